//! Which connections are accepted, and which are refused.

use super::*;
use std::sync::mpsc;

const KEY: Key = [7; 32];

fn acceptor(size: usize) -> (Acceptor, SocketAddr) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (Acceptor::new(listener, KEY, size).unwrap(), address)
}

fn soon(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

fn call(address: SocketAddr, key: Key, rank: usize, size: usize) -> Result<TcpStream> {
    connect_to_rank_0(&[address], "here", &key, [rank, size], soon(5))
}

/// Returns the answer to a claim of rank 1 of 3; a `replayed` claim was made for another connection.
fn claimed(address: SocketAddr, replayed: bool) -> u8 {
    let (mut first, mut second) = (
        TcpStream::connect(address).unwrap(),
        TcpStream::connect(address).unwrap(),
    );
    let mut greetings = [[0; GREETING]; 2];
    first.read_exact(&mut greetings[0]).unwrap();
    second.read_exact(&mut greetings[1]).unwrap();
    assert!(greetings[0][16..] != greetings[1][16..]);
    let nonces = [&greetings[usize::from(!replayed)][16..], &[9; 32]];
    let mut claim = [1u64.to_le_bytes(), 3u64.to_le_bytes()].concat();
    claim.extend([9; 32]);
    claim.extend(proof(&KEY, CONNECTING, nonces, 1, 3).as_bytes());
    second.write_all(&claim).unwrap();
    let mut answer = [0; ANSWER];
    second.read_exact(&mut answer).unwrap();
    answer[0]
}

#[test]
fn ranks_with_the_key_are_accepted_among_foreign_connections() {
    let (acceptor, address) = acceptor(3);
    let (done, ended) = mpsc::channel();
    let ranks = thread::spawn(move || {
        let begun = Instant::now();
        // Connections that send nothing, a few bytes, and more bytes than a claim has.
        let idle = TcpStream::connect(address).unwrap();
        let strangers = [&b"GET /"[..], &[b'x'; 4096]].map(|words| {
            let mut stranger = TcpStream::connect(address).unwrap();
            let _ = stranger.write_all(words);
            stranger
        });
        let error = |key, rank, size| call(address, key, rank, size).unwrap_err().to_string();
        assert!(error([8; 32], 1, 3).contains("the token differs"));
        assert!(error(KEY, 1, 4).contains("another number of ranks"));
        assert!(error(KEY, 3, 3).contains("already has a process of this rank, or expects none"));
        assert_eq!(claimed(address, true), OTHER_KEY);
        let second = call(address, KEY, 2, 3).unwrap();
        assert!(error(KEY, 2, 3).contains("already has a process of this rank"));
        // A rank that closed its connection may connect again.
        drop(second);
        let second = call(address, KEY, 2, 3).unwrap();
        let first = call(address, KEY, 1, 3).unwrap();
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        ended.recv().unwrap();
        drop((idle, strangers));
        [first, second]
    });
    let admitted = acceptor.accept_ranks(soon(20)).unwrap();
    done.send(()).unwrap();
    for (mut inside, mut outside) in admitted.into_iter().zip(ranks.join().unwrap()) {
        inside.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        outside.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
    }
}

#[test]
fn a_claim_made_for_its_own_connection_is_accepted() {
    let (acceptor, address) = acceptor(3);
    let admitting = thread::spawn(move || acceptor.accept_ranks(soon(1)));
    assert_eq!(claimed(address, false), ACCEPTED);
    let error = admitting.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("none from 2"), "{error}");
}

#[test]
fn missing_ranks_are_named_with_the_number_of_foreign_connections() {
    let (acceptor, address) = acceptor(4);
    drop(TcpStream::connect(address).unwrap());
    let rank = thread::spawn(move || call(address, KEY, 2, 4));
    let error = acceptor.accept_ranks(soon(1)).err().unwrap().to_string();
    assert!(
        error.contains("none from 1, 3; connections without a valid proof: 1"),
        "{error}"
    );
    rank.join().unwrap().unwrap();
}

#[test]
fn a_rank_does_not_trust_a_listener_without_the_key() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let foreign = thread::spawn(move || {
        for words in [[&MAGIC[..], &[0; 32]].concat(), b"SSH-2.0".repeat(20)] {
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(&words).unwrap();
            let mut claim = [0; CLAIM];
            if stream.read_exact(&mut claim).is_ok() {
                stream.write_all(&[0; ANSWER]).unwrap();
            }
        }
    });
    let error = call(address, KEY, 1, 2).unwrap_err().to_string();
    assert!(error.contains("does not know the run's token"), "{error}");
    let error = connect_to_rank_0(&[address], "here", &KEY, [1, 2], Instant::now());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("another program listens there"), "{error}");
    foreign.join().unwrap();
}
