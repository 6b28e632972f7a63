//! The end of an optimizer step on a device with kernels (`kernels/adamw.cu`, `kernels/step.cu`): the gradient's
//! norm, the decision whether the step is accepted, the update of all parameters, and the commit of the router state.
//! The host launches all of this without waiting, and reads the outcome when the step has finished.

use super::{AdamW, Shards, device_shards};
use crate::device::Device;
use crate::dist::DeviceRanks;
use crate::error::Result;
use crate::kernels::adamw::{AdamwUpdate, BLOCK, SquareSums};
use crate::kernels::argument::Element;
use crate::kernels::bindings::{routegrad_parameter, routegrad_state};
use crate::kernels::step::{LossesAdd, StateCommit, StepDecide};
use crate::kernels::table::{Row, bytes_of, row_of};
use crate::kernels::{In, Stream};
use crate::model::{Losses, Parameter, Places};
use crate::ops::over_ranks;
use crate::routers::LayerState;
use crate::tape::{Gradients, Var};
use crate::tensor::Tensor;
use crate::tensor::dtype::DType;
use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr::{null, null_mut};

pub use crate::kernels::bindings::routegrad_step_outcome as Outcome;
pub use crate::kernels::bindings::routegrad_step_settings as Settings;

/// The data of an optimizer step in device memory, which is kept between steps.
pub struct DeviceStep {
    device: Device,
    parameters: Table<routegrad_parameter>,
    /// The parameter of each block of this rank, `[blocks]`, and the sum of squares of each block. There are as many
    /// sums as the largest share of a rank has blocks; unused sums are 0.
    block_parameter: Tensor,
    parts: Tensor,
    /// The ranks, if there are several.
    ranks: Option<DeviceRanks>,
    /// Whether this rank was requested to stop, and the number of ranks that were, `[1]` f64 each.
    stop: Tensor,
    stops: Tensor,
    asked: bool,
    /// Whether a report since the last call of [`ask_to_stop`](Self::ask_to_stop) contained a stop request of any
    /// rank.
    stop_read: bool,
    settings: Table<Settings>,
    outcome: Tensor,
    /// The number of updates in the outcome, as last known to the host.
    updates: u64,
    /// Cross-entropy, auxiliary and z-loss of the step, `[3]` f64.
    losses: Tensor,
    states: Table<routegrad_state>,
}

impl DeviceStep {
    /// Creates the data for this rank's share of the parameters. If there are several `ranks`, the parameters are
    /// divided among them.
    pub fn new(
        device: Device,
        parameters: &[Parameter],
        shards: &Shards,
        ranks: Option<DeviceRanks>,
    ) -> Self {
        let block_parameter: Vec<i32> = (0..parameters.len())
            .flat_map(|i| std::iter::repeat_n(i as i32, shards.own(i).len().div_ceil(BLOCK)))
            .collect();
        let (blocks, most) = (block_parameter.len(), shards.most_blocks(BLOCK));
        DeviceStep {
            device,
            parameters: Table::new(device),
            block_parameter: Tensor::from_slice([blocks], &block_parameter).on(device),
            parts: Tensor::zeros(device, DType::F64, [most]),
            ranks: ranks.filter(|_| !shards.is_whole()),
            stop: Tensor::zeros(device, DType::F64, [1]),
            stops: Tensor::zeros(device, DType::F64, [1]),
            asked: false,
            stop_read: false,
            settings: Table::new(device),
            outcome: Tensor::zeros(device, DType::I32, [size_of::<Outcome>() / 4]),
            updates: 0,
            losses: Tensor::unspecified(device, DType::F64, [3]),
            states: Table::new(device),
        }
    }

    /// Adds the losses of a micro-batch, multiplied by `share`, to those of the step. `first` says whether it is the
    /// first micro-batch of the step.
    ///
    /// # Errors
    /// Returns an error when a kernel fails.
    pub fn add_losses(&mut self, losses: &Losses, share: f64, first: bool) -> Result<()> {
        fn term(loss: &Option<Var>) -> Result<Option<In<'_, f32>>> {
            loss.as_ref().map(|l| l.tensor().input()).transpose()
        }
        let kernel = LossesAdd {
            sums: self.losses.output()?,
            cross_entropy: losses.cross_entropy.tensor().input()?,
            auxiliary: term(&losses.auxiliary)?,
            z: term(&losses.z)?,
            share,
            first,
        };
        kernel.launch(&Stream::of(self.device)?)
    }

    /// Sums the losses over all `ranks`, and counts the ranks that were requested to stop.
    ///
    /// # Errors
    /// Returns an error when a rank has left, or a kernel fails.
    pub fn sum_over_ranks(&mut self, ranks: &DeviceRanks) -> Result<()> {
        over_ranks::sum(ranks, &mut self.losses)?;
        over_ranks::sum_to(ranks, &mut self.stops, &self.stop, 0..1)
    }

    /// Makes the following steps inform the other ranks whether this rank was `asked` to stop. Returns whether a
    /// report since the last call contained a stop request of any rank.
    pub fn ask_to_stop(&mut self, asked: bool) -> bool {
        if self.asked != asked {
            self.asked = asked;
            self.stop.slice_mut::<f64>()[0] = f64::from(u8::from(asked));
        }
        std::mem::take(&mut self.stop_read)
    }

    /// Reads the number of ranks that were requested to stop from a copy of a step's results.
    ///
    /// # Errors
    /// Returns an error when `stops` does not hold one number.
    pub fn read_stop(&mut self, stops: &Tensor) -> Result<()> {
        self.stop_read |= stops.item()? > 0.0;
        Ok(())
    }

    /// Copies to the device the inputs of [`update`](Self::update) that are known before the step. Returns whether
    /// the address of a parameter, moment or gradient has changed since the last step.
    ///
    /// # Errors
    /// Returns an error when a gradient is not f32.
    pub fn prepare(
        &mut self,
        optimizer: &mut AdamW,
        parameters: &mut [Parameter],
        gradients: &mut Gradients,
        settings: Settings,
    ) -> Result<bool> {
        if self.updates != optimizer.steps {
            // Training resumes from a checkpoint.
            let outcome = Outcome {
                updates: optimizer.steps,
                ..Default::default()
            };
            let bytes = self.outcome.bytes_mut();
            bytes.copy_from_slice(bytes_of(&[outcome]));
        }
        self.settings.set(&[settings]);
        // Tensors that the host has read are copied back for the kernels.
        let results = [&mut self.outcome, &mut self.losses];
        for kept in results.into_iter().chain([&mut self.stop, &mut self.stops]) {
            kept.pointer_mut::<u8>();
        }
        let rows = rows(optimizer, parameters, gradients)?;
        Ok(self.parameters.set(&rows))
    }

    /// Copies the addresses of the layers' states, for [`commit`](Self::commit). Returns whether an address has
    /// changed since the last step.
    pub fn prepare_states(&mut self, states: &mut [LayerState]) -> bool {
        self.states.set(&state_rows(states))
    }

    /// Decides on the step that was [prepared](Self::prepare), and updates the parameters if it is accepted.
    ///
    /// # Errors
    /// Returns an error when a gradient is not f32, or a kernel fails.
    pub fn update(
        &mut self,
        optimizer: &mut AdamW,
        parameters: &mut [Parameter],
        gradients: &mut Gradients,
        flags: Option<&RefCell<Tensor>>,
    ) -> Result<()> {
        let stream = Stream::of(self.device)?;
        self.parameters
            .set(&rows(optimizer, parameters, gradients)?);
        let flags = flags.map(RefCell::borrow);
        let blocks = self.block_parameter.elements();
        // In a small model, a rank may have no blocks.
        if blocks > 0 {
            let sums = SquareSums {
                parts: self.parts.output()?,
                parameters: self.parameters.input()?,
                block_parameter: self.block_parameter.input()?,
                blocks,
            };
            sums.launch(&stream)?;
        }
        let parts = match &self.ranks {
            None => Cow::Borrowed(&self.parts),
            Some(ranks) => {
                let own = 0..self.parts.elements();
                Cow::Owned(over_ranks::gathered(ranks, &self.parts, own)?)
            }
        };
        let decision = StepDecide {
            outcome: self.outcome.output()?,
            settings: self.settings.input()?,
            losses: self.losses.input()?,
            flags: flags.as_ref().map(|f| f.input()).transpose()?,
            parts: parts.input()?,
            count: parts.elements(),
            layers: flags.as_ref().map_or(0, |f| f.shape()[0]),
        };
        decision.launch(&stream)?;
        if blocks > 0 {
            let update = AdamwUpdate {
                parameters: self.parameters.input()?,
                block_parameter: self.block_parameter.input()?,
                outcome: self.outcome.input()?,
                blocks,
                bf16_moments: optimizer.bf16_moments,
            };
            update.launch(&stream)?;
        }
        match &self.ranks {
            None => Ok(()),
            Some(ranks) => device_shards::gather_weights(ranks, &optimizer.shards, parameters),
        }
    }

    /// Commits the pending state of the layers, or discards it if the step was not accepted.
    ///
    /// # Errors
    /// Returns an error when a kernel fails.
    pub fn commit(&mut self, states: &mut [LayerState]) -> Result<()> {
        let rows = state_rows(states);
        let Some(most) = rows.iter().map(|row| row.words).max() else {
            return Ok(());
        };
        self.states.set(&rows);
        let kernel = StateCommit {
            states: self.states.input()?,
            outcome: self.outcome.input()?,
            count: rows.len(),
            most_words: most as usize,
        };
        kernel.launch(&Stream::of(self.device)?)
    }

    /// Returns the results of the step in device memory: the outcome, and the number of ranks that were requested to
    /// stop.
    pub fn results(&self) -> [&Tensor; 2] {
        [&self.outcome, &self.stops]
    }

    /// Reads the outcome of a step from a copy of it, and updates the optimizer's step count.
    pub fn outcome(&mut self, copy: &Tensor, optimizer: &mut AdamW) -> Outcome {
        let outcome: Outcome = row_of(copy.bytes());
        self.updates = outcome.updates;
        optimizer.steps = outcome.updates;
        outcome
    }
}

/// Builds the table of the parameters with their moments and gradients. The blocks of a rank's share have the same
/// numbers as in the complete parameter. The address of a tensor that holds only the rank's share is shifted to where
/// the complete tensor would begin, so that kernels can use the same offsets.
fn rows(
    optimizer: &mut AdamW,
    parameters: &mut [Parameter],
    gradients: &mut Gradients,
) -> Result<Vec<routegrad_parameter>> {
    let mut first_block = 0;
    let mut rows = Vec::with_capacity(parameters.len());
    let (shards, moments) = (&optimizer.shards, optimizer.moments.iter_mut());
    for (i, (parameter, moments)) in parameters.iter_mut().zip(moments).enumerate() {
        let gradient = gradients.get_mut(i);
        if let Some(gradient) = &gradient {
            gradient.expect_dtype("adamw", "gradient", DType::F32)?;
            gradient.expect_shape("adamw", "gradient", parameter.value.shape())?;
        }
        let own = shards.own(i);
        let before = |t: &mut Tensor| -> *mut c_void {
            let bytes = own.start * t.dtype().size();
            t.pointer_mut::<u8>().wrapping_sub(bytes).cast()
        };
        let shared_out = parameter.value.lower_share().is_some();
        let (whole, upper, lower) = match parameter.value.places() {
            Places::Whole(value) => (value.pointer_mut(), null_mut(), null_mut()),
            Places::Split([upper, lower]) if shared_out => {
                (null_mut(), upper.pointer_mut(), before(lower).cast())
            }
            Places::Split([upper, lower]) => (null_mut(), upper.pointer_mut(), lower.pointer_mut()),
        };
        rows.push(routegrad_parameter {
            whole,
            upper,
            lower,
            first: before(&mut moments.first),
            second: before(&mut moments.second),
            gradient: gradient.map_or(null(), |g| g.pointer_mut::<f32>().cast_const()),
            elements: own.end as i64,
            first_block: first_block - (own.start / BLOCK) as i64,
            decays: parameter.decays.into(),
            reserved: 0,
        });
        first_block += own.len().div_ceil(BLOCK) as i64;
    }
    Ok(rows)
}

/// Builds the table of the committed and pending states.
fn state_rows(states: &mut [LayerState]) -> Vec<routegrad_state> {
    let both = states.iter_mut().flat_map(LayerState::both);
    both.map(|(committed, pending)| routegrad_state {
        words: (committed.elements() * committed.dtype().size() / 4) as i64,
        committed: committed.pointer_mut(),
        pending: pending.pointer_mut(),
    })
    .collect()
}

/// Rows of numbers and addresses in device memory, copied there when they change.
struct Table<R> {
    tensor: Tensor,
    rows: Vec<R>,
}

impl<R: Row + Element> Table<R> {
    fn new(device: Device) -> Self {
        Table {
            tensor: Tensor::zeros(device, DType::I32, [0]),
            rows: Vec::new(),
        }
    }

    /// Replaces the rows, and returns whether they differ from the previous rows.
    fn set(&mut self, rows: &[R]) -> bool {
        if bytes_of(&self.rows) == bytes_of(rows) {
            return false;
        }
        self.rows = rows.to_vec();
        let bytes = bytes_of(rows);
        if self.tensor.bytes().len() != bytes.len() {
            let device = self.tensor.device();
            self.tensor = Tensor::unspecified(device, DType::I32, [bytes.len() / 4]);
        }
        self.tensor.bytes_mut().copy_from_slice(bytes);
        self.tensor.pointer::<u8>(); // copies them
        true
    }

    fn input(&self) -> Result<In<'_, R>> {
        self.tensor.input()
    }
}
