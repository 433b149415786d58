//! From a Prepare to a lazily loaded layer, and back from a record after a restart.
//!
//! ```text
//! prepare:  index ▶ zTOC ▶ open the layer ▶ attributes of implied directories ▶ record, durable ▶ tree ▶ streaming
//! recover:  record ▶ open the layer ▶ tree ▶ streaming                    (no network)
//! adopt:    labels of a snapshot without record (the Go snapshotter's) ▶ as prepare
//! ```
//!
//! Invariant: a layer is in the tree only after its record is on disk, so whatever containerd was told survives a crash.
//! Invariant: what a snapshot has claimed of the layer store is let go when the snapshot goes, or when it turns out not to be lazy,
//! however far it had come: [`LazyMounts::let_go`] is the only way back, and works from everywhere.

use super::{
    artifacts::Artifacts,
    implied::{self, Below, Shown},
    observe::Observers,
    record::{self, LazyRecord},
    served::{self, Served},
    takeover::Waiting,
};
use crate::{
    fs::{self, HeaderCheck, LazyLayer, Tree, Xattrs},
    grpc::{ContainerdBlob, content::ContainerdContent},
    index::{ImageTarget, InUse, Indexes, NoIndex, SociIndex, Ways, ZtocDescriptor, prefetch::Prefetch},
    layers::{Layer, LayerStore, OpenError, RegistrySource, User, Wanted},
    layout::{Layout, SnapshotId},
    oci::{Digest, IdMaps},
    pull::Pulls,
    registry::Registry,
    snapshot::{Extraction, LazyLayers, NotLazyReason, Outcome, Target, Usage, chain},
    telemetry::catalog::say,
};
use futures::future::BoxFuture;
use rustix::fs::{Mode, OFlags};
use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

/// A mounted layer, for status, usage and removal.
struct Mounted {
    layer: Arc<Layer>,
    served: Arc<Served>,
    ztoc: Digest,
    index: Option<Digest>,
    shown: Arc<Shown>,
    /// Where it was prepared; containerd's content belongs to namespaces.
    namespace: String,
}

/// How long the layers of an image wait for their Prepares. containerd prepares them one after another, each within a second.
const CLAIM: Duration = Duration::from_secs(120);

/// How soon a claim that is not needed any more is let go.
const CLAIM_CHECK: Duration = Duration::from_millis(500);

/// Connections to open at first: as many as the first seconds of an image use.
const CONNECTIONS: usize = 5;

/// Images remembered for that; beyond, connections that exist already are opened once more.
const WARMED: usize = 4096;

/// Settings of the lazy side.
#[derive(Debug, Clone, Copy)]
pub struct LazySettings {
    pub headers: HeaderCheck,
    /// Longest time a Prepare may take before the layer is left to containerd.
    pub mount_timeout: Option<Duration>,
}

/// The lazy side of the snapshotter.
pub struct LazyMounts {
    pub layout: Layout,
    pub registry: Registry,
    pub indexes: Indexes,
    pub containerd: ContainerdContent,
    /// Indexes and zTOCs that containerd's content store has.
    pub artifacts: Artifacts,
    /// Whether they are looked for at every Prepare, and not only for what was lazy before (`content_store.type`).
    pub asks_containerd: bool,
    pub store: Arc<LayerStore>,
    pub tree: Arc<Tree>,
    pub observers: Arc<Observers>,
    /// Brings the layers of an indexed image that have no zTOC.
    pub pulls: Pulls,
    pub settings: RwLock<LazySettings>,
    /// [`State::default`] at first.
    pub state: State,
}

/// Why a layer is not shown again.
#[derive(Debug, thiserror::Error)]
pub enum NotRestored {
    /// Its zTOC is not on disk any more as it should be, and can be had from elsewhere.
    #[error("{1}")]
    ZtocLost(Box<LazyRecord>, String),
    #[error("{0}")]
    Other(String),
}

/// What a [`LazyMounts`] remembers.
#[derive(Default)]
pub struct State {
    mounted: Mutex<HashMap<SnapshotId, Mounted>>,
    /// The layer that each snapshot uses in the store, from before it is opened until it is let go. Leaf lock.
    claims: Mutex<HashMap<SnapshotId, Digest>>,
    /// What the Go snapshotter had mounted and we have not yet, and what waits for its zTOC.
    pub waiting: Waiting,
    /// One at a time shows again what could not be shown at start.
    healing: tokio::sync::Mutex<()>,
    /// Indexes whose layers were opened ahead of their Prepares, lately.
    ahead: Mutex<HashSet<Digest>>,
    /// Held by whoever looks for an index and makes a layer of it, from before the search until the layer is shown; alone by who removes what
    /// no layer uses.
    pub looking: tokio::sync::RwLock<()>,
    /// A layer was let go.
    pub let_go: tokio::sync::Notify,
    /// Manifests of images for which connections were opened lately.
    warmed: Mutex<HashSet<Digest>>,
}

impl LazyMounts {
    /// Opens connections to where the image's layers are while its index is being looked for.
    fn warm(&self, target: &Target) {
        let first = {
            let mut warmed = self.state.warmed.lock().unwrap_or_else(PoisonError::into_inner);
            if warmed.len() >= WARMED {
                warmed.clear();
            }
            warmed.insert(target.manifest)
        };
        if let (true, Ok(repository)) = (first, self.registry.repository(&target.reference)) {
            let (layer, connections) = (target.layer, self.store.shared().scheduler.within_limit(CONNECTIONS));
            tokio::spawn(async move { repository.warm(layer, connections).await });
        }
    }

    /// Opens and streams all layers of an image when the first of them is prepared: their Prepares come one after another, and the
    /// link need not wait for them. Layers that nobody has claimed after [`CLAIM`] are given up.
    fn open_ahead(self: &Arc<Self>, index: &SociIndex, target: &Target) {
        if !self.state.ahead.lock().unwrap_or_else(PoisonError::into_inner).insert(index.digest) {
            return;
        }
        // First what somebody will wait for: the others stream beside it.
        let (pulls, whole, indexed) = (self.pulls.clone(), target.clone(), index.layers.clone());
        tokio::spawn(async move { pulls.ahead(&whole, |layer| !indexed.contains_key(layer)).await });
        let layers: Vec<(usize, Digest, ZtocDescriptor)> = index
            .layers_in_order()
            .enumerate()
            .filter(|(_, (layer, ztoc))| *layer != target.layer && self.store.condemned(layer, &ztoc.digest).is_none())
            .map(|(depth, (layer, ztoc))| (depth, layer, ztoc))
            .collect();
        let (me, target, index) = (self.clone(), target.clone(), index.digest);
        tokio::spawn(async move {
            let claim = me.store.claim();
            let mut opened = Vec::new();
            for (depth, layer, ztoc) in layers {
                let target = Target { layer, ..target.clone() };
                match me.open(claim, &LazyRecord::new(&target, &ztoc, depth)).await {
                    Ok(open) => {
                        let local = me.local(&target.namespace, layer);
                        if local.is_there().await {
                            open.add_source(Arc::new(local));
                        }
                        me.store.shared().scheduler.add(&open);
                        opened.push(open);
                    }
                    Err(error) => {
                        // Its own Prepare will say so.
                        tracing::debug!(%layer, error = chain(&error), "cannot open a layer ahead of its Prepare");
                        let _ = me.store.release(layer, claim).await;
                    }
                }
            }
            let until = Instant::now() + CLAIM;
            while !opened.is_empty() {
                tokio::time::sleep(CLAIM_CHECK).await;
                let is_over = Instant::now() >= until;
                // Whose Prepare has come, and what was removed since, is not kept from here any longer: open files keep their space.
                let (kept, given_up): (Vec<_>, Vec<_>) = opened
                    .into_iter()
                    .partition(|layer: &Arc<Layer>| !is_over && me.store.is_kept_by(&layer.digest(), claim));
                opened = kept;
                for layer in given_up {
                    let digest = layer.digest();
                    drop(layer);
                    if let Err(error) = me.store.release(digest, claim).await {
                        say!(NotRemoved, layer = %digest, %error, "cannot remove the layer from disk");
                    }
                }
            }
            tokio::time::sleep_until(until.into()).await;
            me.state.ahead.lock().unwrap_or_else(PoisonError::into_inner).remove(&index);
        });
    }

    fn settings(&self) -> LazySettings {
        *self.settings.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other settings for what is prepared from now on.
    pub fn reconfigure(&self, settings: LazySettings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    fn mounted(&self) -> MutexGuard<'_, HashMap<SnapshotId, Mounted>> {
        self.state.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the layer of `id` looks like, if it is lazy.
    pub fn shown(&self, id: SnapshotId) -> Option<Arc<Shown>> {
        self.mounted().get(&id).map(|mounted| mounted.shown.clone())
    }

    /// Shows the layer of `id` again, from what is on disk.
    pub async fn recover(&self, id: SnapshotId) -> Result<(), NotRestored> {
        let (record, implied) = LazyRecord::read(&self.layout, id).map_err(|e| NotRestored::Other(e.to_string()))?;
        let layer = self.open(id, &record).await.map_err(|error| match error {
            OpenError::ZtocDamaged { .. } => NotRestored::ZtocLost(Box::new(record.clone()), chain(&error)),
            error => NotRestored::Other(chain(&error)),
        })?;
        self.show(id, &record, implied, layer).map_err(|e| NotRestored::Other(e.to_string()))
    }

    /// As [`LazyMounts::recover`], with a zTOC that is brought from where it came from if it must be.
    pub async fn restore(&self, id: SnapshotId) -> Result<(), NotRestored> {
        let record = match self.recover(id).await {
            Err(NotRestored::ZtocLost(record, _)) => record,
            done => return done,
        };
        let image = ImageTarget { reference: record.image.clone(), manifest: record.manifest, explicit: None };
        // containerd may have it.
        let index = record.index.map(|index| index.to_string());
        self.artifacts.forget().await;
        self.artifacts.bring(&record.namespace, record.manifest, index.as_deref()).await;
        match self.indexes.bring_back(&image, record.index, record.ztoc).await {
            Ok(()) => self.recover(id).await,
            Err(error) if error.is_final() => Err(NotRestored::Other(chain(&error))),
            Err(error) => Err(NotRestored::ZtocLost(record, chain(&error))),
        }
    }

    /// Whether reads of that layer are answered.
    pub fn is_mounted(&self, id: SnapshotId) -> bool {
        self.mounted().contains_key(&id)
    }

    /// Makes a layer lazy that was so in another snapshotter's hands. The rest of its image is there already or waits for the same.
    pub async fn adopt(
        self: &Arc<Self>,
        id: SnapshotId,
        target: &Target,
        parents: &[SnapshotId],
    ) -> Result<(), NotLazyReason> {
        self.make_lazy_in_time(id, target, parents, Ways::All).await
    }

    /// Tries once more what failed at start: a disk that was full or slow, descriptors that had run out, a zTOC that is in the registry again.
    async fn heal(&self, id: SnapshotId) -> bool {
        if self.state.waiting.has(id) {
            let patience = self.settings().mount_timeout;
            self.state.waiting.hurry(id, patience).await;
            return self.mounted().contains_key(&id);
        }
        let _one = self.state.healing.lock().await;
        if self.mounted().contains_key(&id) {
            return true;
        }
        match self.restore(id).await {
            Ok(()) => {
                say!(
                    LayerRestored,
                    snapshot = id.to_string(),
                    "the remote snapshot that could not be restored at start is back"
                );
                true
            }
            Err(error) => {
                say!(
                    LayerNotRestored,
                    snapshot = id.to_string(),
                    %error,
                    "the remote snapshot still cannot be restored"
                );
                false
            }
        }
    }

    /// Forgets everything that is done for `id`: takes its layer out of the tree, and off the disk if nobody else uses it.
    fn let_go(&self, id: SnapshotId) {
        self.state.waiting.forget(id);
        self.tree.give_up(id);
        self.undo(id);
    }

    /// What was adopted turned out to be removed.
    pub fn abandon(&self, id: SnapshotId) {
        self.let_go(id);
    }

    /// What was done for `id` so far is undone; it may be tried again.
    fn undo(&self, id: SnapshotId) {
        if self.mounted().remove(&id).is_some() {
            self.tree.remove(id);
            self.observers.unmounted(id);
        }
        let Some(layer) = self.state.claims.lock().unwrap_or_else(PoisonError::into_inner).remove(&id) else { return };
        // What becomes an ordinary snapshot has no such record; where the directory goes, it goes with it.
        let _ = std::fs::remove_file(self.layout.snapshot_lazy_record(id));
        let store = self.store.clone();
        self.state.let_go.notify_one();
        self.store.shared().runtime.spawn(async move {
            if let Err(error) = store.release(layer, id).await {
                say!(NotRemoved, %layer, %error, "cannot remove the layer from disk; the next start of the daemon will");
            }
        });
    }

    /// Layers of an earlier daemon that containerd has by now are read from there.
    pub async fn find_local_copies(&self) {
        let incomplete: Vec<(Arc<Layer>, String)> = {
            let mounted = self.mounted();
            mounted
                .values()
                .filter(|m| !m.layer.is_complete())
                .map(|m| (m.layer.clone(), m.namespace.clone()))
                .collect()
        };
        for (layer, namespace) in incomplete {
            let local = self.local(&namespace, layer.digest());
            if local.is_there().await {
                layer.add_source(Arc::new(local));
            }
        }
    }

    /// What the layers that are shown need of the content store.
    pub fn in_use(&self) -> InUse {
        let mounted = self.mounted();
        InUse {
            ztocs: mounted.values().map(|layer| layer.ztoc).collect(),
            indexes: mounted.values().filter_map(|layer| layer.index).collect(),
            of_some_index: mounted.values().filter(|layer| layer.index.is_none()).map(|layer| layer.ztoc).collect(),
        }
    }

    /// Whether every layer that has a record is shown, so that what is in use is known.
    pub fn all_shown(&self) -> bool {
        let mounted = self.mounted();
        self.state.waiting.is_empty() && record::all(&self.layout).iter().all(|id| mounted.contains_key(id))
    }

    fn local(&self, namespace: &str, blob: Digest) -> ContainerdBlob {
        ContainerdBlob { content: self.containerd.clone(), namespace: namespace.to_owned(), blob }
    }

    async fn open(&self, user: impl Into<User>, record: &LazyRecord) -> Result<Arc<Layer>, OpenError> {
        let user = user.into();
        if let User::Snapshot(id) = user {
            self.state.claims.lock().unwrap_or_else(PoisonError::into_inner).insert(id, record.layer);
        }
        let repository = self.registry.repository(&record.image).map_err(|e| OpenError::Source(chain(&e)))?;
        let registry = Arc::new(RegistrySource { repository, blob: record.layer });
        let wanted = Wanted {
            layer: record.layer,
            ztoc: record.ztoc,
            ztoc_path: self.indexes.ztoc_path(&record.ztoc),
            depth: record.depth,
            source: registry,
            chain: record.chain,
        };
        self.store.open(wanted, user).await
    }

    fn show(
        &self,
        id: SnapshotId,
        record: &LazyRecord,
        implied: HashMap<u32, fs::ImpliedAttrs>,
        layer: Arc<Layer>,
    ) -> Result<(), fs::AddError> {
        let shown = Arc::new(Shown { toc: layer.toc().clone(), implied: implied.clone() });
        let served = Served::new(layer.clone(), record.chain);
        let in_tree = LazyLayer {
            id,
            toc: layer.toc().clone(),
            implied,
            data: served.clone(),
            headers: self.settings().headers,
            // Only an optimisation: an index that says so of a layer with attributes is not believed.
            xattrs: if record.no_xattrs && !layer.toc().has_xattrs() { Xattrs::Hidden } else { Xattrs::Shown },
            maps: record.maps.clone(),
        };
        self.tree.add(in_tree)?;
        self.observers.mounted(id, record, &served, self.layout.snapshot_fs(id));
        self.store.shared().scheduler.add(&layer);
        self.mounted().insert(
            id,
            Mounted {
                layer,
                served,
                ztoc: record.ztoc,
                index: record.index,
                shown,
                namespace: record.namespace.clone(),
            },
        );
        Ok(())
    }

    async fn make_lazy(
        self: &Arc<Self>,
        id: SnapshotId,
        target: &Target,
        parents: &[SnapshotId],
        ways: Ways,
    ) -> Result<(), NotLazyReason> {
        let _looking = self.state.looking.read().await;
        let image = target.reference.to_string();
        let unresolved = |why: String| NotLazyReason::Unresolved { layer: target.layer, image: image.clone(), why };
        let wanted = ImageTarget {
            reference: target.reference.clone(),
            manifest: target.manifest,
            explicit: target.index.clone(),
        };
        if self.asks_containerd || ways == Ways::All {
            self.artifacts.bring(&target.namespace, target.manifest, target.index.as_deref()).await;
        }
        // Whether containerd has the layer already is asked while the index comes; an answer that takes longer is not waited for.
        self.warm(target);
        let local = self.local(&target.namespace, target.layer);
        let (index, is_local) = tokio::join!(self.indexes.search(&wanted, ways), local.is_there());
        let index = index.map_err(|why: NoIndex| NotLazyReason::NoIndex { image: image.clone(), why: chain(&why) })?;
        if ways == Ways::Configured {
            self.open_ahead(&index, target);
        }
        let ztoc = index.layers.get(&target.layer).ok_or(NotLazyReason::NoZtoc(target.layer))?;
        let wrong = |why: String| NotLazyReason::IndexWrong { layer: target.layer, why };
        if let Some(why) = self.store.condemned(&target.layer, &ztoc.digest) {
            return Err(wrong(why));
        }
        let record = LazyRecord::new(target, ztoc, parents.len()).found_in(index.digest);
        let opened = match self.open(id, &record).await {
            // It was here when the index was looked for, long ago perhaps.
            Err(OpenError::ZtocDamaged { .. }) => {
                let back = self.indexes.bring_back(&wanted, Some(index.digest), ztoc.digest).await;
                back.map_err(|error| unresolved(chain(&error)))?;
                self.open(id, &record).await
            }
            opened => opened,
        };
        let layer = opened.map_err(|error| unresolved(chain(&error)))?;
        // Another index of the layer may have come first, and be wrong; or the image is.
        if let Some(why) = layer.verdict().and_then(|verdict| served::trouble(verdict, record.chain.as_ref())) {
            return Err(wrong(why));
        }
        if is_local {
            layer.add_source(Arc::new(local));
        }
        // The link works while the rest is being written down.
        self.store.shared().scheduler.add(&layer);
        let unserved = |why: String| NotLazyReason::Unserved { layer: target.layer, why };
        let implied = self.keep(id, &record, parents, &layer).await.map_err(|e| unserved(e.to_string()))?;
        self.show(id, &record, implied, layer.clone()).map_err(|e| unserved(e.to_string()))?;
        if let Some(wanted) = self.indexes.prefetch(&index, &target.layer).await {
            self.prefetch(&layer, &wanted);
        }
        Ok(())
    }

    /// Has the spans fetched that the author of the index wants first.
    fn prefetch(&self, layer: &Arc<Layer>, wanted: &Prefetch) {
        let Some(last) = layer.table().spans.len().checked_sub(1).and_then(|last| u32::try_from(last).ok()) else {
            return;
        };
        for range in wanted.ranges(last) {
            self.store.shared().scheduler.prefetch(layer, *range.start() as usize..*range.end() as usize + 1);
        }
    }

    /// [`LazyMounts::make_lazy`] within the time that a Prepare may take. After an error nothing of it is left.
    async fn make_lazy_in_time(
        self: &Arc<Self>,
        id: SnapshotId,
        target: &Target,
        parents: &[SnapshotId],
        ways: Ways,
    ) -> Result<(), NotLazyReason> {
        let started = Instant::now();
        // In a task of its own: cut off in the middle, it would leave a layer half opened.
        let (me, wanted, below) = (self.clone(), target.clone(), parents.to_vec());
        let mut work = tokio::spawn(async move { me.make_lazy(id, &wanted, &below, ways).await });
        // Nobody but us waits for what is adopted, and an attempt must have ended before the next begins.
        let limit = self.settings().mount_timeout.filter(|_| ways == Ways::Configured);
        let ended = match limit {
            Some(limit) => tokio::time::timeout(limit, &mut work).await,
            None => Ok((&mut work).await),
        };
        match ended {
            Ok(Ok(Ok(()))) => {
                self.observers.prepared(&target.layer, started.elapsed());
                Ok(())
            }
            Ok(Ok(Err(reason))) => {
                self.undo(id);
                Err(reason)
            }
            Ok(Err(_)) => {
                self.undo(id);
                Err(NotLazyReason::Unserved { layer: target.layer, why: "the work ended early".into() })
            }
            Err(_) => {
                // containerd unpacks the layer; what comes of the work is not wanted any more.
                let me = self.clone();
                tokio::spawn(async move {
                    let _ = work.await;
                    me.undo(id);
                });
                Err(NotLazyReason::Timeout(target.layer))
            }
        }
    }

    /// Works out what the layer takes from those below, and writes down how to serve it.
    async fn keep(
        &self,
        id: SnapshotId,
        record: &LazyRecord,
        parents: &[SnapshotId],
        layer: &Arc<Layer>,
    ) -> io::Result<HashMap<u32, fs::ImpliedAttrs>> {
        let below: Vec<Option<Arc<Shown>>> = {
            let mounted = self.mounted();
            parents.iter().map(|p| mounted.get(p).map(|m| m.shown.clone())).collect()
        };
        let (layout, toc, record) = (self.layout.clone(), layer.toc().clone(), record.clone());
        let waits: Vec<bool> = parents.iter().map(|parent| self.state.waiting.has(*parent)).collect();
        let parents = parents.to_vec();
        let task = tokio::task::spawn_blocking(move || {
            let mut layers = Vec::new();
            for ((parent, lazy), waits) in parents.into_iter().zip(below).zip(waits) {
                layers.push(match lazy {
                    Some(lazy) => Below::Lazy(lazy),
                    // Looking through the mount would be waiting for ourselves.
                    None if waits => return Err(io::Error::other(format!("layer {parent} below it is not here yet"))),
                    None => Below::Unpacked(rustix::fs::open(
                        layout.snapshot_fs(parent),
                        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                        Mode::empty(),
                    )?),
                });
            }
            let implied = implied::attributes(&toc, &layers);
            record.write(&layout, id, &implied)?;
            Ok(implied)
        });
        task.await.map_err(io::Error::other)?
    }
}

impl LazyLayers for Arc<LazyMounts> {
    fn prepare<'a>(
        &'a self,
        id: SnapshotId,
        target: &'a Target,
        parents: &'a [SnapshotId],
    ) -> BoxFuture<'a, Result<(), NotLazyReason>> {
        Box::pin(self.make_lazy_in_time(id, target, parents, Ways::Configured))
    }

    fn map<'a>(&'a self, of: SnapshotId, id: SnapshotId, maps: &'a IdMaps) -> BoxFuture<'a, Result<(), String>> {
        let (me, maps) = (self.clone(), maps.clone());
        let work = async move {
            let (record, implied) = LazyRecord::read(&me.layout, of).map_err(|e| e.to_string())?;
            let record = record.mapped(maps);
            let shown = async {
                let layer = me.open(id, &record).await.map_err(|error| chain(&error))?;
                let (layout, written, lent) = (me.layout.clone(), record.clone(), implied.clone());
                let write = tokio::task::spawn_blocking(move || written.write(&layout, id, &lent)).await;
                write.map_err(io::Error::other).and_then(|written| written).map_err(|e| e.to_string())?;
                me.show(id, &record, implied, layer).map_err(|e| e.to_string())
            };
            shown.await.inspect_err(|_| me.let_go(id))
        };
        Box::pin(async move { tokio::spawn(work).await.unwrap_or_else(|e| Err(e.to_string())) })
    }

    fn available(&self, id: SnapshotId) -> BoxFuture<'_, bool> {
        let here = self.mounted().contains_key(&id);
        Box::pin(async move { here || self.heal(id).await })
    }

    fn condemned(&self, id: SnapshotId) -> Option<String> {
        self.mounted().get(&id).and_then(|mounted| mounted.served.trouble().map(str::to_owned))
    }

    fn remove(&self, id: SnapshotId) {
        self.observers.decisions.forget(id);
        self.store.shared().scheduler.way_is_free(u64::from(id.0));
        self.let_go(id);
    }

    fn usage(&self, id: SnapshotId) -> Usage {
        let layer = self.mounted().get(&id).map(|m| m.layer.clone());
        layer.map_or(Usage::default(), |layer| Usage {
            size: layer.files().disk_usage(),
            inodes: u64::from(layer.toc().len()),
        })
    }

    fn not_lazy(&self, _: SnapshotId, reason: &NotLazyReason) {
        self.observers.not_lazy(reason);
    }

    fn deferred(&self, id: SnapshotId) {
        // containerd fetches it now, and the pull waits for that: what we stream meanwhile is less urgent.
        self.store.shared().scheduler.make_way(u64::from(id.0));
    }

    fn decided(&self, id: SnapshotId, extraction: &Extraction, outcome: Outcome<'_>) {
        self.observers.decisions.record(id, extraction, outcome);
    }

    fn committed(&self, id: SnapshotId) {
        self.store.shared().scheduler.way_is_free(u64::from(id.0));
    }
}
