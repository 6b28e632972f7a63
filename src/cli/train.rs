//! `routegrad train`: what it begins with, the run, and what it says at the end.

use super::arguments::TrainArgs;
use super::process::{start_ranks, watch_signals};
use crate::config::{Config, Layers};
use crate::data;
use crate::device::Device;
use crate::error::Result;
use crate::routers;
use crate::study::{hooks, plan};
use crate::train::{self, Outcome, RunOptions};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use toml::Value;

pub(super) fn train_command(args: &TrainArgs, threads: Option<usize>) -> Result<()> {
    let dist = start_ranks(&args.ranks, threads)?;
    // A run that goes on has its configuration in its folder; a new one may be named after it.
    let (config, out) = if args.resume {
        let out = args.folder(args.router.as_deref().unwrap_or("default"));
        let file = Some(out.join(train::CONFIG_FILE));
        (Config::load(&args.layers(file), &routers::resolve)?, out)
    } else {
        let config = data::configure(&args.layers(args.config.clone()), &routers::resolve)?;
        let out = args.folder(&config.router.name);
        (config, out)
    };
    let stop = Arc::new(AtomicBool::new(false));
    watch_signals(&stop)?;
    let options = RunOptions {
        out: out.clone(),
        resume: args.resume,
        checkpoints: !args.no_checkpoint,
        timeline: args.timeline,
        quiet: args.quiet,
    };
    let device = config.train.device;
    device.prepare()?;
    let planned = plan::Memory::of(&config, plan::Target::H200)?.total();
    if device == Device::Cuda {
        crate::device::reserve(device, planned as usize)?;
    }
    let report = hooks::train_on(dist.clone(), config, &options, &stop)?;
    if dist.rank() != 0 {
        return Ok(());
    }
    if device != Device::Cpu {
        let peak = crate::device::take_peak(device) as f64;
        say!(
            "memory of {device}: {:.3} GB at most, {:.3} GB planned",
            peak / 1e9,
            planned as f64 / 1e9
        );
    }
    let (place, step) = (out.display(), report.step);
    if let (Outcome::Finished, Some(loss)) = (report.outcome, report.validation_loss) {
        say!("validation loss {loss:.4} nats per token after {step} steps");
    }
    match report.outcome {
        Outcome::Stopped if options.checkpoints => {
            say!(
                "stopped and saved at step {step}; go on with: routegrad train --out {place} --resume"
            );
        }
        Outcome::Stopped => say!("stopped at step {step}"),
        Outcome::Finished if options.checkpoints => {
            say!("log, pictures and checkpoints: {place}");
            say!("see it speak: routegrad generate --model {place}");
        }
        Outcome::Finished => say!("log and pictures: {place}"),
    }
    Ok(())
}

impl TrainArgs {
    /// `--out`, or runs/NAME.
    fn folder(&self, router: &str) -> PathBuf {
        if let Some(out) = &self.out {
            return out.clone();
        }
        let name = self.name.clone().unwrap_or_else(|| {
            let preset = self.preset.as_deref().unwrap_or("tiny");
            let parts = [Some(preset), self.experts.as_deref(), Some(router)];
            parts.into_iter().flatten().collect::<Vec<_>>().join("-")
        });
        PathBuf::from("runs").join(name)
    }

    fn layers(&self, file: Option<PathBuf>) -> Layers {
        let number = |n: i64| Value::Integer(n);
        let text = |s: &String| Value::String(s.clone());
        let flags = [
            ("--router", "router.name", self.router.as_ref().map(text)),
            ("--steps", "train.steps", self.steps.map(number)),
            ("--seed", "train.seed", self.seed.map(number)),
            ("--data", "data.source", self.data.as_ref().map(text)),
            // The flag also wins over a mix of the configuration file or of the run that goes on.
            (
                "--data",
                "data.mix",
                self.data.as_ref().map(|_| Value::Array(Vec::new())),
            ),
            ("--device", "train.device", self.device.as_ref().map(text)),
        ];
        Layers {
            preset: self.preset.clone().unwrap_or_else(|| "tiny".into()),
            experts: self.experts.clone(),
            file,
            set: self.set.clone(),
            flags: flags
                .into_iter()
                .filter_map(|(flag, key, value)| Some((flag, key, value?)))
                .collect(),
        }
    }
}
