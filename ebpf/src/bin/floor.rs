//! The least that a connect hook can do: one hash lookup, one array read, and the rewrite.
//!
//! It keeps no state and takes no turns. The benchmark compares `connect4` with it.
#![no_std]
#![no_main]
#![allow(missing_docs, unreachable_pub, reason = "aya's macros generate a second, bare item for each entry point")]

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    btf_maps::{Array, HashMap},
    macros::{btf_map, cgroup_sock_addr},
    programs::SockAddrContext,
};

/// Service address, port and protocol, as [`floor4`] packs them → index of an endpoint.
#[btf_map]
static FLOOR_SERVICES: HashMap<u64, u32, 1> = HashMap::new();

/// Index → address in the lower half, and port in the upper half; both in network order.
#[btf_map]
static FLOOR_ENDPOINTS: Array<u64, 1> = Array::new();

/// Rewrites a connect to a known address.
#[cgroup_sock_addr(connect4)]
pub fn floor4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: the kernel gives a valid context, and these fields may be read and written in this hook.
    // Map values are copied out at once.
    unsafe {
        let key = u64::from(addr_of!((*addr).user_ip4).read_volatile())
            | u64::from(addr_of!((*addr).user_port).read_volatile()) << 32
            | u64::from(addr_of!((*addr).protocol).read_volatile()) << 48;
        let Some(&index) = FLOOR_SERVICES.get(key) else { return 1 };
        let Some(&endpoint) = FLOOR_ENDPOINTS.get(index) else { return 1 };
        addr_of_mut!((*addr).user_ip4).write_volatile(endpoint as u32);
        addr_of_mut!((*addr).user_port).write_volatile((endpoint >> 32) as u32);
    }
    1
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
