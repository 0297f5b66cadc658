//! Processes that are left alone.

/// The key of `OPTED_OUT` is the id of a cgroup: nobody in it or below it is served. The one value of `OPT_OUT_FILTER` has the bits of all of them.
#[derive(Clone, Copy, Debug)]
pub struct OptOut;

impl OptOut {
    /// How many cgroups there may be: more pods than Kubernetes has on a node.
    pub const CAPACITY: u32 = 4_096;
    /// Cgroups are looked for so far below the root of all.
    pub const LEVELS: i32 = 16;

    /// The bit of a cgroup in the filter. The kernel counts their ids up.
    #[inline(always)]
    pub const fn bit(cgroup: u64) -> u64 {
        1 << (cgroup & 63)
    }
}
