//! Checks RMSNorm of pieces of rows (`kernels/qk_norm.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::operands::exact;
use super::{Buffer, Case, Launch, Problem, bind, each, values};
use crate::kernels::{QkNorm, QkNormBackward};
use half::bf16;

const EPS: f32 = 1e-5;

/// Rows with pieces between other columns; without `weighted`, the pieces are copied.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    pieces: usize,
    width: usize,
    around: usize,
    weighted: bool,
}

impl Shape {
    fn pitch(&self) -> usize {
        self.pieces * self.width + 2 * self.around
    }
    fn start(&self, piece: usize) -> usize {
        let (row, within) = (piece / self.pieces, piece % self.pieces);
        row * self.pitch() + self.around + within * self.width
    }
}

/// Returns 1 / √(mean(x²) + ε).
fn scale(x: &[bf16]) -> f64 {
    let squares: f64 = x.iter().map(|&x| exact(x) * exact(x)).sum();
    (squares / x.len() as f64 + f64::from(EPS)).sqrt().recip()
}

fn launch(s: Shape, backward: bool) -> Launch {
    Box::new(move |p, stream| {
        let (rows, pieces, width, pitch) = (s.rows, s.pieces, s.width, s.pitch());
        let x = p.named("x").input().from_element(s.around);
        let out = p.named("y or dx").output().from_element(s.around);
        match backward {
            true => {
                let dy = p.named("dy").input().from_element(s.around);
                bind!(p, QkNormBackward {
                    scales if s.weighted, w if s.weighted;
                    dx: out, dy, x, rows, pieces, width, pitch,
                })
                .launch(stream)
            }
            false => bind!(p, QkNorm {
                scales if s.weighted, w if s.weighted;
                y: out, x, rows, pieces, width, pitch, eps: EPS,
            })
            .launch(stream),
        }
    })
}

/// Elements between the pieces must not change. Buffers: y or dx, scales, x, w, dy.
fn problem(s: Shape, backward: bool) -> Problem {
    let mut random = Random((s.rows * s.pitch()) as u64);
    let [before, x, dy] = [(); 3].map(|()| random.normals_bf16(s.rows * s.pitch()));
    let w = random.normals_bf16(s.width);
    let count = s.rows * s.pieces;
    let piece_of = move |i: usize| s.start(i)..s.start(i) + s.width;
    let scales: Vec<f32> = (0..count).map(|i| scale(&x[piece_of(i)]) as f32).collect();
    let scales_buffer = match (backward, s.weighted) {
        (false, true) => Buffer::output("scales", 4 * count),
        _ => Buffer::input("scales", &scales),
    };
    Problem {
        label: format!("{s:?}"),
        buffers: vec![
            Buffer::changed("y or dx", &before),
            scales_buffer,
            Buffer::input("x", &x),
            Buffer::input("w", &w),
            Buffer::input("dy", &dy),
        ],
        launch: launch(s, backward),
        judge: Box::new(move |out| {
            let got: Vec<bf16> = values(&out[0]);
            let mut errors = Errors::default();
            let roundings = (s.width + 8) as f64 * F32_ROUNDOFF;
            let mut seen = vec![false; got.len()];
            for (piece, &given) in scales.iter().enumerate() {
                let at = piece_of(piece);
                let r = match backward {
                    true => f64::from(given),
                    false => scale(&x[at.clone()]),
                };
                let product = |(i, w): (usize, &bf16)| exact(*w) * exact(dy[i]) * exact(x[i]);
                let (sum, size) = sums(at.clone().zip(&w).map(product));
                let [mean, size] = [sum, size].map(|sum| r * r * sum / s.width as f64);
                if !backward && s.weighted {
                    let found = f64::from(values::<f32>(&out[1])[piece]);
                    errors.add(found, r, roundings * r, || format!("scale {piece}"))?;
                }
                for (i, &w) in at.clone().zip(&w) {
                    seen[i] = true;
                    let (w, x, d) = (exact(w), exact(x[i]), exact(dy[i]));
                    let (want, error) = match (s.weighted, backward) {
                        (true, false) => (x * r * w, roundings * (x * r * w).abs()),
                        (true, true) => (
                            r * (w * d - x * mean),
                            r * (4.0 * F32_ROUNDOFF * (w * d).abs() + roundings * x.abs() * size),
                        ),
                        (false, true) => (d, 0.0),
                        (false, false) => (x, 0.0),
                    };
                    errors.add_bf16(got[i], want, error, || format!("element {i}"))?;
                }
            }
            let wrong = |&i: &usize| !seen[i] && got[i].to_bits() != before[i].to_bits();
            match (0..got.len()).find(wrong) {
                Some(i) => Err(format!("element {i} lies between pieces and was written")),
                None => Ok(errors),
            }
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let shape = |rows, pieces, width, around, weighted| Shape {
        rows,
        pieces,
        width,
        around,
        weighted,
    };
    let small = vec![
        shape(1, 1, 8, 0, true),
        shape(67, 3, 64, 64, true),
        shape(5, 2, 128, 8, false),
        shape(31, 1, 392, 128, true),
    ];
    let covering = vec![
        shape(509, 4, 64, 128, true),
        shape(130, 1, 2048, 256, true),
        shape(257, 2, 128, 0, false),
    ];
    let mut all = Vec::new();
    for (launcher, backward) in [("qk_norm", false), ("qk_norm_backward", true)] {
        let shapes = [small.clone(), covering.clone()];
        let problems = |shapes| each(shapes, move |s| problem(s, backward));
        all.extend(Case::both(launcher, "qk_norm", shapes, problems));
    }
    all
}
