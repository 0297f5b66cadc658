//! Every map and every constant that the agent sets, on one screen. Sizes are set by the agent at load.

use aya_ebpf::{
    Global,
    btf_maps::{Array, HashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use portolan_common::{
    Backend, BackendStats, Counter, Frontend, FrontendKey, FrontendStats, Outcome, Slot, SocketState,
};

/// Service address, port, protocol → where its schedule lies.
#[btf_map]
pub(crate) static FRONTENDS: HashMap<FrontendKey, Frontend, 1> = HashMap::new();

/// Places in schedules: each names a run of backends.
#[btf_map]
pub(crate) static SLOTS: Array<Slot, 1> = Array::new();

/// Runs of backends: backend ids.
#[btf_map]
pub(crate) static RUNS: Array<u32, 1> = Array::new();

/// Backend id → endpoint.
#[btf_map]
pub(crate) static BACKENDS: Array<Backend, 1> = Array::new();

/// Frontend id → shared cursor and counters.
#[btf_map]
pub(crate) static FRONTEND_STATS: Array<FrontendStats, 1> = Array::new();

/// Backend id → counters.
#[btf_map]
pub(crate) static BACKEND_STATS: Array<BackendStats, 1> = Array::new();

/// Backend id → not zero while its successes must be told: set here by a failure, taken back by the agent once no pool counts
/// failures of it any more.
#[btf_map]
pub(crate) static TROUBLED: Array<u32, 1> = Array::new();

/// Socket → what it dialled and what it was given.
#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// Outcomes for the agent: 1 MiB holds 14,500 that were not read yet.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Outcome, 0x10_0000> = RingBuf::new();

/// See [`Counter`].
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { Counter::COUNT as usize }> = PerCpuArray::new();

/// Offset of `sk_err` in the kernel's `struct sock`: the agent reads it from the kernel's BTF.
#[unsafe(no_mangle)]
pub(crate) static SK_ERR_OFFSET: Global<u32> = Global::new(0);

/// Adds one to a counter of this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a live map value of this CPU. A program in a soft interrupt may come between; at worst one count of a thing that
        // should not happen is lost.
        unsafe { *value += 1 };
    }
}
