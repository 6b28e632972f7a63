// Made by bindgen from kernels/routegrad.h; scripts/update-bindings writes it anew.

pub type routegrad_status = i32;
pub const ROUTEGRAD_OK: routegrad_reason = 0;
pub const ROUTEGRAD_NULL_POINTER: routegrad_reason = 1;
pub const ROUTEGRAD_MISALIGNED: routegrad_reason = 2;
pub const ROUTEGRAD_NOT_MULTIPLE: routegrad_reason = 3;
pub const ROUTEGRAD_OUT_OF_RANGE: routegrad_reason = 4;
pub const ROUTEGRAD_OVERFLOW: routegrad_reason = 5;
pub const ROUTEGRAD_CUDA_ERROR: routegrad_reason = 16;
pub const ROUTEGRAD_BAD_TENSOR_MAP: routegrad_reason = 17;
pub const ROUTEGRAD_SIM_FAILED: routegrad_reason = 18;
pub type routegrad_reason = ::std::os::raw::c_uint;
pub type routegrad_stream = *mut ::std::os::raw::c_void;
pub const ROUTEGRAD_SIM_EARLY: routegrad_sim_async = 0;
pub const ROUTEGRAD_SIM_LATE: routegrad_sim_async = 1;
pub const ROUTEGRAD_SIM_RANDOM: routegrad_sim_async = 2;
pub type routegrad_sim_async = ::std::os::raw::c_uint;
pub const ROUTEGRAD_SIM_FIFO: routegrad_sim_order = 0;
pub const ROUTEGRAD_SIM_LIFO: routegrad_sim_order = 1;
pub const ROUTEGRAD_SIM_SHUFFLED: routegrad_sim_order = 2;
pub type routegrad_sim_order = ::std::os::raw::c_uint;
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct routegrad_sim_options {
    pub copies: i32,
    pub products: i32,
    pub order: i32,
    pub threads: i32,
    pub resident: i32,
    pub poison: i32,
    pub multiprocessors: i32,
    pub arch: i32,
    pub seed: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of routegrad_sim_options",
    ][::std::mem::size_of::<routegrad_sim_options>() - 40usize];
    [
        "Alignment of routegrad_sim_options",
    ][::std::mem::align_of::<routegrad_sim_options>() - 8usize];
    [
        "Offset of field: routegrad_sim_options::copies",
    ][::std::mem::offset_of!(routegrad_sim_options, copies) - 0usize];
    [
        "Offset of field: routegrad_sim_options::products",
    ][::std::mem::offset_of!(routegrad_sim_options, products) - 4usize];
    [
        "Offset of field: routegrad_sim_options::order",
    ][::std::mem::offset_of!(routegrad_sim_options, order) - 8usize];
    [
        "Offset of field: routegrad_sim_options::threads",
    ][::std::mem::offset_of!(routegrad_sim_options, threads) - 12usize];
    [
        "Offset of field: routegrad_sim_options::resident",
    ][::std::mem::offset_of!(routegrad_sim_options, resident) - 16usize];
    [
        "Offset of field: routegrad_sim_options::poison",
    ][::std::mem::offset_of!(routegrad_sim_options, poison) - 20usize];
    [
        "Offset of field: routegrad_sim_options::multiprocessors",
    ][::std::mem::offset_of!(routegrad_sim_options, multiprocessors) - 24usize];
    [
        "Offset of field: routegrad_sim_options::arch",
    ][::std::mem::offset_of!(routegrad_sim_options, arch) - 28usize];
    [
        "Offset of field: routegrad_sim_options::seed",
    ][::std::mem::offset_of!(routegrad_sim_options, seed) - 32usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct routegrad_sim_counters {
    pub launches: u64,
    pub blocks: u64,
    pub fiber_switches: u64,
    pub tensor_flops: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub bank_conflicts: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of routegrad_sim_counters",
    ][::std::mem::size_of::<routegrad_sim_counters>() - 56usize];
    [
        "Alignment of routegrad_sim_counters",
    ][::std::mem::align_of::<routegrad_sim_counters>() - 8usize];
    [
        "Offset of field: routegrad_sim_counters::launches",
    ][::std::mem::offset_of!(routegrad_sim_counters, launches) - 0usize];
    [
        "Offset of field: routegrad_sim_counters::blocks",
    ][::std::mem::offset_of!(routegrad_sim_counters, blocks) - 8usize];
    [
        "Offset of field: routegrad_sim_counters::fiber_switches",
    ][::std::mem::offset_of!(routegrad_sim_counters, fiber_switches) - 16usize];
    [
        "Offset of field: routegrad_sim_counters::tensor_flops",
    ][::std::mem::offset_of!(routegrad_sim_counters, tensor_flops) - 24usize];
    [
        "Offset of field: routegrad_sim_counters::bytes_read",
    ][::std::mem::offset_of!(routegrad_sim_counters, bytes_read) - 32usize];
    [
        "Offset of field: routegrad_sim_counters::bytes_written",
    ][::std::mem::offset_of!(routegrad_sim_counters, bytes_written) - 40usize];
    [
        "Offset of field: routegrad_sim_counters::bank_conflicts",
    ][::std::mem::offset_of!(routegrad_sim_counters, bank_conflicts) - 48usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct routegrad_unit_box {
    pub rank: i32,
    pub extent: [i32; 3usize],
    pub box_: [i32; 3usize],
    pub at: [i32; 3usize],
    pub swizzle: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of routegrad_unit_box",
    ][::std::mem::size_of::<routegrad_unit_box>() - 44usize];
    [
        "Alignment of routegrad_unit_box",
    ][::std::mem::align_of::<routegrad_unit_box>() - 4usize];
    [
        "Offset of field: routegrad_unit_box::rank",
    ][::std::mem::offset_of!(routegrad_unit_box, rank) - 0usize];
    [
        "Offset of field: routegrad_unit_box::extent",
    ][::std::mem::offset_of!(routegrad_unit_box, extent) - 4usize];
    [
        "Offset of field: routegrad_unit_box::box_",
    ][::std::mem::offset_of!(routegrad_unit_box, box_) - 16usize];
    [
        "Offset of field: routegrad_unit_box::at",
    ][::std::mem::offset_of!(routegrad_unit_box, at) - 28usize];
    [
        "Offset of field: routegrad_unit_box::swizzle",
    ][::std::mem::offset_of!(routegrad_unit_box, swizzle) - 40usize];
};
pub const ROUTEGRAD_SCORE_LOGITS: routegrad_score = 0;
pub const ROUTEGRAD_SCORE_SOFTMAX: routegrad_score = 1;
pub const ROUTEGRAD_SCORE_SIGMOID: routegrad_score = 2;
pub const ROUTEGRAD_SCORE_RELU: routegrad_score = 3;
pub type routegrad_score = ::std::os::raw::c_uint;
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct routegrad_draws {
    pub seed: u64,
    pub step: u64,
    pub first_token: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of routegrad_draws"][::std::mem::size_of::<routegrad_draws>() - 24usize];
    ["Alignment of routegrad_draws"][::std::mem::align_of::<routegrad_draws>() - 8usize];
    [
        "Offset of field: routegrad_draws::seed",
    ][::std::mem::offset_of!(routegrad_draws, seed) - 0usize];
    [
        "Offset of field: routegrad_draws::step",
    ][::std::mem::offset_of!(routegrad_draws, step) - 8usize];
    [
        "Offset of field: routegrad_draws::first_token",
    ][::std::mem::offset_of!(routegrad_draws, first_token) - 16usize];
};
pub const ROUTEGRAD_FAULT_EXPERT: routegrad_fault = 1;
pub const ROUTEGRAD_FAULT_CAPACITY: routegrad_fault = 2;
pub type routegrad_fault = ::std::os::raw::c_uint;
pub const ROUTEGRAD_GEMM_FORWARD: routegrad_gemm_product = 0;
pub const ROUTEGRAD_GEMM_INPUT_GRADIENT: routegrad_gemm_product = 1;
pub const ROUTEGRAD_GEMM_WEIGHT_GRADIENT: routegrad_gemm_product = 2;
pub const ROUTEGRAD_GEMM_SWIGLU_FORWARD: routegrad_gemm_product = 3;
pub const ROUTEGRAD_GEMM_DOWN_FORWARD: routegrad_gemm_product = 4;
pub const ROUTEGRAD_GEMM_SWIGLU_BACKWARD: routegrad_gemm_product = 5;
pub const ROUTEGRAD_GEMM_HEAD_FORWARD: routegrad_gemm_product = 6;
pub type routegrad_gemm_product = ::std::os::raw::c_uint;
pub const ROUTEGRAD_TILE_AUTO: routegrad_gemm_tile = 0;
pub const ROUTEGRAD_TILE_COOPERATIVE_128X256: routegrad_gemm_tile = 1;
pub const ROUTEGRAD_TILE_COOPERATIVE_256X128: routegrad_gemm_tile = 2;
pub const ROUTEGRAD_TILE_COOPERATIVE_256X176: routegrad_gemm_tile = 3;
pub const ROUTEGRAD_TILE_PINGPONG_128X128: routegrad_gemm_tile = 4;
pub const ROUTEGRAD_TILE_PINGPONG_128X176: routegrad_gemm_tile = 5;
pub const ROUTEGRAD_TILE_MMA_128X128: routegrad_gemm_tile = 6;
pub const ROUTEGRAD_TILE_MMA_256X128: routegrad_gemm_tile = 7;
pub type routegrad_gemm_tile = ::std::os::raw::c_uint;
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct routegrad_gemm_plan {
    pub tile: i32,
    pub tile_rows: i32,
    pub tile_columns: i32,
    pub stages: i32,
    pub blocks: i32,
    pub reserved: i32,
    pub clocks: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of routegrad_gemm_plan",
    ][::std::mem::size_of::<routegrad_gemm_plan>() - 32usize];
    [
        "Alignment of routegrad_gemm_plan",
    ][::std::mem::align_of::<routegrad_gemm_plan>() - 8usize];
    [
        "Offset of field: routegrad_gemm_plan::tile",
    ][::std::mem::offset_of!(routegrad_gemm_plan, tile) - 0usize];
    [
        "Offset of field: routegrad_gemm_plan::tile_rows",
    ][::std::mem::offset_of!(routegrad_gemm_plan, tile_rows) - 4usize];
    [
        "Offset of field: routegrad_gemm_plan::tile_columns",
    ][::std::mem::offset_of!(routegrad_gemm_plan, tile_columns) - 8usize];
    [
        "Offset of field: routegrad_gemm_plan::stages",
    ][::std::mem::offset_of!(routegrad_gemm_plan, stages) - 12usize];
    [
        "Offset of field: routegrad_gemm_plan::blocks",
    ][::std::mem::offset_of!(routegrad_gemm_plan, blocks) - 16usize];
    [
        "Offset of field: routegrad_gemm_plan::reserved",
    ][::std::mem::offset_of!(routegrad_gemm_plan, reserved) - 20usize];
    [
        "Offset of field: routegrad_gemm_plan::clocks",
    ][::std::mem::offset_of!(routegrad_gemm_plan, clocks) - 24usize];
};
pub const ROUTEGRAD_WEIGHTING_PLAIN: routegrad_weighting = 0;
pub const ROUTEGRAD_WEIGHTING_SUM_P: routegrad_weighting = 1;
pub const ROUTEGRAD_WEIGHTING_COUNT: routegrad_weighting = 2;
pub type routegrad_weighting = ::std::os::raw::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct routegrad_parameter {
    pub whole: *mut f32,
    pub upper: *mut u16,
    pub lower: *mut i16,
    pub first: *mut ::std::os::raw::c_void,
    pub second: *mut ::std::os::raw::c_void,
    pub gradient: *const f32,
    pub elements: i64,
    pub first_block: i64,
    pub decays: i32,
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of routegrad_parameter",
    ][::std::mem::size_of::<routegrad_parameter>() - 72usize];
    [
        "Alignment of routegrad_parameter",
    ][::std::mem::align_of::<routegrad_parameter>() - 8usize];
    [
        "Offset of field: routegrad_parameter::whole",
    ][::std::mem::offset_of!(routegrad_parameter, whole) - 0usize];
    [
        "Offset of field: routegrad_parameter::upper",
    ][::std::mem::offset_of!(routegrad_parameter, upper) - 8usize];
    [
        "Offset of field: routegrad_parameter::lower",
    ][::std::mem::offset_of!(routegrad_parameter, lower) - 16usize];
    [
        "Offset of field: routegrad_parameter::first",
    ][::std::mem::offset_of!(routegrad_parameter, first) - 24usize];
    [
        "Offset of field: routegrad_parameter::second",
    ][::std::mem::offset_of!(routegrad_parameter, second) - 32usize];
    [
        "Offset of field: routegrad_parameter::gradient",
    ][::std::mem::offset_of!(routegrad_parameter, gradient) - 40usize];
    [
        "Offset of field: routegrad_parameter::elements",
    ][::std::mem::offset_of!(routegrad_parameter, elements) - 48usize];
    [
        "Offset of field: routegrad_parameter::first_block",
    ][::std::mem::offset_of!(routegrad_parameter, first_block) - 56usize];
    [
        "Offset of field: routegrad_parameter::decays",
    ][::std::mem::offset_of!(routegrad_parameter, decays) - 64usize];
    [
        "Offset of field: routegrad_parameter::reserved",
    ][::std::mem::offset_of!(routegrad_parameter, reserved) - 68usize];
};
impl Default for routegrad_parameter {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct routegrad_step_settings {
    pub rate: f64,
    pub clip: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of routegrad_step_settings",
    ][::std::mem::size_of::<routegrad_step_settings>() - 48usize];
    [
        "Alignment of routegrad_step_settings",
    ][::std::mem::align_of::<routegrad_step_settings>() - 8usize];
    [
        "Offset of field: routegrad_step_settings::rate",
    ][::std::mem::offset_of!(routegrad_step_settings, rate) - 0usize];
    [
        "Offset of field: routegrad_step_settings::clip",
    ][::std::mem::offset_of!(routegrad_step_settings, clip) - 8usize];
    [
        "Offset of field: routegrad_step_settings::beta1",
    ][::std::mem::offset_of!(routegrad_step_settings, beta1) - 16usize];
    [
        "Offset of field: routegrad_step_settings::beta2",
    ][::std::mem::offset_of!(routegrad_step_settings, beta2) - 24usize];
    [
        "Offset of field: routegrad_step_settings::eps",
    ][::std::mem::offset_of!(routegrad_step_settings, eps) - 32usize];
    [
        "Offset of field: routegrad_step_settings::weight_decay",
    ][::std::mem::offset_of!(routegrad_step_settings, weight_decay) - 40usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct routegrad_step_outcome {
    pub updates: u64,
    pub norm: f64,
    pub losses: [f64; 3usize],
    pub accepted: i32,
    pub layer: i32,
    pub token: i32,
    pub fault: i32,
    pub coefficients: [[f32; 7usize]; 2usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of routegrad_step_outcome",
    ][::std::mem::size_of::<routegrad_step_outcome>() - 112usize];
    [
        "Alignment of routegrad_step_outcome",
    ][::std::mem::align_of::<routegrad_step_outcome>() - 8usize];
    [
        "Offset of field: routegrad_step_outcome::updates",
    ][::std::mem::offset_of!(routegrad_step_outcome, updates) - 0usize];
    [
        "Offset of field: routegrad_step_outcome::norm",
    ][::std::mem::offset_of!(routegrad_step_outcome, norm) - 8usize];
    [
        "Offset of field: routegrad_step_outcome::losses",
    ][::std::mem::offset_of!(routegrad_step_outcome, losses) - 16usize];
    [
        "Offset of field: routegrad_step_outcome::accepted",
    ][::std::mem::offset_of!(routegrad_step_outcome, accepted) - 40usize];
    [
        "Offset of field: routegrad_step_outcome::layer",
    ][::std::mem::offset_of!(routegrad_step_outcome, layer) - 44usize];
    [
        "Offset of field: routegrad_step_outcome::token",
    ][::std::mem::offset_of!(routegrad_step_outcome, token) - 48usize];
    [
        "Offset of field: routegrad_step_outcome::fault",
    ][::std::mem::offset_of!(routegrad_step_outcome, fault) - 52usize];
    [
        "Offset of field: routegrad_step_outcome::coefficients",
    ][::std::mem::offset_of!(routegrad_step_outcome, coefficients) - 56usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct routegrad_state {
    pub committed: *mut u32,
    pub pending: *mut u32,
    pub words: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of routegrad_state"][::std::mem::size_of::<routegrad_state>() - 24usize];
    ["Alignment of routegrad_state"][::std::mem::align_of::<routegrad_state>() - 8usize];
    [
        "Offset of field: routegrad_state::committed",
    ][::std::mem::offset_of!(routegrad_state, committed) - 0usize];
    [
        "Offset of field: routegrad_state::pending",
    ][::std::mem::offset_of!(routegrad_state, pending) - 8usize];
    [
        "Offset of field: routegrad_state::words",
    ][::std::mem::offset_of!(routegrad_state, words) - 16usize];
};
impl Default for routegrad_state {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Copy, Clone)]
pub struct routegrad_launchers {
    pub build: *const ::std::os::raw::c_char,
    pub describe: ::std::option::Option<
        unsafe extern "C" fn(
            launcher: *const ::std::os::raw::c_char,
            status: routegrad_status,
            text: *mut ::std::os::raw::c_char,
            capacity: u64,
        ),
    >,
    pub sim_get_options: ::std::option::Option<
        unsafe extern "C" fn(options: *mut routegrad_sim_options),
    >,
    pub sim_set_options: ::std::option::Option<
        unsafe extern "C" fn(options: *const routegrad_sim_options) -> routegrad_status,
    >,
    pub sim_take_counters: ::std::option::Option<
        unsafe extern "C" fn(counters: *mut routegrad_sim_counters),
    >,
    pub unit_wgmma: ::std::option::Option<
        unsafe extern "C" fn(
            c: *mut f32,
            a: *const ::std::os::raw::c_void,
            b: *const ::std::os::raw::c_void,
            n: i32,
            a_mn_major: i32,
            b_mn_major: i32,
            a_in_registers: i32,
            swizzle: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub unit_tma_load: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            tensor: *const ::std::os::raw::c_void,
            box_: *const routegrad_unit_box,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub unit_tma_store: ::std::option::Option<
        unsafe extern "C" fn(
            tensor: *mut ::std::os::raw::c_void,
            in_: *const ::std::os::raw::c_void,
            box_: *const routegrad_unit_box,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub unit_multicast: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            tensor: *const ::std::os::raw::c_void,
            rounds: i32,
            clusters: i32,
            mask0: i32,
            mask1: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub unit_gather: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            in_: *const ::std::os::raw::c_void,
            index: *const i32,
            columns: i32,
            transpose: i32,
            by_mbarrier: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub unit_softmax: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut f32,
            warps_seen: *mut i32,
            in_: *const f32,
            rows: i32,
            columns: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub unit_fault: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut i32,
            fault: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub router_forward: ::std::option::Option<
        unsafe extern "C" fn(
            scores: *mut f32,
            log_sum_exp: *mut f32,
            choices: *mut i32,
            partials: *mut f32,
            first_non_finite: *mut i32,
            x: *const ::std::os::raw::c_void,
            w: *const f32,
            selection_bias: *const f32,
            tokens: i64,
            experts: i32,
            hidden: i32,
            choices_per_token: i32,
            score: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub router_partials: ::std::option::Option<
        unsafe extern "C" fn(
            floats: *mut u64,
            tokens: i64,
            experts: i32,
        ) -> routegrad_status,
    >,
    pub router_statistics: ::std::option::Option<
        unsafe extern "C" fn(
            statistics: *mut f32,
            partials: *const f32,
            tokens: i64,
            experts: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub router_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dx: *mut ::std::os::raw::c_void,
            dz: *mut f32,
            dw_partials: *mut f32,
            scores: *const f32,
            log_sum_exp: *const f32,
            dscores: *const f32,
            dmean: *const f32,
            dlse2: *const f32,
            x: *const ::std::os::raw::c_void,
            w: *const f32,
            tokens: i64,
            experts: i32,
            hidden: i32,
            score: i32,
            accumulate: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub router_weight_gradient: ::std::option::Option<
        unsafe extern "C" fn(
            dw: *mut f32,
            dw_partials: *const f32,
            tokens: i64,
            experts: i32,
            hidden: i32,
            accumulate: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub router_sample: ::std::option::Option<
        unsafe extern "C" fn(
            experts_chosen: *mut i32,
            factors: *mut f32,
            kept: *mut i32,
            choices: *mut i32,
            logits: *const f32,
            draws: *const routegrad_draws,
            tokens: i64,
            experts: i32,
            stages: i32,
            layer: i32,
            epsilon: f64,
            threshold: f64,
            untrusted: f32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub router_backward_workspace: ::std::option::Option<
        unsafe extern "C" fn(
            floats: *mut u64,
            tokens: i64,
            experts: i32,
            hidden: i32,
        ) -> routegrad_status,
    >,
    pub dispatch_choices: ::std::option::Option<
        unsafe extern "C" fn(
            offsets: *mut i32,
            row_token: *mut i32,
            row_slot: *mut i32,
            slot_row: *mut i32,
            fault: *mut i32,
            workspace: *mut ::std::os::raw::c_void,
            choices: *const i32,
            tokens: i64,
            experts: i32,
            choices_per_token: i32,
            row_capacity: i64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub dispatch_positive: ::std::option::Option<
        unsafe extern "C" fn(
            offsets: *mut i32,
            row_token: *mut i32,
            row_slot: *mut i32,
            slot_row: *mut i32,
            fault: *mut i32,
            workspace: *mut ::std::os::raw::c_void,
            scores: *const f32,
            tokens: i64,
            experts: i32,
            row_capacity: i64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub dispatch_workspace: ::std::option::Option<
        unsafe extern "C" fn(
            bytes: *mut u64,
            tokens: i64,
            experts: i32,
            width: i32,
        ) -> routegrad_status,
    >,
    pub grouped_gemm_forward: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            x: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            offsets: *const i32,
            row_token: *const i32,
            rows: i64,
            x_rows: i64,
            experts: i32,
            n: i32,
            k: i32,
            tile: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub grouped_gemm_input_gradient: ::std::option::Option<
        unsafe extern "C" fn(
            dx: *mut ::std::os::raw::c_void,
            dout: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            offsets: *const i32,
            row_token: *const i32,
            rows: i64,
            dout_rows: i64,
            experts: i32,
            n: i32,
            k: i32,
            tile: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub grouped_gemm_weight_gradient: ::std::option::Option<
        unsafe extern "C" fn(
            dw: *mut f32,
            dout: *const ::std::os::raw::c_void,
            x: *const ::std::os::raw::c_void,
            offsets: *const i32,
            dout_row_token: *const i32,
            x_row_token: *const i32,
            rows: i64,
            dout_rows: i64,
            x_rows: i64,
            experts: i32,
            n: i32,
            k: i32,
            accumulate: i32,
            tile: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub sum_parts: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut f32,
            parts: *const f32,
            count: i32,
            elements: i64,
            accumulate: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub grouped_gemm_plan: ::std::option::Option<
        unsafe extern "C" fn(
            plan: *mut routegrad_gemm_plan,
            product: i32,
            rows: i64,
            experts: i32,
            n: i32,
            k: i32,
            multiprocessors: i32,
        ) -> routegrad_status,
    >,
    pub grouped_swiglu_forward: ::std::option::Option<
        unsafe extern "C" fn(
            h: *mut ::std::os::raw::c_void,
            a: *mut ::std::os::raw::c_void,
            x: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            offsets: *const i32,
            row_token: *const i32,
            rows: i64,
            x_rows: i64,
            experts: i32,
            ffn: i32,
            hidden: i32,
            tile: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub grouped_down_forward: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            column_sums: *mut f32,
            a: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            gates: *const f32,
            offsets: *const i32,
            row_token: *const i32,
            rows: i64,
            tokens: i64,
            experts: i32,
            hidden: i32,
            ffn: i32,
            tile: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub grouped_swiglu_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dh: *mut ::std::os::raw::c_void,
            scaled_a: *mut ::std::os::raw::c_void,
            dots: *mut f32,
            dout: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            h: *const ::std::os::raw::c_void,
            gates: *const f32,
            offsets: *const i32,
            row_token: *const i32,
            dout_row_token: *const i32,
            rows: i64,
            dout_rows: i64,
            experts: i32,
            hidden: i32,
            ffn: i32,
            dot_columns: i32,
            tile: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub grouped_swiglu_dot_columns: ::std::option::Option<
        unsafe extern "C" fn(
            columns: *mut i32,
            rows: i64,
            experts: i32,
            hidden: i32,
            ffn: i32,
            tile: i32,
        ) -> routegrad_status,
    >,
    pub expert_sums: ::std::option::Option<
        unsafe extern "C" fn(
            sums: *mut f32,
            masses: *mut f32,
            column_sums: *const f32,
            gates: *const f32,
            offsets: *const i32,
            row_token: *const i32,
            rows: i64,
            tokens: i64,
            experts: i32,
            hidden: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub expert_mean_update: ::std::option::Option<
        unsafe extern "C" fn(
            average: *mut f32,
            sums: *const f32,
            masses: *const f32,
            beta: *const f32,
            experts: i32,
            hidden: i32,
            weighting: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub expert_mean: ::std::option::Option<
        unsafe extern "C" fn(
            average: *mut f32,
            column_sums: *const f32,
            gates: *const f32,
            offsets: *const i32,
            row_token: *const i32,
            beta: *const f32,
            rows: i64,
            tokens: i64,
            experts: i32,
            hidden: i32,
            weighting: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub combine: ::std::option::Option<
        unsafe extern "C" fn(
            y: *mut ::std::os::raw::c_void,
            rows_in: *const ::std::os::raw::c_void,
            gates: *const f32,
            slot_row: *const i32,
            choices: *const i32,
            vectors: *const f32,
            tokens: i64,
            rows: i64,
            experts: i32,
            hidden: i32,
            slots: i32,
            accumulate: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub default_dots: ::std::option::Option<
        unsafe extern "C" fn(
            dgates: *mut f32,
            g_rows: *mut ::std::os::raw::c_void,
            g: *const ::std::os::raw::c_void,
            vectors: *const f32,
            slot_row: *const i32,
            tokens: i64,
            rows: i64,
            experts: i32,
            hidden: i32,
            slots: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub gate_gradient: ::std::option::Option<
        unsafe extern "C" fn(
            dgates: *mut f32,
            dots: *const f32,
            slot_row: *const i32,
            choices: *const i32,
            tokens: i64,
            rows: i64,
            experts: i32,
            slots: i32,
            dot_columns: i32,
            keep: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub norm_forward: ::std::option::Option<
        unsafe extern "C" fn(
            y: *mut ::std::os::raw::c_void,
            sum: *mut ::std::os::raw::c_void,
            x: *const ::std::os::raw::c_void,
            residual: *const ::std::os::raw::c_void,
            weight: *const ::std::os::raw::c_void,
            bias: *const ::std::os::raw::c_void,
            rows: i64,
            hidden: i32,
            eps: f32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub norm_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dx: *mut ::std::os::raw::c_void,
            partials: *mut f32,
            dy: *const ::std::os::raw::c_void,
            skip: *const ::std::os::raw::c_void,
            x: *const ::std::os::raw::c_void,
            weight: *const ::std::os::raw::c_void,
            rows: i64,
            hidden: i32,
            layernorm: i32,
            eps: f32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub norm_weight_gradient: ::std::option::Option<
        unsafe extern "C" fn(
            gradient: *mut f32,
            partials: *const f32,
            rows: i64,
            hidden: i32,
            accumulate: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub norm_partials: ::std::option::Option<
        unsafe extern "C" fn(
            floats: *mut u64,
            rows: i64,
            hidden: i32,
        ) -> routegrad_status,
    >,
    pub attention_forward: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            log_sum_exp: *mut f32,
            qkv: *const ::std::os::raw::c_void,
            first_key: *const i32,
            tokens: i64,
            sequence: i32,
            heads: i32,
            key_value_heads: i32,
            head_width: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub attention_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dqkv: *mut ::std::os::raw::c_void,
            workspace: *mut f32,
            dout: *const ::std::os::raw::c_void,
            qkv: *const ::std::os::raw::c_void,
            out: *const ::std::os::raw::c_void,
            log_sum_exp: *const f32,
            first_key: *const i32,
            cosines: *const f32,
            sines: *const f32,
            tokens: i64,
            sequence: i32,
            heads: i32,
            key_value_heads: i32,
            head_width: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub attention_backward_workspace: ::std::option::Option<
        unsafe extern "C" fn(
            floats: *mut u64,
            tokens: i64,
            sequence: i32,
            heads: i32,
        ) -> routegrad_status,
    >,
    pub head_logits: ::std::option::Option<
        unsafe extern "C" fn(
            logits: *mut f32,
            statistics: *mut f32,
            x: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            tokens: i64,
            vocabulary: i32,
            hidden: i32,
            tile: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub cross_entropy_rows: ::std::option::Option<
        unsafe extern "C" fn(
            losses: *mut f32,
            dlogits: *mut ::std::os::raw::c_void,
            logits: *const f32,
            statistics: *const f32,
            targets: *const i32,
            tokens: i64,
            vocabulary: i32,
            factor: f32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub cross_entropy_mean: ::std::option::Option<
        unsafe extern "C" fn(
            loss: *mut f32,
            losses: *const f32,
            tokens: i64,
            factor: f32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub gradient_scale: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            in_: *const ::std::os::raw::c_void,
            factor: *const f32,
            elements: i64,
            bf16_elements: i32,
            accumulate: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub swiglu_forward: ::std::option::Option<
        unsafe extern "C" fn(
            a: *mut ::std::os::raw::c_void,
            h: *const ::std::os::raw::c_void,
            rows: i64,
            ffn: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub swiglu_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dh: *mut ::std::os::raw::c_void,
            da: *const ::std::os::raw::c_void,
            h: *const ::std::os::raw::c_void,
            rows: i64,
            ffn: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub rope: ::std::option::Option<
        unsafe extern "C" fn(
            y: *mut ::std::os::raw::c_void,
            x: *const ::std::os::raw::c_void,
            cosines: *const f32,
            sines: *const f32,
            tokens: i64,
            sequence: i32,
            heads: i32,
            key_value_heads: i32,
            head_width: i32,
            back: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub qkv_rope_forward: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            x: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            cosines: *const f32,
            sines: *const f32,
            tokens: i64,
            sequence: i32,
            heads: i32,
            key_value_heads: i32,
            head_width: i32,
            hidden: i32,
            tile: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub embedding_forward: ::std::option::Option<
        unsafe extern "C" fn(
            y: *mut ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            ids: *const i32,
            tokens: i64,
            vocabulary: i32,
            hidden: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub embedding_order: ::std::option::Option<
        unsafe extern "C" fn(
            order: *mut i32,
            keys: *mut i32,
            previous: *const i32,
            row_token: *const i32,
            ids: *const i32,
            tokens: i64,
            vocabulary: i32,
            shift: i32,
            whole: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub embedding_gradient: ::std::option::Option<
        unsafe extern "C" fn(
            dw: *mut f32,
            parts: *mut f32,
            dy: *const ::std::os::raw::c_void,
            order: *const i32,
            keys: *const i32,
            tokens: i64,
            vocabulary: i32,
            hidden: i32,
            accumulate: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub embedding_parts: ::std::option::Option<
        unsafe extern "C" fn(
            floats: *mut u64,
            tokens: i64,
            hidden: i32,
        ) -> routegrad_status,
    >,
    pub adamw_update: ::std::option::Option<
        unsafe extern "C" fn(
            parameters: *const routegrad_parameter,
            block_parameter: *const i32,
            outcome: *const routegrad_step_outcome,
            blocks: i64,
            bf16_moments: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub square_sums: ::std::option::Option<
        unsafe extern "C" fn(
            parts: *mut f64,
            parameters: *const routegrad_parameter,
            block_parameter: *const i32,
            blocks: i64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub losses_add: ::std::option::Option<
        unsafe extern "C" fn(
            sums: *mut f64,
            cross_entropy: *const f32,
            auxiliary: *const f32,
            z: *const f32,
            share: f64,
            first: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub step_decide: ::std::option::Option<
        unsafe extern "C" fn(
            outcome: *mut routegrad_step_outcome,
            settings: *const routegrad_step_settings,
            losses: *const f64,
            flags: *const i32,
            parts: *const f64,
            count: i64,
            layers: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub state_commit: ::std::option::Option<
        unsafe extern "C" fn(
            states: *const routegrad_state,
            outcome: *const routegrad_step_outcome,
            count: i32,
            most_words: i64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub layer_tally: ::std::option::Option<
        unsafe extern "C" fn(
            stats: *mut f64,
            load: *mut f64,
            flags: *mut i32,
            fractions: *mut f32,
            offsets: *const i32,
            first_non_finite: *const i32,
            fault: *const i32,
            mean_entropy: *const f32,
            entropy_parts: *const f64,
            tokens: i64,
            first_token: i64,
            parts: i32,
            experts: i32,
            trains: i32,
            first_of_stats: i32,
            first_of_step: i32,
            over_step: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub share_entropy: ::std::option::Option<
        unsafe extern "C" fn(
            parts: *mut f64,
            scores: *const f32,
            tokens: i64,
            experts: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub lossfree_update: ::std::option::Option<
        unsafe extern "C" fn(
            bias: *mut f32,
            load: *const f64,
            experts: i32,
            rate: f32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub remoe_fractions: ::std::option::Option<
        unsafe extern "C" fn(
            fractions: *mut f32,
            lambda: *const f32,
            offsets: *const i32,
            slots: i64,
            experts: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub remoe_update: ::std::option::Option<
        unsafe extern "C" fn(
            lambda: *mut f32,
            load: *const f64,
            layers: i32,
            experts: i32,
            top_k: i32,
            factor: f64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub auxiliary_loss: ::std::option::Option<
        unsafe extern "C" fn(
            loss: *mut f32,
            mean: *const f32,
            fractions: *const f32,
            experts: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub auxiliary_loss_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dmean: *mut f32,
            dloss: *const f32,
            fractions: *const f32,
            experts: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub weighted_sum: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut f32,
            terms: *const *const f32,
            coefficients: *const f32,
            count: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub weighted_sum_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dterms: *const *mut f32,
            dout: *const f32,
            coefficients: *const f32,
            count: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub selected_gates: ::std::option::Option<
        unsafe extern "C" fn(
            w: *mut f32,
            p: *const f32,
            slot_row: *const i32,
            choices: *const i32,
            tokens: i64,
            rows: i64,
            experts: i32,
            slots: i32,
            renormalize: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub selected_gates_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dp: *mut f32,
            dw: *const f32,
            p: *const f32,
            slot_row: *const i32,
            choices: *const i32,
            tokens: i64,
            rows: i64,
            experts: i32,
            slots: i32,
            renormalize: i32,
            through: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub sampled_gates: ::std::option::Option<
        unsafe extern "C" fn(
            w: *mut f32,
            factors: *const f32,
            logits: *const f32,
            experts_chosen: *const i32,
            kept: *const i32,
            tokens: i64,
            experts: i32,
            stages: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub sampled_gates_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dz: *mut f32,
            dw: *const f32,
            logits: *const f32,
            experts_chosen: *const i32,
            kept: *const i32,
            tokens: i64,
            experts: i32,
            stages: i32,
            estimator: f32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub row_arithmetic: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut ::std::os::raw::c_void,
            a: *const ::std::os::raw::c_void,
            b: *const ::std::os::raw::c_void,
            rows: i64,
            b_rows: i64,
            width: i32,
            multiply: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub column_sums: ::std::option::Option<
        unsafe extern "C" fn(
            parts: *mut f32,
            x: *const ::std::os::raw::c_void,
            y: *const ::std::os::raw::c_void,
            scales: *const f32,
            rows: i64,
            width: i32,
            pitch: i64,
            piece: i32,
            runs: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub gated_rows: ::std::option::Option<
        unsafe extern "C" fn(
            y: *mut ::std::os::raw::c_void,
            gates: *mut f32,
            x: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            v: *const ::std::os::raw::c_void,
            rows: i64,
            width: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub gated_rows_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dx: *mut ::std::os::raw::c_void,
            dv: *mut ::std::os::raw::c_void,
            dscores: *mut f32,
            dy: *const ::std::os::raw::c_void,
            gates: *const f32,
            v: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            rows: i64,
            width: i32,
            accumulate: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub qk_norm: ::std::option::Option<
        unsafe extern "C" fn(
            y: *mut ::std::os::raw::c_void,
            scales: *mut f32,
            x: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            rows: i64,
            pieces: i32,
            width: i32,
            pitch: i64,
            eps: f32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub qk_norm_backward: ::std::option::Option<
        unsafe extern "C" fn(
            dx: *mut ::std::os::raw::c_void,
            scales: *const f32,
            dy: *const ::std::os::raw::c_void,
            x: *const ::std::os::raw::c_void,
            w: *const ::std::os::raw::c_void,
            rows: i64,
            pieces: i32,
            width: i32,
            pitch: i64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub rank_sums: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut f32,
            rows: *const f32,
            ranks: i32,
            stride: i64,
            elements: i64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub rank_sums_f64: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut f64,
            rows: *const f64,
            ranks: i32,
            stride: i64,
            elements: i64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub rank_sums_i32: ::std::option::Option<
        unsafe extern "C" fn(
            out: *mut i32,
            rows: *const i32,
            ranks: i32,
            stride: i64,
            elements: i64,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub rank_flags: ::std::option::Option<
        unsafe extern "C" fn(
            flags: *mut i32,
            rows: *const i32,
            ranks: i32,
            layers: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
    pub load_shares: ::std::option::Option<
        unsafe extern "C" fn(
            fractions: *mut f32,
            load: *const f64,
            experts: i32,
            stream: routegrad_stream,
        ) -> routegrad_status,
    >,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of routegrad_launchers",
    ][::std::mem::size_of::<routegrad_launchers>() - 680usize];
    [
        "Alignment of routegrad_launchers",
    ][::std::mem::align_of::<routegrad_launchers>() - 8usize];
    [
        "Offset of field: routegrad_launchers::build",
    ][::std::mem::offset_of!(routegrad_launchers, build) - 0usize];
    [
        "Offset of field: routegrad_launchers::describe",
    ][::std::mem::offset_of!(routegrad_launchers, describe) - 8usize];
    [
        "Offset of field: routegrad_launchers::sim_get_options",
    ][::std::mem::offset_of!(routegrad_launchers, sim_get_options) - 16usize];
    [
        "Offset of field: routegrad_launchers::sim_set_options",
    ][::std::mem::offset_of!(routegrad_launchers, sim_set_options) - 24usize];
    [
        "Offset of field: routegrad_launchers::sim_take_counters",
    ][::std::mem::offset_of!(routegrad_launchers, sim_take_counters) - 32usize];
    [
        "Offset of field: routegrad_launchers::unit_wgmma",
    ][::std::mem::offset_of!(routegrad_launchers, unit_wgmma) - 40usize];
    [
        "Offset of field: routegrad_launchers::unit_tma_load",
    ][::std::mem::offset_of!(routegrad_launchers, unit_tma_load) - 48usize];
    [
        "Offset of field: routegrad_launchers::unit_tma_store",
    ][::std::mem::offset_of!(routegrad_launchers, unit_tma_store) - 56usize];
    [
        "Offset of field: routegrad_launchers::unit_multicast",
    ][::std::mem::offset_of!(routegrad_launchers, unit_multicast) - 64usize];
    [
        "Offset of field: routegrad_launchers::unit_gather",
    ][::std::mem::offset_of!(routegrad_launchers, unit_gather) - 72usize];
    [
        "Offset of field: routegrad_launchers::unit_softmax",
    ][::std::mem::offset_of!(routegrad_launchers, unit_softmax) - 80usize];
    [
        "Offset of field: routegrad_launchers::unit_fault",
    ][::std::mem::offset_of!(routegrad_launchers, unit_fault) - 88usize];
    [
        "Offset of field: routegrad_launchers::router_forward",
    ][::std::mem::offset_of!(routegrad_launchers, router_forward) - 96usize];
    [
        "Offset of field: routegrad_launchers::router_partials",
    ][::std::mem::offset_of!(routegrad_launchers, router_partials) - 104usize];
    [
        "Offset of field: routegrad_launchers::router_statistics",
    ][::std::mem::offset_of!(routegrad_launchers, router_statistics) - 112usize];
    [
        "Offset of field: routegrad_launchers::router_backward",
    ][::std::mem::offset_of!(routegrad_launchers, router_backward) - 120usize];
    [
        "Offset of field: routegrad_launchers::router_weight_gradient",
    ][::std::mem::offset_of!(routegrad_launchers, router_weight_gradient) - 128usize];
    [
        "Offset of field: routegrad_launchers::router_sample",
    ][::std::mem::offset_of!(routegrad_launchers, router_sample) - 136usize];
    [
        "Offset of field: routegrad_launchers::router_backward_workspace",
    ][::std::mem::offset_of!(routegrad_launchers, router_backward_workspace) - 144usize];
    [
        "Offset of field: routegrad_launchers::dispatch_choices",
    ][::std::mem::offset_of!(routegrad_launchers, dispatch_choices) - 152usize];
    [
        "Offset of field: routegrad_launchers::dispatch_positive",
    ][::std::mem::offset_of!(routegrad_launchers, dispatch_positive) - 160usize];
    [
        "Offset of field: routegrad_launchers::dispatch_workspace",
    ][::std::mem::offset_of!(routegrad_launchers, dispatch_workspace) - 168usize];
    [
        "Offset of field: routegrad_launchers::grouped_gemm_forward",
    ][::std::mem::offset_of!(routegrad_launchers, grouped_gemm_forward) - 176usize];
    [
        "Offset of field: routegrad_launchers::grouped_gemm_input_gradient",
    ][::std::mem::offset_of!(routegrad_launchers, grouped_gemm_input_gradient)
        - 184usize];
    [
        "Offset of field: routegrad_launchers::grouped_gemm_weight_gradient",
    ][::std::mem::offset_of!(routegrad_launchers, grouped_gemm_weight_gradient)
        - 192usize];
    [
        "Offset of field: routegrad_launchers::sum_parts",
    ][::std::mem::offset_of!(routegrad_launchers, sum_parts) - 200usize];
    [
        "Offset of field: routegrad_launchers::grouped_gemm_plan",
    ][::std::mem::offset_of!(routegrad_launchers, grouped_gemm_plan) - 208usize];
    [
        "Offset of field: routegrad_launchers::grouped_swiglu_forward",
    ][::std::mem::offset_of!(routegrad_launchers, grouped_swiglu_forward) - 216usize];
    [
        "Offset of field: routegrad_launchers::grouped_down_forward",
    ][::std::mem::offset_of!(routegrad_launchers, grouped_down_forward) - 224usize];
    [
        "Offset of field: routegrad_launchers::grouped_swiglu_backward",
    ][::std::mem::offset_of!(routegrad_launchers, grouped_swiglu_backward) - 232usize];
    [
        "Offset of field: routegrad_launchers::grouped_swiglu_dot_columns",
    ][::std::mem::offset_of!(routegrad_launchers, grouped_swiglu_dot_columns)
        - 240usize];
    [
        "Offset of field: routegrad_launchers::expert_sums",
    ][::std::mem::offset_of!(routegrad_launchers, expert_sums) - 248usize];
    [
        "Offset of field: routegrad_launchers::expert_mean_update",
    ][::std::mem::offset_of!(routegrad_launchers, expert_mean_update) - 256usize];
    [
        "Offset of field: routegrad_launchers::expert_mean",
    ][::std::mem::offset_of!(routegrad_launchers, expert_mean) - 264usize];
    [
        "Offset of field: routegrad_launchers::combine",
    ][::std::mem::offset_of!(routegrad_launchers, combine) - 272usize];
    [
        "Offset of field: routegrad_launchers::default_dots",
    ][::std::mem::offset_of!(routegrad_launchers, default_dots) - 280usize];
    [
        "Offset of field: routegrad_launchers::gate_gradient",
    ][::std::mem::offset_of!(routegrad_launchers, gate_gradient) - 288usize];
    [
        "Offset of field: routegrad_launchers::norm_forward",
    ][::std::mem::offset_of!(routegrad_launchers, norm_forward) - 296usize];
    [
        "Offset of field: routegrad_launchers::norm_backward",
    ][::std::mem::offset_of!(routegrad_launchers, norm_backward) - 304usize];
    [
        "Offset of field: routegrad_launchers::norm_weight_gradient",
    ][::std::mem::offset_of!(routegrad_launchers, norm_weight_gradient) - 312usize];
    [
        "Offset of field: routegrad_launchers::norm_partials",
    ][::std::mem::offset_of!(routegrad_launchers, norm_partials) - 320usize];
    [
        "Offset of field: routegrad_launchers::attention_forward",
    ][::std::mem::offset_of!(routegrad_launchers, attention_forward) - 328usize];
    [
        "Offset of field: routegrad_launchers::attention_backward",
    ][::std::mem::offset_of!(routegrad_launchers, attention_backward) - 336usize];
    [
        "Offset of field: routegrad_launchers::attention_backward_workspace",
    ][::std::mem::offset_of!(routegrad_launchers, attention_backward_workspace)
        - 344usize];
    [
        "Offset of field: routegrad_launchers::head_logits",
    ][::std::mem::offset_of!(routegrad_launchers, head_logits) - 352usize];
    [
        "Offset of field: routegrad_launchers::cross_entropy_rows",
    ][::std::mem::offset_of!(routegrad_launchers, cross_entropy_rows) - 360usize];
    [
        "Offset of field: routegrad_launchers::cross_entropy_mean",
    ][::std::mem::offset_of!(routegrad_launchers, cross_entropy_mean) - 368usize];
    [
        "Offset of field: routegrad_launchers::gradient_scale",
    ][::std::mem::offset_of!(routegrad_launchers, gradient_scale) - 376usize];
    [
        "Offset of field: routegrad_launchers::swiglu_forward",
    ][::std::mem::offset_of!(routegrad_launchers, swiglu_forward) - 384usize];
    [
        "Offset of field: routegrad_launchers::swiglu_backward",
    ][::std::mem::offset_of!(routegrad_launchers, swiglu_backward) - 392usize];
    [
        "Offset of field: routegrad_launchers::rope",
    ][::std::mem::offset_of!(routegrad_launchers, rope) - 400usize];
    [
        "Offset of field: routegrad_launchers::qkv_rope_forward",
    ][::std::mem::offset_of!(routegrad_launchers, qkv_rope_forward) - 408usize];
    [
        "Offset of field: routegrad_launchers::embedding_forward",
    ][::std::mem::offset_of!(routegrad_launchers, embedding_forward) - 416usize];
    [
        "Offset of field: routegrad_launchers::embedding_order",
    ][::std::mem::offset_of!(routegrad_launchers, embedding_order) - 424usize];
    [
        "Offset of field: routegrad_launchers::embedding_gradient",
    ][::std::mem::offset_of!(routegrad_launchers, embedding_gradient) - 432usize];
    [
        "Offset of field: routegrad_launchers::embedding_parts",
    ][::std::mem::offset_of!(routegrad_launchers, embedding_parts) - 440usize];
    [
        "Offset of field: routegrad_launchers::adamw_update",
    ][::std::mem::offset_of!(routegrad_launchers, adamw_update) - 448usize];
    [
        "Offset of field: routegrad_launchers::square_sums",
    ][::std::mem::offset_of!(routegrad_launchers, square_sums) - 456usize];
    [
        "Offset of field: routegrad_launchers::losses_add",
    ][::std::mem::offset_of!(routegrad_launchers, losses_add) - 464usize];
    [
        "Offset of field: routegrad_launchers::step_decide",
    ][::std::mem::offset_of!(routegrad_launchers, step_decide) - 472usize];
    [
        "Offset of field: routegrad_launchers::state_commit",
    ][::std::mem::offset_of!(routegrad_launchers, state_commit) - 480usize];
    [
        "Offset of field: routegrad_launchers::layer_tally",
    ][::std::mem::offset_of!(routegrad_launchers, layer_tally) - 488usize];
    [
        "Offset of field: routegrad_launchers::share_entropy",
    ][::std::mem::offset_of!(routegrad_launchers, share_entropy) - 496usize];
    [
        "Offset of field: routegrad_launchers::lossfree_update",
    ][::std::mem::offset_of!(routegrad_launchers, lossfree_update) - 504usize];
    [
        "Offset of field: routegrad_launchers::remoe_fractions",
    ][::std::mem::offset_of!(routegrad_launchers, remoe_fractions) - 512usize];
    [
        "Offset of field: routegrad_launchers::remoe_update",
    ][::std::mem::offset_of!(routegrad_launchers, remoe_update) - 520usize];
    [
        "Offset of field: routegrad_launchers::auxiliary_loss",
    ][::std::mem::offset_of!(routegrad_launchers, auxiliary_loss) - 528usize];
    [
        "Offset of field: routegrad_launchers::auxiliary_loss_backward",
    ][::std::mem::offset_of!(routegrad_launchers, auxiliary_loss_backward) - 536usize];
    [
        "Offset of field: routegrad_launchers::weighted_sum",
    ][::std::mem::offset_of!(routegrad_launchers, weighted_sum) - 544usize];
    [
        "Offset of field: routegrad_launchers::weighted_sum_backward",
    ][::std::mem::offset_of!(routegrad_launchers, weighted_sum_backward) - 552usize];
    [
        "Offset of field: routegrad_launchers::selected_gates",
    ][::std::mem::offset_of!(routegrad_launchers, selected_gates) - 560usize];
    [
        "Offset of field: routegrad_launchers::selected_gates_backward",
    ][::std::mem::offset_of!(routegrad_launchers, selected_gates_backward) - 568usize];
    [
        "Offset of field: routegrad_launchers::sampled_gates",
    ][::std::mem::offset_of!(routegrad_launchers, sampled_gates) - 576usize];
    [
        "Offset of field: routegrad_launchers::sampled_gates_backward",
    ][::std::mem::offset_of!(routegrad_launchers, sampled_gates_backward) - 584usize];
    [
        "Offset of field: routegrad_launchers::row_arithmetic",
    ][::std::mem::offset_of!(routegrad_launchers, row_arithmetic) - 592usize];
    [
        "Offset of field: routegrad_launchers::column_sums",
    ][::std::mem::offset_of!(routegrad_launchers, column_sums) - 600usize];
    [
        "Offset of field: routegrad_launchers::gated_rows",
    ][::std::mem::offset_of!(routegrad_launchers, gated_rows) - 608usize];
    [
        "Offset of field: routegrad_launchers::gated_rows_backward",
    ][::std::mem::offset_of!(routegrad_launchers, gated_rows_backward) - 616usize];
    [
        "Offset of field: routegrad_launchers::qk_norm",
    ][::std::mem::offset_of!(routegrad_launchers, qk_norm) - 624usize];
    [
        "Offset of field: routegrad_launchers::qk_norm_backward",
    ][::std::mem::offset_of!(routegrad_launchers, qk_norm_backward) - 632usize];
    [
        "Offset of field: routegrad_launchers::rank_sums",
    ][::std::mem::offset_of!(routegrad_launchers, rank_sums) - 640usize];
    [
        "Offset of field: routegrad_launchers::rank_sums_f64",
    ][::std::mem::offset_of!(routegrad_launchers, rank_sums_f64) - 648usize];
    [
        "Offset of field: routegrad_launchers::rank_sums_i32",
    ][::std::mem::offset_of!(routegrad_launchers, rank_sums_i32) - 656usize];
    [
        "Offset of field: routegrad_launchers::rank_flags",
    ][::std::mem::offset_of!(routegrad_launchers, rank_flags) - 664usize];
    [
        "Offset of field: routegrad_launchers::load_shares",
    ][::std::mem::offset_of!(routegrad_launchers, load_shares) - 672usize];
};
impl Default for routegrad_launchers {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
unsafe extern "C" {
    pub fn routegrad_cuda() -> *const routegrad_launchers;
    pub fn routegrad_sim() -> *const routegrad_launchers;
}
