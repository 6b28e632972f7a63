//! The options of the benchmark, and the groups that they select.

use super::case::{Case, Group, Set, Work};

use super::timed;
use crate::device::Device;
use crate::error::Result;
use std::path::PathBuf;

/// The options of [`run`](super::run).
pub struct Options {
    /// Folder for the records.
    pub out: PathBuf,
    /// Device to measure. `None`: a GPU if there is one, otherwise the CPU and the simulator.
    pub device: Option<Device>,
    /// Set of groups to measure. `None`: the core set on a GPU, and the small set elsewhere.
    pub set: Option<Set>,
    /// If set, only cases whose names contain this text are measured.
    pub only: Option<String>,
    /// Time limit in seconds. A group that would probably end later is not started.
    pub budget: f64,
    /// Records with which the results are compared.
    pub baseline: Option<PathBuf>,
    /// Largest relative slowdown that is not an error.
    pub fail_slower: Option<f64>,
}

impl Options {
    pub(super) fn wants(&self, case: &Case) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|only| case.name.contains(only.as_str()))
    }
}

/// Returns the groups of the selected set that run on a device.
pub(super) fn groups(options: &Options, device: Device) -> Result<Vec<Group>> {
    let set = options.set.unwrap_or(match device {
        Device::Cuda => Set::Core,
        _ => Set::Small,
    });
    let runs = |group: &Group| match &group.work {
        Work::Operation(_) => device == Device::Cpu,
        Work::Step(_) => device != Device::Sim,
        _ => device != Device::Cpu,
    };
    let within = |group: &Group| match set {
        Set::Full => group.set != Set::Small,
        set => group.set == set,
    };
    let mut found = Vec::new();
    for group in super::groups::groups()
        .into_iter()
        .filter(|g| runs(g) && within(g))
    {
        if group.cases()?.iter().any(|case| options.wants(case)) {
            found.push(group);
        }
    }
    Ok(found)
}

/// Returns the estimated time of a group on a device in seconds.
pub(super) fn estimate(group: &Group, device: Device) -> Result<f64> {
    let cases = group.cases()?;
    // Minimum number of repetitions of a case: two passes of five samples with an extra launch each, and two launches
    // before.
    const TIMES: f64 = 22.0;
    let flops: f64 = cases.iter().map(|c| c.flops).sum();
    let each = cases.len() as f64 * timed::SIDE_SECONDS;
    Ok(match (device, &group.work) {
        (Device::Cuda, Work::Step(_)) => 60.0 + TIMES * flops / 0.3e15,
        (Device::Cuda, _) => {
            // The largest case uses nearly every buffer; several sets of buffers are created and copied to the device.
            let bytes = cases.iter().map(Case::bytes).fold(0.0, f64::max);
            let peers = if matches!(group.work, Work::Gemm { .. }) {
                3.0
            } else {
                1.0
            };
            0.3 + peers * each + 3.0 * bytes / 2e9
        }
        (Device::Cpu, _) => each + TIMES * flops / 3e10,
        (Device::Sim, _) => each + TIMES * flops / 2e10,
    })
}
