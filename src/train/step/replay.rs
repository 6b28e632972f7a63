//! Replaying a step on a device with kernels: once a step has copied nothing and asked for no memory, the next one is
//! recorded as a graph, and those after it replay it.
//!
//! A graph repeats addresses and numbers. What changes from step to step, tokens and the optimizer's settings, is written to
//! the same places before; and a graph is used only while the tables of all parameters and states are as they were, the same
//! memory is free, and micro-batches have the same shape. Otherwise the step runs as the first did.

use crate::device::graph::{self, Graph};
use crate::device::{Device, counters, with_free_ranges};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Sequences and tokens of each micro-batch, and where they lie.
pub type Shape = Vec<[usize; 5]>;

/// The graph of a step, if there is one, and whether there may be one.
#[derive(Default)]
pub struct Replay {
    /// Micro-batches of the last step that ran by itself, if it did nothing that a graph could not repeat.
    steady: Option<Shape>,
    captured: Option<Captured>,
    /// Why a step could not be captured, after which none is tried.
    error: Option<Error>,
}

struct Captured {
    graph: Graph,
    shape: Shape,
    /// Free ranges of the device's memory: what the step takes for a while lies there.
    free: BTreeMap<usize, usize>,
}

impl Replay {
    /// Forgets the graph: an address in it is another's now.
    pub fn forget(&mut self) {
        self.captured = None;
    }

    /// Replays the graph, if it is one of such micro-batches and the memory that it uses is free.
    ///
    /// # Errors
    /// Those of the launches.
    pub fn run(&self, device: Device, shape: &Shape) -> Result<bool> {
        let Some(own) = self.captured.as_ref().filter(|own| own.shape == *shape) else {
            return Ok(false);
        };
        with_free_ranges(device, |free| match *free == own.free {
            true => own.graph.replay().map(|()| true),
            false => Ok(false),
        })
    }

    /// What launches the next step, in words.
    pub fn words(&self) -> &'static str {
        match self.captured {
            Some(_) => "its replayed graph",
            None => "its launches",
        }
    }

    /// Whether a step of such micro-batches can be captured.
    pub fn is_steady(&self, shape: &Shape) -> bool {
        self.steady.as_ref() == Some(shape)
    }

    /// Runs a step of such micro-batches by itself, and sees what it does.
    ///
    /// # Errors
    /// Those of `step`.
    pub fn watch<R>(&mut self, shape: Shape, step: impl FnOnce() -> Result<R>) -> Result<R> {
        let before = counters::now();
        let done = step()?;
        let now = counters::now();
        let quiet = (before.reads, before.uploads, before.allocations)
            == (now.reads, now.uploads, now.allocations);
        self.steady = (quiet && self.error.is_none()).then_some(shape);
        Ok(done)
    }

    /// Captures a step of such micro-batches. If it cannot be captured after all, that is not tried again; if the memory had to
    /// grow for it, because others have what was free, the next step runs by itself.
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

    /// Why a step could not be captured, if that happened.
    pub fn error(&self) -> Option<&Error> {
        self.error.as_ref()
    }
}
