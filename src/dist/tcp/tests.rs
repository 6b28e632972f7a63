//! Tests calls between ranks that are threads, each with its own TCP connections.

use super::*;
use crate::dist::ThreadRank;
use crate::dist::processes::Processes;

const LIMIT: Duration = Duration::from_secs(30);

/// Returns the results of `f` on `size` ranks that TCP connects.
fn on_ranks<R: Send>(size: usize, f: impl Fn(&Processes) -> R + Sync) -> Vec<R> {
    let free = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let (f, port) = (&f, &port);
    std::thread::scope(|scope| {
        let start = |rank: usize| {
            let read = move |name: &str| match name {
                "RANK" => Some(rank.to_string()),
                "WORLD_SIZE" => Some(size.to_string()),
                "MASTER_ADDR" => Some("127.0.0.1".into()),
                "MASTER_PORT" => Some("1".into()),
                place::PORT => Some(port.clone()),
                _ => None,
            };
            scope.spawn(move || {
                let meeting = Rendezvous::of(&read).unwrap();
                let (star, hub) = Star::start(&meeting, LIMIT).unwrap();
                let ranks = Processes::connect(
                    Box::new(star),
                    ["here".into(), "here".into()],
                    Some(hub),
                    LIMIT,
                );
                let ranks = ranks.unwrap();
                let answer = f(&ranks);
                ranks.finish().unwrap();
                answer
            })
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Makes calls of all kinds, with few bytes and with more bytes than a piece, and returns what a rank receives.
fn calls(dist: &dyn Collective) -> Vec<u8> {
    let (rank, size) = (dist.rank(), dist.size());
    let mut got = Vec::new();
    for n in [0, 1, 1000, PIECE + 13] {
        let own: Vec<u8> = (0..n * size).map(|i| (i * 7 + rank * 31) as u8).collect();
        let mut all = vec![0; n * size];
        dist.all_gather(&own[..n], &mut all).unwrap();
        got.extend(&all);
        dist.exchange(&own, &mut all).unwrap();
        got.extend(&all);
        dist.barrier().unwrap();
    }
    let mut values: Vec<f64> = (0..5000).map(|i| 1.0 / (1 + i + rank) as f64).collect();
    dist.sum(&mut values).unwrap();
    got.extend(values.into_iter().flat_map(f64::to_le_bytes));
    got
}

#[test]
fn calls_give_the_same_bytes_as_calls_between_threads() {
    for size in [2, 3] {
        let by_tcp = on_ranks(size, |ranks| calls(ranks));
        let by_threads = ThreadRank::run(size, |rank| calls(&rank));
        assert!(by_tcp == by_threads, "{size} ranks");
    }
}

#[test]
fn groups_make_calls_independently() {
    let sums = on_ranks(4, |ranks| {
        let group = ranks.group(2).unwrap();
        let mut values = [ranks.rank() as f64];
        // The second group makes more calls than the first.
        for _ in 0..=ranks.rank() / 2 {
            group.sum(&mut values).unwrap();
        }
        ranks.group(1).unwrap().sum(&mut values).unwrap();
        (group.rank(), values[0])
    });
    assert_eq!(sums, [(0, 1.0), (1, 1.0), (0, 10.0), (1, 10.0)]);
}

#[test]
fn different_calls_are_an_error_on_all_ranks() {
    let errors = on_ranks(2, |ranks| {
        let group = ranks.group(2).unwrap();
        let own = vec![0; 8 + ranks.rank()];
        let mut all = vec![0; 2 * own.len()];
        group.all_gather(&own, &mut all).unwrap_err().to_string()
    });
    for error in errors {
        assert!(
            error.contains("of 8 bytes on rank 0") && error.contains("of 9 bytes on rank 1"),
            "{error}"
        );
    }
}
