//! Reads the status of HTTP/1 responses from their first bytes, on keep-alive connections too.
//!
//! This is the only per-packet program, so it is attached only while some pool needs it.
//! Packets of other sockets leave it after two lookups, or three once any socket has used socket storage.
//! It parses nothing but twelve bytes: a response begins with the first byte that arrives after the client has written
//! more (docs/adr/0013-http-status.md).
//! Data that does not look like a response is ignored, and packets are never dropped or delayed.

use aya_ebpf::programs::SkBuffContext;
use portolan_common::{ConnectionFlags, DetectedProtocol, OutcomeKind, Response};

use crate::{
    accounting,
    maps::{BACKEND_USE, TCP_WRITE_SEQ_OFFSET},
    outcome,
    select::add,
    state::{self, State},
};

const IPPROTO_TCP: u8 = 6;
const IPV6_HEADER: usize = 40;
/// The largest plausible distance ahead of the expected sequence number, in bytes.
const FARTHEST: i32 = 16 << 20;
/// The first byte of a TLS record that carries a handshake or an alert.
const TLS: [u8; 2] = [22, 21];
/// The type of a SETTINGS frame, with which HTTP/2 begins.
const SETTINGS: u8 = 4;

/// Handles an ingress packet for a socket in the cgroup.
#[inline(always)]
pub(crate) fn inspect_response(ctx: &SkBuffContext) {
    // SAFETY: the kernel gives a valid context.
    let socket = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    let Some(state) = state::of_socket(socket) else { return };
    if state.flags() & ConnectionFlags::HTTP == 0 {
        return;
    }
    let (Some(extra), Some(tcp)) = (state.extra(), state::tcp_sock(socket)) else { return };
    // SAFETY: a live map value.
    let response = unsafe { &mut (*extra).response };
    let _ = payload(ctx).map(|segment| track_response(ctx, tcp, &state, response, segment));
}

/// Returns the sequence number of the first payload byte, its offset in the packet, and the payload length.
#[inline(always)]
fn payload(ctx: &SkBuffContext) -> Option<(u32, usize, u32)> {
    let first: u8 = ctx.load(0).ok()?;
    let header = if first >> 4 == 4 {
        usize::from(first & 0xf) * 4
    } else {
        let next: u8 = ctx.load(6).ok()?;
        // IPv6 extension headers are rare in responses, so such packets are ignored.
        (next == IPPROTO_TCP).then_some(IPV6_HEADER)?
    };
    let sequence = u32::from_be(ctx.load(header + 4).ok()?);
    let offset: u8 = ctx.load(header + 12).ok()?;
    let start = header + usize::from(offset >> 4) * 4;
    let len = ctx.len().checked_sub(start as u32)?;
    (len > 0).then_some((sequence, start, len))
}

/// Advances the response tracking of a connection by one packet.
#[inline(always)]
fn track_response(
    ctx: &SkBuffContext,
    tcp: *const u8,
    state: &State,
    response: &mut Response,
    (sequence, start, len): (u32, usize, u32),
) {
    // SAFETY: a read through a BTF pointer cannot fault, and the offset comes from the kernel's own BTF.
    let written = unsafe { tcp.add(TCP_WRITE_SEQ_OFFSET.load() as usize).cast::<u32>().read_volatile() };
    let ahead = sequence.wrapping_sub(response.next) as i32;
    if ahead == 0 {
        response.next = sequence.wrapping_add(len);
    } else if ahead > FARTHEST {
        // The packet does not belong to this connection: the kernel will drop it as well.
        return;
    } else if ahead > 0 {
        // Data is missing, and a response may begin in it; bytes behind the hole are not inspected.
        if response.flags & Response::HOLE == 0 {
            response.hole = response.next;
            response.flags |= Response::HOLE;
        }
        response.next = sequence.wrapping_add(len);
        return;
    } else if response.flags & Response::HOLE != 0 && sequence == response.hole {
        response.flags &= !Response::HOLE;
    } else {
        // A retransmission, already seen.
        return;
    }
    let begins = written != response.written || response.flags & Response::AWAITED != 0;
    response.written = written;
    if response.place == 0 && !begins {
        return;
    }
    let end = start + len as usize;
    // Bounded by the number of bytes in a status line prefix.
    for at in start..start + Response::LENGTH as usize {
        if response.place >= Response::LENGTH || at >= end {
            break;
        }
        let Ok(byte) = ctx.load::<u8>(at) else { return };
        let place = response.place;
        if place == 0 {
            response.status = 0;
        }
        if !response.feed(byte) {
            if response.flags & Response::BEGUN == 0 {
                // SAFETY: a live map value.
                unsafe { detect_protocol(ctx, state, response.netns, start, (byte, place)) };
                state.remove_flags(ConnectionFlags::HTTP);
            }
            response.place = 0;
            return;
        }
    }
    if response.place < Response::LENGTH {
        // The status line continues in the next packet.
        return;
    }
    response.place = 0;
    response.flags |= Response::BEGUN;
    let status = response.status;
    if status == 101 {
        // Another protocol follows (101 Switching Protocols).
        state.remove_flags(ConnectionFlags::HTTP);
    } else if status < 200 {
        response.flags |= Response::AWAITED;
    } else {
        response.flags &= !Response::AWAITED;
        let netns = response.netns;
        // SAFETY: a live map value.
        unsafe { on_status(state, netns, status) };
    }
}

/// Counts a response and reports it to the agent if relevant.
#[inline(always)]
unsafe fn on_status(state: &State, netns: u64, status: u32) {
    // SAFETY: live values.
    unsafe {
        if accounting::stats(state).is_none() {
            return;
        }
        let Some(uses) = BACKEND_USE.get_ptr_mut((*state.connection).backend_id) else { return };
        add(&raw mut (*uses).responses, 1);
        let what = (OutcomeKind::Responded, status);
        if status >= 500 {
            add(&raw mut (*uses).server_errors, 1);
            if (502..=504).contains(&status) {
                add(&raw mut (*uses).gateway_errors, 1);
            }
            outcome::report_failure(netns, state, what);
        } else if let Some(failures) = outcome::failures_to_reset(state) {
            outcome::emit_outcome(netns, state, what, failures);
        }
    }
}

/// Records which protocol a connection speaks instead of HTTP/1.
#[inline(always)]
unsafe fn detect_protocol(ctx: &SkBuffContext, state: &State, netns: u64, start: usize, (byte, place): (u8, u32)) {
    let spoken = if place == 0 && (byte == TLS[0] || byte == TLS[1]) {
        DetectedProtocol::TLS
    } else if place == 0 && byte == 0 && ctx.load::<u8>(start + 3).is_ok_and(|kind| kind == SETTINGS) {
        DetectedProtocol::HTTP2
    } else {
        DetectedProtocol::OTHER
    };
    // SAFETY: `state` is a live value; so is that of the map. Bits are only ever added.
    unsafe {
        let Some(pool) = accounting::pool_stats(state) else { return };
        let what = (OutcomeKind::NotHttp, spoken as u32);
        if (*pool).spoken & spoken == 0 && outcome::emit_outcome(netns, state, what, 0) {
            (*pool).spoken |= spoken;
        }
    }
}
