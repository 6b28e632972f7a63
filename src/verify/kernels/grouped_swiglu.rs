//! Checks the experts' gate and up projection with SwiGLU, and its backward (`kernels/grouped_swiglu.cu`), against
//! float64.

use super::experts::{
    Bounded, Layer, add_bf16, covering_layers, gates, rounding_alone, small_layers, swiglu, written,
};
use super::numbers::{Errors, Random};
use super::operands::{Gather, Line, Operands, Product, exact, tiles_of_device};
use super::{Buffer, Case, Problem, launch_of, pairs, sharing, values};
use crate::kernels::bindings::*;
use crate::kernels::{GroupedSwigluBackward, GroupedSwigluForward};
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// The tiles of forward on Hopper that are checked.
pub const FORWARD_TILES: [routegrad_gemm_tile; 3] = [
    ROUTEGRAD_TILE_COOPERATIVE_128X256,
    ROUTEGRAD_TILE_COOPERATIVE_256X176,
    ROUTEGRAD_TILE_PINGPONG_128X176,
];
/// Tiles with their numbers of columns, which determine the partial dots.
pub const BACKWARD_TILES: [(routegrad_gemm_tile, usize); 1] =
    [(ROUTEGRAD_TILE_PINGPONG_128X128, 128)];

/// The inputs of a launch of forward.
pub struct Forward {
    /// The layer.
    pub layer: Layer,
    /// x, gathered or in order, and W [E, 2F, D].
    pub operands: Operands,
}

impl Forward {
    /// Creates seeded inputs for a layer.
    pub fn new(layer: &Layer, gather: Gather) -> Self {
        let shape = layer.shape(2 * layer.ffn, layer.hidden);
        let operands = Operands::new(Product::Forward, gather, false, &shape).with_unit_sums();
        Self {
            layer: layer.clone(),
            operands,
        }
    }

    fn judge(&self, outputs: &[Vec<u8>]) -> Result<Errors, String> {
        let (rows, ffn) = (self.layer.rows(), self.layer.ffn);
        let h: Vec<bf16> = values(written("h", &outputs[0], rows * ffn * 4)?);
        let a: Vec<bf16> = values(written("a", &outputs[1], rows * ffn * 2)?);
        let parts = self.operands.reference().par_iter().map(|(row, line)| {
            let mut errors = Errors::default();
            let sum = |i: usize| Bounded::sum(self.layer.hidden, line[i]);
            for i in 0..2 * ffn {
                let place = || format!("h row {row}, element {i}");
                add_bf16(&mut errors, h[row * 2 * ffn + i], sum(i), place)?;
            }
            for i in 0..ffn {
                let place = || format!("a row {row}, element {i}");
                let want = swiglu(sum(i)).0.times(sum(ffn + i));
                add_bf16(&mut errors, a[row * ffn + i], want, place)?;
            }
            Ok(errors)
        });
        rounding_alone(Errors::of_parts(parts)?)
    }
}

/// Returns the launch of forward with this tile and its check against float64.
pub fn forward_problem(forward: &Arc<Forward>, tile: routegrad_gemm_tile) -> Problem {
    let f = forward.clone();
    let o = &f.operands;
    let (hidden, ffn, given) = (f.layer.hidden, f.layer.ffn, o.rows_given);
    let mut buffers = vec![
        Buffer::output("h", given * f.layer.ffn * 4),
        Buffer::output("a", given * f.layer.ffn * 2),
        Buffer::input("x", &o.a),
        Buffer::input("w", &o.b),
        Buffer::input("offsets", &o.offsets),
    ];
    buffers.extend(o.index.as_ref().map(|i| Buffer::input("row_token", i)));
    let (x_rows, experts) = (o.a_height, f.layer.counts.len());
    let (gather, gathers) = (o.gather, o.index.is_some());
    let (dense, rows, layer) = (f.layer.dense, f.layer.rows_at_most(given), f.layer.label());
    Problem {
        label: format!("swiglu forward, gather {gather:?}, tile {tile}, {layer}"),
        buffers,
        launch: launch_of!(GroupedSwigluForward {
            h, a, x, w, offsets if !dense, row_token if gathers;
            rows, x_rows, experts, ffn, hidden, tile: tile as i32,
        }),
        judge: Box::new(move |outputs| f.judge(outputs)),
    }
}

/// The inputs of a launch of backward.
pub struct Backward {
    /// The layer.
    pub layer: Layer,
    /// dout, gathered or in order, and W [E, D, F].
    pub operands: Operands,
    /// [R, 2F]; NaN after the last expert's rows.
    pub h: Vec<bf16>,
    /// Gates `[T, E]`.
    pub gates: Vec<f32>,
}

impl Backward {
    /// Creates seeded inputs for a layer.
    pub fn new(layer: &Layer, gather: Gather) -> Self {
        let shape = layer.shape(layer.hidden, layer.ffn);
        let operands =
            Operands::new(Product::InputGradient, gather, false, &shape).with_unit_sums();
        let mut random = Random((layer.hidden + 31 * layer.ffn) as u64);
        let width = 2 * layer.ffn;
        let mut h = random.normals_bf16(operands.rows_given * width);
        // Some values are so large that σ is 0 or 1.
        for value in h.iter_mut().step_by(37) {
            *value = bf16::from_f32(value.to_f32() * 40.0);
        }
        h[layer.rows() * width..].fill(bf16::NAN);
        Self {
            gates: gates(operands.a_height, layer.counts.len()),
            layer: layer.clone(),
            operands,
            h,
        }
    }

    fn judge(&self, tile_columns: usize, outputs: &[Vec<u8>]) -> Result<Errors, String> {
        let (rows, ffn) = (self.layer.rows(), self.layer.ffn);
        let dot_columns = ffn.div_ceil(tile_columns);
        let dh: Vec<bf16> = values(written("dh", &outputs[0], rows * ffn * 4)?);
        let scaled_a: Vec<bf16> = values(written("scaled_a", &outputs[1], rows * ffn * 2)?);
        let dots: Vec<f32> = values(written("dots", &outputs[2], rows * dot_columns * 4)?);
        let parts = self.operands.reference().par_iter().map(|(row, line)| {
            let dots = &dots[row * dot_columns..(row + 1) * dot_columns];
            let dh = &dh[row * 2 * ffn..(row + 1) * 2 * ffn];
            self.judge_row(*row, line, tile_columns, dh, &scaled_a[row * ffn..], dots)
        });
        rounding_alone(Errors::of_parts(parts)?)
    }

    fn judge_row(
        &self,
        row: usize,
        line: &Line,
        tile_columns: usize,
        dh: &[bf16],
        scaled_a: &[bf16],
        dots: &[f32],
    ) -> Result<Errors, String> {
        let (ffn, experts) = (self.layer.ffn, self.layer.counts.len());
        let token = self.operands.row_of(Gather::A, row);
        let gate_index = token * experts + self.operands.expert_of(row);
        let w = Bounded::exact(f64::from(self.gates[gate_index]));
        let h = |i: usize| Bounded::exact(exact(self.h[row * 2 * ffn + i]));
        let mut errors = Errors::default();
        // Value, sum of the magnitudes and sum of the errors of the terms, per tile of columns.
        let mut parts = vec![(0.0, 0.0, 0.0); dots.len()];
        for i in 0..ffn {
            let da = Bounded::sum(self.layer.hidden, line[i]);
            let ((silu, slope), up) = (swiglu(h(i)), h(ffn + i));
            let a = silu.times(up);
            for (name, got, want) in [
                ("dh of gate", dh[i], w.times(da).times(up).times(slope)),
                ("dh of up", dh[ffn + i], w.times(da).times(silu)),
                ("scaled_a", scaled_a[i], w.times(a)),
            ] {
                let place = || format!("{name}, row {row}, element {i}");
                add_bf16(&mut errors, got, want, place)?;
            }
            let (term, part) = (da.times(a), &mut parts[i / tile_columns]);
            part.0 += term.value;
            part.1 += term.value.abs();
            part.2 += term.error;
        }
        for (c, (&got, &(value, magnitude, error))) in dots.iter().zip(&parts).enumerate() {
            let bound = error + Bounded::sum(tile_columns, (value, magnitude)).error;
            // Not added to `errors`, whose relative error is that of bf16.
            let place = || format!("dot {c}, row {row}");
            Errors::default().add(f64::from(got), value, bound, place)?;
        }
        Ok(errors)
    }
}

/// `tile` is a tile with its number of columns.
pub fn backward_problem(
    backward: &Arc<Backward>,
    (tile, tile_columns): (routegrad_gemm_tile, usize),
) -> Problem {
    let b = backward.clone();
    let o = &b.operands;
    let (hidden, ffn, given) = (b.layer.hidden, b.layer.ffn, o.rows_given);
    let dot_columns = b.layer.ffn.div_ceil(tile_columns);
    let mut buffers = vec![
        Buffer::output("dh", given * b.layer.ffn * 4),
        Buffer::output("scaled_a", given * b.layer.ffn * 2),
        Buffer::output("dots", given * dot_columns * 4),
        Buffer::input("dout", &o.a),
        Buffer::input("w", &o.b),
        Buffer::input("h", &b.h),
        Buffer::input("gates", &b.gates),
        Buffer::input("offsets", &o.offsets),
    ];
    buffers.extend(o.index.as_ref().map(|i| Buffer::input("row_token", i)));
    let (dout_rows, experts) = (o.a_height, b.layer.counts.len());
    let (gather, gathers) = (o.gather, o.index.is_some());
    let (dense, rows, layer) = (b.layer.dense, b.layer.rows_at_most(given), b.layer.label());
    Problem {
        label: format!("swiglu backward, gather {gather:?}, tile {tile}, {layer}"),
        buffers,
        launch: launch_of!(GroupedSwigluBackward {
            dh, scaled_a, dots, dout, w, h, gates, offsets if !dense, row_token if gathers,
            dout_row_token = "row_token" if gathers;
            rows, dout_rows, experts, hidden, ffn, dot_columns, tile: tile as i32,
        }),
        judge: Box::new(move |outputs| b.judge(tile_columns, outputs)),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let mut forward_tiles = tiles_of_device(&FORWARD_TILES, ROUTEGRAD_TILE_MMA_128X128);
    forward_tiles.push(ROUTEGRAD_TILE_AUTO);
    let backward_tiles = tiles_of_device(&BACKWARD_TILES, (ROUTEGRAD_TILE_MMA_128X128, 128));
    let of = |layers: Vec<Layer>, case: fn(_, _, _) -> Case| {
        let shapes = pairs(layers, [Gather::A, Gather::None]);
        let forward = |(layer, gather): (Layer, Gather)| Forward::new(&layer, gather);
        let backward = |(layer, gather): (Layer, Gather)| Backward::new(&layer, gather);
        let forward = sharing(shapes.clone(), &forward_tiles, forward, forward_problem);
        let backward = sharing(shapes, &backward_tiles, backward, backward_problem);
        [
            case("grouped_swiglu_forward", "grouped_swiglu", forward),
            case("grouped_swiglu_backward", "grouped_swiglu", backward),
        ]
    };
    let covering = of(covering_layers(), Case::covering);
    let small = of(small_layers(), Case::small);
    small.into_iter().chain(covering).collect()
}
