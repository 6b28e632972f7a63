//! The two movers at addresses of a device, behind its launches. A captured step repeats them.
//!
//! Where no library moves the device's memory the host does, by the movers of its own: that serves the simulator, whose memory
//! is the host's, with the calls that a GPU would make.

use super::Collective;
use super::call::Kind;
use crate::device::{Device, graph};
use crate::error::{Error, Result};
use std::ops::Range;
use std::slice::{from_raw_parts, from_raw_parts_mut};
use std::sync::Arc;

/// Bytes that go from this rank to another and from there to this one, by addresses of the device.
#[derive(Clone, Debug)]
pub struct Part {
    pub peer: usize,
    pub send: Range<usize>,
    pub receive: Range<usize>,
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
    /// # Safety
    /// As there; of a captured call, for as long as its graph.
    ///
    /// # Errors
    /// As there.
    pub unsafe fn all_gather(&self, own: usize, all: usize, bytes: usize) -> Result<()> {
        let device = self.device;
        self.call(Kind::DeviceAllGather, bytes, move |dist| {
            // SAFETY: as the caller says.
            unsafe { dist.all_gather_on(device, own, all, bytes) }
        })
    }

    /// See [`Collective::exchange_on`].
    ///
    /// # Safety
    /// As there; of a captured call, for as long as its graph.
    ///
    /// # Errors
    /// As there.
    pub unsafe fn exchange(&self, parts: Vec<Part>) -> Result<()> {
        let device = self.device;
        self.call(Kind::DeviceExchange, parts.len(), move |dist| {
            // SAFETY: as the caller says.
            unsafe { dist.exchange_on(device, &parts) }
        })
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

/// Refuses a device whose memory the host does not see.
fn seen_by_host(device: Device) -> Result<()> {
    if device != Device::Cuda {
        return Ok(());
    }
    let help = "a bug: NCCL was not connected";
    Err(Error::invalid(
        "ranks",
        "a library that moves GPU memory",
        "none",
        help,
    ))
}

/// [`Collective::all_gather_on`] by the host.
///
/// # Safety
/// As there.
pub unsafe fn all_gather<C: Collective + ?Sized>(
    dist: &C,
    device: Device,
    own: usize,
    all: usize,
    bytes: usize,
) -> Result<()> {
    seen_by_host(device)?;
    // SAFETY: as the caller says, and no launch of the simulator is under way.
    let (own, all) = unsafe {
        (
            from_raw_parts(own as *const u8, bytes),
            from_raw_parts_mut(all as *mut u8, bytes * dist.size()),
        )
    };
    dist.all_gather(own, all)
}

/// [`Collective::exchange_on`] by the host, whose exchange takes rows of equal lengths: the longest of all ranks.
///
/// # Safety
/// As there.
pub unsafe fn exchange<C: Collective + ?Sized>(
    dist: &C,
    device: Device,
    parts: &[Part],
) -> Result<()> {
    seen_by_host(device)?;
    let size = dist.size();
    let to = |peer: usize| parts.iter().filter(move |part| part.peer == peer);
    let longest = (0..size).map(|peer| to(peer).map(|part| part.send.len()).sum::<usize>());
    let longest = longest.max().unwrap_or(0);
    let lengths = dist.gather(&[longest as f64])?;
    let row = lengths.into_iter().fold(0.0, f64::max) as usize;
    let (mut own, mut all) = (vec![0; row * size], vec![0; row * size]);
    for peer in 0..size {
        let mut at = peer * row;
        for Part { send, .. } in to(peer) {
            // SAFETY: as the caller says.
            let from = unsafe { from_raw_parts(send.start as *const u8, send.len()) };
            own[at..at + from.len()].copy_from_slice(from);
            at += from.len();
        }
    }
    dist.exchange(&own, &mut all)?;
    for peer in 0..size {
        let mut rest = &all[peer * row..(peer + 1) * row];
        for Part { receive, .. } in to(peer) {
            let Some((from, behind)) = rest.split_at_checked(receive.len()) else {
                return Err(Error::invalid(
                    "exchange on the device",
                    format!("at least {} more bytes from rank {peer}", receive.len()),
                    format!("{}", rest.len()),
                    "give every rank the same model",
                ));
            };
            // SAFETY: as the caller says.
            let to = unsafe { from_raw_parts_mut(receive.start as *mut u8, receive.len()) };
            to.copy_from_slice(from);
            rest = behind;
        }
    }
    Ok(())
}
