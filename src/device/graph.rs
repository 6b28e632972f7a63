//! Launches recorded once and replayed: on a GPU a CUDA graph, on the simulator a list of the same calls.
//!
//! A replay uses the same addresses and numbers as the recorded launches. Therefore a capture must not copy between
//! host and device. Data that changes between replays must be written to device memory before the replay.

use super::Device;
use crate::error::{Error, Result};
use std::any::Any;
use std::cell::RefCell;

/// A launch, a fill or a copy that can be repeated.
type Operation = Box<dyn Fn() -> Result<()>>;

#[derive(Default)]
struct Capture {
    operations: Vec<Operation>,
    kept: Vec<Box<dyn Any>>,
    /// The operation that a replay cannot repeat, if there was one.
    spoiled: Option<&'static str>,
}

thread_local! {
    static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) };
}

/// The launches that [`capture`] recorded.
pub struct Graph {
    work: Work,
    /// Host lists that launches read.
    _kept: Vec<Box<dyn Any>>,
}

enum Work {
    Simulator(Vec<Operation>),
    #[cfg(feature = "cuda")]
    Gpu(cudarc::driver::CudaGraph),
}

/// Records the operations of `body` on `device`, on this thread, without executing them.
///
/// # Errors
/// Returns the error of `body`, or an error when `body` copied between host and device.
pub fn capture(device: Device, body: impl FnOnce() -> Result<()>) -> Result<Graph> {
    CAPTURE.set(Some(Capture::default()));
    let work = match device {
        Device::Sim => body().map(|()| Work::Simulator(Vec::new())),
        #[cfg(feature = "cuda")]
        Device::Cuda => super::cuda::gpu().and_then(|gpu| gpu.capture(body).map(Work::Gpu)),
        _ => Err(Error::invalid(
            "capture",
            "a device with kernels",
            device.to_string(),
            "this is a bug: only launches can be replayed",
        )),
    };
    let found = CAPTURE.take().unwrap_or_default();
    let mut work = work?;
    if let Some(what) = found.spoiled {
        let help = "this is a bug: write data that changes to the device before the capture";
        return Err(Error::invalid("capture", "launches alone", what, help));
    }
    #[cfg_attr(not(feature = "cuda"), expect(irrefutable_let_patterns))]
    if let Work::Simulator(operations) = &mut work {
        *operations = found.operations;
    }
    Ok(Graph {
        work,
        _kept: found.kept,
    })
}

impl Graph {
    /// Executes the recorded operations.
    ///
    /// # Errors
    /// Returns the error of a launch or of the driver.
    pub fn replay(&self) -> Result<()> {
        match &self.work {
            Work::Simulator(operations) => operations.iter().try_for_each(|operation| operation()),
            #[cfg(feature = "cuda")]
            Work::Gpu(graph) => super::cuda::gpu()?.replay(graph),
        }
    }
}

/// Returns whether this thread is capturing.
pub(crate) fn capturing() -> bool {
    CAPTURE.with_borrow(Option::is_some)
}

/// Adds an operation of the simulator to the capture.
pub(crate) fn record(operation: impl Fn() -> Result<()> + 'static) {
    CAPTURE.with_borrow_mut(|capture| {
        if let Some(capture) = capture {
            capture.operations.push(Box::new(operation));
        }
    });
}

/// Marks the current capture as one that cannot be replayed, because of `what`.
pub(super) fn spoil(what: &'static str) {
    CAPTURE.with_borrow_mut(|capture| {
        if let Some(capture) = capture {
            capture.spoiled.get_or_insert(what);
        }
    });
}

/// Returns the address of a host list that a launch reads. It is the address of the list itself, which must outlive
/// the launch; in a capture it is the address of a copy that lives as long as the graph.
pub(crate) fn kept<T: Clone + 'static>(list: &[T]) -> *const T {
    CAPTURE.with_borrow_mut(|capture| match capture {
        None => list.as_ptr(),
        Some(capture) => {
            let own = list.to_vec();
            let place = own.as_ptr();
            capture.kept.push(Box::new(own));
            place
        }
    })
}
