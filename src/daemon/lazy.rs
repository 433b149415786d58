//! From a Prepare to a lazily loaded layer, and back from a record after a restart.
//!
//! ```text
//! prepare:  index ▶ zTOC ▶ open the layer ▶ attributes of implied directories ▶ record, durable ▶ tree ▶ streaming
//! recover:  record ▶ open the layer ▶ tree ▶ streaming                    (no network)
//! ```
//!
//! Invariant: a layer is in the tree only after its record is on disk, so whatever containerd was told survives a crash.

use super::{
    implied::{self, Below, Shown},
    observe::Observers,
    record::LazyRecord,
};
use crate::{
    fs::{self, HeaderCheck, LazyLayer, Tree, Xattrs},
    grpc::{ContainerdBlob, content::ContainerdContent},
    index::{ImageTarget, Indexes, NoIndex},
    layers::{Layer, LayerStore, RegistrySource, Wanted},
    layout::{Layout, SnapshotId},
    oci::Digest,
    registry::Registry,
    snapshot::{LazyLayers, NotLazyReason, Target, Usage},
};
use futures::future::BoxFuture;
use rustix::fs::{Mode, OFlags};
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A mounted layer, for status, usage and removal.
struct Mounted {
    layer: Arc<Layer>,
    shown: Arc<Shown>,
}

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
    pub store: Arc<LayerStore>,
    pub tree: Arc<Tree>,
    pub observers: Arc<Observers>,
    pub settings: LazySettings,
    mounted: Mutex<HashMap<SnapshotId, Mounted>>,
}

/// The parts of a [`LazyMounts`].
pub struct Parts {
    pub layout: Layout,
    pub registry: Registry,
    pub indexes: Indexes,
    pub containerd: ContainerdContent,
    pub store: Arc<LayerStore>,
    pub tree: Arc<Tree>,
    pub observers: Arc<Observers>,
    pub settings: LazySettings,
}

impl LazyMounts {
    pub fn new(parts: Parts) -> LazyMounts {
        let Parts { layout, registry, indexes, containerd, store, tree, observers, settings } = parts;
        LazyMounts {
            layout,
            registry,
            indexes,
            containerd,
            store,
            tree,
            observers,
            settings,
            mounted: Mutex::default(),
        }
    }

    fn mounted(&self) -> MutexGuard<'_, HashMap<SnapshotId, Mounted>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the layer of `id` again, from what is on disk.
    pub async fn recover(&self, id: SnapshotId) -> Result<(), String> {
        let (record, implied) = LazyRecord::read(&self.layout, id).map_err(|e| e.to_string())?;
        let layer = self.open(id, &record).await?;
        self.show(id, &record, implied, layer).map_err(|e| e.to_string())
    }

    fn local(&self, namespace: &str, blob: Digest) -> ContainerdBlob {
        ContainerdBlob { content: self.containerd.clone(), namespace: namespace.to_owned(), blob }
    }

    async fn open(&self, id: SnapshotId, record: &LazyRecord) -> Result<Arc<Layer>, String> {
        let repository = self.registry.repository(&record.image).map_err(|e| e.to_string())?;
        let registry = Arc::new(RegistrySource { repository, blob: record.layer });
        let wanted = Wanted {
            layer: record.layer,
            ztoc: record.ztoc,
            ztoc_path: self.indexes.ztoc_path(&record.ztoc),
            depth: record.depth,
            source: registry,
        };
        self.store.open(wanted, id).await.map_err(|e| crate::snapshot::chain(&e))
    }

    fn show(
        &self,
        id: SnapshotId,
        record: &LazyRecord,
        implied: HashMap<u32, fs::ImpliedAttrs>,
        layer: Arc<Layer>,
    ) -> Result<(), fs::AddError> {
        let shown = Arc::new(Shown { toc: layer.toc().clone(), implied: implied.clone() });
        let in_tree = LazyLayer {
            id,
            toc: layer.toc().clone(),
            implied,
            data: layer.clone(),
            headers: self.settings.headers,
            xattrs: if record.no_xattrs { Xattrs::Hidden } else { Xattrs::Shown },
        };
        self.tree.add(in_tree)?;
        self.observers.mounted(id, record.manifest, &layer, self.layout.snapshot_fs(id));
        self.store.shared().scheduler.add(&layer);
        self.mounted().insert(id, Mounted { layer, shown });
        Ok(())
    }

    async fn prepare(&self, id: SnapshotId, target: &Target, parents: &[SnapshotId]) -> Result<(), NotLazyReason> {
        let image = target.reference.to_string();
        let unresolved = |why: String| NotLazyReason::Unresolved { layer: target.layer, image: image.clone(), why };
        let wanted = ImageTarget {
            reference: target.reference.clone(),
            manifest: target.manifest,
            explicit: target.index.clone(),
        };
        // Whether containerd has the layer already is asked while the index comes; an answer that takes longer is not waited for.
        let local = self.local(&target.namespace, target.layer);
        let (index, is_local) = tokio::join!(self.indexes.get(&wanted), local.is_there());
        let index = index.map_err(|why: NoIndex| NotLazyReason::NoIndex { image: image.clone(), why: crate::snapshot::chain(&why) })?;
        let ztoc = index.layers.get(&target.layer).ok_or(NotLazyReason::NoZtoc(target.layer))?;
        let record = LazyRecord::new(
            target.layer,
            ztoc.digest,
            target.manifest,
            target.reference.clone(),
            target.namespace.clone(),
            ztoc.disable_xattrs,
            parents.len(),
        );
        let layer = self.open(id, &record).await.map_err(unresolved)?;
        if is_local {
            layer.add_source(Arc::new(local));
        }
        let kept = self.keep(id, &record, parents, &layer).await.map_err(|e| e.to_string());
        if let Err(why) = kept.and_then(|implied| self.show(id, &record, implied, layer).map_err(|e| e.to_string())) {
            let _ = self.store.release(target.layer, id).await;
            return Err(NotLazyReason::Unserved { layer: target.layer, why });
        }
        Ok(())
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
        let parents = parents.to_vec();
        let task = tokio::task::spawn_blocking(move || {
            let mut layers = Vec::new();
            for (parent, lazy) in parents.into_iter().zip(below) {
                layers.push(match lazy {
                    Some(lazy) => Below::Lazy(lazy),
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

impl LazyLayers for LazyMounts {
    fn prepare<'a>(
        &'a self,
        id: SnapshotId,
        target: &'a Target,
        parents: &'a [SnapshotId],
    ) -> BoxFuture<'a, Result<(), NotLazyReason>> {
        Box::pin(async move {
            let started = Instant::now();
            let result = match self.settings.mount_timeout {
                Some(limit) => tokio::time::timeout(limit, LazyMounts::prepare(self, id, target, parents))
                    .await
                    .unwrap_or(Err(NotLazyReason::Timeout(target.layer))),
                None => LazyMounts::prepare(self, id, target, parents).await,
            };
            if result.is_ok() {
                self.observers.prepared(&target.layer, started.elapsed());
            }
            result
        })
    }

    fn available(&self, id: SnapshotId) -> BoxFuture<'_, bool> {
        let here = self.mounted().contains_key(&id);
        Box::pin(async move { here })
    }

    fn remove(&self, id: SnapshotId) {
        let Some(mounted) = self.mounted().remove(&id) else { return };
        self.tree.remove(id);
        self.observers.unmounted(id);
        let (store, digest) = (self.store.clone(), mounted.layer.digest());
        let runtime = store.shared().runtime.clone();
        drop(mounted);
        runtime.spawn(async move {
            if let Err(error) = store.release(digest, id).await {
                tracing::warn!(layer = %digest, error = %error, "cannot remove the layer from disk");
            }
        });
    }

    fn usage(&self, id: SnapshotId) -> Usage {
        let layer = self.mounted().get(&id).map(|m| m.layer.clone());
        layer.map_or(Usage::default(), |layer| Usage { size: layer.files().disk_usage(), inodes: u64::from(layer.toc().len()) })
    }

    fn not_lazy(&self, _id: SnapshotId, reason: &NotLazyReason) {
        self.observers.not_lazy(reason);
    }
}
