//! containerd's snapshotter, operation by operation.
//!
//! Each operation that changes something runs in its own task: a client that goes away cannot leave it half done.

use super::directories::{self, Access};
use super::disk::{Disk, blocking};
use super::eager::{EagerLayers, Place, Places, Wanted};
use super::error::{SnapshotError, StoreError, chain};
use super::lazy::{Extraction, LazyLayers};
use super::mapped;
use super::model::{BootId, Info, Kind, Labels, Timestamp, Usage, label};
use super::state::{self, Mount, Pull};
use super::store::{Change, LabelUpdate, Link, Store};
use super::takeover;
use super::written::{self, Writing};
use crate::layout::{Layout, SnapshotId};
use crate::telemetry::catalog::say;
use futures::StreamExt;
use futures::future::BoxFuture;
use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, oneshot};

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
    /// The boot that this is. `None`: it cannot be told, and layers that were not on disk before a power cut are not known as such.
    pub boot: Option<BootId>,
    /// The layer that the record of an unpacked one is about, if its labels say it.
    pub layer_of: fn(&Info) -> Option<Wanted>,
}

impl Options {
    /// With a sweep so late that containerd's own Cleanup usually comes first and finds everything to do.
    pub fn new(layout: Layout, pull: Pull) -> Options {
        Options { layout, pull, sweep_after: Duration::from_secs(5), boot: None, layer_of: |_| None }
    }
}

/// All operations of the snapshots service. Cheap to clone.
#[derive(Clone)]
pub struct Snapshotter(Arc<Inner>);

pub(super) struct Inner {
    pub(super) layout: Layout,
    /// `layout.snapshots()`, as it appears in mounts.
    snapshots: String,
    pub(super) pull: Pull,
    pub(super) store: Store,
    pub(super) lazy: Arc<dyn LazyLayers>,
    pub(super) eager: Arc<dyn EagerLayers>,
    pub(super) disk: Arc<dyn Disk>,
    /// Held while layers are mapped and while it is found out which of them nobody uses.
    pub(super) mapping: tokio::sync::Mutex<()>,
    /// Numbers given out whose record is not written yet: their directories are not orphans. Held for moments only.
    making: Mutex<HashSet<u32>>,
    unsettled: Arc<directories::Unsettled>,
    /// One sweep at a time: two would remove the same directories.
    sweeping: tokio::sync::Mutex<()>,
    /// A record was removed, or all this is being dropped. A permit stays stored while the sweeper is busy, so no wake-up
    /// is lost.
    pub(super) removed: Arc<Notify>,
    /// Layers being made lazy at the same time.
    pub(super) slots: Semaphore,
    pub(super) writing: Writing,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.removed.notify_one();
        self.writing.wake.notify_one();
    }
}

/// While it lives, a directory without record belongs to somebody.
pub(super) struct Making<'a> {
    inner: &'a Inner,
    pub(super) id: SnapshotId,
}

impl Making<'_> {
    /// The directory belongs to somebody until its number is taken out of `making`.
    fn persist(self) -> SnapshotId {
        std::mem::ManuallyDrop::new(self).id
    }
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
        1..=MAX_NAME if !mapped::is_reserved(name) => Ok(()),
        _ => Err(SnapshotError::InvalidName { what, max: MAX_NAME }),
    }
}

impl Snapshotter {
    /// Opens the records below `options.layout` and starts the sweeper. Call within a tokio runtime.
    pub async fn open(
        options: Options,
        lazy: Arc<dyn LazyLayers>,
        eager: Arc<dyn EagerLayers>,
        disk: Arc<dyn Disk>,
    ) -> Result<Snapshotter, StoreError> {
        let Options { layout, pull, sweep_after, boot, layer_of } = options;
        let slots = usize::try_from(pull.max_concurrency.max()).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        let path = layout.snapshots();
        let file = |source| StoreError::File { path: path.clone(), source };
        let utf8 = || io::Error::new(io::ErrorKind::InvalidInput, "mounts can only name paths in UTF-8");
        let snapshots = path.to_str().ok_or_else(utf8).map_err(file)?.to_owned();
        let unsettled = Arc::new(directories::Unsettled::new(layout.clone()));
        let store = {
            let (layout, unsettled) = (layout.clone(), unsettled.clone());
            let opened = blocking(move || {
                directories::make_parents(&layout)?;
                let directories::Found { ids, others } = directories::list(&layout)?;
                let floor = ids.last().map_or(1, |id| id.0.saturating_add(1));
                let store = open_store(&layout, floor, boot, unsettled);
                if let Ok(store) = &store {
                    let strange = ids.iter().filter(|id| !store.is_ours(**id)).map(SnapshotId::to_string);
                    name_strange(strange.chain(others).collect());
                }
                Ok(store)
            });
            opened.await.map_err(file)??
        };
        let writing = Writing::open(&store, boot, layer_of).await?;
        let inner = Inner {
            layout,
            snapshots,
            pull,
            store,
            lazy,
            eager,
            disk,
            making: Mutex::default(),
            mapping: tokio::sync::Mutex::default(),
            unsettled,
            sweeping: tokio::sync::Mutex::default(),
            removed: Arc::default(),
            slots: Semaphore::new(slots),
            writing,
        };
        let snapshotter = Snapshotter(Arc::new(inner));
        snapshotter.0.relink().await?;
        // Whatever a crash left behind.
        snapshotter.0.removed.notify_one();
        tokio::spawn(sweeper(Arc::downgrade(&snapshotter.0), snapshotter.0.removed.clone(), sweep_after));
        tokio::spawn(written::writer(Arc::downgrade(&snapshotter.0), snapshotter.0.writing.wake.clone()));
        tokio::spawn(written::mender(Arc::downgrade(&snapshotter.0)));
        Ok(snapshotter)
    }

    /// All lazy layers: what has to be readable under `lazy/` before the first request is answered.
    pub fn lazy_layers(&self) -> Result<Vec<Info>, StoreError> {
        self.0.store.page(None, usize::MAX, &Info::is_lazy)
    }

    /// The snapshots below one, nearest first.
    pub fn parents(&self, info: &Info) -> Result<Vec<Link>, SnapshotError> {
        self.0.store.chain(info.parent.as_deref())
    }

    /// Where layers can be unpacked that have no record yet.
    pub fn places(&self) -> Arc<dyn Places> {
        Arc::new(PlacesOf(Arc::downgrade(&self.0)))
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
                // Dropped with this future: a pull that nobody waits for any more need not go on.
                let (_here, gone) = oneshot::channel();
                to_the_end(async move { inner.extract(key, parent, labels, extraction, gone).await }).await
            }
            None => match mapped::wanted(&labels)? {
                Some(maps) => to_the_end(async move { inner.create_mapped(key, parent, labels, &maps).await }).await,
                None => to_the_end(async move { inner.create(key, parent, labels, Kind::Active).await }).await,
            },
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
        let (inner, key) = (self.0.clone(), key.to_owned());
        to_the_end(async move {
            let (info, parents) = inner.store.with_chain(&key)?;
            if info.kind == Kind::Committed {
                return Err(SnapshotError::NotMountable(key));
            }
            let parents = inner.whole(parents).await?;
            let parents = match info.kind {
                Kind::Active => inner.as_mounted(&info.labels, parents).await?,
                Kind::View | Kind::Committed => parents,
            };
            inner.check_available(&parents).await?;
            Ok(inner.mount(info.id, info.kind, &parents))
        })
        .await
    }

    /// Has on disk what was committed until now.
    pub async fn settle(&self) {
        self.0.sync().await;
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
            inner.store.commit(&key, &name, labels, usage, Timestamp::now()).await?;
            inner.writing.committed(info.id);
            Ok(())
        })
        .await
    }

    /// Removes the record of `key`. Its directory goes with the next cleanup or sweep.
    pub async fn remove(&self, key: String) -> Result<(), SnapshotError> {
        let inner = self.0.clone();
        to_the_end(async move {
            let info = inner.store.remove(&key, Change::Durable).await?;
            inner.removed.notify_one();
            if let Some(manifest) = info.labels.get(label::MANIFEST_DIGEST) {
                inner.eager.image_removed(manifest);
            }
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
        to_the_end(async move {
            let update = mapped::kept(&inner.store.get(&name)?, update);
            inner.store.update(&name, update, Timestamp::now()).await
        })
        .await
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
        let wanted = move |info: &Info| !mapped::is_mapped(info) && wanted(info);
        let page = tokio::task::spawn_blocking(move || inner.store.page(after.as_deref(), limit, &wanted));
        Ok(page.await.map_err(|_| SnapshotError::Aborted)??)
    }

    /// Removes the directories of removed snapshots. Failures are logged, and tried again by the next cleanup.
    pub async fn cleanup(&self) -> Result<(), SnapshotError> {
        let inner = self.0.clone();
        to_the_end(async move { inner.sweep().await }).await
    }
}

/// The records below `layout`. Where there are none, those of the Go snapshotter that was here before become ours.
fn open_store(
    layout: &Layout,
    floor: u32,
    boot: Option<BootId>,
    unsettled: Arc<directories::Unsettled>,
) -> Result<Store, StoreError> {
    let theirs = layout.go_snapshot_db();
    let (mut taken, mut refused) = (None, Vec::new());
    let import = || {
        let mut import = takeover::read(&theirs)?;
        if let Some(import) = &mut import {
            taken = Some((import.infos.len(), import.infos.iter().filter(|info| info.is_lazy()).count()));
            refused = std::mem::take(&mut import.refused);
        }
        Ok(import)
    };
    let store = Store::open(&layout.snapshot_db(), floor, boot, import, move || unsettled.settle())?;
    match taken {
        Some((snapshots, lazy)) => {
            for takeover::Refused { name, why } in &refused {
                say!(NotTakenOver, snapshot = name, error = %why, "a snapshot of the Go snapshotter is not taken over");
            }
            say!(
                TakenOver,
                snapshots = snapshots.to_string(),
                lazy = lazy.to_string(),
                refused = refused.len().to_string(),
                database = %theirs.display(),
                "took over the snapshots of the Go snapshotter"
            );
        }
        None => {
            if let Some(now) = takeover::transaction(&theirs)
                && store.imported_at() != Some(now)
            {
                say!(
                    PredecessorChanged,
                    database = %theirs.display(),
                    "the Go snapshotter's database has changed since it was taken over; what is new in it is not known here"
                );
            }
        }
    }
    Ok(store)
}

/// Directories named one by one in the journal; the rest is counted.
const NAMED: usize = 20;

fn name_strange(mut names: Vec<String>) {
    let count = names.len();
    if count == 0 {
        return;
    }
    names.truncate(NAMED);
    say!(
        StrangeDirectories,
        directories = count.to_string(),
        names = names.join(" "),
        "snapshot directories that the snapshot database does not know are left alone"
    );
}

/// The label that an update's field names.
fn label_of<'a>(field: &'a str, name: &str) -> Result<&'a str, SnapshotError> {
    let immutable = || SnapshotError::ImmutableField { field: field.to_owned(), name: name.to_owned() };
    field.strip_prefix("labels.").filter(|key| !key.is_empty()).ok_or_else(immutable)
}

/// Places of a snapshotter that may have ended.
struct PlacesOf(Weak<Inner>);

impl Places for PlacesOf {
    fn reserve(&self) -> BoxFuture<'_, io::Result<Box<dyn Place>>> {
        Box::pin(async move {
            let ended = || io::Error::other("the snapshotter has ended");
            let inner = self.0.upgrade().ok_or_else(ended)?;
            let id = inner.make(Access::ReadOnly).await.map_err(io::Error::other)?.persist();
            Ok(Box::new(Reserved { inner: self.0.clone(), id }) as Box<dyn Place>)
        })
    }

    fn is_committed(&self, chain_id: &str) -> bool {
        let found = self.0.upgrade().map(|inner| inner.store.find(chain_id));
        matches!(found, Some(Ok(Some(info))) if info.kind == Kind::Committed)
    }
}

struct Reserved {
    inner: Weak<Inner>,
    id: SnapshotId,
}

impl Place for Reserved {
    fn id(&self) -> SnapshotId {
        self.id
    }

    // What has a record is no orphan, so that dropping it is all there is to do.
    fn keep(self: Box<Self>) {}
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        inner.making.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id.0);
        inner.removed.notify_one();
    }
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
    pub(super) fn mount(&self, id: SnapshotId, kind: Kind, parents: &[Link]) -> Mount {
        let parents: Vec<SnapshotId> = parents.iter().map(|link| link.id).collect();
        state::mount(&self.snapshots, id, kind, &parents)
    }

    pub(super) async fn disk_usage(&self, id: SnapshotId) -> Result<Usage, SnapshotError> {
        self.disk.usage(id).await.map_err(|source| SnapshotError::Directory { id, source })
    }

    /// Fails unless every lazy layer among `links` can be read.
    pub(super) async fn check_available(&self, links: &[Link]) -> Result<(), SnapshotError> {
        let checks = links.iter().filter(|link| link.lazy).map(|link| async move {
            match self.lazy.available(link.id).await {
                true => match self.lazy.condemned(link.id) {
                    Some(why) => Err(SnapshotError::Condemned { id: link.id, why }),
                    None => Ok(()),
                },
                false => Err(SnapshotError::Unavailable(link.id)),
            }
        });
        futures::future::try_join_all(checks).await.map(drop)
    }

    /// Gives the snapshot's `fs` to the owner of its parent's.
    pub(super) async fn inherit_owner(&self, id: SnapshotId, parents: &[Link]) -> Result<(), SnapshotError> {
        let Some(parent) = parents.first().map(|link| link.id) else { return Ok(()) };
        let layout = self.layout.clone();
        let failed = |id| move |source| SnapshotError::Directory { id, source };
        let owner = blocking(move || directories::owner(&layout, parent)).await.map_err(failed(parent))?;
        match owner {
            (0, 0) => Ok(()),
            (uid, gid) => self.disk.own_upper(id, uid, gid).await.map_err(failed(id)),
        }
    }

    /// Whether anything is being unpacked here, or about to.
    pub(super) fn is_unpacking(&self) -> bool {
        !self.making.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// A number and its directory. The record is the caller's to write while the guard lives.
    pub(super) async fn make(&self, access: Access) -> Result<Making<'_>, SnapshotError> {
        let id = self.store.allocate()?;
        self.making.lock().unwrap_or_else(PoisonError::into_inner).insert(id.0);
        let making = Making { inner: self, id };
        let layout = self.layout.clone();
        let made = blocking(move || directories::create(&layout, id, access)).await;
        made.map_err(|source| SnapshotError::Directory { id, source })?;
        self.unsettled.made(id);
        Ok(making)
    }

    /// Parents of a snapshot about to be made under the name `key`: what would fail later fails before anything is made.
    pub(super) fn precheck(&self, key: &str, parent: Option<&str>) -> Result<Vec<Link>, SnapshotError> {
        let parents = self.store.chain(parent)?;
        match self.store.find(key)? {
            Some(_) => Err(SnapshotError::AlreadyExists(key.to_owned())),
            None => Ok(parents),
        }
    }

    pub(super) fn new_info(id: SnapshotId, name: String, parent: Option<String>, kind: Kind, labels: Labels) -> Info {
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
        let parents = self.whole(self.precheck(&key, parent.as_deref())?).await?;
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

    /// Removes every directory of ours that has no record.
    async fn sweep(&self) -> Result<(), SnapshotError> {
        let _one = self.sweeping.lock().await;
        self.forget_unused().await?;
        // In this order: a directory made meanwhile is not in the list, one being made is in `making`, and one that has
        // left `making` since has its record.
        let layout = self.layout.clone();
        let listed = blocking(move || Ok(directories::list(&layout)?.ids)).await;
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

    /// Makes the links of lazy layers that a power failure may have taken, or that the Go snapshotter never had.
    async fn relink(&self) -> Result<(), StoreError> {
        let lazy = self.store.page(None, usize::MAX, &Info::is_lazy)?;
        let layout = self.layout.clone();
        let links = blocking(move || {
            for info in lazy {
                match directories::link_to_lazy(&layout, info.id) {
                    Ok(()) => {}
                    // Nobody serves the mount on it, or somebody does.
                    Err(error) if matches!(error.kind(), io::ErrorKind::NotConnected | io::ErrorKind::ResourceBusy) => {
                        say!(StaleMount, snapshot = %info.id, %error, "the directory of a lazy layer is a mount of the Go snapshotter");
                    }
                    Err(error) => say!(LinkLost, snapshot = %info.id, %error, "lazy layer has lost its directory"),
                }
            }
            Ok(())
        });
        links.await.map_err(|source| StoreError::File { path: self.layout.snapshots(), source })
    }
}
