//! Builds the release image twice, with everything that is packed here made anew, and compares every byte; then
//! looks at the result as firmware and tools would.
//!
//! Needs the packages and the guest kernel of a build, so it is not one of the quick tests: `./just test` runs it last, or
//! `cargo test -p atoll-image --test reproducible -- --ignored`.

#![expect(clippy::unwrap_used, reason = "in a test a failure may panic")]

use atoll_image::cache::Cache;
use atoll_image::lock::{self, Lock};
use atoll_image::plan::{Facts, plan};
use atoll_image::profile::Profile;
use atoll_image::sign::{self, Signer};
use atoll_image::write::Build;
use atoll_image::{debian::Debian, gpt, program::Tools, uki};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

const RESULTS: [&str; 4] = ["atoll.efi", "atoll.raw", "atoll.spdx.json", "SHA256SUMS"];

/// A cache of its own for what the builder makes; what it only fetches or compiles is shared.
fn own_cache(root: &Path) -> Cache {
    let shared = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let shared =
        shared.unwrap_or_else(|| Path::new(&std::env::var("HOME").unwrap()).join(".cache")).join("atoll");
    fs::create_dir_all(root).unwrap();
    for kind in ["apt", "debian", "unpacked", "guest-kernel"] {
        fs::create_dir_all(shared.join(kind)).unwrap();
        symlink(shared.join(kind), root.join(kind)).unwrap();
    }
    Cache::at(root.to_path_buf()).unwrap()
}

/// Programs that stand for Atoll's: a static one is all that the builder asks for.
fn programs(dir: &Path, names: &[String]) {
    fs::create_dir_all(dir).unwrap();
    for name in names {
        fs::copy("/bin/busybox", dir.join(name)).expect("busybox-static is in qemu-test/packages.txt");
    }
}

/// What a build takes: the pinned versions, or what the mirror has in place of those that are gone.
fn lock(cache: &Cache) -> Lock {
    Debian::new(cache).effective(&Lock::parse(lock::BUILT_IN).unwrap(), false).unwrap()
}

fn build(root: &Path, bin_dir: &Path, signer: Option<&Signer>) -> PathBuf {
    let (cache, out) = (own_cache(&root.join("cache")), root.join("out"));
    let profile = Profile::load("release").unwrap();
    let lock = lock(&cache);
    let mut available = profile.binaries.clone();
    available.push(profile.guest.clone());
    programs(bin_dir, &available);
    let facts = Facts { version: "1.2.3", available: &available, signed: signer.is_some() };
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let build = Build {
        cache: &cache,
        lock: &lock,
        profile: &profile,
        version: "1.2.3",
        bin_dir,
        out: &out,
        signer,
        manifest: &manifest,
    };
    build.run(&plan(&profile, &lock, &facts).unwrap()).unwrap();
    out
}

/// The key for tests, from a cache of its own.
fn signer(root: &Path) -> Signer {
    let cache = own_cache(&root.join("keys"));
    let lock = lock(&cache);
    let libraries = Profile::load("release").unwrap().libraries;
    let names = libraries.iter().map(String::as_str).chain(["openssl"]);
    let packages: Vec<_> = names.map(|name| lock.get(name).unwrap()).collect();
    sign::test_signer(&cache, &Tools(Debian::new(&cache).merge(&packages).unwrap())).unwrap()
}

fn same(one: &Path, two: &Path) -> bool {
    Command::new("cmp").arg("--silent").arg(one).arg(two).status().unwrap().success()
}

#[test]
#[ignore = "builds two images; run with --ignored after a build"]
fn the_same_inputs_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let signer = signer(dir.path());
    let one = build(&dir.path().join("one"), &dir.path().join("bin"), Some(&signer));
    let two = build(&dir.path().join("two"), &dir.path().join("other-bin"), Some(&signer));
    for result in RESULTS {
        assert!(same(&one.join(result), &two.join(result)), "{result} differs between two builds");
    }
    looks_right(&one, dir.path());
}

/// The partition table, the ESP and the UKI, as others see them.
fn looks_right(out: &Path, work: &Path) {
    let mut disk = File::open(out.join("atoll.raw")).unwrap();
    let partitions = gpt::read(&mut disk).unwrap();
    assert_eq!(partitions.iter().map(|p| p.label.as_str()).collect::<Vec<_>>(), ["ESP", "STATE", "DATA"]);
    let esp = work.join("esp");
    let copied = Command::new("dd")
        .args(["bs=1M", "skip=1", "count=512", "conv=sparse", "status=none"])
        .arg(format!("if={}", out.join("atoll.raw").display()))
        .arg(format!("of={}", esp.display()))
        .status();
    assert!(copied.unwrap().success());
    let check = Command::new("/usr/sbin/fsck.fat").arg("-n").arg(&esp).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));

    let image = fs::read(out.join("atoll.efi")).unwrap();
    let sections = uki::sections(&image).unwrap();
    let names: Vec<&str> = sections.iter().map(|(name, _, _)| name.as_str()).collect();
    assert!(names.ends_with(&[".osrel", ".cmdline", ".uname", ".initrd", ".linux"]), "{names:?}");
    let initrd = sections.iter().find(|(name, _, _)| name == ".initrd").unwrap().2;
    assert!(initrd.starts_with(b"070701"));
}
