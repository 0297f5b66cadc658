//! Sweep requests, and the decision for each connection.

use std::{collections::HashMap, fmt, net::SocketAddr, sync::Arc, time::Duration};

use portolan_common::FrontendKey;
use portolan_core::{model::Protocol, table::RemovedEndpoints};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::{
    IDLE, MOVE_INTERVAL, Reason,
    socket::{Connection, State},
};

/// What happens to TCP connections to removed endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum RemovedEndpointTcp {
    /// They stay open until either side closes them.
    #[default]
    Keep,
    /// They are closed once no data was sent or received for five seconds.
    Idle,
    /// They are reset immediately.
    Reset,
}

/// Lifetime limits of the connections of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetime {
    /// `idleTimeout`: maximum time without sent or received data; `None` for no limit.
    pub idle: Option<Duration>,
    /// `maxConnectionDuration`: maximum time since the SYN; `None` for no limit.
    pub max_age: Option<Duration>,
}

/// The endpoints that receive the new connections of a frontend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActiveEndpoints {
    /// The endpoints, sorted.
    pub endpoints: Arc<[SocketAddr]>,
    /// A connection to any other endpoint is closed after this long without sent or received data.
    pub idle: Duration,
}

/// What a sweep looks for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SweepRequest {
    /// All endpoints of each frontend, sorted. Empty if the sweep does not look for removed endpoints.
    /// For a frontend that is not listed, see `complete`.
    pub endpoints: HashMap<FrontendKey, Arc<[SocketAddr]>>,
    /// Whether `endpoints` lists all frontends.
    /// If so, a frontend that is not listed has no endpoints left; if not, its connections stay.
    pub complete: bool,
    /// Removed endpoints whose connected UDP sockets are closed; `None` to skip UDP.
    pub removed_udp: Option<RemovedEndpoints>,
    /// What happens to TCP connections to removed endpoints.
    pub removed_endpoint_tcp: RemovedEndpointTcp,
    /// Lifetime limits by (index in `POOLS`, lower half of the epoch) of the pool.
    pub lifetimes: HashMap<(u32, u16), Lifetime>,
    /// The endpoints that receive connections now, by frontend.
    /// Idle connections to other endpoints are closed, subject to a rate limit.
    pub served: HashMap<FrontendKey, ActiveEndpoints>,
    /// Whether to reconcile the entries of `CONNECTIONS` and the counts of active connections with the sockets that exist.
    pub recount: bool,
}

/// The decision for one connection.
pub(super) enum Action {
    Keep,
    Wait(Duration),
    Close(Reason),
}

impl SweepRequest {
    /// Merges a request with the one queued after it. The later `lifetimes` and `served` replace the earlier ones.
    pub(super) fn followed_by(self, next: Self) -> Self {
        let removed = next.looks_for_removed();
        let removed_endpoint_tcp = if next.removed_endpoint_tcp == RemovedEndpointTcp::Keep {
            self.removed_endpoint_tcp
        } else {
            next.removed_endpoint_tcp
        };
        let removed_udp = match (self.removed_udp, next.removed_udp) {
            (Some(mut all), Some(more)) => {
                all.add(more);
                Some(all)
            }
            (one, other) => one.or(other),
        };
        // A request that looks for removed endpoints lists the existing ones. Of two lists, use the later one.
        let (endpoints, complete) =
            if removed { (next.endpoints, next.complete) } else { (self.endpoints, self.complete) };
        let recount = self.recount || next.recount;
        Self {
            endpoints,
            complete,
            removed_udp,
            removed_endpoint_tcp,
            lifetimes: next.lifetimes,
            served: next.served,
            recount,
        }
    }

    /// Returns whether the sweep looks for connections to existing endpoints.
    pub(super) fn looks_for_outlived(&self) -> bool {
        !self.lifetimes.is_empty() || !self.served.is_empty()
    }

    /// Returns whether the sweep looks for connections to removed endpoints.
    pub(super) fn looks_for_removed(&self) -> bool {
        self.removed_udp.is_some() || self.removed_endpoint_tcp != RemovedEndpointTcp::Keep
    }

    /// Decides what to do with a TCP connection. `set` is the id of the map set that pool ids refer to.
    pub(super) fn action_for(&self, connection: &Connection, set: u32) -> Action {
        let Connection { state, idle, .. } = connection;
        if self.removed_endpoint_tcp != RemovedEndpointTcp::Keep && self.is_gone(Protocol::Tcp, state) {
            let waits = self.removed_endpoint_tcp == RemovedEndpointTcp::Idle && *idle < IDLE;
            return if waits { Action::Wait(IDLE - *idle) } else { Action::Close(Reason::Gone) };
        }
        // Lifetime limits apply only once the connection is established.
        let established = state.is_established();
        if established
            && state.set == set as u16
            && state.pool != 0
            && let Some(lifetime) = self.lifetimes.get(&(state.pool, state.pool_epoch))
        {
            if lifetime.max_age.is_some_and(|most| age(state) > most) {
                return Action::Close(Reason::Age);
            }
            if lifetime.idle.is_some_and(|most| *idle > most) {
                return Action::Close(Reason::Idle);
            }
        }
        let Some(served) = self.served.get(&FrontendKey::new(state.frontend, Protocol::Tcp.number())) else {
            return Action::Keep;
        };
        if served.endpoints.binary_search(&state.backend.socket_addr()).is_ok() {
            return Action::Keep;
        }
        match served.idle.checked_sub(*idle) {
            None if established => Action::Close(Reason::Inactive),
            // Bound how often busy connections are checked.
            left => Action::Wait(left.unwrap_or_default().max(MOVE_INTERVAL)),
        }
    }

    pub(super) fn is_gone(&self, protocol: Protocol, state: &State) -> bool {
        match self.endpoints.get(&FrontendKey::new(state.frontend, protocol.number())) {
            Some(endpoints) => endpoints.binary_search(&state.backend.socket_addr()).is_err(),
            None => self.complete,
        }
    }
}

/// Returns the time since the connection's SYN.
fn age(state: &State) -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
    now.saturating_sub(Duration::from_nanos(state.started_ns))
}

impl fmt::Display for RemovedEndpointTcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "keep",
            Self::Idle => "idle",
            Self::Reset => "reset",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_queued_requests_loses_nothing() {
        let key = FrontendKey::new("172.16.0.1:53".parse::<SocketAddr>().unwrap().into(), Protocol::Udp.number());
        let udp = SweepRequest {
            endpoints: HashMap::from([(key, [].into())]),
            complete: true,
            removed_udp: Some(RemovedEndpoints::Any),
            ..SweepRequest::default()
        };
        let sweep =
            SweepRequest { lifetimes: HashMap::from([((1, 1), Lifetime::default())]), ..SweepRequest::default() };
        let reset =
            SweepRequest { removed_endpoint_tcp: RemovedEndpointTcp::Reset, recount: true, ..SweepRequest::default() };
        let both = udp.clone().followed_by(sweep.clone());
        assert!(both.complete && both.removed_udp.is_some() && both.endpoints.len() == 1 && both.lifetimes.len() == 1);
        let both = reset.clone().followed_by(udp.clone()).followed_by(sweep);
        assert!(
            both.removed_endpoint_tcp == RemovedEndpointTcp::Reset
                && both.removed_udp.is_some()
                && both.recount
                && both.complete
        );
        // The later list of endpoints is more recent.
        assert!(!udp.followed_by(reset).complete);
    }
}
