//! Authentication to a registry: the challenge, basic credentials, bearer tokens. ◇
//!
//! Pure: requests are built here and sent by the caller.

use crate::images::Auth;
use base64::Engine as _;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderValue, Request, Uri};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Largest answer of a token server.
pub const MAX_TOKEN: u64 = 256 * 1024;

/// One `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
pub struct Challenge {
    scheme: String,
    parameters: BTreeMap<String, String>,
}

impl Challenge {
    /// Whether it is of a scheme, given in lower case.
    pub fn is(&self, scheme: &str) -> bool {
        self.scheme == scheme
    }
}

/// Reads `Bearer realm="…",service="…"`.
pub fn parse(header: &str) -> Option<Challenge> {
    let (scheme, mut rest) = match header.trim().split_once(' ') {
        Some((scheme, rest)) => (scheme, rest),
        None => (header.trim(), ""),
    };
    if scheme.is_empty() {
        return None;
    }
    let mut parameters = BTreeMap::new();
    while let Some((name, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_at(after.find(',').unwrap_or(after.len())),
        };
        parameters.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
        rest = after.trim_start().trim_start_matches(',');
    }
    Some(Challenge { scheme: scheme.to_ascii_lowercase(), parameters })
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Header for basic credentials.
pub fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
    sensitive(&format!("Basic {pair}"))
}

/// Header for a token.
pub fn bearer(token: &str) -> Option<HeaderValue> {
    sensitive(&format!("Bearer {token}"))
}

/// Percent-encodes everything but the unreserved characters.
fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// The request for a token: GET with basic credentials, or POST to exchange an identity token.
pub fn token_request(
    challenge: &Challenge,
    scope: &str,
    credentials: Option<&Auth>,
) -> Result<Request<String>, String> {
    let realm = challenge.parameters.get("realm").ok_or("its challenge names no token server")?;
    let service = challenge.parameters.get("service").map_or("", String::as_str);
    let scope = challenge.parameters.get("scope").map_or(scope, String::as_str);
    let odd = |error: &dyn std::fmt::Display| format!("its token server '{realm}' is not usable: {error}");
    if let Some(Auth::Identity(token)) = credentials {
        let uri: Uri = realm.parse().map_err(|error: http::uri::InvalidUri| odd(&error))?;
        let form = format!(
            "grant_type=refresh_token&service={}&scope={}&client_id=atoll&refresh_token={}",
            encode(service),
            encode(scope),
            encode(token)
        );
        let request = Request::post(uri).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        return request.body(form).map_err(|error| odd(&error));
    }
    let separator = if realm.contains('?') { '&' } else { '?' };
    let uri = format!("{realm}{separator}service={}&scope={}", encode(service), encode(scope));
    let uri: Uri = uri.parse().map_err(|error: http::uri::InvalidUri| odd(&error))?;
    let mut request = Request::get(uri);
    if let Some(Auth::Basic { username, password }) = credentials {
        let value =
            basic(username, password).ok_or("its credentials hold characters that a header cannot")?;
        request = request.header(AUTHORIZATION, value);
    }
    request.body(String::new()).map_err(|error| odd(&error))
}

/// The token in a token server's answer.
pub fn parse_token(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    answer.token.or(answer.access_token).filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = r#"Bearer realm="https://auth.example/token",service="registry, the one",scope="repository:a/b:pull""#;

    #[test]
    fn challenges() {
        let challenge = parse(HEADER).unwrap();
        assert!(challenge.is("bearer"));
        assert_eq!(challenge.parameters["service"], "registry, the one");
        assert!(parse("Basic realm=simple, charset=UTF-8").unwrap().is("basic"));
        assert!(parse("").is_none());
        assert!(parse("Bearer realm=\"unclosed").is_none());
    }

    #[test]
    fn token_requests() {
        let challenge = parse(HEADER).unwrap();
        let basic = Auth::Basic { username: "u".into(), password: "p".into() };
        let request = token_request(&challenge, "ignored", Some(&basic)).unwrap();
        assert_eq!(
            request.uri(),
            "https://auth.example/token?service=registry%2C%20the%20one&scope=repository%3Aa%2Fb%3Apull"
        );
        assert_eq!(request.headers()[AUTHORIZATION], "Basic dTpw");
        let request = token_request(&challenge, "", Some(&Auth::Identity("r&1".into()))).unwrap();
        assert!(request.body().ends_with("refresh_token=r%261"), "{}", request.body());
        assert_eq!(parse_token(br#"{"access_token":"x"}"#).as_deref(), Some("x"));
        assert_eq!(parse_token(br#"{"token":""}"#), None);
    }
}
