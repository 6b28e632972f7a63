//! Information about the machine: GPU, processor, operating system.

use serde_json::Value;
use std::process::Command;
use std::sync::OnceLock;

/// Streaming multiprocessors of an H200.
pub const H200_MULTIPROCESSORS: usize = 132;
/// Peak of dense bf16 products from the H200's data sheet, FLOP/s.
pub const H200_PEAK: f64 = 989e12;
/// Measured on one H200: FLOP/s of a bf16 product by cuBLAS.
pub const H200_FLOPS_PER_SECOND: f64 = 790e12;
/// Measured on one H200: bytes per second that a copy reads and writes.
pub const H200_BYTES_PER_SECOND: f64 = 4.3e12;
/// Expected bytes per second that a GPU sends to seven others at once, out of NVLink's 450e9 per direction; not
/// measured here.
const HOPPER_LINK_BYTES_PER_SECOND: f64 = 370e9;

/// A GPU model, with the data that planning and rooflines need.
#[derive(Debug)]
pub struct Chip {
    /// Name in commands.
    pub key: &'static str,
    /// Name given by the driver.
    pub name: &'static str,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// GiB available to a program: the GPU memory that CUDA reports, minus at least half a GiB that CUDA itself uses;
    /// measured on an H200.
    pub memory_gib: u64,
    /// Peak of dense bf16 products with f32 sums, in FLOP/s, at the boost clock of the data sheet. A card with a
    /// higher clock exceeds it.
    pub peak: f64,
    /// Memory bandwidth from the data sheet, in bytes per second.
    pub bandwidth: f64,
    /// FLOP/s of a product by cuBLAS and bytes per second of a copy, if they were measured.
    measured: Option<(f64, f64)>,
}

/// The GPU models that commands know by name. On sm_100 the kernels use mma.sync, which does not reach the peak of tcgen05.
pub static CHIPS: [Chip; 8] = [
    // "NVIDIA A100 Tensor Core GPU" data sheet, A100 80GB SXM: bf16 312 TFLOPS, 80 GB, 2,039 GB/s; 108 SMs: its whitepaper.
    chip(
        "a100",
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        108,
        78,
        (312e12, 2.039e12),
    ),
    // "NVIDIA Ampere GA102 GPU Architecture" whitepaper, RTX 3090: bf16 71 TFLOPS (82 SMs x 512 FLOP x 1,695 MHz), 24 GB,
    // 936 GB/s. CUDA reports 24,259 MiB.
    chip(
        "rtx3090",
        "NVIDIA GeForce RTX 3090",
        (8, 6),
        82,
        23,
        (71e12, 0.936e12),
    ),
    // "NVIDIA Ada GPU Architecture" whitepaper, RTX 4090: bf16 165.2 TFLOPS (128 SMs x 512 FLOP x 2,520 MHz), 24 GB,
    // 1,008 GB/s. CUDA reports 24,563 MiB.
    chip(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        128,
        23,
        (165.2e12, 1.008e12),
    ),
    // "NVIDIA RTX Blackwell GPU Architecture" whitepaper, RTX 5090: bf16 209.5 TFLOPS (170 SMs x 512 FLOP x 2,407 MHz), 32 GB,
    // 1,792 GB/s. CUDA reports 32,109 MiB.
    chip(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        (12, 0),
        170,
        30,
        (209.5e12, 1.792e12),
    ),
    // "NVIDIA L40S" data sheet: bf16 362.05 TFLOPS, 48 GB with ECC, 864 GB/s; 18,176 cores: 142 SMs. CUDA reports 45,589 MiB.
    chip(
        "l40s",
        "NVIDIA L40S",
        (8, 9),
        142,
        44,
        (362.05e12, 0.864e12),
    ),
    // "NVIDIA H100 Tensor Core GPU" data sheet, SXM: bf16 1,979 TFLOPS with sparsity, 989 without, 80 GB, 3.35 TB/s; 132 SMs:
    // its whitepaper. CUDA reports 81,090 MiB.
    chip(
        "h100",
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        132,
        78,
        (H200_PEAK, 3.35e12),
    ),
    // "NVIDIA H200 Tensor Core GPU" data sheet, SXM: bf16 989 TFLOPS, 4.8 TB/s; memory and rates as measured on one.
    Chip {
        measured: Some((H200_FLOPS_PER_SECOND, H200_BYTES_PER_SECOND)),
        ..chip(
            "h200",
            "NVIDIA H200",
            (9, 0),
            H200_MULTIPROCESSORS,
            139,
            (H200_PEAK, 4.8e12),
        )
    },
    // "NVIDIA HGX B200" data sheet, an eighth of its 8 GPUs: bf16 36 PFLOPS with sparsity, 18 without, 1.4 TB, 62 TB/s. CUDA
    // reports 148 SMs and 182,631 MiB.
    chip("b200", "NVIDIA B200", (10, 0), 148, 177, (2250e12, 7.7e12)),
];

const fn chip(
    key: &'static str,
    name: &'static str,
    capability: (i32, i32),
    multiprocessors: usize,
    memory_gib: u64,
    (peak, bandwidth): (f64, f64),
) -> Chip {
    Chip {
        key,
        name,
        capability,
        multiprocessors,
        memory_gib,
        peak,
        bandwidth,
        measured: None,
    }
}

impl Chip {
    /// Returns the chip with this key.
    pub fn named(key: &str) -> Option<&'static Chip> {
        CHIPS.iter().find(|chip| chip.key == key)
    }

    /// Returns the chip with this driver name. Variants of a chip are not found, because their clocks and memory
    /// differ.
    pub fn of_driver(name: &str) -> Option<&'static Chip> {
        CHIPS.iter().find(|chip| chip.name == name)
    }

    /// Returns the expected bytes per second that the GPU sends to seven others at once, if they are connected by
    /// NVLink of Hopper's generation.
    pub fn link(&self) -> Option<f64> {
        (self.capability == (9, 0)).then_some(HOPPER_LINK_BYTES_PER_SECOND)
    }

    /// Returns FLOP/s of a product and bytes per second of a copy, measured or else from the data sheet. A card with
    /// a higher clock than in the data sheet exceeds the latter.
    pub fn ceilings(&self) -> (f64, f64) {
        self.measured.unwrap_or((self.peak, self.bandwidth))
    }

    /// Returns whether [`ceilings`](Self::ceilings) were measured.
    pub fn is_measured(&self) -> bool {
        self.measured.is_some()
    }
}

/// Returns the chip to which the records, lower bounds and plans in the documentation refer.
pub fn h200() -> &'static Chip {
    &CHIPS[6]
}

/// Returns clocks, temperature, power and the reasons for reduced clocks; null if nvidia-smi is missing.
pub fn state() -> Value {
    const FIELDS: [&str; 6] = [
        "clocks.sm",
        "clocks.mem",
        "temperature.gpu",
        "power.draw",
        "clocks_event_reasons.active",
        "utilization.gpu",
    ];
    match nvidia_smi(&FIELDS) {
        Some(values) => FIELDS
            .iter()
            .zip(values)
            .map(|(field, value)| (field.to_string(), Value::String(value)))
            .collect(),
        None => Value::Null,
    }
}

/// Returns the version of the driver.
pub fn driver() -> String {
    nvidia_smi(&["driver_version"])
        .and_then(|values| values.into_iter().next())
        .unwrap_or_else(|| "unknown".into())
}

/// PCI address of the GPU that was opened. nvidia-smi numbers GPUs in another order than CUDA, and also those that
/// `CUDA_VISIBLE_DEVICES` hides.
static ADDRESS: OnceLock<String> = OnceLock::new();

/// Makes [`state`] and [`driver`] report the GPU at this PCI address, such as "00000000:1b:00.0".
pub fn report_on(address: String) {
    ADDRESS.get_or_init(|| address);
}

fn nvidia_smi(fields: &[&str]) -> Option<Vec<String>> {
    let query = format!("--query-gpu={}", fields.join(","));
    let gpu = format!("--id={}", ADDRESS.get().map_or("0", String::as_str));
    let output = Command::new("nvidia-smi")
        .args([&query, "--format=csv,noheader,nounits", &gpu])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout)
        .ok()
        .filter(|_| output.status.success())?;
    let values: Vec<String> = text
        .lines()
        .next()?
        .split(',')
        .map(|value| value.trim().to_string())
        .collect();
    (values.len() == fields.len()).then_some(values)
}

/// Returns the processor's name, or "unknown processor".
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map(|(_, name)| name.trim().to_string());
    name.unwrap_or_else(|| "unknown processor".into())
}

/// Returns the commit that was built, from the bundle's script or from git.
pub fn commit() -> String {
    if let Ok(commit) = std::env::var("ROUTEGRAD_COMMIT") {
        return commit;
    }
    let output = Command::new("git")
        .args([
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ])
        .output();
    let text = output
        .ok()
        .filter(|o| o.status.success())
        .and_then(|o| String::from_utf8(o.stdout).ok());
    text.map_or_else(|| "unknown".into(), |text| text.trim().to_string())
}

/// Returns the release of the operating system's kernel.
pub fn system() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".into(), |text| text.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chip_is_found_by_its_key_and_its_drivers_name_and_variants_are_not() {
        for chip in &CHIPS {
            assert!(std::ptr::eq(Chip::named(chip.key).unwrap(), chip));
            assert!(std::ptr::eq(Chip::of_driver(chip.name).unwrap(), chip));
            assert!(chip.capability >= (8, 0), "{}", chip.key);
            let (flops, bytes) = chip.ceilings();
            assert!(
                flops <= chip.peak && bytes <= chip.bandwidth,
                "{}",
                chip.key
            );
        }
        assert_eq!(h200().key, "h200");
        assert!(Chip::of_driver("NVIDIA GeForce RTX 4090 Laptop GPU").is_none());
        assert!(Chip::of_driver("NVIDIA A100-PCIE-40GB").is_none());
    }
}
