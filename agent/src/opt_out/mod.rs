//! Pods of this node that a label excludes.

mod enforcer;
mod registry;

pub use self::{
    enforcer::Enforcer,
    registry::{AskedBy, ByUid, LABEL, OptOutRegistry, Pod, Report},
};
