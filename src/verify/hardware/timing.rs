//! Times single kernels ([`crate::verify::bench::measure`]). A GEMM is compared with cuBLAS, with random data; inputs are
//! rotated so that they are not in the L2 cache. Attention is timed as in the benchmark, forward and backward, with the
//! shapes of the models.

use crate::device::Device;
use crate::error::Result;
use crate::kernels::cost::Cost;
use crate::verify::bench::case::{Case, Group, Work};
use crate::verify::bench::groups::{attention, timed_products};
use crate::verify::bench::measure::{HARDWARE_PLAN as PLAN, Timing};
use crate::verify::bench::timed;
use serde_json::{Value, json};

/// Returns the groups whose cases are timed. Attention: with as many key heads as query heads, as in the presets, and with
/// a quarter of them. Products: dense 4096³ and 8192³, then the expert layers of 1.96b and 7.33b with 16,384 tokens and
/// equal groups.
pub fn groups() -> Vec<Group> {
    let attention = [1, 4].into_iter().flat_map(attention);
    attention.chain(timed_products()).collect()
}

/// Returns the group with a case of this name.
pub fn group_of(case: &str) -> Option<Group> {
    let has_case = |group: &Group| {
        let cases = group.cases().unwrap_or_default();
        cases.iter().any(|c| c.name == case)
    };
    groups().into_iter().find(has_case)
}

/// Returns the estimated seconds of a task. For a product: start, random inputs, the float64 reference of the sampled
/// lines, and the runs.
pub fn estimate(group: &Group, case: &Case) -> f64 {
    let Work::Gemm { .. } = group.work else {
        return 4.0;
    };
    let cost = case.costs[0];
    3.0 + cost.bytes * 2e-9 + cost.floor() * 8.0 * (PLAN.samples * PLAN.launches) as f64
}

/// Returns one side of a timing in the format of a record.
fn side(timing: &Timing, flops: f64, floor: Option<f64>) -> Value {
    let seconds = timing.seconds();
    json!({
        "microseconds_of_each_pass": timing.passes.iter().map(|p| p.0 * 1e6).collect::<Vec<_>>(),
        "spread_of_each_pass": timing.passes.iter().map(|p| p.1).collect::<Vec<_>>(),
        "tflops": flops / seconds / 1e12,
        "share_of_floor": floor.map(|floor| floor / seconds),
    })
}

/// Times the case called `name` of a group of attention. Returns a sentence and the measurements; `None` if the group has
/// no such case.
///
/// # Errors
/// When it cannot run.
pub fn attention_of(group: &Group, name: &str, device: Device) -> Result<Option<(String, Value)>> {
    let mut found = None;
    timed::visit(
        group,
        device,
        &|case| case.name == name,
        &mut |mut ready| {
            let timings = ready.time()?;
            found = Some(attention_report(&ready.cases[0], &timings[0], ready.sets));
            Ok(())
        },
    )?;
    Ok(found)
}

fn attention_report(case: &Case, timing: &Timing, sets: usize) -> (String, Value) {
    let seconds = timing.seconds();
    let floor: f64 = case.costs.iter().map(Cost::floor).sum();
    let mut ours = side(timing, case.flops, Some(floor));
    ours["samples"] = timing.plan.samples.into();
    ours["launches"] = timing.plan.launches.into();
    let detail = format!(
        "{:.0} us, {:.0} TFLOP/s of the causal half, {:.0}% of the floor",
        seconds * 1e6,
        case.flops / seconds / 1e12,
        100.0 * floor / seconds
    );
    let measured = json!({
        "ours": ours, "floor_microseconds": floor * 1e6, "flops": case.flops, "bytes": case.bytes(), "sets": sets,
    });
    (detail, measured)
}

#[cfg(feature = "cuda")]
pub use gpu::product;

#[cfg(feature = "cuda")]
mod gpu {
    use super::{PLAN, side};
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
    use crate::kernels::cost::Cost;
    use crate::verify::bench::cublas::batch;
    use crate::verify::bench::measure::{Events, Plan, Timing, in_turn, interleaved};
    use crate::verify::bench::timed::rotated;
    use crate::verify::kernels::grouped_gemm::{self, Operands, Product, Shape};
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

    /// Times a product, after a check of the results of both sides.
    ///
    /// # Errors
    /// A text that names the side that failed and the reason.
    pub fn product(gpu: &Gpu, product: Product, shape: &Shape) -> Result<(String, Value), String> {
        let text = |e: crate::error::Error| e.to_string();
        let operands = Arc::new(Operands::sampled(product, shape));
        let problem = grouped_gemm::problem(&operands, ROUTEGRAD_TILE_AUTO);
        let cost = product.cost(shape);
        let sets = rotated(gpu.cache_bytes().map_err(text)?, cost.bytes);
        let mut runs = (0..sets)
            .map(|_| Run::new(gpu, &problem))
            .collect::<Result<Vec<_>>>()
            .map_err(text)?;
        problem.judged(&runs[0].fresh_outputs()?)?;

        let peer = Cublas::open(gpu).and_then(|cublas| {
            let matmul = Matmul::new(&cublas, batch(product, shape)?)?;
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
        let samples = PLAN.samples / 4;
        for tile in product.tiles() {
            let launch = grouped_gemm::launch(&operands, tile);
            let mut side = [in_turn(sets, |set| runs[set].launch_as(&launch))];
            let timed = interleaved(&Events(gpu), &mut side, Plan { samples, ..PLAN });
            let microseconds = timed.map_err(text)?[0].seconds() * 1e6;
            tiles.insert(name(tile).into(), json!(microseconds));
        }
        let (detail, mut measured) = report(gpu, cost, &timings, peer.err());
        measured["rows"] = shape.rows().into();
        measured["experts"] = shape.counts.len().into();
        measured["n"] = shape.n.into();
        measured["k"] = shape.k.into();
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
        cost: Cost,
        timings: &[Timing],
        no_peer: Option<String>,
    ) -> (String, Value) {
        // Of a GPU that is not in the table there are rates, but no floor.
        let floor = Chip::of_driver(&gpu.name).map(|chip| cost.floor_on(chip));
        let side = |timing: &Timing| side(timing, cost.flops, floor);
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
        });
        (detail, measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::attention::AttentionSizes;
    use crate::verify::bench::case::Set;

    #[test]
    fn floors_are_those_of_the_papers_layers() {
        let product = |name: &str| match group_of(name).map(|group| group.work) {
            Some(Work::Gemm { product, shape }) => (product.cost(&shape).floor(), shape),
            other => panic!("{other:?}"),
        };
        let (floor, shape) = product("grouped_gemm_forward 7.33b 8c1 gate-up");
        assert!((floor * 1e6 - 957.0).abs() < 1.0, "{floor}");
        assert_eq!(shape.counts, [2048; 8]);
        let (_, shape) = product("grouped_gemm_weight_gradient 1.96b 32c4 down");
        assert_eq!(shape.n, 1024);
    }

    #[test]
    fn a_case_is_timed_on_the_simulator_and_reported_in_causal_flops() {
        let sizes = AttentionSizes {
            sequences: 1,
            sequence: 128,
            heads: 4,
            key_value_heads: 1,
            width: 64,
        };
        let group = Group {
            name: "128 x 64 grouped 4 on 1".into(),
            set: Set::Core,
            work: Work::Attention(sizes),
        };
        let time = |name: &str| attention_of(&group, name, Device::Sim).unwrap();
        for (direction, products) in [("forward", 2.0), ("backward", 5.0)] {
            let name = format!("attention_{direction} {}", group.name);
            let (detail, measured) = time(&name).unwrap();
            assert!(detail.contains("of the causal half"), "{detail}");
            let flops = products * 4.0 * 128.0 * 128.0 * 64.0;
            assert_eq!(measured["flops"], flops, "{name}");
            let passes = measured["ours"]["microseconds_of_each_pass"].as_array();
            assert_eq!(passes.map(Vec::len), Some(2));
        }
        assert!(time("attention_forward").is_none());
        assert!(group_of("attention_forward of nothing").is_none());
    }
}
