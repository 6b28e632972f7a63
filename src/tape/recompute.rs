//! Recompute segments: keep only a segment's inputs, and run it again when backward needs it.

use super::{Forward, Grads, Op, OutputGradients, Tape, Var};
use crate::error::Result;
use crate::tensor::Tensor;

/// A part of the model as a function of activations; parameters (leaves) may be captured.
struct Segment<F> {
    run: F,
}

impl<F> Op for Segment<F>
where
    F: Fn(&Tape, &[Var]) -> Result<Vec<Var>>,
{
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let saved: Vec<Tensor> = inputs.iter().map(|&t| t.clone()).collect();
        let constants: Vec<Var> = saved.iter().cloned().map(Var::constant).collect();
        let outputs = (self.run)(&Tape::without_gradients(), &constants)?;
        Ok(Forward {
            outputs: outputs.into_iter().map(|v| v.tensor).collect(),
            saved,
        })
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let tape = Tape::with(true, true);
        // The segment's inputs temporarily get slots after those of the real leaves.
        let first = grads.store().extend(saved.len());
        let inputs: Vec<Var> = saved
            .iter()
            .enumerate()
            .map(|(i, t)| {
                if grads.wanted(i) {
                    Var::leaf(t.clone(), first + i)
                } else {
                    Var::constant(t.clone())
                }
            })
            .collect();
        let outputs = (self.run)(&tape, &inputs)?;
        let pairs: Vec<(&Var, Tensor)> = outputs
            .iter()
            .zip(douts)
            .filter(|(v, _)| v.needs_gradient())
            .filter_map(|(v, d)| Some((v, d.clone()?)))
            .collect();
        tape.backward_from(&pairs, grads.store())?;
        for (i, gradient) in grads.store().shrink(first).into_iter().enumerate() {
            match gradient {
                Some(gradient) => grads.give(i, gradient)?,
                None => grads.none(i),
            }
        }
        Ok(())
    }
}

impl Tape {
    /// Runs `run` on `inputs` without recording it; backward runs it a second time on a tape for which
    /// [`is_replaying`](Tape::is_replaying) is true. `run` gets its activations as arguments and may capture leaves,
    /// but no other variable of this tape.
    ///
    /// # Errors
    /// The errors of `run`.
    pub fn recompute(
        &self,
        inputs: &[&Var],
        run: impl Fn(&Tape, &[Var]) -> Result<Vec<Var>> + 'static,
    ) -> Result<Vec<Var>> {
        if !self.recording {
            let inputs: Vec<Var> = inputs.iter().map(|&v| v.clone()).collect();
            return run(self, &inputs);
        }
        let op = Segment { run };
        let tensors: Vec<&Tensor> = inputs.iter().map(|v| &v.tensor).collect();
        let Forward { outputs, saved } = op.forward(&tensors)?;
        // Recorded even when no activation needs a gradient: captured parameters may.
        Ok(self.record(true, Box::new(op), inputs, saved, outputs))
    }
}
