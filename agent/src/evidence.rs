//! Evidence before an endpoint is ejected for the whole node: one pod must not be able to do that for all others (a firewall of its own makes its
//! connects fail). Where only one network namespace has seen failures, and others use the endpoint too, the agent dials it itself, once.
//!
//! That connection is not rewritten, for it goes to an endpoint and not to a Service; endpoints that are frontends themselves cannot be dialled
//! so, and what nobody can confirm is not done.

use std::{io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::TcpStream,
    sync::{Semaphore, mpsc},
    time::timeout,
};

/// The longest that a connection is waited for: long enough for a SYN that was lost to be repeated once.
const LIMIT: Duration = Duration::from_millis(2_500);
/// Connections at once; further ones wait for their turn.
const AT_ONCE: usize = 64;
/// Others have used an endpoint lately if they did within this time.
pub const LATELY: Duration = Duration::from_secs(300);

/// What came of a connection of the agent's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// Where it went.
    pub endpoint: SocketAddr,
    /// Whether it failed as well.
    pub failed: bool,
}

/// The one who dials.
#[derive(Clone, Debug)]
pub struct Witness {
    turns: Arc<Semaphore>,
    seen: mpsc::UnboundedSender<Evidence>,
}

impl Witness {
    /// A new one, and what it will have seen.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Evidence>) {
        let (seen, results) = mpsc::unbounded_channel();
        (Self { turns: Arc::new(Semaphore::new(AT_ONCE)), seen }, results)
    }

    /// Dials an endpoint. To be called inside a runtime.
    pub fn ask(&self, endpoint: SocketAddr) {
        let Self { turns, seen } = self.clone();
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _turn = turns.acquire().await;
            let failed = match timeout(LIMIT, TcpStream::connect(endpoint)).await {
                Ok(Ok(_)) => false,
                // What this agent lacks (a route, a descriptor, a permission) says nothing of the endpoint.
                Ok(Err(error)) => matches!(
                    error.kind(),
                    ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::TimedOut
                ),
                Err(_) => true,
            };
            // An error means that nobody wants to know any more.
            let _ = seen.send(Evidence { endpoint, failed });
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
        let (witness, mut results) = Witness::new();
        witness.ask(endpoint);
        assert_eq!(results.recv().await, Some(Evidence { endpoint, failed: false }));
        drop(listener);
        witness.ask(endpoint);
        assert_eq!(results.recv().await, Some(Evidence { endpoint, failed: true }));
    }
}
