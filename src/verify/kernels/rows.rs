//! Checks row-wise arithmetic, column sums and gated rows (`kernels/rows.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::operands::exact;
use super::{BOTH, Buffer, Case, Problem, bind, each, launch_of, pairs, values};
use crate::kernels::{ColumnSums, GatedRows, GatedRowsBackward, RowArithmetic};
use half::bf16;

/// Buffers: out (or a, changed), a, b.
fn arithmetic(rows: usize, width: usize, one_row: bool, multiply: bool, in_place: bool) -> Problem {
    let mut random = Random((rows * width) as u64);
    let a = random.normals_bf16(rows * width);
    let b_rows = if one_row { 1 } else { rows };
    let b = random.normals_bf16(b_rows * width);
    let first = Buffer::added_to("out", &a, in_place);
    Problem {
        label: format!(
            "{rows} rows of {width}, one row {one_row}, multiply {multiply}, in place {in_place}"
        ),
        buffers: vec![first, Buffer::input("a", &a), Buffer::input("b", &b)],
        launch: launch_of!(RowArithmetic {
            out, a = (if in_place { "out" } else { "a" }), b;
            rows, b_rows, width, multiply,
        }),
        judge: Box::new(move |out| {
            Errors::within("element", &values::<bf16>(&out[0]), |i| {
                let (a, b) = (exact(a[i]), exact(b[i % b.len()]));
                let want = if multiply { a * b } else { a + b };
                (want, F32_ROUNDOFF * want.abs())
            })
        }),
    }
}

/// The sizes of a column sum: rows, pieces, width of a piece, columns before and after, runs; and the factors.
#[derive(Clone, Copy, Debug)]
struct Sums {
    rows: usize,
    pieces: usize,
    piece: usize,
    around: usize,
    runs: usize,
    y: bool,
    scales: bool,
}

/// Elements around the columns are NaN. Buffers: parts, x, y, scales.
fn column_sums(s: Sums) -> Problem {
    let mut random = Random((s.rows * s.piece + s.runs) as u64);
    let (width, pitch) = (s.pieces * s.piece, s.pieces * s.piece + 2 * s.around);
    let mut matrix = || {
        let mut m = random.normals_bf16(s.rows * pitch);
        for row in m.chunks_mut(pitch) {
            row[..s.around].fill(bf16::NAN);
            row[s.around + width..].fill(bf16::NAN);
        }
        m
    };
    let (x, y) = (matrix(), matrix());
    let scales = random.normals(s.rows * s.pieces);
    Problem {
        label: format!("{s:?}"),
        buffers: vec![
            Buffer::output("parts", 4 * s.runs * width),
            Buffer::input("x", &x),
            Buffer::input("y", &y),
            Buffer::input("scales", &scales),
        ],
        launch: Box::new(move |p, stream| {
            bind!(p, ColumnSums {
                parts, scales if s.scales;
                x: p.named("x").input().from_element(s.around),
                y: s.y.then(|| p.named("y").input().from_element(s.around)),
                rows: s.rows, width, pitch, piece: s.piece, runs: s.runs,
            })
            .launch(stream)
        }),
        judge: Box::new(move |out| {
            let run = s.rows.div_ceil(s.runs);
            Errors::within("part", &values::<f32>(&out[0]), |i| {
                let (part, column) = (i / width, i % width);
                let rows = (part * run).min(s.rows)..((part + 1) * run).min(s.rows);
                let terms = rows.map(|row| {
                    let at = row * pitch + s.around + column;
                    let y = if s.y { exact(y[at]) } else { 1.0 };
                    let scale = scales[row * s.pieces + column / s.piece];
                    exact(x[at]) * y * if s.scales { f64::from(scale) } else { 1.0 }
                });
                let (sum, size) = sums(terms);
                (sum, (run + 4) as f64 * F32_ROUNDOFF * size)
            })
        }),
    }
}

/// Returns the sum of the products, and the sum of their magnitudes.
fn dot(a: &[bf16], b: &[bf16]) -> (f64, f64) {
    sums(a.iter().zip(b).map(|(&a, &b)| exact(a) * exact(b)))
}

/// Rows whose scores have unit scale. Buffers: y, gates, x, w, v.
fn gated(rows: usize, width: usize) -> Problem {
    let mut random = Random((rows * width + 1) as u64);
    let [x, v] = [(); 2].map(|()| random.normals_bf16(rows * width));
    let unit = |w: &bf16| bf16::from_f32(w.to_f32() / (width as f32).sqrt());
    let w: Vec<bf16> = random.normals_bf16(width).iter().map(unit).collect();
    Problem {
        label: format!("{rows} rows of {width}"),
        buffers: vec![
            Buffer::output("y", 2 * rows * width),
            Buffer::output("gates", 4 * rows),
            Buffer::input("x", &x),
            Buffer::input("w", &w),
            Buffer::input("v", &v),
        ],
        launch: launch_of!(GatedRows { y, gates, x, w, v; rows, width }),
        judge: Box::new(move |out| {
            let (y, gates): (Vec<bf16>, Vec<f32>) = (values(&out[0]), values(&out[1]));
            let mut errors = Errors::default();
            for (row, &found) in gates.iter().enumerate() {
                let at = row * width..(row + 1) * width;
                let (score, size) = dot(&x[at.clone()], &w);
                let gate = 1.0 / (1.0 + (-score).exp());
                // σ has a slope of at most 1/4, and has itself the error described in swiglu.cu.
                let error =
                    (width as f64 * size / 4.0 + (24.0 + 2.0 * score.abs()) * gate) * F32_ROUNDOFF;
                errors.add(f64::from(found), gate, error, || format!("gate {row}"))?;
                for i in at {
                    let (want, size) = (gate * exact(v[i]), exact(v[i]).abs());
                    let place = || format!("element {i}");
                    errors.add_bf16(y[i], want, (error + F32_ROUNDOFF) * size, place)?;
                }
            }
            Ok(errors)
        }),
    }
}

/// Buffers: dx, dv, dscores, dy, gates, v, w.
fn gated_backward(rows: usize, width: usize, accumulate: bool) -> Problem {
    let mut random = Random((rows * width + 2) as u64);
    let [before, dy, v] = [(); 3].map(|()| random.normals_bf16(rows * width));
    let w = random.normals_bf16(width);
    let gates: Vec<f32> = (0..rows).map(|_| random.unit() as f32).collect();
    Problem {
        label: format!("{rows} rows of {width}, accumulate {accumulate}"),
        buffers: vec![
            Buffer::added_to("dx", &before, accumulate),
            Buffer::output("dv", 2 * rows * width),
            Buffer::output("dscores", 4 * rows),
            Buffer::input("dy", &dy),
            Buffer::input("gates", &gates),
            Buffer::input("v", &v),
            Buffer::input("w", &w),
        ],
        launch: launch_of!(GatedRowsBackward {
            dx, dv, dscores, dy, gates, v, w;
            rows, width, accumulate,
        }),
        judge: Box::new(move |out| {
            let (dx, dv): (Vec<bf16>, Vec<bf16>) = (values(&out[0]), values(&out[1]));
            let dscores: Vec<f32> = values(&out[2]);
            let mut errors = Errors::default();
            for (row, &gate) in gates.iter().enumerate() {
                let at = row * width..(row + 1) * width;
                let gate = f64::from(gate);
                let (sum, size) = dot(&dy[at.clone()], &v[at.clone()]);
                let slope = gate * (1.0 - gate);
                let error = (width as f64 + 4.0) * F32_ROUNDOFF * gate * size;
                let want = slope * sum;
                let place = || format!("score {row}");
                errors.add(f64::from(dscores[row]), want, error, place)?;
                for (column, i) in at.enumerate() {
                    let place = || format!("element {i}");
                    let of_v = gate * exact(dy[i]);
                    errors.add_bf16(dv[i], of_v, F32_ROUNDOFF * of_v.abs(), place)?;
                    let old = if accumulate { exact(before[i]) } else { 0.0 };
                    let term = want * exact(w[column]);
                    let bound = error * exact(w[column]).abs()
                        + 2.0 * F32_ROUNDOFF * (term.abs() + old.abs());
                    errors.add_bf16(dx[i], old + term, bound, place)?;
                }
            }
            Ok(errors)
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let case = |launcher, problems| Case::small(launcher, "rows", problems);
    let kinds = [
        (false, false, false),
        (true, false, true),
        (true, true, false),
        (false, false, true),
    ];
    let sizes = [(1, 8), (67, 40), (13, 1408), (509, 264)];
    let arithmetic = each(
        pairs(sizes, kinds),
        |((rows, width), (one_row, multiply, in_place))| {
            arithmetic(rows, width, one_row, multiply, in_place)
        },
    );
    let sizes = [
        (1, 1, 8, 0, 1, false, false),
        (67, 1, 264, 0, 1, false, true),
        (300, 3, 64, 128, 2, true, true),
        (130, 2, 40, 8, 7, true, false),
        // A run without rows.
        (10, 1, 520, 0, 4, false, false),
        (2039, 1, 136, 0, 8, true, true),
    ];
    let sums = each(sizes, |(rows, pieces, piece, around, runs, y, scales)| {
        column_sums(Sums {
            rows,
            pieces,
            piece,
            around,
            runs,
            y,
            scales,
        })
    });
    let sizes = [(1, 8), (67, 40), (19, 1032), (300, 256)];
    let forward = each(sizes, |(rows, width)| gated(rows, width));
    let backward = each(pairs(sizes, BOTH), |((rows, width), add)| {
        gated_backward(rows, width, add)
    });
    vec![
        case("row_arithmetic", arithmetic),
        case("column_sums", sums),
        case("gated_rows", forward),
        case("gated_rows_backward", backward),
    ]
}
