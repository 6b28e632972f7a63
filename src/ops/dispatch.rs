//! Dispatch: from the experts each token chose to rows sorted by expert.
//!
//! A *slot* is one (token, expert) pair, in token order and within a token in expert order; a *row* is the same pair
//! in expert order and within an expert in token order. With R slots, T tokens and E experts: `offsets [E + 1]` are
//! the indices of the experts' first rows, `row_token [R]` the token of a row, `slot_row [R]` the row of a slot.
//! Nothing here is differentiable.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::{DispatchChoices, DispatchPositive, Stream, dispatch};
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use std::sync::{Arc, OnceLock};

/// The experts that each token chose: any number per token, in ascending order. If a kernel made the choice, the
/// first access from the host waits for that kernel and copies the choice.
#[derive(Clone, Debug)]
pub struct Selection {
    num_tokens: usize,
    num_experts: usize,
    chosen: Chosen,
    lists: OnceLock<Arc<Lists>>,
}

/// Where the choice was made.
#[derive(Clone, Debug)]
enum Chosen {
    /// On the host, which holds the lists.
    Host,
    /// By a kernel: K experts of each token, `[T, K]`.
    Experts(Tensor),
    /// By a kernel: the experts whose scores `[T, E]` are positive.
    Positive(Tensor),
    /// No choice: every expert runs for every token.
    All,
}

#[derive(Debug, PartialEq, Eq)]
struct Lists {
    /// `[T + 1]`: first slot of each token.
    token_slots: Vec<i32>,
    /// `[R]`: expert of each slot.
    slot_expert: Vec<i32>,
}

impl Lists {
    fn new(
        num_tokens: usize,
        num_experts: usize,
        mut choose: impl FnMut(usize, &mut Vec<i32>),
    ) -> Result<Self> {
        let mut token_slots = vec![0];
        let mut slot_expert = Vec::new();
        for token in 0..num_tokens {
            let first = slot_expert.len();
            choose(token, &mut slot_expert);
            let chosen = &slot_expert[first..];
            let in_range = chosen.iter().all(|&e| (0..num_experts as i32).contains(&e));
            let slots = i32::try_from(slot_expert.len());
            match slots {
                Ok(slots) if in_range && chosen.windows(2).all(|w| w[0] < w[1]) => {
                    token_slots.push(slots);
                }
                _ => {
                    return Err(Error::invalid(
                        "dispatch",
                        format!("ascending experts below {num_experts}, at most 2^31 slots"),
                        format!("{chosen:?} for token {token}"),
                        "this is a bug of the router",
                    ));
                }
            }
        }
        Ok(Lists {
            token_slots,
            slot_expert,
        })
    }

    fn of_choices(choices: &[i32], tokens: usize, num_experts: usize) -> Result<Self> {
        let top_k = choices.len() / tokens.max(1);
        Self::new(tokens, num_experts, |t, chosen| {
            chosen.extend_from_slice(&choices[t * top_k..(t + 1) * top_k]);
        })
    }

    fn positive<T: Real>(scores: &[T], tokens: usize, num_experts: usize) -> Result<Self> {
        Self::new(tokens, num_experts, |t, chosen| {
            let row = &scores[t * num_experts..(t + 1) * num_experts];
            let positive = (0..).zip(row).filter(|(_, s)| s.f64() > 0.0);
            chosen.extend(positive.map(|(e, _)| e));
        })
    }
}

impl PartialEq for Selection {
    fn eq(&self, other: &Self) -> bool {
        self.num_experts == other.num_experts && self.lists() == other.lists()
    }
}

impl Selection {
    /// Builds a selection of `num_tokens` lists. `choose` gets a token and appends the token's experts.
    ///
    /// # Errors
    /// Returns an error when a list is not strictly ascending or names an expert beyond `num_experts`, or there are
    /// more than 2^31 slots.
    pub fn new(
        num_tokens: usize,
        num_experts: usize,
        choose: impl FnMut(usize, &mut Vec<i32>),
    ) -> Result<Self> {
        let lists = Lists::new(num_tokens, num_experts, choose)?;
        Ok(Selection::of_lists(num_tokens, num_experts, lists))
    }

    fn of_lists(num_tokens: usize, num_experts: usize, lists: Lists) -> Self {
        Selection {
            num_tokens,
            num_experts,
            chosen: Chosen::Host,
            lists: OnceLock::from(Arc::new(lists)),
        }
    }

    /// Builds a selection from `choices [T, top_k]`, ascending in each row.
    ///
    /// # Errors
    /// The same errors as [`new`](Self::new).
    pub fn from_choices(choices: &[i32], tokens: usize, num_experts: usize) -> Result<Self> {
        let lists = Lists::of_choices(choices, tokens, num_experts)?;
        Ok(Selection::of_lists(tokens, num_experts, lists))
    }

    /// Selects the experts with a positive score in `scores [T, E]`: any number per token.
    ///
    /// # Errors
    /// Returns an error when there are more than 2^31 slots.
    pub fn positive<T: Real>(scores: &[T], tokens: usize, num_experts: usize) -> Result<Self> {
        let lists = Lists::positive(scores, tokens, num_experts)?;
        Ok(Selection::of_lists(tokens, num_experts, lists))
    }

    /// The selection that a kernel wrote to `choices [T, top_k]`, ascending in each row.
    pub fn of_kernel(choices: Tensor, num_experts: usize) -> Self {
        Selection {
            num_tokens: choices.shape()[0],
            num_experts,
            chosen: Chosen::Experts(choices),
            lists: OnceLock::new(),
        }
    }

    /// Selects the experts whose scores `[T, E]`, written by a kernel in f32, are positive.
    pub fn positive_of_kernel(scores: Tensor) -> Self {
        Selection {
            num_tokens: scores.shape()[0],
            num_experts: scores.shape()[1],
            chosen: Chosen::Positive(scores),
            lists: OnceLock::new(),
        }
    }

    /// Returns the selection as lists on the host, for any device. Waits for the kernel that made the choice.
    pub fn on_host(self) -> Self {
        self.lists();
        Selection {
            chosen: Chosen::Host,
            ..self
        }
    }

    fn lists(&self) -> &Lists {
        self.lists.get_or_init(|| {
            let (tokens, experts) = (self.num_tokens, self.num_experts);
            let lists = match &self.chosen {
                Chosen::Host => unreachable!("the host's lists are there"),
                Chosen::Experts(choices) => Lists::of_choices(choices.slice(), tokens, experts),
                Chosen::Positive(scores) => Lists::positive(scores.slice::<f32>(), tokens, experts),
                Chosen::All => Lists::new(tokens, experts, |_, chosen| {
                    chosen.extend(0..experts as i32);
                }),
            };
            Arc::new(lists.unwrap_or_else(|e| panic!("{e}")))
        })
    }

    /// The number of experts per token if the host's lists are equally long, else none.
    fn experts_per_token(&self) -> Option<usize> {
        let k = self.num_slots() / self.num_tokens.max(1);
        let mut slots = self.lists().token_slots.windows(2);
        slots.all(|s| (s[1] - s[0]) as usize == k).then_some(k)
    }

    /// Selects every expert for every token.
    pub fn all(num_tokens: usize, num_experts: usize) -> Self {
        Selection {
            num_tokens,
            num_experts,
            chosen: Chosen::All,
            lists: OnceLock::new(),
        }
    }

    /// Returns T, the number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Returns E, the number of experts.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Returns the number of (token, expert) pairs, or an upper bound if only a kernel knows the number.
    pub fn num_slots(&self) -> usize {
        match &self.chosen {
            Chosen::Host => self.lists().slot_expert.len(),
            Chosen::Experts(choices) => choices.elements(),
            Chosen::Positive(_) | Chosen::All => self.num_tokens * self.num_experts,
        }
    }

    /// Returns the slots of a token.
    pub fn slots(&self, token: usize) -> std::ops::Range<usize> {
        let first = &self.lists().token_slots;
        first[token] as usize..first[token + 1] as usize
    }

    /// Returns the expert of a slot.
    pub fn expert(&self, slot: usize) -> usize {
        self.lists().slot_expert[slot] as usize
    }

    /// Returns the experts of a token, ascending.
    pub fn experts(&self, token: usize) -> &[i32] {
        &self.lists().slot_expert[self.slots(token)]
    }

    /// Returns the number of tokens per expert, `[E]`.
    pub fn counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.num_experts];
        for &e in &self.lists().slot_expert {
            counts[e as usize] += 1;
        }
        counts
    }

    fn maps(&self, device: Device, rows: usize) -> Result<DeviceMaps> {
        let (tokens, experts) = (self.num_tokens, self.num_experts);
        let named = match &self.chosen {
            Chosen::Experts(choices) => Named::Experts(choices.clone()),
            Chosen::Positive(scores) => Named::Positive(Some(scores.clone())),
            Chosen::All => Named::Positive(None),
            Chosen::Host => match self.experts_per_token().filter(|k| *k > 0) {
                Some(k) => {
                    let choices = Tensor::from_slice([tokens, k], &self.lists().slot_expert);
                    Named::Experts(choices.on(device))
                }
                None => {
                    let mut scores = vec![0f32; tokens * experts];
                    for (token, row) in scores.chunks_mut(experts).enumerate() {
                        let chosen = self.experts(token).iter();
                        chosen.for_each(|&expert| row[expert as usize] = 1.0);
                    }
                    let scores = Tensor::from_slice([tokens, experts], &scores);
                    Named::Positive(Some(scores.on(device)))
                }
            },
        };
        maps_of(device, named, [tokens, experts], rows)
    }
}

/// The tokens' choices in the form that the kernels of `kernels/dispatch.cu` read.
pub(super) enum Named {
    /// `[T, K]`.
    Experts(Tensor),
    /// The experts whose scores `[T, E]` are positive; every expert if there are no scores.
    Positive(Option<Tensor>),
}

/// Runs the kernels that build the maps from at most `rows` choices of T tokens among E experts.
///
/// # Errors
/// Returns an error when a kernel fails.
pub(super) fn maps_of(
    device: Device,
    named: Named,
    [tokens, experts]: [usize; 2],
    rows: usize,
) -> Result<DeviceMaps> {
    let slots = match &named {
        Named::Experts(choices) => choices.shape()[1],
        Named::Positive(_) => experts,
    };
    let stream = Stream::of(device)?;
    let bytes = dispatch::workspace(stream.launchers(), tokens, experts, slots)?;
    let new = |count: usize| Tensor::unspecified(device, DType::I32, [count]);
    let mut offsets = new(experts + 1);
    let (mut row_token, mut row_slot) = (new(rows.max(1)), new(rows.max(1)));
    let mut slot_row = Tensor::unspecified(device, DType::I32, [tokens, slots]);
    let mut fault = Tensor::zeros(device, DType::I32, [1]);
    let mut workspace = new(bytes.div_ceil(4));
    match &named {
        Named::Experts(choices) => DispatchChoices {
            offsets: offsets.output()?,
            row_token: row_token.output()?,
            row_slot: row_slot.output()?,
            slot_row: slot_row.output()?,
            fault: fault.output()?,
            workspace: workspace.output()?,
            choices: choices.input()?,
            tokens,
            experts,
            choices_per_token: slots,
            row_capacity: rows,
        }
        .launch(&stream)?,
        Named::Positive(scores) => DispatchPositive {
            offsets: offsets.output()?,
            row_token: row_token.output()?,
            row_slot: row_slot.output()?,
            slot_row: slot_row.output()?,
            fault: fault.output()?,
            workspace: workspace.output()?,
            scores: scores.as_ref().map(Tensor::input).transpose()?,
            tokens,
            experts,
            row_capacity: rows.max(1),
        }
        .launch(&stream)?,
    }
    let choices = match named {
        Named::Experts(choices) => Some(choices),
        Named::Positive(_) => None,
    };
    Ok(DeviceMaps {
        offsets,
        row_token,
        slot_row,
        choices,
        fault,
        slots,
    })
}

/// The maps between slots and rows of a selection. The host and a device build them when they first need them.
#[derive(Clone, Debug)]
pub struct Dispatch {
    selection: Selection,
    host: OnceLock<HostMaps>,
    device: OnceLock<DeviceMaps>,
}

#[derive(Clone, Debug)]
struct HostMaps {
    offsets: Vec<i32>,
    row_token: Vec<i32>,
    slot_row: Vec<i32>,
}

/// The maps that the kernels of `kernels/dispatch.cu` build for other kernels. Here every token has `slots` slots: K,
/// or, if the number of experts per token varies, E slots of which some are unused.
#[derive(Clone, Debug)]
pub struct DeviceMaps {
    /// `[E + 1]`.
    pub offsets: Tensor,
    /// `[R]`.
    pub row_token: Tensor,
    /// `[T, slots]`; −1 for an unused slot.
    pub slot_row: Tensor,
    /// `[T, slots]`: expert of each slot; none if slot i belongs to expert i.
    pub choices: Option<Tensor>,
    /// `[1]`: bits of `routegrad_fault`.
    pub fault: Tensor,
    /// Number of slots of a token: the number of its choices, or E.
    pub slots: usize,
}

impl HostMaps {
    /// A stable counting sort of the slots by expert.
    fn new(selection: &Selection) -> Self {
        let mut offsets = vec![0; selection.num_experts + 1];
        for (e, count) in selection.counts().into_iter().enumerate() {
            offsets[e + 1] = offsets[e] + count as i32;
        }
        let mut next = offsets.clone();
        let mut row_token = vec![0; selection.num_slots()];
        let mut slot_row = vec![0; selection.num_slots()];
        for token in 0..selection.num_tokens() {
            for slot in selection.slots(token) {
                let row = &mut next[selection.expert(slot)];
                row_token[*row as usize] = token as i32;
                slot_row[slot] = *row;
                *row += 1;
            }
        }
        HostMaps {
            offsets,
            row_token,
            slot_row,
        }
    }
}

impl Dispatch {
    /// The maps of a selection.
    pub fn new(selection: Selection) -> Self {
        Dispatch {
            selection,
            host: OnceLock::new(),
            device: OnceLock::new(),
        }
    }

    fn host(&self) -> &HostMaps {
        self.host.get_or_init(|| HostMaps::new(&self.selection))
    }

    /// Returns the maps on a device with kernels. The first call builds them.
    ///
    /// # Errors
    /// Returns an error when a kernel fails.
    pub fn maps(&self, device: Device) -> Result<&DeviceMaps> {
        if let Some(maps) = self.device.get() {
            return Ok(maps);
        }
        let maps = self.selection.maps(device, self.num_rows())?;
        Ok(self.device.get_or_init(|| maps))
    }

    /// Returns the selection from which the rows were built.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Returns R, the number of (token, expert) pairs, or an upper bound if only a kernel knows the number.
    pub fn num_rows(&self) -> usize {
        self.selection.num_slots()
    }

    /// Returns the rows of an expert.
    pub fn rows(&self, expert: usize) -> std::ops::Range<usize> {
        let first = &self.host().offsets;
        first[expert] as usize..first[expert + 1] as usize
    }

    /// Returns the token of a row.
    pub fn token(&self, row: usize) -> usize {
        self.host().row_token[row] as usize
    }

    /// Returns the row of a slot.
    pub fn row(&self, slot: usize) -> usize {
        self.host().slot_row[slot] as usize
    }

    /// Returns blocks of at most `block` rows as (expert, rows). No block spans two experts; the blocks of one expert
    /// have about the same length.
    pub fn row_blocks(&self, block: usize) -> Vec<(usize, std::ops::Range<usize>)> {
        let of_expert = |e: usize| {
            let rows = self.rows(e);
            let count = rows.len().div_ceil(block).max(1);
            let length = rows.len().div_ceil(count).max(1);
            let firsts = rows.clone().step_by(length);
            firsts.map(move |r| (e, r..(r + length).min(rows.end)))
        };
        (0..self.selection.num_experts)
            .flat_map(of_expert)
            .collect()
    }
}

/// `k` experts for each of `tokens` tokens, pseudo-random. With `skip_odd`, odd experts get no tokens.
pub(super) fn scattered(tokens: usize, experts: usize, k: usize, skip_odd: bool) -> Selection {
    let selection = Selection::new(tokens, experts, |t, chosen| {
        let usable: Vec<i32> = (0..experts as i32)
            .filter(|e| !skip_odd || e % 2 == 0)
            .collect();
        let start = (t * 7 + t / 3) % usable.len();
        let mut own: Vec<i32> = (0..k.min(usable.len()))
            .map(|i| usable[(start + i) % usable.len()])
            .collect();
        own.sort_unstable();
        chosen.extend(own);
    });
    match selection {
        Ok(selection) => selection,
        Err(e) => unreachable!("ascending by construction: {e}"),
    }
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
