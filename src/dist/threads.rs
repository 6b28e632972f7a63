//! Ranks that are threads of one process.

use super::Collective;
use super::call::{Call, Kind};
use crate::error::{Error, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// One of several ranks that are threads of this process.
///
/// A rank that is dropped, because its thread failed or ended, has left: ranks that still wait for it get an error.
/// Ranks wait for one another, so each needs its own thread; a thread of rayon's pool does not work.
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
/// [`Model::with_router`](crate::model::Model::with_router) creates a model that trains as one of these ranks.
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    size: usize,
    round: Mutex<Round>,
    changed: Condvar,
}

/// The current call and the call before it.
#[derive(Debug)]
struct Round {
    /// What each rank gave to the current call.
    given: Vec<Option<Given>>,
    /// Number of finished calls.
    finished: u64,
    /// What the ranks gave to the last finished call.
    moved: Arc<Vec<Given>>,
    /// A rank that left, and why.
    left: Option<(usize, String)>,
}

#[derive(Debug)]
struct Given {
    call: [u8; Call::BYTES],
    bytes: Vec<u8>,
}

impl ThreadRank {
    /// Creates a group of `size` ranks; rank 0 is the first.
    pub fn group(size: usize) -> Vec<Self> {
        let group = Arc::new(Group {
            size,
            round: Mutex::new(Round {
                given: (0..size).map(|_| None).collect(),
                finished: 0,
                moved: Arc::default(),
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

    /// Runs `f` on `size` ranks at the same time and returns their results, rank 0 first.
    ///
    /// # Panics
    /// Panics if `f` panics.
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

    /// Gives `bytes` to the other ranks, and calls `take` with what all ranks gave.
    fn meet(&self, kind: Kind, bytes: &[u8], take: impl FnOnce(&[Given])) -> Result<()> {
        let mut round = self.group.round();
        let own = round.finished;
        round.given[self.rank] = Some(Given {
            call: Call::new(own, kind, bytes.len()).to_bytes(),
            bytes: bytes.to_vec(),
        });
        if round.given.iter().all(Option::is_some) {
            round.moved = Arc::new(round.given.iter_mut().filter_map(Option::take).collect());
            round.finished += 1;
            self.group.changed.notify_all();
        }
        while round.finished == own {
            if let Some((left, why)) = &round.left {
                return Err(Error::invalid(
                    "collective call",
                    format!("all of {} ranks", self.group.size),
                    format!("a run that rank {left} has left{why}"),
                    "see the error of that rank",
                ));
            }
            let waited = self.group.changed.wait(round);
            round = waited.unwrap_or_else(PoisonError::into_inner);
        }
        // The next call cannot finish before this rank joins it.
        let moved = round.moved.clone();
        drop(round);
        let calls: Vec<u8> = moved.iter().flat_map(|given| given.call).collect();
        Call::compare(&calls)?;
        take(&moved);
        Ok(())
    }
}

impl Group {
    /// Ignores a poisoned lock: a rank whose thread panicked has left, and its drop tells the others.
    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, rank: usize, why: String) {
        self.round().left.get_or_insert((rank, why));
        self.changed.notify_all();
    }
}

/// Returns the rows of `all` `[size, n]`; none if n is 0.
fn rows(all: &mut [u8], size: usize) -> impl Iterator<Item = &mut [u8]> {
    let n = (all.len() / size).max(1);
    all.chunks_mut(n)
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.meet(Kind::AllGather, own, |moved| {
            let rows = rows(all, moved.len()).zip(moved);
            rows.for_each(|(to, from)| to.copy_from_slice(&from.bytes));
        })
    }

    fn exchange(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        self.meet(Kind::Exchange, own, |moved| {
            let rows = rows(all, moved.len()).zip(moved).enumerate();
            let others = rows.filter(|(rank, _)| *rank != self.rank);
            others.for_each(|(_, (to, from))| {
                to.copy_from_slice(&from.bytes[self.rank * to.len()..][..to.len()]);
            });
        })
    }

    fn shares_process(&self) -> bool {
        true
    }

    fn leave(&self, why: &str) {
        self.group.leave(self.rank, format!(": {why}"));
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.group.leave(self.rank, String::new());
    }
}
