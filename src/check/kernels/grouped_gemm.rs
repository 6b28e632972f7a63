//! The grouped GEMMs (`kernels/grouped_gemm.cu`) against float64, line by line: a line is a row of `out` or `dx`, or one
//! output channel of an expert's dW.

use super::numbers::{Errors, F32_ROUNDOFF, Random, half_ulp_bf16};
use super::{Buffer, Case, MakeProblem, Problem, machine::POISON, values};
use crate::device::bindings::*;
use crate::launch;
use half::bf16;
use rayon::prelude::*;
use std::ptr::null;
use std::sync::{Arc, LazyLock, OnceLock};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Product {
    Forward,
    InputGradient,
    WeightGradient,
}
use Product::*;

impl Product {
    pub const ALL: [Product; 3] = [Forward, InputGradient, WeightGradient];

    pub fn launcher(self) -> &'static str {
        match self {
            Forward => "grouped_gemm_forward",
            InputGradient => "grouped_gemm_input_gradient",
            WeightGradient => "grouped_gemm_weight_gradient",
        }
    }

    /// The tiles that it can be told to take.
    pub fn tiles(self) -> impl Iterator<Item = routegrad_gemm_tile> {
        TILES
            .iter()
            .filter(move |t| self != WeightGradient || t.2 != 176)
            .map(|t| t.0)
    }

    pub fn gathers(self) -> &'static [Gather] {
        if self == WeightGradient {
            &[Gather::None, Gather::A, Gather::B]
        } else {
            &[Gather::None, Gather::A]
        }
    }
}

/// Which operand's rows are named by an index instead of standing in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gather {
    None,
    A,
    B,
}

/// Every tile with its rows and columns.
pub const TILES: [(routegrad_gemm_tile, usize, usize); 5] = [
    (ROUTEGRAD_TILE_COOPERATIVE_128X256, 128, 256),
    (ROUTEGRAD_TILE_COOPERATIVE_256X128, 256, 128),
    (ROUTEGRAD_TILE_COOPERATIVE_256X176, 256, 176),
    (ROUTEGRAD_TILE_PINGPONG_128X128, 128, 128),
    (ROUTEGRAD_TILE_PINGPONG_128X176, 128, 176),
];

/// Rows of each expert, and the widths of W [E, n, k].
#[derive(Clone, Debug)]
pub struct Shape {
    pub counts: Vec<usize>,
    pub n: usize,
    pub k: usize,
}

impl Shape {
    pub fn new(counts: &[usize], n: usize, k: usize) -> Self {
        Self {
            counts: counts.to_vec(),
            n,
            k,
        }
    }

    /// `per_token` different experts of `usable` for each of `tokens`.
    pub fn routed(
        tokens: usize,
        experts: usize,
        per_token: usize,
        usable: impl Fn(usize) -> bool,
        n: usize,
        k: usize,
    ) -> Self {
        let mut random = Random((tokens * experts + per_token) as u64);
        let mut pool: Vec<usize> = (0..experts).filter(|&e| usable(e)).collect();
        let mut counts = vec![0; experts];
        for _ in 0..tokens {
            random.shuffle(&mut pool);
            pool[..per_token].iter().for_each(|&e| counts[e] += 1);
        }
        Self { counts, n, k }
    }

    pub fn rows(&self) -> usize {
        self.counts.iter().sum()
    }

    /// 2·R·N·K, the same for the three products.
    pub fn flops(&self) -> f64 {
        2.0 * self.rows() as f64 * self.n as f64 * self.k as f64
    }
}

/// Shapes for every build and schedule: a single row, empty groups, tails of every kind, widths that divide nothing.
pub fn small_shapes() -> Vec<Shape> {
    vec![
        Shape::new(&[1], 8, 8),
        Shape::new(&[0, 130, 0, 1, 127, 0, 65], 72, 136),
        Shape::new(&[300, 64], 184, 200),
    ]
}

/// Prime numbers of tokens, 1 to 128 experts, half of them empty, all tokens to one.
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

/// The operands of a product. Rows past the last expert's hold NaN, and their index leads far outside.
pub struct Operands {
    pub product: Product,
    pub gather: Gather,
    pub shape: Shape,
    /// More than there are: the rest must not matter.
    pub rows_given: usize,
    pub offsets: Vec<i32>,
    pub index: Option<Vec<i32>>,
    /// x or dout.
    pub a: Vec<bf16>,
    /// W, or x for the weight gradient.
    pub b: Vec<bf16>,
    a_height: usize,
    b_height: usize,
    /// dW before, to accumulate on.
    pub added_to: Option<Vec<f32>>,
    /// How many lines are judged; all, where there are no more.
    lines_judged: usize,
    /// The judged lines with their numbers, once they are needed; the same for every tile.
    reference: OnceLock<Vec<(usize, Line)>>,
}

/// Value and sum of the terms' magnitudes of each element.
type Line = Vec<(f64, f64)>;

impl Operands {
    pub fn new(product: Product, gather: Gather, accumulate: bool, shape: &Shape) -> Self {
        let mut operands = Self::with_spare_rows(product, gather, accumulate, shape, 3);
        operands.lines_judged = usize::MAX;
        operands
    }

    /// For shapes at which every line in float64 would take minutes: 64 lines are judged.
    pub fn sampled(product: Product, shape: &Shape) -> Self {
        Self::with_spare_rows(product, Gather::None, false, shape, 0)
    }

    fn with_spare_rows(
        product: Product,
        gather: Gather,
        accumulate: bool,
        shape: &Shape,
        spare: usize,
    ) -> Self {
        let (n, k, rows, experts) = (shape.n, shape.k, shape.rows(), shape.counts.len());
        let mut random = Random((n * 31 + k * 17 + rows) as u64);
        let rows_given = rows + spare;
        let a_width = if product == Forward { k } else { n };
        let tokens = rows / 2 + 1;
        let height = |gathered| if gathered { tokens } else { rows_given };
        let (a_height, b_height) = (height(gather == Gather::A), height(gather == Gather::B));
        let mut a = random.normals_bf16(a_height * a_width);
        let mut b = random.normals_bf16(if product == WeightGradient {
            b_height * k
        } else {
            experts * n * k
        });
        if gather != Gather::A {
            a[rows * a_width..].fill(bf16::NAN);
        }
        if product == WeightGradient && gather != Gather::B {
            b[rows * k..].fill(bf16::NAN);
        }
        let index = (gather != Gather::None).then(|| {
            (0..rows_given)
                .map(|r| {
                    if r < rows {
                        random.below(tokens) as i32
                    } else {
                        i32::MAX
                    }
                })
                .collect()
        });
        let ends = shape.counts.iter().scan(0, |sum, &count| {
            *sum += count as i32;
            Some(*sum)
        });
        let offsets = std::iter::once(0).chain(ends).collect();
        let added_to = accumulate.then(|| (0..experts * n * k).map(|_| random.normal()).collect());
        let shape = shape.clone();
        let (lines_judged, reference) = (64, OnceLock::new());
        Self {
            product,
            gather,
            shape,
            rows_given,
            offsets,
            index,
            a,
            b,
            a_height,
            b_height,
            added_to,
            lines_judged,
            reference,
        }
    }

    fn row_of(&self, operand: Gather, row: usize) -> usize {
        match &self.index {
            Some(index) if self.gather == operand => index[row] as usize,
            _ => row,
        }
    }

    /// Number of lines that are written, and elements of one.
    pub fn lines(&self) -> (usize, usize) {
        let Shape { n, k, ref counts } = self.shape;
        match self.product {
            Forward => (self.shape.rows(), n),
            InputGradient => (self.shape.rows(), k),
            WeightGradient => (counts.len() * n, k),
        }
    }

    fn output_bytes(&self) -> usize {
        let (lines, width) = self.lines();
        match self.product {
            WeightGradient => lines * width * 4,
            _ => self.rows_given * width * 2,
        }
    }

    fn reference(&self) -> &[(usize, Line)] {
        self.reference.get_or_init(|| {
            self.judged_lines()
                .into_par_iter()
                .map(|line| (line, self.line(line)))
                .collect()
        })
    }

    /// One line in float64.
    fn line(&self, line: usize) -> Line {
        let Shape { n, k, .. } = self.shape;
        let mut sums = vec![(0.0, 0.0); self.lines().1];
        let mut add = |scale: bf16, values: &mut dyn Iterator<Item = bf16>| {
            for (sum, value) in sums.iter_mut().zip(values) {
                let term = scale.to_f64() * value.to_f64();
                *sum = (sum.0 + term, sum.1 + term.abs());
            }
        };
        if self.product == WeightGradient {
            let (expert, channel) = (line / n, line % n);
            for row in self.offsets[expert] as usize..self.offsets[expert + 1] as usize {
                let (dout, x) = (self.row_of(Gather::A, row), self.row_of(Gather::B, row));
                add(
                    self.a[dout * n + channel],
                    &mut self.b[x * k..(x + 1) * k].iter().copied(),
                );
            }
            return sums;
        }
        let expert = self
            .offsets
            .partition_point(|&offset| offset as usize <= line)
            - 1;
        let w = &self.b[expert * n * k..(expert + 1) * n * k];
        let from = self.row_of(Gather::A, line);
        if self.product == InputGradient {
            for l in 0..n {
                add(
                    self.a[from * n + l],
                    &mut w[l * k..(l + 1) * k].iter().copied(),
                );
            }
            return sums;
        }
        let x = &self.a[from * k..(from + 1) * k];
        for (sum, w) in sums.iter_mut().zip(w.chunks(k)) {
            for (x, w) in x.iter().zip(w) {
                let term = x.to_f64() * w.to_f64();
                *sum = (sum.0 + term, sum.1 + term.abs());
            }
        }
        sums
    }

    /// The lines that are judged: all, or some of every part with the first and last row of each expert among them.
    fn judged_lines(&self) -> Vec<usize> {
        let lines = self.lines().0;
        if lines <= self.lines_judged {
            return (0..lines).collect();
        }
        let mut random = Random(lines as u64);
        let mut chosen: Vec<usize> = (0..self.lines_judged)
            .map(|_| random.below(lines))
            .collect();
        if self.product != WeightGradient {
            chosen.extend(
                self.offsets
                    .windows(2)
                    .filter(|o| o[0] < o[1])
                    .flat_map(|o| [o[0] as usize, o[1] as usize - 1]),
            );
        }
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }

    pub fn label(&self, tile: routegrad_gemm_tile) -> String {
        let Shape { n, k, ref counts } = self.shape;
        let mode = if self.added_to.is_some() {
            "accumulated"
        } else {
            "assigned"
        };
        format!(
            "{:?} {mode}, gather {:?}, tile {tile}, {counts:?} rows, n {n}, k {k}",
            self.product, self.gather
        )
    }
}

/// Judges output bytes: each element within the bound of its arithmetic, rows past the last expert's as they were.
///
/// # Errors
/// The text names the element.
pub fn judge(operands: &Operands, bytes: &[u8]) -> Result<Errors, String> {
    let (lines, width) = operands.lines();
    let size = if operands.product == WeightGradient {
        4
    } else {
        2
    };
    let (written, rest) = bytes.split_at(lines * width * size);
    if !rest.iter().all(|&b| b == POISON) {
        return Err("rows past the last expert's were written".into());
    }
    let judged: Result<Vec<Errors>, String> = operands
        .reference()
        .par_iter()
        .map(|(line, want)| {
            judge_line(
                operands,
                *line,
                want,
                &written[line * width * size..(line + 1) * width * size],
            )
        })
        .collect();
    let mut errors = Errors::default();
    judged?.into_iter().for_each(|line| errors.merge(line));
    // The root mean square of rounding to 8 bits is 1.6e-3 of the value.
    let limit = if operands.product == WeightGradient {
        1e-6
    } else {
        2e-3
    };
    if !(errors.relative() <= limit) {
        return Err(format!(
            "relative error {:.2e} > {limit:.0e}",
            errors.relative()
        ));
    }
    Ok(errors)
}

fn judge_line(
    operands: &Operands,
    line: usize,
    want: &Line,
    bytes: &[u8],
) -> Result<Errors, String> {
    let width = want.len();
    let place = |i: usize| move || format!("line {line}, element {i}");
    let mut errors = Errors::default();
    if operands.product == WeightGradient {
        let depth = operands.shape.counts[line / operands.shape.n] as f64 + 1.0;
        let got: Vec<f32> = values(bytes);
        for (i, (got, &(want, magnitude))) in got.into_iter().zip(want).enumerate() {
            let before = operands
                .added_to
                .as_ref()
                .map_or(0.0, |b| f64::from(b[line * width + i]));
            let want = want + before;
            let bound = F32_ROUNDOFF * (depth * magnitude + want.abs() + before.abs());
            errors.add(f64::from(got), want, bound, place(i))?;
        }
        return Ok(errors);
    }
    let depth = if operands.product == Forward {
        operands.shape.k
    } else {
        operands.shape.n
    };
    let got: Vec<bf16> = values(bytes);
    for (i, (got, &(want, magnitude))) in got.into_iter().zip(want).enumerate() {
        let sum = F32_ROUNDOFF * depth as f64 * magnitude;
        errors.add(
            got.to_f64(),
            want,
            half_ulp_bf16(want.abs() + sum) + sum,
            place(i),
        )?;
    }
    Ok(errors)
}

/// The launch of `operands` with `tile`. Buffers: output, a, b, offsets and, where rows are gathered, the index.
pub fn problem(operands: &Arc<Operands>, tile: routegrad_gemm_tile) -> Problem {
    let o = operands.clone();
    let output = match &o.added_to {
        Some(before) => Buffer::changed("dw", before),
        None => Buffer::output(
            if o.product == WeightGradient {
                "dw"
            } else {
                "out"
            },
            o.output_bytes(),
        ),
    };
    let mut buffers = vec![
        output,
        Buffer::input("a", &o.a),
        Buffer::input("b", &o.b),
        Buffer::input("offsets", &o.offsets),
    ];
    buffers.extend(o.index.as_ref().map(|index| Buffer::input("index", index)));
    let (product, gather, accumulate) = (o.product, o.gather, i32::from(o.added_to.is_some()));
    let (experts, n, k) = (
        o.shape.counts.len() as i32,
        o.shape.n as i32,
        o.shape.k as i32,
    );
    let (rows, a_height, b_height, tile_number) = (
        o.rows_given as i64,
        o.a_height as i64,
        o.b_height as i64,
        tile as i32,
    );
    Problem {
        label: operands.label(tile),
        buffers,
        launch: Box::new(move |launchers, p, stream| {
            let (out, a, b, offsets) = (p[0], p[1].cast(), p[2].cast(), p[3].cast());
            let index = |of| {
                if gather == of {
                    p[4].cast::<i32>().cast_const()
                } else {
                    null()
                }
            };
            // SAFETY: every buffer has the size that the launcher's header states.
            unsafe {
                match product {
                    Forward => launch!(
                        launchers,
                        grouped_gemm_forward(
                            out.cast(),
                            a,
                            b,
                            offsets,
                            index(Gather::A),
                            rows,
                            a_height,
                            experts,
                            n,
                            k,
                            tile_number,
                            stream
                        )
                    ),
                    InputGradient => launch!(
                        launchers,
                        grouped_gemm_input_gradient(
                            out.cast(),
                            a,
                            b,
                            offsets,
                            index(Gather::A),
                            rows,
                            a_height,
                            experts,
                            n,
                            k,
                            tile_number,
                            stream
                        )
                    ),
                    WeightGradient => launch!(
                        launchers,
                        grouped_gemm_weight_gradient(
                            out.cast(),
                            a,
                            b,
                            offsets,
                            index(Gather::A),
                            index(Gather::B),
                            rows,
                            a_height,
                            b_height,
                            experts,
                            n,
                            k,
                            accumulate,
                            tile_number,
                            stream
                        )
                    ),
                }
            }
        }),
        judge: Box::new(move |out| judge(&o, &out[0])),
    }
}

/// Every tile and the automatic choice, for every gather, over `shapes`.
fn problems(product: Product, accumulate: bool, shapes: &[Shape]) -> Vec<MakeProblem> {
    let mut problems: Vec<MakeProblem> = Vec::new();
    for shape in shapes {
        for &gather in product.gathers() {
            // One set of operands for all tiles.
            let shape = shape.clone();
            let operands = Arc::new(LazyLock::new(move || {
                Arc::new(Operands::new(product, gather, accumulate, &shape))
            }));
            for tile in product.tiles().chain([ROUTEGRAD_TILE_AUTO]) {
                let operands = operands.clone();
                problems.push(Box::new(move || Ok(problem(&operands, tile))));
            }
        }
    }
    problems
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, shapes, small) in [
        ("small", small_shapes(), true),
        ("covering", covering_shapes(), false),
    ] {
        for (product, accumulate) in [
            (Forward, false),
            (InputGradient, false),
            (WeightGradient, false),
            (WeightGradient, true),
        ] {
            let launcher = product.launcher();
            let mode = if accumulate { " accumulated" } else { "" };
            cases.push(Case {
                name: format!("{launcher} {name}{mode}"),
                launcher,
                source: "grouped_gemm",
                problems: problems(product, accumulate, &shapes),
                small,
            });
        }
    }
    cases
}
