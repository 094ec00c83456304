//! Fuzz targets of what strangers put into registries: archives, documents, challenges, and names of images.
//!
//! Called by the tests below (the corpus and a second of mutations) and by `fuzz/targets` (hours).

use super::manifest::{self, Document};
use super::reference::ImageRef;
use super::registry::auth;
use super::tarscan::{Limits, Scanner};
use super::unpacker::decompress;
use super::{Auth, Digest};
use std::io::{Cursor, Read as _};
use std::path::{Component, Path};

/// Most bytes that a layer of this target unpacks to.
const BYTES: u64 = 1 << 20;

/// A compressed layer: the first byte says in what pieces the rest is read. What the scanner lets through must be an
/// archive in which every name stays inside.
pub fn layer(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let piece = 1 + usize::from(*piece) * 5;
    let Ok(mut archive) = decompress(Cursor::new(data.to_vec())) else { return };
    let limits = Limits { bytes: BYTES, entries: 500, room: u64::MAX };
    let (mut scanner, mut passed) = (Scanner::new(limits), Vec::new());
    let mut buffer = vec![0; piece];
    loop {
        let count = match archive.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(_) => return,
        };
        let fed = scanner.feed(&buffer[..count], |bytes| {
            passed.extend_from_slice(bytes);
            Ok(())
        });
        if fed.is_err() {
            break;
        }
    }
    if let Ok(end) = scanner.finish() {
        passed.extend_from_slice(end);
    }
    stays_inside(&passed);
}

/// Reads an archive with another reader than the one that checked it.
fn stays_inside(archive: &[u8]) {
    let mut archive = tar::Archive::new(archive);
    let Ok(entries) = archive.entries() else { return };
    for entry in entries {
        // What one reader takes the other may refuse; mkfs.erofs, a third, refuses more than both.
        let Ok(entry) = entry else { return };
        let inside = |path: &Path| !path.components().any(|part| part == Component::ParentDir);
        if let Ok(path) = entry.path() {
            assert!(inside(&path), "{} leads out", path.display());
        }
        let hard = entry.header().entry_type().is_hard_link();
        if let (true, Ok(Some(target))) = (hard, entry.link_name()) {
            assert!(inside(&target), "a hard link to {} leads out", target.display());
        }
    }
}

/// An index, a manifest or an image config.
pub fn documents(data: &[u8]) {
    match manifest::parse(data, "the manifest") {
        Ok(Document::Index(index)) => drop(manifest::choose(&index, "r.example/x:1")),
        Ok(Document::Manifest(manifest)) => assert!(manifest.layers.len() <= 127),
        Err(error) => assert!(!error.is_transient(), "{error}"),
    }
    for layers in [0, 1, 3] {
        if let Ok(config) = manifest::parse_config(data, "r.example/x:1", layers) {
            assert_eq!((config.diff_ids.len(), &config.id.0), (layers, &Digest::of(data)));
        }
    }
}

/// A challenge, the request that answers it, and a token server's answer.
pub fn challenge(data: &[u8]) {
    if let Some(token) = auth::parse_token(data) {
        assert!(!token.is_empty());
        // A token that no header can carry is refused.
        let _ = auth::bearer(&token);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(challenge) = auth::parse(text) else { return };
    let basic = Auth::Basic { username: "u".into(), password: "p:ß\n".into() };
    for credentials in [None, Some(basic), Some(Auth::Identity("t&x=1".into()))] {
        if let Ok(request) = auth::token_request(&challenge, "repository:a:pull", credentials.as_ref()) {
            assert!(request.uri().to_string().bytes().all(|byte| byte.is_ascii_graphic() || byte >= 0x80));
        }
    }
}

/// A name of an image: what is taken is the same when it is written and read again, and makes a path of a URL.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(reference) = text.parse::<ImageRef>() else { return };
    let written = reference.to_string();
    assert_eq!(written.parse::<ImageRef>().ok().as_ref(), Some(&reference), "{written}");
    assert!(written.bytes().all(|byte| byte.is_ascii_graphic()), "{written}");
    let url =
        format!("https://{}/v2/{}/manifests/{}", reference.endpoint(), reference.path(), reference.wanted());
    let uri: http::Uri = url.parse().unwrap_or_else(|error| panic!("{url}: {error}"));
    assert_eq!(uri.authority().map(|authority| authority.as_str()), Some(reference.endpoint()));
    assert!(!uri.path().split('/').any(|part| part == ".." || part == "."), "{uri}");
    assert!(uri.query().is_none(), "{uri}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_fuzz::replay;
    use std::io::Write as _;

    fn entry(name: &str, kind: u8, link: &str, data: &[u8]) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[156] = kind;
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_link_name_literal(link).unwrap();
        header.set_cksum();
        let mut bytes = [header.as_bytes(), data].concat();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn archives() -> Vec<Vec<u8>> {
        let mut pieces = [
            vec![
                entry("a/b", b'0', "", b"content"),
                entry("a/c", b'2', "../x", b""),
                entry("d", b'1', "a/b", b""),
            ],
            vec![entry("x", b'x', "", b"14 path=a/b/c\n"), entry("short", b'0', "", &[7; 700])],
            vec![
                entry("l", b'L', "", &[b'n'; 200]),
                entry("k", b'K', "", b"a/b\0"),
                entry("short", b'1', "x", b""),
            ],
            vec![entry("../../etc/x", b'0', "", b"")],
            vec![entry("dev", b'3', "", b""), entry("old", 0, "", b"x"), entry("dir/", 0, "", b"")],
            vec![entry("g", b'g', "", b"11 path=ab\n"), entry("x", b'x', "", b"19 size=1234567890\n")],
            vec![entry(".wh.gone", b'0', "", b""), entry("d/.wh..wh..opq", b'0', "", b"")],
        ];
        pieces.iter_mut().for_each(|archive| archive.push(vec![0; 1024]));
        pieces.iter().map(|archive| archive.concat()).collect()
    }

    #[test]
    fn layers_pass_only_what_stays_inside() {
        let mut seeds: Vec<Vec<u8>> =
            archives().into_iter().map(|archive| [&[200][..], &archive].concat()).collect();
        let mut gzip = flate2::write::GzEncoder::new(vec![51], flate2::Compression::fast());
        gzip.write_all(&archives()[0]).unwrap();
        seeds.push(gzip.finish().unwrap());
        seeds.push([vec![255], zstd::encode_all(archives()[1].as_slice(), 1).unwrap()].concat());
        replay("image_layer", seeds, layer);
    }

    #[test]
    fn documents_are_read_or_refused() {
        let digest = Digest::of(b"1");
        let layer = format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":9}}"#
        );
        let platform = r#""platform":{"os":"linux","architecture":"amd64","variant":"v2"}"#;
        let seeds = [
            format!(
                r#"{{"schemaVersion":2,"config":{{"digest":"{digest}","size":7}},"layers":[{layer},{layer}]}}"#
            ),
            format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{digest}","size":7,{platform}}}]}}"#),
            r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(),
            format!(
                r#"{{"os":"linux","architecture":"amd64","rootfs":{{"diff_ids":["{digest}"]}},"config":{{"User":"a","Env":["A=1"],
                "Entrypoint":null,"Cmd":["x"],"WorkingDir":"/","Labels":{{"a":"b"}},"Volumes":{{"/v":{{}}}},"StopSignal":"9"}}}}"#
            ),
        ];
        replay("image_documents", seeds.map(String::into_bytes).into(), documents);
    }

    #[test]
    fn challenges_are_read_or_refused() {
        let seeds = [
            r#"Bearer realm="https://auth.example/token",service="r.example",scope="repository:a:pull""#,
            r#"Basic realm="x""#,
            r#"Bearer realm=https://auth.example/token?x=1, error="insufficient_scope""#,
            r#"{"token":"abc","expires_in":300}"#,
            r#"{"access_token":"abc"}"#,
        ];
        replay("image_challenge", seeds.map(|text| text.as_bytes().to_vec()).into(), challenge);
    }

    #[test]
    fn names_are_the_same_when_read_again() {
        let digest = Digest::of(b"1");
        let seeds = [
            "busybox".to_owned(),
            "docker.io/library/busybox:1.36".to_owned(),
            format!("registry.example:5000/team/app-x_y.z/deep:v1.0@{digest}"),
            "[::1]:5000/app".to_owned(),
            "localhost/app".to_owned(),
            "127.0.0.1:80/a/../b".to_owned(),
        ];
        replay("image_reference", seeds.map(String::into_bytes).into(), reference);
    }
}
