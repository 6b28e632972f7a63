//! Checks the sums of the parts of a weight gradient (`kernels/sum_parts.cu`) against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random, sums};
use super::{BOTH, Buffer, Case, Problem, each, launch_of, pairs, values};
use crate::kernels::sum_parts::SumParts;

/// Buffers: out, parts.
fn problem(count: usize, elements: usize, accumulate: bool) -> Problem {
    let mut random = Random((count * elements) as u64);
    let (before, parts) = (random.normals(elements), random.normals(count * elements));
    Problem {
        label: format!("{count} parts of {elements}, accumulate {accumulate}"),
        buffers: vec![
            Buffer::added_to("out", &before, accumulate),
            Buffer::input("parts", &parts),
        ],
        launch: launch_of!(SumParts { out, parts; count, elements, accumulate }),
        judge: Box::new(move |out| {
            Errors::within("element", &values::<f32>(&out[0]), |i| {
                let first = accumulate.then(|| before[i]);
                let parts = (0..count).map(|p| parts[p * elements + i]);
                let (sum, size) = sums(first.into_iter().chain(parts).map(f64::from));
                (sum, count as f64 * F32_ROUNDOFF * size)
            })
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    let sizes = [(1, 8), (3, 1000), (6, 4104), (8, 2048)];
    let problems = each(pairs(sizes, BOTH), |((count, elements), add)| {
        problem(count, elements, add)
    });
    vec![Case::small("sum_parts", "sum_parts", problems)]
}
