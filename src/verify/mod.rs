//! Checks and timings of the program: gradient checks, kernel checks, the hardware check and the benchmark.
//!
//! Only [`gradcheck`] is intended for users of the library. The other modules are public for the command-line tests and
//! the benchmarks of this repository, and may change without notice. They are hidden in the documentation only, so that
//! the lint `missing_docs` checks them too.

#[cfg_attr(doc, doc(hidden))]
pub mod bench;
#[cfg_attr(doc, doc(hidden))]
pub mod device_check;
#[cfg_attr(doc, doc(hidden))]
pub mod fault;
pub mod gradcheck;
#[cfg_attr(doc, doc(hidden))]
pub mod hardware;
#[cfg_attr(doc, doc(hidden))]
pub mod kernels;
