//! The whole flow against a scripted API server: above all, that the token never reaches an unverified one.

use super::cluster_info::tests::{kubeconfig, map, pin_of};
use super::store::Store;
use super::token::{Join, Pin, Server, Token};
use super::{JoinError, join, renew, request};
use crate::Error;
use crate::api_client::{self, Credentials};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestStatus,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa, KeyPair,
    SanType,
};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const TOKEN: &str = "abcdef.0123456789abcdef";

type Ca = CertifiedIssuer<'static, KeyPair>;
type Seen = Arc<Mutex<Vec<(String, Option<String>)>>>;

fn ca() -> Arc<Ca> {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Arc::new(CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap())
}

fn token() -> Token {
    Token::parse(TOKEN).unwrap()
}

/// What the server does with requests.
struct Script {
    /// Answers to cluster-info, in order; the last one again and again.
    cluster_info: Vec<Vec<u8>>,
    /// Signs requests with this CA.
    signer: Arc<Ca>,
    /// Denies requests instead.
    denies: bool,
    /// Refuses every token.
    refuses: bool,
}

struct Fake {
    server: Server,
    /// `METHOD path` and the authorization of every request.
    seen: Seen,
    /// The client certificate of every connection that had one, in order.
    peers: Arc<Mutex<Vec<CertificateDer<'static>>>>,
}

impl Fake {
    fn tokens_seen(&self) -> usize {
        self.seen.lock().unwrap().iter().filter(|(_, authorization)| authorization.is_some()).count()
    }

    fn requests(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    /// Serves with a certificate of `ca`.
    async fn start(ca: &Ca, script: Script) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.subject_alt_names = vec![SanType::IpAddress("127.0.0.1".parse().unwrap())];
        let certificate = parameters.signed_by(&key, ca).unwrap();
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .unwrap();
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.der().clone()], private)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Server { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
        let seen = Arc::new(Mutex::new(Vec::new()));
        let peers = Arc::new(Mutex::new(Vec::new()));
        let state = Arc::new(State {
            script,
            reads: AtomicUsize::new(0),
            object: Mutex::default(),
            seen: Arc::clone(&seen),
        });
        let connected = Arc::clone(&peers);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, state, connected) =
                    (acceptor.clone(), Arc::clone(&state), Arc::clone(&connected));
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(stream).await else { return };
                    let peer = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first()).cloned();
                    let known = peer.is_some();
                    connected.lock().unwrap().extend(peer.map(CertificateDer::into_owned));
                    let answer = service_fn(move |request| {
                        let state = Arc::clone(&state);
                        async move { Ok::<_, Infallible>(state.answer(request, known).await) }
                    });
                    // A client that hangs up early is part of what is tested.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(tls), answer)
                        .await;
                });
            }
        });
        Self { server, seen, peers }
    }
}

struct State {
    script: Script,
    reads: AtomicUsize,
    object: Mutex<Option<CertificateSigningRequest>>,
    seen: Seen,
}

impl State {
    async fn answer(&self, request: Request<Incoming>, known: bool) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let authorization =
            request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
        self.seen.lock().unwrap().push((format!("{} {path}", request.method()), authorization.clone()));
        if path == super::cluster_info::PATH {
            let at = self.reads.fetch_add(1, Ordering::Relaxed).min(self.script.cluster_info.len() - 1);
            return reply(StatusCode::OK, self.script.cluster_info[at].clone());
        }
        let good = known || authorization == Some(format!("Bearer {TOKEN}"));
        if self.script.refuses || !good {
            return reply(StatusCode::UNAUTHORIZED, br#"{"message":"Unauthorized"}"#.to_vec());
        }
        if request.method() == "POST" {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            return self.create(serde_json::from_slice(&body).unwrap());
        }
        let object = self.object.lock().unwrap().clone();
        reply(StatusCode::OK, serde_json::to_vec(&object.unwrap()).unwrap())
    }

    fn create(&self, mut object: CertificateSigningRequest) -> Response<Full<Bytes>> {
        let mut slot = self.object.lock().unwrap();
        if slot.as_ref().is_some_and(|old| old.metadata.name == object.metadata.name) {
            return reply(StatusCode::CONFLICT, br#"{"message":"already exists"}"#.to_vec());
        }
        let mut status = CertificateSigningRequestStatus::default();
        if self.script.denies {
            status.conditions = Some(vec![CertificateSigningRequestCondition {
                type_: "Denied".into(),
                status: "True".into(),
                message: Some("not today".into()),
                ..CertificateSigningRequestCondition::default()
            }]);
        } else {
            let pem = String::from_utf8(object.spec.request.0.clone()).unwrap();
            let csr = CertificateSigningRequestParams::from_pem(&pem).unwrap();
            let signed = csr.signed_by(&self.script.signer).unwrap();
            status.certificate = Some(ByteString(signed.pem().into_bytes()));
        }
        object.status = Some(status);
        *slot = Some(object);
        reply(StatusCode::CREATED, b"{}".to_vec())
    }
}

fn reply(status: StatusCode, body: Vec<u8>) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::new(Bytes::from(body))).unwrap()
}

fn honest(ca: &Arc<Ca>) -> Script {
    Script {
        cluster_info: vec![map(&kubeconfig(&ca.pem()), Some(&token()))],
        signer: Arc::clone(ca),
        denies: false,
        refuses: false,
    }
}

async fn try_join(fake: &Fake, pins: Vec<Pin>, store: &Store) -> crate::Result<super::Identity> {
    let with = Join { server: fake.server.clone(), token: token(), pins };
    join(&with, "n", store).await
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

#[tokio::test]
async fn token_becomes_an_identity_that_a_restart_finds() {
    let (ca, (_dir, store)) = (ca(), store());
    let fake = Fake::start(&ca, honest(&ca)).await;
    let identity = try_join(&fake, vec![pin_of(&ca.pem())], &store).await.unwrap();
    assert_eq!(store.load("n").unwrap().not_after, identity.not_after);
    let seen = fake.seen.lock().unwrap();
    let (reads, rest): (Vec<_>, Vec<_>) = seen.iter().partition(|(what, _)| what.ends_with("/cluster-info"));
    assert_eq!(reads.len(), 2);
    assert!(reads.iter().all(|(_, authorization)| authorization.is_none()));
    assert_eq!(rest.first().unwrap().0, format!("POST {}", request::PATH));
}

#[tokio::test]
async fn wrong_pin_is_refused_after_one_anonymous_request() {
    let (ca, other, (_dir, store)) = (ca(), ca(), store());
    let fake = Fake::start(&ca, honest(&ca)).await;
    let error = try_join(&fake, vec![pin_of(&other.pem())], &store).await.unwrap_err();
    assert!(matches!(error, Error::Join(JoinError::Pin { .. })), "{error}");
    assert_eq!((fake.requests(), fake.tokens_seen()), (1, 0));
}

#[tokio::test]
async fn wrong_signature_is_refused_after_one_anonymous_request() {
    let (ca, (_dir, store)) = (ca(), store());
    let forger = Token::parse("abcdef.ffffffffffffffff").unwrap();
    let script = Script { cluster_info: vec![map(&kubeconfig(&ca.pem()), Some(&forger))], ..honest(&ca) };
    let fake = Fake::start(&ca, script).await;
    let error = try_join(&fake, vec![pin_of(&ca.pem())], &store).await.unwrap_err();
    assert!(matches!(error, Error::Join(JoinError::Signature { .. })), "{error}");
    assert_eq!((fake.requests(), fake.tokens_seen()), (1, 0));
}

#[tokio::test]
async fn unknown_token_is_named_and_not_sent() {
    let (ca, (_dir, store)) = (ca(), store());
    let script = Script { cluster_info: vec![map(&kubeconfig(&ca.pem()), None)], ..honest(&ca) };
    let fake = Fake::start(&ca, script).await;
    let error = try_join(&fake, vec![pin_of(&ca.pem())], &store).await.unwrap_err();
    assert!(error.to_string().contains("does not know the token abcdef"), "{error}");
    assert!(!error.to_string().contains("0123456789abcdef"), "{error}");
    assert_eq!(fake.tokens_seen(), 0);
}

/// cluster-info is public: somebody in between can show the genuine one, signature and all.
#[tokio::test]
async fn somebody_in_between_with_the_genuine_cluster_info_gets_no_token() {
    let (genuine, thief, (_dir, store)) = (ca(), ca(), store());
    let fake = Fake::start(&thief, honest(&genuine)).await;
    let error = try_join(&fake, vec![pin_of(&genuine.pem())], &store).await.unwrap_err();
    assert!(matches!(error, Error::Join(JoinError::Certificate { .. })), "{error}");
    assert_eq!((fake.requests(), fake.tokens_seen()), (1, 0));
}

#[tokio::test]
async fn another_answer_after_verification_is_refused_before_the_token() {
    let (ca, (_dir, store)) = (ca(), store());
    let other = kubeconfig(&ca.pem()).replace("https://a:1", "https://b:1");
    let script = Script {
        cluster_info: vec![map(&kubeconfig(&ca.pem()), Some(&token())), map(&other, Some(&token()))],
        ..honest(&ca)
    };
    let fake = Fake::start(&ca, script).await;
    let error = try_join(&fake, vec![pin_of(&ca.pem())], &store).await.unwrap_err();
    assert!(matches!(error, Error::Join(JoinError::Changed { .. })), "{error}");
    assert_eq!((fake.requests(), fake.tokens_seen()), (2, 0));
}

#[tokio::test]
async fn refused_token_and_denied_request_are_told() {
    let (ca, (_dir, store)) = (ca(), store());
    let pins = vec![pin_of(&ca.pem())];
    let fake = Fake::start(&ca, Script { refuses: true, ..honest(&ca) }).await;
    let error = try_join(&fake, pins.clone(), &store).await.unwrap_err();
    assert!(matches!(error, Error::Join(JoinError::Refused { .. })), "{error}");

    let before = store.pending_key().unwrap().serialize_pem();
    let fake = Fake::start(&ca, Script { denies: true, ..honest(&ca) }).await;
    let error = try_join(&fake, pins, &store).await.unwrap_err();
    assert!(error.to_string().contains("denied: not today"), "{error}");
    assert_ne!(store.pending_key().unwrap().serialize_pem(), before, "the next try asks with a new key");
}

/// The key was on disk and the request made when the agent ended: the next start goes on with both.
#[tokio::test]
async fn a_restart_goes_on_with_the_request_made_before() {
    let (ca, (_dir, store)) = (ca(), store());
    let pins = vec![pin_of(&ca.pem())];
    let fake = Fake::start(&ca, honest(&ca)).await;
    let name = request::name("n", &store.pending_key().unwrap());
    let with = Join { server: fake.server.clone(), token: token(), pins: pins.clone() };
    let verified = super::https::Verified::new(&fake.server, &ca.pem()).unwrap();
    super::sign(&with, &verified, "n", &store.pending_key().unwrap()).await.unwrap();
    try_join(&fake, pins, &store).await.unwrap();
    let seen = fake.seen.lock().unwrap();
    let looked = seen.iter().filter(|(what, _)| what.ends_with(&name)).count();
    assert_eq!(looked, 2, "{seen:?}");
}

/// The first certificate of an identity that joined through `fake`, and a client that uses it.
async fn joined(fake: &Fake, ca: &Ca, store: &Store) -> (super::Identity, Arc<Credentials>, kube::Client) {
    let identity = try_join(fake, vec![pin_of(&ca.pem())], store).await.unwrap();
    let credentials = Credentials::new(Arc::clone(&identity.certified));
    let client = api_client::client(&identity.server, &identity.ca_pem, &credentials).unwrap();
    (identity, credentials, client)
}

#[tokio::test]
async fn a_certificate_near_its_end_is_renewed_with_a_fresh_key_and_used_at_once() {
    let (ca, (_dir, store)) = (ca(), store());
    let fake = Fake::start(&ca, honest(&ca)).await;
    let (mut identity, credentials, client) = joined(&fake, &ca, &store).await;
    let first = identity.certified.cert[0].clone();
    identity.not_before = renew::now() - 1000;
    identity.not_after = renew::now() + 10;
    let keeping =
        tokio::spawn(renew::keep(client.clone(), "n".into(), store.clone(), identity, credentials.clone()));
    let renewed = async {
        loop {
            if let Some(stored) = store.load("n")
                && stored.certified.cert[0] != first
            {
                return stored.certified.cert[0].clone();
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let second = tokio::time::timeout(std::time::Duration::from_secs(20), renewed).await.unwrap();
    let used = async {
        while fake.peers.lock().unwrap().last() != Some(&second) {
            // The answer does not matter, only the certificate of the connection that brings it.
            let _ = client.apiserver_version().await;
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), used).await.unwrap();
    assert_eq!(fake.peers.lock().unwrap().first(), Some(&first));
    keeping.abort();
}

#[tokio::test]
async fn an_expired_certificate_ends_renewal_so_that_the_node_joins_again() {
    let (ca, (_dir, store)) = (ca(), store());
    let fake = Fake::start(&ca, honest(&ca)).await;
    let (mut identity, credentials, client) = joined(&fake, &ca, &store).await;
    let gone = Fake::start(&ca, Script { refuses: true, ..honest(&ca) }).await;
    identity.server = gone.server.clone();
    let refused = api_client::client(&gone.server, &identity.ca_pem, &credentials).unwrap();
    drop(client);
    identity.not_before = renew::now() - 1000;
    identity.not_after = renew::now() - 1;
    let keeping = renew::keep(refused, "n".into(), store, identity, credentials);
    tokio::time::timeout(std::time::Duration::from_secs(20), keeping).await.unwrap();
}

#[tokio::test]
async fn connections_made_with_the_old_certificate_are_closed() {
    let (ca, (_dir, store)) = (ca(), store());
    let fake = Fake::start(&ca, honest(&ca)).await;
    let (_, credentials, client) = joined(&fake, &ca, &store).await;
    let connections = || fake.peers.lock().unwrap().len();
    let ask = || async { drop(client.apiserver_version().await) };
    ask().await;
    ask().await;
    assert_eq!(connections(), 1, "one connection serves many requests");
    let other = {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(Vec::new()).unwrap().signed_by(&key, &*ca).unwrap();
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signing = rustls::crypto::ring::sign::any_supported_type(&private).unwrap();
        Arc::new(rustls::sign::CertifiedKey::new(vec![certificate.der().clone()], signing))
    };
    credentials.replace(Arc::clone(&other));
    let used = async {
        while fake.peers.lock().unwrap().last() != Some(&other.cert[0]) {
            ask().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), used).await.unwrap();
    assert_eq!(connections(), 2);
}
