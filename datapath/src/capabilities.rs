//! Privilege separation: the agent drops all capabilities once the programs are loaded.
//!
//! Capabilities belong to threads, so each thread drops its own.
//! With `no_new_privs`, programs that it starts afterwards get none either, not even as root.

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
};

/// Irrevocably drops all capabilities of the calling thread except those in `retained`.
/// Cannot add capabilities that the thread does not have.
///
/// # Errors
/// Returns an error if the kernel rejects one of the changes.
pub fn retain_capabilities(retained: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let remaining = capabilities(None)?.permitted & retained;
    Ok(set_capabilities(
        None,
        CapabilitySets { effective: remaining, permitted: remaining, inheritable: CapabilitySet::empty() },
    )?)
}

/// Irrevocably drops all capabilities of the calling thread.
///
/// # Errors
/// Returns an error if the kernel rejects one of the changes.
pub fn drop_capabilities() -> io::Result<()> {
    retain_capabilities(CapabilitySet::empty())
}
