//! What Portolan remembers on a socket, and where.
//!
//! Making a socket's storage takes longer than all the rest of a connect (docs/adr/0002-socket-state.md). So the state of a TCP connection
//! lies in a place of `CONNECTIONS` that its cookie names, from its connect until it closes. Where that place is somebody else's, and for UDP, of
//! whose end no hook hears, it is the socket's storage.

use core::{
    intrinsics::{AtomicOrdering, atomic_cxchg},
    ptr::null_mut,
};

use aya_ebpf::{
    helpers::generated::{bpf_get_socket_cookie, bpf_sk_storage_get, bpf_skc_to_tcp_sock},
    programs::{SockAddrContext, SockOpsContext},
};
use portolan_common::{Connection, SocketState};

use crate::{
    connect::IPPROTO_TCP,
    maps::{CONNECTIONS, SK_COOKIE_OFFSET, SOCKETS},
};

/// What Portolan left on the socket that makes a call.
#[inline(always)]
pub(crate) fn lookup(ctx: &SockAddrContext, protocol: u32) -> Option<*mut SocketState> {
    if protocol == IPPROTO_TCP {
        // One that nobody has asked for its cookie has no place; and storage is only for want of a place.
        // SAFETY: the kernel gives a valid context.
        let cookie = known_cookie(unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk })?;
        if let Some(state) = owned(cookie) {
            return Some(state);
        }
    }
    // SAFETY: the kernel gives a valid context.
    let state = unsafe { SOCKETS.get_ptr_mut(ctx) };
    (!state.is_null()).then_some(state)
}

/// The same, and where there is nothing yet, a new one; `None` where there is no memory for it.
#[inline(always)]
pub(crate) fn get_or_create(ctx: &SockAddrContext, protocol: u32) -> Option<*mut SocketState> {
    if protocol == IPPROTO_TCP
        && let Some(state) = claim(cookie(ctx))
    {
        return Some(state);
    }
    // SAFETY: the kernel gives a valid context.
    let state = unsafe { SOCKETS.get_or_insert_ptr_mut(ctx, None) };
    (!state.is_null()).then_some(state)
}

/// What Portolan left on the TCP socket that something happens to.
#[inline(always)]
pub(crate) fn for_sock_ops(ctx: &SockOpsContext) -> Option<*mut SocketState> {
    // SAFETY: the kernel gives a valid context.
    unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if let Some(state) = owned(known_cookie(sk)?) {
            return Some(state);
        }
        if sk.is_null() {
            return None;
        }
        let map = (&raw const SOCKETS).cast_mut().cast();
        let state: *mut SocketState = bpf_sk_storage_get(map, sk.cast(), null_mut(), 0).cast();
        (!state.is_null()).then_some(state)
    }
}

/// The socket is closed: its place is free. (Storage goes with the socket.)
#[inline(always)]
pub(crate) fn release(ctx: &SockOpsContext) {
    // SAFETY: the kernel gives a valid context.
    let Some(cookie) = known_cookie(unsafe { (*ctx.ops).__bindgen_anon_2.sk }) else { return };
    let Some(place) = slot(cookie) else { return };
    // SAFETY: a live map value. The exchange comes after all that was written before, on every machine.
    unsafe {
        let owner = &raw mut (*place).owner;
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(owner, cookie, 0);
    }
}

/// The place of the socket that something happens to, if it has one.
#[inline(always)]
pub(crate) fn slot_for_sock_ops(ctx: &SockOpsContext) -> Option<*mut Connection> {
    // SAFETY: the kernel gives a valid context.
    connection(tcp_sock(unsafe { (*ctx.ops).__bindgen_anon_2.sk })?)
}

/// The place of a TCP socket, if it has one.
#[inline(always)]
pub(crate) fn connection(tcp: *const u8) -> Option<*mut Connection> {
    let cookie = read_cookie(tcp)?;
    let place = slot(cookie)?;
    // SAFETY: a live map value.
    unsafe { ((&raw const (*place).owner).read_volatile() == cookie).then_some(place) }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: a helper call with the kernel's own context.
    unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) }
}

/// The cookie of a TCP socket, if it has one already: to give it one takes longer than all else about a connect that is none of Portolan's.
#[inline(always)]
fn known_cookie<S>(sk: *mut S) -> Option<u64> {
    read_cookie(tcp_sock(sk)?)
}

/// The kernel's own record of a TCP socket, whose fields lie at the offsets that its BTF says; none of any other socket.
#[inline(always)]
pub(crate) fn tcp_sock<S>(sk: *mut S) -> Option<*const u8> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: the kernel's own pointer.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
    (!tcp.is_null()).then_some(tcp.cast_const().cast())
}

#[inline(always)]
fn read_cookie(tcp: *const u8) -> Option<u64> {
    // SAFETY: a read through a BTF pointer cannot fault, and the offset comes from the kernel's own BTF.
    let cookie = unsafe { tcp.add(SK_COOKIE_OFFSET.load() as usize).cast::<u64>().read_volatile() };
    (cookie != 0).then_some(cookie)
}

/// The place that a cookie names. A CPU gives the cookies of a batch of 4,096 one after the other, so that neighbours in time are neighbours here.
#[inline(always)]
fn slot(cookie: u64) -> Option<*mut Connection> {
    CONNECTIONS.get_ptr_mut(cookie as u32 & (Connection::CAPACITY - 1))
}

/// The state in the place that the cookie names, if it is this socket's.
#[inline(always)]
fn owned(cookie: u64) -> Option<*mut SocketState> {
    let place = slot(cookie)?;
    // SAFETY: a live map value.
    unsafe { ((&raw const (*place).owner).read_volatile() == cookie).then_some(&raw mut (*place).state) }
}

/// The same, and where the place is free it becomes this socket's.
#[inline(always)]
fn claim(cookie: u64) -> Option<*mut SocketState> {
    let place = slot(cookie)?;
    // SAFETY: a live map value; who changes the owner from nobody has the place for itself.
    unsafe {
        let owner = &raw mut (*place).owner;
        let (before, taken) =
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(owner, 0, cookie);
        if !taken && before != cookie {
            return None;
        }
        // Whose it was may have been looked at; of whose it is now, that is decided once it stands.
        (*place).response.flags = 0;
        Some(&raw mut (*place).state)
    }
}
