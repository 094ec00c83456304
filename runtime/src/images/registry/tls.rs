//! Whom to trust: the system's certificates, or those that the settings give for a registry.

use crate::images::reference::ImageRef;
use atoll_spec::node::RegistriesConfig;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio_rustls::TlsConnector;

/// TLS connectors by `host:port`, made when first needed.
pub struct Connectors {
    authorities: HashMap<String, String>,
    system_ca: PathBuf,
    made: Mutex<HashMap<String, TlsConnector>>,
}

impl Connectors {
    /// For the registry of an image, and whatever it redirects to.
    pub fn new(settings: &RegistriesConfig, reference: &ImageRef, system_ca: &Path) -> Self {
        let mut authorities: HashMap<String, String> = settings
            .registries
            .iter()
            .filter_map(|(host, registry)| Some((host.clone(), registry.ca_pem.clone()?)))
            .collect();
        // The registry may be reached under another name than the one it is known by.
        if let Some(pem) = authorities.get(reference.host()).cloned() {
            authorities.insert(reference.endpoint().to_owned(), pem);
        }
        Self { authorities, system_ca: system_ca.to_owned(), made: Mutex::default() }
    }

    /// The connector for a host.
    pub fn connector(&self, authority: &str) -> Result<TlsConnector, String> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connector) = made.get(authority) {
            return Ok(connector.clone());
        }
        let roots = match self.authorities.get(authority) {
            Some(pem) => roots(pem.as_bytes())
                .map_err(|why| format!("the certificates given for {authority}: {why}"))?,
            None => {
                let path = self.system_ca.display();
                let pem =
                    std::fs::read(&self.system_ca).map_err(|error| format!("cannot read {path}: {error}"))?;
                roots(&pem).map_err(|why| format!("the certificates in {path}: {why}"))?
            }
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("cannot set up TLS: {error}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = TlsConnector::from(Arc::new(config));
        made.insert(authority.to_owned(), connector.clone());
        Ok(connector)
    }
}

fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("not PEM: {error}"))?;
        // One that cannot be used does not spoil the others.
        if let Err(error) = store.add(certificate) {
            tracing::debug!("a certificate is not usable: {error}");
        }
    }
    if store.is_empty() { Err("there is none that can be used".into()) } else { Ok(store) }
}
