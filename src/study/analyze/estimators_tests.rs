//! Compares the estimators at one forward pass, and rerouted tokens, with plain loops in f64.

use super::*;
use crate::ops::dispatch::Selection;
use crate::ops::routing::{Choice, Score, scores};
use crate::ops::sampled_outputs::{Sampling, sample};
use crate::routers::{LayerPass, Routing};
use crate::study::analyze::estimators::{Compared, ESTIMATORS, compare, values_of_k};
use crate::study::analyze::regret::{Loss, reroute};
use crate::study::analyze::substitutes::RIDGE;
use crate::tape::Var;
use crate::tensor::random::{Purpose, Stream};

/// ν `[D]` and the mass of an expert, and its linear function, given by x̄ and B, by Gaussian elimination.
struct Fitted {
    mass: f64,
    mean: Vec<f64>,
    center: Vec<f64>,
    map: Vec<Vec<f64>>,
}

/// x `[D]`, and the result of [`token`] for it.
type Token<'a> = (&'a [f64], (Vec<f64>, Vec<bool>, Vec<Vec<f64>>));

fn fitted(tokens: &[Token<'_>], i: usize) -> Fitted {
    let off = tokens.iter().filter(|(_, (_, chosen, _))| !chosen[i]);
    let off: Vec<Weighted> = off.map(|(x, (p, _, e))| (p[i], *x, &e[i])).collect();
    let sum = |f: &dyn Fn(&Weighted) -> f64| -> f64 { off.iter().map(f).sum() };
    let each = |f: &dyn Fn(usize) -> f64| -> Vec<f64> { (0..HIDDEN).map(f).collect() };
    let mass = sum(&|o| o.0);
    let center = each(&|d| sum(&|o| o.0 * o.1[d]) / mass);
    let mean = each(&|d| sum(&|o| o.0 * o.2[d]) / mass);
    // [C + λ I | R], eliminated.
    let row = |a: usize| {
        let left = each(&|b| sum(&|o| o.0 * (o.1[a] - center[a]) * (o.1[b] - center[b])));
        let right = each(&|d| sum(&|o| o.0 * (o.1[a] - center[a]) * (o.2[d] - mean[d])));
        [left, right].concat()
    };
    let mut rows: Vec<Vec<f64>> = (0..HIDDEN).map(row).collect();
    let trace: f64 = (0..HIDDEN).map(|a| rows[a][a]).sum();
    (0..HIDDEN).for_each(|a| rows[a][a] += RIDGE * trace / HIDDEN as f64);
    for a in 0..HIDDEN {
        let pivot: Vec<f64> = rows[a].iter().map(|v| v / rows[a][a]).collect();
        for (b, row) in rows.iter_mut().enumerate() {
            let factor = if b == a { 0.0 } else { row[a] };
            let pairs = row.iter_mut().zip(&pivot);
            pairs.for_each(|(r, p)| *r -= factor * p);
        }
        rows[a] = pivot;
    }
    let map = rows.into_iter().map(|r| r[HIDDEN..].to_vec()).collect();
    Fitted {
        mass,
        mean,
        center,
        map,
    }
}

/// Returns ê after 64 draws, with β = 0.9.
fn sampled(tokens: &[Token<'_>]) -> Vec<Vec<f64>> {
    let p: Vec<f64> = tokens.iter().flat_map(|(_, (p, ..))| p.clone()).collect();
    let p = Tensor::from_slice([tokens.len(), EXPERTS], &p);
    let chosen = Selection::new(tokens.len(), EXPERTS, |t, list| {
        let chosen = (0..).zip(&tokens[t].1.1).filter(|(_, c)| **c);
        list.extend(chosen.map(|(e, _)| e));
    });
    let chosen = chosen.unwrap();
    let mut vectors = vec![vec![0.0; HIDDEN]; EXPERTS];
    for step in 0..64 {
        let sampling = Sampling {
            stream: Stream::new(0, Purpose::Check, step, 0),
            per_step: 16,
            samples: 0..16,
            weighted: true,
            dist: &SingleRank,
        };
        let drawn = sample(&p, &chosen, &sampling).unwrap().unwrap();
        let times = drawn.times().to_f64().unwrap();
        for (i, vector) in vectors.iter_mut().enumerate() {
            for (d, v) in vector.iter_mut().enumerate() {
                let outputs = tokens.iter().map(|(_, (.., e))| e[i][d]).enumerate();
                let sum: f64 = outputs.map(|(t, e)| times[t * EXPERTS + i] * e).sum();
                *v = 0.9 * *v + 0.1 * sum / 16.0;
            }
        }
    }
    vectors
}

/// A weight, a token and an expert's output for it.
type Weighted<'a> = (f64, &'a [f64], &'a Vec<f64>);

/// Returns the comparison of a model with this router in f64 and K = 2, and what plain loops need to check it.
fn compared(router: &str) -> (Config, Model, Compared) {
    let config = micro(router, &["train.dtype=\"f64\"", "model.top_k=2"]);
    let model = Model::new(&config).unwrap();
    let (vectors, text, training) = ([small_vectors()], batch(5), tokens(3));
    let training = Sequences::new(&training, SEQUENCES);
    let by_k = compare(&SingleRank, &config, &model, &vectors, &text, training).unwrap();
    assert_eq!(by_k.iter().map(|(k, _)| *k).collect::<Vec<_>>(), [1, 2, 3]);
    let mut layers = by_k.into_iter().nth(1).unwrap().1;
    assert_eq!(layers.len(), 1);
    (config, model, layers.remove(0))
}

#[test]
fn estimators_at_one_forward_pass_are_those_of_the_formulas_in_plain_loops() {
    for router in ["default", "topk"] {
        let (config, model, found) = compared(router);
        let own = || routers::build(&config.router).unwrap();
        let vectors = small_vectors();
        let here = at(&config, &model, &vectors, &tokens(5), own());
        let there = at(&config, &model, &vectors, &tokens(3), own());
        let seen = there.x.chunks(HIDDEN).map(|x| (x, token(&model, x, 2)));
        let seen: Vec<Token<'_>> = seen.collect();
        let fit: Vec<Fitted> = (0..EXPERTS).map(|i| fitted(&seen, i)).collect();
        let drawn = sampled(&seen);
        let flat = vectors.to_f64().unwrap();
        let row = |i: usize| &flat[i * HIDDEN..(i + 1) * HIDDEN];

        let with = |off: &Off| gradients(&model, &here, 2, off);
        let exact = with(&|_, g, _, e| dot(g, e));
        let topk = with(&|_, _, _, _| 0.0);
        let default = with(&|_, g, i, _| dot(g, row(i)));
        let mean = with(&|_, g, i, _| dot(g, &fit[i].mean));
        let sampled = with(&|_, g, i, _| dot(g, &drawn[i]));
        let linear = with(&|x, g, i, _| {
            let value = |d: usize| -> f64 {
                let along = (0..HIDDEN).map(|a| (x[a] - fit[i].center[a]) * fit[i].map[a][d]);
                fit[i].mean[d] + along.sum::<f64>()
            };
            (0..HIDDEN).map(|d| g[d] * value(d)).sum()
        });
        for (what, qualities, scale) in [
            (0, &found.dz, found.scale_dz),
            (1, &found.dw, found.scale_dw),
        ] {
            // The scale by its definition, and the gradient at it.
            let [from_topk, missed] = [&default, &exact].map(|of| -> Vec<f64> {
                let pairs = of[what].iter().zip(&topk[what]);
                pairs.map(|(a, b)| a - b).collect()
            });
            let best = dot(&missed, &from_topk) / dot(&from_topk, &from_topk);
            let error = (scale.unwrap() - best).abs();
            assert!(error <= 1e-10 * best.abs(), "{router}");
            let at_scale = |c: f64| -> Vec<f64> {
                let pairs = topk[what].iter().zip(&from_topk);
                pairs.map(|(t, d)| t + c * d).collect()
            };
            let shrunk = at_scale(best);
            let expected = [
                &topk[what],
                &default[what],
                &shrunk,
                &sampled[what],
                &mean[what],
                &linear[what],
                &exact[what],
            ];
            assert_eq!(ESTIMATORS.len(), expected.len());
            for ((name, found), expected) in ESTIMATORS.iter().zip(qualities).zip(expected) {
                let [cosine, error] = quality(expected, &exact[what]);
                let case = format!("{router} {name} {what}: {found:?}, {cosine} {error}");
                assert!((found.cosine.unwrap() - cosine).abs() <= 1e-10, "{case}");
                assert!((found.error.unwrap() - error).abs() <= 1e-10, "{case}");
            }
            // No other scale has a smaller error.
            let least = qualities[2].error.unwrap();
            for c in [0.0, 1.0, best - 1e-3, best + 1e-3, -best] {
                assert!(quality(&at_scale(c), &exact[what])[1] > least, "{c}");
            }
            let densemixer = qualities[6];
            assert!((densemixer.cosine.unwrap() - 1.0).abs() <= 1e-12);
            assert!(densemixer.error.unwrap() <= 1e-12);
            assert!(qualities[0].error.unwrap() > 0.01);
        }
        let weighted = |a: &dyn Fn(usize) -> Vec<f64>, b: &dyn Fn(usize) -> Vec<f64>| -> f64 {
            let products = (0..EXPERTS).map(|i| fit[i].mass * dot(&a(i), &b(i)));
            products.sum()
        };
        let (own, other) = (|i: usize| row(i).to_vec(), |i: usize| fit[i].mean.clone());
        let [aa, bb, ab] = [
            weighted(&own, &own),
            weighted(&other, &other),
            weighted(&own, &other),
        ];
        assert!((found.norm_ratio.unwrap() - (aa / bb).sqrt()).abs() <= 1e-10);
        assert!((found.cosine.unwrap() - ab / (aa * bb).sqrt()).abs() <= 1e-10);
    }
}

#[test]
fn values_of_k_are_powers_of_two_the_models_k_and_e_minus_one() {
    assert_eq!(values_of_k(8, 1), [1, 2, 4, 7]);
    assert_eq!(values_of_k(32, 6), [1, 2, 4, 6, 8, 16, 31]);
    assert_eq!(values_of_k(2, 2), [1]);
    assert!(values_of_k(1, 1).is_empty());
}

/// `topk` with given choices.
struct Given(Selection);

impl Router for Given {
    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> crate::error::Result<Routing> {
        let scores = scores(tape, x, weight, Score::Softmax, Choice::top_k(layer.top_k))?;
        let dispatch = layer.select(|| scores.chosen(self.0.clone()))?;
        Ok(Routing::new(scores.values.clone(), scores, dispatch))
    }
}

#[test]
fn a_rerouted_token_has_the_loss_of_a_model_with_this_choice() {
    for top_k in [1, 2] {
        let set = format!("model.top_k={top_k}");
        let config = micro("topk", &["train.dtype=\"f64\"", &set]);
        let model = Model::new(&config).unwrap();
        let batch = MicroBatches {
            micro_batch: SEQUENCES,
            ..batch(5)
        };
        let vectors = [small_vectors()];
        let found = reroute(&SingleRank, &config, &model, &vectors, &batch).unwrap();
        // 32 tokens: 16 positions in each of two sequences.
        assert_eq!((found.len(), found[0].len()), (1, 32));
        let own = routers::build(&config.router).unwrap();
        let x = at(&config, &model, &vectors[0], &tokens(5), own).x;
        let all: Vec<_> = x.chunks(HIDDEN).map(|x| token(&model, x, top_k)).collect();
        let losses = |changed: Option<(usize, usize, usize)>| -> Vec<f64> {
            let selection = Selection::new(all.len(), EXPERTS, |t, list| {
                let chosen = (0..EXPERTS).filter(|e| match changed {
                    Some((at, from, to)) if at == t => *e == to || *e != from && all[t].1[*e],
                    _ => all[t].1[*e],
                });
                list.extend(chosen.map(|e| e as i32));
            });
            let given = Box::new(Given(selection.unwrap()));
            let watched = Watched::new(&config, given, &model).unwrap();
            watched.model.token_losses(batch.all.all()).unwrap()
        };
        let base = losses(None);
        let is_at = |row: usize, loss: &Loss| (base[row] - loss.own).abs() <= 1e-12;
        let mut seen = 0;
        for rerouted in found[0].iter().take(6) {
            let mut rows = (0..all.len()).filter(|row| is_at(*row, &rerouted.chosen));
            let (row, None) = (rows.next().unwrap(), rows.next()) else {
                continue;
            };
            let (p, chosen, _) = &all[row];
            let mut order: Vec<usize> = (0..EXPERTS).collect();
            order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
            let (own, others): (Vec<usize>, Vec<usize>) =
                order.into_iter().partition(|e| chosen[*e]);
            assert_eq!(rerouted.others.len(), EXPERTS - top_k);
            for (other, loss) in others.iter().zip(&rerouted.others) {
                let changed = losses(Some((row, *own.last().unwrap(), *other)));
                let end = (row / LENGTH + 1) * LENGTH;
                let from_here: f64 = changed[row..end].iter().sum();
                assert!((changed[row] - loss.own).abs() <= 1e-12);
                assert!((from_here - loss.from_here).abs() <= 1e-12);
                // Earlier tokens do not change; products with other rows may round differently.
                for at in row / LENGTH * LENGTH..row {
                    assert!((changed[at] - base[at]).abs() <= 1e-12);
                }
                seen += 1;
            }
        }
        assert!(seen > 6, "{seen}");
    }
}

#[test]
fn route_regret_does_not_apply_if_all_experts_are_chosen() {
    let config = micro("topk", &["model.top_k=4"]);
    let report = report(&config, &Model::new(&config).unwrap());
    let regret = report.get("route-regret").unwrap();
    assert!(regret.notes[0].starts_with("Does not apply"));
    assert!(regret.table.rows.is_empty() && regret.figure.is_none());
}
