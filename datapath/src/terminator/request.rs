//! What is looked for, and what becomes of each connection.

use std::{collections::HashMap, fmt, net::SocketAddr, sync::Arc, time::Duration};

use portolan_common::{FrontendKey, SocketStage, SocketState};
use portolan_core::{model::Protocol, table::RemovedEndpoints};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::{IDLE, MOVES_IN, Reason, socket::Connection};

/// What becomes of TCP connections to endpoints that are gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum RemovedEndpointTcp {
    /// They go on until one of their ends closes them.
    #[default]
    Keep,
    /// They are closed once they are idle: nothing was sent or received for five seconds.
    Idle,
    /// They are reset at once.
    Reset,
}

/// How long connections of a pool may live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetime {
    /// Without traffic.
    pub idle: Option<Duration>,
    /// In all.
    pub max_age: Option<Duration>,
}

/// Who gets the connections of a frontend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActiveEndpoints {
    /// In order.
    pub endpoints: Arc<[SocketAddr]>,
    /// A connection to any other endpoint is closed once nothing was sent or received for so long.
    pub idle: Duration,
}

/// What to look for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SweepRequest {
    /// The endpoints that each frontend has, where connections to gone ones shall be looked for. A frontend that is not named is not looked at.
    pub endpoints: HashMap<FrontendKey, Arc<[SocketAddr]>>,
    /// Whether the endpoints of all frontends are known, so that what is not named is gone.
    pub complete: bool,
    /// Endpoints whose connected UDP sockets are looked for.
    pub gone_udp: Option<RemovedEndpoints>,
    /// What becomes of TCP connections to gone endpoints.
    pub removed_endpoint_tcp: RemovedEndpointTcp,
    /// Lifetimes by place and epoch of the pool.
    pub lifetimes: HashMap<(u32, u32), Lifetime>,
    /// The endpoints that get connections of these frontends now: those to any other are closed once they are idle, a few at a time.
    pub served: HashMap<FrontendKey, ActiveEndpoints>,
    /// Whether places and counts of connections are to be led to what there is.
    pub recount: bool,
}

/// What becomes of a connection.
pub(super) enum Action {
    Keep,
    Wait(Duration),
    Close(Reason),
}

impl SweepRequest {
    /// Both in one.
    pub(super) fn followed_by(self, next: Self) -> Self {
        let about_gone = next.is_about_gone();
        let removed_endpoint_tcp = if next.removed_endpoint_tcp == RemovedEndpointTcp::Keep {
            self.removed_endpoint_tcp
        } else {
            next.removed_endpoint_tcp
        };
        let gone_udp = match (self.gone_udp, next.gone_udp) {
            (Some(mut all), Some(more)) => {
                all.add(more);
                Some(all)
            }
            (one, other) => one.or(other),
        };
        // Who looks for what is gone knows what there is; of two the later one knows it better.
        let (endpoints, complete) =
            if about_gone { (next.endpoints, next.complete) } else { (self.endpoints, self.complete) };
        let recount = self.recount || next.recount;
        Self {
            endpoints,
            complete,
            gone_udp,
            removed_endpoint_tcp,
            lifetimes: next.lifetimes,
            served: next.served,
            recount,
        }
    }

    /// Whether connections to endpoints are looked for that are there.
    pub(super) fn is_about_living(&self) -> bool {
        !self.lifetimes.is_empty() || !self.served.is_empty()
    }

    /// Whether connections to gone endpoints are looked for.
    pub(super) fn is_about_gone(&self) -> bool {
        self.gone_udp.is_some() || self.removed_endpoint_tcp != RemovedEndpointTcp::Keep
    }

    /// What becomes of a TCP connection.
    pub(super) fn action_for(&self, connection: &Connection, set: u32) -> Action {
        let Connection { state, idle, .. } = connection;
        if self.removed_endpoint_tcp != RemovedEndpointTcp::Keep && self.is_gone(Protocol::Tcp, state) {
            let waits = self.removed_endpoint_tcp == RemovedEndpointTcp::Idle && *idle < IDLE;
            return if waits { Action::Wait(IDLE - *idle) } else { Action::Close(Reason::Gone) };
        }
        // Before it stands there is nothing to measure by.
        let stands = state.stage == SocketStage::Established as u32;
        if stands
            && state.set == set
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
            None if stands => Action::Close(Reason::Inactive),
            // Busy ones are not looked at all the time.
            left => Action::Wait(left.unwrap_or_default().max(MOVES_IN)),
        }
    }

    pub(super) fn is_gone(&self, protocol: Protocol, state: &SocketState) -> bool {
        match self.endpoints.get(&FrontendKey::new(state.frontend, protocol.number())) {
            Some(endpoints) => endpoints.binary_search(&state.backend.socket_addr()).is_err(),
            None => self.complete,
        }
    }
}

/// How long ago the connection was begun.
fn age(state: &SocketState) -> Duration {
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
    fn orders_that_wait_become_one_in_which_nothing_is_lost() {
        let key = FrontendKey::new("172.16.0.1:53".parse::<SocketAddr>().unwrap().into(), Protocol::Udp.number());
        let udp = SweepRequest {
            endpoints: HashMap::from([(key, [].into())]),
            complete: true,
            gone_udp: Some(RemovedEndpoints::Any),
            ..SweepRequest::default()
        };
        let sweep =
            SweepRequest { lifetimes: HashMap::from([((1, 1), Lifetime::default())]), ..SweepRequest::default() };
        let reset =
            SweepRequest { removed_endpoint_tcp: RemovedEndpointTcp::Reset, recount: true, ..SweepRequest::default() };
        let both = udp.clone().followed_by(sweep.clone());
        assert!(both.complete && both.gone_udp.is_some() && both.endpoints.len() == 1 && both.lifetimes.len() == 1);
        let both = reset.clone().followed_by(udp.clone()).followed_by(sweep);
        assert!(
            both.removed_endpoint_tcp == RemovedEndpointTcp::Reset
                && both.gone_udp.is_some()
                && both.recount
                && both.complete
        );
        // The later one knows better what there is.
        assert!(!udp.followed_by(reset).complete);
    }
}
