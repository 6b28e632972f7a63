//! A grouped GEMM on the simulator: inputs, float64 reference, launch and comparison.

use super::guarded::{Guarded, POISON};
use super::numbers::{Errors, F32_ROUNDOFF, Random, half_ulp_bf16};
use super::schedules::{is_plain, table};
use half::bf16;
use routegrad::device::bindings::*;
use routegrad::launch;
use std::ptr::{null, null_mut};

pub use Product::*;

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Product {
    Forward,
    InputGradient,
    WeightGradient,
}
/// Which operand's rows are named by an index instead of standing in order.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Gather {
    None,
    A,
    B,
}

pub const TILES: [(routegrad_gemm_tile, usize, usize); 5] = [
    (ROUTEGRAD_TILE_COOPERATIVE_128X256, 128, 256),
    (ROUTEGRAD_TILE_COOPERATIVE_256X128, 256, 128),
    (ROUTEGRAD_TILE_COOPERATIVE_256X176, 256, 176),
    (ROUTEGRAD_TILE_PINGPONG_128X128, 128, 128),
    (ROUTEGRAD_TILE_PINGPONG_128X176, 128, 176),
];

pub fn tiles(product: Product) -> impl Iterator<Item = routegrad_gemm_tile> {
    TILES
        .iter()
        .filter(move |t| product != WeightGradient || t.2 != 176)
        .map(|t| t.0)
}

pub fn gathers(product: Product) -> &'static [Gather] {
    if product == WeightGradient {
        &[Gather::None, Gather::A, Gather::B]
    } else {
        &[Gather::None, Gather::A]
    }
}

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
}

/// Shapes for every build and schedule: a single row, empty groups, tails of every kind, widths that divide nothing.
pub fn small_shapes() -> Vec<Shape> {
    vec![
        Shape::new(&[1], 8, 8),
        Shape::new(&[0, 130, 0, 1, 127, 0, 65], 72, 136),
        Shape::new(&[300, 64], 184, 200),
    ]
}

pub fn covering_shapes() -> Vec<Shape> {
    let any = |_| true;
    let mut shapes = small_shapes();
    if is_plain() {
        shapes.extend([
            Shape::routed(2039, 1, 1, any, 136, 72),
            Shape::routed(2039, 7, 2, any, 264, 88),
            Shape::routed(509, 8, 8, any, 104, 120),
            Shape::routed(1021, 32, 4, |e| e % 2 == 0, 176, 64), // half of the experts empty
            Shape::routed(700, 32, 1, |e| e == 17, 352, 40),     // all to one
            Shape::routed(257, 64, 4, any, 40, 264),
            Shape::routed(127, 128, 2, any, 24, 168),
            Shape::new(&[512, 513], 704, 512),
        ]);
    }
    shapes
}

/// The inputs of a product, and its result in float64 with the sum of the terms' magnitudes.
pub struct Problem {
    pub product: Product,
    pub gather: Gather,
    pub shape: Shape,
    pub rows_given: usize, // more than there are: the rest must not matter
    pub offsets: Guarded<i32>,
    pub index: Option<Guarded<i32>>,
    pub a: Guarded<bf16>, // x or dout
    pub b: Guarded<bf16>, // W, or x for the weight gradient
    pub a_height: usize,
    pub b_height: usize,
    pub added_to: Option<Vec<f32>>, // dW before, to accumulate
    pub want: Vec<f64>,
    pub magnitude: Vec<f64>,
}

impl Problem {
    pub fn new(product: Product, gather: Gather, accumulate: bool, shape: &Shape) -> Self {
        let (n, k, rows, experts) = (shape.n, shape.k, shape.rows(), shape.counts.len());
        let mut random = Random((n * 31 + k * 17 + rows) as u64);
        let rows_given = rows + 3;
        let (a_width, b_width) = match product {
            Forward => (k, k),
            InputGradient => (n, k),
            WeightGradient => (n, k),
        };
        let tokens = rows / 2 + 1;
        let height = |gathered| if gathered { tokens } else { rows_given };
        let (a_height, b_height) = (height(gather == Gather::A), height(gather == Gather::B));
        let mut a = random.normals_bf16(a_height * a_width);
        let b_len = if product == WeightGradient {
            b_height * b_width
        } else {
            experts * n * k
        };
        let mut b = random.normals_bf16(b_len);
        // Rows that belong to no expert hold NaN, and their index leads far outside.
        if gather != Gather::A {
            a[rows * a_width..].fill(bf16::NAN);
        }
        if product == WeightGradient && gather != Gather::B {
            b[rows * b_width..].fill(bf16::NAN);
        }
        let index = (gather != Gather::None).then(|| {
            let named = (0..rows_given).map(|r| {
                if r < rows {
                    random.below(tokens) as i32
                } else {
                    i32::MAX
                }
            });
            Guarded::from_slice(&named.collect::<Vec<_>>())
        });
        let offsets: Vec<i32> = std::iter::once(0)
            .chain(shape.counts.iter().scan(0, |sum, &count| {
                *sum += count as i32;
                Some(*sum)
            }))
            .collect();
        let added_to = accumulate.then(|| (0..experts * n * k).map(|_| random.normal()).collect());
        let mut problem = Self {
            product,
            gather,
            shape: shape.clone(),
            rows_given,
            offsets: Guarded::from_slice(&offsets),
            index,
            a: Guarded::from_slice(&a),
            b: Guarded::from_slice(&b),
            a_height,
            b_height,
            added_to,
            want: vec![],
            magnitude: vec![],
        };
        problem.compute_reference();
        problem
    }

    pub fn source(&self, gathered: bool, row: usize) -> usize {
        match &self.index {
            Some(index) if gathered => index.as_slice()[row] as usize,
            _ => row,
        }
    }

    pub fn output_len(&self) -> usize {
        let Shape { n, k, ref counts } = self.shape;
        match self.product {
            Forward => self.rows_given * n,
            InputGradient => self.rows_given * k,
            WeightGradient => counts.len() * n * k,
        }
    }

    pub fn compute_reference(&mut self) {
        let Shape { n, k, .. } = self.shape;
        let (mut want, mut magnitude) =
            (vec![0.0; self.output_len()], vec![0.0; self.output_len()]);
        let values = |from: &[bf16]| from.iter().map(|v| v.to_f64()).collect::<Vec<_>>();
        let (a, b) = (values(self.a.as_slice()), values(self.b.as_slice()));
        // Adds scale · row to both sums.
        let add = |want: &mut [f64], magnitude: &mut [f64], scale: f64, row: &[f64]| {
            for ((w, m), v) in want.iter_mut().zip(magnitude).zip(row) {
                *w += scale * v;
                *m += (scale * v).abs();
            }
        };
        for (expert, rows) in self.offsets.as_slice().windows(2).enumerate() {
            let weight = |l: usize, transposed: &[f64]| transposed[l * n..(l + 1) * n].to_vec();
            let mut transposed = vec![];
            if self.product == Forward {
                let w = &b[expert * n * k..(expert + 1) * n * k];
                transposed = (0..n * k).map(|i| w[i % n * k + i / n]).collect(); // [k, n]
            }
            for row in rows[0] as usize..rows[1] as usize {
                let from = self.source(self.gather == Gather::A, row);
                match self.product {
                    Forward => {
                        for l in 0..k {
                            let out = row * n..(row + 1) * n;
                            add(
                                &mut want[out.clone()],
                                &mut magnitude[out],
                                a[from * k + l],
                                &weight(l, &transposed),
                            );
                        }
                    }
                    InputGradient => {
                        for l in 0..n {
                            let out = row * k..(row + 1) * k;
                            let line = (expert * n + l) * k..(expert * n + l + 1) * k;
                            add(
                                &mut want[out.clone()],
                                &mut magnitude[out],
                                a[from * n + l],
                                &b[line],
                            );
                        }
                    }
                    WeightGradient => {
                        let x = self.source(self.gather == Gather::B, row);
                        for l in 0..n {
                            let out = (expert * n + l) * k..(expert * n + l + 1) * k;
                            add(
                                &mut want[out.clone()],
                                &mut magnitude[out],
                                a[from * n + l],
                                &b[x * k..(x + 1) * k],
                            );
                        }
                    }
                }
            }
        }
        (self.want, self.magnitude) = (want, magnitude);
    }

    /// The bytes of the output.
    pub fn run(&self, tile: routegrad_gemm_tile) -> Vec<u8> {
        let Shape { n, k, ref counts } = self.shape;
        let (experts, n, k, rows) = (
            counts.len() as i32,
            n as i32,
            k as i32,
            self.rows_given as i64,
        );
        let (a_height, b_height) = (self.a_height as i64, self.b_height as i64);
        let index = self.index.as_ref().map_or(null(), |index| index.as_ptr());
        let (offsets, a, b) = (
            self.offsets.as_ptr(),
            self.a.as_ptr().cast(),
            self.b.as_ptr().cast(),
        );
        let mut narrow = Guarded::<bf16>::poisoned(if self.product == WeightGradient {
            0
        } else {
            self.output_len()
        });
        let mut wide = Guarded::<f32>::poisoned(if self.product == WeightGradient {
            self.output_len()
        } else {
            0
        });
        if let Some(before) = &self.added_to {
            wide.as_mut_slice().copy_from_slice(before);
        }
        let out = narrow.as_mut_ptr().cast();
        let launchers = table();
        // Safety: every buffer has the size that the launcher's header states.
        let launched = unsafe {
            match self.product {
                Forward => launch!(
                    launchers,
                    grouped_gemm_forward(
                        out,
                        a,
                        b,
                        offsets,
                        index,
                        rows,
                        a_height,
                        experts,
                        n,
                        k,
                        tile as i32,
                        null_mut()
                    )
                ),
                InputGradient => launch!(
                    launchers,
                    grouped_gemm_input_gradient(
                        out,
                        a,
                        b,
                        offsets,
                        index,
                        rows,
                        a_height,
                        experts,
                        n,
                        k,
                        tile as i32,
                        null_mut()
                    )
                ),
                WeightGradient => {
                    let of_a = if self.gather == Gather::A {
                        index
                    } else {
                        null()
                    };
                    let of_b = if self.gather == Gather::B {
                        index
                    } else {
                        null()
                    };
                    let accumulate = i32::from(self.added_to.is_some());
                    launch!(
                        launchers,
                        grouped_gemm_weight_gradient(
                            wide.as_mut_ptr(),
                            a,
                            b,
                            offsets,
                            of_a,
                            of_b,
                            rows,
                            a_height,
                            b_height,
                            experts,
                            n,
                            k,
                            accumulate,
                            tile as i32,
                            null_mut()
                        )
                    )
                }
            }
        };
        launched.unwrap_or_else(|e| panic!("{}: {e}", self.label(tile)));
        narrow.check_guards("out");
        wide.check_guards("dw");
        self.offsets.check_guards("offsets");
        self.a.check_guards("a");
        self.b.check_guards("b");
        [narrow.as_bytes(), wide.as_bytes()].concat()
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

    /// Worst element and relative L2 error; whatever belongs to no row keeps its poison.
    pub fn check(&self, tile: routegrad_gemm_tile, bytes: &[u8]) {
        let Shape { n, k, .. } = self.shape;
        let mut errors = Errors::default();
        let place = |i: usize| move || format!("{}: element {i}", self.label(tile));
        if self.product == WeightGradient {
            let depth = *self.shape.counts.iter().max().unwrap() as f64 + 1.0;
            for (i, got) in bytemuck::cast_slice::<u8, f32>(bytes).iter().enumerate() {
                let before = self.added_to.as_ref().map_or(0.0, |b| f64::from(b[i]));
                let want = self.want[i] + before;
                let bound = F32_ROUNDOFF * (depth * self.magnitude[i] + want.abs() + before.abs());
                errors.add(f64::from(*got), want, bound, place(i));
            }
            assert!(
                errors.relative() <= 1e-6,
                "{}: relative error {:.2e}",
                self.label(tile),
                errors.relative()
            );
            return;
        }
        let (width, depth) = if self.product == Forward {
            (n, k)
        } else {
            (k, n)
        };
        let (written, rest) = bytes.split_at(self.shape.rows() * width * 2);
        assert!(
            rest.iter().all(|&b| b == POISON),
            "{}: rows past the last expert were written",
            self.label(tile)
        );
        for (i, got) in bytemuck::cast_slice::<u8, bf16>(written).iter().enumerate() {
            let sum = F32_ROUNDOFF * depth as f64 * self.magnitude[i];
            let bound = half_ulp_bf16(self.want[i].abs() + sum) + sum;
            errors.add(got.to_f64(), self.want[i], bound, place(i));
        }
        // The root mean square of rounding to 8 bits is 1.6e-3 of the value.
        assert!(
            errors.relative() <= 2e-3,
            "{}: relative error {:.2e}",
            self.label(tile),
            errors.relative()
        );
    }
}
