//! Renormalised gates: `q_i = p_i / Σ_{j∈A} p_j` on the chosen experts A of each token, 0 elsewhere.
//!
//! `p [T, E]`, `q [T, E]`. Backward `dp_i = (dq_i − Σ_{j∈A} q_j dq_j) / Σ_A p` on A, 0 elsewhere.
//! With one expert per token q is 1 and the gradient 0: a router trained so learns nothing.

use super::dispatch::Dispatch;
use super::gates::Selected;
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::dtype::Real;
use crate::with_real;
use std::rc::Rc;

/// Gates that sum to 1 over each token's chosen experts.
///
/// # Errors
/// When `p` does not fit the dispatch.
pub fn renormalize(tape: &Tape, p: &Var, dispatch: &Rc<Dispatch>) -> Result<Var> {
    let selection = dispatch.selection();
    let shape = [selection.num_tokens(), selection.num_experts()];
    p.tensor()
        .expect_shape("renormalize", "probabilities", shape)?;
    let dispatch = dispatch.clone();
    tape.apply_one(Renormalize { dispatch }, &[p])
}

struct Renormalize {
    dispatch: Rc<Dispatch>,
}

/// On a device with kernels.
const GATES: Selected = Selected {
    renormalize: true,
    through: false,
};

impl Op for Renormalize {
    fn name(&self) -> &'static str {
        "renormalize"
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let p = inputs[0];
        if p.device() != Device::Cpu {
            return Ok(Forward {
                outputs: vec![GATES.forward(p, &self.dispatch)?],
                saved: vec![p.clone()],
            });
        }
        let mut q = p.unspecified_like();
        with_real!(p.dtype(), "renormalize", |T| {
            reference::forward(q.slice_mut::<T>(), p.slice(), self.dispatch.selection());
            Ok(Forward {
                saved: vec![p.clone(), q.clone()],
                outputs: vec![q],
            })
        })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
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
            );
            grads.give(0, dp)
        })
    }
}

mod reference {
    use super::*;
    use crate::ops::dispatch::Selection;

    pub fn forward<T: Real>(q: &mut [T], p: &[T], selection: &Selection) {
        let width = selection.num_experts();
        for (t, (q, p)) in q.chunks_mut(width).zip(p.chunks(width)).enumerate() {
            let chosen = selection.experts(t);
            let sum: T = chosen.iter().map(|&e| p[e as usize]).sum();
            q.fill(T::zero());
            for &e in chosen {
                q[e as usize] = p[e as usize] / sum;
            }
        }
    }

    pub fn backward<T: Real>(dp: &mut [T], dq: &[T], p: &[T], q: &[T], selection: &Selection) {
        let width = selection.num_experts();
        dp.fill(T::zero());
        for t in 0..selection.num_tokens() {
            let at = |e: &i32| t * width + *e as usize;
            let chosen = selection.experts(t);
            let sum: T = chosen.iter().map(|e| p[at(e)]).sum();
            let mean: T = chosen.iter().map(|e| q[at(e)] * dq[at(e)]).sum();
            for e in chosen {
                dp[at(e)] = (dq[at(e)] - mean) / sum;
            }
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    use super::dispatch::Selection;
    [(1, 2, 1), (5, 7, 3), (9, 4, 4)]
        .into_iter()
        .map(|(t, e, k)| {
            let positive: Vec<f64> = crate::tape::check::normal_numbers(t * e, 7)
                .iter()
                .map(|x| 1.0 + x * x)
                .collect();
            Case::new(format!("renormalize [{t}, {e}] top {k}"), move |tape, v| {
                let selection = Selection::new(t, e, |t, c| {
                    let mut own: Vec<i32> = (0..k).map(|i| ((t + 2 * i) % e) as i32).collect();
                    own.sort_unstable();
                    own.dedup();
                    c.extend(own);
                })?;
                let dispatch = Rc::new(Dispatch::new(selection));
                Ok(vec![renormalize(tape, &v[0], &dispatch)?])
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
}
