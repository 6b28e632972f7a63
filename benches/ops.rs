//! The cases of `routegrad bench` under criterion: operations of the CPU in f32, forward and backward together, and the
//! kernels on the simulator, at the sizes of `tiny`; on a GPU (`--features cuda`) the kernels by its events.
//!
//! `cargo bench --bench ops` prints time and throughput: of what has matrix products floating-point operations a second
//! (criterion's "elem/s"), of the others bytes read and written. `cargo bench --bench ops -- combine` takes some of them.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use routegrad::device::Device;
use routegrad::verify::bench::case::{Group, Set, Work};
use routegrad::verify::bench::groups::groups;
use routegrad::verify::bench::timed;
use std::time::Duration;

/// Where a group runs here.
fn device(group: &Group) -> Option<Device> {
    match &group.work {
        Work::Operation(_) => Some(Device::Cpu),
        Work::Step(_) => None, // benches/step.rs
        _ if cfg!(feature = "cuda") && Device::Cuda.prepare().is_ok() => Some(Device::Cuda),
        _ => Some(Device::Sim),
    }
}

fn benches(c: &mut Criterion) {
    Device::Sim.prepare().unwrap_or_else(|e| panic!("{e}"));
    for group in groups().iter().filter(|group| group.set == Set::Small) {
        let Some(device) = device(group) else {
            continue;
        };
        let mut criterion = c.benchmark_group(device.to_string());
        timed::visit(group, device, &|_| true, &mut |mut ready| {
            let (case, side, clock) = (&ready.cases[0], &mut ready.sides[0], ready.clock);
            criterion.throughput(match case.flops {
                0.0 => Throughput::Bytes(case.bytes() as u64),
                flops => Throughput::Elements(flops as u64),
            });
            criterion.bench_function(&case.name, |b| {
                b.iter_custom(|times| {
                    let seconds = clock.seconds(&mut || side(times as usize));
                    Duration::from_secs_f64(seconds.unwrap_or_else(|e| panic!("{e}")))
                });
            });
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
        criterion.finish();
    }
}

criterion_group! {
    name = group;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = benches
}
criterion_main!(group);
