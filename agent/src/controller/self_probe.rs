//! The agent as its own client: what it sees, and which hooks are repaired because of it.

use std::net::SocketAddr;

use portolan_core::table::{Layout, Table};

use super::{
    effect::{Action, Effect},
    event_log::{Event, EventKind},
};
use crate::{kernel::Kernel, probe::self_probe::Seen};

/// What the self-probe needs in the kernel, and its last result.
#[derive(Debug)]
pub(super) struct SelfProbeMonitor {
    /// The frontends that it dials.
    table: Table,
    endpoint: SocketAddr,
    /// The last result; an error before the first one.
    seen: Seen,
    /// Connections of it that the kernel had counted by then.
    counted: u64,
}

impl SelfProbeMonitor {
    /// A monitor for a self-probe with this table, which leads to this endpoint.
    pub(super) fn new(table: Table, endpoint: SocketAddr) -> Self {
        Self { table, endpoint, seen: Err("it has not run yet".to_owned()), counted: 0 }
    }

    /// Returns the frontends that it dials.
    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    /// Returns why it failed last, if it did.
    pub(super) fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Handles a result: verifies that the connection was counted, and repairs hooks. Reports whether a hook was repaired.
    pub(super) fn on_result(&mut self, seen: Seen, layout: &Layout, kernel: &mut impl Kernel) -> (Vec<Effect>, bool) {
        let stats = layout.backend_id(&self.endpoint).and_then(|id| kernel.backend_stats(id).ok());
        let opened = stats.map_or(0, |stats| stats.opened);
        let seen = seen.and_then(|()| {
            let counted = opened > self.counted;
            counted.then_some(()).ok_or_else(|| "sock_ops does not work: the connection was not counted".to_owned())
        });
        self.counted = opened;
        let repaired = kernel.repair_hooks().unwrap_or_else(|error| {
            tracing::error!("{error:#}");
            Vec::new()
        });
        match (&seen, &self.seen) {
            (Err(why), before) if before.as_ref().err() != Some(why) => tracing::error!("the self-probe failed: {why}"),
            (Ok(()), Err(_)) => tracing::info!("the self-probe passed"),
            _ => {}
        }
        self.seen = seen;
        let log = |why: &String| Effect::Log(Event::new(EventKind::Repaired, format!("{why}: repaired")));
        let mut effects: Vec<Effect> = repaired.iter().map(log).collect();
        if !repaired.is_empty() {
            effects.push(Effect::Act(Action::SelfProbe));
        }
        (effects, !repaired.is_empty())
    }
}
