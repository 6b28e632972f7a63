//! Checks rotary position embedding (`kernels/rope.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::operands::exact;
use super::{Buffer, Case, Problem, each, launch_of, pairs, values};
use crate::kernels::Rope;
use half::bf16;

const THETA: f64 = 10_000.0;

/// The shape of the projections to rotate.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// B, the number of sequences.
    pub sequences: usize,
    /// S, the tokens per sequence.
    pub sequence: usize,
    /// H, the number of query heads.
    pub heads: usize,
    /// KV, the number of key and value heads.
    pub key_value_heads: usize,
    /// d, the width of a head.
    pub width: usize,
}

impl Shape {
    /// Returns the number of tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences * self.sequence
    }

    /// Returns the number of elements of a row.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.key_value_heads) * self.width
    }

    /// Returns the angle of element `i` of a half, in float64.
    pub fn angle(&self, row: usize, i: usize) -> f64 {
        angle(row % self.sequence, i, self.width)
    }
}

/// Returns the angle of element `i` of a half of a head, in float64.
pub fn angle(position: usize, i: usize, width: usize) -> f64 {
    position as f64 * THETA.powf(-2.0 * i as f64 / width as f64)
}

/// Returns the cosines and sines of the angles of all positions, `[positions, width / 2]`.
pub fn tables(positions: usize, width: usize) -> [Vec<f32>; 2] {
    let half = width / 2;
    [f64::cos, f64::sin].map(|f: fn(f64) -> f64| {
        (0..positions * half)
            .map(|i| f(angle(i / half, i % half, width)) as f32)
            .collect()
    })
}

/// [`tables`] as the buffers `cosines` and `sines`.
pub(super) fn table_buffers(positions: usize, width: usize) -> [Buffer; 2] {
    let [cosines, sines] = tables(positions, width);
    [
        Buffer::input("cosines", &cosines),
        Buffer::input("sines", &sines),
    ]
}

/// Returns the launch of `rope`, in place or not. Buffers: y, x, cosines, sines.
pub fn problem(shape: Shape, back: bool, in_place: bool) -> Problem {
    let (tokens, row) = (shape.tokens(), shape.row());
    let mut x = Random((tokens * 31 + row) as u64).normals_bf16(tokens * row);
    // A row of NaN must not affect other rows.
    if tokens > 2 {
        x[row..2 * row].fill(bf16::NAN);
    }
    let mut buffers = vec![Buffer::added_to("y", &x, in_place), Buffer::input("x", &x)];
    buffers.extend(table_buffers(shape.sequence, shape.width));
    Problem {
        label: format!("{shape:?}, back {back}, in place {in_place}"),
        buffers,
        launch: launch_of!(Rope {
            y, x = (if in_place { "y" } else { "x" }), cosines, sines;
            tokens, sequence: shape.sequence, heads: shape.heads,
            key_value_heads: shape.key_value_heads, head_width: shape.width, back,
        }),
        judge: Box::new(move |out| judge(&shape, &x, back, &values(&out[0]))),
    }
}

/// Rotates the elements of a head, with bounds of their errors, by the angles of `position`, or by their negatives if
/// `back`.
pub fn turned(position: usize, line: &[(f64, f64)], back: bool) -> Vec<(f64, f64)> {
    let half = line.len() / 2;
    let turned = (0..line.len()).map(|i| {
        let (sine, cosine) = angle(position, i % half, line.len()).sin_cos();
        let (own, other) = (line[i], line[(i + half) % line.len()]);
        let across = if (i < half) == back { sine } else { -sine };
        let (along, across) = (own.0 * cosine, other.0 * across);
        // The table's element, the product and the sum are each rounded once.
        let rounding = 4.0 * F32_ROUNDOFF * (along.abs() + across.abs());
        let error = own.1 * cosine.abs() + other.1 * sine.abs();
        (along + across, error + rounding)
    });
    turned.collect()
}

fn judge(shape: &Shape, x: &[bf16], back: bool, y: &[bf16]) -> Result<Errors, String> {
    let heads = shape.row() / shape.width;
    let mut errors = Errors::default();
    let lines = x.chunks(shape.width).zip(y.chunks(shape.width));
    for (number, (x, y)) in lines.enumerate() {
        let (row, head) = (number / heads, number % heads);
        let place = |i| format!("y of row {row}, column {}", head * shape.width + i);
        if head >= shape.heads + shape.key_value_heads {
            for (i, (got, value)) in y.iter().zip(x).enumerate() {
                if got.to_bits() != value.to_bits() {
                    return Err(format!("{}: got {got}, not the value {value}", place(i)));
                }
                errors.merge(Errors::none(1));
            }
            continue;
        }
        let exactly: Vec<_> = x.iter().map(|&x| (exact(x), 0.0)).collect();
        let wanted = turned(row % shape.sequence, &exactly, back);
        for (i, (&got, (want, error))) in y.iter().zip(wanted).enumerate() {
            errors.add_bf16(got, want, error, || place(i))?;
        }
    }
    Ok(errors)
}

/// B sequences of S tokens, with H query heads, `key_value_heads` key heads, and this head width.
pub(super) const fn shape(
    b: usize,
    s: usize,
    heads: usize,
    key_value_heads: usize,
    width: usize,
) -> Shape {
    Shape {
        sequences: b,
        sequence: s,
        heads,
        key_value_heads,
        width,
    }
}

/// One token, odd numbers of tokens, several sequences, every ratio of heads, widths that are not powers of two.
const SMALL: [Shape; 5] = [
    shape(1, 1, 1, 1, 16),
    shape(1, 17, 3, 1, 48),
    shape(3, 7, 4, 2, 64),
    shape(2, 5, 2, 2, 128),
    shape(1, 13, 5, 5, 80),
];
/// The last position of a long sequence, a prime number of tokens, wide heads.
const COVERING: [Shape; 3] = [
    shape(1, 8192, 1, 1, 32),
    shape(1, 2039, 4, 2, 64),
    shape(2, 331, 16, 4, 128),
];

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let modes = [(false, false), (true, false), (true, true)];
    Case::both("rope", "rope", [&SMALL[..], &COVERING], |shapes| {
        each(
            pairs(shapes.to_vec(), modes),
            |(shape, (back, in_place))| problem(shape, back, in_place),
        )
    })
}
