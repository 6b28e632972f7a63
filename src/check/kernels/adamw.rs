//! The optimizer's update, the sum of squares of a gradient and the rounded weights (`kernels/adamw.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::{Buffer, Case, MakeProblem, Problem, exactly, values};
use crate::launch;

/// β₁, β₂, rate, second_scale, ε, keep, scale: a third step with clipping and decay.
const COEFFICIENTS: [f32; 7] = [0.9, 0.95, 2.2e-3, 7.01, 1e-8, 0.9996, 0.37];

fn normals(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.normal()).collect()
}

/// Buffers: w, m, v, gradient, coefficients.
fn update(count: usize) -> Problem {
    let mut random = Random(count as u64);
    let [w, m, g] = [0, 1, 2].map(|_| normals(&mut random, count));
    let v: Vec<f32> = normals(&mut random, count).iter().map(|x| x * x).collect();
    Problem {
        label: format!("N {count}"),
        buffers: vec![
            Buffer::changed("w", &w),
            Buffer::changed("m", &m),
            Buffer::changed("v", &v),
            Buffer::input("gradient", &g),
            Buffer::input("coefficients", &COEFFICIENTS),
        ],
        launch: Box::new(move |launchers, p, stream| {
            // SAFETY: every buffer has the size that the launcher's header states.
            unsafe {
                launch!(
                    launchers,
                    adamw_update(
                        p[0].cast(),
                        p[1].cast(),
                        p[2].cast(),
                        p[3].cast(),
                        p[4].cast(),
                        count as i64,
                        stream
                    )
                )
            }
        }),
        judge: Box::new(move |out| {
            let [beta1, beta2, rate, second_scale, eps, keep, scale] = COEFFICIENTS.map(f64::from);
            let got: [Vec<f32>; 3] = [0, 1, 2].map(|i| values(&out[i]));
            let mut errors = Errors::default();
            for i in 0..count {
                let g = f64::from(g[i]) * scale;
                // 1 − β is rounded to f32 too, as the reference does.
                let [more1, more2] = [COEFFICIENTS[0], COEFFICIENTS[1]].map(|b| f64::from(1.0 - b));
                let (a, b) = (beta1 * f64::from(m[i]), more1 * g);
                let second = beta2 * f64::from(v[i]) + more2 * g * g;
                let step = rate * (a + b) / ((second * second_scale).sqrt() + eps);
                let kept = keep * f64::from(w[i]);
                let terms = rate * (a.abs() + b.abs()) / ((second * second_scale).sqrt() + eps);
                let mut judge = |what: &str, got: f32, want: f64, size: f64| {
                    let place = || format!("{what} {i}");
                    errors.add(f64::from(got), want, size * F32_ROUNDOFF + 1e-44, place)
                };
                judge("m", got[1][i], a + b, 4.0 * (a.abs() + b.abs()))?;
                judge("v", got[2][i], second, 6.0 * second)?;
                judge("w", got[0][i], kept - step, 3.0 * kept.abs() + 14.0 * terms)?;
            }
            Ok(errors)
        }),
    }
}

/// Buffers: parts, gradient.
fn squares(count: usize) -> Problem {
    const PART: usize = 8192;
    let g = normals(&mut Random(3), count);
    Problem {
        label: format!("N {count}"),
        buffers: vec![
            Buffer::output("parts", count.div_ceil(PART) * 8),
            Buffer::input("gradient", &g),
        ],
        launch: Box::new(move |launchers, p, stream| {
            let mut parts = 0u64;
            // SAFETY: it writes one number.
            unsafe { launch!(launchers, square_parts(&mut parts, count as i64)) }?;
            assert_eq!(parts as usize, count.div_ceil(PART));
            // SAFETY: every buffer has the size that the launcher's header states.
            unsafe {
                launch!(
                    launchers,
                    square_sums(p[0].cast(), p[1].cast(), count as i64, stream)
                )
            }
        }),
        judge: Box::new(move |out| {
            let mut errors = Errors::default();
            for (i, (got, g)) in values::<f64>(&out[0])
                .into_iter()
                .zip(g.chunks(PART))
                .enumerate()
            {
                let want: f64 = g.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
                errors.add(got, want, 1e-12 * want, || format!("part {i}"))?;
            }
            Ok(errors)
        }),
    }
}

/// Buffers: r, w.
fn round(count: usize) -> Problem {
    let mut w = normals(&mut Random(4), count);
    // Ties, up and down, of both signs.
    for (i, bits) in [0x3f80_8000u32, 0xbf81_8000, 0x3f80_7fff, 0x0000_8000]
        .into_iter()
        .enumerate()
    {
        w[i % count] = f32::from_bits(bits);
    }
    Problem {
        label: format!("N {count}"),
        buffers: vec![Buffer::output("r", 2 * count), Buffer::input("w", &w)],
        launch: Box::new(move |launchers, p, stream| {
            // SAFETY: every buffer has the size that the launcher's header states.
            unsafe {
                launch!(
                    launchers,
                    round_weights(p[0].cast(), p[1].cast(), count as i64, stream)
                )
            }
        }),
        judge: Box::new(move |out| {
            exactly::<u16>("r", &out[0], |i| ((w[i].to_bits() + 0x8000) >> 16) as u16)
        }),
    }
}

pub fn cases() -> Vec<Case> {
    type Make = fn(usize) -> Problem;
    let kinds = [
        ("adamw_update", update as Make),
        ("square_sums", squares),
        ("round_weights", round),
    ];
    kinds
        .map(|(launcher, problem)| Case {
            name: format!("{launcher} small"),
            launcher,
            source: "adamw",
            problems: [1, 5, 2048, 8192, 20_011]
                .map(|count| Box::new(move || Ok(problem(count))) as MakeProblem)
                .into(),
            small: true,
        })
        .into()
}
