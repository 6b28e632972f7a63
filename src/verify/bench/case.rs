//! Definitions of the benchmark cases, shared by kernels and operations, by peers in other languages, and by criterion.
//!
//! A [`Group`] has one set of buffers; its [`Case`]s are timed on them. Each case has the FLOPs of its mathematical
//! definition (rates are computed from them, for every implementation alike) and its floor from `costs`.

use super::operations::Operation;
use super::steps::Step;
use crate::device::machine::h200;
use crate::error::Result;
use crate::kernels::adamw::AdamwUpdate;
use crate::kernels::attention::AttentionSizes;
use crate::kernels::cost::{Cost, Sizes};
use crate::kernels::cross_entropy::CrossEntropyRows;
use crate::kernels::norm::{NormBackward, NormForward};
use crate::kernels::router::RouterForward;
use crate::kernels::{
    AttentionBackward, AttentionForward, Combine, DefaultDots, ExpertMean, GateGradient,
};
use crate::verify::bench::roofline;
use crate::verify::kernels::grouped_gemm::{Product, Shape};
use serde_json::{Value, json};

/// A set of groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Set {
    /// A few seconds on any device: the sizes of `tiny`.
    Small,
    /// The paper's layers, four of SonicMoE's, dense products, and the other kernels of a model.
    Core,
    /// The core set, and complete training steps.
    Full,
}

/// Cases that share their inputs.
#[derive(Clone, Debug)]
pub struct Group {
    /// Name of the group, which seeds the inputs.
    pub name: String,
    /// The smallest set that contains the group.
    pub set: Set,
    /// The computation.
    pub work: Work,
}

/// The computation of a group.
#[derive(Clone, Debug)]
pub enum Work {
    /// One product of a grouped linear layer; a dense layer is one group.
    Gemm {
        /// The product.
        product: Product,
        /// Rows of each group, and the widths of the weight.
        shape: Shape,
    },
    /// The kernels of an MoE layer.
    Layer(Layer),
    /// LayerNorm with the residual add, `[rows, hidden]`.
    Norm {
        /// Number of rows.
        rows: usize,
        /// Width of a row.
        hidden: usize,
    },
    /// Cross-entropy: from f32 logits `[tokens, vocabulary]` to the losses and the gradient of the logits.
    CrossEntropy {
        /// Number of tokens.
        tokens: usize,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// The AdamW update of a tensor.
    AdamW {
        /// Number of elements of the tensor.
        numbers: usize,
    },
    /// Causal attention.
    Attention(AttentionSizes),
    /// An operation on the CPU, forward and backward together, in f32.
    Operation(Operation),
    /// Optimizer steps of a preset with each of these routers, in turn.
    Step(Step),
}

/// An MoE layer with its routing.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Number of tokens T.
    pub tokens: usize,
    /// Width D of the model.
    pub hidden: usize,
    /// Width F of an expert.
    pub ffn: usize,
    /// Number of experts K per token.
    pub top_k: usize,
    /// Number of rows of each expert.
    pub counts: Vec<usize>,
}

impl Layer {
    /// Returns the sizes from which the costs of the kernels are computed.
    pub fn sizes(&self) -> Sizes {
        Sizes {
            tokens: self.tokens,
            hidden: self.hidden,
            ffn: self.ffn,
            experts: self.counts.len(),
            slots: self.top_k,
            rows: self.counts.iter().sum(),
        }
    }
}

/// One case of the benchmark.
#[derive(Clone, Debug)]
pub struct Case {
    /// Unique name, "FAMILY SHAPE".
    pub name: String,
    /// Name of the kernel or pass, which is the first word of the name of the case.
    pub family: &'static str,
    /// FLOPs of the mathematical definition.
    pub flops: f64,
    /// Cost of each kernel that the case needs; the floor of the case is the sum of their floors.
    pub costs: Vec<Cost>,
}

impl Case {
    /// Returns the minimum number of bytes that the kernels of the case move.
    pub fn bytes(&self) -> f64 {
        self.costs.iter().map(|c| c.bytes).sum()
    }

    /// Returns the lower bound of the case's time in seconds on a machine with these FLOP/s and bytes per second.
    pub fn floor(&self, flops: f64, bytes: f64) -> f64 {
        let each = self.costs.iter();
        each.map(|c| (c.flops / flops).max(c.bytes / bytes)).sum()
    }
}

impl Group {
    /// Returns the cases that are timed on the group's buffers, in the order of the parts that its builder creates.
    ///
    /// # Errors
    /// When the kernels do not support the sizes.
    pub fn cases(&self) -> Result<Vec<Case>> {
        let name = &self.name;
        let case = |family: &'static str, flops: f64, costs: Vec<Cost>| Case {
            name: match name.strip_prefix(family) {
                Some(_) => name.clone(),
                None => format!("{family} {name}"),
            },
            family,
            flops,
            costs,
        };
        Ok(match &self.work {
            Work::Gemm { product, shape } => {
                let cost = product.cost(shape);
                vec![case(product.launcher(), cost.flops, vec![cost])]
            }
            Work::Layer(layer) => layer_cases(layer, case)?,
            Work::Norm { rows, hidden } => {
                let forward = NormForward::cost(*rows, *hidden, true, true);
                let backward = NormBackward::cost(*rows, *hidden, true, false, false);
                vec![
                    case("norm_forward", 0.0, vec![forward]),
                    case("norm_backward", 0.0, vec![backward]),
                ]
            }
            Work::CrossEntropy { tokens, vocabulary } => {
                let cost = CrossEntropyRows::cost(*tokens, *vocabulary, true, false);
                vec![case("cross_entropy_rows", 0.0, vec![cost])]
            }
            Work::AdamW { numbers } => {
                vec![case("adamw_update", 0.0, vec![AdamwUpdate::cost(*numbers)])]
            }
            Work::Attention(sizes) => {
                // Two products forward and five backward, over the causal half.
                let lines = (sizes.sequences * sizes.heads) as f64;
                let product = lines * (sizes.sequence as f64).powi(2) * sizes.width as f64;
                vec![
                    case(
                        "attention_forward",
                        2.0 * product,
                        vec![AttentionForward::cost(sizes)],
                    ),
                    case(
                        "attention_backward",
                        5.0 * product,
                        vec![AttentionBackward::cost(sizes)],
                    ),
                ]
            }
            Work::Operation(operation) => {
                let cost = operation.cost();
                vec![case(operation.name(), cost.flops, vec![cost])]
            }
            Work::Step(step) => {
                let of = |router: &&str| {
                    let flops = super::steps::flops(step, router)?;
                    let cost = Cost { flops, bytes: 0.0 };
                    let whole = case("step", flops, vec![cost]);
                    let name = format!("{} {router}", whole.name);
                    Ok(Case { name, ..whole })
                };
                step.routers.iter().map(of).collect::<Result<_>>()?
            }
        })
    }

    /// Returns the sizes as JSON, for implementations in other languages.
    ///
    /// # Errors
    /// When a preset does not exist.
    pub fn sizes(&self) -> Result<Value> {
        Ok(match &self.work {
            Work::Gemm { product, shape } => {
                json!({"work": "gemm", "product": product.launcher(), "counts": shape.counts, "n": shape.n, "k": shape.k})
            }
            Work::Layer(l) => {
                json!({"work": "layer", "tokens": l.tokens, "hidden": l.hidden, "ffn": l.ffn, "top_k": l.top_k, "counts": l.counts})
            }
            Work::Norm { rows, hidden } => json!({"work": "norm", "rows": rows, "hidden": hidden}),
            Work::CrossEntropy { tokens, vocabulary } => {
                json!({"work": "cross_entropy", "tokens": tokens, "vocabulary": vocabulary})
            }
            Work::AdamW { numbers } => json!({"work": "adamw", "numbers": numbers}),
            Work::Attention(s) => {
                json!({"work": "attention", "sequences": s.sequences, "sequence": s.sequence, "heads": s.heads, "width": s.width})
            }
            Work::Operation(operation) => operation.sizes(),
            Work::Step(step) => super::steps::sizes(step)?,
        })
    }
}

/// Returns the cases of a layer, in the order of the parts of [`super::layer`].
fn layer_cases(
    layer: &Layer,
    case: impl Fn(&'static str, f64, Vec<Cost>) -> Case,
) -> Result<Vec<Case>> {
    let s = layer.sizes();
    // Three matrix products forward; in backward, a gradient of each weight and of each input.
    let forward = 6.0 * s.rows as f64 * s.hidden as f64 * s.ffn as f64;
    let mut cases = Vec::new();
    for (default, families) in [
        (false, ["layer_forward", "layer_backward"]),
        (true, ["default_layer_forward", "default_layer_backward"]),
    ] {
        let costs = roofline::layer_costs(&s, default, false, h200())?;
        let [first, second] = costs.map(|pass| pass.into_iter().map(|(_, cost)| cost).collect());
        cases.push(case(families[0], forward, first));
        cases.push(case(families[1], 2.0 * forward, second));
    }
    let dots = roofline::dot_columns(&s)?;
    let means = vec![ExpertMean::cost(&s)];
    // Includes sorting dy, which for `default` is part of the dots of the default vectors.
    let gates = vec![
        DefaultDots::cost(&s, true),
        GateGradient::cost(&s, true, dots),
    ];
    cases.push(case("router_forward", 0.0, vec![RouterForward::cost(&s)]));
    cases.push(case(
        "combine",
        0.0,
        vec![Combine::cost(&s, true, true, false)],
    ));
    cases.push(case("expert_mean", 0.0, means));
    cases.push(case("gate_gradient", 0.0, gates));
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::super::groups::{groups, timed_products};
    use super::super::hardware_records::{TIMED, timed};
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn names_are_unique_and_every_case_costs_something() {
        let mut names = BTreeSet::new();
        for group in groups() {
            for case in group.cases().unwrap() {
                assert!(case.floor(1e12, 1e12) > 0.0, "{}", case.name);
                assert!(case.name.starts_with(case.family), "{}", case.name);
                assert!(names.insert(case.name.clone()), "{} comes twice", case.name);
            }
        }
        assert!(names.contains("grouped_gemm_forward 7.33b 8c1 gate-up"));
        assert!(names.contains("layer_backward 1.96b 32c4 zipf"));
    }

    #[test]
    fn products_are_those_that_hardware_check_has_timed() {
        let names: BTreeSet<String> = groups().into_iter().map(|g| g.name).collect();
        for group in timed_products() {
            assert!(names.contains(&group.name), "{}", group.name);
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
        for record in timed(&folder).unwrap() {
            let case = record.task.strip_prefix(TIMED).unwrap();
            assert!(names.contains(case), "{case}");
        }
    }

    #[test]
    fn a_floor_is_a_lower_bound_of_every_kernel_of_the_case() {
        use crate::device::machine::{H200_BYTES_PER_SECOND, H200_FLOPS_PER_SECOND};
        let groups = groups();
        let find = |name: &str| {
            let all = groups.iter().flat_map(|g| g.cases().unwrap());
            all.into_iter().find(|c| c.name == name).unwrap()
        };
        let product = find("grouped_gemm_forward 7.33b 8c1 gate-up");
        let floor = product.floor(H200_FLOPS_PER_SECOND, H200_BYTES_PER_SECOND);
        assert!((floor * 1e6 - 957.0).abs() < 1.0, "{floor}");
        // 4.3 TB/s of reads and writes: 2·(R + T)·D bytes and little more.
        let combine = find("combine 7.33b 8c1").floor(H200_FLOPS_PER_SECOND, H200_BYTES_PER_SECOND);
        assert!((combine * 1e6 - 31.5).abs() < 0.5, "{combine}");
        let forward = find("layer_forward 7.33b 8c1");
        assert_eq!(forward.flops, 6.0 * 16_384.0 * 2048.0 * 5632.0);
    }
}
