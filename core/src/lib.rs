//! Portolan's pure core.
#![forbid(unsafe_code)]

pub mod decode;
pub mod health;
pub mod model;
pub mod policy;
pub mod report;
pub mod store;
pub mod table;
