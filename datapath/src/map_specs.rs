//! Every BPF map of the object, in one table. Pin paths, sizes and the comparison of pinned maps derive from it.
//!
//! A map that the object has and this table lacks (or the other way round) fails `object_and_table_agree`.

use portolan_common::{
    Affinity, AffinityKey, Backend, BackendStats, BackendUse, ClientUse, Connection, ConnectionExtra, Counter,
    DatagramFlows, Entry, Frontend4, Frontend6, FrontendVersion, OptOut, PoolLimits, PoolStats, Slot, SocketState,
    TIME_BUCKETS,
};
use portolan_core::table::Sizes;

/// Which folder a map is pinned in, and so how long it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The folder of a map set: a new schema or new sizes get a new set, and the old one is removed once the new one is in use.
    Set,
    /// A folder that all sets share: flows of UDP sockets, and excluded pods. Only a new `SHARED_LAYOUT` replaces it.
    Shared,
    /// A folder that all sets share: the state of connected sockets. Only a new `SOCKET_LAYOUT` replaces it.
    Sockets,
    /// The same folder, but another number of entries of `CONNECTIONS` gets a new map.
    Connections,
}

/// The number of entries of a map.
#[derive(Clone, Copy)]
pub(crate) enum Entries {
    /// As the object says: this many.
    Fixed(u32),
    /// A setting of the agent.
    Setting(fn(&Sizes) -> u32),
}

impl Entries {
    /// Returns the number of entries with these settings.
    pub(crate) fn number(self, sizes: &Sizes) -> u32 {
        match self {
            Self::Fixed(entries) => entries,
            Self::Setting(entries) => entries(sizes),
        }
    }
}

/// One BPF map.
#[derive(Clone, Copy)]
pub(crate) struct MapSpec {
    /// Its name in the object, and the name of its pin.
    pub(crate) name: &'static str,
    /// Bytes of a key.
    pub(crate) key_size: u32,
    /// Bytes of a value; 0 for the ring buffer, which has none.
    pub(crate) value_size: u32,
    /// Where it is pinned. Every map is pinned: programs outlive the agent.
    pub(crate) scope: Scope,
    /// How many entries it has.
    pub(crate) entries: Entries,
    /// Whether the agent maps it into its memory (`BPF_F_MMAPABLE`).
    pub(crate) mmapable: bool,
    /// Whether `portolan doctor` counts its entries in use; only hash maps can be counted from outside.
    pub(crate) countable: bool,
}

impl MapSpec {
    const fn new<K, V>(name: &'static str, scope: Scope, entries: Entries) -> Self {
        let (key_size, value_size) = (size_of::<K>() as u32, size_of::<V>() as u32);
        Self { name, key_size, value_size, scope, entries, mmapable: false, countable: false }
    }

    /// An array of a map set, whose number of entries is a setting.
    const fn array<V>(name: &'static str, entries: fn(&Sizes) -> u32) -> Self {
        Self::new::<u32, V>(name, Scope::Set, Entries::Setting(entries))
    }

    /// A hash map of a map set, whose number of entries is a setting.
    const fn hash<K, V>(name: &'static str, entries: fn(&Sizes) -> u32) -> Self {
        Self { countable: true, ..Self::new::<K, V>(name, Scope::Set, Entries::Setting(entries)) }
    }

    /// A memory-mapped array beside `CONNECTIONS`.
    const fn connections<V>(name: &'static str, entries: fn(&Sizes) -> u32) -> Self {
        Self::new::<u32, V>(name, Scope::Connections, Entries::Setting(entries)).mmapable()
    }

    const fn mmapable(self) -> Self {
        Self { mmapable: true, ..self }
    }
}

pub(crate) const FRONTENDS4: MapSpec = MapSpec::array::<Frontend4>("FRONTENDS4", Sizes::frontend_lines).mmapable();
pub(crate) const FRONTENDS6: MapSpec = MapSpec::array::<Frontend6>("FRONTENDS6", Sizes::frontend_lines).mmapable();
/// Both families share it.
pub(crate) const FRONTEND_OVERFLOW: MapSpec = MapSpec {
    // Frontends are counted as a whole.
    countable: false,
    ..MapSpec::hash::<u64, u32>("FRONTEND_OVERFLOW", |sizes| 2 * sizes.frontend_overflow())
};
pub(crate) const ENTRIES: MapSpec = MapSpec::array::<Entry>("ENTRIES", |sizes| sizes.slots).mmapable();
pub(crate) const VERSIONS: MapSpec = MapSpec::array::<FrontendVersion>("VERSIONS", Sizes::versions).mmapable();
pub(crate) const SLOTS: MapSpec = MapSpec::array::<Slot>("SLOTS", |sizes| sizes.slots).mmapable();
pub(crate) const RUNS: MapSpec = MapSpec::array::<u32>("RUNS", |sizes| sizes.slots);
pub(crate) const BACKENDS: MapSpec = MapSpec::array::<Backend>("BACKENDS", |sizes| sizes.backends);
pub(crate) const POOLS: MapSpec = MapSpec::array::<PoolLimits>("POOLS", Sizes::pools);
pub(crate) const BACKEND_STATS: MapSpec =
    MapSpec::array::<BackendStats>("BACKEND_STATS", |sizes| sizes.backends).mmapable();
pub(crate) const BACKEND_USE: MapSpec = MapSpec::array::<BackendUse>("BACKEND_USE", |sizes| sizes.backends).mmapable();
pub(crate) const POOL_STATS: MapSpec = MapSpec::array::<PoolStats>("POOL_STATS", Sizes::pools).mmapable();
/// Failures of backends, and how far the agent has evaluated them.
pub(crate) const FAILURES: MapSpec = MapSpec::array::<u64>("FAILURES", |sizes| sizes.backends).mmapable();
pub(crate) const AFFINITY: MapSpec = MapSpec::hash::<AffinityKey, Affinity>("AFFINITY", |sizes| sizes.affinities);
/// Latency histograms.
pub(crate) const TIMES: MapSpec = MapSpec::new::<u32, u64>("TIMES", Scope::Set, Entries::Fixed(2 * TIME_BUCKETS));
pub(crate) const COUNTERS: MapSpec = MapSpec::new::<u32, u64>("COUNTERS", Scope::Set, Entries::Fixed(Counter::COUNT));
pub(crate) const EVENTS: MapSpec = MapSpec::new::<(), ()>("EVENTS", Scope::Set, Entries::Fixed(0x10_0000));
pub(crate) const CONNECTIONS: MapSpec = MapSpec::connections::<Connection>("CONNECTIONS", |sizes| sizes.connections);
pub(crate) const CONNECTION_EXTRAS: MapSpec =
    MapSpec::connections::<ConnectionExtra>("CONNECTION_EXTRAS", |sizes| sizes.connections);
/// Its counts are those of `CONNECTIONS`, with which it comes and goes.
pub(crate) const CLIENTS: MapSpec = MapSpec {
    entries: Entries::Fixed(ClientUse::CAPACITY),
    ..MapSpec::connections::<ClientUse>("CLIENTS", |_| ClientUse::CAPACITY)
};
pub(crate) const SOCKETS: MapSpec = MapSpec::new::<u32, SocketState>("SOCKETS", Scope::Sockets, Entries::Fixed(0));
pub(crate) const NODE_FLAGS: MapSpec =
    MapSpec::new::<u32, u64>("NODE_FLAGS", Scope::Sockets, Entries::Fixed(1)).mmapable();
pub(crate) const DATAGRAMS: MapSpec = MapSpec::new::<u32, DatagramFlows>("DATAGRAMS", Scope::Shared, Entries::Fixed(0));
pub(crate) const OPTED_OUT: MapSpec =
    MapSpec::new::<u64, u32>("OPTED_OUT", Scope::Shared, Entries::Fixed(OptOut::CAPACITY));
pub(crate) const OPT_OUT_FILTER: MapSpec = MapSpec::new::<u32, u64>("OPT_OUT_FILTER", Scope::Shared, Entries::Fixed(1));

/// All maps of the object.
pub(crate) const MAPS: [MapSpec; 25] = [
    FRONTENDS4,
    FRONTENDS6,
    FRONTEND_OVERFLOW,
    ENTRIES,
    VERSIONS,
    SLOTS,
    RUNS,
    BACKENDS,
    POOLS,
    BACKEND_STATS,
    BACKEND_USE,
    POOL_STATS,
    FAILURES,
    AFFINITY,
    TIMES,
    COUNTERS,
    EVENTS,
    CONNECTIONS,
    CONNECTION_EXTRAS,
    CLIENTS,
    SOCKETS,
    NODE_FLAGS,
    DATAGRAMS,
    OPTED_OUT,
    OPT_OUT_FILTER,
];

/// Returns the maps of one scope.
pub(crate) fn of_scope(scope: Scope) -> impl Iterator<Item = &'static MapSpec> {
    MAPS.iter().filter(move |spec| spec.scope == scope)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::programs;

    const BPF_F_MMAPABLE: u32 = 1 << 10;

    #[test]
    fn object_and_table_agree() {
        let Ok(object) = programs::object() else {
            // `cargo xtask test` sets the toolchain up first, so that this holds there.
            return eprintln!("built without the eBPF toolchain: there is no object to compare with");
        };
        let object = aya_obj::Object::parse(object).unwrap();
        // Sections of constants, and aya-log's own maps.
        let is_own = |name: &str| !name.starts_with('.') && !name.starts_with("AYA_LOG");
        let compiled: BTreeMap<&str, _> = object.maps.iter().map(|(name, map)| (name.as_str(), map)).collect();
        let compiled: BTreeMap<&str, _> = compiled.into_iter().filter(|(name, _)| is_own(name)).collect();
        let names: Vec<&str> = compiled.keys().copied().collect();
        let mut listed: Vec<&str> = MAPS.iter().map(|spec| spec.name).collect();
        listed.sort_unstable();
        assert_eq!(names, listed, "maps of the object, and of `MAPS`");
        for spec in MAPS {
            let map = compiled[spec.name];
            let fixed = match spec.entries {
                Entries::Fixed(entries) => entries,
                // What the object says is a placeholder that the loader overrides.
                Entries::Setting(_) => map.max_entries(),
            };
            assert_eq!(
                (map.key_size(), map.value_size(), map.max_entries(), map.map_flags() & BPF_F_MMAPABLE != 0),
                (spec.key_size, spec.value_size, fixed, spec.mmapable),
                "{}: key size, value size, entries, mmapable",
                spec.name
            );
        }
    }
}
