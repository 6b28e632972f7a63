//! Checks the kernels for the scalars of the losses (`kernels/balance.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::{Buffer, Case, Problem, bind, each, launch_of, values};
use crate::kernels;
use crate::kernels::balance::{
    AuxiliaryLoss, AuxiliaryLossBackward, WeightedSum, WeightedSumBackward,
};

/// Compares with the sum of the terms in float64; the kernel rounds once.
fn judge_sum(out: &[u8], want: f64) -> Result<Errors, String> {
    let bound = 2.0 * F32_ROUNDOFF * want.abs() + 1e-37;
    Errors::within("sum", &values::<f32>(out), |_| (want, bound))
}

/// Compares with the products of one factor and each number, within a few roundings.
fn judge_products(out: &[u8], factor: f64, numbers: &[f32]) -> Result<Errors, String> {
    Errors::within("element", &values::<f32>(out), |i| {
        let want = factor * f64::from(numbers[i]);
        (want, 4.0 * F32_ROUNDOFF * want.abs())
    })
}

fn products(a: &[f32], b: &[f32]) -> impl Iterator<Item = f64> {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b))
}

/// Buffers: loss, mean, fractions; or dmean, dloss, fractions.
fn auxiliary(experts: usize, backward: bool) -> Problem {
    let mut random = Random(experts as u64 + 5);
    let mut shares = || -> Vec<f32> { (0..experts).map(|_| random.unit() as f32).collect() };
    let (mean, fractions) = (shares(), shares());
    let dloss = [-1.75f32];
    let buffers = match backward {
        true => vec![
            Buffer::output("dmean", 4 * experts),
            Buffer::input("dloss", &dloss),
        ],
        false => vec![Buffer::output("loss", 4), Buffer::input("mean", &mean)],
    };
    let fractions_buffer = Buffer::input("fractions", &fractions);
    Problem {
        label: format!("E {experts}"),
        buffers: buffers.into_iter().chain([fractions_buffer]).collect(),
        launch: match backward {
            true => launch_of!(AuxiliaryLossBackward { dmean, dloss, fractions; experts }),
            false => launch_of!(AuxiliaryLoss { loss, mean, fractions; experts }),
        },
        judge: Box::new(move |out| {
            let experts = experts as f64;
            match backward {
                true => judge_products(&out[0], experts * f64::from(dloss[0]), &fractions),
                false => judge_sum(&out[0], experts * products(&mean, &fractions).sum::<f64>()),
            }
        }),
    }
}

/// Buffers: out, coefficients, then a scalar for each term; or dout, coefficients, the terms' gradients.
fn weighted(count: usize, backward: bool) -> Problem {
    let mut random = Random(count as u64 + 9);
    let (coefficients, terms) = (random.normals(count), random.normals(count));
    let dout = [0.625f32];
    let mut buffers = vec![
        match backward {
            true => Buffer::input("dout", &dout),
            false => Buffer::output("out", 4),
        },
        Buffer::input("coefficients", &coefficients),
    ];
    buffers.extend(terms.iter().map(|term| match backward {
        true => Buffer::output("dterms", 4),
        false => Buffer::input("terms", &[*term]),
    }));
    Problem {
        label: format!("{count} terms"),
        buffers,
        launch: Box::new(move |p, stream| match backward {
            true => {
                let dterms = &p.all("dterms").map(kernels::Buffer::output).collect();
                bind!(p, WeightedSumBackward { dout, coefficients; dterms, count }).launch(stream)
            }
            false => {
                let terms = &p.all("terms").map(kernels::Buffer::input).collect();
                bind!(p, WeightedSum { out, coefficients; terms, count }).launch(stream)
            }
        }),
        judge: Box::new(move |out| match backward {
            true => judge_products(&out.concat(), f64::from(dout[0]), &coefficients),
            false => {
                // Terms may cancel, but the float64 sum has the same terms.
                let (want, size) = sums(products(&terms, &coefficients));
                let bound = F32_ROUNDOFF * want.abs() + 1e-13 * size;
                Errors::within("sum", &values::<f32>(&out[0]), |_| (want, bound))
            }
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    const EXPERTS: [usize; 6] = [1, 5, 8, 33, 64, 256];
    const TERMS: [usize; 5] = [1, 2, 9, 49, 128];
    let case = |launcher, problems| Case::small(launcher, "balance", problems);
    vec![
        case("auxiliary_loss", each(EXPERTS, |n| auxiliary(n, false))),
        case(
            "auxiliary_loss_backward",
            each(EXPERTS, |n| auxiliary(n, true)),
        ),
        case("weighted_sum", each(TERMS, |n| weighted(n, false))),
        case("weighted_sum_backward", each(TERMS, |n| weighted(n, true))),
    ]
}
