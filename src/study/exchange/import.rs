//! Starts a run from a model of another framework.

use super::saved::own_fingerprint;
use super::source::Source;
use crate::config::{Config, Layers, RouterConfig};
use crate::data::tokenizer::{BYTES, TOKENIZER_FILE};
use crate::data::{self, Corpus};
use crate::error::{Error, Result};
use crate::report::files::replace;
use crate::report::lock::FolderLock;
use crate::report::progress::Phases;
use crate::routers::{self, RouterInfo};
use crate::train;
use crate::train::checkpoint::{self, TrainerState};
use crate::train::step::StepExecutor;
use std::path::PathBuf;

/// Setting that makes the weights of a token's experts sum to 1, in routers that have it.
const RENORMALIZE: &str = "renormalize";

/// The model to import, and the configuration of its training.
pub struct Import {
    /// The model's folder.
    pub from: PathBuf,
    /// The training configuration, and the router's settings if a router other than the model's is requested. The shape of
    /// the model in it is not used.
    pub layers: Layers,
    /// Whether to use the router of `layers` instead of the model's router.
    pub own_router: bool,
    /// Whether to use the sequence length of `layers` instead of the model's longest.
    pub own_length: bool,
    /// Folder of the run.
    pub out: PathBuf,
}

impl Import {
    /// Returns the configuration of the run.
    fn config(&self, source: &Source) -> Result<Config> {
        let mut config = Config::load(&self.layers, &routers::resolve)?;
        let (told, model) = (config.model, &source.file.model);
        config.model = model.clone();
        if self.own_length {
            config.model.sequence_length = told.sequence_length;
        }
        let router = &source.file.router;
        match self.own_router {
            true => self.keep_weights_of_experts(router, &mut config.router)?,
            false => config.router = router.clone(),
        }
        data::adopt_tokenizer(&mut config.data)?;
        config.validate().map_err(of_model)?;
        Ok(config)
    }

    /// Sets `renormalize` of the requested router to the model's value, unless it was set.
    fn keep_weights_of_experts(
        &self,
        model: &RouterConfig,
        asked: &mut RouterConfig,
    ) -> Result<()> {
        if self.layers.gives("router.renormalize")? {
            return Ok(());
        }
        let renormalize = model.settings.get(RENORMALIZE).and_then(|v| v.as_bool());
        match (renormalize, knows_renormalize(routers::find(&asked.name)?)) {
            (Some(renormalize), true) => {
                asked
                    .settings
                    .insert(RENORMALIZE.into(), renormalize.into());
                Ok(())
            }
            (Some(true), false) => Err(Error::usage(
                "--router",
                "a router with the setting `renormalize`: the weights of a token's experts sum to 1 in this model",
                &asked.name,
                format!("take one of {}", routers_that_renormalize().join(", ")),
            )),
            _ => Ok(()),
        }
    }
}

/// Changes the advice of an error about the shape of the model, which `--set` cannot change here.
fn of_model(e: Error) -> Error {
    match e {
        Error::Invalid {
            op, expected, got, ..
        } if op.starts_with("model.") && op != "model.sequence_length" => Error::usage(
            op,
            expected,
            got,
            "it is the shape of the model of --from: leave train.device out, or choose another model",
        ),
        other => other,
    }
}

fn knows_renormalize(router: &RouterInfo) -> bool {
    router.settings.iter().any(|(key, _)| *key == RENORMALIZE)
}

fn routers_that_renormalize() -> Vec<&'static str> {
    let all = routers::all().into_iter();
    all.filter(|r| knows_renormalize(r))
        .map(|r| r.name)
        .collect()
}

/// Creates a run at step 0 that starts with the model's weights. Returns lines for the user.
///
/// # Errors
/// When the model cannot be read or trained, the text does not fit it or was made with another tokenizer than the model's,
/// or the run's folder already holds a run.
pub fn import(import: &Import) -> Result<Vec<String>> {
    let phases = Phases::new(4);
    phases.begin(1, "reading the files");
    let (source, out) = (Source::open(&import.from)?, &import.out);
    let config = import.config(&source)?;
    let own = own_fingerprint(source.folder())?;
    let file = source.folder().join(TOKENIZER_FILE);
    let prepare = format!("routegrad data prepare TEXT --tokenizer {}", file.display());
    let found = &config.data.tokenizer;
    if let Some(own) = own.as_ref().filter(|own| *own != found)
        && found != BYTES
    {
        return Err(Error::file(
            config.data.name(),
            format!("tokens of the model's own tokenizer, of fingerprint {own}"),
            format!("tokens of the tokenizer with fingerprint {found}"),
            format!("prepare the text again: {prepare}"),
        ));
    }
    phases.begin(2, "reading the text");
    let corpus = Corpus::load(&config.data, &config.model, config.train.seed)?;
    let _lock = FolderLock::take(out)?;
    train::refuse_existing(out)?;
    phases.begin(3, "making the model");
    let (model, _) = source.model(&config)?;
    let trainer = StepExecutor::new(&config.train, &model);
    let state = TrainerState::at_start(config, corpus.fingerprint());
    phases.begin(4, "writing the checkpoint");
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
        match (state.config.data.tokenizer.as_str(), own) {
            (BYTES, Some(own)) if own != BYTES => format!(
                "Text is read as bytes, which the model was not trained on. For its own tokens: {prepare}"
            ),
            (BYTES, _) => "Text is read as bytes.".into(),
            (tokenizer, _) => format!("Tokens are those of the tokenizer {tokenizer}."),
        },
    ])
}
