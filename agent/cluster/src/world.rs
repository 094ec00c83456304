//! The objects of the scripted control plane and what requests do to them.

use crate::authority::{Ca, Life, YEAR, lasts};
use crate::{Body, POD_CIDR, Seen};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use rcgen::{CertificateSigningRequestParams, ExtendedKeyUsagePurpose};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Instant;

/// A fault that befalls requests whose `METHOD path` begins with a text.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) requests: String,
    pub(crate) status: u16,
    pub(crate) retry_after: Option<u64>,
    pub(crate) left: usize,
}

/// A change of a pod.
#[derive(Debug, Clone)]
pub struct Change {
    /// Resource version that it made.
    pub version: u64,
    /// What a watch calls it.
    pub kind: &'static str,
    /// The pod after it.
    pub object: Value,
    /// When it was made.
    pub at: Instant,
}

#[derive(Default)]
pub(crate) struct World {
    pub(crate) objects: BTreeMap<String, Value>,
    pub(crate) version: u64,
    pub(crate) uids: u64,
    /// What watches tell.
    pub(crate) history: Vec<Change>,
    /// Watches from before this version are told 410.
    pub(crate) compacted: u64,
    pub(crate) faults: Vec<Fault>,
    pub(crate) seen: Vec<Seen>,
    /// Users by bearer token.
    pub(crate) users: BTreeMap<String, String>,
    /// `user verb subresource` that are allowed.
    pub(crate) allowed: Vec<String>,
    pub(crate) client_life: Option<Life>,
    /// The token is known to `cluster-info`, and lets callers in.
    pub(crate) token_listed: bool,
    pub(crate) token_good: bool,
}

pub(crate) const COLLECTIONS: [&str; 2] = ["pods", "nodes"];

fn is_pod(path: &str) -> bool {
    path.starts_with("/api/v1/namespaces/") && path.split('/').nth(5) == Some("pods")
}

impl World {
    pub(crate) fn put(&mut self, path: &str, mut object: Value) -> Value {
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
            self.note(kind, object.clone());
        }
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    pub(crate) fn remove(&mut self, path: &str) {
        let Some(mut object) = self.objects.remove(path) else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if is_pod(path) {
            self.note("DELETED", object);
        }
    }

    fn note(&mut self, kind: &'static str, object: Value) {
        self.history.push(Change { version: self.version, kind, object, at: Instant::now() });
    }

    pub(crate) fn list(&self, path: &str) -> Response<Body> {
        let inside = |key: &str| match path {
            "/api/v1/pods" => is_pod(key),
            _ => key.strip_prefix(path).is_some_and(|rest| rest.starts_with('/')),
        };
        let items: Vec<_> = self.objects.iter().filter(|(key, _)| inside(key)).map(|(_, v)| v).collect();
        let list = json!({ "kind": "List", "apiVersion": "v1", "items": items,
            "metadata": { "resourceVersion": self.version.to_string() } });
        reply(StatusCode::OK, &list)
    }

    pub(crate) fn create(&mut self, ca: &Ca, path: &str, mut sent: Value) -> Response<Body> {
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

    pub(crate) fn patch(&mut self, path: &str, sent: &Value) -> Response<Body> {
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

    pub(crate) fn delete(&mut self, path: &str, sent: &Value) -> Response<Body> {
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

pub(crate) fn reply(status: StatusCode, object: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(object.to_string())).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", "application/json".parse().expect("a header"));
    response
}

pub(crate) fn failure(status: StatusCode, message: &str) -> Response<Body> {
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
