//! Messages between a rank and the hub: lines of JSON on a TCP connection.

use crate::dist::handshake::{Acceptor, Key, broken, connect_to_rank_0};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A message that is not sent within this time is given up: its rank is stopped or its host gone.
const SEND: Duration = Duration::from_secs(1);

/// No line is longer; whoever sends more is no rank.
const LONGEST: u64 = 1 << 16;

#[derive(Serialize, Deserialize)]
pub(super) enum Message {
    /// What a rank is doing.
    Beat {
        calls: u64,
        inside: bool,
        what: String,
        alone: bool,
        /// From rank 0: the other ranks that work alone.
        others_alone: Vec<usize>,
    },
    /// Call number `call` of those begun takes too long.
    Late { call: u64 },
    /// A rank met an error.
    Failed { why: String },
    /// The run ends.
    End { text: String, reporter: usize },
    /// The rank has finished.
    Done,
}

/// Where ranks find the hub.
pub(in super::super) enum Meeting {
    /// On rank 0.
    Accept(Acceptor),
    /// On the others: the host and port of rank 0, and what it asks for.
    Connect { host: String, port: u16, key: Key },
}

impl Meeting {
    /// The lines: to every other rank on rank 0, to rank 0 on the others.
    pub(super) fn connect(self, rank: usize, size: usize, limit: Duration) -> Result<Vec<Line>> {
        let deadline = Instant::now() + limit;
        match self {
            Meeting::Accept(acceptor) => {
                let streams = acceptor.accept_ranks(deadline)?.into_iter().zip(1..);
                streams
                    .map(|(stream, peer)| Line::new(peer, stream))
                    .collect()
            }
            Meeting::Connect { host, port, key } => {
                let found = (host.as_str(), port).to_socket_addrs();
                let addresses: Vec<_> = found.map_err(|e| broken(&e))?.collect();
                let named = format!("{host}, port {port}");
                let stream = connect_to_rank_0(&addresses, &named, &key, [rank, size], deadline)?;
                Ok(vec![Line::new(0, stream)?])
            }
        }
    }
}

/// The connection to one rank.
pub(super) struct Line {
    pub peer: usize,
    stream: Mutex<TcpStream>,
}

/// Its other direction.
pub(super) struct Reader(BufReader<TcpStream>);

impl Line {
    fn new(peer: usize, stream: TcpStream) -> Result<Self> {
        let prepared = stream.set_write_timeout(Some(SEND));
        prepared.map_err(|e| broken(&e))?;
        Ok(Line {
            peer,
            stream: Mutex::new(stream),
        })
    }

    pub fn reader(&self) -> Result<Reader> {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = stream.try_clone().map_err(|e| broken(&e))?;
        Ok(Reader(BufReader::new(stream)))
    }

    /// A message that cannot be sent is none: that the line is closed or silent is found where it is read.
    pub fn send(&self, message: &Message) {
        let Ok(mut text) = serde_json::to_string(message) else {
            return;
        };
        text.push('\n');
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.write_all(text.as_bytes());
    }
}

impl Reader {
    /// Hands on each message until the line is closed.
    pub fn each(mut self, mut receive: impl FnMut(Message)) {
        let mut text = Vec::new();
        loop {
            text.clear();
            match (&mut self.0).take(LONGEST).read_until(b'\n', &mut text) {
                Ok(n) if n > 0 => {}
                _ => return,
            }
            match serde_json::from_slice(&text) {
                Ok(message) => receive(message),
                Err(_) => return,
            }
        }
    }
}
