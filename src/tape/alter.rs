//! Altering the gradients of operations as backward runs: how a check of gradients makes an error on purpose.

use super::{Gradients, Grads, Op, Source};
use crate::error::Result;
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::rc::Rc;

/// One operation in backward.
pub struct BackwardCall<'a> {
    /// The operation, as its forward recorded it.
    pub op: &'a dyn Op,
    /// What its forward saved.
    pub saved: &'a [Tensor],
    /// The gradients of its outputs.
    pub douts: &'a [Option<Tensor>],
}

/// Changes the gradients that an operation gave for its inputs.
pub(super) type Alter = Rc<dyn Fn(&BackwardCall, &mut [Option<Tensor>])>;

thread_local! {
    static ALTER: RefCell<Option<Alter>> = const { RefCell::new(None) };
}

/// Until the guard is dropped, `alter` changes the gradients that each operation gives for its inputs, of every backward
/// pass on this thread. What one operation adds to a gradient is altered before it is added.
pub fn alter_gradients(
    alter: impl Fn(&BackwardCall, &mut [Option<Tensor>]) + 'static,
) -> AlteredGradients {
    ALTER.set(Some(Rc::new(alter)));
    AlteredGradients(())
}

/// See [`alter_gradients`].
#[must_use]
pub struct AlteredGradients(());

impl Drop for AlteredGradients {
    fn drop(&mut self) {
        ALTER.set(None);
    }
}

pub(super) fn current() -> Option<Alter> {
    ALTER.with_borrow(Option::clone)
}

/// Runs the backward of one operation, alters what it gives, and hands that over.
pub(super) fn backward(
    alter: &Alter,
    call: &BackwardCall,
    inputs: &[Source],
    pending: &mut [Vec<Option<Tensor>>],
    store: &mut Gradients,
) -> Result<()> {
    let own = |(output, source): (usize, &Source)| match source {
        Source::Constant => Source::Constant,
        _ => Source::Entry {
            tape: 0,
            entry: 0,
            output,
        },
    };
    let sources: Vec<Source> = inputs.iter().enumerate().map(own).collect();
    let mut given = [vec![None; inputs.len()]];
    let mut grads = Grads::new(&sources, &mut given, store);
    call.op.backward(call.saved, call.douts, &mut grads)?;
    grads.finish(call.op.name());
    let [mut given] = given;
    alter(call, &mut given);
    let mut grads = Grads::new(inputs, pending, store);
    for (input, gradient) in given.into_iter().enumerate() {
        match gradient {
            Some(gradient) => grads.give(input, gradient)?,
            None => grads.none(input),
        }
    }
    grads.finish(call.op.name());
    Ok(())
}
