//! A DHCPv4 client (RFC 2131, 2132, 3396, 3442) that probes an address before it uses it (RFC 5227).
//!
//! `packet`, `frame` and `arp` turn bytes into messages and back, `machine` decides, `client` does: one task per link, which
//! reports each lease to the app. Own code because the protocol crate there is brings a DNS library and an Unicode
//! database along; the part needed here is small and is tested against a real server.

pub mod arp;
pub mod client;
pub mod frame;
pub mod machine;
pub mod packet;
