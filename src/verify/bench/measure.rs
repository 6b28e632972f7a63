//! Times several implementations of the same work. Samples are interleaved, so that a change of the machine's speed
//! affects all of them; each implementation is timed in two passes, whose ratio shows how reliable the figures are.
//! Results are medians.
//!
//! A [`Clock`] measures time: the host's clock if the work is complete on return, events of the GPU if it is only
//! launched, and a counter in the tests.

use crate::error::Result;
use std::time::Instant;

/// Measures how long work takes.
pub trait Clock {
    /// Returns the seconds from the start of `work` until all of it is complete.
    ///
    /// # Errors
    /// When `work` returns an error, or the device reports one.
    fn seconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
}

/// The host's clock, for work that is complete on return.
pub struct Wall;

impl Clock for Wall {
    fn seconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Events on a GPU's stream, before the first launch and after the last.
#[cfg(feature = "cuda")]
pub struct Events<'a>(pub &'a crate::device::cuda::Gpu);

#[cfg(feature = "cuda")]
impl Clock for Events<'_> {
    fn seconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let from = self.0.mark()?;
        work()?;
        self.0.seconds(&from, &self.0.mark()?)
    }
}

/// One implementation of the work. The argument is how often to do the work; each repetition uses the next set of inputs.
pub type Side<'a> = Box<dyn FnMut(usize) -> Result<()> + 'a>;

/// Name of a peer: `Ok` if it has a side, otherwise the reason why it cannot run.
pub type Peer = (&'static str, Result<(), String>);

/// The number of samples and launches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Number of samples per pass.
    pub samples: usize,
    /// Number of repetitions of the work per sample.
    pub launches: usize,
}

/// Returns a side that launches on each of `sets` sets of inputs in turn.
pub fn in_turn<'a>(sets: usize, mut launch: impl FnMut(usize) -> Result<()> + 'a) -> Side<'a> {
    let mut next = 0;
    Box::new(move |times| {
        for _ in 0..times {
            launch(next)?;
            next = (next + 1) % sets;
        }
        Ok(())
    })
}

/// As [`in_turn`], replayed from graphs: one graph for each first set and number of launches.
#[cfg(feature = "cuda")]
pub fn replayed<'a>(
    gpu: &'a crate::device::cuda::Gpu,
    sets: usize,
    launch: impl Fn(usize) -> Result<()> + 'a,
) -> Side<'a> {
    let (mut next, mut graphs) = (0, std::collections::BTreeMap::new());
    Box::new(move |times| {
        let first = next;
        next = (next + times) % sets;
        let graph = match graphs.entry((first, times)) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                let mut places = (first..first + times).map(|i| i % sets);
                new.insert(gpu.capture(|| places.try_for_each(&launch))?)
            }
        };
        gpu.replay(graph)
    })
}

/// Number of passes of every side.
pub const PASSES: usize = 2;

/// The plan of `hardware-check`.
pub const HARDWARE_PLAN: Plan = Plan {
    samples: 15,
    launches: 4,
};

impl Plan {
    /// Returns a plan that takes about `budget` seconds per side, if the work takes `seconds` once. Samples are at least a
    /// millisecond long, so that events and clocks are accurate; a pass has 5 to 25 samples.
    pub fn within(budget: f64, seconds: f64) -> Self {
        let seconds = seconds.max(1e-9);
        let launches = (1e-3 / seconds).ceil().clamp(1.0, 64.0);
        let samples = budget / (PASSES as f64 * (launches + 1.0) * seconds);
        Self {
            samples: samples.clamp(5.0, 25.0) as usize,
            launches: launches as usize,
        }
    }
}

/// The time of one side.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// Median seconds of each pass, and the interquartile range of the pass divided by its median.
    pub passes: Vec<(f64, f64)>,
    /// The numbers of samples and launches of the measurement.
    pub plan: Plan,
}

impl Timing {
    /// Returns the median of the faster pass in seconds.
    pub fn seconds(&self) -> f64 {
        self.passes
            .iter()
            .map(|p| p.0)
            .fold(f64::INFINITY, f64::min)
    }

    /// Returns the median of the slower pass divided by that of the faster; 1 if both are equal.
    pub fn repeat_ratio(&self) -> f64 {
        let slowest = self.passes.iter().map(|p| p.0).fold(0.0, f64::max);
        slowest / self.seconds()
    }
}

/// Times the sides in turn, sample by sample. Before each sample, a side does its work once untimed.
///
/// # Errors
/// When a side or the clock returns an error.
pub fn interleaved(clock: &dyn Clock, sides: &mut [Side], plan: Plan) -> Result<Vec<Timing>> {
    let mut passes = vec![Vec::new(); sides.len()];
    for _ in 0..PASSES {
        let mut samples = vec![Vec::new(); sides.len()];
        for _ in 0..plan.samples {
            for (side, samples) in sides.iter_mut().zip(&mut samples) {
                side(1)?; // clocks, caches and the queue are warm when the sample begins
                let seconds = clock.seconds(&mut || side(plan.launches))?;
                samples.push(seconds / plan.launches as f64);
            }
        }
        for (passes, samples) in passes.iter_mut().zip(&samples) {
            passes.push(median(samples));
        }
    }
    let timing = |passes| Timing { passes, plan };
    Ok(passes.into_iter().map(timing).collect())
}

/// Returns the median, and the interquartile range divided by the median.
pub fn median(samples: &[f64]) -> (f64, f64) {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    (at(0.5), (at(0.75) - at(0.25)) / at(0.5))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// A clock that advances only when a side requests it.
    struct Fake(Cell<f64>);

    impl Clock for Fake {
        fn seconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
            let start = self.0.get();
            work()?;
            Ok(self.0.get() - start)
        }
    }

    impl Fake {
        /// Returns a side whose launch number n takes `seconds(n)`.
        fn side<'a>(&'a self, seconds: impl Fn(usize) -> f64 + 'a) -> Side<'a> {
            let mut launch = 0;
            Box::new(move |times| {
                for _ in 0..times {
                    self.0.set(self.0.get() + seconds(launch));
                    launch += 1;
                }
                Ok(())
            })
        }
    }

    const PLAN: Plan = Plan {
        samples: 5,
        launches: 3,
    };

    #[test]
    fn the_median_is_not_moved_by_one_outlier() {
        assert_eq!(median(&[3.0, 1.0, 2.0, 100.0, 2.0]), (2.0, 0.5));
    }

    #[test]
    fn each_side_gets_its_own_time_and_both_are_timed_twice() {
        let clock = Fake(Cell::new(0.0));
        let mut sides = [clock.side(|_| 2.0), clock.side(|_| 3.0)];
        let timings = interleaved(&clock, &mut sides, PLAN).unwrap();
        assert_eq!(timings[0].passes, [(2.0, 0.0); 2]);
        assert_eq!(timings[1].seconds() / timings[0].seconds(), 1.5);
        assert_eq!(timings[1].repeat_ratio(), 1.0);
    }

    #[test]
    fn the_untimed_launch_does_not_count() {
        let clock = Fake(Cell::new(0.0));
        // Launches 0, 4, 8, ... come before a sample.
        let cold = |launch: usize| if launch % 4 == 0 { 1e9 } else { 1.0 };
        let timings = interleaved(&clock, &mut [clock.side(cold)], PLAN).unwrap();
        assert_eq!(timings[0].passes, [(1.0, 0.0); 2]);
    }

    #[test]
    fn a_slowdown_of_the_machine_affects_both_sides_and_the_repeat_ratio() {
        let clock = Fake(Cell::new(0.0));
        // The second pass begins after 5 samples of 1 + 3 launches.
        let throttled =
            |factor: f64| move |launch: usize| if launch < 20 { factor } else { 1.5 * factor };
        let mut sides = [clock.side(throttled(1.0)), clock.side(throttled(2.0))];
        let timings = interleaved(&clock, &mut sides, PLAN).unwrap();
        for (timing, factor) in timings.iter().zip([1.0, 2.0]) {
            assert_eq!((timing.seconds(), timing.repeat_ratio()), (factor, 1.5));
        }
    }

    #[test]
    fn a_plan_stays_within_its_budget_and_its_limits() {
        for seconds in [1e-6, 1e-4, 1e-2] {
            let plan = Plan::within(0.5, seconds);
            let spent = PASSES as f64 * plan.samples as f64 * (plan.launches + 1) as f64 * seconds;
            assert!(spent <= 0.5 && plan.samples >= 5, "{plan:?}");
        }
        assert_eq!(
            Plan::within(0.5, 10.0),
            Plan {
                samples: 5,
                launches: 1
            }
        );
    }
}
