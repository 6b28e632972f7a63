//! Ranks that are processes, and exchange bytes by MPI.
//!
//! Calls are non-blocking and polled, so that a lost rank ends them with an error. MPI may write to the buffers of a call
//! that was given up; they are therefore this module's own, and are never freed then.

pub(super) mod library;

use super::Collective;
use super::call::{Call, Kind};
use super::hub::{Hub, Meeting, Member};
use crate::error::{Error, Result};
use library::{Library, Request};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that a rank gives to MPI at a time, at most; on several ranks less, so that all of a call stay below 2^30.
const PIECE: usize = 8 << 20;

/// Polls before a rank lets others use its core, and before it sleeps between polls: on a busy machine who sleeps is served
/// sooner than who only yields.
const SPINS: u32 = 200;
const YIELDS: u32 = 100;

/// Sleep between polls, and that of a wait that takes longer than [`PATIENCE`].
const NAP: Duration = Duration::from_micros(20);
const LONG_NAP: Duration = Duration::from_micros(500);
const PATIENCE: Duration = Duration::from_millis(100);

/// The rank of this process, among all or in its group.
pub(super) struct Mpi {
    library: Library,
    /// Set when all is connected.
    hub: OnceLock<Arc<Hub>>,
    /// Calls that were begun since then.
    calls: AtomicU64,
    buffers: Mutex<Buffers>,
    /// A call was given up: MPI cannot be used any more.
    broken: AtomicBool,
    limit: Duration,
}

/// What MPI reads and writes.
#[derive(Default)]
struct Buffers {
    own: Vec<u8>,
    all: Vec<u8>,
}

/// What rank 0 tells the others before they can connect to it.
#[derive(Serialize, Deserialize)]
struct Place {
    port: u16,
    token: String,
}

impl Mpi {
    /// Initialises MPI and connects the ranks. A rank that is silent, or keeps the others waiting, for longer than `limit`
    /// ends the run.
    ///
    /// # Errors
    /// When the library is missing or refuses, or ranks cannot connect.
    pub fn start(names: &[String], limit: Duration) -> Result<Self> {
        let mpi = Self::new(Library::start(names)?, OnceLock::new(), limit);
        let member = Member {
            host: mpi.library.host.clone(),
            pid: std::process::id(),
            cores: cores(),
        };
        let members = mpi.gather_json(&member)?;
        let local = members.iter().all(|m| m.host == members[0].host);
        let hosting = match mpi.rank() {
            0 => Some(Meeting::host(local)?),
            _ => None,
        };
        let place = hosting.as_ref().map(|m| Place {
            port: m.port,
            token: m.token.clone(),
        });
        let places: Vec<Option<Place>> = mpi.gather_json(&place)?;
        let meeting = match (hosting, places.into_iter().next().flatten()) {
            (Some(meeting), _) => meeting,
            (None, Some(place)) => Meeting::guest(mpi.rank(), place.port, place.token),
            (None, None) => return Err(foreign()),
        };
        let hub = Hub::begin(meeting, members, limit)?;
        let _ = mpi.hub.set(hub);
        Ok(mpi)
    }

    /// This rank among `size` consecutive ones, which make calls of their own from now on. Every rank calls it; `size` divides
    /// their number.
    ///
    /// # Errors
    /// When MPI refuses.
    pub fn group(&self, size: usize) -> Result<Self> {
        self.barrier()?;
        let library = self.library.group(size)?;
        let hub = OnceLock::new();
        if let Some(all) = self.hub() {
            all.group_by(size);
            let _ = hub.set(all.clone());
        }
        Ok(Self::new(library, hub, self.limit))
    }

    fn new(library: Library, hub: OnceLock<Arc<Hub>>, limit: Duration) -> Self {
        Mpi {
            library,
            hub,
            calls: AtomicU64::new(0),
            buffers: Mutex::default(),
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

    /// Name and version of the library.
    pub fn version(&self) -> &str {
        &self.library.version
    }

    /// Ends MPI after all ranks have finished.
    ///
    /// # Errors
    /// When a rank has left.
    pub fn finish(&self) -> Result<()> {
        self.barrier()?;
        if let Some(hub) = self.hub() {
            hub.finish();
        }
        self.library.finalize();
        Ok(())
    }

    /// A call of `kind`, whose ranks give `count` bytes each: compared, then moved by `run`.
    fn call(
        &self,
        kind: Kind,
        count: usize,
        run: impl FnOnce(&mut Buffers) -> Result<()>,
    ) -> Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            let reason = self.hub().and_then(|hub| hub.failure());
            return Err(lost(reason.unwrap_or("an earlier call failed")));
        }
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let ordinal = match self.hub() {
            None => 0,
            Some(hub) => {
                hub.enter();
                self.calls.fetch_add(1, Ordering::SeqCst)
            }
        };
        let own = Call::new(ordinal, kind, count);
        let result = self
            .compare(&mut buffers, &own)
            .and_then(|()| run(&mut buffers));
        match &result {
            Ok(()) => {}
            Err(_) => self.broken.store(true, Ordering::SeqCst),
        }
        if let Some(hub) = self.hub() {
            hub.exit();
        }
        result
    }

    fn compare(&self, buffers: &mut Buffers, own: &Call) -> Result<()> {
        buffers.own.clear();
        buffers.own.extend(own.to_bytes());
        buffers.all.resize(Call::BYTES * self.size(), 0);
        self.run(buffers, |library, own, all| {
            // SAFETY: `run` keeps the buffers.
            unsafe { library.all_gather(own, all) }
        })?;
        Call::compare(&buffers.all).map_err(|e| super::shared(self, e))
    }

    /// Begins a request on the buffers and waits for it. Buffers of a request that is not done are given up.
    fn run(
        &self,
        buffers: &mut Buffers,
        begin: impl FnOnce(&Library, &[u8], &mut [u8]) -> Result<Request>,
    ) -> Result<()> {
        let begun = begin(&self.library, &buffers.own, &mut buffers.all);
        let waited = begun.and_then(|request| self.wait(request));
        if let Err(error) = waited {
            std::mem::forget(std::mem::take(buffers));
            // Where MPI itself misses a rank first, the hub still knows which one.
            let failure = self
                .hub()
                .and_then(|hub| hub.failure_within(Duration::from_secs(1)));
            return Err(failure.map_or(error, lost));
        }
        Ok(())
    }

    fn wait(&self, mut request: Request) -> Result<()> {
        let (begun, mut polls, mut warnings) = (Instant::now(), 0u32, 0);
        loop {
            if self.library.done(&mut request)? {
                return Ok(());
            }
            polls = polls.saturating_add(1);
            if polls < SPINS {
                std::hint::spin_loop();
                continue;
            }
            if let Some(text) = self.hub().and_then(|hub| hub.failure()) {
                return Err(lost(text));
            }
            let waited = begun.elapsed();
            match polls {
                _ if waited > PATIENCE => std::thread::sleep(LONG_NAP),
                p if p < SPINS + YIELDS => std::thread::yield_now(),
                _ => std::thread::sleep(NAP),
            }
            if waited > self.limit * (warnings + 1) {
                warnings += 1;
                self.late(waited, warnings)?;
            }
        }
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

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.library.rank
    }

    fn size(&self) -> usize {
        self.library.size
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        let (n, size) = (own.len(), self.size());
        if size == 1 {
            all.copy_from_slice(own);
            return Ok(());
        }
        self.call(Kind::AllGather, n, |buffers| {
            let most = PIECE.min((1 << 30) / size);
            for first in (0..n).step_by(most) {
                let count = most.min(n - first);
                buffers.own.clear();
                buffers.own.extend_from_slice(&own[first..first + count]);
                buffers.all.resize(count * size, 0);
                self.run(buffers, |library, own, all| {
                    // SAFETY: `run` keeps the buffers.
                    unsafe { library.all_gather(own, all) }
                })?;
                for (r, row) in buffers.all.chunks(count).enumerate() {
                    all[r * n + first..][..count].copy_from_slice(row);
                }
            }
            Ok(())
        })
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        let size = self.size();
        let n = own.len() / size;
        if size == 1 {
            all.copy_from_slice(own);
            return Ok(());
        }
        self.call(Kind::Exchange, own.len(), |buffers| {
            let most = (PIECE / size).max(1);
            for first in (0..n).step_by(most) {
                let count = most.min(n - first);
                buffers.own.clear();
                for r in 0..size {
                    let row = &own[r * n + first..][..count];
                    buffers.own.extend_from_slice(row);
                }
                buffers.all.resize(count * size, 0);
                self.run(buffers, |library, own, all| {
                    // SAFETY: `run` keeps the buffers.
                    unsafe { library.all_to_all(own, all) }
                })?;
                for (r, row) in buffers.all.chunks(count).enumerate() {
                    all[r * n + first..][..count].copy_from_slice(row);
                }
            }
            Ok(())
        })
    }

    fn failure_within(&self, most: Duration) -> Option<String> {
        self.hub()?.failure_within(most).map(String::from)
    }

    fn leave(&self, why: &str) {
        if let Some(hub) = self.hub() {
            hub.leave(why);
        }
    }
}
