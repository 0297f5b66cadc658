//! Finds the frontend that a connection dials: open addressing in memory-mapped arrays (docs/adr/0019-hit-path.md).

use portolan_common::{Frontend, FrontendKey, Published};

use crate::maps::{FRONTEND_MULTIPLIERS, FRONTEND_OVERFLOW, FRONTEND_SEED, FRONTEND_SHIFT, FRONTENDS4, FRONTENDS6};

/// The bit of a frontend id that tells IPv6 from IPv4; the other bits are the index.
const V6: u32 = 1 << 31;

/// A frontend that a connection dials, with what was in effect when it was found.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    pub(crate) line: *mut Frontend,
    pub(crate) id: u32,
    pub(crate) current: Published,
}

impl Found {
    #[inline(always)]
    fn new(line: *mut Frontend, id: u32) -> Self {
        // SAFETY: a live map value, of which the agent changes this word by a single store.
        let current = Published(unsafe { (&raw const (*line).current).read_volatile() });
        Self { line, id, current }
    }
}

/// Returns the frontend with this key; `None` if it is not a Service address.
#[inline(always)]
pub(crate) fn find(key: &FrontendKey) -> Option<Found> {
    if key.endpoint().is_v4() {
        // The key itself, which needs no multipliers.
        find4(key.fingerprint(&[0; 4]))
    } else {
        find6(key, key.fingerprint(&FRONTEND_MULTIPLIERS.load()))
    }
}

#[inline(always)]
fn find4(fingerprint: u64) -> Option<Found> {
    let hash = Frontend::hash(fingerprint, FRONTEND_SEED.load());
    let first = Frontend::first_bucket(hash, FRONTEND_SHIFT.load());
    let (one, one_key) = line4(first)?;
    if one_key == fingerprint {
        return Some(Found::new(one, first));
    }
    let (other, other_key) = line4(first | 1)?;
    if other_key == fingerprint {
        return Some(Found::new(other, first | 1));
    }
    if one_key == Frontend::EMPTY || other_key == Frontend::EMPTY {
        return None;
    }
    let index = search4(fingerprint, hash).checked_sub(1)?;
    // What the overflow map says may be out of date.
    let (line, key) = line4(index)?;
    (key == fingerprint).then(|| Found::new(line, index))
}

#[inline(always)]
fn line4(index: u32) -> Option<(*mut Frontend, u64)> {
    let line: *mut Frontend = FRONTENDS4.get_ptr_mut(index)?.cast();
    // SAFETY: a live map value, of which the agent changes this word by a single store.
    Some((line, unsafe { (&raw const (*line).key).read_volatile() }))
}

/// Searches behind the first bucket, and returns the index plus one; 0 if there is no such frontend.
/// Not inlined: few frontends are there.
#[inline(never)]
fn search4(fingerprint: u64, hash: u64) -> u32 {
    let second = Frontend::second_bucket(hash, FRONTEND_SHIFT.load());
    let Some((_, one_key)) = line4(second) else { return 0 };
    if one_key == fingerprint {
        return second.wrapping_add(1);
    }
    let Some((_, other_key)) = line4(second | 1) else { return 0 };
    if other_key == fingerprint {
        return (second | 1).wrapping_add(1);
    }
    if one_key == Frontend::EMPTY || other_key == Frontend::EMPTY {
        return 0;
    }
    overflow(fingerprint)
}

#[inline(always)]
fn overflow(fingerprint: u64) -> u32 {
    // SAFETY: the value is copied out at once.
    unsafe { FRONTEND_OVERFLOW.get(fingerprint) }.map_or(0, |index| index.wrapping_add(1))
}

/// The same for IPv6, where several keys may have the same fingerprint.
#[inline(always)]
fn find6(key: &FrontendKey, fingerprint: u64) -> Option<Found> {
    let hash = Frontend::hash(fingerprint, FRONTEND_SEED.load());
    let index = search6(key, fingerprint, hash).checked_sub(1)?;
    let value = FRONTENDS6.get_ptr_mut(index)?;
    Some(Found::new(value.cast(), index | V6))
}

/// Returns the index plus one of the frontend with this key; 0 if there is none.
/// Not inlined, so that the verifier checks what follows once.
#[inline(never)]
fn search6(key: &FrontendKey, fingerprint: u64, hash: u64) -> u32 {
    let shift = FRONTEND_SHIFT.load();
    for bucket in [Frontend::first_bucket(hash, shift), Frontend::second_bucket(hash, shift)] {
        let mut is_open = false;
        for index in [bucket, bucket | 1] {
            let found = at6(index, key, fingerprint);
            if found == FOUND {
                return index.wrapping_add(1);
            }
            is_open |= found == OPEN;
        }
        if is_open {
            return 0;
        }
    }
    let index = overflow(fingerprint);
    if index != 0 && at6(index.wrapping_sub(1), key, fingerprint) == FOUND { index } else { 0 }
}

const OTHER: u32 = 0;
const FOUND: u32 = 1;
const OPEN: u32 = 2;

/// Returns whether a line is that of this key, another one, or has never been used.
#[inline(always)]
fn at6(index: u32, key: &FrontendKey, fingerprint: u64) -> u32 {
    let Some(value) = FRONTENDS6.get_ptr(index) else { return OTHER };
    // SAFETY: a live map value, of which the agent changes the first word by a single store. The key stays the same while a
    // program may be reading the line.
    unsafe {
        let word = (&raw const (*value).line.key).read_volatile();
        if word == Frontend::EMPTY {
            return OPEN;
        }
        if word == fingerprint && (*value).key == *key { FOUND } else { OTHER }
    }
}
