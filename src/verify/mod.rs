//! Checks and timings of the program: gradient checks, kernel checks, the hardware check and the benchmark.
//!
//! Only [`gradcheck`] is intended for users of the library. The hidden modules are public for the command-line tests and
//! the benchmarks of this repository, and may change without notice.

#[doc(hidden)]
pub mod bench;
#[doc(hidden)]
pub mod device_check;
#[doc(hidden)]
pub mod fault;
pub mod gradcheck;
#[doc(hidden)]
pub mod hardware;
#[doc(hidden)]
pub mod kernels;
