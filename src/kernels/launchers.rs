//! The kernels' launchers: one table per build of `kernels/`, the same functions in each.

use std::ffi::{CStr, CString, c_char};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use super::bindings;
pub use super::bindings::{routegrad_sim_counters as Counters, routegrad_sim_options as Options};
use crate::device::graph;
use crate::error::{Error, Result};

/// Environment variable with the path of a shared object whose simulator replaces the linked one: a race, sanitizer
/// or mutant build.
pub const LIBRARY_VARIABLE: &str = "ROUTEGRAD_SIM_LIBRARY";

/// Environment variable; if it is 1, the host waits for every launch on a GPU.
pub const WAIT_VARIABLE: &str = "ROUTEGRAD_WAIT";

/// Tile value that lets the kernels choose the tile of a product.
pub const TILE_AUTO: i32 = bindings::ROUTEGRAD_TILE_AUTO as i32;

/// The launchers of one build.
pub struct Launchers {
    table: &'static bindings::routegrad_launchers,
    /// Keeps the shared object loaded.
    _library: Option<libloading::Library>,
}

// SAFETY: a table of functions and one constant string; nothing writes to it.
unsafe impl Send for Launchers {}
unsafe impl Sync for Launchers {}

/// Returns the simulator's launchers, which read and write host memory and return when the kernel has finished.
///
/// # Errors
/// Returns an error when `ROUTEGRAD_SIM_LIBRARY` names a file that cannot be loaded.
pub fn sim() -> Result<&'static Launchers> {
    static SIM: OnceLock<Result<Launchers, String>> = OnceLock::new();
    let loaded = SIM.get_or_init(|| match std::env::var_os(LIBRARY_VARIABLE) {
        Some(path) => load(path.as_ref()).map_err(|e| e.to_string()),
        // SAFETY: the function returns a table with static lifetime.
        None => Ok(Launchers {
            table: unsafe { &*bindings::routegrad_sim() },
            _library: None,
        }),
    });
    loaded.as_ref().map_err(|why| {
        let help = format!("build one with scripts/sim-variant, or unset {LIBRARY_VARIABLE}");
        Error::invalid(
            "simulator",
            "a shared object that exports routegrad_sim",
            why,
            help,
        )
    })
}

/// Compute capability of the GPU that the simulator imitates, as 10 · major + minor (80 for `sm_80`). 0 means that
/// `ROUTEGRAD_SIM` or the default decides.
static SIM_ARCHITECTURE: AtomicI32 = AtomicI32::new(0);

/// Makes the simulator imitate a GPU of this architecture, on every thread that calls
/// [`prepare`](crate::device::Device::prepare) from now on.
pub fn simulate(architecture: i32) {
    SIM_ARCHITECTURE.store(architecture, Ordering::Relaxed);
}

/// Returns the architecture passed to [`simulate`], if it was called.
pub(super) fn simulated() -> Option<i32> {
    Some(SIM_ARCHITECTURE.load(Ordering::Relaxed)).filter(|architecture| *architecture != 0)
}

/// Returns whether the GPU of this process, or the GPU that this thread's simulator imitates, uses the kernels for
/// Hopper.
pub fn on_hopper() -> bool {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = crate::device::cuda::opened() {
        return gpu.capability == (9, 0) && crate::device::built_for().any(|arch| arch == "90a");
    }
    let options = sim().ok().and_then(Launchers::options);
    options.is_none_or(|options| options.arch == 90)
}

/// Returns the GPU's launchers, which read and write device memory; `None` in a build without nvcc.
pub fn cuda() -> Option<&'static Launchers> {
    #[cfg(routegrad_cuda)]
    {
        static CUDA: OnceLock<Launchers> = OnceLock::new();
        // SAFETY: as for the simulator.
        Some(CUDA.get_or_init(|| Launchers {
            table: unsafe { &*bindings::routegrad_cuda() },
            _library: None,
        }))
    }
    #[cfg(not(routegrad_cuda))]
    None
}

fn load(path: &std::path::Path) -> Result<Launchers, libloading::Error> {
    type Entry = unsafe extern "C" fn() -> *const bindings::routegrad_launchers;
    // SAFETY: the object is one of scripts/sim-variant, whose initialisers only register C++ statics.
    let library = unsafe { libloading::Library::new(path) }?;
    // SAFETY: that script builds it from the same header, so the types agree.
    let table = unsafe {
        let entry: libloading::Symbol<Entry> = library.get(b"routegrad_sim\0")?;
        &*entry()
    };
    Ok(Launchers {
        table,
        _library: Some(library),
    })
}

/// Returns whether the host waits for every launch.
pub fn waits() -> bool {
    static WAITS: OnceLock<bool> = OnceLock::new();
    *WAITS.get_or_init(|| std::env::var_os(WAIT_VARIABLE).is_some_and(|v| v == "1"))
}

/// With `ROUTEGRAD_WAIT=1` in the environment, waits for a launch on a GPU, so that an error names the kernel that
/// caused it and not a later copy.
#[cfg(feature = "cuda")]
fn waited(launcher: &str) -> Result<()> {
    // A stream cannot be waited for while its launches are recorded as a graph.
    match crate::device::cuda::opened().filter(|_| waits() && !graph::capturing()) {
        Some(gpu) => gpu.finish().map_err(|e| match e {
            Error::Device {
                status, text, help, ..
            } => Error::Device {
                op: launcher.into(),
                status,
                text,
                help,
            },
            other => other,
        }),
        None => Ok(()),
    }
}

/// Without a GPU, a launch has finished when its launcher returns.
#[cfg(not(feature = "cuda"))]
fn waited(_launcher: &str) -> Result<()> {
    Ok(())
}

impl Launchers {
    /// Returns the name of the build: "cuda", "sim", or the name of a variant such as "sim-race".
    pub fn build(&self) -> &'static str {
        // SAFETY: in every table, the build name is a constant string.
        unsafe { CStr::from_ptr(self.table.build) }
            .to_str()
            .unwrap_or("unknown")
    }

    /// Returns the raw functions.
    pub(super) fn table(&self) -> &bindings::routegrad_launchers {
        self.table
    }

    /// Runs `call`, a launch of `launcher`, or records it during a capture.
    ///
    /// # Errors
    /// The same errors as [`check`](Self::check).
    pub fn launch(
        &self,
        launcher: &'static str,
        call: impl Fn() -> bindings::routegrad_status + 'static,
    ) -> Result<()> {
        crate::device::counters::launched();
        if self.table.sim_set_options.is_some() && graph::capturing() {
            graph::record(move || match call() {
                0 => Ok(()),
                status => sim()?.check(launcher, status),
            });
            return Ok(());
        }
        let _span = crate::device::timeline::Span::begin(launcher);
        let status = call();
        super::trace::launched(launcher, || self.take_counters());
        self.check(launcher, status)
    }

    /// Converts the status of `launcher` into an error with the text of the kernels' build. Call this on the thread
    /// that launched, before its next launch.
    pub fn check(&self, launcher: &str, status: bindings::routegrad_status) -> Result<()> {
        if status == bindings::ROUTEGRAD_OK as i32 {
            return waited(launcher);
        }
        let text = self.describe(launcher, status);
        let reason = (status & 0xff) as u32;
        if reason < bindings::ROUTEGRAD_CUDA_ERROR {
            return Err(Error::invalid(
                launcher,
                "arguments that the kernel can take",
                text,
                "nothing was launched",
            ));
        }
        let help = match reason {
            bindings::ROUTEGRAD_SIM_FAILED => "the simulator found a bug in the kernel",
            _ => "nothing was launched, or an earlier launch failed; see the error text",
        };
        Err(Error::Device {
            op: launcher.into(),
            status,
            text,
            help: help.into(),
        })
    }

    fn describe(&self, launcher: &str, status: bindings::routegrad_status) -> String {
        let mut text = [0u8; 4096];
        let (Some(describe), Ok(name)) = (self.table.describe, CString::new(launcher)) else {
            return format!("status {status}");
        };
        // SAFETY: the buffer has the length that was passed, and the text ends with a null byte inside it.
        unsafe {
            describe(
                name.as_ptr(),
                status,
                text.as_mut_ptr().cast::<c_char>(),
                text.len() as u64,
            )
        };
        let text = CStr::from_bytes_until_nul(&text).unwrap_or_default();
        text.to_string_lossy().into_owned()
    }

    /// Returns the simulator's options for launches from this thread; `None` for the GPU.
    pub fn options(&self) -> Option<Options> {
        let get = self.table.sim_get_options?;
        let mut options = Options::default();
        // SAFETY: it writes one struct.
        unsafe { get(&mut options) };
        Some(options)
    }

    /// Sets the simulator's options for launches from this thread.
    ///
    /// # Errors
    /// Returns an error for the GPU, and for values outside the ranges in `routegrad.h`.
    pub fn set_options(&self, options: &Options) -> Result<()> {
        let wrong = |got: String| {
            let help = "see routegrad_sim_options in kernels/routegrad.h";
            Error::invalid(
                "simulator options",
                "values of the ranges in routegrad.h",
                got,
                help,
            )
        };
        let set = self
            .table
            .sim_set_options
            .ok_or_else(|| wrong("a GPU's launchers".into()))?;
        // SAFETY: it reads one struct.
        match unsafe { set(options) } {
            0 => Ok(()),
            _ => Err(wrong(format!("{options:?}"))),
        }
    }

    /// Starts to record the launches of this thread on the simulator; see [`trace`](super::trace).
    pub fn trace(&self) {
        self.take_counters();
        super::trace::start();
    }

    /// Returns the counters of the launches of this thread since the last call; `None` for the GPU.
    pub fn take_counters(&self) -> Option<Counters> {
        let take = self.table.sim_take_counters?;
        let mut counters = Counters::default();
        // SAFETY: it writes one struct.
        unsafe { take(&mut counters) };
        Some(counters)
    }
}

/// Returns the error for a launcher that is not in the table.
pub(super) fn missing(name: &str) -> Error {
    let help = "build the kernels and the crate from one checkout";
    Error::invalid(name, "a launcher of this build", "none", help)
}
