//! Modification of the gradients that operations compute in backward. Tests use it to introduce an error that a
//! gradient check must detect.

use super::{Gradients, Grads, Op, OutputGradients, Source};
use crate::error::Result;
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::rc::Rc;

/// The call of one operation's backward.
pub struct BackwardCall<'a> {
    /// The operation, as its forward recorded it.
    pub op: &'a dyn Op,
    /// What its forward saved.
    pub saved: &'a [Tensor],
    /// The gradients of its outputs; `None` for an output without a gradient.
    pub douts: &'a OutputGradients,
}

/// A function that changes the gradients that an operation computed for its inputs.
pub(super) type Alter = Rc<dyn Fn(&BackwardCall, &mut [Option<Tensor>])>;

thread_local! {
    static ALTER: RefCell<Option<Alter>> = const { RefCell::new(None) };
}

/// Until the returned guard is dropped, `alter` changes the gradients that each operation computes for its inputs, in
/// every backward pass on this thread. The contribution of an operation is changed before it is added to a gradient.
pub fn alter_gradients(
    alter: impl Fn(&BackwardCall, &mut [Option<Tensor>]) + 'static,
) -> AlteredGradients {
    ALTER.set(Some(Rc::new(alter)));
    AlteredGradients(())
}

/// The guard returned by [`alter_gradients`].
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

/// Runs the backward of one operation, changes its gradients with `alter`, and stores the result in `grads`.
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
