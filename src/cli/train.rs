//! `routegrad train`: resolves the configuration, runs the training, and prints the result.

use super::arguments::TrainArgs;
use super::process::{in_pool, simulate, start_ranks, watch_signals};
use crate::config::{Config, Layers};
use crate::data;
use crate::data::tokenizer::loss_unit;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::report::size;
use crate::routers;
use crate::study::{hooks, plan};
use crate::train::{self, Outcome, RunOptions, Summary};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use toml::Value;

pub(super) fn train_command(args: &TrainArgs, threads: Option<usize>) -> Result<()> {
    let dist = start_ranks(&args.ranks, threads)?;
    // A resumed run has its configuration in its folder; a new run may be named after its configuration.
    let (config, out) = if args.resume {
        let out = args.folder(args.settings.router.as_deref().unwrap_or("default"));
        let file = out.join(train::CONFIG_FILE);
        if !file.exists() {
            let got = format!("no {} there", train::CONFIG_FILE);
            let help = "pass the run's folder as --out, or its name as --name; without --resume a new run begins";
            return Err(Error::file(out, "a run to resume", got, help));
        }
        let layers = Layers {
            resolved: true,
            ..args.layers(Some(file))
        };
        (Config::load(&layers, &routers::resolve)?, out)
    } else {
        let config = data::configure(
            &args.layers(args.settings.config.clone()),
            &routers::resolve,
        )?;
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
    if args.timeline && device == Device::Cpu {
        return Err(Error::usage(
            "--timeline",
            "a device with kernels, sim or cuda",
            "cpu",
            "add --device sim or --device cuda",
        ));
    }
    simulate(args.sim_arch, device)?;
    device.prepare()?;
    let planned = plan::Memory::of(&config, plan::Target::gpu(), dist.size())?.total();
    if device == Device::Cuda {
        crate::device::reserve(device, planned as usize)?;
    }
    let unit = loss_unit(&config.data.tokenizer);
    let run = || hooks::train_on(dist.clone(), config, &options, &stop);
    let report = in_pool(device, run)??;
    if dist.rank() != 0 {
        return Ok(());
    }
    if device != Device::Cpu {
        let peak = crate::device::take_peak(device) as u64;
        say!(
            "memory of {device}: {} at most, {} planned",
            size(peak),
            size(planned)
        );
    }
    tell(&report, unit, &out, options.checkpoints)
}

/// Prints how a run ended, and what the user can do next.
fn tell(report: &Summary, unit: &str, out: &Path, checkpoints: bool) -> Result<()> {
    let (place, step) = (out.display(), report.step);
    if let (Outcome::Finished, Some(loss)) = (report.outcome, report.validation_loss) {
        say!("validation loss {loss:.4} {unit} after {step} steps");
    }
    if report.left_out > 0 {
        let left_out = report.left_out;
        say!(
            "{left_out} of {step} steps were skipped because of values that were not finite; lower train.learning_rate or check the data"
        );
    }
    match report.outcome {
        Outcome::Stopped if step == 0 => {
            say!(
                "stopped before the end of the first step; start again with: routegrad train --out {place} --resume"
            );
        }
        Outcome::Stopped if checkpoints => {
            say!(
                "stopped and saved at step {step}; resume with: routegrad train --out {place} --resume"
            );
        }
        Outcome::Stopped => say!("stopped at step {step}"),
        Outcome::Finished if checkpoints => {
            say!("log, plots and checkpoints: {place}");
            say!("generate text: routegrad generate --model {place}");
        }
        Outcome::Finished => say!("log and plots: {place}"),
    }
    Ok(())
}

impl TrainArgs {
    /// Returns the folder of the run: `--out`, or runs/NAME.
    fn folder(&self, router: &str) -> PathBuf {
        if let Some(out) = &self.out {
            return out.clone();
        }
        let name = self.name.clone().unwrap_or_else(|| {
            let preset = self.settings.preset.as_deref().unwrap_or("tiny");
            let parts = [Some(preset), self.settings.experts.as_deref(), Some(router)];
            parts.into_iter().flatten().collect::<Vec<_>>().join("-")
        });
        PathBuf::from("runs").join(name)
    }

    fn layers(&self, file: Option<PathBuf>) -> Layers {
        let device = self.device.clone().map(Value::from);
        let mut layers = self.settings.layers(file);
        layers
            .flags
            .extend(device.map(|d| ("--device", "train.device", d)));
        layers
    }
}
