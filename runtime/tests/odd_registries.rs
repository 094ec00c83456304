//! Registries that want tokens, redirect, hurry nobody, break off, or lie: a scripted one on loopback.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(dead_code, reason = "the module is shared with tests that use all of it")]

mod registry;

use atoll_runtime::images::{Auth, Digest, ImageError, ImageRef, ImageStore, StoreOptions};
use registry::{Family, Packing, TestImage, layer, options};
use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What arrived.
#[derive(Debug, Clone)]
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

impl Request {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// Status line and headers, and body.
type Answer = (String, Vec<u8>);

/// An HTTP server whose answers a function gives; it keeps what was asked.
struct Server {
    address: String,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (Arc::clone(&asked), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream, &seen, &*answer));
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, seen: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Answer) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let headers = lines.by_ref().take_while(|line| !line.is_empty());
    let headers = headers.filter_map(|line| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_ascii_lowercase(), value.to_owned()))
    });
    let request = Request { path: first.split(' ').nth(1).unwrap().to_owned(), headers: headers.collect() };
    seen.lock().unwrap().push(request.clone());
    let (head, body) = answer(&request);
    let length = if head.contains("Content-Length") {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    // The client may have hung up in disgust.
    let _ = stream.write_all(format!("HTTP/1.1 {head}\r\n{length}Connection: close\r\n\r\n").as_bytes());
    let _ = stream.write_all(&body);
}

/// An image's documents and blobs by the end of their path.
fn documents(image: &TestImage) -> HashMap<String, Vec<u8>> {
    let documents = Mutex::new(HashMap::new());
    let manifest = image.manifest(|blob| {
        let digest = Digest::of(blob);
        documents.lock().unwrap().insert(format!("blobs/{digest}"), blob.to_vec());
        digest
    });
    documents.lock().unwrap().insert("manifests/v1".into(), manifest.into_bytes());
    documents.into_inner().unwrap()
}

fn find(documents: &HashMap<String, Vec<u8>>, path: &str) -> Answer {
    match documents.iter().find(|(name, _)| path.ends_with(name.as_str())) {
        Some((_, body)) => ("200 OK".into(), body.clone()),
        None => ("404 Not Found".into(), Vec::new()),
    }
}

fn is_layer(image: &TestImage, path: &str) -> bool {
    path.contains("/blobs/") && !path.ends_with(Digest::of(image.config().as_bytes()).as_str())
}

fn image() -> TestImage {
    let noise: String =
        (0..60_000u32).map(|n| char::from(b' ' + (n.wrapping_mul(2_654_435_761) >> 26) as u8)).collect();
    TestImage::new(Family::Oci, vec![(layer(&[("noise", &noise)]), Packing::Plain)])
}

async fn open(options: &StoreOptions, server: &Server) -> (ImageStore, ImageRef) {
    let settings = serde_json::json!({"registries": {&server.address: {"plain_http": true}}});
    std::fs::write(&options.registries, settings.to_string()).unwrap();
    let store = ImageStore::open(options.clone()).await.unwrap();
    (store, format!("{}/app:v1", server.address).parse().unwrap())
}

#[tokio::test]
async fn a_token_is_fetched_and_stays_with_its_registry() {
    let dir = tempfile::tempdir().unwrap();
    let Some(options) = options(dir.path()) else { return };
    let image = image();
    let blobs = documents(&image);
    let elsewhere = Server::start(move |request| find(&blobs, &request.path));
    let storage = elsewhere.address.clone();
    let documents = documents(&image);
    let tokens = Server::start(|request| {
        // "user:pass"
        match request.header("authorization") {
            "Basic dXNlcjpwYXNz" => ("200 OK".into(), br#"{"token":"good"}"#.to_vec()),
            _ => ("401 Unauthorized".into(), Vec::new()),
        }
    });
    let realm = tokens.address.clone();
    let server = Server::start(move |request| {
        if request.header("authorization") != "Bearer good" {
            let challenge =
                format!("WWW-Authenticate: Bearer realm=\"http://{realm}/token\",service=\"here\"");
            return (format!("401 Unauthorized\r\n{challenge}"), Vec::new());
        }
        if request.path.contains("/blobs/") {
            return (
                format!("307 Temporary Redirect\r\nLocation: http://{storage}{}", request.path),
                Vec::new(),
            );
        }
        find(&documents, &request.path)
    });
    let (store, name) = open(&options, &server).await;
    let refused =
        store.pull(&name, Some(Auth::Basic { username: "user".into(), password: "no".into() })).await;
    assert!(matches!(refused, Err(ImageError::Denied { .. })), "{refused:?}");
    store.pull(&name, Some(Auth::Basic { username: "user".into(), password: "pass".into() })).await.unwrap();
    let asked = tokens.asked();
    assert!(asked[1].path.ends_with("/token?service=here&scope=repository%3Aapp%3Apull"), "{asked:?}");
    assert_eq!(elsewhere.asked().len(), 2, "config and layer came from there");
    assert!(elsewhere.asked().iter().all(|request| request.header("authorization").is_empty()));
    assert!(server.asked().iter().all(|request| !request.header("authorization").starts_with("Basic")));
}

#[tokio::test]
async fn broken_downloads_go_on_where_they_broke() {
    for ranges in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let Some(options) = options(dir.path()) else { return };
        let image = image();
        let documents = documents(&image);
        let broke = Mutex::new(0);
        let server = Server::start(move |request| {
            let (head, body) = find(&documents, &request.path);
            if !is_layer(&self::image(), &request.path) {
                return (head, body);
            }
            let mut broke = broke.lock().unwrap();
            *broke += 1;
            let from =
                request.header("range").strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
            let from: usize = from.filter(|_| ranges).map_or(0, |from| from.parse().unwrap());
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            let head = format!("{status}\r\nContent-Length: {}", body.len() - from);
            // Twice it breaks off half way.
            let end = if *broke <= 2 { from + (body.len() - from) / 2 } else { body.len() };
            (head, body[from..end].to_vec())
        });
        let (store, name) = open(&options, &server).await;
        store.pull(&name, None).await.unwrap();
        let asked = server.asked();
        let ranges: Vec<&str> =
            asked.iter().filter(|r| is_layer(&image, &r.path)).map(|r| r.header("range")).collect();
        assert_eq!(ranges.len(), 3, "{ranges:?}");
        assert!(ranges[0].is_empty() && ranges[1].starts_with("bytes="), "{ranges:?}");
    }
}

#[tokio::test]
async fn a_busy_registry_is_given_the_time_it_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let Some(options) = options(dir.path()) else { return };
    let documents = documents(&image());
    let busy = Mutex::new(true);
    let server = Server::start(move |request| {
        if std::mem::take(&mut *busy.lock().unwrap()) {
            return ("429 Too Many Requests\r\nRetry-After: 1".into(), Vec::new());
        }
        find(&documents, &request.path)
    });
    let (store, name) = open(&options, &server).await;
    let started = Instant::now();
    store.pull(&name, None).await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn lies_are_seen() {
    let dir = tempfile::tempdir().unwrap();
    let Some(options) = options(dir.path()) else { return };
    let image = image();
    type Twist = fn(&TestImage, &Request, Answer) -> Answer;
    type Expected = fn(&ImageError) -> bool;
    let twists: [(Twist, Expected); 4] = [
        (
            |image, request, (head, mut body)| {
                if is_layer(image, &request.path) {
                    body[1000] ^= 1;
                }
                (head, body)
            },
            |error| matches!(error, ImageError::DigestMismatch { .. }),
        ),
        (
            |image, request, (head, mut body)| {
                if is_layer(image, &request.path) {
                    body.extend(vec![0; 1000]);
                }
                (head, body)
            },
            |error| matches!(error, ImageError::TooLarge { .. }),
        ),
        (
            |_, request, (head, body)| {
                if request.path.contains("/manifests/") { (head, vec![b' '; 5 << 20]) } else { (head, body) }
            },
            |error| matches!(error, ImageError::TooLarge { .. }),
        ),
        (
            |_, request, (_, body)| (format!("302 Found\r\nLocation: {}", request.path), body),
            |error| error.to_string().contains("redirects too often"),
        ),
    ];
    for (number, (twist, expected)) in twists.into_iter().enumerate() {
        let documents = documents(&image);
        let server =
            Server::start(move |request| twist(&self::image(), request, find(&documents, &request.path)));
        let (store, name) = open(&options, &server).await;
        let error = store.pull(&name, None).await.unwrap_err();
        assert!(expected(&error), "twist {number}: {error}");
        assert!(store.list().is_empty());
    }
    // By digest, another manifest than the one asked for.
    let documents = documents(&image);
    let server = Server::start(move |_| ("200 OK".into(), documents["manifests/v1"].clone()));
    let (store, _) = open(&options, &server).await;
    let name = format!("{}/app@{}", server.address, Digest::of(b"another")).parse().unwrap();
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error}");
}
