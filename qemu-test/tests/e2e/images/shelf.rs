//! What the strangers' registry has: one image for each trick, and what it does when it is asked for them.

use atoll_odd_registry::entries::{device, end, entry, file, header, link, long};
use atoll_odd_registry::{Answer, Request, rest};
use atoll_qemu_test::lab::REGISTRY;
use atoll_qemu_test::oci::{Image, digest};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What a busy registry asks for.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Entries of a name that is not UTF-8.
const CAFE: &[u8] = b"odd/caf\xe9-\xff\xfe";

/// What the registry does instead of giving what it has.
#[derive(Debug, Default)]
enum Twist {
    #[default]
    Honest,
    /// One bit of the layer is another.
    Altered,
    /// The layer goes on after its end.
    Longer,
    /// The layer ends half way, whatever is asked for.
    Half,
    /// The first answer ends half way and keeps the connection; later ones give the rest, and only that.
    HangsOnce(AtomicUsize),
    /// The first request gets 429; whoever does not wait gets nothing.
    Busy(Mutex<Option<Instant>>),
    /// Blobs are elsewhere.
    Redirects,
}

/// One image.
#[derive(Debug)]
struct Article {
    /// By the end of their paths: `manifests/1`, `blobs/sha256:…`.
    documents: HashMap<String, Vec<u8>>,
    /// Path of the topmost layer, which is the odd one.
    layer: String,
    twist: Twist,
}

/// All of them, by the name of their repository.
#[derive(Debug, Default)]
pub struct Shelf(HashMap<&'static str, Article>);

/// An archive of these entries.
fn tar(entries: &[Vec<u8>]) -> Vec<u8> {
    [entries.concat(), end()].concat()
}

/// A single layer that nobody is to run.
fn bare(entries: &[Vec<u8>]) -> anyhow::Result<Image> {
    Image::of_archives(&[tar(entries)], json!({}))
}

/// Something to run under the archive of these entries.
fn under(entries: &[Vec<u8>]) -> anyhow::Result<Image> {
    Image::busybox_under(vec![tar(entries)])
}

impl Shelf {
    /// With everything in it.
    pub fn filled() -> anyhow::Result<Self> {
        let mut shelf = Self::default();
        shelf.add_layers()?;
        shelf.add_runnable()?;
        shelf.add_liars()?;
        Ok(shelf)
    }

    fn put(&mut self, name: &'static str, image: &Image, twist: Twist) {
        let mut documents = HashMap::from([("manifests/1".to_owned(), image.manifest())]);
        for blob in image.blobs() {
            documents.insert(format!("blobs/{}", blob.digest), blob.bytes.clone());
        }
        let layer = image.layers().last().map_or_else(String::new, |blob| format!("blobs/{}", blob.digest));
        self.0.insert(name, Article { documents, layer, twist });
    }

    /// Layers that are refused.
    fn add_layers(&mut self) -> anyhow::Result<()> {
        let claims = |name: &[u8], size: u64| header(name, b'0', size).as_bytes().to_vec();
        let layers: [(&str, Vec<Vec<u8>>); 6] = [
            ("dot-dot", vec![entry(b"a/../../etc/x", b'0', b"x")]),
            ("symlinked", vec![link(b"dir", b'2', "/etc"), entry(b"dir/escaped", b'0', b"x")]),
            ("hard-link", vec![link(b"shadow", b'1', "../../../etc/shadow")]),
            ("long-name", vec![long(&b"n".repeat(4096), b'0', b"")]),
            ("entry-lies", vec![claims(b"huge", 1 << 40), vec![1; 512]]),
            // 40 GiB of zeros, as far as anybody reads them.
            ("bomb", vec![claims(b"bomb", 40 << 30), vec![0; 8 << 20]]),
        ];
        for (name, entries) in layers {
            self.put(name, &bare(&entries)?, Twist::Honest);
        }
        // Without the zeros that an archive ends with, which would be taken for its data.
        let cut = Image::of_archives(&[[claims(b"cut", 100_000), vec![1; 512]].concat()], json!({}))?;
        self.put("cut", &cut, Twist::Honest);
        Ok(())
    }

    /// Images that run.
    fn add_runnable(&mut self) -> anyhow::Result<()> {
        self.put("absolute", &under(&[entry(b"/etc/inside", b'0', b"inside\n")])?, Twist::Honest);
        self.put("not-utf-8", &under(&[entry(CAFE, b'0', b"x")])?, Twist::Honest);
        let nodes = [
            device(b"zero", b'3', (1, 5)),
            device(b"disk", b'4', (254, 0)),
            file(b"su", (0o6755, 0, 7), b"x"),
        ];
        self.put("devices", &under(&nodes)?, Twist::Honest);
        let whiteouts = [
            entry(b".wh.never", b'0', b""),
            entry(b"no/such/.wh.thing", b'0', b""),
            entry(b"etc/.wh.nothing", b'0', b""),
            entry(b"empty/.wh..wh..opq", b'0', b""),
        ];
        self.put("whiteouts", &under(&whiteouts)?, Twist::Honest);
        let more = (0..79).map(|n| {
            let (own, top) = (format!("own/{n}"), n.to_string());
            tar(&[entry(own.as_bytes(), b'0', b""), entry(b"top", b'0', top.as_bytes())])
        });
        self.put("eighty", &Image::busybox_under(more.collect())?, Twist::Honest);
        self.put("together", &Image::busybox_with_noise(2, 9)?, Twist::Honest);
        self.put("hangs", &Image::busybox_with_noise(1, 7)?, Twist::HangsOnce(AtomicUsize::new(0)));
        self.put("busy", &under(&[entry(b"busy", b'0', b"x")])?, Twist::Busy(Mutex::default()));
        self.put("redirects", &elsewhere()?, Twist::Redirects);
        Ok(())
    }

    /// What the registry says of one image is not so.
    fn add_liars(&mut self) -> anyhow::Result<()> {
        let plain = |name: &'static str| bare(&[entry(name.as_bytes(), b'0', &name.as_bytes().repeat(500))]);
        self.put("wrong-digest", &plain("wrong-digest")?, Twist::Altered);
        self.put("oversized", &plain("oversized")?, Twist::Longer);
        self.put("truncated", &plain("truncated")?, Twist::Half);
        let lies = plain("size-lies")?;
        self.put("size-lies", &lies, Twist::Honest);
        let mut manifest: Value = serde_json::from_slice(&lies.manifest())?;
        manifest["layers"][0]["size"] = (1_u64 << 50).into();
        self.replace_manifest("size-lies", manifest.to_string().into_bytes());
        self.put("huge-manifest", &plain("huge-manifest")?, Twist::Honest);
        self.replace_manifest("huge-manifest", vec![b' '; 10 << 20]);
        Ok(())
    }

    fn replace_manifest(&mut self, name: &str, manifest: Vec<u8>) {
        let article = self.0.get_mut(name).expect("it was put there");
        article.documents.insert("manifests/1".to_owned(), manifest);
    }

    /// Path of the odd layer of an image.
    pub fn layer(&self, name: &str) -> String {
        format!("{name}/{}", self.0[name].layer)
    }

    /// What is said to a request.
    pub fn answer(&self, request: &Request) -> Answer {
        let path = request.path.strip_prefix("/v2/").unwrap_or_default();
        let found = path.split_once('/').and_then(|(name, rest)| Some((self.0.get(name)?, rest)));
        let Some((article, path)) = found else { return nothing() };
        article.answer(path, request)
    }
}

/// What the other registry has, for the one that redirects there.
pub fn elsewhere() -> anyhow::Result<Image> {
    under(&[entry(b"from", b'0', b"elsewhere\n")])
}

fn nothing() -> Answer {
    ("404 Not Found".to_owned(), Vec::new()).into()
}

impl Article {
    fn answer(&self, path: &str, request: &Request) -> Answer {
        let Some(body) = self.documents.get(path).cloned() else { return nothing() };
        let (is_layer, from) = (path == self.layer, request.from());
        if let (Twist::Redirects, true) = (&self.twist, path.starts_with("blobs/")) {
            let location = format!("http://{REGISTRY}/v2/redirects/{path}");
            return (format!("307 Temporary Redirect\r\nLocation: {location}"), Vec::new()).into();
        }
        if let (Twist::Busy(since), true) = (&self.twist, path.starts_with("manifests/")) {
            let mut since = since.lock().expect("nobody panics with it");
            match *since {
                None => {
                    *since = Some(Instant::now());
                    let seconds = PATIENCE.as_secs();
                    return (format!("429 Too Many Requests\r\nRetry-After: {seconds}"), Vec::new()).into();
                }
                Some(since) if since.elapsed() < PATIENCE => return nothing(),
                Some(_) => {}
            }
        }
        if from > body.len() || !is_layer {
            return ("200 OK".to_owned(), body).into();
        }
        self.layer(body, from)
    }

    fn layer(&self, mut body: Vec<u8>, from: usize) -> Answer {
        match &self.twist {
            Twist::Altered => body[100] ^= 1,
            Twist::Longer => body.extend([0; 1000]),
            Twist::Half => body.truncate((body.len() / 2).max(from)),
            Twist::HangsOnce(asked) => {
                let first = asked.fetch_add(1, Ordering::Relaxed) == 0;
                if first != (from == 0) {
                    return nothing();
                }
                let (head, mut body) = rest(body, from);
                if first {
                    body.truncate(body.len() / 2);
                }
                return Answer { head, body, hang: first };
            }
            Twist::Honest | Twist::Busy(_) | Twist::Redirects => {}
        }
        rest(body, from).into()
    }
}

/// A digest that nothing has.
pub fn of_nothing() -> String {
    digest(b"nothing has this digest")
}
