//! Times a group on a device: kernels on a machine, operations and steps with the host's clock.

use super::case::{Case, Group, Work};
use super::kernels;
use super::problem::Kernels;
use super::steps::{self, Step};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::dtype::DType;
use crate::verify::bench::measure::{Clock, Peer, Plan, Side, Timing, Wall, in_turn, interleaved};
#[cfg(feature = "cuda")]
use crate::verify::bench::measure::{Events, replayed};
use crate::verify::kernels::{Machine, Run, Simulator};
use half::bf16;

/// Where kernels are timed.
struct Place<'a> {
    machine: &'a dyn Machine,
    clock: &'a dyn Clock,
    /// Size of the cache in bytes; larger inputs are rotated over several sets. 0: one set of inputs.
    cache: usize,
    #[cfg(feature = "cuda")]
    gpu: Option<&'a crate::device::cuda::Gpu>,
}

impl Place<'_> {
    /// Returns a side that launches, from graphs if the machine supports them.
    fn side<'a>(
        &'a self,
        sets: usize,
        launch: impl Fn(usize) -> Result<()> + 'a,
    ) -> (Side<'a>, bool) {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.gpu {
            return (replayed(gpu, sets, launch), true);
        }
        (in_turn(sets, launch), false)
    }
}

/// Time limit in seconds of each side of a case.
pub const SIDE_SECONDS: f64 = 0.15;
/// Bytes of a large CPU cache.
const CPU_CACHE: usize = 32 << 20;
/// Maximum number of bytes of all sets of a group together.
const MOST_BYTES: f64 = 20e9;
/// Number of bytes of an output that are checked for elements that no kernel wrote.
const LOOKED_AT: usize = 64 << 20;

/// Cases that are ready to be timed together: our side of each case, followed by those of other libraries.
pub struct Ready<'a> {
    /// The cases.
    pub cases: Vec<Case>,
    /// The clock that times all sides.
    pub clock: &'a dyn Clock,
    /// The sides: ours of each case, then those of the peers.
    pub sides: Vec<Side<'a>>,
    /// The peers, in order.
    pub peers: Vec<Peer>,
    /// Sets of inputs, and whether our launches are replayed from graphs.
    pub sets: usize,
    /// Whether our launches are replayed from graphs.
    pub graph: bool,
}

impl Ready<'_> {
    /// Times the sides in turn: one untimed launch each, then a plan from the time of the slowest side, then all samples.
    ///
    /// # Errors
    /// When a side returns an error.
    pub fn time(&mut self) -> Result<Vec<Timing>> {
        let mut slowest = 0f64;
        for side in &mut self.sides {
            side(1)?;
            slowest = slowest.max(self.clock.seconds(&mut || side(1))?);
        }
        let plan = Plan::within(SIDE_SECONDS, slowest);
        if self.graph {
            // Captures every graph that the samples will replay; the first sets repeat after this number of samples.
            for side in &mut self.sides {
                for _ in 0..self.sets {
                    side(1)?;
                    side(plan.launches)?;
                }
            }
        }
        interleaved(self.clock, &mut self.sides, plan)
    }
}

type Visit<'v> = &'v mut dyn FnMut(Ready) -> Result<()>;

/// Prepares the cases of a group for which `wanted` is true on a device, and passes each to `visit`.
///
/// # Errors
/// When there is not enough memory, a launch fails, an output has elements that no kernel wrote, or `visit` returns an
/// error.
pub fn visit(
    group: &Group,
    device: Device,
    wanted: &dyn Fn(&Case) -> bool,
    visit: Visit,
) -> Result<()> {
    if let Work::Operation(_) | Work::Step(_) = &group.work {
        return on_host(group, device, wanted, visit);
    }
    #[cfg(feature = "cuda")]
    if device == Device::Cuda {
        let gpu = crate::device::cuda::gpu()?;
        let place = Place {
            machine: gpu,
            clock: &Events(gpu),
            cache: gpu.cache_bytes()?,
            gpu: Some(gpu),
        };
        return on_kernels(&place, group, wanted, visit);
    }
    let place = Place {
        machine: &Simulator::new()?,
        clock: &Wall,
        cache: 0,
        #[cfg(feature = "cuda")]
        gpu: None,
    };
    on_kernels(&place, group, wanted, visit)
}

fn on_kernels(
    place: &Place,
    group: &Group,
    wanted: &dyn Fn(&Case) -> bool,
    visit: Visit,
) -> Result<()> {
    let Some(kernels) = kernels::build(place.machine, group)? else {
        return Ok(());
    };
    let cases = group.cases()?;
    let sets = sets(place, &kernels, &cases);
    let runs = (0..sets)
        .map(|_| Run::new(place.machine, &kernels.whole))
        .collect::<Result<Vec<_>>>()?;
    runs.iter().try_for_each(Run::launch)?;
    look_at(&runs[0], &kernels)?;
    for (case, part) in cases.into_iter().zip(&kernels.parts) {
        if !wanted(&case) {
            continue;
        }
        let launch = |set: usize| runs[set].launch_as(part);
        let (side, graph) = place.side(sets, launch);
        #[cfg(feature = "cuda")]
        let (peers, theirs) = match (&group.work, place.gpu) {
            (Work::Gemm { product, shape }, Some(gpu)) => {
                super::cublas::sides(gpu, *product, shape, &runs)
            }
            _ => Default::default(),
        };
        #[cfg(not(feature = "cuda"))]
        let (peers, theirs) = <(Vec<Peer>, Vec<Side>)>::default();
        visit(Ready {
            cases: vec![case],
            clock: place.clock,
            sides: [side].into_iter().chain(theirs).collect(),
            peers,
            sets,
            graph,
        })?;
    }
    Ok(())
}

/// Returns the number of sets of buffers that are used in turn, as many as fit in memory.
fn sets(place: &Place, kernels: &Kernels, cases: &[Case]) -> usize {
    if place.cache == 0 {
        return 1;
    }
    let least = cases.iter().map(Case::bytes).fold(f64::INFINITY, f64::min);
    let room = (MOST_BYTES / kernels.whole.bytes() as f64) as usize;
    rotated(place.cache, least).min(room.max(2))
}

/// Returns a number of sets of inputs such that a set is no longer in the cache when it is used again.
pub fn rotated(cache: usize, bytes: f64) -> usize {
    ((2.0 * cache as f64 / bytes).ceil() as usize + 1).clamp(2, 12)
}

/// Checks the outputs. Buffers start as NaN, so a remaining NaN shows that a kernel did not write it.
fn look_at(run: &Run, kernels: &Kernels) -> Result<()> {
    for (name, dtype) in &kernels.outputs {
        let bytes = run.content(name, LOOKED_AT)?;
        let numbers = numbers(&bytes, *dtype);
        if let Some(at) = numbers.iter().position(|x| x.is_nan()) {
            return Err(Error::NonFinite {
                what: format!("{name}[{at}] of {}", kernels.whole.label),
                help: "a kernel did not write it: run hardware-check".into(),
            });
        }
    }
    Ok(())
}

/// Converts an output's bytes to f32.
pub fn numbers(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Bf16 => {
            let all: Vec<bf16> = crate::verify::kernels::values(bytes);
            all.into_iter().map(bf16::to_f32).collect()
        }
        _ => crate::verify::kernels::values(bytes),
    }
}

/// Prepares an operation on the CPU, or steps on a device with the routers in turn.
fn on_host(
    group: &Group,
    device: Device,
    wanted: &dyn Fn(&Case) -> bool,
    visit: Visit,
) -> Result<()> {
    let mut cases = group.cases()?;
    let (mut sides, mut sets): (Vec<Side>, usize) = (Vec::new(), 1);
    match &group.work {
        Work::Operation(operation) if wanted(&cases[0]) => {
            sets = rotated(CPU_CACHE, cases[0].bytes());
            let made = (0..sets).map(|_| operation.build(&group.name));
            let mut running = made.collect::<Result<Vec<_>>>()?;
            sides.push(in_turn(sets, move |set| running[set].run().map(drop)));
        }
        Work::Step(step) => {
            let each = step.routers.iter().zip(&cases);
            for (router, _) in each.filter(|(_, case)| wanted(case)) {
                sides.push(step_side(step, router, device)?);
            }
        }
        _ => {}
    }
    cases.retain(wanted);
    if cases.is_empty() {
        return Ok(());
    }
    visit(Ready {
        cases,
        clock: &Wall,
        sides,
        peers: Vec::new(),
        sets,
        graph: false,
    })
}

fn step_side(step: &Step, router: &str, device: Device) -> Result<Side<'static>> {
    let mut training = steps::training(step, router, device)?;
    Ok(in_turn(1, move |_| {
        training.step()?;
        finish(device)
    }))
}

/// Waits for the launches that a step leaves unfinished, so that the host's clock includes them.
fn finish(device: Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if device == Device::Cuda {
        crate::device::cuda::gpu()?.finish()?;
    }
    let _ = device;
    Ok(())
}
