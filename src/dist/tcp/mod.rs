//! Transfers bytes between processes by TCP, through rank 0. The processes of torchrun use it, because it needs no
//! library. Each rank has one connection to rank 0, which collects the bytes of all ranks and forwards them.
//!
//! Both ends know the size of the next data on a connection, because the ranks compare each call first. There are
//! therefore no headers, and no rank allocates memory for a length that another one sends.

pub(super) mod place;

use super::Collective;
use super::handshake::{self, Acceptor, Key, connect_to_rank_0};
use super::processes::{HubAddress, Transfer, Transport, Waiting, foreign, gather_json};
use crate::error::{Error, Result};
use place::Rendezvous;
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Largest number of bytes that a rank sends to rank 0 at a time in an exchange.
const PIECE: usize = 4 << 20;

/// The connections of a rank.
pub(super) struct Star {
    rank: usize,
    size: usize,
    /// On rank 0 to every other rank; on the others to rank 0.
    lines: Vec<TcpStream>,
    name: String,
    /// The address of this rank in the network of the others.
    address: IpAddr,
}

/// The address and key with which the ranks of a group connect.
#[derive(Serialize, Deserialize)]
struct Place {
    address: SocketAddr,
    key: Key,
}

impl Star {
    /// Connects the ranks at the address of `meeting`, and also returns the address of the hub.
    ///
    /// # Errors
    /// Returns an error when rank 0 cannot listen there, or a rank does not connect within `limit`.
    pub fn start(meeting: &Rendezvous, limit: Duration) -> Result<(Self, HubAddress)> {
        let Rendezvous { rank, size, .. } = *meeting;
        let name = format!("TCP by {}", meeting.named());
        let deadline = Instant::now() + limit;
        if rank == 0 {
            let listener = meeting.listen()?;
            let own = listener.local_addr().map_err(|e| handshake::broken(&e))?;
            let acceptor = Acceptor::new(listener, meeting.key, size)?;
            let star = Self::new(rank, size, acceptor.accept_ranks(deadline)?, name, own.ip())?;
            let hub = HubAddress {
                listener: Some(acceptor.into_listener()),
                host: own.ip().to_string(),
            };
            return Ok((star, hub));
        }
        let (addresses, named) = (meeting.addresses()?, meeting.named());
        let stream = connect_to_rank_0(&addresses, &named, &meeting.key, [rank, size], deadline)?;
        let ends = || Ok((stream.local_addr()?, stream.peer_addr()?));
        let (own, theirs) = ends().map_err(|e| handshake::broken(&e))?;
        let star = Self::new(rank, size, vec![stream], name, own.ip())?;
        let hub = HubAddress {
            listener: None,
            host: theirs.ip().to_string(),
        };
        Ok((star, hub))
    }

    fn new(
        rank: usize,
        size: usize,
        lines: Vec<TcpStream>,
        name: String,
        address: IpAddr,
    ) -> Result<Self> {
        for line in &lines {
            line.set_nonblocking(true)
                .map_err(|e| handshake::broken(&e))?;
        }
        Ok(Star {
            rank,
            size,
            lines,
            name,
            address,
        })
    }

    /// Sends to each connection its bytes.
    fn send<'b>(&self, bytes: impl Iterator<Item = &'b [u8]>, waiting: &mut Waiting) -> Result<()> {
        let mut left: Vec<(usize, &[u8])> = bytes.enumerate().collect();
        self.pump(&mut left, waiting, |mut line, rest| {
            let moved = line.write(rest)?;
            *rest = &rest[moved..];
            Ok((moved, rest.is_empty()))
        })
    }

    /// Receives the bytes of each connection.
    fn receive<'b>(
        &self,
        bytes: impl Iterator<Item = &'b mut [u8]>,
        waiting: &mut Waiting,
    ) -> Result<()> {
        let mut left: Vec<(usize, &mut [u8])> = bytes.enumerate().collect();
        self.pump(&mut left, waiting, |mut line, rest| {
            let moved = line.read(rest)?;
            *rest = &mut std::mem::take(rest)[moved..];
            Ok((moved, rest.is_empty()))
        })
    }

    /// Transfers bytes on all connections until each has transferred its own.
    fn pump<B>(
        &self,
        left: &mut Vec<(usize, B)>,
        waiting: &mut Waiting,
        mut step: impl FnMut(&TcpStream, &mut B) -> std::io::Result<(usize, bool)>,
    ) -> Result<()> {
        while !left.is_empty() {
            let (mut moved, mut lost) = (false, None);
            left.retain_mut(|(i, rest)| match step(&self.lines[*i], rest) {
                Ok((0, _)) => {
                    lost = Some((*i, "the connection was closed".to_string()));
                    true
                }
                Ok((_, done)) => {
                    moved = true;
                    !done
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    true
                }
                Err(e) => {
                    lost = Some((*i, e.to_string()));
                    true
                }
            });
            if let Some((line, why)) = lost {
                let peer = if self.rank == 0 { line + 1 } else { 0 };
                let expected = format!("bytes of rank {peer}");
                let help = "see the messages of that rank; if it has no error, check the network";
                return Err(Error::invalid("collective call", expected, why, help));
            }
            match moved {
                true => waiting.renew(),
                false => waiting.pause()?,
            }
        }
        Ok(())
    }

    fn all_gather(&self, own: &[u8], all: &mut [u8], waiting: &mut Waiting) -> Result<()> {
        if self.rank != 0 {
            self.send([own].into_iter(), waiting)?;
            return self.receive([all].into_iter(), waiting);
        }
        let mut rows = all.chunks_mut(own.len());
        if let Some(first) = rows.next() {
            first.copy_from_slice(own);
        }
        self.receive(rows, waiting)?;
        let all = &*all;
        self.send(self.lines.iter().map(|_| all), waiting)
    }

    fn exchange(&self, own: &[u8], all: &mut [u8], waiting: &mut Waiting) -> Result<()> {
        let (rank, size) = (self.rank, self.size);
        let n = own.len() / size;
        let most = (PIECE / size).max(1);
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            // A block for each other rank.
            let blocks = others(rank, size).flat_map(|r| &own[r * n + first..][..count]);
            let given: Vec<u8> = blocks.copied().collect();
            let mut taken = vec![0; given.len()];
            match rank {
                0 => {
                    let mut from = vec![0; given.len() * size];
                    let (mine, theirs) = from.split_at_mut(given.len());
                    mine.copy_from_slice(&given);
                    self.receive(theirs.chunks_mut(given.len()), waiting)?;
                    // Row r of `to` has the blocks that r receives from each other rank s; they are in row s of `from`.
                    let mut to = vec![0; from.len()];
                    let pairs = (0..size).flat_map(|r| others(r, size).map(move |s| (r, s)));
                    for (block, (r, s)) in to.chunks_mut(count).zip(pairs) {
                        let among_others = r - usize::from(r > s);
                        let at = s * given.len() + among_others * count;
                        block.copy_from_slice(&from[at..][..count]);
                    }
                    taken.copy_from_slice(&to[..given.len()]);
                    self.send(to.chunks(given.len()).skip(1), waiting)?;
                }
                _ => {
                    self.send([&given[..]].into_iter(), waiting)?;
                    self.receive([&mut taken[..]].into_iter(), waiting)?;
                }
            }
            for (r, row) in others(rank, size).zip(taken.chunks(count)) {
                all[r * n + first..][..count].copy_from_slice(row);
            }
        }
        Ok(())
    }
}

impl Transport for Star {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn transfer(
        &self,
        kind: Transfer,
        own: &[u8],
        all: &mut [u8],
        waiting: &mut Waiting,
    ) -> Result<()> {
        match kind {
            Transfer::AllGather => self.all_gather(own, all, waiting),
            Transfer::Exchange => self.exchange(own, all, waiting),
        }
    }

    fn group(
        &self,
        size: usize,
        all: &dyn Collective,
        limit: Duration,
    ) -> Result<Box<dyn Transport>> {
        let (first, rank) = (self.rank / size * size, self.rank % size);
        let (mut acceptor, mut own) = (None, None);
        if rank == 0 {
            let bound = TcpListener::bind((self.address, 0));
            let bound = bound.and_then(|listener| Ok((listener.local_addr()?, listener)));
            let key = handshake::random()?;
            let (address, listener) = bound.map_err(|e| handshake::broken(&e))?;
            own = Some(Place { address, key });
            acceptor = Some(Acceptor::new(listener, key, size)?);
        }
        let mut places: Vec<Option<Place>> = gather_json(all, &own)?;
        let deadline = Instant::now() + limit;
        let lines = match (acceptor, places.swap_remove(first)) {
            (Some(acceptor), _) => acceptor.accept_ranks(deadline)?,
            (None, Some(Place { address, key })) => {
                let (named, ranks) = (address.to_string(), [rank, size]);
                let line = connect_to_rank_0(&[address], &named, &key, ranks, deadline)?;
                vec![line]
            }
            (None, None) => return Err(foreign()),
        };
        let star = Star::new(rank, size, lines, self.name.clone(), self.address)?;
        Ok(Box::new(star))
    }
}

/// Returns the ranks 0 to `size` − 1 except `rank`, in order.
fn others(rank: usize, size: usize) -> impl Iterator<Item = usize> {
    (0..size).filter(move |other| *other != rank)
}

#[cfg(test)]
mod tests;
