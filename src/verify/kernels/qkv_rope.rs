//! Checks the projection with fused rotary position embedding (`kernels/qkv_rope.cu`) against float64.

use super::experts::Bounded;
use super::grouped_down::TILES;
use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::operands::{exact, tiles_of_device};
use super::rope::{Shape, shape, table_buffers};
use super::{Buffer, Case, Problem, each, launch_of, pairs, values};
use crate::kernels::QkvRopeForward;
use crate::kernels::bindings::{ROUTEGRAD_TILE_MMA_128X128, routegrad_gemm_tile};
use crate::kernels::launchers::TILE_AUTO;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// x `[T, D]` and W `[(H + 2 KV) d, D]`.
pub struct Inputs {
    shape: Shape,
    hidden: usize,
    x: Vec<bf16>,
    w: Vec<bf16>,
}

impl Inputs {
    /// Creates seeded inputs.
    pub fn new(shape: Shape, hidden: usize) -> Self {
        let mut random = Random((shape.tokens() * 31 + shape.row() + hidden) as u64);
        let mut x = random.normals_bf16(shape.tokens() * hidden);
        // A row of NaN must not affect other rows.
        if shape.tokens() > 2 {
            x[hidden..2 * hidden].fill(bf16::NAN);
        }
        Inputs {
            w: random.normals_bf16(shape.row() * hidden),
            shape,
            hidden,
            x,
        }
    }

    /// Returns a row of x Wᵀ, which tensor cores sum in an order that is not specified.
    fn product(&self, token: usize) -> Vec<Bounded> {
        let x = &self.x[token * self.hidden..][..self.hidden];
        let lines = self.w.chunks(self.hidden).map(|w| {
            let terms = x.iter().zip(w).map(|(a, b)| exact(*a) * exact(*b));
            Bounded::sum(self.hidden + 8, sums(terms))
        });
        lines.collect()
    }

    fn judge(&self, out: &[bf16]) -> Result<Errors, String> {
        let (shape, half) = (self.shape, self.shape.width / 2);
        let turned = (shape.heads + shape.key_value_heads) * shape.width;
        let rows = out.par_chunks(shape.row()).enumerate();
        Errors::of_parts(rows.map(|(token, got)| {
            let product = self.product(token);
            Errors::within(&format!("token {token}, column"), got, |column| {
                let i = column % shape.width;
                let (sine, cosine) = shape.angle(token, i % half).sin_cos();
                let want = match (column < turned, i < half) {
                    (false, _) => product[column],
                    (_, true) => turn(product[column], product[column + half], [cosine, -sine]),
                    (_, false) => turn(product[column], product[column - half], [cosine, sine]),
                };
                (want.value, want.error)
            })
        }))
    }
}

/// Returns `own · cosine + other · sine` with the factors of a table that is rounded to f32.
fn turn(own: Bounded, other: Bounded, factors: [f64; 2]) -> Bounded {
    let [own, other] = [(own, factors[0]), (other, factors[1])].map(|(x, factor)| {
        x.times(Bounded {
            value: factor,
            error: F32_ROUNDOFF,
        })
    });
    let terms = own.value.abs() + own.error + other.value.abs() + other.error;
    Bounded {
        value: own.value + other.value,
        error: own.error + other.error + F32_ROUNDOFF * terms,
    }
}

/// Returns the launch for these inputs. Buffers: out, x, w, cosines, sines.
pub fn problem(inputs: &Arc<Inputs>, tile: routegrad_gemm_tile) -> Problem {
    let i = inputs.clone();
    let (shape, hidden) = (i.shape, i.hidden);
    let mut buffers = vec![
        Buffer::output("out", 2 * shape.tokens() * shape.row()),
        Buffer::input("x", &i.x),
        Buffer::input("w", &i.w),
    ];
    buffers.extend(table_buffers(shape.sequence, shape.width));
    Problem {
        label: format!("{shape:?}, D {hidden}, tile {tile}"),
        buffers,
        launch: launch_of!(QkvRopeForward {
            out, x, w, cosines, sines;
            tokens: shape.tokens(), sequence: shape.sequence, heads: shape.heads,
            key_value_heads: shape.key_value_heads, head_width: shape.width, hidden,
            tile: tile as i32,
        }),
        judge: Box::new(move |out| i.judge(&values(&out[0]))),
    }
}

/// One token; sequences shorter than a tile; a tile that ends within the query heads, and one whose second half is values.
const SMALL: [(Shape, usize); 4] = [
    (shape(1, 1, 1, 1, 64), 8),
    (shape(3, 7, 4, 2, 64), 24),
    (shape(2, 5, 2, 2, 128), 72),
    (shape(2, 67, 3, 1, 64), 40),
];
const COVERING: [(Shape, usize); 3] = [
    (shape(1, 300, 4, 2, 128), 64),
    (shape(5, 61, 16, 4, 64), 136),
    (shape(1, 2039, 1, 1, 128), 8),
];

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let problems = |shapes: &[(Shape, usize)]| {
        let mut tiles = tiles_of_device(&TILES, ROUTEGRAD_TILE_MMA_128X128);
        tiles.push(TILE_AUTO as routegrad_gemm_tile);
        each(pairs(shapes.to_vec(), tiles), |((shape, hidden), tile)| {
            problem(&Arc::new(Inputs::new(shape, hidden)), tile)
        })
    };
    let shapes = [&SMALL[..], &COVERING];
    Case::both("qkv_rope_forward", "qkv_rope", shapes, problems)
}
