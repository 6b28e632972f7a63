//! Shared parts of the cases for the experts' fused products: shapes, gates, and SwiGLU in float64 with bounds of the f32
//! error.

use super::machine::POISON;
use super::numbers::{Errors, F32_ROUNDOFF, Random, half_ulp_bf16};
use super::operands::Shape;

/// Widths and rows of an expert layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Number of rows of each expert `[E]`.
    pub counts: Vec<usize>,
    /// Width D of the model.
    pub hidden: usize,
    /// Width F of an expert.
    pub ffn: usize,
    /// A single expert with all rows; the launch passes no offsets.
    pub dense: bool,
}

impl Layer {
    /// Creates a layer with these numbers of rows.
    pub fn new(counts: &[usize], hidden: usize, ffn: usize) -> Self {
        Self {
            counts: counts.to_vec(),
            hidden,
            ffn,
            dense: false,
        }
    }

    /// Creates a dense layer: one expert with all rows.
    pub fn dense(rows: usize, hidden: usize, ffn: usize) -> Self {
        Self {
            dense: true,
            ..Self::new(&[rows], hidden, ffn)
        }
    }

    /// Returns the upper bound of the rows that the launch passes if the buffers have room for `given` rows.
    pub fn rows_at_most(&self, given: usize) -> usize {
        if self.dense { self.rows() } else { given }
    }

    /// Returns the shape of the product with W [E, n, k].
    pub fn shape(&self, n: usize, k: usize) -> Shape {
        Shape::new(&self.counts, n, k)
    }

    /// Returns the number of rows R.
    pub fn rows(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Describes the layer, for messages.
    pub fn label(&self) -> String {
        let (counts, hidden, ffn) = (&self.counts, self.hidden, self.ffn);
        let kind = if self.dense { " dense" } else { "" };
        format!("{counts:?}{kind} rows, hidden {hidden}, ffn {ffn}")
    }
}

/// Shapes for every build and schedule: a single row, experts without rows, all kinds of partial tiles, widths that are
/// not multiples of a tile.
pub fn small_layers() -> Vec<Layer> {
    vec![
        Layer::new(&[1], 8, 8),
        Layer::new(&[0, 130, 0, 1, 127, 0, 65], 72, 136),
        Layer::new(&[300, 64], 184, 200),
        Layer::dense(77, 72, 88),
    ]
}

/// Prime numbers of tokens, 1 to 128 experts, half of them without rows, all tokens to one expert.
pub fn covering_layers() -> Vec<Layer> {
    let any = |_| true;
    let routed = |tokens, experts, per_token, usable: fn(usize) -> bool, hidden, ffn| {
        let shape = Shape::routed(tokens, experts, per_token, usable, 8, 8);
        Layer::new(&shape.counts, hidden, ffn)
    };
    vec![
        routed(2039, 1, 1, any, 72, 136),
        routed(2039, 7, 2, any, 88, 264),
        routed(509, 8, 8, any, 120, 104),
        routed(1021, 32, 4, |e| e % 2 == 0, 64, 352),
        routed(700, 32, 1, |e| e == 17, 352, 40),
        routed(257, 64, 4, any, 264, 40),
        routed(127, 128, 2, any, 24, 168),
        Layer::new(&[512, 513], 256, 704),
    ]
}

/// Returns gates [T, E] in (0, 1]; a tenth of them are 0.
pub fn gates(tokens: usize, experts: usize) -> Vec<f32> {
    let mut random = Random((tokens * 7 + experts) as u64);
    let gate = |_| match random.below(10) {
        0 => 0.0,
        _ => random.unit() as f32,
    };
    (0..tokens * experts).map(gate).collect()
}

/// A number with a bound of its error in f32 arithmetic.
#[derive(Clone, Copy, Debug)]
pub struct Bounded {
    /// The number.
    pub value: f64,
    /// Bound of its error.
    pub error: f64,
}

impl Bounded {
    /// Returns a number without error.
    pub fn exact(value: f64) -> Self {
        Self { value, error: 0.0 }
    }

    /// A sum of `depth` products with the given value and sum of magnitudes.
    pub fn sum(depth: usize, (value, magnitude): (f64, f64)) -> Self {
        Self {
            value,
            error: F32_ROUNDOFF * depth as f64 * magnitude,
        }
    }

    /// The product of two numbers.
    pub fn times(self, other: Self) -> Self {
        let value = self.value * other.value;
        let error = self.error * other.value.abs()
            + other.error * self.value.abs()
            + self.error * other.error;
        Self {
            value,
            error: error + F32_ROUNDOFF * (value.abs() + error),
        }
    }

    /// Returns the error bound after rounding to bf16.
    pub fn bound_in_bf16(self) -> f64 {
        half_ulp_bf16(self.value.abs() + self.error) + self.error + f64::from(f32::MIN_POSITIVE)
    }
}

/// Returns silu(g) and its derivative. On a GPU, exp has an error of up to 2 + 1.2 |g| ulp, and a quotient of up to 2 ulp;
/// results below the smallest normal number may be 0.
pub fn swiglu(gate: Bounded) -> (Bounded, Bounded) {
    let g = gate.value;
    let s = 1.0 / (1.0 + (-g).exp());
    let relative = F32_ROUNDOFF * (16.0 + 4.0 * g.abs());
    let (slope, flushed) = (s * (1.0 + g * (1.0 - s)), f64::from(f32::MIN_POSITIVE));
    // |silu'| < 1.1 and |silu''| <= 1/2.
    let silu = Bounded {
        value: g * s,
        error: (s * relative + flushed) * g.abs() + 1.1 * gate.error,
    };
    let slope = Bounded {
        value: slope,
        error: (s * relative + flushed) * (1.0 + 2.0 * g.abs()) + 0.5 * gate.error,
    };
    (silu, slope)
}

/// Adds the error of a bf16 element.
///
/// # Errors
/// When the element is not within its bound.
pub fn add_bf16(
    errors: &mut Errors,
    got: half::bf16,
    want: Bounded,
    place: impl Fn() -> String,
) -> Result<(), String> {
    errors.add(got.to_f64(), want.value, want.bound_in_bf16(), place)
}

/// Returns the part of an output that is written, and checks that the rest is unchanged.
///
/// # Errors
/// When an element after `bytes` was written.
pub fn written<'a>(name: &str, output: &'a [u8], bytes: usize) -> Result<&'a [u8], String> {
    let (written, rest) = output.split_at(bytes);
    match rest.iter().all(|&b| b == POISON) {
        true => Ok(written),
        false => Err(format!(
            "rows of `{name}` past the last expert's were written"
        )),
    }
}

/// Checks that the error is explained by rounding alone: the root mean square error of rounding to 8 bits is 1.6e-3 of the
/// value.
///
/// # Errors
/// When the relative error is larger.
pub fn rounding_alone(errors: Errors) -> Result<Errors, String> {
    errors.at_most(2.5e-3)
}
