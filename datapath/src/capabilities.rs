//! What the agent may do beyond what any process may: nothing, once the programs are loaded.
//!
//! Capabilities belong to threads: each has to give up its own. Programs that it starts after that get none either, root or not.

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
};

/// Gives up all capabilities of this thread but these, for good.
///
/// # Errors
/// What the kernel said.
pub fn retain_capabilities(kept: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let held = capabilities(None)?.permitted & kept;
    Ok(set_capabilities(
        None,
        CapabilitySets { effective: held, permitted: held, inheritable: CapabilitySet::empty() },
    )?)
}

/// Gives up all capabilities of this thread, for good.
///
/// # Errors
/// What the kernel said.
pub fn drop_capabilities() -> io::Result<()> {
    retain_capabilities(CapabilitySet::empty())
}
