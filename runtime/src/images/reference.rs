//! Image references: `[host[:port]/]path[:tag][@digest]`, normalised as users expect from other runtimes. ◇
//!
//! Pure. `busybox` means `docker.io/library/busybox:latest`; the normalised text is what CRI clients see as a
//! repo tag and what a second pull of the same image is recognised by.

use super::digest::Digest;
use super::error::ImageError;
use std::fmt;
use std::str::FromStr;

const DEFAULT_HOST: &str = "docker.io";
const DEFAULT_NAMESPACE: &str = "library/";
const DEFAULT_TAG: &str = "latest";
const MAX_LEN: usize = 512;
const MAX_TAG: usize = 128;
const MAX_PATH: usize = 255;

/// A normalised reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageRef {
    host: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl ImageRef {
    /// `host` or `host:port` as in the name; credentials and settings are found by it.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Where requests go: the host, except for Docker Hub whose registry has another name.
    pub fn endpoint(&self) -> &str {
        if self.host == DEFAULT_HOST { "registry-1.docker.io" } else { &self.host }
    }

    /// Repository on the host.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The digest, when the reference has one; it wins over the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What to ask the registry for: the digest or the tag.
    pub fn wanted(&self) -> &str {
        match &self.digest {
            Some(digest) => digest.as_str(),
            None => self.tag.as_deref().unwrap_or(DEFAULT_TAG),
        }
    }

    /// `host/path`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.host, self.path)
    }

    /// `host/path:tag`, unless the reference has only a digest.
    pub fn repo_tag(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}/{}:{tag}", self.host, self.path))
    }

    /// `host/path@digest` for the digest that the manifest turned out to have.
    pub fn repo_digest(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.host, self.path)
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for ImageRef {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        parse(text).map_err(|why| ImageError::Reference { text: text.chars().take(200).collect(), why })
    }
}

fn parse(text: &str) -> Result<ImageRef, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > MAX_LEN {
        return Err("it is longer than 512 bytes");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (
            rest,
            Some(digest.parse::<Digest>().map_err(|_| "its digest is not sha256 and 64 hexadecimal digits")?),
        ),
        None => (text, None),
    };
    // A colon after the last slash starts the tag; one before it belongs to the port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    let (host, path) = split_host(name);
    check_host(host)?;
    check_path(&path)?;
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, Some(_)) => None,
        (None, None) => Some(DEFAULT_TAG.to_owned()),
    };
    Ok(ImageRef { host: host.to_owned(), path, tag, digest })
}

/// The first part is a host when it could not be a path: it has a dot or a port, or is `localhost`.
fn split_host(name: &str) -> (&str, String) {
    let (host, path) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
        _ => (DEFAULT_HOST, name),
    };
    let host = if host == "index.docker.io" { DEFAULT_HOST } else { host };
    if host == DEFAULT_HOST && !path.contains('/') {
        (host, format!("{DEFAULT_NAMESPACE}{path}"))
    } else {
        (host, path.to_owned())
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or("its IPv6 address has no closing bracket")?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| "its host is not an IPv6 address")?;
            (
                "",
                if after.is_empty() {
                    None
                } else {
                    Some(after.strip_prefix(':').ok_or("its port is not a number")?)
                },
            )
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    if let Some(port) = port
        && (port.parse::<u16>().is_err() || !port.bytes().all(|b| b.is_ascii_digit()))
    {
        return Err("its port is not a number from 0 to 65535");
    }
    if host.starts_with('[') {
        return Ok(());
    }
    let label_ok = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if name.split('.').all(label_ok) { Ok(()) } else { Err("its host is not a host name") }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.len() > MAX_PATH {
        return Err("its repository is longer than 255 bytes");
    }
    if path.split('/').all(path_part_ok) {
        Ok(())
    } else {
        Err(
            "its repository may have only a-z, 0-9 and '.', '_', '__' or dashes between them, separated by '/'",
        )
    }
}

/// Runs of a-z and 0-9, joined by one dot, one or two underscores, or any number of dashes.
fn path_part_ok(part: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    if !bytes.first().is_some_and(alphanumeric) || !bytes.last().is_some_and(alphanumeric) {
        return false;
    }
    bytes
        .split(alphanumeric)
        .filter(|separator| !separator.is_empty())
        .all(|separator| matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-'))
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let first_ok = tag.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    let rest_ok = tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if first_ok && rest_ok && tag.len() <= MAX_TAG {
        Ok(())
    } else {
        Err(
            "its tag may have at most 128 letters, digits, '_', '.' and '-', and starts with none of the last two",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(input: &str, expect: &str) {
        assert_eq!(input.parse::<ImageRef>().unwrap().to_string(), expect, "{input}");
    }

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_completed() {
        check("busybox", "docker.io/library/busybox:latest");
        check("busybox:1.36", "docker.io/library/busybox:1.36");
        check("index.docker.io/busybox", "docker.io/library/busybox:latest");
        check("grafana/loki", "docker.io/grafana/loki:latest");
        check("localhost/x", "localhost/x:latest");
        check("localhost:5000/x", "localhost:5000/x:latest");
        check("10.0.0.1:5000/a/b__c:v1", "10.0.0.1:5000/a/b__c:v1");
        check("[fd00::1]:5000/a:v1", "[fd00::1]:5000/a:v1");
        check(&format!("busybox@{D}"), &format!("docker.io/library/busybox@{D}"));
        check(&format!("r.example/b:1@{D}"), &format!("r.example/b:1@{D}"));
    }

    #[test]
    fn what_is_asked_for() {
        let both: ImageRef = format!("r.example/b:1@{D}").parse().unwrap();
        assert_eq!(both.wanted(), D);
        assert_eq!(both.repo_tag().unwrap(), "r.example/b:1");
        let hub: ImageRef = "busybox".parse().unwrap();
        assert_eq!(
            (hub.host(), hub.endpoint(), hub.wanted()),
            ("docker.io", "registry-1.docker.io", "latest")
        );
    }

    #[test]
    fn bad_names_are_refused() {
        for bad in [
            "",
            ":",
            "@",
            "/",
            "a/",
            "UPPER",
            "a//b",
            "a..b",
            "-a",
            "a-",
            "a___b",
            "a:",
            "a:.x",
            "a@sha256:00",
            "host.x:99999/a",
            "host.x:/a",
            "ho_st.x/a",
            "a b",
            "../x",
            "r.example/../x",
            "[::1/x",
            "a@b@c",
        ] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn normal_form_is_a_fixed_point(
            host in "([a-z0-9]{1,8}\\.[a-z]{2,3}(:[1-9][0-9]{1,3})?/)?",
            path in "[a-z0-9]{1,6}([._-][a-z0-9]{1,6})?(/[a-z0-9]{1,6}){0,2}",
            tag in "(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,10})?",
            digest in proptest::bool::ANY,
        ) {
            let text = format!("{host}{path}{tag}{}", if digest { format!("@{D}") } else { String::new() });
            let once: ImageRef = text.parse().unwrap();
            let twice: ImageRef = once.to_string().parse().unwrap();
            prop_assert_eq!(&once, &twice);
            prop_assert!(once.repository().contains('/'));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".{0,80}") {
            if let Ok(reference) = text.parse::<ImageRef>() {
                prop_assert_eq!(reference.to_string().parse::<ImageRef>().unwrap(), reference);
            }
        }
    }
}
