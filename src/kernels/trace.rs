//! The bytes moved and tensor-core operations computed by the launches of a step on the simulator, per launcher. A
//! GPU's kernels would have the same numbers.

use super::bindings::routegrad_sim_counters as Counters;
use super::cost::Cost;
use crate::device::machine::h200;
use serde::Serialize;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

thread_local! {
    static ENTRIES: RefCell<Option<BTreeMap<&'static str, Entry>>> = const { RefCell::new(None) };
}

/// The totals of one launcher.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Entry {
    /// Its name in `kernels/routegrad.h`.
    pub launcher: &'static str,
    /// How often it ran.
    pub launches: usize,
    /// Global memory that it read and wrote, each byte counted as often as a kernel accesses it.
    pub bytes: f64,
    /// Floating-point operations of the tensor cores.
    pub flops: f64,
}

impl Entry {
    fn cost(&self) -> Cost {
        Cost {
            flops: self.flops,
            bytes: self.bytes,
        }
    }
}

/// The launches of this thread between [`Launchers::trace`](super::launchers::Launchers::trace) and [`finish`].
#[derive(Clone, Debug, Serialize)]
pub struct Trace {
    /// The entries, sorted by their lower bound of the time on an H200, longest first.
    pub entries: Vec<Entry>,
}

/// Starts to record the launches of this thread.
pub(super) fn start() {
    ENTRIES.set(Some(BTreeMap::new()));
}

/// Stops recording and returns the trace; `None` if recording was not started or nothing was launched.
pub fn finish() -> Option<Trace> {
    let found = ENTRIES.take()?;
    let mut entries: Vec<Entry> = found.into_values().collect();
    entries.sort_by(|a, b| b.cost().floor().total_cmp(&a.cost().floor()));
    (!entries.is_empty()).then_some(Trace { entries })
}

/// Returns whether launches are recorded.
pub fn recorded() -> bool {
    ENTRIES.with_borrow(Option::is_some)
}

/// Records a finished launch, if launches are recorded; `counters` returns its counters.
pub(super) fn launched(launcher: &'static str, counters: impl FnOnce() -> Option<Counters>) {
    ENTRIES.with_borrow_mut(|entries| {
        let Some(entries) = entries else {
            return;
        };
        let Some(counters) = counters() else {
            return;
        };
        let entry = entries.entry(launcher).or_default();
        entry.launcher = launcher;
        // Functions that only compute the size of a workspace launch nothing.
        entry.launches += usize::from(counters.launches > 0);
        entry.bytes += (counters.bytes_read + counters.bytes_written) as f64;
        entry.flops += counters.tensor_flops as f64;
    });
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "launches        MB    GFLOP  {} at best, µs  launcher",
            h200().key
        )?;
        let sum = |of: fn(&Entry) -> f64| self.entries.iter().map(of).sum();
        let total = Entry {
            launcher: "the step",
            launches: self.entries.iter().map(|e| e.launches).sum(),
            bytes: sum(|e| e.bytes),
            flops: sum(|e| e.flops),
        };
        let floor: f64 = sum(|e| e.cost().floor());
        let rows = self.entries.iter().map(|e| (e, e.cost().floor()));
        for (entry, floor) in rows.chain([(&total, floor)]) {
            let (mb, gflop, us) = (entry.bytes / 1e6, entry.flops / 1e9, 1e6 * floor);
            let (launches, launcher) = (entry.launches, entry.launcher);
            writeln!(
                f,
                "{launches:8}  {mb:8.2}  {gflop:7.3}  {us:16.2}  {launcher}"
            )?;
        }
        Ok(())
    }
}
