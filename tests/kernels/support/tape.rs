//! Operations on the tape: the same numbers on a device and on the CPU, and how near their results are.

use routegrad::device::Device;
use routegrad::tape::Var;
use routegrad::tape::check::normal_numbers;
use routegrad::tensor::Tensor;
use routegrad::tensor::shape::Shape;

/// Normal numbers rounded to bf16: as bf16 on a device with kernels, widened on the CPU.
pub fn tensor(seed: u64, shape: impl Into<Shape>, device: Device) -> Tensor {
    scaled(seed, 1.0, shape, device)
}

/// The same with deviation `scale`.
#[allow(dead_code)]
pub fn scaled(seed: u64, scale: f64, shape: impl Into<Shape>, device: Device) -> Tensor {
    let shape = shape.into();
    let values = normal_numbers(shape.elements(), seed).into_iter();
    let values: Vec<f32> = values.map(|x| (scale * x) as f32).collect();
    let rounded = Tensor::from_slice(shape, &values).narrowed();
    match device {
        Device::Cpu => rounded.widened(),
        _ => rounded.on(device),
    }
}

/// [`tensor`] as the leaf or the parameter of a slot, which is its seed less one.
pub fn var(slot: usize, shape: impl Into<Shape>, device: Device, parameter: bool) -> Var {
    let tensor = tensor(slot as u64 + 1, shape, device);
    match parameter {
        true => Var::parameter(tensor, slot),
        false => Var::leaf(tensor, slot),
    }
}

/// ‖device − cpu‖ ≤ 0.004 ‖cpu‖: bf16 rounds by at most 1/256 of a value.
pub fn close(what: &str, device: &[f64], cpu: &[f64]) {
    let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let error = squares(&mut device.iter().zip(cpu).map(|(a, b)| a - b));
    let error = error / squares(&mut cpu.iter().copied());
    assert!(error <= 0.004, "{what} is off by {error:.1e}");
}
