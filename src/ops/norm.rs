//! The kernels of `kernels/norm.cu`, for the operations that normalise rows: formulas stand there and
//! in `rmsnorm` and `layernorm`.

use crate::device::stream;
use crate::error::Result;
use crate::tape::Grads;
use crate::tensor::Tensor;
use crate::tensor::cpu::Accumulate;
use crate::tensor::dtype::DType;
use crate::{launch, query};
use std::ptr::{null, null_mut};

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Rms,
    /// With a bias.
    Layer,
}

impl Kind {
    /// Parameters: a weight, and a bias.
    fn vectors(self) -> usize {
        match self {
            Kind::Rms => 1,
            Kind::Layer => 2,
        }
    }
}

/// A norm whose forward has run: what it normalised `[.., D]`, its weight `[D]`, ε.
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
/// When a dtype or a width is not one of the kernel's.
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
        Some((sum, residual)) => (sum.pointer_mut(), residual.pointer()),
        None => (null_mut(), null()),
    };
    // SAFETY: the tensors have the shapes that norm.cu's header names.
    unsafe {
        launch!(
            x.device().launchers()?,
            norm_forward(
                y.pointer_mut(),
                sum,
                x.pointer(),
                residual,
                w.pointer(),
                bias.map_or(null(), Tensor::pointer),
                x.shape().rows() as i64,
                x.shape().width() as i32,
                eps as f32,
                stream(),
            )
        )
    }
}

/// Backward of an operation whose inputs are x, the weight and, for LayerNorm, the bias.
///
/// # Errors
/// When a kernel fails.
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

/// The gradient that reaches what was normalised past the norm.
pub(super) enum Skip<'a> {
    None,
    /// What dx holds.
    InPlace,
    Tensor(&'a Tensor),
}

impl Norm<'_> {
    /// Writes dx, and gives the partial sums of the parameters' gradients.
    ///
    /// # Errors
    /// When the kernel fails.
    pub fn backward(&self, dx: &mut Tensor, skip: Skip<'_>, dy: &Tensor) -> Result<Partials> {
        dx.expect_dtype("norm", "the gradient of x", DType::Bf16)?;
        let (x, launchers) = (self.x, self.x.device().launchers()?);
        let (rows, hidden) = (x.shape().rows() as i64, x.shape().width() as i32);
        let mut floats = 0u64;
        // SAFETY: it writes one number.
        unsafe { query!(launchers, norm_partials(&mut floats, rows, hidden)) }?;
        let shape = [self.kind.vectors(), floats as usize];
        let mut values = Tensor::unspecified(x.device(), DType::F32, shape);
        let to = dx.pointer_mut();
        let skip = match skip {
            Skip::None => null(),
            Skip::InPlace => to,
            Skip::Tensor(t) => t.pointer(),
        };
        // SAFETY: the tensors have the shapes that norm.cu's header names; dx may be skip.
        unsafe {
            launch!(
                launchers,
                norm_backward(
                    to,
                    values.pointer_mut(),
                    dy.pointer(),
                    skip,
                    x.pointer(),
                    self.w.pointer(),
                    rows,
                    hidden,
                    (self.kind == Kind::Layer).into(),
                    self.eps as f32,
                    stream(),
                )
            )?;
        }
        Ok(Partials {
            values,
            rows,
            hidden,
        })
    }
}

/// Partial sums of the gradients of the weight and of the bias, one line a run of rows.
pub(super) struct Partials {
    /// `[parameters, runs · D]`.
    values: Tensor,
    rows: i64,
    hidden: i32,
}

impl Partials {
    /// Answers for the parameters, which are inputs `first` and, for LayerNorm, the next.
    ///
    /// # Errors
    /// When a kernel fails.
    pub fn answer(&self, first: usize, w: &Tensor, grads: &mut Grads) -> Result<()> {
        let [vectors, floats] = [self.values.shape()[0], self.values.shape()[1]];
        for vector in 0..vectors {
            grads.write(first + vector, w, |gradient, accumulate| {
                gradient.expect_dtype("norm", "a parameter's gradient", DType::F32)?;
                // SAFETY: the tensors have the shapes that norm.cu's header names.
                unsafe {
                    launch!(
                        w.device().launchers()?,
                        norm_weight_gradient(
                            gradient.pointer_mut(),
                            self.values.pointer::<f32>().add(vector * floats),
                            self.rows,
                            self.hidden,
                            (accumulate == Accumulate::Add).into(),
                            stream(),
                        )
                    )
                }
            })?;
        }
        Ok(())
    }
}
