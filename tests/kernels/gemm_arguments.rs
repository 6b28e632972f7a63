//! The grouped GEMMs' host side: which tile a product gets, and what the launchers refuse.

use crate::support::refusals::{input, optional, output, stream};
use crate::support::schedules::{counted, table};
use routegrad::device::machine::H200_MULTIPROCESSORS;
use routegrad::kernels::bindings::*;
use routegrad::kernels::grouped_gemm::{self, Plan};
use routegrad::kernels::{GroupedGemmForward, GroupedGemmInputGradient, GroupedGemmWeightGradient};

const FORWARD: u32 = ROUTEGRAD_GEMM_FORWARD;
const INPUT_GRADIENT: u32 = ROUTEGRAD_GEMM_INPUT_GRADIENT;
const WEIGHT_GRADIENT: u32 = ROUTEGRAD_GEMM_WEIGHT_GRADIENT;

fn plan(product: u32, rows: usize, experts: usize, n: usize, k: usize) -> Plan {
    grouped_gemm::plan(
        table(),
        product,
        [rows, experts, n, k],
        H200_MULTIPROCESSORS,
    )
    .unwrap_or_else(|e| panic!("{e}"))
}

/// The products of the paper's expert layers at 16 Ki tokens: (rows, experts, n, k).
fn paper_layers() -> Vec<(usize, usize, usize, usize)> {
    let mut layers = vec![];
    for (hidden, width8) in [(512, 1408), (1024, 2816), (2048, 5632)] {
        for (experts, width, top_k) in [
            (8, width8, 1),
            (8, width8, 2),
            (32, width8 / 4, 1),
            (32, width8 / 4, 4),
        ] {
            layers.push((16384 * top_k, experts, 2 * width, hidden)); // gate and up
            layers.push((16384 * top_k, experts, hidden, width)); // down
        }
    }
    layers
}

#[test]
fn the_plan_is_a_pure_function_with_a_grid_that_fits() {
    for (rows, experts, n, k) in paper_layers() {
        for product in [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT] {
            let (first, second) = (
                plan(product, rows, experts, n, k),
                plan(product, rows, experts, n, k),
            );
            assert_eq!(format!("{first:?}"), format!("{second:?}"));
            assert!(
                1 <= first.blocks && first.blocks as usize <= H200_MULTIPROCESSORS,
                "{first:?}"
            );
            assert!(first.stages >= 3, "{first:?}");
            let floor =
                2.0 * rows as f64 * n as f64 * k as f64 / (4096.0 * H200_MULTIPROCESSORS as f64);
            assert!(
                first.clocks as f64 >= floor,
                "{first:?}: fewer clocks than the tensor cores need, {floor}"
            );
        }
    }
}

#[test]
fn the_plan_wastes_little_of_the_papers_layers() {
    for (rows, experts, n, k) in paper_layers() {
        for product in [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT] {
            let p = plan(product, rows, experts, n, k);
            let columns = if product == FORWARD { n } else { k };
            let computed = columns.next_multiple_of(p.tile_columns as usize);
            let waste = computed as f64 / columns as f64 - 1.0;
            assert!(
                waste <= 0.1,
                "product {product}, {rows} rows, n {n}, k {k}: {p:?} computes {computed} columns"
            );
        }
    }
}

#[test]
fn the_plan_is_what_it_was() {
    // One number per paper layer (routegrad_gemm_tile); a change of the estimate must be meant.
    let tile = |product, (rows, experts, n, k)| plan(product, rows, experts, n, k).tile;
    let layers = paper_layers();
    let chosen = |product| {
        layers
            .iter()
            .map(|&layer| tile(product, layer))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        chosen(FORWARD),
        [
            5, 1, 5, 1, 5, 5, 5, 5, 3, 1, 1, 1, 3, 1, 3, 1, 1, 1, 1, 1, 3, 1, 1, 1
        ]
    );
    assert_eq!(
        chosen(INPUT_GRADIENT),
        [
            1, 5, 1, 5, 1, 5, 1, 5, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 1, 1, 3, 1, 3
        ]
    );
    assert_eq!(
        chosen(WEIGHT_GRADIENT),
        [
            1, 4, 1, 4, 4, 4, 2, 4, 1, 1, 1, 1, 4, 4, 1, 1, 1, 1, 1, 1, 4, 4, 1, 2
        ]
    );
}

#[test]
fn a_small_problem_gets_no_more_blocks_than_tiles() {
    assert_eq!(plan(FORWARD, 1, 1, 8, 8).blocks, 1);
    assert_eq!(plan(WEIGHT_GRADIENT, 1, 3, 8, 8).blocks, 3);
}

/// The arguments of a weight gradient, or what the other products need of them.
#[derive(Clone)]
struct Call {
    out: usize,
    a: usize,
    b: usize,
    offsets: usize,
    a_index: usize,
    b_index: usize,
    rows: usize,
    a_rows: usize,
    b_rows: usize,
    experts: usize,
    n: usize,
    k: usize,
    tile: i32,
}

fn call(product: u32, c: &Call) -> routegrad::error::Result<()> {
    let (offsets, row_token) = (optional(c.offsets), optional(c.a_index));
    match product {
        FORWARD => GroupedGemmForward {
            out: output(c.out),
            x: input(c.a),
            w: input(c.b),
            offsets,
            row_token,
            rows: c.rows,
            x_rows: c.a_rows,
            experts: c.experts,
            n: c.n,
            k: c.k,
            tile: c.tile,
        }
        .launch(&stream()),
        INPUT_GRADIENT => GroupedGemmInputGradient {
            dx: output(c.out),
            dout: input(c.a),
            w: input(c.b),
            offsets,
            row_token,
            rows: c.rows,
            dout_rows: c.a_rows,
            experts: c.experts,
            n: c.n,
            k: c.k,
            tile: c.tile,
        }
        .launch(&stream()),
        _ => GroupedGemmWeightGradient {
            dw: output(c.out),
            dout: input(c.a),
            x: input(c.b),
            offsets,
            dout_row_token: row_token,
            x_row_token: optional(c.b_index),
            rows: c.rows,
            dout_rows: c.a_rows,
            x_rows: c.b_rows,
            experts: c.experts,
            n: c.n,
            k: c.k,
            accumulate: false,
            tile: c.tile,
        }
        .launch(&stream()),
    }
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let room = [0u128; 16];
    let good = room.as_ptr() as usize;
    let valid = Call {
        out: good,
        a: good,
        b: good,
        offsets: good,
        a_index: 0,
        b_index: 0,
        rows: 4,
        a_rows: 4,
        b_rows: 4,
        experts: 2,
        n: 16,
        k: 8,
        tile: 0,
    };
    let null = "is a null pointer";
    let misaligned = "is not 16-byte aligned";
    let range = "is outside what the kernel can do";
    let overflow = "makes a product of sizes overflow";
    let multiple = "is not a multiple of 8";
    // Per product, the names of: out, a, b, rows of a.
    let products = [
        (FORWARD, ["out", "x", "w", "x_rows"]),
        (INPUT_GRADIENT, ["dx", "dout", "w", "dout_rows"]),
        (WEIGHT_GRADIENT, ["dw", "dout", "x", "dout_rows"]),
    ];
    for (product, [out, a, b, a_rows]) in products {
        let refused = |change: &dyn Fn(&mut Call), why: &str, name: &str| {
            let mut arguments = valid.clone();
            change(&mut arguments);
            let mut text = String::new();
            let launches =
                counted(|| text = call(product, &arguments).expect_err(name).to_string()).launches;
            assert!(
                text.contains(&format!("argument `{name}` {why}")),
                "{name} {why}: {text}"
            );
            assert_eq!(launches, 0, "{name}: something was launched");
        };
        refused(&|c| c.out = 0, null, out);
        refused(&|c| c.a = 0, null, a);
        refused(&|c| c.b = 0, null, b);
        refused(&|c| c.offsets = 0, null, "offsets");
        refused(&|c| c.out += 8, misaligned, out);
        refused(&|c| c.a += 2, misaligned, a);
        refused(&|c| c.b += 4, misaligned, b);
        refused(&|c| c.n = 20, multiple, "n");
        refused(&|c| c.k = 1, multiple, "k");
        refused(&|c| c.n = 0, range, "n");
        refused(&|c| c.k = 0, range, "k");
        refused(&|c| c.experts = 0, range, "experts");
        refused(&|c| c.rows = 0, range, "rows");
        refused(&|c| c.rows = 1 << 31, range, "rows");
        refused(&|c| c.a_rows = 3, range, a_rows);
        refused(&|c| c.tile = 8, range, "tile");
        refused(&|c| c.tile = -1, range, "tile");
        refused(&|c| (c.n, c.k) = (1 << 20, 1 << 20), overflow, "k");
        if product == WEIGHT_GRADIENT {
            refused(&|c| c.b_rows = 3, range, "x_rows");
            refused(
                &|c| (c.a_index, c.b_index) = (good, good),
                range,
                "x_row_token",
            );
            refused(
                &|c| c.tile = ROUTEGRAD_TILE_PINGPONG_128X176 as i32,
                range,
                "tile",
            );
            refused(
                &|c| (c.experts, c.n, c.k) = (1 << 16, 1 << 17, 1 << 17),
                overflow,
                "rows",
            );
        } else {
            refused(
                &|c| (c.rows, c.a_rows, c.n, c.k) = (1 << 30, 1 << 30, 1 << 16, 1 << 16),
                overflow,
                "rows",
            );
        }
    }
}
