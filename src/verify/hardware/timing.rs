//! Times a GEMM and cuBLAS ([`crate::verify::bench::measure`]) with random data; inputs are rotated so that they are not
//! in the L2 cache.

use crate::kernels::cost::Cost;
use crate::kernels::{GroupedGemmForward, GroupedGemmWeightGradient};
use crate::verify::bench::measure::HARDWARE_PLAN as PLAN;
use crate::verify::kernels::grouped_gemm::{Product, Shape};

/// A product with a shape of the core set.
pub struct TimedCase {
    /// Unique name.
    pub name: String,
    /// The product.
    pub product: Product,
    /// Rows of each group, and the widths of the weight.
    pub shape: Shape,
}

impl TimedCase {
    /// Returns the FLOPs of the product, and the bytes that must be moved once: operands and result.
    pub fn cost(&self) -> Cost {
        let Shape { n, k, ref counts } = self.shape;
        let (rows, experts) = (self.shape.rows(), counts.len());
        match self.product {
            Product::WeightGradient => GroupedGemmWeightGradient::cost(rows, experts, n, k, false),
            _ => GroupedGemmForward::cost(rows, experts, n, k),
        }
    }

    /// Returns the estimated seconds of the task: start, random inputs, the float64 reference of the sampled lines, and
    /// the runs.
    pub fn estimate(&self) -> f64 {
        let cost = self.cost();
        3.0 + cost.bytes * 2e-9 + cost.floor() * 8.0 * (PLAN.samples * PLAN.launches) as f64
    }
}

/// Returns the cases: dense 4096³ and 8192³, then the expert layers of 1.96b and 7.33b with 16,384 tokens and equal
/// groups.
pub fn cases() -> Vec<TimedCase> {
    let mut cases = Vec::new();
    for side in [4096, 8192] {
        for product in Product::ALL {
            let shape = Shape::new(&[side], side, side);
            cases.push(TimedCase {
                name: format!("{} dense {side}", product.launcher()),
                product,
                shape,
            });
        }
    }
    // The width of an expert with 8 experts; with 32 experts it is a quarter.
    for (model, hidden, width) in [("1.96b", 1024, 2816), ("7.33b", 2048, 5632)] {
        for (experts, top_k) in [(8, 1), (8, 2), (32, 4)] {
            let width = width * 8 / experts;
            for (matrix, n, k) in [("gate-up", 2 * width, hidden), ("down", hidden, width)] {
                for product in Product::ALL {
                    let shape = Shape::new(&vec![16_384 * top_k / experts; experts], n, k);
                    let name = format!("{} {model} {experts}c{top_k} {matrix}", product.launcher());
                    cases.push(TimedCase {
                        name,
                        product,
                        shape,
                    });
                }
            }
        }
    }
    cases
}

#[cfg(feature = "cuda")]
pub use gpu::time;

#[cfg(feature = "cuda")]
mod gpu {
    use super::{PLAN, TimedCase};
    use crate::device::cublas::{Cublas, Matmul};
    use crate::device::cuda::Gpu;
    use crate::device::machine::Chip;
    use crate::error::Result;
    use crate::kernels::bindings::{
        ROUTEGRAD_TILE_AUTO, ROUTEGRAD_TILE_COOPERATIVE_128X256,
        ROUTEGRAD_TILE_COOPERATIVE_256X128, ROUTEGRAD_TILE_COOPERATIVE_256X176,
        ROUTEGRAD_TILE_MMA_128X128, ROUTEGRAD_TILE_PINGPONG_128X128,
        ROUTEGRAD_TILE_PINGPONG_128X176, routegrad_gemm_tile,
    };
    use crate::verify::bench::cublas::batch;
    use crate::verify::bench::measure::{Events, Plan, Timing, in_turn, interleaved};
    use crate::verify::kernels::grouped_gemm::{self, Operands};
    use crate::verify::kernels::{Problem, Run};
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn name(tile: routegrad_gemm_tile) -> &'static str {
        match tile {
            ROUTEGRAD_TILE_COOPERATIVE_128X256 => "cooperative 128x256",
            ROUTEGRAD_TILE_COOPERATIVE_256X128 => "cooperative 256x128",
            ROUTEGRAD_TILE_COOPERATIVE_256X176 => "cooperative 256x176",
            ROUTEGRAD_TILE_PINGPONG_128X128 => "pingpong 128x128",
            ROUTEGRAD_TILE_PINGPONG_128X176 => "pingpong 128x176",
            ROUTEGRAD_TILE_MMA_128X128 => "mma 128x128",
            _ => "unnamed",
        }
    }

    /// Times `case`, after a check of the results of both sides.
    ///
    /// # Errors
    /// A text that names the side that failed and the reason.
    pub fn time(gpu: &Gpu, case: &TimedCase) -> Result<(String, Value), String> {
        let text = |e: crate::error::Error| e.to_string();
        let operands = Arc::new(Operands::sampled(case.product, &case.shape));
        let problem = grouped_gemm::problem(&operands, ROUTEGRAD_TILE_AUTO);
        // Enough sets of buffers that a set is no longer in the cache when it is used again.
        let cache = gpu.cache_bytes().map_err(text)? as f64;
        let sets = ((2.0 * cache / case.cost().bytes).ceil() as usize + 1).clamp(2, 12);
        let mut runs = (0..sets)
            .map(|_| Run::new(gpu, &problem))
            .collect::<Result<Vec<_>>>()
            .map_err(text)?;
        problem.judged(&runs[0].fresh_outputs()?)?;

        let peer = Cublas::open(gpu).and_then(|cublas| {
            let matmul = Matmul::new(&cublas, batch(case.product, &case.shape)?)?;
            Ok((cublas, matmul))
        });
        // cuBLAS may choose an algorithm that rounds partial sums: noted, not a failure of ours.
        let peer_differs = match &peer {
            Ok((_, matmul)) => judge_peer(gpu, &problem, &mut runs[0], matmul).err(),
            Err(_) => None,
        };
        let mut sides = vec![in_turn(sets, |set| runs[set].launch())];
        if let Ok((_, matmul)) = &peer {
            let launch = |set: usize| matmul.launch(gpu, &runs[set].pointers());
            sides.push(in_turn(sets, launch));
        }
        let timings = interleaved(&Events(gpu), &mut sides, PLAN).map_err(text)?;
        drop(sides);
        let mut tiles = serde_json::Map::new();
        for tile in case.product.tiles() {
            let problem = grouped_gemm::problem(&operands, tile);
            let side = in_turn(sets, |set| runs[set].launch_as(&problem));
            let timed = interleaved(
                &Events(gpu),
                &mut [side],
                Plan {
                    samples: PLAN.samples / 4,
                    ..PLAN
                },
            );
            tiles.insert(
                name(tile).into(),
                json!(timed.map_err(text)?[0].seconds() * 1e6),
            );
        }
        let (detail, mut measured) = report(gpu, case, &timings, peer.err());
        measured["microseconds_of_each_tile"] = tiles.into();
        measured["cublas_outside_bound"] = json!(peer_differs);
        Ok((detail, measured))
    }

    fn judge_peer(
        gpu: &Gpu,
        problem: &Problem,
        run: &mut Run,
        matmul: &Matmul,
    ) -> Result<(), String> {
        run.reset().map_err(|e| e.to_string())?;
        matmul
            .launch(gpu, &run.pointers())
            .map_err(|e| e.to_string())?;
        problem.judged(&run.outputs()?).map(|_| ())
    }

    fn report(
        gpu: &Gpu,
        case: &TimedCase,
        timings: &[Timing],
        no_peer: Option<String>,
    ) -> (String, Value) {
        // Of a GPU that is not in the table there are rates, but no floor.
        let floor = Chip::of_driver(&gpu.name).map(|chip| case.cost().floor_on(chip));
        let side = |timing: &Timing| {
            let seconds = timing.seconds();
            json!({
                "microseconds_of_each_pass": timing.passes.iter().map(|p| p.0 * 1e6).collect::<Vec<_>>(),
                "spread_of_each_pass": timing.passes.iter().map(|p| p.1).collect::<Vec<_>>(),
                "tflops": case.cost().flops / seconds / 1e12,
                "share_of_floor": floor.map(|floor| floor / seconds),
            })
        };
        let (ours, theirs) = (side(&timings[0]), timings.get(1).map(side));
        let ratio = theirs
            .as_ref()
            .and_then(|t| Some(ours["tflops"].as_f64()? / t["tflops"].as_f64()?));
        let mut detail = format!("{:.0} TFLOP/s", ours["tflops"].as_f64().unwrap_or(f64::NAN));
        match (&ratio, &no_peer) {
            (Some(ratio), _) => detail += &format!(", {ratio:.3} x cuBLAS"),
            (None, Some(why)) => detail += &format!(", no cuBLAS: {why}"),
            (None, None) => {}
        }
        let measured = json!({
            "ours": ours, "cublas": theirs, "ratio_to_cublas": ratio, "floor_microseconds": floor.map(|floor| floor * 1e6),
            "rows": case.shape.rows(), "experts": case.shape.counts.len(), "n": case.shape.n, "k": case.shape.k,
        });
        (detail, measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_are_those_of_the_papers_layers() {
        let case = |name: &str| cases().into_iter().find(|c| c.name == name).unwrap();
        let gate_up = case("grouped_gemm_forward 7.33b 8c1 gate-up");
        assert!(
            (gate_up.cost().floor() * 1e6 - 957.0).abs() < 1.0,
            "{}",
            gate_up.cost().floor()
        );
        assert_eq!(gate_up.shape.counts, [2048; 8]);
        assert_eq!(
            case("grouped_gemm_weight_gradient 1.96b 32c4 down").shape.n,
            1024
        );
    }
}
