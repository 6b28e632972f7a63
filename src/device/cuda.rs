//! One GPU through the CUDA driver, whose library is loaded at run time: the program starts on machines without it.
//!
//! [`Gpu::open`] says why there is none to use. Launches go to one stream of the GPU's own; nothing here uses the default
//! stream, and cudarc's event tracking is off, since it would break graph capture.

use super::driver::{error, error_text};
use super::pinned::{PinnedReadback, PinnedReadbacks, Staging};
use super::{built_for, copies, counters, require_capability};
use crate::error::{Error, Result};
use crate::report::size;
use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUdevice_attribute_enum as Attribute, CUevent_flags, CUgraphInstantiate_flags,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// A GPU from Ampere on, with kernels compiled for it.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    staging: Mutex<Staging>,
    readbacks: PinnedReadbacks,
    /// As the driver names it, such as "NVIDIA H200".
    pub name: String,
    /// Compute capability, as (9, 0).
    pub capability: (i32, i32),
    /// Version of CUDA that the driver speaks, as (13, 0).
    pub driver: (i32, i32),
}

/// CUDA that the kernels are compiled with; an older driver cannot load them.
pub const NEEDED_DRIVER: (i32, i32) = (13, 0);

static GPU: OnceLock<Result<Gpu, String>> = OnceLock::new();

/// The GPU to open: another one for each process of a host.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// Chooses the GPU that [`gpu`] opens.
pub(super) fn choose(number: usize) {
    CHOSEN.store(number, Ordering::SeqCst);
}

/// The one of `count` GPUs that a process opens which was given number `chosen`. A launcher may show each process its own
/// GPU alone.
fn place(chosen: usize, count: usize) -> Result<usize, String> {
    match count {
        0 => Err("the CUDA driver finds no GPU".into()),
        1 => Ok(0),
        n if chosen < n => Ok(chosen),
        n => Err(format!(
            "this is process {chosen} of its host, counted from 0, and there are {n} GPUs: start at most one process a GPU"
        )),
    }
}

/// The GPU of this process, opened at the first call.
///
/// # Errors
/// As [`Gpu::open`].
pub fn gpu() -> Result<&'static Gpu> {
    GPU.get_or_init(Gpu::open).as_ref().map_err(|why| {
        let help = "use device = \"cpu\" or \"sim\", or a machine with an NVIDIA GPU from Ampere on and its driver";
        Error::invalid("device cuda", "an NVIDIA GPU from Ampere on", why, help)
    })
}

/// The same, if it was opened.
pub fn opened() -> Option<&'static Gpu> {
    GPU.get()?.as_ref().ok()
}

impl Gpu {
    /// The GPU that was chosen, the first one of the machine unless several processes share it.
    ///
    /// # Errors
    /// One sentence that says why there is none to use: kernels not compiled in, no driver library, a driver too old, no
    /// GPU, one older than Ampere, or one that the kernels are not compiled for.
    pub fn open() -> Result<Self, String> {
        let failed = |what: &str, e: DriverError| {
            format!("the CUDA driver cannot {what}: {}", error_text(e))
        };
        let (driver, count) = Self::driver_and_count()?;
        let place = place(CHOSEN.load(Ordering::SeqCst), count)?;
        let context = CudaContext::new(place).map_err(|e| failed("open the GPU", e))?;
        // SAFETY: there is no allocation yet, and everything here runs on one stream.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(|e| failed("name the GPU", e))?;
        let capability = context
            .compute_capability()
            .map_err(|e| failed("describe the GPU", e))?;
        require_capability(&name, capability, built_for())?;
        let stream = context
            .new_stream()
            .map_err(|e| failed("make a stream", e))?;
        Ok(Self {
            context,
            stream,
            staging: Mutex::new(Staging::new().map_err(|e| failed("pin memory of the host", e))?),
            readbacks: PinnedReadbacks::default(),
            name,
            capability,
            driver,
        })
    }

    /// The number of GPUs that this process sees.
    ///
    /// # Errors
    /// As [`open`](Self::open), as far as the driver goes.
    pub fn count() -> Result<usize, String> {
        Self::driver_and_count().map(|(_, count)| count)
    }

    fn driver_and_count() -> Result<((i32, i32), usize), String> {
        if !cfg!(routegrad_cuda) {
            return Err("the kernels are not compiled in: no nvcc was found at build time".into());
        }
        // SAFETY: the function only tries to load the library.
        if !unsafe { sys::is_culib_present() } {
            return Err("no CUDA driver: libcuda.so cannot be loaded".into());
        }
        let failed = |what: &str, e: DriverError| {
            format!("the CUDA driver cannot {what}: {}", error_text(e))
        };
        result::init().map_err(|e| failed("start", e))?;
        let driver = driver_version().map_err(|e| failed("tell its version", e))?;
        require_driver(driver)?;
        let count = CudaContext::device_count().map_err(|e| failed("count its GPUs", e))?;
        Ok((driver, count.max(0) as usize))
    }

    /// The stream of every launch. The GPU becomes the calling thread's own.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn stream(&self) -> Result<sys::CUstream> {
        self.context
            .bind_to_thread()
            .map_err(|e| error("bind the GPU to a thread", e))?;
        Ok(self.stream.cu_stream())
    }

    /// Bytes of the L2 cache.
    pub fn cache_bytes(&self) -> Result<usize> {
        let bytes = self
            .context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
        bytes
            .map(|bytes| bytes as usize)
            .map_err(|e| error("read an attribute", e))
    }

    /// The stream for a launcher, which opens the GPU's primary context on its thread itself.
    pub fn raw_stream(&self) -> *mut std::ffi::c_void {
        self.stream.cu_stream().cast()
    }

    /// Waits for every launch.
    ///
    /// # Errors
    /// What a launch since the last wait met.
    pub fn finish(&self) -> Result<()> {
        counters::waited();
        self.stream
            .synchronize()
            .map_err(|e| error("wait for its launches", e))
    }

    /// `bytes` bytes of unspecified content.
    ///
    /// # Errors
    /// When there is no room.
    pub fn allocate(&self, bytes: usize) -> Result<DeviceMemory> {
        self.stream()?;
        // SAFETY: freed by DeviceMemory alone.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }
            .map_err(|e| error(&format!("allocate {bytes} bytes"), e))?;
        Ok(DeviceMemory {
            address,
            bytes,
            context: self.context.clone(),
            stream: self.stream.clone(),
        })
    }

    /// Address of `bytes` bytes of unspecified content that are never given back.
    ///
    /// # Errors
    /// When there is no room: the text says how much there is.
    pub fn chunk(&self, bytes: usize) -> Result<usize> {
        self.stream()?;
        // SAFETY: nothing frees it.
        let address = unsafe { result::malloc_sync(bytes) };
        address.map(|a| a as usize).map_err(|e| {
            let free = result::mem_get_info().map_or(0, |(free, _)| free);
            let what = format!(
                "allocate {}, {} are free",
                size(bytes as u64),
                size(free as u64)
            );
            error(&what, e)
        })
    }

    /// Copies to the GPU behind the launches so far; the bytes may be changed when it returns.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn upload(&self, to: usize, bytes: &[u8]) -> Result<()> {
        let stream = self.stream()?;
        copies::copied(false, bytes.len());
        let mut staging = self.staging.lock().unwrap_or_else(|e| e.into_inner());
        let staged = staging.stage(bytes, || self.mark())?;
        let from = staged.unwrap_or(bytes);
        // SAFETY: the caller owns the range, and the source lives until the copy is over: the staging buffer is not
        // written again before a mark behind the copy, and for anything larger this waits.
        unsafe { result::memcpy_htod_async(to as u64, from, stream) }
            .map_err(|e| error("copy to the GPU", e))?;
        if staged.is_none() {
            self.finish()?;
        }
        Ok(())
    }

    /// Copies to the host, after the launches so far.
    ///
    /// # Errors
    /// What a launch met.
    pub fn download(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let stream = self.stream()?;
        copies::copied(true, bytes.len());
        // SAFETY: the caller owns the range, and the copy is over when this returns.
        unsafe { result::memcpy_dtoh_async(bytes, from as u64, stream) }
            .map_err(|e| error("copy from the GPU", e))?;
        self.finish()
    }

    /// Begins to copy ranges, by address and bytes, to the host, behind the launches so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn send(&self, ranges: &[(usize, usize)]) -> Result<PinnedReadback> {
        let stream = self.stream()?;
        let bytes = ranges.iter().map(|(_, bytes)| bytes).sum();
        let mut readback = self.readbacks.take(bytes)?;
        let mut to = readback.bytes_mut();
        for &(from, count) in ranges {
            let (part, rest) = to.split_at_mut(count);
            copies::copied(true, count);
            // SAFETY: the caller owns the range, and the readback is neither read nor given back before its mark.
            unsafe { result::memcpy_dtoh_async(part, from as u64, stream) }
                .map_err(|e| error("copy from the GPU", e))?;
            to = rest;
        }
        Ok(readback.over_at(self.mark()?))
    }

    /// Gives what was sent, when it is there; launches behind it need not be over.
    ///
    /// # Errors
    /// What a launch before it met.
    pub fn receive(&self, readback: PinnedReadback) -> Result<Vec<u8>> {
        self.stream()?;
        self.readbacks.receive(readback)
    }

    /// Sets `count` bytes, behind the launches so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill(&self, to: usize, byte: u8, count: usize) -> Result<()> {
        let stream = self.stream()?;
        // SAFETY: the caller owns the range.
        unsafe { result::memset_d8_async(to as u64, byte, count, stream) }
            .map_err(|e| error("fill memory", e))
    }

    /// Copies within the GPU, behind the launches so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn copy(&self, to: usize, from: usize, count: usize) -> Result<()> {
        let stream = self.stream()?;
        // SAFETY: the caller owns both ranges.
        unsafe { result::memcpy_dtod_async(to as u64, from as u64, count, stream) }
            .map_err(|e| error("copy within the GPU", e))
    }

    /// A point in time on the stream: after every launch so far.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn mark(&self) -> Result<CudaEvent> {
        self.stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .map_err(|e| error("record an event", e))
    }

    /// Seconds between two marks; waits for the second.
    ///
    /// # Errors
    /// What a launch before it met.
    pub fn seconds(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64> {
        from.elapsed_ms(to)
            .map(|ms| f64::from(ms) * 1e-3)
            .map_err(|e| error("time its launches", e))
    }

    /// Records the launches of `body` as a graph instead of running them.
    ///
    /// # Errors
    /// What `body` answered, or that it did something a capture forbids.
    pub fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        // The others forbid to allocate memory meanwhile, which a step may have to that finds less free than the last.
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.stream
            .begin_capture(mode)
            .map_err(|e| error("begin a capture", e))?;
        let done = body();
        let graph = self
            .stream
            .end_capture(CUgraphInstantiate_flags(0))
            .map_err(|e| error("end a capture", e));
        done?;
        graph?.ok_or_else(|| {
            error(
                "capture a graph",
                DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
            )
        })
    }

    /// Runs a captured graph.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn replay(&self, graph: &CudaGraph) -> Result<()> {
        graph.launch().map_err(|e| error("launch a graph", e))
    }
}

/// Memory of a GPU; copies wait for the stream and are done on return.
pub struct DeviceMemory {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl DeviceMemory {
    /// Aligned to 256 bytes.
    pub fn address(&self) -> usize {
        self.address as usize
    }

    /// How many there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies from the host to the bytes from `at` on; the copy is over on return.
    ///
    /// # Errors
    /// When the range is not inside, or the driver refuses.
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        let to = self.place(at, bytes.len())?;
        // SAFETY: the range lies inside, and the copy is over when this returns. (The driver's synchronous copy may still
        // be on its way then, and a stream of our own would not wait for it.)
        let copied = unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) };
        copied
            .and_then(|()| self.stream.synchronize())
            .map_err(|e| error("copy to the GPU", e))
    }

    /// Sets `count` bytes from `at` on.
    ///
    /// # Errors
    /// When the range is not inside, or the driver refuses.
    pub fn fill(&mut self, at: usize, count: usize, byte: u8) -> Result<()> {
        let to = self.place(at, count)?;
        // SAFETY: the range lies inside.
        let filled = unsafe { result::memset_d8_async(to, byte, count, self.stream.cu_stream()) };
        filled
            .and_then(|()| self.stream.synchronize())
            .map_err(|e| error("fill memory", e))
    }

    /// Copies the bytes from `at` on to the host; the copy is over on return.
    ///
    /// # Errors
    /// When the range is not inside, or the driver refuses.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()> {
        let from = self.place(at, bytes.len())?;
        // SAFETY: as above.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) };
        copied
            .and_then(|()| self.stream.synchronize())
            .map_err(|e| error("copy from the GPU", e))
    }

    /// The address of a range inside.
    fn place(&self, at: usize, count: usize) -> Result<sys::CUdeviceptr> {
        if at.checked_add(count).is_none_or(|end| end > self.bytes) {
            let got = format!("{count} bytes from byte {at}");
            return Err(Error::invalid(
                "device memory",
                format!("a range within {} bytes", self.bytes),
                got,
                "a bug",
            ));
        }
        self.context
            .bind_to_thread()
            .map_err(|e| error("bind the GPU to a thread", e))?;
        Ok(self.address + at as u64)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // After a fault of a kernel the driver refuses everything, and the process is about to end.
        let _ = self.context.bind_to_thread();
        // SAFETY: nothing else frees it; the driver waits for what still uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

fn driver_version() -> Result<(i32, i32), DriverError> {
    let mut version = 0;
    // SAFETY: one int is written; the library is present.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok((version / 1000, version % 1000 / 10))
}

fn require_driver(got: (i32, i32)) -> Result<(), String> {
    if got >= NEEDED_DRIVER {
        return Ok(());
    }
    let (major, minor) = NEEDED_DRIVER;
    Err(format!(
        "the CUDA driver is too old: it speaks CUDA {}.{}, the kernels need {major}.{minor} (driver 580)",
        got.0, got.1
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_driver_is_refused_with_what_is_needed() {
        assert!(
            require_driver((12, 9))
                .unwrap_err()
                .contains("CUDA 12.9, the kernels need 13.0")
        );
        assert!(require_driver((13, 0)).is_ok() && require_driver((13, 2)).is_ok());
    }

    #[test]
    fn each_process_of_a_host_has_its_gpu_or_is_shown_it_alone() {
        assert_eq!((place(0, 8), place(7, 8)), (Ok(0), Ok(7)));
        assert_eq!(place(3, 1), Ok(0));
        let error = place(8, 8).unwrap_err();
        assert!(
            error.contains("process 8") && error.contains("8 GPUs"),
            "{error}"
        );
        assert!(place(0, 0).unwrap_err().contains("no GPU"));
    }
}
