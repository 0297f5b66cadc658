//! Pods that opted out of Portolan.

/// Constants for opted-out cgroups.
/// The keys of `OPTED_OUT` are cgroup ids: Portolan ignores processes in these cgroups and below.
/// The only value of `OPT_OUT_FILTER` is the union of their [`OptOut::bit`]s.
#[derive(Clone, Copy, Debug)]
pub struct OptOut;

impl OptOut {
    /// The maximum number of opted-out cgroups: more than the pods that Kubernetes allows on a node.
    pub const CAPACITY: u32 = 4_096;
    /// The depth below the root cgroup to which lookups search.
    pub const LEVELS: i32 = 16;

    /// Returns the filter bit of a cgroup id.
    /// The kernel assigns ids in ascending order, so their low bits are well distributed.
    #[inline(always)]
    pub const fn bit(cgroup: u64) -> u64 {
        1 << (cgroup & 63)
    }
}
