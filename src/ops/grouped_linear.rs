//! Grouped expert products: every row through the weight of its expert.
//!
//! `y_r = W_{e(r)} x_{t(r)}`, rows r sorted by expert ([`Dispatch`]), `W [E, N, I]`, `y [R, N]`.
//! Input rows are either the tokens' (`x [T, I]`, gathered: the up projection) or already one per
//! row (`x [R, I]`: the down projection).
//! `dW_e = Σ_{r of e} dy_r x_{t(r)}ᵀ`, exact zeros for an expert without rows;
//! `dx_t = Σ_{r of t} W_{e(r)}ᵀ dy_r`, in expert order.

use super::dispatch::Dispatch;
use crate::error::{Error, Result};
use crate::tape::check::Case;
use crate::tape::{Forward, Grads, Op, Tape, Var, only};
use crate::tensor::Tensor;
use crate::tensor::cpu::{self, Accumulate, Mat, MatMut};
use crate::tensor::dtype::Real;
use crate::with_real;
use rayon::prelude::*;
use std::rc::Rc;

/// Which rows `x` has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One per token: `x [T, I]`.
    Tokens,
    /// One per (token, expert) pair, sorted by expert: `x [R, I]`.
    Dispatched,
}

/// The grouped product of `x` with `weight [E, N, I]`: `[R, N]`.
///
/// # Errors
/// When the shapes do not fit each other or the dispatch.
pub fn grouped_linear(
    tape: &Tape,
    x: &Var,
    rows: Rows,
    weight: &Var,
    dispatch: &Rc<Dispatch>,
) -> Result<Var> {
    let (x_shape, w_shape) = (x.tensor().shape(), weight.tensor().shape());
    let expected_rows = match rows {
        Rows::Tokens => dispatch.selection().num_tokens(),
        Rows::Dispatched => dispatch.num_rows(),
    };
    let experts = dispatch.selection().num_experts();
    let fits =
        w_shape.len() == 3 && w_shape[0] == experts && *x_shape == [expected_rows, w_shape[2]];
    if !fits {
        return Err(Error::invalid(
            "grouped_linear",
            format!("x [{expected_rows}, inputs] and a weight [{experts}, outputs, inputs]"),
            format!("{x_shape} and {w_shape}"),
            "pass tensors that fit the dispatch",
        ));
    }
    weight
        .tensor()
        .expect_dtype("grouped_linear", "weight", x.tensor().dtype())?;
    tape.apply_one(
        GroupedLinear {
            rows,
            dispatch: dispatch.clone(),
        },
        &[x, weight],
    )
}

struct GroupedLinear {
    rows: Rows,
    dispatch: Rc<Dispatch>,
}

impl GroupedLinear {
    /// One input row per dispatched row: gathered, or as they are.
    fn dispatched(&self, x: &Tensor) -> Result<Tensor> {
        if self.rows == Rows::Dispatched {
            return Ok(x.clone());
        }
        let width = x.shape().width();
        let mut packed =
            Tensor::unspecified(x.device(), x.dtype(), [self.dispatch.num_rows(), width]);
        with_real!(x.dtype(), "grouped_linear", |T| {
            reference::gather(packed.slice_mut::<T>(), x.slice(), &self.dispatch, width);
            Ok(packed)
        })
    }
}

impl Op for GroupedLinear {
    fn name(&self) -> &'static str {
        "grouped_linear"
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, w) = (inputs[0], inputs[1]);
        let packed = self.dispatched(x)?;
        let shape = [self.dispatch.num_rows(), w.shape()[1]];
        let mut y = Tensor::unspecified(x.device(), x.dtype(), shape);
        with_real!(x.dtype(), "grouped_linear", |T| {
            let weight = Weight::new(w);
            reference::forward(y.slice_mut::<T>(), packed.slice(), weight, &self.dispatch);
            Ok(Forward {
                outputs: vec![y],
                saved: vec![x.clone(), w.clone()],
            })
        })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        douts: &[Option<Tensor>],
        grads: &mut Grads,
    ) -> Result<()> {
        let (x, w, dy) = (&saved[0], &saved[1], only(douts));
        with_real!(x.dtype(), "grouped_linear", |T| {
            let weight = Weight::<T>::new(w);
            grads.write(0, x, |dx, accumulate| {
                match self.rows {
                    Rows::Dispatched => {
                        let dx = dx.slice_mut::<T>();
                        reference::dx(dx, accumulate, dy.slice(), weight, &self.dispatch);
                    }
                    Rows::Tokens => {
                        let shape = [self.dispatch.num_rows(), weight.inputs];
                        let mut rows = Tensor::unspecified(x.device(), x.dtype(), shape);
                        let assign = Accumulate::Assign;
                        reference::dx(
                            rows.slice_mut::<T>(),
                            assign,
                            dy.slice(),
                            weight,
                            &self.dispatch,
                        );
                        let dx = dx.slice_mut::<T>();
                        reference::sum_rows(
                            dx,
                            accumulate,
                            rows.slice(),
                            &self.dispatch,
                            weight.inputs,
                        );
                    }
                }
                Ok(())
            })?;
            grads.write(1, w, |dw, accumulate| {
                let packed = self.dispatched(x)?;
                let extents = (weight.outputs, weight.inputs);
                let dw = dw.slice_mut::<T>();
                reference::dw(
                    dw,
                    accumulate,
                    dy.slice(),
                    packed.slice(),
                    extents,
                    &self.dispatch,
                );
                Ok(())
            })
        })
    }
}

/// The experts' weights `[E, outputs, inputs]`.
#[derive(Clone, Copy)]
struct Weight<'a, T> {
    data: &'a [T],
    outputs: usize,
    inputs: usize,
}

impl<'a, T: Real> Weight<'a, T> {
    fn new(w: &'a Tensor) -> Self {
        Weight {
            data: w.slice(),
            outputs: w.shape()[1],
            inputs: w.shape()[2],
        }
    }

    fn expert(&self, expert: usize) -> Mat<'a, T> {
        let size = self.outputs * self.inputs;
        Mat::new(
            &self.data[expert * size..(expert + 1) * size],
            self.outputs,
            self.inputs,
        )
    }
}

mod reference {
    use super::*;

    /// Rows of a block: large enough that packing an expert's weight is cheap beside using it.
    const ROWS: usize = 192;

    /// Cuts `out`, `width` numbers a row, into the dispatch's row blocks: (expert, rows, part).
    fn row_jobs<'a, T>(
        out: &'a mut [T],
        width: usize,
        dispatch: &Dispatch,
    ) -> Vec<(usize, std::ops::Range<usize>, &'a mut [T])> {
        let mut rest = out;
        let mut jobs = Vec::new();
        for (expert, rows) in dispatch.row_blocks(ROWS) {
            let (part, behind) = rest.split_at_mut(rows.len() * width);
            rest = behind;
            jobs.push((expert, rows, part));
        }
        jobs
    }

    pub fn gather<T: Real>(packed: &mut [T], x: &[T], dispatch: &Dispatch, width: usize) {
        cpu::each_row_block(packed, width, |first, rows| {
            for (i, row) in rows.chunks_mut(width).enumerate() {
                let token = dispatch.token(first + i);
                row.copy_from_slice(&x[token * width..(token + 1) * width]);
            }
        });
    }

    pub fn forward<T: Real>(y: &mut [T], x: &[T], w: Weight<T>, dispatch: &Dispatch) {
        row_jobs(y, w.outputs, dispatch)
            .into_par_iter()
            .for_each(|(e, rows, y)| {
                let x = Mat::new(&x[rows.start * w.inputs..], rows.len(), w.inputs);
                let y = MatMut::new(y, rows.len(), w.outputs);
                cpu::gemm(y, Accumulate::Assign, x, w.expert(e).t());
            });
    }

    pub fn dx<T: Real>(
        dx: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        w: Weight<T>,
        dispatch: &Dispatch,
    ) {
        row_jobs(dx, w.inputs, dispatch)
            .into_par_iter()
            .for_each(|(e, rows, dx)| {
                let dy = Mat::new(&dy[rows.start * w.outputs..], rows.len(), w.outputs);
                cpu::gemm(
                    MatMut::new(dx, rows.len(), w.inputs),
                    accumulate,
                    dy,
                    w.expert(e),
                );
            });
    }

    pub fn dw<T: Real>(
        dw: &mut [T],
        accumulate: Accumulate,
        dy: &[T],
        x: &[T],
        (outputs, inputs): (usize, usize),
        dispatch: &Dispatch,
    ) {
        // About sixteen jobs: experts, and where there are few of them parts of their outputs.
        let experts = dispatch.selection().num_experts();
        let parts = 16usize.div_ceil(experts);
        let block = outputs.div_ceil(parts).next_multiple_of(8);
        dw.par_chunks_mut(outputs * inputs)
            .enumerate()
            .for_each(|(e, dw)| {
                let rows = dispatch.rows(e);
                let dy = Mat::new(&dy[rows.start * outputs..], rows.len(), outputs).t();
                let x = Mat::new(&x[rows.start * inputs..], rows.len(), inputs);
                dw.par_chunks_mut(block * inputs)
                    .enumerate()
                    .for_each(|(i, dw)| {
                        let count = dw.len() / inputs;
                        let part = dy.rows(i * block, count);
                        cpu::gemm(MatMut::new(dw, count, inputs), accumulate, part, x);
                    });
            });
    }

    /// `dx_t (+)= Σ rows of token t`, in the order of the token's slots.
    pub fn sum_rows<T: Real>(
        dx: &mut [T],
        accumulate: Accumulate,
        rows: &[T],
        dispatch: &Dispatch,
        width: usize,
    ) {
        cpu::each_row_block(dx, width, |first, block| {
            for (i, dx) in block.chunks_mut(width).enumerate() {
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
        });
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for rows in [Rows::Tokens, Rows::Dispatched] {
        for (t, e, k, skip_odd) in [
            (1, 1, 1, false),
            (1, 4, 2, false),
            (23, 7, 2, true),
            (9, 3, 3, false),
            (210, 8, 1, false),
        ] {
            let selection = crate::ops::dispatch::scattered(t, e, k, skip_odd);
            let name =
                format!("grouped_linear {rows:?} T {t} E {e} K {k} empty experts {skip_odd}");
            let x_rows = if rows == Rows::Tokens {
                t
            } else {
                selection.num_slots()
            };
            let case = Case::new(name, move |tape, v| {
                let dispatch = Rc::new(Dispatch::new(selection.clone()));
                Ok(vec![grouped_linear(tape, &v[0], rows, &v[1], &dispatch)?])
            });
            cases.push(case.input("x", [x_rows, 5]).input("weight", [e, 3, 5]));
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::dispatch::Selection;
    use crate::tape::Gradients;

    #[test]
    fn two_experts_worked_by_hand() {
        // Token 0 to expert 1, token 1 to both. W_0 = (1, 2), W_1 = (10, 20).
        let selection = Selection::new(2, 2, |t, c| {
            c.extend(if t == 0 { vec![1] } else { vec![0, 1] })
        });
        let dispatch = Rc::new(Dispatch::new(selection.unwrap()));
        let x = Var::leaf(Tensor::from_slice([2, 2], &[1.0, 0.0, 0.0, 1.0]), 0);
        let w = Var::leaf(Tensor::from_slice([2, 1, 2], &[1.0, 2.0, 10.0, 20.0]), 1);
        let tape = Tape::new();
        let y = grouped_linear(&tape, &x, Rows::Tokens, &w, &dispatch).unwrap();
        // Rows: (expert 0, token 1), (expert 1, token 0), (expert 1, token 1).
        assert_eq!(y.tensor().slice::<f64>(), [2.0, 10.0, 20.0]);
        let mut store = Gradients::new(2);
        tape.backward_from(
            &[(&y, Tensor::from_slice([3, 1], &[1.0, 2.0, 3.0]))],
            &mut store,
        )
        .unwrap();
        // dx_0 = 2 W_1, dx_1 = W_0 + 3 W_1; dW_0 = x_1, dW_1 = 2 x_0 + 3 x_1.
        assert_eq!(
            store.get(0).unwrap().slice::<f64>(),
            [20.0, 40.0, 31.0, 62.0]
        );
        assert_eq!(store.get(1).unwrap().slice::<f64>(), [0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn an_expert_without_tokens_gets_exact_zeros() {
        let selection = Selection::new(3, 2, |_, c| c.push(1)).unwrap();
        let dispatch = Rc::new(Dispatch::new(selection));
        let x = Var::constant(Tensor::from_slice([3, 1], &[1.0, 2.0, 3.0]));
        let w = Var::leaf(Tensor::from_slice([2, 1, 1], &[5.0, 7.0]), 0);
        let tape = Tape::new();
        let y = grouped_linear(&tape, &x, Rows::Tokens, &w, &dispatch).unwrap();
        let mut store = Gradients::new(1);
        tape.backward_from(
            &[(&y, Tensor::from_slice([3, 1], &[1.0, 1.0, 1.0]))],
            &mut store,
        )
        .unwrap();
        assert_eq!(store.get(0).unwrap().slice::<f64>(), [0.0, 6.0]);
    }
}
