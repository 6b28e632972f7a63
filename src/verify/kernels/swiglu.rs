//! Checks SwiGLU of dense layers (`kernels/swiglu.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::operands::exact;
use super::{Buffer, Case, Problem, each, launch_of, values};
use crate::kernels::{SwigluBackward, SwigluForward};
use half::bf16;

/// Returns the error bound of a product with this magnitude. σ and products are f32: two hardware approximations of 2 ulp
/// each, and one rounding for each other operation; the argument of exp has an error of |z| log₂e roundings. σ may be 0
/// below 2^-126, which it reaches at -126 ln 2.
fn error(magnitude: f64, gate: f64) -> f64 {
    let lost = if gate < -87.3 { magnitude } else { 0.0 };
    (24.0 + 2.0 * gate.abs()) * F32_ROUNDOFF * magnitude + lost + 1e-37
}

/// h is normal with a standard deviation of `spread`. Buffers: a, h; or dh, da, h.
fn problem(rows: usize, ffn: usize, spread: f32, backward: bool) -> Problem {
    let mut random = Random((rows * 31 + ffn) as u64);
    let mut h = random.normals_bf16(rows * 2 * ffn);
    h.iter_mut()
        .for_each(|v| *v = bf16::from_f32(spread * v.to_f32()));
    let da = random.normals_bf16(rows * ffn);
    let (output, input) = match backward {
        true => ("dh", Buffer::input("da", &da)),
        false => ("a", Buffer::workspace("none", 16)),
    };
    let bytes = if backward { 4 } else { 2 } * rows * ffn;
    Problem {
        label: format!("T {rows}, F {ffn}, spread {spread}"),
        buffers: vec![Buffer::output(output, bytes), input, Buffer::input("h", &h)],
        launch: match backward {
            true => launch_of!(SwigluBackward { dh, da, h; rows, ffn }),
            false => launch_of!(SwigluForward { a, h; rows, ffn }),
        },
        judge: Box::new(move |out| {
            let got: Vec<bf16> = values(&out[0]);
            let mut errors = Errors::default();
            let mut judge = |at: usize, want: f64, magnitude: f64, gate: f64| {
                let place = || format!("element {at}");
                errors.add_bf16(got[at], want, error(magnitude, gate), place)
            };
            for row in 0..rows {
                for column in 0..ffn {
                    let (at, at_a) = (2 * row * ffn + column, row * ffn + column);
                    let (gate, up) = (exact(h[at]), exact(h[at + ffn]));
                    let s = 1.0 / (1.0 + (-gate).exp());
                    if backward {
                        let d = exact(da[at_a]);
                        // 1 + gate (1 − σ) may cancel; the rounding applies to its terms.
                        let terms = (d * up * s).abs() * (1.0 + (gate * (1.0 - s)).abs());
                        judge(at, d * up * s * (1.0 + gate * (1.0 - s)), terms, gate)?;
                        judge(at + ffn, d * gate * s, (d * gate * s).abs(), gate)?;
                    } else {
                        judge(at_a, gate * s * up, (gate * s * up).abs(), gate)?;
                    }
                }
            }
            Ok(errors)
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let shapes = [
        (1, 8, 1.0),
        (67, 40, 4.0),
        (13, 1408, 1.0),
        (2039, 72, 20.0),
    ];
    let cases = [("swiglu_forward", false), ("swiglu_backward", true)];
    let of = |(launcher, backward)| {
        let problems = each(shapes, move |(rows, ffn, spread)| {
            problem(rows, ffn, spread, backward)
        });
        Case::small(launcher, "swiglu", problems)
    };
    cases.map(of).into()
}
