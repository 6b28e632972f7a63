//! Distributes a grid over the processes of a launcher: groups of ranks, each of which trains some of the runs.

use super::grid::Run;
use super::run::{one, open, say_run};
use crate::dist::{self, Collective, agree, doing};
use crate::error::{Error, Result};
use crate::report::stderr_line;
use crate::study::eval::gathered;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Trains all unfinished runs on groups of `size` ranks. Returns false if `stop` was set on a rank before the end; the
/// current runs are then saved.
///
/// # Errors
/// When `size` does not divide the number of ranks, a folder holds a different run, or a run fails for a reason other than
/// divergence.
pub fn all(
    out: &Path,
    runs: &[Run],
    ranks: &Arc<dyn Collective>,
    size: usize,
    quiet: bool,
    stop: &AtomicBool,
) -> Result<bool> {
    doing("the choice of runs");
    let first = ranks.rank() == 0;
    let found = match first {
        true => open(out, runs, quiet),
        false => Ok(Vec::new()),
    };
    // Rank 0 decides which runs are unfinished: another rank may look after a run has already started.
    let found: Vec<f64> = agree(&**ranks, found)?.iter().map(|&i| i as f64).collect();
    let open = gathered(&**ranks, &found)?.swap_remove(0);
    let open: Vec<usize> = open.map(|i| i as usize).collect();
    let dist = dist::groups(ranks, size)?;
    let (group, count) = (ranks.rank() / size, ranks.size() / size);
    let leads = dist.rank() == 0;
    if first && !quiet {
        let s = if size == 1 { "" } else { "s" };
        stderr_line(&format!("{count} runs at a time, each on {size} rank{s}"));
    }
    for &i in &share(runs, &open, count)?[group] {
        if dist::any(&*dist, stop.load(Ordering::SeqCst))? {
            break;
        }
        if leads && !quiet {
            say_run(runs, i);
        }
        let done = one(out, &runs[i], dist.clone(), quiet || count > 1, stop);
        // The other groups have not been informed yet.
        done.map_err(|e| match count {
            1 => e,
            _ => Error::invalid(
                format!("run {}", runs[i].name),
                "a run that ends, stops or diverges",
                e.to_string(),
                "correct the cause and run the same command again: it continues the runs",
            ),
        })?;
    }
    doing("waiting for the runs of other groups");
    Ok(!dist::any(&**ranks, stop.load(Ordering::SeqCst))?)
}

/// Assigns the runs to `count` groups: in order of decreasing cost, each run goes to the group with the least work.
fn share(runs: &[Run], open: &[usize], count: usize) -> Result<Vec<Vec<usize>>> {
    let mut costs = Vec::new();
    for &i in open {
        costs.push((i, runs[i].flops()?));
    }
    costs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut groups = vec![(0.0f64, Vec::new()); count];
    for (i, cost) in costs {
        let least = groups.iter_mut().min_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((load, runs)) = least {
            *load += cost;
            runs.push(i);
        }
    }
    Ok(groups.into_iter().map(|(_, runs)| runs).collect())
}
