//! The serving certificate: requested from the cluster (signer `kubernetes.io/kubelet-serving`), approved there,
//! renewed with a fresh key at 80 % of its life, swapped without closing a connection.
//!
//! Until the first certificate is there, TLS handshakes fail: a self-signed one would only teach callers not to
//! verify. The key never leaves memory: a restart asks anew.

use crate::app::Shared;
use crate::error::{Error, Result, chain};
use crate::join::renew;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::{Api, ObjectMeta, PostParams};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

const SIGNER: &str = "kubernetes.io/kubelet-serving";
/// How long one request may wait for its approval before another is made.
const APPROVAL: Duration = Duration::from_secs(15 * 60);
const LOOK_AGAIN: Duration = Duration::from_secs(1);
const FIRST_BACK_OFF: Duration = Duration::from_secs(2);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(120);
const CALL: Duration = Duration::from_secs(20);
/// How often the clock is looked at; it may jump, so nothing sleeps until a far moment.
const LOOK: Duration = Duration::from_secs(30);
/// Least time between two certificates.
const LEAST: Duration = Duration::from_secs(5);

/// The certificate in use.
#[derive(Debug, Default)]
struct Slot(RwLock<Option<Arc<CertifiedKey>>>);

impl ResolvesServerCert for Slot {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Keeps a certificate in its slot.
pub(super) struct Serving {
    slot: Arc<Slot>,
}

/// What the certificate must name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Names {
    node: String,
    addresses: Vec<IpAddr>,
}

impl Serving {
    pub(super) fn new() -> Self {
        Self { slot: Arc::default() }
    }

    /// For TLS.
    pub(super) fn resolver(&self) -> Arc<dyn ResolvesServerCert> {
        Arc::clone(&self.slot) as Arc<dyn ResolvesServerCert>
    }

    /// Gets a certificate, and a new one when the addresses change or it nears its end. Never returns.
    pub(super) async fn keep(self, shared: Shared) {
        let mut config = shared.config.clone();
        let mut back_off = FIRST_BACK_OFF;
        loop {
            let names = {
                let config = config.borrow_and_update();
                Names { node: config.node_name.clone(), addresses: config.addresses.clone() }
            };
            match request(&shared.client, &names).await {
                Ok((certified, due)) => {
                    tracing::info!("kubelet API: serving certificate for {} in use", names.node);
                    *self.slot.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(certified));
                    back_off = FIRST_BACK_OFF;
                    // One that is due at once, by a wrong clock or a very short life, must not be a storm of requests.
                    tokio::time::sleep(LEAST).await;
                    loop {
                        let changed =
                            config.wait_for(|c| c.node_name != names.node || c.addresses != names.addresses);
                        match tokio::time::timeout(LOOK, changed).await {
                            Ok(Err(_)) => return,
                            Ok(Ok(_)) => break,
                            Err(_) if renew::now() >= due => break,
                            Err(_) => {}
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(
                        "kubelet API: no serving certificate yet, trying again in {} s: {}",
                        back_off.as_secs(),
                        chain(&error)
                    );
                    tokio::time::sleep(back_off).await;
                    back_off = (back_off * 2).min(LONGEST_BACK_OFF);
                }
            }
        }
    }
}

/// One request from key to certificate; also when to ask for the next one, in seconds since 1970.
async fn request(client: &kube::Client, names: &Names) -> Result<(CertifiedKey, i64)> {
    let broken = |reason: String| Error::Certificate { what: "the serving certificate".into(), reason };
    let key = KeyPair::generate().map_err(|error| broken(error.to_string()))?;
    let csr = csr_pem(names, &key).map_err(|error| broken(error.to_string()))?;
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let object = CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("csr-".into()), ..Default::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(csr.into_bytes()),
            signer_name: SIGNER.into(),
            usages: Some(vec!["digital signature".into(), "server auth".into()]),
            ..Default::default()
        },
        status: None,
    };
    let created = within("create the serving CSR", requests.create(&PostParams::default(), &object)).await?;
    let name = created.metadata.name.unwrap_or_default();
    let pem = tokio::time::timeout(APPROVAL, wait_signed(&requests, &name)).await.map_err(|_| {
        Error::Deadline { what: format!("approval of the serving CSR {name}"), seconds: APPROVAL.as_secs() }
    })??;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| broken(error.to_string()))?;
    let due = due(chain.first().ok_or_else(|| broken("the answer has no certificate".into()))?)
        .ok_or_else(|| broken("its end cannot be read".into()))?;
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signing = rustls::crypto::ring::sign::any_supported_type(&private)
        .map_err(|error| broken(error.to_string()))?;
    Ok((CertifiedKey::new(chain, signing), due))
}

fn csr_pem(names: &Names, key: &KeyPair) -> std::result::Result<String, rcgen::Error> {
    let mut parameters = CertificateParams::new(vec![names.node.clone()])?;
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    parameters.distinguished_name.push(DnType::CommonName, format!("system:node:{}", names.node));
    parameters.subject_alt_names.extend(names.addresses.iter().map(|address| SanType::IpAddress(*address)));
    parameters.serialize_request(key)?.pem()
}

async fn wait_signed(requests: &Api<CertificateSigningRequest>, name: &str) -> Result<Vec<u8>> {
    loop {
        let status = within("read the serving CSR", requests.get(name)).await?.status.unwrap_or_default();
        if let Some(ByteString(pem)) = status.certificate {
            return Ok(pem);
        }
        let refused = status.conditions.iter().flatten().find(|c| c.type_ == "Denied" || c.type_ == "Failed");
        if let Some(condition) = refused {
            return Err(Error::Certificate {
                what: format!("the serving CSR {name}"),
                reason: format!("{}: {}", condition.type_, condition.message.clone().unwrap_or_default()),
            });
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn within<T>(operation: &str, call: impl Future<Output = kube::Result<T>>) -> Result<T> {
    tokio::time::timeout(CALL, call)
        .await
        .map_err(|_| Error::Deadline { what: operation.into(), seconds: CALL.as_secs() })?
        .map_err(|error| Error::api(format!("cannot {operation}"), error))
}

/// At four fifths of its life.
fn due(certificate: &CertificateDer<'_>) -> Option<i64> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let validity = parsed.validity();
    Some(renew::due(validity.not_before.timestamp(), validity.not_after.timestamp(), 0.5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_names_node_and_addresses_and_nothing_else() {
        let names = Names { node: "n".into(), addresses: vec!["192.0.2.9".parse().unwrap()] };
        let key = KeyPair::generate().unwrap();
        let pem = csr_pem(&names, &key).unwrap();
        let parsed = rcgen::CertificateSigningRequestParams::from_pem(&pem).unwrap().params;
        assert_eq!(parsed.subject_alt_names.len(), 2);
        assert_eq!(
            parsed.distinguished_name.get(&DnType::CommonName),
            Some(&rcgen::DnValue::Utf8String("system:node:n".into()))
        );
    }
}
