//! Access to addresses in the hooks' contexts.
//!
//! The verifier allows only one word of a context per access, so every access is a volatile one of four bytes.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_ops},
    programs::{SockAddrContext, SockOpsContext},
};
use portolan_common::Endpoint;

const AF_INET: u32 = 2;

/// Reads the IPv4 address and port of a sock_addr hook.
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

/// Reads the IPv6 address and port of a sock_addr hook.
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

/// Replaces the IPv4 address and port of a sock_addr hook.
#[inline(always)]
pub(crate) fn write4(ctx: &SockAddrContext, endpoint: &Endpoint) {
    let addr = ctx.sock_addr;
    // SAFETY: the kernel gives a valid context, and these fields may be written in these hooks.
    unsafe {
        addr_of_mut!((*addr).user_ip4).write_volatile(endpoint.v4_word());
        addr_of_mut!((*addr).user_port).write_volatile(u32::from(endpoint.port_word()));
    }
}

/// Replaces the IPv6 address and port of a sock_addr hook.
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

/// Returns the peer of a TCP socket.
#[inline(always)]
pub(crate) fn remote(ctx: &SockOpsContext) -> Endpoint {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: the kernel gives a valid context.
    unsafe {
        // The kernel puts this port, in network order, into the upper half of the word.
        let port = (addr_of!((*ops).remote_port).read_volatile() >> 16) as u16;
        // Both last words first: the compiler would merge the reads of two branches, at an address that it computes,
        // which the verifier rejects.
        let v4 = addr_of!((*ops).remote_ip4).read_volatile();
        let last = addr_of!((*ops).remote_ip6[3]).read_volatile();
        if addr_of!((*ops).family).read_volatile() == AF_INET {
            return Endpoint::from_v4_word(v4, port);
        }
        Endpoint::from_words(
            [
                addr_of!((*ops).remote_ip6[0]).read_volatile(),
                addr_of!((*ops).remote_ip6[1]).read_volatile(),
                addr_of!((*ops).remote_ip6[2]).read_volatile(),
                last,
            ],
            port,
        )
    }
}

/// Returns the peer of a connected socket.
///
/// # Safety
/// `sk` must be a socket pointer from the kernel.
#[inline(always)]
pub(crate) unsafe fn peer(sk: *const bpf_sock) -> Endpoint {
    // SAFETY: guaranteed by the caller.
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
