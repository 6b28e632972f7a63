//! Per-expert mean of the experts' outputs and the moving average of it: the default vectors.
//!
//! Over the rows r of expert i, with outputs `e [R, D]` and weights `a_r` (the router's probability,
//! or 1): `sum_i = Σ_r a_r e_r`, `mass_i = Σ_r a_r`; mean `m_i = sum_i / mass_i`.
//! `ê_i ← β ê_i + (1 − β) m_i` (Default MoE, eq. 10); an expert without rows keeps its ê.
//! Sums and masses are added over ranks before the division. Nothing here is differentiable.

use super::dispatch::Dispatch;
use crate::dist::Collective;
use crate::dtype::Real;
use crate::error::Result;
use crate::tensor::Tensor;
use crate::with_real;
use rayon::prelude::*;

/// What a row counts, and what the sum is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// Every row counts 1: the plain mean.
    Plain,
    /// A row counts its probability; divided by the sum of the probabilities.
    BySumOfProbabilities,
    /// A row counts its probability; divided by the number of rows.
    ByCount,
}

/// The mean output of every expert over all ranks: `m [E, D]`, and how many rows each is the mean
/// of; where that is 0, `m` holds zeros.
///
/// # Errors
/// When shapes or dtypes do not fit.
pub fn expert_mean(
    outputs: &Tensor,
    gates: &Tensor,
    weighting: Weighting,
    dispatch: &Dispatch,
    dist: &dyn Collective,
) -> Result<(Tensor, Vec<usize>)> {
    let selection = dispatch.selection();
    let (experts, width) = (selection.num_experts(), outputs.shape().width());
    outputs.expect_shape(
        "expert_mean",
        "expert outputs",
        [dispatch.num_rows(), width],
    )?;
    gates.expect_shape("expert_mean", "gates", [selection.num_tokens(), experts])?;
    gates.expect_dtype("expert_mean", "gates", outputs.dtype())?;
    let mut mean = Tensor::zeros(outputs.device(), outputs.dtype(), [experts, width]);
    with_real!(outputs.dtype(), "expert_mean", |T| {
        let weight = |row: usize, expert: usize| match weighting {
            Weighting::Plain => T::of(1.0),
            _ => gates.slice::<T>()[dispatch.token(row) * experts + expert],
        };
        let (mut sums, mut totals) = reference::sums(outputs.slice::<T>(), weight, dispatch, width);
        if dist.size() > 1 {
            dist.sum(&mut sums);
            dist.sum(&mut totals);
        }
        let mean = mean.slice_mut::<T>();
        let mut rows = Vec::with_capacity(experts);
        for (e, total) in totals.chunks(2).enumerate() {
            let (mass, count) = (total[0], total[1]);
            let divisor = if weighting == Weighting::ByCount {
                count
            } else {
                mass
            };
            rows.push(count as usize);
            if count > 0.0 {
                let sums = &sums[e * width..(e + 1) * width];
                for (m, s) in mean[e * width..(e + 1) * width].iter_mut().zip(sums) {
                    *m = T::of(s / divisor);
                }
            }
        }
        Ok(rows)
    })
    .map(|rows| (mean, rows))
}

/// `average ← β average + (1 − β) mean` for the experts with rows.
///
/// # Errors
/// When shapes or dtypes differ.
pub fn update_average(
    average: &mut Tensor,
    mean: &Tensor,
    rows: &[usize],
    beta: f64,
) -> Result<()> {
    mean.expect_shape("expert_mean", "mean", average.shape())?;
    mean.expect_dtype("expert_mean", "mean", average.dtype())?;
    let width = mean.shape().width();
    with_real!(mean.dtype(), "expert_mean", |T| {
        let average = average.slice_mut::<T>().chunks_mut(width);
        let pairs = average.zip(mean.slice::<T>().chunks(width));
        for ((average, mean), _) in pairs.zip(rows).filter(|(_, rows)| **rows > 0) {
            for (a, &m) in average.iter_mut().zip(mean) {
                *a = T::of(beta) * *a + T::of(1.0 - beta) * m;
            }
        }
        Ok(())
    })
}

mod reference {
    use super::*;

    /// `Σ a_r e_r [E, D]` and (`Σ a_r`, rows) per expert. Blocks of rows are summed in `T`, blocks
    /// in f64.
    pub fn sums<T: Real>(
        outputs: &[T],
        weight: impl Fn(usize, usize) -> T + Sync,
        dispatch: &Dispatch,
        width: usize,
    ) -> (Vec<f64>, Vec<f64>) {
        const BLOCK: usize = 64;
        let experts = dispatch.selection().num_experts();
        let partials: Vec<(Vec<T>, T)> = dispatch
            .row_blocks(BLOCK)
            .into_par_iter()
            .map(|(e, rows)| {
                let (mut sum, mut mass) = (vec![T::zero(); width], T::zero());
                for r in rows {
                    let a = weight(r, e);
                    mass += a;
                    for (s, &o) in sum.iter_mut().zip(&outputs[r * width..(r + 1) * width]) {
                        *s += a * o;
                    }
                }
                (sum, mass)
            })
            .collect();
        let mut sums = vec![0.0; experts * width];
        let mut totals = vec![0.0; experts * 2];
        for ((e, rows), (sum, mass)) in dispatch.row_blocks(BLOCK).into_iter().zip(partials) {
            for (s, p) in sums[e * width..(e + 1) * width].iter_mut().zip(sum) {
                *s += p.f64();
            }
            totals[2 * e] += mass.f64();
            totals[2 * e + 1] += rows.len() as f64;
        }
        (sums, totals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::SingleRank;
    use crate::ops::dispatch::Selection;

    /// Tokens 0 and 1 chose expert 0 with p = 1/4 and 3/4, none chose expert 1.
    /// e_0(x_0) = (4, 0), e_0(x_1) = (0, 8).
    fn mean(weighting: Weighting) -> (Vec<f64>, Vec<usize>) {
        let dispatch = Dispatch::new(Selection::new(2, 2, |_, c| c.push(0)).unwrap());
        let outputs = Tensor::from_slice([2, 2], &[4.0, 0.0, 0.0, 8.0]);
        let gates = Tensor::from_slice([2, 2], &[0.25, 0.75, 0.75, 0.25]);
        let (m, rows) = expert_mean(&outputs, &gates, weighting, &dispatch, &SingleRank).unwrap();
        (m.to_f64().unwrap(), rows)
    }

    #[test]
    fn means_worked_by_hand_in_all_three_weightings() {
        assert_eq!(
            mean(Weighting::Plain),
            (vec![2.0, 4.0, 0.0, 0.0], vec![2, 0])
        );
        // (1/4 (4, 0) + 3/4 (0, 8)) / 1, and / 2.
        assert_eq!(
            mean(Weighting::BySumOfProbabilities).0,
            [1.0, 6.0, 0.0, 0.0]
        );
        assert_eq!(mean(Weighting::ByCount).0, [0.5, 3.0, 0.0, 0.0]);
    }

    #[test]
    fn an_expert_without_tokens_keeps_its_default_vector() {
        let mut average = Tensor::from_slice([2, 2], &[1.0, 1.0, 5.0, 7.0]);
        let m = Tensor::from_slice([2, 2], &[2.0, 4.0, 0.0, 0.0]);
        update_average(&mut average, &m, &[2, 0], 0.75).unwrap();
        assert_eq!(average.slice::<f64>(), [1.25, 1.75, 5.0, 7.0]);
    }
}
