//! No token sees a later one at evaluation, under any router, and kept keys and values change no logit.

use routegrad::config::{Config, Layers};
use routegrad::model::Model;
use routegrad::model::batch::Sequences;
use routegrad::ops::cached_attention::KeyValueCache;
use routegrad::routers::{self, ROUTERS};
use routegrad::train::step::StepExecutor;
use std::rc::Rc;

const SEQUENCES: usize = 2;
const LENGTH: usize = 24;

/// A model after a step, so that default vectors are not zero, and the tokens of the step.
fn trained(router: &str, set: &[&str]) -> (Model, Vec<i32>) {
    let mut layers = Layers::preset("tiny");
    layers.set = vec![
        format!("router.name=\"{router}\""),
        "model.layers=2".into(),
        format!("model.sequence_length={LENGTH}"),
    ];
    layers.set.extend(set.iter().map(|s| s.to_string()));
    let config = Config::load(&layers, &routers::resolve).unwrap();
    let mut model = Model::new(&config).unwrap();
    let tokens: Vec<i32> = (0..SEQUENCES * (LENGTH + 1))
        .map(|i| (i * i + 7 * i) as i32 % 256)
        .collect();
    let mut trainer = StepExecutor::new(&config.train, &model);
    trainer
        .step(&mut model, &[Sequences::new(&tokens, SEQUENCES)], 1e-2)
        .unwrap();
    (model, tokens)
}

#[test]
fn logits_behind_kept_keys_and_values_are_those_of_the_whole_text() {
    for router in ROUTERS {
        let (model, tokens) = trained(router.name, &["train.dtype=\"f64\"", "model.qkv_bias=true"]);
        let cache = Rc::new(KeyValueCache::default());
        let mut before = 0;
        for end in [7, 8, 9, 20, LENGTH] {
            let found = model
                .next_token_logits_after(&cache, &tokens[before..end])
                .unwrap();
            let whole = model.next_token_logits(&tokens[..end], 1).unwrap();
            for (a, b) in found.iter().zip(&whole) {
                assert!((a - b).abs() <= 1e-12, "{} at {end}: {a} {b}", router.name);
            }
            before = end;
        }
        assert_eq!(cache.rows(), LENGTH);
        assert!(model.next_token_logits_after(&cache, &[1]).is_err());
    }
}

#[test]
fn a_later_token_changes_no_earlier_loss() {
    for router in ROUTERS {
        let (model, tokens) = trained(router.name, &[]);
        let before = model
            .token_losses(Sequences::new(&tokens, SEQUENCES))
            .unwrap();
        for at in [1, LENGTH / 2, LENGTH] {
            let mut changed = tokens.clone();
            changed[at] = (changed[at] + 1) % 256;
            let after = model
                .token_losses(Sequences::new(&changed, SEQUENCES))
                .unwrap();
            // Loss k predicts token k + 1: those before `at` must keep their bits, its own and, if
            // there is one, the next must change.
            assert_eq!(before[..at - 1], after[..at - 1], "{} at {at}", router.name);
            assert!(before[at - 1] != after[at - 1], "{} at {at}", router.name);
            assert_eq!(before[LENGTH..], after[LENGTH..], "the other sequence");
        }
    }
}
