//! What the machine says about itself: GPU, processor, system.

use serde_json::Value;
use std::process::Command;

/// Streaming multiprocessors of an H200.
pub const H200_MULTIPROCESSORS: usize = 132;
/// Dense bf16 peak of the H200's data sheet, FLOP/s.
pub const H200_PEAK: f64 = 989e12;
/// Measured on one H200: bf16 FLOP/s of a product by cuBLAS, and bytes a second that a copy reads and writes.
pub const H200_FLOPS_PER_SECOND: f64 = 790e12;
pub const H200_BYTES_PER_SECOND: f64 = 4.3e12;
/// Bytes a second that a GPU is expected to send to seven others at once, of NVLink's 450e9 a direction; not measured here.
pub const H200_LINK_BYTES_PER_SECOND: f64 = 370e9;

/// Clocks, temperature, power and what holds the clocks back; null where nvidia-smi is missing.
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

/// Version of the driver.
pub fn driver() -> String {
    nvidia_smi(&["driver_version"])
        .and_then(|values| values.into_iter().next())
        .unwrap_or_else(|| "unknown".into())
}

fn nvidia_smi(fields: &[&str]) -> Option<Vec<String>> {
    let query = format!("--query-gpu={}", fields.join(","));
    let output = Command::new("nvidia-smi")
        .args([&query, "--format=csv,noheader,nounits", "--id=0"])
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

/// The processor's name, where the system tells it.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map(|(_, name)| name.trim().to_string());
    name.unwrap_or_else(|| "unknown processor".into())
}

/// The commit that was built: told by the bundle's script, or asked of git.
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

/// Release of the operating system's kernel.
pub fn system() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".into(), |text| text.trim().to_string())
}
