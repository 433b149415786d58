//! Who wants which layer: one job for each, shared; and how long it is wanted.
//!
//! ```text
//!   request (a Prepare that waits) ──┐
//!   request of another namespace ────┼──▶ Use ──▶ job of a chain ID ──▶ result, for all of them
//!   image (its other layers) ────────┘
//! ```
//! A job begins with its first [`Use`] and is aborted with the last one, done or not: what was unpacked and nobody has asked for is swept.
//! A request uses a job while it waits. An image uses the jobs of its layers for a while after its latest request: for [`CLAIM`] if containerd may be
//! busy with a layer itself, for [`PAUSE`] if it has everything it asked for, and for no more than [`REGRET`] when its requests were cancelled; or
//! until a snapshot of it is removed.

use super::{
    Contents, Keep, Observer, Settings, Unpacker,
    download::Downloads,
    flights::Flights,
    image::{self, CONFIG_MAX, Image, MANIFEST_MAX},
    job::{self, Order, Workshop},
    parts::Crew,
    shelf::Shelf,
};
use crate::{
    layout::SnapshotId,
    oci::{Descriptor, Digest, media_type},
    registry::{Registry, Throttle},
    snapshot::{EagerLayers, Extent, NotPulled, Places, Pulled, Target, Usage, Wanted},
    telemetry::catalog::say,
};
use futures::future::BoxFuture;
use std::{
    collections::{HashMap, HashSet},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{Notify, OnceCell, Semaphore, watch};

/// How long the layers of an image wait for their Prepares. containerd prepares them one after another; between two of them it may download one itself.
const CLAIM: Duration = Duration::from_secs(120);
/// The same after a layer that was brought: containerd prepares the next one at once, but a loaded node takes its time.
const PAUSE: Duration = Duration::from_secs(20);
/// The same after a request that was cancelled, the image's last: whoever cancels a pull cancels it as a whole, and who tries again does so at once.
const REGRET: Duration = Duration::from_millis(500);
/// How long a failure is believed: the Prepare of a layer that failed ahead of it need not fail again, a pull that is repeated may succeed.
const BELIEF: Duration = Duration::from_secs(15);
/// How long after a layer has come the namespaces that have waited for it may take to say that it is theirs.
const ADOPTION: Duration = Duration::from_secs(1);
/// Images whose layers are remembered.
const IMAGES: usize = 256;
/// Layers at work at a time, without the operator's word: per core, as each has stages for more than one; and at least.
const BENCHES_PER_CORE: usize = 2;
/// See [`BENCHES_PER_CORE`].
const BENCHES_MIN: usize = 4;

/// A layer at its place in an image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    chain_id: String,
    layer: Digest,
}

type Outcome = (Result<Pulled, NotPulled>, Instant);

struct Entry {
    /// Jobs come and go under one key.
    number: u64,
    users: usize,
    /// For whom it was begun: manifest and namespace.
    owner: (Digest, String),
    result: watch::Receiver<Option<Outcome>>,
    task: tokio::task::AbortHandle,
}

/// An image that was asked for lately.
struct Claim {
    uses: HashMap<Key, Use>,
    until: Instant,
    /// Requests that wait for one of its layers.
    asking: usize,
    /// `until` has come nearer.
    sooner: Arc<Notify>,
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Brought,
    LeftToContainerd,
    Cancelled,
}

/// A request of an image. Dropped before its end, it was cancelled.
struct Asking {
    inner: Arc<Inner>,
    claimed: (Digest, String),
    asked: Asked,
}

impl Drop for Asking {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        let Some(claim) = state.claims.get_mut(&self.claimed) else { return };
        claim.asking = claim.asking.saturating_sub(1);
        let rest = match self.asked {
            Asked::Brought => PAUSE,
            Asked::LeftToContainerd => CLAIM,
            // The others say when it is over.
            Asked::Cancelled if claim.asking > 0 => return,
            Asked::Cancelled => REGRET,
        };
        claim.until = Instant::now() + rest;
        claim.sooner.notify_one();
    }
}

impl Claim {
    fn new(until: Instant) -> Claim {
        Claim { uses: HashMap::new(), until, asking: 0, sooner: Arc::default() }
    }
}

#[derive(Default)]
struct State {
    next: u64,
    jobs: HashMap<Key, Entry>,
    /// By manifest and namespace.
    claims: HashMap<(Digest, String), Claim>,
}

struct Inner {
    shop: Workshop,
    places: OnceLock<Arc<dyn Places>>,
    /// Only the store of snapshots is asked while it is held. A `Use` is never dropped then.
    state: Mutex<State>,
    images: Mutex<HashMap<Digest, Arc<OnceCell<Arc<Image>>>>>,
}

/// All pulls of the node. Cheap to clone.
#[derive(Clone)]
pub struct Pulls(Arc<Inner>);

/// What the eager side stands on.
pub struct Parts {
    pub registry: Registry,
    pub contents: Arc<dyn Contents>,
    pub unpacker: Arc<dyn Unpacker>,
    pub observer: Arc<dyn Observer>,
    pub throttle: Throttle,
    pub shelf: Shelf,
    /// Where files without names may live.
    pub scratch: PathBuf,
}

/// Somebody wants a job's result.
struct Use {
    inner: Arc<Inner>,
    key: Key,
    number: u64,
    owner: (Digest, String),
    result: watch::Receiver<Option<Outcome>>,
}

impl Drop for Use {
    fn drop(&mut self) {
        let ended = {
            let mut state = self.inner.lock();
            match state.jobs.get_mut(&self.key) {
                Some(entry) if entry.number == self.number => {
                    entry.users -= 1;
                    (entry.users == 0).then(|| state.jobs.remove(&self.key)).flatten()
                }
                _ => None,
            }
        };
        if let Some(entry) = ended {
            entry.task.abort();
        }
    }
}

impl Use {
    async fn result(&mut self) -> Result<Pulled, NotPulled> {
        match self.result.wait_for(Option::is_some).await {
            Ok(result) => result.clone().map_or(Err(NotPulled::Abandoned), |(result, _)| result),
            Err(_) => Err(NotPulled::Abandoned),
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pulls {
    pub fn new(settings: Settings, parts: Parts) -> Pulls {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let benches = settings.unpacks.unwrap_or((cores * BENCHES_PER_CORE).max(BENCHES_MIN));
        let shop = Workshop {
            downloads: Downloads::new(parts.throttle, settings.piece),
            flights: Flights::new(parts.scratch),
            shelf: Arc::new(parts.shelf),
            crew: Crew::new(cores),
            benches: Arc::new(Semaphore::new(benches.clamp(1, Semaphore::MAX_PERMITS))),
            registry: parts.registry,
            contents: parts.contents,
            unpacker: parts.unpacker,
            observer: parts.observer,
            settings,
        };
        Pulls(Arc::new(Inner { shop, places: OnceLock::new(), state: Mutex::default(), images: Mutex::default() }))
    }

    /// Where layers go. Before this nothing is pulled.
    pub fn open(&self, places: Arc<dyn Places>) {
        // A second call would be a mistake of ours, and changes nothing.
        let _ = self.0.places.set(places);
    }

    /// A request waits for a layer of the image from now on.
    fn ask(&self, target: &Target) -> Asking {
        let claimed = (target.manifest, target.namespace.clone());
        if let Some(claim) = self.0.lock().claims.get_mut(&claimed) {
            claim.asking += 1;
        }
        Asking { inner: self.0.clone(), claimed, asked: Asked::Cancelled }
    }

    /// Begins to pull the layers of `target`'s image that `is_wanted` picks: their Prepares are about to come.
    pub async fn ahead(&self, target: &Target, is_wanted: impl Fn(&Digest) -> bool) {
        let Ok(image) = self.image(target).await else { return };
        let wanted: Vec<usize> =
            (0..image.layers.len()).filter(|index| is_wanted(&image.layers[*index].blob.digest)).collect();
        self.claim(target, &image, &wanted);
    }

    /// The image's layers, from containerd or from the registry.
    async fn image(&self, target: &Target) -> Result<Arc<Image>, NotPulled> {
        let cell = {
            let mut images = self.0.images.lock().unwrap_or_else(PoisonError::into_inner);
            if images.len() >= IMAGES && !images.contains_key(&target.manifest) {
                images.clear();
            }
            images.entry(target.manifest).or_default().clone()
        };
        let learn = || async {
            let unknown = |why: String| NotPulled::ImageUnknown { image: target.reference.to_string(), why };
            let manifest = self.document(target, target.manifest, MANIFEST_MAX, Document::Manifest).await;
            let manifest = image::manifest(&manifest.map_err(unknown)?).map_err(|e| unknown(e.to_string()))?;
            if !manifest.media_type.is_empty() && !media_type::is_manifest(&manifest.media_type) {
                return Err(unknown(format!("{} is not a manifest", target.manifest)));
            }
            let config = self.document(target, manifest.config.digest, CONFIG_MAX, Document::Config).await;
            let layers = image::layers(&manifest, &config.map_err(unknown)?).map_err(|e| unknown(e.to_string()))?;
            let settings = &self.0.shop.settings;
            let limit =
                |most: Option<usize>| most.map(|most| Arc::new(Semaphore::new(most.clamp(1, Semaphore::MAX_PERMITS))));
            Ok(Arc::new(Image {
                layers,
                downloads: limit(settings.downloads_per_image),
                unpacks: limit(settings.unpacks_per_image),
            }))
        };
        cell.get_or_try_init(learn).await.cloned()
    }

    async fn document(&self, target: &Target, digest: Digest, max: u64, what: Document) -> Result<Vec<u8>, String> {
        let shop = &self.0.shop;
        if let Some(size) = shop.contents.size(&target.namespace, digest).await.filter(|size| *size <= max)
            && let Ok(bytes) = shop.contents.read(&target.namespace, digest, 0..size).await
            && Digest::of(&bytes) == digest
        {
            return Ok(bytes.to_vec());
        }
        let repository = shop.registry.repository(&target.reference).map_err(|e| e.to_string())?;
        let fetched = match what {
            Document::Manifest => repository.manifest(&digest.to_string()).await.map(|fetched| fetched.bytes),
            Document::Config => repository.blob(digest, max).await,
        };
        fetched.map(|bytes| bytes.to_vec()).map_err(|e| e.to_string())
    }

    /// The image uses the jobs of these layers from now on, for a while.
    fn claim(&self, target: &Target, image: &Arc<Image>, wanted: &[usize]) {
        let Some(places) = self.0.places.get() else { return };
        let claimed = (target.manifest, target.namespace.clone());
        let until = Instant::now() + CLAIM;
        let mut uses = HashMap::new();
        let known: HashSet<Key> = {
            let mut state = self.0.lock();
            match state.claims.get_mut(&claimed) {
                Some(claim) => {
                    claim.until = until;
                    claim.uses.keys().cloned().collect()
                }
                None => HashSet::new(),
            }
        };
        for index in wanted {
            let layer = &image.layers[*index];
            let key = Key { chain_id: layer.chain_id.clone(), layer: layer.blob.digest };
            if !known.contains(&key) && !places.is_committed(&key.chain_id) {
                uses.insert(key.clone(), self.use_job(key, self.order(target, image, *index)));
            }
        }
        let (is_new, surplus) = {
            let mut state = self.0.lock();
            let is_new = !state.claims.contains_key(&claimed);
            let claim = state.claims.entry(claimed.clone()).or_insert_with(|| Claim::new(until));
            claim.until = until;
            let surplus: Vec<Use> = uses.into_iter().filter_map(|(key, user)| claim.uses.insert(key, user)).collect();
            (is_new, surplus)
        };
        drop(surplus);
        if is_new {
            let me = self.clone();
            tokio::spawn(async move { me.watch(claimed).await });
        }
    }

    /// Lets go of an image's layers when nobody has asked for one of them for long.
    async fn watch(self, claimed: (Digest, String)) {
        loop {
            let (until, sooner) = {
                let mut state = self.0.lock();
                let Some(claim) = state.claims.get_mut(&claimed) else { return };
                if claim.asking > 0 {
                    claim.until = claim.until.max(Instant::now() + PAUSE);
                }
                (claim.until, claim.sooner.clone())
            };
            if until <= Instant::now() {
                let ended = self.0.lock().claims.remove(&claimed);
                drop(ended);
                return self.let_go(claimed).await;
            }
            let _ = tokio::time::timeout_at(until.into(), sooner.notified()).await;
        }
    }

    /// What containerd's content store has of the image is the image's own business from now on.
    async fn let_go(&self, (manifest, namespace): (Digest, String)) {
        let shop = &self.0.shop;
        if shop.settings.keep != Keep::InContainerd {
            return;
        }
        // What was begun for it may be wanted by another namespace by now, and is written under its lease.
        let owner = (manifest, namespace);
        loop {
            let (is_back, is_at_work) = {
                let state = self.0.lock();
                let at_work = |entry: &Entry| entry.owner == owner && entry.result.borrow().is_none();
                (state.claims.contains_key(&owner), state.jobs.values().any(at_work))
            };
            if is_back {
                return;
            }
            // Who has waited for the last of it takes it over within moments.
            tokio::time::sleep(ADOPTION).await;
            if !is_at_work {
                break;
            }
        }
        shop.contents.let_go(&owner.1, owner.0).await;
    }

    /// A layer that was pulled for another namespace: containerd is to have it in this one too.
    async fn adopt(&self, target: &Target, blob: &Descriptor) {
        let contents = &self.0.shop.contents;
        if contents.size(&target.namespace, blob.digest).await == Some(blob.size) {
            return;
        }
        if let Err(error) = contents.adopt(&target.namespace, &target.reference, target.manifest, blob).await {
            say!(LayerNotKept, layer = %blob.digest, error, "cannot keep the layer in containerd's content store");
        }
    }

    fn order(&self, target: &Target, image: &Arc<Image>, index: usize) -> Order {
        Order {
            namespace: target.namespace.clone(),
            reference: target.reference.clone(),
            manifest: target.manifest,
            image: image.clone(),
            index,
        }
    }

    fn is_committed(&self, key: &Key) -> bool {
        self.0.places.get().is_some_and(|places| places.is_committed(&key.chain_id))
    }

    /// The job for `key`, begun if there is none.
    fn use_job(&self, key: Key, order: Order) -> Use {
        let mut state = self.0.lock();
        if let Some(entry) = state.jobs.get_mut(&key) {
            let is_stale = match &*entry.result.borrow() {
                Some((Err(_), at)) => at.elapsed() > BELIEF,
                // As long as it is there, whoever asks is told so; another job is for when it was removed.
                Some((Ok(pulled), _)) => is_taken(pulled) && !self.is_committed(&key),
                None => false,
            };
            if !is_stale {
                entry.users += 1;
                let (number, owner, result) = (entry.number, entry.owner.clone(), entry.result.clone());
                return Use { inner: self.0.clone(), key, number, owner, result };
            }
            // Who still uses the old one keeps its result; the number tells them apart.
            state.jobs.remove(&key);
        }
        let (sender, result) = watch::channel(None);
        let me = self.clone();
        let owner = (order.manifest, order.namespace.clone());
        let task = tokio::spawn(async move {
            let outcome = match me.0.places.get() {
                Some(places) => job::run(&me.0.shop, places.as_ref(), &order).await,
                None => Err(NotPulled::Abandoned),
            };
            // Who wanted it may have gone meanwhile; the task is aborted then.
            let _ = sender.send(Some((outcome, Instant::now())));
        });
        state.next += 1;
        let number = state.next;
        let entry = Entry { number, users: 1, owner: owner.clone(), result: result.clone(), task: task.abort_handle() };
        state.jobs.insert(key.clone(), entry);
        Use { inner: self.0.clone(), key, number, owner, result }
    }
}

/// Whether the place of a layer has become somebody's snapshot.
fn is_taken(pulled: &Pulled) -> bool {
    // Locked: by who is about to take it.
    pulled.place.try_lock().is_ok_and(|place| place.is_none())
}

#[derive(Clone, Copy)]
enum Document {
    Manifest,
    Config,
}

impl EagerLayers for Pulls {
    fn pull<'a>(&'a self, wanted: &'a Wanted) -> BoxFuture<'a, Result<Pulled, NotPulled>> {
        Box::pin(async move {
            let target = &wanted.target;
            let image = self.image(target).await?;
            let index = image.find(&target.layer, &wanted.chain_id).ok_or(NotPulled::NotInImage(target.layer))?;
            let key = Key { chain_id: wanted.chain_id.clone(), layer: target.layer };
            let mut job = self.use_job(key, self.order(target, &image, index));
            let others: Vec<usize> = match wanted.extent {
                Extent::Layer => Vec::new(),
                Extent::Image => (index + 1..image.layers.len()).collect(),
            };
            self.claim(target, &image, &others);
            let mut asking = self.ask(target);
            let result = job.result().await;
            if result.is_ok() && self.0.shop.settings.keep == Keep::InContainerd && job.owner.1 != target.namespace {
                self.adopt(target, &image.layers[index].blob).await;
            }
            asking.asked = if result.is_ok() { Asked::Brought } else { Asked::LeftToContainerd };
            result
        })
    }

    fn publish<'a>(&'a self, id: SnapshotId, parents: &'a [SnapshotId]) -> BoxFuture<'a, io::Result<Usage>> {
        self.0.shop.unpacker.publish(id, parents)
    }

    fn failed(&self, extent: Extent, why: &NotPulled) {
        self.0.shop.observer.not_pulled(extent, why);
    }

    fn image_removed(&self, manifest: &str) {
        let Ok(manifest) = manifest.parse::<Digest>() else { return };
        let ended: Vec<((Digest, String), Claim)> = {
            let mut state = self.0.lock();
            state.claims.extract_if(|(digest, _), _| *digest == manifest).collect()
        };
        for (claimed, claim) in ended {
            drop(claim);
            let me = self.clone();
            tokio::spawn(async move { me.let_go(claimed).await });
        }
    }
}
