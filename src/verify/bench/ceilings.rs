//! Peak rates of the machine, measured in the same run as the cases; floors are computed from them.

use crate::error::Result;
use crate::tensor::cpu::{Accumulate, Mat, MatMut, gemm};
use crate::verify::bench::measure::{Clock, Plan, Wall, in_turn, interleaved};
use rayon::prelude::*;

/// Upper bounds of the rates of kernels.
#[derive(Clone, Debug, PartialEq)]
pub struct Ceilings {
    /// FLOP/s of a matrix product.
    pub flops: f64,
    /// Bytes per second that a copy reads and writes.
    pub bytes: f64,
    /// Description of how the rates were determined.
    pub of: String,
}

const PLAN: Plan = Plan {
    samples: 7,
    launches: 2,
};

fn seconds(clock: &dyn Clock, work: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    Ok(interleaved(clock, &mut [in_turn(1, work)], PLAN)?[0].seconds())
}

/// Measures the CPU: a 1024³ product of the GEMM crate on all threads, and a copy of 256 MB by all threads.
///
/// # Errors
/// When the clock returns an error.
pub fn of_cpu() -> Result<Ceilings> {
    const N: usize = 1024;
    let threads = rayon::current_num_threads();
    let a: Vec<f32> = (0..N * N).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
    let mut products = vec![vec![0f32; N * N]; threads];
    let product = seconds(&Wall, |_| {
        products.par_iter_mut().for_each(|c| {
            let out = MatMut::new(c, N, N);
            gemm(
                out,
                Accumulate::Assign,
                Mat::new(&a, N, N),
                Mat::new(&a, N, N),
            );
        });
        Ok(())
    })?;
    let from = vec![1f32; 1 << 26];
    let mut to = vec![0f32; from.len()];
    let part = from.len() / threads.max(1);
    let copy = seconds(&Wall, |_| {
        let parts = to.par_chunks_mut(part).zip(from.par_chunks(part));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })?;
    Ok(Ceilings {
        flops: 2.0 * (N * N * N * threads) as f64 / product,
        bytes: 8.0 * from.len() as f64 / copy,
        of: format!("a 1024³ product of the GEMM crate and a copy, on {threads} threads"),
    })
}

/// Measures the GPU: a bf16 8192³ product of cuBLASLt on random data, and a copy of 1 GiB on the device. Without cuBLAS,
/// the rate of products is that of [`Cost`](crate::kernels::cost::Cost).
///
/// # Errors
/// When there is not enough memory, or a launch fails.
#[cfg(feature = "cuda")]
pub fn of_gpu(gpu: &crate::device::cuda::Gpu) -> Result<Ceilings> {
    use super::cublas::batch;
    use super::inputs::Inputs;
    use crate::device::cublas::Matmul;
    use crate::device::machine::H200_FLOPS_PER_SECOND as FLOPS_PER_SECOND;
    use crate::verify::bench::measure::{Events, replayed};
    use crate::verify::kernels::grouped_gemm::{Product, Shape};
    const SIDE: usize = 8192;
    const BYTES: usize = 1 << 30;
    let clock = Events(gpu);
    let (from, to) = (gpu.allocate(BYTES)?, gpu.allocate(BYTES)?);
    let copy = seconds(&clock, |_| gpu.copy(to.address(), from.address(), BYTES))?;
    let bytes = 2.0 * BYTES as f64 / copy;
    let numbers = Inputs("ceiling").bf16("a", SIDE * SIDE, 1.0);
    let mut operands = [
        gpu.allocate(2 * SIDE * SIDE)?,
        gpu.allocate(2 * SIDE * SIDE)?,
    ];
    for operand in &mut operands {
        operand.write(0, bytemuck::cast_slice(&numbers))?;
    }
    let out = gpu.allocate(2 * SIDE * SIDE)?;
    let pointers = [&out, &operands[0], &operands[1]].map(|b| b.address() as *mut u8);
    let shape = Shape::new(&[SIDE], SIDE, SIDE);
    let matmul =
        batch(Product::Forward, &shape).and_then(|batch| Matmul::started(gpu, batch, &pointers));
    Ok(match &matmul {
        Ok((matmul, _cublas)) => {
            let mut side = [replayed(gpu, 1, |_| matmul.launch(gpu, &pointers))];
            let product = interleaved(&clock, &mut side, PLAN)?[0].seconds();
            Ceilings {
                flops: 2.0 * (SIDE as f64).powi(3) / product,
                bytes,
                of: "cuBLASLt's 8192³ product and a copy of 1 GiB".into(),
            }
        }
        Err(why) => Ceilings {
            flops: FLOPS_PER_SECOND,
            bytes,
            of: format!("790 TFLOP/s (not measured here: {why}) and a copy of 1 GiB"),
        },
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_cpu_multiplies_and_copies_faster_than_nothing() {
        let ceilings = super::of_cpu().unwrap();
        assert!(ceilings.flops > 1e8 && ceilings.bytes > 1e8, "{ceilings:?}");
    }
}
