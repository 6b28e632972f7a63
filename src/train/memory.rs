//! A check, before a run begins, that it can fit in memory.

use crate::config::{Config, count};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::report::size;
use std::fs;

/// Returns a lower bound of the bytes that each of `ranks` ranks needs to train: each parameter with its gradient and this
/// rank's share of the two moments, and the tensors kept for backward of its part of a micro-batch. Per token and layer these
/// are about 8 D numbers for attention and 2 D + 3 F for each expert; a recomputed layer keeps only its input.
pub fn least(config: &Config, ranks: usize) -> u64 {
    let (m, ranks) = (&config.model, ranks as u64);
    let size = config.train.dtype.dtype().size() as u64;
    let parameters = count::total_parameters(m);
    let weights = parameters
        .saturating_mul(2)
        .saturating_add(parameters.saturating_mul(2) / ranks);
    let tokens = config.train.micro_batch as u64 * m.sequence_length as u64 / ranks;
    let d = m.hidden as u64;
    let per_token: u64 = (0..m.layers)
        .map(|layer| {
            let ffn = if m.dense_layers.contains(&layer) {
                m.dense_ffn_width as u64 * 3
            } else {
                m.top_k as u64 * (2 * d + 3 * m.expert_ffn_width as u64)
            };
            if config.train.recompute.covers(layer) {
                d
            } else {
                8 * d + ffn
            }
        })
        .sum();
    // The tokens of the current step and of the two prefetched steps are in memory as i32.
    let batch = 3 * config.train.sequences_per_step as u64 * m.sequence_length as u64 * 4 / ranks;
    weights
        .saturating_add(tokens.saturating_mul(per_token))
        .saturating_mul(size)
        .saturating_add(batch)
}

/// Rejects a run of which a rank needs more memory than the machine has. The memory of a GPU is not checked here; it is
/// reserved before the run.
pub(super) fn check(config: &Config, ranks: usize) -> Result<()> {
    match config.train.device {
        Device::Cuda => Ok(()),
        _ => fits(least(config, ranks), available()),
    }
}

fn fits(needed: u64, available: Option<u64>) -> Result<()> {
    match available {
        Some(available) if needed > available => Err(Error::invalid(
            "train",
            format!("a model that fits in {} of free memory", size(available)),
            format!("one whose training takes at least {}", size(needed)),
            "choose a smaller --preset, or lower train.micro_batch, train.sequences_per_step or model.sequence_length",
        )),
        _ => Ok(()),
    }
}

/// Returns the free memory in bytes, or the container's limit if that is less; `None` if the system does not report
/// it.
pub fn available() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let free = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    let read = |name| {
        let text = fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let limit =
        read("memory.max").map(|max| max.saturating_sub(read("memory.current").unwrap_or(0)));
    Some(limit.map_or(free, |l| l.min(free)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiny_fits_and_the_error_names_both_sizes() {
        let config = Config::tiny(&[]);
        check(&config, 1).unwrap();
        // 3.7 M parameters of 16 bytes, and about 30 kB for each of 4,096 tokens.
        let least = least(&config, 1);
        assert!((150_000_000..300_000_000).contains(&least), "{least}");
        let e = fits(50 << 30, Some(24 << 30)).unwrap_err().to_string();
        assert!(e.contains("24.00 GiB") && e.contains("50.00 GiB"), "{e}");
        fits(u64::MAX, None).unwrap();
    }

    #[test]
    fn recomputed_layers_need_less() {
        let of = |set: &[&str]| least(&Config::tiny(set), 1);
        assert!(of(&["train.recompute=true"]) < of(&[]));
    }
}
