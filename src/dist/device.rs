//! The two movers of a device's memory, behind its launches. A captured step repeats them.
//!
//! Where no library moves the memory the host does, by the movers of its own: that serves the simulator, whose memory is the
//! host's, with the calls that a GPU would make.

use super::Collective;
use super::call::Kind;
use crate::device::{Device, Span, graph};
use crate::error::{Error, Result};
use std::sync::Arc;

/// Bytes that go from this rank to another one and from there to this one.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The other rank.
    pub peer: usize,
    /// What goes to it.
    pub send: Span,
    /// Where what it sends is put.
    pub receive: Span,
}

/// The ranks of a run, as the steps of a device call them.
#[derive(Clone)]
pub struct DeviceRanks {
    dist: Arc<dyn Collective>,
    device: Device,
}

impl DeviceRanks {
    /// Those of `dist`, for memory of `device`.
    pub fn new(dist: Arc<dyn Collective>, device: Device) -> Self {
        DeviceRanks { dist, device }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.dist.rank()
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.dist.size()
    }

    /// Their device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// See [`Collective::all_gather_on`].
    ///
    /// # Errors
    /// As there.
    pub fn all_gather(&self, own: Span, all: Span) -> Result<()> {
        let call = move |dist: &dyn Collective| dist.all_gather_on(own, all);
        self.call(Kind::DeviceAllGather, own.bytes(), call)
    }

    /// See [`Collective::exchange_on`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// When a part is this rank's own.
    pub fn exchange(&self, parts: Vec<Part>) -> Result<()> {
        let own = parts.iter().find(|part| part.peer == self.rank());
        assert!(own.is_none(), "a rank sends nothing to itself: {own:?}");
        let count = parts.len();
        let call = move |dist: &dyn Collective| dist.exchange_on(&parts);
        self.call(Kind::DeviceExchange, count, call)
    }

    /// Makes a call, or records it. On a GPU its stream does.
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

/// [`Collective::all_gather_on`] by the host.
///
/// # Errors
/// As there.
pub fn all_gather<C: Collective + ?Sized>(dist: &C, own: Span, all: Span) -> Result<()> {
    let (mut sent, mut received) = (vec![0; own.bytes()], vec![0; all.bytes()]);
    own.read(&mut sent)?;
    dist.all_gather(&sent, &mut received)?;
    all.write(&received)
}

/// [`Collective::exchange_on`] by the host, whose exchange takes rows of equal lengths: the longest of all ranks.
///
/// # Errors
/// As there.
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
