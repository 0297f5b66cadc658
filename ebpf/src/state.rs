//! Per-socket state, and where it is stored.
//!
//! The state of a socket is in `CONNECTIONS`, at one of two indices that its kernel address selects, from connect until
//! the connection or the socket ends (docs/adr/0002-socket-state.md).
//! Socket storage is the fallback: if other sockets own both entries, or the pod has used up its share of them.
//!
//! The kernel reuses the addresses of sockets, so an entry is believed only while the socket's peer is the backend in
//! it.

use core::{
    intrinsics::{AtomicOrdering, atomic_and, atomic_cxchg, atomic_or, atomic_xadd},
    ptr::null_mut,
};

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_sk_storage_get, bpf_skc_to_tcp_sock,
    },
    programs::SockAddrContext,
};
use portolan_common::{
    ClientUse, Connection, ConnectionExtra, ConnectionFlags, Counter, Endpoint, SocketStage, SocketState,
};

use crate::{
    maps::{
        CLIENT_LEVEL, CLIENTS, CONNECTION_EXTRAS, CONNECTION_SHARE, CONNECTION_SHIFT, CONNECTIONS, FALLBACK_USED,
        SOCKETS, count,
    },
    outcome,
};

/// The state of a socket.
#[derive(Clone, Copy)]
pub(crate) struct State {
    pub(crate) connection: *mut Connection,
    place: Place,
}

#[derive(Clone, Copy)]
enum Place {
    /// An entry of `CONNECTIONS`, by its index.
    Entry(u32),
    Storage(*mut SocketState),
}

impl State {
    #[inline(always)]
    fn entry(index: u32) -> Option<Self> {
        CONNECTIONS.get_ptr_mut(index).map(|connection| Self { connection, place: Place::Entry(index) })
    }

    #[inline(always)]
    fn storage(storage: *mut SocketState) -> Option<Self> {
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

    /// Voids the state, and frees its entry.
    /// Socket storage is freed with the socket.
    #[inline(always)]
    pub(crate) fn free(&self, owner: u64) {
        // SAFETY: a live map value.
        unsafe { (*self.connection).backend_port = 0 };
        if let Place::Entry(_) = self.place {
            leave_share(self);
            // SAFETY: as above.
            // Sequentially consistent: earlier writes come first on every architecture.
            unsafe { exchange(&raw mut (*self.connection).owner, owner, 0) };
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
    if !is_fallback_used() {
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

/// Returns a place for the state of a socket for which [`claim`] found none; `None` if the kernel has no memory.
#[inline(always)]
pub(crate) fn make_room(socket: *mut bpf_sock) -> Option<State> {
    if socket.is_null() {
        return None;
    }
    let me = owner(socket);
    steal(Connection::first_way(me as u32, CONNECTION_SHIFT.load()), me).or_else(|| fall_back(socket))
}

/// Returns the entry of a socket, and claims one if it has none; `None` if others have both of its entries.
/// What an earlier connect has left in it no longer counts.
#[inline(always)]
pub(crate) fn claim(socket: *mut bpf_sock) -> Option<State> {
    let me = owner(socket);
    let first = Connection::first_way(me as u32, CONNECTION_SHIFT.load());
    let (one, other) = (State::entry(first)?, State::entry(first | 1)?);
    // SAFETY: live map values.
    let (owner_of_one, owner_of_other) = unsafe { (owner_of(one.connection), owner_of(other.connection)) };
    if owner_of_one == me || owner_of_other == me {
        let mine = if owner_of_one == me { one } else { other };
        return forget(mine.connection, me).then_some(mine);
    }
    let free = if owner_of_one == 0 {
        one
    } else if owner_of_other == 0 {
        other
    } else {
        return None;
    };
    // SAFETY: a live map value. Only the socket that changes the owner from 0 uses the entry.
    unsafe { exchange(&raw mut (*free.connection).owner, 0, me).1 }.then_some(free)
}

/// Takes an entry from a socket whose connect has not come to its SYN: it failed, or is about to send it.
/// A pod can hold many of the former, which are in no share.
/// The latter, should it lose its entry in the microsecond that this takes, is served without being observed.
#[inline(always)]
fn steal(first: u32, me: u64) -> Option<State> {
    for way in 0..Connection::WAYS {
        let state = State::entry(first | way)?;
        // SAFETY: a live map value.
        unsafe {
            let before = owner_of(state.connection);
            let is_idle = state.flags() & (ConnectionFlags::STAGE | ConnectionFlags::UDP) == 0;
            if is_idle && before != 0 && exchange(&raw mut (*state.connection).owner, before, me).1 {
                return Some(state);
            }
        }
    }
    None
}

/// Ends the accounting of what an earlier connect of this socket has left in its entry. Returns true.
/// Not inlined: it is rare.
#[inline(never)]
fn forget(connection: *mut Connection, me: u64) -> bool {
    let state = State { connection, place: Place::Entry(0) };
    outcome::stop_counting(&state, me);
    leave_share(&state);
    true
}

/// Records which client an entry belongs to, and the socket's cookie.
/// Returns `false` if the client has used up its share of `CONNECTIONS`.
///
/// Must run in the context of the caller: for TCP when the SYN is about to be sent, so that a failing connect costs
/// little; for UDP in the connect hook.
#[inline(always)]
pub(crate) fn join_share(state: &State, cookie: u64) -> bool {
    let client = client();
    // SAFETY: live map values; the counter is only ever added to.
    unsafe {
        (*state.connection).client = client;
        (*state.connection).cookie = cookie;
        if let Place::Storage(_) = state.place {
            return true;
        }
        let Some(uses) = CLIENTS.get_ptr_mut(ClientUse::index(client)) else { return true };
        if (&raw const (*uses).connections).read_volatile() as i64 >= i64::from(CONNECTION_SHARE.load()) {
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*uses).over_share, 1);
            return false;
        }
        atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*uses).connections, 1);
    }
    state.add_flags(ConnectionFlags::SHARED);
    true
}

/// Takes an entry out of its client's share, if it is in it.
#[inline(always)]
fn leave_share(state: &State) {
    if state.flags() & ConnectionFlags::SHARED == 0
        || state.remove_flags(ConnectionFlags::SHARED) & ConnectionFlags::SHARED == 0
    {
        return;
    }
    // SAFETY: live map values; the counter is only ever added to.
    unsafe {
        if let Some(uses) = CLIENTS.get_ptr_mut(ClientUse::index((*state.connection).client)) {
            atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*uses).connections, u64::MAX);
        }
    }
}

/// Moves the state of a socket, whose client has used up its share, from its entry to socket storage.
/// Returns `false` if the kernel has no memory for it.
#[inline(never)]
pub(crate) fn move_to_storage(connection: *mut Connection, index: u32, socket: *mut bpf_sock) -> bool {
    let Some(moved) = fall_back(socket) else { return false };
    // SAFETY: live values of this socket, which is locked.
    unsafe {
        let (flags, client) = ((*moved.connection).flags, (*moved.connection).client);
        *moved.connection = Connection { owner: 0, ..*connection };
        (*moved.connection).client = client;
        (*moved.connection).flags |= flags;
        if let (Some(from), Some(to)) = (CONNECTION_EXTRAS.get_ptr(index), moved.extra()) {
            *to = *from;
        }
        exchange(&raw mut (*connection).owner, owner(socket), 0);
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
    if let Some(used) = FALLBACK_USED.get_ptr_mut(0) {
        // SAFETY: a live map value, which is set once.
        unsafe { used.write_volatile(1) };
    }
    outcome::stop_counting(&state, 0);
    Some(state)
}

/// Returns whether any socket has ever had its state in socket storage.
/// Until then, no hook needs to look there.
#[inline(always)]
fn is_fallback_used() -> bool {
    // SAFETY: a live map value.
    FALLBACK_USED.get_ptr(0).is_some_and(|used| unsafe { used.read_volatile() } != 0)
}

#[inline(always)]
fn storage(socket: *mut bpf_sock, flags: u64) -> *mut SocketState {
    let map = (&raw const SOCKETS).cast_mut().cast();
    // SAFETY: a helper call with the kernel's own pointer.
    unsafe { bpf_sk_storage_get(map, socket.cast(), null_mut(), flags).cast() }
}

/// Returns the client that runs this program: the pod, or the container of it, by the lower half of its cgroup's id.
/// Outside of pods, it is the caller's own cgroup.
#[inline(always)]
fn client() -> u32 {
    // SAFETY: helper calls without pointers.
    unsafe {
        match bpf_get_current_ancestor_cgroup_id(CLIENT_LEVEL.load()) {
            0 => bpf_get_current_cgroup_id() as u32,
            id => id as u32,
        }
    }
}

#[inline(always)]
unsafe fn owner_of(connection: *const Connection) -> u64 {
    // SAFETY: guaranteed by the caller.
    unsafe { (&raw const (*connection).owner).read_volatile() }
}

#[inline(always)]
unsafe fn exchange(word: *mut u64, before: u64, after: u64) -> (u64, bool) {
    // SAFETY: guaranteed by the caller.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, before, after) }
}

/// Handles the end of a socket's last descriptor.
///
/// A connection may outlive it in the kernel; then its entry stays until that ends.
/// A program of the pod's own may hide that end from `sock_ops`, but not this hook.
#[inline(always)]
pub(crate) fn on_release<S>(socket: *const S) {
    let Some(state) = owned(socket) else { return };
    let flags = state.flags();
    if flags & ConnectionFlags::UDP != 0 || flags & ConnectionFlags::STAGE == SocketStage::None as u32 {
        state.free(owner(socket));
    } else {
        outcome::stop_counting(&state, owner(socket));
    }
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
