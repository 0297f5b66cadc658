//! Events from the kernel: connection outcomes, and the programs' debug log.

use std::{net::SocketAddr, time::Duration};

use aya::{
    Ebpf,
    maps::{MapData, RingBuf},
};
use portolan_common::{Outcome as Record, OutcomeKind};
use portolan_core::table::FrontendId;
use tokio::io::unix::AsyncFd;

use crate::{error::Result, map_specs, maps};

/// An event of a connection to an endpoint: how the connect ended, or what came back on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Time of the event, on CLOCK_MONOTONIC.
    pub at: Duration,
    /// The endpoint that the connection was assigned.
    pub backend: SocketAddr,
    /// Id of the frontend that the application dialed.
    pub frontend_id: FrontendId,
    /// The lower half of the epoch of that id.
    pub frontend_epoch: u16,
    /// What happened.
    pub kind: OutcomeKind,
    /// The errno that the application received, or 0 for none.
    /// For [`OutcomeKind::Responded`], the HTTP status; for [`OutcomeKind::NotHttp`], the detected protocol.
    pub errno: u32,
    /// Time from the SYN to the event.
    pub latency: Duration,
    /// Cookie of the application's network namespace.
    pub netns_cookie: u64,
    /// The application's pod: the lower half of the id of its cgroup.
    pub pod: u32,
    /// The endpoint's count of failures, for [`Maps::acknowledge_failures`](crate::Maps::acknowledge_failures).
    pub failures: u32,
}

/// Reads connection outcomes from the `EVENTS` ring buffer.
pub struct EventStream {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl EventStream {
    pub(crate) fn open(bpf: &mut Ebpf) -> Result<Self> {
        let map = maps::take(bpf, map_specs::EVENTS)?;
        let ring = RingBuf::try_from(map)?;
        // SAFETY: the ring buffer owns its descriptor and returns the same one for its whole lifetime.
        Ok(Self { ring: unsafe { AsyncFd::register(ring).map_err(std::io::Error::from)? } })
    }

    /// Waits until there are outcomes, and returns up to `limit` of them, at least one.
    ///
    /// # Errors
    /// Returns an error if the ring buffer cannot be polled.
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
    // SAFETY: `Record` is plain data of exactly this length, and the read may be unaligned.
    let record = unsafe { bytes.as_ptr().cast::<Record>().read_unaligned() };
    Some(Outcome {
        at: Duration::from_nanos(record.time_ns),
        backend: record.backend.socket_addr(),
        frontend_id: FrontendId::new(record.frontend_id),
        frontend_epoch: record.frontend_epoch,
        kind: OutcomeKind::from_u32(record.kind.into())?,
        errno: record.errno,
        latency: Duration::from_micros(record.latency_us.into()),
        netns_cookie: record.netns_cookie,
        pod: record.client,
        failures: record.failures,
    })
}

/// Reads the debug log of the programs.
pub struct Logs {
    logger: AsyncFd<aya_log::EbpfLogger<&'static dyn log::Log>>,
}

impl Logs {
    pub(crate) fn open(bpf: &mut Ebpf) -> Result<Self> {
        let logger = aya_log::EbpfLogger::init(bpf).map_err(std::io::Error::other)?;
        // SAFETY: the logger owns its ring buffer's descriptor and returns the same one for its whole lifetime.
        Ok(Self { logger: unsafe { AsyncFd::register(logger).map_err(std::io::Error::from)? } })
    }

    /// Forwards log lines to the `log` crate until an error occurs.
    ///
    /// # Errors
    /// Returns an error if the ring buffer cannot be polled.
    pub async fn forward(&mut self) -> Result<()> {
        loop {
            let mut ready = self.logger.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}
