//! Saving of checkpoints while training continues.
//!
//! Training pauses while the data to be saved is copied; a thread then writes the copy. At most one save is in
//! progress: the next save waits for it, and so does dropping the [`Saver`]. If the copy would not fit in host
//! memory, training pauses for the complete save, which then holds one array at a time.

use super::{Snapshot, save, sync};
use crate::error::{Error, Result};
use crate::report::metrics::Saved;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Instant;

/// Fraction of the free memory that a copy may use; the rest is for allocations of training during the save.
const SHARE: f64 = 0.8;

/// The location of a run's checkpoints, and how they are kept.
#[derive(Clone, Debug)]
pub struct Place {
    /// `checkpoints` of the run's folder.
    pub folder: PathBuf,
    /// Files on which a checkpoint depends. They are synced to disk before the checkpoint.
    pub logs: Vec<PathBuf>,
    /// Number of newest checkpoints to keep.
    pub keep: usize,
    /// Upper bound of the bytes of arrays per file, see [`save`].
    pub shard_bytes: u64,
}

/// Saves the checkpoints of a run.
pub struct Saver {
    place: Place,
    under_way: Option<UnderWay>,
    ended: Vec<Saved>,
}

struct UnderWay {
    /// The result of the save, without the time of the write.
    save: Saved,
    thread: JoinHandle<Result<f64>>,
}

impl Saver {
    /// Creates a saver; no save is in progress.
    pub fn new(place: Place) -> Self {
        Saver {
            place,
            under_way: None,
            ended: Vec::new(),
        }
    }

    /// Saves in the background if a copy fits in the free memory that `available` returns. If it does not fit, or
    /// `available` returns `None`, the save has ended when this function returns.
    ///
    /// # Errors
    /// Returns the error of the previous save, or of the part of this save that is done before the function returns.
    /// Earlier checkpoints do not change.
    pub fn save(
        &mut self,
        snapshot: &Snapshot,
        available: impl FnOnce() -> Option<u64>,
    ) -> Result<()> {
        let begun = Instant::now();
        // Only after this is the memory of the previous copy free.
        self.wait()?;
        if !fits(snapshot.bytes(), available()) {
            return self.write_now(snapshot, begun);
        }
        let copy = snapshot.owned()?;
        let place = self.place.clone();
        let thread = thread::Builder::new()
            .name("save".into())
            .spawn(move || write(&place, &copy))
            .map_err(|e| Error::io("start a thread to write to", &self.place.folder, e))?;
        let save = saved(snapshot, begun, true);
        self.under_way = Some(UnderWay { save, thread });
        Ok(())
    }

    /// Saves; the save has ended when this function returns.
    ///
    /// # Errors
    /// The same errors as [`save`](Self::save).
    pub fn save_now(&mut self, snapshot: &Snapshot) -> Result<()> {
        let begun = Instant::now();
        self.wait()?;
        self.write_now(snapshot, begun)
    }

    fn write_now(&mut self, snapshot: &Snapshot, begun: Instant) -> Result<()> {
        let write_seconds = write(&self.place, snapshot)?;
        self.ended.push(Saved {
            write_seconds,
            ..saved(snapshot, begun, false)
        });
        Ok(())
    }

    /// Returns the saves that have ended since the last call.
    ///
    /// # Errors
    /// Returns an error when a save failed in the background. Earlier checkpoints do not change.
    pub fn ended(&mut self) -> Result<Vec<Saved>> {
        if let Some(save) = &self.under_way
            && save.thread.is_finished()
        {
            self.wait()?;
        }
        Ok(std::mem::take(&mut self.ended))
    }

    /// Waits for the save in progress.
    fn wait(&mut self) -> Result<()> {
        let Some(UnderWay { mut save, thread }) = self.under_way.take() else {
            return Ok(());
        };
        // A panic in the thread is a bug, and is passed on.
        save.write_seconds = thread.join().unwrap_or_else(|e| resume_unwind(e))?;
        self.ended.push(save);
        Ok(())
    }
}

impl Drop for Saver {
    /// A save that was started is finished, whatever ended the run.
    fn drop(&mut self) {
        if let Some(save) = self.under_way.take() {
            // If the save fails as well, the error that ended the run is reported.
            let _ = save.thread.join();
        }
    }
}

/// Returns the report of a save for which training has paused since `begun`, without the time of the write.
fn saved(snapshot: &Snapshot, begun: Instant, background: bool) -> Saved {
    Saved {
        step: snapshot.step,
        bytes: snapshot.bytes(),
        background,
        blocked_seconds: begun.elapsed().as_secs_f64(),
        write_seconds: 0.0,
    }
}

/// Does the complete save, and returns its duration in seconds.
fn write(place: &Place, snapshot: &Snapshot) -> Result<f64> {
    let begun = Instant::now();
    place.logs.iter().try_for_each(|log| sync(log))?;
    save(&place.folder, snapshot, place.keep, place.shard_bytes)?;
    Ok(begun.elapsed().as_secs_f64())
}

fn fits(bytes: u64, available: Option<u64>) -> bool {
    available.is_none_or(|free| bytes as f64 <= SHARE * free as f64)
}

#[cfg(test)]
mod tests {
    use super::super::{Array, SHARD_BYTES, newest};
    use super::*;
    use crate::tensor::Tensor;
    use crate::tensor::dtype::DType;
    use serde_json::json;
    use std::fs;
    use std::path::Path;

    fn saver(folder: &Path) -> Saver {
        Saver::new(Place {
            folder: folder.into(),
            logs: Vec::new(),
            keep: 2,
            shard_bytes: SHARD_BYTES,
        })
    }

    fn snapshot(step: u64, weights: &Tensor) -> Snapshot<'_> {
        Snapshot {
            step,
            config: json!({}),
            model: vec![Array::borrowed("weights", weights)],
            trainer: vec![Array::borrowed("moments", weights)],
            state: json!({ "step": step }),
        }
    }

    fn weights_of_newest(folder: &Path) -> (u64, Vec<f32>) {
        let checkpoint = newest(folder).unwrap().0.unwrap();
        let mut arrays = checkpoint.model().unwrap();
        let weights = arrays.take("weights", DType::F32, [3]).unwrap();
        (checkpoint.step(), weights.slice::<f32>().to_vec())
    }

    #[test]
    fn a_save_in_the_background_holds_the_state_at_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let mut weights = Tensor::from_slice([3], &[1f32, 2.0, 3.0]);
        let mut saver = saver(dir.path());
        for step in 1..=5 {
            saver.save(&snapshot(step, &weights), || None).unwrap();
            weights.slice_mut::<f32>()[0] += 1.0;
        }
        // The saver is dropped immediately, and finishes the save.
        drop(saver);
        assert_eq!(weights_of_newest(dir.path()), (5, vec![5.0, 2.0, 3.0]));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn every_save_is_reported_once() {
        let dir = tempfile::tempdir().unwrap();
        let weights = Tensor::from_slice([3], &[1f32, 2.0, 3.0]);
        let mut saver = saver(dir.path());
        saver.save(&snapshot(1, &weights), || Some(1000)).unwrap();
        // The copy needs more than four fifths of the free memory, so this saves before it returns, after the
        // previous save.
        saver.save(&snapshot(2, &weights), || Some(29)).unwrap();
        let ended = saver.ended().unwrap();
        let told: Vec<_> = ended
            .iter()
            .map(|s| (s.step, s.bytes, s.background))
            .collect();
        assert_eq!(told, [(1, 24, true), (2, 24, false)]);
        for save in &ended {
            assert!(save.write_seconds > 0.0 && save.blocked_seconds > 0.0);
        }
        assert!(saver.ended().unwrap().is_empty());
        assert_eq!(weights_of_newest(dir.path()).0, 2);
    }

    #[test]
    fn a_save_that_fails_in_the_background_is_reported_and_the_one_before_stays() {
        let dir = tempfile::tempdir().unwrap();
        let weights = Tensor::from_slice([3], &[1f32, 2.0, 3.0]);
        let mut saver = saver(dir.path());
        saver.save_now(&snapshot(1, &weights)).unwrap();
        // A file with the name of the folder to be created.
        let obstacle = dir.path().join(".unfinished-step-2");
        fs::write(&obstacle, "").unwrap();
        saver.save(&snapshot(2, &weights), || None).unwrap();
        let e = loop {
            match saver.ended() {
                Ok(_) => thread::yield_now(),
                Err(e) => break e.to_string(),
            }
        };
        assert!(
            e.contains("cannot remove") && e.contains(".unfinished-step-2"),
            "{e}"
        );
        assert_eq!(weights_of_newest(dir.path()).0, 1);
        fs::remove_file(&obstacle).unwrap();
        saver.save(&snapshot(3, &weights), || None).unwrap();
        drop(saver);
        assert_eq!(weights_of_newest(dir.path()).0, 3);
    }
}
