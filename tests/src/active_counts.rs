//! Portolan's counts of active connections (the pinned maps `BACKEND_STATS` and `POOL_STATS`), accessed from outside the
//! agent.

use std::{fs, path::Path, sync::atomic::Ordering::SeqCst};

use anyhow::{Context as _, Result};

use crate::pinned_array::PinnedArray;

/// A map, the words of its values, and which of them is the number of active connections.
const MAPS: [(&str, usize, usize); 2] = [("BACKEND_STATS", 8, 1), ("POOL_STATS", 3, 0)];
/// Words in a page: only the first values are of interest.
const PAGE: usize = 512;

/// Raises the counts of all backends and pools that have active connections, as if the ends of `more` connections of each
/// had not been seen. The agent pins its objects below `pins`.
///
/// # Errors
/// Returns an error if no such maps are pinned there, or if they cannot be opened or mapped.
pub fn lose_ends(pins: &Path, more: u64) -> Result<()> {
    for (name, words, active) in MAPS {
        let path = fs::read_dir(pins)?.flatten().map(|entry| entry.path().join(name)).find(|path| path.exists());
        let array = PinnedArray::open(&path.with_context(|| format!("no map {name} is pinned"))?, PAGE)?;
        for value in array.words().chunks_exact(words).filter(|value| value[active].load(SeqCst) != 0) {
            value[active].fetch_add(more, SeqCst);
        }
    }
    Ok(())
}
