//! Compares estimators of the router's gradient at the same forward pass and the same incoming gradient g. There
//! `densemixer` is exact: `dz_j = p_j (s_j − Σ_i p_i s_i)` with `s_i = ⟨g, e_i(x)⟩` of every expert. The estimators
//! differ only in what replaces `e_i` for experts outside the set A of chosen experts.
//!
//! The forward pass is the model's own, with K changed in all MoE layers together and with frozen state. Substitutes
//! are fitted on training text with the same model and the same K.

use super::gradients::{
    LayerAt, MicroBatches, backward, estimator, layer_weights, own_method, rounded,
};
use super::probe::Seen;
use super::shares::shared_out_known;
use super::substitutes::{LayerWeights, Substitutes};
use crate::config::Config;
use crate::dist::Collective;
use crate::error::Result;
use crate::model::Model;
use crate::model::batch::Sequences;
use crate::routers::default::{DefaultMoe, VECTORS};
use crate::routers::densemixer::DenseMixer;
use crate::routers::topk::TopK;
use crate::routers::{Phase, Router};
use crate::tensor::Tensor;

/// The estimators that are compared, in the order of the tables.
pub const ESTIMATORS: [&str; 7] = [
    "topk",
    "default",
    "default, shrunk to c*",
    "default, sampled",
    "mean over non-choosing tokens",
    "linear in x",
    "densemixer",
];

/// Indices of the estimators whose difference from the exact gradient is measured: [`ESTIMATORS`] without the shrunk
/// one, which is computed from two of them.
const TOPK: usize = 0;
const DEFAULT: usize = 1;
const MEASURED: usize = 6;

/// The cosine with the exact gradient, and the distance from it divided by its norm; none where a norm is 0.
#[derive(Clone, Copy, Debug)]
pub struct Quality {
    pub cosine: Option<f64>,
    pub error: Option<f64>,
}

/// The comparison for one MoE layer at one K.
pub struct Compared {
    /// Of dW `[E, D]` and of dz `[T, E]`, for each of [`ESTIMATORS`].
    pub dw: Vec<Quality>,
    pub dz: Vec<Quality>,
    /// c* of both: the scale of the ê term at which the squared error is least.
    pub scale_dw: Option<f64>,
    pub scale_dz: Option<f64>,
    /// The norm ratio |ê| / |ν| and the cosine of ê and ν over all experts of the layer. The weight of an expert is the
    /// sum of its probabilities over the tokens that did not choose it.
    pub norm_ratio: Option<f64>,
    pub cosine: Option<f64>,
}

/// Length of an encoded [`Compared`]: two numbers for dW and for dz of each estimator, and four more.
const NUMBERS: usize = 4 * ESTIMATORS.len() + 4;

impl Compared {
    /// Encodes it as numbers, for other ranks.
    fn numbers(&self) -> Vec<Option<f64>> {
        let qualities = self.dw.iter().chain(&self.dz);
        let qualities = qualities.flat_map(|q| [q.cosine, q.error]);
        let others = [self.scale_dw, self.scale_dz, self.norm_ratio, self.cosine];
        qualities.chain(others).collect()
    }

    /// Decodes it from [`NUMBERS`] numbers.
    fn of(numbers: &[Option<f64>]) -> Self {
        let (qualities, others) = numbers.split_at(NUMBERS - 4);
        let quality = |q: &[Option<f64>]| Quality {
            cosine: q[0],
            error: q[1],
        };
        let mut dw: Vec<Quality> = qualities.chunks(2).map(quality).collect();
        let dz = dw.split_off(ESTIMATORS.len());
        Compared {
            dw,
            dz,
            scale_dw: others[0],
            scale_dz: others[1],
            norm_ratio: others[2],
            cosine: others[3],
        }
    }
}

/// Returns the values of K that are compared: powers of two, the model's own K and E − 1.
pub fn values_of_k(experts: usize, own: usize) -> Vec<usize> {
    let powers = (0..usize::BITS).map(|i| 1 << i);
    let mut all: Vec<usize> = powers.take_while(|k| *k < experts).collect();
    all.extend([own, experts - 1]);
    all.retain(|k| (1..experts).contains(k));
    all.sort_unstable();
    all.dedup();
    all
}

/// Returns the comparison for every K of [`values_of_k`] and every MoE layer: `[(K, [MoE layer])]`.
pub fn compare(
    dist: &dyn Collective,
    config: &Config,
    source: &Model,
    vectors: &[Tensor],
    batch: &MicroBatches,
    training: Sequences<'_>,
) -> Result<Vec<(usize, Vec<Compared>)>> {
    let model = &config.model;
    let by_k = values_of_k(model.num_experts, model.top_k);
    let found = shared_out_known(dist, by_k.len(), |i| {
        let layers = compare_at(config, source, vectors, batch, training, by_k[i])?;
        Ok(layers.iter().flat_map(Compared::numbers).collect())
    })?;
    let layers = |numbers: Vec<Option<f64>>| numbers.chunks(NUMBERS).map(Compared::of).collect();
    Ok(by_k
        .into_iter()
        .zip(found.into_iter().map(layers))
        .collect())
}

/// The input and the choices of a layer in a micro-batch, with its incoming gradient g `[T, D]`.
struct Part {
    seen: Seen,
    g: Tensor,
}

fn compare_at(
    config: &Config,
    source: &Model,
    vectors: &[Tensor],
    batch: &MicroBatches,
    training: Sequences<'_>,
    top_k: usize,
) -> Result<Vec<Compared>> {
    let router = own_method(config)?.router(config)?;
    let watched = estimator(config, source, vectors, router, top_k)?;
    let fitted_on = watched.see(training, Phase::Frozen)?;
    let mut parts: Vec<Vec<Part>> = fitted_on.iter().map(|_| Vec::new()).collect();
    backward(&watched, batch, |store| {
        for (l, seen) in watched.take().into_iter().enumerate() {
            if let Some(g) = store.get(watched.slot(l)) {
                let g = g.clone();
                parts[l].push(Part { seen, g });
            }
        }
        Ok(())
    })?;
    let weights = layer_weights(&watched.model)?.into_iter();
    let layers = weights.zip(&fitted_on).zip(&parts).zip(vectors);
    layers
        .map(|(((weights, fitted_on), parts), vectors)| {
            let substitutes = Substitutes::fit(weights, fitted_on)?;
            compare_layer(config, weights, vectors, &substitutes, parts, top_k)
        })
        .collect()
}

fn compare_layer(
    config: &Config,
    weights: LayerWeights<'_>,
    vectors: &Tensor,
    substitutes: &Substitutes,
    parts: &[Part],
    top_k: usize,
) -> Result<Compared> {
    let (experts, width) = (config.model.num_experts, config.model.hidden);
    let like = |values: &[f64]| rounded(vectors.dtype(), vectors.shape(), values);
    let [mean, sampled] = [like(&substitutes.mean)?, like(&substitutes.sampled)?];
    let vectors_of = [vectors, &sampled, &mean];
    let mut gram = Gram::default();
    let mut dw = vec![vec![0.0; experts * width]; 1 + MEASURED];
    for part in parts {
        let x = part.seen.x.to_f64()?;
        let dz = logit_gradients(config, weights, vectors_of, substitutes, part, top_k)?;
        gram.add(&dz);
        for (dw, dz) in dw.iter_mut().zip(&dz) {
            for (x, dz) in x.chunks(width).zip(dz.chunks(experts)) {
                for (row, dz) in dw.chunks_mut(width).zip(dz) {
                    row.iter_mut().zip(x).for_each(|(w, x)| *w += dz * x);
                }
            }
        }
    }
    let mut of_weights = Gram::default();
    of_weights.add(&dw);
    let [norm_ratio, cosine] = beside(&vectors.to_f64()?, substitutes);
    Ok(Compared {
        dw: of_weights.qualities(),
        dz: gram.qualities(),
        scale_dw: of_weights.scale(),
        scale_dz: gram.scale(),
        norm_ratio,
        cosine,
    })
}

/// Returns the exact dz `[T, E]`, followed by the differences of the measured estimators from it.
fn logit_gradients(
    config: &Config,
    weights: LayerWeights<'_>,
    [vectors, sampled, mean]: [&Tensor; 3],
    substitutes: &Substitutes,
    part: &Part,
    top_k: usize,
) -> Result<Vec<Vec<f64>>> {
    let Seen { x, chosen, .. } = &part.seen;
    let experts = config.model.num_experts;
    let z = weights.logits(x)?;
    let by_router = |router: &dyn Router, vectors: &Tensor| {
        let state = [(VECTORS, vectors.clone())];
        let layer = LayerAt {
            z: &z,
            x,
            g: &part.g,
            weights,
            state: &state,
        };
        layer.logit_gradient(config, router, top_k)
    };
    let p = weights.probabilities(&z)?.to_f64()?;
    let (x64, g64) = (x.to_f64()?, part.g.to_f64()?);
    let width = config.model.hidden;
    let [mut exact, mut linear] = [vec![0.0; p.len()], vec![0.0; p.len()]];
    for e in 0..experts {
        let outputs = weights.outputs(x, e)?;
        let stand_in = substitutes.linear_dots(e, &x64, &g64);
        let rows = outputs.chunks(width).zip(g64.chunks(width));
        for (t, (row, g)) in rows.enumerate() {
            let s: f64 = row.iter().zip(g).map(|(e, g)| e * g).sum();
            exact[t * experts + e] = s;
            linear[t * experts + e] = match chosen.experts(t).contains(&(e as i32)) {
                true => s,
                false => stand_in[t],
            };
        }
    }
    through_softmax(&p, &mut exact, experts);
    through_softmax(&p, &mut linear, experts);
    let default = DefaultMoe::default();
    let mut found = vec![
        by_router(&TopK::default(), vectors)?,
        by_router(&default, vectors)?,
        by_router(&default, sampled)?,
        by_router(&default, mean)?,
        linear,
        by_router(&DenseMixer::default(), vectors)?,
    ];
    for dz in &mut found {
        dz.iter_mut().zip(&exact).for_each(|(dz, e)| *dz -= e);
    }
    found.insert(0, exact);
    Ok(found)
}

/// Replaces s by `dz_j = p_j (s_j − Σ_i p_i s_i)`, in rows of E.
fn through_softmax(p: &[f64], s: &mut [f64], experts: usize) {
    for (p, s) in p.chunks(experts).zip(s.chunks_mut(experts)) {
        let mean: f64 = p.iter().zip(&*s).map(|(p, s)| p * s).sum();
        s.iter_mut().zip(p).for_each(|(s, p)| *s = p * (*s - mean));
    }
}

/// Inner products of all pairs of the exact gradient and the differences from it.
#[derive(Default)]
struct Gram([[f64; 1 + MEASURED]; 1 + MEASURED]);

impl Gram {
    /// Adds the inner products of `parts`: the exact gradient, then the differences.
    fn add(&mut self, parts: &[Vec<f64>]) {
        for (i, row) in self.0.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                *sum += parts[i]
                    .iter()
                    .zip(&parts[j])
                    .map(|(a, b)| a * b)
                    .sum::<f64>();
            }
        }
    }

    /// Returns the quality of the exact gradient plus `Σ c_n δ_n`, where δ_n are the differences.
    fn quality(&self, c: [f64; MEASURED]) -> Quality {
        let along: f64 = (0..MEASURED).map(|n| c[n] * self.0[0][1 + n]).sum();
        let square: f64 = (0..MEASURED)
            .flat_map(|n| (0..MEASURED).map(move |m| (n, m)))
            .map(|(n, m)| c[n] * c[m] * self.0[1 + n][1 + m])
            .sum();
        let exact = self.0[0][0];
        let norms = (exact * (exact + 2.0 * along + square)).sqrt();
        let real = |x: f64| Some(x).filter(|x| x.is_finite());
        Quality {
            cosine: real((exact + along) / norms),
            error: real((square.max(0.0) / exact).sqrt()),
        }
    }

    /// Returns the scale c* at which `topk + c (default − topk)` has the smallest squared error.
    fn scale(&self) -> Option<f64> {
        let of = |n: usize, m: usize| self.0[1 + n][1 + m];
        // c* = ⟨−δ_topk, d⟩ / ⟨d, d⟩ with d = δ_default − δ_topk.
        let square = of(DEFAULT, DEFAULT) - 2.0 * of(DEFAULT, TOPK) + of(TOPK, TOPK);
        let missed = of(TOPK, TOPK) - of(TOPK, DEFAULT);
        Some(missed / square).filter(|c| c.is_finite())
    }

    /// Returns the quality of each of [`ESTIMATORS`].
    fn qualities(&self) -> Vec<Quality> {
        let measured = |n: usize| {
            let mut c = [0.0; MEASURED];
            c[n] = 1.0;
            self.quality(c)
        };
        let mut all: Vec<Quality> = (0..MEASURED).map(measured).collect();
        let shrunk = self.scale().map_or(all[TOPK], |scale| self.at_scale(scale));
        all.insert(DEFAULT + 1, shrunk);
        all
    }

    /// Returns the quality of `topk + scale (default − topk)`.
    fn at_scale(&self, scale: f64) -> Quality {
        let mut c = [0.0; MEASURED];
        (c[TOPK], c[DEFAULT]) = (1.0 - scale, scale);
        self.quality(c)
    }
}

/// Returns |ê| / |ν| and cos(ê, ν) over all experts of a layer, weighted by their mass.
fn beside(vectors: &[f64], substitutes: &Substitutes) -> [Option<f64>; 2] {
    let width = vectors.len() / substitutes.mass.len();
    let weighted = |a: &[f64], b: &[f64]| -> f64 {
        let rows = a.chunks(width).zip(b.chunks(width)).zip(&substitutes.mass);
        rows.map(|((a, b), w)| w * a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>())
            .sum()
    };
    let mean = &substitutes.mean;
    let [own, other] = [weighted(vectors, vectors), weighted(mean, mean)].map(f64::sqrt);
    [own / other, weighted(vectors, mean) / (own * other)]
        .map(|x| Some(x).filter(|x| x.is_finite()))
}
