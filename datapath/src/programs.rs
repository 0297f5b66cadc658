//! The embedded BPF object, and the names and hooks of its programs.

use crate::error::Unsupported;

/// The compiled programs. Empty if this crate was built without the eBPF toolchain.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/portolan.bpf.o"));

/// Returns the compiled BPF object.
///
/// # Errors
/// Returns an error if this crate was built without the eBPF toolchain.
pub(crate) fn object() -> Result<&'static [u8], Unsupported> {
    if OBJECT.is_empty() {
        let message = "this binary was built without the eBPF programs; run `cargo xtask toolchain`, then rebuild";
        return Err(Unsupported(message.to_owned()));
    }
    Ok(OBJECT)
}

/// The hooks in use, with the values of `enum bpf_attach_type` of linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum AttachType {
    InetIngress = 0,
    SockOps = 3,
    Inet4Connect = 10,
    Inet6Connect = 11,
    Udp4Sendmsg = 14,
    Udp6Sendmsg = 15,
    Udp4Recvmsg = 19,
    Udp6Recvmsg = 20,
    Inet4Getpeername = 29,
    Inet6Getpeername = 30,
    InetSockRelease = 34,
}

/// A program of the BPF object and the hook that it attaches to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProgramSpec {
    /// The name of both its function and its pinned link.
    pub(crate) name: &'static str,
    pub(crate) attach_type: AttachType,
}

const fn program(name: &'static str, attach_type: AttachType) -> ProgramSpec {
    ProgramSpec { name, attach_type }
}

/// The programs that are always attached, in attach order.
/// `sock_release` and `sock_ops` come first, so that no connection is rewritten before its end can be observed.
pub(crate) const PROGRAMS: [ProgramSpec; 10] = [
    program("sock_release", AttachType::InetSockRelease),
    program("sock_ops", AttachType::SockOps),
    program("getpeername4", AttachType::Inet4Getpeername),
    program("getpeername6", AttachType::Inet6Getpeername),
    program("recvmsg4", AttachType::Udp4Recvmsg),
    program("recvmsg6", AttachType::Udp6Recvmsg),
    program("sendmsg4", AttachType::Udp4Sendmsg),
    program("sendmsg6", AttachType::Udp6Sendmsg),
    program("connect4", AttachType::Inet4Connect),
    program("connect6", AttachType::Inet6Connect),
];

/// The only program that reads packets. Attached only while a rule enables error-based ejection on an HTTP port.
pub(crate) const HTTP_INGRESS: ProgramSpec = program("received", AttachType::InetIngress);
