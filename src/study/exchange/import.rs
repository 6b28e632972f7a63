//! Another framework's model as the beginning of a run.

use super::saved::own_tokenizer;
use super::source::Source;
use crate::config::{Config, Layers, RouterConfig};
use crate::data::tokenizer::BYTES;
use crate::data::{self, Corpus};
use crate::error::{Error, Result};
use crate::report::files::replace;
use crate::report::lock::FolderLock;
use crate::routers;
use crate::train;
use crate::train::checkpoint::{self, TrainerState};
use crate::train::step::StepExecutor;
use std::path::PathBuf;

/// What makes the weights of a token's experts sum to 1, in routers that know it.
const RENORMALIZE: &str = "renormalize";

/// What to import, and how to train it.
pub struct Import {
    /// The model's folder.
    pub from: PathBuf,
    /// The training, and the settings of the router if another one than the model's is asked for; the model's shape in it does
    /// not count.
    pub layers: Layers,
    /// Whether the router is that of `layers`, and not the model's own.
    pub own_router: bool,
    /// The sequence length is that of `layers`, and not the longest of the model.
    pub own_length: bool,
    /// Folder of the run.
    pub out: PathBuf,
}

impl Import {
    /// The configuration of the run.
    fn config(&self, source: &Source) -> Result<Config> {
        let mut config = source.config(&self.layers)?;
        let told = Config::load(&self.layers, &routers::resolve)?;
        if self.own_length {
            config.model.sequence_length = told.model.sequence_length;
        }
        if self.own_router {
            config.router = told.router;
            self.keep_weights_of_experts(&source.file.router, &mut config.router)?;
        }
        data::adopt_tokenizer(&mut config.data)?;
        config.validate()?;
        Ok(config)
    }

    /// The asked router's `renormalize` becomes that of the model, unless it was given.
    fn keep_weights_of_experts(
        &self,
        model: &RouterConfig,
        asked: &mut RouterConfig,
    ) -> Result<()> {
        if self.layers.gives("router.renormalize")? {
            return Ok(());
        }
        let renormalize = model.settings.get(RENORMALIZE).and_then(|v| v.as_bool());
        let settings = routers::find(&asked.name)?.settings;
        match (
            renormalize,
            settings.iter().any(|(key, _)| *key == RENORMALIZE),
        ) {
            (Some(renormalize), true) => {
                asked
                    .settings
                    .insert(RENORMALIZE.into(), renormalize.into());
                Ok(())
            }
            (Some(true), false) => Err(Error::invalid(
                "--router",
                "a router with the setting `renormalize`: the weights of a token's experts sum to 1 in this model",
                &asked.name,
                format!("take one of {}", routers_that_renormalize().join(", ")),
            )),
            _ => Ok(()),
        }
    }
}

fn routers_that_renormalize() -> Vec<String> {
    let knows = |settings: &[(&str, &str)]| settings.iter().any(|(key, _)| *key == RENORMALIZE);
    let all = routers::all().into_iter();
    all.filter(|router| knows(router.settings))
        .map(|router| router.name.to_string())
        .collect()
}

/// Makes a run at step 0 that begins with a model. Lines for the user.
///
/// # Errors
/// When the model cannot be read or trained, the text does not fit it or was made by another tokenizer than the model's, or
/// the run's folder holds a run.
pub fn import(import: &Import) -> Result<Vec<String>> {
    let (source, out) = (Source::open(&import.from)?, &import.out);
    let config = import.config(&source)?;
    let tokenizer = own_tokenizer(source.folder())?;
    if let Some(own) = tokenizer
        .as_ref()
        .filter(|own| own.fingerprint() != config.data.tokenizer)
        && config.data.tokenizer != BYTES
    {
        return Err(Error::file(
            config.data.name(),
            format!(
                "tokens of the model's own tokenizer, of fingerprint {}",
                own.fingerprint()
            ),
            format!("those of {}", config.data.tokenizer),
            format!(
                "prepare the text again: routegrad data prepare … --tokenizer {}",
                source
                    .folder()
                    .join(data::tokenizer::TOKENIZER_FILE)
                    .display()
            ),
        ));
    }
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
    for (name, content) in corpus.tokenizer_files()? {
        replace(out, name, &content)?;
    }
    train::write_config(out, &state.config)?;
    let (router, out) = (&state.config.router.name, out.display());
    Ok(vec![
        format!("model  {}", source.folder().display()),
        format!("router {router}"),
        format!("run    {out}, at step 0"),
        format!("next   routegrad train --resume --out {out}"),
        match (state.config.data.tokenizer.as_str(), tokenizer) {
            (BYTES, Some(own)) if own.fingerprint() != BYTES => format!(
                "Text is read as bytes, which the model was not trained on. For its own tokens: \
                 routegrad data prepare TEXT --tokenizer {}",
                source
                    .folder()
                    .join(data::tokenizer::TOKENIZER_FILE)
                    .display()
            ),
            (BYTES, _) => "Text is read as bytes.".into(),
            (tokenizer, _) => format!("Tokens are those of the tokenizer {tokenizer}."),
        },
    ])
}
