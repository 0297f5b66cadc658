//! Every map and every constant that the agent sets, on one screen. Sizes are set by the agent at load.
//!
//! What a connection reads, in this order: FRONTENDS → CURRENT → VERSIONS → SLOTS → RUNS → BACKENDS. All but CURRENT are written only
//! where no program can be reading; the word in CURRENT is what publishes.
//!
//! An array that can be mapped into memory begins at a page, so that values of 64 bytes are one cache line each: the dearest part of a connect to
//! one of many services is to fetch them.

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use portolan_common::{
    Affinity, AffinityKey, Backend, BackendStats, BackendUse, Connection, Counter, DatagramFlows, EventBudget,
    FrontendKey, FrontendStats, FrontendVersion, OptOut, Outcome, PoolLimits, PoolStats, Slot, SocketState,
    TIME_BUCKETS,
};

/// Service address, port, protocol → frontend id. An entry never changes: replacing one would let a reader of its bucket miss it.
#[btf_map]
pub(crate) static FRONTENDS: HashMap<FrontendKey, u32, 1> = HashMap::new();

/// Frontend id → which version counts. The agent has it in its memory, and changes it by a single store.
#[btf_map]
pub(crate) static CURRENT: Array<u64, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Versions of frontends.
#[btf_map]
pub(crate) static VERSIONS: Array<FrontendVersion, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Places in schedules: each names a run of backends. The agent has it in its memory: a schedule may have 10,000 of them.
#[btf_map]
pub(crate) static SLOTS: Array<Slot, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Runs of backends: backend ids.
#[btf_map]
pub(crate) static RUNS: Array<u32, 1> = Array::new();

/// Backend id → endpoint.
#[btf_map]
pub(crate) static BACKENDS: Array<Backend, 1> = Array::new();

/// Limits of pools.
#[btf_map]
pub(crate) static POOLS: Array<PoolLimits, 1> = Array::new();

/// Frontend id → shared cursor and counters.
#[btf_map]
pub(crate) static FRONTEND_STATS: Array<FrontendStats, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Backend id → counters.
#[btf_map]
pub(crate) static BACKEND_STATS: Array<BackendStats, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Counters of pools that have limits.
#[btf_map]
pub(crate) static POOL_STATS: Array<PoolStats, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Backend id → who used it last, and what its responses said. Written where a pool ejects.
#[btf_map]
pub(crate) static BACKEND_USE: Array<BackendUse, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Microseconds to connect (the first half) and of round trips (the second): how many were below each power of two, and last their sum.
#[btf_map]
pub(crate) static TIMES: PerCpuArray<u64, { 2 * TIME_BUCKETS as usize }> = PerCpuArray::new();

/// Backend id → not zero while its successes must be told: set here by a failure, taken back by the agent once no pool counts
/// failures of it any more.
#[btf_map]
pub(crate) static TROUBLED: Array<u32, 1> = Array::new();

/// Who comes back to which backend (`sessionAffinity`).
#[btf_map]
pub(crate) static AFFINITY: LruHashMap<AffinityKey, Affinity, 1> = LruHashMap::new();

/// Connected TCP sockets → what they dialled and what they were given, in the place that the socket's cookie names.
#[btf_map]
pub(crate) static CONNECTIONS: Array<Connection, { Connection::CAPACITY as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// Socket → the same, for all that have no place in `CONNECTIONS`.
#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// Unconnected UDP socket → where its datagrams go, and whose the answers are.
#[btf_map]
pub(crate) static DATAGRAMS: SkStorage<DatagramFlows> = SkStorage::new();

/// Outcomes for the agent: 1 MiB holds 14,500 that were not read yet.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Outcome, { EVENTS_BYTES as usize }> = RingBuf::new();

/// See [`EVENTS`].
pub(crate) const EVENTS_BYTES: u64 = 0x10_0000;

/// Network namespace (the lower bits of its cookie) → what it has told while the agent was behind, see [`EventBudget`].
#[btf_map]
pub(crate) static BUDGETS: Array<u64, { EventBudget::CAPACITY as usize }> = Array::new();

/// Cgroup → whatever is there: who is in it or below it is left alone, see [`OptOut`].
#[btf_map]
pub(crate) static OPTED_OUT: HashMap<u64, u32, { OptOut::CAPACITY as usize }> = HashMap::new();

/// The bits of all that are in `OPTED_OUT`: nearly always none.
#[btf_map]
pub(crate) static OPT_OUT_FILTER: Array<u64, 1> = Array::new();

/// See [`Counter`].
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { Counter::COUNT as usize }> = PerCpuArray::new();

/// Offset of `sk_err` in the kernel's `struct sock`: the agent reads it from the kernel's BTF.
#[unsafe(no_mangle)]
pub(crate) static SK_ERR_OFFSET: Global<u32> = Global::new(0);

/// Offset of a socket's cookie in the same.
#[unsafe(no_mangle)]
pub(crate) static SK_COOKIE_OFFSET: Global<u32> = Global::new(0);

/// Offset of `write_seq` in the kernel's `struct tcp_sock`.
#[unsafe(no_mangle)]
pub(crate) static TCP_WRITE_SEQ_OFFSET: Global<u32> = Global::new(0);

/// Nanoseconds of a tick of the kernel's clock, in which it counts timeouts.
#[unsafe(no_mangle)]
pub(crate) static TICK_NS: Global<u32> = Global::new(0);

/// The name of this set of maps, for what sockets remember of it.
#[unsafe(no_mangle)]
pub(crate) static SET: Global<u32> = Global::new(0);

/// Takes down a time, in one of the two halves of `TIMES`.
#[inline(always)]
pub(crate) fn time(half: u32, micros: u32) {
    let power = 32 - micros.leading_zeros();
    let last = TIME_BUCKETS - 2;
    let bucket = if power < last { power } else { last };
    for (index, more) in [(bucket, 1), (TIME_BUCKETS - 1, u64::from(micros))] {
        if let Some(value) = TIMES.get_ptr_mut(half * TIME_BUCKETS + index) {
            // SAFETY: a live map value of this CPU; at worst a count is lost to a soft interrupt.
            unsafe { *value += more };
        }
    }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a live map value of this CPU. A program in a soft interrupt may come between; at worst one count of a thing that
        // should not happen is lost.
        unsafe { *value += 1 };
    }
}
