//! Reference-counted ids of items that several frontends share: allocated on first use, freed after the last.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
};

use super::{
    ids::GraceEpoch,
    range_alloc::{OutOfCapacity, RangeAllocator},
};

/// Ids by the item that they stand for.
#[derive(Clone, Debug)]
pub(super) struct RefcountedIds<K, I> {
    ids: RangeAllocator,
    known: HashMap<K, Use<I>>,
    /// The items of a previous agent that [`Self::drop_adopted`] has not released yet; they keep their ids even while
    /// unused.
    adopted: BTreeSet<K>,
    /// The last epoch of each id that was ever in use.
    epochs: HashMap<I, u32>,
}

#[derive(Clone, Copy, Debug)]
struct Use<I> {
    id: I,
    frontends: u32,
}

/// An id in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id<I> {
    pub(super) id: I,
    pub(super) epoch: u32,
    /// Whether the id has just been allocated, so that its map entry must be written.
    pub(super) is_new: bool,
}

impl<K: Copy + Eq + Hash + Ord, I: Copy + Eq + Hash + From<u32> + Into<u32>> RefcountedIds<K, I> {
    pub(super) fn new(ids: RangeAllocator) -> Self {
        Self { ids, known: HashMap::new(), adopted: BTreeSet::new(), epochs: HashMap::new() }
    }

    /// Restores the epochs of ids that a previous agent has used.
    pub(super) fn restore_epochs(&mut self, epochs: impl IntoIterator<Item = (I, u32)>) {
        self.epochs.extend(epochs);
    }

    /// Keeps the id of an item that a previous agent has used.
    pub(super) fn adopt(&mut self, key: K, id: I) {
        self.ids.claim(id.into(), 1);
        self.known.insert(key, Use { id, frontends: 0 });
        self.adopted.insert(key);
    }

    /// Stops protecting adopted items and frees those that no frontend uses.
    pub(super) fn drop_adopted(&mut self, epoch: GraceEpoch) {
        for key in std::mem::take(&mut self.adopted) {
            self.drop_if_unused(epoch, key);
        }
    }

    pub(super) fn id(&self, key: &K) -> Option<I> {
        self.known.get(key).map(|known| known.id)
    }

    /// Returns the epoch of an item's id; 0 if it has none.
    pub(super) fn epoch(&self, key: &K) -> u32 {
        self.id(key).and_then(|id| self.epochs.get(&id).copied()).unwrap_or_default()
    }

    /// Returns every item that has an id, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (K, I)> {
        self.known.iter().map(|(key, known)| (*key, known.id))
    }

    /// Adds a use by one frontend, and allocates an id for the first one.
    pub(super) fn acquire(&mut self, key: K) -> Result<Id<I>, OutOfCapacity> {
        if let Some(known) = self.known.get_mut(&key) {
            known.frontends += 1;
            let epoch = self.epochs.get(&known.id).copied().unwrap_or_default();
            return Ok(Id { id: known.id, epoch, is_new: false });
        }
        let id = I::from(self.ids.alloc(1)?);
        let epoch = *self.epochs.entry(id).and_modify(|epoch| *epoch = epoch.wrapping_add(1)).or_insert(1);
        self.known.insert(key, Use { id, frontends: 1 });
        Ok(Id { id, epoch, is_new: true })
    }

    /// Drops a use by one frontend; after the last one, the id is freed once a grace period has passed.
    pub(super) fn release(&mut self, epoch: GraceEpoch, key: K) {
        if let Some(known) = self.known.get_mut(&key) {
            known.frontends = known.frontends.saturating_sub(1);
        }
        self.drop_if_unused(epoch, key);
    }

    /// Undoes an [`Self::acquire`] whose id was never published, for immediate reuse.
    pub(super) fn unalloc(&mut self, key: K) {
        let Some(known) = self.known.get_mut(&key) else { return };
        known.frontends = known.frontends.saturating_sub(1);
        let id = known.id;
        if known.frontends == 0 && !self.adopted.contains(&key) {
            self.known.remove(&key);
            self.ids.unalloc(id.into(), 1);
        }
    }

    pub(super) fn ranges(&self) -> &RangeAllocator {
        &self.ids
    }

    pub(super) fn ranges_mut(&mut self) -> &mut RangeAllocator {
        &mut self.ids
    }

    fn drop_if_unused(&mut self, epoch: GraceEpoch, key: K) {
        // An adopted frontend may still use it; its uses are not counted.
        if self.adopted.contains(&key) {
            return;
        }
        if let Some(known) = self.known.get(&key).copied().filter(|known| known.frontends == 0) {
            self.known.remove(&key);
            self.ids.defer_free(epoch, known.id.into(), 1);
        }
    }
}
