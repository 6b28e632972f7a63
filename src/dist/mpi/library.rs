//! Loads MPI at run time, with the few functions that transfer bytes. Three ABIs are supported: Open MPI's, MPICH's
//! (which Intel MPI, MVAPICH and Cray MPICH share), and the standard ABI of MPI 5. No header and no compiler wrapper is
//! needed.

use crate::dist::load::load;
use crate::error::{Error, Result};
use libloading::os::unix::{Library as Loaded, RTLD_GLOBAL, Symbol};
use std::ffi::{c_char, c_int, c_void};
use std::ptr::null_mut;

/// A handle of any ABI: an address in the ABI of Open MPI and in the standard ABI; an `int` in the ABI of MPICH, where
/// the upper half is zero.
type Handle = usize;

/// The environment variable that names the library.
pub(in super::super) const VARIABLE: &str = "ROUTEGRAD_MPI";

type Gather = unsafe extern "C" fn(
    *const c_void,
    c_int,
    Handle,
    *mut c_void,
    c_int,
    Handle,
    Handle,
    *mut Handle,
) -> c_int;
/// The counts and offsets of the rows are arrays of `c_int`, which must stay valid until the request is done.
type Exchange = unsafe extern "C" fn(
    *const c_void,
    *const c_int,
    *const c_int,
    Handle,
    *mut c_void,
    *const c_int,
    *const c_int,
    Handle,
    Handle,
    *mut Handle,
) -> c_int;
type Test = unsafe extern "C" fn(*mut Handle, *mut c_int, *mut c_void) -> c_int;
type Text = unsafe extern "C" fn(c_int, *mut c_char, *mut c_int) -> c_int;
type OfWorld = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type Init = unsafe extern "C" fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int) -> c_int;

/// The constants of an ABI.
struct Abi {
    world: Handle,
    byte: Handle,
    errors_return: Handle,
    /// MPI_THREAD_SERIALIZED.
    serialized: c_int,
}

const MPICH: Abi = Abi {
    world: 0x4400_0000,
    byte: 0x4c00_010d,
    errors_return: 0x5400_0001,
    serialized: 2,
};

const STANDARD: Abi = Abi {
    world: 0x101,
    byte: 0x247,
    errors_return: 0x142,
    serialized: 2048,
};

type Split = unsafe extern "C" fn(Handle, c_int, c_int, *mut Handle) -> c_int;

/// The initialised library, and one of its communicators.
#[derive(Clone)]
pub(super) struct Library {
    communicator: Handle,
    byte: Handle,
    all_gather: Gather,
    all_to_all: Exchange,
    test: Test,
    split: Split,
    error_text: Text,
    finalize: unsafe extern "C" fn() -> c_int,
    pub rank: usize,
    pub size: usize,
    /// The host of this rank.
    pub host: String,
    /// Name and version, as the library reports them.
    pub version: String,
}

/// A request that is not done yet. Until it is done, MPI may access its buffers and the arrays that are kept here.
pub(super) struct Request {
    handle: Handle,
    /// Counts and offsets of the rows of an exchange.
    _rows: Vec<c_int>,
}

impl Library {
    /// Loads the first library of `names` that exists, and initialises it.
    ///
    /// # Errors
    /// Returns an error when no library can be loaded, or MPI fails.
    pub fn start(names: &[String]) -> Result<Self> {
        let help = format!(
            "install the launcher's MPI library, name it in {VARIABLE}, or use --ranks none for a run of one process"
        );
        // The plug-ins of Open MPI need its symbols to be global.
        let (loaded, name) = load("MPI", names, RTLD_GLOBAL, help)?;
        let abi = Abi::of(loaded, &name)?;
        let init: Init = symbol(loaded, "MPI_Init_thread")?;
        let mut threads = 0;
        // SAFETY: in every ABI MPI_Init_thread accepts null addresses of the arguments, and writes an int.
        let status = unsafe { init(null_mut(), null_mut(), abi.serialized, &mut threads) };
        if status != 0 || threads < abi.serialized {
            return Err(Error::invalid(
                "MPI",
                "a library that supports several threads (MPI_THREAD_SERIALIZED)",
                format!("status {status}, threads of level {threads} from {name}"),
                "use an MPI library that was built with threads",
            ));
        }
        let of_world = |function: &str| -> Result<usize> {
            let call: OfWorld = symbol(loaded, function)?;
            let mut number = 0;
            // SAFETY: both functions write an int.
            unsafe { call(abi.world, &mut number) };
            Ok(number.max(0) as usize)
        };
        let set: unsafe extern "C" fn(Handle, Handle) -> c_int =
            symbol(loaded, "MPI_Comm_set_errhandler")?;
        // SAFETY: the handles are those of this ABI.
        unsafe { set(abi.world, abi.errors_return) };
        type Name = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;
        let text = |function: &str| -> Result<String> {
            let call: Name = symbol(loaded, function)?;
            Ok(read_text(|to, length| unsafe { call(to, length) }))
        };
        let version = text("MPI_Get_library_version")?;
        Ok(Library {
            rank: of_world("MPI_Comm_rank")?,
            size: of_world("MPI_Comm_size")?,
            host: text("MPI_Get_processor_name")?,
            version: version.lines().next().unwrap_or_default().to_string(),
            all_gather: symbol(loaded, "MPI_Iallgather")?,
            all_to_all: symbol(loaded, "MPI_Ialltoallv")?,
            test: symbol(loaded, "MPI_Test")?,
            split: symbol(loaded, "MPI_Comm_split")?,
            error_text: symbol(loaded, "MPI_Error_string")?,
            finalize: symbol(loaded, "MPI_Finalize")?,
            communicator: abi.world,
            byte: abi.byte,
        })
    }

    /// Divides the ranks into groups of `size` consecutive ranks, and returns the communicator of this rank's group.
    /// Every rank calls it; `size` divides the number of ranks.
    ///
    /// # Errors
    /// Returns an error when MPI fails.
    pub fn group(&self, size: usize) -> Result<Self> {
        let (group, rank) = (self.rank / size, self.rank % size);
        let mut communicator = 0;
        // SAFETY: the communicator belongs to this library, and a handle is written.
        let status = unsafe {
            (self.split)(
                self.communicator,
                group as c_int,
                rank as c_int,
                &mut communicator,
            )
        };
        self.check("MPI_Comm_split", status)?;
        Ok(Library {
            communicator,
            rank,
            size,
            ..self.clone()
        })
    }

    /// Begins to gather `own`, n bytes, of every rank into `all` `[size, n]`.
    ///
    /// # Safety
    /// Until the request is done, the request and both buffers must exist, and nothing else may read or write the buffers.
    ///
    /// # Errors
    /// Returns an error when MPI fails.
    pub unsafe fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<Request> {
        let (mut handle, count) = (0, own.len() as c_int);
        // SAFETY: the counts are those of the buffers, which the caller keeps.
        let status = unsafe {
            (self.all_gather)(
                own.as_ptr().cast(),
                count,
                self.byte,
                all.as_mut_ptr().cast(),
                count,
                self.byte,
                self.communicator,
                &mut handle,
            )
        };
        self.check("MPI_Iallgather", status)?;
        let _rows = Vec::new();
        Ok(Request { handle, _rows })
    }

    /// Begins to send row r of `own` `[size, n]` to each other rank r, and to receive row r of `all` from it.
    ///
    /// # Safety
    /// The same as for [`all_gather`](Self::all_gather).
    ///
    /// # Errors
    /// Returns an error when MPI fails.
    pub unsafe fn all_to_all(&self, own: &[u8], all: &mut [u8]) -> Result<Request> {
        let row = own.len() / self.size;
        let counts = (0..self.size).map(|r| if r == self.rank { 0 } else { row });
        let places = (0..self.size).map(|r| r * row);
        let rows: Vec<c_int> = counts.chain(places).map(|n| n as c_int).collect();
        let (counts, places) = (rows.as_ptr(), rows[self.size..].as_ptr());
        let mut handle = 0;
        // SAFETY: the rows are those of the buffers, which the caller keeps, as it does the arrays with the request.
        let status = unsafe {
            (self.all_to_all)(
                own.as_ptr().cast(),
                counts,
                places,
                self.byte,
                all.as_mut_ptr().cast(),
                counts,
                places,
                self.byte,
                self.communicator,
                &mut handle,
            )
        };
        self.check("MPI_Ialltoallv", status)?;
        Ok(Request {
            handle,
            _rows: rows,
        })
    }

    /// Whether the request is done. During this call MPI works on the request.
    ///
    /// # Errors
    /// Returns an error when the request failed.
    pub fn done(&self, request: &mut Request) -> Result<bool> {
        // An MPI_Status takes 20 to 32 bytes.
        let (mut done, mut status) = (0, [0u64; 8]);
        // SAFETY: the request belongs to this library, and the status is large enough in every ABI.
        let code =
            unsafe { (self.test)(&mut request.handle, &mut done, status.as_mut_ptr().cast()) };
        self.check("MPI_Test", code)?;
        Ok(done != 0)
    }

    /// Ends MPI after every rank has finished.
    pub fn finalize(&self) {
        // SAFETY: no request is pending.
        unsafe { (self.finalize)() };
    }

    fn check(&self, what: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the buffer is larger than any library's longest text.
        let text = read_text(|to, length| unsafe { (self.error_text)(status, to, length) });
        Err(Error::invalid(
            what,
            "success",
            format!("error {status}: {text}"),
            "see the messages of the other ranks; if they have no errors, check the network",
        ))
    }
}

impl Abi {
    fn of(loaded: &'static Loaded, name: &str) -> Result<Self> {
        let address = |name: &str| symbol::<Handle>(loaded, name);
        if name.contains("mpi_abi") {
            return Ok(STANDARD);
        }
        match address("ompi_mpi_comm_world") {
            Err(_) => Ok(MPICH),
            Ok(world) => Ok(Abi {
                world,
                byte: address("ompi_mpi_byte")?,
                errors_return: address("ompi_mpi_errors_return")?,
                serialized: 2,
            }),
        }
    }
}

fn symbol<T: Copy>(loaded: &'static Loaded, name: &str) -> Result<T> {
    // SAFETY: every caller asks for the type that MPI gives the function of this name, or for an address.
    let found: Result<Symbol<T>, _> = unsafe { loaded.get(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|e| missing(name, &e))
}

fn missing(name: &str, e: &libloading::Error) -> Error {
    let help = format!("name an MPI library of version 3 or later in {VARIABLE}");
    Error::invalid("MPI", format!("the function {name}"), e.to_string(), help)
}

/// Returns the text that a function writes to a buffer. No library writes more than 8192 bytes.
fn read_text(write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> String {
    let (mut buffer, mut length) = (vec![0u8; 8193], 0);
    write(buffer.as_mut_ptr().cast(), &mut length);
    let text = &buffer[..(length.max(0) as usize).min(buffer.len())];
    let text = String::from_utf8_lossy(text);
    text.trim_end_matches('\0').trim().to_string()
}
