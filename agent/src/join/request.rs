//! The certificate signing request of a node's client certificate. Pure.

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::ObjectMeta;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData as _};
use sha2::{Digest as _, Sha256};

/// Who signs client certificates of nodes.
pub const SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// Where requests are made.
pub const PATH: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";

/// The request for this key. Its name follows from key and node: a restart finds the request it made before, and a
/// new key never meets an old request.
pub fn object(node: &str, key: &KeyPair) -> Result<CertificateSigningRequest, rcgen::Error> {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    parameters.distinguished_name.push(DnType::CommonName, user(node));
    let pem = parameters.serialize_request(key)?.pem()?;
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(name(node, key)), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: SIGNER.into(),
            usages: Some(vec!["digital signature".into(), "client auth".into()]),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

/// The user that a node is.
pub fn user(node: &str) -> String {
    format!("system:node:{node}")
}

/// Name of the request.
pub fn name(node: &str, key: &KeyPair) -> String {
    let mut hash = Sha256::new();
    hash.update(key.subject_public_key_info());
    hash.update(node);
    hash.finalize().iter().take(16).fold("node-csr-".to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not decided, or not signed yet.
    Pending,
    /// The certificate, PEM.
    Signed(String),
    /// Refused, with the reason given.
    Refused(String),
}

/// Reads the outcome.
pub fn outcome(request: &CertificateSigningRequest) -> Outcome {
    let Some(status) = &request.status else { return Outcome::Pending };
    let refused = status.conditions.iter().flatten().find(|c| c.type_ == "Denied" || c.type_ == "Failed");
    if let Some(condition) = refused {
        let message = condition.message.as_deref().unwrap_or("no reason given");
        return Outcome::Refused(format!("{}: {message}", condition.type_.to_lowercase()));
    }
    match status.certificate.as_ref().map(|pem| String::from_utf8(pem.0.clone())) {
        Some(Ok(pem)) if !pem.is_empty() => Outcome::Signed(pem),
        _ => Outcome::Pending,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_follows_from_key_and_node() {
        let (one, two) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        assert_eq!(name("a", &one), name("a", &one));
        assert_ne!(name("a", &one), name("b", &one));
        assert_ne!(name("a", &one), name("a", &two));
    }

    #[test]
    fn it_asks_for_the_node_and_has_no_alternative_names() {
        let key = KeyPair::generate().unwrap();
        let object = object("n", &key).unwrap();
        let pem = String::from_utf8(object.spec.request.0).unwrap();
        let parsed = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap().params;
        assert!(parsed.subject_alt_names.is_empty());
        let subject = &parsed.distinguished_name;
        let text = |kind| match subject.get(kind) {
            Some(rcgen::DnValue::Utf8String(text)) => text.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(text(&DnType::CommonName), "system:node:n");
        assert_eq!(text(&DnType::OrganizationName), "system:nodes");
    }
}
