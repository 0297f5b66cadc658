//! What the kernel tells: outcomes of connections, and the programs' own words for debugging.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{MapData, RingBuf},
};
use portolan_common::{Outcome as Record, OutcomeKind};
use tokio::io::unix::AsyncFd;

/// How a connection attempt to an endpoint ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// When, on CLOCK_MONOTONIC.
    pub at: Duration,
    /// The endpoint.
    pub backend: SocketAddr,
    /// The frontend that the application had dialled.
    pub frontend_id: u32,
    /// How it ended.
    pub kind: OutcomeKind,
    /// The error that the application got, 0 for none; of a response, its status.
    pub errno: u32,
    /// Time from the SYN to the outcome.
    pub latency: Duration,
    /// The network namespace of the application.
    pub netns_cookie: u64,
}

/// The ring buffer of outcomes.
pub struct EventStream {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl EventStream {
    pub(crate) fn open(bpf: &mut Ebpf) -> Result<Self> {
        let map = bpf.take_map("EVENTS").context("the embedded object has no map EVENTS")?;
        let ring = RingBuf::try_from(map)?;
        // SAFETY: the ring buffer owns its descriptor, and gives the same one as long as it lives.
        Ok(Self { ring: unsafe { AsyncFd::register(ring)? } })
    }

    /// Waits until there are outcomes, and takes up to `limit` of them.
    ///
    /// # Errors
    /// The ring buffer cannot be waited for.
    pub async fn next(&mut self, limit: usize) -> Result<Vec<Outcome>> {
        loop {
            let mut ready = self.ring.readable_mut().await?;
            let ring = ready.get_inner_mut();
            let mut outcomes = Vec::new();
            while outcomes.len() < limit {
                let Some(item) = ring.next() else {
                    ready.clear_ready();
                    break;
                };
                outcomes.extend(decode(&item));
            }
            if !outcomes.is_empty() {
                return Ok(outcomes);
            }
        }
    }
}

fn decode(bytes: &[u8]) -> Option<Outcome> {
    if bytes.len() != size_of::<Record>() {
        return None;
    }
    // SAFETY: `Record` is plain data of exactly this length, and a read that need not be aligned.
    let record = unsafe { bytes.as_ptr().cast::<Record>().read_unaligned() };
    Some(Outcome {
        at: Duration::from_nanos(record.time_ns),
        backend: record.backend.socket_addr(),
        frontend_id: record.frontend_id,
        kind: OutcomeKind::from_u32(record.kind)?,
        errno: record.errno,
        latency: Duration::from_nanos(record.latency_ns),
        netns_cookie: record.netns_cookie,
    })
}

/// Log lines of the programs.
pub struct Logs {
    logger: AsyncFd<aya_log::EbpfLogger<&'static dyn log::Log>>,
}

impl Logs {
    pub(crate) fn open(bpf: &mut Ebpf) -> Result<Self> {
        let logger = aya_log::EbpfLogger::init(bpf)?;
        // SAFETY: the logger owns its ring buffer's descriptor, and gives the same one as long as it lives.
        Ok(Self { logger: unsafe { AsyncFd::register(logger)? } })
    }

    /// Passes on what the programs say, for ever.
    ///
    /// # Errors
    /// The ring buffer cannot be waited for.
    pub async fn forward(&mut self) -> Result<()> {
        loop {
            let mut ready = self.logger.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}
