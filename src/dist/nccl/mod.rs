//! Ranks with one GPU each. NCCL transfers the memory of the GPUs; the data of the hosts uses the transport of the
//! processes.
//!
//! NCCL enqueues its calls on the stream of the step, and does not detect that ranks made different calls: it blocks or
//! gives wrong results. The hosts therefore compare the calls of the first step before they enqueue them; later steps
//! repeat these calls, most of them as a graph. A thread checks for asynchronous errors. After an error it aborts the
//! pending calls and tells the other ranks.

mod library;

pub use library::VARIABLE;

use super::call::{Call, Kind};
use super::device::Part;
use super::{Collective, SingleRank, lost};
use crate::device::{self, Device, Span};
use crate::error::{Error, Result};
use library::{Communicator, Id, Library, names};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Time between two checks for asynchronous errors.
const LOOK: Duration = Duration::from_millis(100);

/// Time for the hub to find out which rank NCCL has lost.
const NAMING: Duration = Duration::from_secs(1);

/// A rank of a run whose devices NCCL connects.
pub struct Nccl {
    host: Arc<dyn Collective>,
    link: Arc<Link>,
    version: (i32, i32, i32),
    /// Device calls compared so far.
    calls: AtomicU64,
    /// Whether further calls are compared.
    compares: AtomicBool,
    /// Whether all ranks have finished.
    finished: AtomicBool,
    /// The thread that checks for errors.
    watcher: Option<JoinHandle<()>>,
}

/// What the rank shares with the thread that checks for errors.
struct Link {
    communicator: Communicator,
    /// Why no further call can be made, after a failure.
    failure: OnceLock<String>,
    ended: AtomicBool,
}

/// Loads the library for `device`, if NCCL transfers its memory.
///
/// # Errors
/// Returns an error when the library cannot be loaded.
fn library_for(device: Device) -> Result<Option<Library>> {
    match device {
        Device::Cpu => Ok(None),
        Device::Cuda => Library::load(&names()).map(Some),
        // The memory of the simulator is host memory, which NVIDIA's library does not accept.
        Device::Sim if std::env::var_os(VARIABLE).is_some() => {
            Library::load(&names()).map(|library| Some(library).filter(|l| l.on_host))
        }
        Device::Sim => Ok(None),
    }
}

/// Connects the device memory of the ranks of `host` by NCCL, if `device` and the number of ranks need it; otherwise
/// returns `host`. Every rank calls it.
///
/// # Errors
/// Returns the same error on all ranks when a rank cannot load the library or open its GPU, or NCCL fails.
pub fn on_device(host: Arc<dyn Collective>, device: Device) -> Result<Arc<dyn Collective>> {
    if host.size() == 1 {
        return Ok(host);
    }
    match super::agree(&*host, library_for(device))? {
        None => Ok(host),
        Some(library) => Ok(Arc::new(Nccl::connect(host, &library, device)?)),
    }
}

/// Does the same as [`on_device`] with the library at `path`, regardless of the environment.
///
/// # Errors
/// Returns the errors of [`on_device`].
pub fn with_library(
    host: Arc<dyn Collective>,
    device: Device,
    path: &str,
) -> Result<Arc<dyn Collective>> {
    let library = super::agree(&*host, Library::load(&[path.into()]))?;
    Ok(Arc::new(Nccl::connect(host, &library, device)?))
}

/// Checks that the library for `device` can be loaded.
///
/// # Errors
/// Returns an error when it cannot be loaded.
pub fn available(device: Device) -> Result<()> {
    library_of(device).map(drop)
}

/// Returns a single rank whose device makes the calls of several ranks, to check their cost and their results.
///
/// # Errors
/// Returns the errors of [`on_device`], and an error when `device` has no library.
pub fn alone(device: Device) -> Result<Arc<dyn Collective>> {
    let (library, host) = (library_of(device)?, Arc::new(SingleRank));
    Ok(Arc::new(Nccl::connect(host, &library, device)?))
}

fn library_of(device: Device) -> Result<Library> {
    library_for(device)?.ok_or_else(|| {
        let expected = format!("a library that moves the memory of device {device}");
        Error::invalid("NCCL", expected, "none", format!("name one in {VARIABLE}"))
    })
}

impl Nccl {
    fn connect(host: Arc<dyn Collective>, library: &Library, device: Device) -> Result<Self> {
        super::agree(&*host, device::bind(device))?;
        let id = match host.rank() {
            0 => library.unique_id().map(|id| id.0.to_vec()),
            _ => Ok(Vec::new()),
        };
        let id = super::agree(&*host, id)?;
        let ids = host.gather_bytes(&id)?;
        let mut own = Id([0; 128]);
        own.0.copy_from_slice(&ids[0]);
        let connected = library.connect(own, host.rank(), host.size());
        let link = Arc::new(Link {
            communicator: super::agree(&*host, connected)?,
            failure: OnceLock::new(),
            ended: AtomicBool::new(false),
        });
        let watcher = Some(watch(host.clone(), link.clone())?);
        Ok(Nccl {
            // A rank alone waits for no other.
            finished: AtomicBool::new(host.size() == 1),
            watcher,
            host,
            link,
            version: library.version,
            calls: AtomicU64::new(0),
            compares: AtomicBool::new(true),
        })
    }

    /// Makes a call of the communicator, unless an earlier one has failed.
    fn call(&self, call: impl FnOnce(&Communicator) -> Result<()>) -> Result<()> {
        if let Some(text) = self.link.failure.get() {
            return Err(lost(text.as_str()));
        }
        let called = call(&self.link.communicator);
        called.map_err(|error| {
            // NCCL may notice a lost rank before the hub finds out which one it is.
            self.failure_within(NAMING).map_or(error, lost)
        })
    }
}

/// Starts the thread that checks for asynchronous errors until the rank ends.
fn watch(host: Arc<dyn Collective>, link: Arc<Link>) -> Result<JoinHandle<()>> {
    let look = move || {
        while !link.ended.load(Ordering::SeqCst) {
            if let Err(error) = link.communicator.asynchronous() {
                if link.ended.swap(true, Ordering::SeqCst) {
                    return;
                }
                let named = host.failure_within(NAMING);
                let known = named.is_some();
                let text = named.unwrap_or_else(|| error.to_string());
                let _ = link.failure.set(text.clone());
                // Before the abort, which may wait for the other ranks.
                if !known {
                    host.leave(&text);
                }
                link.communicator.abort();
                return;
            }
            thread::park_timeout(LOOK);
        }
    };
    let thread = thread::Builder::new().name("nccl".into()).spawn(look);
    thread.map_err(|e| Error::thread("NCCL", "a thread that checks for errors", &e))
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if self.link.ended.swap(true, Ordering::SeqCst) {
            return;
        }
        if thread::panicking() || !self.finished.load(Ordering::SeqCst) {
            // The end of the process frees the communicator: here NCCL might wait for ranks that wait for this one.
            return;
        }
        if let Some(watcher) = self.watcher.take() {
            watcher.thread().unpark();
            let _ = watcher.join();
        }
        self.link.communicator.destroy();
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.host.all_gather(own, all)
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.host.exchange(own, all)
    }

    fn leave(&self, why: &str) {
        self.host.leave(why);
    }

    fn failure_within(&self, most: Duration) -> Option<String> {
        let named = self.host.failure_within(most);
        named.or_else(|| self.link.failure.get().cloned())
    }

    fn all_gather_on(&self, own: Span, all: Span) -> Result<()> {
        self.call(|c| c.all_gather(own, all))
    }

    fn exchange_on(&self, parts: &[Part]) -> Result<()> {
        self.call(|c| c.exchange(parts))
    }

    fn compare_device_call(&self, kind: Kind, count: usize) -> Result<()> {
        if !self.compares.load(Ordering::SeqCst) {
            return Ok(());
        }
        let ordinal = self.calls.fetch_add(1, Ordering::SeqCst);
        let own = Call::new(ordinal, kind, count).to_bytes();
        let mut all = vec![0; own.len() * self.size()];
        self.host.all_gather(&own, &mut all)?;
        Call::compare(&all).map_err(|e| super::shared(self, e))
    }

    fn finished(&self) {
        self.finished.store(true, Ordering::SeqCst);
        self.host.finished();
    }

    fn begin_device_step(&self) {
        self.finished.store(self.size() == 1, Ordering::SeqCst);
        self.host.begin_device_step();
    }

    fn await_device(&self, waiting: bool) {
        self.host.await_device(waiting);
    }

    fn trust_device_calls(&self) {
        self.compares.store(false, Ordering::SeqCst);
    }

    fn shares_process(&self) -> bool {
        self.host.shares_process()
    }

    fn ranks_per_node(&self) -> usize {
        self.host.ranks_per_node()
    }

    fn device_library(&self) -> Option<String> {
        let (major, minor, patch) = self.version;
        Some(format!("NCCL {major}.{minor}.{patch}"))
    }
}
