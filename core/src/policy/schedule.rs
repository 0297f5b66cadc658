//! The schedule: turns shares into a cycle in which every share is exact.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    net::SocketAddr,
};

use num_integer::Integer;
use portolan_common::LbPolicy;

use super::{maglev, share::Share};

/// Maximum number of turns in a schedule. Finer shares are rounded to a hundredth of a percent.
const MAX_TURNS: u128 = 10_000;
/// Maximum number of entries in a run whose endpoints differ in weight.
const MAX_RUN: u128 = 10_000;

/// Endpoints that share the connections of their turns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of turns that the run has in one cycle.
    pub visits: u32,
    /// Endpoints in selection order; those of higher weight occur more often.
    pub members: Vec<SocketAddr>,
    /// How the kernel selects a member.
    pub choice: LbPolicy,
    /// Index of the route that the run belongs to.
    pub route: u32,
}

/// Endpoints and their share: the input for one run.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedGroup {
    /// Fraction of all connections, relative to the sum over the groups.
    pub share: Share,
    /// Endpoints and their weights. If empty, the turns of the group refuse.
    pub members: Vec<(SocketAddr, u32)>,
    /// How the kernel selects a member.
    pub choice: LbPolicy,
    /// Index of the route that the group belongs to.
    pub route: u32,
}

impl WeightedGroup {
    /// Creates a round-robin group that belongs to the first route.
    pub fn in_turn(share: Share, members: Vec<(SocketAddr, u32)>) -> Self {
        Self { share, members, choice: LbPolicy::RoundRobin, route: 0 }
    }
}

/// One turn of the cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduleSlot {
    /// Index into [`Schedule::runs`].
    pub run: u32,
    /// Zero-based number of this turn among the run's turns in the cycle.
    pub visit: u32,
}

/// A cycle of turns. An empty schedule refuses all connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// Turns of one cycle, in order.
    pub turns: Vec<ScheduleSlot>,
    /// Runs that the turns refer to.
    pub runs: Vec<Run>,
}

impl Schedule {
    /// Builds the schedule from weighted groups of endpoints.
    pub fn new(weighted_groups: Vec<WeightedGroup>) -> Self {
        let shares: Vec<Share> = weighted_groups.iter().map(|part| part.share).collect();
        let visits = parts(&shares, MAX_TURNS);
        let mut seen = vec![0; visits.len()];
        let turns = edf_order(&visits)
            .into_iter()
            .map(|run| {
                seen[run] += 1;
                ScheduleSlot { run: run as u32, visit: seen[run] - 1 }
            })
            .collect();
        let runs = weighted_groups.into_iter().zip(visits).map(|(part, visits)| Run {
            visits: visits as u32,
            members: if part.choice == LbPolicy::Hash { maglev::table(&part.members) } else { run(&part.members) },
            choice: part.choice,
            route: part.route,
        });
        Self { turns, runs: runs.collect() }
    }

    /// Returns whether the schedule refuses all connections.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Returns the fraction of connections that the kernel gives each member of each run: index of the run, endpoint,
    /// fraction.
    pub fn shares(&self) -> impl Iterator<Item = (usize, SocketAddr, f64)> {
        let turns = self.turns.len() as f64;
        self.runs.iter().enumerate().flat_map(move |(i, run)| {
            let each = f64::from(run.visits) / turns / run.members.len() as f64;
            run.members.iter().map(move |member| (i, *member, each))
        })
    }
}

/// Returns the order within a run: interleaved by weight, if weights differ.
fn run(members: &[(SocketAddr, u32)]) -> Vec<SocketAddr> {
    let weights: Vec<Share> = members.iter().map(|(_, weight)| Share::from(u128::from(*weight))).collect();
    edf_order(&parts(&weights, MAX_RUN)).into_iter().map(|i| members[i].0).collect()
}

/// Returns integers in proportion to the shares.
fn parts(shares: &[Share], max: u128) -> Vec<u64> {
    exact_parts(shares, max).unwrap_or_else(|| {
        let as_float = |share: &Share| *share.numer() as f64 / *share.denom() as f64;
        let total: f64 = shares.iter().map(as_float).sum();
        let ideal: Vec<f64> = shares.iter().map(|share| as_float(share) / total * max as f64).collect();
        let mut parts: Vec<u64> =
            ideal.iter().map(|ideal| if *ideal > 0.0 { (ideal.floor() as u64).max(1) } else { 0 }).collect();
        let mut order: Vec<usize> = (0..ideal.len()).collect();
        order.sort_by(|&a, &b| ideal[b].fract().total_cmp(&ideal[a].fract()).then(a.cmp(&b)));
        let left = (max as u64).saturating_sub(parts.iter().sum());
        for &i in order.iter().filter(|&&i| ideal[i] > 0.0).take(left as usize) {
            parts[i] += 1;
        }
        parts
    })
}

fn exact_parts(shares: &[Share], max: u128) -> Option<Vec<u64>> {
    let mut common: u128 = 1;
    for share in shares {
        common = (common / common.gcd(share.denom())).checked_mul(*share.denom())?;
    }
    let mut parts = Vec::with_capacity(shares.len());
    for share in shares {
        parts.push(share.numer().checked_mul(common / share.denom())?);
    }
    let divisor = parts.iter().fold(0, |divisor: u128, part| divisor.gcd(part)).max(1);
    let total = parts.iter().try_fold(0u128, |sum, part| sum.checked_add(part / divisor))?;
    (total <= max).then(|| parts.iter().map(|part| (part / divisor) as u64).collect())
}

/// Returns one full cycle of earliest deadline first, in which index i occurs `weights[i]` times.
pub fn edf_order(weights: &[u64]) -> Vec<usize> {
    let cycle: u64 = weights.iter().sum();
    let mut queue: BinaryHeap<Reverse<Entry>> = BinaryHeap::new();
    let mut inserted = 0;
    for (index, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0) {
        queue.push(Reverse(Entry { turn: 1, weight, inserted, index }));
        inserted += 1;
    }
    let mut order = Vec::with_capacity(cycle as usize);
    while order.len() < cycle as usize {
        let Some(Reverse(entry)) = queue.pop() else { break };
        order.push(entry.index);
        queue.push(Reverse(Entry { turn: entry.turn + 1, inserted, ..entry }));
        inserted += 1;
    }
    order
}

/// A queue entry. Its deadline, `turn / weight`, is kept as a fraction, so that ties compare equal.
#[derive(PartialEq, Eq)]
struct Entry {
    turn: u64,
    weight: u64,
    inserted: u64,
    index: usize,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        let left = u128::from(self.turn) * u128::from(other.weight);
        let right = u128::from(other.turn) * u128::from(self.weight);
        left.cmp(&right).then(self.inserted.cmp(&other.inserted))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn address(i: usize) -> SocketAddr {
        SocketAddr::from(([10, 0, (i / 250) as u8, (i % 250) as u8 + 1], 9080))
    }

    /// Returns what the kernel selects at one cursor value.
    fn take(schedule: &Schedule, cursor: usize) -> SocketAddr {
        let (cycle, turn) = (cursor / schedule.turns.len(), schedule.turns[cursor % schedule.turns.len()]);
        let run = &schedule.runs[turn.run as usize];
        run.members[(cycle * run.visits as usize + turn.visit as usize) % run.members.len()]
    }

    fn equal(hosts: std::ops::Range<usize>) -> Vec<(SocketAddr, u32)> {
        hosts.map(|i| (address(i), 1)).collect()
    }

    #[test]
    fn ninety_ten_split_is_exact_in_every_ten_picks() {
        for (near, far) in [(1, 1), (3, 2), (7, 5), (100, 1)] {
            let near_part = WeightedGroup::in_turn(Share::new(9, 10), equal(0..near));
            let groups = vec![near_part, WeightedGroup::in_turn(Share::new(1, 10), equal(near..near + far))];
            let schedule = Schedule::new(groups);
            let picks: Vec<_> = (0..1000).map(|i| take(&schedule, i)).collect();
            let far: Vec<_> = (near..near + far).map(address).collect();
            for ten in picks.chunks(10) {
                assert_eq!(ten.iter().filter(|pick| far.contains(pick)).count(), 1);
            }
        }
    }

    #[test]
    fn zero_weight_gets_no_connections() {
        // An off-by-one in a percentage draw would give every destination, also one of weight 0, one percent more.
        let schedule = Schedule::new(vec![
            WeightedGroup::in_turn(Share::from(0), equal(0..1)),
            WeightedGroup::in_turn(Share::from(1), equal(1..2)),
        ]);
        assert!((0..10_000).all(|i| take(&schedule, i) == address(1)));
        let members =
            Schedule::new(vec![WeightedGroup::in_turn(Share::from(1), vec![(address(0), 0), (address(1), 5)])]);
        assert!((0..100).all(|i| take(&members, i) == address(1)));
    }

    proptest! {
        #[test]
        fn every_cycle_honors_the_weights(weights in prop::collection::vec(0u64..40, 1..8)) {
            let order = edf_order(&weights);
            for (i, weight) in weights.iter().enumerate() {
                prop_assert_eq!(order.iter().filter(|&&index| index == i).count() as u64, *weight);
            }
        }

        #[test]
        fn shares_match_the_observed_picks(groups in prop::collection::vec((1u128..60, 1usize..9), 1..5)) {
            let mut next = 0;
            let schedule = Schedule::new(groups.iter().map(|&(share, hosts)| {
                next += hosts;
                WeightedGroup::in_turn(Share::from(share), equal(next - hosts..next))
            }).collect());
            let rounds: usize = schedule.runs.iter().fold(1, |rounds, run| rounds.lcm(&run.members.len()));
            let picks = rounds * schedule.turns.len();
            prop_assume!(picks < 200_000);
            let mut counted: BTreeMap<SocketAddr, usize> = BTreeMap::new();
            for i in 0..picks {
                *counted.entry(take(&schedule, i)).or_default() += 1;
            }
            for (_, host, share) in schedule.shares() {
                prop_assert!((counted[&host] as f64 - share * picks as f64).abs() < 1e-6);
            }
        }

        #[test]
        fn overly_fine_shares_are_rounded(weights in prop::collection::vec(1u128..1_000_000_007, 2..6)) {
            let shares: Vec<Share> = weights.iter().map(|weight| Share::from(*weight)).collect();
            let parts = parts(&shares, MAX_TURNS);
            let (total, sum) = (parts.iter().sum::<u64>(), weights.iter().sum::<u128>());
            prop_assert!(u128::from(total) <= MAX_TURNS + weights.len() as u128);
            // A share below one turn still gets one, at the expense of the others.
            let tiny = weights.iter().filter(|weight| **weight * MAX_TURNS < sum).count() as f64;
            for (part, weight) in parts.iter().zip(&weights) {
                let difference = *part as f64 / total as f64 - *weight as f64 / sum as f64;
                prop_assert!(*part > 0 && difference.abs() <= (1.0 + tiny) / total as f64, "{difference}");
            }
        }
    }
}
