//! Compares measurements with a file of earlier records and finds cases that became slower.

use super::record::{OURS, Record, Records};
use crate::report::records::Entry;

/// A case that takes longer than before.
#[derive(Clone, Debug, PartialEq)]
pub struct Slower {
    /// Name of the case.
    pub case: String,
    /// New time divided by old time.
    pub factor: f64,
    /// Whether the passes of one of the two measurements differ by more than this factor.
    pub doubtful: bool,
}

/// The result of a comparison.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Number of cases in both files with the same machine and device.
    pub compared: usize,
    /// The slower cases, slowest first.
    pub slower: Vec<Slower>,
}

/// Returns our cases in `now` that take more than `tolerance` (0.05 is 5%) longer than in `before`.
pub fn compare<'a>(
    before: &Records,
    now: impl Iterator<Item = &'a Record>,
    tolerance: f64,
) -> Comparison {
    let mut found = Comparison::default();
    for new in now.filter(|record| record.implementation == OURS) {
        let timings = before.get(&new.key()).and_then(|old| old.timing.as_ref());
        let (Some(old), Some(new_timing)) = (timings, &new.timing) else {
            continue;
        };
        found.compared += 1;
        let factor = new_timing.seconds / old.seconds;
        if factor <= 1.0 + tolerance {
            continue;
        }
        found.slower.push(Slower {
            case: new.case.clone(),
            factor,
            doubtful: !(old.repeat_ratio().max(new_timing.repeat_ratio()) <= factor),
        });
    }
    found.slower.sort_by(|a, b| b.factor.total_cmp(&a.factor));
    found
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    fn records(all: Vec<Record>) -> Records {
        let mut records = Records::open(std::path::Path::new("/nonexistent")).unwrap();
        all.into_iter().for_each(|r| records.insert(r));
        records
    }

    #[test]
    fn a_kernel_that_became_slower_is_flagged_and_a_faster_one_is_not() {
        let before = records(vec![
            record("a", OURS, 1.0),
            record("b", OURS, 1.0),
            record("c", OURS, 1.0),
        ]);
        let now = [
            record("a", OURS, 1.2),
            record("b", OURS, 1.04),
            record("c", OURS, 0.5),
        ];
        let found = compare(&before, now.iter(), 0.05);
        assert_eq!(found.compared, 3);
        let planted = Slower {
            case: "a".into(),
            factor: 1.2,
            doubtful: false,
        };
        assert_eq!(found.slower, [planted]);
        assert_eq!(compare(&before, now.iter(), 0.25).slower, []);
    }

    #[test]
    fn records_of_another_machine_or_of_a_peer_are_not_compared() {
        let before = records(vec![
            record("a", OURS, 1.0),
            record("b", "peer", 1.0),
            record("c", OURS, -1.0),
        ]);
        let elsewhere = Record {
            machine: "NVIDIA H100".into(),
            ..record("a", OURS, 9.0)
        };
        let now = [elsewhere, record("b", "peer", 9.0), record("c", OURS, 9.0)];
        assert_eq!(compare(&before, now.iter(), 0.05), Comparison::default());
    }

    #[test]
    fn a_difference_smaller_than_that_of_two_passes_is_doubtful() {
        let before = records(vec![record("a", OURS, 1.0)]);
        let mut slow = record("a", OURS, 1.1);
        if let Some(timing) = &mut slow.timing {
            timing.passes = vec![1.1, 1.5];
        }
        assert!(compare(&before, [slow].iter(), 0.05).slower[0].doubtful);
    }
}
