//! Confirmation before an endpoint is ejected for the whole node.
//!
//! A single pod must not be able to eject an endpoint for all others: its own firewall may make its connects fail.
//! If only one network namespace has seen failures, and others use the endpoint too, the agent dials it once itself.
//!
//! The eBPF programs do not rewrite that connection, because an endpoint is not a Service address.
//! An endpoint that is also a frontend cannot be dialed this way.
//! An ejection that stays unconfirmed is not performed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use portolan_core::model::{Probe, ProbeKind};
use tokio::sync::{Semaphore, mpsc};

use super::check::{ProbeResult, check};

/// Maximum time to wait for a connection: long enough to retransmit a lost SYN once.
const CONFIRM_TIMEOUT: Duration = Duration::from_millis(2_500);

/// Returns a probe that makes one TCP connection. It times out no later than the `connectTimeout` of the pods.
pub fn connect_probe(connect_timeout: Option<Duration>) -> Probe {
    let timeout = connect_timeout.map_or(CONFIRM_TIMEOUT, |connect_timeout| connect_timeout.min(CONFIRM_TIMEOUT));
    Probe { kind: ProbeKind::Tcp, port: None, period: Duration::MAX, timeout, failures: 1, successes: 1 }
}

/// Maximum number of concurrent confirmations; further ones wait.
const MAX_IN_FLIGHT: usize = 64;
/// How long after its last use an endpoint counts as used by other pods.
pub const RECENT_USE: Duration = Duration::from_secs(300);

/// Result of a confirmation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confirmation {
    /// Endpoint that was probed.
    pub endpoint: SocketAddr,
    /// Probe that was made, as passed to [`Confirmer::ask`].
    pub probe: Arc<Probe>,
    /// What the agent itself saw.
    pub result: ProbeResult,
}

/// Runs confirmations in the background.
#[derive(Clone, Debug)]
pub struct Confirmer {
    permits: Arc<Semaphore>,
    seen: mpsc::UnboundedSender<Confirmation>,
}

impl Confirmer {
    /// Creates a confirmer and the channel on which it sends its results.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Confirmation>) {
        let (seen, results) = mpsc::unbounded_channel();
        (Self { permits: Arc::new(Semaphore::new(MAX_IN_FLIGHT)), seen }, results)
    }

    /// Starts a probe of an endpoint. Must be called from within a Tokio runtime.
    pub fn ask(&self, endpoint: SocketAddr, probe: Arc<Probe>) {
        let Self { permits, seen } = self.clone();
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _permit = permits.acquire().await;
            let result = check(endpoint, &probe).await;
            // An error means that the receiver is gone.
            let _ = seen.send(Confirmation { endpoint, probe, result });
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn open_port_passes_and_closed_port_fails() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap();
        let (confirmer, mut results) = Confirmer::new();
        let probe = Arc::new(connect_probe(None));
        confirmer.ask(endpoint, Arc::clone(&probe));
        let expected = Confirmation { endpoint, probe: Arc::clone(&probe), result: ProbeResult::Success };
        assert_eq!(results.recv().await, Some(expected));
        drop(listener);
        confirmer.ask(endpoint, probe);
        assert!(matches!(results.recv().await.unwrap().result, ProbeResult::Failing(_)));
    }
}
