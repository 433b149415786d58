//! Layers that are read before they have arrived: what is here, what is on its way, what comes next.
//!
//! [`LayerStore`] opens layers by digest, once however many snapshots use them. A [`Layer`] answers reads (`fs::LayerData`) from
//! memory, disk or network, in that order. The [`Scheduler`] decides who may use the network next.
//!
//! Invariant: a layer's directory is complete before it is opened ([`files::create`] writes `spans` last), so a crash at any point
//! leaves a directory that is either used or made again.
//! Invariant: opening a layer that was opened before needs no network.
//!
//! Absent on purpose: snapshots, mounts, eviction of parts of a layer (a layer goes when its last snapshot goes).
#![forbid(unsafe_code)]

mod cache;
mod fetch;
mod files;
mod layer;
pub mod prior;
mod scheduler;
mod source;
mod spans;
mod split;
pub mod toc;
mod window;

pub use cache::InflatedCache;
pub use layer::{Layer, Shared};
pub use scheduler::{Pace, Scheduler, Settings};
pub use source::{Body, RegistrySource, Remedy, Source, SourceError};

use crate::{layout::Layout, layout::SnapshotId, oci::Digest, sys::map::Mapping, ztoc::Limits, ztoc::Ztoc};
use files::LayerFiles;
use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// What happens to layers, for metrics.
pub trait Observer: Send + Sync {
    /// A reader waits for `spans` spans that are not here.
    fn demand_fetch(&self, _layer: &Digest, _spans: usize) {}
    /// A range of the blob was asked for; the answer began, or failed, after `_took`.
    fn range_request(&self, _layer: &Digest, _took: Duration) {}
    fn background_fetched(&self, _layer: &Digest, _spans: usize) {}
    fn background_failed(&self, _layer: &Digest) {}
    /// Every span is here, `_took` after the layer was opened.
    fn layer_complete(&self, _layer: &Layer, _took: Duration) {}
    /// The flat table of contents was built.
    fn toc_built(&self, _layer: &Digest, _took: Duration) {}
}

/// An [`Observer`] that ignores everything.
pub struct Unobserved;
impl Observer for Unobserved {}

/// Why a layer cannot be opened. None of these is healed by time; the layer is not loaded lazily.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot read or write {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the zTOC of the layer is not usable")]
    Ztoc(#[source] crate::ztoc::ZtocError),
    #[error("the layer's table of contents cannot be built")]
    Toc(#[source] toc::BuildError),
    #[error("the layer's table of contents cannot be read")]
    TocFile(#[source] toc::OpenError),
    #[error("the daemon is stopping")]
    Stopping,
}

/// What is needed to open a layer.
#[derive(Clone)]
pub struct Wanted {
    pub layer: Digest,
    pub ztoc: Digest,
    /// Where the zTOC's bytes are; not needed when the layer's directory exists already.
    pub ztoc_path: PathBuf,
    /// Number of layers below this one.
    pub depth: usize,
    pub source: Arc<dyn Source>,
}

type Opening = Arc<tokio::sync::Mutex<Weak<Layer>>>;

/// All layers of the node.
pub struct LayerStore {
    layout: Layout,
    shared: Arc<Shared>,
    limits: Limits,
    open: Mutex<HashMap<Digest, Opening>>,
    users: RwLock<HashMap<Digest, HashSet<SnapshotId>>>,
    numbers: AtomicU64,
}

impl LayerStore {
    /// The store below `layout`.
    pub fn new(layout: Layout, shared: Arc<Shared>, limits: Limits) -> LayerStore {
        LayerStore {
            layout,
            shared,
            limits,
            open: Mutex::default(),
            users: RwLock::default(),
            numbers: AtomicU64::new(1),
        }
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn opening(&self) -> MutexGuard<'_, HashMap<Digest, Opening>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a layer for `user`, or finds it open. Blocks on disk in a thread that may; never on the network.
    pub async fn open(self: &Arc<Self>, wanted: Wanted, user: SnapshotId) -> Result<Arc<Layer>, OpenError> {
        let slot = self.opening().entry(wanted.layer).or_default().clone();
        let mut slot = slot.lock().await;
        self.users.write().unwrap_or_else(PoisonError::into_inner).entry(wanted.layer).or_default().insert(user);
        if let Some(layer) = slot.upgrade() {
            layer.add_source(wanted.source);
            return Ok(layer);
        }
        let store = self.clone();
        let opened = self.shared.runtime.spawn_blocking(move || store.open_blocking(&wanted)).await;
        let layer = match opened {
            Ok(Ok(layer)) => layer,
            Ok(Err(error)) => {
                return Err(error);
            }
            Err(_) => return Err(OpenError::Stopping),
        };
        *slot = Arc::downgrade(&layer);
        Ok(layer)
    }

    fn open_blocking(&self, wanted: &Wanted) -> Result<Arc<Layer>, OpenError> {
        let directory = self.layout.layer(&wanted.layer);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { path, source }
        };
        // The first zTOC of a layer serves it for as long as the layer is here: every one describes the same bytes.
        let existing = files::ztoc_of(&directory);
        let fresh = existing.is_none();
        if fresh {
            fs::create_dir_all(&directory).map_err(failed(&directory))?;
            let bytes = Mapping::of(&fs::File::open(&wanted.ztoc_path).map_err(failed(&wanted.ztoc_path))?)
                .map_err(failed(&wanted.ztoc_path))?;
            let ztoc = Ztoc::parse(&bytes, &self.limits).map_err(OpenError::Ztoc)?;
            let table = ztoc.spans();
            self.build_toc(&ztoc, wanted.layer, &directory)?;
            files::create(&directory, &wanted.ztoc_path, &wanted.ztoc, table.compressed_size, table.spans.len())
                .map_err(failed(&directory))?;
        }
        let files = LayerFiles::open(&directory).map_err(failed(&directory))?;
        let ztoc = Ztoc::parse(files.ztoc(), &self.limits).map_err(OpenError::Ztoc)?;
        let table = ztoc.spans().clone();
        let toc_path = files::toc_path(&directory);
        let toc = match toc::Toc::open(&toc_path, &wanted.layer) {
            Ok(toc) => toc,
            Err(_) => {
                self.build_toc(&ztoc, wanted.layer, &directory)?;
                toc::Toc::open(&toc_path, &wanted.layer).map_err(OpenError::TocFile)?
            }
        };
        drop(ztoc);
        files.settle();
        let present = files.present(table.spans.len()).map_err(failed(&directory))?;
        // Upper layers hold what the image is for.
        let ranked = rank(&table, &toc, if wanted.depth == 0 { 1.0 } else { 3.0 });
        let parts = layer::Parts {
            number: self.numbers.fetch_add(1, Ordering::Relaxed),
            digest: wanted.layer,
            table,
            toc: Arc::new(toc),
            files,
            ranked,
            present,
            source: wanted.source.clone(),
        };
        Ok(Layer::new(parts, self.shared.clone()))
    }

    fn build_toc(&self, ztoc: &Ztoc<'_>, layer: Digest, directory: &Path) -> Result<(), OpenError> {
        let started = std::time::Instant::now();
        let bytes = toc::build(&layer, ztoc).map_err(OpenError::Toc)?;
        let path = files::toc_path(directory);
        let temporary = path.with_extension("new");
        fs::write(&temporary, bytes)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|source| OpenError::Io { path, source })?;
        self.shared.observer.toc_built(&layer, started.elapsed());
        Ok(())
    }

    /// `user` does not need `layer` any more. The last one to say so removes it from disk.
    pub async fn release(&self, layer: Digest, user: SnapshotId) -> io::Result<()> {
        let slot = self.opening().get(&layer).cloned();
        // Nobody opens it while it is being removed.
        let _held = match &slot {
            Some(slot) => Some(slot.lock().await),
            None => None,
        };
        {
            let mut users = self.users.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(set) = users.get_mut(&layer) {
                set.remove(&user);
                if !set.is_empty() {
                    return Ok(());
                }
                users.remove(&layer);
            }
        }
        let directory = self.layout.layer(&layer);
        let removed = self.shared.runtime.spawn_blocking(move || match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        });
        removed.await.unwrap_or(Ok(()))
    }

    /// Removes the directories of layers that no snapshot uses: what a crash between two steps may have left.
    pub fn sweep(&self) -> io::Result<usize> {
        let mut removed = 0;
        let entries = match fs::read_dir(self.layout.layers()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let layer = entry.file_name().to_str().and_then(|name| Digest::from_hex(name).ok());
            let used = |layer: &Digest| self.users.read().unwrap_or_else(PoisonError::into_inner).contains_key(layer);
            if !layer.is_some_and(|layer| used(&layer)) {
                fs::remove_dir_all(entry.path())?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

fn rank(table: &crate::ztoc::SpanTable, toc: &toc::Toc, interest: f32) -> Vec<prior::Ranked> {
    let ends: Vec<u64> = table.spans.iter().map(|s| s.uncompressed.end).collect();
    let mut value = prior::Values::new(&ends);
    // Files of a directory are neighbours in the table, so its path is put together once.
    let (mut directory, mut path) = (None, Vec::new());
    for file in toc.files() {
        if directory != Some(file.parent) {
            directory = Some(file.parent);
            path = toc.path(file.parent);
            if !path.is_empty() {
                path.push(b'/');
            }
        }
        let length = path.len();
        path.extend_from_slice(file.name);
        value.add(prior::File { path: &path, mode: file.mode & 0o7777, offset: file.offset, size: file.size });
        path.truncate(length);
    }
    value.order(interest)
}
