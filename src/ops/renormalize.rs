//! Renormalised gates: `q_i = p_i / Σ_{j∈A} p_j` on the chosen experts A of each token, 0 elsewhere.
//!
//! `p [T, E]`, `q [T, E]`. Backward `dp_i = (dq_i − Σ_{j∈A} q_j dq_j) / Σ_A p` on A, 0 elsewhere. With one expert per
//! token, q is 1 and the gradient is 0: the router then learns nothing.
//!
//! The form for all experts, for use with default vectors: `q_i = p_i / Σ_{j∈A} p_j` for every i; backward
//! `dp_i = (dq_i − 1[i∈A] Σ_all q_j dq_j) / Σ_A p`, which is not 0 with one expert per token either.

use super::dispatch::Dispatch;
use super::gates::Selected;
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::dtype::Real;
use crate::with_real;
use std::rc::Rc;

/// Returns gates `[T, E]` that sum to 1 over each token's chosen experts; 0 for the other experts.
///
/// # Errors
/// Returns an error when `p` does not fit the dispatch.
pub fn renormalize(tape: &Tape, p: &Var, dispatch: &Rc<Dispatch>) -> Result<Var> {
    apply(tape, p, dispatch, false)
}

/// Returns gates `[T, E]` for every expert, all divided by the sum over the chosen experts A. Only on the CPU.
///
/// # Errors
/// Returns an error when `p` does not fit the dispatch.
pub fn renormalize_all(tape: &Tape, p: &Var, dispatch: &Rc<Dispatch>) -> Result<Var> {
    apply(tape, p, dispatch, true)
}

fn apply(tape: &Tape, p: &Var, dispatch: &Rc<Dispatch>, all: bool) -> Result<Var> {
    let selection = dispatch.selection();
    let shape = [selection.num_tokens(), selection.num_experts()];
    p.tensor()
        .expect_shape("renormalize", "probabilities", shape)?;
    let dispatch = dispatch.clone();
    tape.apply_one(Renormalize { dispatch, all }, &[p])
}

struct Renormalize {
    dispatch: Rc<Dispatch>,
    /// Whether experts off A have gates as well.
    all: bool,
}

/// The form of the gates on a device with kernels.
const GATES: Selected = Selected {
    renormalize: true,
    through: false,
};

impl Op for Renormalize {
    fn name(&self) -> &'static str {
        "renormalize"
    }

    fn runs_on(&self, device: Device) -> bool {
        device == Device::Cpu || !self.all
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let p = inputs[0];
        if p.device() != Device::Cpu {
            return Ok(Forward::one(
                GATES.forward(p, &self.dispatch)?,
                vec![p.clone()],
            ));
        }
        let mut q = p.unspecified_like();
        with_real!(p.dtype(), "renormalize", |T| {
            reference::forward(
                q.slice_mut::<T>(),
                p.slice(),
                self.dispatch.selection(),
                self.all,
            );
            Ok(Forward::one(q.clone(), vec![p.clone(), q]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (p, dq) = (&saved[0], only(douts));
        if p.device() != Device::Cpu {
            return grads.give(0, GATES.backward(dq, p, &self.dispatch)?);
        }
        let q = &saved[1];
        let mut dp = p.unspecified_like();
        with_real!(p.dtype(), "renormalize", |T| {
            reference::backward(
                dp.slice_mut::<T>(),
                dq.slice(),
                p.slice(),
                q.slice(),
                self.dispatch.selection(),
                self.all,
            );
            grads.give(0, dp)
        })
    }
}

mod reference {
    use super::*;
    use crate::ops::dispatch::Selection;

    pub fn forward<T: Real>(q: &mut [T], p: &[T], selection: &Selection, all: bool) {
        let width = selection.num_experts();
        for (t, (q, p)) in q.chunks_mut(width).zip(p.chunks(width)).enumerate() {
            let chosen = selection.experts(t);
            let sum: T = chosen.iter().map(|&e| p[e as usize]).sum();
            q.fill(T::zero());
            if all {
                q.iter_mut().zip(p).for_each(|(q, &p)| *q = p / sum);
            }
            for &e in chosen {
                q[e as usize] = p[e as usize] / sum;
            }
        }
    }

    pub fn backward<T: Real>(
        dp: &mut [T],
        dq: &[T],
        p: &[T],
        q: &[T],
        selection: &Selection,
        all: bool,
    ) {
        let width = selection.num_experts();
        dp.fill(T::zero());
        for t in 0..selection.num_tokens() {
            let at = |e: &i32| t * width + *e as usize;
            let chosen = selection.experts(t);
            let sum: T = chosen.iter().map(|e| p[at(e)]).sum();
            let row = t * width..(t + 1) * width;
            let mean: T = match all {
                true => row.clone().map(|i| q[i] * dq[i]).sum(),
                false => chosen.iter().map(|e| q[at(e)] * dq[at(e)]).sum(),
            };
            if all {
                row.for_each(|i| dp[i] = dq[i] / sum);
            }
            for e in chosen {
                dp[at(e)] = (dq[at(e)] - mean) / sum;
            }
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    use super::dispatch::Selection;
    let shapes = [(1, 2, 1), (5, 7, 3), (9, 4, 4)].into_iter();
    shapes
        .flat_map(|shape| [(shape, false), (shape, true)])
        .map(|((t, e, k), all)| {
            let positive: Vec<f64> = crate::tape::check::normal_numbers(t * e, 7)
                .iter()
                .map(|x| 1.0 + x * x)
                .collect();
            let of = if all { ", all experts" } else { "" };
            let name = format!("renormalize [{t}, {e}] top {k}{of}");
            Case::new(name, move |tape, v| {
                let selection = Selection::new(t, e, |t, c| {
                    let mut own: Vec<i32> = (0..k).map(|i| ((t + 2 * i) % e) as i32).collect();
                    own.sort_unstable();
                    own.dedup();
                    c.extend(own);
                })?;
                let dispatch = Rc::new(Dispatch::new(selection));
                Ok(vec![apply(tape, &v[0], &dispatch, all)?])
            })
            .values("p", [t, e], &positive)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::dispatch::Selection;
    use crate::tape::Gradients;

    #[test]
    fn gates_worked_by_hand_sum_to_one_over_the_chosen() {
        let p = Var::leaf(Tensor::from_slice([1, 3], &[0.25, 0.25, 0.5]), 0);
        let selection = Selection::new(1, 3, |_, c| c.extend([0, 2])).unwrap();
        let tape = Tape::new();
        let q = renormalize(&tape, &p, &Rc::new(Dispatch::new(selection))).unwrap();
        assert_eq!(q.tensor().slice::<f64>(), [1.0 / 3.0, 0.0, 2.0 / 3.0]);
        // dq = (3, 9, 0): Σ q dq = 1, dp = ((3 − 1) / 0.75, 0, −1 / 0.75).
        let mut store = Gradients::new(1);
        tape.backward_from(
            &[(&q, Tensor::from_slice([1, 3], &[3.0, 9.0, 0.0]))],
            &mut store,
        )
        .unwrap();
        let dp = store.get(0).unwrap().slice::<f64>();
        for (found, expected) in dp.iter().zip([8.0 / 3.0, 0.0, -4.0 / 3.0]) {
            approx::assert_relative_eq!(*found, expected, epsilon = 1e-14);
        }
    }

    #[test]
    fn gates_of_all_experts_worked_by_hand() {
        // A = {2}: q = p / 0.5. dq = (3, 9, 2): Σ q dq = 1.5 + 4.5 + 2 = 8, dp = (3, 9, 2 − 8) / 0.5.
        let p = Var::leaf(Tensor::from_slice([1, 3], &[0.25, 0.25, 0.5]), 0);
        let selection = Selection::new(1, 3, |_, c| c.push(2)).unwrap();
        let tape = Tape::new();
        let q = renormalize_all(&tape, &p, &Rc::new(Dispatch::new(selection))).unwrap();
        assert_eq!(q.tensor().slice::<f64>(), [0.5, 0.5, 1.0]);
        let mut store = Gradients::new(1);
        let dq = Tensor::from_slice([1, 3], &[3.0, 9.0, 2.0]);
        tape.backward_from(&[(&q, dq)], &mut store).unwrap();
        assert_eq!(store.get(0).unwrap().slice::<f64>(), [6.0, 18.0, -12.0]);
    }
}
