//! A run of the benchmark: the values that its records share, and the printed output.

use super::case::{Case, Group};
use super::ceilings::{self, Ceilings};
use super::options::{Options, estimate, groups};
use super::page::CEILINGS;
use super::record::{Measured, OURS, Record, Records, told};
use super::timed::{self, Ready};
use crate::device::Device;
use crate::device::machine;
use crate::error::{Error, Result};
use crate::report::records::now;
use crate::verify::bench::measure::Timing;
use serde_json::{Value, json};
use std::time::Instant;

/// Returns the fields that all records of a run on a device share, as JSON.
pub fn head(device: Device) -> Value {
    json!({
        "machine": machine_name(device), "device": device, "run": run_name(), "commit": machine::commit(),
        "system": machine::system(), "driver": driver(device),
    })
}

/// Returns the identifier of the run. A script that measures with several programs sets it, so that their records have the
/// same identifier.
fn run_name() -> String {
    std::env::var("ROUTEGRAD_RUN").unwrap_or_else(|_| now())
}

fn machine_name(device: Device) -> String {
    #[cfg(feature = "cuda")]
    if device == Device::Cuda
        && let Some(gpu) = crate::device::cuda::opened()
    {
        return crate::verify::hardware::with_kernels(gpu.name.clone());
    }
    let _ = device;
    machine::processor()
}

fn driver(device: Device) -> String {
    match device {
        Device::Cuda => machine::driver(),
        _ => String::new(),
    }
}

/// A run in progress.
pub struct Session<'a> {
    options: &'a Options,
    records: Records,
    run: String,
    commit: String,
    start: Instant,
    left_out: usize,
    failures: usize,
    /// The records of this run.
    pub measured: Vec<Record>,
}

impl<'a> Session<'a> {
    /// # Errors
    /// When the existing records cannot be read.
    pub fn new(options: &'a Options) -> Result<Self> {
        Ok(Self {
            options,
            records: Records::open(&options.out)?,
            run: run_name(),
            commit: machine::commit(),
            start: Instant::now(),
            left_out: 0,
            failures: 0,
            measured: Vec::new(),
        })
    }

    /// Measures every selected group on a device within the time limit. Records are written after each group.
    ///
    /// # Errors
    /// When the device cannot be used, or a record cannot be written.
    pub fn measure(&mut self, device: Device) -> Result<()> {
        device.prepare()?;
        let groups = groups(self.options, device)?;
        if groups.is_empty() {
            return Ok(());
        }
        let ceilings = self.ceilings(device)?;
        say!(
            "{:48} {:>10} {:>8} {:>8} {:>8} {:>6} {:>6}  times as fast as",
            "case",
            "µs",
            "TFLOP/s",
            "TB/s",
            "of floor",
            "spread",
            "repeat"
        );
        for group in &groups {
            let left = self.options.budget - self.start.elapsed().as_secs_f64();
            if estimate(group, device)? > left {
                self.left_out += 1; // a shorter group may still fit
                continue;
            }
            if let Err(why) = self.group(group, device, ceilings.as_ref()) {
                self.failed(group, device, &why.to_string())?;
            }
        }
        Ok(())
    }

    /// Writes a record with the reason for a group that failed; the run continues with the next group.
    fn failed(&mut self, group: &Group, device: Device, why: &str) -> Result<()> {
        self.failures += 1;
        say!("FAILED  {}: {why}", group.name);
        for case in group
            .cases()?
            .iter()
            .filter(|case| self.options.wants(case))
        {
            let record = Record {
                detail: why.into(),
                ..self.record(case, device, None)
            };
            self.keep(record);
        }
        self.records.save(&machine_name(device))
    }

    fn ceilings(&mut self, device: Device) -> Result<Option<Ceilings>> {
        let found = match device {
            Device::Cpu => Some(ceilings::of_cpu()?),
            Device::Sim => None,
            #[cfg(feature = "cuda")]
            Device::Cuda => Some(ceilings::of_gpu(crate::device::cuda::gpu()?)?),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => None,
        };
        let name = machine_name(device);
        match &found {
            Some(c) => say!(
                "\n{device}, {name}: {:.4} TFLOP/s, {:.4} TB/s ({})",
                c.flops / 1e12,
                c.bytes / 1e12,
                c.of
            ),
            None => say!("\n{device}, {name}: no floors, since nothing here is a GPU's time"),
        }
        if device == Device::Cuda {
            say!("{}", told_state(&state(device)));
        }
        if let Some(c) = &found {
            let case = Case {
                name: CEILINGS.into(),
                family: CEILINGS,
                flops: c.flops,
                costs: Vec::new(),
            };
            let record = Record {
                bytes: c.bytes,
                detail: c.of.clone(),
                ..self.record(&case, device, None)
            };
            self.keep(record);
        }
        Ok(found)
    }

    fn group(&mut self, group: &Group, device: Device, ceilings: Option<&Ceilings>) -> Result<()> {
        let options = self.options;
        let before = state(device);
        let mut records = Vec::new();
        timed::visit(
            group,
            device,
            &|case| options.wants(case),
            &mut |mut ready| {
                let timings = ready.time()?;
                let (ours, theirs) = timings.split_at(ready.cases.len());
                let mut theirs = theirs.iter();
                for (case, timing) in ready.cases.iter().zip(ours) {
                    let mut record = self.record(case, device, ceilings);
                    record.timing = Some(measured(timing, &ready, ready.graph));
                    let mut ratios = Vec::new();
                    let mut peers = Vec::new();
                    for (name, ran) in &ready.peers {
                        let peer = self.peer(name, ran, &ready, &mut theirs, &record);
                        ratios.push(match peer.seconds() {
                            Some(seconds) => format!("{name} {:.3}", seconds / timing.seconds()),
                            None => format!("{name}: {}", peer.detail),
                        });
                        peers.push(peer);
                    }
                    print(&record, &ratios.join(", "))?;
                    records.push(record);
                    records.append(&mut peers);
                }
                Ok(())
            },
        )?;
        let after = state(device);
        for mut record in records {
            (record.before, record.after) = (before.clone(), after.clone());
            self.keep(record);
        }
        self.records.save(&machine_name(device))
    }

    /// Returns the record of a peer; takes the next timing if the peer ran.
    fn peer<'t>(
        &self,
        name: &str,
        ran: &Result<(), String>,
        ready: &Ready,
        timings: &mut impl Iterator<Item = &'t Timing>,
        ours: &Record,
    ) -> Record {
        let timing = ran.as_ref().ok().and_then(|()| timings.next());
        // Only the grouped call of cuBLAS is not replayed from a graph.
        let replayed = ready.graph && name != super::record::CUBLAS_GROUPED;
        Record {
            implementation: name.into(),
            version: String::new(),
            timing: timing.map(|timing| measured(timing, ready, replayed)),
            detail: ran.as_ref().err().cloned().unwrap_or_default(),
            ..ours.clone()
        }
    }

    fn record(&self, case: &Case, device: Device, ceilings: Option<&Ceilings>) -> Record {
        Record {
            machine: machine_name(device),
            device: device.to_string(),
            case: case.name.clone(),
            family: case.family.into(),
            implementation: OURS.into(),
            version: self.commit.clone(),
            run: self.run.clone(),
            date: now(),
            flops: case.flops,
            bytes: case.bytes(),
            timing: None,
            floor_seconds: ceilings.map(|c| case.floor(c.flops, c.bytes)),
            detail: String::new(),
            system: machine::system(),
            driver: driver(device),
            before: Value::Null,
            after: Value::Null,
        }
    }

    fn keep(&mut self, record: Record) {
        self.records.insert(record.clone());
        self.measured.push(record);
    }

    /// Prints the last lines.
    ///
    /// # Errors
    /// When a group failed, or no case has the requested name.
    pub fn end(&self) -> Result<()> {
        let ran = self.measured.iter().filter(|r| r.timing.is_some()).count();
        let (seconds, out) = (
            self.start.elapsed().as_secs_f64(),
            self.options.out.display(),
        );
        say!("{ran} timings in {seconds:.0} s; records: {out}");
        if self.left_out > 0 {
            say!(
                "{} groups were not run for lack of time; use a larger --budget",
                self.left_out
            );
        }
        if ran == 0 && self.failures == 0 && self.left_out == 0 {
            let help = "routegrad bench --list shows the names of the cases";
            return Err(Error::usage(
                "bench --only",
                "a part of a case's name",
                "text that is in no name",
                help,
            ));
        }
        match self.failures {
            0 => Ok(()),
            n => Err(Error::invalid(
                "bench",
                "every group to run",
                format!("{n} that failed"),
                "their records say why; `routegrad hardware-check` proves the kernels one by one",
            )),
        }
    }
}

/// Returns the state of the GPU from nvidia-smi.
fn state(device: Device) -> Value {
    match device {
        Device::Cuda => machine::state(),
        _ => Value::Null,
    }
}

/// Formats clocks and temperature, or a sentence that they are not known.
fn told_state(state: &Value) -> String {
    let Some(fields) = state.as_object() else {
        return "no nvidia-smi: clocks, temperature and throttling are not known".into();
    };
    let told = fields
        .iter()
        .map(|(field, value)| format!("{field} {}", value.as_str().unwrap_or("?")));
    told.collect::<Vec<_>>().join(", ")
}

fn measured(timing: &Timing, ready: &Ready, graph: bool) -> Measured {
    Measured {
        seconds: timing.seconds(),
        passes: timing.passes.iter().map(|p| p.0).collect(),
        spread: timing.passes.iter().map(|p| p.1).collect(),
        samples: timing.plan.samples,
        launches: timing.plan.launches,
        sets: ready.sets,
        graph,
    }
}

fn print(record: &Record, ratios: &str) -> Result<()> {
    let Some(timing) = &record.timing else {
        return Ok(());
    };
    let spread = timing.spread.iter().copied().fold(0.0, f64::max);
    say!(
        "{:48} {:>10.1} {:>8} {:>8} {:>8} {:>6.3} {:>6.3}  {ratios}",
        record.case,
        1e6 * timing.seconds,
        told(record.tflops()),
        told(record.terabytes()),
        told(record.share_of_floor()),
        spread,
        timing.repeat_ratio(),
    );
    Ok(())
}
