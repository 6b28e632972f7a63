//! The kernels' launchers: one table per build of `kernels/`, the same functions in each.

use std::ffi::{CStr, CString, c_char};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use super::bindings;
pub use super::bindings::{routegrad_sim_counters as Counters, routegrad_sim_options as Options};
use crate::device::graph;
use crate::error::{Error, Result};

/// Names a shared object whose simulator is used instead of the linked one: the race, sanitizer and mutant builds.
pub const LIBRARY_VARIABLE: &str = "ROUTEGRAD_SIM_LIBRARY";

/// Set to 1: every launch on a GPU is waited for.
pub const WAIT_VARIABLE: &str = "ROUTEGRAD_WAIT";

/// The tile of a product that the kernels' own plan takes.
pub const TILE_AUTO: i32 = bindings::ROUTEGRAD_TILE_AUTO as i32;

/// One build's launchers.
pub struct Launchers {
    table: &'static bindings::routegrad_launchers,
    /// Keeps the shared object loaded.
    _library: Option<libloading::Library>,
}

// SAFETY: a table of functions and one constant text; nothing writes to it.
unsafe impl Send for Launchers {}
unsafe impl Sync for Launchers {}

/// The simulator's launchers, which take host memory and return when the kernel is done.
///
/// # Errors
/// When `ROUTEGRAD_SIM_LIBRARY` names a file that cannot be loaded.
pub fn sim() -> Result<&'static Launchers> {
    static SIM: OnceLock<Result<Launchers, String>> = OnceLock::new();
    let loaded = SIM.get_or_init(|| match std::env::var_os(LIBRARY_VARIABLE) {
        Some(path) => load(path.as_ref()).map_err(|e| e.to_string()),
        // SAFETY: the function returns a table with the life of the program.
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

/// Of the GPU that the simulator stands for, as `sm_80`: 10 · major + minor of the compute capability; 0 where
/// `ROUTEGRAD_SIM` or the default says.
static SIM_ARCHITECTURE: AtomicI32 = AtomicI32::new(0);

/// Makes the simulator of every thread that [prepares](crate::device::Device::prepare) from now on stand for a GPU of this
/// architecture.
pub fn simulate(architecture: i32) {
    SIM_ARCHITECTURE.store(architecture, Ordering::Relaxed);
}

/// What [`simulate`] was told.
pub(super) fn simulated() -> Option<i32> {
    Some(SIM_ARCHITECTURE.load(Ordering::Relaxed)).filter(|architecture| *architecture != 0)
}

/// Whether the GPU of this process, or the one that this thread's simulator stands for, takes the kernels for Hopper.
pub fn on_hopper() -> bool {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = crate::device::cuda::opened() {
        return gpu.capability == (9, 0) && crate::device::built_for().any(|arch| arch == "90a");
    }
    let options = sim().ok().and_then(Launchers::options);
    options.is_none_or(|options| options.arch == 90)
}

/// The GPU's launchers, which take device memory; none in a build without nvcc.
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

/// Whether launches are waited for.
pub fn waits() -> bool {
    static WAITS: OnceLock<bool> = OnceLock::new();
    *WAITS.get_or_init(|| std::env::var_os(WAIT_VARIABLE).is_some_and(|v| v == "1"))
}

/// With `ROUTEGRAD_WAIT=1` in the environment waits for each launch on a GPU, so that a fault is blamed on the kernel that
/// made it and not on whichever copy comes next.
#[cfg(feature = "cuda")]
fn waited(launcher: &str) -> Result<()> {
    match crate::device::cuda::opened().filter(|_| waits()) {
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

/// Without a GPU a launch is over when its launcher returns.
#[cfg(not(feature = "cuda"))]
fn waited(_launcher: &str) -> Result<()> {
    Ok(())
}

impl Launchers {
    /// "cuda", "sim", or the variant's name such as "sim-race".
    pub fn build(&self) -> &'static str {
        // SAFETY: every table names its build with a constant.
        unsafe { CStr::from_ptr(self.table.build) }
            .to_str()
            .unwrap_or("unknown")
    }

    /// The raw functions.
    pub(super) fn table(&self) -> &bindings::routegrad_launchers {
        self.table
    }

    /// Runs `call`, a launch of `launcher`, or records it.
    ///
    /// # Errors
    /// As [`check`](Self::check).
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

    /// Turns the status of `launcher` into an error that says what the kernel's build says about it. To be called on the
    /// thread that launched, before its next launch.
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
            bindings::ROUTEGRAD_SIM_FAILED => "a bug of the kernel, found by the simulator",
            _ => "nothing was launched, or an earlier launch failed; see the text",
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
        // SAFETY: the buffer is as long as said, and the text is ended by a zero within it.
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

    /// The simulator's options for launches from this thread; none on the GPU.
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
    /// On the GPU, and for values outside those that `routegrad.h` names.
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

    /// Begins to record what this thread launches on the simulator; see [`trace`](super::trace).
    pub fn trace(&self) {
        self.take_counters();
        super::trace::start();
    }

    /// What the launches of this thread did since the last call; none on the GPU.
    pub fn take_counters(&self) -> Option<Counters> {
        let take = self.table.sim_take_counters?;
        let mut counters = Counters::default();
        // SAFETY: it writes one struct.
        unsafe { take(&mut counters) };
        Some(counters)
    }
}

/// The error of a launcher that is not in the table.
pub(super) fn missing(name: &str) -> Error {
    let help = "build the kernels and the crate from one checkout";
    Error::invalid(name, "a launcher of this build", "none", help)
}
