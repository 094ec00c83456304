//! What registries and layers of strangers look like at their worst, for tests: [`Server`] answers what a test tells it
//! to, [`entries`] writes archives byte by byte.
//!
//! Called by the tests of the runtime and by those in the booted host. Whatever goes wrong in here is the test's own
//! fault, so it panics.

pub mod entries;
mod server;

pub use server::{Answer, Request, Server, rest};

/// A certificate for the given names, signed by itself.
///
/// # Panics
/// When a name cannot stand in a certificate.
pub fn identity(names: &[&str], expired: bool) -> rcgen::CertifiedKey<rcgen::KeyPair> {
    let signing_key = rcgen::KeyPair::generate().expect("a key");
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut parameters = rcgen::CertificateParams::new(names).expect("names of hosts");
    if expired {
        parameters.not_before = rcgen::date_time_ymd(2001, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(2002, 1, 1);
    }
    let cert = parameters.self_signed(&signing_key).expect("a certificate");
    rcgen::CertifiedKey { cert, signing_key }
}
