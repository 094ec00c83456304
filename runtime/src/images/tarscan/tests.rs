//! Hostile and odd archives.

use super::*;
use proptest::prelude::*;

fn header(name: &str, kind: u8, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_mut_bytes()[156] = kind;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    header
}

fn entry(name: &str, kind: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, kind, data.len() as u64).as_bytes().to_vec();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

fn link(name: &str, kind: u8, target: &str) -> Vec<u8> {
    let mut header = header(name, kind, 0);
    header.set_link_name_literal(target).unwrap();
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn pax(records: &str) -> Vec<u8> {
    entry("pax", b'x', records.as_bytes())
}

fn end() -> Vec<u8> {
    vec![0; 2 * BLOCK]
}

/// What is passed on, or why not; fed in pieces of the given size.
fn scan_in(archive: &[u8], piece: usize, limits: Limits) -> Result<Vec<u8>, String> {
    let mut scanner = Scanner::new(limits);
    let mut passed = Vec::new();
    for piece in archive.chunks(piece) {
        scanner.feed(piece, |bytes| {
            passed.extend_from_slice(bytes);
            Ok(())
        })?;
    }
    passed.extend_from_slice(scanner.finish()?);
    Ok(passed)
}

fn scan(archive: &[u8]) -> Result<Vec<u8>, String> {
    scan_in(archive, 1000, Limits::default())
}

fn refused(archive: Vec<u8>, why: &str) {
    let message = scan(&[archive, end()].concat()).unwrap_err();
    assert!(message.contains(why), "{message} does not say '{why}'");
}

#[test]
fn ordinary_archives_pass_unchanged() {
    let mut builder = tar::Builder::new(Vec::new());
    let long = format!("{}/file", "d".repeat(150));
    let long_directory = format!("{}/", "d".repeat(150));
    for (name, size) in [
        ("./", 0),
        ("etc/", 0),
        (long_directory.as_str(), 0),
        ("etc/passwd", 700),
        (long.as_str(), 512),
        ("empty", 0),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(size as u64);
        header.set_mode(0o644);
        header.set_entry_type(if name.ends_with('/') {
            tar::EntryType::Directory
        } else {
            tar::EntryType::Regular
        });
        builder.append_data(&mut header, name, vec![7; size].as_slice()).unwrap();
    }
    let archive = builder.into_inner().unwrap();
    for piece in [1, 511, 512, 513, 100_000] {
        assert!(scan_in(&archive, piece, Limits::default()).unwrap() == archive, "in pieces of {piece}");
    }
}

/// Names and kinds of the entries that are passed on.
fn names(archive: &[u8]) -> Vec<(String, u8, u32)> {
    let passed = scan(archive).unwrap();
    let mut archive = tar::Archive::new(passed.as_slice());
    let entries = archive.entries().unwrap().map(|entry| {
        let entry = entry.unwrap();
        let header = entry.header();
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        (name, header.entry_type().as_byte(), header.mode().unwrap())
    });
    entries.collect()
}

#[test]
fn implied_directories_and_the_oldest_files_are_put_right() {
    let deep = format!("{}/{}/x", "a".repeat(80), "b".repeat(80));
    let long = entry("l", b'L', deep.as_bytes());
    let archive =
        [entry("usr/bin/tool", 0, b"x"), entry("usr/bin/", 0, b""), long, entry("short", b'7', b"")].concat();
    let directory = |name: &str| (name.to_owned(), b'5', 0o755);
    let file = |name: &str| (name.to_owned(), b'0', 0o644);
    let (first, second) = ("a".repeat(80) + "/", format!("{}/{}/", "a".repeat(80), "b".repeat(80)));
    assert_eq!(
        names(&archive),
        [
            directory("./"),
            directory("usr/"),
            directory("usr/bin/"),
            file("usr/bin/tool"),
            ("usr/bin/".to_owned(), b'5', 0o644),
            directory(&first),
            directory(&second),
            file(&deep)
        ]
    );
    refused([link("lib", b'2', "usr/lib"), entry("lib/x", b'0', b"")].concat(), "which is no directory");
    refused([entry("f", b'0', b""), entry("./f//x", b'0', b"")].concat(), "which is no directory");
}

#[test]
fn an_archive_may_lack_its_end_or_have_more_after_it() {
    let file = [entry("./", b'5', b""), entry("a", b'0', b"x")].concat();
    assert_eq!(scan(&file).unwrap(), [file.clone(), end()].concat());
    let more = [file.clone(), end(), b"trailing rubbish".to_vec()].concat();
    assert_eq!(scan(&more).unwrap(), [file.clone(), end()].concat());
    assert!(scan(&file[..1100]).is_err(), "cut in the data");
    assert!(scan(&file[..600]).is_err(), "cut in the header");
    assert!(scan(&[pax("11 path=ab\n")].concat()).is_err(), "a pax header for nothing");
}

#[test]
fn paths_that_lead_out_are_refused() {
    refused(entry("../x", b'0', b""), "leads out");
    refused(entry("a/../../x", b'0', b""), "leads out");
    refused(entry("a/..", b'5', b""), "leads out");
    refused([pax("16 path=../evil\n"[..].into()), entry("ok", b'0', b"")].concat(), "leads out");
    refused([entry("l", b'L', b"../../etc/shadow\0"), entry("ok", b'0', b"")].concat(), "leads out");
    refused(link("a", b'1', "../../etc/shadow"), "leads out");
    refused([entry("k", b'K', b"../etc/shadow\0"), link("a", b'1', "ok")].concat(), "leads out");
    refused(pax(&long_name()), "after an extension header");
}

fn long_name() -> String {
    let value = "n".repeat(300);
    let length = " path=\n".len() + value.len() + 3;
    format!("{length} path={value}\n")
}

#[test]
fn symbolic_links_may_point_anywhere() {
    assert!(scan(&[link("a", b'2', "../../../etc"), link("b", b'2', "/etc"), end()].concat()).is_ok());
    refused(link("a", b'2', ""), "odd target");
}

#[test]
fn what_no_image_has_is_refused() {
    refused(entry("a", b'S', b""), "of kind 83");
    refused(entry("a", b'V', b""), "of kind 86");
    refused(entry("", b'0', b""), "has no name");
    refused([pax(&long_name()), entry("a", b'0', b"")].concat(), "too long");
    refused([pax("22 GNU.sparse.major=1\n"), entry("a", b'0', b"")].concat(), "sparse");
    refused(entry("g", b'g', b"11 path=ab\n"), "global");
    refused(pax("99 path=x\n"), "does not add up");
    refused(pax("x path=x\n"), "does not add up");
    refused([vec![0; BLOCK], entry("a", b'0', b"")].concat(), "after a zero block");
    refused(vec![b'x'; BLOCK], "checksum");
    let mut linked = header("a", b'1', 5);
    linked.set_link_name("b").unwrap();
    linked.set_cksum();
    refused([linked.as_bytes().to_vec(), vec![1; BLOCK]].concat(), "data of its own");
}

#[test]
fn bombs_are_refused() {
    let mut huge = header("a", b'0', 0);
    huge.as_gnu_mut().unwrap().size = [0xff; 12];
    huge.set_cksum();
    refused(huge.as_bytes().to_vec(), "odd size");
    refused(header("a", b'0', 1 << 40).as_bytes().to_vec(), "bytes");
    refused(header("x", b'x', 2 << 20).as_bytes().to_vec(), "extension header");
    let limits = Limits { bytes: 10_000, entries: 3, ..Limits::default() };
    let many =
        [entry("a", b'0', b""), entry("b", b'0', b""), entry("c", b'0', b""), entry("d", b'0', b"")].concat();
    assert!(scan_in(&many, 512, limits).unwrap_err().contains("more than 3 entries"));
    let large = entry("a", b'0', &[0; 20_000]);
    assert!(scan_in(&large, 512, limits).unwrap_err().contains("20000 bytes"), "stated size");
    let trailing = [entry("a", b'0', b""), end(), vec![0; 20_000]].concat();
    assert!(scan_in(&trailing, 512, limits).unwrap_err().contains("10000 bytes"), "after the end");
}

proptest! {
    #[test]
    fn any_bytes_are_passed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..4096), piece in 1usize..2000) {
        // Never a panic, and never more than came in, the end mark aside.
        if let Ok(passed) = scan_in(&bytes, piece, Limits::default()) {
            // Implied directories come on top.
            prop_assert!(passed.len() <= bytes.len() * 10 + 4 * BLOCK);
        }
    }

    #[test]
    fn damaged_archives_never_pass_a_bad_path(at in 0usize..2048, value in any::<u8>()) {
        let mut archive = [pax("14 path=a/b/c\n"), entry("x", b'0', &[1; 700]), link("y", b'1', "x"), end()].concat();
        let at = at % archive.len();
        archive[at] = value;
        if let Ok(passed) = scan(&archive) {
            prop_assert!(passed.len() >= BLOCK);
        }
    }
}
