//! Ranks that are processes: calls that are compared and have a limit of time, whatever moves their bytes.

use super::Collective;
use super::call::{Call, Kind};
use super::handshake::{self, Acceptor, Key};
use super::hub::{Hub, Meeting, Member};
use crate::device::Memory;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::mem;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Polls before a rank lets others use its core, and before it sleeps between polls: on a busy machine who sleeps is served
/// sooner than who only yields.
const SPINS: u32 = 200;
const YIELDS: u32 = 100;

/// Sleep between polls, and that of a wait that takes longer than [`PATIENCE`].
const POLL_SLEEP: Duration = Duration::from_micros(20);
const LONG_POLL_SLEEP: Duration = Duration::from_micros(500);
const PATIENCE: Duration = Duration::from_millis(100);

/// What moves bytes between processes. Calls come one at a time, with equally many bytes on every rank; after one that
/// failed there are no more.
pub(super) trait Transport: Send + Sync {
    fn rank(&self) -> usize;

    fn size(&self) -> usize;

    /// Name and version of what moves them.
    fn name(&self) -> &str;

    /// See [`Collective::all_gather`].
    ///
    /// # Errors
    /// When a rank is lost, and those of `waiting`.
    fn all_gather(&self, own: &[u8], all: &mut [u8], waiting: &mut Waiting) -> Result<()>;

    /// See [`Collective::exchange`].
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn exchange(&self, own: &[u8], all: &mut [u8], waiting: &mut Waiting) -> Result<()>;

    /// See [`Collective::all_gather_owned`].
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn all_gather_owned(
        &self,
        own: Memory,
        mut all: Memory,
        waiting: &mut Waiting,
    ) -> Result<[Memory; 2]> {
        self.all_gather(own.bytes(), all.bytes_mut(), waiting)?;
        Ok([own, all])
    }

    /// See [`Collective::exchange_owned`].
    ///
    /// # Errors
    /// As [`all_gather`](Self::all_gather).
    fn exchange_owned(
        &self,
        own: Memory,
        mut all: Memory,
        waiting: &mut Waiting,
    ) -> Result<[Memory; 2]> {
        self.exchange(own.bytes(), all.bytes_mut(), waiting)?;
        Ok([own, all])
    }

    /// The transport of this rank's group of `size` consecutive ranks, which the ranks of `all` make together.
    ///
    /// # Errors
    /// When they cannot be connected within `limit`.
    fn group(
        &self,
        size: usize,
        all: &dyn Collective,
        limit: Duration,
    ) -> Result<Box<dyn Transport>>;

    /// Ends it, once every rank has finished.
    fn finish(&self) {}
}

/// How the hub at rank 0 is reached, where that is known before the ranks have met.
pub(super) struct HubAddress {
    /// On rank 0.
    pub listener: Option<TcpListener>,
    /// Its host.
    pub host: String,
}

/// The rank of this process, among all or in its group.
pub(super) struct Processes {
    transport: Box<dyn Transport>,
    /// Set when all is connected.
    hub: OnceLock<Arc<Hub>>,
    /// Calls that were begun since then.
    calls: AtomicU64,
    /// One call at a time.
    turn: Mutex<()>,
    /// A call was given up: the transport cannot be used any more.
    broken: AtomicBool,
    limit: Duration,
}

/// What rank 0 tells the others before they can connect to it.
#[derive(Serialize, Deserialize)]
struct Place {
    port: u16,
    key: Key,
}

impl Processes {
    /// Connects the ranks of `transport`, this one on `host`. A rank that is silent, or keeps the others waiting, for longer
    /// than
    /// `limit` ends the run.
    ///
    /// # Errors
    /// When they cannot connect.
    pub fn connect(
        transport: Box<dyn Transport>,
        host: String,
        hub: Option<HubAddress>,
        limit: Duration,
    ) -> Result<Self> {
        let processes = Self::new(transport, OnceLock::new(), limit);
        let (rank, size) = (processes.rank(), processes.size());
        let member = Member {
            host,
            pid: std::process::id(),
            cores: cores(),
        };
        let members = processes.gather_json(&member)?;
        let local = members.iter().all(|m| m.host == members[0].host);
        let (listener, host) = match hub {
            Some(hub) => (hub.listener, hub.host),
            None if members[0].host == members[rank].host => (None, "127.0.0.1".into()),
            None => (None, members[0].host.clone()),
        };
        let (mut acceptor, mut place) = (None, None);
        if rank == 0 {
            let listener = listener.map_or_else(|| listen(local), Ok)?;
            let port = listener
                .local_addr()
                .map_err(|e| handshake::broken(&e))?
                .port();
            let key = handshake::random()?;
            place = Some(Place { port, key });
            acceptor = Some(Acceptor::new(listener, key, size)?);
        }
        let places: Vec<Option<Place>> = processes.gather_json(&place)?;
        let meeting = match (acceptor, places.into_iter().next().flatten()) {
            (Some(acceptor), _) => Meeting::Accept(acceptor),
            (None, Some(Place { port, key })) => Meeting::Connect { host, port, key },
            (None, None) => return Err(foreign()),
        };
        let hub = Hub::begin(rank, meeting, members, limit)?;
        let _ = processes.hub.set(hub);
        Ok(processes)
    }

    /// This rank among `size` consecutive ones, which make calls of their own from now on. Every rank calls it; `size` divides
    /// their number.
    ///
    /// # Errors
    /// When the transport refuses.
    pub fn group(&self, size: usize) -> Result<Self> {
        self.barrier()?;
        let transport = self.transport.group(size, self, self.limit)?;
        let hub = OnceLock::new();
        if let Some(all) = self.hub() {
            all.group_by(size);
            let _ = hub.set(all.clone());
        }
        Ok(Self::new(transport, hub, self.limit))
    }

    fn new(transport: Box<dyn Transport>, hub: OnceLock<Arc<Hub>>, limit: Duration) -> Self {
        Processes {
            transport,
            hub,
            calls: AtomicU64::new(0),
            turn: Mutex::new(()),
            broken: AtomicBool::new(false),
            limit,
        }
    }

    fn gather_json<T: Serialize + for<'a> Deserialize<'a>>(&self, own: &T) -> Result<Vec<T>> {
        let text = serde_json::to_vec(own).map_err(|_| foreign())?;
        let all = self.gather_bytes(&text)?;
        let all = all.iter().map(|t| serde_json::from_slice(t));
        all.collect::<Result<_, _>>().map_err(|_| foreign())
    }

    pub fn hub(&self) -> Option<&Arc<Hub>> {
        self.hub.get()
    }

    /// Name and version of what moves the bytes.
    pub fn wire_name(&self) -> &str {
        self.transport.name()
    }

    /// Ends this rank's part after all have finished.
    ///
    /// # Errors
    /// When a rank has left.
    pub fn finish(&self) -> Result<()> {
        self.barrier()?;
        if let Some(hub) = self.hub() {
            hub.finish();
        }
        self.transport.finish();
        Ok(())
    }

    /// A call of `kind`, whose ranks give `count` bytes each: compared, then moved by `run`, which is not called for none.
    fn call(
        &self,
        kind: Kind,
        count: usize,
        run: impl FnOnce(&dyn Transport, &mut Waiting) -> Result<()>,
    ) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.broken.load(Ordering::SeqCst) {
            let reason = self.hub().and_then(|hub| hub.failure());
            return Err(lost(reason.unwrap_or("an earlier call failed")));
        }
        let ordinal = match self.hub() {
            None => 0,
            Some(hub) => {
                hub.enter();
                self.calls.fetch_add(1, Ordering::SeqCst)
            }
        };
        let own = Call::new(ordinal, kind, count);
        let result = self.compare(&own).and_then(|()| match count {
            0 => Ok(()),
            _ => self.waited(run),
        });
        if result.is_err() {
            self.broken.store(true, Ordering::SeqCst);
        }
        if let Some(hub) = self.hub() {
            hub.exit();
        }
        result
    }

    fn compare(&self, own: &Call) -> Result<()> {
        let mut all = vec![0; Call::BYTES * self.size()];
        self.waited(|transport, waiting| transport.all_gather(&own.to_bytes(), &mut all, waiting))?;
        Call::compare(&all).map_err(|e| super::shared(self, e))
    }

    /// Lets the transport move bytes, with a limit of time.
    fn waited(&self, run: impl FnOnce(&dyn Transport, &mut Waiting) -> Result<()>) -> Result<()> {
        let mut waiting = Waiting {
            processes: self,
            begun: Instant::now(),
            polls: 0,
            warnings: 0,
        };
        run(&*self.transport, &mut waiting).map_err(|error| {
            // Where the transport misses a rank first, the hub still knows which one.
            let failure = self
                .hub()
                .and_then(|hub| hub.failure_within(Duration::from_secs(1)));
            failure.map_or(error, lost)
        })
    }

    /// The call has waited for `warnings` times the limit.
    fn late(&self, waited: Duration, warnings: u32) -> Result<()> {
        let patient = match self.hub() {
            None => false,
            Some(hub) => {
                hub.late();
                hub.may_wait_long(self.size()) || warnings < 3
            }
        };
        if patient {
            return Ok(());
        }
        Err(Error::invalid(
            "collective call",
            format!("an answer within {} s", self.limit.as_secs_f64()),
            format!(
                "none in {:.0} s, though all ranks are there",
                waited.as_secs_f64()
            ),
            "check the network between the hosts; --rank-timeout gives more time",
        ))
    }
}

/// How a call waits for the other ranks.
pub(super) struct Waiting<'p> {
    processes: &'p Processes,
    begun: Instant,
    polls: u32,
    warnings: u32,
}

impl Waiting<'_> {
    /// Bytes have moved: the limit of time begins anew.
    pub fn renew(&mut self) {
        (self.begun, self.polls, self.warnings) = (Instant::now(), 0, 0);
    }

    /// Between two polls that found nothing.
    ///
    /// # Errors
    /// When the run ends, or the others are there and the call takes too long.
    pub fn pause(&mut self) -> Result<()> {
        self.polls = self.polls.saturating_add(1);
        if self.polls < SPINS {
            std::hint::spin_loop();
            return Ok(());
        }
        let processes = self.processes;
        if let Some(text) = processes.hub().and_then(|hub| hub.failure()) {
            return Err(lost(text));
        }
        let waited = self.begun.elapsed();
        match self.polls {
            _ if waited > PATIENCE => std::thread::sleep(LONG_POLL_SLEEP),
            p if p < SPINS + YIELDS => std::thread::yield_now(),
            _ => std::thread::sleep(POLL_SLEEP),
        }
        if waited > processes.limit * (self.warnings + 1) {
            self.warnings += 1;
            processes.late(waited, self.warnings)?;
        }
        Ok(())
    }
}

/// What stands for buffers while a transport has them.
fn no_buffers() -> [Memory; 2] {
    [Memory::unspecified(0), Memory::unspecified(0)]
}

/// A port for heartbeats, for connections of this host alone if all ranks are `local`.
fn listen(local: bool) -> Result<TcpListener> {
    let address = match local {
        true => Ipv4Addr::LOCALHOST,
        false => Ipv4Addr::UNSPECIFIED,
    };
    TcpListener::bind((address, 0)).map_err(|e| {
        let help = "check the network of rank 0's host";
        Error::invalid("ranks", "a TCP port for heartbeats", e.to_string(), help)
    })
}

/// Names the run's failure; the rank that reports it says the same.
fn lost(text: &str) -> Error {
    Error::Ranks {
        text: text.into(),
        cause: None,
    }
}

fn foreign() -> Error {
    let help = "start every rank with the same program";
    Error::invalid("ranks", "ranks of this program", "others", help)
}

/// The cores that this process may use, as `/proc` lists them.
fn cores() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
    line.unwrap_or_default().trim().to_string()
}

impl Collective for Processes {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn size(&self) -> usize {
        self.transport.size()
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        if self.size() == 1 {
            all.copy_from_slice(own);
            return Ok(());
        }
        self.call(Kind::AllGather, own.len(), |transport, waiting| {
            transport.all_gather(own, all, waiting)
        })
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        self.call(Kind::Exchange, own.len(), |transport, waiting| {
            transport.exchange(own, all, waiting)
        })
    }

    fn all_gather_owned(&self, own: Memory, all: Memory) -> Result<[Memory; 2]> {
        let (count, mut buffers) = (own.bytes().len(), [own, all]);
        self.call(Kind::AllGather, count, |transport, waiting| {
            let [own, all] = mem::replace(&mut buffers, no_buffers());
            buffers = transport.all_gather_owned(own, all, waiting)?;
            Ok(())
        })?;
        Ok(buffers)
    }

    fn exchange_owned(&self, own: Memory, all: Memory) -> Result<[Memory; 2]> {
        let (count, mut buffers) = (own.bytes().len(), [own, all]);
        self.call(Kind::Exchange, count, |transport, waiting| {
            let [own, all] = mem::replace(&mut buffers, no_buffers());
            buffers = transport.exchange_owned(own, all, waiting)?;
            Ok(())
        })?;
        Ok(buffers)
    }

    fn failure_within(&self, most: Duration) -> Option<String> {
        self.hub()?.failure_within(most).map(String::from)
    }

    fn leave(&self, why: &str) {
        if let Some(hub) = self.hub() {
            hub.leave(why);
        }
    }

    fn begin_device_step(&self) {
        if let Some(hub) = self.hub() {
            hub.begin_device_step();
        }
    }

    fn await_device(&self, waiting: bool) {
        if let Some(hub) = self.hub() {
            hub.await_device(waiting);
        }
    }
}
