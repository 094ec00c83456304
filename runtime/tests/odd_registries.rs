//! Registries that want tokens, redirect, hurry nobody, break off, or lie: a scripted one on loopback.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(dead_code, reason = "the module is shared with tests that use all of it")]

mod registry;

use atoll_odd_registry::{Answer, Request, Server, identity, rest};
use atoll_runtime::images::{Auth, Digest, ImageError, ImageRef, ImageStore, Patience};
use registry::scripted::{documents, find, image, is_layer, open};
use registry::{Family, Packing, TestImage, layer, options};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Pulls from a server whose right answers are changed by `twist`; the store must be empty afterwards.
async fn refused(
    twist: impl Fn(&Request, (String, Vec<u8>)) -> (String, Vec<u8>) + Send + Sync + 'static,
) -> ImageError {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let documents = documents(&image());
    let server = Server::start(move |request| twist(request, find(&documents, &request.path)));
    let (store, name) = open(&options, &server).await;
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(store.list().is_empty(), "{error}");
    assert_eq!(files_below(&options.root.join("layers")), 0, "{error}");
    assert_eq!(files_below(&options.root.join("tmp")), 0, "{error}");
    error
}

fn files_below(path: &Path) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

#[tokio::test]
async fn a_token_is_fetched_and_stays_with_its_registry_when_that_redirects_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
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
    let basic = |password: &str| Some(Auth::Basic { username: "user".into(), password: password.into() });
    let refused = store.pull(&name, basic("no")).await;
    assert!(matches!(refused, Err(ImageError::Denied { .. })), "{refused:?}");
    store.pull(&name, basic("pass")).await.unwrap();
    let asked = tokens.asked();
    assert!(asked[1].path.ends_with("/token?service=here&scope=repository%3Aapp%3Apull"), "{asked:?}");
    assert_eq!(elsewhere.asked().len(), 2, "config and layer came from there");
    assert!(elsewhere.asked().iter().all(|request| request.header("authorization").is_empty()));
    assert!(server.asked().iter().all(|request| !request.header("authorization").starts_with("Basic")));
}

#[tokio::test]
async fn a_redirect_in_a_circle_is_given_up() {
    let error =
        refused(|request, (_, body)| (format!("302 Found\r\nLocation: {}", request.path), body)).await;
    assert!(error.to_string().contains("redirects too often"), "{error}");
}

#[tokio::test]
async fn a_redirect_to_another_scheme_or_to_nowhere_is_refused() {
    for location in ["file:///etc/shadow", "gopher://127.0.0.1/x", "", "http://"] {
        let error = refused(move |_, (_, body)| (format!("302 Found\r\nLocation: {location}"), body)).await;
        assert!(error.to_string().contains("redirects to"), "{location}: {error}");
    }
}

/// Pulls over TLS from a server with the given certificate, of which the settings trust `trusted`.
async fn pull_over_tls(
    identity: &rcgen::CertifiedKey<rcgen::KeyPair>,
    trusted: &str,
) -> Result<(), ImageError> {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let documents = documents(&image());
    let server = Server::start_tls(identity, move |request| find(&documents, &request.path));
    let settings = serde_json::json!({"registries": {&server.address: {"ca_pem": trusted}}});
    std::fs::write(&options.registries, settings.to_string()).unwrap();
    let store = ImageStore::open(options).await.unwrap();
    let name: ImageRef = format!("{}/app:v1", server.address).parse().unwrap();
    store.pull(&name, None).await.map(drop)
}

#[tokio::test]
async fn a_registry_with_a_wrong_certificate_is_not_trusted() {
    let right = identity(&["127.0.0.1"], false);
    pull_over_tls(&right, &right.cert.pem()).await.unwrap();
    let cases = [
        ("of another authority", identity(&["127.0.0.1"], false), right.cert.pem()),
        ("for another name", identity(&["registry.example"], false), String::new()),
        ("that has expired", identity(&["127.0.0.1"], true), String::new()),
    ];
    for (which, identity, trusted) in cases {
        let trusted = if trusted.is_empty() { identity.cert.pem() } else { trusted };
        let started = Instant::now();
        let error = pull_over_tls(&identity, &trusted).await.unwrap_err();
        assert!(matches!(error, ImageError::Untrusted { .. }), "{which}: {error}");
        assert!(error.to_string().contains("give its CA certificate"), "{which}: {error}");
        assert!(!error.is_transient(), "trying again does not help");
        assert!(started.elapsed() < Duration::from_secs(10), "{which}: it was tried more than once");
    }
}

#[tokio::test]
async fn a_redirect_from_tls_to_plain_http_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let blobs = documents(&image());
    let plain = Server::start(move |request| find(&blobs, &request.path));
    let target = plain.address.clone();
    let identity = identity(&["127.0.0.1"], false);
    let server = Server::start_tls(&identity, move |request| {
        (format!("302 Found\r\nLocation: http://{target}{}", request.path), Vec::new())
    });
    let settings = serde_json::json!({"registries": {&server.address: {"ca_pem": identity.cert.pem()}}});
    std::fs::write(&options.registries, settings.to_string()).unwrap();
    let store = ImageStore::open(options).await.unwrap();
    let name: ImageRef = format!("{}/app:v1", server.address).parse().unwrap();
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(error.to_string().contains("from https to http"), "{error}");
    assert!(plain.asked().is_empty());
}

#[tokio::test]
async fn an_interrupted_download_resumes_where_it_broke() {
    for ranges in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        let image = image();
        let documents = documents(&image);
        let broke = Mutex::new(0);
        let server = Server::start(move |request| {
            let (head, body) = find(&documents, &request.path);
            if !is_layer(&registry::scripted::image(), &request.path) {
                return (head, body);
            }
            let mut broke = broke.lock().unwrap();
            *broke += 1;
            let (head, mut body) = rest(body, if ranges { request.from() } else { 0 });
            // Twice it breaks off half way.
            if *broke <= 2 {
                body.truncate(body.len() / 2);
            }
            (head, body)
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
async fn a_pull_that_failed_resumes_with_the_layers_that_were_done() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let image = TestImage::new(
        Family::Oci,
        (0..4).map(|n| (layer(&[("file", &n.to_string())]), Packing::Gzip)).collect(),
    );
    let last = Digest::of(&registry::pack(&image.layers[3].0, Packing::Gzip)).to_string();
    let (documents, missing) = (documents(&image), last.clone());
    let broken = std::sync::Arc::new(Mutex::new(true));
    let works = std::sync::Arc::clone(&broken);
    let done = options.root.join("layers");
    let server = Server::start(move |request| {
        if request.path.ends_with(&missing) && *broken.lock().unwrap() {
            // Not before the others are in the store.
            let until = Instant::now() + Duration::from_secs(20);
            while files_below(&done) < 3 && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            return ("503 Service Unavailable\r\nRetry-After: 0".into(), Vec::new());
        }
        find(&documents, &request.path)
    });
    let (store, name) = open(&options, &server).await;
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("503"), "{error}");
    assert!(store.list().is_empty());
    assert_eq!(files_below(&options.root.join("tmp")), 0);
    *works.lock().unwrap() = false;
    let before = server.asked().len();
    let id = store.pull(&name, None).await.unwrap();
    let blobs: Vec<String> = server.asked()[before..].iter().map(|r| r.path.clone()).collect();
    assert_eq!(blobs.len(), 3, "manifest, config and the one layer that was missing: {blobs:?}");
    store.remove(&id.to_string()).await.unwrap();
    assert_eq!(files_below(&options.root.join("layers")), 0, "nothing is held any more");
}

#[tokio::test]
async fn a_registry_that_hangs_in_the_middle_is_left_and_asked_for_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let patience = Patience { head: Duration::from_secs(20), silence: Duration::from_millis(300) };
    let options = atoll_runtime::images::StoreOptions { patience, ..options(dir.path()) };
    let image = image();
    let documents = documents(&image);
    let hung = Mutex::new(false);
    let server = Server::start(move |request| {
        let (head, body) = find(&documents, &request.path);
        if !is_layer(&registry::scripted::image(), &request.path) {
            return Answer { head, body, hang: false };
        }
        let first = !std::mem::replace(&mut *hung.lock().unwrap(), true);
        let (head, mut body) = rest(body, request.from());
        if first {
            body.truncate(body.len() / 2);
        }
        Answer { head, body, hang: first }
    });
    let (store, name) = open(&options, &server).await;
    store.pull(&name, None).await.unwrap();
    let asked = server.asked();
    assert!(asked.last().unwrap().from() > 10_000, "{asked:?}");
}

#[tokio::test]
async fn a_registry_that_hangs_for_good_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let patience = Patience { head: Duration::from_millis(300), silence: Duration::from_millis(300) };
    let options = atoll_runtime::images::StoreOptions { patience, ..options(dir.path()) };
    let documents = documents(&image());
    // It takes the request for the layer and says nothing, or only the head of an answer.
    for head in ["", "200 OK\r\nContent-Length: 70000"] {
        let documents = documents.clone();
        let server = Server::start(move |request| {
            let layer = is_layer(&image(), &request.path);
            let (right, body) = find(&documents, &request.path);
            match layer {
                true => Answer { head: head.into(), body: Vec::new(), hang: true },
                false => Answer { head: right, body, hang: false },
            }
        });
        let (store, name) = open(&options, &server).await;
        let started = Instant::now();
        let error = store.pull(&name, None).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert!(started.elapsed() < Duration::from_secs(120), "{:?}", started.elapsed());
        assert_eq!(files_below(&options.root.join("tmp")), 0);
    }
}

#[tokio::test]
async fn a_registry_that_answers_429_is_given_the_time_it_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
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
async fn a_registry_that_answers_429_for_ever_is_given_up_and_named() {
    let error = refused(|_, _| ("429 Too Many Requests\r\nRetry-After: 0".into(), Vec::new())).await;
    assert!(error.is_transient() && error.to_string().contains("429"), "{error}");
}

#[tokio::test]
async fn a_layer_with_a_wrong_digest_is_refused() {
    let error = refused(|request, (head, mut body)| {
        if is_layer(&image(), &request.path) {
            body[1000] ^= 1;
        }
        (head, body)
    })
    .await;
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn a_config_with_a_wrong_digest_is_refused() {
    let error = refused(|request, (head, body)| {
        let config = request.path.contains("/blobs/") && !is_layer(&image(), &request.path);
        (head, if config { body.iter().map(|b| if *b == b'w' { b'v' } else { *b }).collect() } else { body })
    })
    .await;
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn a_manifest_with_a_wrong_digest_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let documents = documents(&image());
    let server = Server::start(move |_| ("200 OK".to_owned(), documents["manifests/v1"].clone()));
    let (store, _) = open(&options, &server).await;
    let name = format!("{}/app@{}", server.address, Digest::of(b"another")).parse().unwrap();
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn an_oversized_layer_is_cut_off() {
    let error = refused(|request, (head, mut body)| {
        if is_layer(&image(), &request.path) {
            body.extend(vec![0; 1000]);
        }
        (head, body)
    })
    .await;
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
}

/// The manifest with another size of the layer.
fn with_layer_size(body: &[u8], size: u64) -> Vec<u8> {
    let mut manifest: serde_json::Value = serde_json::from_slice(body).unwrap();
    manifest["layers"][0]["size"] = size.into();
    manifest.to_string().into_bytes()
}

#[tokio::test]
async fn a_layer_whose_size_lies_is_refused() {
    let lie = |size: u64| {
        refused(move |request, (head, body)| match request.path.contains("/manifests/") {
            true => (head, with_layer_size(&body, size)),
            false => (head, body),
        })
    };
    let small = lie(1000).await;
    assert!(matches!(small, ImageError::TooLarge { limit: 1000, .. }), "{small}");
    let empty = lie(0).await;
    assert!(matches!(empty, ImageError::DigestMismatch { .. }), "{empty}");
    let huge = lie(u64::MAX).await;
    assert!(matches!(huge, ImageError::TooLarge { .. }), "{huge}");
}

#[tokio::test]
async fn a_layer_that_ends_before_its_size_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let documents = documents(&image());
    let server = Server::start(move |request| {
        let (head, body) = find(&documents, &request.path);
        match request.path.contains("/manifests/") {
            true => (head, with_layer_size(&body, 10 << 20)),
            false => (head, body),
        }
    });
    let (store, name) = open(&options, &server).await;
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(error.to_string().contains("it ended after"), "{error}");
    assert!(store.list().is_empty());
}

#[tokio::test]
async fn a_layer_larger_than_the_disk_is_refused_before_a_byte_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let options = atoll_runtime::images::StoreOptions { reserve: u64::MAX / 2, ..options(dir.path()) };
    let documents = documents(&image());
    let server = Server::start(move |request| find(&documents, &request.path));
    let (store, name) = open(&options, &server).await;
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(matches!(error, ImageError::Full { .. }), "{error}");
    assert_eq!(server.asked().len(), 2, "manifest and config only");
}

#[tokio::test]
async fn a_manifest_of_ten_megabytes_is_refused() {
    let error = refused(|request, (head, body)| {
        if request.path.contains("/manifests/") { (head, vec![b' '; 10 << 20]) } else { (head, body) }
    })
    .await;
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    assert!(error.to_string().starts_with("the manifest of "), "{error}");
}

#[tokio::test]
async fn two_pods_that_pull_one_image_at_once_share_the_download() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let image = image();
    let layer = Digest::of(&registry::pack(&image.layers[0].0, Packing::Plain));
    let documents = documents(&image);
    let server = Server::start(move |request| find(&documents, &request.path));
    let (store, name) = open(&options, &server).await;
    let pulls = (0..8).map(|_| {
        let (store, name) = (store.clone(), name.clone());
        tokio::spawn(async move { store.pull(&name, None).await.unwrap() })
    });
    let pulls: Vec<_> = pulls.collect();
    for pull in pulls {
        pull.await.unwrap();
    }
    assert_eq!(server.count(layer.as_str()), 1, "the layer came once");
    assert_eq!(store.list().len(), 1);
    assert_eq!(files_below(&options.root.join("layers")), 1);
}

#[tokio::test]
async fn an_image_of_many_layers_does_not_hold_up_another() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let layers = (0..80).map(|n| (layer(&[("n", n.to_string().as_str())]), Packing::Plain)).collect();
    let (many, one) = (documents(&TestImage::new(Family::Oci, layers)), documents(&image()));
    let server = Server::start(move |request| {
        find(if request.path.starts_with("/v2/many/") { &many } else { &one }, &request.path)
    });
    let (store, name) = open(&options, &server).await;
    let many: ImageRef = format!("{}/many:v1", server.address).parse().unwrap();
    let pulls = store.clone();
    let many = tokio::spawn(async move { pulls.pull(&many, None).await });
    // All of them wait to be unpacked before the other image comes.
    let asked = || server.asked().iter().filter(|r| r.path.starts_with("/v2/many/blobs/")).count();
    while asked() < 20 && !many.is_finished() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    store.pull(&name, None).await.unwrap();
    let unpacked = files_below(&options.root.join("layers"));
    assert!(unpacked < 60, "{unpacked} layers were unpacked before it");
    many.await.unwrap().unwrap();
    assert_eq!(files_below(&options.root.join("layers")), 81);
}

#[tokio::test]
async fn one_of_two_pods_may_give_its_pull_up() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let documents = documents(&image());
    let server = Server::start(move |request| find(&documents, &request.path));
    let (store, name) = open(&options, &server).await;
    for _ in 0..10 {
        let (other, its) = (store.clone(), name.clone());
        let given_up = tokio::spawn(async move { other.pull(&its, None).await });
        let pulled = store.pull(&name, None);
        tokio::task::yield_now().await;
        given_up.abort();
        let id = pulled.await.unwrap();
        let _ = given_up.await;
        assert_eq!(store.layers(&id).unwrap().len(), 1);
        store.remove(&id.to_string()).await.unwrap();
    }
    store.pull(&name, None).await.unwrap();
    assert_eq!(files_below(&options.root.join("tmp")), 0);
}
