//! Causal attention on the fused projection, with grouped queries.
//!
//! `qkv [B·S, (H + 2 KV) hd]`, `o [B·S, H hd]`. For each sequence and query head, with the key and
//! value head of its group: `P = softmax(Q Kᵀ / √hd)` over the keys at or before the query, `O = P V`.
//! Backward: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P ⊙ (dP − rowsum(dO ⊙ O))`, `dQ = dS K / √hd`,
//! `dK = dSᵀ Q / √hd`.
//!
//! As in FlashAttention (Dao et al., arXiv 2205.14135) scores exist only for one block of queries at
//! a time, backward forms them again, and of the softmax only the logsumexp of each row is kept.

pub(super) mod kernels;
pub(super) mod reference;

use super::heads::Heads;
use crate::check::Case;
use crate::device::Device;
use crate::error::Result;
use crate::tape::{Forward, Grads, Op, Tape, Var, only};
use crate::tensor::Tensor;
use crate::with_real;

/// Causal attention of `qkv [B·S, (H + 2 KV) hd]`, S = `sequence`; the result is `[B·S, H hd]`.
///
/// # Errors
/// When `qkv` does not have the layout of `heads` or is no whole number of sequences.
pub fn attention(tape: &Tape, qkv: &Var, heads: Heads, sequence: usize) -> Result<Var> {
    heads.check("attention", qkv.tensor(), sequence)?;
    tape.apply_one(Attention { heads, sequence }, &[qkv])
}

struct Attention {
    heads: Heads,
    sequence: usize,
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
            let [out, lse] = kernels::forward(qkv, None, heads, self.sequence)?;
            return Ok(Forward {
                saved: vec![qkv.clone(), out.clone(), lse],
                outputs: vec![out],
            });
        }
        let tokens = qkv.shape()[0];
        let of_width = |w: usize| Tensor::unspecified(qkv.device(), qkv.dtype(), [tokens, w]);
        let (mut out, mut lse) = (of_width(heads.query * heads.dim), of_width(heads.query));
        with_real!(qkv.dtype(), "attention", |T| {
            reference::forward(
                out.slice_mut::<T>(),
                lse.slice_mut(),
                qkv.slice(),
                heads,
                self.sequence,
            );
            Ok(Forward {
                saved: vec![qkv.clone(), out.clone(), lse],
                outputs: vec![out],
            })
        })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
        let (qkv, out, lse) = (&saved[0], &saved[1], &saved[2]);
        let dout = only(douts);
        if qkv.device() != Device::Cpu {
            if !grads.wanted(0) {
                grads.none(0);
                return Ok(());
            }
            let dqkv = kernels::backward(dout, qkv, [out, lse], self.heads, self.sequence)?;
            return grads.give(0, dqkv);
        }
        with_real!(qkv.dtype(), "attention", |T| grads.write(
            0,
            qkv,
            |dqkv, accumulate| {
                reference::backward(
                    dqkv.slice_mut::<T>(),
                    accumulate,
                    dout.slice(),
                    reference::Saved {
                        qkv: qkv.slice(),
                        out: out.slice(),
                        lse: lse.slice(),
                    },
                    self.heads,
                    self.sequence,
                );
                Ok(())
            }
        ))
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |batch: usize, sequence: usize, query: usize, key_value: usize, dim: usize| {
        let heads = Heads {
            query,
            key_value,
            dim,
        };
        let name = format!("attention, {batch} sequences of {sequence}, {heads:?}");
        Case::new(name, move |tape, v| {
            Ok(vec![attention(tape, &v[0], heads, sequence)?])
        })
        .input("qkv", [batch * sequence, heads.row_width()])
    };
    vec![
        case(1, 1, 1, 1, 4),
        case(2, 5, 4, 2, 6),
        case(1, 67, 3, 1, 8),
        case(3, 64, 2, 2, 5),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Gradients;

    fn attend(qkv: &[f64], tokens: usize, heads: Heads, sequence: usize) -> Vec<f64> {
        let qkv = Tensor::from_slice([tokens, heads.row_width()], qkv);
        let y = attention(&Tape::new(), &Var::constant(qkv), heads, sequence).unwrap();
        y.tensor().slice::<f64>().to_vec()
    }

    #[test]
    fn two_queries_of_one_group_worked_by_hand() {
        // hd = 1, no scaling. Rows (q0, q1, k, v): (5, 7, ln 2, 10), (1, 0, 0, 4).
        // Row 0 sees itself alone: 10 for both heads. Row 1: head 0 has scores (ln 2, 0),
        // probabilities (2/3, 1/3), value 8; head 1 has scores (0, 0), value 7.
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
    fn the_kernels_give_what_the_reference_gives_to_a_hundredth() {
        for dim in [64, 128] {
            let heads = Heads {
                query: 4,
                key_value: 2,
                dim,
            };
            let (tokens, sequence) = (2 * 70, 70);
            let numbers = |width: usize, seed| {
                let numbers = crate::check::normal_numbers(tokens * width, seed);
                let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
                Tensor::from_slice([tokens, width], &numbers).narrowed()
            };
            let (qkv, dout) = (numbers(heads.row_width(), 1), numbers(4 * dim, 2));
            let run = |qkv: Tensor, dout: Tensor| {
                let tape = Tape::new();
                let y = attention(&tape, &Var::leaf(qkv, 0), heads, sequence).unwrap();
                let output = y.tensor().clone();
                let mut gradients = Gradients::new(1);
                tape.backward_from(&[(&y, dout)], &mut gradients).unwrap();
                let flat = |t: &Tensor| t.widened().on(Device::Cpu).slice::<f32>().to_vec();
                [flat(&output), flat(gradients.get(0).unwrap())]
            };
            crate::tape::take_ran();
            let kernels = run(qkv.clone().on(Device::Sim), dout.clone().on(Device::Sim));
            assert_eq!(crate::tape::take_ran()["attention"], 1);
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
        let mut qkv = crate::check::normal_numbers(2 * sequence * width, 1);
        let before = attend(&qkv, 2 * sequence, heads, sequence);
        let changed = 66;
        qkv[changed * width..sequence * width].fill(3.0);
        let after = attend(&qkv, 2 * sequence, heads, sequence);
        assert_eq!(before[..changed * 8], after[..changed * 8]);
        assert_ne!(before[changed * 8..70 * 8], after[changed * 8..70 * 8]);
        assert_eq!(before[sequence * 8..], after[sequence * 8..]);
    }

    #[test]
    fn tokens_that_are_no_whole_sequences_are_an_error() {
        let heads = Heads {
            query: 1,
            key_value: 1,
            dim: 2,
        };
        let qkv = Var::constant(Tensor::from_slice([3, 6], &[0.0; 18]));
        let e = attention(&Tape::new(), &qkv, heads, 2).unwrap_err();
        assert!(e.to_string().contains("whole sequences of 2 tokens"), "{e}");
    }
}
