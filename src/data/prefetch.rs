//! Prefetch: while a step runs, a thread reads the data of the next two steps, so that training does not wait for the
//! disk.

use crate::error::{Error, Result};
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};

/// The results of a function for each step of a range, in order, computed in advance by a thread.
pub struct Prefetch<T> {
    next: u64,
    /// Both are present until the value is dropped.
    parts: Option<(Receiver<T>, JoinHandle<()>)>,
}

impl<T: Send + 'static> Prefetch<T> {
    /// Starts to read for the first of `steps`.
    ///
    /// # Errors
    /// When the operating system cannot start a thread.
    pub fn new(steps: Range<u64>, read: impl Fn(u64) -> T + Send + 'static) -> Result<Self> {
        let next = steps.start;
        // One result is in the channel while the thread holds the next.
        let (sender, receiver) = sync_channel(1);
        let thread = thread::Builder::new()
            .name("read".into())
            .spawn(move || {
                for step in steps {
                    if sender.send(read(step)).is_err() {
                        return;
                    }
                }
            })
            .map_err(|e| Error::thread("data", "a thread to read ahead", &e))?;
        Ok(Prefetch {
            next,
            parts: Some((receiver, thread)),
        })
    }

    /// Returns the result for `step`.
    ///
    /// # Panics
    /// When the steps are not requested in order, `step` is after the last one, or the reading thread panicked.
    pub fn take(&mut self, step: u64) -> T {
        assert_eq!(step, self.next, "the step that was read for");
        self.next += 1;
        let received = self.parts.as_ref().and_then(|(r, _)| r.recv().ok());
        received.unwrap_or_else(|| self.fail(step))
    }

    /// Panics with the panic of the reading thread.
    fn fail(&mut self, step: u64) -> ! {
        if let Some((_, thread)) = self.parts.take()
            && let Err(panic) = thread.join()
        {
            resume_unwind(panic);
        }
        panic!("nothing was read for step {step}: it is past the last");
    }
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        if let Some((receiver, thread)) = self.parts.take() {
            // Without a receiver, the thread ends after its current read.
            drop(receiver);
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    #[test]
    fn two_steps_are_read_ahead_and_no_more() {
        let reads = Arc::new(AtomicU64::new(0));
        let counted = reads.clone();
        let mut prefetch = Prefetch::new(5..100, move |step| {
            counted.fetch_add(1, Ordering::SeqCst);
            step * 10
        })
        .unwrap();
        for step in 5..50 {
            assert_eq!(prefetch.take(step), step * 10);
            let most = step - 5 + 1 + 2;
            while reads.load(Ordering::SeqCst) < most {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(reads.load(Ordering::SeqCst), most);
        }
    }

    #[test]
    fn dropping_it_at_any_time_does_not_block() {
        for taken in [0, 1, 7, 10] {
            let mut prefetch = Prefetch::new(0..10, |step| vec![step; 1000]).unwrap();
            (0..taken).for_each(|step| assert_eq!(prefetch.take(step)[0], step));
        }
        drop(Prefetch::new(3..3, |step| step).unwrap());
    }

    #[test]
    #[should_panic(expected = "no page 2")]
    fn a_panic_of_the_reader_is_passed_to_the_caller_of_take() {
        let mut prefetch = Prefetch::new(0..4, |step| {
            assert!(step < 2, "no page {step}");
            step
        })
        .unwrap();
        (0..4).for_each(|step| assert_eq!(prefetch.take(step), step));
    }

    #[test]
    #[should_panic(expected = "past the last")]
    fn there_is_no_result_after_the_last_step() {
        let mut prefetch = Prefetch::new(0..1, |step| step).unwrap();
        prefetch.take(0);
        prefetch.take(1);
    }
}
