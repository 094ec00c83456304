//! The store: an index of images over content-addressed layer files.
//!
//! One lock guards the index; it is never held across a wait. Pulls of the same layer wait for each other. Layers
//! of a pull under way, and those that a sandbox holds, are not deleted.

use super::digest::Digest;
use super::error::ImageError;
use super::index::{Layer, Layout, Record};
use super::manifest::Descriptor;
use super::pull::{Progress, Resolved, download, resolve};
use super::reference::ImageRef;
use super::registry::{Registry, SharedRegistry};
use super::slots::Slots;
use super::unpack::unpack;
use super::{Auth, FsUsage, Image, ImageConfig, ImageId, LayerFile, StoreOptions, room, scratch};
use atoll_spec::images::{Access, PullSecret};
use atoll_spec::node::RegistriesConfig;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How often a pull says how far it is.
const REPORT: Duration = Duration::from_secs(5);
/// Shortest beginning of an id that names an image.
const MIN_PREFIX: usize = 8;
/// Most secrets that are kept of one image and repository.
const MOST_SECRETS: usize = 256;
/// How long the finished layers of a broken pull wait for the next try.
const KEEP_INTERRUPTED: Duration = Duration::from_secs(3600);

#[derive(Default)]
struct State {
    records: BTreeMap<ImageId, Record>,
    sequence: u64,
    /// Layers kept by sandboxes and by pulls, with how often.
    holds: HashMap<String, Vec<Digest>>,
    /// Pulls that broke off, whose holds still stand.
    interrupted: Vec<Interrupted>,
    /// One lock for each layer that is being fetched.
    fetching: HashMap<Digest, Weak<tokio::sync::Mutex<()>>>,
}

/// A pull that broke off: trying again goes on with the layers that were done.
struct Interrupted {
    /// Of its hold.
    owner: String,
    /// What was pulled.
    name: String,
    at: Instant,
}

impl State {
    fn find(&self, name: &str) -> Option<&Record> {
        let hex = name.strip_prefix("sha256:").unwrap_or(name);
        if hex.len() >= MIN_PREFIX && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let mut matches = self.records.values().filter(|record| record.id.0.hex().starts_with(hex));
            if let (Some(found), None) = (matches.next(), matches.next()) {
                return Some(found);
            }
        }
        let reference: ImageRef = name.parse().ok()?;
        let wanted = match reference.digest() {
            Some(digest) => reference.repo_digest(digest),
            None => reference.repo_tag()?,
        };
        self.records
            .values()
            .find(|record| record.repo_tags.contains(&wanted) || record.repo_digests.contains(&wanted))
    }

    fn needs(&self, diff_id: &Digest) -> bool {
        let in_images =
            self.records.values().flat_map(|record| &record.layers).any(|layer| layer.diff_id == *diff_id);
        in_images || self.holds.values().flatten().any(|held| held == diff_id)
    }
}

struct Shared {
    options: StoreOptions,
    layout: Layout,
    state: Mutex<State>,
    slots: Slots,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one statement, so a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deletes those of the layers that nothing needs. Under the lock, so that no pull takes one up meanwhile.
    fn sweep(&self, state: &State, layers: impl IntoIterator<Item = Digest>) {
        for diff_id in layers.into_iter().collect::<BTreeSet<_>>() {
            if !state.needs(&diff_id)
                && let Err(error) = self.layout.delete_layer(&diff_id)
            {
                tracing::warn!("{error}; the next start will delete it");
            }
        }
    }

    fn release(&self, owner: &str) {
        let mut state = self.lock();
        if let Some(layers) = state.holds.remove(owner) {
            self.sweep(&state, layers);
        }
    }

    /// Ends the holds of those broken pulls that are `over`.
    fn forget_interrupted(&self, over: impl Fn(&Interrupted) -> bool) {
        let mut state = self.lock();
        let (over, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.interrupted).into_iter().partition(over);
        state.interrupted = kept;
        let layers: Vec<Digest> =
            over.iter().filter_map(|pull| state.holds.remove(&pull.owner)).flatten().collect();
        self.sweep(&state, layers);
    }
}

/// A pull's hold on its layers, until its record does that.
struct PullHold {
    shared: Arc<Shared>,
    owner: String,
    name: String,
    /// Trying again cannot help, or is not needed.
    over: bool,
}

impl Drop for PullHold {
    fn drop(&mut self) {
        if self.over {
            self.shared.release(&self.owner);
        } else {
            let (owner, name) = (self.owner.clone(), self.name.clone());
            self.shared.lock().interrupted.push(Interrupted { owner, name, at: Instant::now() });
        }
    }
}

/// The image store; clones share it.
#[derive(Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
}

impl ImageStore {
    /// Opens the store, removing what an interrupted pull or removal left.
    pub async fn open(options: StoreOptions) -> Result<Self, ImageError> {
        let layout = Layout::make(&options.root)?;
        scratch::clear(&options.root)?;
        let records = layout.load()?;
        let sequence = records.values().map(|record| record.sequence).max().unwrap_or(0);
        tracing::info!("image store {}: {} images", options.root.display(), records.len());
        let shared = Shared {
            options,
            layout,
            state: Mutex::new(State { records, sequence, ..State::default() }),
            slots: Slots::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Pulls an image, or finds that it is here already in this very version. Safe to call many times at once; a dropped
    /// future leaves nothing behind.
    pub async fn pull(&self, reference: &ImageRef, auth: Option<Auth>) -> Result<ImageId, ImageError> {
        self.pull_with(reference, auth, None).await
    }

    /// The same; `secret` is where the credentials came from, for [`ImageStore::access`]. The registry is asked what the
    /// name means, with these credentials, also when the image is here; layers that are here are not asked for.
    pub async fn pull_with(
        &self,
        reference: &ImageRef,
        auth: Option<Auth>,
        secret: Option<PullSecret>,
    ) -> Result<ImageId, ImageError> {
        self.shared.forget_interrupted(|pull| pull.at.elapsed() > KEEP_INTERRUPTED);
        let options = &self.shared.options;
        let deadline = options.pull_deadline;
        match tokio::time::timeout(deadline, self.pull_now(reference, auth, secret)).await {
            Ok(Err(error)) if is_full(&error) => {
                // Layers that wait for another try go first.
                self.shared.forget_interrupted(|_| true);
                match error {
                    ImageError::Io { .. } => Err(room::full(options, &format!("image {reference}"))),
                    told => Err(told),
                }
            }
            Ok(result) => result,
            Err(_) => Err(ImageError::Deadline {
                what: format!("the pull of {reference}"),
                seconds: deadline.as_secs(),
            }),
        }
    }

    async fn pull_now(
        &self,
        reference: &ImageRef,
        auth: Option<Auth>,
        secret: Option<PullSecret>,
    ) -> Result<ImageId, ImageError> {
        let started = Instant::now();
        let options = &self.shared.options;
        let registry =
            Registry::new(reference, auth, &read_registries(options)?, &options.system_ca, options.patience)?;
        let registry: SharedRegistry = Arc::new(registry);
        let resolved = resolve(&registry, reference).await?;
        let name = reference.to_string();
        let mut hold = self.hold_for_pull(&resolved, &name);
        let fetched = self.fetch_layers(&registry, &resolved, &name).await;
        hold.over = !fetched.as_ref().is_err_and(ImageError::is_transient);
        let layers = fetched?;
        let (id, count) = (resolved.config.id.clone(), layers.len());
        let shown = if registry.took_credentials() { Shown::Credentials(secret) } else { Shown::Nothing };
        self.record(reference, resolved, layers, shown)?;
        drop(hold);
        self.shared.forget_interrupted(|pull| pull.name == name);
        tracing::info!("pulled {name}: {id}, {count} layers, {:.1} s", started.elapsed().as_secs_f32());
        Ok(id)
    }

    fn hold_for_pull(&self, resolved: &Resolved, name: &str) -> PullHold {
        let mut state = self.shared.lock();
        state.sequence += 1;
        // No sandbox id has a space.
        let owner = format!("pull {}", state.sequence);
        state.holds.insert(owner.clone(), resolved.config.diff_ids.clone());
        PullHold { shared: Arc::clone(&self.shared), owner, name: name.to_owned(), over: false }
    }

    /// Brings all layers here, side by side.
    async fn fetch_layers(
        &self,
        registry: &SharedRegistry,
        resolved: &Resolved,
        name: &str,
    ) -> Result<Vec<Layer>, ImageError> {
        let wanted: Vec<(Descriptor, Digest)> =
            resolved.manifest.layers.iter().cloned().zip(resolved.config.diff_ids.iter().cloned()).collect();
        let missing = wanted.iter().filter(|(_, diff_id)| self.shared.layout.layer_length(diff_id).is_none());
        let progress = Progress::new(name.to_owned(), missing.map(|(layer, _)| layer.size).sum());
        // Dropped with this future, the set ends what still runs.
        let mut tasks = JoinSet::new();
        let own = Arc::new(Slots::default());
        for (number, (layer, diff_id)) in wanted.into_iter().enumerate() {
            let (shared, registry, progress) =
                (Arc::clone(&self.shared), Arc::clone(registry), Arc::clone(&progress));
            let own = Arc::clone(&own);
            tasks.spawn(async move {
                let length = fetch_layer(&shared, &registry, (&layer, &diff_id), &own, &progress).await?;
                Ok::<_, ImageError>((number, Layer { diff_id, length }))
            });
        }
        let mut layers = BTreeMap::new();
        let mut report = tokio::time::interval_at(tokio::time::Instant::now() + REPORT, REPORT);
        loop {
            // Both arms are cancel-safe: a finished task stays in the set until it is taken, a tick loses nothing.
            tokio::select! {
                finished = tasks.join_next() => match finished {
                    None => break,
                    Some(Ok(fetched)) => {
                        let (number, layer) = fetched?;
                        layers.insert(number, layer);
                    }
                    Some(Err(error)) => return Err(registry.error(name, format!("a download failed: {error}"))),
                },
                _ = report.tick() => progress.report(),
            }
        }
        Ok(layers.into_values().collect())
    }

    /// Writes the image down, and takes its tag from the image that had it.
    fn record(
        &self,
        reference: &ImageRef,
        resolved: Resolved,
        layers: Vec<Layer>,
        shown: Shown,
    ) -> Result<(), ImageError> {
        let mut state = self.shared.lock();
        state.sequence += 1;
        let sequence = state.sequence;
        let id = resolved.config.id.clone();
        let known = state.records.get(&id).cloned();
        let mut record = known.unwrap_or_else(|| Record {
            id: id.clone(),
            sequence,
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            layers,
            config: resolved.config.run,
            access: BTreeMap::new(),
        });
        shown.to(record.access.entry(reference.repository()).or_default());
        record.sequence = sequence;
        push_new(&mut record.repo_digests, Some(reference.repo_digest(&resolved.digest)));
        let tag = if reference.digest().is_none() { reference.repo_tag() } else { None };
        push_new(&mut record.repo_tags, tag.clone());
        self.shared.layout.write(&record)?;
        state.records.insert(id.clone(), record);
        let Some(tag) = tag else { return Ok(()) };
        let before =
            state.records.values().find(|other| other.id != id && other.repo_tags.contains(&tag)).cloned();
        if let Some(mut before) = before {
            before.repo_tags.retain(|other| *other != tag);
            self.shared.layout.write(&before)?;
            state.records.insert(before.id.clone(), before);
        }
        Ok(())
    }

    /// Who has shown that they may have an image from the repository that `name` is of; `None` when nobody ever pulled
    /// the image. By its id it is of no repository, so nobody has.
    pub fn access(&self, name: &str) -> Option<Access> {
        let state = self.shared.lock();
        let access = state.find(name).map(|record| &record.access).filter(|access| !access.is_empty())?;
        let repository = name.parse::<ImageRef>().ok().map(|reference| reference.repository());
        Some(repository.and_then(|repository| access.get(&repository).cloned()).unwrap_or_default())
    }

    /// Every image.
    pub fn list(&self) -> Vec<Image> {
        self.shared.lock().records.values().map(Record::image).collect()
    }

    /// The image that `name` means: an id (`sha256:…`, or its hexadecimal digits, or an unambiguous beginning of them of
    /// at least 8), or a reference by tag or digest.
    pub fn status(&self, name: &str) -> Option<Image> {
        self.shared.lock().find(name).map(Record::image)
    }

    /// Removes the image that `name` means, with all its tags; no error when it is not here. Layers that another
    /// image or a hold needs stay.
    pub async fn remove(&self, name: &str) -> Result<(), ImageError> {
        let mut state = self.shared.lock();
        let Some(id) = state.find(name).map(|record| record.id.clone()) else { return Ok(()) };
        self.shared.layout.delete(&id)?;
        if let Some(record) = state.records.remove(&id) {
            self.shared.sweep(&state, record.layers.into_iter().map(|layer| layer.diff_id));
        }
        tracing::info!("removed image {id} ({name})");
        Ok(())
    }

    fn with<T>(&self, id: &ImageId, look: impl FnOnce(&Record) -> T) -> Result<T, ImageError> {
        self.shared.lock().records.get(id).map(look).ok_or_else(|| ImageError::NotFound(id.to_string()))
    }

    /// Layers of an image, the lowest first.
    pub fn layers(&self, id: &ImageId) -> Result<Vec<LayerFile>, ImageError> {
        let layout = &self.shared.layout;
        self.with(id, |record| record.layers.iter().map(|layer| layout.layer_file(layer)).collect())
    }

    /// How to run an image.
    pub fn config(&self, id: &ImageId) -> Result<ImageConfig, ImageError> {
        self.with(id, |record| record.config.clone())
    }

    /// Keeps the layers of an image on disk for `owner` (a sandbox or container id) even when the image is removed. Holds
    /// live in memory: after a restart the runtime takes them again before it serves requests.
    pub fn hold(&self, owner: &str, id: &ImageId) -> Result<Vec<LayerFile>, ImageError> {
        let mut state = self.shared.lock();
        let record = state.records.get(id).ok_or_else(|| ImageError::NotFound(id.to_string()))?;
        let files = record.layers.iter().map(|layer| self.shared.layout.layer_file(layer)).collect();
        let layers: Vec<Digest> = record.layers.iter().map(|layer| layer.diff_id.clone()).collect();
        state.holds.entry(owner.to_owned()).or_default().extend(layers);
        Ok(files)
    }

    /// Ends all holds of `owner`; layers that nothing needs any more are deleted.
    pub fn release(&self, owner: &str) {
        self.shared.release(owner);
    }

    /// What the store takes of its file system.
    pub fn fs_usage(&self) -> Result<FsUsage, ImageError> {
        self.shared.forget_interrupted(|pull| pull.at.elapsed() > KEEP_INTERRUPTED);
        let root = &self.shared.options.root;
        let (used_bytes, used_inodes) = self.shared.layout.usage()?;
        let file_system = rustix::fs::statvfs(root)
            .map_err(|error| ImageError::io("look at the file system of", root)(error.into()))?;
        Ok(FsUsage {
            mount_point: root.clone(),
            used_bytes,
            used_inodes,
            capacity_bytes: file_system.f_blocks * file_system.f_frsize,
            available_bytes: file_system.f_bavail * file_system.f_frsize,
        })
    }
}

/// What a pull had to show.
enum Shown {
    Nothing,
    /// Credentials of this secret, or of somebody who did not say.
    Credentials(Option<PullSecret>),
}

impl Shown {
    fn to(self, access: &mut Access) {
        match self {
            Self::Nothing => access.everyone = true,
            Self::Credentials(None) => {}
            Self::Credentials(Some(secret)) => {
                access.secrets.retain(|known| !known.is(&secret));
                access.secrets.push(secret);
                // Those that were shown first are shown again when they are needed.
                let over = access.secrets.len().saturating_sub(MOST_SECRETS);
                access.secrets.drain(..over);
            }
        }
    }
}

fn is_full(error: &ImageError) -> bool {
    match error {
        ImageError::Full { .. } => true,
        ImageError::Io { source, .. } => room::is_lacking(source),
        _ => false,
    }
}

fn push_new(list: &mut Vec<String>, text: Option<String>) {
    if let Some(text) = text.filter(|text| !list.contains(text)) {
        list.push(text);
    }
}

/// Settings as they are now: hostd replaces the file when the machine config changes.
fn read_registries(options: &StoreOptions) -> Result<RegistriesConfig, ImageError> {
    let path = &options.registries;
    let why = |why: String| ImageError::Settings { registry: path.display().to_string(), why };
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| why(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(RegistriesConfig::default()),
        Err(error) => Err(why(error.to_string())),
    }
}

/// Brings one layer here, unless it is; gives the length of its file.
async fn fetch_layer(
    shared: &Shared,
    registry: &SharedRegistry,
    (layer, diff_id): (&Descriptor, &Digest),
    own: &Slots,
    progress: &Progress,
) -> Result<u64, ImageError> {
    let one_at_a_time = {
        let mut state = shared.lock();
        state.fetching.retain(|_, lock| lock.strong_count() > 0);
        let known = state.fetching.get(diff_id).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let lock = Arc::new(tokio::sync::Mutex::new(()));
            state.fetching.insert(diff_id.clone(), Arc::downgrade(&lock));
            lock
        })
    };
    let _alone = one_at_a_time.lock().await;
    if let Some(length) = shared.layout.layer_length(diff_id) {
        return Ok(length);
    }
    let blob = {
        let _slots = shared.slots.download(own).await?;
        download(registry, &shared.options, layer, progress).await?
    };
    let _slots = shared.slots.unpack(own).await?;
    let unpacked = unpack(&shared.options, &blob, diff_id).await?;
    shared.layout.adopt_layer(&unpacked.path, diff_id)?;
    drop(unpacked.work);
    Ok(unpacked.length)
}
