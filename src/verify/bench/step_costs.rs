//! Computes the operations and bytes of the kernels of a training step, per launcher, from the configuration alone. A test
//! compares the list with a step on the simulator.

use super::roofline;
use crate::config::{Config, Norm, Recompute};
use crate::device::machine::h200;
use crate::error::{Error, Result};
use crate::kernels::attention::AttentionSizes;
use crate::kernels::cost::{Cost, Sizes};
use crate::kernels::{
    AdamwUpdate, AttentionBackward, AttentionForward, CrossEntropyRows, DispatchChoices,
    EmbeddingForward, EmbeddingGradient, EmbeddingOrder, GradientScale, GroupedGemmForward,
    GroupedGemmInputGradient, GroupedGemmWeightGradient, HeadLogits, NormBackward, NormForward,
    QkvRopeForward, SquareSums, SumParts, SwigluBackward, SwigluForward,
};
use crate::ops::cross_entropy::{LOGIT_TOKENS, gradient_tokens};
use crate::routers::{default, topk};
use std::collections::BTreeMap;

/// The sizes of a grouped product, [`GroupedGemmForward`] or one of its gradients: rows of all groups, groups, n, k.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub rows: usize,
    pub groups: usize,
    pub n: usize,
    pub k: usize,
}

/// All launches of one launcher in a step.
#[derive(Clone, Debug, Default)]
pub struct Launches {
    pub count: usize,
    /// Bytes and operations of all launches.
    pub cost: Cost,
    /// Sum of the lower bounds of each launch's time on an H200, in seconds.
    pub floor: f64,
    /// For a grouped product: the sizes, and the number of launches with each size.
    pub products: Vec<(Product, usize)>,
}

/// The launches of a step on one GPU, by launcher.
#[derive(Clone, Debug, Default)]
pub struct StepCosts(pub BTreeMap<&'static str, Launches>);

/// Returns whether the router is `default`.
fn has_default_vectors(config: &Config) -> bool {
    config.router.name == default::INFO.name
}

impl StepCosts {
    /// Returns the launches of a step of `topk` or `default` without recomputation, for models such as those of the paper:
    /// without a shared expert, biases, or norms of queries and keys.
    ///
    /// # Errors
    /// When the configuration is of another kind.
    pub fn of(config: &Config) -> Result<Self> {
        let name = config.router.name.as_str();
        let (m, t) = (&config.model, &config.train);
        let plain =
            t.recompute == Recompute::default() && !m.qkv_bias && m.shared_expert_width == 0;
        if ![topk::INFO.name, default::INFO.name].contains(&name) || !plain {
            return Err(Error::invalid(
                "predicted steps",
                "router topk or default, without recomputation, biases and shared experts",
                format!("router {name} and other settings"),
                "see src/verify/bench/step_costs.rs for the kernels of a step",
            ));
        }
        let mut step = StepCosts::default();
        for micro_batch in 0..t.sequences_per_step / t.micro_batch {
            step.micro_batch(config, micro_batch > 0)?;
        }
        let numbers = crate::config::count::total_parameters(m) as usize;
        step.add("square_sums", 1, SquareSums::cost(numbers));
        step.add("adamw_update", 1, AdamwUpdate::cost(numbers));
        step.add("step_decide", 1, Cost::default());
        // Update of ê.
        step.add(
            "state_commit",
            usize::from(has_default_vectors(config)),
            Cost::default(),
        );
        Ok(step)
    }

    /// Returns the number of launches of all kernels.
    pub fn launches(&self) -> usize {
        self.0.values().map(|l| l.count).sum()
    }

    /// Returns the sum of all lower bounds on an H200, in seconds.
    pub fn floor(&self) -> f64 {
        self.0.values().map(|l| l.floor).sum()
    }

    fn add(&mut self, launcher: &'static str, times: usize, cost: Cost) {
        let entry = self.0.entry(launcher).or_default();
        entry.count += times;
        entry.floor += times as f64 * cost.floor();
        let times = times as f64;
        entry.cost = entry.cost
            + Cost {
                flops: times * cost.flops,
                bytes: times * cost.bytes,
            };
    }

    fn product(&mut self, launcher: &'static str, times: usize, p: Product, cost: Cost) {
        self.add(launcher, times, cost);
        let entry = self.0.entry(launcher).or_default();
        entry.products.push((p, times));
    }

    fn forward(&mut self, times: usize, p: Product) {
        let cost = GroupedGemmForward::cost(p.rows, p.groups, p.n, p.k);
        self.product("grouped_gemm_forward", times, p, cost);
    }

    fn input_gradient(&mut self, times: usize, p: Product) {
        let cost = GroupedGemmInputGradient::cost(p.rows, p.groups, p.n, p.k);
        self.product("grouped_gemm_input_gradient", times, p, cost);
    }

    fn weight_gradient(&mut self, times: usize, p: Product, accumulate: bool) {
        let cost = GroupedGemmWeightGradient::cost(p.rows, p.groups, p.n, p.k, accumulate);
        self.product("grouped_gemm_weight_gradient", times, p, cost);
    }

    /// Adds the gradient of a dense weight, which is computed in parts.
    fn dense_weight_gradient(&mut self, times: usize, p: Product, accumulate: bool) {
        let parts = GroupedGemmWeightGradient::parts(p.rows, p.n, p.k);
        if parts == 1 {
            return self.weight_gradient(times, p, accumulate);
        }
        self.weight_gradient(times, Product { groups: parts, ..p }, false);
        let mut sum = SumParts::cost(parts, p.n * p.k);
        if accumulate {
            sum.bytes += 4.0 * (p.n * p.k) as f64;
        }
        self.add("sum_parts", times, sum);
    }

    fn micro_batch(&mut self, config: &Config, accumulate: bool) -> Result<()> {
        let (m, t) = (&config.model, &config.train);
        let tokens = t.micro_batch * m.sequence_length;
        let dense_layers = m.dense_layers.len();
        let dense = |n: usize, k: usize| Product {
            rows: tokens,
            groups: 1,
            n,
            k,
        };
        let q = m.heads * m.head_dim;
        let qkv = q + 2 * m.kv_heads * m.head_dim;
        let (hidden, ffn, layers) = (m.hidden, m.dense_ffn_width, m.layers);

        self.embedding(config, tokens, accumulate);
        self.norms(config, tokens, accumulate);
        // Attention.
        let sizes = AttentionSizes {
            sequences: t.micro_batch,
            sequence: m.sequence_length,
            heads: m.heads,
            key_value_heads: m.kv_heads,
            width: m.head_dim,
        };
        let projection = QkvRopeForward::cost(tokens, qkv, hidden);
        self.add("qkv_rope_forward", layers, projection);
        self.add("attention_forward", layers, AttentionForward::cost(&sizes));
        self.add(
            "attention_backward",
            layers,
            AttentionBackward::cost(&sizes),
        );
        self.forward(layers, dense(hidden, q));
        for (n, k) in [(qkv, hidden), (hidden, q)] {
            self.input_gradient(layers, dense(n, k));
            self.dense_weight_gradient(layers, dense(n, k), accumulate);
        }
        // Dense feed-forward layers.
        for (n, k) in [(2 * ffn, hidden), (hidden, ffn)] {
            self.forward(dense_layers, dense(n, k));
            self.input_gradient(dense_layers, dense(n, k));
            self.dense_weight_gradient(dense_layers, dense(n, k), accumulate);
        }
        self.add(
            "swiglu_forward",
            dense_layers,
            SwigluForward::cost(tokens, ffn),
        );
        self.add(
            "swiglu_backward",
            dense_layers,
            SwigluBackward::cost(tokens, ffn),
        );
        self.experts(config, tokens, accumulate)?;
        self.head(config, tokens, accumulate);
        Ok(())
    }

    fn embedding(&mut self, config: &Config, tokens: usize, accumulate: bool) {
        let m = &config.model;
        let forward = EmbeddingForward::cost(tokens, m.vocab_size, m.hidden);
        let gradient = EmbeddingGradient::cost(tokens, m.vocab_size, m.hidden, accumulate);
        let calls = EmbeddingOrder::calls(m.vocab_size);
        let bytes_of_ids = Sizes {
            tokens,
            hidden: m.hidden,
            ffn: 0,
            experts: 256,
            slots: 1,
            rows: tokens,
        };
        self.add("embedding_forward", 1, forward);
        self.add("embedding_gradient", 1, gradient);
        self.add("embedding_order", calls, EmbeddingOrder::cost(tokens));
        self.add(
            "dispatch_choices",
            calls - 1,
            DispatchChoices::cost(&bytes_of_ids),
        );
    }

    /// Adds the norms. Each norm but the first also adds the output of the previous layer to the residual stream; for each
    /// norm but the last, a gradient arrives from the residual stream.
    fn norms(&mut self, config: &Config, tokens: usize, accumulate: bool) {
        let m = &config.model;
        let layer_norm = m.norm == Norm::LayerNorm;
        for (times, other) in [(2 * m.layers, true), (1, false)] {
            let forward = NormForward::cost(tokens, m.hidden, layer_norm, other);
            let backward = NormBackward::cost(tokens, m.hidden, layer_norm, other, accumulate);
            self.add("norm_forward", times, forward);
            self.add("norm_backward", times, backward);
            let parameters = if layer_norm { 2 } else { 1 };
            self.add("norm_weight_gradient", parameters * times, Cost::default());
        }
    }

    fn experts(&mut self, config: &Config, tokens: usize, accumulate: bool) -> Result<()> {
        let m = &config.model;
        let times = m.layers - m.dense_layers.len();
        let sizes = roofline::layer_sizes(m, tokens);
        let default = has_default_vectors(config);
        let passes = roofline::layer_costs(&sizes, default, accumulate, h200())?;
        for (name, cost) in passes.into_iter().flatten() {
            let launcher = match name.split([',', ' ']).next() {
                Some(_) if default && name == roofline::SORT_OF_DY => "default_dots",
                Some(launcher) => launcher,
                None => name,
            };
            if !launcher.starts_with("grouped_gemm_") {
                self.add(launcher, times, cost);
            }
        }
        let product = |n: usize, k: usize| Product {
            rows: sizes.rows,
            groups: sizes.experts,
            n,
            k,
        };
        let (gate_up, down) = (
            product(2 * sizes.ffn, m.hidden),
            product(m.hidden, sizes.ffn),
        );
        self.input_gradient(times, gate_up);
        self.weight_gradient(times, gate_up, accumulate);
        self.weight_gradient(times, down, accumulate);
        for launcher in [
            "router_statistics",
            "router_weight_gradient",
            "layer_tally",
            "auxiliary_loss",
            "auxiliary_loss_backward",
            "weighted_sum",
            "weighted_sum_backward",
        ] {
            self.add(launcher, times, Cost::default());
        }
        Ok(())
    }

    /// Adds the head, its loss and their gradients, in chunks of tokens.
    fn head(&mut self, config: &Config, tokens: usize, accumulate: bool) {
        let (vocabulary, hidden) = (config.model.vocab_size, config.model.hidden);
        let chunk = gradient_tokens(hidden);
        for first in (0..tokens).step_by(chunk) {
            let rows = chunk.min(tokens - first);
            for part in (0..rows).step_by(LOGIT_TOKENS) {
                let rows = LOGIT_TOKENS.min(rows - part);
                self.add("head_logits", 1, HeadLogits::cost(rows, vocabulary, hidden));
                let loss = CrossEntropyRows::cost(rows, vocabulary, true, true);
                self.add("cross_entropy_rows", 1, loss);
            }
            let product = Product {
                rows,
                groups: 1,
                n: vocabulary,
                k: hidden,
            };
            self.input_gradient(1, product);
            self.dense_weight_gradient(1, product, first > 0);
        }
        for launcher in ["cross_entropy_mean", "losses_add"] {
            self.add(launcher, 1, Cost::default());
        }
        let (dx, dw) = (tokens * hidden, vocabulary * hidden);
        self.add("gradient_scale", 1, GradientScale::cost(dx, true, false));
        self.add(
            "gradient_scale",
            1,
            GradientScale::cost(dw, false, accumulate),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;
    use crate::kernels::{launchers, trace};
    use crate::routers;
    use crate::train::Trainer;

    /// Compares the launches of every kernel; and the bytes of kernels that read each operand once, which excludes
    /// products.
    #[test]
    fn a_step_on_the_simulator_launches_and_moves_what_step_costs_lists() {
        for router in ["topk", "default"] {
            let mut layers = Layers::preset("tiny");
            let router_name = format!("router.name={router}");
            layers.set = [
                "model.norm=\"layernorm\"",
                "model.layers=3",
                "model.sequence_length=128",
                "train.sequences_per_step=4",
                "train.micro_batch=2",
                "train.eval_sequences=2",
                "train.device=\"sim\"",
                &router_name,
            ]
            .map(str::to_string)
            .to_vec();
            let config = Config::load(&layers, &routers::resolve).unwrap();
            let step = StepCosts::of(&config).unwrap();
            let mut trainer = Trainer::new(config).unwrap();
            trainer.step().unwrap();
            launchers::sim().unwrap().trace();
            trainer.step().unwrap();
            let mut found: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
            for e in trace::finish().unwrap().entries {
                found.insert(e.launcher, (e.launches, e.bytes));
            }
            let listed = step.0.iter().map(|(l, e)| (*l, e.count));
            let launched = found.iter().map(|(l, e)| (*l, e.0));
            assert_eq!(
                listed.filter(|(_, n)| *n > 0).collect::<BTreeMap<_, _>>(),
                launched.filter(|(_, n)| *n > 0).collect::<BTreeMap<_, _>>(),
                "{router}"
            );
            // The gradients of a norm's parameters are part of the cost of the norm's backward.
            found.get_mut("norm_backward").unwrap().1 += found["norm_weight_gradient"].1;
            let (mut compared, mut wrong) = (0, Vec::new());
            for (launcher, entry) in &step.0 {
                let bytes = entry.cost.bytes;
                if bytes > 1e5 && entry.cost.flops == 0.0 {
                    let error = found[launcher].1 / bytes - 1.0;
                    println!("{router} {launcher}: {bytes:.0}, {:+.2}%", 100.0 * error);
                    let allowed = match *launcher {
                        // Each thread reads the row of its parameter, or its id, again from the cache.
                        "adamw_update" | "square_sums" => 0.06,
                        "embedding_forward" => 0.13,
                        // Only a third of the ids occur.
                        "embedding_gradient" => 0.35,
                        _ => 0.02,
                    };
                    wrong.extend(
                        (error.abs() > allowed).then(|| format!("{launcher}: {error:+.3}")),
                    );
                    compared += 1;
                }
            }
            assert!(wrong.is_empty(), "{router}: {wrong:?}");
            assert!(compared >= 10, "{compared}");
        }
    }

    #[test]
    fn other_models_are_refused() {
        let mut layers = Layers::preset("tiny");
        layers.set = vec!["router.name=remoe".into()];
        let config = Config::load(&layers, &routers::resolve).unwrap();
        assert!(
            StepCosts::of(&config)
                .unwrap_err()
                .to_string()
                .contains("topk or default")
        );
    }
}
