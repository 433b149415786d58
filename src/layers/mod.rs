//! Layers that are read before they have arrived: what is here, what is on its way, what comes next.
//!
//! [`LayerStore`] opens layers by digest, once however many snapshots use them. A [`Layer`] answers reads (`fs::LayerData`) from
//! memory, disk or network, in that order. The [`Scheduler`] decides who may use the network next.
//!
//! Invariant: a layer's directory is complete before it is opened ([`files::create`] writes `spans` last), so a crash at any point
//! leaves a directory that is either used or made again.
//! Invariant: opening a layer that was opened before needs no network.
//!
//! Absent on purpose: snapshots, mounts.
#![forbid(unsafe_code)]

mod ahead;
mod cache;
mod examine;
mod fetch;
mod files;
mod judge;
mod large;
mod layer;
mod passing;
pub mod prior;
mod quota;
mod read;
mod receive;
mod room;
mod scheduler;
mod scratch;
mod source;
mod spans;
mod split;
mod store;
pub mod toc;
mod verdict;
mod window;

pub use ahead::Ahead;
pub use cache::InflatedCache;
pub use layer::{Layer, Shared, Spill};
pub use quota::QuotaSettings;
pub use scheduler::{Background, Pace, Persistence, Scheduler, Settings};
pub use scratch::Scratch;
pub use source::{Body, RegistrySource, Remedy, Source, SourceError};
pub use store::LayerStore;
pub use verdict::Verdict;

use crate::{
    layout::SnapshotId,
    oci::{Chain, Digest},
};
use std::{io, path::PathBuf, sync::Arc, time::Duration};

/// What happens to layers, for metrics.
pub trait Observer: Send + Sync {
    /// A reader waits for `spans` spans that are not here.
    fn demand_fetch(&self, _layer: &Digest, _spans: usize) {}
    /// A range of the blob was asked for; the answer began, or failed, after `_took`.
    fn range_request(&self, _layer: &Digest, _took: Duration) {}
    fn background_fetched(&self, _layer: &Digest, _spans: usize) {}
    fn background_failed(&self, _layer: &Digest) {}
    /// A span of `_bytes` compressed bytes was taken off the disk, because the quota was reached.
    fn evicted(&self, _layer: &Digest, _bytes: u64) {}
    /// Every span is here, `_took` after the layer was opened.
    fn layer_complete(&self, _layer: &Layer, _took: Duration) {}
    /// All of the layer was compared with its index: it has a [`Layer::verdict`] now. On a thread of no runtime.
    fn layer_examined(&self, _layer: &Layer) {}
    /// The flat table of contents was built.
    fn toc_built(&self, _layer: &Digest, _took: Duration) {}
}

/// An [`Observer`] that ignores everything.
pub struct Unobserved;
impl Observer for Unobserved {}

/// Why a layer cannot be opened. None of these is healed by time; [`OpenError::ZtocDamaged`] is by another copy of the zTOC.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot read or write {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is missing or damaged: it is not the zTOC {ztoc}")]
    ZtocDamaged { path: PathBuf, ztoc: Digest },
    #[error("the zTOC of the layer is not usable")]
    Ztoc(#[source] crate::ztoc::ZtocError),
    #[error("the layer's table of contents cannot be built")]
    Toc(#[source] toc::BuildError),
    #[error("the layer's table of contents cannot be read")]
    TocFile(#[source] toc::OpenError),
    #[error("there is nowhere to fetch it from: {0}")]
    Source(String),
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
    /// What the image says of its diff ID.
    pub chain: Option<Chain>,
}

/// Who needs a layer to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum User {
    Snapshot(SnapshotId),
    /// Somebody who expects a snapshot to come; see [`LayerStore::claim`].
    Claim(u64),
}

impl From<SnapshotId> for User {
    fn from(id: SnapshotId) -> User {
        User::Snapshot(id)
    }
}
