//! The kernels of `kernels/norm.cu`, for the operations that normalise rows. The formulas are in that file and in
//! `rmsnorm` and `layernorm`.

use crate::error::Result;
use crate::kernels::Stream;
use crate::kernels::norm::{NormBackward, NormForward, NormWeightGradient, partials};
use crate::tape::Grads;
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;

/// The kind of norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Rms,
    /// LayerNorm, which has a bias.
    Layer,
}

impl Kind {
    /// Number of parameter vectors: the weight and, for LayerNorm, the bias.
    fn vectors(self) -> usize {
        match self {
            Kind::Rms => 1,
            Kind::Layer => 2,
        }
    }
}

/// A norm whose forward has run: its input `[.., D]`, its weight `[D]`, and ε.
pub(super) struct Norm<'a> {
    pub kind: Kind,
    pub x: &'a Tensor,
    pub w: &'a Tensor,
    pub eps: f64,
}

/// `y = norm(s)`, s = x or, with `added` = (sum, residual), `sum = x + residual`. With a bias it is
/// LayerNorm.
///
/// # Errors
/// Returns an error when the kernel does not support a dtype or a width.
pub(super) fn forward(
    y: &mut Tensor,
    added: Option<(&mut Tensor, &Tensor)>,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<()> {
    for (what, t) in [("x", x), ("weight", w)] {
        t.expect_dtype("norm", what, DType::Bf16)?;
    }
    let (sum, residual) = match added {
        Some((sum, residual)) => (Some(sum.output()?), Some(residual.input()?)),
        None => (None, None),
    };
    let kernel = NormForward {
        y: y.output()?,
        sum,
        x: x.input()?,
        residual,
        weight: w.input()?,
        bias: bias.map(Tensor::input).transpose()?,
        rows: x.shape().rows(),
        hidden: x.shape().width(),
        eps: eps as f32,
    };
    kernel.launch(&Stream::of(x.device())?)
}

/// Backward of an operation whose inputs are x, the weight and, for LayerNorm, the bias.
///
/// # Errors
/// Returns an error when a kernel fails.
pub(super) fn answer(norm: Norm<'_>, dy: &Tensor, grads: &mut Grads) -> Result<()> {
    let mut partials = None;
    let mut run = |dx: &mut Tensor, accumulate| {
        let skip = match accumulate {
            Accumulate::Add => Skip::InPlace,
            Accumulate::Assign => Skip::None,
        };
        partials = Some(norm.backward(dx, skip, dy)?);
        Ok(())
    };
    if !grads.wanted(0) {
        run(&mut norm.x.unspecified_like(), Accumulate::Assign)?;
    }
    grads.write(0, norm.x, run)?;
    match partials {
        Some(partials) => partials.answer(1, norm.w, grads),
        None => unreachable!("the kernel ran, for x or for nothing"),
    }
}

/// The gradient that reaches the input of the norm through the residual connection.
pub(super) enum Skip<'a> {
    None,
    /// dx already holds it.
    InPlace,
    Tensor(&'a Tensor),
}

impl Norm<'_> {
    /// Writes dx, and returns the partial sums of the parameters' gradients.
    ///
    /// # Errors
    /// Returns an error when the kernel fails.
    pub fn backward(&self, dx: &mut Tensor, skip: Skip<'_>, dy: &Tensor) -> Result<Partials> {
        dx.expect_dtype("norm", "the gradient of x", DType::Bf16)?;
        let (x, stream) = (self.x, Stream::of(self.x.device())?);
        let (rows, hidden) = (x.shape().rows(), x.shape().width());
        let floats = partials(stream.launchers(), rows, hidden)?;
        let shape = [self.kind.vectors(), floats];
        let mut values = Tensor::unspecified(x.device(), DType::F32, shape);
        let dx = dx.output()?;
        let kernel = NormBackward {
            dx,
            partials: values.output()?,
            dy: dy.input()?,
            skip: match skip {
                Skip::None => None,
                Skip::InPlace => Some(dx.as_input()),
                Skip::Tensor(t) => Some(t.input()?),
            },
            x: x.input()?,
            weight: self.w.input()?,
            rows,
            hidden,
            layernorm: self.kind == Kind::Layer,
            eps: self.eps as f32,
        };
        kernel.launch(&stream)?;
        Ok(Partials {
            values,
            rows,
            hidden,
        })
    }
}

/// Partial sums of the gradients of the weight and of the bias, one per run of consecutive rows.
pub(super) struct Partials {
    /// `[parameters, runs · D]`.
    values: Tensor,
    rows: usize,
    hidden: usize,
}

impl Partials {
    /// Writes the gradients of the parameters, which are input `first` and, for LayerNorm, the next input.
    ///
    /// # Errors
    /// Returns an error when a kernel fails.
    pub fn answer(&self, first: usize, w: &Tensor, grads: &mut Grads) -> Result<()> {
        let [vectors, floats] = [self.values.shape()[0], self.values.shape()[1]];
        for vector in 0..vectors {
            grads.write(first + vector, w, |gradient, accumulate| {
                gradient.expect_dtype("norm", "a parameter's gradient", DType::F32)?;
                let kernel = NormWeightGradient {
                    gradient: gradient.output()?,
                    partials: self.values.input()?.from_element(vector * floats),
                    rows: self.rows,
                    hidden: self.hidden,
                    accumulate: accumulate == Accumulate::Add,
                };
                kernel.launch(&Stream::of(w.device())?)
            })?;
        }
        Ok(())
    }
}
