//! Compiles the kernels twice from one source: against the simulator with the C++ compiler (always), and for GPUs with
//! nvcc where one is found.

#[path = "build/bindings.rs"]
mod bindings;
#[path = "build/cuda.rs"]
mod cuda;
#[path = "build/simulator.rs"]
mod simulator;
#[path = "build/sources.rs"]
mod sources;

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rustc-check-cfg=cfg(routegrad_cuda)");
    simulator::compile();
    cuda::compile();
    bindings::generate();
}
