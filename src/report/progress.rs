//! Progress of long work on standard error: a bar on a terminal, a line now and then elsewhere.

use super::{shows_bars, stderr_line};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// A bar of this template on standard error, or one that is not `shown`.
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

/// Work of a known size. The bar goes away with it.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
    quiet: bool,
    begun: Instant,
    last_line: Mutex<Instant>,
}

impl Progress {
    /// Of work of `total`, in any unit; shows nothing if `quiet`.
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

    /// `position` of the work is done; `text` says so in the reader's units.
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

    /// The rest at the rate so far.
    fn left(&self) -> HumanDuration {
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let rest = total.saturating_sub(done) as f64 / done.max(1) as f64;
        HumanDuration(self.begun.elapsed().mul_f64(rest))
    }

    /// A line that stays, unless quiet.
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

/// Work in named phases, of which none says how far it is. The bar goes away with it.
pub struct Phases {
    bar: ProgressBar,
    /// Of the present phase.
    text: Arc<Mutex<String>>,
    /// Writes lines until the sender is gone; none beside a bar.
    lines: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Phases {
    /// Of work of so many phases.
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
                        let time = HumanDuration(begun.elapsed());
                        write(&format!("{text}, {time} so far"));
                    }
                };
                // Without a thread to spare there are no lines.
                let thread = thread::Builder::new().name("progress".into()).spawn(work);
                thread.ok().map(|thread| (sender, thread))
            }
        };
        Phases { bar, text, lines }
    }

    /// Begins phase number `n`, counted from 1.
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
    fn a_phase_is_named_again_and_again_until_the_work_is_done() {
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
            two.iter().all(|l| l.starts_with("routing (2/3), ")),
            "{two:?}"
        );
        drop(phases);
        // The thread has ended: its end of the channel is gone.
        assert!(lines.iter().all(|line| line.starts_with("routing (2/3)")));
    }
}
