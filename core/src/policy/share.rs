//! Exact fractions of a pool's connections.

use std::net::SocketAddr;

use num_rational::Ratio;

/// Endpoints that together receive one fraction of the pool's connections.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Fraction of the pool's connections.
    pub share: Share,
    /// Addresses and weights of the eligible endpoints.
    pub members: Vec<(SocketAddr, u32)>,
}

/// An exact fraction of all connections.
pub type Share = Ratio<u128>;
