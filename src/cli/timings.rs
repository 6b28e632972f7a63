//! `routegrad bench`: times the cases, writes the report, and exports the cases to benchmarks in other languages.

use super::arguments::*;
use crate::device::Device;
use crate::error::Error;
use crate::error::Result;
use crate::verify::bench;
use std::path::Path;

pub(super) fn run(args: BenchArgs) -> Result<()> {
    if !args.merge.is_empty() {
        say!("{}", bench::record::Records::merge(&args.out, &args.merge)?);
        return Ok(());
    }
    if args.predict {
        let model = bench::predict(&args.out)?;
        match &args.update {
            Some(page) => {
                model.update(page)?;
                bench::mma_limits::update(page)?;
                bench::step_predictions::update(&model, &args.out, page)?;
            }
            None => {
                say!("{}", model.markdown());
                let steps = bench::step_predictions::markdown(&model, &args.out)?;
                say!("{steps}\n{}", bench::mma_limits::markdown().trim_end());
            }
        }
        return Ok(());
    }
    if let Some(file) = &args.report {
        return bench_report(&args, file);
    }
    let device = match args.device.as_deref() {
        None => None,
        Some("cpu") => Some(Device::Cpu),
        Some("sim") => Some(Device::Sim),
        Some("cuda") => Some(Device::Cuda),
        Some(other) => {
            let help = "leave it out to use a GPU if there is one, else the CPU and the simulator";
            return Err(Error::invalid("--device", "cpu, sim or cuda", other, help));
        }
    };
    let options = bench::Options {
        out: args.out,
        device,
        set: args.set,
        only: args.only,
        budget: args.budget,
        baseline: args.baseline,
        fail_slower: args.fail_slower,
    };
    if let Some(file) = &args.dump {
        let count = bench::dump(&options, file)?;
        say!("{count} arrays in {}", file.display());
        return Ok(());
    }
    match (args.list, args.json) {
        (true, true) => say!("{}", bench::list_json(&options)?),
        (true, false) => say!("{}", bench::list(&options)?),
        _ => bench::run(&options)?,
    }
    Ok(())
}

/// Reads the records of this command and of `hardware-check`, and writes the page and the other outputs that were
/// requested.
fn bench_report(args: &BenchArgs, file: &Path) -> Result<()> {
    let records = bench::read_all(&args.out)?;
    crate::report::files::publish(file, bench::page::html(&records)?)?;
    say!("{}", file.display());
    if let Some(folder) = &args.pictures {
        bench::page::write_pictures(&records, folder)?;
    }
    if let Some(page) = &args.update {
        bench::page::update(&records, page)?;
    }
    Ok(())
}
