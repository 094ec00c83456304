//! Layers of strangers, all the way: a registry, the unpack helper in its jail, mkfs.erofs, and a look at what came out.
//!
//! One test for each trick. What is refused leaves nothing in the store; what is taken is mounted and looked at.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(dead_code, reason = "the module is shared with tests that use all of it")]

mod registry;

use atoll_odd_registry::Server;
use atoll_odd_registry::entries::{device, end, entry, file, header, link, long};
use atoll_runtime::images::{Digest, ImageError, ImageStore, StoreOptions};
use registry::scripted::{documents, find, open};
use registry::{Family, Packing, TestImage, layer, options, pack};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A store with what was pulled into it.
struct Pulled {
    store: ImageStore,
    options: StoreOptions,
    /// Lowest first.
    layers: Vec<PathBuf>,
    _directory: tempfile::TempDir,
}

async fn try_pull(
    image: &TestImage,
    change: impl FnOnce(&mut StoreOptions),
) -> Result<Pulled, (ImageError, StoreOptions, tempfile::TempDir)> {
    let directory = tempfile::tempdir().unwrap();
    let mut options = options(directory.path());
    change(&mut options);
    let documents = documents(image);
    let server = Server::start(move |request| find(&documents, &request.path));
    let (store, name) = open(&options, &server).await;
    match store.pull(&name, None).await {
        Ok(id) => {
            let layers = store.layers(&id).unwrap().into_iter().map(|layer| layer.path).collect();
            Ok(Pulled { store, options, layers, _directory: directory })
        }
        Err(error) => {
            assert!(store.list().is_empty(), "{error}");
            Err((error, options, directory))
        }
    }
}

fn image_of(layers: Vec<Vec<u8>>) -> TestImage {
    TestImage::new(Family::Oci, layers.into_iter().map(|tar| (tar, Packing::Gzip)).collect())
}

async fn pull(layers: Vec<Vec<u8>>) -> Pulled {
    match try_pull(&image_of(layers), |_| ()).await {
        Ok(pulled) => pulled,
        Err((error, ..)) => panic!("{error}"),
    }
}

/// The reason for which an image is refused; the store must be as before.
async fn refused_image(image: &TestImage) -> ImageError {
    let Err((error, options, _directory)) = try_pull(image, |_| ()).await else { panic!("it was taken") };
    for directory in ["layers", "tmp", "images"] {
        let left = std::fs::read_dir(options.root.join(directory)).unwrap().count();
        assert_eq!(left, 0, "{directory} after: {error}");
    }
    error
}

async fn refused(layer: Vec<u8>) -> String {
    let error = refused_image(&image_of(vec![layer])).await;
    assert!(matches!(error, ImageError::Unpack { .. }), "{error}");
    assert!(!error.is_transient());
    let text = error.to_string();
    assert!(text.starts_with("cannot unpack layer sha256:") && !text.contains('\n'), "{text}");
    text
}

impl Pulled {
    /// Mounts the layers, stacks them at `/mnt/m` by the calls that the guest uses, and runs a script there.
    fn look(&self, script: &str) -> String {
        let mounts: Vec<String> = (0..self.layers.len())
            .map(|n| {
                format!(
                    "mkdir /mnt/{n} && mount -t erofs -o loop,ro,nodev {} /mnt/{n}",
                    self.layers[n].display()
                )
            })
            .collect();
        let lower: Vec<String> = (0..self.layers.len()).rev().map(|n| n.to_string()).collect();
        let lower = if lower.len() > 1 { lower.join(":") } else { format!("{}:empty", lower.join(":")) };
        let script = format!(
            "set -e; mount -t tmpfs t /mnt; cd /mnt; mkdir empty m; {}; mount -t overlay -o nodev,lowerdir={lower} none /mnt/m; cd /mnt/m; {script}",
            mounts.join("; ")
        );
        let output = Command::new("unshare").args(["--mount", "bash", "-c", &script]).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "root, erofs and overlayfs are needed: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[tokio::test]
async fn dot_dot_paths_are_refused() {
    for name in [&b"../../etc/x"[..], b"a/../../x", b"..", b"a/.."] {
        let why = refused([entry(name, b'0', b"x"), end()].concat()).await;
        assert!(why.contains("leads out of the image"), "{why}");
    }
}

#[tokio::test]
async fn absolute_paths_stay_inside_the_image() {
    let pulled = pull(vec![[entry(b"/etc/inside", b'0', b"x"), end()].concat()]).await;
    assert_eq!(pulled.look("find . -type f"), "./etc/inside\n");
    assert!(!Path::new("/etc/inside").exists());
}

#[tokio::test]
async fn nothing_is_written_through_a_symbolic_link() {
    for target in ["/etc", "../../../../etc", "/"] {
        let layer = [link(b"dir", b'2', target), entry(b"dir/atoll-escaped", b'0', b"x"), end()].concat();
        let why = refused(layer).await;
        assert!(why.contains("which is no directory"), "{why}");
    }
    assert!(!Path::new("/etc/atoll-escaped").exists());
}

#[tokio::test]
async fn symbolic_links_that_lead_out_are_kept_as_they_are() {
    let layer = [link(b"up", b'2', "../../../etc/passwd"), link(b"abs", b'2', "/etc/passwd"), end()].concat();
    let pulled = pull(vec![layer]).await;
    assert_eq!(pulled.look("readlink up abs"), "../../../etc/passwd\n/etc/passwd\n");
}

#[tokio::test]
async fn hard_links_out_of_the_tree_are_refused() {
    let why = refused([link(b"shadow", b'1', "../../../etc/shadow"), end()].concat()).await;
    assert!(why.contains("its hard link 'shadow'") && why.contains("leads out"), "{why}");
    // Absolute, it means a file of the image; this image has none of that name.
    refused([link(b"shadow", b'1', "/etc/shadow"), end()].concat()).await;
    // Through a symbolic link of the image to the host's directory.
    refused([link(b"dir", b'2', "/etc"), link(b"shadow", b'1', "dir/shadow"), end()].concat()).await;
}

#[tokio::test]
async fn hard_links_inside_share_one_file() {
    let layer = [entry(b"a", b'0', b"one"), link(b"b", b'1', "a"), link(b"d/c", b'1', "/b"), end()].concat();
    assert_eq!(pull(vec![layer]).await.look("stat -c %h a; test a -ef b; test a -ef d/c; cat d/c"), "3\none");
}

#[tokio::test]
async fn device_nodes_are_kept_and_cannot_be_opened() {
    let (zero, disk) = (device(b"zero", b'3', (1, 5)), device(b"disk", b'4', (254, 0)));
    let fifo = entry(b"fifo", b'6', b"");
    let layer = [zero, disk, fifo, end()].concat();
    let looked = pull(vec![layer]).await.look(
        "stat -c '%F %t:%T' zero disk fifo; head -c1 zero 2>/dev/null || echo closed; head -c1 disk 2>/dev/null || echo closed",
    );
    assert_eq!(looked, "character special file 1:5\nblock special file fe:0\nfifo 0:0\nclosed\nclosed\n");
}

#[tokio::test]
async fn setuid_files_keep_their_bits_and_their_owner() {
    let pulled = pull(vec![[file(b"su", (0o6755, 0, 7), b"x"), end()].concat()]).await;
    assert_eq!(pulled.look("stat -c '%a %u %g' su"), "6755 0 7\n");
    // The file that holds it is nobody's to run or change.
    let metadata = std::fs::metadata(&pulled.layers[0]).unwrap();
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o444, 0, 0));
}

#[tokio::test]
async fn a_path_of_4_kib_is_taken_and_a_longer_one_refused() {
    let part = [b"p".repeat(200), b"/".to_vec()].concat();
    // 20 × 201 + 75 = 4095 bytes: the longest path that a system call takes.
    let deepest = [part.repeat(20), b"f".repeat(75)].concat();
    let pulled = pull(vec![[long(&deepest, b'0', b"deep"), end()].concat()]).await;
    assert_eq!(pulled.look("find . -type f -printf '%d %s\\n'"), "21 4\n");
    let longer = [part.repeat(20), b"f".repeat(77)].concat();
    let why = refused([long(&longer, b'0', b""), end()].concat()).await;
    assert!(why.contains("too long a name"), "{why}");
}

#[tokio::test]
async fn a_name_of_4_kib_is_refused_and_one_of_255_bytes_taken() {
    let why = refused([long(&b"n".repeat(4096), b'0', b""), end()].concat()).await;
    assert!(why.contains("too long a name"), "{why}");
    let pulled = pull(vec![[long(&b"n".repeat(255), b'0', b"x"), end()].concat()]).await;
    assert_eq!(pulled.look("ls | wc -c"), "256\n");
}

#[tokio::test]
async fn names_that_are_not_utf_8_are_kept_byte_by_byte() {
    let name = b"caf\xe9-\xff\xfe\x01";
    let pulled = pull(vec![[entry(name, b'0', b"x"), end()].concat()]).await;
    let listed = pulled.look("for f in *; do printf %s \"$f\" | od -An -tx1; done");
    assert_eq!(listed.trim(), "63 61 66 e9 2d ff fe 01");
    assert_eq!(std::ffi::OsStr::from_bytes(name).len(), 8);
}

#[tokio::test]
async fn whiteouts_of_things_that_are_not_there_do_nothing() {
    let base = layer(&[("etc/passwd", "root"), ("keep", "1")]);
    let top = [
        entry(b".wh.never", b'0', b""),
        entry(b"no/such/.wh.thing", b'0', b""),
        entry(b"etc/.wh.nothing", b'0', b""),
        entry(b"empty/.wh..wh..opq", b'0', b""),
        end(),
    ]
    .concat();
    let pulled = pull(vec![base, top]).await;
    assert_eq!(pulled.look("find . | sort"), ".\n./empty\n./etc\n./etc/passwd\n./keep\n./no\n./no/such\n");
}

#[tokio::test]
async fn whiteouts_with_odd_names_are_refused_or_harmless() {
    // A whiteout of nothing, of itself, of the directory, and of its parent.
    for name in [&b".wh."[..], b".wh...", b"a/.wh..", b".wh..wh..plnk"] {
        let image = image_of(vec![layer(&[("a/file", "1")]), [entry(name, b'0', b""), end()].concat()]);
        if let Ok(pulled) = try_pull(&image, |_| ()).await {
            assert_eq!(pulled.look("cat a/file"), "1", "{}", String::from_utf8_lossy(name));
        }
    }
}

#[tokio::test]
async fn an_image_of_80_layers_is_pulled_in_order_and_stacked() {
    let layers: Vec<_> = (0..80)
        .map(|n| layer(&[("top", n.to_string().as_str()), (format!("own/{n}").as_str(), "")]))
        .collect();
    let pulled = pull(layers).await;
    assert_eq!(pulled.layers.len(), 80);
    assert_eq!(pulled.look("cat top; ls own | wc -l"), "7980\n");
}

#[tokio::test]
async fn an_image_of_more_layers_than_a_guest_can_stack_is_refused() {
    let layers = (0..128).map(|n| layer(&[("n", n.to_string().as_str())])).collect();
    let error = refused_image(&image_of(layers)).await;
    assert!(error.to_string().contains("128 layers, more than 127"), "{error}");
}

#[tokio::test]
async fn a_layer_that_is_cut_short_is_refused() {
    let good = layer(&[("a", &"x".repeat(3000))]);
    for packing in [Packing::Gzip, Packing::Zstd] {
        let mut cut = pack(&good, packing);
        cut.truncate(cut.len() / 2);
        let image = TestImage {
            diff_ids: Some(vec![Digest::of(&good)]),
            ..TestImage::new(Family::Oci, vec![(cut, Packing::Plain)])
        };
        let error = refused_image(&image).await.to_string();
        assert!(error.contains("cannot decompress"), "{error}");
    }
    // A whole stream of half an archive.
    let why = refused(good[..1200].to_vec()).await;
    assert!(why.contains("cut short"), "{why}");
}

#[tokio::test]
async fn a_layer_with_another_content_than_the_config_says_is_refused() {
    let image = TestImage {
        diff_ids: Some(vec![Digest::of(b"something else")]),
        ..image_of(vec![layer(&[("a", "1")])])
    };
    let error = refused_image(&image).await.to_string();
    assert!(error.contains("not to what the image config says"), "{error}");
}

#[tokio::test]
async fn a_layer_that_is_no_archive_is_refused() {
    let why = refused(vec![b'x'; 2000]).await;
    assert!(why.contains("checksum"), "{why}");
}

#[tokio::test]
async fn an_entry_whose_size_lies_is_refused() {
    // It claims 1 TiB and brings 512 bytes; or it claims no more than other files have, and the archive ends.
    let huge = [header(b"huge", b'0', 1 << 40).as_bytes().to_vec(), vec![1; 512], end()].concat();
    let why = refused(huge).await;
    assert!(why.contains("its file 'huge' has 1099511627776 bytes"), "{why}");
    let short = [header(b"short", b'0', 100_000).as_bytes().to_vec(), vec![1; 512]].concat();
    let why = refused(short).await;
    assert!(why.contains("cut short"), "{why}");
}

/// Zeros that a gzip stream of a thousandth of their number unpacks to.
fn zeros_in_gzip(megabytes: usize, before: &[u8]) -> (Vec<u8>, Digest) {
    use sha2::Digest as _;
    use std::io::Write as _;
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let mut hasher = sha2::Sha256::new();
    let zeros = vec![0; 1 << 20];
    for piece in std::iter::once(before).chain(std::iter::repeat_n(zeros.as_slice(), megabytes)) {
        packed.write_all(piece).unwrap();
        hasher.update(piece);
    }
    let hash: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    (packed.finish().unwrap(), format!("sha256:{hash}").parse().unwrap())
}

#[tokio::test]
async fn a_gzip_bomb_stops_at_the_room_there_is() {
    let disk = SmallDisk::new(24);
    // As one file, and as rubbish after the archive's end.
    let bomb = header(b"bomb", b'0', 40 << 20).as_bytes().to_vec();
    for before in [bomb, [entry(b"a", b'0', b""), end()].concat()] {
        let (bomb, diff_id) = zeros_in_gzip(40, &before);
        assert!(bomb.len() < 100_000, "{}", bomb.len());
        let image = TestImage {
            diff_ids: Some(vec![diff_id]),
            ..TestImage::new(Family::Oci, vec![(bomb, Packing::Plain)])
        };
        let error = disk.try_pull(&image).await.unwrap_err();
        assert!(matches!(error, ImageError::Full { .. }), "{error}");
        assert!(disk.used() < 1 << 20, "{} bytes are left on the disk", disk.used());
    }
}

/// A file system of a few MiB for the store, unmounted in the end.
struct SmallDisk {
    directory: tempfile::TempDir,
    options: StoreOptions,
}

impl SmallDisk {
    fn new(mebibytes: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut options = options(directory.path());
        let disk = directory.path().join("disk");
        std::fs::create_dir(&disk).unwrap();
        let size = std::ffi::CString::new(format!("size={mebibytes}m,mode=0711")).unwrap();
        rustix::mount::mount("none", &disk, "tmpfs", rustix::mount::MountFlags::empty(), size.as_c_str())
            .unwrap();
        options.root = disk.join("store");
        options.reserve = 1 << 20;
        Self { directory, options }
    }

    fn disk(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    fn used(&self) -> u64 {
        let file_system = rustix::fs::statvfs(self.disk()).unwrap();
        (file_system.f_blocks - file_system.f_bfree) * file_system.f_frsize
    }

    async fn try_pull(&self, image: &TestImage) -> Result<(), ImageError> {
        let documents = documents(image);
        let server = Server::start(move |request| find(&documents, &request.path));
        let (store, name) = open(&self.options, &server).await;
        store.pull(&name, None).await.map(drop)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The directory can be deleted only when nothing is mounted in it.
        let _ = rustix::mount::unmount(self.disk(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// Bytes that no packer makes smaller.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

fn noisy_image(mebibytes: usize) -> TestImage {
    let small = layer(&[("small", "1")]);
    TestImage::new(
        Family::Oci,
        vec![
            (small, Packing::Gzip),
            ([entry(b"noise", b'0', &noise(mebibytes << 20)), end()].concat(), Packing::Gzip),
        ],
    )
}

fn is_one_clear_line(error: &ImageError) {
    assert!(matches!(error, ImageError::Full { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("no room") && text.contains("remove images") && !text.contains('\n'), "{text}");
}

#[tokio::test]
async fn a_disk_that_is_full_during_the_download_gives_one_clear_error_and_a_right_store() {
    let disk = SmallDisk::new(24);
    disk.try_pull(&image_of(vec![layer(&[("kept", "1")])])).await.unwrap();
    let before = disk.used();
    // Somebody else takes the room while the layer comes.
    let image = noisy_image(10);
    let documents = documents(&image);
    let hog = disk.disk().join("hog");
    let server = Server::start(move |request| {
        let (head, body) = find(&documents, &request.path);
        if body.len() > 1 << 20 {
            let _ = std::fs::write(&hog, vec![1; 18 << 20]);
        }
        (head, body)
    });
    let (store, name) = open(&disk.options, &server).await;
    is_one_clear_line(&store.pull(&name, None).await.unwrap_err());
    assert_eq!(store.list().len(), 1, "what was there is there");
    std::fs::remove_file(disk.disk().join("hog")).unwrap();
    assert_eq!(disk.used(), before, "nothing is left of the pull");
    // Freed, the same store goes on.
    assert!(store.pull(&name, None).await.is_err(), "the server fills the disk again");
    std::fs::remove_file(disk.disk().join("hog")).unwrap();
    disk.try_pull(&noisy_image(3)).await.unwrap();
}

#[tokio::test]
async fn a_disk_that_is_full_during_the_unpack_gives_one_clear_error_and_a_right_store() {
    // The blob fits, the blob and its file system together do not.
    let disk = SmallDisk::new(24);
    is_one_clear_line(&disk.try_pull(&noisy_image(14)).await.unwrap_err());
    assert!(disk.used() < 1 << 20, "{} bytes are left on the disk", disk.used());
    // As large as fits.
    disk.try_pull(&noisy_image(6)).await.unwrap();
}

#[tokio::test]
async fn a_disk_that_is_full_under_mkfs_gives_the_same_error() {
    // Room for the archive by the numbers, but mkfs.erofs meets ENOSPC: its output is larger than its input.
    let mut disk = SmallDisk::new(24);
    disk.options.reserve = 0;
    let many: Vec<u8> =
        (0..9_000u32).flat_map(|n| entry(format!("f{n}").as_bytes(), b'0', &noise(600))).collect();
    let image = image_of(vec![[many, end()].concat()]);
    match disk.try_pull(&image).await {
        Ok(()) => panic!("the disk must be too small for this"),
        Err(error) => is_one_clear_line(&error),
    }
    assert!(disk.used() < 1 << 20, "{} bytes are left on the disk", disk.used());
}
