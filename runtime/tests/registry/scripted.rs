//! Images for a registry whose every answer a test gives ([`Server`]), on loopback.

use super::{Family, Packing, TestImage, layer};
use atoll_odd_registry::Server;
use atoll_runtime::images::{Digest, ImageRef, ImageStore, StoreOptions};
use std::collections::HashMap;
use std::sync::Mutex;

/// An image's documents and blobs by the end of their path.
pub fn documents(image: &TestImage) -> HashMap<String, Vec<u8>> {
    let documents = Mutex::new(HashMap::new());
    let manifest = image.manifest(|blob| {
        let digest = Digest::of(blob);
        documents.lock().unwrap().insert(format!("blobs/{digest}"), blob.to_vec());
        digest
    });
    documents.lock().unwrap().insert("manifests/v1".into(), manifest.into_bytes());
    documents.into_inner().unwrap()
}

pub fn find(documents: &HashMap<String, Vec<u8>>, path: &str) -> (String, Vec<u8>) {
    match documents.iter().find(|(name, _)| path.ends_with(name.as_str())) {
        Some((_, body)) => ("200 OK".into(), body.clone()),
        None => ("404 Not Found".into(), Vec::new()),
    }
}

pub fn is_layer(image: &TestImage, path: &str) -> bool {
    path.contains("/blobs/") && !path.ends_with(Digest::of(image.config().as_bytes()).as_str())
}

/// One plain layer of some 60 kB.
pub fn image() -> TestImage {
    let noise: String =
        (0..60_000u32).map(|n| char::from(b' ' + (n.wrapping_mul(2_654_435_761) >> 26) as u8)).collect();
    TestImage::new(Family::Oci, vec![(layer(&[("noise", &noise)]), Packing::Plain)])
}

/// A store that speaks plain HTTP to the server, and the name of its image.
pub async fn open(options: &StoreOptions, server: &Server) -> (ImageStore, ImageRef) {
    let settings = serde_json::json!({"registries": {&server.address: {"plain_http": true}}});
    std::fs::write(&options.registries, settings.to_string()).unwrap();
    let store = ImageStore::open(options.clone()).await.unwrap();
    (store, format!("{}/app:v1", server.address).parse().unwrap())
}
