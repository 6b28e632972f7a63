//! Agreement between the ranks of a run: that they belong to one run, from which checkpoint it resumes, and when it
//! stops.

use super::checkpoint::{self, Checkpoint};
use crate::config::Config;
use crate::dist::{self, Collective, agree, doing, same_on_all};
use crate::error::{Error, Result};
use crate::report::files::UNFINISHED;
use crate::report::version;
use std::fs;
use std::path::Path;

/// Checks that all ranks have the same program and configuration, and that they can divide the batch.
///
/// # Errors
/// Returns an error when programs or configurations differ, or the batch cannot be divided.
pub(super) fn check(dist: &dyn Collective, config: &Config) -> Result<()> {
    if dist.size() == 1 {
        return Ok(());
    }
    doing("the comparison of programs and configurations");
    check_alike(dist, config)?;
    let shared = dist.part(0..config.train.micro_batch as u64);
    shared.map(drop).map_err(|e| dist::shared(dist, e))
}

/// Refuses ranks of different programs or configurations.
///
/// # Errors
/// When there are some.
pub(crate) fn check_alike(dist: &dyn Collective, config: &Config) -> Result<()> {
    if dist.size() == 1 {
        return Ok(());
    }
    let program = format!("{} ({})", version::program(), program_digest());
    let both = |a: &str, b: &str| format!("the programs {a} and {b}");
    let help = "start every rank with the same program";
    same_on_all(dist, &program, both, help)?;
    let help = "start every rank with the same arguments and files";
    same_on_all(dist, &config.to_toml()?, first_difference, help)
}

/// Checks that all ranks read the same text.
///
/// # Errors
/// Returns an error when the ranks read different text.
pub(crate) fn check_data(dist: &dyn Collective, fingerprint: &str) -> Result<()> {
    let both = |a: &str, b: &str| format!("data with the digests {a} and {b}");
    let help = "give every host the same files of data.source";
    same_on_all(dist, fingerprint, both, help)
}

/// Returns a short digest of the program's file.
fn program_digest() -> String {
    let read = || fs::read(std::env::current_exe().ok()?).ok();
    let digest = read().map(|bytes| blake3::hash(&bytes).to_hex().as_str()[..16].to_string());
    digest.unwrap_or_else(|| "unreadable".into())
}

/// Returns the first key whose values differ between two configurations.
fn first_difference(a: &str, b: &str) -> String {
    let lines = |text: &str| -> Vec<String> {
        let mut section = String::new();
        let keyed = text.lines().filter_map(|line| {
            match line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                Some(name) => {
                    section = format!("{name}.");
                    None
                }
                None if line.trim().is_empty() => None,
                None => Some(format!("{section}{line}")),
            }
        });
        keyed.collect()
    };
    let (a, b) = (lines(a), lines(b));
    let missing = || "nothing".to_string();
    let only = |of: &[String], other: &[String]| of.iter().find(|l| !other.contains(l)).cloned();
    let (in_a, in_b) = (only(&a, &b), only(&b, &a));
    let (in_a, in_b) = (in_a.unwrap_or_else(missing), in_b.unwrap_or_else(missing));
    format!("the configurations `{in_a}` and `{in_b}`")
}

/// Checks that all ranks can access the run's folder, which must exist.
///
/// # Errors
/// Returns an error when a rank cannot access it, or a file cannot be written.
pub(super) fn check_folder(dist: &dyn Collective, out: &Path) -> Result<()> {
    if dist.size() == 1 {
        return Ok(());
    }
    doing("the test of the run's folder");
    let path = out.join(format!("{UNFINISHED}shared"));
    let token = format!("{} {:?}", std::process::id(), std::time::SystemTime::now());
    let written = match dist.rank() {
        0 => fs::write(&path, &token).map_err(|e| Error::io("write", &path, e)),
        _ => Ok(()),
    };
    agree(dist, written)?;
    let tokens = dist.gather_bytes(token.as_bytes())?;
    let seen = match fs::read(&path).is_ok_and(|found| found == tokens[0]) {
        true => Ok(()),
        false => Err(Error::invalid(
            "ranks",
            format!("the folder of rank 0, {}", out.display()),
            "another folder of that name, or none",
            "set --out to a folder on a file system that all hosts share",
        )),
    };
    let seen = agree(dist, seen);
    if dist.rank() == 0 {
        // If this fails, the file stays; the next check replaces it.
        let _ = fs::remove_file(&path);
    }
    seen
}

/// Returns the newest complete checkpoint in `folder`, and an error for each newer one. If all checkpoints are
/// damaged, it returns an error and changes nothing, because a run from the start would overwrite checkpoints that
/// could perhaps be repaired.
fn one_whole(folder: &Path) -> Result<(Option<Checkpoint>, Vec<Error>)> {
    let (found, damaged) = checkpoint::newest(folder)?;
    if found.is_some() || damaged.is_empty() {
        return Ok((found, damaged));
    }
    let reasons: Vec<String> = damaged.iter().map(ToString::to_string).collect();
    Err(Error::file(
        folder,
        "a complete checkpoint",
        format!("{} damaged: {}", damaged.len(), reasons.join("; ")),
        "restore a complete checkpoint; to begin again, choose another --name or --out, or move the run's folder",
    ))
}

/// Returns the newest complete checkpoint in `folder`, as determined by rank 0, and an error for each newer one.
///
/// # Errors
/// Returns an error when a rank cannot read it.
pub(super) fn newest(
    dist: &dyn Collective,
    folder: &Path,
) -> Result<(Option<Checkpoint>, Vec<Error>)> {
    if dist.size() == 1 {
        return one_whole(folder);
    }
    doing("the choice of a checkpoint");
    let found = match dist.rank() {
        0 => one_whole(folder),
        _ => Ok((None, Vec::new())),
    };
    let found = agree(dist, found)?;
    let step = found.0.as_ref().map_or(-1.0, |c| c.step() as f64);
    let step = dist.gather(&[step])?[0];
    if dist.rank() == 0 || !(step >= 0.0) {
        return Ok(found);
    }
    let own = Checkpoint::open(&folder.join(format!("step-{step}")))?;
    Ok((Some(own), Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::ThreadRank;

    #[test]
    fn the_first_key_that_differs_is_named_with_its_section() {
        let a = "name = 1\n\n[train]\nsteps = 8\nseed = 1\n";
        let b = "name = 1\n\n[train]\nsteps = 9\nseed = 1\n";
        let found = first_difference(a, b);
        assert_eq!(
            found,
            "the configurations `train.steps = 8` and `train.steps = 9`"
        );
    }

    #[test]
    fn a_folder_that_one_rank_does_not_see_is_refused_by_all() {
        let place = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let fine = ThreadRank::run(3, |rank| check_folder(&rank, place.path()).is_ok());
        assert_eq!(fine, [true; 3]);
        let errors = ThreadRank::run(3, |rank| {
            let folder = [place.path(), place.path(), other.path()][rank.rank()];
            check_folder(&rank, folder).unwrap_err().to_string()
        });
        let expected = "rank 2: ranks: expected the folder of rank 0";
        assert!(errors.iter().all(|e| e.contains(expected)), "{errors:?}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_rank_that_stops_stops_all() {
        let stopped = ThreadRank::run(3, |rank| dist::any(&rank, rank.rank() == 1).unwrap());
        assert_eq!(stopped, [true; 3]);
        let none = ThreadRank::run(3, |rank| dist::any(&rank, false).unwrap());
        assert_eq!(none, [false; 3]);
    }
}
