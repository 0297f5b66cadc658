//! Privilege separation: the agent drops all capabilities once the programs are loaded.
//!
//! Capabilities belong to threads, so each thread drops its own.
//! With `no_new_privs`, programs that it starts afterwards get none either, not even as root.
//!
//! Each thread also gets a system call filter that refuses what the agent never does.
//! It applies in addition to that of a container or of systemd, which may allow some of it.
//! It is a second line behind the capabilities, for what root may do without any.

use std::{collections::BTreeMap, io};

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// System calls that neither the agent nor its helper ever makes once the programs are loaded.
const REFUSED: [libc::c_long; 27] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_chroot,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// Irrevocably drops all capabilities of the calling thread except those in `retained`.
/// Cannot add capabilities that the thread does not have.
///
/// # Errors
/// Returns an error if the kernel rejects one of the changes.
pub fn retain_capabilities(retained: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    filter_system_calls()?;
    clear_ambient_capability_set()?;
    let remaining = capabilities(None)?.permitted & retained;
    Ok(set_capabilities(
        None,
        CapabilitySets { effective: remaining, permitted: remaining, inheritable: CapabilitySet::empty() },
    )?)
}

/// Refuses [`REFUSED`], and the loading of BPF programs, for the calling thread and those that it starts.
fn filter_system_calls() -> io::Result<()> {
    const BPF_PROG_LOAD: u64 = 5;
    let other = io::Error::other::<seccompiler::BackendError>;
    let loads = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, BPF_PROG_LOAD).map_err(other)?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_bpf, vec![SeccompRule::new(vec![loads]).map_err(other)?]);
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into().map_err(other)?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).map_err(other)?;
    let program: BpfProgram = filter.try_into().map_err(other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

/// Irrevocably drops all capabilities of the calling thread.
///
/// # Errors
/// Returns an error if the kernel rejects one of the changes.
pub fn drop_capabilities() -> io::Result<()> {
    retain_capabilities(CapabilitySet::empty())
}
