//! Portolan's pure core: decoding, health, policy and table computation, without I/O or system calls.
#![forbid(unsafe_code)]

pub mod decode;
pub mod health;
pub mod model;
pub mod policy;
pub mod report;
pub mod store;
pub mod table;
