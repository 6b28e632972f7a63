//! What the benchmark is asked to do, and the groups that this takes in.

use super::case::{Case, Group, Set, Work};

use super::timed;
use crate::device::Device;
use crate::error::Result;
use std::path::PathBuf;

/// What [`run`](super::run) is asked to do.
pub struct Options {
    /// Folder of the records.
    pub out: PathBuf,
    /// None: a GPU where there is one, else the CPU and the simulator.
    pub device: Option<Device>,
    /// None: core on a GPU, small elsewhere.
    pub set: Option<Set>,
    /// Only cases whose name contains this.
    pub only: Option<String>,
    /// Seconds to end within; no group starts that is likely to end later.
    pub budget: f64,
    /// Records to compare with, and by how much a case may be slower.
    pub baseline: Option<PathBuf>,
    pub fail_slower: Option<f64>,
}

impl Options {
    pub(super) fn wants(&self, case: &Case) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|only| case.name.contains(only.as_str()))
    }
}

/// Groups that run on a device, of the wanted set.
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

/// Seconds that a group is likely to take on a device.
pub(super) fn estimate(group: &Group, device: Device) -> Result<f64> {
    let cases = group.cases()?;
    // At least so often is every case done: two passes of five samples, a launch before each, and before all.
    const TIMES: f64 = 22.0;
    let flops: f64 = cases.iter().map(|c| c.flops).sum();
    let each = cases.len() as f64 * timed::SIDE_SECONDS;
    Ok(match (device, &group.work) {
        (Device::Cuda, Work::Step(_)) => 60.0 + TIMES * flops / 0.3e15,
        (Device::Cuda, _) => {
            // The largest case touches nearly every buffer; some sets of them are made and sent.
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
