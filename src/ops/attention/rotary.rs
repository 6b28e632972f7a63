//! RoPE and causal attention in one operation, in which kernels rotate queries and keys while they hold them.
//!
//! Forward rotates them in the epilogue of the projection `qkv = x Wᵀ` (`kernels/qkv_rope.cu`), or, if another
//! operation runs between projection and RoPE, in a separate kernel (`kernels/rope.cu`). Backward rotates dQ and dK
//! back before the attention kernel stores them, so dqkv is the gradient of the values before rotation.
//! Mathematically the operation is [`linear`](fn@linear), [`rope`](fn@rope::rope) and [`attention`](super::attention)
//! one after another. The CPU rotates the queries and keys of a head while they are in its cache.

use super::{Attention, kernels};
use crate::device::Device;
use crate::error::Result;
use crate::ops::heads::Heads;
use crate::ops::linear::{self, linear};
use crate::ops::rope::{self, RopeTables};
use crate::tape::{Forward, Grads, Op, OutputGradients, Tape, Var, only};
use crate::tensor::Tensor;

/// How the rows divide into heads, sequences and documents.
pub struct Places<'a> {
    /// Number and width of the heads.
    pub heads: Heads,
    /// Number of rows of a sequence.
    pub sequence: usize,
    /// Cosines and sines for every position.
    pub tables: &'a RopeTables,
    /// The first key of each row, `[B·S]`, see [`attention`](super::attention).
    pub first_key: Option<&'a Tensor>,
}

/// [`rope`](fn@rope::rope), then [`attention`](super::attention) of `qkv [B·S, (H + 2 KV) hd]`; returns
/// `[B·S, H hd]`.
///
/// # Errors
/// The errors of both operations.
pub fn rotary_attention(tape: &Tape, qkv: &Var, places: &Places) -> Result<Var> {
    let (heads, sequence) = (places.heads, places.sequence);
    heads.check("attention", qkv.tensor(), sequence)?;
    if qkv.tensor().device() == Device::Cpu {
        let dtype = qkv.tensor().dtype();
        places.tables.check(sequence, heads, dtype)?;
        let attention = Attention {
            heads,
            sequence,
            first_key: places.first_key.cloned(),
            tables: Some(places.tables.clone()),
        };
        return tape.apply_one(attention, &[qkv]);
    }
    tape.apply_one(RotaryAttention::new(places, false)?, &[qkv])
}

/// The projection `x Wᵀ` to queries, keys and values, then [`rotary_attention`].
///
/// # Errors
/// The errors of [`linear`](crate::ops::linear::linear) and [`rotary_attention`].
pub fn projected_attention(tape: &Tape, x: &Var, weight: &Var, places: &Places) -> Result<Var> {
    if x.tensor().device() == Device::Cpu {
        return rotary_attention(tape, &linear(tape, x, weight, None)?, places);
    }
    let (x_shape, heads) = (x.tensor().shape(), places.heads);
    let shape = [heads.row_width(), x_shape.width()];
    weight.tensor().expect_shape("attention", "weight", shape)?;
    tape.apply_one(RotaryAttention::new(places, true)?, &[x, weight])
}

struct RotaryAttention {
    heads: Heads,
    sequence: usize,
    tables: RopeTables,
    first_key: Option<Tensor>,
    /// Whether the operation begins with the projection.
    projects: bool,
}

impl RotaryAttention {
    fn new(places: &Places, projects: bool) -> Result<Self> {
        Ok(RotaryAttention {
            heads: places.heads,
            sequence: places.sequence,
            tables: places.tables.of(places.sequence, places.heads)?,
            first_key: places.first_key.cloned(),
            projects,
        })
    }
}

impl Op for RotaryAttention {
    fn name(&self) -> &'static str {
        "rotary attention"
    }

    fn runs_on(&self, device: Device) -> bool {
        device != Device::Cpu
    }

    fn forward(&self, inputs: &[&Tensor]) -> Result<Forward> {
        let (heads, sequence, tables) = (self.heads, self.sequence, &self.tables);
        let qkv = match self.projects {
            true => kernels::project(inputs[0], inputs[1], tables, heads, sequence)?,
            false => rope::turned(inputs[0], tables, heads, sequence, false)?,
        };
        let [out, lse] = kernels::forward(&qkv, self.first_key.as_ref(), heads, sequence)?;
        let mut saved = vec![qkv, out.clone(), lse];
        if self.projects {
            saved.extend(inputs.iter().map(|&input| input.clone()));
        }
        Ok(Forward::one(out, saved))
    }

    fn backward(&self, saved: &[Tensor], douts: &OutputGradients, grads: &mut Grads) -> Result<()> {
        let (qkv, kept) = (&saved[0], [&saved[1], &saved[2]]);
        let dqkv = kernels::backward(
            only(douts),
            qkv,
            kept,
            self.first_key.as_ref(),
            Some(&self.tables),
            self.heads,
            self.sequence,
        )?;
        match self.projects {
            true => linear::kernels::backward(grads, &saved[3], &saved[4], &dqkv),
            false => grads.give(0, dqkv),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::attention;
    use crate::tape::Gradients;
    use crate::tape::check::normal_numbers;
    use crate::tensor::dtype::DType;

    #[test]
    fn the_cpu_returns_the_same_bytes_as_rope_followed_by_attention() {
        // Two blocks of queries, groups of two, documents within a sequence.
        let heads = Heads {
            query: 4,
            key_value: 2,
            dim: 6,
        };
        let (sequence, tokens) = (70, 140);
        let tables = RopeTables::new(DType::F64, sequence, heads.dim, 10_000.0).unwrap();
        let first_key: Vec<i32> = (0..tokens as i32).map(|i| i % 70 / 40 * 40).collect();
        let first_key = Tensor::from_slice([tokens], &first_key);
        let places = Places {
            heads,
            sequence,
            tables: &tables,
            first_key: Some(&first_key),
        };
        let tensor = |width: usize, seed| {
            Tensor::from_slice([tokens, width], &normal_numbers(tokens * width, seed))
        };
        let run = |attend: &dyn Fn(&Tape, &Var) -> Result<Var>| {
            let (tape, qkv) = (Tape::new(), Var::leaf(tensor(heads.row_width(), 1), 0));
            let y = attend(&tape, &qkv).unwrap();
            let mut gradients = Gradients::new(1);
            let dout = tensor(heads.query * heads.dim, 2);
            tape.backward_from(&[(&y, dout)], &mut gradients).unwrap();
            [y.tensor(), gradients.get(0).unwrap()].map(|t| t.slice::<f64>().to_vec())
        };
        let [y, dqkv] = run(&|tape, qkv| rotary_attention(tape, qkv, &places));
        let [expected, gradient] = run(&|tape, qkv| {
            let turned = rope::rope(tape, qkv, heads, sequence, &tables)?;
            attention(tape, &turned, heads, sequence, Some(&first_key))
        });
        assert_eq!(y, expected);
        for (got, want) in dqkv.iter().zip(&gradient) {
            assert!((got - want).abs() <= 1e-14, "{got} for {want}");
        }
    }
}
