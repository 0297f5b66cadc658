//! What the controller's parts ask for: changes of its state, and I/O that the loop does.

use std::{net::SocketAddr, sync::Arc};

use portolan_core::{
    health::Target,
    model::{Finding, Probe, ServiceId},
    policy::PoolKey,
};

use super::{event_log::Event, state_file::PersistedState};
use crate::metrics::collect::HealthCount;

/// What a part asks of the controller.
#[derive(Debug)]
pub(super) enum Effect {
    /// Log an event.
    Log(Event),
    /// Recompute a service, for the health of its endpoints has changed.
    Recompute(ServiceId),
    /// Look through the findings again.
    Findings,
    /// Save the state that outlives the agent.
    Persist,
    /// Count an ejection, or one that did not happen.
    Count(PoolKey, HealthCount),
    /// Do I/O.
    Act(Action),
}

/// An ejection that was not confirmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unconfirmed {
    pub(super) pool: PoolKey,
    pub(super) endpoint: SocketAddr,
    /// What is known without the name of the client.
    pub(super) message: String,
    /// Cookie of the network namespace that saw the failures.
    pub client: u64,
}

/// I/O that the controller asks of the loop. Results come back as inputs.
#[derive(Debug)]
pub enum Action {
    /// Dial an endpoint, to confirm that it fails.
    Confirm {
        /// The endpoint's address.
        endpoint: SocketAddr,
        /// What to ask.
        probe: Arc<Probe>,
    },
    /// Find out whose the network namespace is that alone saw an endpoint fail.
    NameNamespace(Unconfirmed),
    /// Probe a target from now on under this number, or no longer.
    Probe {
        /// What to probe, and how.
        target: Target,
        /// Results come back with it; `None` stops probing.
        number: Option<u64>,
    },
    /// Record a new finding as a Kubernetes Event.
    RecordFinding(Finding),
    /// Run the self-probe now.
    SelfProbe,
    /// Write the state file.
    Save {
        /// The result comes back with it.
        id: u64,
        /// What to write.
        state: PersistedState,
    },
}
