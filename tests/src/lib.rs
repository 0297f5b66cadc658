//! Portolan's test bed, and the demo that runs the user scenarios on it.
//!
//! Network namespaces, cgroups, processes, and agents are removed when their values are dropped.

mod active_counts;
mod agent;
pub mod api;
mod blocked_file;
mod cgroup;
mod cleanup;
mod connection_slots;
mod container;
mod counting_server;
pub mod demo;
pub mod dial;
#[cfg(feature = "direct")]
pub mod direct;
mod directory;
mod foreign_program;
mod netns;
pub mod objects;
mod pinned_array;
mod pod;
mod process;
pub mod report;
pub mod steps;
pub mod storm;
mod test_bed;
mod wait;

pub use active_counts::ActiveCounts;
pub use agent::{Agent, helper_of};
pub use api::Api;
pub use blocked_file::BlockedFile;
pub use cgroup::Cgroup;
pub use cleanup::cleanup_on_interrupt;
pub use connection_slots::ConnectionSlots;
pub use container::Container;
pub use counting_server::CountingServer;
pub use dial::Dialer;
pub use directory::Directory;
pub use foreign_program::{Foreign, ForeignProgram};
pub use netns::{Namespace, link};
pub use pod::Pod;
pub use process::{Process, ProcessContext, binary};
pub use test_bed::{Server, TestBed};
pub use wait::{patience, wait_until};

use std::sync::atomic::{AtomicU32, Ordering};

/// Returns a name, `ptl<pid>-<n>-<what>`, that no other test and no concurrent run uses.
pub fn unique(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("ptl{}-{}-{what}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
