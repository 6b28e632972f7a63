//! Replay of a step on a device with kernels: after a step that copied nothing and allocated no memory, the next step
//! is recorded as a graph, and later steps replay the graph.
//!
//! A graph uses the same addresses and numbers each time. Data that changes between steps, which are tokens and the
//! optimizer's settings, is written to the same addresses before each replay. A graph is used only if the tables of
//! all parameters and states have not changed, the same memory is free, and micro-batches have the same shape.
//! Otherwise the step runs without a graph.

use crate::device::graph::{self, Graph};
use crate::device::{Device, counters, with_free_ranges};
use crate::dist::Collective;
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Numbers of sequences and tokens of each micro-batch, and their addresses.
pub type Shape = Vec<[usize; 5]>;

/// How a step is launched. All ranks use the smallest of their modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LaunchMode {
    /// Kernel by kernel.
    Eager,
    /// The step is recorded as a graph, and the graph is launched.
    Capture,
    /// The recorded graph is launched.
    Replay,
}

/// Returns the mode in which all ranks launch a step, where `mode` is what this rank can do. NCCL requires that all
/// ranks replay a graph with its calls, or none ([documentation][1]). While an earlier step is `in_flight`, the hosts do not
/// communicate: that step was replayed, so every rank replays the next one too.
///
/// [1]: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/cudagraph.html
///
/// # Errors
/// Returns an error when communication fails, or the memory of this rank changed while a step was in flight.
pub fn common_mode(dist: &dyn Collective, mode: LaunchMode, in_flight: bool) -> Result<LaunchMode> {
    match (in_flight, mode) {
        (true, LaunchMode::Replay) => return Ok(mode),
        (true, LaunchMode::Capture) => {
            return Err(Error::invalid(
                "step",
                "the same free memory as when the step was recorded as a graph",
                "other free memory, while the other ranks replay the graph",
                "this is a bug; resume with train.graph = false",
            ));
        }
        // Micro-batches of another shape have it on all ranks.
        _ => {}
    }
    let mut all = vec![0; dist.size()];
    dist.all_gather(&[mode as u8], &mut all)?;
    let least = all.into_iter().min().unwrap_or(0);
    Ok([LaunchMode::Eager, LaunchMode::Capture, LaunchMode::Replay][usize::from(least)])
}

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

impl Captured {
    /// Returns whether a step with micro-batches of this shape, while this memory is free, can replay the graph.
    fn fits(&self, shape: &Shape, free: &BTreeMap<usize, usize>) -> bool {
        self.shape == *shape && self.free == *free
    }
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
        let Some(own) = &self.captured else {
            return Ok(false);
        };
        with_free_ranges(device, |free| match own.fits(shape, free) {
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

    /// Returns how this rank can launch a step with micro-batches of this shape.
    pub fn mode(&self, device: Device, shape: &Shape) -> LaunchMode {
        let fits = |own: &Captured| with_free_ranges(device, |free| own.fits(shape, free));
        if self.captured.as_ref().is_some_and(fits) {
            LaunchMode::Replay
        } else if self.steady.as_ref() == Some(shape) {
            LaunchMode::Capture
        } else {
            LaunchMode::Eager
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::ThreadRank;

    fn of_ranks(own: &[LaunchMode], in_flight: bool) -> Vec<Result<LaunchMode>> {
        ThreadRank::run(own.len(), |rank| {
            common_mode(&rank, own[rank.rank()], in_flight)
        })
    }

    #[test]
    fn all_ranks_launch_a_step_in_a_mode_that_each_of_them_can() {
        use LaunchMode::{Capture, Eager, Replay};
        for (own, all) in [
            ([Replay, Replay], Replay),
            ([Replay, Capture], Capture),
            ([Eager, Replay], Eager),
            ([Capture, Capture], Capture),
        ] {
            for found in of_ranks(&own, false) {
                assert_eq!(found.unwrap(), all, "{own:?}");
            }
        }
    }

    #[test]
    fn while_a_step_is_in_flight_ranks_do_not_wait_for_each_other() {
        let found = of_ranks(&[LaunchMode::Replay, LaunchMode::Capture], true);
        assert_eq!(found[0].as_ref().unwrap(), &LaunchMode::Replay);
        let error = found[1].as_ref().unwrap_err().to_string();
        assert!(error.contains("same free memory"), "{error}");
    }
}
