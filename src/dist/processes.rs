//! Ranks that are processes. Their calls are compared and have a time limit, with any transport.

use super::call::{Call, Kind};
use super::handshake::{self, Acceptor, Key};
use super::hub::{Hub, Meeting, Member, ranks_per_node};
use super::{Collective, lost};
use crate::device::Memory;
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::mem;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Number of polls before a rank yields its core, and number of further polls before it sleeps between polls. On a busy
/// machine, a thread that sleeps gets a core sooner than a thread that only yields.
const SPINS: u32 = 200;
const YIELDS: u32 = 100;

/// Sleep between polls, and sleep in a wait that takes longer than [`PATIENCE`].
const POLL_SLEEP: Duration = Duration::from_micros(20);
const LONG_POLL_SLEEP: Duration = Duration::from_micros(500);
const PATIENCE: Duration = Duration::from_millis(100);

/// The two ways in which a [`Transport`] moves bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Transfer {
    /// See [`Collective::all_gather`].
    AllGather,
    /// See [`Collective::exchange`].
    Exchange,
}

impl From<Transfer> for Kind {
    fn from(transfer: Transfer) -> Self {
        match transfer {
            Transfer::AllGather => Kind::AllGather,
            Transfer::Exchange => Kind::Exchange,
        }
    }
}

/// Transfers bytes between processes. Calls are made one at a time, with the same number of bytes on every rank; after
/// a failed call there are no further calls.
pub(super) trait Transport: Send + Sync {
    fn rank(&self) -> usize;

    fn size(&self) -> usize;

    /// Returns the name and version of the transport.
    fn name(&self) -> &str;

    /// See [`Collective::all_gather`] and [`Collective::exchange`].
    ///
    /// # Errors
    /// Returns an error when a rank is lost, and the errors of `waiting`.
    fn transfer(
        &self,
        kind: Transfer,
        own: &[u8],
        all: &mut [u8],
        waiting: &mut Waiting,
    ) -> Result<()>;

    /// See [`Collective::all_gather_owned`].
    ///
    /// # Errors
    /// Returns the errors of [`transfer`](Self::transfer).
    fn transfer_owned(
        &self,
        kind: Transfer,
        own: Memory,
        mut all: Memory,
        waiting: &mut Waiting,
    ) -> Result<[Memory; 2]> {
        self.transfer(kind, own.bytes(), all.bytes_mut(), waiting)?;
        Ok([own, all])
    }

    /// Returns the transport of this rank's group of `size` consecutive ranks. All ranks of `all` call it.
    ///
    /// # Errors
    /// Returns an error when the ranks cannot be connected within `limit`.
    fn group(
        &self,
        size: usize,
        all: &dyn Collective,
        limit: Duration,
    ) -> Result<Box<dyn Transport>>;

    /// Ends the transport after every rank has finished.
    fn finish(&self) {}
}

/// The address of the hub on rank 0, if it is known before the ranks are connected.
pub(super) struct HubAddress {
    /// The listener, on rank 0 only.
    pub listener: Option<TcpListener>,
    /// The host of rank 0.
    pub host: String,
}

/// The rank of this process, among all ranks or in its group.
pub(super) struct Processes {
    transport: Box<dyn Transport>,
    /// Set when the ranks are connected.
    hub: OnceLock<Arc<Hub>>,
    /// Number of calls that were begun since then.
    calls: AtomicU64,
    /// Held during a call: calls are made one at a time.
    turn: Mutex<()>,
    /// Whether a call has failed. The transport cannot be used after that.
    broken: AtomicBool,
    limit: Duration,
    /// See [`Collective::ranks_per_node`].
    ranks_per_node: usize,
}

/// What the other ranks need to know to connect to rank 0.
#[derive(Serialize, Deserialize)]
struct Place {
    port: u16,
    key: Key,
}

impl Processes {
    /// Connects the ranks of `transport`; this rank runs on the given host and node (see [`Member`]). The run ends if a
    /// rank is silent or keeps the others waiting for longer than `limit`.
    ///
    /// # Errors
    /// Returns an error when the ranks cannot connect.
    pub fn connect(
        transport: Box<dyn Transport>,
        [host, node]: [String; 2],
        hub: Option<HubAddress>,
        limit: Duration,
    ) -> Result<Self> {
        let mut processes = Self::new(transport, OnceLock::new(), limit);
        let (rank, size) = (processes.rank(), processes.size());
        let member = Member {
            host,
            node,
            pid: std::process::id(),
            cores: cores(),
        };
        let members = gather_json(&processes, &member)?;
        processes.ranks_per_node = ranks_per_node(&members);
        let local = members.iter().all(|m| m.host == members[0].host);
        let (listener, host) = match hub {
            Some(hub) => (hub.listener, hub.host),
            None if members[0].host == members[rank].host => (None, "127.0.0.1".into()),
            None => (None, members[0].host.clone()),
        };
        let (mut acceptor, mut place) = (None, None);
        if rank == 0 {
            let listener = listener.map_or_else(|| listen(local), Ok)?;
            let address = listener.local_addr().map_err(|e| handshake::broken(&e))?;
            let port = address.port();
            let key = handshake::random()?;
            place = Some(Place { port, key });
            acceptor = Some(Acceptor::new(listener, key, size)?);
        }
        let places: Vec<Option<Place>> = gather_json(&processes, &place)?;
        let meeting = match (acceptor, places.into_iter().next().flatten()) {
            (Some(acceptor), _) => Meeting::Accept(acceptor),
            (None, Some(Place { port, key })) => Meeting::Connect { host, port, key },
            (None, None) => return Err(foreign()),
        };
        let hub = Hub::begin(rank, meeting, members, limit)?;
        let _ = processes.hub.set(hub);
        Ok(processes)
    }

    /// Returns this rank as a member of its group of `size` consecutive ranks, which make calls among themselves. Every
    /// rank calls it; `size` divides the number of ranks.
    ///
    /// # Errors
    /// Returns an error when the transport cannot connect the group.
    pub fn group(&self, size: usize) -> Result<Self> {
        self.barrier()?;
        let transport = self.transport.group(size, self, self.limit)?;
        let hub = OnceLock::new();
        if let Some(all) = self.hub() {
            all.group_by(size);
            let _ = hub.set(all.clone());
        }
        let mut group = Self::new(transport, hub, self.limit);
        if size % self.ranks_per_node == 0 {
            group.ranks_per_node = self.ranks_per_node;
        }
        Ok(group)
    }

    fn new(transport: Box<dyn Transport>, hub: OnceLock<Arc<Hub>>, limit: Duration) -> Self {
        Processes {
            ranks_per_node: transport.size(),
            transport,
            hub,
            calls: AtomicU64::new(0),
            turn: Mutex::new(()),
            broken: AtomicBool::new(false),
            limit,
        }
    }

    pub fn hub(&self) -> Option<&Arc<Hub>> {
        self.hub.get()
    }

    /// Returns the name and version of the transport.
    pub fn wire_name(&self) -> &str {
        self.transport.name()
    }

    /// Waits until all ranks have finished, and ends this rank's part.
    ///
    /// # Errors
    /// Returns an error when a rank has left.
    pub fn finish(&self) -> Result<()> {
        self.barrier()?;
        if let Some(hub) = self.hub() {
            hub.finish();
        }
        self.transport.finish();
        Ok(())
    }

    /// Makes a call of `kind`, to which each rank gives `count` bytes: compares it between the ranks, then transfers
    /// the bytes with `run`. If `count` is 0, `run` is not called.
    fn call(
        &self,
        kind: Transfer,
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
        let own = Call::new(ordinal, kind.into(), count);
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

    /// The same for buffers that the transport owns during the call.
    fn call_owned(&self, kind: Transfer, own: Memory, all: Memory) -> Result<[Memory; 2]> {
        let (count, mut buffers) = (own.bytes().len(), [own, all]);
        self.call(kind, count, |transport, waiting| {
            let [own, all] = mem::replace(&mut buffers, no_buffers());
            buffers = transport.transfer_owned(kind, own, all, waiting)?;
            Ok(())
        })?;
        Ok(buffers)
    }

    fn compare(&self, own: &Call) -> Result<()> {
        let mut all = vec![0; Call::BYTES * self.size()];
        let own = own.to_bytes();
        self.waited(|transport, waiting| {
            transport.transfer(Transfer::AllGather, &own, &mut all, waiting)
        })?;
        Call::compare(&all).map_err(|e| super::shared(self, e))
    }

    /// Transfers bytes with a time limit.
    fn waited(&self, run: impl FnOnce(&dyn Transport, &mut Waiting) -> Result<()>) -> Result<()> {
        let mut waiting = Waiting {
            processes: self,
            begun: Instant::now(),
            polls: 0,
            warnings: 0,
        };
        run(&*self.transport, &mut waiting).map_err(|error| {
            // The transport may notice a lost rank first; the hub then finds out which one it is.
            let failure = self.failure_within(Duration::from_secs(1));
            failure.map_or(error, lost)
        })
    }

    /// Decides what to do when a call has waited for `warnings` times the limit.
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
        let (limit, waited) = (self.limit.as_secs_f64(), waited.as_secs_f64());
        Err(Error::invalid(
            "collective call",
            format!("an answer within {limit} s"),
            format!("none in {waited:.0} s, although all ranks are alive"),
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
    /// Starts the time limit again, after bytes were transferred.
    pub fn renew(&mut self) {
        (self.begun, self.polls, self.warnings) = (Instant::now(), 0, 0);
    }

    /// Pauses between two polls that transferred nothing.
    ///
    /// # Errors
    /// Returns an error when the run ends, or the call takes too long although all ranks are alive.
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

/// Returns empty buffers, in place of buffers that a transport has taken.
fn no_buffers() -> [Memory; 2] {
    [Memory::unspecified(0), Memory::unspecified(0)]
}

/// Opens a port for heartbeats; if all ranks are `local`, only this host can connect to it.
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

/// Returns the values of all ranks, rank 0 first.
pub(super) fn gather_json<T: Serialize + DeserializeOwned>(
    dist: &dyn Collective,
    own: &T,
) -> Result<Vec<T>> {
    let text = serde_json::to_vec(own).map_err(|_| foreign())?;
    let all = dist.gather_bytes(&text)?;
    let all = all.iter().map(|t| serde_json::from_slice(t));
    all.collect::<Result<_, _>>().map_err(|_| foreign())
}

pub(super) fn foreign() -> Error {
    let help = "start every rank with the same program";
    Error::invalid("ranks", "ranks of this program", "others", help)
}

/// Returns the cores that this process may use, as `/proc` lists them.
fn cores() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let line = lines.find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
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
        self.call(Transfer::AllGather, own.len(), |transport, waiting| {
            transport.transfer(Transfer::AllGather, own, all, waiting)
        })
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        self.call(Transfer::Exchange, own.len(), |transport, waiting| {
            transport.transfer(Transfer::Exchange, own, all, waiting)
        })
    }

    fn all_gather_owned(&self, own: Memory, all: Memory) -> Result<[Memory; 2]> {
        self.call_owned(Transfer::AllGather, own, all)
    }

    fn exchange_owned(&self, own: Memory, all: Memory) -> Result<[Memory; 2]> {
        self.call_owned(Transfer::Exchange, own, all)
    }

    fn failure_within(&self, most: Duration) -> Option<String> {
        self.hub()?.failure_within(most).map(String::from)
    }

    fn leave(&self, why: &str) {
        if let Some(hub) = self.hub() {
            hub.leave(why);
        }
    }

    fn ranks_per_node(&self) -> usize {
        self.ranks_per_node
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
