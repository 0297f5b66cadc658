//! Portolan's test bed, and the demo that runs the user scenarios on it.
//!
//! Network namespaces, cgroups, processes, and agents are removed when their values are dropped.

mod agent;
pub mod api;
mod cgroup;
mod container;
mod counting;
pub mod demo;
pub mod dial;
#[cfg(feature = "direct")]
pub mod direct;
mod directory;
mod foreign;
mod held;
mod netns;
pub mod objects;
mod places;
mod pod;
mod process;
pub mod report;
pub mod steps;
pub mod storm;
mod sweep;
mod wait;

pub use agent::{Agent, Bed, Serving, helper_of};
pub use api::Api;
pub use cgroup::Cgroup;
pub use container::Container;
pub use counting::Counting;
pub use dial::Dialler;
pub use directory::Directory;
pub use foreign::Foreign;
pub use held::Held;
pub use netns::{Namespace, link};
pub use places::Places;
pub use pod::Pod;
pub use process::{Place, Process, binary};
pub use sweep::sweep_on_interrupt;
pub use wait::{patience, wait_until};

use std::sync::atomic::{AtomicU32, Ordering};

/// Returns a name, `ptl<pid>-<n>-<what>`, that no other test and no concurrent run uses.
pub fn unique(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("ptl{}-{}-{what}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
