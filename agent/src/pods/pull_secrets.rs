//! Image names and the credentials of pull secrets ◇.

use atoll_cri::v1::AuthConfig;
use atoll_spec::images::PullSecret;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
}

/// The image's name with `:latest` when it has neither tag nor digest.
///
/// # Errors
/// When it is not an image name.
pub fn with_tag(image: &str) -> Result<String, String> {
    let wrong = || "couldn't parse image name: invalid reference format".to_owned();
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    if let Some(digest) = digest {
        let (_, hex) = digest.split_once(':').ok_or_else(wrong)?;
        if hex.len() < 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
    }
    let last = name.rsplit('/').next().unwrap_or(name);
    let (repository, tag) = match last.rsplit_once(':') {
        Some((_, tag)) => (&name[..name.len() - tag.len() - 1], Some(tag)),
        None => (name, None),
    };
    let tag_byte = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if tag.is_some_and(|t| t.is_empty() || t.len() > 128 || !t.bytes().all(tag_byte)) {
        return Err(wrong());
    }
    let (host, path) = split_host(repository);
    let path_byte =
        |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-' | b'/');
    let host_byte = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']');
    let parts_ok = path.split('/').all(|p| p.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric()));
    if !parts_ok || !path.bytes().all(path_byte) || !host.is_none_or(|h| h.bytes().all(host_byte)) {
        return Err(wrong());
    }
    Ok(if tag.is_none() && digest.is_none() { format!("{image}:latest") } else { image.to_owned() })
}

fn split_host(repository: &str) -> (Option<&str>, &str) {
    match repository.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (Some(first), rest),
        _ => (None, repository),
    }
}

/// Credentials of a secret that fit an image, the most specific first.
pub fn credentials(secret: &Secret, image: &str) -> Vec<AuthConfig> {
    let data = secret.data.as_ref();
    let parsed = if let Some(json) = data.and_then(|d| d.get(".dockerconfigjson")) {
        serde_json::from_slice::<DockerConfig>(&json.0).map(|c| c.auths)
    } else if let Some(json) = data.and_then(|d| d.get(".dockercfg")) {
        serde_json::from_slice(&json.0)
    } else {
        return Vec::new();
    };
    let mut fitting: Vec<_> =
        parsed.unwrap_or_default().into_iter().filter(|(at, _)| fits(at, image)).collect();
    fitting.sort_by_key(|(at, _)| std::cmp::Reverse(at.len()));
    fitting.into_iter().map(|(at, entry)| auth(at, entry)).collect()
}

/// What the record of a pull keeps of credentials: the secret's coordinates and a hash, the same for equal credentials.
pub fn trace(secret: &Secret, auth: &AuthConfig) -> PullSecret {
    let mut hasher = Sha256::new();
    for part in [&auth.username, &auth.password, &auth.identity_token] {
        // With its length, so that no two parts can be mistaken for others.
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let meta = &secret.metadata;
    PullSecret {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        hash: hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

fn fits(at: &str, image: &str) -> bool {
    let at = at.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let at = at.trim_end_matches("/v1").trim_end_matches("/v2");
    let name = image.split('@').next().unwrap_or(image);
    let (host, path) = split_host(name);
    let (host, at) = match host {
        None | Some("docker.io" | "index.docker.io") => {
            ("docker.io", at.replace("index.docker.io", "docker.io"))
        }
        Some(host) => (host, at.to_owned()),
    };
    let (at_host, at_path) = at.split_once('/').map_or((at.as_str(), ""), |(host, path)| (host, path));
    let hosts = match at_host.strip_prefix("*.") {
        Some(parent) => {
            host.strip_suffix(parent).is_some_and(|h| h.ends_with('.') && !h[..h.len() - 1].contains('.'))
        }
        None => at_host == host,
    };
    hosts
        && path
            .strip_prefix(at_path)
            .is_some_and(|rest| at_path.is_empty() || rest.is_empty() || rest.starts_with(['/', ':']))
}

fn auth(at: String, entry: Entry) -> AuthConfig {
    let decoded = STANDARD.decode(entry.auth.trim()).ok().and_then(|b| String::from_utf8(b).ok());
    let (username, password) = match decoded.as_deref().and_then(|text| text.split_once(':')) {
        Some((user, password)) if entry.username.is_empty() => (user.to_owned(), password.to_owned()),
        _ => (entry.username, entry.password),
    };
    AuthConfig {
        username,
        password,
        server_address: at,
        identity_token: entry.identity_token,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (image, want) in [
            ("busybox", "busybox:latest"),
            ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
            ("r.example/a:v1", "r.example/a:v1"),
        ] {
            assert_eq!(with_tag(image).as_deref(), Ok(want));
        }
        let digest = format!("a@sha256:{}", "0".repeat(64));
        assert_eq!(with_tag(&digest), Ok(digest));
        for image in ["", "A", "a b", "a:", "/a", "a@sha256:x", "r.example/A"] {
            assert!(with_tag(image).is_err(), "{image}");
        }
    }

    #[test]
    fn secrets_fit_by_host_and_path() {
        let table = [
            ("r.example", "r.example/a:1", true),
            ("https://r.example/v1/", "r.example/a", true),
            ("r.example/team", "r.example/team/a", true),
            ("r.example/team", "r.example/teams/a", false),
            ("*.example", "r.example/a", true),
            ("*.example", "x.r.example/a", false),
            ("https://index.docker.io/v1/", "busybox", true),
            ("r.example", "s.example/a", false),
        ];
        for (at, image, want) in table {
            assert_eq!(fits(at, image), want, "{at} {image}");
        }
    }

    #[test]
    fn reads_both_forms() {
        let json = r#"{"auths": {"r.example": {"auth": "dTpw"}, "r.example/a": {"username": "x", "password": "y"}}}"#;
        let data = [(".dockerconfigjson".to_owned(), k8s_openapi::ByteString(json.into()))].into();
        let secret = Secret { data: Some(data), ..Default::default() };
        let found: Vec<_> =
            credentials(&secret, "r.example/a:1").into_iter().map(|a| (a.username, a.password)).collect();
        assert_eq!(found, [("x".to_owned(), "y".to_owned()), ("u".to_owned(), "p".to_owned())]);
    }
}
