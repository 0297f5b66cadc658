//! The agent as its own client: what it has seen, and what is put back for it.

use std::{net::SocketAddr, sync::Arc};

use portolan_core::table::Table;
use tokio::sync::{Notify, mpsc};

use super::{Reconciler, event_log::Event};
use crate::probe::self_probe::{Seen, SelfProbe};

/// What the agent sees as its own client.
pub(super) struct Probe {
    /// What the kernel has to hold for it.
    pub(super) table: Table,
    pub(super) endpoint: SocketAddr,
    /// Has it probe now.
    pub(super) wanted: Arc<Notify>,
    pub(super) results: mpsc::Receiver<Seen>,
    /// The last result; an error before there is one.
    pub(super) seen: Seen,
    /// Connections of it that the kernel had counted then.
    counted: u64,
}

impl Probe {
    /// Begins to answer, and to probe once it is wanted.
    pub(super) fn start(probe: SelfProbe) -> Self {
        let (sender, results) = mpsc::channel(1);
        let (table, endpoint, wanted) = (probe.table(), probe.endpoint(), probe.wanted());
        tokio::spawn(probe.run(sender));
        Self { table, endpoint, wanted, results, seen: Err("it has not been tried yet".to_owned()), counted: 0 }
    }
}

impl Reconciler {
    /// The agent has been its own client. Whatever is found not to be in its place is put back.
    pub(super) fn take_probe(&mut self, seen: Seen) {
        let opened =
            self.layout.backend_id(&self.probe.endpoint).and_then(|id| self.datapath.maps.backend_stats(id).ok());
        let opened = opened.map_or(0, |stats| stats.opened);
        let uncounted = || Err("sock_ops does not do its work: the connection was not counted".to_owned());
        let seen = seen.and_then(|()| if opened > self.probe.counted { Ok(()) } else { uncounted() });
        self.probe.counted = opened;
        let repaired = match self.datapath.repair_hooks() {
            Ok(repaired) => repaired,
            Err(error) => {
                tracing::error!("{error:#}");
                Vec::new()
            }
        };
        for message in &repaired {
            let message = format!("{message}: mended");
            self.events.add(Event { kind: Event::REPAIRED.to_owned(), message, ..Event::default() });
        }
        match (&seen, &self.probe.seen) {
            (Err(why), before) if before.as_ref().err() != Some(why) => tracing::error!("the self-probe failed: {why}"),
            (Ok(()), Err(_)) => tracing::info!("the self-probe passed"),
            _ => {}
        }
        self.probe.seen = seen;
        if !repaired.is_empty() {
            self.recount();
            self.probe.wanted.notify_one();
        }
    }
}
