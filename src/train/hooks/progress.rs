//! Progress of a run, on a terminal or in lines.

use crate::error::Result;
use crate::report::metrics::Record;
use crate::train::{Hook, Trainer};
use std::time::{Duration, Instant};

/// Time between two lines if there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows loss, speed and remaining time: on a progress bar if there is a terminal, else on a line every ten seconds.
#[derive(Default)]
pub struct Progress {
    /// The time at which training started, and the number of steps done before.
    started: Option<(Instant, u64)>,
    last_line: Option<Instant>,
    /// Validation loss of the last evaluation.
    validation: Option<f64>,
}

impl Hook for Progress {
    fn start(&mut self, trainer: &Trainer) -> Result<()> {
        self.started = Some((Instant::now(), trainer.steps_done()));
        Ok(())
    }

    fn log(&mut self, trainer: &Trainer, record: &Record) -> Result<()> {
        let (step, total) = (record.step, trainer.config().train.steps);
        let (begun, first) = *self.started.get_or_insert((Instant::now(), 0));
        let done = (step - first).max(1) as f64;
        let left = begun.elapsed().as_secs_f64() / done * total.saturating_sub(step) as f64;
        if record.validation_loss.is_some() {
            self.validation = record.validation_loss;
        }
        let number = |x: Option<f64>| x.map_or("not finite".into(), |x| format!("{x:.3}"));
        let validation = self.validation.map(|x| format!(" (validation {x:.3})"));
        let text = format!(
            "loss {}{}  {:.0} tokens/s  {} left  busiest expert {:.2}×",
            number(record.loss),
            validation.unwrap_or_default(),
            record.tokens_per_second,
            clock(left),
            busiest(&record.load),
        );
        if let Some(bar) = trainer.console.bar() {
            bar.set_position(step);
            bar.set_message(text);
            return Ok(());
        }
        let due = self.last_line.is_none_or(|t| t.elapsed() >= LINE_INTERVAL);
        let notable = step == total || record.validation_loss.is_some();
        if due || notable {
            self.last_line = Some(Instant::now());
            trainer.info(&format!("step {step}/{total}  {text}"));
        }
        Ok(())
    }
}

/// Returns the greatest load of an expert in any layer, relative to a balanced load.
pub(crate) fn busiest(load: &[Vec<u64>]) -> f64 {
    load.iter()
        .map(|counts| {
            let most = counts.iter().copied().max().unwrap_or(0) as f64;
            most * counts.len() as f64 / counts.iter().sum::<u64>().max(1) as f64
        })
        .fold(0.0, f64::max)
}

/// Formats seconds as 4:05 or 1:02:03.
fn clock(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        h => format!("{h}:{:02}:{:02}", s / 60 % 60, s % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_expert_is_that_of_the_worst_layer() {
        assert_eq!(busiest(&[vec![2, 2], vec![1, 3]]), 1.5);
        assert_eq!(busiest(&[vec![0, 0]]), 0.0);
        assert_eq!(busiest(&[]), 0.0);
    }

    #[test]
    fn times_read_as_on_a_clock() {
        assert_eq!(clock(0.2), "0:00");
        assert_eq!(clock(245.4), "4:05");
        assert_eq!(clock(3723.0), "1:02:03");
    }
}
