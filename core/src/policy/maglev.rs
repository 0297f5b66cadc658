//! Consistent hashing with a Maglev table, which a client's hash indexes.

use std::{collections::BTreeMap, hash::Hasher as _, net::SocketAddr};

use num_integer::Integer as _;
use siphasher::sip::SipHasher13;

use super::share::{Group, Share};

/// Table sizes for small and for large pools, both primes.
const CAPACITY: [usize; 2] = [4_099, 65_537];
/// Largest number of endpoints for the small table; at this size, shares are off by 1/32 at most.
const SMALL_POOL_MAX: usize = 128;

/// Merges the groups into one, in which the weight of each endpoint is its number of slots.
pub(super) fn quotas(groups: Vec<Group>) -> Vec<Group> {
    let mut shares: BTreeMap<SocketAddr, Share> = BTreeMap::new();
    for group in groups {
        let total: u128 = group.members.iter().map(|(_, weight)| u128::from(*weight)).sum();
        for (address, weight) in group.members {
            *shares.entry(address).or_default() += group.share * Share::new(u128::from(weight), total.max(1));
        }
    }
    shares.retain(|_, share| *share > Share::default());
    if shares.is_empty() {
        return Vec::new();
    }
    let slots = if shares.len() <= SMALL_POOL_MAX { CAPACITY[0] } else { CAPACITY[1] };
    let total: Share = shares.values().sum();
    let exact = |share: Share| share / total * Share::from(slots as u128);
    let mut quotas: Vec<(SocketAddr, u32)> =
        shares.iter().map(|(address, share)| (*address, exact(*share).to_integer().max(1) as u32)).collect();
    // Leftover slots go to the largest remainders.
    let mut order: Vec<usize> = (0..quotas.len()).collect();
    let remainders: Vec<Share> = shares.values().map(|share| exact(*share).fract()).collect();
    order.sort_by(|a, b| remainders[*b].cmp(&remainders[*a]).then(a.cmp(b)));
    let given: usize = quotas.iter().map(|(_, quota)| *quota as usize).sum();
    for &i in order.iter().cycle().take(slots.saturating_sub(given)) {
        quotas[i].1 += 1;
    }
    for _ in 0..given.saturating_sub(slots) {
        if let Some(largest) = quotas.iter_mut().max_by_key(|(_, quota)| *quota) {
            largest.1 -= 1;
        }
    }
    vec![Group { share: Share::from(1), members: quotas }]
}

/// Fills the table for endpoints with their numbers of slots, whose sum is a prime.
pub(super) fn table(quotas: &[(SocketAddr, u32)]) -> Vec<SocketAddr> {
    let slots: usize = quotas.iter().map(|(_, quota)| *quota as usize).sum();
    if slots < 2 {
        return quotas.iter().filter(|(_, quota)| *quota > 0).map(|(address, _)| *address).collect();
    }
    let max_quota = quotas.iter().map(|(_, quota)| u64::from(*quota)).max().unwrap_or(1);
    let mut preferences: Vec<Preference> = quotas.iter().map(|(address, _)| Preference::new(address, slots)).collect();
    let mut table: Vec<Option<SocketAddr>> = vec![None; slots];
    let mut taken = vec![0u32; quotas.len()];
    let (mut filled, mut round) = (0, 0u64);
    while filled < slots {
        round += 1;
        for (i, (address, quota)) in quotas.iter().enumerate() {
            // Endpoints with fewer slots take turns proportionally less often.
            if taken[i] >= *quota || u64::from(taken[i]) * max_quota >= u64::from(*quota) * round {
                continue;
            }
            for slot in preferences[i].by_ref() {
                if table[slot].is_none() {
                    table[slot] = Some(*address);
                    break;
                }
            }
            taken[i] += 1;
            filled += 1;
        }
    }
    table.into_iter().flatten().collect()
}

/// The order in which an endpoint prefers slots: a permutation of all of them.
struct Preference {
    next: usize,
    skip: usize,
    slots: usize,
}

impl Preference {
    fn new(address: &SocketAddr, slots: usize) -> Self {
        let hash = |seed| {
            let mut hasher = SipHasher13::new_with_keys(seed, 0);
            hasher.write(address.to_string().as_bytes());
            hasher.finish()
        };
        let (_, offset) = hash(0).div_rem(&(slots as u64));
        let (_, skip) = hash(1).div_rem(&(slots as u64 - 1));
        Self { next: offset as usize, skip: skip as usize + 1, slots }
    }
}

impl Iterator for Preference {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let slot = self.next;
        self.next = (self.next + self.skip) % self.slots;
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(hosts: impl Iterator<Item = u8>, share: (u128, u128)) -> Group {
        let address = |host| SocketAddr::from(([10, 0, 0, host], 80));
        Group { share: Share::new(share.0, share.1), members: hosts.map(|host| (address(host), 1)).collect() }
    }

    fn filled(groups: Vec<Group>) -> Vec<SocketAddr> {
        table(&quotas(groups)[0].members)
    }

    fn count(table: &[SocketAddr], hosts: std::ops::Range<u8>) -> usize {
        let host = |address: &&SocketAddr| match address.ip() {
            std::net::IpAddr::V4(ip) => hosts.contains(&ip.octets()[3]),
            std::net::IpAddr::V6(_) => false,
        };
        table.iter().filter(host).count()
    }

    #[test]
    fn slots_are_proportional_to_shares() {
        let table = filled(vec![group(0..3, (9, 10)), group(3..5, (1, 10))]);
        assert_eq!(table.len(), 4_099);
        assert_eq!((count(&table, 0..3), count(&table, 3..5)), (3_689, 410));
        let alone = filled(vec![group(7..8, (1, 1))]);
        assert_eq!(count(&alone, 7..8), 4_099);
        let many = filled(vec![group(0..200, (1, 1))]);
        assert_eq!(many.len(), 65_537);
        for host in 0..200 {
            assert!((327..=328).contains(&count(&many, host..host + 1)));
        }
    }

    /// When one of ten endpoints is removed, its own clients must move, and hardly any others.
    #[test]
    fn removing_an_endpoint_moves_few_slots() {
        let (before, after) = (filled(vec![group(0..10, (1, 1))]), filled(vec![group(1..10, (1, 1))]));
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        let least = count(&before, 0..1);
        assert!(moved < 2 * least, "{moved} of {} slots change owners, but only {least} must", before.len());
        // Adding the endpoint back restores the original table.
        assert_eq!(filled(vec![group(0..10, (1, 1))]), before);
    }
}
