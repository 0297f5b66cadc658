//! Plain types: what the objects say, free of the form in which they came.

mod endpoint;
mod finding;
mod locality;
mod mesh;
mod name;
mod object;
mod rules;
mod service;

pub use endpoint::{EndpointSlice, Node, Pod, SliceEndpoint, SlicePort};
pub use finding::{Finding, Severity};
pub use locality::{Locality, LocalityPattern};
pub use mesh::{ClusterLocalRule, MeshConfig};
pub use name::NamespacedName;
pub use object::{Kind, Object, ObjectKey, Scope};
pub use rules::{
    Algorithm, DestinationRule, Distribute, Failover, LocalitySetting, OutlierDetection, Subset, TcpRoute,
    TrafficPolicy, VirtualService, WeightedDestination,
};
pub use service::{Protocol, Service, ServicePort};
