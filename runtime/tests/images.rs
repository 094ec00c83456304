//! Pulls from a real registry, and from ones that misbehave.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(dead_code, reason = "the module is shared with tests that use all of it")]

mod registry;

use atoll_runtime::images::{Auth, Digest, ImageError, ImageRef, ImageStore, StoreOptions};
use registry::{Family, Packing, Registry, Settings, TestImage, layer, options};
use std::path::Path;
use std::process::Command;

const PASSWORD: &str = "secret";
/// bcrypt of [`PASSWORD`].
const HTPASSWD: &str = "tester:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

fn plain(options: &StoreOptions, registry: &Registry) {
    let settings = serde_json::json!({"registries": {&registry.address: {"plain_http": true}}});
    std::fs::write(&options.registries, settings.to_string()).unwrap();
}

fn reference(registry: &Registry, rest: &str) -> ImageRef {
    format!("{}/{rest}", registry.address).parse().unwrap()
}

fn files_below(path: &Path) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

#[tokio::test]
async fn images_of_both_families_and_every_packing() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let registry = Registry::start(dir.path(), &Settings::default());
    plain(&options, &registry);
    let base = layer(&[("etc/passwd", "root\n"), ("bin/tool", "x")]);
    let top = layer(&[("etc/.wh.passwd", ""), ("data/new", "y")]);
    let opaque = layer(&[("bin/.wh..wh..opq", ""), ("bin/other", "z")]);
    let oci = TestImage::new(
        Family::Oci,
        vec![(base.clone(), Packing::Plain), (top, Packing::Zstd), (opaque, Packing::Gzip)],
    );
    let docker = TestImage::new(Family::Docker, vec![(base, Packing::Gzip)]);
    let (digest, length) = registry.put_image("team/oci", "v1", &oci);
    registry.put_image("team/docker", "v1", &docker);
    let arm = TestImage { architecture: "arm64", ..TestImage::new(Family::Oci, vec![]) };
    let (arm, arm_length) = registry.put_image("team/oci", "arm", &arm);
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": arm.as_str(), "size": arm_length,
            "platform": {"os": "linux", "architecture": "arm64"}},
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest.as_str(), "size": length,
            "platform": {"os": "linux", "architecture": "amd64"}}]});
    let index = registry.put_manifest(
        "team/oci",
        "multi",
        "application/vnd.oci.image.index.v1+json",
        &index.to_string(),
    );

    let store = ImageStore::open(options.clone()).await.unwrap();
    let names = ["team/oci:v1", "team/docker:v1"].map(|name| reference(&registry, name));
    let (one, two) = tokio::join!(store.pull(&names[0], None), store.pull(&names[1], None));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one.0, Digest::of(oci.config().as_bytes()));
    let layers = store.layers(&one).unwrap();
    assert_eq!(layers.len(), 3);
    assert_eq!(layers[0], store.layers(&two).unwrap()[0], "shared, although packed differently");
    for layer in &layers {
        assert_eq!(layer.length % 4096, 0);
        assert_eq!(std::fs::metadata(&layer.path).unwrap().len(), layer.length);
    }
    let config = store.config(&one).unwrap();
    assert_eq!(
        (config.user.as_str(), config.env, config.cmd),
        ("web", vec!["A=1".to_owned()], vec!["/bin/sh".to_owned()])
    );

    // The index leads to the same image; by digest it has no tag.
    let by_index = reference(&registry, &format!("team/oci@{index}"));
    assert_eq!(store.pull(&by_index, None).await.unwrap(), one);
    assert_eq!(store.pull(&reference(&registry, "team/oci:multi"), None).await.unwrap(), one);
    let image = store.status(&format!("{}/team/oci@{index}", registry.address)).unwrap();
    assert_eq!(image.repo_tags.len(), 2);
    assert_eq!(image.repo_digests.len(), 2);
    assert_eq!(store.status(&one.0.hex()[..12]).unwrap().id, one);
    let wrong = store.pull(&reference(&registry, "team/oci:arm"), None).await.unwrap_err();
    assert!(matches!(wrong, ImageError::NoPlatform { .. }), "{wrong}");
    look_inside(&layers[0].path, &layers[1].path, &layers[2].path);
    assert!(store.fs_usage().unwrap().used_bytes >= image.size / 2);
    assert_eq!(files_below(&options.root.join("tmp")), 0, "nothing is left over");
}

#[tokio::test]
async fn a_missing_tag_or_repository_is_told_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let registry = Registry::start(dir.path(), &Settings::default());
    plain(&options, &registry);
    registry.put_image("team/app", "v1", &TestImage::new(Family::Oci, vec![(layer(&[]), Packing::Gzip)]));
    let store = ImageStore::open(options).await.unwrap();
    for name in ["team/app:v2", "team/none:v1"] {
        let error = store.pull(&reference(&registry, name), None).await.unwrap_err();
        assert!(matches!(error, ImageError::NotInRegistry { .. }), "{error}");
        assert!(error.to_string().contains(name) && error.to_string().contains("check the name"), "{error}");
    }
}

/// Mounts what was made.
fn look_inside(base: &Path, top: &Path, opaque: &Path) {
    let script = "set -e; mkdir -p /mnt/a /mnt/b /mnt/c; mount -t erofs -o loop,ro $0 /mnt/a; mount -t erofs -o loop,ro $1 /mnt/b; \
        mount -t erofs -o loop,ro $2 /mnt/c; stat -c '%a %u %g %Y %s' /mnt/a/etc/passwd; stat -c '%F %t %T' /mnt/b/etc/passwd; stat -c '%a %u' /mnt/a /mnt/a/etc; \
        mkdir /mnt/m; mount -t overlay -o lowerdir=/mnt/c:/mnt/b:/mnt/a none /mnt/m; cd /mnt/m; find . -type f | sort";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &format!("mount -t tmpfs t /mnt; {script}")])
        .args([base, top, opaque].map(Path::as_os_str))
        .current_dir("/")
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "root, erofs and overlayfs are needed: {errors}");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "640 33 44 1000000000 5\ncharacter special file 0 0\n755 0\n755 0\n./bin/other\n./data/new\n"
    );
}

#[tokio::test]
async fn tls_and_basic_authentication() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let open = Registry::start(dir.path(), &Settings::default());
    open.put_image(
        "private/app",
        "v1",
        &TestImage::new(Family::Oci, vec![(layer(&[("a", "1")]), Packing::Gzip)]),
    );
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(path("key.pem"), key.serialize_pem()).unwrap();
    std::fs::write(path("htpasswd"), HTPASSWD).unwrap();
    let settings =
        Settings { tls: Some((path("cert.pem"), path("key.pem"))), htpasswd: Some(path("htpasswd")) };
    let closed = Registry::start(dir.path(), &settings);
    let name = reference(&closed, "private/app:v1");
    let write = |value: serde_json::Value| {
        let text = serde_json::json!({"registries": {&closed.address: value}}).to_string();
        std::fs::write(&options.registries, text).unwrap();
    };
    let store = ImageStore::open(options.clone()).await.unwrap();
    let auth = |password: &str| Some(Auth::Basic { username: "tester".into(), password: password.into() });

    let untrusted = store.pull(&name, auth(PASSWORD)).await.unwrap_err();
    assert!(untrusted.to_string().contains("certificate"), "{untrusted}");
    write(serde_json::json!({"ca_pem": certificate.pem()}));
    for refused in [None, auth("wrong")] {
        let error = store.pull(&name, refused).await.unwrap_err();
        assert!(matches!(error, ImageError::Denied { status: 401, .. }), "{error}");
    }
    let id = store.pull(&name, auth(PASSWORD)).await.unwrap();
    store.remove(&id.to_string()).await.unwrap();
    write(serde_json::json!({"ca_pem": certificate.pem(), "username": "tester", "password": PASSWORD}));
    assert_eq!(store.pull(&name, None).await.unwrap(), id);
}

#[tokio::test]
async fn tags_move_and_layers_live_as_long_as_they_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let registry = Registry::start(dir.path(), &Settings::default());
    plain(&options, &registry);
    let shared = layer(&[("shared", "1")]);
    let image = |own: &str| {
        TestImage::new(
            Family::Oci,
            vec![(shared.clone(), Packing::Gzip), (layer(&[("own", own)]), Packing::Gzip)],
        )
    };
    let name = reference(&registry, "app:v1");
    registry.put_image("app", "v1", &image("first"));
    let store = ImageStore::open(options.clone()).await.unwrap();
    let first = store.pull(&name, None).await.unwrap();
    store.hold("sandbox-1", &first).unwrap();
    registry.put_image("app", "v1", &image("second"));
    let second = store.pull(&name, None).await.unwrap();
    assert_ne!(first, second);
    assert!(store.status(first.0.hex()).unwrap().repo_tags.is_empty(), "the tag has moved");
    assert_eq!(store.status(&name.to_string()).unwrap().id, second);

    let layers = options.root.join("layers");
    assert_eq!(files_below(&layers), 3);
    store.remove(first.0.as_str()).await.unwrap();
    assert_eq!(files_below(&layers), 3, "held by the sandbox");
    store.release("sandbox-1");
    assert_eq!(files_below(&layers), 2);
    drop(store);

    // A crash leaves rubbish of every kind.
    std::fs::write(options.root.join("tmp/blob-1-1"), "half").unwrap();
    std::fs::write(layers.join("no-such.erofs"), "orphan").unwrap();
    std::fs::write(options.root.join("images/half.partial"), "{").unwrap();
    std::fs::write(options.root.join(format!("images/{}.json", first.0.hex())), "{").unwrap();
    let store = ImageStore::open(options.clone()).await.unwrap();
    assert_eq!(store.list().len(), 1);
    assert_eq!((files_below(&layers), files_below(&options.root.join("images"))), (2, 1));
    let lost = store.layers(&second).unwrap()[1].path.clone();
    drop(store);
    std::fs::remove_file(lost).unwrap();
    let store = ImageStore::open(options.clone()).await.unwrap();
    assert!(store.list().is_empty(), "an image without one of its layers is no image");
    store.pull(&name, None).await.unwrap();
    store.remove(&name.to_string()).await.unwrap();
    assert_eq!(files_below(&layers), 0);
    store.remove(&name.to_string()).await.unwrap();
}

/// Where the child of the next test finds its store and registry.
const CHILD: &str = "ATOLL_TEST_PULLER";

/// Pulls and removes without end; only as the child of the test below.
#[tokio::test]
async fn puller() {
    let Ok(text) = std::env::var(CHILD) else { return };
    let [root, mkfs, registries, name] = text.split('|').collect::<Vec<_>>()[..] else { panic!("{text}") };
    let options = StoreOptions {
        mkfs_erofs: mkfs.into(),
        registries: registries.into(),
        helper: env!("CARGO_BIN_EXE_atoll-runtime").into(),
        helper_uid: Some(65534),
        ..StoreOptions::new(root)
    };
    let store = ImageStore::open(options).await.unwrap();
    for version in ["v1", "v2"].into_iter().cycle() {
        let name: ImageRef = format!("{name}:{version}").parse().unwrap();
        let id = store.pull(&name, None).await.unwrap();
        if version == "v2" {
            store.remove(id.0.as_str()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_store_survives_being_killed_at_any_time() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let registry = Registry::start(dir.path(), &Settings::default());
    plain(&options, &registry);
    let shared = layer(&[("shared", "1")]);
    for version in ["v1", "v2"] {
        let own = layer(&[("own", version)]);
        let image = TestImage::new(Family::Oci, vec![(shared.clone(), Packing::Gzip), (own, Packing::Zstd)]);
        registry.put_image("app", version, &image);
    }
    let paths =
        [&options.root, &options.mkfs_erofs, &options.registries].map(|path| path.display().to_string());
    let told = format!("{}|{}/app", paths.join("|"), registry.address);
    for round in 0..25u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "puller"])
            .env(CHILD, &told)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20 + round * 37 % 300));
        child.kill().unwrap();
        child.wait().unwrap();
        let store = ImageStore::open(options.clone()).await.unwrap();
        for image in store.list() {
            for layer in store.layers(&image.id).unwrap() {
                assert_eq!(std::fs::metadata(&layer.path).unwrap().len(), layer.length, "round {round}");
            }
        }
        let needed: std::collections::BTreeSet<_> = store
            .list()
            .iter()
            .flat_map(|image| store.layers(&image.id).unwrap())
            .map(|layer| layer.diff_id)
            .collect();
        assert_eq!(files_below(&options.root.join("layers")), needed.len(), "round {round}");
    }
    let store = ImageStore::open(options.clone()).await.unwrap();
    store.pull(&reference(&registry, "app:v1"), None).await.unwrap();
}
