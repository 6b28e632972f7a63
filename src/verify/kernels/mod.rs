//! Cases of the kernels. Each declares shapes, inputs, launch, float64 reference and error bound once, and runs on the
//! simulator (in the tests) and on a GPU (in `hardware-check`).
//!
//! A [`Case`] is a named group of [`Problem`]s of one launcher. A problem lists its buffers, launches the kernel, and
//! checks the outputs. [`Run`] runs it on a [`Machine`]: every buffer is between guard bands, every output is initially
//! poisoned, and inputs must not change.

pub mod adamw;
pub mod attention;
pub mod attention_backward;
pub mod balance;
pub mod bound;
pub mod combine;
pub mod cross_entropy;
pub mod dispatch;
pub mod embedding;
pub mod expert_mean;
pub mod experts;
pub mod gate_gradient;
pub mod gates;
pub mod grouped_down;
pub mod grouped_gemm;
pub mod grouped_swiglu;
pub mod layer_tally;
pub mod machine;
pub mod norm;
pub mod numbers;
pub mod operands;
pub mod problem;
pub mod qk_norm;
pub mod qkv_rope;
pub mod ranks;
pub mod rope;
pub mod routed;
pub mod router;
pub mod router_backward;
pub mod router_sample;
mod router_shapes;
pub mod rows;
pub mod sampled_gates;
pub mod step;
pub mod sum_parts;
pub mod swiglu;
pub mod unit;

pub use bound::Bound;
pub(crate) use bound::{bind, launch_of};
pub use machine::{Guarded, Machine, Simulator};
pub use numbers::Errors;
use problem::with;
pub use problem::{
    BOTH, Buffer, Case, Content, Judge, Launch, MakeProblem, Problem, each, pairs, sharing,
};

use crate::error::Result;

/// Returns all cases, in the order in which they should first run on a GPU.
pub fn cases() -> Vec<Case> {
    let mut all = unit::cases();
    all.extend(router::cases());
    all.extend(router_backward::cases());
    all.extend(router_sample::cases());
    all.extend(dispatch::cases());
    all.extend(grouped_gemm::cases());
    all.extend(expert_mean::cases());
    all.extend(combine::cases());
    all.extend(gate_gradient::cases());
    all.extend(grouped_swiglu::cases());
    all.extend(grouped_down::cases());
    all.extend(norm::cases());
    all.extend(attention::cases());
    all.extend(attention_backward::cases());
    all.extend(cross_entropy::cases());
    all.extend(swiglu::cases());
    all.extend(adamw::cases());
    all.extend(step::cases());
    all.extend(layer_tally::cases());
    all.extend(sum_parts::cases());
    all.extend(rope::cases());
    all.extend(qkv_rope::cases());
    all.extend(embedding::cases());
    all.extend(balance::cases());
    all.extend(gates::cases());
    all.extend(sampled_gates::cases());
    all.extend(rows::cases());
    all.extend(qk_norm::cases());
    all.extend(ranks::cases());
    all
}

/// A problem on a machine.
pub struct Run<'a> {
    machine: &'a dyn Machine,
    problem: &'a Problem,
    buffers: Vec<Guarded<'a>>,
}

impl<'a> Run<'a> {
    /// Allocates and initialises every buffer.
    ///
    /// # Errors
    /// When the machine does not have enough memory.
    pub fn new(machine: &'a dyn Machine, problem: &'a Problem) -> Result<Self> {
        let mut buffers = Vec::new();
        for buffer in &problem.buffers {
            let mut guarded = Guarded::new(machine, buffer.bytes())?;
            if let Content::Input(bytes) | Content::Changed(bytes) = &buffer.content {
                guarded.write(bytes)?;
            }
            buffers.push(guarded);
        }
        let addresses: Vec<*mut u8> = buffers.iter().map(Guarded::pointer).collect();
        for (buffer, guarded) in problem.buffers.iter().zip(&mut buffers) {
            if let Content::Table(_, fill) = &buffer.content {
                guarded.write(&fill(&addresses))?;
            }
        }
        Ok(Self {
            machine,
            problem,
            buffers,
        })
    }

    /// Restores the initial content of every buffer that a launch may write.
    pub fn reset(&mut self) -> Result<()> {
        for (buffer, guarded) in self.problem.buffers.iter().zip(&mut self.buffers) {
            match &buffer.content {
                Content::Input(_) | Content::Table(..) => {}
                Content::Output(_) | Content::Workspace(_) => guarded.poison()?,
                Content::Changed(bytes) => guarded.write(bytes)?,
            }
        }
        Ok(())
    }

    /// Returns the buffers on the machine with their names.
    fn bound(&self) -> Bound {
        Bound {
            names: self.problem.buffers.iter().map(|b| b.name).collect(),
            buffers: self.buffers.iter().map(Guarded::buffer).collect(),
        }
    }

    /// Returns the addresses of the buffers on the machine.
    pub fn pointers(&self) -> Vec<*mut u8> {
        self.buffers.iter().map(Guarded::pointer).collect()
    }

    /// Returns the first `bytes` bytes of the buffer called `name` after all earlier launches; fewer if it is shorter.
    ///
    /// # Errors
    /// When a launch failed.
    ///
    /// # Panics
    /// When no buffer has this name.
    pub fn content(&self, name: &str, bytes: usize) -> Result<Vec<u8>> {
        self.machine.finish()?;
        let place = self.problem.buffers.iter().position(|b| b.name == name);
        self.buffers[place.expect("a buffer of the problem")].read_first(bytes)
    }

    /// Launches the problem; on a GPU it may still be running on return.
    pub fn launch(&self) -> Result<()> {
        self.launch_as(&self.problem.launch)
    }

    /// Launches something else on the buffers of the problem.
    ///
    /// # Errors
    /// When the launcher returns an error.
    pub fn launch_as(&self, launch: &Launch) -> Result<()> {
        launch(&self.bound(), &self.machine.stream()?)
    }

    /// Waits for the launches and returns the content of the outputs.
    ///
    /// # Errors
    /// A text that says what failed: a launch, a guard band, or an input that was changed.
    pub fn outputs(&self) -> Result<Vec<Vec<u8>>, String> {
        let label = &self.problem.label;
        self.machine.finish().map_err(|e| format!("{label}: {e}"))?;
        let mut outputs = Vec::new();
        for (buffer, guarded) in self.problem.buffers.iter().zip(&self.buffers) {
            let name = buffer.name;
            if let Some(at) = guarded.overwritten().map_err(|e| e.to_string())? {
                return Err(format!(
                    "{label}: `{name}` was written {at} bytes from its start, outside of it"
                ));
            }
            let bytes = guarded.read().map_err(|e| e.to_string())?;
            match &buffer.content {
                Content::Input(before) if *before != bytes => {
                    return Err(format!("{label}: the input `{name}` was changed"));
                }
                Content::Table(_, fill) if fill(&self.pointers()) != bytes => {
                    return Err(format!("{label}: the table `{name}` was changed"));
                }
                Content::Input(_) | Content::Table(..) | Content::Workspace(_) => {}
                Content::Output(_) | Content::Changed(_) => outputs.push(bytes),
            }
        }
        Ok(outputs)
    }

    /// Restores the initial content, launches, and returns the content of the outputs.
    ///
    /// # Errors
    /// As [`outputs`](Self::outputs).
    pub fn fresh_outputs(&mut self) -> Result<Vec<Vec<u8>>, String> {
        self.reset().map_err(|e| e.to_string())?;
        self.launch()
            .map_err(|e| format!("{}: {e}", self.problem.label))?;
        self.outputs()
    }
}

impl Problem {
    /// Runs the problem once and returns the content of the outputs.
    ///
    /// # Errors
    /// A text that says what failed.
    pub fn outputs(&self, machine: &dyn Machine) -> Result<Vec<Vec<u8>>, String> {
        Run::new(machine, self)
            .map_err(|e| format!("{}: {e}", self.label))?
            .fresh_outputs()
    }

    /// Runs the problem once and checks the outputs.
    ///
    /// # Errors
    /// A text that says what failed, or which element has which error.
    pub fn check(&self, machine: &dyn Machine) -> Result<Errors, String> {
        self.judged(&self.outputs(machine)?)
    }

    /// Returns the size of all its buffers in bytes.
    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(Buffer::bytes).sum()
    }

    /// Checks the outputs of a run.
    ///
    /// # Errors
    /// A text that names the problem and the element.
    pub fn judged(&self, outputs: &[Vec<u8>]) -> Result<Errors, String> {
        (self.judge)(outputs).map_err(|why| format!("{}: {why}", self.label))
    }
}

/// Returns the values in `bytes`, which may have any alignment.
pub fn values<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    bytes
        .chunks_exact(size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
        .collect()
}

/// Compares the output's values one by one; returns an error if two are not equal.
fn exactly<T: bytemuck::Pod + PartialEq + std::fmt::Debug>(
    name: &str,
    bytes: &[u8],
    want: impl Fn(usize) -> T,
) -> Result<Errors, String> {
    let got: Vec<T> = values(bytes);
    for (i, got) in got.iter().enumerate() {
        let want = want(i);
        if *got != want {
            return Err(format!("{name}[{i}] is {got:?} instead of {want:?}"));
        }
    }
    Ok(Errors::none(got.len()))
}
