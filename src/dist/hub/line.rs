//! Messages between a rank and the hub: lines of JSON on a TCP connection.

use super::member::Member;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A message that is not sent within this time is given up: its rank is stopped or its host gone.
const SEND: Duration = Duration::from_secs(1);

/// No line is longer; whoever sends more is no rank.
const LONGEST: u64 = 1 << 16;

#[derive(Serialize, Deserialize)]
pub(super) enum Message {
    /// The first one of a rank.
    Hello { rank: usize, token: String },
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

/// Where and how ranks find the hub.
pub(in super::super) struct Meeting {
    pub rank: usize,
    /// On rank 0.
    listener: Option<TcpListener>,
    pub port: u16,
    /// What a connection has to know.
    pub token: String,
}

impl Meeting {
    /// On rank 0: listens, for connections of this host alone if all ranks are `local`.
    pub fn host(local: bool) -> Result<Self> {
        let address = match local {
            true => Ipv4Addr::LOCALHOST,
            false => Ipv4Addr::UNSPECIFIED,
        };
        let listen = || {
            let listener = TcpListener::bind((address, 0))?;
            listener.set_nonblocking(true)?;
            let port = listener.local_addr()?.port();
            Ok((listener, port))
        };
        let (listener, port) = listen().map_err(|e: std::io::Error| {
            let help = "check the network of rank 0's host";
            Error::invalid("ranks", "a TCP port for heartbeats", e.to_string(), help)
        })?;
        // From the system's random numbers, so that nobody else on the network can guess it.
        let random = RandomState::new();
        let token = [0, 1]
            .map(|part| format!("{:016x}", random.hash_one(part)))
            .concat();
        Ok(Meeting {
            rank: 0,
            listener: Some(listener),
            port,
            token,
        })
    }

    /// On another rank.
    pub fn guest(rank: usize, port: u16, token: String) -> Self {
        Meeting {
            rank,
            listener: None,
            port,
            token,
        }
    }

    /// The lines: to every other rank on rank 0, to rank 0 on the others.
    pub(super) fn connect(self, members: &[Member], limit: Duration) -> Result<Vec<Line>> {
        let deadline = Instant::now() + limit;
        match &self.listener {
            Some(listener) => self.accept(listener, members.len(), deadline),
            None => {
                let host = match members[0].host == members[self.rank].host {
                    true => "127.0.0.1",
                    false => members[0].host.as_str(),
                };
                let line = Line::new(0, self.call(host, deadline)?)?;
                let (rank, token) = (self.rank, self.token.clone());
                line.send(&Message::Hello { rank, token });
                Ok(vec![line])
            }
        }
    }

    fn accept(&self, listener: &TcpListener, size: usize, deadline: Instant) -> Result<Vec<Line>> {
        let mut lines: Vec<Line> = Vec::new();
        while lines.len() + 1 < size {
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Some(line) = self.greeted(stream, size)
                        && lines.iter().all(|l| l.peer != line.peer)
                    {
                        lines.push(line);
                    }
                }
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
                Err(e) => {
                    let got = format!("{} of them: {e}", lines.len());
                    let expected = format!("a connection from each of {} ranks", size - 1);
                    let help = "let the hosts of the ranks connect to rank 0's by TCP";
                    return Err(Error::invalid("ranks", expected, got, help));
                }
            }
        }
        lines.sort_by_key(|line| line.peer);
        Ok(lines)
    }

    /// A connection that knows the token; any other is closed.
    fn greeted(&self, stream: TcpStream, size: usize) -> Option<Line> {
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(SEND)).ok()?;
        let (mut text, mut byte) = (Vec::new(), [0]);
        // Byte by byte: what follows the first line is for the reader.
        while text.len() < LONGEST as usize {
            (&stream).read_exact(&mut byte).ok()?;
            match byte {
                [b'\n'] => break,
                [other] => text.push(other),
            }
        }
        stream.set_read_timeout(None).ok()?;
        match serde_json::from_slice(&text).ok()? {
            Message::Hello { rank, token } if token == self.token && (1..size).contains(&rank) => {
                Line::new(rank, stream).ok()
            }
            _ => None,
        }
    }

    fn call(&self, host: &str, deadline: Instant) -> Result<TcpStream> {
        loop {
            match TcpStream::connect((host, self.port)) {
                Ok(stream) => return Ok(stream),
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
                Err(e) => {
                    let expected = format!("a connection to rank 0 at {host}:{}", self.port);
                    let help = "let the hosts of the ranks connect to rank 0's by TCP";
                    return Err(Error::invalid("ranks", expected, e.to_string(), help));
                }
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
        let prepared = stream
            .set_nodelay(true)
            .and_then(|()| stream.set_write_timeout(Some(SEND)));
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

fn broken(e: &std::io::Error) -> Error {
    let help = "check the network between the hosts of the ranks";
    Error::invalid("ranks", "a TCP connection", e.to_string(), help)
}
