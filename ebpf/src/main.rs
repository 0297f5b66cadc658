//! The entry points of Portolan's eBPF programs, one for each hook.
//!
//! | program | hook | purpose |
//! |---|---|---|
//! | `connect4`, `connect6` | `connect()` | replaces a Service address with an endpoint, or refuses the connect |
//! | `sendmsg4`, `sendmsg6` | send on an unconnected UDP socket | does the same for each flow |
//! | `recvmsg4`, `recvmsg6` | receive on a UDP socket | restores the Service address as the source |
//! | `getpeername4`, `getpeername6` | `getpeername()` | returns the Service address that was dialed |
//! | `sock_release` | the end of a socket | frees the state of connections that never began, or were UDP |
//! | `sock_ops` | TCP events | records connection outcomes and counters |
//! | `received` | ingress packets, only while a rule needs it | reads the status of HTTP/1 responses |
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "an exact shared cursor needs atomic_xadd with its result")]
#![allow(missing_docs, unreachable_pub, reason = "aya's macros generate a second, bare item for each entry point")]

mod accounting;
mod addr;
mod claim;
mod connect;
mod consts;
mod datagram;
mod frontend;
mod http;
mod maps;
mod opt_out;
mod outcome;
mod peername;
mod select;
mod state;

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock, cgroup_sock_addr, sock_ops},
    programs::{SkBuffContext, SockAddrContext, SockContext, SockOpsContext},
};

/// Handles connects to IPv4 addresses, of TCP and UDP sockets.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::connect4(&ctx)
}

/// Handles connects to IPv6 addresses, including v4-mapped ones, of TCP and UDP sockets.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::connect6(&ctx)
}

/// Handles datagrams sent to an IPv4 address.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    datagram::sendmsg4(&ctx)
}

/// Handles datagrams sent to an IPv6 address.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    datagram::sendmsg6(&ctx)
}

/// Handles datagrams received by an IPv4 socket.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    datagram::recvmsg4(&ctx)
}

/// Handles datagrams received by an IPv6 socket, including those from v4-mapped addresses.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    datagram::recvmsg6(&ctx)
}

/// Returns the dialed address as the peer of an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    peername::getpeername4(&ctx)
}

/// Returns the dialed address as the peer of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    peername::getpeername6(&ctx)
}

/// Tracks the life of a TCP connection.
#[sock_ops]
pub fn sock_ops(ctx: SockOpsContext) -> u32 {
    outcome::sock_ops(&ctx);
    1
}

/// Handles the end of a socket, after its last descriptor was closed.
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    claim::on_release(ctx.sock);
    1
}

/// Inspects an ingress packet of a socket; always lets it pass.
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
