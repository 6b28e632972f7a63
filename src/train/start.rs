//! What a run begins with: a new model, or that of a checkpoint.

use crate::config::Config;
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::routers;
use crate::train::checkpoint::{self, Checkpoint, TrainerState};
use crate::train::step::Trainer;

/// A run that has done no step.
pub(super) fn anew(
    config: Config,
    data: String,
    dist: Box<dyn Collective>,
) -> Result<(Model, Trainer, TrainerState)> {
    let model = Model::with_router(&config, routers::build(&config.router)?, dist)?;
    let trainer = Trainer::new(&config.train, &model);
    let state = TrainerState {
        step: 0,
        optimizer_steps: 0,
        skipped_in_a_row: 0,
        data,
        config,
    };
    Ok((model, trainer, state))
}

/// Goes on from `saved` with a configuration that may differ in what does not make it another run.
pub(super) fn resume(
    saved: &Checkpoint,
    config: Config,
    data: String,
    dist: Box<dyn Collective>,
) -> Result<(Model, Trainer, TrainerState)> {
    let device = config.train.device;
    let (model, mut state) = checkpoint::load_model_on(saved, |c| c.train.device = device, dist)?;
    let old = &state.config;
    for (what, same) in [
        ("model", old.model == config.model),
        ("router", old.router == config.router),
        ("train.seed", old.train.seed == config.train.seed),
        ("train.dtype", old.train.dtype == config.train.dtype),
        (
            "train.bf16_moments",
            old.train.bf16_moments == config.train.bf16_moments,
        ),
        (
            "train.sequences_per_step",
            old.train.sequences_per_step == config.train.sequences_per_step,
        ),
        ("data", state.data == data),
        (
            "data.document_boundaries",
            old.data.document_boundaries == config.data.document_boundaries,
        ),
    ] {
        if !same {
            return Err(Error::invalid(
                "train --resume",
                format!("the {what} that the run began with"),
                "another one",
                "put it back, or begin a new run under another --name",
            ));
        }
    }
    let mut trainer = Trainer::new(&config.train, &model);
    checkpoint::load_trainer(saved, &state, &model, &mut trainer)?;
    state.config = config;
    Ok((model, trainer, state))
}
