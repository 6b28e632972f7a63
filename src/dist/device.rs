//! The two transfers of device memory, which follow the earlier launches of the device. A captured step repeats them.
//!
//! Without a library for the device, the host transfers the memory with its own calls. The simulator, whose memory is
//! host memory, uses this to make the same calls as a GPU.

use super::Collective;
use super::call::Kind;
use crate::device::{Device, Span, graph};
use crate::error::{Error, Result};
use std::sync::Arc;

/// Memory that this rank and another one send each other.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The other rank.
    pub peer: usize,
    /// The range that is sent to it.
    pub send: Span,
    /// The range that receives what it sends.
    pub receive: Span,
}

/// The ranks of a run, for the calls that the steps of a device make.
#[derive(Clone)]
pub struct DeviceRanks {
    dist: Arc<dyn Collective>,
    device: Device,
}

impl DeviceRanks {
    /// Creates the ranks of `dist` for memory of `device`.
    pub fn new(dist: Arc<dyn Collective>, device: Device) -> Self {
        DeviceRanks { dist, device }
    }

    /// Returns the number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.dist.rank()
    }

    /// Returns the number of ranks.
    pub fn size(&self) -> usize {
        self.dist.size()
    }

    /// Calls [`Collective::ranks_per_node`].
    pub fn ranks_per_node(&self) -> usize {
        self.dist.ranks_per_node()
    }

    /// Returns the device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Calls [`Collective::all_gather_on`].
    ///
    /// # Errors
    /// Returns the errors of that method.
    pub fn all_gather(&self, own: Span, all: Span) -> Result<()> {
        let call = move |dist: &dyn Collective| dist.all_gather_on(own, all);
        self.call(Kind::DeviceAllGather, own.bytes(), call)
    }

    /// Calls [`Collective::exchange_on`].
    ///
    /// # Errors
    /// Returns the errors of that method.
    ///
    /// # Panics
    /// Panics if this rank is the peer of a part.
    pub fn exchange(&self, parts: Vec<Part>) -> Result<()> {
        let own = parts.iter().find(|part| part.peer == self.rank());
        assert!(own.is_none(), "a rank sends nothing to itself: {own:?}");
        let count = parts.len();
        let call = move |dist: &dyn Collective| dist.exchange_on(&parts);
        self.call(Kind::DeviceExchange, count, call)
    }

    /// Makes a call, or records it for a captured step of the simulator. On a GPU the stream records it.
    fn call(
        &self,
        kind: Kind,
        count: usize,
        call: impl Fn(&dyn Collective) -> Result<()> + 'static,
    ) -> Result<()> {
        let capturing = graph::capturing();
        if capturing && self.device == Device::Sim {
            let dist = self.dist.clone();
            graph::record(move || call(&*dist));
            return Ok(());
        }
        if !capturing {
            self.dist.compare_device_call(kind, count)?;
        }
        call(&*self.dist)
    }
}

/// Does what [`Collective::all_gather_on`] does with transfers of the host.
///
/// # Errors
/// Returns the errors of that method.
pub fn all_gather<C: Collective + ?Sized>(dist: &C, own: Span, all: Span) -> Result<()> {
    let (mut sent, mut received) = (vec![0; own.bytes()], vec![0; all.bytes()]);
    own.read(&mut sent)?;
    dist.all_gather(&sent, &mut received)?;
    all.write(&received)
}

/// Does what [`Collective::exchange_on`] does with transfers of the host. These need rows of equal length, so all rows
/// have the length of the longest row of all ranks.
///
/// # Errors
/// Returns the errors of that method.
pub fn exchange<C: Collective + ?Sized>(dist: &C, parts: &[Part]) -> Result<()> {
    let size = dist.size();
    let to = |peer: usize| parts.iter().filter(move |part| part.peer == peer);
    let sent = |peer: usize| to(peer).map(|part| part.send.bytes()).sum::<usize>();
    let longest = (0..size).map(sent).max().unwrap_or(0);
    let lengths = dist.gather(&[longest as f64])?;
    let row = lengths.into_iter().fold(0.0, f64::max) as usize;
    let (mut own, mut all) = (vec![0; row * size], vec![0; row * size]);
    for peer in 0..size {
        let mut rest = &mut own[peer * row..(peer + 1) * row];
        for Part { send, .. } in to(peer) {
            let (first, behind) = rest.split_at_mut(send.bytes());
            send.read(first)?;
            rest = behind;
        }
    }
    dist.exchange(&own, &mut all)?;
    for peer in 0..size {
        let mut rest = &all[peer * row..(peer + 1) * row];
        for Part { receive, .. } in to(peer) {
            let Some((from, behind)) = rest.split_at_checked(receive.bytes()) else {
                return Err(Error::invalid(
                    "exchange on the device",
                    format!("{} more bytes from rank {peer}", receive.bytes()),
                    rest.len().to_string(),
                    "give every rank the same model",
                ));
            };
            receive.write(from)?;
            rest = behind;
        }
    }
    Ok(())
}
