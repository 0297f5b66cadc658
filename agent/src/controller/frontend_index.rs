//! What the ids of frontends stand for.

use std::collections::{BTreeSet, HashMap};

use portolan_core::{
    model::NamespacedName,
    policy::{Assignment, PoolKey},
    table::{self, FrontendId, Layout},
};

/// The pools, and the service and port, behind each frontend id.
#[derive(Debug, Default)]
pub(super) struct FrontendIndex {
    /// With the lower half of the id's epoch.
    pools: HashMap<FrontendId, (u16, Vec<PoolKey>)>,
    services: HashMap<FrontendId, (NamespacedName, u16)>,
}

impl FrontendIndex {
    /// Forgets all frontends.
    pub(super) fn clear(&mut self) {
        self.pools.clear();
        self.services.clear();
    }

    /// Indexes the frontends of an assignment that the kernel holds.
    pub(super) fn insert(&mut self, assignment: &Assignment, layout: &Layout) {
        // A route may name a pool twice.
        let pools: BTreeSet<PoolKey> = assignment.routes.iter().map(|route| route.pool.key.clone()).collect();
        let pools: Vec<PoolKey> = pools.into_iter().collect();
        for frontend in &assignment.frontends {
            let key = table::key(*frontend, assignment.protocol);
            if let (Some(id), Some(epoch)) = (layout.frontend_id(&key), layout.frontend_epoch(&key)) {
                self.pools.insert(id, (epoch as u16, pools.clone()));
                self.services.insert(id, (assignment.service.name.clone(), assignment.port));
            }
        }
    }

    /// Returns the pools that connections to a frontend may use, by its id and the lower half of the id's epoch.
    /// `None` if the id belongs to another frontend by now.
    pub(super) fn pools(&self, id: FrontendId, epoch: u16) -> Option<&[PoolKey]> {
        self.pools.get(&id).filter(|(own, _)| *own == epoch).map(|(_, pools)| pools.as_slice())
    }

    /// Returns the pools of all frontends, each once or more often.
    pub(super) fn all_pools(&self) -> impl Iterator<Item = &PoolKey> {
        self.pools.values().flat_map(|(_, pools)| pools)
    }

    /// Returns the service and port of each frontend.
    pub(super) fn services(&self) -> impl Iterator<Item = (FrontendId, &NamespacedName, u16)> {
        self.services.iter().map(|(id, (service, port))| (*id, service, *port))
    }
}
