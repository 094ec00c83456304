//! A scripted control plane: what the agent needs of an API server, over real TLS, with every fault that a test asks
//! for. It signs certificates, keeps objects, lets pods be watched, and notes each request with its time.
//!
//! Used by the agent's own tests, and by the bench inside the booted host, where the real one would take the processor
//! from what is measured. Whatever is asked of it that no agent asks is a defect of the caller: it panics.

mod authority;
mod world;

pub use crate::authority::{Ca, Life, YEAR, authority, authority_of, client_certificate, pin};
pub use crate::world::Change;

use crate::authority::{common_name, server_tls};
use crate::world::{COLLECTIONS, Fault, World, failure, reply};

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// The bootstrap token that it takes.
pub const TOKEN: &str = "abcdef.0123456789abcdef";
/// What its nodes get for their pods.
pub const POD_CIDR: &str = "10.244.7.0/24";

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// When.
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

impl Cluster {
    /// Serves on a free port of loopback, with a new authority and nothing in it.
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0", authority("kubernetes")).await
    }

    /// Serves with this authority on this address of loopback.
    pub async fn start_at(address: &str, ca: Arc<Ca>) -> Self {
        let listener = TcpListener::bind(address).await.expect("a port");
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

    /// Where it is reached.
    pub fn url(&self) -> String {
        format!("https://{}", self.0.address)
    }

    /// Its authority.
    pub fn ca(&self) -> &Ca {
        &self.0.ca
    }

    /// Pin of its CA.
    pub fn pin(&self) -> String {
        pin(&self.0.ca)
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

    /// No more faults.
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

    /// How many requests since `from` begin with this text.
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
        self.changes(path).into_iter().map(|change| change.object).collect()
    }

    /// The same, each with its time.
    pub fn changes(&self, path: &str) -> Vec<Change> {
        let name = path.rsplit('/').next();
        let of = |change: &&Change| change.object["metadata"]["name"].as_str() == name;
        self.world().history.iter().filter(of).cloned().collect()
    }

    /// Waits until `look` has something; it is asked anew after each change. `None` at the deadline.
    pub async fn wait<T>(&self, deadline: Duration, mut look: impl FnMut(&Self) -> Option<T>) -> Option<T> {
        let mut changed = self.0.changed.subscribe();
        let found = async {
            loop {
                changed.borrow_and_update();
                if let Some(found) = look(self) {
                    return Some(found);
                }
                changed.changed().await.ok()?;
            }
        };
        tokio::time::timeout(deadline, found).await.ok().flatten()
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
        // As the real one: otherwise each answer of two packets waits 40 ms for the other side's acknowledgement.
        let _ = stream.set_nodelay(true);
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
                    let newer = |change: &&Change| change.version > last;
                    let news: Vec<_> = world.history.iter().filter(newer).cloned().collect();
                    (news, last < world.compacted)
                };
                if gone {
                    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
                        "reason": "Expired", "message": "too old resource version", "metadata": {}});
                    let _ = sender.send(line("ERROR", &status)).await;
                    return;
                }
                for change in news {
                    last = change.version;
                    if sender.send(line(change.kind, &change.object)).await.is_err() {
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

fn line(kind: &str, object: &Value) -> Bytes {
    format!("{}\n", json!({ "type": kind, "object": object })).into()
}
