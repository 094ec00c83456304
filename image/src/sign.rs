//! Secure Boot signatures, with the user's key. The signing time is fixed: the same file and key give the same
//! signature.

use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::program::{SOURCE_DATE, Tools};
use std::fs;
use std::path::{Path, PathBuf};

/// A key and its certificate, both PEM.
#[derive(Debug, Clone)]
pub struct Signer {
    /// Private key.
    pub key: PathBuf,
    /// Certificate, which the firmware must know.
    pub certificate: PathBuf,
}

impl Signer {
    /// Signs an EFI program.
    pub fn sign(&self, tools: &Tools, from: &Path, to: &Path) -> Result<()> {
        match fs::remove_file(to) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::file("remove", to)(e)),
            _ => {}
        }
        let program = tools.osslsigncode().args(["sign", "-h", "sha256", "-time", SOURCE_DATE]);
        let program = program.arg("-certs").arg(&self.certificate).arg("-key").arg(&self.key);
        program.arg("-in").arg(from).arg("-out").arg(to).run().map(drop)
    }
}

/// The key for tests and the demo: made once, kept in the cache, trusted by nobody else.
pub fn test_signer(cache: &Cache, tools: &Tools) -> Result<Signer> {
    let dir = cache.entry("keys", "test", |dir| {
        let program = tools
            .openssl("make a signing key for tests")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-sha256"]);
        let program = program.args(["-nodes", "-days", "3650", "-subj", "/CN=Atoll test key/"]);
        program.arg("-keyout").arg(dir.join("test.key")).arg("-out").arg(dir.join("test.crt")).run().map(drop)
    })?;
    Ok(Signer { key: dir.join("test.key"), certificate: dir.join("test.crt") })
}
