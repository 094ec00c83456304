//! Keys, certificates and the kubeconfig of this node, on the state partition.
//!
//! `pending.key` is written before it is used, so that a crash never leaves a request whose key is lost;
//! `client.pem` holds certificate and key together, so that there is never one without the other; `kubeconfig`
//! is written last and says that the rest is whole.

use super::request::user;
use super::token::Server;
use crate::error::{Error, Result};
use rcgen::{KeyPair, PublicKeyData as _};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A client certificate in force.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Certificate chain and key.
    pub certified: Arc<CertifiedKey>,
    /// The cluster's CAs, PEM.
    pub ca_pem: String,
    /// The API server.
    pub server: Server,
    /// Seconds since 1970 from which the certificate is valid.
    pub not_before: i64,
    /// Seconds since 1970 until which it is.
    pub not_after: i64,
}

/// The directory.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Of this directory, made when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: &Path) -> Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| Error::Write { what: "the directory of keys", path: dir.into(), source })?;
        Ok(Self { dir: dir.into() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The key to ask with: the one of a request that was not answered yet, or a fresh one, on disk already.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn pending_key(&self) -> Result<KeyPair> {
        let path = self.path("pending.key");
        if let Ok(pem) = std::fs::read_to_string(&path)
            && let Ok(key) = KeyPair::from_pem(&pem)
        {
            return Ok(key);
        }
        let key = KeyPair::generate()
            .map_err(|error| Error::Certificate { what: "a new key".into(), reason: error.to_string() })?;
        self.write("pending.key", key.serialize_pem().as_bytes())?;
        Ok(key)
    }

    /// Forgets the pending key: its request was refused or answered.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn forget_pending_key(&self) -> Result<()> {
        let path = self.path("pending.key");
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Write { what: "the old key", path, source })
            }
            _ => Ok(()),
        }
    }

    /// Stores a certificate that was signed for `key`, and returns the identity it makes.
    ///
    /// # Errors
    /// When the certificate is not for this key and node, or cannot be written.
    pub fn save(
        &self,
        node: &str,
        key: &KeyPair,
        pem: &str,
        ca_pem: &str,
        server: &Server,
    ) -> Result<Identity> {
        let whole = format!("{}\n{}", pem.trim_end(), key.serialize_pem());
        let identity = identity(&whole, node, ca_pem, server)?;
        self.write("client.pem", whole.as_bytes())?;
        self.write("ca.pem", ca_pem.as_bytes())?;
        self.write("kubeconfig", &self.kubeconfig(server, node))?;
        self.forget_pending_key()?;
        Ok(identity)
    }

    /// The identity from an earlier start; `None` when there is none, or not for this node.
    pub fn load(&self, node: &str) -> Option<Identity> {
        let read = |name: &str| std::fs::read_to_string(self.path(name)).ok();
        let kubeconfig: serde_json::Value = serde_json::from_str(&read("kubeconfig")?).ok()?;
        let server = Server::parse(kubeconfig.pointer("/clusters/0/cluster/server")?.as_str()?).ok()?;
        match identity(&read("client.pem")?, node, &read("ca.pem")?, &server) {
            Ok(identity) => Some(identity),
            Err(error) => {
                tracing::warn!("the stored identity is not used: {}", crate::error::chain(&error));
                None
            }
        }
    }

    /// JSON is YAML, so every client reads it.
    fn kubeconfig(&self, server: &Server, node: &str) -> Vec<u8> {
        let client = self.path("client.pem");
        serde_json::to_vec_pretty(&serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "cluster", "cluster": {
                "server": server.to_string(), "certificate-authority": self.path("ca.pem")}}],
            "users": [{"name": user(node), "user": {"client-certificate": client, "client-key": client}}],
            "contexts": [{"name": "node", "context": {"cluster": "cluster", "user": user(node)}}],
            "current-context": "node",
        }))
        .expect("strings and maps become JSON")
    }

    /// Replaces a file atomically and makes sure that it is on the disk.
    fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let (path, partial) = (self.path(name), self.path(&format!(".{name}.partial")));
        let replace = || {
            let mut file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?;
            file.write_all(content)?;
            file.sync_all()?;
            std::fs::rename(&partial, &path)?;
            std::fs::File::open(&self.dir)?.sync_all()
        };
        replace().map_err(|source| Error::Write { what: "identity file", path: path.clone(), source })
    }
}

/// Checks that certificate and key belong together and to this node.
fn identity(whole: &str, node: &str, ca_pem: &str, server: &Server) -> Result<Identity> {
    let broken = |reason: String| Error::Certificate { what: "the node's certificate".into(), reason };
    let chain = CertificateDer::pem_slice_iter(whole.as_bytes())
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| broken(error.to_string()))?;
    let first = chain.first().cloned().ok_or_else(|| broken("there is none in the file".into()))?;
    let key = PrivateKeyDer::from_pem_slice(whole.as_bytes()).map_err(|error| broken(error.to_string()))?;
    let pair = KeyPair::try_from(&key).map_err(|error| broken(error.to_string()))?;
    let (_, parsed) = X509Certificate::from_der(&first).map_err(|error| broken(error.to_string()))?;
    if parsed.public_key().raw != pair.subject_public_key_info() {
        return Err(broken("it is for another key".into()));
    }
    let name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    if name != Some(user(node).as_str()) {
        return Err(broken(format!("it is for {}, not for {}", name.unwrap_or("nobody"), user(node))));
    }
    let signing =
        rustls::crypto::ring::sign::any_supported_type(&key).map_err(|error| broken(error.to_string()))?;
    Ok(Identity {
        certified: Arc::new(CertifiedKey::new(chain, signing)),
        ca_pem: ca_pem.to_owned(),
        server: server.clone(),
        not_before: parsed.validity().not_before.timestamp(),
        not_after: parsed.validity().not_after.timestamp(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(node: &str, key: &KeyPair) -> String {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, user(node));
        parameters.self_signed(key).unwrap().pem()
    }

    #[test]
    fn an_identity_survives_a_restart_and_is_for_one_node() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let server = Server::parse("https://a:1").unwrap();
        assert!(store.load("n").is_none());
        let key = store.pending_key().unwrap();
        assert_eq!(store.pending_key().unwrap().serialize_pem(), key.serialize_pem());
        store.save("n", &key, &signed("n", &key), "CA", &server).unwrap();
        assert_ne!(store.pending_key().unwrap().serialize_pem(), key.serialize_pem());
        assert_eq!(store.load("n").unwrap().server, server);
        assert!(store.load("m").is_none());
    }

    #[test]
    fn a_certificate_for_another_key_is_refused_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (key, other) = (store.pending_key().unwrap(), KeyPair::generate().unwrap());
        let server = Server::parse("https://a:1").unwrap();
        assert!(store.save("n", &key, &signed("n", &other), "CA", &server).is_err());
        assert!(store.load("n").is_none());
    }
}
