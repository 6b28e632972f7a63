//! Counts of the operations that ran on a device with kernels.

use super::Var;
use crate::device::Device;
use std::cell::RefCell;
use std::collections::BTreeMap;

thread_local! {
    static COUNTS: RefCell<BTreeMap<&'static str, usize>> = RefCell::default();
}

/// Returns, for each operation, how often its forward ran on a device with kernels, on this thread since the last
/// call.
pub fn take_op_counts() -> BTreeMap<&'static str, usize> {
    COUNTS.take()
}

/// Counts one forward of `op`.
pub(super) fn count(op: &'static str) {
    COUNTS.with_borrow_mut(|counts| *counts.entry(op).or_default() += 1);
}

/// Returns the device of an operation on these inputs: a device with kernels if any input is on one.
pub(super) fn device_of(inputs: &[&Var]) -> Device {
    let mut devices = inputs.iter().map(|v| v.tensor.device());
    devices
        .find(|&device| device != Device::Cpu)
        .unwrap_or_default()
}
