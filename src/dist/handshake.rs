//! The handshake of a TCP connection between two ranks: each end proves that it knows the key of the run, without
//! sending the key. A connection without a valid proof is closed; it delays no rank, and the memory for such
//! connections is limited.
//!
//! The listening end sends [`MAGIC`] and a nonce. The connecting end sends its rank, the number of ranks, its own
//! nonce, and a keyed digest of these values and the first nonce. The listening end answers with a status and its own
//! keyed digest. Every message has a fixed length. The data that follows is neither encrypted nor signed.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// The secret that the ranks of a run share.
pub(super) type Key = [u8; 32];

const MAGIC: [u8; 16] = *b"routegrad ranks\n";

/// Sizes of the three messages in bytes.
const GREETING: usize = 16 + 32;
const CLAIM: usize = 8 + 8 + 32 + 32;
const ANSWER: usize = 1 + 32;

/// A connection without a proof after this time is closed.
const PATIENCE: Duration = Duration::from_secs(3);

/// Largest number of connections without a proof at a time.
const MOST: usize = 1024;

/// Status in the answer of the listening end.
const ACCEPTED: u8 = 0;
const OTHER_KEY: u8 = 1;
const OTHER_SIZE: u8 = 2;
const RANK_TAKEN: u8 = 3;

/// Returns 32 random bytes from the operating system.
///
/// # Errors
/// Returns an error when they cannot be read.
pub(super) fn random() -> Result<Key> {
    let mut bytes = [0; 32];
    let path = "/dev/urandom";
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|e| Error::io("read", path, e))?;
    Ok(bytes)
}

/// Returns the digest with which an end of a connection proves that it knows the key.
fn proof(key: &Key, end: u8, nonces: [&[u8]; 2], rank: u64, size: u64) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    let [first, second] = nonces;
    let numbers = [rank, size].map(u64::to_le_bytes);
    for part in [&[end][..], first, second, numbers.as_flattened()] {
        hasher.update(part);
    }
    hasher.finalize()
}

const LISTENING: u8 = 0;
const CONNECTING: u8 = 1;

/// The listener of rank 0, to which ranks 1 to `size` − 1 of a run connect.
pub(super) struct Acceptor {
    listener: TcpListener,
    key: Key,
    size: usize,
}

impl Acceptor {
    /// Creates the listener for a run of `size` ranks.
    ///
    /// # Errors
    /// Returns an error when the listener cannot be polled.
    pub fn new(listener: TcpListener, key: Key, size: usize) -> Result<Self> {
        listener.set_nonblocking(true).map_err(|e| broken(&e))?;
        Ok(Acceptor {
            listener,
            key,
            size,
        })
    }

    /// Returns the listener, for further connections.
    pub fn into_listener(self) -> TcpListener {
        self.listener
    }

    /// Returns a connection to each of the other ranks, in rank order.
    ///
    /// # Errors
    /// Returns an error when a connection is missing at `deadline`.
    pub fn accept_ranks(&self, deadline: Instant) -> Result<Vec<TcpStream>> {
        let mut found: Vec<Option<TcpStream>> = (1..self.size).map(|_| None).collect();
        let (mut pending, mut refused) = (Vec::new(), 0);
        loop {
            while pending.len() < MOST
                && let Ok((stream, _)) = self.listener.accept()
            {
                pending.extend(random().ok().and_then(|nonce| Pending::new(stream, nonce)));
            }
            let mut waiting = Vec::with_capacity(pending.len());
            for mut candidate in pending {
                match candidate.poll() {
                    Claim::Partial => waiting.push(candidate),
                    Claim::Failed => refused += 1,
                    Claim::Complete => refused += usize::from(!self.verify(candidate, &mut found)),
                }
            }
            pending = waiting;
            if found.iter().all(Option::is_some) {
                break;
            }
            if Instant::now() >= deadline {
                return Err(self.missing(&found, refused));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Keeps the connection of a rank with a valid proof, and closes any other. Returns whether it kept the connection.
    fn verify(&self, candidate: Pending, found: &mut [Option<TcpStream>]) -> bool {
        let Pending {
            mut stream,
            nonce,
            heard,
            ..
        } = candidate;
        let (rank, size) = (number(&heard[..8]), number(&heard[8..16]));
        let (theirs, claimed) = (&heard[16..48], &heard[48..]);
        let nonces = [&nonce[..], theirs];
        // Hashes are compared in constant time.
        let known = proof(&self.key, CONNECTING, nonces, rank, size) == *claimed;
        let place = (rank as usize)
            .checked_sub(1)
            .and_then(|i| found.get_mut(i));
        let (answer, place) = match place {
            _ if !known => (OTHER_KEY, None),
            _ if size != self.size as u64 => (OTHER_SIZE, None),
            // A rank that closed its connection before it got the answer may connect again.
            Some(place) if place.as_ref().is_none_or(is_closed) => (ACCEPTED, Some(place)),
            _ => (RANK_TAKEN, None),
        };
        let mut text = [0; ANSWER];
        text[0] = answer;
        if place.is_some() {
            let own = proof(&self.key, LISTENING, nonces, rank, size);
            text[1..].copy_from_slice(own.as_bytes());
        }
        let sent = stream.write_all(&text).is_ok() && stream.set_nonblocking(false).is_ok();
        match place.filter(|_| sent && stream.set_nodelay(true).is_ok()) {
            None => false,
            Some(place) => {
                *place = Some(stream);
                true
            }
        }
    }

    fn missing(&self, found: &[Option<TcpStream>], refused: usize) -> Error {
        let missing = found.iter().zip(1..).filter(|(line, _)| line.is_none());
        let missing: Vec<String> = missing.map(|(_, rank)| rank.to_string()).collect();
        let refused = match refused {
            0 => String::new(),
            n => format!("; connections without a valid proof: {n}"),
        };
        Error::invalid(
            "ranks",
            format!("a connection from each of {} other ranks", self.size - 1),
            format!("none from {}{refused}", missing.join(", ")),
            "check that they have started, and that their hosts can connect to the host of rank 0 by TCP; --rank-timeout gives more time",
        )
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}

/// Whether the other end has closed a connection.
fn is_closed(stream: &TcpStream) -> bool {
    let polled = stream.set_nonblocking(true);
    let peeked = polled.and_then(|()| stream.peek(&mut [0]));
    let _ = stream.set_nonblocking(false);
    match peeked {
        Ok(n) => n == 0,
        Err(e) => e.kind() != ErrorKind::WouldBlock,
    }
}

/// A connection without a proof so far.
struct Pending {
    stream: TcpStream,
    nonce: Key,
    heard: [u8; CLAIM],
    count: usize,
    since: Instant,
}

enum Claim {
    Partial,
    Complete,
    /// The connection has closed, or takes too long.
    Failed,
}

impl Pending {
    fn new(mut stream: TcpStream, nonce: Key) -> Option<Self> {
        stream.set_nonblocking(true).ok()?;
        let mut greeting = [0; GREETING];
        greeting[..16].copy_from_slice(&MAGIC);
        greeting[16..].copy_from_slice(&nonce);
        stream.write_all(&greeting).ok()?;
        Some(Pending {
            stream,
            nonce,
            heard: [0; CLAIM],
            count: 0,
            since: Instant::now(),
        })
    }

    fn poll(&mut self) -> Claim {
        match self.stream.read(&mut self.heard[self.count..]) {
            Ok(n @ 1..) => self.count += n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            _ => return Claim::Failed,
        }
        match self.count == CLAIM {
            true => Claim::Complete,
            false if self.since.elapsed() > PATIENCE => Claim::Failed,
            false => Claim::Partial,
        }
    }
}

/// Connects rank `rank` of `size` to rank 0, which listens or will listen at one of `addresses`. Error messages show
/// `named` for the addresses.
///
/// # Errors
/// Returns an error when rank 0 refuses the connection, or does not listen until `deadline`.
pub(super) fn connect_to_rank_0(
    addresses: &[SocketAddr],
    named: &str,
    key: &Key,
    [rank, size]: [usize; 2],
    deadline: Instant,
) -> Result<TcpStream> {
    let failed = |got: String, help: &str| {
        let expected = format!("a connection of rank {rank} to rank 0 at {named}");
        Err(Error::invalid("ranks", expected, got, help))
    };
    loop {
        let mut last = "no such address".to_string();
        for address in addresses {
            match attempt(address, key, rank as u64, size as u64) {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(refusal)) => {
                    let help = "give every process of the run the same environment, except for its rank, and start no other run with this address";
                    return failed(refusal.into(), help);
                }
                Err(e) => last = e.to_string(),
            }
        }
        if Instant::now() >= deadline {
            return failed(
                last,
                "check that rank 0 has started and has printed no error, and that the hosts of the ranks can connect to its host by TCP",
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Tries to connect once. Returns the connection or the refusal of the other end. After an I/O error another attempt
/// may succeed.
fn attempt(
    address: &SocketAddr,
    key: &Key,
    rank: u64,
    size: u64,
) -> std::io::Result<std::result::Result<TcpStream, &'static str>> {
    let other = |what: &str| std::io::Error::new(ErrorKind::InvalidData, what);
    let mut stream = TcpStream::connect_timeout(address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; GREETING];
    stream.read_exact(&mut greeting)?;
    let (magic, nonce) = greeting.split_at(16);
    if magic != MAGIC {
        return Err(other("another program listens there"));
    }
    let own = random().map_err(|e| other(&e.to_string()))?;
    let nonces = [nonce, &own[..]];
    let mut claim = Vec::with_capacity(CLAIM);
    claim.extend(rank.to_le_bytes());
    claim.extend(size.to_le_bytes());
    claim.extend(own);
    claim.extend(proof(key, CONNECTING, nonces, rank, size).as_bytes());
    stream.write_all(&claim)?;
    let mut answer = [0; ANSWER];
    stream.read_exact(&mut answer)?;
    let refusal = match answer[0] {
        ACCEPTED if proof(key, LISTENING, nonces, rank, size) == answer[1..] => {
            stream.set_read_timeout(None)?;
            return Ok(Ok(stream));
        }
        ACCEPTED => "the program that listens there does not know the run's token",
        OTHER_KEY => "rank 0 belongs to another run: the token differs",
        OTHER_SIZE => "rank 0 expects another number of ranks",
        _ => "rank 0 already has a process of this rank, or expects none",
    };
    Ok(Err(refusal))
}

pub(super) fn broken(e: &std::io::Error) -> Error {
    let help = "check the network between the hosts of the ranks";
    Error::invalid("ranks", "a TCP connection", e.to_string(), help)
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
