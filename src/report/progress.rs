//! Shows the progress of long work on standard error: a bar on a terminal, otherwise a line at intervals.

use super::{shows_bars, stderr_line};
use indicatif::{FormattedDuration, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Time between two lines if standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Creates a progress bar with this template on standard error; it is hidden unless `shown`.
pub(crate) fn bar(total: u64, template: &str, shown: bool) -> ProgressBar {
    let target = match shown {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
    }
    bar
}

/// Progress of work of a known size. The bar is removed when the value is dropped.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
    quiet: bool,
    begun: Instant,
    last_line: Mutex<Instant>,
}

impl Progress {
    /// Starts work of size `total`, in any unit; shows nothing if `quiet`.
    pub fn new(total: u64, quiet: bool) -> Self {
        let terminal = shows_bars() && !quiet;
        Progress {
            bar: bar(total, "{bar:12} {wide_msg}", terminal),
            terminal,
            quiet,
            begun: Instant::now(),
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// Sets the part of the work that is done; `text` describes it for the reader.
    pub fn at(&self, position: u64, text: &str) {
        self.bar.set_position(position);
        if self.terminal {
            self.bar
                .set_message(format!("{text}  {} left", self.left()));
            return;
        }
        let mut last = self.last_line.lock().unwrap_or_else(|e| e.into_inner());
        if !self.quiet && last.elapsed() >= LINE_INTERVAL {
            *last = Instant::now();
            stderr_line(&format!("{text}, {} left", self.left()));
        }
    }

    /// Returns the estimated remaining time at the average rate so far.
    fn left(&self) -> HumanDuration {
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let rest = total.saturating_sub(done) as f64 / done.max(1) as f64;
        HumanDuration(self.begun.elapsed().mul_f64(rest))
    }

    /// Prints a permanent line, unless quiet.
    pub fn note(&self, text: &str) {
        if self.terminal {
            self.bar.println(text);
        } else if !self.quiet {
            stderr_line(text);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Progress of work in named phases of unknown length. The bar is removed when the value is dropped.
pub struct Phases {
    bar: ProgressBar,
    /// Start and name of the current phase.
    text: Arc<Mutex<String>>,
    /// The thread that writes lines until the sender is dropped; `None` if there is a bar.
    lines: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Phases {
    /// Starts work with `count` phases.
    pub fn new(count: usize) -> Self {
        Self::with(count, shows_bars(), LINE_INTERVAL, stderr_line)
    }

    fn with(
        count: usize,
        terminal: bool,
        interval: Duration,
        write: impl Fn(&str) + Send + 'static,
    ) -> Self {
        let bar = bar(count as u64, "{bar:12} {wide_msg} {elapsed}", terminal);
        let text = Arc::new(Mutex::new(String::new()));
        let lines = match terminal {
            true => {
                bar.enable_steady_tick(Duration::from_secs(1));
                None
            }
            false => {
                let (text, begun) = (text.clone(), Instant::now());
                let (sender, ended) = channel();
                let work = move || {
                    while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                        let text = text.lock().unwrap_or_else(|e| e.into_inner()).clone();
                        let time = FormattedDuration(begun.elapsed());
                        write(&format!("{text}, {time} so far"));
                    }
                };
                // If no thread can be started, no lines are written.
                let thread = thread::Builder::new().name("progress".into()).spawn(work);
                thread.ok().map(|thread| (sender, thread))
            }
        };
        Phases { bar, text, lines }
    }

    /// Starts phase number `n`, counted from 1.
    pub fn begin(&self, n: usize, name: &str) {
        let text = format!("{name} ({n}/{})", self.bar.length().unwrap_or(0));
        self.bar.set_position(n as u64 - 1);
        self.bar.set_message(text.clone());
        *self.text.lock().unwrap_or_else(|e| e.into_inner()) = text;
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        if let Some((sender, thread)) = self.lines.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phase_is_printed_repeatedly_until_the_work_is_done() {
        let (sender, lines) = channel();
        let write = move |line: &str| sender.send(line.to_owned()).unwrap();
        let phases = Phases::with(3, false, Duration::from_millis(1), write);
        phases.begin(2, "routing");
        let two: Vec<String> = lines
            .iter()
            .filter(|l| l.contains("routing"))
            .take(2)
            .collect();
        assert!(
            two.iter().all(|l| l.starts_with("routing (2/3), 00:00:0")),
            "{two:?}"
        );
        drop(phases);
        // The thread has ended: its receiver is gone.
        assert!(lines.iter().all(|line| line.starts_with("routing (2/3)")));
    }
}
