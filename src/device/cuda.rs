//! One GPU through the CUDA driver. The driver library is loaded at run time, so the program starts on machines
//! without it.
//!
//! [`Gpu::open`] returns the reason if there is no usable GPU. All launches go to one stream, which the [`Gpu`] owns;
//! no code here uses the default stream. Event tracking of cudarc is off, because it would break graph capture.

use super::driver::{error, error_text};
use super::pinned::{PinnedReadback, PinnedReadbacks, Staging};
use super::{
    built_for, copies, counters, cuda_version, driver_of_kernels, machine, require_capability,
    require_driver,
};
use crate::error::{Error, Result};
use crate::report::size;
use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUdevice_attribute_enum as Attribute, CUevent_flags, CUgraphInstantiate_flags,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// A GPU of the Ampere generation or newer, for which the kernels are compiled.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    staging: Mutex<Staging>,
    readbacks: PinnedReadbacks,
    /// Name given by the driver, such as "NVIDIA H200".
    pub name: String,
    /// Compute capability, for example (9, 0).
    pub capability: (i32, i32),
    /// CUDA version that the driver supports, for example (13, 0).
    pub driver: (i32, i32),
}

/// CUDA version whose driver functions this module calls. The kernels may need a driver for a later version.
pub const NEEDED_DRIVER: (i32, i32) = (13, 0);

static GPU: OnceLock<Result<Gpu, String>> = OnceLock::new();

/// Index of the GPU to open, which differs for each process of a host.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

/// Chooses the GPU that [`gpu`] opens.
pub(super) fn choose(number: usize) {
    CHOSEN.store(number, Ordering::SeqCst);
}

/// Returns the index of the GPU, of `count` visible GPUs, that a process with number `chosen` opens. If only one GPU
/// is visible, it is that one, because a process launcher may make only one GPU visible to each process.
fn place(chosen: usize, count: usize) -> Result<usize, String> {
    match count {
        0 => Err("the CUDA driver finds no GPU".into()),
        1 => Ok(0),
        n if chosen < n => Ok(chosen),
        n => Err(format!(
            "this is process {chosen} of its host, counted from 0, and there are {n} GPUs: start at most one process per GPU"
        )),
    }
}

/// Returns the GPU of this process. The first call opens it.
///
/// # Errors
/// The same errors as [`Gpu::open`].
pub fn gpu() -> Result<&'static Gpu> {
    GPU.get_or_init(Gpu::open).as_ref().map_err(|why| {
        let help = "use device = \"cpu\" or \"sim\", or a machine with an NVIDIA GPU from Ampere on and its driver";
        Error::invalid("device cuda", "an NVIDIA GPU from Ampere on", why, help)
    })
}

/// Returns the GPU of this process if it is open.
pub fn opened() -> Option<&'static Gpu> {
    GPU.get()?.as_ref().ok()
}

impl Gpu {
    /// Opens the chosen GPU: the first of the machine unless several processes share the machine.
    ///
    /// # Errors
    /// Returns one sentence that says why no GPU is usable: kernels are not compiled in, there is no driver library,
    /// the driver is too old, there is no GPU, the GPU is older than Ampere, or the kernels are not compiled for it.
    pub fn open() -> Result<Self, String> {
        let failed = |what: &str, e: DriverError| {
            format!("the CUDA driver cannot {what}: {}", error_text(e))
        };
        let (driver, count) = Self::driver_and_count()?;
        let place = place(CHOSEN.load(Ordering::SeqCst), count)?;
        let context = CudaContext::new(place).map_err(|e| failed("open the GPU", e))?;
        // SAFETY: there is no allocation yet, and all work runs on one stream.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(|e| failed("name the GPU", e))?;
        let capability = context
            .compute_capability()
            .map_err(|e| failed("describe the GPU", e))?;
        require_capability(&name, capability, built_for())?;
        let number = |what| {
            context
                .attribute(what)
                .map_err(|e| failed("describe the GPU", e))
        };
        machine::report_on(format!(
            "{:08x}:{:02x}:{:02x}.0",
            number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?
        ));
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

    /// Returns the number of GPUs visible to this process.
    ///
    /// # Errors
    /// The errors of [`open`](Self::open) that concern the driver.
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
        let driver = driver_version().map_err(|e| failed("report its version", e))?;
        require_driver(driver, NEEDED_DRIVER.max(driver_of_kernels()))?;
        let count = CudaContext::device_count().map_err(|e| failed("count its GPUs", e))?;
        Ok((driver, count.max(0) as usize))
    }

    /// Returns the stream of all launches, and binds the GPU's context to the calling thread.
    ///
    /// # Errors
    /// Returns an error when a driver call fails.
    pub fn stream(&self) -> Result<sys::CUstream> {
        self.context
            .bind_to_thread()
            .map_err(|e| error("bind the GPU to a thread", e))?;
        Ok(self.stream.cu_stream())
    }

    /// Returns the size of the L2 cache in bytes.
    pub fn cache_bytes(&self) -> Result<usize> {
        let bytes = self
            .context
            .attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
        bytes
            .map(|bytes| bytes as usize)
            .map_err(|e| error("read an attribute", e))
    }

    /// Returns the stream for a launcher, which binds the GPU's primary context to its thread itself.
    pub fn raw_stream(&self) -> *mut std::ffi::c_void {
        self.stream.cu_stream().cast()
    }

    /// Waits until all launches have finished.
    ///
    /// # Errors
    /// Returns the error of a launch since the last wait.
    pub fn finish(&self) -> Result<()> {
        counters::waited();
        self.stream
            .synchronize()
            .map_err(|e| error("wait for its launches", e))
    }

    /// Allocates `bytes` bytes of unspecified content.
    ///
    /// # Errors
    /// Returns an error when the GPU does not have enough memory.
    pub fn allocate(&self, bytes: usize) -> Result<DeviceMemory> {
        self.stream()?;
        // SAFETY: only DeviceMemory frees it.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }
            .map_err(|e| error(&format!("allocate {bytes} bytes"), e))?;
        Ok(DeviceMemory {
            address,
            bytes,
            context: self.context.clone(),
            stream: self.stream.clone(),
        })
    }

    /// Allocates `bytes` bytes of unspecified content that are never freed, and returns their address.
    ///
    /// # Errors
    /// Returns an error when the GPU does not have enough memory; it states how much is free.
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

    /// Copies `bytes` to the GPU after the launches so far. The caller may change `bytes` when this returns.
    ///
    /// # Errors
    /// Returns an error when a driver call fails.
    pub fn upload(&self, to: usize, bytes: &[u8]) -> Result<()> {
        let stream = self.stream()?;
        copies::copied(false, bytes.len());
        let mut staging = self.staging.lock().unwrap_or_else(|e| e.into_inner());
        let staged = staging.stage(bytes, || self.mark())?;
        let from = staged.unwrap_or(bytes);
        // SAFETY: the caller owns the range, and the source is valid until the copy ends: the staging buffer is not
        // written again before an event after the copy, and for larger copies this function waits.
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
    /// Returns the error of a launch.
    pub fn download(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let stream = self.stream()?;
        copies::copied(true, bytes.len());
        // SAFETY: the caller owns the range, and the copy has ended when this returns.
        unsafe { result::memcpy_dtoh_async(bytes, from as u64, stream) }
            .map_err(|e| error("copy from the GPU", e))?;
        self.finish()
    }

    /// Starts to copy ranges, given as (address, bytes), to the host after the launches so far.
    ///
    /// # Errors
    /// Returns an error when a driver call fails.
    pub fn send(&self, ranges: &[(usize, usize)]) -> Result<PinnedReadback> {
        let stream = self.stream()?;
        let bytes = ranges.iter().map(|(_, bytes)| bytes).sum();
        let mut readback = self.readbacks.take(bytes)?;
        let mut to = readback.bytes_mut();
        for &(from, count) in ranges {
            let (part, rest) = to.split_at_mut(count);
            copies::copied(true, count);
            // SAFETY: the caller owns the range, and the readback memory is neither read nor reused before its event.
            unsafe { result::memcpy_dtoh_async(part, from as u64, stream) }
                .map_err(|e| error("copy from the GPU", e))?;
            to = rest;
        }
        Ok(readback.over_at(self.mark()?))
    }

    /// Waits for the copy and returns its bytes. Later launches need not have finished.
    ///
    /// # Errors
    /// Returns the error of an earlier launch.
    pub fn receive(&self, readback: PinnedReadback) -> Result<Vec<u8>> {
        self.stream()?;
        self.readbacks.receive(readback)
    }

    /// Sets `count` bytes after the launches so far.
    ///
    /// # Errors
    /// Returns an error when a driver call fails.
    pub fn fill(&self, to: usize, byte: u8, count: usize) -> Result<()> {
        let stream = self.stream()?;
        // SAFETY: the caller owns the range.
        unsafe { result::memset_d8_async(to as u64, byte, count, stream) }
            .map_err(|e| error("fill memory", e))
    }

    /// Copies within the GPU after the launches so far.
    ///
    /// # Errors
    /// Returns an error when a driver call fails.
    pub fn copy(&self, to: usize, from: usize, count: usize) -> Result<()> {
        let stream = self.stream()?;
        // SAFETY: the caller owns both ranges.
        unsafe { result::memcpy_dtod_async(to as u64, from as u64, count, stream) }
            .map_err(|e| error("copy within the GPU", e))
    }

    /// Records an event on the stream, after all launches so far.
    ///
    /// # Errors
    /// Returns an error when a driver call fails.
    pub fn mark(&self) -> Result<CudaEvent> {
        self.stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            .map_err(|e| error("record an event", e))
    }

    /// Returns the seconds between two events; waits for the second.
    ///
    /// # Errors
    /// Returns the error of an earlier launch.
    pub fn seconds(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64> {
        from.elapsed_ms(to)
            .map(|ms| f64::from(ms) * 1e-3)
            .map_err(|e| error("time its launches", e))
    }

    /// Records the launches of `body` as a graph instead of running them.
    ///
    /// # Errors
    /// Returns the error of `body`, or an error when `body` did something that is not permitted in a capture.
    pub fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        // The other modes do not permit memory allocation during the capture, which a step may need if less memory is
        // free than in the last step.
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
    /// Returns an error when a driver call fails.
    pub fn replay(&self, graph: &CudaGraph) -> Result<()> {
        graph.launch().map_err(|e| error("launch a graph", e))
    }
}

/// Memory of a GPU. Copies run in stream order and have ended when the function returns.
pub struct DeviceMemory {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl DeviceMemory {
    /// Returns the address, which is aligned to 256 bytes.
    pub fn address(&self) -> usize {
        self.address as usize
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `bytes` from the host to the memory at offset `at`. The copy has ended when this returns.
    ///
    /// # Errors
    /// Returns an error when the range is outside the allocation, or the driver returns an error.
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        let to = self.place(at, bytes.len())?;
        // SAFETY: the range is inside the allocation, and the copy has ended when this returns. (The driver's
        // synchronous copy may return before the transfer ends, and our stream would not wait for it.)
        let copied = unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) };
        copied
            .and_then(|()| self.stream.synchronize())
            .map_err(|e| error("copy to the GPU", e))
    }

    /// Sets `count` bytes at offset `at`.
    ///
    /// # Errors
    /// Returns an error when the range is outside the allocation, or the driver returns an error.
    pub fn fill(&mut self, at: usize, count: usize, byte: u8) -> Result<()> {
        let to = self.place(at, count)?;
        // SAFETY: the range is inside the allocation.
        let filled = unsafe { result::memset_d8_async(to, byte, count, self.stream.cu_stream()) };
        filled
            .and_then(|()| self.stream.synchronize())
            .map_err(|e| error("fill memory", e))
    }

    /// Copies the bytes at offset `at` to the host. The copy has ended when this returns.
    ///
    /// # Errors
    /// Returns an error when the range is outside the allocation, or the driver returns an error.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<()> {
        let from = self.place(at, bytes.len())?;
        // SAFETY: as above.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) };
        copied
            .and_then(|()| self.stream.synchronize())
            .map_err(|e| error("copy from the GPU", e))
    }

    /// Returns the address of a range inside the allocation.
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
        // After a kernel fault all driver calls fail, and the process will end.
        let _ = self.context.bind_to_thread();
        // SAFETY: no other code frees it; the driver waits for work that still uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

fn driver_version() -> Result<(i32, i32), DriverError> {
    let mut version = 0;
    // SAFETY: one int is written; the library is present.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(cuda_version(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_of_a_host_opens_its_own_gpu_or_the_only_visible_one() {
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
