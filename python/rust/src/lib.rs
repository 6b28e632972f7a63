//! `routegrad._kernels`: the kernels as functions that take addresses, for the operators in `routegrad/torch/ops/`.
//!
//! Each function makes the typed call of a kernel. Its first argument is the stream: `None` for the simulator, whose tensors
//! are in host memory, or a `cudaStream_t` of the current GPU as an integer. The other arguments are the fields of the call,
//! passed by name: a tensor as `(address, bytes)`, an optional tensor also as `None`. This module checks the lengths; the
//! caller must check dtypes and devices. The interpreter's lock is released while a kernel is launched.

mod arguments;
mod memory;
mod module;

use arguments::{Arguments, add_function};
use memory::{Field, Memory};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use routegrad::device;
use routegrad::error::Error;
use routegrad::kernels as typed;
use routegrad::kernels::bindings::{
    ROUTEGRAD_SCORE_SOFTMAX, ROUTEGRAD_WEIGHTING_COUNT, ROUTEGRAD_WEIGHTING_PLAIN,
    ROUTEGRAD_WEIGHTING_SUM_P,
};
use routegrad::kernels::cross_entropy::{CrossEntropyRows, HeadLogits};
use routegrad::kernels::launchers::{self, TILE_AUTO};
use routegrad::kernels::router::{RouterForward, RouterStatistics};
use routegrad::kernels::router_backward::{RouterBackward, RouterWeightGradient};
use routegrad::kernels::{
    AttentionBackward, AttentionForward, Combine, DefaultDots, DispatchChoices, ExpertMeanUpdate,
    ExpertSums, GateGradient, GroupedDownForward, GroupedGemmForward, GroupedGemmInputGradient,
    GroupedGemmWeightGradient, GroupedSwigluBackward, GroupedSwigluForward, Stream,
};
use routegrad::train::checkpoint::Checkpoint;
use std::cell::Cell;
use std::ffi::CStr;
use std::path::Path;

/// Declares the function of each kernel with the fields of its typed call. Fields after `with` have a fixed value.
macro_rules! kernels {
    ($( $function:ident = $Call:ident { $($field:ident: $type:ty),* } $(with { $($constant:ident: $value:expr),* })?; )*) => {
        fn add_kernels(module: &Bound<'_, PyModule>) -> PyResult<()> {
            $(add_function(module, name!($function), |arguments| {
                arguments.expect(1, &[$(stringify!($field)),*])?;
                $( let $field: $type = arguments.named(stringify!($field))?; )*
                on_stream(arguments, move |stream| {
                    $Call { $($field: $field.field(),)* $($($constant: $value),*)? }.launch(stream)
                })?;
                Ok(None)
            })?;)*
            Ok(())
        }
    };
}

/// A function's name as a C string.
macro_rules! name {
    ($function:ident) => {
        const { CStr::from_bytes_with_nul(concat!(stringify!($function), "\0").as_bytes()) }
            .unwrap_or_default()
    };
}

kernels! {
    router_forward = RouterForward {
        scores: Memory, log_sum_exp: Memory, choices: Option<Memory>, partials: Memory, first_non_finite: Memory, x: Memory,
        w: Memory, selection_bias: Option<Memory>, tokens: usize, experts: usize, hidden: usize, choices_per_token: usize
    } with { score: ROUTEGRAD_SCORE_SOFTMAX };
    router_statistics = RouterStatistics { statistics: Memory, partials: Memory, tokens: usize, experts: usize };
    router_backward = RouterBackward {
        dx: Memory, dz: Memory, dw_partials: Memory, scores: Memory, log_sum_exp: Option<Memory>, dscores: Option<Memory>,
        dlse2: Option<Memory>, x: Memory, w: Memory, tokens: usize, experts: usize, hidden: usize
    } with { dmean: None, score: ROUTEGRAD_SCORE_SOFTMAX, accumulate: false };
    router_weight_gradient = RouterWeightGradient {
        dw: Memory, dw_partials: Memory, tokens: usize, experts: usize, hidden: usize
    } with { accumulate: false };
    dispatch_choices = DispatchChoices {
        offsets: Memory, row_token: Memory, row_slot: Memory, slot_row: Memory, fault: Memory, workspace: Memory,
        choices: Memory, tokens: usize, experts: usize, choices_per_token: usize, row_capacity: usize
    };
    grouped_gemm_forward = GroupedGemmForward {
        out: Memory, x: Memory, w: Memory, offsets: Option<Memory>, rows: usize, x_rows: usize, experts: usize, n: usize,
        k: usize
    } with { row_token: None, tile: TILE_AUTO };
    grouped_gemm_input_gradient = GroupedGemmInputGradient {
        dx: Memory, dout: Memory, w: Memory, offsets: Option<Memory>, rows: usize, dout_rows: usize, experts: usize, n: usize,
        k: usize
    } with { row_token: None, tile: TILE_AUTO };
    grouped_gemm_weight_gradient = GroupedGemmWeightGradient {
        dw: Memory, dout: Memory, x: Memory, offsets: Option<Memory>, rows: usize, dout_rows: usize, x_rows: usize,
        experts: usize, n: usize, k: usize, accumulate: bool
    } with { dout_row_token: None, x_row_token: None, tile: TILE_AUTO };
    grouped_swiglu_forward = GroupedSwigluForward {
        h: Memory, a: Memory, x: Memory, w: Memory, offsets: Option<Memory>, rows: usize, x_rows: usize, experts: usize,
        ffn: usize, hidden: usize
    } with { row_token: None, tile: TILE_AUTO };
    grouped_down_forward = GroupedDownForward {
        out: Memory, column_sums: Option<Memory>, a: Memory, w: Memory, gates: Option<Memory>, offsets: Option<Memory>,
        row_token: Option<Memory>, rows: usize, tokens: usize, experts: usize, hidden: usize, ffn: usize
    } with { tile: TILE_AUTO };
    grouped_swiglu_backward = GroupedSwigluBackward {
        dh: Memory, scaled_a: Memory, dots: Memory, dout: Memory, w: Memory, h: Memory, gates: Memory, offsets: Option<Memory>,
        row_token: Option<Memory>, rows: usize, dout_rows: usize, experts: usize, hidden: usize, ffn: usize,
        dot_columns: usize
    } with { dout_row_token: None, tile: TILE_AUTO };
    expert_sums = ExpertSums {
        sums: Memory, masses: Memory, column_sums: Memory, gates: Option<Memory>, offsets: Memory, row_token: Memory,
        rows: usize, tokens: usize, experts: usize, hidden: usize
    };
    expert_mean_update = ExpertMeanUpdate {
        average: Memory, sums: Memory, masses: Memory, beta: Memory, experts: usize, hidden: usize, weighting: i32
    };
    combine = Combine {
        y: Memory, rows_in: Memory, gates: Option<Memory>, slot_row: Memory, choices: Option<Memory>,
        vectors: Option<Memory>, tokens: usize, rows: usize, experts: usize, hidden: usize, slots: usize
    } with { accumulate: false };
    default_dots = DefaultDots {
        dgates: Memory, g_rows: Option<Memory>, g: Memory, vectors: Memory, slot_row: Option<Memory>, tokens: usize,
        rows: usize, experts: usize, hidden: usize, slots: usize
    };
    gate_gradient = GateGradient {
        dgates: Memory, dots: Memory, slot_row: Memory, choices: Option<Memory>, tokens: usize, rows: usize, experts: usize,
        slots: usize, dot_columns: usize, keep: bool
    };
    attention_forward = AttentionForward {
        out: Memory, log_sum_exp: Memory, qkv: Memory, first_key: Option<Memory>, tokens: usize, sequence: usize,
        heads: usize, key_value_heads: usize, head_width: usize
    };
    attention_backward = AttentionBackward {
        dqkv: Memory, workspace: Memory, dout: Memory, qkv: Memory, out: Memory, log_sum_exp: Memory,
        first_key: Option<Memory>, tokens: usize, sequence: usize, heads: usize, key_value_heads: usize, head_width: usize
    } with { cosines: None, sines: None };
    head_logits = HeadLogits {
        logits: Memory, statistics: Memory, x: Memory, w: Memory, tokens: usize, vocabulary: usize, hidden: usize
    } with { tile: TILE_AUTO };
    cross_entropy_rows = CrossEntropyRows {
        losses: Memory, dlogits: Option<Memory>, logits: Memory, statistics: Option<Memory>, targets: Memory, tokens: usize,
        vocabulary: usize, factor: f32
    };
}

/// Declares functions for sizes that the launchers compute on the host.
macro_rules! sizes {
    ($( $function:ident = $host:path { $($size:ident),* } $(with $last:expr)?; )*) => {
        fn add_sizes(module: &Bound<'_, PyModule>) -> PyResult<()> {
            $(
                add_function(module, name!($function), |arguments| {
                    arguments.expect(1, &[$(stringify!($size)),*])?;
                    $( let $size: usize = arguments.named(stringify!($size))?; )*
                    on_stream(arguments, move |stream| $host(stream.launchers(), $($size,)* $($last)?)).map(Some)
                })?;
            )*
            Ok(())
        }
    };
}

sizes! {
    // Number of floats in `partials` of `router_forward`.
    router_partials = typed::router::partials { tokens, experts };
    // Number of floats in `dw_partials` of `router_backward`.
    router_backward_workspace = typed::router_backward::workspace { tokens, experts, hidden };
    // Size of `workspace` of `dispatch_choices` in bytes.
    dispatch_workspace = typed::dispatch::workspace { tokens, experts, choices_per_token };
    // Number of partial dot products per row of `grouped_swiglu_backward`.
    dot_columns = typed::grouped_swiglu::dot_columns { rows, experts, hidden, ffn } with TILE_AUTO;
    // Number of floats in `workspace` of `attention_backward`.
    attention_backward_workspace = typed::attention_backward::workspace { tokens, sequence, heads };
}

/// Raises RuntimeError unless the kernels support a GPU with this name and compute capability.
fn require_gpu(arguments: &Arguments<'_, '_>) -> PyResult<Option<usize>> {
    arguments.expect(3, &[])?;
    gpu_launchers()?;
    let capability = (arguments.at(1)?, arguments.at(2)?);
    device::require_capability(&arguments.at::<String>(0)?, capability, device::built_for())
        .map_err(PyRuntimeError::new_err)?;
    Ok(None)
}

/// Raises RuntimeError unless a driver can load the kernels: the CUDA version that it supports, 1000 · major + 10 · minor.
fn require_driver(arguments: &Arguments<'_, '_>) -> PyResult<Option<usize>> {
    arguments.expect(1, &[])?;
    gpu_launchers()?;
    let got = device::cuda_version(arguments.at(0)?);
    device::require_driver(got, device::driver_of_kernels()).map_err(PyRuntimeError::new_err)?;
    Ok(None)
}

fn gpu_launchers() -> PyResult<&'static launchers::Launchers> {
    launchers::cuda().ok_or_else(|| {
        PyRuntimeError::new_err(
            "expected a build with kernels for GPUs, got one without: no nvcc was found; run scripts/install-toolkit in the \
             repository and `pip install ./python` again, or move the tensors to the CPU",
        )
    })
}

/// Raises ValueError unless a file of a checkpoint is the one that was saved: the checkpoint's folder, and the file's name.
fn verify_file(arguments: &Arguments<'_, '_>) -> PyResult<Option<usize>> {
    arguments.expect(2, &[])?;
    let (folder, name): (String, String) = (arguments.at(0)?, arguments.at(1)?);
    let run = move || Checkpoint::open(Path::new(&folder))?.verify_file(&name);
    arguments.python().detach(run).map_err(exception)?;
    Ok(None)
}

/// Runs `call` on the stream in the first argument, with the interpreter's lock released.
fn on_stream<T: Send>(
    arguments: &Arguments<'_, '_>,
    call: impl FnOnce(&Stream) -> routegrad::Result<T> + Send,
) -> PyResult<T> {
    let stream: Option<usize> = arguments.at(0)?;
    let run = move || call(&open(stream)?).map_err(exception);
    arguments.python().detach(run)
}

fn open(stream: Option<usize>) -> PyResult<Stream> {
    match stream {
        Some(raw) => {
            let launchers = gpu_launchers()?;
            // SAFETY: the caller passes a PyTorch stream of the current GPU.
            Ok(unsafe { Stream::from_raw(launchers, raw as *mut _) })
        }
        None => {
            thread_local!(static PREPARED: Cell<bool> = const { Cell::new(false) });
            if !PREPARED.get() {
                device::Device::Sim.prepare().map_err(exception)?;
                PREPARED.set(true);
            }
            Stream::of(device::Device::Sim).map_err(exception)
        }
    }
}

fn exception(error: Error) -> PyErr {
    match error {
        Error::Invalid { .. } | Error::File { .. } => PyValueError::new_err(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}

fn fill(module: &Bound<'_, PyModule>) -> PyResult<()> {
    add_kernels(module)?;
    add_sizes(module)?;
    add_function(module, c"require_gpu", require_gpu)?;
    add_function(module, c"require_driver", require_driver)?;
    add_function(module, c"verify_file", verify_file)?;
    module.add("HAS_GPU_KERNELS", launchers::cuda().is_some())?;
    for (name, weighting) in [
        ("WEIGHTING_PLAIN", ROUTEGRAD_WEIGHTING_PLAIN),
        ("WEIGHTING_SUM_P", ROUTEGRAD_WEIGHTING_SUM_P),
        ("WEIGHTING_COUNT", ROUTEGRAD_WEIGHTING_COUNT),
    ] {
        module.add(name, weighting)?;
    }
    Ok(())
}

/// Creates the module; called by `import routegrad._kernels`.
///
/// # Safety
/// Must be called only by the interpreter, which holds its lock.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PyInit__kernels() -> *mut pyo3::ffi::PyObject {
    // SAFETY: the interpreter calls this function once, with its lock held.
    unsafe { module::initialize(c"_kernels", fill) }
}
