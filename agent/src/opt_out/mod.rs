//! Pods of this node that opt out of load balancing by a label.

mod enforcer;
mod registry;

pub use self::{
    enforcer::{Enforcer, Note},
    registry::{AskedBy, ByUid, LABEL, OptOutRegistry, Pod, Report},
};
