//! A router and a training loop of one's own: does it matter that routing is learned?
//!
//! `Hashed` sends each token to K experts picked by its position alone, and learns only how much to
//! weigh them. This program trains it beside `topk` on the embedded speeches and prints both.
//!
//! ```sh
//! cargo run --release --example own_router
//! ```

use routegrad::config::{Config, Layers};
use routegrad::data::Corpus;
use routegrad::dist::SingleRank;
use routegrad::error::Result;
use routegrad::model::Model;
use routegrad::ops::dispatch::Selection;
use routegrad::ops::router::{NonFinite, TopK};
use routegrad::ops::routing::{Choice, Score, scores};
use routegrad::routers::{self, Balance, LayerPass, Router, Routing};
use routegrad::tape::{Tape, Var};
use routegrad::train::step::StepExecutor;

/// Experts by position, weights by softmax.
struct Hashed;

impl Router for Hashed {
    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing> {
        let scores = scores(tape, x, weight, Score::Softmax, Choice::none())?;
        let shape = scores.values.tensor().shape();
        let (tokens, experts, k, depth) = (shape[0], shape[1], layer.top_k, layer.layer);
        // `select` keeps the choice, so that recomputed activations see the same one.
        let dispatch = layer.select(|| {
            let selection = Selection::new(tokens, experts, |token, chosen| {
                let first = (token.wrapping_mul(2_654_435_761) >> 7).wrapping_add(depth);
                let mut own: Vec<i32> = (0..k).map(|i| ((first + i) % experts) as i32).collect();
                own.sort_unstable();
                chosen.extend(own);
            })?;
            Ok(TopK {
                selection,
                non_finite: NonFinite::At(None),
            })
        })?;
        Ok(Routing::new(scores.values.clone(), scores, dispatch))
    }

    /// The choice is balanced already.
    fn balance(&self) -> Balance {
        Balance::None
    }
}

fn main() -> Result<()> {
    let mut layers = Layers::preset("tiny");
    layers.set = vec!["train.steps=60".into()];
    let config = Config::load(&layers, &routers::resolve)?;
    let corpus = Corpus::load(&config.data, &config.model, config.train.seed)?;
    let sequences = config.train.sequences_per_step;

    let contenders: Vec<(&str, Box<dyn Router>)> = vec![
        ("hashed", Box::new(Hashed)),
        ("topk", Box::new(routers::topk::TopK::default())),
    ];
    for (name, router) in contenders {
        let mut model = Model::with_router(&config, router, Box::new(SingleRank))?;
        let mut trainer = StepExecutor::new(&config.train, &model);
        for step in 0..config.train.steps {
            let first = step * sequences as u64;
            let batch = corpus.sequences(first..first + sequences as u64);
            let report = trainer.step(&mut model, &[batch.all()], 3e-3)?;
            if step % 20 == 19 {
                let loss = report.cross_entropy;
                println!("{name:7} step {:3}  loss {loss:.3} nats per byte", step + 1);
            }
        }
    }
    Ok(())
}
