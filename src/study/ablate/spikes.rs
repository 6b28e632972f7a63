//! Definition of a spike.
//!
//! OLMo 2 (arXiv 2501.00656, section 3.2) defines the spike score of a series as the percentage of its values that lie at
//! least seven standard deviations from the rolling average of the last 1,000. This module makes two changes: only values
//! above the average count, since a decrease is not an instability; and the window is W = min(1000, max(20, ⌊N / 10⌋))
//! values for a run of N steps, so that short runs have a window too. Value x_t is compared with the W values before it,
//! x_{t−W} … x_{t−1}; the first W values are not compared. Consecutive spiking steps form one spike.

use crate::study::moments;

/// Number of standard deviations above the rolling mean at which a value counts as a spike.
pub const DEVIATIONS: f64 = 7.0;

/// The spikes of one series.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spikes {
    /// Steps, counted from 1, at which a spike begins.
    pub begins: Vec<u64>,
    /// Percentage of the compared values that are spikes; `None` if none is compared, as in a series that is shorter than the
    /// window.
    pub score: Option<f64>,
}

/// Returns the number of values in the window for a run of `steps` steps.
pub fn window(steps: u64) -> usize {
    (steps / 10).clamp(20, 1000) as usize
}

/// Finds the spikes of a series of (step, value) with one value per step. Values that are not finite are left out of the
/// windows.
pub fn find(series: &[(u64, f64)], steps: u64) -> Spikes {
    let width = window(steps);
    let finite: Vec<(u64, f64)> = series.iter().copied().filter(|v| v.1.is_finite()).collect();
    let (mut begins, mut spiking, mut before) = (Vec::new(), 0, None);
    let judged = finite.len().saturating_sub(width);
    for i in width..finite.len() {
        let near = &finite[i - width..i];
        let (mean, squares) = moments(near.iter().map(|v| v.1));
        let deviation = (squares / width as f64).sqrt();
        let (step, value) = finite[i];
        if value > mean && value - mean >= DEVIATIONS * deviation {
            spiking += 1;
            if before != Some(step - 1) {
                begins.push(step);
            }
            before = Some(step);
        }
    }
    Spikes {
        begins,
        score: (judged > 0).then(|| 100.0 * spiking as f64 / judged as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a decreasing loss with noise of ±0.01.
    fn series() -> Vec<(u64, f64)> {
        let noise = |t: u64| if t % 2 == 0 { 0.01 } else { -0.01 };
        (1..=600)
            .map(|t| (t, 2.0 + 2.0 / t as f64 + noise(t)))
            .collect()
    }

    #[test]
    fn a_decreasing_loss_with_noise_has_no_spike() {
        let none = find(&series(), 600);
        assert_eq!((none.begins.len(), none.score), (0, Some(0.0)));
        assert_eq!(find(&[], 600), Spikes::default());
        assert_eq!((window(50), window(600), window(76_294)), (20, 60, 1000));
    }

    #[test]
    fn neighbours_are_one_spike_and_a_decrease_is_none() {
        let mut values = series();
        values[299].1 = 3.0;
        values[300].1 = 5.0;
        values[449].1 = 3.0;
        values[519].1 = 1.0;
        let found = find(&values, 600);
        assert_eq!(found.begins, [300, 450]);
        assert!((found.score.unwrap() - 100.0 * 3.0 / 540.0).abs() < 1e-12);
    }

    #[test]
    fn six_deviations_are_no_spike_and_seven_are() {
        // A window of 20 values ±1: mean 0, standard deviation 1.
        let mut values: Vec<(u64, f64)> = (1..=20)
            .map(|t| (t, if t % 2 == 0 { 1.0 } else { -1.0 }))
            .collect();
        values.push((21, 6.9));
        assert!(find(&values, 100).begins.is_empty());
        values[20].1 = 7.0;
        assert_eq!(find(&values, 100).begins, [21]);
        values[20].1 = f64::NAN;
        assert!(find(&values, 100).begins.is_empty());
    }
}
