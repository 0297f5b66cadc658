//! Portolan's kernel side: the entry points, one for each hook, and nothing else.
//!
//! | program | hook | job |
//! |---|---|---|
//! | `connect4`, `connect6` | before a connect | a Service address becomes an endpoint, or the connect is refused |
//! | `sendmsg4`, `sendmsg6` | before a datagram of an unconnected socket | the same, for one conversation after another |
//! | `recvmsg4`, `recvmsg6` | after a datagram was received | it comes from the Service address that it answers |
//! | `getpeername4`, `getpeername6` | `getpeername()` | the application sees the Service address that it dialled |
//! | `sock_ops` | TCP events | how the connect ended, and the counters |
//! | `received` | packets that come, while a rule asks for it | the status of HTTP/1 responses |
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "atomic_xadd with its result is the one way to an exact shared cursor")]
#![allow(missing_docs, unreachable_pub, reason = "the macros of aya make a second, bare item of each entry point")]

mod addr;
mod connect;
mod datagram;
mod http;
mod maps;
mod opt_out;
mod outcome;
mod peername;
mod select;
mod state;

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock_addr, sock_ops},
    programs::{SkBuffContext, SockAddrContext, SockOpsContext},
};

/// TCP and connected UDP to an IPv4 address.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::connect4(&ctx)
}

/// TCP and connected UDP to an IPv6 address, v4-mapped ones included.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::connect6(&ctx)
}

/// A datagram to an IPv4 address.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    datagram::sendmsg4(&ctx)
}

/// A datagram to an IPv6 address.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    datagram::sendmsg6(&ctx)
}

/// A datagram that an IPv4 socket has received.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    datagram::recvmsg4(&ctx)
}

/// A datagram that an IPv6 socket has received, from v4-mapped addresses included.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    datagram::recvmsg6(&ctx)
}

/// The peer of an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    peername::getpeername4(&ctx)
}

/// The peer of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    peername::getpeername6(&ctx)
}

/// What becomes of a connection.
#[sock_ops]
pub fn sock_ops(ctx: SockOpsContext) -> u32 {
    outcome::sock_ops(&ctx);
    1
}

/// A packet for a socket. It always goes on.
#[cgroup_skb(ingress)]
pub fn received(ctx: SkBuffContext) -> i32 {
    http::inspect_response(&ctx);
    1
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
