//! The domain model: plain types that do not depend on the format of their source.

mod endpoint;
mod finding;
mod ip_family;
mod istio;
mod locality;
mod mesh_config;
mod name;
mod object;
mod object_ref;
mod outlier_detection;
mod probe;
mod protocol;
mod service;

pub use endpoint::{
    EndpointSlice, Hints, Labels, Namespace, Node, Pod, SliceEndpoint, SlicePort, Workload, WorkloadEntry,
};
pub use finding::{Code, Finding, Position, Severity};
pub use ip_family::IpFamily;
pub use istio::{
    Algorithm, ConnectionPool, DestinationRule, Distribute, Failover, Keepalive, LabelPreference, LoadBalancer,
    LocalitySetting, Match, Route, Subnet, Subset, TrafficPolicy, VirtualService, Warmup, WeightedDestination,
};
pub use locality::{Locality, LocalityPattern};
pub use mesh_config::{ClusterLocal, ClusterLocalRule, MeshConfig};
pub use name::NamespacedName;
pub use object::{Kind, Object, ObjectKey, Scope};
pub use object_ref::ObjectRef;
pub use outlier_detection::{OutlierDetection, SuccessCriterion};
pub use probe::{Probe, ProbeKind};
pub use protocol::Protocol;
pub use service::{Service, ServiceEntry, ServiceId, ServicePort, Target, TrafficDistribution};
