//! The kernels on the simulator: every case, schedules, refusals, and the operations that launch them.

mod support;

mod adamw;
mod attention;
mod combine;
mod cross_entropy;
mod dispatch;
mod embedding;
mod expert_mean;
mod experts;
mod experts_arguments;
mod gate_gradient;
mod gates;
mod gemm_arguments;
mod gemm_ring;
mod grouped_gemm;
mod layer_tally;
mod mma;
mod norm;
mod ranks;
mod rope;
mod router;
mod rows;
mod simulator;
mod sources;
mod step;
mod swiglu;
