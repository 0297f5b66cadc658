//! Pods that are left alone: their connections go where they dial.

use aya_ebpf::helpers::generated::bpf_get_current_ancestor_cgroup_id;
use portolan_common::OptOut;

use crate::maps::{OPT_OUT_FILTER, OPTED_OUT};

/// Whether the caller is in a cgroup that is left alone, at any depth. Where there is none, one word is read.
#[inline(always)]
pub(crate) fn is_opted_out() -> bool {
    let Some(filter) = OPT_OUT_FILTER.get_ptr(0) else { return false };
    // SAFETY: a live map value, which the agent changes by a single store.
    let filter = unsafe { filter.read_volatile() };
    filter != 0 && is_below_any(filter)
}

/// A function of its own: the kernel checks its loop once for each call, and not in the midst of all else.
#[inline(never)]
fn is_below_any(filter: u64) -> bool {
    for level in 1..=OptOut::LEVELS {
        // SAFETY: a helper call without pointers.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            return false;
        }
        // SAFETY: only whether there is one is asked.
        if filter & OptOut::bit(cgroup) != 0 && unsafe { OPTED_OUT.get(&cgroup) }.is_some() {
            return true;
        }
    }
    false
}
