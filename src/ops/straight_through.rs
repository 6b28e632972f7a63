//! Gates with the values of TopK and a gradient that includes every expert (DenseMixer).
//!
//! Forward `w_i = p_i` on the chosen experts A, 0 off them; backward passes `dw` to all experts: `dp_i = dw_i`.
//! Renormalised, with `S = Σ_A p`: `w_i = p_i / S` on A; backward treats an expert off A as if its gate were
//! `p_i / S` with S constant: `dp_j = (dw_j − Σ_A w_i dw_i) / S` on A, `dp_j = dw_j / S` off A. All tensors are
//! `[T, E]`. Source: DenseMixer (Yao et al. 2025) and its code.

use super::dispatch::{Dispatch, Selection};
use super::gates::Selected;
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::dtype::Real;
use crate::with_real;
use std::rc::Rc;

/// Returns the gates `[T, E]` of the chosen experts from the probabilities `p [T, E]`; 0 for the other experts.
///
/// # Errors
/// Returns an error when `p` does not fit the choice.
pub fn straight_through(
    tape: &Tape,
    p: &Var,
    chosen: &Rc<Dispatch>,
    renormalize: bool,
) -> Result<Var> {
    let selection = chosen.selection();
    let shape = [selection.num_tokens(), selection.num_experts()];
    p.tensor()
        .expect_shape("straight_through", "probabilities", shape)?;
    tape.apply_one(
        StraightThrough {
            chosen: chosen.clone(),
            renormalize,
        },
        &[p],
    )
}

pub(crate) struct StraightThrough {
    pub(crate) chosen: Rc<Dispatch>,
    renormalize: bool,
}

impl StraightThrough {
    /// The form of the gates for the kernels.
    fn gates(&self) -> Selected {
        Selected {
            renormalize: self.renormalize,
            through: true,
        }
    }
}

impl Op for StraightThrough {
    fn name(&self) -> &'static str {
        "straight_through"
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn runs_on(&self, _device: Device) -> bool {
        true
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let p = inputs[0];
        if p.device() != Device::Cpu {
            return Ok(Forward::one(
                self.gates().forward(p, &self.chosen)?,
                vec![p.clone()],
            ));
        }
        let mut w = Tensor::zeros(p.device(), p.dtype(), p.shape());
        with_real!(p.dtype(), "straight_through", |T| {
            reference::forward(
                w.slice_mut::<T>(),
                p.slice(),
                self.chosen.selection(),
                self.renormalize,
            );
            Ok(Forward::one(w.clone(), vec![p.clone(), w]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (p, dw) = (&saved[0], only(douts));
        if p.device() != Device::Cpu {
            return grads.give(0, self.gates().backward(dw, p, &self.chosen)?);
        }
        let w = &saved[1];
        let mut dp = p.unspecified_like();
        with_real!(p.dtype(), "straight_through", |T| {
            reference::backward(
                dp.slice_mut::<T>(),
                dw.slice(),
                p.slice(),
                w.slice(),
                self.chosen.selection(),
                self.renormalize,
            );
            grads.give(0, dp)
        })
    }
}

mod reference {
    use super::*;

    /// `Σ_A p` of a token; 1 without renormalisation.
    fn divisor<T: Real>(p: &[T], chosen: &[i32], renormalize: bool) -> T {
        if renormalize {
            chosen.iter().map(|&e| p[e as usize]).sum()
        } else {
            T::one()
        }
    }

    /// Writes the gates of the chosen experts to `w`, which holds zeros.
    pub fn forward<T: Real>(w: &mut [T], p: &[T], chosen: &Selection, renormalize: bool) {
        let width = chosen.num_experts();
        for (t, (w, p)) in w.chunks_mut(width).zip(p.chunks(width)).enumerate() {
            let own = chosen.experts(t);
            let divisor = divisor(p, own, renormalize);
            for &e in own {
                w[e as usize] = p[e as usize] / divisor;
            }
        }
    }

    pub fn backward<T: Real>(
        dp: &mut [T],
        dw: &[T],
        p: &[T],
        w: &[T],
        chosen: &Selection,
        renormalize: bool,
    ) {
        let width = chosen.num_experts();
        for t in 0..chosen.num_tokens() {
            let row = t * width..(t + 1) * width;
            let (dp, dw) = (&mut dp[row.clone()], &dw[row.clone()]);
            let (p, w) = (&p[row.clone()], &w[row]);
            let own = chosen.experts(t);
            let divisor = divisor(p, own, renormalize);
            let mean: T = match renormalize {
                true => own.iter().map(|&e| w[e as usize] * dw[e as usize]).sum(),
                false => T::zero(),
            };
            for (dp, &dw) in dp.iter_mut().zip(dw) {
                *dp = dw / divisor;
            }
            for &e in own {
                dp[e as usize] = (dw[e as usize] - mean) / divisor;
            }
        }
    }
}

/// If all experts are chosen, the gradient is the derivative of the value. The other experts' gradients are checked
/// by the router's own check, against the dense router, and by the tests below, against values computed by hand.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (t, e) in [(1, 1), (5, 7)] {
        for renormalize in [false, true] {
            let positive: Vec<f64> = crate::tape::check::normal_numbers(t * e, 7)
                .iter()
                .map(|x| 1.0 + x * x)
                .collect();
            let name = format!("straight_through [{t}, {e}] all chosen, renormalize {renormalize}");
            let case = Case::new(name, move |tape, v| {
                let all = Rc::new(Dispatch::new(Selection::all(t, e)));
                Ok(vec![straight_through(tape, &v[0], &all, renormalize)?])
            });
            cases.push(case.values("p", [t, e], &positive));
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::Gradients;

    /// p = (1/2, 1/4, 1/8, 1/8), A = {0, 1}, dw = (8, 4, 2, −1).
    fn worked(renormalize: bool) -> (Vec<f64>, Vec<f64>) {
        let p = Var::leaf(Tensor::from_slice([1, 4], &[0.5, 0.25, 0.125, 0.125]), 0);
        let chosen = Selection::new(1, 4, |_, c| c.extend([0, 1])).unwrap();
        let (tape, chosen) = (Tape::new(), Rc::new(Dispatch::new(chosen)));
        let w = straight_through(&tape, &p, &chosen, renormalize).unwrap();
        let mut store = Gradients::new(1);
        let dw = Tensor::from_slice([1, 4], &[8.0, 4.0, 2.0, -1.0]);
        tape.backward_from(&[(&w, dw)], &mut store).unwrap();
        let of = |t: &Tensor| t.to_f64().unwrap();
        (of(w.tensor()), of(store.get(0).unwrap()))
    }

    #[test]
    fn every_gate_gets_its_gradient_and_only_the_chosen_a_value() {
        assert_eq!(
            worked(false),
            (vec![0.5, 0.25, 0.0, 0.0], vec![8.0, 4.0, 2.0, -1.0])
        );
    }

    #[test]
    fn renormalised_gates_worked_by_hand() {
        // S = 3/4, w = (2/3, 1/3), Σ_A w dw = 16/3 + 4/3 = 20/3:
        // dp = ((8 − 20/3) / S, (4 − 20/3) / S, 2 / S, −1 / S).
        let (w, dp) = worked(true);
        let expected = [16.0 / 9.0, -32.0 / 9.0, 8.0 / 3.0, -4.0 / 3.0];
        assert_eq!(w, [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        for (found, expected) in dp.iter().zip(expected) {
            approx::assert_relative_eq!(*found, expected, epsilon = 1e-14);
        }
    }
}
