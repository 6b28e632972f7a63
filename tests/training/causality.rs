//! No token sees a later one at evaluation, under any router.

use routegrad::config::{Config, Layers};
use routegrad::model::Model;
use routegrad::model::batch::Sequences;
use routegrad::routers::{self, ROUTERS};
use routegrad::train::step::StepExecutor;

#[test]
fn a_later_token_changes_no_earlier_loss() {
    const SEQUENCES: usize = 2;
    const LENGTH: usize = 24;
    for router in ROUTERS {
        let mut layers = Layers::preset("tiny");
        layers.set = vec![
            format!("router.name=\"{}\"", router.name),
            "model.layers=2".into(),
            format!("model.sequence_length={LENGTH}"),
        ];
        let config = Config::load(&layers, &routers::resolve).unwrap();
        let mut model = Model::new(&config).unwrap();
        let tokens: Vec<i32> = (0..SEQUENCES * (LENGTH + 1))
            .map(|i| (i * i + 7 * i) as i32 % 256)
            .collect();
        // A step, so that default vectors are not zero.
        let mut trainer = StepExecutor::new(&config.train, &model);
        trainer
            .step(&mut model, &[Sequences::new(&tokens, SEQUENCES)], 1e-2)
            .unwrap();

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
