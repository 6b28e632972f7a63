//! Combine: the layer's output from its experts' outputs and the default vectors.
//!
//! `y_t = Σ_{i∈A_t} w_ti e_i(x_t) + Σ_{i∉A_t} w_ti ê_i` (Default MoE, eq. 11): `w [T, E]` gates,
//! `e [R, D]` outputs of the chosen experts sorted by expert, `ê [E, D]` default vectors or none.
//! With g = dy: `de_r = w g`, `dw_ti = ⟨g_t, e_i⟩` on A, `⟨g_t, ê_i⟩` off A (0 without defaults).
//! ê is a constant: no gradient flows into or through it.

use super::dispatch::Dispatch;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::vector::map_over;
use crate::tensor::cpu::{self, Accumulate, Mat, MatMut};
use crate::tensor::dtype::Real;
use crate::with_real;
use std::rc::Rc;

/// Default vectors of a layer, and whether they enter the forward pass.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// `[E, D]`.
    pub vectors: Tensor,
    /// Whether they are added to the output. They always enter the gradient of the gates.
    pub in_forward: bool,
}

/// Returns the layer's output `[T, D]` from gates `[T, E]` and expert outputs `[R, D]`.
///
/// # Errors
/// Returns an error when the shapes do not fit each other or the dispatch.
pub fn combine(
    tape: &Tape,
    gates: &Var,
    expert_outputs: &Var,
    defaults: Option<Defaults>,
    dispatch: &Rc<Dispatch>,
) -> Result<Var> {
    let selection = dispatch.selection();
    let (tokens, experts) = (selection.num_tokens(), selection.num_experts());
    let width = expert_outputs.tensor().shape().width();
    let dtype = gates.tensor().dtype();
    gates
        .tensor()
        .expect_shape("combine", "gates", [tokens, experts])?;
    expert_outputs.tensor().expect_shape(
        "combine",
        "expert outputs",
        [dispatch.num_rows(), width],
    )?;
    expert_outputs
        .tensor()
        .expect_dtype("combine", "expert outputs", dtype)?;
    if let Some(d) = &defaults {
        d.vectors
            .expect_shape("combine", "default vectors", [experts, width])?;
        d.vectors
            .expect_dtype("combine", "default vectors", dtype)?;
    }
    tape.apply_one(
        Combine {
            defaults,
            dispatch: dispatch.clone(),
        },
        &[gates, expert_outputs],
    )
}

pub(crate) struct Combine {
    defaults: Option<Defaults>,
    pub(crate) dispatch: Rc<Dispatch>,
}

impl Op for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (gates, outputs) = (inputs[0], inputs[1]);
        let shape = [gates.shape()[0], outputs.shape().width()];
        let mut y = Tensor::unspecified(gates.device(), gates.dtype(), shape);
        with_real!(gates.dtype(), "combine", |T| {
            let vectors = self
                .defaults
                .as_ref()
                .filter(|d| d.in_forward)
                .map(|d| d.vectors.slice::<T>());
            let layer = Layer {
                gates: gates.slice::<T>(),
                dispatch: &self.dispatch,
                width: shape[1],
            };
            layer.forward(y.slice_mut(), outputs.slice(), vectors);
            Ok(Forward::one(y, vec![gates.clone(), outputs.clone()]))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (gates, outputs, dy) = (&saved[0], &saved[1], only(douts));
        with_real!(gates.dtype(), "combine", |T| {
            let vectors = self.defaults.as_ref().map(|d| d.vectors.slice::<T>());
            let width = outputs.shape().width();
            let layer = Layer {
                gates: gates.slice::<T>(),
                dispatch: &self.dispatch,
                width,
            };
            grads.write(0, gates, |dw, accumulate| {
                layer.dgates(
                    dw.slice_mut(),
                    accumulate,
                    dy.slice(),
                    outputs.slice(),
                    vectors,
                );
                Ok(())
            })?;
            grads.write(1, outputs, |de, accumulate| {
                layer.doutputs(de.slice_mut(), accumulate, dy.slice());
                Ok(())
            })
        })
    }
}

/// The reference: gates `[T, E]`, rows of `width` = D numbers.
struct Layer<'a, T> {
    gates: &'a [T],
    dispatch: &'a Dispatch,
    width: usize,
}

impl<T: Real> Layer<'_, T> {
    fn forward(&self, y: &mut [T], outputs: &[T], defaults: Option<&[T]>) {
        let (selection, width) = (self.dispatch.selection(), self.width);
        let experts = selection.num_experts();
        cpu::each_row_block(y, width, |first, y| {
            let tokens = y.len() / width;
            match defaults {
                None => y.fill(T::zero()),
                Some(vectors) => {
                    // Gates of the experts not chosen, times their default vectors.
                    let mut rest = self.gates[first * experts..(first + tokens) * experts].to_vec();
                    for (t, gates) in rest.chunks_mut(experts).enumerate() {
                        for &e in selection.experts(first + t) {
                            gates[e as usize] = T::zero();
                        }
                    }
                    let (rest, vectors) = (
                        Mat::new(&rest, tokens, experts),
                        Mat::new(vectors, experts, width),
                    );
                    cpu::gemm(
                        MatMut::new(y, tokens, width),
                        Accumulate::Assign,
                        rest,
                        vectors,
                    );
                }
            }
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (t, y) in y.chunks_mut(width).enumerate() {
                        for slot in selection.slots(first + t) {
                            let gate = self.gates[(first + t) * experts + selection.expert(slot)];
                            let row = self.dispatch.row(slot) * width;
                            let output = &outputs[row..row + width];
                            map_over([&mut *y], [output], |[e], [old]| [old + gate * e]);
                        }
                    }
                },
            );
        });
    }

    fn doutputs(&self, de: &mut [T], accumulate: Accumulate, dy: &[T]) {
        let (selection, width) = (self.dispatch.selection(), self.width);
        let experts = selection.num_experts();
        // The row blocks of the dispatch name their expert; a row index does not.
        let row_expert: Vec<usize> = (0..experts)
            .flat_map(|e| self.dispatch.rows(e).map(move |_| e))
            .collect();
        cpu::each_row_block(de, width, |first, de| {
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (i, de) in de.chunks_mut(width).enumerate() {
                        let token = self.dispatch.token(first + i);
                        let gate = self.gates[token * experts + row_expert[first + i]];
                        let dy = &dy[token * width..][..width];
                        map_over([de], [dy], |[g], [old]| [accumulate.onto(old, gate * g)]);
                    }
                },
            );
        });
    }

    fn dgates(
        &self,
        dw: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        outputs: &[T],
        defaults: Option<&[T]>,
    ) {
        let (selection, width) = (self.dispatch.selection(), self.width);
        let experts = selection.num_experts();
        cpu::each_row_block(dw, experts, |first, dw| {
            let tokens = dw.len() / experts;
            let g = &dy[first * width..(first + tokens) * width];
            let mut s = vec![T::zero(); tokens * experts];
            if let Some(vectors) = defaults {
                let (g, vectors) = (
                    Mat::new(g, tokens, width),
                    Mat::new(vectors, experts, width),
                );
                cpu::gemm(
                    MatMut::new(&mut s, tokens, experts),
                    Accumulate::Assign,
                    g,
                    vectors.t(),
                );
            }
            for (t, g) in g.chunks(width).enumerate() {
                for slot in selection.slots(first + t) {
                    let row = self.dispatch.row(slot) * width;
                    let dot = dot(g, &outputs[row..row + width]);
                    s[t * experts + selection.expert(slot)] = dot;
                }
            }
            match accumulate {
                Accumulate::Assign => dw.copy_from_slice(&s),
                Accumulate::Add => dw.iter_mut().zip(&s).for_each(|(d, &s)| *d += s),
            }
        });
    }
}

/// Inner product in eight interleaved partial sums: vector code with a fixed order.
#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let (mut lanes, mut rest) = ([T::zero(); 8], T::zero());
    let whole = a.len() / 8 * 8;
    let mut i = 0;
    while i < whole {
        let [a, b]: [&[T; 8]; 2] = [a, b].map(|s| s[i..].first_chunk().expect("8 elements"));
        for lane in 0..8 {
            lanes[lane] += a[lane] * b[lane];
        }
        i += 8;
    }
    for i in whole..a.len() {
        rest += a[i] * b[i];
    }
    lanes.into_iter().sum::<T>() + rest
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (t, e, k, skip_odd) in [
        (1, 1, 1, false),
        (1, 4, 2, false),
        (23, 7, 2, true),
        (9, 3, 3, false),
        (70, 8, 1, false),
    ] {
        for with_defaults in [false, true] {
            let selection = crate::ops::dispatch::scattered(t, e, k, skip_odd);
            let rows = selection.num_slots();
            let name = format!("combine T {t} E {e} K {k} defaults {with_defaults}");
            let case = Case::new(name, move |tape, v| {
                let dispatch = Rc::new(Dispatch::new(selection.clone()));
                let vectors = v[2].tensor().clone();
                let defaults = with_defaults.then_some(Defaults {
                    vectors,
                    in_forward: true,
                });
                Ok(vec![combine(tape, &v[0], &v[1], defaults, &dispatch)?])
            });
            cases.push(
                case.input("gates", [t, e])
                    .input("expert outputs", [rows, 9])
                    .input("default vectors", [e, 9])
                    .constant(),
            );
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::dispatch::Selection;
    use crate::tape::Gradients;

    /// One token, three experts, expert 1 chosen: e_1 = (1, 2), ê = (10, 0), (-, -), (0, 10),
    /// gates (0.5, 0.25, 0.125), g = (1, -1).
    fn worked(in_forward: Option<bool>) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let dispatch = Rc::new(Dispatch::new(
            Selection::new(1, 3, |_, c| c.push(1)).unwrap(),
        ));
        let gates = Var::leaf(Tensor::from_slice([1, 3], &[0.5, 0.25, 0.125]), 0);
        let outputs = Var::leaf(Tensor::from_slice([1, 2], &[1.0, 2.0]), 1);
        let vectors = Tensor::from_slice([3, 2], &[10.0, 0.0, f64::MAX, f64::MAX, 0.0, 10.0]);
        let defaults = in_forward.map(|in_forward| Defaults {
            vectors,
            in_forward,
        });
        let tape = Tape::new();
        let y = combine(&tape, &gates, &outputs, defaults, &dispatch).unwrap();
        let mut store = Gradients::new(2);
        tape.backward_from(
            &[(&y, Tensor::from_slice([1, 2], &[1.0, -1.0]))],
            &mut store,
        )
        .unwrap();
        let gradient = |i| store.get(i).unwrap().to_f64().unwrap();
        (y.tensor().to_f64().unwrap(), gradient(0), gradient(1))
    }

    #[test]
    fn without_defaults_only_the_chosen_expert_contributes() {
        let (y, dgates, doutputs) = worked(None);
        assert_eq!(y, [0.25, 0.5]);
        assert_eq!(dgates, [0.0, -1.0, 0.0]);
        assert_eq!(doutputs, [0.25, -0.25]);
    }

    #[test]
    fn with_defaults_every_gate_gets_a_gradient() {
        // y = 0.25 (1, 2) + 0.5 (10, 0) + 0.125 (0, 10).
        let (y, dgates, doutputs) = worked(Some(true));
        assert_eq!(y, [5.25, 1.75]);
        assert_eq!(dgates, [10.0, -1.0, -10.0]);
        assert_eq!(doutputs, [0.25, -0.25]);
    }

    #[test]
    fn defaults_kept_out_of_the_forward_still_reach_the_gates() {
        let (y, dgates, _) = worked(Some(false));
        assert_eq!(y, [0.25, 0.5]);
        assert_eq!(dgates, [10.0, -1.0, -10.0]);
    }
}
