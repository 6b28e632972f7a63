//! A router of another crate: does it matter that routing is learned?
//!
//! `hashed` sends each token to K experts picked by its position alone, and learns only how much to weigh them. Registered, it
//! is known by name to configurations and checkpoints. This program trains it on the embedded speeches, resumes the run,
//! evaluates it and lets it continue a text.
//!
//! ```sh
//! cargo run --release --example own_router
//! ```

use routegrad::ops::dispatch::Selection;
use routegrad::ops::router::{NonFinite, TopK};
use routegrad::ops::routing::{Choice, Score, scores};
use routegrad::prelude::*;
use routegrad::routers::Balance;
use routegrad::study::eval;
use routegrad::study::exchange::Saved;
use routegrad::study::generate::{self, Sampling};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

/// Experts by position, weights by softmax.
#[derive(Default)]
struct Hashed;

impl Router for Hashed {
    fn route(&self, tape: &Tape, x: &Var, w: &Var, layer: &mut LayerPass) -> Result<Routing> {
        let scores = scores(tape, x, w, Score::Softmax, Choice::none())?;
        let shape = scores.values.tensor().shape();
        let (tokens, experts, k, depth) = (shape[0], shape[1], layer.top_k, layer.layer);
        // `select` caches the choice, so that recomputed activations see the same one.
        let dispatch = layer.select(|| {
            let selection = Selection::new(tokens, experts, |token, chosen| {
                let first = (token.wrapping_mul(2_654_435_761) >> 7).wrapping_add(depth);
                let mut own: Vec<i32> = (0..k).map(|i| ((first + i) % experts) as i32).collect();
                own.sort_unstable();
                chosen.extend(own);
            })?;
            let non_finite = NonFinite::At(None);
            Ok(TopK {
                selection,
                non_finite,
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
    routers::register(RouterInfo::new::<Hashed>("hashed", "experts by position"))?;
    let out = PathBuf::from(std::env::args().nth(1).unwrap_or("runs/hashed".into()));
    for steps in [40, 60] {
        let keys = ["router.name=hashed", &format!("train.steps={steps}")];
        let builder = Trainer::builder(routegrad::preset("tiny", &keys)?);
        let run = RunOptions::new(&out).resumed();
        let mut trainer = builder.hook(Evaluation).run_folder(run).build()?;
        trainer.run(&AtomicBool::new(false))?;
    }
    let (saved, _) = Saved::open(&out)?;
    let (model, state) = saved.load(|_| ())?;
    let report = eval::run(&model, &state, None, 64)?;
    println!("{:.3} bits per byte", report.bits_per_byte());
    let (prompt, sampling) = ("My fellow citizens, ", Sampling::default());
    generate::run(&saved, prompt, 200, &sampling, &mut std::io::stdout())?;
    Ok(())
}
