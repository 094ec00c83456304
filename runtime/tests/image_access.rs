//! Who may use an image that was pulled with credentials: what the store keeps of it, and what asking again costs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(dead_code, reason = "the module is shared with tests that use all of it")]

mod registry;

use atoll_odd_registry::{Request, Server};
use atoll_runtime::images::{Auth, ImageError, ImageStore};
use atoll_spec::images::PullSecret;
use registry::options;
use registry::scripted::{documents, find, image, is_layer, open};

/// user:pass
const RIGHT: &str = "Basic dXNlcjpwYXNz";

fn basic(password: &str) -> Option<Auth> {
    Some(Auth::Basic { username: "user".into(), password: password.into() })
}

fn secret(name: &str) -> PullSecret {
    PullSecret { namespace: "ns".into(), name: name.into(), uid: format!("uid-{name}"), hash: name.into() }
}

/// A registry that wants the right password for all that it has.
fn private() -> Server {
    let documents = documents(&image());
    Server::start(move |request: &Request| {
        if request.header("authorization") == RIGHT {
            return find(&documents, &request.path);
        }
        ("401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"here\"".into(), Vec::new())
    })
}

#[tokio::test]
async fn the_record_of_a_private_image_names_its_secrets_and_outlives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let server = private();
    let (store, name) = open(&options, &server).await;
    assert_eq!(store.access(&name.to_string()), None);
    store.pull_with(&name, basic("pass"), Some(secret("one"))).await.unwrap();
    store.pull_with(&name, basic("pass"), Some(secret("two"))).await.unwrap();
    // The same secret with another content.
    let changed = PullSecret { hash: "new".into(), ..secret("one") };
    store.pull_with(&name, basic("pass"), Some(changed.clone())).await.unwrap();
    drop(store);
    let store = ImageStore::open(options.clone()).await.unwrap();
    let access = store.access(&name.to_string()).unwrap();
    assert!(!access.everyone);
    assert_eq!(access.secrets, [secret("two"), changed]);
    // By its id, or from another repository, it was pulled by nobody.
    let id = store.list()[0].id.clone();
    for other in [id.to_string(), id.0.hex().to_owned()] {
        assert!(store.status(&other).is_some(), "{other}");
        assert!(!store.access(&other).unwrap().admits(&[secret("two")]), "{other}");
    }
    let record = std::fs::read_dir(options.root.join("images")).unwrap().next().unwrap().unwrap().path();
    let record = std::fs::read_to_string(record).unwrap();
    assert!(!record.contains("pass") && !record.contains("dXNlcjpwYXNz"), "{record}");
}

#[tokio::test]
async fn asking_again_for_a_private_image_reads_no_layer_and_a_refusal_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let server = private();
    let (store, name) = open(&options, &server).await;
    store.pull_with(&name, basic("pass"), Some(secret("one"))).await.unwrap();
    let layers = || server.asked().iter().filter(|request| is_layer(&image(), &request.path)).count();
    let before = (layers(), store.access(&name.to_string()));
    assert!(before.0 > 0);
    for auth in [None, basic("wrong")] {
        let refused = store.pull_with(&name, auth, Some(secret("stranger"))).await;
        assert!(matches!(refused, Err(ImageError::Denied { .. })), "{refused:?}");
    }
    assert_eq!((layers(), store.access(&name.to_string())), before);
    store.pull_with(&name, basic("pass"), Some(secret("two"))).await.unwrap();
    assert_eq!(layers(), before.0);
    assert!(store.access(&name.to_string()).unwrap().admits(&[secret("two")]));
}

#[tokio::test]
async fn an_image_that_the_registry_gives_to_anybody_is_for_everyone_whoever_pulled_it() {
    let documents = documents(&image());
    let server = Server::start(move |request: &Request| find(&documents, &request.path));
    for auth in [None, basic("pass")] {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        let (store, name) = open(&options, &server).await;
        store.pull_with(&name, auth, Some(secret("one"))).await.unwrap();
        assert!(store.access(&name.to_string()).unwrap().everyone);
    }
}
