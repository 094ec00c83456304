//! A registry whose every answer a test gives, on loopback, with TLS or without.

use super::{Family, Packing, TestImage, layer};
use atoll_runtime::images::{Digest, ImageRef, ImageStore, StoreOptions};
use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Longest time that a connection hangs.
const HANG: Duration = Duration::from_secs(60);

/// What arrived.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    headers: HashMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Where a range request begins; 0 without.
    pub fn from(&self) -> usize {
        let range = self.header("range").strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        range.map_or(0, |from| from.parse().unwrap())
    }
}

/// An answer.
#[derive(Clone)]
pub struct Answer {
    /// Status line and headers.
    pub head: String,
    pub body: Vec<u8>,
    /// After the body nothing more comes, and the connection stays open.
    pub hang: bool,
}

impl From<(String, Vec<u8>)> for Answer {
    fn from((head, body): (String, Vec<u8>)) -> Self {
        Self { head, body, hang: false }
    }
}

/// An HTTP server whose answers a function gives; it keeps what was asked.
pub struct Server {
    pub address: String,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn start<A: Into<Answer>>(answer: impl Fn(&Request) -> A + Send + Sync + 'static) -> Self {
        Self::listen(None, answer)
    }

    /// With a certificate for `name` and its key.
    pub fn start_tls<A: Into<Answer>>(
        identity: &rcgen::CertifiedKey<rcgen::KeyPair>,
        answer: impl Fn(&Request) -> A + Send + Sync + 'static,
    ) -> Self {
        let key = rustls_pki_types::PrivatePkcs8KeyDer::from(identity.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![identity.cert.der().clone()], key.into())
            .unwrap();
        Self::listen(Some(Arc::new(config)), answer)
    }

    fn listen<A: Into<Answer>>(
        tls: Option<Arc<rustls::ServerConfig>>,
        answer: impl Fn(&Request) -> A + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let answer = Arc::new(move |request: &Request| answer(request).into());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, answer, tls) = (Arc::clone(&seen), Arc::clone(&answer), tls.clone());
                stream.set_read_timeout(Some(HANG)).unwrap();
                std::thread::spawn(move || match tls {
                    None => serve(stream, &seen, &*answer),
                    Some(config) => {
                        let connection = rustls::ServerConnection::new(config).unwrap();
                        serve(rustls::StreamOwned::new(connection, stream), &seen, &*answer);
                    }
                });
            }
        });
        Self { address, asked }
    }

    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }

    /// How often something was asked for whose path ends so.
    pub fn count(&self, end: &str) -> usize {
        self.asked().iter().filter(|request| request.path.ends_with(end)).count()
    }
}

fn serve(mut stream: impl Read + Write, seen: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Answer) {
    let mut lines = BufReader::new(&mut stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let headers = lines.by_ref().take_while(|line| !line.is_empty());
    let headers = headers.filter_map(|line| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_ascii_lowercase(), value.to_owned()))
    });
    let request = Request { path: first.split(' ').nth(1).unwrap().to_owned(), headers: headers.collect() };
    seen.lock().unwrap().push(request.clone());
    let Answer { head, body, hang } = answer(&request);
    let length = if head.contains("Content-Length") {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    // The client may have hung up in disgust.
    let _ = stream.write_all(format!("HTTP/1.1 {head}\r\n{length}Connection: close\r\n\r\n").as_bytes());
    let _ = stream.write_all(&body);
    let _ = stream.flush();
    if hang {
        // Until the client has had enough.
        let _ = stream.read(&mut [0]);
    }
}

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

/// The rest of a blob, as a range request wants it.
pub fn rest(body: Vec<u8>, from: usize) -> (String, Vec<u8>) {
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    (format!("{status}\r\nContent-Length: {}", body.len() - from), body[from..].to_vec())
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
