//! Sums and gathers, built on the two transfers. Sums are computed in rank order.

use super::Collective;
use crate::error::{Error, Result};

/// Up to this size in bytes, every rank sums all values instead of a part of them.
const SMALL: usize = 32 << 10;

/// Size in bytes of the values of a rank that are summed at a time.
const PIECE: usize = 4 << 20;

/// See [`Collective::sum`].
pub(super) fn sum<C: Collective + ?Sized>(dist: &C, values: &mut [f64]) -> Result<()> {
    let ranks = dist.size();
    if ranks == 1 {
        return Ok(());
    }
    if size_of_val(values) <= SMALL {
        let all = gather(dist, values)?;
        add_rows(&all, values);
        return Ok(());
    }
    for piece in values.chunks_mut(PIECE / size_of::<f64>()) {
        // Rank r sums the r-th part of the piece; the last parts may be padded.
        let each = piece.len().div_ceil(ranks);
        let mut own = piece.to_vec();
        own.resize(each * ranks, 0.0);
        let mut parts = vec![0.0; each * ranks];
        dist.exchange(
            bytemuck::cast_slice(&own),
            bytemuck::cast_slice_mut(&mut parts),
        )?;
        let kept = dist.rank() * each..(dist.rank() + 1) * each;
        parts[kept.clone()].copy_from_slice(&own[kept]);
        let mut total = vec![0.0; each];
        add_rows(&parts, &mut total);
        dist.all_gather(
            bytemuck::cast_slice(&total),
            bytemuck::cast_slice_mut(&mut own),
        )?;
        piece.copy_from_slice(&own[..piece.len()]);
    }
    Ok(())
}

/// Writes the sum of the rows `[ranks, n]` to `total` `[n]`, starting with the first row.
fn add_rows(rows: &[f64], total: &mut [f64]) {
    if total.is_empty() {
        return;
    }
    let mut rows = rows.chunks(total.len());
    if let Some(first) = rows.next() {
        total.copy_from_slice(first);
    }
    for row in rows {
        total.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
}

/// See [`Collective::gather`].
pub(super) fn gather<C: Collective + ?Sized>(dist: &C, values: &[f64]) -> Result<Vec<f64>> {
    let mut all = vec![0.0; dist.size() * values.len()];
    dist.all_gather(
        bytemuck::cast_slice(values),
        bytemuck::cast_slice_mut(&mut all),
    )?;
    Ok(all)
}

/// See [`Collective::gather_bytes`].
pub(super) fn gather_bytes<C: Collective + ?Sized>(dist: &C, own: &[u8]) -> Result<Vec<Vec<u8>>> {
    let lengths = gather(dist, &[own.len() as f64])?;
    let longest = lengths.iter().fold(0.0, |most: f64, n| most.max(*n)) as usize;
    let mut padded = own.to_vec();
    padded.resize(longest, 0);
    let mut all = vec![0; longest * dist.size()];
    dist.all_gather(&padded, &mut all)?;
    let rows = lengths.iter().enumerate();
    let rows = rows.map(|(r, n)| all[r * longest..][..*n as usize].to_vec());
    Ok(rows.collect())
}

/// Returns `own`, the result of work that each rank did by itself, if all ranks succeeded. Otherwise every rank gets
/// the error of the first rank that failed.
///
/// # Errors
/// Returns that error, and the errors of [`Collective::gather_bytes`].
pub fn agree<T>(dist: &dyn Collective, own: Result<T>) -> Result<T> {
    if dist.size() == 1 {
        return own;
    }
    let text = own.as_ref().err().map(ToString::to_string);
    let all = dist.gather_bytes(text.unwrap_or_default().as_bytes())?;
    match all.iter().position(|text| !text.is_empty()) {
        None => own,
        Some(rank) => {
            let text = String::from_utf8_lossy(&all[rank]);
            Err(lost(format!("rank {rank}: {text}")))
        }
    }
}

/// Whether `flag` is set on any rank.
///
/// # Errors
/// Returns an error when a rank has left.
pub fn any(dist: &dyn Collective, flag: bool) -> Result<bool> {
    if dist.size() == 1 {
        return Ok(flag);
    }
    let mut flags = [f64::from(u8::from(flag))];
    dist.sum(&mut flags)?;
    Ok(flags[0] > 0.0)
}

/// Returns the error of a run that ended for all ranks; the rank that reports it prints the same text.
pub fn lost(text: impl Into<String>) -> Error {
    Error::Ranks {
        text: text.into(),
        cause: None,
    }
}

/// Marks an error that every rank got, so that only one of them reports it.
pub fn shared(dist: &dyn Collective, error: Error) -> Error {
    match dist.size() {
        1 => error,
        _ => Error::Ranks {
            text: error.to_string(),
            cause: Some(Box::new(error)),
        },
    }
}

/// Checks that `text` is the same on all ranks. `differ` describes a difference, given the text of rank 0 and the other
/// text; `help` says what to do.
///
/// # Errors
/// Returns an error when the texts differ, and the errors of [`Collective::gather_bytes`].
pub fn same_on_all(
    dist: &dyn Collective,
    text: &str,
    differ: impl Fn(&str, &str) -> String,
    help: &str,
) -> Result<()> {
    let all = dist.gather_bytes(text.as_bytes())?;
    let all: Vec<_> = all.iter().map(|t| String::from_utf8_lossy(t)).collect();
    let Some(rank) = all.iter().position(|t| *t != all[0]) else {
        return Ok(());
    };
    let found = format!("on rank 0 and rank {rank} {}", differ(&all[0], &all[rank]));
    let error = Error::invalid("ranks", "the same run on every rank", found, help);
    Err(shared(dist, error))
}
