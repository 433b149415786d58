//! Layers that are pulled and unpacked here, before anybody may see them.
//!
//! ```text
//!   reserve ──▶ a number and its directory, without record ──▶ unpacked ──▶ record under the chain id
//!                        └──── dropped ──▶ swept
//! ```
//! A crash leaves at most a directory without record, which the next start sweeps like any other.

use super::lazy::Target;
use super::model::Usage;
use crate::layout::SnapshotId;
use crate::oci::Digest;
use futures::future::BoxFuture;
use std::io;
use std::sync::Arc;

/// How much of an image to pull when one layer of it is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// That layer: the others are lazy, or containerd's.
    Layer,
    /// It and all above it, at the same time.
    Image,
}

/// A layer that is wanted unpacked.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub target: Target,
    /// Name under which it will be committed.
    pub chain_id: String,
    pub extent: Extent,
}

/// Why a layer could not be pulled here. Logged once; containerd then pulls it, or says itself why it cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotPulled {
    /// Manifest or configuration of the image.
    #[error("cannot learn the layers of image {image:?}: {why}")]
    ImageUnknown { image: String, why: String },
    #[error("the image has no layer {0}")]
    NotInImage(Digest),
    #[error("cannot fetch layer {layer}: {why}")]
    Fetch { layer: Digest, why: String },
    #[error("layer {layer}: compressed digests did not match: what was fetched has {actual}")]
    Compressed { layer: Digest, actual: Digest },
    #[error("layer {layer}: uncompressed digests did not match: expected {expected}, got {actual}")]
    Uncompressed { layer: Digest, expected: Digest, actual: Digest },
    /// The bytes are right and cannot be made files of.
    #[error("cannot unpack layer {layer}: {why}")]
    Unpack { layer: Digest, why: String },
    /// No directory, no descriptor, no thread.
    #[error("cannot begin to unpack layer {layer}: {why}")]
    Resources { layer: Digest, why: String },
    #[error("the pull was given up")]
    Abandoned,
}

/// A number with a directory and no record. Unless it gets one, it is swept when this is dropped.
pub trait Place: Send + Sync {
    fn id(&self) -> SnapshotId;
    /// It has a record now.
    fn keep(self: Box<Self>);
}

/// Where layers are unpacked to, and whether that is still needed.
pub trait Places: Send + Sync {
    fn reserve(&self) -> BoxFuture<'_, io::Result<Box<dyn Place>>>;
    /// Whether there is a committed snapshot of that name.
    fn is_committed(&self, chain_id: &str) -> bool;
}

/// A layer that is unpacked. Who takes the place while holding its lock may give it a record.
#[derive(Clone)]
pub struct Pulled {
    pub place: Arc<tokio::sync::Mutex<Option<Box<dyn Place>>>>,
}

/// The eager side: what downloads and unpacks layers.
pub trait EagerLayers: Send + Sync {
    /// The layer, unpacked but not visible. Dropping the future gives it up, unless somebody else wants it too.
    fn pull<'a>(&'a self, wanted: &'a Wanted) -> BoxFuture<'a, Result<Pulled, NotPulled>>;

    /// Makes what was unpacked the content of snapshot `id`, above `parents` (nearest first), and measures it.
    fn publish<'a>(&'a self, id: SnapshotId, parents: &'a [SnapshotId]) -> BoxFuture<'a, io::Result<Usage>>;

    /// A layer that should have been pulled here was not.
    fn failed(&self, extent: Extent, why: &NotPulled) {
        let _ = (extent, why);
    }

    /// A snapshot of the image with this manifest was removed: what is pulled for nobody but it may stop.
    fn image_removed(&self, manifest: &str) {
        let _ = manifest;
    }
}

/// Pulls nothing: every layer that is not lazy is left to containerd.
pub struct NeverEager;

impl EagerLayers for NeverEager {
    fn pull<'a>(&'a self, _: &'a Wanted) -> BoxFuture<'a, Result<Pulled, NotPulled>> {
        Box::pin(std::future::ready(Err(NotPulled::Abandoned)))
    }

    fn publish<'a>(&'a self, _: SnapshotId, _: &'a [SnapshotId]) -> BoxFuture<'a, io::Result<Usage>> {
        Box::pin(std::future::ready(Err(io::ErrorKind::Unsupported.into())))
    }
}
