//! Plain types: what the objects say, free of the form in which they came.

mod endpoint;
mod finding;
mod locality;
mod mesh;
mod name;
mod object;
mod rules;
mod service;

pub use endpoint::{
    EndpointSlice, Hints, Labels, Namespace, Node, Pod, SliceEndpoint, SlicePort, Workload, WorkloadEntry,
};
pub use finding::{Code, Finding, Position, Severity};
pub use locality::{Locality, LocalityPattern};
pub use mesh::{MeshConfig, Retention, RetentionRule};
pub use name::NamespacedName;
pub use object::{Kind, Object, ObjectKey, Scope};
pub use rules::{
    Algorithm, ConnectionPool, DestinationRule, Distribute, Failover, JudgedBy, Keepalive, LabelPreference,
    LoadBalancer, LocalitySetting, Match, OutlierDetection, Probe, ProbeKind, Route, Subnet, Subset, TrafficPolicy,
    VirtualService, Warmup, WeightedDestination,
};
pub use service::{Protocol, Service, ServiceEntry, ServiceId, ServicePort, Target, TrafficDistribution};
