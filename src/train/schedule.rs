//! The learning rate of a step: linear warm-up, then one of the schedules.

use crate::config::{Schedule, TrainConfig};
use std::f64::consts::PI;

/// Returns the learning rate of step `step`, counted from 0, of N = `config.steps` steps. In the first w =
/// ⌈`warmup_fraction` · N⌉ steps the rate rises linearly to `learning_rate`. In the others it falls as defined by
/// `schedule` to `final_rate · learning_rate`, the rate of the last step.
pub fn learning_rate(config: &TrainConfig, step: u64) -> f64 {
    let steps_of = |share: f64| (share * config.steps as f64).ceil() as u64;
    let warmup = steps_of(config.warmup_fraction);
    if step < warmup {
        return config.learning_rate * ((step + 1) as f64 / warmup as f64);
    }
    // The fraction of the decay that is done, where the decay begins after `first` steps.
    let progress = |first: u64| {
        let falling = config.steps.saturating_sub(first).max(1);
        ((step + 1).saturating_sub(first) as f64 / falling as f64).min(1.0)
    };
    let height = match config.schedule {
        Schedule::Cosine => 0.5 * (1.0 + (PI * progress(warmup)).cos()),
        Schedule::Linear => 1.0 - progress(warmup),
        Schedule::Constant => return config.learning_rate,
        Schedule::Wsd => {
            let decay = config.steps.saturating_sub(steps_of(config.decay_fraction));
            1.0 - progress(decay.max(warmup))
        }
    };
    config.learning_rate * (config.final_rate + (1.0 - config.final_rate) * height)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn rates(set: &[&str]) -> Vec<f64> {
        let train = Config::tiny(set).train;
        let steps = 0..train.steps;
        steps.map(|step| learning_rate(&train, step)).collect()
    }

    #[test]
    fn the_rate_rises_to_its_maximum_and_falls_to_its_final_value() {
        let r = rates(&["train.steps=600"]);
        assert!((r[0] - 3e-3 / 6.0).abs() < 1e-15);
        assert_eq!(r[5], 3e-3);
        assert!(r[5..].windows(2).all(|w| w[1] < w[0]));
        assert!((r[599] - 3e-4).abs() < 1e-12);
        // Halfway through the cosine, the rate is the mean of both ends.
        assert!((r[6 + 296] - 1.65e-3).abs() < 1e-12);
    }

    #[test]
    fn every_schedule_ends_where_it_says() {
        let of = |schedule: &str| {
            let schedule = format!("train.schedule={schedule}");
            rates(&["train.steps=100", "train.warmup_fraction=0.1", &schedule])
        };
        let linear = of("linear");
        assert_eq!(linear[9], 3e-3);
        assert!((linear[54] - 0.5 * (3e-3 + 3e-4)).abs() < 1e-12);
        assert!((linear[99] - 3e-4).abs() < 1e-15);
        assert!(of("constant")[9..].iter().all(|r| *r == 3e-3));
        let wsd = of("wsd");
        assert!(wsd[9..80].iter().all(|r| *r == 3e-3));
        assert!(wsd[79..].windows(2).all(|w| w[1] < w[0]));
        assert!((wsd[89] - 0.5 * (3e-3 + 3e-4)).abs() < 1e-12);
        assert!((wsd[99] - 3e-4).abs() < 1e-15);
    }

    #[test]
    fn rates_are_finite_without_warm_up_and_with_only_warm_up() {
        assert!(rates(&["train.steps=1"]).iter().all(|r| *r > 0.0));
        let all = rates(&["train.warmup_fraction=1", "train.steps=4"]);
        assert_eq!(all, [0.25 * 3e-3, 0.5 * 3e-3, 0.75 * 3e-3, 3e-3]);
        let none = rates(&["train.warmup_fraction=0", "train.steps=2"]);
        assert!(none[0] < 3e-3 && (none[1] - 3e-4).abs() < 1e-12);
    }
}
