//! The groups of cases that the benchmark measures.

use super::case::{Group, Layer, Set, Work};
use super::inputs::{balanced, zipf};
use super::operations::Operation;
use super::steps::Step;
use crate::kernels::attention::AttentionSizes;
use crate::verify::kernels::grouped_gemm::{Product, Shape};

/// Tokens of a micro-batch of the paper's models.
const TOKENS: usize = 16_384;
/// The paper's models: name, D, and F with 8 experts.
const MODELS: [(&str, usize, usize); 2] = [("7.33b", 2048, 5632), ("1.96b", 1024, 2816)];

/// Returns every group, most important first.
pub fn groups() -> Vec<Group> {
    let mut all = core();
    all.extend(small());
    all.push(step("1.96b", Set::Full, 64, &["topk", "default"]));
    // Two of these models do not fit on one GPU at the same time.
    all.push(step("7.33b", Set::Full, 64, &["topk"]));
    all
}

impl Set {
    fn group(self, name: impl Into<String>, work: Work) -> Group {
        Group {
            name: name.into(),
            set: self,
            work,
        }
    }
}

fn step(
    preset: &'static str,
    set: Set,
    sequences: usize,
    routers: &'static [&'static str],
) -> Group {
    let experts = "8c1";
    let step = Step {
        preset,
        experts,
        routers,
        sequences,
    };
    set.group(format!("{preset} {experts}"), Work::Step(step))
}

/// Returns the three products of a linear layer with W [E, n, k].
fn gemms(set: Set, name: &str, counts: &[usize], n: usize, k: usize) -> [Group; 3] {
    Product::ALL.map(|product| {
        let shape = Shape::new(counts, n, k);
        let name = format!("{} {name}", product.launcher());
        set.group(name, Work::Gemm { product, shape })
    })
}

fn gate_up(name: &str, layer: &Layer) -> [Group; 3] {
    let Layer { hidden, ffn, .. } = *layer;
    let name = format!("{name} gate-up");
    gemms(Set::Core, &name, &layer.counts, 2 * ffn, hidden)
}

fn down(name: &str, layer: &Layer) -> [Group; 3] {
    let Layer { hidden, ffn, .. } = *layer;
    let name = format!("{name} down");
    gemms(Set::Core, &name, &layer.counts, hidden, ffn)
}

/// Returns the dense products of square matrices.
fn squares() -> impl Iterator<Item = Group> {
    let gemms = |side| gemms(Set::Core, &format!("dense {side}"), &[side], side, side);
    [4096, 8192].into_iter().flat_map(gemms)
}

/// Returns the layers of one of the paper's models with their names; the rows are spread evenly.
fn layers((model, hidden, width): (&str, usize, usize)) -> [(String, Layer); 3] {
    [(8, 1), (8, 2), (32, 4)].map(|(experts, top_k)| {
        let layer = Layer {
            tokens: TOKENS,
            hidden,
            ffn: width * 8 / experts,
            top_k,
            counts: balanced(TOKENS * top_k, experts),
        };
        (format!("{model} {experts}c{top_k}"), layer)
    })
}

/// Returns the products with equal groups that `hardware-check` times.
pub fn timed_products() -> Vec<Group> {
    let models = MODELS.into_iter().rev().flat_map(layers);
    let products = models.flat_map(|(name, layer)| {
        let gate_up = gate_up(&name, &layer).into_iter();
        gate_up.chain(down(&name, &layer))
    });
    squares().chain(products).collect()
}

/// Returns causal attention of 16,384 tokens with 2048 channels, in sequences of 2048 and 8192 tokens, with heads of width
/// 64 and 128; `queries_a_key` query heads share a key head.
pub fn attention(queries_a_key: usize) -> [Group; 4] {
    [(2048, 64), (2048, 128), (8192, 64), (8192, 128)].map(|(sequence, width)| {
        let heads = 2048 / width;
        let key_value_heads = heads / queries_a_key;
        let sizes = AttentionSizes {
            sequences: TOKENS / sequence,
            sequence,
            heads,
            key_value_heads,
            width,
        };
        let mut name = format!("{sequence} x {width}");
        if queries_a_key > 1 {
            name += &format!(" grouped {heads} on {key_value_heads}");
        }
        Set::Core.group(name, Work::Attention(sizes))
    })
}

fn core() -> Vec<Group> {
    let set = Set::Core;
    let mut groups: Vec<Group> = squares().collect();
    let mut with_layers = Vec::new();
    for (name, layer) in MODELS.into_iter().flat_map(layers) {
        let uneven = format!("{name} zipf");
        let counts = zipf(TOKENS, layer.top_k, layer.counts.len());
        groups.extend(gate_up(&name, &layer));
        groups.extend(down(&name, &layer));
        with_layers.push(set.group(name, Work::Layer(layer.clone())));
        let layer = Layer { counts, ..layer };
        groups.extend(gate_up(&uneven, &layer));
        with_layers.push(set.group(uneven, Work::Layer(layer)));
    }
    // SonicMoE's published shapes: T, D, F, E, K.
    for (tokens, hidden, ffn, experts, top_k) in [
        (24_576, 1536, 256, 128, 8),
        (24_576, 1536, 512, 64, 4),
        (24_576, 1536, 1024, 32, 2),
        (32_768, 4096, 1024, 64, 4),
    ] {
        let name = format!("sonic {hidden} x {ffn} {experts}c{top_k}");
        let layer = Layer {
            tokens,
            hidden,
            ffn,
            top_k,
            counts: balanced(tokens * top_k, experts),
        };
        if ffn == 256 {
            groups.extend(gate_up(&name, &layer));
        }
        with_layers.push(set.group(name, Work::Layer(layer)));
    }
    let of_models = [("1.96b", 1024), ("7.33b", 2048)];
    // The projection to queries, keys and values.
    for (model, hidden) in of_models {
        let name = format!("dense {model} qkv");
        groups.extend(gemms(set, &name, &[TOKENS], 3 * hidden, hidden));
    }
    groups.extend(with_layers);
    groups.extend(attention(1));
    let rows = TOKENS;
    groups.extend(of_models.map(|(name, hidden)| set.group(name, Work::Norm { rows, hidden })));
    let (tokens, vocabulary, numbers) = (2048, 128_256, 1 << 26);
    let logits = Work::CrossEntropy { tokens, vocabulary };
    groups.push(set.group("2048 x 128256", logits));
    groups.push(set.group("67m", Work::AdamW { numbers }));
    groups
}

/// Returns the groups with the sizes of `tiny`: kernels for the simulator or any other device, operations and steps for
/// the CPU.
fn small() -> Vec<Group> {
    let set = Set::Small;
    let (hidden, ffn, tokens, vocabulary) = (128, 352, 256, 256);
    let layer = |top_k, counts| Layer {
        tokens,
        hidden,
        ffn,
        top_k,
        counts,
    };
    let even = layer(1, balanced(tokens, 8));
    let uneven = layer(2, zipf(tokens, 2, 8));
    let mut groups = Vec::from(gemms(set, "small dense", &[256], 256, 256));
    let name = "small 8c2 zipf";
    groups.extend(gemms(set, name, &uneven.counts, 2 * ffn, hidden));
    groups.push(set.group("small 8c1", Work::Layer(even)));
    groups.push(set.group(name, Work::Layer(uneven)));
    groups.extend([64, 128].map(|width| {
        let sizes = AttentionSizes {
            sequences: 1,
            sequence: 256,
            heads: 2,
            key_value_heads: 2,
            width,
        };
        set.group(format!("small 256 x {width}"), Work::Attention(sizes))
    }));
    let rows = tokens;
    groups.push(set.group("small", Work::Norm { rows, hidden }));
    groups.push(set.group("small", Work::CrossEntropy { tokens, vocabulary }));
    groups.push(set.group("small", Work::AdamW { numbers: 1 << 16 }));
    groups.extend(Operation::ALL.map(|o| set.group("tiny", Work::Operation(o))));
    groups.push(step("tiny", set, 16, &["topk", "default"]));
    groups
}
