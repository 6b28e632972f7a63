//! Divides an analysis into independent parts, which the ranks of a run compute in turns.

use crate::dist::Collective;
use crate::error::Result;
use crate::study::eval::gathered;

/// Computes parts `0..count`, each on one rank, and returns the numbers of all parts in order. Every rank gets the same bytes.
///
/// # Errors
/// The errors of `compute`, and an error when a rank is lost.
pub fn shared_out(
    dist: &dyn Collective,
    count: usize,
    mut compute: impl FnMut(usize) -> Result<Vec<f64>>,
) -> Result<Vec<Vec<f64>>> {
    let mut own = Vec::new();
    for part in (dist.rank()..count).step_by(dist.size()) {
        let numbers = compute(part)?;
        own.push(numbers.len() as f64);
        own.extend(numbers);
    }
    let mut ranks = gathered(dist, &own)?;
    let parts = (0..count).map(|part| {
        let numbers = &mut ranks[part % dist.size()];
        let length = numbers.next().unwrap_or_default() as usize;
        numbers.take(length).collect()
    });
    Ok(parts.collect())
}

/// Does the same as [`shared_out`] for numbers that may be missing but are never NaN.
///
/// # Errors
/// The errors of [`shared_out`].
pub fn shared_out_known(
    dist: &dyn Collective,
    count: usize,
    mut compute: impl FnMut(usize) -> Result<Vec<Option<f64>>>,
) -> Result<Vec<Vec<Option<f64>>>> {
    let coded = |part| {
        let numbers = compute(part)?.into_iter();
        Ok(numbers.map(|n| n.unwrap_or(f64::NAN)).collect())
    };
    let parts = shared_out(dist, count, coded)?.into_iter();
    let known = |numbers: Vec<f64>| numbers.into_iter().map(|n| Some(n).filter(|n| !n.is_nan()));
    Ok(parts.map(|numbers| known(numbers).collect()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::{SingleRank, ThreadRank};
    use crate::error::Error;

    #[test]
    fn every_rank_gets_all_parts_in_their_order_and_each_is_computed_once() {
        // Parts of several lengths, with numbers that only their bits tell apart.
        let part = |i: usize| match i {
            1 => vec![],
            3 => vec![f64::INFINITY, -0.0],
            i => vec![1.0 / (1.0 + i as f64); i],
        };
        let bits = |parts: &[Vec<f64>]| -> Vec<Vec<u64>> {
            let parts = parts.iter();
            parts
                .map(|part| part.iter().map(|x| x.to_bits()).collect())
                .collect()
        };
        let expected: Vec<Vec<f64>> = (0..5).map(part).collect();
        let alone = shared_out(&SingleRank, 5, |i| Ok(part(i))).unwrap();
        assert_eq!(bits(&alone), bits(&expected));
        for ranks in [2, 3, 7] {
            let found = ThreadRank::run(ranks, |rank| {
                let mut computed = Vec::new();
                let compute = |i| {
                    computed.push(i);
                    Ok(part(i))
                };
                let all = shared_out(&rank, 5, compute).unwrap();
                (all, computed)
            });
            let mut computed: Vec<usize> = found.iter().flat_map(|(_, own)| own.clone()).collect();
            computed.sort_unstable();
            assert_eq!(computed, [0, 1, 2, 3, 4], "{ranks} ranks");
            for (all, _) in found {
                assert_eq!(bits(&all), bits(&expected), "{ranks} ranks");
            }
        }
        let known = |i: usize| Ok(vec![Some(i as f64), None]);
        let found = ThreadRank::run(2, |rank| shared_out_known(&rank, 3, known).unwrap());
        let expected: Vec<_> = (0..3).map(|i| vec![Some(i as f64), None]).collect();
        assert_eq!(found, vec![expected; 2]);
    }

    #[test]
    fn a_part_that_fails_on_one_rank_ends_the_others() {
        let failed = ThreadRank::run(3, |rank| {
            let compute = |i| match i {
                1 => Err(Error::invalid("part", "one thing", "another", "nothing")),
                i => Ok(vec![i as f64]),
            };
            let error = shared_out(&rank, 3, compute).unwrap_err();
            rank.leave(&error.to_string());
            error.to_string()
        });
        assert!(failed[1].contains("got another"), "{failed:?}");
        assert!(
            failed
                .iter()
                .all(|e| e.contains("one thing") || e.contains("has left"))
        );
    }
}
