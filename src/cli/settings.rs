//! Builds the configuration of a run from its arguments.

use super::arguments::SettingsArgs;
use crate::config::{self, Config, Layers};
use crate::data;
use crate::error::Result;
use crate::routers;
use std::path::PathBuf;
use toml::Value;

impl SettingsArgs {
    /// Returns the sources of the configuration, with `file` in place of `--config`.
    pub(super) fn layers(&self, file: Option<PathBuf>) -> Layers {
        let number = |n: Option<i64>| n.map(Value::Integer);
        let text = |s: &Option<String>| s.clone().map(Value::String);
        let flags = [
            ("--router", "router.name", text(&self.router)),
            ("--steps", "train.steps", number(self.steps)),
            ("--batch", "train.sequences_per_step", number(self.batch)),
            (
                "--micro-batch",
                "train.micro_batch",
                number(self.micro_batch),
            ),
            (
                "--sequence-length",
                "model.sequence_length",
                number(self.sequence_length),
            ),
            (
                "--learning-rate",
                "train.learning_rate",
                self.learning_rate.map(Value::Float),
            ),
            (
                "--eval-interval",
                "train.eval_interval",
                number(self.eval_interval),
            ),
            ("--seed", "train.seed", number(self.seed)),
            ("--data", "data.source", text(&self.data)),
        ];
        let given = flags
            .into_iter()
            .filter_map(|(flag, key, value)| Some((flag, key, value?)));
        Layers {
            preset: self.preset.clone().unwrap_or_else(|| "tiny".into()),
            file,
            resolved: false,
            set: self.set.clone(),
            experts: self.experts.clone(),
            flags: given.collect(),
        }
    }

    /// Returns the resolved configuration.
    ///
    /// # Errors
    /// Returns an error when a key or a value is wrong, or the data cannot be opened.
    pub(super) fn configure(&self) -> Result<Config> {
        data::configure(&self.layers(self.config.clone()), &routers::resolve)
    }
}

pub(super) fn config_command(args: &SettingsArgs) -> Result<()> {
    let config = args.configure()?;
    let mut preset = Layers::preset(args.preset.as_deref().unwrap_or("tiny"));
    preset.set = vec![format!("router.name={:?}", config.router.name)];
    let defaults = Config::load(&preset, &routers::resolve)?;
    let settings = routers::find(&config.router.name)?.settings;
    say!("{}", config::described(&config, &defaults, settings)?);
    Ok(())
}
