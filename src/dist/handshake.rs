//! The handshake of a TCP connection between two ranks: each end proves that it knows the run's key, without sending it. A
//! connection that cannot is closed, and costs the ranks neither time nor memory.
//!
//! The listening end sends [`MAGIC`] and a nonce; the other end its rank, the number of ranks, a nonce of its own and a
//! keyed digest of all; the listening end answers with another one. Every message has a fixed length. What follows on the
//! connection is neither encrypted nor signed.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// The secret that the ranks of a run share.
pub(super) type Key = [u8; 32];

const MAGIC: [u8; 16] = *b"routegrad ranks\n";

/// Bytes of the three messages.
const GREETING: usize = 16 + 32;
const CLAIM: usize = 8 + 8 + 32 + 32;
const ANSWER: usize = 1 + 32;

/// A connection that has not proved itself so long after it was made is closed.
const PATIENCE: Duration = Duration::from_secs(3);

/// Unproven connections at a time, at most.
const MOST: usize = 1024;

/// What the listening end answers.
const ACCEPTED: u8 = 0;
const OTHER_KEY: u8 = 1;
const OTHER_SIZE: u8 = 2;
const RANK_TAKEN: u8 = 3;

/// 32 random bytes of the system.
///
/// # Errors
/// When it has none.
pub(super) fn random() -> Result<Key> {
    let mut bytes = [0; 32];
    let path = "/dev/urandom";
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|e| Error::io("read", path, e))?;
    Ok(bytes)
}

/// What an end of a connection proves its knowledge with.
fn proof(key: &Key, end: u8, nonces: [&[u8]; 2], rank: u64, size: u64) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&[end]);
    nonces.iter().for_each(|nonce| {
        hasher.update(nonce);
    });
    hasher.update(&rank.to_le_bytes());
    hasher.update(&size.to_le_bytes());
    hasher.finalize()
}

const LISTENING: u8 = 0;
const CONNECTING: u8 = 1;

/// Where ranks 1 to `size` of a run connect to rank 0.
pub(super) struct Acceptor {
    listener: TcpListener,
    key: Key,
    size: usize,
}

impl Acceptor {
    /// # Errors
    /// When the listener cannot be polled.
    pub fn new(listener: TcpListener, key: Key, size: usize) -> Result<Self> {
        listener.set_nonblocking(true).map_err(|e| broken(&e))?;
        Ok(Acceptor {
            listener,
            key,
            size,
        })
    }

    /// The listener, for further connections.
    pub fn into_listener(self) -> TcpListener {
        self.listener
    }

    /// A connection to each of the other ranks, in their order.
    ///
    /// # Errors
    /// When one is missing at `deadline`.
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

    /// Keeps the connection of a rank that proved to be one, and closes any other.
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
        let known = proof(&self.key, CONNECTING, nonces, rank, size) == *slice_32(claimed);
        let place = (rank as usize)
            .checked_sub(1)
            .and_then(|i| found.get_mut(i));
        let (answer, place) = match place {
            _ if !known => (OTHER_KEY, None),
            _ if size != self.size as u64 => (OTHER_SIZE, None),
            // One that gave up before it was answered may call again.
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
            n => format!("; {n} others did not prove to be ranks of this run"),
        };
        Error::invalid(
            "ranks",
            format!("a connection from each of {} other ranks", self.size - 1),
            format!("none from {}{refused}", missing.join(", ")),
            "see whether they have started, and let their hosts connect to rank 0's by TCP; --rank-timeout gives more time",
        )
    }
}

fn slice_32(bytes: &[u8]) -> &[u8; 32] {
    bytes.first_chunk().unwrap_or(&[0; 32])
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

/// A connection that has not proved itself yet.
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

/// Connects rank `rank` of `size` to rank 0, which listens, or will, at one of `addresses`; `named` is how to call them.
///
/// # Errors
/// When rank 0 refuses, or is not there at `deadline`.
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
                    let help = "give every process of the run the same environment, but for its rank, and start no other there";
                    return failed(refusal.into(), help);
                }
                Err(e) => last = e.to_string(),
            }
        }
        if Instant::now() >= deadline {
            return failed(
                last,
                "see whether rank 0 has started and says why it ended, and let the hosts of the ranks connect to rank 0's by TCP",
            );
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// One attempt: the connection, or the other end's refusal. An error is worth another attempt.
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
        ACCEPTED if proof(key, LISTENING, nonces, rank, size) == *slice_32(&answer[1..]) => {
            stream.set_read_timeout(None)?;
            return Ok(Ok(stream));
        }
        ACCEPTED => "what listens there does not know the run's token",
        OTHER_KEY => "rank 0 is of another run: the token differs",
        OTHER_SIZE => "rank 0 expects another number of ranks",
        _ => "rank 0 has a process of this rank already, or expects none",
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
