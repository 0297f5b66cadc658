//! All maps, and all constants that the agent sets at load time; the agent also sets the map sizes.
//!
//! A connection reads FRONTENDS4 or FRONTENDS6, where a short list of endpoints is beside the frontend, or else → ENTRIES.
//! If the schedule is more than such a list, it reads → VERSIONS in between, and → SLOTS → RUNS → BACKENDS without a list.
//! The agent writes schedules only where no program can be reading them, and publishes each by a single store.
//!
//! The values of an mmapable array start at a page boundary, so values of 64 bytes occupy one cache line each.
//! With many services, fetching these lines is the most expensive part of a connect.

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use portolan_common::{
    Affinity, AffinityKey, Backend, BackendStats, BackendUse, ClientUse, Connection, ConnectionExtra, Counter,
    DatagramFlows, Entry, Frontend4, Frontend6, FrontendVersion, OptOut, Outcome, PoolLimits, PoolStats, Slot,
    SocketState, TIME_BUCKETS,
};

/// Index, which follows from the key → frontend with an IPv4 address, see [`Frontend`](portolan_common::Frontend).
#[btf_map]
pub(crate) static FRONTENDS4: Array<Frontend4, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The same for IPv6 addresses.
#[btf_map]
pub(crate) static FRONTENDS6: Array<Frontend6, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Fingerprint of a key → index, for the few frontends whose buckets were full.
#[btf_map]
pub(crate) static FRONTEND_OVERFLOW: HashMap<u64, u32, 1> = HashMap::new();

/// Index → turn of a schedule that is a list of endpoints.
#[btf_map]
pub(crate) static ENTRIES: Array<Entry, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Index → version of a frontend whose schedule is more than that.
#[btf_map]
pub(crate) static VERSIONS: Array<FrontendVersion, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Index → slot of a schedule, which names a run of backends.
/// The agent maps this array into memory, because a schedule may have 10,000 slots.
#[btf_map]
pub(crate) static SLOTS: Array<Slot, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Index → backend id, in runs; also the member lists of versions.
#[btf_map]
pub(crate) static RUNS: Array<u32, 1> = Array::new();

/// Backend id → endpoint.
#[btf_map]
pub(crate) static BACKENDS: Array<Backend, 1> = Array::new();

/// Index → limits of a pool.
#[btf_map]
pub(crate) static POOLS: Array<PoolLimits, 1> = Array::new();

/// Backend id → counters.
#[btf_map]
pub(crate) static BACKEND_STATS: Array<BackendStats, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Index, as in `POOLS` → counters of a pool.
#[btf_map]
pub(crate) static POOL_STATS: Array<PoolStats, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Backend id → last users and response counts.
/// Written only for pools with outlier detection.
#[btf_map]
pub(crate) static BACKEND_USE: Array<BackendUse, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Two latency histograms in microseconds: connect times, then round-trip times.
/// Each has one bucket per power of two, and the sum as its last entry.
#[btf_map]
pub(crate) static TIMES: PerCpuArray<u64, { 2 * TIME_BUCKETS as usize }> = PerCpuArray::new();

/// Backend id → its failures, and up to which one the agent has evaluated them, see
/// [`FailureCount`](portolan_common::FailureCount).
#[btf_map]
pub(crate) static FAILURES: Array<u64, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Client and frontend → backend that the client returns to (`sessionAffinity`).
#[btf_map]
pub(crate) static AFFINITY: LruHashMap<AffinityKey, Affinity, 1> = LruHashMap::new();

/// One of two indices that a socket's address selects → state of the socket, see [`Connection::first_way`].
#[btf_map]
pub(crate) static CONNECTIONS: Array<Connection, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The same index → what only some connections need.
#[btf_map]
pub(crate) static CONNECTION_EXTRAS: Array<ConnectionExtra, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Client → what it uses of `CONNECTIONS` and `EVENTS`.
#[btf_map]
pub(crate) static CLIENTS: Array<ClientUse, { ClientUse::CAPACITY as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// Socket → the same state, for sockets without an entry in `CONNECTIONS`.
#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// [`NodeFlags`](portolan_common::NodeFlags) bits: what has been used so far, and the side on which connections are counted.
#[btf_map]
pub(crate) static NODE_FLAGS: Array<u64, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Unconnected UDP socket → its flows, to redirect datagrams and to translate replies.
#[btf_map]
pub(crate) static DATAGRAMS: SkStorage<DatagramFlows> = SkStorage::new();

/// Outcomes for the agent: 1 MiB holds about 14,500 unread ones.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Outcome, { EVENTS_BYTES as usize }> = RingBuf::new();

/// The size of [`EVENTS`] in bytes.
pub(crate) const EVENTS_BYTES: u64 = 0x10_0000;

/// Cgroup id → unused value: processes in it or below it have opted out, see [`OptOut`].
#[btf_map]
pub(crate) static OPTED_OUT: HashMap<u64, u32, { OptOut::CAPACITY as usize }> = HashMap::new();

/// The union of the filter bits of all cgroups in `OPTED_OUT`; nearly always 0.
#[btf_map]
pub(crate) static OPT_OUT_FILTER: Array<u64, 1> = Array::new();

/// Per-CPU counters of rare events, indexed by [`Counter`].
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { Counter::COUNT as usize }> = PerCpuArray::new();

/// The offset of `sk_err` in the kernel's `struct sock`; the agent reads it from the kernel's BTF.
#[unsafe(no_mangle)]
pub(crate) static SK_ERR_OFFSET: Global<u32> = Global::new(0);

/// The `shift` of [`Connection::first_way`].
#[unsafe(no_mangle)]
pub(crate) static CONNECTION_SHIFT: Global<u32> = Global::new(32);

/// The multipliers of [`FrontendKey::fingerprint`](portolan_common::FrontendKey::fingerprint).
#[unsafe(no_mangle)]
pub(crate) static FRONTEND_MULTIPLIERS: Global<[u64; 4]> = Global::new([0; 4]);

/// The `seed` of [`Frontend::hash`](portolan_common::Frontend::hash).
#[unsafe(no_mangle)]
pub(crate) static FRONTEND_SEED: Global<u64> = Global::new(0);

/// The `shift` of [`Frontend::first_bucket`]; the default is that of the smallest array.
#[unsafe(no_mangle)]
pub(crate) static FRONTEND_SHIFT: Global<u32> = Global::new(63);

/// The entries of `CONNECTIONS` that one client may use.
#[unsafe(no_mangle)]
pub(crate) static CONNECTION_SHARE: Global<u32> = Global::new(1);

/// The depth of the cgroups that count as clients.
#[unsafe(no_mangle)]
pub(crate) static CLIENT_LEVEL: Global<i32> = Global::new(1);

/// The offset of `write_seq` in the kernel's `struct tcp_sock`.
#[unsafe(no_mangle)]
pub(crate) static TCP_WRITE_SEQ_OFFSET: Global<u32> = Global::new(0);

/// Nanoseconds per tick (jiffy) of the kernel's clock, the unit of its timeouts.
#[unsafe(no_mangle)]
pub(crate) static TICK_NS: Global<u32> = Global::new(0);

/// The id of this map set; per-socket state names the set that its ids belong to.
#[unsafe(no_mangle)]
pub(crate) static SET: Global<u32> = Global::new(0);

/// Records a time in one of the two histograms of `TIMES`: 0 for connects, 1 for round trips.
#[inline(always)]
pub(crate) fn time(half: u32, micros: u32) {
    let power = 32 - micros.leading_zeros();
    let last = TIME_BUCKETS - 2;
    let bucket = if power < last { power } else { last };
    for (index, more) in [(bucket, 1), (TIME_BUCKETS - 1, u64::from(micros))] {
        if let Some(value) = TIMES.get_ptr_mut(half * TIME_BUCKETS + index) {
            // SAFETY: a live map value of this CPU; at worst, a softirq loses a count.
            unsafe { *value += more };
        }
    }
}

/// Increments a counter of this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a live map value of this CPU; at worst, a program in a softirq loses a count of an event that should
        // not occur.
        unsafe { *value += 1 };
    }
}
