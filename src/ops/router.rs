//! Router logits, probabilities and the choice of experts.
//!
//! `z = x Wᵀ`, `x [T, D]`, `W [E, D]`; backward `dx = dz W`, `dW = dzᵀ x`. `p = softmax(z)` over all experts,
//! `z [T, E]`; backward `dz_j = p_j (dp_j − Σ_i p_i dp_i)`: with `dp_i = s_i` only on the chosen experts this is the
//! gradient of TopK routing; with `dp_i = s_i` for all experts it is the gradient of Default MoE and of dense routing
//! (Default MoE, eq. 11 and 12). `top_k` chooses the K largest scores of a row; of equal scores, the lower expert.

use super::dispatch::Selection;
use super::linear::reference as linear;
use crate::error::{Error, Result};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu;
use crate::tensor::dtype::Real;
use crate::with_real;

/// Returns the logits `x Wᵀ [T, E]` of `x [T, D]` with the router weight `[E, D]`.
///
/// # Errors
/// Returns an error when widths or dtypes differ.
pub fn logits(tape: &Tape, x: &Var, weight: &Var) -> Result<Var> {
    let shape = [weight.tensor().shape().rows(), x.tensor().shape().width()];
    weight.tensor().expect_shape("router", "weight", shape)?;
    weight
        .tensor()
        .expect_dtype("router", "weight", x.tensor().dtype())?;
    tape.apply_one(Logits, &[x, weight])
}

/// Returns `softmax(z)` of each row of `z [T, E]`.
///
/// # Errors
/// Returns an error when `z` is not a matrix of real numbers.
pub fn softmax(tape: &Tape, z: &Var) -> Result<Var> {
    if z.tensor().shape().len() != 2 {
        return Err(Error::invalid(
            "router",
            "logits [tokens, experts]",
            z.tensor().shape().to_string(),
            "pass a matrix",
        ));
    }
    tape.apply_one(Softmax, &[z])
}

/// The experts that a router chose.
#[derive(Clone)]
pub struct TopK {
    /// The experts of each token.
    pub selection: Selection,
    /// Whether the logits were finite.
    pub non_finite: NonFinite,
}

/// The first token whose logits hold a NaN or an infinity. Its experts are still in range.
#[derive(Clone)]
pub enum NonFinite {
    /// Its index in the batch; `None` if all logits are finite.
    At(Option<usize>),
    /// `[1]`, in device memory; `i32::MAX` if all logits are finite.
    OfKernel(Tensor),
}

/// Chooses the `k` experts of largest score for each row of `scores [T, E]`; of equal scores, the lower expert.
///
/// # Errors
/// Returns an error when `k` is 0 or larger than E.
pub fn top_k(scores: &Tensor, k: usize) -> Result<Selection> {
    let (tokens, experts) = (scores.shape()[0], scores.shape()[1]);
    if k == 0 || k > experts {
        return Err(Error::invalid(
            "router",
            format!("top_k from 1 to {experts}, the number of experts"),
            k.to_string(),
            "set model.top_k or model.num_experts",
        ));
    }
    with_real!(scores.dtype(), "router", |T| {
        let scores = scores.slice::<T>();
        let mut best: Vec<i32> = Vec::with_capacity(experts);
        Selection::new(tokens, experts, |token, chosen| {
            let row = &scores[token * experts..(token + 1) * experts];
            reference::top_k(row, k, &mut best);
            chosen.extend_from_slice(&best);
        })
    })
}

/// `−Σ_t Σ_i p_ti ln p_ti`, in nats.
pub(super) fn entropy(p: &Tensor) -> Result<f64> {
    let width = p.shape().width();
    with_real!(p.dtype(), "entropy", |T| {
        let p = p.slice::<T>();
        let partials = cpu::blocks(p.len() / width, 256, |_, rows| {
            let block = &p[rows.start * width..rows.end * width];
            block
                .iter()
                .filter(|p| **p > 0.0)
                .map(|&p| -(p * p.ln()).f64())
                .sum::<f64>()
        });
        Ok(partials.into_iter().sum())
    })
}

struct Logits;

impl Op for Logits {
    fn name(&self) -> &'static str {
        "router logits"
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, w) = (inputs[0], inputs[1]);
        let shape = [x.shape().rows(), w.shape()[0]];
        let mut z = Tensor::unspecified(x.device(), x.dtype(), shape);
        with_real!(x.dtype(), "router", |T| {
            linear::forward(z.slice_mut::<T>(), x.slice(), w.slice(), None, w.shape()[1]);
            Ok(Forward::one(z, vec![x.clone(), w.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (x, w, dz) = (&saved[0], &saved[1], only(douts));
        let width = w.shape()[1];
        with_real!(x.dtype(), "router", |T| {
            grads.write(0, x, |dx, accumulate| {
                let dx = dx.slice_mut::<T>();
                linear::dx(dx, accumulate, dz.slice(), w.slice(), width);
                Ok(())
            })?;
            grads.write(1, w, |dw, accumulate| {
                let dw = dw.slice_mut::<T>();
                linear::dw(dw, accumulate, dz.slice(), x.slice(), width);
                Ok(())
            })
        })
    }
}

struct Softmax;

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "router softmax"
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let z = inputs[0];
        let mut p = z.unspecified_like();
        with_real!(z.dtype(), "router", |T| {
            reference::softmax(p.slice_mut::<T>(), z.slice(), z.shape().width());
            Ok(Forward::one(p.clone(), vec![p]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (p, dp) = (&saved[0], only(douts));
        let mut dz = p.unspecified_like();
        with_real!(p.dtype(), "router", |T| {
            reference::softmax_backward(
                dz.slice_mut::<T>(),
                p.slice(),
                dp.slice(),
                p.shape().width(),
            );
            grads.give(0, dz)
        })
    }
}

/// The operations on slices of rows of E numbers, for the CPU.
pub(super) mod reference {
    use super::*;

    pub fn softmax<T: Real>(p: &mut [T], z: &[T], experts: usize) {
        cpu::each_row_block(p, experts, |first, rows| {
            for (p, z) in rows
                .chunks_mut(experts)
                .zip(z[first * experts..].chunks(experts))
            {
                let max = z.iter().fold(T::neg_infinity(), |m, &x| m.max(x));
                let mut sum = T::zero();
                for (p, &z) in p.iter_mut().zip(z) {
                    *p = (z - max).exp();
                    sum += *p;
                }
                for p in p {
                    *p /= sum;
                }
            }
        });
    }

    pub fn softmax_backward<T: Real>(dz: &mut [T], p: &[T], dp: &[T], experts: usize) {
        cpu::each_row_block(dz, experts, |first, rows| {
            let at = first * experts;
            let given = p[at..].chunks(experts).zip(dp[at..].chunks(experts));
            for (dz, (p, dp)) in rows.chunks_mut(experts).zip(given) {
                let average: T = p.iter().zip(dp).map(|(&p, &dp)| p * dp).sum();
                for (dz, (&p, &dp)) in dz.iter_mut().zip(p.iter().zip(dp)) {
                    *dz = p * (dp - average);
                }
            }
        });
    }

    /// Writes to `best` the indices of the `k` largest `scores`, ascending. NaN is treated as smaller than every
    /// number.
    pub fn top_k<T: Real>(scores: &[T], k: usize, best: &mut Vec<i32>) {
        best.clear();
        best.extend(0..scores.len() as i32);
        let score = |e: &i32| {
            let s = scores[*e as usize];
            if s.is_nan() { T::neg_infinity() } else { s }
        };
        // Descending by score, then ascending by index: a total order, so the result is unique.
        let order = |a: &i32, b: &i32| {
            score(b)
                .partial_cmp(&score(a))
                .unwrap_or(std::cmp::Ordering::Equal)
                .then(a.cmp(b))
        };
        if k < best.len() {
            best.select_nth_unstable_by(k - 1, order);
        }
        best.truncate(k);
        best.sort_unstable();
    }
}

pub(super) fn cases() -> Vec<Case> {
    let logits_case = Case::new("router logits [37, 6] to 5", |tape, v| {
        Ok(vec![logits(tape, &v[0], &v[1])?])
    })
    .input("x", [37, 6])
    .input("weight", [5, 6]);
    [(1, 1), (5, 7), (130, 8)]
        .into_iter()
        .map(|(t, e)| {
            Case::new(format!("router softmax [{t}, {e}]"), |tape, v| {
                Ok(vec![softmax(tape, &v[0])?])
            })
            .input("z", [t, e])
        })
        .chain([logits_case])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::scores::first_non_finite;

    fn chosen(scores: &[f64], k: usize) -> Selection {
        top_k(&Tensor::from_slice([1, scores.len()], scores), k).unwrap()
    }

    #[test]
    fn softmax_worked_by_hand() {
        // e^0 : e^ln 3 = 1 : 3.
        let z = Var::constant(Tensor::from_slice([1, 2], &[0.0, 3f64.ln()]));
        let p = softmax(&Tape::new(), &z).unwrap();
        approx::assert_relative_eq!(p.tensor().slice::<f64>()[0], 0.25, epsilon = 1e-15);
        approx::assert_relative_eq!(p.tensor().slice::<f64>()[1], 0.75, epsilon = 1e-15);
    }

    #[test]
    fn ties_go_to_the_lower_expert() {
        assert_eq!(chosen(&[1.0, 2.0, 2.0, 2.0], 2).experts(0), [1, 2]);
        assert_eq!(chosen(&[0.5; 6], 3).experts(0), [0, 1, 2]);
    }

    #[test]
    fn the_largest_scores_are_chosen_in_ascending_order_of_expert() {
        assert_eq!(chosen(&[0.1, 5.0, -3.0, 7.0], 2).experts(0), [1, 3]);
        assert_eq!(chosen(&[0.1, 5.0, -3.0, 7.0], 4).experts(0), [0, 1, 2, 3]);
    }

    #[test]
    fn a_row_of_nan_is_flagged_and_stays_in_range() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let scores = Tensor::from_slice([2, 3], &[1.0, 2.0, 3.0, bad, bad, bad]);
            assert_eq!(first_non_finite(&scores).unwrap(), Some(1));
            assert_eq!(top_k(&scores, 2).unwrap().experts(1), [0, 1]);
        }
        let finite = Tensor::from_slice([1, 2], &[1.0, 2.0]);
        assert_eq!(first_non_finite(&finite).unwrap(), None);
    }

    #[test]
    fn top_k_beyond_the_number_of_experts_is_an_error() {
        let scores = Tensor::from_slice([1, 2], &[1.0, 2.0]);
        assert!(top_k(&scores, 3).is_err() && top_k(&scores, 0).is_err());
    }
}
