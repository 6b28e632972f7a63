//! Checks RMSNorm and LayerNorm with the preceding residual addition (`kernels/norm.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::operands::exact;
use super::{BOTH, Buffer, Case, Problem, bind, each, exactly, launch_of, pairs, values};
use crate::kernels::norm::{NormBackward, NormForward, NormWeightGradient, partials};
use half::bf16;
use std::sync::Arc;

/// The kind of norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// RMSNorm.
    Rms,
    /// LayerNorm.
    Layer,
}
use Kind::{Layer, Rms};

/// What is added before the norm, or to its gradient: nothing, a separate tensor, or the tensor that the result replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// Nothing.
    Nothing,
    /// A separate tensor.
    Apart,
    /// The tensor that the result replaces.
    InPlace,
}

const ADDED: [Added; 3] = [Added::Nothing, Added::Apart, Added::InPlace];

/// ε, which is added to the mean square or the variance.
const EPS: f32 = 1e-5;

/// Bound for a row's sum: a term takes part in at most 32 additions in a thread, 5 in a warp and 8 over the warps; the
/// rest is for the operations on the term.
const ROW_SUM: f64 = 64.0 * F32_ROUNDOFF;

/// Rows to normalise and their incoming gradients.
pub struct Inputs {
    /// The kind of norm.
    pub kind: Kind,
    /// Number of rows T.
    pub rows: usize,
    /// Width D of a row.
    pub hidden: usize,
    /// `[T, D]`.
    x: Vec<bf16>,
    /// The residual, or the gradient that bypasses the norm.
    added: Vec<bf16>,
    dy: Vec<bf16>,
    weight: Vec<bf16>,
    bias: Vec<bf16>,
}

impl Inputs {
    /// x is normal with this mean and standard deviation.
    pub fn new(kind: Kind, rows: usize, hidden: usize, (mean, deviation): (f32, f32)) -> Self {
        let mut random = Random((rows * 31 + hidden) as u64);
        let mut x = random.normals_bf16(rows * hidden);
        x.iter_mut()
            .for_each(|x| *x = bf16::from_f32(mean + deviation * x.to_f32()));
        Self {
            kind,
            rows,
            hidden,
            x,
            added: random.normals_bf16(rows * hidden),
            dy: random.normals_bf16(rows * hidden),
            weight: random.normals_bf16(hidden),
            bias: random.normals_bf16(hidden),
        }
    }

    /// Makes row 1 NaN and puts an infinity into row 2; this must not affect other rows.
    pub fn with_bad_rows(mut self) -> Self {
        self.x[self.hidden..2 * self.hidden].fill(bf16::NAN);
        self.x[2 * self.hidden + 5] = bf16::INFINITY;
        self
    }

    fn label(&self, added: Added) -> String {
        let (kind, rows, hidden) = (self.kind, self.rows, self.hidden);
        format!("{kind:?}, T {rows}, D {hidden}, added {added:?}")
    }

    fn row<'a>(&self, of: &'a [bf16], row: usize) -> &'a [bf16] {
        &of[row * self.hidden..(row + 1) * self.hidden]
    }

    /// Returns the input of the norm: x, or x + residual as an f32 sum rounded to bf16.
    fn normalised(&self, added: Added) -> Vec<bf16> {
        if added == Added::Nothing {
            return self.x.clone();
        }
        let sum = |(a, b): (&bf16, &bf16)| bf16::from_f32(a.to_f32() + b.to_f32());
        self.x.iter().zip(&self.added).map(sum).collect()
    }
}

/// A row's mean (0 for RMSNorm), r, and the possible error of an f32 mean.
struct Moments {
    mean: f64,
    r: f64,
    mean_error: f64,
}

impl Moments {
    fn of(row: &[bf16], kind: Kind) -> Self {
        let n = row.len() as f64;
        let over = |f: &dyn Fn(f64) -> f64| row.iter().map(|&x| f(exact(x))).sum::<f64>() / n;
        let (mean, magnitude) = match kind {
            Rms => (0.0, 0.0),
            Layer => (over(&|x| x), over(&|x| x.abs())),
        };
        let variance = over(&|x| (x - mean) * (x - mean));
        Moments {
            mean,
            r: (variance + f64::from(EPS)).sqrt().recip(),
            mean_error: ROW_SUM * magnitude,
        }
    }
}

/// Returns the launch of `norm_forward`. Buffers: y, sum, x, residual, weight, bias; in place, sum is x.
pub fn forward_problem(inputs: &Arc<Inputs>, added: Added) -> Problem {
    let i = inputs.clone();
    let bytes = 2 * i.rows * i.hidden;
    let (adds, in_place) = (added != Added::Nothing, added == Added::InPlace);
    let buffers = vec![
        Buffer::output("y", bytes),
        match added {
            Added::Apart => Buffer::output("sum", bytes),
            Added::InPlace => Buffer::changed("sum", &i.x),
            Added::Nothing => Buffer::workspace("sum", 16),
        },
        Buffer::input("x", &i.x),
        Buffer::input("residual", &i.added),
        Buffer::input("weight", &i.weight),
        Buffer::input("bias", &i.bias),
    ];
    let (rows, hidden, kind) = (i.rows, i.hidden, i.kind);
    Problem {
        label: i.label(added),
        buffers,
        launch: launch_of!(NormForward {
            y, sum if adds, x = (if in_place { "sum" } else { "x" }), residual if adds, weight,
            bias if kind == Layer;
            rows, hidden, eps: EPS,
        }),
        judge: Box::new(move |out| {
            let normalised = i.normalised(added);
            let mut errors = Errors::default();
            if added != Added::Nothing {
                let sums: Vec<bf16> = values(&out[1]);
                for (at, (got, want)) in sums.iter().zip(&normalised).enumerate() {
                    let (got_bits, bits) = (got.to_bits(), want.to_bits());
                    if got_bits != bits && !(want.is_nan() && got.is_nan()) {
                        return Err(format!("sum[{at}] is {got_bits:#x} instead of {bits:#x}"));
                    }
                }
                errors.merge(Errors::none(sums.len()));
            }
            let y: Vec<bf16> = values(&out[0]);
            for row in 0..i.rows {
                let x = i.row(&normalised, row);
                let m = Moments::of(x, kind);
                for (column, &x) in x.iter().enumerate() {
                    let w = exact(i.weight[column]);
                    let normal = (exact(x) - m.mean) * m.r * w;
                    let bias = match kind {
                        Rms => 0.0,
                        Layer => exact(i.bias[column]),
                    };
                    let error = ROW_SUM * normal.abs()
                        + m.mean_error * m.r * w.abs()
                        + F32_ROUNDOFF * (normal + bias).abs();
                    let place = || format!("y of row {row}, column {column}");
                    let got = y[row * i.hidden + column];
                    errors.add_bf16(got, normal + bias, error, place)?;
                }
            }
            Ok(errors)
        }),
    }
}

/// Returns the launches of `norm_backward` and, for each parameter, of `norm_weight_gradient`, which assigns or
/// accumulates. Buffers: dx, dw, db, partials, dy, skip, x, weight; in place, dx is skip.
pub fn backward_problem(inputs: &Arc<Inputs>, added: Added, accumulate: bool) -> Problem {
    let i = inputs.clone();
    let runs = NormBackward::runs(i.rows);
    let mut random = Random(i.hidden as u64 + 7);
    let before = random.normals(2 * i.hidden);
    let parameter = |name, of: &[f32]| Buffer::added_to(name, of, accumulate);
    let vectors = if i.kind == Layer { 2 } else { 1 };
    let buffers = vec![
        Buffer::added_to("dx", &i.added, added == Added::InPlace),
        parameter("dw", &before[..i.hidden]),
        match i.kind {
            Rms => Buffer::workspace("db", 16),
            Layer => parameter("db", &before[i.hidden..]),
        },
        Buffer::workspace("partials", 4 * vectors * runs * i.hidden),
        Buffer::input("dy", &i.dy),
        Buffer::input("skip", &i.added),
        Buffer::input("x", &i.x),
        Buffer::input("weight", &i.weight),
    ];
    let (rows, hidden, kind) = (i.rows, i.hidden, i.kind);
    Problem {
        label: format!("{}, accumulate {accumulate}", i.label(added)),
        buffers,
        launch: Box::new(move |p, stream| {
            bind!(p, NormBackward {
                dx, partials, dy, x, weight,
                skip = (if added == Added::InPlace { "dx" } else { "skip" })
                    if added != Added::Nothing;
                rows, hidden, layernorm: kind == Layer, eps: EPS,
            })
            .launch(stream)?;
            let floats = partials(stream.launchers(), rows, hidden)?;
            for (vector, name) in ["dw", "db"].into_iter().take(vectors).enumerate() {
                let partials = p.named("partials").input().from_element(vector * floats);
                bind!(p, NormWeightGradient {
                    gradient = name;
                    partials, rows, hidden, accumulate,
                })
                .launch(stream)?;
            }
            Ok(())
        }),
        judge: Box::new(move |out| {
            let before = accumulate.then_some(&before[..]);
            judge_backward(&i, added, before, out)
        }),
    }
}

fn judge_backward(
    i: &Inputs,
    added: Added,
    before: Option<&[f32]>,
    out: &[Vec<u8>],
) -> Result<Errors, String> {
    let (hidden, n) = (i.hidden, i.hidden as f64);
    let dx: Vec<bf16> = values(&out[0]);
    let mut errors = Errors::default();
    // Σ, Σ of magnitudes, and the effect of the rounding of x̂, for dw and db.
    let mut sums = vec![[[0.0; 3]; 2]; hidden];
    for row in 0..i.rows {
        let (x, dy) = (i.row(&i.x, row), i.row(&i.dy, row));
        let m = Moments::of(x, i.kind);
        let normal = |c: usize| (exact(x[c]) - m.mean) * m.r;
        let g = |c: usize| exact(dy[c]) * exact(i.weight[c]);
        let mean = |f: &dyn Fn(usize) -> f64| (0..hidden).map(f).sum::<f64>() / n;
        let (mean_g, magnitude_g) = match i.kind {
            Rms => (0.0, mean(&|c| g(c).abs())),
            Layer => (mean(&g), mean(&|c| g(c).abs())),
        };
        let along = mean(&|c| g(c) * normal(c));
        let magnitude = mean(&|c| (g(c) * normal(c)).abs());
        // x̂ has this error in addition to its own rounding.
        let shift = m.mean_error * m.r;
        for c in 0..hidden {
            let skip = match added {
                Added::Nothing => 0.0,
                _ => exact(i.added[row * hidden + c]),
            };
            let want = skip + m.r * (g(c) - mean_g - normal(c) * along);
            let error = m.r
                * (ROW_SUM * (g(c).abs() + magnitude_g + normal(c).abs() * magnitude)
                    + shift * (along.abs() + normal(c).abs() * magnitude_g))
                + F32_ROUNDOFF * want.abs();
            let place = || format!("dx of row {row}, column {c}");
            errors.add_bf16(dx[row * hidden + c], want, error, place)?;
            let (d, x) = (exact(dy[c]), normal(c));
            let terms = [(d * x, ROW_SUM * (d * x).abs() + shift * d.abs()), (d, 0.0)];
            for (sum, (term, off)) in sums[c].iter_mut().zip(terms) {
                *sum = [sum[0] + term, sum[1] + term.abs(), sum[2] + off];
            }
        }
    }
    // Number of additions that affect one term: rows of a team, teams of a run, runs of a warp, warps.
    let depth = (i.rows.div_ceil(264).max(8) + 8 + 264 / 8 + 8 + 2) as f64;
    let vectors = if i.kind == Layer { 2 } else { 1 };
    for vector in 0..vectors {
        let got: Vec<f32> = values(&out[1 + vector]);
        for c in 0..hidden {
            let [sum, magnitude, off] = sums[c][vector];
            let old = before.map_or(0.0, |b| f64::from(b[vector * hidden + c]));
            let bound = depth * F32_ROUNDOFF * magnitude + off + F32_ROUNDOFF * (old + sum).abs();
            let place = || format!("gradient of parameter {vector}, column {c}");
            errors.add(f64::from(got[c]), old + sum, bound, place)?;
        }
    }
    Ok(errors)
}

/// Returns the launch of `norm_weight_gradient` alone, with integers, whose sum is exact, and NaN in elements that must
/// not be read.
pub fn sum_problem(rows: usize, hidden: usize, accumulate: bool) -> Problem {
    let runs = NormBackward::runs(rows);
    let mut random = Random((rows + hidden) as u64);
    let mut partials: Vec<f32> = (0..runs * hidden)
        .map(|_| random.below(1 << 12) as f32 - 2048.0)
        .collect();
    let mut want = vec![0.0f32; hidden];
    for line in partials.chunks(hidden) {
        want.iter_mut().zip(line).for_each(|(w, p)| *w += p);
    }
    let before: Vec<f32> = (0..hidden).map(|c| c as f32).collect();
    if accumulate {
        want.iter_mut().zip(&before).for_each(|(w, b)| *w += b);
    }
    partials.extend(vec![f32::NAN; hidden]);
    let buffers = vec![
        Buffer::added_to("gradient", &before, accumulate),
        Buffer::input("partials", &partials),
    ];
    Problem {
        label: format!("T {rows}, D {hidden}, accumulate {accumulate}"),
        buffers,
        launch: launch_of!(NormWeightGradient { gradient, partials; rows, hidden, accumulate }),
        judge: Box::new(move |out| exactly::<f32>("gradient", &out[0], |i| want[i])),
    }
}

/// Rows, D, and the mean and standard deviation of x.
type Shape = (usize, usize, (f32, f32));

/// Mean and standard deviation of a standard normal distribution.
pub const STANDARD: (f32, f32) = (0.0, 1.0);
/// With this mean, the variance cannot be computed from the mean square in f32. (bf16 has steps of 1 at this magnitude.)
const FAR: (f32, f32) = (200.0, 0.3);

/// One row, odd numbers of rows, every number of warps per row, last chunks that are not full.
const SMALL: [Shape; 5] = [
    (1, 8, STANDARD),
    (11, 72, FAR),
    (19, 1032, STANDARD),
    (13, 2056, STANDARD),
    (3, 8192, STANDARD),
];
const COVERING: [Shape; 5] = [
    (2039, 264, STANDARD),
    (311, 768, FAR),
    (97, 1536, STANDARD),
    (67, 2048, (-30.0, 1.0)),
    (41, 4104, STANDARD),
];

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let forward = |shapes: [Shape; 5]| {
        each(
            pairs(pairs(shapes, [Rms, Layer]), ADDED),
            |(((rows, hidden, about), kind), added)| {
                let mut inputs = Inputs::new(kind, rows, hidden, about);
                if rows == 19 {
                    inputs = inputs.with_bad_rows();
                }
                forward_problem(&Arc::new(inputs), added)
            },
        )
    };
    let backward = |shapes: [Shape; 5]| {
        let modes = ADDED.into_iter().zip([false, true, false]);
        each(
            pairs(pairs(shapes, [Rms, Layer]), modes),
            |(((rows, hidden, about), kind), (added, accumulate))| {
                let inputs = Inputs::new(kind, rows, hidden, about);
                backward_problem(&Arc::new(inputs), added, accumulate)
            },
        )
    };
    let sizes = [(1, 8), (67, 40), (2039, 264), (100_003, 72)];
    let sums = each(pairs(sizes, BOTH), |((rows, hidden), accumulate)| {
        sum_problem(rows, hidden, accumulate)
    });
    let shapes = [SMALL, COVERING];
    let mut all = Case::both("norm_forward", "norm", shapes, forward);
    all.extend(Case::both("norm_backward", "norm", shapes, backward));
    all.push(Case::small("norm_weight_gradient", "norm", sums));
    all
}
