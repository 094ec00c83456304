//! Certificates of the scripted control plane: its authority, its own and those of its callers.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    PublicKeyData as _, SanType,
};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use std::time::Duration;
use x509_parser::prelude::FromDer as _;

/// Seconds from now in which a certificate is in force.
#[derive(Debug, Clone, Copy)]
pub struct Life {
    /// First second.
    pub from: i64,
    /// Last second.
    pub to: i64,
}

/// A year, as the real ones have.
pub const YEAR: Life = Life { from: -300, to: 365 * 86_400 };

/// An authority: its certificate and key.
pub type Ca = CertifiedIssuer<'static, KeyPair>;

/// A certificate authority.
pub fn authority(name: &str) -> Arc<Ca> {
    self_signed(name, KeyPair::generate().expect("random numbers"))
}

/// The certificate authority of a key that is known already, as PEM (PKCS #8).
pub fn authority_of(name: &str, key: &str) -> Arc<Ca> {
    self_signed(name, KeyPair::from_pem(key).expect("a key"))
}

/// The pin of an authority, as a machine config has it.
pub fn pin(ca: &Ca) -> String {
    let digest = Sha256::digest(ca.key().subject_public_key_info());
    digest.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

fn self_signed(name: &str, key: KeyPair) -> Arc<Ca> {
    let mut parameters = CertificateParams::new(Vec::new()).expect("no names");
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Arc::new(CertifiedIssuer::self_signed(parameters, key).expect("a CA can be made"))
}

/// A client certificate and its key, as PEM.
pub fn client_certificate(
    ca: &Ca,
    user: &str,
    group: &str,
    usage: ExtendedKeyUsagePurpose,
) -> (String, String) {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, user);
    parameters.distinguished_name.push(DnType::OrganizationName, group);
    parameters.extended_key_usages = vec![usage];
    let key = KeyPair::generate().expect("random numbers");
    (parameters.signed_by(&key, ca).expect("signed").pem(), key.serialize_pem())
}

pub(crate) fn lasts(parameters: &mut CertificateParams, life: Life) {
    let now = jiff::Timestamp::now().as_second();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let at = |seconds: i64| epoch + Duration::from_secs(u64::try_from(now + seconds).expect("after 1970"));
    (parameters.not_before, parameters.not_after) = (at(life.from), at(life.to));
}

pub(crate) fn server_tls(ca: &Ca, signer: &Ca, life: Life) -> Arc<rustls::ServerConfig> {
    let key = KeyPair::generate().expect("random numbers");
    let mut parameters = CertificateParams::new(Vec::new()).expect("no names");
    parameters.subject_alt_names = vec![SanType::IpAddress("127.0.0.1".parse().expect("an address"))];
    lasts(&mut parameters, life);
    let certificate = parameters.signed_by(&key, signer).expect("signed");
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().clone()).expect("a CA");
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .expect("a verifier");
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has them")
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.der().clone()], private)
        .expect("key and certificate fit");
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Arc::new(tls)
}

pub(crate) fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    Some(parsed.subject().iter_common_name().next()?.as_str().ok()?.to_owned())
}
