//! Exact shares of the connections of a pool.

use std::net::SocketAddr;

use num_rational::Ratio;

/// Endpoints that share what the group gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Fraction of the pool's connections.
    pub share: Share,
    /// Addresses and weights of those that may be chosen.
    pub members: Vec<(SocketAddr, u32)>,
}

/// An exact fraction of all connections.
pub type Share = Ratio<u128>;
