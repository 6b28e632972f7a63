//! Tests of the tape with small operations defined here: the tape must work for any operation.

use super::*;
use crate::tensor::cpu::Accumulate;

/// x · y, element by element.
struct Multiply;

impl Op for Multiply {
    fn name(&self) -> &'static str {
        "multiply"
    }
    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (x, y) = (inputs[0].slice::<f64>(), inputs[1].slice::<f64>());
        let product: Vec<f64> = x.iter().zip(y).map(|(a, b)| a * b).collect();
        Ok(Forward {
            outputs: vec![Tensor::from_slice(inputs[0].shape(), &product)],
            saved: vec![inputs[0].clone(), inputs[1].clone()],
        })
    }
    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let Some(dout) = &douts[0] else { return Ok(()) };
        for input in 0..2 {
            let other = &saved[1 - input];
            grads.write(input, other, |dst, accumulate| {
                for ((d, o), g) in dst
                    .slice_mut::<f64>()
                    .iter_mut()
                    .zip(other.slice::<f64>())
                    .zip(dout.slice::<f64>())
                {
                    *d = o * g
                        + if accumulate == Accumulate::Add {
                            *d
                        } else {
                            0.0
                        };
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// An operation that forgets to answer for its second input.
struct Forgetful;

impl Op for Forgetful {
    fn name(&self) -> &'static str {
        "forgetful"
    }
    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        Ok(Forward {
            outputs: vec![inputs[0].clone()],
            saved: vec![],
        })
    }
    fn backward(&self, _: &[Tensor], _: &OutputGradients, grads: &mut Grads) -> Result<()> {
        grads.none(0);
        Ok(())
    }
}

fn multiply(tape: &Tape, x: &Var, y: &Var) -> Var {
    tape.apply_one(Multiply, &[x, y]).unwrap()
}

fn leaf(x: f64, index: usize) -> Var {
    Var::leaf(Tensor::scalar(x), index)
}

fn gradient(store: &Gradients, leaf: usize) -> f64 {
    store.get(leaf).unwrap().item().unwrap()
}

#[test]
fn several_consumers_of_a_value_are_summed() {
    // f = (x y) x: df/dx = 2 x y, df/dy = x^2.
    let (x, y, tape) = (leaf(3.0, 0), leaf(5.0, 1), Tape::new());
    let f = multiply(&tape, &multiply(&tape, &x, &y), &x);
    let mut store = Gradients::new(2);
    tape.backward(&f, 1.0, &mut store).unwrap();
    assert_eq!((gradient(&store, 0), gradient(&store, 1)), (30.0, 9.0));
}

#[test]
fn micro_batches_accumulate_until_reset() {
    let mut store = Gradients::new(2);
    for (x, expected) in [(3.0, 0.5 * 5.0), (3.0, 5.0)] {
        let tape = Tape::new();
        let f = multiply(&tape, &leaf(x, 0), &leaf(5.0, 1));
        tape.backward(&f, 0.5, &mut store).unwrap();
        assert_eq!(gradient(&store, 0), expected);
    }
    store.reset();
    assert!(store.get(0).is_none());
    let tape = Tape::new();
    let f = multiply(&tape, &leaf(3.0, 0), &leaf(5.0, 1));
    tape.backward(&f, 1.0, &mut store).unwrap();
    assert_eq!(gradient(&store, 0), 5.0);
}

#[test]
fn nothing_is_recorded_where_no_gradient_is_needed() {
    let tape = Tape::new();
    let c = Var::constant(Tensor::scalar(2.0));
    assert!(!multiply(&tape, &c, &c).needs_gradient());
    assert!(tape.is_empty());
    let tape = Tape::without_gradients();
    assert!(!multiply(&tape, &leaf(1.0, 0), &c).needs_gradient());
    assert!(tape.is_empty());
}

#[test]
fn an_unused_leaf_has_no_gradient() {
    let tape = Tape::new();
    let f = multiply(&tape, &leaf(1.0, 0), &Var::constant(Tensor::scalar(2.0)));
    let mut store = Gradients::new(2);
    tape.backward(&f, 1.0, &mut store).unwrap();
    assert!(store.get(1).is_none());
}

#[test]
fn recomputed_segments_give_the_same_gradients_and_run_twice() {
    let (x, w) = (leaf(3.0, 0), leaf(5.0, 1));
    let runs = std::rc::Rc::new(std::cell::Cell::new(0));
    let mut store = Gradients::new(2);
    {
        let tape = Tape::new();
        let a = multiply(&tape, &x, &x);
        // Captures the leaf w, gets the activation a: a (a w).
        let (captured, counter) = (w.clone(), runs.clone());
        let b = tape
            .recompute(&[&a], move |t, v| {
                assert_eq!(t.is_replaying(), counter.get() == 1);
                counter.set(counter.get() + 1);
                Ok(vec![multiply(t, &v[0], &multiply(t, &v[0], &captured))])
            })
            .unwrap();
        let f = multiply(&tape, &b[0], &w);
        tape.backward(&f, 1.0, &mut store).unwrap();
    }
    // f = x^4 w^2: df/dx = 4 x^3 w^2, df/dw = 2 x^4 w.
    assert_eq!(runs.get(), 2);
    assert_eq!(gradient(&store, 0), 4.0 * 27.0 * 25.0);
    assert_eq!(gradient(&store, 1), 2.0 * 81.0 * 5.0);
}

#[test]
#[should_panic(
    expected = "forgetful: backward delivered neither a gradient nor `none` for input 1"
)]
fn an_operation_that_forgets_an_input_is_a_bug() {
    let tape = Tape::new();
    let y = tape
        .apply_one(Forgetful, &[&leaf(1.0, 0), &leaf(1.0, 1)])
        .unwrap();
    let _ = tape.backward(&y, 1.0, &mut Gradients::new(2));
}

#[test]
fn backward_of_a_vector_without_a_seed_is_an_error() {
    let tape = Tape::new();
    let x = Var::leaf(Tensor::from_slice([2], &[1.0, 2.0]), 0);
    let y = multiply(&tape, &x, &x);
    assert!(tape.backward(&y, 1.0, &mut Gradients::new(1)).is_err());
}

#[test]
fn backward_of_an_output_of_another_tape_is_an_error() {
    let (tape, other) = (Tape::new(), Tape::new());
    let x = leaf(3.0, 0);
    multiply(&tape, &x, &x);
    let y = multiply(&other, &x, &x);
    let error = tape.backward(&y, 1.0, &mut Gradients::new(1)).unwrap_err();
    assert!(error.to_string().contains("another tape"), "{error}");
}
