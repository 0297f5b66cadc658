//! Per-socket state, and where it is stored.
//!
//! Allocating socket storage takes longer than the rest of a connect (docs/adr/0002-socket-state.md).
//! The state of a TCP connection is therefore in `CONNECTIONS`, at the index given by its cookie, from connect to
//! close.
//! Socket storage is the fallback if another socket owns that entry.
//! UDP always uses it, because no hook reports the close of a UDP socket.

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
    consts::IPPROTO_TCP,
    maps::{CONNECTIONS, SK_COOKIE_OFFSET, SOCKETS},
};

/// Returns the state of the socket that makes a call.
#[inline(always)]
pub(crate) fn lookup(ctx: &SockAddrContext, protocol: u32) -> Option<*mut SocketState> {
    if protocol == IPPROTO_TCP {
        // A socket without a cookie has no entry, and socket storage is only a fallback for sockets with one.
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

/// Returns the state of the socket that makes a call, and creates it if necessary; `None` if the kernel has no memory.
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

/// Returns the state of the TCP socket of a sock_ops event.
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

/// Frees the entry of a closed socket.
/// Socket storage is freed with the socket.
#[inline(always)]
pub(crate) fn release(ctx: &SockOpsContext) {
    // SAFETY: the kernel gives a valid context.
    let Some(cookie) = known_cookie(unsafe { (*ctx.ops).__bindgen_anon_2.sk }) else { return };
    let Some(place) = slot(cookie) else { return };
    // SAFETY: a live map value.
    // The exchange is sequentially consistent: earlier writes come first on every architecture.
    unsafe {
        let owner = &raw mut (*place).owner;
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(owner, cookie, 0);
    }
}

/// Returns the entry of the TCP socket of a sock_ops event, if it owns one.
#[inline(always)]
pub(crate) fn slot_for_sock_ops(ctx: &SockOpsContext) -> Option<*mut Connection> {
    // SAFETY: the kernel gives a valid context.
    connection(tcp_sock(unsafe { (*ctx.ops).__bindgen_anon_2.sk })?)
}

/// Returns the entry of a TCP socket, if it owns one.
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

/// Returns the cookie of a TCP socket, if it already has one.
/// Generating one would dominate the cost of a connect that bypasses Portolan.
#[inline(always)]
fn known_cookie<S>(sk: *mut S) -> Option<u64> {
    read_cookie(tcp_sock(sk)?)
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

#[inline(always)]
fn read_cookie(tcp: *const u8) -> Option<u64> {
    // SAFETY: a read through a BTF pointer cannot fault, and the offset comes from the kernel's own BTF.
    let cookie = unsafe { tcp.add(SK_COOKIE_OFFSET.load() as usize).cast::<u64>().read_volatile() };
    (cookie != 0).then_some(cookie)
}

/// Returns the entry at the index that a cookie selects.
/// A CPU hands out its batch of 4,096 cookies in order, so sockets close in time are neighbors here.
#[inline(always)]
fn slot(cookie: u64) -> Option<*mut Connection> {
    CONNECTIONS.get_ptr_mut(cookie as u32 & (Connection::CAPACITY - 1))
}

/// Returns the state in the cookie's entry, if this socket owns it.
#[inline(always)]
fn owned(cookie: u64) -> Option<*mut SocketState> {
    let place = slot(cookie)?;
    // SAFETY: a live map value.
    unsafe { ((&raw const (*place).owner).read_volatile() == cookie).then_some(&raw mut (*place).state) }
}

/// Returns the state in the cookie's entry, and claims the entry if it is free.
#[inline(always)]
fn claim(cookie: u64) -> Option<*mut SocketState> {
    let place = slot(cookie)?;
    // SAFETY: a live map value.
    // Only the socket that changes the owner from 0 uses the entry.
    unsafe {
        let owner = &raw mut (*place).owner;
        let (before, taken) =
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(owner, 0, cookie);
        if !taken && before != cookie {
            return None;
        }
        // The previous owner may have had its responses tracked.
        // For the new owner, this is decided once it is established.
        (*place).response.flags = 0;
        Some(&raw mut (*place).state)
    }
}
