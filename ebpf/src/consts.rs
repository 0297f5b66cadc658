//! Numbers of the kernel's user-space interface that several hooks use.

/// `IPPROTO_TCP` of linux/in.h.
pub(crate) const IPPROTO_TCP: u32 = 6;
/// `IPPROTO_UDP` of linux/in.h.
pub(crate) const IPPROTO_UDP: u32 = 17;

/// The return value of a sock_addr program that lets the call proceed.
pub(crate) const PROCEED: i32 = 1;
/// The return value that fails the call with the error set by `bpf_set_retval`.
pub(crate) const FAIL: i32 = 0;

/// The error of a connection that no endpoint may take.
pub(crate) const ECONNREFUSED: i32 = 111;
/// The error of a connection that must not leave its cluster, and has no endpoint there.
pub(crate) const EHOSTUNREACH: i32 = 113;
