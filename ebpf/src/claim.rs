//! Takes and frees the places of sockets: entries of `CONNECTIONS`, or socket storage (docs/adr/0018-socket-state.md).

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id},
};
use portolan_common::{ClientUse, Connection, ConnectionFlags, Counter, NodeFlags, SocketStage};

use crate::{
    accounting::{self, increment},
    maps::{CLIENT_LEVEL, CLIENTS, CONNECTION_EXTRAS, CONNECTION_SHARE, CONNECTION_SHIFT, count},
    state::{self, Place, State, exchange, owner, owner_of, storage},
};

/// Returns a place for the state of a socket for which [`claim`] found none; `None` if the kernel has no memory.
#[inline(always)]
pub(crate) fn make_room(socket: *mut bpf_sock) -> Option<State> {
    if socket.is_null() {
        return None;
    }
    steal(Connection::first_way(owner(socket) as u32, CONNECTION_SHIFT.load())).or_else(|| fall_back(socket))
}

/// Returns the entry of a socket, and claims one if it has none; `None` if others have both of its entries.
/// What an earlier connect has left in it no longer counts.
/// The entry is busy until [`state::settle`].
#[inline(always)]
pub(crate) fn claim(socket: *mut bpf_sock) -> Option<State> {
    let me = owner(socket);
    let first = Connection::first_way(me as u32, CONNECTION_SHIFT.load());
    let (one, other) = (State::entry(first)?, State::entry(first | 1)?);
    // SAFETY: live map values.
    let (owner_of_one, owner_of_other) = unsafe { (owner_of(one.connection), owner_of(other.connection)) };
    if owner_of_one == me || owner_of_other == me {
        let mine = if owner_of_one == me { one } else { other };
        return accounting::forget(mine.connection, me).then_some(mine);
    }
    // SAFETY: live map values. Only the socket that changes the owner from 0 uses the entry.
    unsafe {
        if owner_of_one == 0 && exchange(&raw mut (*one.connection).owner, 0, Connection::BUSY).1 {
            return Some(one);
        }
        let other_is_mine = owner_of_other == 0 && exchange(&raw mut (*other.connection).owner, 0, Connection::BUSY).1;
        other_is_mine.then_some(other)
    }
}

/// Takes an entry from a socket whose connect has not sent its SYN: it failed, or is about to send it.
/// A pod can hold many of the former, which are in no share.
/// The latter is served, but not observed.
#[inline(always)]
fn steal(first: u32) -> Option<State> {
    for way in 0..Connection::WAYS {
        let state = State::entry(first | way)?;
        // SAFETY: a live map value.
        unsafe {
            let before = owner_of(state.connection);
            if before == 0 || before == Connection::BUSY || !is_idle(&state) {
                continue;
            }
            if !exchange(&raw mut (*state.connection).owner, before, Connection::BUSY).1 {
                continue;
            }
            // Its socket may have been counted between the two checks. While the entry is busy here, that socket does not
            // find it; if it ends at this moment, the agent reclaims the entry later.
            if is_idle(&state) {
                return Some(state);
            }
            state::settle(&state, before);
        }
    }
    None
}

/// Returns whether an entry belongs to a connect that has not sent its SYN.
#[inline(always)]
fn is_idle(state: &State) -> bool {
    state.flags() & (ConnectionFlags::STAGE | ConnectionFlags::UDP) == 0
}

/// Counts an entry for its client, on this side, and records the socket's cookie.
/// Returns the flags that say so, or `None` if the client has used up its share of `CONNECTIONS`.
///
/// For TCP, this runs when the SYN is about to be sent, so that a failing connect costs little; for UDP, in the connect
/// hook.
#[inline(always)]
pub(crate) fn join_share(state: &State, cookie: u64, side: u32) -> Option<u32> {
    // SAFETY: live map values; the counter is only ever added to.
    unsafe {
        let client = (*state.connection).client;
        (*state.connection).cookie = cookie;
        if let Place::Storage(_) = state.place {
            return Some(side);
        }
        let Some(uses) = CLIENTS.get_ptr_mut(ClientUse::index(client)) else { return Some(side) };
        if (&raw const (*uses).connections).read_volatile().total() >= u64::from(CONNECTION_SHARE.load()) {
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*uses).over_share, 1);
            return None;
        }
        increment(&raw mut (*uses).connections, side);
    }
    Some(ConnectionFlags::SHARED | side)
}

/// Moves the state of a socket, whose client has used up its share, from its entry to socket storage.
/// `me` is the owner that the entry has now. Returns `false` if the kernel has no memory for it.
#[inline(never)]
pub(crate) fn move_to_storage(connection: *mut Connection, index: u32, socket: *mut bpf_sock, me: u64) -> bool {
    let Some(moved) = fall_back(socket) else { return false };
    // SAFETY: live values of this socket, which is locked.
    unsafe {
        *moved.connection = Connection { owner: 0, ..*connection };
        if let (Some(from), Some(to)) = (CONNECTION_EXTRAS.get_ptr(index), moved.extra()) {
            *to = *from;
        }
        exchange(&raw mut (*connection).owner, me, 0);
    }
    true
}

#[inline(always)]
fn fall_back(socket: *mut bpf_sock) -> Option<State> {
    let Some(state) = State::storage(storage(socket, u64::from(BPF_SK_STORAGE_GET_F_CREATE))) else {
        count(Counter::NoMemory);
        return None;
    };
    count(Counter::Fallback);
    state::set_used(NodeFlags::STORAGE);
    accounting::stop_counting(&state, 0);
    Some(state)
}

/// Returns the client that runs this program: the pod, or the container of it, by the lower half of its cgroup's id.
/// Outside of pods, it is the caller's own cgroup.
/// Only for the connect hooks: before Linux 6.2, `sock_ops` cannot ask.
#[inline(always)]
pub(crate) fn client() -> u32 {
    // SAFETY: helper calls without pointers.
    unsafe {
        match bpf_get_current_ancestor_cgroup_id(CLIENT_LEVEL.load()) {
            0 => bpf_get_current_cgroup_id() as u32,
            id => id as u32,
        }
    }
}

/// Handles the end of a socket's last descriptor.
///
/// A connection may outlive it in the kernel; then its entry stays until that ends.
/// A program of the pod's own may hide that end from `sock_ops`, but not this hook.
#[inline(always)]
pub(crate) fn on_release(socket: *mut bpf_sock) {
    let Some(state) = state::of_socket(socket) else { return };
    let flags = state.flags();
    if flags & ConnectionFlags::UDP != 0 || flags & ConnectionFlags::STAGE == SocketStage::None as u32 {
        accounting::free(&state, owner(socket));
    } else {
        accounting::stop_counting(&state, owner(socket));
    }
}
