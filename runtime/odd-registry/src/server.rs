//! An HTTP server whose answers a test gives, with TLS or without; it keeps what was asked.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Longest time that a connection hangs.
const HANG: Duration = Duration::from_secs(60);

/// What arrived.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path and query.
    pub path: String,
    headers: HashMap<String, String>,
}

impl Request {
    /// A header, by its name in small letters; empty when it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Where a range request begins; 0 without.
    ///
    /// # Panics
    /// When it begins nowhere.
    pub fn from(&self) -> usize {
        let range = self.header("range").strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        range.map_or(0, |from| from.parse().expect("a range begins with a number"))
    }
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status line and headers.
    pub head: String,
    /// What follows.
    pub body: Vec<u8>,
    /// After the body nothing more comes, and the connection stays open.
    pub hang: bool,
}

impl From<(String, Vec<u8>)> for Answer {
    fn from((head, body): (String, Vec<u8>)) -> Self {
        Self { head, body, hang: false }
    }
}

/// An HTTP server whose answers a function gives; it keeps what was asked. It serves until the process ends.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: String,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// On loopback.
    ///
    /// # Panics
    /// When there is no port left.
    pub fn start<A: Into<Answer>>(answer: impl Fn(&Request) -> A + Send + Sync + 'static) -> Self {
        Self::listen("127.0.0.1:0", None, answer)
    }

    /// On loopback, with a certificate and its key.
    ///
    /// # Panics
    /// When there is no port left.
    pub fn start_tls<A: Into<Answer>>(
        identity: &rcgen::CertifiedKey<rcgen::KeyPair>,
        answer: impl Fn(&Request) -> A + Send + Sync + 'static,
    ) -> Self {
        Self::listen("127.0.0.1:0", Some(identity), answer)
    }

    /// At this address.
    ///
    /// # Panics
    /// When somebody else has it.
    pub fn listen<A: Into<Answer>>(
        address: &str,
        identity: Option<&rcgen::CertifiedKey<rcgen::KeyPair>>,
        answer: impl Fn(&Request) -> A + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).expect("an address to listen at");
        let address = listener.local_addr().expect("it listens").to_string();
        let tls = identity.map(tls);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let answer = Arc::new(move |request: &Request| answer(request).into());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, answer, tls) = (Arc::clone(&seen), Arc::clone(&answer), tls.clone());
                stream.set_read_timeout(Some(HANG)).expect("a time above zero");
                std::thread::spawn(move || match tls {
                    None => serve(stream, &seen, &*answer),
                    Some(config) => {
                        let connection = rustls::ServerConnection::new(config).expect("a good config");
                        serve(rustls::StreamOwned::new(connection, stream), &seen, &*answer);
                    }
                });
            }
        });
        Self { address, asked }
    }

    /// All that was asked so far.
    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How often something was asked for whose path ends so.
    pub fn count(&self, end: &str) -> usize {
        self.asked().iter().filter(|request| request.path.ends_with(end)).count()
    }
}

fn tls(identity: &rcgen::CertifiedKey<rcgen::KeyPair>) -> Arc<rustls::ServerConfig> {
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(identity.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has all of them")
        .with_no_client_auth()
        .with_single_cert(vec![identity.cert.der().clone()], key.into())
        .expect("the key is the certificate's");
    Arc::new(config)
}

fn serve(mut stream: impl Read + Write, seen: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Answer) {
    let mut lines = BufReader::new(&mut stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let headers = lines.by_ref().take_while(|line| !line.is_empty());
    let headers = headers.filter_map(|line| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_ascii_lowercase(), value.to_owned()))
    });
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let request = Request { path, headers: headers.collect() };
    seen.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
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

/// The rest of a blob, as a range request wants it.
///
/// # Panics
/// When it begins beyond the end.
pub fn rest(body: Vec<u8>, from: usize) -> (String, Vec<u8>) {
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    (format!("{status}\r\nContent-Length: {}", body.len() - from), body[from..].to_vec())
}
