//! A scripted control plane: what the agent needs of an API server, over real TLS, with every fault that a test asks
//! for. It signs certificates, keeps objects, lets pods be watched, and notes each request.

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, PublicKeyData as _, SanType,
};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::FromDer as _;

pub const TOKEN: &str = "abcdef.0123456789abcdef";
pub const POD_CIDR: &str = "10.244.7.0/24";

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Ca = CertifiedIssuer<'static, KeyPair>;

/// Seconds from now in which a certificate is in force.
#[derive(Debug, Clone, Copy)]
pub struct Life {
    pub from: i64,
    pub to: i64,
}

/// A year, as the real ones have.
pub const YEAR: Life = Life { from: -300, to: 365 * 86_400 };

/// A fault that befalls requests whose `METHOD path` begins with a text.
#[derive(Debug, Clone)]
struct Fault {
    requests: String,
    status: u16,
    retry_after: Option<u64>,
    left: usize,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub at: Instant,
    /// `METHOD path?query`
    pub what: String,
    /// Common name of the client certificate.
    pub who: Option<String>,
    /// With a bearer token.
    pub token: Option<String>,
}

/// Whether the server can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// As it should.
    Served,
    /// Nobody listens.
    Refused,
    /// Connections are taken and nothing is ever said.
    Silent,
}

#[derive(Default)]
struct World {
    objects: BTreeMap<String, Value>,
    version: u64,
    uids: u64,
    /// Version, type, object: what watches tell.
    history: Vec<(u64, &'static str, Value)>,
    /// Watches from before this version are told 410.
    compacted: u64,
    faults: Vec<Fault>,
    seen: Vec<Seen>,
    /// Users by bearer token.
    users: BTreeMap<String, String>,
    /// `user verb subresource` that are allowed.
    allowed: Vec<String>,
    client_life: Option<Life>,
    /// The token is known to `cluster-info`, and lets callers in.
    token_listed: bool,
    token_good: bool,
}

struct Inner {
    ca: Arc<Ca>,
    address: SocketAddr,
    world: Mutex<World>,
    changed: watch::Sender<u64>,
    reach: watch::Sender<Reach>,
    tls: Mutex<Arc<rustls::ServerConfig>>,
}

/// The control plane; ends with the test's runtime.
#[derive(Clone)]
pub struct Cluster(Arc<Inner>);

/// A certificate authority.
pub fn authority(name: &str) -> Arc<Ca> {
    let mut parameters = CertificateParams::new(Vec::new()).expect("no names");
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("random numbers");
    Arc::new(CertifiedIssuer::self_signed(parameters, key).expect("a CA can be made"))
}

/// A client certificate and its key, as PEM.
pub fn client_certificate(
    ca: &Ca,
    user: &str,
    group: &str,
    usage: ExtendedKeyUsagePurpose,
) -> (String, String) {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, user);
    parameters.distinguished_name.push(DnType::OrganizationName, group);
    parameters.extended_key_usages = vec![usage];
    let key = KeyPair::generate().expect("random numbers");
    (parameters.signed_by(&key, ca).expect("signed").pem(), key.serialize_pem())
}

fn lasts(parameters: &mut CertificateParams, life: Life) {
    let now = jiff::Timestamp::now().as_second();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let at = |seconds: i64| epoch + Duration::from_secs(u64::try_from(now + seconds).expect("after 1970"));
    (parameters.not_before, parameters.not_after) = (at(life.from), at(life.to));
}

fn server_tls(ca: &Ca, signer: &Ca, life: Life) -> Arc<rustls::ServerConfig> {
    let key = KeyPair::generate().expect("random numbers");
    let mut parameters = CertificateParams::new(Vec::new()).expect("no names");
    parameters.subject_alt_names = vec![SanType::IpAddress("127.0.0.1".parse().expect("an address"))];
    lasts(&mut parameters, life);
    let certificate = parameters.signed_by(&key, signer).expect("signed");
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().clone()).expect("a CA");
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .expect("a verifier");
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has them")
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.der().clone()], private)
        .expect("key and certificate fit");
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Arc::new(tls)
}

impl Cluster {
    /// Serves, with nothing in it.
    pub async fn start() -> Self {
        let ca = authority("kubernetes");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let tls = Mutex::new(server_tls(&ca, &ca, YEAR));
        let world = World { token_listed: true, token_good: true, version: 10, ..World::default() };
        let cluster = Self(Arc::new(Inner {
            ca,
            address,
            world: Mutex::new(world),
            changed: watch::Sender::new(0),
            reach: watch::Sender::new(Reach::Served),
            tls,
        }));
        tokio::spawn(cluster.clone().listen(listener));
        cluster
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.world.lock().expect("no test panics with the lock held")
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.0.address)
    }

    pub fn ca(&self) -> &Ca {
        &self.0.ca
    }

    /// Pin of its CA.
    pub fn pin(&self) -> String {
        let digest = Sha256::digest(self.0.ca.key().subject_public_key_info());
        digest.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    }

    /// From now on, new connections get a certificate of this authority with this life; the old ones end.
    pub fn serve_as(&self, signer: &Ca, life: Life) {
        *self.0.tls.lock().expect("whole") = server_tls(&self.0.ca, signer, life);
        let reach = *self.0.reach.borrow();
        self.0.reach.send_replace(reach);
    }

    /// Changes who can reach it; open connections end, or fall silent.
    pub fn reach(&self, reach: Reach) {
        self.0.reach.send_replace(reach);
    }

    /// Answers the next `times` requests whose `METHOD path` begins with `requests` with this status.
    pub fn fail(&self, requests: &str, status: u16, retry_after: Option<u64>, times: usize) {
        let requests = requests.to_owned();
        self.world().faults.push(Fault { requests, status, retry_after, left: times });
    }

    pub fn heal(&self) {
        self.world().faults.clear();
    }

    /// Life of client certificates that it signs.
    pub fn client_life(&self, life: Life) {
        self.world().client_life = Some(life);
    }

    /// The bootstrap token: whether `cluster-info` is signed with it, and whether it lets callers in.
    pub fn token(&self, listed: bool, good: bool) {
        let mut world = self.world();
        (world.token_listed, world.token_good) = (listed, good);
    }

    /// A bearer token and the user behind it; `None` takes it away.
    pub fn user(&self, token: &str, user: Option<&str>) {
        let mut world = self.world();
        match user {
            Some(user) => world.users.insert(token.into(), user.into()),
            None => world.users.remove(token),
        };
    }

    /// Lets a user do `verb` to `nodes/subresource`.
    pub fn allow(&self, user: &str, verb: &str, subresource: &str) {
        self.world().allowed.push(format!("{user} {verb} {subresource}"));
    }

    /// Requests since `from`, as `METHOD path?query`.
    pub fn seen_since(&self, from: Instant) -> Vec<Seen> {
        self.world().seen.iter().filter(|seen| seen.at >= from).cloned().collect()
    }

    pub fn count(&self, from: Instant, begins: &str) -> usize {
        self.seen_since(from).iter().filter(|seen| seen.what.starts_with(begins)).count()
    }

    /// An object by its path, such as `/api/v1/nodes/n`.
    pub fn get(&self, path: &str) -> Option<Value> {
        self.world().objects.get(path).cloned()
    }

    /// Objects whose path begins with this.
    pub fn objects(&self, path: &str) -> Vec<Value> {
        let world = self.world();
        world.objects.iter().filter(|(key, _)| key.starts_with(path)).map(|(_, v)| v.clone()).collect()
    }

    /// Creates or replaces an object, as `kubectl` would.
    pub fn put(&self, path: &str, object: Value) -> Value {
        let stored = self.world().put(path, object);
        self.tell();
        stored
    }

    /// Every version of a pod that there was, oldest first, until history is compacted.
    pub fn versions(&self, path: &str) -> Vec<Value> {
        let name = path.rsplit('/').next();
        let of = |object: &Value| object["metadata"]["name"].as_str() == name;
        self.world().history.iter().filter(|(_, _, object)| of(object)).map(|(.., o)| o.clone()).collect()
    }

    /// Labels an object, as `kubectl label` does: nothing of its status is touched.
    pub fn label(&self, path: &str, value: &str) {
        let mut world = self.world();
        let mut object = world.objects.get(path).cloned().expect("an object");
        object["metadata"]["labels"]["test"] = value.into();
        world.put(path, object);
        drop(world);
        self.tell();
    }

    /// Removes an object at once.
    pub fn remove(&self, path: &str) {
        self.world().remove(path);
        self.tell();
    }

    /// Forgets history: whoever watches from an older version is told so, and open watches end.
    pub fn compact(&self) {
        let mut world = self.world();
        world.version += 1000;
        world.compacted = world.version;
        world.history.clear();
        drop(world);
        self.tell();
    }

    fn tell(&self) {
        self.0.changed.send_modify(|n| *n += 1);
    }

    async fn listen(self, first: TcpListener) {
        let mut listener = Some(first);
        let mut reach = self.0.reach.subscribe();
        loop {
            if *reach.borrow_and_update() == Reach::Refused {
                listener = None;
                if reach.changed().await.is_err() {
                    return;
                }
                continue;
            }
            if listener.is_none() {
                listener = TcpListener::bind(self.0.address).await.ok();
            }
            let Some(open) = &listener else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            tokio::select! {
                accepted = open.accept() => {
                    if let Ok((stream, _)) = accepted {
                        tokio::spawn(self.clone().connection(stream));
                    }
                }
                _ = reach.changed() => {}
            }
        }
    }

    async fn connection(self, stream: tokio::net::TcpStream) {
        let mut reach = self.0.reach.subscribe();
        while *reach.borrow_and_update() == Reach::Silent {
            if reach.changed().await.is_err() {
                return;
            }
        }
        let acceptor = TlsAcceptor::from(self.0.tls.lock().expect("whole").clone());
        let Ok(tls) = acceptor.accept(stream).await else { return };
        let who = tls.get_ref().1.peer_certificates().and_then(|chain| common_name(chain.first()?));
        let h2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        let cluster = self.clone();
        let service = service_fn(move |request| {
            let (cluster, who) = (cluster.clone(), who.clone());
            async move { Ok::<_, Infallible>(cluster.answer(request, who).await) }
        });
        let io = TokioIo::new(tls);
        let serve = async {
            // A caller that hangs up is part of what is tested.
            if h2 {
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(io, service)
                    .await;
            } else {
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
            }
        };
        let mut serve = std::pin::pin!(serve);
        tokio::select! {
            () = &mut serve => return,
            _ = reach.changed() => {}
        }
        // Held open without a word, or dropped.
        while *reach.borrow_and_update() == Reach::Silent {
            if reach.changed().await.is_err() {
                return;
            }
        }
    }

    async fn answer(&self, request: Request<Incoming>, who: Option<String>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let what = format!("{} {}", parts.method, parts.uri.path_and_query().map_or("", |p| p.as_str()));
        let token = parts
            .headers
            .get("authorization")
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer ").map(str::to_owned));
        if let Some(fault) = self.note(&what, who.clone(), token.clone()) {
            return fault;
        }
        if path == "/api/v1/namespaces/kube-public/configmaps/cluster-info" {
            return reply(StatusCode::OK, &self.cluster_info());
        }
        let bootstrapping = token.as_deref() == Some(TOKEN) && self.world().token_good;
        if who.is_none() && !bootstrapping {
            return failure(StatusCode::UNAUTHORIZED, "Unauthorized");
        }
        if parts.method == Method::GET && parts.uri.query().is_some_and(|query| query.contains("watch=")) {
            return self.watch(parts.uri.query().unwrap_or_default());
        }
        // An agent killed between the headers and the body of a request asked for nothing.
        let Ok(body) = body.collect().await.map(|body| body.to_bytes()) else {
            return failure(StatusCode::BAD_REQUEST, "the body is cut off");
        };
        let sent: Value = serde_json::from_slice(&body).unwrap_or_default();
        let answer = self.handle(&parts.method, &path, sent);
        self.tell();
        answer
    }

    /// Notes a request, and answers it when a fault befalls it.
    fn note(&self, what: &str, who: Option<String>, token: Option<String>) -> Option<Response<Body>> {
        let mut world = self.world();
        world.seen.push(Seen { at: Instant::now(), what: what.to_owned(), who, token });
        let fault = world.faults.iter_mut().find(|f| f.left > 0 && what.starts_with(&f.requests))?;
        fault.left -= 1;
        let status = StatusCode::from_u16(fault.status).expect("a status");
        // As the API server's own limiter answers: no Status object, only text.
        let body = Full::new(Bytes::from_static(b"scripted fault, please try again later.\n"));
        let mut response = Response::new(body.boxed_unsync());
        *response.status_mut() = status;
        if let Some(seconds) = fault.retry_after {
            response.headers_mut().insert("retry-after", seconds.into());
        }
        Some(response)
    }

    fn cluster_info(&self) -> Value {
        let config = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: \"\"\n  cluster:\n    server: {}\n    certificate-authority-data: {}\n",
            self.url(),
            BASE64_STANDARD.encode(self.0.ca.pem())
        );
        let mut data = json!({ "kubeconfig": config });
        if self.world().token_listed {
            let (id, secret) = TOKEN.split_once('.').expect("a token");
            let header = BASE64_URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"HS256","kid":"{id}"}}"#));
            let signed = format!("{header}.{}", BASE64_URL_SAFE_NO_PAD.encode(&config));
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
            let signature = BASE64_URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, signed.as_bytes()));
            data[format!("jws-kubeconfig-{id}")] = format!("{header}..{signature}").into();
        }
        json!({ "kind": "ConfigMap", "apiVersion": "v1", "data": data })
    }

    fn handle(&self, method: &Method, path: &str, sent: Value) -> Response<Body> {
        let mut world = self.world();
        match *method {
            Method::POST => world.create(&self.0.ca, path, sent),
            Method::GET => match world.objects.get(path) {
                Some(object) => reply(StatusCode::OK, object),
                None if path.rsplit('/').next().is_some_and(|last| COLLECTIONS.contains(&last)) => {
                    world.list(path)
                }
                None => failure(StatusCode::NOT_FOUND, "not found"),
            },
            Method::PATCH => world.patch(path, &sent),
            Method::PUT if world.objects.contains_key(path) => {
                let stored = world.put(path, sent);
                reply(StatusCode::OK, &stored)
            }
            Method::DELETE => world.delete(path, &sent),
            _ => failure(StatusCode::NOT_FOUND, "not found"),
        }
    }

    /// Tells what changed since the version in the query, until the connection ends.
    fn watch(&self, query: &str) -> Response<Body> {
        let from = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("resourceVersion="))
            .and_then(|version| version.parse::<u64>().ok())
            .unwrap_or_default();
        if from < self.world().compacted {
            return failure(StatusCode::GONE, "too old resource version");
        }
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<Bytes>(16);
        let cluster = self.clone();
        tokio::spawn(async move {
            let mut changed = cluster.0.changed.subscribe();
            let mut last = from;
            loop {
                changed.borrow_and_update();
                let (news, gone) = {
                    let world = cluster.world();
                    let news: Vec<_> =
                        world.history.iter().filter(|(version, ..)| *version > last).cloned().collect();
                    (news, last < world.compacted)
                };
                if gone {
                    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
                        "reason": "Expired", "message": "too old resource version", "metadata": {}});
                    let _ = sender.send(line("ERROR", &status)).await;
                    return;
                }
                for (version, kind, object) in news {
                    last = version;
                    if sender.send(line(kind, &object)).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    changed = changed.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        let stream = futures_util::stream::poll_fn(move |context| receiver.poll_recv(context));
        let frames = futures_util::StreamExt::map(stream, |line| Ok(Frame::data(line)));
        let mut response = Response::new(http_body_util::BodyExt::boxed_unsync(StreamBody::new(frames)));
        response.headers_mut().insert("content-type", "application/json".parse().expect("a header"));
        response
    }
}

const COLLECTIONS: [&str; 2] = ["pods", "nodes"];

fn line(kind: &str, object: &Value) -> Bytes {
    format!("{}\n", json!({ "type": kind, "object": object })).into()
}

fn is_pod(path: &str) -> bool {
    path.starts_with("/api/v1/namespaces/") && path.split('/').nth(5) == Some("pods")
}

impl World {
    fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        let known = self.objects.get(path).and_then(|old| old["metadata"]["uid"].as_str()).map(str::to_owned);
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        let uid = object["metadata"]["uid"].as_str().map(str::to_owned).or(known).unwrap_or_else(|| {
            self.uids += 1;
            format!("00000000-0000-4000-8000-{:012}", self.uids)
        });
        object["metadata"]["uid"] = uid.into();
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if object["metadata"]["creationTimestamp"].is_null() {
            object["metadata"]["creationTimestamp"] = jiff::Timestamp::now().to_string().into();
        }
        if path.starts_with("/api/v1/nodes/") && object["spec"]["podCIDR"].is_null() {
            object["spec"]["podCIDR"] = POD_CIDR.into();
            object["spec"]["podCIDRs"] = json!([POD_CIDR]);
        }
        if is_pod(path) {
            self.history.push((self.version, kind, object.clone()));
        }
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    fn remove(&mut self, path: &str) {
        let Some(mut object) = self.objects.remove(path) else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if is_pod(path) {
            self.history.push((self.version, "DELETED", object));
        }
    }

    fn list(&self, path: &str) -> Response<Body> {
        let inside = |key: &str| match path {
            "/api/v1/pods" => is_pod(key),
            _ => key.strip_prefix(path).is_some_and(|rest| rest.starts_with('/')),
        };
        let items: Vec<_> = self.objects.iter().filter(|(key, _)| inside(key)).map(|(_, v)| v).collect();
        let list = json!({ "kind": "List", "apiVersion": "v1", "items": items,
            "metadata": { "resourceVersion": self.version.to_string() } });
        reply(StatusCode::OK, &list)
    }

    fn create(&mut self, ca: &Ca, path: &str, mut sent: Value) -> Response<Body> {
        match path.rsplit('/').next() {
            Some("tokenreviews") => {
                let token = sent["spec"]["token"].as_str().unwrap_or_default();
                sent["status"] = match self.users.get(token) {
                    Some(user) => {
                        json!({ "authenticated": true, "user": { "username": user, "groups": ["g"] } })
                    }
                    None => json!({ "authenticated": false, "error": "invalid bearer token" }),
                };
                return reply(StatusCode::CREATED, &sent);
            }
            Some("subjectaccessreviews") => {
                let spec = &sent["spec"];
                let asked = format!(
                    "{} {} {}",
                    spec["user"].as_str().unwrap_or_default(),
                    spec["resourceAttributes"]["verb"].as_str().unwrap_or_default(),
                    spec["resourceAttributes"]["subresource"].as_str().unwrap_or_default()
                );
                let allowed = self.allowed.contains(&asked);
                sent["status"] = json!({ "allowed": allowed });
                return reply(StatusCode::CREATED, &sent);
            }
            _ => {}
        }
        if sent["metadata"]["name"].is_null() {
            let prefix = sent["metadata"]["generateName"].as_str().unwrap_or("x-").to_owned();
            self.uids += 1;
            sent["metadata"]["name"] = format!("{prefix}{}", self.uids).into();
        }
        let name = format!("{path}/{}", sent["metadata"]["name"].as_str().unwrap_or_default());
        if self.objects.contains_key(&name) {
            return failure(StatusCode::CONFLICT, "already exists");
        }
        if path.ends_with("/certificatesigningrequests") {
            sent["status"] = json!({ "certificate": self.sign(ca, &sent) });
        }
        let stored = self.put(&name, sent);
        reply(StatusCode::CREATED, &stored)
    }

    fn sign(&self, ca: &Ca, request: &Value) -> String {
        let pem = BASE64_STANDARD.decode(request["spec"]["request"].as_str().unwrap_or_default());
        let pem = String::from_utf8(pem.expect("base64")).expect("PEM");
        let mut csr = CertificateSigningRequestParams::from_pem(&pem).expect("a CSR");
        let client = request["spec"]["signerName"] == "kubernetes.io/kube-apiserver-client-kubelet";
        let life = self.client_life.filter(|_| client).unwrap_or(YEAR);
        lasts(&mut csr.params, life);
        csr.params.extended_key_usages = vec![if client {
            ExtendedKeyUsagePurpose::ClientAuth
        } else {
            ExtendedKeyUsagePurpose::ServerAuth
        }];
        BASE64_STANDARD.encode(csr.signed_by(ca).expect("signed").pem())
    }

    fn patch(&mut self, path: &str, sent: &Value) -> Response<Body> {
        let path = path.strip_suffix("/status").unwrap_or(path);
        let Some(mut object) = self.objects.get(path).cloned() else {
            return failure(StatusCode::NOT_FOUND, "not found");
        };
        if let Some(uid) = sent["metadata"]["uid"].as_str()
            && object["metadata"]["uid"] != uid
        {
            return failure(StatusCode::CONFLICT, "Precondition failed: UID in precondition differs");
        }
        merge(&mut object, sent);
        let stored = if Some(&object) == self.objects.get(path) { object } else { self.put(path, object) };
        reply(StatusCode::OK, &stored)
    }

    fn delete(&mut self, path: &str, sent: &Value) -> Response<Body> {
        let Some(object) = self.objects.get(path) else {
            return failure(StatusCode::NOT_FOUND, "not found");
        };
        if sent["preconditions"]["uid"].as_str().is_some_and(|uid| object["metadata"]["uid"] != uid) {
            return failure(StatusCode::CONFLICT, "the UID in the precondition differs");
        }
        self.remove(path);
        reply(StatusCode::OK, &json!({ "kind": "Status", "status": "Success" }))
    }
}

/// A strategic merge as far as the agent needs one: conditions by their type, `$patch: replace`, and null removes.
fn merge(into: &mut Value, from: &Value) {
    let (Some(fields), Some(changes)) = (into.as_object_mut(), from.as_object()) else {
        *into = from.clone();
        return;
    };
    for (name, change) in changes {
        match (name.as_str(), change) {
            (_, Value::Null) => drop(fields.remove(name)),
            (_, Value::Object(_)) => merge(fields.entry(name).or_insert_with(|| json!({})), change),
            ("conditions", Value::Array(changed)) => {
                let entry = fields.entry(name).or_insert_with(|| json!([]));
                let all = entry.as_array_mut().expect("a list");
                for condition in changed {
                    all.retain(|old| old["type"] != condition["type"]);
                    all.push(condition.clone());
                }
                all.sort_by_key(|condition| condition["type"].as_str().map(str::to_owned));
            }
            (_, Value::Array(items)) => {
                let plain = items.iter().filter(|item| item["$patch"].is_null()).cloned().collect();
                fields.insert(name.clone(), plain);
            }
            _ => drop(fields.insert(name.clone(), change.clone())),
        }
    }
}

fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    Some(parsed.subject().iter_common_name().next()?.as_str().ok()?.to_owned())
}

fn reply(status: StatusCode, object: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(object.to_string())).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", "application/json".parse().expect("a header"));
    response
}

fn failure(status: StatusCode, message: &str) -> Response<Body> {
    let reason = match status {
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::CONFLICT => "Conflict",
        StatusCode::GONE => "Expired",
        _ => "",
    };
    let body = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {},
        "code": status.as_u16(), "message": message, "reason": reason });
    reply(status, &body)
}
