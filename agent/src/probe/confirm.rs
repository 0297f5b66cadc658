//! Evidence before an endpoint is ejected for the whole node: one pod must not be able to do that for all others (a firewall of its own makes its
//! connects fail). Where only one network namespace has seen failures, and others use the endpoint too, the agent dials it itself, once.
//!
//! That connection is not rewritten, for it goes to an endpoint and not to a Service; endpoints that are frontends themselves cannot be dialled
//! so, and what nobody can confirm is not done.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use portolan_core::model::{Probe, ProbeKind};
use tokio::sync::{Semaphore, mpsc};

use super::check::{ProbeResult, check};

/// A connection is waited for so long at the most: long enough for a SYN that was lost to be repeated once.
const LIMIT: Duration = Duration::from_millis(2_500);

/// A connection of the agent's own, which fails no later than those of the pods do by their `connectTimeout`.
pub fn dial(connect_timeout: Option<Duration>) -> Probe {
    let timeout = connect_timeout.map_or(LIMIT, |connect_timeout| connect_timeout.min(LIMIT));
    Probe { kind: ProbeKind::Tcp, port: None, period: Duration::MAX, timeout, failures: 1, successes: 1 }
}
/// Connections at once; further ones wait for their turn.
const AT_ONCE: usize = 64;
/// Others have used an endpoint lately if they did within this time.
pub const LATELY: Duration = Duration::from_secs(300);

/// What came of a connection of the agent's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confirmation {
    /// Where it went.
    pub endpoint: SocketAddr,
    /// What was asked.
    pub probe: Arc<Probe>,
    /// Whether it failed as well.
    pub failed: bool,
}

/// The one who dials.
#[derive(Clone, Debug)]
pub struct Confirmer {
    turns: Arc<Semaphore>,
    seen: mpsc::UnboundedSender<Confirmation>,
}

impl Confirmer {
    /// A new one, and what it will have seen.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Confirmation>) {
        let (seen, results) = mpsc::unbounded_channel();
        (Self { turns: Arc::new(Semaphore::new(AT_ONCE)), seen }, results)
    }

    /// Asks an endpoint what a probe asks. To be called inside a runtime.
    pub fn ask(&self, endpoint: SocketAddr, probe: Arc<Probe>) {
        let Self { turns, seen } = self.clone();
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _turn = turns.acquire().await;
            let failed = matches!(check(endpoint, &probe).await, ProbeResult::Failing(_));
            // An error means that nobody wants to know any more.
            let _ = seen.send(Confirmation { endpoint, probe, failed });
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_listener_answers_and_a_closed_port_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap();
        let (witness, mut results) = Confirmer::new();
        let probe = Arc::new(dial(None));
        witness.ask(endpoint, Arc::clone(&probe));
        let expected = Confirmation { endpoint, probe: Arc::clone(&probe), failed: false };
        assert_eq!(results.recv().await, Some(expected.clone()));
        drop(listener);
        witness.ask(endpoint, probe);
        assert_eq!(results.recv().await, Some(Confirmation { failed: true, ..expected }));
    }
}
