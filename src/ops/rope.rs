//! Rotary position embedding (Su et al., arXiv 2104.09864), the rotate-half form.
//!
//! On rows of the fused projection `[T, (H + 2 KV) hd]`: each query and key head `(a, b)`, halves of hd/2, becomes
//! `(a cos − b sin, b cos + a sin)` with angles `position · θ^(−2i/hd)`, i < hd/2; values are copied. A row's
//! position is its index modulo the sequence length. Backward rotates by the opposite angles.

use super::heads::Heads;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::{self, Stream};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::vector::map_over;
use crate::tensor::cpu::{self, Accumulate};
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use reference::Angles;

/// Cosines and sines of every position, computed once and shared by all layers.
#[derive(Clone)]
pub struct RopeTables {
    cos: Tensor, // [positions, hd/2]
    sin: Tensor, // [positions, hd/2]
}

impl RopeTables {
    /// Builds tables for positions `0 .. positions` and heads of width `dim`. Angles are computed in f64.
    ///
    /// # Errors
    /// Returns an error when the width is odd, or the dtype not real.
    pub fn new(dtype: DType, positions: usize, dim: usize, theta: f64) -> Result<Self> {
        if dim % 2 != 0 {
            return Err(Error::invalid(
                "rope",
                "heads of even width",
                dim.to_string(),
                "choose an even head_dim",
            ));
        }
        let half = dim / 2;
        let angle = |i: usize| (i / half) as f64 * theta.powf(-((i % half) as f64) / half as f64);
        let table = |f: fn(f64) -> f64| {
            let mut table = Tensor::unspecified(Device::Cpu, dtype, [positions, half]);
            with_real!(dtype, "rope", |T| {
                for (i, t) in table.slice_mut::<T>().iter_mut().enumerate() {
                    *t = T::of(f(angle(i)));
                }
                Ok(())
            })?;
            Ok(table)
        };
        Ok(RopeTables {
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
        })
    }

    /// Returns the number of positions of the tables.
    pub(super) fn positions(&self) -> usize {
        self.cos.shape()[0]
    }

    /// Returns the tables if they cover `positions` positions of heads of this width.
    ///
    /// # Errors
    /// Returns an error when the tables are too short, or their head width or dtype differs.
    pub(super) fn of(&self, positions: usize, heads: Heads) -> Result<Self> {
        self.check(positions, heads, self.cos.dtype())?;
        Ok(self.clone())
    }

    /// Returns cosines and sines in the memory of `device`.
    ///
    /// # Errors
    /// Returns an error when the tables are not f32.
    pub(super) fn on(&self, device: Device) -> Result<[Tensor; 2]> {
        self.cos.expect_dtype("rope", "tables", DType::F32)?;
        Ok([&self.cos, &self.sin].map(|t| t.on(device)))
    }

    /// Returns the angles of the first `positions` positions.
    pub(super) fn angles<T: Real>(&self, positions: usize) -> Angles<'_, T> {
        let half = self.cos.shape()[1];
        Angles {
            cos: &self.cos.slice()[..positions * half],
            sin: &self.sin.slice()[..positions * half],
            half,
        }
    }

    /// Checks that the tables cover `positions` positions of heads of this width and dtype.
    ///
    /// # Errors
    /// Returns an error when the tables are too short, or their head width or dtype differs.
    pub(super) fn check(&self, positions: usize, heads: Heads, dtype: DType) -> Result<()> {
        let found = self.cos.shape();
        if found[0] < positions || found[1] * 2 != heads.dim {
            return Err(Error::invalid(
                "rope",
                format!("tables for {positions} positions, heads of {}", heads.dim),
                format!("{} positions, heads of {}", found[0], found[1] * 2),
                "make the tables for the model's longest sequence and its head_dim",
            ));
        }
        self.cos.expect_dtype("rope", "tables", dtype)
    }
}

/// Rotates row i of `qkv` by the angles of position `positions[i]`, without a gradient: for evaluation.
///
/// # Errors
/// The same errors as [`rope`], and an error when a position is outside the tables.
pub fn rope_at(
    qkv: &Tensor,
    heads: Heads,
    positions: &[usize],
    tables: &RopeTables,
) -> Result<Tensor> {
    let rows = positions.len();
    heads.check("rope", qkv, rows)?;
    let longest = positions.iter().max().map_or(0, |p| p + 1);
    tables.check(longest, heads, qkv.dtype().arithmetic())?;
    let gathered = |table: &Tensor| {
        let half = heads.dim / 2;
        let mut out = Tensor::unspecified(Device::Cpu, table.dtype(), [rows, half]);
        with_real!(table.dtype(), "rope", |T| {
            let angles = out.slice_mut::<T>().chunks_exact_mut(half);
            for (row, &position) in angles.zip(positions) {
                row.copy_from_slice(&table.slice::<T>()[position * half..][..half]);
            }
            Ok(())
        })?;
        Ok(out)
    };
    let op = Rope {
        heads,
        sequence: rows,
        tables: RopeTables {
            cos: gathered(&tables.cos)?,
            sin: gathered(&tables.sin)?,
        },
    };
    if qkv.device() != Device::Cpu {
        return turned(qkv, &op.tables, heads, rows, false);
    }
    let mut y = qkv.unspecified_like();
    with_real!(y.dtype(), "rope", |T| {
        op.turn::<T>(&mut y, Accumulate::Assign, qkv, false);
        Ok(y)
    })
}

/// Rotates the query and key heads of `qkv [B·S, (H + 2 KV) hd]`, with S = `sequence`.
///
/// # Errors
/// Returns an error when `qkv` does not have the layout of `heads`, or the tables are of another dtype or head width
/// or shorter than a sequence.
pub fn rope(
    tape: &Tape,
    qkv: &Var,
    heads: Heads,
    sequence: usize,
    tables: &RopeTables,
) -> Result<Var> {
    heads.check("rope", qkv.tensor(), sequence)?;
    tables.check(sequence, heads, qkv.tensor().dtype().arithmetic())?;
    let tables = tables.clone();
    tape.apply_one(
        Rope {
            heads,
            sequence,
            tables,
        },
        &[qkv],
    )
}

struct Rope {
    heads: Heads,
    sequence: usize,
    tables: RopeTables,
}

impl Rope {
    /// [`turned`] with the tables of this operation.
    fn turned(&self, x: &Tensor, back: bool) -> Result<Tensor> {
        turned(x, &self.tables, self.heads, self.sequence, back)
    }

    /// Writes to `y` the values `x`, rotated forwards or backwards.
    fn turn<T: Real>(&self, y: &mut Tensor, accumulate: Accumulate, x: &Tensor, back: bool) {
        let rotated = (self.heads.query + self.heads.key_value) * self.heads.dim;
        let tables = self.tables.angles(self.sequence);
        let (y, width) = (y.slice_mut::<T>(), self.heads.row_width());
        if back {
            reference::turn::<T, true>(y, accumulate, x.slice(), width, rotated, tables);
        } else {
            reference::turn::<T, false>(y, accumulate, x.slice(), width, rotated, tables);
        }
    }
}

/// Returns `x`, on a device with kernels, rotated forwards or backwards.
///
/// # Errors
/// Returns an error when the kernel does not support a dtype or a size.
pub(super) fn turned(
    x: &Tensor,
    tables: &RopeTables,
    heads: Heads,
    sequence: usize,
    back: bool,
) -> Result<Tensor> {
    x.expect_dtype("rope", "qkv", DType::Bf16)?;
    let [cos, sin] = tables.on(x.device())?;
    let mut y = x.unspecified_like();
    kernels::Rope {
        y: y.output()?,
        x: x.input()?,
        cosines: cos.input()?,
        sines: sin.input()?,
        tokens: x.shape().rows(),
        sequence,
        heads: heads.query,
        key_value_heads: heads.key_value,
        head_width: heads.dim,
        back,
    }
    .launch(&Stream::of(x.device())?)?;
    Ok(y)
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        if inputs[0].device() != Device::Cpu {
            return Ok(Forward::one(self.turned(inputs[0], false)?, vec![]));
        }
        let mut y = inputs[0].unspecified_like();
        with_real!(y.dtype(), "rope", |T| {
            self.turn::<T>(&mut y, Accumulate::Assign, inputs[0], false);
            Ok(Forward::one(y, vec![]))
        })
    }

    fn backward(
        &self,
        _saved: &[Tensor],
        douts: &OutputGradients,
        grads: &mut Grads,
    ) -> Result<()> {
        let dy = only(douts);
        if dy.device() != Device::Cpu {
            return grads.give(0, self.turned(dy, true)?);
        }
        with_real!(dy.dtype(), "rope", |T| grads.write(
            0,
            dy,
            |dx, accumulate| {
                self.turn::<T>(dx, accumulate, dy, true);
                Ok(())
            }
        ))
    }
}

/// The operation on slices, for the CPU.
pub(super) mod reference {
    use super::*;

    /// Angles by position, `half` angles per position, one position per row of a sequence.
    #[derive(Clone, Copy)]
    pub struct Angles<'a, T> {
        pub cos: &'a [T],
        pub sin: &'a [T],
        pub half: usize,
    }

    impl<T: Real> Angles<'_, T> {
        /// Rotates rows of one head in place; the rows are at consecutive positions from `first`.
        pub fn turn_rows(self, rows: &mut [T], first: usize, back: bool) {
            let half = self.half;
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (i, row) in rows.chunks_exact_mut(2 * half).enumerate() {
                        let (a, b) = row.split_at_mut(half);
                        let [cos, sin] =
                            [self.cos, self.sin].map(|s| &s[(first + i) * half..][..half]);
                        map_over([a, b], [cos, sin], |[cos, sin], [a, b]| {
                            turned([a, b], cos, if back { -sin } else { sin })
                        });
                    }
                },
            );
        }
    }

    #[inline(always)]
    fn turned<T: Real>([a, b]: [T; 2], cos: T, sin: T) -> [T; 2] {
        [a * cos - b * sin, b * cos + a * sin]
    }

    /// Rotates the first `rotated` elements of each row of `width` elements, head by head, and copies the rest.
    pub fn turn<T: Real, const BACK: bool>(
        y: &mut [T],
        accumulate: Accumulate,
        x: &[T],
        width: usize,
        rotated: usize,
        tables: Angles<T>,
    ) {
        let half = tables.half;
        let sequence = tables.cos.len() / half;
        cpu::each_row_block(y, width, |first, y| {
            let x = &x[first * width..];
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (i, y) in y.chunks_exact_mut(width).enumerate() {
                        let x = &x[i * width..][..width];
                        let start = (first + i) % sequence * half;
                        let cos = &tables.cos[start..start + half];
                        let sin = &tables.sin[start..start + half];
                        let (y, y_rest) = y.split_at_mut(rotated);
                        let (x, x_rest) = x.split_at(rotated);
                        for (head, y) in y.chunks_exact_mut(2 * half).enumerate() {
                            let (y_a, y_b) = y.split_at_mut(half);
                            let (x_a, x_b) = x[head * 2 * half..][..2 * half].split_at(half);
                            map_over([y_a, y_b], [x_a, x_b, cos, sin], |[a, b, cos, sin], old| {
                                let [a, b] = turned([a, b], cos, if BACK { -sin } else { sin });
                                [accumulate.onto(old[0], a), accumulate.onto(old[1], b)]
                            });
                        }
                        map_over([y_rest], [x_rest], |[x], [old]| [accumulate.onto(old, x)]);
                    }
                },
            );
        });
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |batch: usize, sequence: usize, heads: Heads| {
        let name = format!("rope, {batch} sequences of {sequence}, {heads:?}");
        Case::new(name, move |tape, v| {
            let dtype = v[0].tensor().dtype();
            let tables = RopeTables::new(dtype, sequence + 2, heads.dim, 10_000.0)?;
            Ok(vec![rope(tape, &v[0], heads, sequence, &tables)?])
        })
        .input("qkv", [batch * sequence, heads.row_width()])
    };
    let heads = |query, key_value, dim| Heads {
        query,
        key_value,
        dim,
    };
    vec![
        case(1, 1, heads(1, 1, 2)),
        case(3, 7, heads(4, 2, 6)),
        case(2, 33, heads(2, 2, 8)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads {
        query: 1,
        key_value: 1,
        dim: 2,
    };

    #[test]
    fn positions_restart_with_each_sequence_and_values_stay() {
        // hd = 2: one angle, equal to the position. q = (1, 0), k = (0, 1), v = (5, 6) in each row.
        let row = [1.0, 0.0, 0.0, 1.0, 5.0, 6.0];
        let qkv = Var::constant(Tensor::from_slice([4, 6], &row.repeat(4)));
        let tables = RopeTables::new(DType::F64, 2, 2, 10_000.0).unwrap();
        let y = rope(&Tape::new(), &qkv, HEADS, 2, &tables).unwrap();
        let (cos, sin) = (1f64.cos(), 1f64.sin());
        let turned = [cos, sin, -sin, cos, 5.0, 6.0];
        assert_eq!(
            y.tensor().slice::<f64>(),
            [row, turned, row, turned].concat()
        );
    }

    #[test]
    fn tables_that_end_before_the_sequence_are_an_error() {
        let qkv = Var::constant(Tensor::from_slice([3, 6], &[0.0; 18]));
        let tables = RopeTables::new(DType::F64, 2, 2, 10_000.0).unwrap();
        let e = rope(&Tape::new(), &qkv, HEADS, 3, &tables).unwrap_err();
        assert!(e.to_string().contains("got 2 positions"), "{e}");
        assert!(RopeTables::new(DType::F64, 2, 3, 10_000.0).is_err());
    }
}
