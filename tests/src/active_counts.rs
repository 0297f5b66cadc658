//! Portolan's counts of active connections (the pinned maps `BACKEND_STATS` and `POOL_STATS`), accessed from outside the
//! agent.

use std::{fs, path::Path, sync::atomic::Ordering::SeqCst};

use anyhow::{Context as _, Result};

use crate::pinned_array::PinnedArray;

/// Words in a page: only the first values are of interest.
const PAGE: usize = 512;

/// The counts of backends and of pools, mapped into this process.
pub struct ActiveCounts([(PinnedArray, Value); 2]);

/// The words of a value, and which of them is the number of active connections.
#[derive(Clone, Copy)]
struct Value {
    words: usize,
    active: usize,
}

impl ActiveCounts {
    /// Maps the counts of the agent that pins its objects below `pins`.
    ///
    /// # Errors
    /// Returns an error if no such maps are pinned there, or if they cannot be opened or mapped.
    pub fn open(pins: &Path) -> Result<Self> {
        let open = |name| -> Result<PinnedArray> {
            let path = fs::read_dir(pins)?.flatten().map(|entry| entry.path().join(name)).find(|path| path.exists());
            PinnedArray::open(&path.with_context(|| format!("no map {name} is pinned"))?, PAGE)
        };
        let backends = (open("BACKEND_STATS")?, Value { words: 8, active: 1 });
        Ok(Self([backends, (open("POOL_STATS")?, Value { words: 3, active: 0 })]))
    }

    /// Returns the counts that are not zero: those of backends, then those of pools.
    pub fn read(&self) -> [Vec<i64>; 2] {
        [0, 1].map(|i| {
            let (array, value) = &self.0[i];
            let all = array.words().chunks_exact(value.words).map(|words| total(words[value.active].load(SeqCst)));
            all.filter(|count| *count != 0).collect()
        })
    }

    /// Raises each count that is not zero, as if the ends of this many connections had not been seen: some that began
    /// before the agent last changed the side of the counts, and some that began afterwards.
    pub fn lose_ends(&self, (before, after): (u32, u32)) {
        for (array, value) in &self.0 {
            for words in array.words().chunks_exact(value.words).filter(|words| words[value.active].load(SeqCst) != 0) {
                words[value.active].fetch_add(u64::from(before) | u64::from(after) << 32, SeqCst);
            }
        }
    }
}

/// Returns the number of connections, which is the sum of a count in the lower half and one in the upper half.
fn total(word: u64) -> i64 {
    i64::from(word as i32) + i64::from((word >> 32) as i32)
}
