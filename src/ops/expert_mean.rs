//! Per-expert mean of the experts' outputs and the moving average of it: the default vectors.
//!
//! Over the rows r of expert i, with outputs `e [R, D]` and weights `a_r` (the router's probability, or 1):
//! `sum_i = Σ_r a_r e_r`, `mass_i = Σ_r a_r`; mean `m_i = sum_i / mass_i`. `ê_i ← β ê_i + (1 − β) m_i` (Default MoE,
//! eq. 10); an expert without rows keeps its ê. Sums and masses are added over ranks before the division. On a single
//! rank, a device computes them and the average in one launch. Nothing here is differentiable.

use super::dispatch::Dispatch;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::bindings::{
    ROUTEGRAD_WEIGHTING_COUNT, ROUTEGRAD_WEIGHTING_PLAIN, ROUTEGRAD_WEIGHTING_SUM_P,
    routegrad_weighting,
};
use crate::kernels::{self, ExpertMean, ExpertMeanUpdate, Stream};
use crate::tensor::Tensor;
use crate::tensor::dtype::{DType, Real};
use crate::with_real;
use rayon::prelude::*;

/// The weight of a row, and the divisor of the sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// Every row has weight 1: the unweighted mean.
    Plain,
    /// The weight of a row is its probability; the sum is divided by the sum of the probabilities.
    BySumOfProbabilities,
    /// The weight of a row is its probability; the sum is divided by the number of rows.
    ByCount,
}

/// Sums over the rows of every expert, for one micro-batch of this rank or of all ranks.
pub struct ExpertSums {
    held: Held,
    weighting: Weighting,
}

enum Held {
    Sums {
        /// `Σ_r a_r e_r [E, D]`: f64 on the CPU, f32 on devices with kernels.
        sums: Tensor,
        /// `Σ_r p_r` and the number of rows, `[E, 2]`.
        masses: Tensor,
    },
    Partials(Partials),
}

/// The inputs of the sums on a device with kernels.
struct Partials {
    /// `Σ_r a_r e_r` of each block of 64 rows, as written by the kernel of the down projection.
    column_sums: Tensor,
    /// `[T, E]`.
    gates: Tensor,
    offsets: Tensor,
    row_token: Tensor,
    rows: usize,
}

impl ExpertSums {
    /// Returns the sums of the rows `outputs [R, D]`, on the CPU.
    ///
    /// # Errors
    /// Returns an error when shapes or dtypes do not fit.
    pub fn of_rows(
        outputs: &Tensor,
        gates: &Tensor,
        weighting: Weighting,
        dispatch: &Dispatch,
    ) -> Result<Self> {
        let selection = dispatch.selection();
        let (experts, width) = (selection.num_experts(), outputs.shape().width());
        let shape = [dispatch.num_rows(), width];
        outputs.expect_shape("expert_mean", "expert outputs", shape)?;
        gates.expect_shape("expert_mean", "gates", [selection.num_tokens(), experts])?;
        gates.expect_dtype("expert_mean", "gates", outputs.dtype())?;
        with_real!(outputs.dtype(), "expert_mean", |T| {
            let weight = |row: usize, expert: usize| match weighting {
                Weighting::Plain => T::of(1.0),
                _ => gates.slice::<T>()[dispatch.token(row) * experts + expert],
            };
            let (sums, masses) = reference::sums(outputs.slice::<T>(), weight, dispatch, width);
            let held = Held::Sums {
                sums: Tensor::from_slice([experts, width], &sums),
                masses: Tensor::from_slice([experts, 2], &masses),
            };
            Ok(ExpertSums { held, weighting })
        })
    }

    /// Returns the sums, on a device with kernels, of the partial sums that the kernel of the down projection wrote,
    /// one per block of 64 rows (`kernels/grouped_down.cu`). They are computed when first needed.
    ///
    /// # Errors
    /// Returns an error when the maps of the dispatch cannot be built on the device.
    pub fn of_partials(
        partials: &Tensor,
        gates: &Tensor,
        weighting: Weighting,
        dispatch: &Dispatch,
    ) -> Result<Self> {
        let maps = dispatch.maps(partials.device())?;
        let held = Held::Partials(Partials {
            column_sums: partials.clone(),
            gates: gates.clone(),
            offsets: maps.offsets.clone(),
            row_token: maps.row_token.clone(),
            rows: dispatch.num_rows().max(1),
        });
        Ok(ExpertSums { held, weighting })
    }

    /// Adds the sums of the other ranks. `sum` replaces a tensor by its sum over all ranks.
    ///
    /// # Errors
    /// The errors of `sum`, and an error when a kernel fails.
    pub fn over_ranks(self, sum: impl Fn(&mut Tensor) -> Result<()>) -> Result<Self> {
        let (mut sums, mut masses) = match self.held {
            Held::Sums { sums, masses } => (sums, masses),
            Held::Partials(partials) => partials.sums()?,
        };
        sum(&mut sums)?;
        sum(&mut masses)?;
        Ok(ExpertSums {
            held: Held::Sums { sums, masses },
            weighting: self.weighting,
        })
    }

    /// `average ← β average + (1 − β) m` for the experts that have rows, where m is their mean output.
    ///
    /// # Errors
    /// Returns an error when the shapes differ, or a kernel fails.
    pub fn update(&self, average: &mut Tensor, beta: f64) -> Result<()> {
        let (sums, masses) = match &self.held {
            Held::Sums { sums, masses } => (sums, masses),
            Held::Partials(partials) => return partials.update(average, self.weighting, beta),
        };
        average.expect_shape("expert_mean", "average", sums.shape())?;
        if average.device() == Device::Cpu {
            return with_real!(average.dtype(), "expert_mean", |T| {
                let (sums, masses) = (sums.slice(), masses.slice());
                reference::update::<T>(average.slice_mut(), sums, masses, self.weighting, beta);
                Ok(())
            });
        }
        let (experts, hidden) = (average.shape()[0], average.shape()[1]);
        let stream = Stream::of(average.device())?;
        let beta = Tensor::constant(average.device(), [1], &[beta as f32]);
        ExpertMeanUpdate {
            average: average.output()?,
            sums: sums.input()?,
            masses: masses.input()?,
            beta: beta.input()?,
            experts,
            hidden,
            weighting: self.weighting.kernel() as i32,
        }
        .launch(&stream)
    }
}

impl Partials {
    /// Returns E and D.
    fn sizes(&self) -> [usize; 2] {
        [self.gates.shape().width(), self.column_sums.shape().width()]
    }

    /// Returns the sums and the masses.
    fn sums(&self) -> Result<(Tensor, Tensor)> {
        let device = self.gates.device();
        let [experts, hidden] = self.sizes();
        let mut sums = Tensor::unspecified(device, DType::F32, [experts, hidden]);
        let mut masses = Tensor::unspecified(device, DType::F32, [experts, 2]);
        kernels::ExpertSums {
            sums: sums.output()?,
            masses: masses.output()?,
            column_sums: self.column_sums.input()?,
            gates: Some(self.gates.input()?),
            offsets: self.offsets.input()?,
            row_token: self.row_token.input()?,
            rows: self.rows,
            tokens: self.gates.shape().rows(),
            experts,
            hidden,
        }
        .launch(&Stream::of(device)?)?;
        Ok((sums, masses))
    }

    fn update(&self, average: &mut Tensor, weighting: Weighting, beta: f64) -> Result<()> {
        let device = average.device();
        let [experts, hidden] = self.sizes();
        average.expect_shape("expert_mean", "average", [experts, hidden])?;
        let beta = Tensor::constant(device, [1], &[beta as f32]);
        ExpertMean {
            average: average.output()?,
            column_sums: self.column_sums.input()?,
            gates: Some(self.gates.input()?),
            offsets: self.offsets.input()?,
            row_token: self.row_token.input()?,
            beta: beta.input()?,
            rows: self.rows,
            tokens: self.gates.shape().rows(),
            experts,
            hidden,
            weighting: weighting.kernel() as i32,
        }
        .launch(&Stream::of(device)?)
    }
}

/// Returns `factor` times the default vectors. On a device with kernels this is computed as a moving average of the
/// vectors with zeros, so it needs no separate kernel. `changes` says that the factor differs in every step, so that
/// the device does not keep a copy of it.
///
/// # Errors
/// Returns an error when the tensor is not real, or a kernel fails.
pub fn scaled(vectors: &Tensor, factor: f64, changes: bool) -> Result<Tensor> {
    let (device, mut scaled) = (vectors.device(), vectors.clone());
    if device == Device::Cpu {
        with_real!(scaled.dtype(), "expert_mean", |T| {
            let values = scaled.slice_mut::<T>().iter_mut();
            values.for_each(|v| *v *= T::of(factor));
            Ok::<(), Error>(())
        })?;
        return Ok(scaled);
    }
    let beta = [factor as f32];
    let beta = match changes {
        true => Tensor::from_slice([1], &beta).on(device),
        false => Tensor::constant(device, [1], &beta),
    };
    let (experts, hidden) = (vectors.shape()[0], vectors.shape()[1]);
    ExpertMeanUpdate {
        average: scaled.output()?,
        sums: Tensor::constant(device, vectors.shape(), &vec![0f32; vectors.elements()]).input()?,
        masses: Tensor::constant(device, [experts, 2], &vec![1f32; 2 * experts]).input()?,
        beta: beta.input()?,
        experts,
        hidden,
        weighting: Weighting::Plain.kernel() as i32,
    }
    .launch(&Stream::of(device)?)?;
    Ok(scaled)
}

impl Weighting {
    fn kernel(self) -> routegrad_weighting {
        match self {
            Weighting::Plain => ROUTEGRAD_WEIGHTING_PLAIN,
            Weighting::BySumOfProbabilities => ROUTEGRAD_WEIGHTING_SUM_P,
            Weighting::ByCount => ROUTEGRAD_WEIGHTING_COUNT,
        }
    }
}

mod reference {
    use super::*;

    /// Returns `Σ a_r e_r [E, D]` and (`Σ a_r`, number of rows) per expert. The rows of a block are summed in `T`,
    /// the blocks in f64.
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

    pub fn update<T: Real>(
        average: &mut [T],
        sums: &[f64],
        masses: &[f64],
        weighting: Weighting,
        beta: f64,
    ) {
        let width = sums.len() / (masses.len() / 2);
        let experts = average.chunks_mut(width).zip(sums.chunks(width));
        for ((average, sums), mass) in experts.zip(masses.chunks(2)) {
            let (mass, count) = (mass[0], mass[1]);
            let divisor = match weighting {
                Weighting::ByCount => count,
                _ => mass,
            };
            // There are no rows, or all their weights are 0: there is no mean.
            if divisor == 0.0 {
                continue;
            }
            for (a, s) in average.iter_mut().zip(sums) {
                *a = T::of(beta) * *a + T::of(1.0 - beta) * T::of(s / divisor);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::dispatch::Selection;

    /// Tokens 0 and 1 chose expert 0 with p = 1/4 and 3/4, none chose expert 1.
    /// e_0(x_0) = (4, 0), e_0(x_1) = (0, 8).
    fn updated(weighting: Weighting, start: [f64; 4], beta: f64) -> Vec<f64> {
        let dispatch = Dispatch::new(Selection::new(2, 2, |_, c| c.push(0)).unwrap());
        let outputs = Tensor::from_slice([2, 2], &[4.0, 0.0, 0.0, 8.0]);
        let gates = Tensor::from_slice([2, 2], &[0.25, 0.75, 0.75, 0.25]);
        let sums = ExpertSums::of_rows(&outputs, &gates, weighting, &dispatch).unwrap();
        let mut average = Tensor::from_slice([2, 2], &start);
        let sums = sums.over_ranks(|_| Ok(())).unwrap();
        sums.update(&mut average, beta).unwrap();
        average.to_f64().unwrap()
    }

    #[test]
    fn means_worked_by_hand_in_all_three_weightings() {
        let mean = |weighting| updated(weighting, [0.0; 4], 0.0);
        assert_eq!(mean(Weighting::Plain), [2.0, 4.0, 0.0, 0.0]);
        // (1/4 (4, 0) + 3/4 (0, 8)) / 1, and / 2.
        assert_eq!(mean(Weighting::BySumOfProbabilities), [1.0, 6.0, 0.0, 0.0]);
        assert_eq!(mean(Weighting::ByCount), [0.5, 3.0, 0.0, 0.0]);
    }

    #[test]
    fn an_expert_without_tokens_keeps_its_default_vector() {
        let found = updated(Weighting::Plain, [1.0, 1.0, 5.0, 7.0], 0.75);
        assert_eq!(found, [1.25, 1.75, 5.0, 7.0]);
    }

    #[test]
    fn a_scaled_tensor_is_its_multiple_and_the_tensor_stays() {
        let tensor = Tensor::from_slice([2, 2], &[1.0f32, -2.0, 0.5, 4.0]);
        for factor in [0.0, 0.25, 1.5] {
            let found = scaled(&tensor, factor, false).unwrap();
            assert_eq!(found.shape(), tensor.shape());
            let expected: Vec<f64> = tensor
                .to_f64()
                .unwrap()
                .iter()
                .map(|x| factor * x)
                .collect();
            assert_eq!(found.to_f64().unwrap(), expected);
        }
        assert_eq!(tensor.to_f64().unwrap(), [1.0, -2.0, 0.5, 4.0]);
    }
}
