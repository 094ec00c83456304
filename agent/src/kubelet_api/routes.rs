//! From a path and its query to what is asked for. Query names are the kubelet's.

use super::access::Attempt;
use super::logs::LogOptions;
use super::streams::{self, Wanted};
use super::{Api, Body, Refusal, find, logs, text, whole};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};

/// Decoded query, in order. It is bounded with the whole URI, by the HTTP parser.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Self {
        Self(text.split('&').filter(|pair| !pair.is_empty()).map(decode_pair).collect())
    }

    pub(super) fn one(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.clone()).collect()
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        self.one(name).is_some_and(|value| value == "1" || value == "true")
    }
}

fn decode_pair(pair: &str) -> (String, String) {
    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
    (decode(key), decode(value))
}

/// `application/x-www-form-urlencoded`; bytes that are not UTF-8 become U+FFFD.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match (bytes[at], escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The decoded parts of a path: what is allowed and what is done both go by them.
fn parts(path: &str) -> Vec<String> {
    path.trim_matches('/').split('/').map(decode).collect()
}

/// What a request tries to do.
pub(super) fn attempt<B>(request: &Request<B>) -> Attempt {
    let parts = parts(request.uri().path());
    Attempt::of(request.method(), parts.first().map(String::as_str).unwrap_or_default())
}

/// Does what is asked for; the caller may.
pub(super) async fn route(api: &Api, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
    let path = request.uri().path().to_owned();
    let parts = parts(&path);
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let looks = *request.method() == Method::GET || *request.method() == Method::HEAD;
    match parts[..] {
        ["healthz"] | ["healthz", "ping"] if looks => Ok(text(StatusCode::OK, "ok")),
        ["pods"] if looks => Ok(pods(api)),
        ["containerLogs", namespace, pod, container] if looks => {
            let pod = find::pod(api, namespace, pod)?;
            logs::serve(api, &pod, container, &LogOptions::parse(&query)?).await
        }
        ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container] => {
            let pod = find::pod(api, namespace, pod)?;
            let wanted = Wanted::exec(find::running(api, &pod, container).await?, &query)?;
            streams::serve(api, request, wanted).await
        }
        ["attach", namespace, pod, container] | ["attach", namespace, pod, _, container] => {
            let pod = find::pod(api, namespace, pod)?;
            let wanted = Wanted::attach(find::running(api, &pod, container).await?, &query)?;
            streams::serve(api, request, wanted).await
        }
        ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
            let pod = find::pod(api, namespace, pod)?;
            let wanted = Wanted::port_forward(find::sandbox(api, &pod).await?, &query)?;
            streams::serve(api, request, wanted).await
        }
        _ => Err(Refusal::new(
            StatusCode::NOT_FOUND,
            format!(
                "{path} is not here: this node serves healthz, pods, containerLogs, exec, attach and portForward"
            ),
        )),
    }
}

/// Every pod of this node as a PodList.
fn pods(api: &Api) -> Response<Body> {
    let pods = api.shared.pods.borrow().clone();
    let items: Vec<_> = pods.iter().map(|pod| pod.as_ref()).collect();
    let list = serde_json::json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items });
    let mut response = Response::new(whole(list.to_string()));
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn queries_are_decoded_in_order() {
        let query = Query::parse("command=sh&command=-c&command=echo+%22a%26b%22&input=1");
        assert_eq!(query.all("command"), ["sh", "-c", "echo \"a&b\""]);
        assert!(query.flag("input") && !query.flag("tty"));
    }

    /// Paths as a caller would try them: known names, escaped or not, with slashes and dots in odd places.
    fn paths() -> impl Strategy<Value = String> {
        let known = prop::sample::select(vec![
            "exec",
            "attach",
            "portForward",
            "containerLogs",
            "pods",
            "healthz",
            "stats",
            "metrics",
            "logs",
            "run",
            "..",
            ".",
            "",
            "%2e%2e",
            "%65xec",
            "exec%2f",
            "%2fexec",
            "EXEC",
            "exec;x",
            "ns",
            "pod",
        ]);
        let part = prop_oneof![4 => known.prop_map(str::to_owned), 1 => "[!-~]{0,8}"];
        prop::collection::vec(part, 0..7).prop_map(|parts| format!("/{}", parts.join("/")))
    }

    proptest! {
        #[test]
        fn decoding_never_panics(text in ".*") {
            let _ = decode(&text);
        }

        #[test]
        fn any_query_is_read_or_refused_with_400(text in "([a-zA-Z]{0,12}(=[!-~]{0,12})?&?){0,6}", known in prop::sample::select(vec![
            "sinceTime", "sinceSeconds", "tailLines", "limitBytes", "stream", "follow",
        ]), value in ".{0,24}") {
            let escaped: String = value.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let query = Query::parse(&format!("{text}&{known}={escaped}"));
            if let Err(refusal) = LogOptions::parse(&query) {
                prop_assert_eq!(refusal.status, StatusCode::BAD_REQUEST);
            }
            let streams = [Wanted::exec("id".into(), &query), Wanted::attach("id".into(), &query),
                Wanted::port_forward("id".into(), &query)];
            for refusal in streams.into_iter().filter_map(Result::err) {
                prop_assert_eq!(refusal.status, StatusCode::BAD_REQUEST);
            }
        }

        /// What the API server is asked about is what is done: no spelling of a path turns one into the other.
        #[test]
        fn no_spelling_of_a_path_acts_with_the_right_to_look(path in paths(), post in any::<bool>()) {
            let Ok(uri) = path.parse::<http::Uri>() else { return Ok(()) };
            let method = if post { Method::POST } else { Method::GET };
            let request = Request::builder().method(method).uri(uri).body(()).unwrap();
            let asked = attempt(&request);
            let parts = parts(request.uri().path());
            if matches!(parts[0].as_str(), "exec" | "attach" | "portForward") {
                prop_assert_eq!(asked, Attempt { verb: "create", subresources: &["proxy"] });
            } else if parts[0] == "containerLogs" {
                prop_assert_eq!(asked.subresources, &["proxy"][..]);
            }
        }
    }
}
