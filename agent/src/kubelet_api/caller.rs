//! Who calls: by a client certificate of the cluster's authority, or by a bearer token that the API server knows.

use super::Refusal;
use super::access::Access;
use crate::error::{Error, Result};
use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderMap};
use rustls::server::{ResolvesServerCert, WebPkiClientVerifier};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Longest bearer token looked at, in bytes; service-account tokens are about one kibibyte.
const MAX_TOKEN: usize = 16 * 1024;

/// An authenticated caller, as Kubernetes names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Caller {
    /// User name.
    pub user: String,
    /// Groups.
    pub groups: Vec<String>,
}

/// TLS that accepts certificates of `client_ca`, and callers without one (they need a token).
pub(super) fn tls_config(
    client_ca: Vec<CertificateDer<'static>>,
    certificate: Arc<dyn ResolvesServerCert>,
) -> Result<rustls::ServerConfig> {
    let bad =
        |reason: String| Error::Certificate { what: "the cluster's certificate authority".into(), reason };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    for authority in client_ca {
        roots.add(authority).map_err(|error| bad(error.to_string()))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|error| bad(error.to_string()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certificate);
    // Upgrades (exec, attach, port-forward) are HTTP/1.1.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// The caller, or 401.
pub(super) async fn identify(
    access: &Access,
    certificate: Option<&CertificateDer<'_>>,
    headers: &HeaderMap,
) -> std::result::Result<Caller, Refusal> {
    let unauthorised = || Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized");
    if let Some(certificate) = certificate {
        // TLS has verified the chain.
        return from_certificate(certificate).ok_or_else(unauthorised);
    }
    let token = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .filter(|token| !token.is_empty() && token.len() <= MAX_TOKEN)
        .ok_or_else(unauthorised)?;
    access.review_token(token).await?.ok_or_else(unauthorised)
}

/// Common name is the user, organisations are the groups: Kubernetes' reading of X.509.
fn from_certificate(der: &CertificateDer<'_>) -> Option<Caller> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let mut groups: Vec<String> =
        subject.iter_organization().filter_map(|name| name.as_str().ok().map(str::to_owned)).collect();
    groups.push("system:authenticated".into());
    (!user.is_empty()).then_some(Caller { user, groups })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_subject_is_user_and_groups() {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "system:node:n");
        parameters.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let caller = from_certificate(certificate.der()).unwrap();
        assert_eq!(caller.user, "system:node:n");
        assert_eq!(caller.groups, ["system:nodes", "system:authenticated"]);
    }
}
