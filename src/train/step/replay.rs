//! Replay of a step on a device with kernels: after a step that copied nothing and allocated no memory, the next step
//! is recorded as a graph, and later steps replay the graph.
//!
//! A graph uses the same addresses and numbers each time. Data that changes between steps, which are tokens and the
//! optimizer's settings, is written to the same addresses before each replay. A graph is used only if the tables of
//! all parameters and states have not changed, the same memory is free, and micro-batches have the same shape.
//! Otherwise the step runs without a graph.

use crate::device::graph::{self, Graph};
use crate::device::{Device, counters, with_free_ranges};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Numbers of sequences and tokens of each micro-batch, and their addresses.
pub type Shape = Vec<[usize; 5]>;

/// The graph of a step, if there is one, and whether a step can be captured.
#[derive(Default)]
pub struct Replay {
    /// Shape of the micro-batches of the last step without a graph, if that step did nothing that a graph cannot
    /// repeat.
    steady: Option<Shape>,
    captured: Option<Captured>,
    /// The error because of which a step could not be captured; no further capture is tried after it.
    error: Option<Error>,
}

struct Captured {
    graph: Graph,
    shape: Shape,
    /// Free ranges of the device's memory, in which the step allocates temporary blocks.
    free: BTreeMap<usize, usize>,
}

impl Replay {
    /// Drops the graph, because an address in it is no longer valid.
    pub fn forget(&mut self) {
        self.captured = None;
    }

    /// Replays the graph if it has micro-batches of this shape and the memory that it uses is free. Returns whether
    /// it did.
    ///
    /// # Errors
    /// The errors of the launches.
    pub fn run(&self, device: Device, shape: &Shape) -> Result<bool> {
        let Some(own) = self.captured.as_ref().filter(|own| own.shape == *shape) else {
            return Ok(false);
        };
        with_free_ranges(device, |free| match *free == own.free {
            true => own.graph.replay().map(|()| true),
            false => Ok(false),
        })
    }

    /// Returns a description of how the next step is launched.
    pub fn words(&self) -> &'static str {
        match self.captured {
            Some(_) => "its replayed graph",
            None => "its launches",
        }
    }

    /// Returns whether a step with micro-batches of this shape can be captured.
    pub fn is_steady(&self, shape: &Shape) -> bool {
        self.steady.as_ref() == Some(shape)
    }

    /// Runs a step with micro-batches of this shape without a graph, and records whether it can be captured.
    ///
    /// # Errors
    /// The errors of `step`.
    pub fn watch<R>(&mut self, shape: Shape, step: impl FnOnce() -> Result<R>) -> Result<R> {
        let before = counters::now();
        let done = step()?;
        let now = counters::now();
        let quiet = (before.reads, before.uploads, before.allocations)
            == (now.reads, now.uploads, now.allocations);
        self.steady = (quiet && self.error.is_none()).then_some(shape);
        Ok(done)
    }

    /// Captures a step with micro-batches of this shape. If the capture fails, it is not tried again. If memory had
    /// to grow during the capture, because previously free memory is in use, the next step runs without a graph.
    pub fn capture(&mut self, device: Device, shape: &Shape, step: impl FnOnce() -> Result<()>) {
        let free = with_free_ranges(device, BTreeMap::clone);
        let allocations = counters::now().allocations;
        match graph::capture(device, step) {
            Ok(_) if counters::now().allocations != allocations => self.steady = None,
            Ok(graph) => {
                let shape = shape.clone();
                self.captured = Some(Captured { graph, shape, free });
            }
            Err(why) => (self.steady, self.error) = (None, Some(why)),
        }
    }

    /// Returns the error because of which a step could not be captured, if there was one.
    pub fn error(&self) -> Option<&Error> {
        self.error.as_ref()
    }
}
