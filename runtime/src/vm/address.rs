//! Addresses of pods: the pod CIDR and who has which of its addresses. ◇ Pure.
//!
//! The service owner keeps one [`Pool`]; leases live in the records of the sandboxes, so that a restarted runtime
//! rebuilds the pool from them. Invariant: no address is given twice, and a freed one is used again last.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

/// The next hop of every pod; on the host side of each tap.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Hardware address of the host side of each tap.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xa7, 0, 0, 0, 1];
/// MTU of the pod network.
pub const MTU: u16 = 1500;

/// An IPv4 range that pods get their addresses from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodCidr {
    base: u32,
    prefix: u8,
}

impl PodCidr {
    /// Reads `a.b.c.d/p`; of a comma-separated pair (dual stack) the IPv4 one counts.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("pod CIDR '{text}' {why}: give an IPv4 range such as 10.244.1.0/24");
        let Some(range) = text.split(',').map(str::trim).find(|r| !r.contains(':')) else {
            return Err(wrong("has no IPv4 range"));
        };
        let (address, prefix) = range.split_once('/').ok_or_else(|| wrong("has no prefix length"))?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong("is not an IPv4 range"))?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong("has a bad prefix length"))?;
        if !(8..=30).contains(&prefix) {
            return Err(wrong("must have a prefix length of 8 to 30"));
        }
        let base = u32::from(address) & (u32::MAX << (32 - prefix));
        Ok(Self { base, prefix })
    }

    fn size(self) -> u32 {
        1 << (32 - self.prefix)
    }

    /// Whether `address` lies inside.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address).wrapping_sub(self.base) < self.size()
    }
}

impl fmt::Display for PodCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

/// Free and used addresses.
#[derive(Debug, Default)]
pub struct Pool {
    cidr: Option<PodCidr>,
    used: BTreeSet<Ipv4Addr>,
    cursor: u32,
}

impl Pool {
    /// Sets the range; addresses in use stay what they are.
    pub fn set_cidr(&mut self, cidr: PodCidr) {
        if self.cidr != Some(cidr) {
            self.cidr = Some(cidr);
            self.cursor = 0;
        }
    }

    /// The range, once known.
    pub fn cidr(&self) -> Option<PodCidr> {
        self.cidr
    }

    /// Marks an address as used (found in a record).
    pub fn adopt(&mut self, address: Ipv4Addr) {
        self.used.insert(address);
    }

    /// A free address: neither the first nor the last of the range.
    pub fn take(&mut self) -> Result<Ipv4Addr, String> {
        let cidr =
            self.cidr.ok_or("no pod CIDR yet: it comes with UpdateRuntimeConfig once the node has one")?;
        let usable = cidr.size() - 2;
        for step in 0..usable {
            let offset = (self.cursor + step) % usable;
            let address = Ipv4Addr::from(cidr.base + 1 + offset);
            if self.used.insert(address) {
                self.cursor = (offset + 1) % usable;
                return Ok(address);
            }
        }
        Err(format!(
            "all {usable} addresses of {cidr} are in use: remove pods, or give the node a larger range"
        ))
    }

    /// Gives an address back.
    pub fn release(&mut self, address: Ipv4Addr) {
        self.used.remove(&address);
    }
}

/// Hardware address of a pod's own device, made from its address.
pub fn pod_mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0xa8, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_read_and_bad_ones_named() {
        assert_eq!(PodCidr::parse("10.1.2.3/24").unwrap().to_string(), "10.1.2.0/24");
        assert_eq!(PodCidr::parse("fd00::/64, 10.0.0.0/16").unwrap().to_string(), "10.0.0.0/16");
        for bad in ["", "10.0.0.0", "fd00::/64", "10.0.0.0/31", "10.0.0.0/x", "a/24"] {
            assert!(PodCidr::parse(bad).unwrap_err().contains("10.244.1.0/24"), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_address_is_given_twice(prefix in 24u8..=30, steps in proptest::collection::vec(any::<bool>(), 1..400)) {
            let cidr = PodCidr::parse(&format!("10.9.0.0/{prefix}")).unwrap();
            let mut pool = Pool::default();
            pool.set_cidr(cidr);
            let mut held: Vec<Ipv4Addr> = Vec::new();
            for take in steps {
                if take {
                    match pool.take() {
                        Ok(a) => {
                            prop_assert!(cidr.contains(a) && !held.contains(&a));
                            held.push(a);
                        }
                        Err(_) => prop_assert_eq!(held.len() as u32, cidr.size() - 2),
                    }
                } else if !held.is_empty() {
                    pool.release(held.remove(0));
                }
            }
        }
    }
}
