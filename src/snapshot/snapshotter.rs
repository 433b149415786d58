//! containerd's snapshotter, operation by operation.
//!
//! Each operation that changes something runs in its own task: a client that goes away cannot leave it half done.

use super::directories::{self, Access};
use super::disk::{Disk, blocking};
use super::error::{SnapshotError, StoreError, chain};
use super::lazy::{Extraction, LazyLayers, NotLazyReason, Outcome, Target};
use super::model::{Info, Kind, Labels, Timestamp, Usage, label};
use super::state::{self, Mount, Plan, Pull};
use super::store::{Change, LabelUpdate, Link, Store};
use crate::layout::{Layout, SnapshotId};
use crate::telemetry::catalog::say;
use futures::StreamExt;
use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};

/// Longest name. containerd keeps names as bbolt keys, which end there.
const MAX_NAME: usize = 32_768;
/// Directories removed at the same time.
const SWEEP_WIDTH: usize = 4;

/// What a [`Snapshotter`] is told at start.
#[derive(Debug, Clone)]
pub struct Options {
    pub layout: Layout,
    pub pull: Pull,
    /// From a Remove to the sweep.
    pub sweep_after: Duration,
}

impl Options {
    /// With a sweep so late that containerd's own Cleanup usually comes first and finds everything to do.
    pub fn new(layout: Layout, pull: Pull) -> Options {
        Options { layout, pull, sweep_after: Duration::from_secs(5) }
    }
}

/// All operations of the snapshots service. Cheap to clone.
#[derive(Clone)]
pub struct Snapshotter(Arc<Inner>);

struct Inner {
    layout: Layout,
    /// `layout.snapshots()`, as it appears in mounts.
    snapshots: String,
    pull: Pull,
    store: Store,
    lazy: Arc<dyn LazyLayers>,
    disk: Arc<dyn Disk>,
    /// Numbers given out whose record is not written yet: their directories are not orphans. Held for moments only.
    making: Mutex<HashSet<u32>>,
    /// One sweep at a time: two would remove the same directories.
    sweeping: tokio::sync::Mutex<()>,
    /// A record was removed, or all this is being dropped. A permit stays stored while the sweeper is busy, so no wake-up
    /// is lost.
    removed: Arc<Notify>,
    /// Layers being made lazy at the same time.
    slots: Semaphore,
    said_parallel: AtomicBool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.removed.notify_one();
    }
}

/// While it lives, a directory without record belongs to somebody.
struct Making<'a> {
    inner: &'a Inner,
    id: SnapshotId,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.inner.making.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id.0);
    }
}

/// Runs `operation` to its end, even if the caller is not interested any more.
async fn to_the_end<T: Send + 'static>(
    operation: impl Future<Output = Result<T, SnapshotError>> + Send + 'static,
) -> Result<T, SnapshotError> {
    tokio::spawn(operation).await.unwrap_or(Err(SnapshotError::Aborted))
}

fn named(what: &'static str, name: &str) -> Result<(), SnapshotError> {
    match name.len() {
        1..=MAX_NAME => Ok(()),
        _ => Err(SnapshotError::InvalidName { what, max: MAX_NAME }),
    }
}

impl Snapshotter {
    /// Opens the records below `options.layout` and starts the sweeper. Call within a tokio runtime.
    pub async fn open(
        options: Options,
        lazy: Arc<dyn LazyLayers>,
        disk: Arc<dyn Disk>,
    ) -> Result<Snapshotter, StoreError> {
        let Options { layout, pull, sweep_after } = options;
        let slots = usize::try_from(pull.max_concurrency.max()).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        let path = layout.snapshots();
        let file = |source| StoreError::File { path: path.clone(), source };
        let utf8 = || io::Error::new(io::ErrorKind::InvalidInput, "mounts can only name paths in UTF-8");
        let snapshots = path.to_str().ok_or_else(utf8).map_err(file)?.to_owned();
        let (store, strange) = {
            let layout = layout.clone();
            let opened = blocking(move || {
                directories::make_parents(&layout)?;
                let ids = directories::list(&layout)?;
                let floor = ids.last().map_or(1, |id| id.0.saturating_add(1));
                let store = Store::open(&layout.snapshot_db(), floor);
                let strange = store.as_ref().map_or(0, |store| ids.iter().filter(|id| !store.is_ours(**id)).count());
                Ok((store, strange))
            });
            let (store, strange) = opened.await.map_err(file)?;
            (store?, strange)
        };
        if strange > 0 {
            say!(
                StrangeDirectories,
                directories = strange.to_string(),
                "snapshot directories that the snapshot database does not know are left alone"
            );
        }
        let inner = Inner {
            layout,
            snapshots,
            pull,
            store,
            lazy,
            disk,
            making: Mutex::default(),
            sweeping: tokio::sync::Mutex::default(),
            removed: Arc::default(),
            slots: Semaphore::new(slots),
            said_parallel: AtomicBool::new(false),
        };
        let snapshotter = Snapshotter(Arc::new(inner));
        snapshotter.0.relink().await?;
        // Whatever a crash left behind.
        snapshotter.0.removed.notify_one();
        tokio::spawn(sweeper(Arc::downgrade(&snapshotter.0), snapshotter.0.removed.clone(), sweep_after));
        Ok(snapshotter)
    }

    /// Numbers of all lazy layers: what has to be readable under `lazy/` before the first request is answered.
    pub fn lazy_layers(&self) -> Result<Vec<SnapshotId>, StoreError> {
        let infos = self.0.store.page(None, usize::MAX, &Info::is_lazy)?;
        Ok(infos.into_iter().map(|info| info.id).collect())
    }

    /// A new active snapshot on `parent`. For a layer extraction that succeeds lazily, [`SnapshotError::TargetExists`].
    pub async fn prepare(
        &self,
        key: String,
        parent: Option<String>,
        labels: Labels,
        extraction: Option<Extraction>,
    ) -> Result<Mount, SnapshotError> {
        named("key", &key)?;
        let inner = self.0.clone();
        match extraction {
            Some(extraction) => {
                named("target", &extraction.chain_id)?;
                to_the_end(async move { inner.extract(key, parent, labels, extraction).await }).await
            }
            None if labels.contains_key(label::UID_MAPPING) && labels.contains_key(label::GID_MAPPING) => {
                Err(SnapshotError::IdMapping)
            }
            None => to_the_end(async move { inner.create(key, parent, labels, Kind::Active).await }).await,
        }
    }

    /// A new read-only snapshot on `parent`.
    pub async fn view(&self, key: String, parent: Option<String>, labels: Labels) -> Result<Mount, SnapshotError> {
        named("key", &key)?;
        let inner = self.0.clone();
        to_the_end(async move { inner.create(key, parent, labels, Kind::View).await }).await
    }

    /// The mounts of an active snapshot or a view.
    pub async fn mounts(&self, key: &str) -> Result<Mount, SnapshotError> {
        let (info, parents) = self.0.store.with_chain(key)?;
        if info.kind == Kind::Committed {
            return Err(SnapshotError::NotMountable(key.to_owned()));
        }
        self.0.check_available(&parents).await?;
        Ok(self.0.mount(info.id, info.kind, &parents))
    }

    /// Makes the active snapshot `key` the committed snapshot `name`.
    pub async fn commit(&self, name: String, key: String, labels: Labels) -> Result<(), SnapshotError> {
        named("name", &name)?;
        let inner = self.0.clone();
        to_the_end(async move {
            if inner.store.find(&name)?.is_some() {
                return Err(SnapshotError::AlreadyExists(name));
            }
            let info = inner.store.get(&key)?;
            if info.kind != Kind::Active {
                return Err(SnapshotError::NotActive(key));
            }
            let usage = inner.disk_usage(info.id).await?;
            inner.lazy.committed(info.id);
            inner.store.commit(&key, &name, labels, usage, Timestamp::now()).await
        })
        .await
    }

    /// Removes the record of `key`. Its directory goes with the next cleanup or sweep.
    pub async fn remove(&self, key: String) -> Result<(), SnapshotError> {
        let inner = self.0.clone();
        to_the_end(async move {
            inner.store.remove(&key, Change::Durable).await?;
            inner.removed.notify_one();
            Ok(())
        })
        .await
    }

    /// The record of `key`.
    pub fn stat(&self, key: &str) -> Result<Info, SnapshotError> {
        self.0.store.get(key)
    }

    /// Changes the labels of `name`: all of them, or those that `fields` (`labels`, `labels.<key>`) names.
    pub async fn update(&self, name: String, mut labels: Labels, fields: &[String]) -> Result<Info, SnapshotError> {
        let update = if fields.is_empty() || fields.iter().any(|field| field == "labels") {
            for field in fields.iter().filter(|field| *field != "labels") {
                label_of(field, &name)?;
            }
            LabelUpdate::Replace(labels)
        } else {
            let mut set = Labels::new();
            for field in fields {
                let key = label_of(field, &name)?;
                set.insert(key.to_owned(), labels.remove(key).unwrap_or_default());
            }
            LabelUpdate::Set(set)
        };
        let inner = self.0.clone();
        to_the_end(async move { inner.store.update(&name, update, Timestamp::now()).await }).await
    }

    /// Space that `key` takes: measured while it is active, what the layer store holds for a lazy layer, else as committed.
    pub async fn usage(&self, key: &str) -> Result<Usage, SnapshotError> {
        let info = self.0.store.get(key)?;
        match info.kind {
            Kind::Active => self.0.disk_usage(info.id).await,
            Kind::Committed if info.is_lazy() => Ok(self.0.lazy.usage(info.id)),
            Kind::Committed | Kind::View => Ok(info.usage),
        }
    }

    /// Up to `limit` snapshots that `wanted` accepts, after the name `after`, in byte order of their names.
    pub async fn page(
        &self,
        after: Option<String>,
        limit: usize,
        wanted: impl Fn(&Info) -> bool + Send + 'static,
    ) -> Result<Vec<Info>, SnapshotError> {
        let inner = self.0.clone();
        let page = tokio::task::spawn_blocking(move || inner.store.page(after.as_deref(), limit, &wanted));
        Ok(page.await.map_err(|_| SnapshotError::Aborted)??)
    }

    /// Removes the directories of removed snapshots. Failures are logged, and tried again by the next cleanup.
    pub async fn cleanup(&self) -> Result<(), SnapshotError> {
        let inner = self.0.clone();
        to_the_end(async move { inner.sweep().await }).await
    }
}

/// The label that an update's field names.
fn label_of<'a>(field: &'a str, name: &str) -> Result<&'a str, SnapshotError> {
    let immutable = || SnapshotError::ImmutableField { field: field.to_owned(), name: name.to_owned() };
    field.strip_prefix("labels.").filter(|key| !key.is_empty()).ok_or_else(immutable)
}

/// Sweeps a while after something was removed, as long as there is a snapshotter.
async fn sweeper(inner: Weak<Inner>, removed: Arc<Notify>, delay: Duration) {
    loop {
        removed.notified().await;
        if inner.strong_count() == 0 {
            return;
        }
        tokio::time::sleep(delay).await;
        let Some(inner) = inner.upgrade() else { return };
        if let Err(error) = inner.sweep().await {
            say!(NotRemoved, error = chain(&error), "cannot look for directories of removed snapshots");
        }
    }
}

impl Inner {
    fn mount(&self, id: SnapshotId, kind: Kind, parents: &[Link]) -> Mount {
        let parents: Vec<SnapshotId> = parents.iter().map(|link| link.id).collect();
        state::mount(&self.snapshots, id, kind, &parents)
    }

    async fn disk_usage(&self, id: SnapshotId) -> Result<Usage, SnapshotError> {
        self.disk.usage(id).await.map_err(|source| SnapshotError::Directory { id, source })
    }

    /// Fails unless every lazy layer among `links` can be read.
    async fn check_available(&self, links: &[Link]) -> Result<(), SnapshotError> {
        let checks = links.iter().filter(|link| link.lazy).map(|link| async move {
            match self.lazy.available(link.id).await {
                true => Ok(()),
                false => Err(SnapshotError::Unavailable(link.id)),
            }
        });
        futures::future::try_join_all(checks).await.map(drop)
    }

    /// Gives the snapshot's `fs` to the owner of its parent's.
    async fn inherit_owner(&self, id: SnapshotId, parents: &[Link]) -> Result<(), SnapshotError> {
        let Some(parent) = parents.first().map(|link| link.id) else { return Ok(()) };
        let layout = self.layout.clone();
        let failed = |id| move |source| SnapshotError::Directory { id, source };
        let owner = blocking(move || directories::owner(&layout, parent)).await.map_err(failed(parent))?;
        match owner {
            (0, 0) => Ok(()),
            (uid, gid) => self.disk.own_upper(id, uid, gid).await.map_err(failed(id)),
        }
    }

    /// A number and its directory. The record is the caller's to write while the guard lives.
    async fn make(&self, access: Access) -> Result<Making<'_>, SnapshotError> {
        let id = self.store.allocate()?;
        self.making.lock().unwrap_or_else(PoisonError::into_inner).insert(id.0);
        let making = Making { inner: self, id };
        let layout = self.layout.clone();
        let made = blocking(move || directories::create(&layout, id, access)).await;
        made.map_err(|source| SnapshotError::Directory { id, source })?;
        Ok(making)
    }

    /// Parents of a snapshot about to be made under the name `key`: what would fail later fails before anything is made.
    fn precheck(&self, key: &str, parent: Option<&str>) -> Result<Vec<Link>, SnapshotError> {
        let parents = self.store.chain(parent)?;
        match self.store.find(key)? {
            Some(_) => Err(SnapshotError::AlreadyExists(key.to_owned())),
            None => Ok(parents),
        }
    }

    fn new_info(id: SnapshotId, name: String, parent: Option<String>, kind: Kind, labels: Labels) -> Info {
        let now = Timestamp::now();
        Info { id, name, parent, kind, created: now, updated: now, labels, usage: Usage::default() }
    }

    /// Prepare of anything but a layer, and View.
    async fn create(
        &self,
        key: String,
        parent: Option<String>,
        labels: Labels,
        kind: Kind,
    ) -> Result<Mount, SnapshotError> {
        let parents = self.precheck(&key, parent.as_deref())?;
        self.check_available(&parents).await?;
        let access = if kind == Kind::Active { Access::Writable } else { Access::ReadOnly };
        let making = self.make(access).await?;
        let id = making.id;
        let recorded = async {
            self.inherit_owner(id, &parents).await?;
            self.store.insert(Self::new_info(id, key, parent, kind, labels), Change::Durable).await
        };
        if let Err(error) = recorded.await {
            drop(making);
            self.removed.notify_one();
            return Err(error);
        }
        Ok(self.mount(id, kind, &parents))
    }

    /// Prepare of a layer that containerd is about to unpack.
    async fn extract(
        &self,
        key: String,
        parent: Option<String>,
        labels: Labels,
        extraction: Extraction,
    ) -> Result<Mount, SnapshotError> {
        let there = self.store.find(&extraction.chain_id)?;
        if let Some(there) = &there
            && is_target(there, &extraction, parent.as_deref())
        {
            log_prepared(&key, &extraction, there.is_lazy());
            return Err(SnapshotError::TargetExists(extraction.chain_id));
        }
        let parents = self.precheck(&key, parent.as_deref())?;
        let labels = state::extraction_labels(labels, &extraction);
        let making = self.make(Access::Writable).await?;
        let id = making.id;
        let info = Self::new_info(id, key.clone(), parent.clone(), Kind::Active, labels.clone());
        // Not durable yet: a crash before the commit below forgets a snapshot that nobody was told of.
        if let Err(error) = self.store.insert(info, Change::Soon).await {
            drop(making);
            self.removed.notify_one();
            return Err(error);
        }
        drop(making);

        let reason = match state::plan(&extraction, &self.pull) {
            Plan::Defer(reason) => reason,
            Plan::Lazy(_) if there.is_some() => NotLazyReason::NameTaken(extraction.chain_id.clone()),
            Plan::Lazy(target) => match self.make_lazy(id, target, &parents).await {
                Err(reason) => reason,
                Ok(()) => return self.commit_lazy(id, &key, parent.as_deref(), labels, &extraction).await,
            },
        };
        self.lazy.not_lazy(id, &reason);
        self.lazy.decided(id, &extraction, Outcome::Left(&reason));
        self.log_deferred(&key, &extraction, &reason);
        let answered = async {
            self.check_available(&parents).await?;
            self.inherit_owner(id, &parents).await?;
            self.store.sync().await
        };
        match answered.await {
            Ok(()) => Ok(self.mount(id, Kind::Active, &parents)),
            Err(error) => {
                self.discard(&key).await;
                Err(error)
            }
        }
    }

    /// Makes the layer readable and points the snapshot at it.
    async fn make_lazy(&self, id: SnapshotId, target: &Target, parents: &[Link]) -> Result<(), NotLazyReason> {
        let ids: Vec<SnapshotId> = parents.iter().map(|link| link.id).collect();
        // The semaphore is never closed; a layer prepared without a slot would only be one too many.
        let _slot = self.slots.acquire().await.ok();
        self.lazy.prepare(id, target, &ids).await?;
        let layout = self.layout.clone();
        let linked = blocking(move || directories::link_to_lazy(&layout, id)).await;
        linked.map_err(|error| {
            self.lazy.remove(id);
            NotLazyReason::Unserved { layer: target.layer, why: error.to_string() }
        })
    }

    /// Commits a lazy layer under its chain id. Always an error: `TargetExists` is the good one.
    async fn commit_lazy(
        &self,
        id: SnapshotId,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
        extraction: &Extraction,
    ) -> Result<Mount, SnapshotError> {
        let (name, labels) = (&extraction.chain_id, state::lazy_labels(labels));
        // Usage is what the layer store holds at any time, see `usage`.
        match self.store.commit(key, name, labels, Usage::default(), Timestamp::now()).await {
            Ok(()) => {
                self.lazy.decided(id, extraction, Outcome::Lazy);
                log_prepared(key, extraction, true);
                Err(SnapshotError::TargetExists(name.clone()))
            }
            Err(SnapshotError::AlreadyExists(_)) => {
                // Somebody else prepared the same layer at the same time, and was first.
                self.discard(key).await;
                match self.store.find(name)? {
                    Some(there) if is_target(&there, extraction, parent) => {
                        log_prepared(key, extraction, there.is_lazy());
                        Err(SnapshotError::TargetExists(name.clone()))
                    }
                    _ => Err(SnapshotError::AlreadyExists(name.clone())),
                }
            }
            Err(error) => {
                self.discard(key).await;
                Err(error)
            }
        }
    }

    /// Takes back an active snapshot that nobody was told of.
    async fn discard(&self, key: &str) {
        if let Err(error) = self.store.remove(key, Change::Soon).await {
            say!(NotRemoved, key, error = chain(&error), "cannot take back a snapshot");
        }
        self.removed.notify_one();
    }

    /// Removes every directory of ours that has no record.
    async fn sweep(&self) -> Result<(), SnapshotError> {
        let _one = self.sweeping.lock().await;
        // In this order: a directory made meanwhile is not in the list, one being made is in `making`, and one that has
        // left `making` since has its record.
        let layout = self.layout.clone();
        let listed = blocking(move || directories::list(&layout)).await;
        let found = listed.map_err(|source| StoreError::File { path: self.layout.snapshots(), source })?;
        let making = self.making.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let recorded = self.store.ids()?;
        let orphan = |id: &SnapshotId| self.store.is_ours(*id) && !making.contains(&id.0) && !recorded.contains(&id.0);
        let orphans: Vec<SnapshotId> = found.into_iter().filter(orphan).collect();
        if orphans.is_empty() {
            return Ok(());
        }
        // A removal, or a number given out, that is not on disk yet must not come undone once the directory is gone.
        self.store.sync().await?;
        futures::stream::iter(orphans)
            .for_each_concurrent(SWEEP_WIDTH, |id| async move {
                self.lazy.remove(id);
                if let Err(error) = self.disk.remove_tree(id).await {
                    say!(NotRemoved, snapshot = %id, %error, "failed to remove directory");
                }
            })
            .await;
        Ok(())
    }

    /// Makes the links of lazy layers that a power failure may have taken.
    async fn relink(&self) -> Result<(), StoreError> {
        let lazy = self.store.page(None, usize::MAX, &Info::is_lazy)?;
        let layout = self.layout.clone();
        let links = blocking(move || {
            for info in lazy {
                if let Err(error) = directories::link_to_lazy(&layout, info.id) {
                    say!(LinkLost, snapshot = %info.id, %error, "lazy layer has lost its directory");
                }
            }
            Ok(())
        });
        links.await.map_err(|source| StoreError::File { path: self.layout.snapshots(), source })
    }

    /// One line for each layer that is left to containerd, and before it why lazy loading was not possible.
    fn log_deferred(&self, key: &str, extraction: &Extraction, reason: &NotLazyReason) {
        let (target, image, layer) = names(extraction);
        let error = reason.to_string();
        let code = reason.code();
        if reason.was_tried() {
            say!(
                LayerNotLazy,
                "remote-snapshot-prepared" = "false",
                error,
                key,
                target,
                image,
                layer,
                reason = code,
                "failed to prepare remote snapshot"
            );
        }
        let parallel = match reason {
            NotLazyReason::ParallelPull => Some("parallel_pull_unpack.enable is set, and not implemented yet"),
            NotLazyReason::NoIndex { .. } if self.pull.parallel_fallback => {
                Some("parallel_pull_as_fallback is set, and not implemented yet")
            }
            _ => None,
        };
        if let Some(what) = parallel
            && !self.said_parallel.swap(true, Ordering::Relaxed)
        {
            tracing::info!("{what}: such layers are left to containerd");
        }
        if matches!(reason, NotLazyReason::TooSmall { .. }) {
            tracing::info!(key, "layer size less than runtime min_layer_size, skipping remote snapshot preparation");
        }
        if matches!(reason, NotLazyReason::NoIndex { .. }) {
            say!(
                NoIndex,
                "defer-snapshot-runtime" = "true",
                key,
                target,
                image,
                layer,
                reason = code,
                "no valid SOCI index found; deferring to container runtime"
            );
        } else {
            say!(
                LeftToContainerd,
                "defer-snapshot-runtime" = "true",
                error,
                key,
                target,
                image,
                layer,
                reason = code,
                "failed to prepare local snapshot; deferring to container runtime"
            );
        }
    }
}

/// Whether containerd, searching for the target after ALREADY_EXISTS, will find `there`.
fn is_target(there: &Info, extraction: &Extraction, parent: Option<&str>) -> bool {
    there.kind == Kind::Committed
        && there.parent.as_deref() == parent
        && there.labels.get(label::TARGET) == Some(&extraction.chain_id)
}

/// The machine-read line of a layer that containerd need not unpack.
fn log_prepared(key: &str, extraction: &Extraction, lazy: bool) {
    let (target, image, layer) = names(extraction);
    if lazy {
        say!(
            LayerLazy,
            "remote-snapshot-prepared" = "true",
            key,
            target,
            image,
            layer,
            "remote snapshot successfully prepared."
        );
    } else {
        say!(
            LayerPulled,
            "local-snapshot-prepared" = "true",
            key,
            target,
            image,
            layer,
            "local snapshot successfully prepared"
        );
    }
}

/// What log lines call the layer: its chain id, and image and digest where the labels name them.
fn names(extraction: &Extraction) -> (&str, Option<String>, Option<String>) {
    let target = extraction.target.as_ref().ok();
    let (image, layer) = (target.map(|t| t.reference.to_string()), target.map(|t| t.layer.to_string()));
    (extraction.chain_id.as_str(), image, layer)
}
