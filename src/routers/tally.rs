//! The counts of a MoE layer: statistics for the reports, and the loads of an optimizer step. On the CPU the host
//! counts. On a device with kernels, `kernels/layer_tally.cu` counts, and the host reads the counts at the end of a
//! step.

use super::statistics::LayerStats;
use crate::device::Device;
use crate::dist::{Collective, DeviceRanks};
use crate::error::Result;
use crate::kernels::Stream;
use crate::kernels::layer_tally::{LayerTally, ShareEntropy};
use crate::kernels::ranks::LoadShares;
use crate::ops::dispatch::Dispatch;
use crate::ops::over_ranks::{agree_on_flags, sum_to};
use crate::ops::router::NonFinite;
use crate::ops::routing::Entropy;
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use std::cell::RefCell;
use std::rc::Rc;

/// The input of a count: one pass over one micro-batch of a layer.
pub struct Counted<'a> {
    /// The experts that count as chosen.
    pub chosen: &'a Dispatch,
    pub entropy: Entropy,
    pub non_finite: NonFinite,
    /// Index of the first token in the global batch.
    pub first_token: u64,
    /// Whether the step's loads change as well.
    pub trains: bool,
    /// Whether the fractions are over the step so far and all ranks; otherwise they are over these tokens only.
    pub over_step: bool,
}

/// The sums of one layer.
pub enum Tally {
    Host(HostTally),
    Device {
        sums: Rc<DeviceTally>,
        layer: usize,
        fresh: Fresh,
    },
}

impl Default for Tally {
    fn default() -> Self {
        Tally::Host(HostTally::default())
    }
}

#[derive(Default)]
pub struct HostTally {
    stats: LayerStats,
    /// On the host: tokens, and tokens per expert, of this optimizer step so far on this rank.
    tokens: f64,
    load: Vec<f64>,
    first_non_finite: Option<usize>,
}

/// The sums of all layers in device memory, one row per layer.
pub struct DeviceTally {
    experts: usize,
    /// `[layers, E + 2]` f64: tokens per expert, tokens, entropy.
    stats: RefCell<Tensor>,
    /// `[layers, E + 1]` f64: tokens per expert and tokens of the step so far.
    load: RefCell<Tensor>,
    /// `[layers, 2]`: the first token whose logits are not finite (`i32::MAX` if there is none), and the fault bits
    /// of the dispatch.
    flags: RefCell<Tensor>,
    over_ranks: Option<OverRanks>,
}

/// The counts of a step summed over several ranks.
struct OverRanks {
    ranks: DeviceRanks,
    /// `stats` and `load` of all ranks.
    stats: RefCell<Tensor>,
    load: RefCell<Tensor>,
}

/// The sums that the next count resets first.
pub struct Fresh {
    stats: bool,
    step: bool,
}

impl DeviceTally {
    /// Creates the sums of `layers` layers with `experts` experts, and, with `ranks`, the sums over ranks.
    pub fn new(
        device: Device,
        layers: usize,
        experts: usize,
        ranks: Option<DeviceRanks>,
    ) -> Rc<Self> {
        let zeros = |dtype, width| RefCell::new(Tensor::zeros(device, dtype, [layers, width]));
        let over_ranks = ranks.map(|ranks| OverRanks {
            ranks,
            stats: zeros(DType::F64, experts + 2),
            load: zeros(DType::F64, experts + 1),
        });
        Rc::new(DeviceTally {
            experts,
            stats: zeros(DType::F64, experts + 2),
            load: zeros(DType::F64, experts + 1),
            flags: zeros(DType::I32, 2),
            over_ranks,
        })
    }

    /// Returns the tally of one layer.
    pub fn layer(self: &Rc<Self>, layer: usize) -> Tally {
        Tally::Device {
            sums: self.clone(),
            layer,
            fresh: Fresh {
                stats: true,
                step: true,
            },
        }
    }

    /// Copies the sums back to device memory after the host has read them, so that later kernels find them there.
    pub fn keep_in_place(&self) {
        let all = self
            .over_ranks
            .iter()
            .flat_map(|all| [&all.stats, &all.load]);
        for sums in [&self.stats, &self.load, &self.flags]
            .into_iter()
            .chain(all)
        {
            sums.borrow_mut().pointer_mut::<u8>();
        }
    }

    /// Returns the statistics of all layers and ranks after [`sum_over_ranks`](Self::sum_over_ranks), as
    /// [`LayerStats::of_rows`] reads them.
    pub fn stats(&self) -> &RefCell<Tensor> {
        self.over_ranks
            .as_ref()
            .map_or(&self.stats, |all| &all.stats)
    }

    /// Sums statistics and loads, and combines flags, over all ranks, at the end of a step.
    ///
    /// # Errors
    /// Returns an error when a rank has left, or a kernel fails.
    pub fn sum_over_ranks(&self) -> Result<()> {
        let Some(OverRanks { ranks, stats, load }) = &self.over_ranks else {
            return Ok(());
        };
        for (all, own) in [(stats, &self.stats), (load, &self.load)] {
            let own = own.borrow();
            sum_to(ranks, &mut all.borrow_mut(), &own, 0..own.elements())?;
        }
        agree_on_flags(ranks, &mut self.flags.borrow_mut())
    }

    /// Returns the fractions `f_i [E]` from the loads of all ranks, if there are several ranks.
    fn fractions_of_all(&self, layer: usize) -> Result<Option<Tensor>> {
        let Some(OverRanks { ranks, .. }) = &self.over_ranks else {
            return Ok(None);
        };
        let (load, experts) = (self.load.borrow(), self.experts);
        let device = load.device();
        let mut all = Tensor::unspecified(device, DType::F64, [experts]);
        let first = layer * (experts + 1);
        sum_to(ranks, &mut all, &load, first..first + experts)?;
        let mut fractions = Tensor::unspecified(device, DType::F32, [experts]);
        let kernel = LoadShares {
            fractions: fractions.output()?,
            load: all.input()?,
            experts,
        };
        kernel.launch(&Stream::of(device)?)?;
        Ok(Some(fractions))
    }

    /// Returns the flags of all layers, for the kernel that decides whether a step is accepted.
    pub fn flags(&self) -> &RefCell<Tensor> {
        &self.flags
    }

    fn upload(&self, fractions: &[f64]) -> Tensor {
        let fractions: Vec<f32> = fractions.iter().map(|f| *f as f32).collect();
        Tensor::from_slice([fractions.len()], &fractions).on(self.load.borrow().device())
    }

    fn row(tensor: &RefCell<Tensor>, layer: usize) -> Vec<f64> {
        let tensor = tensor.borrow();
        let width = tensor.shape().width();
        tensor.slice::<f64>()[layer * width..][..width].to_vec()
    }

    /// Adds the counts to row `layer`, and returns the fractions.
    fn count(&self, layer: usize, counted: &Counted<'_>, fresh: &Fresh) -> Result<Tensor> {
        let (mut stats, mut load) = (self.stats.borrow_mut(), self.load.borrow_mut());
        let (mut flags, device) = (self.flags.borrow_mut(), stats.device());
        let experts = self.experts;
        let maps = counted.chosen.maps(device)?;
        let tokens = counted.chosen.selection().num_tokens();
        let mut fractions = Tensor::unspecified(device, DType::F32, [experts]);
        let (mean_entropy, parts) = match &counted.entropy {
            // The entropy is the last element of the statistics.
            Entropy::OfKernel(statistics) => {
                let mean = statistics.input()?.from_element(2 * experts + 1);
                (Some(mean), None)
            }
            Entropy::OfShares(scores) => (None, Some(share_entropy(scores)?)),
            Entropy::Sum(sum) => (None, Some(Tensor::from_slice([1], &[*sum]).on(device))),
        };
        let non_finite = match &counted.non_finite {
            NonFinite::OfKernel(flag) => flag.clone(),
            NonFinite::At(token) => {
                let token = token.map_or(i32::MAX, |token| token as i32);
                Tensor::constant(device, [1], &[token])
            }
        };
        let kernel = LayerTally {
            stats: stats.output()?.from_element(layer * (experts + 2)),
            load: load.output()?.from_element(layer * (experts + 1)),
            flags: flags.output()?.from_element(layer * 2),
            fractions: fractions.output()?,
            offsets: maps.offsets.input()?,
            first_non_finite: non_finite.input()?,
            fault: maps.fault.input()?,
            mean_entropy,
            entropy_parts: parts.as_ref().map(Tensor::input).transpose()?,
            tokens,
            first_token: counted.first_token as usize,
            parts: parts.as_ref().map_or(0, Tensor::elements),
            experts,
            trains: counted.trains,
            first_of_stats: fresh.stats,
            first_of_step: fresh.step,
            over_step: counted.over_step,
        };
        kernel.launch(&Stream::of(device)?)?;
        Ok(fractions)
    }
}

/// Returns, for every 256 tokens, the sum of the entropy of `scores [T, E]` divided by their sum.
fn share_entropy(scores: &Tensor) -> Result<Tensor> {
    let (tokens, experts) = (scores.shape().rows(), scores.shape().width());
    let lines = [ShareEntropy::parts(tokens)];
    let mut parts = Tensor::unspecified(scores.device(), DType::F64, lines);
    let kernel = ShareEntropy {
        parts: parts.output()?,
        scores: scores.input()?,
        tokens,
        experts,
    };
    kernel.launch(&Stream::of(scores.device())?)?;
    Ok(parts)
}

impl Tally {
    /// Adds the counts, and returns `f_i [E]`, the fraction of slots that went to expert i.
    ///
    /// # Errors
    /// Returns an error when a kernel or a sum over ranks fails.
    pub fn count(&mut self, counted: &Counted<'_>, dist: &dyn Collective) -> Result<Tensor> {
        match self {
            Tally::Host(tally) => tally.count(counted, dist),
            Tally::Device { sums, layer, fresh } => {
                let fractions = sums.count(*layer, counted, fresh)?;
                fresh.stats = false;
                fresh.step &= !counted.trains;
                match counted.over_step {
                    true => Ok(sums.fractions_of_all(*layer)?.unwrap_or(fractions)),
                    false => Ok(fractions),
                }
            }
        }
    }

    /// Returns the fractions `f_i [E]` of one selection without counting it.
    pub fn fractions_of(&self, chosen: &Dispatch) -> Tensor {
        let counts = chosen.selection().counts();
        let counts: Vec<f64> = counts.into_iter().map(|c| c as f64).collect();
        match self {
            Tally::Host(_) => fractions(&counts),
            Tally::Device { sums, .. } => sums.upload(&shares(&counts)),
        }
    }

    /// Begins a new step.
    pub fn begin_step(&mut self) {
        match self {
            Tally::Host(tally) => {
                tally.tokens = 0.0;
                tally.load.clear();
                tally.first_non_finite = None;
            }
            Tally::Device { fresh, .. } => fresh.step = true,
        }
    }

    /// Returns whether the next count resets all sums first.
    pub fn is_fresh(&self) -> bool {
        match self {
            Tally::Host(_) => false,
            Tally::Device { fresh, .. } => fresh.stats && fresh.step,
        }
    }

    /// Makes the next count by kernels reset all sums first.
    pub fn count_anew(&mut self) {
        if let Tally::Device { fresh, .. } = self {
            *fresh = Fresh {
                stats: true,
                step: true,
            };
        }
    }

    /// Returns the statistics since the last call.
    pub fn take_stats(&mut self) -> LayerStats {
        match self {
            Tally::Host(tally) => std::mem::take(&mut tally.stats),
            Tally::Device { fresh, .. } if fresh.stats => LayerStats::default(),
            Tally::Device { sums, layer, fresh } => {
                fresh.stats = true;
                LayerStats::of_row(&DeviceTally::row(&sums.stats, *layer))
            }
        }
    }

    /// Returns the number of tokens of this rank in the step so far, and the number that chose each expert; empty
    /// before the first token.
    pub fn step_load(&self) -> (f64, Vec<f64>) {
        match self {
            Tally::Host(tally) => (tally.tokens, tally.load.clone()),
            Tally::Device { fresh, .. } if fresh.step => (0.0, Vec::new()),
            Tally::Device { sums, layer, .. } => {
                let mut load = DeviceTally::row(&sums.load, *layer);
                (load.pop().unwrap_or_default(), load)
            }
        }
    }

    /// Returns the ranks over which device memory is summed, if there are several.
    pub fn ranks(&self) -> Option<&DeviceRanks> {
        match self {
            Tally::Host(_) => None,
            Tally::Device { sums, .. } => sums.over_ranks.as_ref().map(|all| &all.ranks),
        }
    }

    /// If the load is in device memory, calls `f` with the tensor and the index of this layer's first element. On
    /// several ranks it is the load of all ranks.
    pub fn device_load<R>(&self, f: impl FnOnce(&Tensor, usize) -> R) -> Option<R> {
        match self {
            Tally::Host(_) => None,
            Tally::Device { sums, layer, .. } => {
                let all = sums.over_ranks.as_ref();
                let load = all.map_or(&sums.load, |all| &all.load).borrow();
                Some(f(&load, layer * (sums.experts + 1)))
            }
        }
    }

    /// Returns the index in the global batch of this rank's first token in this step whose logits were not finite.
    pub fn first_non_finite(&self) -> Option<usize> {
        match self {
            Tally::Host(tally) => tally.first_non_finite,
            Tally::Device { fresh, .. } if fresh.step => None,
            Tally::Device { sums, layer, .. } => {
                let flags = sums.flags.borrow();
                let token = flags.slice::<i32>()[2 * layer];
                (token < i32::MAX).then_some(token as usize)
            }
        }
    }
}

impl HostTally {
    fn count(&mut self, counted: &Counted<'_>, dist: &dyn Collective) -> Result<Tensor> {
        let selection = counted.chosen.selection();
        let counts: Vec<f64> = selection.counts().into_iter().map(|c| c as f64).collect();
        let tokens = selection.num_tokens() as f64;
        let add = |sums: &mut Vec<f64>| {
            sums.resize(counts.len(), 0.0);
            sums.iter_mut().zip(&counts).for_each(|(s, c)| *s += c);
        };
        add(&mut self.stats.counts);
        self.stats.tokens += tokens;
        if let Entropy::Sum(entropy) = counted.entropy {
            self.stats.entropy += entropy;
        }
        if counted.trains {
            add(&mut self.load);
            self.tokens += tokens;
            if let NonFinite::At(token) = counted.non_finite {
                let place = token.map(|token| counted.first_token as usize + token);
                self.first_non_finite = self.first_non_finite.or(place);
            }
        }
        let slots = if counted.over_step {
            let mut load = self.load.clone();
            dist.sum(&mut load)?;
            load
        } else {
            counts
        };
        Ok(fractions(&slots))
    }
}

fn fractions(slots: &[f64]) -> Tensor {
    Tensor::from_slice([slots.len()], &shares(slots))
}

fn shares(slots: &[f64]) -> Vec<f64> {
    let all: f64 = slots.iter().sum();
    slots.iter().map(|n| n / all.max(1.0)).collect()
}
