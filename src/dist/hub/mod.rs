//! Detects lost ranks. Each rank has one TCP connection to the hub on rank 0, and both ends send heartbeats that say
//! what their rank is doing. If a connection is closed or silent, or a rank has an error, the run ends on all ranks,
//! and one rank prints one message.

mod line; // messages on a TCP connection
mod member;

use super::activity::Activity;
use crate::error::Error;
use crate::report::stderr_line;
use line::{LONGEST_REASON, Line, Message};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub(super) use line::Meeting;
pub(super) use member::{Member, ranks_per_node};

/// A process that still runs this long after the run failed is ended.
const GRACE: Duration = Duration::from_secs(2);

/// Time for the reporting rank to print a failure, before the launcher notices that another rank has ended.
const HEAD_START: Duration = Duration::from_secs(1);

/// The longest time between two heartbeats.
const BEAT: Duration = Duration::from_millis(500);

/// After this many further time limits, a device that has not finished its step counts as hung, even if the rank at
/// fault is not known.
const DEVICE_WARNINGS: u32 = 9;

/// A rank counts as silent after this many heartbeat intervals; on a busy machine one heartbeat may be late.
const LATE_BEATS: u32 = 4;

/// What the last heartbeat of a rank said.
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
    /// The rank that prints it.
    reporter: usize,
}

/// The heartbeats of this rank, and its connections to other ranks.
pub(super) struct Hub {
    rank: usize,
    members: Vec<Member>,
    /// How long a rank may be silent, or keep the others waiting.
    limit: Duration,
    lines: Vec<Line>,
    states: Mutex<Vec<State>>,
    /// Number of ranks in a group. A group has consecutive ranks, which make calls only among themselves.
    group_size: AtomicUsize,
    calls: AtomicU64,
    inside: AtomicBool,
    /// When the host started to wait for its device, if it waits.
    device_since: Mutex<Option<Instant>>,
    failure: OnceLock<Failure>,
    reported: AtomicBool,
    done: AtomicBool,
    /// Whether the connection to the rank that reports the failure has closed.
    released: AtomicBool,
}

impl Hub {
    /// Connects the ranks, and begins to listen and to send heartbeats.
    ///
    /// # Errors
    /// Returns an error when a rank does not connect within `limit`.
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

    /// Divides the ranks into groups of `size` consecutive ranks; from now on ranks make calls only within their group.
    pub fn group_by(&self, size: usize) {
        self.group_size.store(size, Ordering::SeqCst);
    }

    /// Returns the ranks of the group of `rank`.
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

    /// Records that the call has ended.
    pub fn exit(&self) {
        let mut since = self.device_since();
        // During a step of the device, the call shows that the step makes progress.
        *since = since.map(|_| Instant::now());
        self.inside.store(since.is_some(), Ordering::SeqCst);
    }

    /// Counts a step of the device as a call that this rank begins, because it waits for the steps of other ranks.
    pub fn begin_device_step(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
    }

    /// Records that the host starts or ends waiting for its device.
    pub fn await_device(&self, waiting: bool) {
        *self.device_since() = waiting.then(Instant::now);
        self.inside.store(waiting, Ordering::SeqCst);
    }

    fn device_since(&self) -> MutexGuard<'_, Option<Instant>> {
        let since = self.device_since.lock();
        since.unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns why the run ends, if it ends within `most`.
    pub fn failure_within(&self, most: Duration) -> Option<&str> {
        self.wait_until(most, || self.failure.get().is_some());
        self.failure()
    }

    /// Returns why the run ends, if it ends.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(|f| f.text.as_str())
    }

    /// Reports that the call of this rank has taken longer than the limit. The hub decides whether a rank causes this.
    pub fn late(self: &Arc<Self>) {
        let call = self.calls.load(Ordering::SeqCst);
        match self.rank {
            0 => self.verify(0, call),
            _ => self.send(&Message::Late { call }),
        }
    }

    /// Whether a call between `size` ranks has no time limit: a rank of the group works alone, or the call is between
    /// all groups and other groups may still have work.
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
        let why: String = why.chars().take(LONGEST_REASON).collect();
        match self.rank {
            0 => self.fail(0, 0, "failed", &why),
            _ => {
                self.send(&Message::Failed { why });
                self.wait_until(GRACE, || self.failure.get().is_some());
            }
        }
    }

    /// Whether this rank must report an error that all ranks got. On the other ranks it returns after the reporting
    /// rank has had time to print.
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

    /// Whether this rank must report the failure that ends the run. On the other ranks it returns after the reporting
    /// rank has had time to print.
    pub fn reports(&self) -> bool {
        match self.failure.get() {
            Some(failure) if failure.reporter != self.rank => {
                self.wait_until(HEAD_START, || self.released.load(Ordering::SeqCst));
                false
            }
            // Without a failure from the hub, the rank reports its own error.
            _ => !self.reported.swap(true, Ordering::SeqCst),
        }
    }

    /// Records that all ranks have finished: a connection that closes from now on is not a failure.
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
                // Only rank 0 receives the heartbeats of all ranks.
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

    /// Returns the rank that reports the loss of rank `lost`: rank 0, or rank 1 if rank 0 is lost.
    fn next_reporter(&self, lost: usize) -> usize {
        usize::from(lost == 0)
    }

    /// Sends heartbeats and detects silent ranks, until the run ends.
    fn beat(self: &Arc<Self>) {
        let interval = BEAT.min(self.limit / 10);
        let (mut last, mut warnings) = (Instant::now(), 0);
        while !self.done.load(Ordering::SeqCst) {
            // If this process itself was stopped, it received no heartbeats during that time.
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
                let event = format!("has sent no heartbeat for {seconds} s, and was last");
                self.fail(peer, self.next_reporter(peer), &event, "");
            }
            warnings = self.watch_device(warnings);
            thread::sleep(interval);
        }
    }

    /// Checks whether a wait for the device takes longer than the limit. Takes the number of warnings so far, and
    /// returns the new number.
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
                "its device has not finished a step in {seconds:.0} s, although all ranks are alive; --rank-timeout gives more time"
            ));
        }
        warnings + 1
    }

    /// Ends the run if a rank keeps rank `waiting` and its group waiting in the call with number `call`, counted from
    /// 1.
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
            "" => "; everything saved so far is kept".into(),
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

    /// Ends the run with this failure, unless an earlier failure has ended it. An `own` error of this rank is reported
    /// where it is handled.
    fn end(self: &Arc<Self>, failure: Failure, own: bool) {
        let message = Message::End {
            text: failure.text.clone(),
            reporter: failure.reporter,
        };
        if self.failure.set(failure).is_err() {
            return;
        }
        // Reports at once: a launcher may end this process as soon as it notices the lost one.
        let reports = self.failure.get().is_some_and(|f| f.reporter == self.rank);
        if reports && !own && !self.reported.swap(true, Ordering::SeqCst) {
            self.report();
        }
        if self.rank == 0 {
            self.send(&message);
        }
        let hub = self.clone();
        // The rank may be in a long computation, or wait for a lost rank inside a library.
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
    let error = |e| Error::thread("ranks", "a thread for heartbeats", &e);
    thread.map(drop).map_err(error)
}
