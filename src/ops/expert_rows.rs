//! SwiGLU networks on the CPU: those of the experts, from tokens to rows sorted by expert, or one network for all
//! tokens.
//!
//! For row r of expert e and token t ([`Dispatch`]), with `x [T, D]`, `G [E, 2F, D]` (gate above up) and `W [E, D, F]`:
//! `h_r = G_e x_t`, `a_r = silu(gate) ⊙ up`, `y_r = W_e a_r`, `y [R, D]`.
//! Backward: `dh_r = swiglu′(h_r) W_eᵀ dy_r`, `dx_t = Σ_{r of t} G_eᵀ dh_r` in expert order, `dG_e = Σ_r dh_r x_tᵀ`,
//! `dW_e = Σ_r dy_r a_rᵀ`; exact zeros for an expert without rows.
//!
//! One thread computes all products of a pass for a block of rows, a few columns of h at a time. These columns stay
//! in its cache between a product and SwiGLU.

use super::dispatch::Dispatch;
use super::linear::linear;
use super::swiglu;
use crate::device::Device;
use crate::error::Result;
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate, Mat, MatMut, Scratch, gemm};
use crate::tensor::dtype::Real;
use crate::with_real;
use rayon::prelude::*;
use std::ops::Range;
use std::rc::Rc;

/// Number of rows of a block: large enough that packing an expert's weights costs little compared with the products.
const ROWS: usize = 256;
/// Number of columns of gate, and of up, at a time: a multiple of the register width of every kernel of the GEMM
/// library.
const COLUMNS: usize = 192;

/// Returns the experts' outputs `[R, D]` for the dispatched rows of `x [T, D]`, with `gate_up [E, 2F, D]`, gate above
/// up, and `down [E, D, F]`.
///
/// # Errors
/// Returns an error when the shapes do not fit each other or the dispatch.
pub fn expert_rows(
    tape: &Tape,
    [x, gate_up, down]: [&Var; 3],
    dispatch: &Rc<Dispatch>,
) -> Result<Var> {
    let hidden = x.tensor().shape().width();
    let ffn = down.tensor().shape().width();
    let selection = dispatch.selection();
    let (tokens, experts) = (selection.num_tokens(), selection.num_experts());
    for (what, var, shape) in [
        ("x", x, &[tokens, hidden][..]),
        ("gate_up", gate_up, &[experts, 2 * ffn, hidden]),
        ("down", down, &[experts, hidden, ffn]),
    ] {
        var.tensor().expect_shape("expert_rows", what, shape)?;
        let dtype = x.tensor().dtype();
        var.tensor().expect_dtype("expert_rows", what, dtype)?;
    }
    let dispatch = Some(dispatch.clone());
    tape.apply_one(ExpertRows { dispatch }, &[x, gate_up, down])
}

/// Returns the outputs `[T, D]` of one network for all rows of `x [T, D]`, with `gate_up [2F, D]`, gate above up, and
/// `down [D, F]`. On a device with kernels it is a composition of `linear` and `swiglu`.
///
/// # Errors
/// Returns an error when the shapes do not fit each other.
pub fn network(tape: &Tape, [x, gate_up, down]: [&Var; 3]) -> Result<Var> {
    if x.tensor().device() != Device::Cpu {
        let h = linear(tape, x, gate_up, None)?;
        return linear(tape, &swiglu::swiglu(tape, &h)?, down, None);
    }
    let (hidden, ffn) = (x.tensor().shape().width(), down.tensor().shape().width());
    for (what, var, shape) in [
        ("gate_up", gate_up, [2 * ffn, hidden]),
        ("down", down, [hidden, ffn]),
    ] {
        var.tensor().expect_shape("network", what, shape)?;
        var.tensor()
            .expect_dtype("network", what, x.tensor().dtype())?;
    }
    tape.apply_one(ExpertRows { dispatch: None }, &[x, gate_up, down])
}

struct ExpertRows {
    /// None: one network for all rows.
    dispatch: Option<Rc<Dispatch>>,
}

impl Op for ExpertRows {
    fn name(&self) -> &'static str {
        "expert_rows"
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let [x, gate_up, down] = inputs else {
            unreachable!("the experts have three inputs")
        };
        let tokens = x.shape().rows();
        let rows = self.dispatch.as_ref().map_or(tokens, |d| d.num_rows());
        let new = |width: usize| Tensor::unspecified(x.device(), x.dtype(), [rows, width]);
        let ffn = down.shape().width();
        let (mut h, mut a, mut y) = (new(2 * ffn), new(ffn), new(x.shape().width()));
        let dispatch = self.dispatch.as_deref();
        with_real!(x.dtype(), "expert_rows", |T| {
            let outputs = [&mut h, &mut a, &mut y].map(Tensor::slice_mut::<T>);
            Layer::<T>::new(gate_up, down, dispatch).forward(outputs, x.slice());
            let inputs = inputs.iter().map(|&input| input.clone());
            Ok(Forward::one(y, inputs.chain([h, a]).collect()))
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let [x, gate_up, down, h, a] = saved else {
            unreachable!("five tensors are kept")
        };
        let dy = only(douts);
        with_real!(x.dtype(), "expert_rows", |T| {
            let dispatch = self.dispatch.as_deref();
            let layer = Layer::<T>::new(gate_up, down, dispatch);
            let (mut dh, mut rows) = (h.unspecified_like(), dy.unspecified_like());
            let outputs = [&mut dh, &mut rows].map(Tensor::slice_mut::<T>);
            layer.backward(outputs, dy.slice(), h.slice());
            let x = match dispatch {
                None => {
                    grads.give(0, rows)?;
                    x.clone()
                }
                Some(dispatch) => {
                    grads.write(0, x, |dx, accumulate| {
                        layer.sum_rows(dx.slice_mut(), accumulate, rows.slice(), dispatch);
                        Ok(())
                    })?;
                    cpu::each_row_block(rows.slice_mut(), layer.hidden, |first, rows| {
                        layer.copy_tokens(rows, x.slice(), first, dispatch);
                    });
                    rows
                }
            };
            grads.write(1, gate_up, |dw, accumulate| {
                let (dh, x) = ((dh.slice(), 2 * layer.ffn), (x.slice(), layer.hidden));
                layer.weight_gradient(dw.slice_mut(), accumulate, dh, x);
                Ok(())
            })?;
            grads.write(2, down, |dw, accumulate| {
                let (dy, a) = ((dy.slice(), layer.hidden), (a.slice(), layer.ffn));
                layer.weight_gradient(dw.slice_mut(), accumulate, dy, a);
                Ok(())
            })
        })
    }
}

/// The operation on slices.
struct Layer<'a, T> {
    gate_up: &'a [T], // [E, 2F, D]
    down: &'a [T],    // [E, D, F]
    hidden: usize,
    ffn: usize,
    dispatch: Option<&'a Dispatch>,
}

/// A block of rows of one expert, with the matching rows of N matrices.
struct Block<'a, T, const N: usize> {
    expert: usize,
    rows: Range<usize>,
    parts: [&'a mut [T]; N],
}

impl<'a, T: Real> Layer<'a, T> {
    fn new(gate_up: &'a Tensor, down: &'a Tensor, dispatch: Option<&'a Dispatch>) -> Self {
        let (gate_up, ffn) = (gate_up.slice(), down.shape().width());
        let experts = dispatch.map_or(1, |d| d.selection().num_experts());
        Layer {
            gate_up,
            down: down.slice(),
            hidden: down.elements() / (experts * ffn),
            ffn,
            dispatch,
        }
    }

    /// `[2F, D]`.
    fn gate_up(&self, expert: usize) -> Mat<'a, T> {
        let size = 2 * self.ffn * self.hidden;
        let own = &self.gate_up[expert * size..][..size];
        Mat::new(own, 2 * self.ffn, self.hidden)
    }

    /// `[D, F]`.
    fn down(&self, expert: usize) -> Mat<'a, T> {
        let size = self.hidden * self.ffn;
        let own = &self.down[expert * size..][..size];
        Mat::new(own, self.hidden, self.ffn)
    }

    /// Cuts matrices, with `widths` numbers per row, into blocks of rows.
    fn blocks<'m, const N: usize>(
        &self,
        mut matrices: [&'m mut [T]; N],
        widths: [usize; N],
    ) -> Vec<Block<'m, T, N>> {
        let blocks = match self.dispatch {
            Some(dispatch) => dispatch.row_blocks(ROWS),
            None => {
                let rows = matrices[0].len() / widths[0];
                let block = cpu::block_rows(rows);
                let firsts = (0..rows).step_by(block);
                firsts.map(|r| (0, r..(r + block).min(rows))).collect()
            }
        };
        let cut = blocks.into_iter().map(|(expert, rows)| Block {
            expert,
            parts: std::array::from_fn(|i| {
                let rest = std::mem::take(&mut matrices[i]);
                let (part, behind) = rest.split_at_mut(rows.len() * widths[i]);
                matrices[i] = behind;
                part
            }),
            rows,
        });
        cut.collect()
    }

    /// Ranges of the columns of gate and up.
    fn columns(&self) -> impl Iterator<Item = Range<usize>> {
        let ffn = self.ffn;
        let firsts = (0..ffn).step_by(COLUMNS);
        firsts.map(move |first| first..(first + COLUMNS).min(ffn))
    }

    fn forward(&self, outputs: [&mut [T]; 3], x: &[T]) {
        let (hidden, ffn) = (self.hidden, self.ffn);
        let blocks = self.blocks(outputs, [2 * ffn, ffn, hidden]);
        blocks.into_par_iter().for_each(|block| {
            let ([h, a, y], n) = (block.parts, block.rows.len());
            let mut own;
            let x = match self.dispatch {
                None => &x[block.rows.start * hidden..],
                Some(dispatch) => {
                    own = Scratch::<T>::new(n * hidden);
                    self.copy_tokens(&mut own, x, block.rows.start, dispatch);
                    &own[..]
                }
            };
            let (x, gate_up) = (Mat::new(x, n, hidden), self.gate_up(block.expert));
            for columns in self.columns() {
                for first in [columns.start, ffn + columns.start] {
                    gemm(
                        MatMut::strided(&mut h[first..], n, columns.len(), 2 * ffn),
                        Accumulate::Assign,
                        x,
                        gate_up.rows(first, columns.len()).t(),
                    );
                }
                swiglu::reference::forward_columns(a, h, ffn, columns);
            }
            let (a, down) = (Mat::new(a, n, ffn), self.down(block.expert));
            gemm(MatMut::new(y, n, hidden), Accumulate::Assign, a, down.t());
        });
    }

    /// Writes dh `[R, 2F]` and the rows' terms of dx, `[R, D]`.
    fn backward(&self, outputs: [&mut [T]; 2], dy: &[T], h: &[T]) {
        let (hidden, ffn) = (self.hidden, self.ffn);
        let blocks = self.blocks(outputs, [2 * ffn, hidden]);
        blocks.into_par_iter().for_each(|block| {
            let ([dh, dx], first, n) = (block.parts, block.rows.start, block.rows.len());
            let dy = Mat::new(&dy[first * hidden..], n, hidden);
            let (h, down) = (&h[first * 2 * ffn..], self.down(block.expert));
            let mut own = Scratch::<T>::new(n * ffn.min(COLUMNS));
            for columns in self.columns() {
                let da = &mut own[..n * columns.len()];
                gemm(
                    MatMut::new(da, n, columns.len()),
                    Accumulate::Assign,
                    dy,
                    down.t().rows(columns.start, columns.len()).t(),
                );
                let assign = Accumulate::Assign;
                swiglu::reference::dx_columns(dh, assign, da, h, ffn, columns);
            }
            let (dh, gate_up) = (Mat::new(dh, n, 2 * ffn), self.gate_up(block.expert));
            gemm(MatMut::new(dx, n, hidden), Accumulate::Assign, dh, gate_up);
        });
    }

    /// `dw_e (+)= Σ_r dout_r in_rᵀ`, of `outputs` and `inputs` numbers a row.
    fn weight_gradient(
        &self,
        dw: &mut [T],
        accumulate: Accumulate,
        (dout, outputs): (&[T], usize),
        (input, inputs): (&[T], usize),
    ) {
        let Some(dispatch) = self.dispatch else {
            let rows = dout.len() / outputs;
            let dout = Mat::new(dout, rows, outputs).t();
            let input = Mat::new(input, rows, inputs);
            return cpu::matmul_over_inner(dw, accumulate, dout, input);
        };
        // About sixteen jobs: one per expert, or, if there are few experts, one per part of an expert's outputs.
        let parts = 16usize.div_ceil(dispatch.selection().num_experts());
        let block = outputs.div_ceil(parts).next_multiple_of(8);
        dw.par_chunks_mut(outputs * inputs)
            .enumerate()
            .for_each(|(e, dw)| {
                let rows = dispatch.rows(e);
                let dout = Mat::new(&dout[rows.start * outputs..], rows.len(), outputs).t();
                let input = Mat::new(&input[rows.start * inputs..], rows.len(), inputs);
                dw.par_chunks_mut(block * inputs)
                    .enumerate()
                    .for_each(|(i, dw)| {
                        let count = dw.len() / inputs;
                        let part = dout.rows(i * block, count);
                        cpu::gemm_over_inner(dw, accumulate, part, input);
                    });
            });
    }

    /// The tokens of the rows from `first` on.
    fn copy_tokens(&self, rows: &mut [T], x: &[T], first: usize, dispatch: &Dispatch) {
        for (i, row) in rows.chunks_exact_mut(self.hidden).enumerate() {
            let token = dispatch.token(first + i);
            row.copy_from_slice(&x[token * self.hidden..][..self.hidden]);
        }
    }

    /// `dx_t (+)= Σ rows of token t`, in the order of the token's slots.
    fn sum_rows(&self, dx: &mut [T], accumulate: Accumulate, rows: &[T], dispatch: &Dispatch) {
        let width = self.hidden;
        cpu::each_row_block(dx, width, |first, block| {
            cpu::vectorized(
                #[inline(always)]
                || {
                    for (i, dx) in block.chunks_exact_mut(width).enumerate() {
                        if accumulate == Accumulate::Assign {
                            dx.fill(T::zero());
                        }
                        for slot in dispatch.selection().slots(first + i) {
                            let row = dispatch.row(slot) * width;
                            for (d, &r) in dx.iter_mut().zip(&rows[row..row + width]) {
                                *d += r;
                            }
                        }
                    }
                },
            );
        });
    }
}

pub(super) fn cases() -> Vec<Case> {
    let case = |t: usize, e: usize, k: usize, skip_odd: bool, ffn: usize| {
        let selection = crate::ops::dispatch::scattered(t, e, k, skip_odd);
        let name = format!("expert_rows T {t} E {e} K {k} F {ffn} empty experts {skip_odd}");
        let case = Case::new(name, move |tape, v| {
            let dispatch = Rc::new(Dispatch::new(selection.clone()));
            Ok(vec![expert_rows(tape, [&v[0], &v[1], &v[2]], &dispatch)?])
        });
        case.input("x", [t, 5])
            .input("gate_up", [e, 2 * ffn, 5])
            .input("down", [e, 5, ffn])
    };
    let network = Case::new("expert_rows, one network, T 70 F 3", |tape, v| {
        Ok(vec![network(tape, [&v[0], &v[1], &v[2]])?])
    })
    .input("x", [70, 5])
    .input("gate_up", [6, 5])
    .input("down", [5, 3]);
    vec![
        network,
        case(1, 1, 1, false, 3),
        case(1, 4, 2, false, 3),
        case(23, 7, 2, true, 3),
        case(9, 3, 3, false, 4),
        case(600, 2, 1, false, 3),         // two blocks of rows
        case(4, 2, 1, false, COLUMNS + 1), // two blocks of columns
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::dispatch::Selection;
    use crate::tape::Gradients;

    /// Outputs of tokens (ln 3, 2 ln 3), and the gradients of `down` for dy = (1, 2, ..): σ is 3/4 and 9/10.
    fn run(selection: Selection, down: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let ln3 = 3f64.ln();
        let x = Var::constant(Tensor::from_slice([2, 1], &[ln3, 2.0 * ln3]));
        let gate_up = Tensor::from_slice([2, 2, 1], &[1.0, 10.0, 1.0, 100.0]);
        let gate_up = Var::leaf(gate_up, 0);
        let down = Var::leaf(Tensor::from_slice([2, 1, 1], down), 1);
        let dispatch = Rc::new(Dispatch::new(selection));
        let tape = Tape::new();
        let y = expert_rows(&tape, [&x, &gate_up, &down], &dispatch).unwrap();
        let rows = dispatch.num_rows();
        let dy: Vec<f64> = (1..=rows).map(|i| i as f64).collect();
        let mut store = Gradients::new(2);
        let dy = Tensor::from_slice([rows, 1], &dy);
        tape.backward_from(&[(&y, dy)], &mut store).unwrap();
        let in_units = |t: &Tensor| t.slice::<f64>().iter().map(|v| v / ln3 / ln3).collect();
        (in_units(y.tensor()), in_units(store.get(1).unwrap()))
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= 1e-12 * b.abs(), "{a} for {b}");
        }
    }

    #[test]
    fn two_experts_worked_by_hand() {
        // Token 0 to expert 1, token 1 to both: rows (0, token 1), (1, token 0), (1, token 1), whose a are
        // 9/10 · 2 · 20, 3/4 · 100 and 9/10 · 2 · 200, in units of ln² 3.
        let selection = Selection::new(2, 2, |t, c| {
            c.extend(if t == 0 { vec![1] } else { vec![0, 1] })
        });
        let (y, ddown) = run(selection.unwrap(), &[1.0, 2.0]);
        assert_close(&y, &[36.0, 150.0, 720.0]);
        assert_close(&ddown, &[36.0, 2.0 * 75.0 + 3.0 * 360.0]);
    }

    #[test]
    fn an_expert_without_tokens_gets_exact_zeros() {
        let selection = Selection::new(2, 2, |_, c| c.push(1)).unwrap();
        let (y, ddown) = run(selection, &[5.0, 7.0]);
        assert_close(&y, &[7.0 * 75.0, 7.0 * 360.0]);
        assert_close(&ddown, &[0.0, 75.0 + 2.0 * 360.0]);
    }
}
