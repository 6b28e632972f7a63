//! Cases of the kernels: one declaration of shapes, inputs, launch, float64 reference and bound, which runs on the
//! simulator (the tests) and on a GPU (`hardware-check`) alike.
//!
//! A [`Case`] is a named group of [`Problem`]s of one launcher. A problem lists its buffers, launches, and judges what the
//! outputs hold. [`Run`] puts it on a [`Machine`]: every buffer lies between guard bands, every output starts poisoned,
//! inputs must come back unchanged.

pub mod adamw;
pub mod attention;
pub mod attention_backward;
pub mod balance;
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

pub use machine::{Guarded, Machine, Simulator};
pub use numbers::Errors;

use crate::error::Result;
use crate::kernels::table::{Row, bytes_of};
use crate::kernels::{self, Stream};

/// One buffer of a problem.
pub struct Buffer {
    pub name: &'static str,
    pub content: Content,
}

/// What a buffer holds before the launch, and whose it is after.
pub enum Content {
    /// Read only.
    Input(Vec<u8>),
    /// So many bytes that hold addresses of other buffers, read only.
    Table(usize, Fill),
    /// So many poisoned bytes, judged after the launch.
    Output(usize),
    /// Changed in place, judged after the launch.
    Changed(Vec<u8>),
    /// So many poisoned bytes for the kernel's own use.
    Workspace(usize),
}

/// The content of a table, from the addresses of the buffers in the order of the problem's list.
type Fill = Box<dyn Fn(&[*mut u8]) -> Vec<u8> + Send + Sync>;

impl Buffer {
    /// Rows that `fill` makes of the buffers' addresses.
    pub fn table<R: Row>(
        name: &'static str,
        rows: usize,
        fill: impl Fn(&[*mut u8]) -> Vec<R> + Send + Sync + 'static,
    ) -> Self {
        let bytes = rows * size_of::<R>();
        let fill = move |addresses: &[*mut u8]| bytes_of(&fill(addresses)).to_vec();
        Self {
            name,
            content: Content::Table(bytes, Box::new(fill)),
        }
    }

    pub fn input<T: bytemuck::NoUninit>(name: &'static str, values: &[T]) -> Self {
        Self {
            name,
            content: Content::Input(bytemuck::cast_slice(values).to_vec()),
        }
    }
    pub fn output(name: &'static str, bytes: usize) -> Self {
        Self {
            name,
            content: Content::Output(bytes),
        }
    }
    pub fn changed<T: bytemuck::NoUninit>(name: &'static str, values: &[T]) -> Self {
        Self {
            name,
            content: Content::Changed(bytemuck::cast_slice(values).to_vec()),
        }
    }

    /// What is added to, or assigned whatever was there.
    pub fn added_to<T: bytemuck::NoUninit>(
        name: &'static str,
        before: &[T],
        accumulate: bool,
    ) -> Self {
        match accumulate {
            true => Self::changed(name, before),
            false => Self::output(name, size_of_val(before)),
        }
    }
    pub fn workspace(name: &'static str, bytes: usize) -> Self {
        Self {
            name,
            content: Content::Workspace(bytes),
        }
    }

    fn bytes(&self) -> usize {
        match &self.content {
            Content::Input(bytes) | Content::Changed(bytes) => bytes.len(),
            Content::Output(bytes) | Content::Workspace(bytes) | Content::Table(bytes, _) => *bytes,
        }
    }
}

/// Launches on the buffers, in the order of the problem's list.
pub type Launch = Box<dyn Fn(&[kernels::Buffer], &Stream) -> Result<()> + Send + Sync>;

/// Judges the content of the outputs and changed buffers, in the order of the problem's list.
pub type Judge = Box<dyn Fn(&[Vec<u8>]) -> Result<Errors, String> + Send + Sync>;

/// One launch with its inputs and its reference.
pub struct Problem {
    /// Shape and settings, for reports.
    pub label: String,
    pub buffers: Vec<Buffer>,
    pub launch: Launch,
    pub judge: Judge,
}

/// Makes a problem when its turn comes: the inputs of large ones fill gigabytes.
pub type MakeProblem = Box<dyn Fn() -> Result<Problem> + Send + Sync>;

/// A named group of problems.
pub struct Case {
    /// Unique among all cases; part of the key of a record.
    pub name: String,
    /// Its row in `kernels/routegrad.h`.
    pub launcher: &'static str,
    /// The `.cu` file, without its ending.
    pub source: &'static str,
    pub problems: Vec<MakeProblem>,
    /// Small enough for instruments that slow a kernel a thousandfold.
    pub small: bool,
}

/// Every case that any machine can run, in the order in which a first visit to a GPU should.
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
    /// Allocates and fills every buffer.
    ///
    /// # Errors
    /// When the machine has too little memory.
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

    /// Puts every buffer that a launch may write back to what it held before the first.
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

    /// The buffers on the machine.
    pub fn buffers(&self) -> Vec<kernels::Buffer> {
        self.buffers.iter().map(Guarded::buffer).collect()
    }

    /// Addresses of the buffers on the machine.
    pub fn pointers(&self) -> Vec<*mut u8> {
        self.buffers.iter().map(Guarded::pointer).collect()
    }

    /// The first `bytes` bytes of a buffer, after every launch so far; fewer where it is shorter.
    ///
    /// # Errors
    /// What a launch met.
    pub fn content(&self, buffer: usize, bytes: usize) -> Result<Vec<u8>> {
        self.machine.finish()?;
        self.buffers[buffer].read_first(bytes)
    }

    /// Launches; on a GPU it may still run on return.
    pub fn launch(&self) -> Result<()> {
        self.launch_as(self.problem)
    }

    /// Launches another problem of the same buffers.
    ///
    /// # Errors
    /// When the launcher refuses.
    pub fn launch_as(&self, problem: &Problem) -> Result<()> {
        (problem.launch)(&self.buffers(), &self.machine.stream()?)
    }

    /// Waits, then gives what the outputs hold.
    ///
    /// # Errors
    /// The text says what failed: a launch, a guard band, or an input that was changed.
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

    /// Launches from the first state and gives what the outputs hold after.
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
    /// Runs it once and gives what the outputs hold.
    ///
    /// # Errors
    /// The text says what failed.
    pub fn outputs(&self, machine: &dyn Machine) -> Result<Vec<Vec<u8>>, String> {
        Run::new(machine, self)
            .map_err(|e| format!("{}: {e}", self.label))?
            .fresh_outputs()
    }

    /// Runs it once and judges the outputs.
    ///
    /// # Errors
    /// The text says what failed, or which element is how far off.
    pub fn check(&self, machine: &dyn Machine) -> Result<Errors, String> {
        self.judged(&self.outputs(machine)?)
    }

    /// Bytes of all its buffers.
    pub fn bytes(&self) -> usize {
        self.buffers.iter().map(Buffer::bytes).sum()
    }

    /// Judges outputs that a run left.
    ///
    /// # Errors
    /// The text names the problem and the element.
    pub fn judged(&self, outputs: &[Vec<u8>]) -> Result<Errors, String> {
        (self.judge)(outputs).map_err(|why| format!("{}: {why}", self.label))
    }
}

/// The values that `bytes` hold, at any alignment.
pub fn values<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    bytes
        .chunks_exact(size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
        .collect()
}

/// The outputs' values compared one by one, equal or an error.
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
