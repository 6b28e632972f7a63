//! Who is still there. Each rank holds one TCP line to the hub at rank 0, and both ends send heartbeats that carry what
//! their rank is doing. A line that closes or falls silent, and an error of a rank, end the run on all ranks, with one
//! message of one rank.

mod line; // messages on a TCP line
mod member;

use super::activity::Activity;
use crate::error::Error;
use crate::report::stderr_line;
use line::{Line, Message};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub(super) use line::Meeting;
pub(super) use member::Member;

/// A process that has not ended so long after the run failed is ended.
const GRACE: Duration = Duration::from_secs(2);

/// Time for the rank that reports a failure to do so, before the launcher sees another rank end.
const HEAD_START: Duration = Duration::from_secs(1);

/// The longest time between two heartbeats.
const BEAT: Duration = Duration::from_millis(500);

/// A device that has not finished a step after so many more limits of time hangs, whichever rank's it is.
const DEVICE_WARNINGS: u32 = 9;

/// A heartbeat that should have come, but for the scheduling of a busy machine.
const LATE_BEATS: u32 = 4;

/// What a rank was last heard to do.
#[derive(Clone, Debug)]
struct State {
    /// Calls that it has begun.
    calls: u64,
    /// Whether it is in the last of them.
    inside: bool,
    activity: Activity,
    heard: Instant,
    done: bool,
}

/// Why the run ends.
struct Failure {
    text: String,
    /// The rank that says so.
    reporter: usize,
}

/// This rank's end of the lines.
pub(super) struct Hub {
    rank: usize,
    members: Vec<Member>,
    /// How long a rank may be silent, or keep the others waiting.
    limit: Duration,
    lines: Vec<Line>,
    states: Mutex<Vec<State>>,
    /// Ranks of a group: consecutive ones, which call one another alone.
    group_size: AtomicUsize,
    calls: AtomicU64,
    inside: AtomicBool,
    /// Since when the host waits for its device.
    device_since: Mutex<Option<Instant>>,
    failure: OnceLock<Failure>,
    reported: AtomicBool,
    done: AtomicBool,
    /// The line to the rank that reports has closed.
    released: AtomicBool,
}

impl Hub {
    /// Connects the ranks, and begins to listen and to send heartbeats.
    ///
    /// # Errors
    /// When a rank does not connect within `limit`.
    pub fn begin(
        rank: usize,
        meeting: Meeting,
        members: Vec<Member>,
        limit: Duration,
    ) -> Result<Arc<Self>, Error> {
        let lines = meeting.connect(rank, members.len(), limit)?;
        let state = State {
            calls: 0,
            inside: false,
            activity: Activity::default(),
            heard: Instant::now(),
            done: false,
        };
        let hub = Arc::new(Hub {
            rank,
            limit,
            lines,
            states: Mutex::new(vec![state; members.len()]),
            group_size: AtomicUsize::new(members.len()),
            members,
            calls: AtomicU64::new(0),
            inside: AtomicBool::new(false),
            device_since: Mutex::new(None),
            failure: OnceLock::new(),
            reported: AtomicBool::new(false),
            done: AtomicBool::new(false),
            released: AtomicBool::new(false),
        });
        for (i, line) in hub.lines.iter().enumerate() {
            let (hub, reader) = (hub.clone(), line.reader()?);
            spawn("hub", move || {
                let peer = hub.lines[i].peer;
                reader.each(|message| hub.receive(peer, message));
                hub.closed(peer);
            })?;
        }
        let beating = hub.clone();
        spawn("heartbeat", move || beating.beat())?;
        Ok(hub)
    }

    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// From now on ranks call only those of their group, `size` consecutive ranks.
    pub fn group_by(&self, size: usize) {
        self.group_size.store(size, Ordering::SeqCst);
    }

    /// The ranks of the group of `rank`.
    fn group(&self, rank: usize) -> Range<usize> {
        let size = self.group_size.load(Ordering::SeqCst);
        let first = rank / size * size;
        first..first + size
    }

    /// Counts a call that this rank begins.
    pub fn enter(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.inside.store(true, Ordering::SeqCst);
    }

    /// The call is over.
    pub fn exit(&self) {
        let mut since = self.device_since();
        // Within a step of the device it shows that the step goes on.
        *since = since.map(|_| Instant::now());
        self.inside.store(since.is_some(), Ordering::SeqCst);
    }

    /// Counts a step of the device as a call that this rank begins: it waits for those of other ranks.
    pub fn begin_device_step(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
    }

    /// The host begins or ends to wait for its device.
    pub fn await_device(&self, waiting: bool) {
        *self.device_since() = waiting.then(Instant::now);
        self.inside.store(waiting, Ordering::SeqCst);
    }

    fn device_since(&self) -> MutexGuard<'_, Option<Instant>> {
        let since = self.device_since.lock();
        since.unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the run ends, if it does within `most`.
    pub fn failure_within(&self, most: Duration) -> Option<&str> {
        self.wait_until(most, || self.failure.get().is_some());
        self.failure()
    }

    /// Why the run ends, if it does.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(|f| f.text.as_str())
    }

    /// Says that this rank's call has taken longer than the limit. The hub decides whether a rank is to blame.
    pub fn late(self: &Arc<Self>) {
        let call = self.calls.load(Ordering::SeqCst);
        match self.rank {
            0 => self.verify(0, call),
            _ => self.send(&Message::Late { call }),
        }
    }

    /// Whether a call between `size` ranks may take any time: one of the group works alone, or it is a call of all while other
    /// groups still have work.
    pub fn may_wait_long(&self, size: usize) -> bool {
        let between_groups = size > self.group_size.load(Ordering::SeqCst);
        let alone = |rank: usize| match rank == self.rank {
            true => Activity::of_process().alone,
            false => self.states()[rank].activity.alone,
        };
        between_groups || self.group(self.rank).any(alone)
    }

    /// Ends the run on all ranks because of this one.
    pub fn leave(self: &Arc<Self>, why: &str) {
        match self.rank {
            0 => self.fail(0, 0, "failed", why),
            _ => {
                let why = why.to_string();
                self.send(&Message::Failed { why });
                self.wait_until(GRACE, || self.failure.get().is_some());
            }
        }
    }

    /// Whether this rank is to report an error that all ranks met alike. Otherwise returns when another one had the time to
    /// do so.
    pub fn reports_common(&self) -> bool {
        if self.failure.get().is_some() {
            return self.reports();
        }
        self.finish();
        if self.rank != 0 {
            self.wait_until(HEAD_START, || self.released.load(Ordering::SeqCst));
        }
        self.rank == 0
    }

    /// The same of the failure that ends the run.
    pub fn reports(&self) -> bool {
        match self.failure.get() {
            Some(failure) if failure.reporter != self.rank => {
                self.wait_until(HEAD_START, || self.released.load(Ordering::SeqCst));
                false
            }
            // Without a word from the hub the rank speaks for itself.
            _ => !self.reported.swap(true, Ordering::SeqCst),
        }
    }

    /// All ranks have finished: lines that close from now on are no failures.
    pub fn finish(&self) {
        self.done.store(true, Ordering::SeqCst);
        self.send(&Message::Done);
    }

    fn wait_until(&self, most: Duration, condition: impl Fn() -> bool) {
        let begun = Instant::now();
        while !condition() && begun.elapsed() < most {
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: &Message) {
        self.lines.iter().for_each(|line| line.send(message));
    }

    fn own_state(&self) -> State {
        State {
            calls: self.calls.load(Ordering::SeqCst),
            inside: self.inside.load(Ordering::SeqCst),
            activity: Activity::of_process(),
            heard: Instant::now(),
            done: self.done.load(Ordering::SeqCst),
        }
    }

    fn receive(self: &Arc<Self>, from: usize, message: Message) {
        let mut states = self.states();
        let state = &mut states[from];
        state.heard = Instant::now();
        match message {
            Message::Beat {
                calls,
                inside,
                what,
                alone,
                others_alone,
            } => {
                (state.calls, state.inside) = (calls, inside);
                state.activity = Activity { what, alone };
                // Only rank 0 hears all ranks.
                if from == 0 {
                    for (rank, state) in states.iter_mut().enumerate().skip(1) {
                        state.activity.alone = others_alone.contains(&rank);
                    }
                }
            }
            Message::Done => state.done = true,
            Message::Late { call } => {
                drop(states);
                self.verify(from, call);
            }
            Message::Failed { why } => {
                drop(states);
                self.fail(from, 0, "failed", &why);
            }
            Message::End { text, reporter } => {
                drop(states);
                self.end(Failure { text, reporter }, false);
            }
        }
    }

    fn closed(self: &Arc<Self>, peer: usize) {
        let reporter = self.failure.get().map_or(0, |f| f.reporter);
        if peer == reporter {
            self.released.store(true, Ordering::SeqCst);
        }
        let done = self.done.load(Ordering::SeqCst) || self.states()[peer].done;
        if !done {
            self.fail(peer, self.next_reporter(peer), "ended", "");
        }
    }

    /// Who reports that `lost` is lost: rank 0, or rank 1 where it is rank 0.
    fn next_reporter(&self, lost: usize) -> usize {
        usize::from(lost == 0)
    }

    /// Heartbeats, and the silence of others.
    fn beat(self: &Arc<Self>) {
        let interval = BEAT.min(self.limit / 10);
        let (mut last, mut warnings) = (Instant::now(), 0);
        while !self.done.load(Ordering::SeqCst) {
            // A process that was itself stopped has heard of nobody meanwhile.
            if last.elapsed() > interval * LATE_BEATS {
                let now = Instant::now();
                self.states().iter_mut().for_each(|state| state.heard = now);
            }
            last = Instant::now();
            let own = self.own_state();
            let alone = |(rank, state): (usize, &State)| state.activity.alone.then_some(rank);
            let others_alone = match self.rank {
                0 => self.states().iter().enumerate().filter_map(alone).collect(),
                _ => Vec::new(),
            };
            self.send(&Message::Beat {
                calls: own.calls,
                inside: own.inside,
                what: own.activity.what,
                alone: own.activity.alone,
                others_alone,
            });
            let silent = self.lines.iter().map(|line| line.peer).find(|peer| {
                let state = &self.states()[*peer];
                !state.done && state.heard.elapsed() > self.limit
            });
            if let Some(peer) = silent {
                let seconds = self.limit.as_secs_f64();
                let event = format!("has not been heard of for {seconds} s, and was last");
                self.fail(peer, self.next_reporter(peer), &event, "");
            }
            warnings = self.watch_device(warnings);
            thread::sleep(interval);
        }
    }

    /// Looks for a wait for the device that takes longer than the limit, of which `warnings` were given: so many now.
    fn watch_device(self: &Arc<Self>, warnings: u32) -> u32 {
        let since = *self.device_since();
        let Some(waited) = since.map(|since| since.elapsed()) else {
            return 0;
        };
        if waited <= self.limit * (warnings + 1) {
            return warnings;
        }
        self.late();
        let patient = self.may_wait_long(self.group(self.rank).len());
        if warnings >= DEVICE_WARNINGS && !patient && self.failure().is_none() {
            let seconds = waited.as_secs_f64();
            self.leave(&format!(
                "its device has not finished a step in {seconds:.0} s, though all ranks are there; --rank-timeout gives more time"
            ));
        }
        warnings + 1
    }

    /// Ends the run if a rank keeps `waiting` and its group waiting for call number `call` (of those begun).
    fn verify(self: &Arc<Self>, waiting: usize, call: u64) {
        let mut states = self.states().clone();
        states[0] = self.own_state();
        let silence = LATE_BEATS * BEAT.min(self.limit / 10);
        let behind = |s: &State| {
            let missing = s.calls < call || s.calls == call && !s.inside;
            !s.done && !s.activity.alone && (missing || s.heard.elapsed() > silence)
        };
        let silent = |s: &State| s.heard.elapsed() > silence;
        let group = self.group(waiting);
        let laggards = states
            .iter()
            .enumerate()
            .filter(|(r, s)| group.contains(r) && behind(s));
        let Some((rank, _)) = laggards.min_by_key(|(_, s)| (!silent(s), s.calls)) else {
            return;
        };
        let seconds = self.limit.as_secs_f64();
        let event = format!("has kept the others waiting for {seconds} s, and was last");
        self.fail(rank, self.next_reporter(rank), &event, "");
    }

    fn fail(self: &Arc<Self>, rank: usize, reporter: usize, event: &str, why: &str) {
        let state = match rank == self.rank {
            true => self.own_state(),
            false => self.states()[rank].clone(),
        };
        let Member { host, pid, .. } = &self.members[rank];
        let what = match state.activity.what.as_str() {
            "" => String::new(),
            what => format!(", {what}"),
        };
        let why = match why {
            "" => "; what was saved before stays".into(),
            why => format!(": {why}"),
        };
        let calls = state.calls;
        let failure = Failure {
            text: format!("rank {rank} ({host}, process {pid}) {event} at call {calls}{what}{why}"),
            reporter,
        };
        self.end(failure, rank == self.rank);
    }

    fn report(&self) {
        let text = self.failure().unwrap_or_default();
        stderr_line(&format!("error: {text}"));
    }

    /// Ends the run: the first failure counts. An `own` error is reported where it is handled.
    fn end(self: &Arc<Self>, failure: Failure, own: bool) {
        let message = Message::End {
            text: failure.text.clone(),
            reporter: failure.reporter,
        };
        if self.failure.set(failure).is_err() {
            return;
        }
        // At once: a launcher may end this process as soon as it sees the lost one.
        let reports = self.failure.get().is_some_and(|f| f.reporter == self.rank);
        if reports && !own && !self.reported.swap(true, Ordering::SeqCst) {
            self.report();
        }
        if self.rank == 0 {
            self.send(&message);
        }
        let hub = self.clone();
        // The rank may be in the middle of something long, or wait for a lost rank inside the library.
        let ending = spawn("end", move || {
            thread::sleep(GRACE);
            if hub.reports() {
                hub.report();
            }
            signal_hook::low_level::exit(1);
        });
        if ending.is_err() {
            signal_hook::low_level::exit(1);
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = thread::Builder::new().name(name.into()).spawn(run);
    thread.map(drop).map_err(|e| {
        let help = "raise the limit of threads (ulimit -u), or end other programs";
        Error::invalid("ranks", "a thread for heartbeats", e.to_string(), help)
    })
}
