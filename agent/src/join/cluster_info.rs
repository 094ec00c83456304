//! The ConfigMap `kube-public/cluster-info`: what a server says before it is trusted, and what makes it trusted.
//! Pure.

use super::token::{Join, Pin, Server};
use super::{JoinError, Result, jws};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use k8s_openapi::api::core::v1::ConfigMap;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Where it is.
pub const PATH: &str = "/api/v1/namespaces/kube-public/configmaps/cluster-info";

/// The part of a kubeconfig that matters here.
#[derive(Deserialize)]
struct Kubeconfig {
    #[serde(default)]
    clusters: Vec<NamedCluster>,
}

#[derive(Deserialize)]
struct NamedCluster {
    cluster: Cluster,
}

#[derive(Deserialize)]
struct Cluster {
    #[serde(rename = "certificate-authority-data", default)]
    authority: Option<String>,
}

/// A cluster that signature and pin vouch for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trusted {
    /// The kubeconfig, byte for byte: the second reading must give the same.
    pub kubeconfig: String,
    /// The cluster's CAs.
    pub ca_pem: String,
}

/// Checks signature, then pins.
///
/// # Errors
/// When the token is not known there, the signature is not the token's, or no CA matches a pin.
pub fn trust(answer: &[u8], join: &Join) -> Result<Trusted> {
    let malformed = |reason: String| JoinError::ClusterInfo { server: join.server.clone(), reason };
    let map: ConfigMap = serde_json::from_slice(answer).map_err(|error| malformed(error.to_string()))?;
    let data = map.data.unwrap_or_default();
    let kubeconfig = data.get("kubeconfig").ok_or_else(|| malformed("it has no kubeconfig".into()))?;
    let signature = data.get(&format!("jws-kubeconfig-{}", join.token.id())).ok_or_else(|| {
        JoinError::UnknownToken { server: join.server.clone(), id: join.token.id().to_owned() }
    })?;
    if !jws::verify(signature, kubeconfig.as_bytes(), &join.token) {
        return Err(JoinError::Signature { server: join.server.clone(), id: join.token.id().to_owned() });
    }
    let parsed: Kubeconfig =
        serde_saphyr::from_str(kubeconfig).map_err(|error| malformed(error.to_string()))?;
    let authority = match parsed.clusters.as_slice() {
        [only] => only.cluster.authority.as_deref().unwrap_or_default(),
        _ => return Err(malformed("its kubeconfig does not have exactly one cluster".into())),
    };
    let pem = BASE64_STANDARD.decode(authority.trim()).map_err(|error| malformed(error.to_string()))?;
    let ca_pem = String::from_utf8(pem).map_err(|error| malformed(error.to_string()))?;
    check_pins(&ca_pem, &join.pins, &join.server)?;
    Ok(Trusted { kubeconfig: kubeconfig.clone(), ca_pem })
}

/// Whether one of the CAs matches one of the pins.
///
/// # Errors
/// When none does.
pub fn check_pins(ca_pem: &str, pins: &[Pin], server: &Server) -> Result<()> {
    let found =
        pins_of(ca_pem).map_err(|reason| JoinError::ClusterInfo { server: server.clone(), reason })?;
    if found.iter().any(|pin| pins.contains(pin)) {
        return Ok(());
    }
    let found = found.iter().map(Pin::to_string).collect::<Vec<_>>().join(", ");
    Err(JoinError::Pin { server: server.clone(), found })
}

/// The pins of every certificate in a PEM file.
fn pins_of(pem: &str) -> std::result::Result<Vec<Pin>, String> {
    let mut pins = Vec::new();
    for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let der = der.map_err(|error| format!("its CA is not PEM: {error}"))?;
        let (_, certificate) =
            X509Certificate::from_der(&der).map_err(|error| format!("its CA is not X.509: {error}"))?;
        pins.push(Pin(Sha256::digest(certificate.public_key().raw).into()));
    }
    Ok(pins)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::join::token::Token;
    use std::collections::BTreeMap;

    pub(in crate::join) fn pin_of(pem: &str) -> Pin {
        pins_of(pem).unwrap()[0]
    }

    pub(in crate::join) fn kubeconfig(ca_pem: &str) -> String {
        format!(
            "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {}\n    server: https://a:1\n  name: \"\"\ncontexts: null\nkind: Config\nusers: null\n",
            BASE64_STANDARD.encode(ca_pem)
        )
    }

    pub(in crate::join) fn map(kubeconfig: &str, signer: Option<&Token>) -> Vec<u8> {
        let mut data = BTreeMap::from([("kubeconfig".to_owned(), kubeconfig.to_owned())]);
        if let Some(token) = signer {
            data.insert(format!("jws-kubeconfig-{}", token.id()), jws::sign(kubeconfig.as_bytes(), token));
        }
        serde_json::to_vec(&ConfigMap { data: Some(data), ..ConfigMap::default() }).unwrap()
    }

    fn ca() -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        rcgen::CertificateParams::new(vec!["ca".into()]).unwrap().self_signed(&key).unwrap().pem()
    }

    fn join(pins: Vec<Pin>) -> Join {
        Join {
            server: Server::parse("https://a:1").unwrap(),
            token: Token::parse("abcdef.0123456789abcdef").unwrap(),
            pins,
        }
    }

    #[test]
    fn signed_and_pinned_is_trusted() {
        let (ca, other) = (ca(), ca());
        let join = join(vec![pin_of(&other), pin_of(&ca)]);
        let trusted = trust(&map(&kubeconfig(&ca), Some(&join.token)), &join).unwrap();
        assert_eq!(trusted.ca_pem, ca);
    }

    #[test]
    fn each_missing_proof_has_its_own_error() {
        let (ca, other) = (ca(), ca());
        let ours = join(vec![pin_of(&ca)]);
        let config = kubeconfig(&ca);
        assert!(matches!(trust(&map(&config, None), &ours), Err(JoinError::UnknownToken { .. })));
        let forger = Token::parse("abcdef.ffffffffffffffff").unwrap();
        assert!(matches!(trust(&map(&config, Some(&forger)), &ours), Err(JoinError::Signature { .. })));
        let wrong = kubeconfig(&other);
        assert!(matches!(trust(&map(&wrong, Some(&ours.token)), &ours), Err(JoinError::Pin { .. })));
        assert!(matches!(trust(b"{}", &ours), Err(JoinError::ClusterInfo { .. })));
        assert!(matches!(trust(b"<html>", &ours), Err(JoinError::ClusterInfo { .. })));
    }
}
