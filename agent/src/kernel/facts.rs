//! Facts about the maps that the fake models. `fake_kernel_models_these_facts` runs them on the fake, and
//! `kernel_confirms_what_the_fake_models` (in the kernel tests) on the real maps. Everything else about the fake is set by
//! tests, such as an error or a missing hook.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use portolan_common::{BackendStats, FrontendKey, FrontendStats, PoolStats, TrackFlags};
use portolan_core::{
    model::{ConnectionPool, IpFamily, NamespacedName, Protocol, ServiceId},
    policy::{PoolKey, Schedule, Share, WeightedGroup},
    table::{BackendId, Completeness, FrontendId, FrontendSpec, Layout, Op, PoolSpec, Sizes, Table, key},
};

use super::Kernel;

/// The sizes that the facts are checked with.
pub const SIZES: Sizes = Sizes { frontends: 8, backends: 16, slots: 256, affinities: 8, connections: 1 << 14 };

/// A fact that does not hold, with what was seen.
pub type Broken = String;

fn address(i: u8) -> SocketAddr {
    SocketAddr::from(([10, 255, 0, i], 9080))
}

fn frontend(i: u8) -> FrontendKey {
    key(SocketAddr::from(([172, 31, 255, i], 80)), Protocol::Tcp)
}

fn pool() -> PoolKey {
    PoolKey {
        service: ServiceId::service(NamespacedName::new("facts", "web")),
        port: 80,
        protocol: Protocol::Tcp,
        subset: None,
        family: IpFamily::V4,
    }
}

/// Frontends by number, each with its members; all of them use one pool with limits.
fn table(frontends: &[(u8, &[u8])]) -> Table {
    let limits = ConnectionPool { max_connections: Some(7), ..ConnectionPool::default() };
    let pool = PoolSpec { key: pool(), limits, strict: false, watch: TrackFlags::USE };
    let spec = |members: &[u8]| {
        let members: Vec<_> = members.iter().map(|member| (address(*member), 1)).collect();
        let endpoints = members.iter().map(|(address, _)| *address).collect();
        let schedule = Schedule::new(vec![WeightedGroup::in_turn(Share::from(1), members)]);
        FrontendSpec {
            schedule: Arc::new(schedule),
            endpoints,
            pools: Arc::new([pool.clone()]),
            affinity: Some(Duration::from_secs(5)),
            random: false,
        }
    };
    Table { frontends: frontends.iter().map(|(i, members)| (frontend(*i), spec(members))).collect() }
}

macro_rules! check {
    ($holds:expr, $($what:tt)*) => { if !$holds { return Err(format!($($what)*)) } };
}

/// Checks every fact on a kernel whose maps are empty.
///
/// # Errors
/// Returns the first fact that does not hold.
pub fn check(kernel: &mut impl Kernel) -> Result<(), Broken> {
    let failed = |error: portolan_datapath::Error| format!("{error:#}");
    let empty = kernel.read_back(SIZES).map_err(failed)?;
    check!(empty.frontends.is_empty() && empty.backends.is_empty(), "maps are not empty at first: {empty:?}");

    // Adopting nothing, for the seed of the hash.
    let mut layout = Layout::adopt(SIZES, empty);
    let (ops, rejected) = layout.update(&table(&[(1, &[1, 2]), (2, &[2, 3])]), Completeness::Complete);
    check!(rejected.is_empty(), "{rejected:?}");
    check!(kernel.frontend(&frontend(1)).is_none(), "a frontend exists before it is added");
    kernel.apply(&ops).map_err(failed)?;

    // What was written is read back, with the ids and epochs that were used.
    let held = kernel.read_back(SIZES).map_err(failed)?;
    let ids: BTreeMap<SocketAddr, _> =
        held.backends.iter().map(|(id, backend)| (backend.endpoint.socket_addr(), *id)).collect();
    let expected: BTreeMap<SocketAddr, _> = layout.backends().collect();
    check!(ids == expected, "backends that are read back: {ids:?}, written: {expected:?}");
    check!(held.epochs.iter().all(|(_, epoch)| *epoch == 1), "epochs of first use: {:?}", held.epochs);
    let (pool_id, pool_epoch) = layout.pool(&pool()).ok_or("the pool has no id")?;
    check!(
        held.pools.iter().any(|(id, limits)| *id == pool_id && limits.epoch == pool_epoch),
        "pools: {:?}",
        held.pools
    );
    for i in [1, 2] {
        let (id, published, generation) = kernel.frontend(&frontend(i)).ok_or("a published frontend is missing")?;
        check!(Some(id) == layout.frontend_id(&frontend(i)), "id of frontend {i}: {id}");
        let same = |pinned: &portolan_core::table::PinnedFrontend| {
            (pinned.key, pinned.id, pinned.epoch) == (frontend(i), id, 1)
                && (pinned.published, pinned.generation) == (published, generation)
        };
        check!(held.frontends.iter().any(same), "frontend {i} is not read back: {:?}", held.frontends);
    }

    // A layout that adopts it writes nothing for the same table but versions of its own, and keeps every backend id.
    let mut adopted = Layout::adopt(SIZES, held);
    check!(adopted.adopted() == 2, "adopted frontends: {}", adopted.adopted());
    let (ops, _) = adopted.update(&table(&[(1, &[1, 2]), (2, &[2, 3])]), Completeness::Complete);
    check!(!ops.iter().any(|op| matches!(op, Op::SetBackend(..) | Op::RemoveFrontend(..))), "adopting writes {ops:?}");
    kernel.apply(&ops).map_err(failed)?;

    // Counters start at zero, with the epoch of their backend.
    let backend = adopted.backend_id(&address(1)).ok_or("backend 1 has no id")?;
    let stats = kernel.backend_stats(backend).map_err(failed)?;
    check!(stats == BackendStats { epoch: 1, ..BackendStats::default() }, "counters of a new backend: {stats:?}");
    let stats = kernel.pool_stats(pool_id).map_err(failed)?;
    check!(stats == PoolStats::default(), "counters of a new pool: {stats:?}");
    let id = adopted.frontend_id(&frontend(1)).ok_or("frontend 1 has no id")?;
    let stats = kernel.frontend_stats(id).map_err(failed)?;
    check!(stats == FrontendStats::default(), "counters of a new frontend: {stats:?}");
    check!(!kernel.backend_use(backend).map_err(failed)?.used_by_others(1, 0), "a new backend is in use");
    check!(kernel.failures(backend).map_err(failed)? == 0, "a new backend has failures");
    kernel.acknowledge_failures(backend, 1).map_err(failed)?;

    // An id that is not in use has counters of zero.
    let unused = kernel.backend_stats(BackendId::new(SIZES.backends - 1)).map_err(failed)?;
    check!(unused == BackendStats::default(), "counters of an unused backend: {unused:?}");
    let unused = kernel.frontend_stats(FrontendId::new(SIZES.frontends - 1)).map_err(failed)?;
    check!(unused == FrontendStats::default(), "counters of an unused frontend: {unused:?}");

    // A removed frontend is gone, and the others are not.
    let (ops, _) = adopted.update(&table(&[(2, &[2, 3])]), Completeness::Complete);
    kernel.apply(&ops).map_err(failed)?;
    check!(kernel.frontend(&frontend(1)).is_none(), "a removed frontend is still there");
    check!(kernel.frontend(&frontend(2)).is_some(), "a frontend that stays is gone");
    let held = kernel.read_back(SIZES).map_err(failed)?;
    check!(held.frontends.len() == 1, "frontends after the removal: {:?}", held.frontends);
    // Epochs of backends outlive their use, so that a reused id is distinct from its previous use.
    check!(held.epochs.len() == 3, "epochs after the removal: {:?}", held.epochs);

    // Nothing is lost in the counters of the programs by all this.
    let lost = kernel.counters().map_err(failed)?;
    check!(lost.events_lost == 0 && lost.inconsistent == 0, "{lost:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fake::FakeKernel;

    #[test]
    fn fake_kernel_models_these_facts() {
        check(&mut FakeKernel::default()).unwrap();
    }
}
