//! A model of the kernel's maps, and the invariants that must hold after every single write.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proptest::prelude::*;

use super::*;
use crate::{
    model::{ConnectionPool, IpFamily, NamespacedName, ServiceId},
    policy::{Schedule, Share, WeightedGroup},
    table::{fake_maps::FakeMaps, key},
};

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
            // Half of the frontends have lists of endpoints; the others list their members as well.
            affinity: (i % 2 == 0).then(|| Duration::from_secs(10)),
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
const SMALL: Sizes = Sizes { frontends: 12, backends: 30, slots: 400, affinities: 1, connections: 1 << 14 };

proptest! {
    #[test]
    fn every_update_prefix_is_consistent(tables in tables(), settles in prop::collection::vec(any::<bool>(), 12)) {
        let (mut layout, mut maps) = (Layout::new(SMALL), FakeMaps::default());
        let mut before = Table::default();
        // Versions that a program may still be reading, with the picks that they gave.
        let mut read: Vec<(FrontendId, Published, Vec<Option<SocketAddr>>)> = Vec::new();
        for (table, settles) in tables.iter().zip(settles) {
            for key in maps.keys() {
                let id = maps.frontend(key).unwrap().0;
                read.push((id, maps.published(key), maps.picks(key, PICKS)));
            }
            let (ops, refused) = layout.update(table, Completeness::Complete);
            // Without grace periods, ranges run out: the update is rejected, and nothing else breaks.
            prop_assume!(refused.is_empty());
            for op in &ops {
                maps.write(op);
                for key in maps.keys() {
                    let picks = maps.picks(key, PICKS);
                    let versions = [&before, table].into_iter().filter_map(|table| table.frontends.get(key));
                    let mut versions = versions.map(|entry| expected(&entry.schedule));
                    prop_assert!(versions.any(|version| version == picks), "a partial update is visible");
                }
                for (id, published, picks) in &read {
                    prop_assert_eq!(&maps.picks_of(*id, *published, PICKS), picks, "what is still in use has changed");
                }
            }
            let present: BTreeSet<_> = maps.keys().collect();
            prop_assert_eq!(present, table.frontends.keys().collect());
            for (key, entry) in &table.frontends {
                let picks = expected(&entry.schedule);
                prop_assert_eq!(&maps.picks(key, PICKS), &picks);
                let members: BTreeSet<_> = entry.schedule.runs.iter().flat_map(|run| run.members.iter().copied()).collect();
                if entry.affinity.is_some() && !entry.schedule.is_empty() {
                    prop_assert_eq!(maps.members(key), members);
                }
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
        let (mut layout, mut maps) = (Layout::new(Sizes::default()), FakeMaps::default());
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
            prop_assert_eq!(maps.keys().collect::<Vec<_>>(), table.frontends.keys().collect::<Vec<_>>());
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
        let (mut layout, mut maps) = (Layout::new(Sizes::default()), FakeMaps::default());
        for table in &first {
            layout.update(table, Completeness::Complete).0.iter().for_each(|op| maps.write(op));
        }
        let previous = maps.clone();
        let held = maps.read_back();
        let mut layout = Layout::adopt(Sizes::default(), held);
        // Nothing is known yet, so nothing may be removed.
        layout.update(&Table::default(), Completeness::Partial).0.iter().for_each(|op| maps.write(op));
        for key in previous.keys() {
            prop_assert_eq!(maps.picks(key, PICKS), previous.picks(key, PICKS));
        }
        let last = second.last().unwrap();
        for op in layout.update(last, Completeness::Complete).0 {
            maps.write(&op);
            for key in maps.keys() {
                let picks = maps.picks(key, PICKS);
                let old = previous.frontend(key).is_some() && picks == previous.picks(key, PICKS);
                prop_assert!(old || last.frontends.get(key).is_some_and(|entry| picks == expected(&entry.schedule)));
            }
        }
        prop_assert_eq!(maps.keys().collect::<Vec<_>>(), last.frontends.keys().collect::<Vec<_>>());
    }
}

#[test]
fn frontend_that_does_not_fit_is_rejected_and_others_are_published() {
    let sizes = Sizes { frontends: 4, backends: 3, slots: 100, affinities: 1, connections: 1 << 14 };
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
    let added = |ops: &[Op], i| ops.iter().any(|op| matches!(op, Op::AddFrontend(key, _) if *key == frontend(i)));
    let published = |ops: &[Op]| ops.iter().filter(|op| matches!(op, Op::Publish(..))).count();
    assert!(added(&ops, 2) && published(&ops) == 1, "{ops:?}");
    // A new frontend that does not fit is published as refusing instead of missing.
    let (ops, refused) =
        layout.update(&table(&[(1, vec![(1, vec![1, 2])]), (3, vec![(1, vec![6, 7, 8])])]), Completeness::Complete);
    assert_eq!(refused.iter().map(|refused| refused.key).collect::<Vec<_>>(), [frontend(3)]);
    let refuses = |op: &Op| matches!(op, Op::Publish(_, published, _) if published.period() == 0);
    assert!(added(&ops, 3) && ops.iter().any(refuses), "{ops:?}");
    // Reservations of the rejected frontend do not leak.
    reclaim(&mut layout);
    let (_, refused) = layout.update(&table(&[(1, vec![(1, vec![1, 2, 6])])]), Completeness::Complete);
    assert_eq!(refused, []);
}

#[test]
fn rejected_frontend_leaves_limits_unchanged() {
    // `POOLS` has three entries, of which entry 0 is reserved.
    let sizes = Sizes { frontends: 1, backends: 4, slots: 10, affinities: 1, connections: 1 << 14 };
    let mut layout = Layout::new(sizes);
    let pool = |port, max| PoolSpec {
        key: PoolKey {
            service: ServiceId::service(NamespacedName::new("default", "web")),
            port,
            protocol: Protocol::Tcp,
            subset: None,
            family: IpFamily::V4,
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

#[test]
fn short_lists_are_behind_their_line_once_no_program_reads_an_earlier_one() {
    let mut layout = Layout::new(SMALL);
    let is_inline = |ops: &[Op]| ops.iter().any(|op| matches!(op, Op::SetInline(..)));
    let mut publish = |members: &[u8], settles: bool| {
        // Frontend 1 is a plain list, and frontend 2 also lists its members.
        let wanted = table(&[(1, vec![(1, members.to_vec())]), (2, vec![(1, members.to_vec())])]);
        let (ops, refused) = layout.update(&wanted, Completeness::Complete);
        assert_eq!(refused, []);
        let used = layout.occupancy().iter().find(|(name, ..)| *name == "entries").unwrap().1;
        if settles {
            reclaim(&mut layout);
        }
        (is_inline(&ops), used)
    };
    assert_eq!(publish(&[1, 2], true), (true, 0));
    assert_eq!(publish(&[1, 3], false), (false, 4), "programs may be reading the first list");
    assert_eq!(publish(&[1, 4], false), (false, 8));
    assert_eq!(publish(&[1, 5], true), (false, 12));
    assert_eq!(publish(&[1, 6], true), (true, 4), "a grace period has elapsed");
    assert_eq!(publish(&(1..=5).collect::<Vec<_>>(), true), (false, 10), "too long");
}

#[test]
fn short_lists_move_back_behind_their_line() {
    let (mut previous, mut maps) = (Layout::new(SMALL), FakeMaps::default());
    let wanted = table(&[(1, vec![(1, vec![1, 2])]), (2, vec![(1, vec![2, 3])])]);
    maps.write_all(&previous.update(&wanted, Completeness::Complete).0);
    // The next agent publishes beside what the last one has left behind the lines.
    let mut layout = Layout::adopt(SMALL, maps.read_back());
    maps.write_all(&layout.update(&wanted, Completeness::Complete).0);
    let used = |layout: &Layout| layout.occupancy().iter().find(|(name, ..)| *name == "entries").unwrap().1;
    assert_eq!((used(&layout), layout.move_inline()), (4, Vec::new()), "programs may be reading them");
    for left in [4, 0] {
        let epoch = layout.end_epoch().unwrap();
        layout.reclaim(epoch);
        maps.write_all(&layout.move_inline());
        assert_eq!(used(&layout), left);
        assert_eq!(maps.picks(&frontend(1), 2), [Some(address(1)), Some(address(2))]);
        assert_eq!(maps.picks(&frontend(2), 2), [Some(address(2)), Some(address(3))]);
    }
    assert_eq!((layout.end_epoch(), layout.move_inline()), (None, Vec::new()));
    assert_eq!(layout.update(&wanted, Completeness::Complete), (Vec::new(), Vec::new()));
}

/// 70 turns are a list of 70 entries, or 10 slots and two runs of 7 entries.
#[test]
fn list_that_does_not_fit_is_in_slots() {
    let split = |i| (i, vec![(9, vec![1, 2, 3, 4, 5, 6, 7]), (1, vec![8, 9, 10, 11, 12, 13, 14])]);
    let sizes = Sizes { frontends: 4, backends: 16, slots: 100, affinities: 1, connections: 1 << 14 };
    let (mut layout, mut maps) = (Layout::new(sizes), FakeMaps::default());
    let wanted = table(&[split(1), split(3)]);
    let (ops, refused) = layout.update(&wanted, Completeness::Complete);
    assert_eq!(refused, []);
    maps.write_all(&ops);
    let used: Vec<_> =
        layout.occupancy().into_iter().filter(|(name, ..)| ["entries", "slots", "runs"].contains(name)).collect();
    assert_eq!(used, [("entries", 70, 100), ("slots", 10, 100), ("runs", 14, 100)]);
    assert_eq!(maps.picks(&frontend(1), 140), maps.picks(&frontend(3), 140));
}

/// The kernel still sends connections to the previous endpoints of a rejected frontend.
#[test]
fn backends_of_rejected_adopted_frontend_are_not_reused() {
    let sizes = Sizes { frontends: 4, backends: 4, slots: 4, affinities: 1, connections: 1 << 14 };
    let (mut previous, mut maps) = (Layout::new(sizes), FakeMaps::default());
    let ops = previous.update(&table(&[(1, vec![(1, vec![1, 2])])]), Completeness::Complete).0;
    ops.iter().for_each(|op| maps.write(op));
    let held = maps.read_back();
    let mut layout = Layout::adopt(sizes, held);
    // Neither behind the line nor in `ENTRIES` is room for as many turns.
    let too_much = (1, vec![(1, (1..=5).collect())]);
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
fn adopted_layout() -> (Layout, FakeMaps) {
    let sizes = Sizes { frontends: 8, backends: 8, slots: 40, affinities: 1, connections: 1 << 14 };
    let (mut previous, mut maps) = (Layout::new(sizes), FakeMaps::default());
    let ops = previous.update(&table(&[(1, vec![(1, vec![1])]), (2, vec![(1, vec![1, 2])])]), Completeness::Complete).0;
    maps.write_all(&ops);
    (Layout::adopt(sizes, maps.read_back()), maps)
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
    let mut layout = layout.resync(maps.read_back());
    assert_eq!(layout.adopted(), 2);
    reclaim(&mut layout);
    let moved = table(&[(3, vec![(1, vec![4])]), (2, vec![(1, vec![4])])]);
    maps.write_all(&layout.update(&moved, Completeness::WithoutSettings).0);
    assert_eq!(maps.picks(&frontend(3), 1), [Some(address(4))], "own frontend is not updated");
    assert_eq!(maps.picks(&frontend(2), 2), [Some(address(1)), Some(address(2))], "adopted frontend has changed");
}
