//! Fuzz targets of what the runtime sends: requests, packets of a stream, trees.
//!
//! The guest trusts its runtime more than the other way round, but a runtime of another release, or a broken one, must
//! get an answer and not end the pod. Called by the tests below (the corpus and a second of mutations) and by
//! `fuzz/targets` (hours).

use crate::stdio::next_packet;
use crate::transport::read_frame;
use crate::{rpc, tree};
use atoll_spec::guest::{MAX_FRAME, Request};
use std::path::{Path, PathBuf};

/// A control connection's bytes: each frame is a request, or an answer that says why not, or nothing.
pub fn requests(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some(frame)) = read_frame(&mut rest) {
        assert!(frame.len() <= MAX_FRAME);
        match serde_json::from_slice::<Request>(&frame) {
            Ok(request) => {
                // What was understood can be said again.
                let text = serde_json::to_vec(&request).expect("a request can be written");
                assert_eq!(serde_json::from_slice::<Request>(&text).expect("and read"), request);
            }
            Err(error) => drop(rpc::not_understood(&frame, &error)),
        }
    }
    let mut rest = data;
    while let Some((_, payload, after)) = next_packet(rest) {
        assert!(payload.len() + after.len() < rest.len());
        rest = after;
    }
}

/// An archive of a tree: unpacked, or refused, and nothing beside the directory is touched.
pub fn trees(data: &[u8]) {
    let top = Directory::new();
    let inner = top.0.join("a/b/tree");
    std::fs::create_dir_all(&inner).expect("a directory can be made");
    let _ = tree::unpack(data, &inner);
    let names = |path: &Path| -> Vec<_> {
        let list = std::fs::read_dir(path).expect("the directory is there");
        list.flatten().map(|entry| entry.file_name()).collect()
    };
    assert_eq!(
        (names(&top.0), names(&top.0.join("a")), names(&top.0.join("a/b"))),
        (vec!["a".into()], vec!["b".into()], vec!["tree".into()])
    );
}

/// A directory in memory, gone with this value.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = PathBuf::from(format!("/dev/shm/atoll-fuzz-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("a directory can be made");
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // An archive may have taken rights away that even root misses on some file systems; memory is not one.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::write_frame;
    use atoll_fuzz::replay;
    use atoll_spec::guest::Call;

    fn calls() -> Vec<Call> {
        let container = || "c1".parse().unwrap();
        vec![
            Call::StartContainer { container: container() },
            Call::SignalContainer { container: container(), signal: 9, all: true },
            Call::RemoveContainer { container: container() },
            Call::OpenStdio { container: container(), stream: 7 },
            Call::UpdateLimits { container: container(), limits: Default::default() },
            Call::KillExec { exec: "e1".parse().unwrap() },
            Call::PublishTree { tree: "t".into(), stream: 8 },
            Call::ReadFile { container: container(), target: "/x".into() },
            Call::Stats,
            Call::List,
            Call::AckEvents { sequence: 3 },
            Call::PowerOff,
        ]
    }

    #[test]
    fn requests_are_understood_or_answered() {
        let mut seeds = Vec::new();
        for (id, call) in (1..).zip(calls()) {
            let mut wire = Vec::new();
            write_frame(&mut wire, &Request { id, call }).unwrap();
            seeds.push(wire);
        }
        seeds.push(seeds.concat());
        let mut newer = Vec::new();
        write_frame(&mut newer, &serde_json::json!({"id": 5, "call": {"call": "dance"}})).unwrap();
        seeds.push(newer);
        seeds.push(vec![0, 3, 0, 0, 0, b'a', b'b', b'c', 3, 4, 0, 0, 0, 80, 0, 24, 0]);
        replay("guest_requests", seeds, requests);
    }

    fn entry(name: &str, kind: u8, link: &str, data: &[u8]) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[156] = kind;
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_link_name_literal(link).unwrap();
        header.set_cksum();
        let mut bytes = [header.as_bytes(), data].concat();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    #[test]
    fn trees_stay_in_their_directory() {
        let seeds = vec![
            [
                entry("./", b'5', "", b""),
                entry("..2026/", b'5', "", b""),
                entry("..2026/key", b'0', "", b"value"),
                entry("..data", b'2', "..2026", b""),
                entry("key", b'2', "..data/key", b""),
                vec![0; 1024],
            ]
            .concat(),
            [entry("up", b'2', "../..", b""), entry("up/escaped", b'0', "", b"x"), vec![0; 1024]].concat(),
            [entry("../../x", b'0', "", b"x"), vec![0; 1024]].concat(),
            [entry("h", b'1', "../../../../etc/passwd", b""), entry("d", b'3', "", b""), vec![0; 1024]]
                .concat(),
            [entry("x", b'x', "", b"14 path=../../x\n"), entry("a", b'0', "", b"x"), vec![0; 1024]].concat(),
        ];
        replay("guest_trees", seeds, trees);
    }
}
