//! Checks the experts' down projection with its column sums (`kernels/grouped_down.cu`) against float64.

use super::experts::{
    Bounded, Layer, add_bf16, covering_layers, gates, rounding_alone, small_layers, written,
};
use super::machine::POISON;
use super::numbers::{Errors, Random};
use super::operands::{Gather, Line, Operands, Product, tiles_of_device};
use super::{Buffer, Case, MakeProblem, Problem, launch_of, pairs, sharing, values};
use crate::kernels::GroupedDownForward;
use crate::kernels::bindings::*;
use half::bf16;
use std::sync::Arc;

/// The tiles on Hopper that are checked.
pub const TILES: [routegrad_gemm_tile; 2] = [
    ROUTEGRAD_TILE_COOPERATIVE_128X256,
    ROUTEGRAD_TILE_PINGPONG_128X128,
];

/// The additional output of a problem.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sums {
    /// No sums.
    None,
    /// Column sums of the rows.
    Plain,
    /// Column sums of the rows, weighted by their gates.
    Gated,
}

/// The inputs of a launch.
pub struct Down {
    /// The layer.
    pub layer: Layer,
    /// a [R, F] and W [E, D, F].
    pub operands: Operands,
    /// The additional output.
    pub sums: Sums,
    /// Number of tokens T.
    pub tokens: usize,
    /// Gates `[T, E]`.
    pub gates: Vec<f32>,
    /// Token of each row; out of range after the last expert's rows.
    pub row_token: Vec<i32>,
}

impl Down {
    /// Creates seeded inputs for a layer.
    pub fn new(layer: &Layer, sums: Sums) -> Self {
        let shape = layer.shape(layer.hidden, layer.ffn);
        let operands =
            Operands::new(Product::Forward, Gather::None, false, &shape).with_unit_sums();
        let (rows, experts) = (layer.rows(), layer.counts.len());
        let tokens = rows / 2 + 1;
        Self {
            sums,
            tokens,
            gates: gates(tokens, experts),
            row_token: Random(rows as u64).tokens(tokens, rows, operands.rows_given),
            operands,
            layer: layer.clone(),
        }
    }

    /// Returns the number of blocks for which `column_sums` has room.
    pub fn blocks(&self) -> usize {
        GroupedDownForward::column_sum_lines(self.operands.rows_given, self.layer.counts.len())
    }

    fn gate(&self, row: usize) -> f64 {
        if self.sums != Sums::Gated {
            return 1.0;
        }
        let (token, expert) = (self.row_token[row] as usize, self.operands.expert_of(row));
        f64::from(self.gates[token * self.layer.counts.len() + expert])
    }

    fn judge(&self, outputs: &[Vec<u8>]) -> Result<Errors, String> {
        let (rows, hidden) = (self.layer.rows(), self.layer.hidden);
        let out: Vec<bf16> = values(written("out", &outputs[0], rows * hidden * 2)?);
        let mut errors = Errors::default();
        let reference = self.operands.reference();
        for (row, line) in reference {
            for (i, &want) in line.iter().enumerate() {
                let place = || format!("out row {row}, element {i}");
                let want = Bounded::sum(self.layer.ffn, want);
                add_bf16(&mut errors, out[row * hidden + i], want, place)?;
            }
        }
        let errors = rounding_alone(errors)?;
        if self.sums != Sums::None {
            self.judge_sums(reference, &outputs[1])?;
        }
        Ok(errors)
    }

    /// Checks the f32 sum of every block, and that nothing else was written.
    fn judge_sums(&self, reference: &[(usize, Line)], bytes: &[u8]) -> Result<(), String> {
        let hidden = self.layer.hidden;
        let got: Vec<f32> = values(bytes);
        let mut is_block = vec![false; self.blocks()];
        for (expert, &count) in self.layer.counts.iter().enumerate() {
            let first = self.operands.offsets[expert] as usize;
            for b in 0..count.div_ceil(64) {
                let block = first / 64 + expert + b;
                is_block[block] = true;
                let rows = first + 64 * b..first + count.min(64 * (b + 1));
                let mut sums = vec![(0.0, 0.0, 0.0); hidden];
                for (row, line) in &reference[rows] {
                    let gate = self.gate(*row);
                    for (sum, &term) in sums.iter_mut().zip(line) {
                        let term = Bounded::sum(self.layer.ffn, term).times(Bounded::exact(gate));
                        sum.0 += term.value;
                        sum.1 += term.value.abs();
                        sum.2 += term.error;
                    }
                }
                let mut errors = Errors::default();
                for (i, &(value, magnitude, error)) in sums.iter().enumerate() {
                    let bound = error + Bounded::sum(64, (value, magnitude)).error;
                    let place = || format!("column sum {i} of block {b} of expert {expert}");
                    errors.add(f64::from(got[block * hidden + i]), value, bound, place)?;
                }
                if !(errors.relative() <= 1e-5) {
                    return Err(format!("column sums: relative error {}", errors.relative()));
                }
            }
        }
        for (block, _) in is_block.iter().enumerate().filter(|(_, is)| !**is) {
            let entry = &bytes[block * hidden * 4..(block + 1) * hidden * 4];
            if entry.iter().any(|&b| b != POISON) {
                return Err(format!(
                    "entry {block} of column_sums is no block, but written"
                ));
            }
        }
        Ok(())
    }
}

/// Returns the launch with this tile and its check against float64.
pub fn problem(down: &Arc<Down>, tile: routegrad_gemm_tile) -> Problem {
    let d = down.clone();
    let (hidden, ffn) = (d.layer.hidden, d.layer.ffn);
    let mut buffers = vec![
        Buffer::output("out", d.operands.output_bytes()),
        Buffer::input("a", &d.operands.a),
        Buffer::input("w", &d.operands.b),
        Buffer::input("offsets", &d.operands.offsets),
        Buffer::input("gates", &d.gates),
        Buffer::input("row_token", &d.row_token),
    ];
    if d.sums != Sums::None {
        buffers.push(Buffer::output("column_sums", d.blocks() * hidden * 4));
    }
    let (sums, tokens, experts) = (d.sums, d.tokens, d.layer.counts.len());
    let (dense, rows) = (d.layer.dense, d.layer.rows_at_most(d.operands.rows_given));
    Problem {
        label: format!("down, sums {sums:?}, tile {tile}, {}", d.layer.label()),
        buffers,
        launch: launch_of!(GroupedDownForward {
            out, column_sums if sums != Sums::None, a, w, gates if sums == Sums::Gated,
            offsets if !dense, row_token;
            rows, tokens, experts, hidden, ffn, tile: tile as i32,
        }),
        judge: Box::new(move |outputs| d.judge(outputs)),
    }
}

fn problems(layers: Vec<Layer>) -> Vec<MakeProblem> {
    let shapes = pairs(layers, [Sums::Gated, Sums::Plain, Sums::None]);
    let mut tiles = tiles_of_device(&TILES, ROUTEGRAD_TILE_MMA_128X128);
    tiles.push(ROUTEGRAD_TILE_AUTO);
    let inputs = |(layer, sums): (Layer, Sums)| Down::new(&layer, sums);
    sharing(shapes, &tiles, inputs, problem)
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let layers = [small_layers(), covering_layers()];
    Case::both("grouped_down_forward", "grouped_down", layers, problems)
}
