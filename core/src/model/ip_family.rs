//! Address families.

use std::net::IpAddr;

/// An address family. A connection stays in one: an endpoint of the other family cannot be dialed from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpFamily {
    /// IPv4, also where an IPv6 socket dials a v4-mapped address.
    #[default]
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// Both families, IPv4 first.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the family of an address.
    pub const fn of(address: &IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Reports whether an address is of this family.
    pub fn contains(self, address: &IpAddr) -> bool {
        Self::of(address) == self
    }
}
