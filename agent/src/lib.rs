//! Portolan gives every connection on a node to the right endpoint, in the kernel.
//!
//! One path leads through this crate: [`source`] reports what objects say, [`store`] remembers it, [`policy`] computes what it
//! means for this node, [`table`] turns that into values for the kernel, and [`datapath`] writes them there. What becomes of the
//! connections comes back to [`health`], and changes the policy's verdict. [`reconcile`] is the one task that drives all of it.

pub mod accounts;
pub mod admin;
pub mod cli;
pub mod datapath;
pub mod doctor;
pub mod evidence;
pub mod explain;
pub mod health;
pub mod journal;
pub mod kept;
pub mod metrics;
pub mod model;
pub mod opt_out;
pub mod place;
pub mod policy;
pub mod privileges;
pub mod probes;
pub mod reconcile;
pub mod report;
pub mod self_probe;
pub mod source;
pub mod store;
pub mod table;
