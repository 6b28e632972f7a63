//! Token embedding: `y_t = table[id_t]`.
//!
//! `table [V, D]`, `ids [T]` (i32), `y [T, D]`. `dtable_v = Σ over t with id_t = v of dy_t`, in the order of the
//! tokens. The ids are sorted, so that one thread computes each row of the gradient.
//!
//! On a device with kernels (`kernels/embedding.cu`, `kernels/dispatch.cu`) the table is bf16, its gradient f32, and
//! a kernel sorts the ids, one byte at a time.

use super::dispatch::{Named, maps_of};
use super::tokens;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::embedding::workspace;
use crate::kernels::{EmbeddingForward, EmbeddingGradient, EmbeddingOrder, Stream};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate};
use crate::tensor::dtype::{DType, Real};
use crate::with_real;

/// Returns the rows `ids` (i32, any shape, T in total) of `table [V, D]` as `[T, D]`.
///
/// # Errors
/// Returns an error when an id is not in the table (the error names id and position), or the table is not a matrix.
pub fn embedding(tape: &Tape, table: &Var, ids: &Tensor) -> Result<Var> {
    let shape = table.tensor().shape();
    if shape.len() != 2 {
        return Err(Error::invalid(
            "embedding",
            "a table [vocabulary, width]",
            shape.to_string(),
            "pass the embedding matrix",
        ));
    }
    tokens::check("embedding", "token", ids, shape[0])?;
    tape.apply_one(Embedding { ids: ids.clone() }, &[table])
}

struct Embedding {
    ids: Tensor,
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let table = inputs[0];
        let width = table.shape()[1];
        let shape = [self.ids.elements(), width];
        let mut y = Tensor::unspecified(table.device(), table.dtype(), shape);
        if table.device() != Device::Cpu {
            kernels::forward(&mut y, table, &self.ids)?;
            return Ok(Forward::one(y, vec![table.clone()]));
        }
        with_real!(table.dtype(), "embedding", |T| {
            reference::forward(y.slice_mut::<T>(), table.slice(), self.ids.slice(), width);
            Ok(Forward::one(y, vec![table.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let table = &saved[0];
        let dy = only(douts);
        if table.device() != Device::Cpu {
            return grads.write(0, table, |dtable, accumulate| {
                kernels::dtable(dtable, accumulate, dy, &self.ids)
            });
        }
        with_real!(table.dtype(), "embedding", |T| grads.write(
            0,
            table,
            |dtable, accumulate| {
                let width = table.shape()[1];
                reference::dtable(
                    dtable.slice_mut::<T>(),
                    accumulate,
                    dy.slice(),
                    self.ids.slice(),
                    width,
                );
                Ok(())
            }
        ))
    }
}

/// The operation on a device with kernels.
pub(super) mod kernels {
    use super::*;

    /// `y_t = table[id_t]`; NaN for an id that is not in the table.
    ///
    /// # Errors
    /// Returns an error when the kernel does not support a dtype or the width.
    pub fn forward(y: &mut Tensor, table: &Tensor, ids: &Tensor) -> Result<()> {
        table.expect_dtype("embedding", "table", DType::Bf16)?;
        let ids = ids.on(table.device());
        EmbeddingForward {
            y: y.output()?,
            w: table.input()?,
            ids: ids.input()?,
            tokens: ids.elements(),
            vocabulary: table.shape()[0],
            hidden: table.shape()[1],
        }
        .launch(&Stream::of(table.device())?)
    }

    pub fn dtable(
        dtable: &mut Tensor,
        accumulate: Accumulate,
        dy: &Tensor,
        ids: &Tensor,
    ) -> Result<()> {
        dtable.expect_dtype("embedding", "the table's gradient", DType::F32)?;
        let device = dy.device();
        let stream = Stream::of(device)?;
        let [vocabulary, hidden] = [0, 1].map(|i| dtable.shape()[i]);
        let (order, keys) = sorted(&ids.on(device), vocabulary)?;
        let tokens = ids.elements();
        let floats = workspace(stream.launchers(), tokens, hidden)?;
        let mut parts = Tensor::unspecified(device, DType::F32, [floats]);
        EmbeddingGradient {
            dw: dtable.output()?,
            parts: parts.output()?,
            dy: dy.input()?,
            order: order.input()?,
            keys: keys.input()?,
            tokens,
            vocabulary,
            hidden,
            accumulate: accumulate == Accumulate::Add,
        }
        .launch(&stream)
    }

    /// Returns the tokens ordered by id, tokens with equal ids in token order, and the ids in that order.
    fn sorted(ids: &Tensor, vocabulary: usize) -> Result<(Tensor, Tensor)> {
        /// Number of values of a byte, which take the place of experts in the dispatch.
        const BYTE: usize = 256;
        let tokens = ids.elements();
        let mut so_far = None;
        for pass in 0..EmbeddingOrder::calls(vocabulary) - 1 {
            let (order, byte) = next(ids, vocabulary, so_far.as_ref(), Some(8 * pass))?;
            let maps = maps_of(ids.device(), Named::Experts(byte), [tokens, BYTE], tokens)?;
            so_far = Some((order, maps.row_token));
        }
        next(ids, vocabulary, so_far.as_ref(), None)
    }

    /// Returns the tokens as sorted by `so_far` (an order, and a sort of that order). It also returns, in the new
    /// order, one byte of each id at the given bit offset, or the complete ids.
    fn next(
        ids: &Tensor,
        vocabulary: usize,
        so_far: Option<&(Tensor, Tensor)>,
        byte: Option<usize>,
    ) -> Result<(Tensor, Tensor)> {
        let (device, tokens) = (ids.device(), ids.elements());
        let new = || Tensor::unspecified(device, DType::I32, [tokens, 1]);
        let (mut order, mut keys) = (new(), new());
        EmbeddingOrder {
            order: order.output()?,
            keys: keys.output()?,
            previous: so_far.map(|(order, _)| order.input()).transpose()?,
            row_token: so_far.map(|(_, sort)| sort.input()).transpose()?,
            ids: ids.input()?,
            tokens,
            vocabulary,
            shift: byte.unwrap_or(0),
            whole: byte.is_none(),
        }
        .launch(&Stream::of(device)?)?;
        Ok((order, keys))
    }
}

/// The operation on slices, for the CPU; `width` is D.
pub(super) mod reference {
    use super::*;

    pub fn forward<T: Real>(y: &mut [T], table: &[T], ids: &[i32], width: usize) {
        cpu::each_row_block(y, width, |first, y| {
            for (y, &id) in y.chunks_exact_mut(width).zip(&ids[first..]) {
                y.copy_from_slice(&table[id as usize * width..][..width]);
            }
        });
    }

    pub fn dtable<T: Real>(
        dtable: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        ids: &[i32],
        width: usize,
    ) {
        if dtable.is_empty() {
            return;
        }
        let (ends, order) = sort(ids, dtable.len() / width);
        cpu::each_row_block(dtable, width, |first, dtable| {
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (i, sum) in dtable.chunks_exact_mut(width).enumerate() {
                        if accumulate == Accumulate::Assign {
                            sum.fill(T::zero());
                        }
                        let id = first + i;
                        let start = if id == 0 { 0 } else { ends[id - 1] };
                        for &token in &order[start..ends[id]] {
                            for (s, &d) in sum.iter_mut().zip(&dy[token * width..][..width]) {
                                *s += d;
                            }
                        }
                    }
                },
            );
        });
    }

    /// Returns the positions ordered by id, positions with equal ids in ascending order, and for each id the end of
    /// its positions.
    fn sort(ids: &[i32], vocabulary: usize) -> (Vec<usize>, Vec<usize>) {
        let mut next = vec![0; vocabulary + 1];
        for &id in ids {
            next[id as usize + 1] += 1;
        }
        for id in 0..vocabulary {
            next[id + 1] += next[id];
        }
        let mut order = vec![0; ids.len()];
        for (position, &id) in ids.iter().enumerate() {
            order[next[id as usize]] = position;
            next[id as usize] += 1;
        }
        (next, order)
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |vocabulary: usize, width: usize, ids: Vec<i32>| {
        let name = format!("embedding [{vocabulary}, {width}], {} tokens", ids.len());
        let ids = Tensor::from_slice([ids.len()], &ids);
        Case::new(name, move |tape, v| Ok(vec![embedding(tape, &v[0], &ids)?]))
            .input("table", [vocabulary, width])
    };
    vec![
        case(1, 3, vec![0]),
        case(7, 5, vec![6, 0, 3, 3, 6, 3]),
        case(70, 9, (0..150).map(|i| i * i % 67).collect()),
        case(4, 2, vec![]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Gradients;

    #[test]
    fn a_row_used_twice_gets_both_gradients_and_an_unused_one_zero() {
        let table = Tensor::from_slice([3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let table = Var::leaf(table, 0);
        let ids = Tensor::from_slice([3], &[2, 0, 2]);
        let tape = Tape::new();
        let y = embedding(&tape, &table, &ids).unwrap();
        assert_eq!(y.tensor().slice::<f64>(), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        let dy = Tensor::from_slice([3, 2], &[1.0, 10.0, 2.0, 20.0, 4.0, 40.0]);
        let mut store = Gradients::new(1);
        tape.backward_from(&[(&y, dy)], &mut store).unwrap();
        let expected = [2.0, 20.0, 0.0, 0.0, 5.0, 50.0];
        assert_eq!(store.get(0).unwrap().slice::<f64>(), expected);
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_named_with_its_position() {
        let table = Var::constant(Tensor::from_slice([3, 1], &[0.0; 3]));
        for bad in [3, -1] {
            let ids = Tensor::from_slice([3], &[0, 2, bad]);
            let e = embedding(&Tape::new(), &table, &ids).unwrap_err();
            let expected = format!("got {bad} at position 2");
            assert!(e.to_string().contains(&expected), "{e}");
        }
    }
}
