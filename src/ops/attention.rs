//! Causal attention on the fused projection, with grouped queries.
//!
//! `qkv [B·S, (H + 2 KV) hd]`, `o [B·S, H hd]`. For each sequence and query head, with the key and value head of its
//! group: `P = softmax(Q Kᵀ / √hd)` over the keys at or before the query, `O = P V`. If several documents share a
//! sequence, row r attends to the keys `first_key[r] … r`, which are those of its document.
//!
//! Backward: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P ⊙ (dP − rowsum(dO ⊙ O))`, `dQ = dS K / √hd`, `dK = dSᵀ Q / √hd`.
//!
//! As in FlashAttention (Dao et al., arXiv 2205.14135) scores exist only for one block of queries at a time, and
//! backward computes them again. Of the softmax, only the logsumexp of each row is kept.

pub(super) mod kernels;
pub(super) mod reference;
pub mod rotary;

use super::heads::Heads;
use super::rope::RopeTables;
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::with_real;

/// Causal attention of `qkv [B·S, (H + 2 KV) hd]`, S = `sequence`; returns `[B·S, H hd]`. `first_key [B·S]` (i32)
/// holds, for each row, the index within its sequence of the first key that the row attends to. The index must not
/// exceed the row's own index and must not decrease from row to row. Without `first_key` it is 0.
///
/// # Errors
/// Returns an error when `qkv` does not have the layout of `heads` or does not hold complete sequences, or when
/// `first_key` does not have one entry per row.
pub fn attention(
    tape: &Tape,
    qkv: &Var,
    heads: Heads,
    sequence: usize,
    first_key: Option<&Tensor>,
) -> Result<Var> {
    heads.check("attention", qkv.tensor(), sequence)?;
    if let Some(first_key) = first_key {
        first_key.expect_dtype("attention", "first_key", DType::I32)?;
        first_key.expect_shape("attention", "first_key", [qkv.tensor().shape()[0]])?;
    }
    let op = Attention {
        heads,
        sequence,
        first_key: first_key.cloned(),
        tables: None,
    };
    tape.apply_one(op, &[qkv])
}

struct Attention {
    heads: Heads,
    sequence: usize,
    first_key: Option<Tensor>,
    /// On the CPU: the tables by which queries and keys are rotated before attention.
    tables: Option<RopeTables>,
}

impl Attention {
    fn places<T: Real>(&self) -> reference::Places<'_, T> {
        reference::Places {
            heads: self.heads,
            sequence: self.sequence,
            first_key: self.first_key.as_ref().map(Tensor::slice),
            angles: self.tables.as_ref().map(|t| t.angles(self.sequence)),
        }
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (qkv, heads) = (inputs[0], self.heads);
        if qkv.device() != Device::Cpu {
            let first_key = self.first_key.as_ref();
            let [out, lse] = kernels::forward(qkv, first_key, heads, self.sequence)?;
            return Ok(Forward::one(out.clone(), vec![qkv.clone(), out, lse]));
        }
        let tokens = qkv.shape()[0];
        let of_width = |w: usize| Tensor::unspecified(qkv.device(), qkv.dtype(), [tokens, w]);
        let (mut out, mut lse) = (of_width(heads.query * heads.dim), of_width(heads.query));
        with_real!(qkv.dtype(), "attention", |T| {
            let (out, lse) = (out.slice_mut::<T>(), lse.slice_mut());
            reference::forward(out, lse, qkv.slice(), self.places());
            Ok(())
        })?;
        Ok(Forward::one(out.clone(), vec![qkv.clone(), out, lse]))
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (qkv, out, lse) = (&saved[0], &saved[1], &saved[2]);
        let dout = only(douts);
        if qkv.device() != Device::Cpu {
            if !grads.wanted(0) {
                grads.none(0);
                return Ok(());
            }
            let (saved, first_key) = ([out, lse], self.first_key.as_ref());
            let dqkv =
                kernels::backward(dout, qkv, saved, first_key, None, self.heads, self.sequence)?;
            return grads.give(0, dqkv);
        }
        with_real!(qkv.dtype(), "attention", |T| grads.write(
            0,
            qkv,
            |dqkv, accumulate| {
                let saved = reference::Saved {
                    qkv: qkv.slice(),
                    out: out.slice(),
                    lse: lse.slice(),
                };
                let dqkv = dqkv.slice_mut::<T>();
                reference::backward(dqkv, accumulate, dout.slice(), saved, self.places());
                Ok(())
            }
        ))
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |batch: usize, sequence: usize, heads: [usize; 3], documents: &[i32]| {
        let [query, key_value, dim] = heads;
        let heads = Heads {
            query,
            key_value,
            dim,
        };
        let name = format!(
            "attention, {batch} sequences of {sequence}, {heads:?}, documents from {documents:?}"
        );
        let first_key = (documents.len() > 1).then(|| packed(batch, sequence, documents));
        Case::new(name, move |tape, v| {
            let first_key = first_key.as_ref();
            Ok(vec![attention(tape, &v[0], heads, sequence, first_key)?])
        })
        .input("qkv", [batch * sequence, heads.row_width()])
    };
    vec![
        case(1, 1, [1, 1, 4], &[0]),
        case(2, 5, [4, 2, 6], &[0]),
        case(1, 67, [3, 1, 8], &[0]),
        case(3, 64, [2, 2, 5], &[0]),
        case(2, 7, [4, 2, 3], &[0, 3, 4]),
        // One document begins inside a block of queries, one at the start of a block, one in the last block.
        case(1, 131, [2, 1, 4], &[0, 30, 64, 130]),
    ]
}

/// `first_key` for `batch` sequences whose documents begin at the indices `documents`.
fn packed(batch: usize, sequence: usize, documents: &[i32]) -> Tensor {
    let of_row = |row: usize| {
        let begun = documents.iter().rev().find(|d| **d <= row as i32);
        begun.copied().unwrap_or(0)
    };
    let rows: Vec<i32> = (0..batch).flat_map(|_| (0..sequence).map(of_row)).collect();
    Tensor::from_slice([rows.len()], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Gradients;

    fn attend(qkv: &[f64], tokens: usize, heads: Heads, sequence: usize) -> Vec<f64> {
        let qkv = Tensor::from_slice([tokens, heads.row_width()], qkv);
        let y = attention(&Tape::new(), &Var::constant(qkv), heads, sequence, None).unwrap();
        y.tensor().slice::<f64>().to_vec()
    }

    #[test]
    fn two_queries_of_one_group_worked_by_hand() {
        // hd = 1, no scaling. Rows (q0, q1, k, v): (5, 7, ln 2, 10), (1, 0, 0, 4). Row 0 attends only to itself: 10
        // for both heads. Row 1: head 0 has scores (ln 2, 0), probabilities (2/3, 1/3), value 8; head 1 has scores
        // (0, 0), value 7.
        let heads = Heads {
            query: 2,
            key_value: 1,
            dim: 1,
        };
        let qkv = [5.0, 7.0, 2f64.ln(), 10.0, 1.0, 0.0, 0.0, 4.0];
        let y = attend(&qkv, 2, heads, 2);
        for (y, expected) in y.iter().zip([10.0, 10.0, 8.0, 7.0]) {
            assert!((y - expected).abs() <= 1e-14, "{y} for {expected}");
        }
    }

    #[test]
    fn the_kernels_agree_with_the_reference_within_one_percent() {
        for (dim, documents) in [(64, &[0][..]), (128, &[0]), (64, &[0, 1, 40, 64])] {
            let heads = Heads {
                query: 4,
                key_value: 2,
                dim,
            };
            let (tokens, sequence) = (2 * 70, 70);
            let numbers = |width: usize, seed| {
                let numbers = crate::tape::check::normal_numbers(tokens * width, seed);
                let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
                Tensor::from_slice([tokens, width], &numbers).narrowed()
            };
            let (qkv, dout) = (numbers(heads.row_width(), 1), numbers(4 * dim, 2));
            let first_key = packed(2, sequence, documents);
            let run = |qkv: Tensor, dout: Tensor| {
                let tape = Tape::new();
                let first_key = first_key.clone().on(qkv.device());
                let qkv = Var::leaf(qkv, 0);
                let y = attention(&tape, &qkv, heads, sequence, Some(&first_key)).unwrap();
                let output = y.tensor().clone();
                let mut gradients = Gradients::new(1);
                tape.backward_from(&[(&y, dout)], &mut gradients).unwrap();
                let flat = |t: &Tensor| t.widened().on(Device::Cpu).slice::<f32>().to_vec();
                [flat(&output), flat(gradients.get(0).unwrap())]
            };
            crate::tape::take_op_counts();
            let kernels = run(qkv.clone().on(Device::Sim), dout.clone().on(Device::Sim));
            assert_eq!(crate::tape::take_op_counts()["attention"], 1);
            for (got, want) in kernels.iter().zip(run(qkv.widened(), dout.widened())) {
                let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
                let error = norm(&mut got.iter().zip(&want).map(|(g, w)| g - w));
                let relative = error / norm(&mut want.iter().copied());
                assert!(relative <= 1e-2, "width {dim}: relative error {relative}");
            }
        }
    }

    #[test]
    fn no_output_depends_on_a_later_token_or_another_sequence() {
        let heads = Heads {
            query: 2,
            key_value: 1,
            dim: 4,
        };
        let (sequence, width) = (70, heads.row_width());
        let mut qkv = crate::tape::check::normal_numbers(2 * sequence * width, 1);
        let before = attend(&qkv, 2 * sequence, heads, sequence);
        let changed = 66;
        qkv[changed * width..sequence * width].fill(3.0);
        let after = attend(&qkv, 2 * sequence, heads, sequence);
        assert_eq!(before[..changed * 8], after[..changed * 8]);
        assert_ne!(before[changed * 8..70 * 8], after[changed * 8..70 * 8]);
        assert_eq!(before[sequence * 8..], after[sequence * 8..]);
    }

    #[test]
    fn an_incomplete_sequence_is_an_error() {
        let heads = Heads {
            query: 1,
            key_value: 1,
            dim: 2,
        };
        let qkv = Var::constant(Tensor::from_slice([3, 6], &[0.0; 18]));
        let e = attention(&Tape::new(), &qkv, heads, 2, None).unwrap_err();
        assert!(e.to_string().contains("whole sequences of 2 tokens"), "{e}");
    }

    #[test]
    fn each_document_of_a_sequence_gets_the_result_it_gets_alone() {
        let heads = Heads {
            query: 4,
            key_value: 2,
            dim: 6,
        };
        // Documents of 1, 69, 60 and 1 rows.
        let (sequence, documents, width) = (131, [0, 1, 70, 130], heads.row_width());
        let qkv = crate::tape::check::normal_numbers(sequence * width, 3);
        let first_key = packed(1, sequence, &documents);
        let whole = Var::constant(Tensor::from_slice([sequence, width], &qkv));
        let y = attention(&Tape::new(), &whole, heads, sequence, Some(&first_key)).unwrap();
        let alone = documents
            .iter()
            .zip([1, 70, 130, 131])
            .flat_map(|(&begin, end)| {
                let rows = end - begin as usize;
                attend(&qkv[begin as usize * width..end * width], rows, heads, rows)
            });
        let alone: Vec<f64> = alone.collect();
        for (y, alone) in y.tensor().slice::<f64>().iter().zip(alone) {
            assert!((y - alone).abs() <= 1e-12, "{y} for {alone}");
        }
    }

    #[test]
    fn a_first_key_count_other_than_one_per_row_is_an_error() {
        let heads = Heads {
            query: 1,
            key_value: 1,
            dim: 2,
        };
        let qkv = Var::constant(Tensor::from_slice([4, 6], &[0.0; 24]));
        let few = Tensor::from_slice([3], &[0i32; 3]);
        let e = attention(&Tape::new(), &qkv, heads, 2, Some(&few)).unwrap_err();
        assert!(e.to_string().contains("first_key"), "{e}");
    }
}
