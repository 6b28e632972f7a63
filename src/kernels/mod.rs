//! The kernels, one file for each `kernels/NAME.cu`, with typed arguments, checks, launch, workspace and cost.
//!
//! There is one way to call a kernel. Its struct has a named field for every argument of its launcher, in the
//! launcher's order. [`launch`](Combine::launch) checks that every buffer is as long as the sizes require, then
//! launches on a [`Stream`]. The launcher itself checks null pointers, alignment and the ranges of the sizes.
//! Operations, kernel checks, benchmarks and tests all use these structs; no other code names a launcher.
//!
//! ```
//! # fn main() -> routegrad::error::Result<()> {
//! use routegrad::device::Device;
//! use routegrad::kernels::{Stream, SwigluForward};
//! use routegrad::tensor::{Tensor, dtype::DType};
//!
//! let h = Tensor::zeros(Device::Sim, DType::Bf16, [4, 16]);
//! let mut a = Tensor::unspecified(Device::Sim, DType::Bf16, [4, 8]);
//! SwigluForward { a: a.output()?, h: h.input()?, rows: 4, ffn: 8 }.launch(&Stream::of(Device::Sim)?)?;
//! # Ok(()) }
//! ```

pub mod adamw;
pub mod argument;
pub mod attention;
pub mod attention_backward;
pub mod balance;
// kernels/routegrad.h documents the names in this module.
#[allow(missing_docs, non_camel_case_types, non_upper_case_globals, clippy::type_complexity)]
#[rustfmt::skip]
pub mod bindings;
pub mod combine;
pub mod cost;
pub mod cross_entropy;
pub mod dispatch;
pub mod embedding;
pub mod expert_mean;
#[cfg(test)]
mod flag_tests;
pub mod gate_gradient;
pub mod gates;
pub mod grouped_down;
pub mod grouped_gemm;
pub mod grouped_swiglu;
pub mod launchers;
pub mod layer_tally;
pub mod norm;
pub mod qk_norm;
pub mod qkv_rope;
pub mod ranks;
pub mod rope;
pub mod router;
pub mod router_backward;
pub mod router_sample;
pub mod rows;
pub mod step;
pub mod sum_parts;
pub mod swiglu;
pub mod table;
pub mod trace;
// Single instructions and deliberate faults, only for the tests of the simulator.
#[doc(hidden)]
pub mod unit;

pub use adamw::{AdamwUpdate, SquareSums};
pub use argument::{Buffer, In, Out, Stream};
pub use attention::AttentionForward;
pub use attention_backward::AttentionBackward;
pub use combine::Combine;
pub use cross_entropy::{CrossEntropyRows, GradientScale, HeadLogits};
pub use dispatch::{DispatchChoices, DispatchPositive};
pub use embedding::{EmbeddingForward, EmbeddingGradient, EmbeddingOrder};
pub use expert_mean::{ExpertMean, ExpertMeanUpdate, ExpertSums};
pub use gate_gradient::{DefaultDots, GateGradient};
pub use grouped_down::GroupedDownForward;
pub use grouped_gemm::{GroupedGemmForward, GroupedGemmInputGradient, GroupedGemmWeightGradient};
pub use grouped_swiglu::{GroupedSwigluBackward, GroupedSwigluForward};
pub use norm::{NormBackward, NormForward};
pub use qk_norm::{QkNorm, QkNormBackward};
pub use qkv_rope::QkvRopeForward;
pub use rope::Rope;
pub use rows::{ColumnSums, GatedRows, GatedRowsBackward, RowArithmetic};
pub use sum_parts::SumParts;
pub use swiglu::{SwigluBackward, SwigluForward};

use crate::device::Device;
use crate::error::{Error, Result};
use launchers::Launchers;

impl Device {
    /// Prepares a thread to launch kernels. Call it once per thread: the simulator then divides the blocks of a
    /// launch among all cores. Results do not depend on this.
    ///
    /// # Errors
    /// Returns an error when the simulator cannot be loaded, or there is no GPU to use.
    pub fn prepare(self) -> Result<()> {
        if self != Device::Cpu {
            let launchers = self.launchers()?;
            if let Some(mut options) = launchers.options() {
                options.threads = rayon::current_num_threads() as i32;
                options.arch = launchers::simulated().unwrap_or(options.arch);
                launchers.set_options(&options)?;
            }
        }
        Ok(())
    }

    /// Returns the launchers of this device.
    ///
    /// # Errors
    /// Returns an error for the CPU, which has no kernels, and when the simulator or the GPU's kernels are not
    /// available.
    pub fn launchers(self) -> Result<&'static Launchers> {
        match self {
            Device::Sim => launchers::sim(),
            #[cfg(feature = "cuda")]
            Device::Cuda => {
                crate::device::cuda::gpu()?;
                launchers::cuda().ok_or_else(|| {
                    let help =
                        "install nvcc in .toolkit/ with scripts/install-toolkit and build again";
                    Error::invalid("device cuda", "kernels compiled by nvcc", "none", help)
                })
            }
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => Err(Error::invalid(
                "device cuda",
                "a build with it",
                "one without",
                "build with --features cuda",
            )),
            Device::Cpu => Err(Error::invalid(
                "kernels",
                "tensors on a device with kernels",
                "tensors on cpu",
                "this is a bug: the operation should have used its CPU implementation",
            )),
        }
    }
}

/// Declares the typed call of one launcher: a struct with one field for each of the launcher's arguments except the
/// stream, in the launcher's order, and `launch`, which checks the length of every field that is followed by a length
/// in brackets.
///
/// A length is a number of elements: a formula of the other fields, or `=> function(fields)`, which calls a
/// [`host_function`] with some of the fields.
macro_rules! kernel {
    (
        $(#[$about:meta])*
        pub struct $Name:ident = $launcher:ident {
            $(
                $(#[$field_about:meta])*
                $field:ident: $type:ty $([$length:expr])? $(=> $host:ident($($size:ident),*))?;
            )*
        }
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy)]
        pub struct $Name<'a> {
            $( $(#[$field_about])* pub $field: $type, )*
        }

        impl $Name<'_> {
            /// The launcher's name in `kernels/routegrad.h`.
            pub const LAUNCHER: &'static str = stringify!($launcher);

            /// Checks the lengths of the buffers.
            #[allow(unused_variables)]
            fn check(&self, launchers: &$crate::kernels::launchers::Launchers) -> $crate::error::Result<()> {
                use $crate::kernels::argument::{Argument, Size};
                // If a host function rejects the sizes, the launcher rejects them too and names the wrong argument.
                $( $(
                    let length = $host(launchers, $(self.$size),*).unwrap_or(0) as u128;
                    Argument::check(&self.$field, Self::LAUNCHER, stringify!($field), length)?;
                )? )*
                $( let $field = Size::size(&self.$field); )*
                $( $( Argument::check(&self.$field, Self::LAUNCHER, stringify!($field), $length)?; )? )*
                Ok(())
            }

            /// Checks the arguments and launches. On a GPU the kernel may still run when this returns.
            ///
            /// # Errors
            /// Returns an error when a buffer is shorter than the sizes require, or the launcher refuses an argument.
            pub fn launch(&self, stream: &$crate::kernels::Stream) -> $crate::error::Result<()> {
                use $crate::kernels::argument::Pass;
                let launchers = stream.launchers();
                self.check(launchers)?;
                let Some(function) = launchers.table().$launcher else {
                    return Err($crate::kernels::launchers::missing(Self::LAUNCHER));
                };
                $( let $field = Pass::pass(self.$field, Self::LAUNCHER, stringify!($field))?; )*
                let raw = stream.raw();
                // SAFETY: every buffer has at least the length above, which is the length in the launcher's header,
                // and is in the memory of the stream's device. The kernel ends before the memory is reused, since all
                // launches of a device share one stream.
                launchers.launch(Self::LAUNCHER, move || unsafe { function($($field,)* raw) })
            }
        }
    };
}
pub(crate) use kernel;

/// Declares a function of sizes that the kernel library computes on the host, such as the length of a workspace.
macro_rules! host_function {
    (
        $(#[$about:meta])*
        pub fn $name:ident = $launcher:ident($($size:ident: $type:ty),*) -> $raw:ty
    ) => {
        $(#[$about])*
        ///
        /// # Errors
        /// Returns an error when the launcher refuses a size.
        pub fn $name(
            launchers: &$crate::kernels::launchers::Launchers,
            $($size: $type),*
        ) -> $crate::error::Result<usize> {
            use $crate::kernels::argument::Pass;
            const LAUNCHER: &str = stringify!($launcher);
            let Some(function) = launchers.table().$launcher else {
                return Err($crate::kernels::launchers::missing(LAUNCHER));
            };
            let mut value: $raw = 0;
            $( let $size = Pass::pass($size, LAUNCHER, stringify!($size))?; )*
            // SAFETY: it computes on the host, and writes one number.
            launchers.check(LAUNCHER, unsafe { function(&mut value, $($size),*) })?;
            Ok(value as usize)
        }
    };
}
pub(crate) use host_function;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;
    use crate::tensor::dtype::DType;

    #[test]
    fn a_buffer_shorter_than_the_sizes_require_is_refused_and_nothing_is_launched() {
        let new = |dtype, elements: usize| Tensor::zeros(Device::Sim, dtype, [elements]);
        let stream = Stream::of(Device::Sim).unwrap();
        let (h, mut a) = (new(DType::Bf16, 4 * 16), new(DType::Bf16, 4 * 8 - 1));
        launchers::sim().unwrap().take_counters();
        let swiglu = SwigluForward {
            a: a.output().unwrap(),
            h: h.input().unwrap(),
            rows: 4,
            ffn: 8,
        };
        let e = swiglu.launch(&stream).unwrap_err().to_string();
        assert!(e.contains("`a` of 32 elements") && e.contains("31"), "{e}");
        // The length of a workspace is the result of its host function.
        let floats = embedding::workspace(stream.launchers(), 4, 8).unwrap();
        let (mut dw, mut parts) = (new(DType::F32, 3 * 8), new(DType::F32, floats - 1));
        let (dy, ids) = (new(DType::Bf16, 4 * 8), new(DType::I32, 4));
        let gradient = EmbeddingGradient {
            dw: dw.output().unwrap(),
            parts: parts.output().unwrap(),
            dy: dy.input().unwrap(),
            order: ids.input().unwrap(),
            keys: ids.input().unwrap(),
            tokens: 4,
            vocabulary: 3,
            hidden: 8,
            accumulate: false,
        };
        let e = gradient.launch(&stream).unwrap_err().to_string();
        assert!(e.contains(&format!("`parts` of {floats} elements")), "{e}");
        let counters = launchers::sim().unwrap().take_counters().unwrap();
        assert_eq!(counters.launches, 0);
    }

    /// Typed calls cannot pass null; other users of the C interface can.
    #[test]
    fn host_functions_refuse_a_null_result() {
        let table = launchers::sim().unwrap().table();
        let null = std::ptr::null_mut();
        // SAFETY: nothing is written.
        let statuses = unsafe {
            [
                table.dispatch_workspace.unwrap()(null, 4, 8, 2),
                table.router_partials.unwrap()(null, 4, 8),
                table.router_backward_workspace.unwrap()(null, 4, 8, 64),
                table.norm_partials.unwrap()(null, 4, 64),
                table.attention_backward_workspace.unwrap()(null, 4, 2, 4),
                table.embedding_parts.unwrap()(null, 4, 8),
                table.grouped_swiglu_dot_columns.unwrap()(null.cast(), 4, 2, 8, 16, 0),
                table.grouped_gemm_plan.unwrap()(null.cast(), 0, 4, 2, 8, 16, 132),
            ]
        };
        for (i, status) in statuses.into_iter().enumerate() {
            let reason = (status & 0xff) as u32;
            assert_eq!(reason, bindings::ROUTEGRAD_NULL_POINTER, "function {i}");
        }
    }
}
