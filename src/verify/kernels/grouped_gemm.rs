//! Checks the grouped GEMMs (`kernels/grouped_gemm.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, half_ulp_bf16};
use super::operands::Line;
pub use super::operands::{Gather, Operands, Product, Shape, TILES};
use super::{
    Buffer, Case, Launch, MakeProblem, Problem, launch_of, machine::POISON, pairs, sharing, values,
};
use crate::kernels::bindings::*;
use crate::kernels::{GroupedGemmForward, GroupedGemmInputGradient, GroupedGemmWeightGradient};
use Product::*;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// Shapes for every build and schedule: a single row, groups without rows, all kinds of partial tiles, widths that are not
/// multiples of a tile.
pub fn small_shapes() -> Vec<Shape> {
    vec![
        Shape::new(&[1], 8, 8),
        Shape::new(&[0, 130, 0, 1, 127, 0, 65], 72, 136),
        Shape::new(&[300, 64], 184, 200),
    ]
}

/// Prime numbers of tokens, 1 to 128 experts, half of them without rows, all tokens to one expert.
pub fn covering_shapes() -> Vec<Shape> {
    let any = |_| true;
    vec![
        Shape::routed(2039, 1, 1, any, 136, 72),
        Shape::routed(2039, 7, 2, any, 264, 88),
        Shape::routed(509, 8, 8, any, 104, 120),
        Shape::routed(1021, 32, 4, |e| e % 2 == 0, 176, 64),
        Shape::routed(700, 32, 1, |e| e == 17, 352, 40),
        Shape::routed(257, 64, 4, any, 40, 264),
        Shape::routed(127, 128, 2, any, 24, 168),
        Shape::new(&[512, 513], 704, 512),
    ]
}

/// Checks output bytes: each element must be within the bound of its arithmetic, and rows after the last expert's must be
/// unchanged.
///
/// # Errors
/// A text that names the element.
pub fn judge(operands: &Operands, bytes: &[u8]) -> Result<Errors, String> {
    let (lines, width) = operands.lines();
    let weights = operands.product == WeightGradient;
    let size = if weights { 4 } else { 2 };
    let (written, rest) = bytes.split_at(lines * width * size);
    if !rest.iter().all(|&b| b == POISON) {
        return Err("rows past the last expert's were written".into());
    }
    let lines = operands.reference().par_iter();
    let errors = Errors::of_parts(lines.map(|(line, want)| {
        let bytes = &written[line * width * size..(line + 1) * width * size];
        judge_line(operands, *line, want, bytes)
    }))?;
    // The root mean square error of rounding to 8 bits is 1.6e-3 of the value. In f32, a tensor core may truncate the sum
    // instead of rounding it at every step of 16 products; this error always has the same sign and grows with the number
    // of steps.
    let deepest = operands.shape.counts.iter().max().copied().unwrap_or(0);
    let limit = match operands.product {
        WeightGradient => 1e-6 + 2.0 * F32_ROUNDOFF * deepest as f64 / 16.0,
        _ => 2e-3,
    };
    errors.at_most(limit)
}

fn judge_line(
    operands: &Operands,
    line: usize,
    want: &Line,
    bytes: &[u8],
) -> Result<Errors, String> {
    let width = want.len();
    let name = format!("line {line}, element");
    if operands.product == WeightGradient {
        let depth = operands.shape.counts[line / operands.shape.n] as f64 + 1.0;
        let before = operands.added_to.as_ref();
        return Errors::within(&name, &values::<f32>(bytes), |i| {
            let before = before.map_or(0.0, |b| f64::from(b[line * width + i]));
            let (sum, magnitude) = want[i];
            let want = sum + before;
            let bound = F32_ROUNDOFF * (depth * magnitude + want.abs() + before.abs());
            (want, bound)
        });
    }
    let depth = operands.depth();
    let got: Vec<f64> = values(bytes).into_iter().map(bf16::to_f64).collect();
    Errors::within(&name, &got, |i| {
        let (want, magnitude) = want[i];
        let sum = F32_ROUNDOFF * depth as f64 * magnitude;
        (want, half_ulp_bf16(want.abs() + sum) + sum)
    })
}

/// Returns the launch of `o` with `tile` on the buffers of [`problem`].
pub(crate) fn launch(o: &Operands, tile: routegrad_gemm_tile) -> Launch {
    let (product, gather, accumulate) = (o.product, o.gather, o.added_to.is_some());
    let (experts, n, k) = (o.shape.counts.len(), o.shape.n, o.shape.k);
    let (rows, a_height, b_height) = (o.rows_given, o.a_height, o.b_height);
    let tile = tile as i32;
    let [of_a, of_b] = [Gather::A, Gather::B].map(|operand| gather == operand);
    match product {
        Forward => launch_of!(GroupedGemmForward {
            out, x = "a", w = "b", offsets, row_token = "index" if of_a;
            rows, x_rows: a_height, experts, n, k, tile,
        }),
        InputGradient => launch_of!(GroupedGemmInputGradient {
            dx, dout = "a", w = "b", offsets, row_token = "index" if of_a;
            rows, dout_rows: a_height, experts, n, k, tile,
        }),
        WeightGradient => launch_of!(GroupedGemmWeightGradient {
            dw, dout = "a", x = "b", offsets, dout_row_token = "index" if of_a,
            x_row_token = "index" if of_b;
            rows, dout_rows: a_height, x_rows: b_height, experts, n, k, accumulate, tile,
        }),
    }
}

/// Returns the launch of `operands` with `tile`. Buffers: result, a, b, offsets and, if rows are gathered, the index.
pub fn problem(operands: &Arc<Operands>, tile: routegrad_gemm_tile) -> Problem {
    let o = operands.clone();
    let result = o.product.result();
    let mut buffers = vec![
        match &o.added_to {
            Some(before) => Buffer::changed(result, before),
            None => Buffer::output(result, o.output_bytes()),
        },
        Buffer::input("a", &o.a),
        Buffer::input("b", &o.b),
        Buffer::input("offsets", &o.offsets),
    ];
    buffers.extend(o.index.as_ref().map(|index| Buffer::input("index", index)));
    Problem {
        label: o.label(tile),
        buffers,
        launch: launch(&o, tile),
        judge: Box::new(move |out| judge(&o, &out[0])),
    }
}

/// Returns problems for every tile and the automatic choice, for every kind of gathering, over `shapes`.
fn problems(product: Product, accumulate: bool, shapes: Vec<Shape>) -> Vec<MakeProblem> {
    let tiles: Vec<_> = product.tiles().chain([ROUTEGRAD_TILE_AUTO]).collect();
    let operands = move |(shape, gather): (Shape, &Gather)| {
        Operands::new(product, *gather, accumulate, &shape)
    };
    sharing(pairs(shapes, product.gathers()), &tiles, operands, problem)
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, shapes, small) in [
        ("small", small_shapes(), true),
        ("covering", covering_shapes(), false),
    ] {
        for (product, name, accumulate) in [
            (Forward, name.to_owned(), false),
            (InputGradient, name.to_owned(), false),
            (WeightGradient, name.to_owned(), false),
            (WeightGradient, format!("{name} accumulated"), true),
        ] {
            let problems = problems(product, accumulate, shapes.clone());
            let launcher = product.launcher();
            cases.push(Case::new(launcher, "grouped_gemm", &name, small, problems));
        }
    }
    cases
}
