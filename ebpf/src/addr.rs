//! Reading and writing addresses in the contexts of the hooks.
//!
//! The verifier allows one word of a context at a time, so every access is a volatile one of four bytes.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_ops},
    programs::{SockAddrContext, SockOpsContext},
};
use portolan_common::Endpoint;

const AF_INET: u32 = 2;

/// The IPv4 address and port of a hook's socket address.
#[inline(always)]
pub(crate) fn read4(ctx: &SockAddrContext) -> Endpoint {
    let addr = ctx.sock_addr;
    // SAFETY: the kernel gives a valid context.
    unsafe {
        Endpoint::from_v4_word(
            addr_of!((*addr).user_ip4).read_volatile(),
            addr_of!((*addr).user_port).read_volatile() as u16,
        )
    }
}

/// The IPv6 address and port of a hook's socket address.
#[inline(always)]
pub(crate) fn read6(ctx: &SockAddrContext) -> Endpoint {
    let addr = ctx.sock_addr;
    // SAFETY: the kernel gives a valid context.
    unsafe {
        Endpoint::from_words(
            [
                addr_of!((*addr).user_ip6[0]).read_volatile(),
                addr_of!((*addr).user_ip6[1]).read_volatile(),
                addr_of!((*addr).user_ip6[2]).read_volatile(),
                addr_of!((*addr).user_ip6[3]).read_volatile(),
            ],
            addr_of!((*addr).user_port).read_volatile() as u16,
        )
    }
}

/// Replaces the IPv4 address and port.
#[inline(always)]
pub(crate) fn write4(ctx: &SockAddrContext, endpoint: &Endpoint) {
    let addr = ctx.sock_addr;
    // SAFETY: the kernel gives a valid context, and these fields may be written in these hooks.
    unsafe {
        addr_of_mut!((*addr).user_ip4).write_volatile(endpoint.v4_word());
        addr_of_mut!((*addr).user_port).write_volatile(u32::from(endpoint.port_word()));
    }
}

/// Replaces the IPv6 address and port.
#[inline(always)]
pub(crate) fn write6(ctx: &SockAddrContext, endpoint: &Endpoint) {
    let addr = ctx.sock_addr;
    let [a, b, c, d] = endpoint.words();
    // SAFETY: the kernel gives a valid context, and these fields may be written in these hooks.
    unsafe {
        addr_of_mut!((*addr).user_ip6[0]).write_volatile(a);
        addr_of_mut!((*addr).user_ip6[1]).write_volatile(b);
        addr_of_mut!((*addr).user_ip6[2]).write_volatile(c);
        addr_of_mut!((*addr).user_ip6[3]).write_volatile(d);
        addr_of_mut!((*addr).user_port).write_volatile(u32::from(endpoint.port_word()));
    }
}

/// The peer of a TCP socket.
#[inline(always)]
pub(crate) fn remote(ctx: &SockOpsContext) -> Endpoint {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: the kernel gives a valid context.
    unsafe {
        // The kernel leaves this port in network order in the upper half of the word.
        let port = (addr_of!((*ops).remote_port).read_volatile() >> 16) as u16;
        if addr_of!((*ops).family).read_volatile() == AF_INET {
            return Endpoint::from_v4_word(addr_of!((*ops).remote_ip4).read_volatile(), port);
        }
        Endpoint::from_words(
            [
                addr_of!((*ops).remote_ip6[0]).read_volatile(),
                addr_of!((*ops).remote_ip6[1]).read_volatile(),
                addr_of!((*ops).remote_ip6[2]).read_volatile(),
                addr_of!((*ops).remote_ip6[3]).read_volatile(),
            ],
            port,
        )
    }
}

/// The peer of a connected socket.
///
/// # Safety
/// The socket must be one that the kernel has given.
#[inline(always)]
pub(crate) unsafe fn peer(sk: *const bpf_sock) -> Endpoint {
    // SAFETY: as the caller promises.
    unsafe {
        let port = addr_of!((*sk).dst_port).read_volatile();
        if addr_of!((*sk).family).read_volatile() == AF_INET {
            return Endpoint::from_v4_word(addr_of!((*sk).dst_ip4).read_volatile(), port);
        }
        Endpoint::from_words(
            [
                addr_of!((*sk).dst_ip6[0]).read_volatile(),
                addr_of!((*sk).dst_ip6[1]).read_volatile(),
                addr_of!((*sk).dst_ip6[2]).read_volatile(),
                addr_of!((*sk).dst_ip6[3]).read_volatile(),
            ],
            port,
        )
    }
}
