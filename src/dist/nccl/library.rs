//! Loads NCCL at run time, with the few functions that transfer bytes. No header is needed: the functions below have
//! had these types since version 2.14.

use crate::device::{Span, stream};
use crate::dist::device::Part;
use crate::dist::load::load;
use crate::error::{Error, Result};
use libloading::os::unix::{Library as Loaded, RTLD_LOCAL, Symbol};
use std::env::var;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;

/// The environment variable that names the library.
pub const VARIABLE: &str = "ROUTEGRAD_NCCL";

/// The oldest version that has all functions, and sends and receives in captured graphs.
const NEEDED: (i32, i32) = (2, 14);

/// `ncclUint8`.
const BYTE: c_int = 1;

/// `ncclInProgress`, which is not an error.
const IN_PROGRESS: c_int = 7;

/// `ncclComm_t`.
type Handle = *mut c_void;
/// `cudaStream_t`.
type Stream = *mut c_void;
type Status = c_int;

/// `ncclUniqueId`: the id with which the ranks of a communicator connect.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Id(pub [u8; 128]);

type AllGather =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> Status;
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> Status;
type Receive = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;
type OfCommunicator = unsafe extern "C" fn(Handle) -> Status;
type Number = unsafe extern "C" fn(Handle, *mut c_int) -> Status;

/// The library's functions.
#[derive(Clone, Copy)]
pub struct Library {
    unique_id: unsafe extern "C" fn(*mut Id) -> Status,
    error_text: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    init_rank: unsafe extern "C" fn(*mut Handle, c_int, Id, c_int) -> Status,
    count: Number,
    user_rank: Number,
    asynchronous: Number,
    abort: OfCommunicator,
    destroy: OfCommunicator,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    all_gather: AllGather,
    send: Send,
    receive: Receive,
    /// Major, minor, patch.
    pub version: (i32, i32, i32),
    /// Whether this is a test library, which accepts addresses of host memory.
    pub on_host: bool,
}

/// Returns the names under which to look for the library: only that of [`VARIABLE`], if it is set.
pub fn names() -> Vec<String> {
    match var(VARIABLE) {
        Ok(name) => vec![name],
        Err(_) => ["libnccl.so.2", "libnccl.so"].map(String::from).into(),
    }
}

impl Library {
    /// Loads the first library of `names` that exists.
    ///
    /// # Errors
    /// Returns an error when no library can be loaded, it is too old, or a function is missing.
    pub fn load(names: &[String]) -> Result<Self> {
        let help = format!("install NVIDIA's NCCL, or name it in {VARIABLE}");
        let (loaded, name) = load("NCCL", names, RTLD_LOCAL, help)?;
        let version = version(loaded, &name)?;
        Ok(Library {
            unique_id: symbol(loaded, "ncclGetUniqueId")?,
            error_text: symbol(loaded, "ncclGetErrorString")?,
            last_error: symbol(loaded, "ncclGetLastError")?,
            init_rank: symbol(loaded, "ncclCommInitRank")?,
            count: symbol(loaded, "ncclCommCount")?,
            user_rank: symbol(loaded, "ncclCommUserRank")?,
            asynchronous: symbol(loaded, "ncclCommGetAsyncError")?,
            abort: symbol(loaded, "ncclCommAbort")?,
            destroy: symbol(loaded, "ncclCommDestroy")?,
            group_start: symbol(loaded, "ncclGroupStart")?,
            group_end: symbol(loaded, "ncclGroupEnd")?,
            all_gather: symbol(loaded, "ncclAllGather")?,
            send: symbol(loaded, "ncclSend")?,
            receive: symbol(loaded, "ncclRecv")?,
            version,
            on_host: symbol::<*const c_void>(loaded, "routegrad_nccl_on_host").is_ok(),
        })
    }

    /// Creates an id, which all ranks need to connect.
    ///
    /// # Errors
    /// Returns an error when NCCL fails, for example without a network interface.
    pub fn unique_id(&self) -> Result<Id> {
        let mut id = Id([0; 128]);
        // SAFETY: an id is written.
        let status = unsafe { (self.unique_id)(&mut id) };
        self.check("ncclGetUniqueId", None, null_mut(), status)?;
        Ok(id)
    }

    /// Connects this rank to the communicator of `size` ranks with this `id`, for the current GPU of the calling
    /// thread. All ranks call it.
    ///
    /// # Errors
    /// Returns an error when NCCL fails, for example without a GPU, or if two ranks use one GPU.
    pub fn connect(&self, id: Id, rank: usize, size: usize) -> Result<Communicator> {
        let mut handle = null_mut();
        // SAFETY: a handle is written.
        let status = unsafe { (self.init_rank)(&mut handle, size as c_int, id, rank as c_int) };
        self.check("ncclCommInitRank", Some(rank), handle, status)?;
        let communicator = Communicator {
            library: *self,
            handle,
            rank,
            size,
        };
        let number = |name: &str, call: Number| -> Result<usize> {
            let mut number = 0;
            // SAFETY: the handle is this library's, and an int is written.
            let status = unsafe { call(handle, &mut number) };
            self.check(name, Some(rank), handle, status)?;
            Ok(number.max(0) as usize)
        };
        let found = (
            number("ncclCommUserRank", self.user_rank)?,
            number("ncclCommCount", self.count)?,
        );
        if found != (rank, size) {
            return Err(Error::invalid(
                "ncclCommInitRank",
                format!("rank {rank} of {size}"),
                format!("rank {} of {}", found.0, found.1),
                "report this as a bug, with the library's version",
            ));
        }
        Ok(communicator)
    }

    fn check(&self, name: &str, rank: Option<usize>, handle: Handle, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let text = |from: *const c_char| match from.is_null() {
            true => String::new(),
            // SAFETY: NCCL's texts end with a zero byte and are valid until its next call.
            false => {
                let text = unsafe { CStr::from_ptr(from) }.to_string_lossy();
                text.trim().to_string()
            }
        };
        // SAFETY: both functions take any status and any handle of this library, null included.
        let short = text(unsafe { (self.error_text)(status) });
        let long = text(unsafe { (self.last_error)(handle) });
        let rank = rank.map_or(String::new(), |rank| format!(" on rank {rank}"));
        let long = match long.is_empty() {
            true => long,
            false => format!(" ({long})"),
        };
        Err(Error::invalid(
            name,
            "success",
            format!("error {status}{rank}: {short}{long}"),
            "set NCCL_DEBUG=INFO in the environment to see more",
        ))
    }
}

/// A communicator on one rank. One thread at a time enqueues calls on a stream; another thread may check for
/// [errors](Self::asynchronous) and [abort](Self::abort).
pub struct Communicator {
    library: Library,
    handle: Handle,
    rank: usize,
    size: usize,
}

// SAFETY: a communicator of NCCL does not belong to a thread, and allows the calls that the doc of the type names.
unsafe impl std::marker::Send for Communicator {}
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Gathers `own` of every rank to `all`, rank 0 first, after all earlier launches.
    ///
    /// # Errors
    /// Returns an error when NCCL fails.
    pub fn all_gather(&self, own: Span, all: Span) -> Result<()> {
        assert_eq!(all.bytes(), own.bytes() * self.size, "bytes of all ranks");
        let (from, to) = (own.address() as *const c_void, all.address() as *mut c_void);
        // SAFETY: the ranges are the device's, as is its stream.
        let status = unsafe {
            (self.library.all_gather)(from, to, own.bytes(), BYTE, self.handle, stream())
        };
        self.check("ncclAllGather", status)
    }

    /// Sends and receives all parts at once, after all earlier launches. Two ranks give the parts between them in the
    /// same order, with the same lengths.
    ///
    /// # Errors
    /// Returns an error when NCCL fails.
    pub fn exchange(&self, parts: &[Part]) -> Result<()> {
        let (library, handle) = (&self.library, self.handle);
        // SAFETY: a group takes no arguments.
        self.check("ncclGroupStart", unsafe { (library.group_start)() })?;
        let begun = parts.iter().try_for_each(|part| {
            let peer = part.peer as c_int;
            let (from, sent) = (part.send.address() as *const c_void, part.send.bytes());
            if sent > 0 {
                // SAFETY: the range is the device's, as is its stream.
                let status = unsafe { (library.send)(from, sent, BYTE, peer, handle, stream()) };
                self.check("ncclSend", status)?;
            }
            let (to, received) = (part.receive.address() as *mut c_void, part.receive.bytes());
            if received > 0 {
                // SAFETY: as above.
                let status =
                    unsafe { (library.receive)(to, received, BYTE, peer, handle, stream()) };
                self.check("ncclRecv", status)?;
            }
            Ok(())
        });
        // A group that was begun must be ended; otherwise every later call would become part of it.
        // SAFETY: a group takes no arguments.
        let ended = self.check("ncclGroupEnd", unsafe { (library.group_end)() });
        begun.and(ended)
    }

    /// Checks for errors of calls that were enqueued.
    ///
    /// # Errors
    /// Returns such an error, or an error when NCCL cannot check.
    pub fn asynchronous(&self) -> Result<()> {
        let mut status = 0;
        // SAFETY: an int is written.
        let asked = unsafe { (self.library.asynchronous)(self.handle, &mut status) };
        self.check("ncclCommGetAsyncError", asked)?;
        match status {
            IN_PROGRESS => Ok(()),
            status => self.check("an asynchronous call of NCCL", status),
        }
    }

    /// Aborts all pending calls, on this rank only. No further call may be made.
    pub fn abort(&self) {
        // SAFETY: the caller makes no further calls.
        unsafe { (self.library.abort)(self.handle) };
    }

    /// Destroys the communicator after all calls have finished. No further call may be made.
    pub fn destroy(&self) {
        // SAFETY: the caller makes no further calls.
        unsafe { (self.library.destroy)(self.handle) };
    }

    fn check(&self, name: &str, status: Status) -> Result<()> {
        self.library
            .check(name, Some(self.rank), self.handle, status)
    }
}

/// Returns the version (major, minor, patch), or an error if the library is too old.
fn version(loaded: &'static Loaded, name: &str) -> Result<(i32, i32, i32)> {
    let get: unsafe extern "C" fn(*mut c_int) -> Status = symbol(loaded, "ncclGetVersion")?;
    let mut code = 0;
    // SAFETY: an int is written.
    let status = unsafe { get(&mut code) };
    // Since 2.9 the minor and the patch version have two digits each; before that the minor version has one.
    let version = match code {
        c if c >= 10_000 => (c / 10_000, c / 100 % 100, c % 100),
        c => (c / 1000, c / 100 % 10, c % 100),
    };
    if status != 0 || (version.0, version.1) < NEEDED {
        return Err(Error::invalid(
            "NCCL",
            format!("version {}.{} or later", NEEDED.0, NEEDED.1),
            format!(
                "{}.{}.{} in {name} (status {status})",
                version.0, version.1, version.2
            ),
            format!("install a newer NCCL, or name one in {VARIABLE}"),
        ));
    }
    Ok(version)
}

fn symbol<T: Copy>(loaded: &'static Loaded, name: &str) -> Result<T> {
    // SAFETY: every caller asks for the type that NCCL gives the function of this name.
    let found: Result<Symbol<T>, _> = unsafe { loaded.get(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|e| {
        let (major, minor) = NEEDED;
        let help = format!("name an NCCL of version {major}.{minor} or later in {VARIABLE}");
        Error::invalid("NCCL", format!("the function {name}"), e.to_string(), help)
    })
}
