//! What must be summed over ranks goes through one trait, so that code for one rank never changes
//! when ranks are added.

use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Sums over all ranks of a run, in rank order, so that every rank gets the same bytes.
///
/// Every rank makes the same calls in the same order, each with equally many values.
pub trait Collective: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Replaces `values` by their sum over the ranks.
    ///
    /// # Errors
    /// When a rank has left, or the ranks do not sum the same things.
    fn sum(&self, values: &mut [f64]) -> Result<()>;

    /// The values of all ranks, rank 0 first.
    ///
    /// # Errors
    /// As [`sum`](Self::sum).
    fn gather(&self, values: &[f64]) -> Result<Vec<f64>> {
        let mut all = vec![0.0; self.size() * values.len()];
        let first = self.rank() * values.len();
        all[first..first + values.len()].copy_from_slice(values);
        self.sum(&mut all)?;
        Ok(all)
    }

    /// This rank's part of the sequences of a micro-batch: the rank-th of as many equal, consecutive
    /// parts as there are ranks. So micro-batch m of a step has the same sequences in the same places
    /// of the global batch on any number of ranks, and with it all counts, averages and draws.
    ///
    /// # Errors
    /// When the ranks cannot share the sequences equally.
    fn part(&self, sequences: Range<u64>) -> Result<Range<u64>> {
        let (count, ranks) = (sequences.end - sequences.start, self.size() as u64);
        if count % ranks != 0 {
            return Err(Error::invalid(
                "ranks",
                format!("a multiple of {ranks} sequences, one part of equal size for each rank"),
                count.to_string(),
                "change train.micro_batch or the number of ranks",
            ));
        }
        let first = sequences.start + self.rank() as u64 * (count / ranks);
        Ok(first..first + count / ranks)
    }
}

/// A run of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleRank;

impl Collective for SingleRank {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _values: &mut [f64]) -> Result<()> {
        Ok(())
    }
}

/// One of several ranks that are threads of this process.
///
/// A rank that is dropped, because its thread failed or ended, has left: whoever still waits for it
/// gets an error. Ranks wait for one another, so that each needs a thread of its own, not one of
/// rayon's.
///
/// ```
/// use routegrad::dist::{Collective, ThreadRank};
///
/// let sums = ThreadRank::run(4, |rank| {
///     let mut values = [rank.rank() as f64, 1.0];
///     rank.sum(&mut values).map(|()| values)
/// });
/// for values in sums {
///     assert_eq!(values.unwrap(), [6.0, 4.0]);
/// }
/// ```
///
/// A model that trains as one of them is made by
/// [`Model::with_router`](crate::model::Model::with_router).
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    round: Mutex<Round>,
    changed: Condvar,
}

/// The sum under way and the one before it.
#[derive(Debug)]
struct Round {
    /// What each rank gave to the sum under way.
    given: Vec<Option<Vec<f64>>>,
    /// Sums finished.
    finished: u64,
    /// The last of them; none if the ranks gave differently many values.
    total: Option<Vec<f64>>,
    /// A rank that left.
    left: Option<usize>,
}

impl ThreadRank {
    /// Ranks 0 to `size`.
    pub fn group(size: usize) -> Vec<Self> {
        let group = Arc::new(Group {
            round: Mutex::new(Round {
                given: vec![None; size],
                finished: 0,
                total: None,
                left: None,
            }),
            changed: Condvar::new(),
        });
        let member = |rank| ThreadRank {
            rank,
            group: group.clone(),
        };
        (0..size).map(member).collect()
    }

    /// Runs `f` on `size` ranks at once and gives their answers, rank 0 first.
    ///
    /// # Panics
    /// When `f` does.
    pub fn run<R: Send>(size: usize, f: impl Fn(ThreadRank) -> R + Sync) -> Vec<R> {
        let f = &f;
        std::thread::scope(|scope| {
            let ranks = Self::group(size).into_iter();
            let threads: Vec<_> = ranks.map(|rank| scope.spawn(move || f(rank))).collect();
            let joined = threads.into_iter().map(|thread| match thread.join() {
                Ok(answer) => answer,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.collect()
        })
    }
}

impl Group {
    /// A thread that panicked with the lock has left, which the others learn from its drop.
    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Round {
    /// Ends the sum: the values are added in the order of the ranks.
    fn finish(&mut self) {
        let given = self.given.iter_mut().filter_map(Option::take);
        self.total = given
            .map(Some)
            .reduce(|sum, values| {
                let (mut sum, values) = (sum?, values?);
                (sum.len() == values.len()).then_some(())?;
                sum.iter_mut().zip(values).for_each(|(s, v)| *s += v);
                Some(sum)
            })
            .flatten();
        self.finished += 1;
    }
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.round().given.len()
    }

    fn sum(&self, values: &mut [f64]) -> Result<()> {
        let mut round = self.group.round();
        let own = round.finished;
        round.given[self.rank] = Some(values.to_vec());
        if round.given.iter().all(Option::is_some) {
            round.finish();
            self.group.changed.notify_all();
        }
        while round.finished == own {
            if let Some(left) = round.left {
                return Err(Error::invalid(
                    "sum over ranks",
                    format!("all of {} ranks", round.given.len()),
                    format!("a run that rank {left} has left"),
                    "see the error of that rank",
                ));
            }
            let waited = self.group.changed.wait(round);
            round = waited.unwrap_or_else(PoisonError::into_inner);
        }
        match &round.total {
            Some(total) if total.len() == values.len() => values.copy_from_slice(total),
            _ => {
                return Err(Error::invalid(
                    "sum over ranks",
                    "equally many values from every rank",
                    format!("{} from rank {}, others elsewhere", values.len(), self.rank),
                    "give every rank the same model and equally many micro-batches",
                ));
            }
        }
        Ok(())
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.group.round().left = Some(self.rank);
        self.group.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_summed_in_their_order_many_times_over() {
        // 1e16 + 1 − 1e16 + 1 is 1 in this order and 2, 0 or 1 in others.
        let own = [1e16, 1.0, -1e16, 1.0];
        let sums = ThreadRank::run(4, |rank| {
            (0..1000).all(|i| {
                let mut values = [own[rank.rank()], i as f64];
                rank.sum(&mut values).unwrap();
                values == [1.0, 4.0 * i as f64]
            })
        });
        assert_eq!(sums, [true; 4]);
    }

    #[test]
    fn everyone_gets_what_each_rank_has() {
        let all = ThreadRank::run(3, |rank| {
            let own = rank.rank() as f64;
            rank.gather(&[own, -own]).unwrap()
        });
        assert_eq!(all, vec![vec![0.0, 0.0, 1.0, -1.0, 2.0, -2.0]; 3]);
        assert_eq!(SingleRank.gather(&[7.0]).unwrap(), [7.0]);
    }

    #[test]
    fn a_micro_batch_is_cut_into_equal_consecutive_parts() {
        let parts = ThreadRank::group(4).into_iter().map(|r| r.part(16..24));
        let parts: Vec<_> = parts.map(Result::unwrap).collect();
        assert_eq!(parts, [16..18, 18..20, 20..22, 22..24]);
        let error = ThreadRank::group(3)[0].part(0..4).unwrap_err().to_string();
        assert!(error.contains("a multiple of 3 sequences"), "{error}");
        assert_eq!(SingleRank.part(5..8).unwrap(), 5..8);
    }

    #[test]
    fn nobody_waits_for_a_rank_that_has_left() {
        let answers = ThreadRank::run(3, |rank| match rank.rank() {
            1 => None,
            _ => Some(rank.sum(&mut [0.0]).unwrap_err().to_string()),
        });
        for answer in [&answers[0], &answers[2]] {
            // A rank that learnt it leaves too.
            assert!(answer.as_ref().unwrap().contains("has left"), "{answer:?}");
        }
        // A sum that all had joined is finished, whoever leaves behind it.
        let sums = ThreadRank::run(4, |rank| {
            let mut values = [1.0];
            rank.sum(&mut values).map(|()| values)
        });
        assert!(sums.into_iter().all(|s| s.unwrap() == [4.0]));
    }

    #[test]
    fn ranks_that_sum_different_things_all_get_an_error() {
        let errors = ThreadRank::run(3, |rank| {
            let mut values = vec![0.0; 1 + rank.rank() / 2];
            rank.sum(&mut values).unwrap_err().to_string()
        });
        assert!(
            errors.iter().all(|e| e.contains("equally many")),
            "{errors:?}"
        );
    }
}
