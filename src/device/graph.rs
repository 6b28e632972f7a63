//! Launches recorded once and replayed: on a GPU a CUDA graph, on the simulator a list of the same calls.
//!
//! A replay repeats addresses and numbers as they were. So nothing may be copied between host and device within a capture:
//! what changes from one replay to the next is written to device memory before it.

use super::Device;
use crate::error::{Error, Result};
use std::any::Any;
use std::cell::RefCell;

/// A launch, a fill or a copy, ready to be made again.
type Operation = Box<dyn Fn() -> Result<()>>;

#[derive(Default)]
struct Capture {
    operations: Vec<Operation>,
    kept: Vec<Box<dyn Any>>,
    /// What was done that a replay could not repeat.
    spoiled: Option<&'static str>,
}

thread_local! {
    static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) };
}

/// What [`capture`] recorded.
pub struct Graph {
    work: Work,
    /// Lists of the host that launches read.
    _kept: Vec<Box<dyn Any>>,
}

enum Work {
    Simulator(Vec<Operation>),
    #[cfg(feature = "cuda")]
    Gpu(cudarc::driver::CudaGraph),
}

/// Records what `body` does on `device`, from this thread, and does none of it.
///
/// # Errors
/// What `body` answered, or that it copied between host and device.
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
            "a bug: only launches can be replayed",
        )),
    };
    let found = CAPTURE.take().unwrap_or_default();
    let mut work = work?;
    if let Some(what) = found.spoiled {
        let help = "a bug: what changes must be written before the capture";
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
    /// Does what was recorded.
    ///
    /// # Errors
    /// What a launch answers, or that the driver refuses.
    pub fn replay(&self) -> Result<()> {
        match &self.work {
            Work::Simulator(operations) => operations.iter().try_for_each(|operation| operation()),
            #[cfg(feature = "cuda")]
            Work::Gpu(graph) => super::cuda::gpu()?.replay(graph),
        }
    }
}

/// Whether this thread is within a capture.
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

/// Notes that the capture cannot be replayed.
pub(super) fn spoil(what: &'static str) {
    CAPTURE.with_borrow_mut(|capture| {
        if let Some(capture) = capture {
            capture.spoiled.get_or_insert(what);
        }
    });
}

/// The place of a list of the host that a launch reads: the list's own, which must outlive the launch, and within a capture
/// that of a copy which lives as long as the graph.
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
