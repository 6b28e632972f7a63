//! Messages between a rank and the hub: lines of JSON on a TCP connection.

use crate::dist::handshake::{Acceptor, Key, broken, connect_to_rank_0};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time limit for sending a message. A message takes longer if the other rank is stopped or its host is lost.
const SEND: Duration = Duration::from_secs(1);

/// Longest line in bytes. A rank sends no longer lines.
const LONGEST: u64 = 1 << 16;

/// Longest reason for the end of a run in characters. In JSON a character has at most 6 bytes, so that a message with a reason
/// is shorter than [`LONGEST`].
pub(super) const LONGEST_REASON: usize = 8000;

#[derive(Serialize, Deserialize)]
pub(super) enum Message {
    /// A heartbeat, with what the rank is doing.
    Beat {
        calls: u64,
        inside: bool,
        what: String,
        alone: bool,
        /// From rank 0: the other ranks that work alone.
        others_alone: Vec<usize>,
    },
    /// The call with this number, counted from 1, takes too long.
    Late { call: u64 },
    /// The rank has an error.
    Failed { why: String },
    /// The run ends.
    End { text: String, reporter: usize },
    /// The rank has finished.
    Done,
}

/// How a rank connects to the hub.
pub(in super::super) enum Meeting {
    /// On rank 0: accepts connections.
    Accept(Acceptor),
    /// On the other ranks: the host and port of rank 0, and the key.
    Connect { host: String, port: u16, key: Key },
}

impl Meeting {
    /// Connects rank 0 to every other rank, and the others to rank 0.
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

/// The receiving side of a [`Line`].
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

    /// Sends a message and ignores errors: the receiving side detects that the connection is closed or silent.
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
    /// Calls `receive` with each message until the connection is closed.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_message_with_the_longest_reason_arrives() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let from = Line::new(1, listener.accept().unwrap().0).unwrap();
        // Control characters have the longest form in JSON.
        let reason = "\u{1}".repeat(LONGEST_REASON);
        Line::new(0, to).unwrap().send(&Message::Failed {
            why: reason.clone(),
        });
        let mut received = Vec::new();
        from.reader().unwrap().each(|message| match message {
            Message::Failed { why } => received.push(why),
            _ => panic!("another message"),
        });
        assert_eq!(received, [reason]);
    }
}
