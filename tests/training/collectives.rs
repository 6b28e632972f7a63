//! Ranks that are threads sum and gather in their order, and none waits for one that left or makes another call.

use routegrad::dist::{Collective, SingleRank, ThreadRank, agree, doing, same_on_all};
use routegrad::error::{Error, Result};

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
fn a_sum_of_many_values_has_the_bytes_of_a_sum_of_few() {
    // Several pieces, the last one not a multiple of the ranks.
    let value = |rank: usize, i: usize| (1.0 + rank as f64 * 0.37) / (1.0 + i as f64);
    let n = 600_001;
    let sums = ThreadRank::run(3, |rank| {
        let mut many: Vec<f64> = (0..n).map(|i| value(rank.rank(), i)).collect();
        rank.sum(&mut many).unwrap();
        many
    });
    let exact: Vec<f64> = (0..n)
        .map(|i| value(0, i) + value(1, i) + value(2, i))
        .collect();
    assert!(sums.iter().all(|s| *s == exact));
}

#[test]
fn everyone_gets_what_each_rank_has() {
    let all = ThreadRank::run(3, |rank| {
        let own = rank.rank() as f64;
        rank.gather(&[own, -own]).unwrap()
    });
    assert_eq!(all, vec![vec![0.0, 0.0, 1.0, -1.0, 2.0, -2.0]; 3]);
    assert_eq!(SingleRank.gather(&[7.0]).unwrap(), [7.0]);
    let texts = ThreadRank::run(3, |rank| {
        let own = vec![b'x'; rank.rank() * 2];
        rank.gather_bytes(&own).unwrap()
    });
    assert_eq!(texts, vec![vec![vec![], vec![b'x'; 2], vec![b'x'; 4]]; 3]);
}

#[test]
fn an_exchange_transposes_what_ranks_send_one_another_and_leaves_the_own_row() {
    let got = ThreadRank::run(3, |rank| {
        let own: Vec<u8> = (0..6).map(|i| 10 * rank.rank() as u8 + i / 2).collect();
        let mut all = [99; 6];
        rank.exchange(&own, &mut all).unwrap();
        all
    });
    for (rank, got) in got.into_iter().enumerate() {
        let from = |other: usize| match other == rank {
            true => 99,
            false => 10 * other as u8 + rank as u8,
        };
        let expected: Vec<u8> = (0..3).flat_map(|other| [from(other); 2]).collect();
        assert_eq!(got[..], expected);
    }
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
        1 => {
            rank.leave("its disk is full");
            None
        }
        _ => Some(rank.sum(&mut [0.0]).unwrap_err().to_string()),
    });
    for answer in [&answers[0], &answers[2]] {
        // A rank that learnt it leaves too.
        assert!(answer.as_ref().unwrap().contains("has left"), "{answer:?}");
    }
    assert!(
        answers
            .iter()
            .flatten()
            .any(|a| a.contains("its disk is full"))
    );
    // A sum that all had joined is finished, whoever leaves behind it.
    let sums = ThreadRank::run(4, |rank| {
        let mut values = [1.0];
        rank.sum(&mut values).map(|()| values)
    });
    assert!(sums.into_iter().all(|s| s.unwrap() == [4.0]));
}

#[test]
fn ranks_that_make_different_calls_all_get_the_same_error() {
    let errors = ThreadRank::run(3, |rank| {
        doing(format!("the test on rank {}", rank.rank()));
        let mut values = vec![0.0; 1 + rank.rank() / 2];
        rank.sum(&mut values).unwrap_err().to_string()
    });
    let expected = "call 0, all_gather of 8 bytes (the test on rank 0) on rank 0, \
                    call 0, all_gather of 16 bytes (the test on rank 2) on rank 2";
    assert!(errors.iter().all(|e| e.contains(expected)), "{errors:?}");
    let errors = ThreadRank::run(2, |rank| {
        let (own, mut all) = ([0; 4], [0; 8]);
        match rank.rank() {
            0 => rank.all_gather(&own, &mut all).unwrap_err(),
            _ => rank.exchange(&all.clone(), &mut all).unwrap_err(),
        }
        .to_string()
    });
    let expected = "exchange of 8 bytes";
    assert!(errors.iter().all(|e| e.contains(expected)), "{errors:?}");
}

#[test]
fn the_error_of_one_rank_is_that_of_all() {
    let errors = ThreadRank::run(3, |rank| {
        let own = match rank.rank() {
            1 => Err(Error::invalid("test", "one thing", "another", "nothing")),
            r => Ok(r),
        };
        agree(&rank, own).unwrap_err().to_string()
    });
    let expected = "rank 1: test: expected one thing, got another; nothing";
    assert!(errors.iter().all(|e| e == expected), "{errors:?}");
    let fine = ThreadRank::run(3, |rank| agree(&rank, Ok(rank.rank())).unwrap());
    assert_eq!(fine, [0, 1, 2]);
}

#[test]
fn ranks_of_different_runs_are_refused_with_the_difference() {
    let errors = ThreadRank::run(3, |rank| {
        let text = ["a = 1", "a = 1", "a = 2"][rank.rank()];
        let differ = |a: &str, b: &str| format!("{a} and {b}");
        let found = same_on_all(&rank, text, differ, "give all the same");
        found.unwrap_err().to_string()
    });
    let expected = "on rank 0 and rank 2 a = 1 and a = 2";
    assert!(errors.iter().all(|e| e.contains(expected)), "{errors:?}");
}
