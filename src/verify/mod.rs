//! What proves and times the program: gradient checks, kernel checks, the hardware check and the benchmark.
//!
//! Of these only [`gradcheck`] is for users of the library. The hidden modules are public for the commands' tests and the
//! benches of this repository, and change without notice.

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
