//! `routegrad hardware-check` and `routegrad status`: check kernels and steps on a GPU, and show the records.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::verify::hardware::{self, Options, Place, code, loss_parity, record, run_task, status};
use clap::{Args, ValueEnum};
use std::path::PathBuf;

#[derive(Args)]
pub(super) struct HardwareArgs {
    /// Folder of the records.
    #[arg(long, value_name = "DIR", default_value = hardware::FOLDER)]
    out: PathBuf,
    /// Time limit in seconds; tasks that do not fit are left for the next call.
    #[arg(long, value_name = "SECONDS", default_value_t = 540.0)]
    budget: f64,
    /// List the tasks in order, with their requirements and estimated times; run nothing.
    #[arg(long, visible_alias = "dry-run")]
    list: bool,
    /// Run only tasks whose name contains this text.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Also run tasks that have passed before.
    #[arg(long)]
    again: bool,
    /// cuda; or sim, which runs whole steps at a small size to test the tasks themselves.
    #[arg(long, value_name = "DEVICE", value_enum, default_value = "cuda")]
    device: Checked,
    /// Add the records of these files to the folder; run nothing.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["list", "only", "again"])]
    merge: Vec<PathBuf>,
    /// Train on the CPU, and write the losses to the folder as the reference for the losses of a GPU; takes minutes.
    #[arg(long, conflicts_with_all = ["list", "again", "merge"])]
    record_curves: bool,
    /// Run one task in this process and print its outcome; the command starts its tasks in this way.
    #[arg(long, value_name = "TASK", hide = true)]
    one: Option<String>,
    /// Plant a fault in every task of whole steps; each task must report it.
    #[arg(long, hide = true)]
    plant: bool,
    /// Print the digest of the sources that is stored in records of whole steps; for scripts/bundle.
    #[arg(long, hide = true)]
    sources: bool,
}

/// Where the tasks run.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Checked {
    Cuda,
    Sim,
}

#[derive(Args)]
pub(super) struct StatusArgs {
    /// Folder of the records.
    #[arg(long, value_name = "DIR", default_value = hardware::FOLDER)]
    records: PathBuf,
    /// Write the table to this page instead of printing it; it replaces the old table.
    #[arg(long, value_name = "FILE")]
    update: Option<PathBuf>,
}

pub(super) fn check(args: HardwareArgs) -> Result<()> {
    if args.sources {
        say!("{}", code::sources().unwrap_or_default());
        return Ok(());
    }
    if args.record_curves {
        return loss_parity::record(&args.out, args.only.as_deref());
    }
    if !args.merge.is_empty() {
        say!("{}", record::Records::merge(&args.out, &args.merge)?);
        return Ok(());
    }
    let place = Place {
        device: match args.device {
            Checked::Cuda => Device::Cuda,
            Checked::Sim => Device::Sim,
        },
        out: args.out,
        planted: args.plant,
    };
    if let Some(task) = &args.one {
        return run_task::run(task, &place);
    }
    hardware::check(&Options {
        place,
        budget: args.budget,
        list: args.list,
        only: args.only,
        again: args.again,
    })
}

pub(super) fn status(args: &StatusArgs) -> Result<()> {
    let records = record::Records::open(&args.records)?;
    let table = status::table(&records);
    match &args.update {
        Some(_) if code::code("router").is_none() => Err(Error::invalid(
            "status --update",
            "a program with compiled kernels, to compare the records with them",
            "one built without nvcc",
            "run scripts/install-toolkit, and build with --features cuda",
        )),
        Some(page) => status::update(page, &table),
        None => {
            say!("{table}\n{}", status::steps(&records).trim_end());
            Ok(())
        }
    }
}
