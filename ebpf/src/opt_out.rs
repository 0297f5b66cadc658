//! Pods that opted out: their connections keep the address that they dial.

use aya_ebpf::helpers::generated::bpf_get_current_ancestor_cgroup_id;
use portolan_common::OptOut;

use crate::maps::{OPT_OUT_FILTER, OPTED_OUT};

/// Returns whether the caller is in an opted-out cgroup, at any depth.
/// If no cgroup has opted out, this reads a single word.
#[inline(always)]
pub(crate) fn is_opted_out() -> bool {
    let Some(filter) = OPT_OUT_FILTER.get_ptr(0) else { return false };
    // SAFETY: a live map value, which the agent changes by a single store.
    let filter = unsafe { filter.read_volatile() };
    filter != 0 && is_below_any(filter)
}

/// Not inlined, so that the verifier checks the loop once per call instead of once per path of the caller.
#[inline(never)]
fn is_below_any(filter: u64) -> bool {
    for level in 1..=OptOut::LEVELS {
        // SAFETY: a helper call without pointers.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            return false;
        }
        // SAFETY: only the presence of the value is used.
        if filter & OptOut::bit(cgroup) != 0 && unsafe { OPTED_OUT.get(cgroup) }.is_some() {
            return true;
        }
    }
    false
}
