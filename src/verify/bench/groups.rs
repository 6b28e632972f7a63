//! The groups of cases that the benchmark measures.

use super::case::{Group, Layer, Set, Work};
use super::inputs;
use super::operations::Operation;
use super::steps::Step;
use crate::kernels::attention::AttentionSizes;
use crate::verify::kernels::grouped_gemm::{Product, Shape};

/// Tokens of a micro-batch of the paper's models.
const TOKENS: usize = 16_384;

/// Returns every group, most important first.
pub fn groups() -> Vec<Group> {
    let mut all = core();
    all.extend(small());
    all.extend([step("1.96b", Set::Full, 64, &["topk", "default"])]);
    // Two of these models do not fit on one GPU at the same time.
    all.extend([step("7.33b", Set::Full, 64, &["topk"])]);
    all
}

fn step(
    preset: &'static str,
    set: Set,
    sequences: usize,
    routers: &'static [&'static str],
) -> Group {
    let experts = "8c1";
    Group {
        name: format!("{preset} {experts}"),
        set,
        work: Work::Step(Step {
            preset,
            experts,
            routers,
            sequences,
        }),
    }
}

fn gemms(name: &str, set: Set, shape: &Shape) -> Vec<Group> {
    let group = |product: Product| Group {
        name: format!("{} {name}", product.launcher()),
        set,
        work: Work::Gemm {
            product,
            shape: shape.clone(),
        },
    };
    Product::ALL.map(group).into()
}

/// Returns the paper's layers: name, D, F, E, K.
fn models() -> impl Iterator<Item = (String, usize, usize, usize, usize)> {
    let models = [("7.33b", 2048, 5632), ("1.96b", 1024, 2816)];
    models.into_iter().flat_map(|(model, hidden, width)| {
        // The width of an expert with 8 experts; with 32 experts it is a quarter.
        [(8, 1), (8, 2), (32, 4)].map(|(experts, top_k)| {
            let name = format!("{model} {experts}c{top_k}");
            (name, hidden, width * 8 / experts, experts, top_k)
        })
    })
}

/// Returns SonicMoE's published shapes: products and layers.
fn sonic() -> (Vec<Group>, Vec<Group>) {
    let (mut groups, mut layers) = (Vec::new(), Vec::new());
    // T, D, F, E, K.
    for (tokens, hidden, ffn, experts, top_k) in [
        (24_576, 1536, 256, 128, 8),
        (24_576, 1536, 512, 64, 4),
        (24_576, 1536, 1024, 32, 2),
        (32_768, 4096, 1024, 64, 4),
    ] {
        let counts = inputs::balanced(tokens * top_k, experts);
        let name = format!("sonic {hidden} x {ffn} {experts}c{top_k}");
        if ffn == 256 {
            let shape = Shape::new(&counts, 2 * ffn, hidden);
            groups.extend(gemms(&format!("{name} gate-up"), Set::Core, &shape));
        }
        let layer = Layer {
            tokens,
            hidden,
            ffn,
            top_k,
            counts,
        };
        layers.push(Group {
            name,
            set: Set::Core,
            work: Work::Layer(layer),
        });
    }
    (groups, layers)
}

fn core() -> Vec<Group> {
    let mut groups = Vec::new();
    let group = |name: String, work| Group {
        name,
        set: Set::Core,
        work,
    };
    for side in [4096, 8192] {
        let name = format!("dense {side}");
        groups.extend(gemms(&name, Set::Core, &Shape::new(&[side], side, side)));
    }
    let mut layers = Vec::new();
    for (name, hidden, ffn, experts, top_k) in models() {
        for (routing, counts) in [
            ("", inputs::balanced(TOKENS * top_k, experts)),
            (" zipf", inputs::zipf(TOKENS, top_k, experts)),
        ] {
            let gate_up = Shape::new(&counts, 2 * ffn, hidden);
            groups.extend(gemms(
                &format!("{name}{routing} gate-up"),
                Set::Core,
                &gate_up,
            ));
            if routing.is_empty() {
                let down = Shape::new(&counts, hidden, ffn);
                groups.extend(gemms(&format!("{name} down"), Set::Core, &down));
            }
            let layer = Layer {
                tokens: TOKENS,
                hidden,
                ffn,
                top_k,
                counts,
            };
            layers.push(group(format!("{name}{routing}"), Work::Layer(layer)));
        }
    }
    let (sonic_products, sonic_layers) = sonic();
    groups.extend(sonic_products);
    layers.extend(sonic_layers);
    // Dense products of the models: the projection to queries, keys and values.
    for (model, hidden) in [("1.96b", 1024), ("7.33b", 2048)] {
        let shape = Shape::new(&[TOKENS], 3 * hidden, hidden);
        groups.extend(gemms(&format!("dense {model} qkv"), Set::Core, &shape));
    }
    groups.extend(layers);
    for (sequence, width) in [(2048, 64), (2048, 128), (8192, 64), (8192, 128)] {
        let sizes = AttentionSizes {
            sequences: TOKENS / sequence,
            sequence,
            heads: 2048 / width,
            key_value_heads: 2048 / width,
            width,
        };
        groups.push(group(
            format!("{sequence} x {width}"),
            Work::Attention(sizes),
        ));
    }
    for (name, hidden) in [("1.96b", 1024), ("7.33b", 2048)] {
        let rows = TOKENS;
        groups.push(group(name.into(), Work::Norm { rows, hidden }));
    }
    let (tokens, vocabulary, numbers) = (2048, 128_256, 1 << 26);
    let logits = Work::CrossEntropy { tokens, vocabulary };
    groups.push(group("2048 x 128256".into(), logits));
    groups.push(group("67m".into(), Work::AdamW { numbers }));
    groups
}

/// Returns the groups with the sizes of `tiny`: kernels for the simulator or any other device, operations and steps for
/// the CPU.
fn small() -> Vec<Group> {
    let group = |name: &str, work| Group {
        name: name.into(),
        set: Set::Small,
        work,
    };
    let (hidden, ffn, tokens) = (128, 352, 256);
    let mut groups = gemms("small dense", Set::Small, &Shape::new(&[256], 256, 256));
    let uneven = Shape::new(&inputs::zipf(tokens, 2, 8), 2 * ffn, hidden);
    groups.extend(gemms("small 8c2 zipf", Set::Small, &uneven));
    for (name, top_k, counts) in [
        ("small 8c1", 1, inputs::balanced(tokens, 8)),
        ("small 8c2 zipf", 2, inputs::zipf(tokens, 2, 8)),
    ] {
        let layer = Layer {
            tokens,
            hidden,
            ffn,
            top_k,
            counts,
        };
        groups.push(group(name, Work::Layer(layer)));
    }
    for width in [64, 128] {
        let sizes = AttentionSizes {
            sequences: 1,
            sequence: 256,
            heads: 2,
            key_value_heads: 2,
            width,
        };
        groups.push(group(
            &format!("small 256 x {width}"),
            Work::Attention(sizes),
        ));
    }
    let vocabulary = 256;
    groups.push(group(
        "small",
        Work::Norm {
            rows: tokens,
            hidden,
        },
    ));
    groups.push(group("small", Work::CrossEntropy { tokens, vocabulary }));
    groups.push(group("small", Work::AdamW { numbers: 1 << 16 }));
    groups.extend(Operation::ALL.map(|o| group("tiny", Work::Operation(o))));
    groups.push(step("tiny", Set::Small, 16, &["topk", "default"]));
    groups
}
