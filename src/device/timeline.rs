//! The time of a step on a GPU: launches per launcher, and copies between host and GPU.

pub use super::copies::Copies;
use serde::Serialize;
use std::fmt;

/// The time of one launcher's kernels.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Its name in `kernels/routegrad.h`.
    pub launcher: &'static str,
    /// How often it ran.
    pub launches: usize,
    /// Seconds of all its launches.
    pub seconds: f64,
}

/// The launches and copies between [`start`] and [`finish`].
#[derive(Clone, Debug, Serialize)]
pub struct Timeline {
    /// The entries, sorted by time, longest first.
    pub entries: Vec<Entry>,
    /// Number and bytes of the copies to the GPU.
    pub to_gpu: Copies,
    /// Number and bytes of the copies to the host.
    pub to_host: Copies,
    /// Wall-clock time in seconds.
    pub wall: f64,
}

impl Timeline {
    /// Returns the seconds in which a kernel ran.
    pub fn busy(&self) -> f64 {
        self.entries.iter().map(|e| e.seconds).sum()
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "      ms  of step  launches  launcher")?;
        let share = |seconds: f64| 100.0 * seconds / self.wall;
        for e in &self.entries {
            let (ms, share) = (e.seconds * 1e3, share(e.seconds));
            writeln!(
                f,
                "{ms:8.2}  {share:6.1}%  {:8}  {}",
                e.launches, e.launcher
            )?;
        }
        let idle = self.wall - self.busy();
        writeln!(
            f,
            "{:8.2}  {:6.1}%            no kernel",
            idle * 1e3,
            share(idle)
        )?;
        writeln!(f, "{:8.2}            the step", self.wall * 1e3)?;
        for (to, copies) in [("GPU", self.to_gpu), ("host", self.to_host)] {
            let mb = copies.bytes as f64 / 1e6;
            writeln!(f, "{} copies to the {to}, {mb:.1} MB", copies.count)?;
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
pub use gpu::{Span, finish, recorded, start};

#[cfg(feature = "cuda")]
mod gpu {
    use super::{Entry, Timeline};
    use crate::device::{copies, cuda};
    use crate::error::Result;
    use cudarc::driver::CudaEvent;
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::time::Instant;

    struct Recording {
        begun: Instant,
        launches: Vec<(&'static str, CudaEvent, CudaEvent)>,
    }

    static RECORDING: Mutex<Option<Recording>> = Mutex::new(None);

    fn recording() -> std::sync::MutexGuard<'static, Option<Recording>> {
        RECORDING.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Starts to record, if a GPU is open.
    ///
    /// # Errors
    /// Returns the error of an earlier launch.
    pub fn start() -> Result<()> {
        let Some(gpu) = cuda::opened() else {
            return Ok(());
        };
        gpu.finish()?;
        copies::begin();
        *recording() = Some(Recording {
            begun: Instant::now(),
            launches: Vec::new(),
        });
        Ok(())
    }

    /// Returns whether launches are recorded.
    pub fn recorded() -> bool {
        recording().is_some()
    }

    /// Stops recording and returns the timeline, if one was recorded.
    ///
    /// # Errors
    /// Returns the error of a launch.
    pub fn finish() -> Result<Option<Timeline>> {
        let Some(gpu) = cuda::opened() else {
            return Ok(None);
        };
        gpu.finish()?;
        let Some(found) = recording().take() else {
            return Ok(None);
        };
        let wall = found.begun.elapsed().as_secs_f64();
        let mut sums: BTreeMap<&'static str, (usize, f64)> = BTreeMap::new();
        for (launcher, from, to) in &found.launches {
            let sum = sums.entry(launcher).or_default();
            sum.0 += 1;
            sum.1 += gpu.seconds(from, to)?;
        }
        let entries = sums
            .into_iter()
            .map(|(launcher, (launches, seconds))| Entry {
                launcher,
                launches,
                seconds,
            });
        let mut entries: Vec<Entry> = entries.collect();
        entries.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        let [to_gpu, to_host] = copies::take();
        Ok(Some(Timeline {
            entries,
            to_gpu,
            to_host,
            wall,
        }))
    }

    /// The time from before a launch to its end.
    pub struct Span(Option<(&'static str, CudaEvent)>);

    impl Span {
        /// Records the start of a launch if launches are recorded; otherwise does nothing.
        pub fn begin(launcher: &'static str) -> Self {
            let on = cuda::opened().filter(|_| recording().is_some());
            Span(on.and_then(|gpu| Some((launcher, gpu.mark().ok()?))))
        }
    }

    impl Drop for Span {
        fn drop(&mut self) {
            let Some((launcher, from)) = self.0.take() else {
                return;
            };
            let to = cuda::opened().and_then(|gpu| gpu.mark().ok());
            if let (Some(recording), Some(to)) = (recording().as_mut(), to) {
                recording.launches.push((launcher, from, to));
            }
        }
    }
}

#[cfg(not(feature = "cuda"))]
pub use none::{Span, finish, recorded, start};

#[cfg(not(feature = "cuda"))]
mod none {
    use super::Timeline;
    use crate::error::Result;

    /// Does nothing: without the feature `cuda` there is nothing to record.
    pub fn start() -> Result<()> {
        Ok(())
    }

    /// Without the feature `cuda` there is nothing to record.
    pub fn recorded() -> bool {
        false
    }

    /// Without the feature `cuda` there is nothing to record.
    pub fn finish() -> Result<Option<Timeline>> {
        Ok(None)
    }

    /// Without the feature `cuda` there is nothing to record.
    pub struct Span;

    impl Span {
        /// Does nothing.
        pub fn begin(_launcher: &'static str) -> Self {
            Span
        }
    }
}
