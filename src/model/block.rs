//! One transformer block: attention, then a dense or a mixture-of-experts feed-forward.

use super::context::Context;
use super::feed_forward::SwigluSlots;
use super::moe::{BalanceLosses, MoeLayer};
use super::parameters::{Layout, NormSlots};
use super::rows::Rows;
use super::stream::Stream;
use crate::config::{ModelConfig, QkNorm};
use crate::error::Result;
use crate::ops::linear::linear;
use crate::ops::qk_norm::qk_norm;
use crate::routers::Pass;
use crate::tape::{Tape, Var};

/// The indices of a block's parameters.
pub struct Block {
    attention_norm: NormSlots,
    qkv: usize,
    qkv_bias: Option<usize>,
    /// Weights of the query and key norms.
    qk_norm: Option<[usize; 2]>,
    output: usize,
    ffn_norm: NormSlots,
    ffn: FeedForward,
}

enum FeedForward {
    Dense(SwigluSlots),
    Moe(MoeLayer),
}

impl Block {
    pub fn new(layout: &mut Layout, config: &ModelConfig, layer: usize) -> Self {
        let prefix = format!("model.layers.{layer}");
        let (q, kv) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let parts = |kind: &str| {
            [("q", q), ("k", kv), ("v", kv)]
                .map(|(m, n)| (format!("{prefix}.self_attn.{m}_proj.{kind}"), n))
        };
        let attention_norm = layout.norm(&format!("{prefix}.input_layernorm"));
        let name = format!("{prefix}.self_attn.qkv_proj");
        let qkv = layout.stacked(&format!("{name}.weight"), &parts("weight"), config.hidden);
        let qkv_bias = config
            .qkv_bias
            .then(|| layout.vectors(&format!("{name}.bias"), &parts("bias"), 0.0));
        let lengths = match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Head => Some([config.head_dim, config.head_dim]),
            QkNorm::Full => Some([q, kv]),
        };
        let qk_norm = lengths.map(|[q, k]| {
            [("q", q), ("k", k)].map(|(m, n)| {
                let name = format!("{prefix}.self_attn.{m}_norm.weight");
                layout.vectors(&name, &[(name.clone(), n)], 1.0)
            })
        });
        let output = layout.residual(
            &format!("{prefix}.self_attn.o_proj.weight"),
            &[config.hidden, q],
        );
        let ffn_norm = layout.norm(&format!("{prefix}.post_attention_layernorm"));
        let moe_index = config.moe_layers().iter().position(|l| *l == layer);
        let mlp = format!("{prefix}.mlp");
        let ffn = match moe_index {
            None => FeedForward::Dense(SwigluSlots::new(
                layout,
                &mlp,
                config.hidden,
                config.dense_ffn_width,
            )),
            Some(index) => FeedForward::Moe(MoeLayer::new(layout, config, &mlp, index)),
        };
        Block {
            attention_norm,
            qkv,
            qkv_bias,
            qk_norm,
            output,
            ffn_norm,
            ffn,
        }
    }

    /// Returns the block's mixture of experts, if it has one.
    pub fn moe(&self) -> Option<&MoeLayer> {
        match &self.ffn {
            FeedForward::Moe(moe) => Some(moe),
            FeedForward::Dense(_) => None,
        }
    }

    /// Returns the residual stream after the block and, for a MoE layer, the balance losses.
    pub fn forward(
        &self,
        model: &Context,
        tape: &Tape,
        weights: &[Var],
        stream: &Stream,
        rows: &Rows,
        pass: Pass,
    ) -> Result<(Stream, Option<BalanceLosses>)> {
        let heads = model.heads();
        let (x, normed) = model.norm(tape, stream, weights, &self.attention_norm)?;
        let (weight, rope) = (&weights[self.qkv], &model.rope);
        let attended = if self.qkv_bias.is_none() && self.qk_norm.is_none() {
            rows.projected_attention(tape, &normed, weight, heads, rope)?
        } else {
            let bias = self.qkv_bias.map(|slot| &weights[slot]);
            let mut qkv = linear(tape, &normed, weight, bias)?;
            if let Some([q, k]) = self.qk_norm {
                let (q, k) = (&weights[q], &weights[k]);
                qkv = qk_norm(tape, &qkv, q, k, heads, model.config.norm_eps)?;
            }
            rows.attention(tape, &qkv, heads, rope)?
        };
        let pending = Some(linear(tape, &attended, &weights[self.output], None)?);
        let (x, normed) = model.norm(tape, &Stream { x, pending }, weights, &self.ffn_norm)?;
        let (y, losses) = match &self.ffn {
            FeedForward::Dense(slots) => (slots.forward(tape, weights, &normed)?, None),
            FeedForward::Moe(moe) => {
                let (y, losses) = moe.forward(model, tape, weights, &normed, pass)?;
                (y, Some(losses))
            }
        };
        let pending = Some(y);
        Ok((Stream { x, pending }, losses))
    }
}
