//! Another framework's model as the beginning of a run.

use super::source::Source;
use crate::config::Layers;
use crate::data::tokenizer::BYTES;
use crate::data::{self, Corpus};
use crate::error::Result;
use crate::report::lock::FolderLock;
use crate::train;
use crate::train::checkpoint::{self, TrainerState};
use crate::train::step::StepExecutor;
use std::path::Path;

/// Makes a run at `out` that begins with the model in `from`; what the training is told comes from
/// `layers`, whose model and router are left out but for `sequence_length`, if given. Lines for the user.
///
/// # Errors
/// When the model cannot be read or trained, the text does not fit it, or `out` holds a run.
pub fn import(
    from: &Path,
    layers: &Layers,
    sequence_length: Option<usize>,
    out: &Path,
) -> Result<Vec<String>> {
    let source = Source::open(from)?;
    let mut config = source.config(layers)?;
    config.model.sequence_length = sequence_length.unwrap_or(source.file.model.sequence_length);
    data::adopt_tokenizer(&mut config.data)?;
    config.validate()?;
    let _lock = FolderLock::take(out)?;
    train::refuse_existing(out)?;
    let corpus = Corpus::load(&config.data, &config.model, config.train.seed)?;
    let (model, _) = source.model(&config)?;
    let trainer = StepExecutor::new(&config.train, &model);
    let state = TrainerState {
        step: 0,
        optimizer_steps: 0,
        skipped_in_a_row: 0,
        data: corpus.fingerprint(),
        config,
    };
    let snapshot = checkpoint::snapshot(&model, &trainer, &state)?;
    let folder = out.join(train::CHECKPOINTS);
    checkpoint::save(&folder, &snapshot, 1, checkpoint::SHARD_BYTES)?;
    train::write_config(out, &state.config)?;
    Ok(vec![
        format!("model  {}", source.folder().display()),
        format!("run    {}, at step 0", out.display()),
        format!("next   routegrad train --resume --out {}", out.display()),
        match state.config.data.tokenizer.as_str() {
            BYTES => "Text is read as bytes: the model's own tokenizer is not used.".into(),
            tokenizer => format!("Tokens are those of the tokenizer {tokenizer}."),
        },
    ])
}
