//! Per-socket state, and where it is stored.
//!
//! The state of a socket is in `CONNECTIONS`, at one of two indices that its kernel address selects, from connect until
//! the connection or the socket ends (docs/adr/0018-socket-state.md).
//! Socket storage is the fallback: if other sockets own both entries, or the pod has used up its share of them.
//!
//! The kernel reuses the addresses of sockets, so an entry is believed only while the socket's peer is the backend in
//! it.

use core::{
    intrinsics::{AtomicOrdering, atomic_and, atomic_cxchg, atomic_or},
    ptr::null_mut,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::{
    bindings::bpf_sock,
    helpers::generated::{bpf_sk_storage_get, bpf_skc_to_tcp_sock},
    programs::SockAddrContext,
};
use portolan_common::{Connection, ConnectionExtra, ConnectionFlags, Endpoint, NodeFlags, SocketStage, SocketState};

use crate::maps::{CONNECTION_EXTRAS, CONNECTION_SHIFT, CONNECTIONS, NODE_FLAGS, SOCKETS};

/// The state of a socket.
#[derive(Clone, Copy)]
pub(crate) struct State {
    pub(crate) connection: *mut Connection,
    pub(crate) place: Place,
}

#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// An entry of `CONNECTIONS`, by its index.
    Entry(u32),
    Storage(*mut SocketState),
}

impl State {
    #[inline(always)]
    pub(crate) fn entry(index: u32) -> Option<Self> {
        CONNECTIONS.get_ptr_mut(index).map(|connection| Self { connection, place: Place::Entry(index) })
    }

    #[inline(always)]
    pub(crate) fn storage(storage: *mut SocketState) -> Option<Self> {
        if storage.is_null() {
            return None;
        }
        // SAFETY: a live value, which contains the connection.
        Some(Self { connection: unsafe { &raw mut (*storage).connection }, place: Place::Storage(storage) })
    }

    /// Returns the index of the entry; `None` for socket storage.
    #[inline(always)]
    pub(crate) fn index(&self) -> Option<u32> {
        match self.place {
            Place::Entry(index) => Some(index),
            Place::Storage(_) => None,
        }
    }

    /// Returns the part of the state that only some connections need.
    #[inline(always)]
    pub(crate) fn extra(&self) -> Option<*mut ConnectionExtra> {
        match self.place {
            Place::Entry(index) => CONNECTION_EXTRAS.get_ptr_mut(index),
            // SAFETY: a live value.
            Place::Storage(storage) => Some(unsafe { &raw mut (*storage).extra }),
        }
    }

    #[inline(always)]
    pub(crate) fn flags(&self) -> u32 {
        // SAFETY: a live map value. Another CPU may change bits at the same time.
        unsafe { (&raw const (*self.connection).flags).read_volatile() }
    }

    /// Sets flags of a connection whose SYN has not been sent: no other CPU can be changing them.
    #[inline(always)]
    pub(crate) fn set_first_flags(&self, flags: u32) {
        // SAFETY: a live map value of this socket, which is locked.
        unsafe { (&raw mut (*self.connection).flags).write_volatile(self.flags() | flags) };
    }

    /// Sets the stage, a byte that only the events of the socket's own connection write, one at a time.
    #[inline(always)]
    pub(crate) fn set_stage(&self, stage: SocketStage) {
        // SAFETY: a live map value. The stage is the lowest byte; big-endian machines are refused at build time.
        unsafe { (&raw mut (*self.connection).flags).cast::<u8>().write_volatile(stage as u8) };
    }

    /// Sets flags, and keeps those that another CPU may be clearing.
    #[inline(always)]
    pub(crate) fn add_flags(&self, flags: u32) {
        // SAFETY: a live map value.
        unsafe { atomic_or::<u32, u32, { AtomicOrdering::SeqCst }>(&raw mut (*self.connection).flags, flags) };
    }

    /// Clears flags, and returns the former ones.
    #[inline(always)]
    pub(crate) fn remove_flags(&self, flags: u32) -> u32 {
        // SAFETY: a live map value.
        unsafe { atomic_and::<u32, u32, { AtomicOrdering::SeqCst }>(&raw mut (*self.connection).flags, !flags) }
    }

    /// Replaces the flags if they are still the same as before. Returns those that it found, and whether it did.
    #[inline(always)]
    pub(crate) fn exchange_flags(&self, before: u32, after: u32) -> (u32, bool) {
        // SAFETY: a live map value.
        unsafe {
            let flags = &raw mut (*self.connection).flags;
            atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(flags, before, after)
        }
    }

    #[inline(always)]
    pub(crate) fn stage(&self) -> u32 {
        self.flags() & ConnectionFlags::STAGE
    }

    /// Returns whether the state is valid for a socket with this peer.
    #[inline(always)]
    pub(crate) fn has_backend(&self, peer: &Endpoint) -> bool {
        // SAFETY: live map values.
        unsafe {
            let connection = &*self.connection;
            if connection.backend_port != peer.port_word() || connection.backend_word != peer.v4_word() {
                return false;
            }
            if connection.flags & ConnectionFlags::V6 == 0 {
                return peer.is_v4();
            }
            let [a, b, c, _] = peer.words();
            self.extra().is_some_and(|extra| (*extra).backend_words == [a, b, c])
        }
    }

    /// Returns the address that the application dialed.
    #[inline(always)]
    pub(crate) fn frontend(&self) -> Endpoint {
        // SAFETY: live map values.
        unsafe {
            let connection = &*self.connection;
            if connection.flags & ConnectionFlags::V6 == 0 {
                return Endpoint::from_v4_word(connection.frontend_word, connection.frontend_port);
            }
            let [a, b, c] = self.extra().map_or([0; 3], |extra| (*extra).frontend_words);
            Endpoint::from_words([a, b, c, connection.frontend_word], connection.frontend_port)
        }
    }

    /// Returns the endpoint that the connection was redirected to.
    #[inline(always)]
    pub(crate) fn backend(&self) -> Endpoint {
        // SAFETY: live map values.
        unsafe {
            let connection = &*self.connection;
            if connection.flags & ConnectionFlags::V6 == 0 {
                return Endpoint::from_v4_word(connection.backend_word, connection.backend_port);
            }
            let [a, b, c] = self.extra().map_or([0; 3], |extra| (*extra).backend_words);
            Endpoint::from_words([a, b, c, connection.backend_word], connection.backend_port)
        }
    }
}

/// The kernel address of a socket, as the owner of its entry.
#[inline(always)]
pub(crate) fn owner<S>(socket: *const S) -> u64 {
    socket.expose_provenance() as u64
}

/// Returns the state of the socket that makes a call.
#[inline(always)]
pub(crate) fn lookup(ctx: &SockAddrContext) -> Option<State> {
    // SAFETY: the kernel gives a valid context.
    of_socket(unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk })
}

/// Returns the state of a socket, wherever it is stored.
#[inline(always)]
pub(crate) fn of_socket(socket: *mut bpf_sock) -> Option<State> {
    if socket.is_null() {
        return None;
    }
    if let Some(state) = owned(socket) {
        return Some(state);
    }
    if !is_used(NodeFlags::STORAGE) {
        return None;
    }
    State::storage(storage(socket, 0))
}

/// Returns the entry of `CONNECTIONS` that a socket owns.
/// `S` is the type of the kernel's pointer; only its address is used.
#[inline(always)]
pub(crate) fn owned<S>(socket: *const S) -> Option<State> {
    let first = Connection::first_way(owner(socket) as u32, CONNECTION_SHIFT.load());
    owned_at(first, owner(socket)).or_else(|| owned_at(first | 1, owner(socket)))
}

#[inline(always)]
fn owned_at(index: u32, owner: u64) -> Option<State> {
    let state = State::entry(index)?;
    // SAFETY: a live map value.
    (unsafe { owner_of(state.connection) } == owner).then_some(state)
}

/// Returns the [`NodeFlags`] bits.
#[inline(always)]
fn node_flags() -> u64 {
    // SAFETY: a live map value.
    NODE_FLAGS.get_ptr(0).map_or(0, |flags| unsafe { flags.read_volatile() })
}

/// Returns whether something has ever been used, as a [`NodeFlags`] bit. Until then, no hook needs to look for it.
#[inline(always)]
pub(crate) fn is_used(what: u64) -> bool {
    node_flags() & what != 0
}

/// Returns the side on which a connection that begins now is counted, as a flag of the connection.
#[inline(always)]
pub(crate) fn current_side() -> u32 {
    if node_flags() & NodeFlags::SIDE == 0 { 0 } else { ConnectionFlags::SIDE }
}

/// Records that something is used.
#[inline(always)]
pub(crate) fn set_used(what: u64) {
    if !is_used(what)
        && let Some(used) = NODE_FLAGS.get_ptr_mut(0)
    {
        // SAFETY: a live map value.
        unsafe { atomic_or::<u64, u64, { AtomicOrdering::SeqCst }>(used, what) };
    }
}

#[inline(always)]
pub(crate) fn storage(socket: *mut bpf_sock, flags: u64) -> *mut SocketState {
    let map = (&raw const SOCKETS).cast_mut().cast();
    // SAFETY: a helper call with the kernel's own pointer.
    unsafe { bpf_sk_storage_get(map, socket.cast(), null_mut(), flags).cast() }
}

#[inline(always)]
pub(crate) unsafe fn owner_of(connection: *const Connection) -> u64 {
    // SAFETY: guaranteed by the caller.
    unsafe { (&raw const (*connection).owner).read_volatile() }
}

#[inline(always)]
pub(crate) unsafe fn exchange(word: *mut u64, before: u64, after: u64) -> (u64, bool) {
    // SAFETY: guaranteed by the caller.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, before, after) }
}

/// Returns whether the entry still belongs to this owner; socket storage always does.
#[inline(always)]
pub(crate) fn is_owned_by(state: &State, owner: u64) -> bool {
    match state.place {
        // SAFETY: a live map value.
        Place::Entry(_) => unsafe { owner_of(state.connection) == owner },
        Place::Storage(_) => true,
    }
}

/// Marks an entry as busy, before its socket counts; returns false if another socket has taken it.
#[inline(always)]
pub(crate) fn begin(state: &State, me: u64) -> bool {
    match state.place {
        // SAFETY: a live map value.
        Place::Entry(_) => unsafe { exchange(&raw mut (*state.connection).owner, me, Connection::BUSY).1 },
        Place::Storage(_) => true,
    }
}

/// Gives a busy entry to its socket, after `claim`, `make_room` or [`begin`]. Whoever sees the owner also sees what was
/// written before.
#[inline(always)]
pub(crate) fn settle(state: &State, me: u64) {
    if let Place::Entry(_) = state.place {
        compiler_fence(Ordering::Release);
        // SAFETY: a live map value, whose owner no other program changes while it is busy.
        unsafe { (&raw mut (*state.connection).owner).write_volatile(me) };
    }
}

/// Returns the kernel's `struct tcp_sock`, whose field offsets come from BTF; `None` for any other socket.
#[inline(always)]
pub(crate) fn tcp_sock<S>(sk: *mut S) -> Option<*const u8> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: the kernel's own pointer.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
    (!tcp.is_null()).then_some(tcp.cast_const().cast())
}
