//! A model of the kernel's maps, and the invariants that must hold after every single write.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proptest::prelude::*;

use super::*;
use crate::{
    model::{NamespacedName, ServiceId},
    policy::{Schedule, Share, WeightedGroup},
    table::key,
};

/// The contents of the maps.
#[derive(Clone, Default)]
struct Maps {
    frontends: BTreeMap<FrontendKey, u32>,
    current: BTreeMap<u32, u32>,
    versions: BTreeMap<u32, FrontendVersion>,
    slots: BTreeMap<u32, Slot>,
    runs: BTreeMap<u32, u32>,
    backends: BTreeMap<u32, Backend>,
    pools: BTreeMap<u32, PoolLimits>,
}

impl Maps {
    fn write(&mut self, op: &Op) {
        match op {
            Op::SetBackend(id, backend) => drop(self.backends.insert(*id, *backend)),
            Op::ResetPool(id, limits) | Op::SetPool(id, limits) => drop(self.pools.insert(*id, *limits)),
            Op::SetRuns(first, ids) => self.runs.extend((*first..).zip(ids.iter().copied())),
            Op::SetSlots(first, slots) => self.slots.extend((*first..).zip(slots.iter().copied())),
            Op::SetVersion(index, version) => drop(self.versions.insert(*index, *version)),
            Op::ResetFrontend(_) => {}
            Op::Publish(id, index) => drop(self.current.insert(*id, *index)),
            Op::AddFrontend(key, id) => drop(self.frontends.insert(*key, *id)),
            Op::RemoveFrontend(key) => drop(self.frontends.remove(key)),
        }
    }

    /// Returns the active version of a frontend.
    /// Panics if the version belongs to another frontend.
    fn version(&self, key: &FrontendKey) -> FrontendVersion {
        let version = self.versions[&self.current[&self.frontends[key]]];
        assert_eq!(version.key, *key);
        version
    }

    /// Returns the pick of a connection for each value of the cursor, computed as the kernel does.
    /// Panics if an entry is missing.
    fn picks(&self, key: &FrontendKey, count: u64) -> Vec<Option<SocketAddr>> {
        self.picks_of(&self.version(key), count)
    }

    fn picks_of(&self, version: &FrontendVersion, count: u64) -> Vec<Option<SocketAddr>> {
        let period = u64::from(version.period);
        (0..if period == 0 { 0 } else { count })
            .map(|turn| {
                let slot = self.slots[&(version.base + (turn % period) as u32)];
                (slot.len > 0).then(|| self.backends[&self.runs[&slot.entry(turn / period)]].endpoint.socket_addr())
            })
            .collect()
    }

    /// Returns the endpoints that clients of a frontend may return to.
    fn members(&self, key: &FrontendKey) -> BTreeSet<SocketAddr> {
        let version = self.version(key);
        let ids: Vec<u32> = (version.members..version.members + version.member_count).map(|i| self.runs[&i]).collect();
        assert!(ids.is_sorted(), "the kernel's binary search needs sorted members");
        ids.iter().map(|id| self.backends[id].endpoint.socket_addr()).collect()
    }

    /// Returns the state that a new agent would read from the maps.
    fn pinned_state(&self, layout: &Layout) -> PinnedState {
        let of = |key: &FrontendKey| {
            let version = self.version(key);
            let slots = || (version.base..version.base + version.period).map(|i| self.slots[&i]);
            let members = (version.member_count > 0).then_some((version.members, 2 * version.member_count));
            let used = || slots().map(|slot| (slot.first, slot.len)).chain(members);
            let start = used().map(|(first, _)| first).min().unwrap_or(0);
            let end = used().map(|(first, len)| first + len).max().unwrap_or(0);
            let id = self.frontends[key];
            PinnedFrontend { id, index: self.current[&id], version, runs: (start, end - start) }
        };
        let used: BTreeSet<u32> = self.runs.values().copied().collect();
        let is_current = |id: &u32| layout.backend_id(&self.backends[id].endpoint.socket_addr()) == Some(*id);
        PinnedState {
            frontends: self.frontends.keys().map(of).collect(),
            backends: used.into_iter().filter(is_current).map(|id| (id, self.backends[&id])).collect(),
            epochs: self.backends.iter().map(|(id, backend)| (*id, backend.epoch)).collect(),
            pools: self.pools.iter().map(|(id, limits)| (*id, *limits)).collect(),
            pool_epochs: self.pools.iter().map(|(id, limits)| (*id, limits.epoch)).collect(),
        }
    }

    fn write_all(&mut self, ops: &[Op]) {
        ops.iter().for_each(|op| self.write(op));
    }
}

/// Ends an epoch and reclaims at once, as if no program were running.
fn reclaim(layout: &mut Layout) {
    if let Some(epoch) = layout.end_epoch() {
        layout.reclaim(epoch);
    }
}

const PICKS: u64 = 60;

/// Computes the expected picks from the schedule alone.
fn expected(schedule: &Schedule) -> Vec<Option<SocketAddr>> {
    let turns = schedule.turns.len();
    (0..if turns == 0 { 0 } else { PICKS as usize })
        .map(|i| {
            let turn = schedule.turns[i % turns];
            let run = &schedule.runs[turn.run as usize];
            let visit = (i / turns) * run.visits as usize + turn.visit as usize;
            run.members.get(visit.checked_rem(run.members.len())?).copied()
        })
        .collect()
}

fn address(i: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, i], 9080))
}

fn frontend(i: u8) -> FrontendKey {
    key(SocketAddr::from(([172, 16, 0, i], 80)), Protocol::Tcp)
}

/// A frontend and its groups, each a share and its members.
type Spec = (u8, Vec<(u8, Vec<u8>)>);

fn table(spec: &[Spec]) -> Table {
    let frontends = spec.iter().map(|(i, groups)| {
        let groups = groups.iter().map(|(share, members)| {
            let members = members.iter().map(|member| (address(*member), 1)).collect();
            WeightedGroup::in_turn(Share::from(u128::from(*share)), members)
        });
        let schedule = Schedule::new(groups.collect());
        let endpoints: BTreeSet<_> = schedule.runs.iter().flat_map(|run| run.members.iter().copied()).collect();
        let entry = FrontendSpec {
            schedule: Arc::new(schedule),
            endpoints: endpoints.into_iter().collect(),
            pools: Arc::new([]),
            affinity: Some(Duration::from_secs(10)),
            random: false,
        };
        (frontend(*i), entry)
    });
    Table { frontends: frontends.collect() }
}

fn tables() -> impl Strategy<Value = Vec<Table>> {
    let members = prop::collection::btree_set(0u8..12, 0..5).prop_map(|set| set.into_iter().collect::<Vec<_>>());
    let groups = prop::collection::vec((1u8..6, members), 0..3);
    let spec = prop::collection::btree_map(0u8..5, groups, 0..5).prop_map(|map| map.into_iter().collect::<Vec<_>>());
    prop::collection::vec(spec.prop_map(|spec| table(&spec)), 1..12)
}

/// Sizes so small that ids and ranges are reused many times.
const SMALL: Sizes = Sizes { frontends: 12, backends: 30, slots: 400, affinities: 1 };

proptest! {
    #[test]
    fn every_update_prefix_is_consistent(tables in tables(), settles in prop::collection::vec(any::<bool>(), 12)) {
        let (mut layout, mut maps) = (Layout::new(SMALL), Maps::default());
        let mut before = Table::default();
        // Versions that a program may still be reading, with the picks that they gave.
        let mut read: Vec<(FrontendVersion, Vec<Option<SocketAddr>>)> = Vec::new();
        for (table, settles) in tables.iter().zip(settles) {
            for key in maps.frontends.keys() {
                read.push((maps.version(key), maps.picks(key, PICKS)));
            }
            let (ops, refused) = layout.update(table, Completeness::Complete);
            // Without grace periods, ranges run out: the update is rejected, and nothing else breaks.
            prop_assume!(refused.is_empty());
            for op in &ops {
                maps.write(op);
                for key in maps.frontends.keys() {
                    let picks = maps.picks(key, PICKS);
                    let versions = [&before, table].into_iter().filter_map(|table| table.frontends.get(key));
                    let mut versions = versions.map(|entry| expected(&entry.schedule));
                    prop_assert!(versions.any(|version| version == picks), "a partial update is visible");
                }
                for (version, picks) in &read {
                    prop_assert_eq!(&maps.picks_of(version, PICKS), picks, "a version still in use has changed");
                }
            }
            let present: BTreeSet<_> = maps.frontends.keys().collect();
            prop_assert_eq!(present, table.frontends.keys().collect());
            for (key, entry) in &table.frontends {
                let picks = expected(&entry.schedule);
                prop_assert_eq!(&maps.picks(key, PICKS), &picks);
                let members = entry.schedule.runs.iter().flat_map(|run| run.members.iter().copied()).collect();
                prop_assert_eq!(maps.members(key), members);
            }
            let again = layout.update(table, Completeness::Complete);
            prop_assert_eq!(again, (Vec::new(), Vec::new()), "an unchanged table causes writes");
            before = table.clone();
            if settles {
                reclaim(&mut layout);
                read.clear();
            }
        }
    }

    /// Changing a table in parts has the same result as changing it at once.
    #[test]
    fn partial_changes_add_up_to_a_full_update(tables in tables(), parts in 1usize..4) {
        let (mut layout, mut maps) = (Layout::new(Sizes::default()), Maps::default());
        let mut before = Table::default();
        for table in &tables {
            reclaim(&mut layout);
            let keys: BTreeSet<_> = before.frontends.keys().chain(table.frontends.keys()).copied().collect();
            for part in 0..parts {
                let own: Vec<_> = keys.iter().skip(part).step_by(parts).copied().collect();
                let set = own.iter().filter_map(|key| Some((*key, table.frontends.get(key)?.clone())));
                let set = Table { frontends: set.collect() };
                let gone: Vec<_> = own.into_iter().filter(|key| !table.frontends.contains_key(key)).collect();
                let (ops, refused) = layout.change(&set, &gone, Completeness::Complete);
                prop_assert!(refused.is_empty());
                maps.write_all(&ops);
            }
            prop_assert_eq!(maps.frontends.keys().collect::<Vec<_>>(), table.frontends.keys().collect::<Vec<_>>());
            for (key, entry) in &table.frontends {
                prop_assert_eq!(maps.picks(key, PICKS), expected(&entry.schedule));
            }
            // A further update is a no-op.
            prop_assert_eq!(layout.update(table, Completeness::Complete), (Vec::new(), Vec::new()));
            before = table.clone();
        }
    }

    #[test]
    fn new_agent_adopts_pinned_state(first in tables(), second in tables()) {
        let (mut layout, mut maps) = (Layout::new(Sizes::default()), Maps::default());
        for table in &first {
            layout.update(table, Completeness::Complete).0.iter().for_each(|op| maps.write(op));
        }
        let previous = maps.clone();
        let held = maps.pinned_state(&layout);
        let mut layout = Layout::from_held(Sizes::default(), held);
        // Nothing is known yet, so nothing may be removed.
        layout.update(&Table::default(), Completeness::Partial).0.iter().for_each(|op| maps.write(op));
        for key in previous.frontends.keys() {
            prop_assert_eq!(maps.picks(key, PICKS), previous.picks(key, PICKS));
        }
        let last = second.last().unwrap();
        for op in layout.update(last, Completeness::Complete).0 {
            maps.write(&op);
            for key in maps.frontends.keys() {
                let picks = maps.picks(key, PICKS);
                let old = previous.frontends.contains_key(key) && picks == previous.picks(key, PICKS);
                prop_assert!(old || last.frontends.get(key).is_some_and(|entry| picks == expected(&entry.schedule)));
            }
        }
        prop_assert_eq!(maps.frontends.keys().collect::<Vec<_>>(), last.frontends.keys().collect::<Vec<_>>());
    }
}

#[test]
fn frontend_that_does_not_fit_is_rejected_and_others_are_published() {
    let sizes = Sizes { frontends: 4, backends: 3, slots: 100, affinities: 1 };
    let mut layout = Layout::new(sizes);
    let (_, refused) = layout.update(&table(&[(1, vec![(1, vec![1, 2])])]), Completeness::Complete);
    assert_eq!(refused, []);
    // The first of two frontends needs two backends more than fit.
    let wanted = table(&[(1, vec![(1, vec![1, 2, 3, 4, 5])]), (2, vec![(1, vec![6])])]);
    let (ops, refused) = layout.update(&wanted, Completeness::Complete);
    assert_eq!(
        refused.iter().map(|refused| (refused.key, refused.map)).collect::<Vec<_>>(),
        [(frontend(1), "BACKENDS")]
    );
    assert!(ops.iter().any(|op| matches!(op, Op::SetVersion(_, it) if it.key == frontend(2))));
    assert!(!ops.iter().any(|op| matches!(op, Op::SetVersion(_, it) if it.key == frontend(1))));
    // A new frontend that does not fit is published as refusing instead of missing.
    let (ops, refused) =
        layout.update(&table(&[(1, vec![(1, vec![1, 2])]), (3, vec![(1, vec![6, 7, 8])])]), Completeness::Complete);
    assert_eq!(refused.iter().map(|refused| refused.key).collect::<Vec<_>>(), [frontend(3)]);
    assert!(ops.iter().any(|op| matches!(op, Op::SetVersion(_, it) if it.key == frontend(3) && it.period == 0)));
    // Reservations of the rejected frontend do not leak.
    reclaim(&mut layout);
    let (_, refused) = layout.update(&table(&[(1, vec![(1, vec![1, 2, 6])])]), Completeness::Complete);
    assert_eq!(refused, []);
}

#[test]
fn rejected_frontend_leaves_limits_unchanged() {
    // `POOLS` has three entries, of which entry 0 is reserved.
    let sizes = Sizes { frontends: 1, backends: 4, slots: 10, affinities: 1 };
    let mut layout = Layout::new(sizes);
    let pool = |port, max| PoolSpec {
        key: PoolKey {
            service: ServiceId::service(NamespacedName::new("default", "web")),
            port,
            protocol: Protocol::Tcp,
            subset: None,
            v6: false,
        },
        limits: ConnectionPool { max_connections: Some(max), ..ConnectionPool::default() },
        strict: false,
        watch: 0,
    };
    let with = |pools: Vec<PoolSpec>| {
        let mut table = table(&[(1, vec![(1, vec![1])])]);
        table.frontends.values_mut().for_each(|entry| entry.pools = pools.clone().into());
        table
    };
    let (ops, refused) = layout.update(&with(vec![pool(80, 5), pool(81, 5)]), Completeness::Complete);
    assert_eq!((ops.iter().filter(|op| matches!(op, Op::ResetPool(..))).count(), refused.len()), (2, 0));
    let before = layout.limits.clone();
    let (ops, refused) = layout.update(&with(vec![pool(80, 6), pool(82, 6), pool(83, 6)]), Completeness::Complete);
    assert_eq!(refused.iter().map(|refused| refused.map).collect::<Vec<_>>(), ["POOLS"]);
    assert!(ops.is_empty() && layout.limits == before, "{ops:?}");
    // Reservations of the rejected frontend do not leak.
    reclaim(&mut layout);
    let (ops, refused) = layout.update(&with(vec![pool(80, 7), pool(81, 5)]), Completeness::Complete);
    assert_eq!((ops.iter().filter(|op| matches!(op, Op::SetPool(..))).count(), refused.len()), (1, 0));
}

/// The kernel still sends connections to the previous endpoints of a rejected frontend.
#[test]
fn backends_of_rejected_adopted_frontend_are_not_reused() {
    let sizes = Sizes { frontends: 4, backends: 4, slots: 10, affinities: 1 };
    let (mut previous, mut maps) = (Layout::new(sizes), Maps::default());
    let ops = previous.update(&table(&[(1, vec![(1, vec![1, 2])])]), Completeness::Complete).0;
    ops.iter().for_each(|op| maps.write(op));
    let held = PinnedState {
        backends: maps.backends.iter().map(|(id, backend)| (*id, *backend)).collect(),
        ..maps.pinned_state(&previous)
    };
    let mut layout = Layout::from_held(sizes, held);
    // Three entries do not fit beside the two that are in use.
    let too_much = (1, vec![(1, vec![1, 2, 3])]);
    let (_, refused) = layout.update(&table(std::slice::from_ref(&too_much)), Completeness::Complete);
    assert_eq!(refused.len(), 1);
    for member in [7, 8] {
        reclaim(&mut layout);
        let wanted = table(&[too_much.clone(), (2, vec![(1, vec![member])])]);
        let (ops, _) = layout.update(&wanted, Completeness::Complete);
        for op in &ops {
            maps.write(op);
        }
        assert_eq!(maps.picks(&frontend(1), 2), [Some(address(1)), Some(address(2))]);
    }
}

/// Returns a layout that has adopted frontends 1 and 2 of a previous agent, which share endpoint 1, and the maps.
fn adopted_layout() -> (Layout, Maps) {
    let sizes = Sizes { frontends: 8, backends: 8, slots: 40, affinities: 1 };
    let (mut previous, mut maps) = (Layout::new(sizes), Maps::default());
    let ops = previous.update(&table(&[(1, vec![(1, vec![1])]), (2, vec![(1, vec![1, 2])])]), Completeness::Complete).0;
    maps.write_all(&ops);
    (Layout::from_held(sizes, maps.pinned_state(&previous)), maps)
}

#[test]
fn backends_shared_among_adopted_frontends_are_not_reused() {
    let (mut layout, mut maps) = adopted_layout();
    // This agent has replaced frontend 1; frontend 2 is still adopted.
    // Then endpoint 1 leaves frontend 1.
    for members in [vec![1], vec![3], vec![4, 5], vec![6, 7]] {
        reclaim(&mut layout);
        let wanted = table(&[(1, vec![(1, members)])]);
        let (ops, refused) = layout.change(&wanted, &[], Completeness::Partial);
        assert_eq!(refused, []);
        maps.write_all(&ops);
        assert_eq!(maps.picks(&frontend(2), 2), [Some(address(1)), Some(address(2))]);
    }
    // With complete input, the adopted frontend may be removed.
    let last = table(&[(1, vec![(1, vec![6])])]);
    maps.write_all(&layout.update(&last, Completeness::Complete).0);
    assert_eq!((layout.backend_id(&address(1)), layout.adopted()), (None, 0));
}

#[test]
fn change_with_incomplete_input_removes_no_adopted_frontend() {
    for completeness in [Completeness::Partial, Completeness::WithoutSettings] {
        let (mut layout, _) = adopted_layout();
        let refusing = table(&[(1, vec![])]);
        assert_eq!(
            layout.change(&refusing, &[frontend(2)], completeness),
            (Vec::new(), Vec::new()),
            "{completeness:?}"
        );
    }
}

#[test]
fn own_frontends_stay_own_when_maps_are_read_again() {
    let (mut layout, mut maps) = adopted_layout();
    let own = table(&[(3, vec![(1, vec![3])])]);
    maps.write_all(&layout.change(&own, &[], Completeness::WithoutSettings).0);
    let mut layout = layout.read_again(maps.pinned_state(&layout));
    assert_eq!(layout.adopted(), 2);
    reclaim(&mut layout);
    let moved = table(&[(3, vec![(1, vec![4])]), (2, vec![(1, vec![4])])]);
    maps.write_all(&layout.update(&moved, Completeness::WithoutSettings).0);
    assert_eq!(maps.picks(&frontend(3), 1), [Some(address(4))], "own frontend is not updated");
    assert_eq!(maps.picks(&frontend(2), 2), [Some(address(1)), Some(address(2))], "adopted frontend has changed");
}
