//! Compares every gradient with finite differences: of operations, routers, and a complete model.
//!
//! A router is checked in a mixture-of-experts layer, from its input and parameters to its output and balance losses; a
//! model is checked from all its parameters to its loss. A training pass first sets the chosen experts, default vectors
//! and balance fractions, which are then fixed, so that the forward pass is differentiable ([`Phase::Frozen`]). An
//! estimator, whose gradient intentionally differs from that of its forward pass, is compared with the method or function
//! whose gradient it should equal.

use crate::config::{Config, Layers, RouterConfig};
use crate::dist::SingleRank;
use crate::error::Result;
use crate::model::{Model, Parameter, Weights};
use crate::ops::OPS;
use crate::routers::{self, GradientCheck, Pass, Phase, Surrogate};
use crate::tape::check::{Case, finite_differences, gradients, normal_numbers};
use crate::tape::{Tape, Var};
use crate::verify::device_check::random_batch;
use crate::verify::fault::Fault;
use std::sync::Arc;

/// The largest relative error that passes the check.
pub const TOLERANCE: f64 = 1e-6;

/// One line of the report.
#[derive(Clone, Debug)]
pub struct Row {
    /// The operation, router or model.
    pub subject: String,
    /// The input of the check.
    pub case: String,
    /// Number of compared derivatives.
    pub compared: usize,
    /// The input with the largest error.
    pub worst: String,
    /// The largest relative error.
    pub error: f64,
}

impl Row {
    fn new(subject: String, case: String) -> Self {
        Row {
            subject,
            case,
            compared: 0,
            worst: String::new(),
            error: 0.0,
        }
    }

    /// Adds the derivatives by an input.
    fn add(&mut self, input: String, compared: usize, error: f64) {
        self.compared += compared;
        if self.worst.is_empty() || !(error <= self.error) {
            (self.worst, self.error) = (input, error);
        }
    }

    /// Returns whether the error is at most [`TOLERANCE`]; false for NaN.
    pub fn passes(&self) -> bool {
        self.error <= TOLERANCE
    }
}

/// A router in a layer: its name, its settings, and the reference for its gradient.
struct RouterCase {
    router: &'static str,
    set: &'static [&'static str],
    /// Parts of the names of the compared inputs; if empty, all inputs are compared.
    inputs: &'static [&'static str],
    against: Against,
}

impl RouterCase {
    fn subject(&self) -> String {
        format!("router {}", self.router)
    }
}

/// The reference for a router's gradient.
enum Against {
    Differences,
    /// The gradient of a router with an additional setting, for the same incoming gradient.
    Gradient(&'static str, &'static str),
    /// The gradient of the router's surrogate, which is itself compared with differences.
    Surrogate,
}

const fn differences(router: &'static str, set: &'static [&'static str]) -> RouterCase {
    RouterCase {
        router,
        set,
        inputs: &[],
        against: Against::Differences,
    }
}

/// DenseMixer at K = 2 and K = 1: the router's gradient equals that of `dense`, and the experts' gradients equal those of
/// `topk`. The auxiliary loss is off, because `dense` has none.
const fn densemixer(
    set: &'static [&'static str],
    inputs: &'static [&'static str],
    like: &'static str,
) -> RouterCase {
    RouterCase {
        router: "densemixer",
        set,
        inputs,
        against: Against::Gradient(like, ""),
    }
}

/// SparseMixer: the experts' gradients are those of the forward pass.
const fn sparsemixer_experts(set: &'static [&'static str]) -> RouterCase {
    RouterCase {
        inputs: &[".experts.", "omega"],
        ..differences("sparsemixer", set)
    }
}

/// SparseMixer: the router's gradient is that of a layer with gates c p instead of h p: c / h times the derivative.
const fn sparsemixer_router(set: &'static [&'static str]) -> RouterCase {
    RouterCase {
        router: "sparsemixer",
        set,
        inputs: &["gate.weight"],
        against: Against::Surrogate,
    }
}

const UNBALANCED_1: &[&str] = &[
    "model.top_k=1",
    "balance.aux_coefficient=0",
    "balance.z_coefficient=0",
];
const UNBALANCED_2: &[&str] = &[
    "model.top_k=2",
    "balance.aux_coefficient=0",
    "balance.z_coefficient=0",
];
const UNBALANCED_RENORMALIZED: &[&str] = &[
    "model.top_k=2",
    "balance.aux_coefficient=0",
    "balance.z_coefficient=0",
    "router.renormalize=true",
];

const ROUTER_CASES: &[RouterCase] = &[
    differences("topk", &["model.top_k=1"]),
    differences("topk", &["model.top_k=3"]),
    differences("topk", &["model.top_k=2", "router.renormalize=true"]),
    differences("default", &["model.top_k=1"]),
    differences(
        "default",
        &[
            "model.top_k=2",
            "router.weight_norm=\"count\"",
            "router.init_std=0.5",
        ],
    ),
    differences(
        "default",
        &["model.top_k=2", "router.weighted=false", "router.beta=0.3"],
    ),
    differences("default", &["model.top_k=1", "router.renormalize=true"]),
    differences("default", &["router.renormalize=true", "router.shrink=0.5"]),
    differences("default", &["model.top_k=2", "router.source=\"sampled\""]),
    RouterCase {
        router: "default",
        set: &["model.top_k=2", "router.pass_forward=false"],
        inputs: &[],
        against: Against::Gradient("default", "router.pass_forward=true"),
    },
    differences("dense", &[]),
    densemixer(UNBALANCED_1, &["gate.weight"], "dense"),
    densemixer(UNBALANCED_2, &["gate.weight"], "dense"),
    densemixer(UNBALANCED_2, &[".experts."], "topk"),
    densemixer(UNBALANCED_RENORMALIZED, &[".experts."], "topk"),
    differences("densemixer", &["model.top_k=5"]),
    differences("densemixer", &["model.top_k=5", "router.renormalize=true"]),
    sparsemixer_experts(&["model.top_k=1", "router.version=\"v1\""]),
    sparsemixer_experts(&["model.top_k=1"]),
    sparsemixer_experts(&["model.top_k=2", "router.epsilon=0.5"]),
    sparsemixer_router(&[
        "model.top_k=1",
        "router.version=\"v1\"",
        "router.epsilon=0.5",
    ]),
    sparsemixer_router(&["model.top_k=1"]),
    sparsemixer_router(&["model.top_k=2", "router.epsilon=0.5"]),
    differences("remoe", &["router.initial_lambda=0.5"]),
    differences("remoe", &["model.top_k=1", "router.initial_lambda=10"]),
    differences("lossfree", &["model.top_k=1"]),
    differences("lossfree", &["model.top_k=2", "router.renormalize=true"]),
    differences("lossfree", &["model.top_k=1", "router.score=\"softmax\""]),
    differences(
        "lossfree",
        &[
            "model.top_k=3",
            "router.score=\"softmax\"",
            "router.renormalize=true",
        ],
    ),
];

/// All five experts of the checked models are chosen.
const ALL_EXPERTS: &str = "model.top_k=5";

fn surrogate_of(router: &str) -> Option<Surrogate> {
    let mut all = routers::all().into_iter();
    all.find(|info| info.name == router)?.check.surrogate
}

/// Returns settings that make the forward pass of a complete model differentiable, or a term of its loss large enough to
/// be detected.
fn model_settings(check: &GradientCheck) -> Vec<&'static str> {
    let all = check.exact_for_all_experts.then_some(ALL_EXPERTS);
    check.set.iter().copied().chain(all).collect()
}

/// Settings of the checked models; the first entry is for the defaults.
const MODEL_OPTIONS: &[&[&str]] = &[
    &[],
    &[
        "model.norm=\"layernorm\"",
        "model.qkv_bias=true",
        "model.tied_embeddings=true",
    ],
    &[
        "model.kv_heads=1",
        "model.qk_norm=\"head\"",
        "model.shared_expert_width=5",
    ],
    &[
        "model.head_dim=6",
        "model.qk_norm=\"full\"",
        "train.recompute=true",
        "data.document_boundaries=true",
    ],
    &[
        "balance.aux_scope=\"micro\"",
        "balance.aux_reduction=\"mean\"",
        "model.dense_layers=[1]",
    ],
];

/// Checks every subject ("op linear", "router topk", "model dense") whose name contains `filter`; calls `each` with every
/// row when it is done.
///
/// # Errors
/// When an operation returns an error.
pub fn run(filter: &str, plant: Option<Fault>, mut each: impl FnMut(&Row)) -> Result<Vec<Row>> {
    let _guard = plant.map(Fault::inject);
    let mut rows = Vec::new();
    let mut push = |row: Row| {
        each(&row);
        rows.push(row);
    };
    for op in OPS {
        let subject = format!("op {}", op.name);
        if subject.contains(filter) {
            for case in (op.cases)() {
                push(by_differences(subject.clone(), &case)?);
            }
        }
    }
    for case in ROUTER_CASES {
        if case.subject().contains(filter) {
            router_rows(case)?.into_iter().for_each(&mut push);
        }
    }
    for router in routers::all() {
        let subject = format!("model {}", router.name);
        if !subject.contains(filter) {
            continue;
        }
        let plain = &MODEL_OPTIONS[..1];
        let options = if router.name == RouterConfig::default().name {
            MODEL_OPTIONS
        } else {
            plain
        };
        for set in options {
            let layers = ["model.layers=3", "model.dense_layers=[0]"];
            let own = set.iter().copied().chain(model_settings(&router.check));
            let all: Vec<&str> = layers.into_iter().chain(own.clone()).collect();
            let config = config(router.name, &all)?;
            let surrogate = router.check.surrogate;
            let case = model_case(&config, prepared(&config, surrogate)?)?;
            let row = by_differences(subject.clone(), &case)?;
            let shown: Vec<&str> = own.chain(surrogate.map(|_| "(surrogate)")).collect();
            push(Row {
                case: format!("3 layers, loss {}", shown.join(" "))
                    .trim_end()
                    .into(),
                ..row
            });
        }
    }
    Ok(rows)
}

fn by_differences(subject: String, case: &Case) -> Result<Row> {
    let mut row = Row::new(subject, case.name.clone());
    for report in finite_differences(case)? {
        row.add(report.input, report.compared, report.relative_error);
    }
    Ok(row)
}

fn router_rows(router: &RouterCase) -> Result<Vec<Row>> {
    let subject = router.subject();
    let own_config = config(router.router, router.set)?;
    let own = || layer_case(&own_config, prepared(&own_config, None)?, router.inputs);
    let name = match router.inputs {
        [] => router.set.join(" "),
        inputs => format!("{}: {}", router.set.join(" "), inputs.join(" ")),
    };
    match router.against {
        Against::Differences => {
            let row = by_differences(subject, &own()?)?;
            Ok(vec![Row { case: name, ..row }])
        }
        Against::Gradient(other, setting) => {
            let further = (!setting.is_empty()).then_some(setting);
            let set: Vec<&str> = router.set.iter().copied().chain(further).collect();
            let config = config(other, &set)?;
            let expected = layer_case(&config, prepared(&config, None)?, router.inputs)?;
            let case = format!("{name}: as {}", further.unwrap_or(other));
            Ok(vec![by_gradients(subject, case, &own()?, &expected)?])
        }
        Against::Surrogate => {
            let build = surrogate_of(router.router);
            let surrogate = |inputs| layer_case(&own_config, prepared(&own_config, build)?, inputs);
            let equal = by_gradients(
                subject.clone(),
                format!("{name}: as its surrogate"),
                &own()?,
                &surrogate(router.inputs)?,
            )?;
            let row = by_differences(subject, &surrogate(&[])?)?;
            let case = format!("{} (surrogate)", router.set.join(" "));
            Ok(vec![equal, Row { case, ..row }])
        }
    }
}

/// Compares the gradient of `own` with that of `other`, input by input.
fn by_gradients(subject: String, case: String, own: &Case, other: &Case) -> Result<Row> {
    let (own, expected) = (gradients(own)?, gradients(other)?);
    let mut row = Row::new(subject, case);
    for ((input, own), (_, expected)) in own.into_iter().zip(&expected) {
        let scale = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let worst = own
            .iter()
            .zip(expected)
            .fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
        let error = if scale == 0.0 { worst } else { worst / scale };
        row.add(input, own.len(), error);
    }
    Ok(row)
}

/// Returns the configuration of a small model in f64 with every balance loss enabled, so that every term has an effect.
fn config(router: &str, set: &[&str]) -> Result<Config> {
    let mut layers = Layers::preset("tiny");
    let small = [
        "model.vocab_size=11",
        "model.hidden=8",
        "model.heads=2",
        "model.head_dim=4",
        "model.layers=1",
        "model.dense_layers=[]",
        "model.num_experts=5",
        "model.expert_ffn_width=6",
        "model.dense_ffn_width=6",
        "model.sequence_length=7",
        "model.top_k=2",
        "train.dtype=\"f64\"",
        "balance.aux_coefficient=0.5",
        "balance.z_coefficient=0.25",
    ];
    layers.set = small.iter().chain(set).map(|s| s.to_string()).collect();
    layers.set.push(format!("router.name=\"{router}\""));
    Config::load(&layers, &routers::resolve)
}

/// Returns the case of the first MoE layer of a model: inputs are x and the layer's parameters; outputs are y and the
/// balance losses. Gradients are computed for the inputs whose names contain one of `inputs`, or for all.
fn layer_case(config: &Config, model: Model, inputs: &[&str]) -> Result<Case> {
    const TOKENS: usize = 13;
    let wanted = |name: &str| inputs.is_empty() || inputs.iter().any(|i| name.contains(i));
    let width = config.model.hidden;
    let x = normal_numbers(TOKENS * width, 77);
    let own: Vec<usize> = (0..model.parameters.len())
        .filter(|&i| model.parameters[i].name.contains(".mlp."))
        .collect();
    let parameters = own.iter().map(|&i| &model.parameters[i]);
    let parameters = parameters.map(input_of).collect::<Result<Vec<_>>>()?;
    let place = move |v: &[Var], weights: &Weights| -> Weights {
        let mut all: Vec<Var> = weights.iter().map(Var::detached).collect();
        own.iter()
            .zip(&v[1..])
            .for_each(|(&i, v)| all[i] = v.clone());
        all.into()
    };
    let run = move |tape: &Tape, v: &[Var], phase: Phase| {
        let weights = place(v, &model.weights());
        let (y, losses) = model.moe_layer(0, tape, &weights, &v[0], Pass::single(phase))?;
        Ok(std::iter::once(y).chain(losses).collect::<Vec<Var>>())
    };
    // A training pass chooses the experts and updates the default vectors; after that they are fixed.
    let held = std::cell::Cell::new(false);
    let case = Case::new("layer", move |tape, v| {
        if !held.replace(true) {
            run(&Tape::without_gradients(), v, Phase::Train)?;
        }
        run(tape, v, Phase::Frozen)
    });
    let mut case = case.values("x", [TOKENS, width], &x);
    for (name, shape, values) in parameters {
        case = case.values(name, shape.as_slice(), &values);
    }
    for input in &mut case.inputs {
        input.differentiable = wanted(&input.name);
    }
    Ok(case)
}

/// Returns the name, shape and values of a parameter.
fn input_of(p: &Parameter) -> Result<(String, Vec<usize>, Vec<f64>)> {
    Ok((p.name.clone(), p.value.shape().to_vec(), p.value.to_f64()?))
}

/// Returns the case of a complete model: inputs are all its parameters, and the output is its loss.
fn model_case(config: &Config, model: Model) -> Result<Case> {
    let batch = random_batch(config, 2);
    let inputs = model.parameters.iter().map(input_of);
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    let held = std::cell::Cell::new(false);
    let case = Case::new(
        format!("{} layers, loss", config.model.layers),
        move |tape, v| {
            let weights: Weights = v.to_vec().into();
            let run =
                |tape: &Tape, phase| model.loss(tape, &weights, batch.all(), Pass::single(phase));
            if !held.replace(true) {
                run(&Tape::without_gradients(), Phase::Train)?;
            }
            Ok(vec![run(tape, Phase::Frozen)?.total])
        },
    );
    Ok(inputs
        .into_iter()
        .fold(case, |case, (name, shape, values)| {
            case.values(name, shape.as_slice(), &values)
        }))
}

/// Returns a model whose matrices have such a scale that every part of the loss has a measurable effect; with a surrogate
/// in place of the router, if there is one.
fn prepared(config: &Config, surrogate: Option<Surrogate>) -> Result<Model> {
    let mut model = match surrogate {
        Some(build) => Model::with_router(config, build(&config.router)?, Arc::new(SingleRank))?,
        None => Model::new(config)?,
    };
    for (i, p) in model.parameters.iter_mut().enumerate() {
        let shape = p.value.shape();
        if shape.len() < 2 {
            continue;
        }
        // Rows have unit scale for every width, because a norm has a strong curvature around short rows.
        let fan_in = if p.name.contains("embed") {
            1
        } else {
            shape.width()
        };
        let spread = 1.0 / (fan_in as f64).sqrt();
        let numbers = normal_numbers(shape.elements(), 500 + i as u64);
        let numbers: Vec<f64> = numbers.iter().map(|x| spread * x).collect();
        p.value
            .set(&crate::tensor::Tensor::from_slice(shape, &numbers));
    }
    Ok(model)
}
