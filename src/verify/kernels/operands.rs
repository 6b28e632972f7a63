//! The operands of the grouped GEMMs over ragged groups, and their products in float64, line by line. A line is a row of
//! `out` or `dx`, or one output channel of an expert's dW.

use super::numbers::Random;
use crate::kernels::bindings::*;
use crate::kernels::cost::Cost;
use crate::kernels::launchers;
use crate::kernels::{GroupedGemmForward, GroupedGemmWeightGradient};
use crate::tensor::cpu::{Accumulate, Mat, matmul};
use half::bf16;
use rayon::prelude::*;
use std::sync::OnceLock;

/// The three products of a grouped linear layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Product {
    /// `out = x Wᵀ`.
    Forward,
    /// `dx = dout W`.
    InputGradient,
    /// `dW = doutᵀ x`.
    WeightGradient,
}
use Product::*;

impl Product {
    /// All products.
    pub const ALL: [Product; 3] = [Forward, InputGradient, WeightGradient];

    /// Returns the name of the launcher.
    pub fn launcher(self) -> &'static str {
        match self {
            Forward => "grouped_gemm_forward",
            InputGradient => "grouped_gemm_input_gradient",
            WeightGradient => "grouped_gemm_weight_gradient",
        }
    }

    /// Returns the FLOPs, and the bytes that must be moved once: operands and result.
    pub fn cost(self, shape: &Shape) -> Cost {
        let (rows, experts) = (shape.rows(), shape.counts.len());
        match self {
            WeightGradient => {
                GroupedGemmWeightGradient::cost(rows, experts, shape.n, shape.k, false)
            }
            _ => GroupedGemmForward::cost(rows, experts, shape.n, shape.k),
        }
    }

    /// Returns the name of the result.
    pub fn result(self) -> &'static str {
        match self {
            Forward => "out",
            InputGradient => "dx",
            WeightGradient => "dw",
        }
    }

    /// Returns the tiles that can be requested for the product.
    pub fn tiles(self) -> impl Iterator<Item = routegrad_gemm_tile> {
        let usable = TILES
            .iter()
            .filter(|t| self != WeightGradient || t.2 != 176);
        let hopper: Vec<routegrad_gemm_tile> = usable.map(|t| t.0).collect();
        tiles_of_device(&hopper, ROUTEGRAD_TILE_MMA_128X128).into_iter()
    }

    /// Returns the operands that the kernel can gather.
    pub fn gathers(self) -> &'static [Gather] {
        match self {
            WeightGradient => &[Gather::None, Gather::A, Gather::B],
            _ => &[Gather::None, Gather::A],
        }
    }
}

/// The operand whose rows are selected by an index instead of being in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gather {
    /// No operand.
    None,
    /// Operand a.
    A,
    /// Operand b.
    B,
}

/// Returns the tiles for the cases: `hopper` on Hopper; on other GPUs `other`, which all of them support.
pub fn tiles_of_device<T: Copy>(hopper: &[T], other: T) -> Vec<T> {
    match launchers::on_hopper() {
        true => hopper.to_vec(),
        false => vec![other],
    }
}

/// All tiles of Hopper with their rows and columns.
pub const TILES: [(routegrad_gemm_tile, usize, usize); 5] = [
    (ROUTEGRAD_TILE_COOPERATIVE_128X256, 128, 256),
    (ROUTEGRAD_TILE_COOPERATIVE_256X128, 256, 128),
    (ROUTEGRAD_TILE_COOPERATIVE_256X176, 256, 176),
    (ROUTEGRAD_TILE_PINGPONG_128X128, 128, 128),
    (ROUTEGRAD_TILE_PINGPONG_128X176, 128, 176),
];

/// Number of rows of each expert, and the widths of W [E, n, k].
#[derive(Clone, Debug)]
pub struct Shape {
    /// Number of rows of each expert `[E]`.
    pub counts: Vec<usize>,
    /// Output width n of W.
    pub n: usize,
    /// Input width k of W.
    pub k: usize,
}

impl Shape {
    /// Creates a shape.
    pub fn new(counts: &[usize], n: usize, k: usize) -> Self {
        Self {
            counts: counts.to_vec(),
            n,
            k,
        }
    }

    /// Each of `tokens` tokens chooses `per_token` different experts of `usable`.
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

    /// Returns the number of rows R.
    pub fn rows(&self) -> usize {
        self.counts.iter().sum()
    }
}

/// The operands of a product. Rows after the last expert's contain NaN, and their index is far out of range.
pub struct Operands {
    /// The product.
    pub product: Product,
    /// The operand that is gathered.
    pub gather: Gather,
    /// The shape.
    pub shape: Shape,
    /// Number of rows passed to the launcher, which is larger than the actual number; the additional rows must have no
    /// effect.
    pub rows_given: usize,
    /// First row of each expert, and the number of rows `[E + 1]`.
    pub offsets: Vec<i32>,
    /// Source row of each row of the gathered operand, if one is gathered.
    pub index: Option<Vec<i32>>,
    /// x or dout.
    pub a: Vec<bf16>,
    /// W, or x for the weight gradient.
    pub b: Vec<bf16>,
    /// Number of rows of `a`.
    pub a_height: usize,
    /// Number of rows of `b`, if `b` has rows.
    pub b_height: usize,
    /// The previous content of dW, for accumulation.
    pub added_to: Option<Vec<f32>>,
    /// Number of lines to check; all lines if there are not more.
    lines_judged: usize,
    /// The lines to check with their indices, computed when they are first needed; they are the same for every tile.
    reference: OnceLock<Vec<(usize, Line)>>,
}

/// For each element, the value and the sum of the magnitudes of its terms.
pub type Line = Vec<(f64, f64)>;

impl Operands {
    /// Creates seeded operands of which every line is checked.
    pub fn new(product: Product, gather: Gather, accumulate: bool, shape: &Shape) -> Self {
        let mut operands = Self::with_spare_rows(product, gather, accumulate, shape, 3);
        operands.lines_judged = usize::MAX;
        operands
    }

    /// For shapes for which computing every line in float64 would take minutes; 64 lines are checked.
    pub fn sampled(product: Product, shape: &Shape) -> Self {
        Self::with_spare_rows(product, Gather::None, false, shape, 0)
    }

    /// For operands that are given; 64 lines are checked.
    pub fn of(product: Product, shape: &Shape, a: Vec<bf16>, b: Vec<bf16>) -> Self {
        let rows = shape.rows();
        let ends = shape.counts.iter().scan(0, |sum, &count| {
            *sum += count as i32;
            Some(*sum)
        });
        Self {
            product,
            gather: Gather::None,
            shape: shape.clone(),
            rows_given: rows,
            offsets: std::iter::once(0).chain(ends).collect(),
            index: None,
            a,
            b,
            a_height: rows,
            b_height: rows,
            added_to: None,
            lines_judged: 64,
            reference: OnceLock::new(),
        }
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
        let mut b = random.normals_bf16(match product {
            WeightGradient => b_height * k,
            _ => experts * n * k,
        });
        if gather != Gather::A {
            a[rows * a_width..].fill(bf16::NAN);
        }
        if product == WeightGradient && gather != Gather::B {
            b[rows * k..].fill(bf16::NAN);
        }
        let index = (gather != Gather::None).then(|| random.tokens(tokens, rows, rows_given));
        let added_to = accumulate.then(|| random.normals(experts * n * k));
        Self {
            gather,
            rows_given,
            index,
            a_height,
            b_height,
            added_to,
            ..Self::of(product, shape, a, b)
        }
    }

    /// Returns the row of `operand` that is used for row `row` of the product.
    pub fn row_of(&self, operand: Gather, row: usize) -> usize {
        match &self.index {
            Some(index) if self.gather == operand => index[row] as usize,
            _ => row,
        }
    }

    /// Returns the number of terms of each sum over a width of W.
    pub fn depth(&self) -> usize {
        match self.product {
            Forward => self.shape.k,
            _ => self.shape.n,
        }
    }

    /// Divides W by a power of two near √depth, so that sums have unit scale, as their terms do.
    pub fn with_unit_sums(mut self) -> Self {
        let scale = ((self.depth() as f32).log2() / 2.0).round().exp2();
        for w in &mut self.b {
            *w = bf16::from_f32(w.to_f32() / scale);
        }
        self
    }

    /// Returns the expert to which row `row` belongs.
    pub fn expert_of(&self, row: usize) -> usize {
        self.offsets
            .partition_point(|&offset| offset as usize <= row)
            - 1
    }

    fn expert_of_line(&self, line: usize) -> usize {
        match self.product {
            WeightGradient => line / self.shape.n,
            _ => self.expert_of(line),
        }
    }

    /// Returns the number of lines that are written, and the number of elements per line.
    pub fn lines(&self) -> (usize, usize) {
        let Shape { n, k, ref counts } = self.shape;
        match self.product {
            Forward => (self.shape.rows(), n),
            InputGradient => (self.shape.rows(), k),
            WeightGradient => (counts.len() * n, k),
        }
    }

    /// Returns the size of the output in bytes, including spare rows.
    pub fn output_bytes(&self) -> usize {
        let (lines, width) = self.lines();
        match self.product {
            WeightGradient => lines * width * 4,
            _ => self.rows_given * width * 2,
        }
    }

    /// Returns the lines to check with their indices; computes them on the first call.
    pub fn reference(&self) -> &[(usize, Line)] {
        self.reference.get_or_init(|| {
            let judged = self.judged_lines();
            let of_experts: Vec<&[usize]> = judged
                .chunk_by(|&x, &y| self.expert_of_line(x) == self.expert_of_line(y))
                .collect();
            let lines = of_experts.into_par_iter();
            let lines: Vec<Vec<Line>> = lines.map(|lines| self.lines_of_expert(lines)).collect();
            let lines = lines.into_iter().flatten();
            judged.into_iter().zip(lines).collect()
        })
    }

    /// Computes lines of one expert in float64.
    fn lines_of_expert(&self, lines: &[usize]) -> Vec<Line> {
        let Shape { n, k, .. } = self.shape;
        let expert = self.expert_of_line(lines[0]);
        let (mut a, mut b) = (vec![], vec![]);
        let (inner, width) = match self.product {
            Forward => (k, n),
            InputGradient => (n, k),
            WeightGradient => {
                let rows = self.offsets[expert] as usize..self.offsets[expert + 1] as usize;
                for &line in lines {
                    let value = |row| exact(self.a[self.row_of(Gather::A, row) * n + line % n]);
                    a.extend(rows.clone().map(value));
                }
                for row in rows.clone() {
                    let x = self.row_of(Gather::B, row);
                    b.extend(self.b[x * k..(x + 1) * k].iter().map(|&x| exact(x)));
                }
                (rows.len(), k)
            }
        };
        if self.product != WeightGradient {
            for &line in lines {
                let from = self.row_of(Gather::A, line);
                let row = &self.a[from * inner..(from + 1) * inner];
                a.extend(row.iter().map(|&x| exact(x)));
            }
            let w = &self.b[expert * n * k..(expert + 1) * n * k];
            b.extend(w.iter().map(|&w| exact(w)));
        }
        let product = |a: &[f64], b: &[f64]| {
            let mut sums = vec![0.0; lines.len() * width];
            let b = match self.product {
                Forward => Mat::new(b, n, k).t(),
                _ => Mat::new(b, inner, width),
            };
            let a = Mat::new(a, lines.len(), inner);
            matmul(&mut sums, Accumulate::Assign, a, b);
            sums
        };
        let values = product(&a, &b);
        for x in a.iter_mut().chain(&mut b) {
            *x = x.abs();
        }
        let pairs: Vec<(f64, f64)> = values.into_iter().zip(product(&a, &b)).collect();
        pairs.chunks(width).map(<[_]>::to_vec).collect()
    }

    /// Returns the indices of the lines to check: all, or some of every part that include the first and last row of each
    /// expert.
    fn judged_lines(&self) -> Vec<usize> {
        let lines = self.lines().0;
        if lines <= self.lines_judged {
            return (0..lines).collect();
        }
        let mut random = Random(lines as u64);
        let sampled = (0..self.lines_judged).map(|_| random.below(lines));
        let mut chosen: Vec<usize> = sampled.collect();
        if self.product != WeightGradient {
            let experts = self.offsets.windows(2).filter(|o| o[0] < o[1]);
            chosen.extend(experts.flat_map(|o| [o[0] as usize, o[1] as usize - 1]));
        }
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }

    /// Describes the product, for messages.
    pub fn label(&self, tile: routegrad_gemm_tile) -> String {
        let Shape { n, k, ref counts } = self.shape;
        let (product, gather) = (self.product, self.gather);
        let mode = self.added_to.as_ref().map_or("assigned", |_| "accumulated");
        format!("{product:?} {mode}, gather {gather:?}, tile {tile}, {counts:?} rows, n {n}, k {k}")
    }
}

/// Converts a bf16 exactly, as the upper half of an f32. (`to_f64` handles NaN separately, which prevents vectorisation.)
#[inline]
pub fn exact(x: bf16) -> f64 {
    f64::from(f32::from_bits(u32::from(x.to_bits()) << 16))
}
