//! What a layer extraction asks for, who can make it lazy, and every way in which it cannot.

use super::model::Usage;
use crate::layout::SnapshotId;
use crate::oci::{Chain, Digest, IdMaps, Reference};
use futures::future::BoxFuture;

/// A Prepare that containerd makes for a layer it is about to unpack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extraction {
    /// Name under which the layer is committed, without namespace: all namespaces share it.
    pub chain_id: String,
    pub namespace: String,
    /// Compressed size, where the client said it.
    pub size: Option<u64>,
    /// The layer, if the labels name it.
    pub target: Result<Target, NotLazyReason>,
}

/// The layer to be made readable, as the labels of a Prepare name it. Made by `grpc::labels` only, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub namespace: String,
    pub reference: Reference,
    pub manifest: Digest,
    pub layer: Digest,
    /// Which diff ID the image says it has, where snapshots are named as containerd names them.
    pub chain: Option<Chain>,
    /// Compressed size, where the client said it.
    pub size: Option<u64>,
    /// The SOCI index that the user asked for: not parsed, since an invalid one means "no index".
    pub index: Option<String>,
    /// This layer and then the other ones that the labels list, with their sizes where the client said them.
    pub layers: Vec<(Digest, Option<u64>)>,
}

/// Why a layer is not lazy. Logged once, counted once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotLazyReason {
    /// `[pull_modes.parallel_pull_unpack] enable`.
    #[error("parallel pulls are configured")]
    ParallelPull,
    #[error("layer size {size} less than runtime min_layer_size {min}")]
    TooSmall { size: u64, min: u64 },
    #[error("label {0} is missing")]
    LabelMissing(&'static str),
    #[error("label {label} is invalid: {why}")]
    LabelInvalid { label: &'static str, why: String },
    /// Discovery is off, found nothing, or what it found cannot be used.
    #[error("unable to fetch SOCI artifacts for image {image:?}: {why}")]
    NoIndex { image: String, why: String },
    /// The index has no zTOC for this layer.
    #[error("skipping mounting layer {0} as FUSE mount: no ztoc for layer")]
    NoZtoc(Digest),
    /// The registry, the zTOC or our own disk.
    #[error("failed to resolve layer {:?} from {image:?}: {why}", layer.to_string())]
    Unresolved { layer: Digest, image: String, why: String },
    #[error("timeout waiting for layer {0} to resolve")]
    Timeout(Digest),
    /// A snapshot that is not this layer is already committed under its chain id.
    #[error("snapshot {0:?} exists and is not this layer")]
    NameTaken(String),
    /// Its index was found to be wrong.
    #[error("the SOCI index of layer {layer} is wrong, so it is not loaded lazily: {why}")]
    IndexWrong { layer: Digest, why: String },
    /// The lazy filesystem cannot show it.
    #[error("cannot serve layer {layer}: {why}")]
    Unserved { layer: Digest, why: String },
}

impl NotLazyReason {
    /// In one word, for scripts and searches: `SOCI_REASON=` in the journal, `reason` in `soci status`.
    pub fn code(&self) -> &'static str {
        match self {
            NotLazyReason::ParallelPull => "parallel-pull",
            NotLazyReason::TooSmall { .. } => "too-small",
            NotLazyReason::LabelMissing(_) => "label-missing",
            NotLazyReason::LabelInvalid { .. } => "label-invalid",
            NotLazyReason::NoIndex { .. } => "no-index",
            NotLazyReason::NoZtoc(_) => "no-ztoc",
            NotLazyReason::Unresolved { .. } => "unresolved",
            NotLazyReason::Timeout(_) => "timeout",
            NotLazyReason::NameTaken(_) => "name-taken",
            NotLazyReason::IndexWrong { .. } => "index-wrong",
            NotLazyReason::Unserved { .. } => "unserved",
        }
    }

    /// Whether this is a failure (`fuse_mount_failure_count`) and not a decision or an image without index.
    pub fn is_failure(&self) -> bool {
        match self {
            NotLazyReason::ParallelPull
            | NotLazyReason::TooSmall { .. }
            | NotLazyReason::NoIndex { .. }
            | NotLazyReason::NoZtoc(_) => false,
            NotLazyReason::LabelMissing(_)
            | NotLazyReason::LabelInvalid { .. }
            | NotLazyReason::Unresolved { .. }
            | NotLazyReason::Timeout(_)
            | NotLazyReason::NameTaken(_)
            | NotLazyReason::IndexWrong { .. }
            | NotLazyReason::Unserved { .. } => true,
        }
    }

    /// Whether lazy loading was tried before it turned out this way.
    pub fn was_tried(&self) -> bool {
        match self {
            NotLazyReason::ParallelPull | NotLazyReason::TooSmall { .. } => false,
            NotLazyReason::LabelMissing(_)
            | NotLazyReason::LabelInvalid { .. }
            | NotLazyReason::NoIndex { .. }
            | NotLazyReason::NoZtoc(_)
            | NotLazyReason::Unresolved { .. }
            | NotLazyReason::Timeout(_)
            | NotLazyReason::NameTaken(_)
            | NotLazyReason::IndexWrong { .. }
            | NotLazyReason::Unserved { .. } => true,
        }
    }
}

/// What became of a layer that containerd was about to unpack.
#[derive(Debug, Clone, Copy)]
pub enum Outcome<'a> {
    /// Readable while it arrives.
    Lazy,
    /// Pulled and unpacked here, for the reason that it is not lazy.
    Pulled(&'a NotLazyReason),
    /// containerd pulls and unpacks it.
    Left(&'a NotLazyReason),
}

/// The lazy side: what makes layers readable under `lazy/<id>`.
pub trait LazyLayers: Send + Sync {
    /// Makes the layer readable at `lazy/<id>`, durably, or says why not. Leaves the snapshot's `fs` alone.
    /// `parents` are the snapshots below, nearest first.
    fn prepare<'a>(
        &'a self,
        id: SnapshotId,
        target: &'a Target,
        parents: &'a [SnapshotId],
    ) -> BoxFuture<'a, Result<(), NotLazyReason>>;

    /// Makes the lazy layer `of` readable at `lazy/<id>` too, durably, with the owners that `maps` gives; or says why not.
    fn map<'a>(&'a self, of: SnapshotId, id: SnapshotId, maps: &'a IdMaps) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move { Err(format!("layer {of} cannot be shown as {id} with the owners {maps}")) })
    }

    /// Whether reads of this layer can be answered. Never waits long for the network.
    fn available(&self, id: SnapshotId) -> BoxFuture<'_, bool>;

    /// Why the layer must not be used any more, although its reads are answered: its index was found to be wrong.
    fn condemned(&self, id: SnapshotId) -> Option<String> {
        let _ = id;
        None
    }

    /// The snapshot will not be lazy after all, or its directory is about to be removed. Called for every snapshot, lazy or
    /// not, once or more.
    fn remove(&self, id: SnapshotId);

    /// What the layer holds on disk.
    fn usage(&self, id: SnapshotId) -> Usage;

    /// A layer extraction was not lazy, for this reason: called once for each.
    fn not_lazy(&self, id: SnapshotId, reason: &NotLazyReason) {
        let _ = (id, reason);
    }

    /// containerd now fetches and unpacks that layer.
    fn deferred(&self, id: SnapshotId) {
        let _ = id;
    }

    /// What became of a layer, once for each extraction that ends; a layer that was here already is none.
    fn decided(&self, id: SnapshotId, extraction: &Extraction, outcome: Outcome<'_>) {
        let _ = (id, extraction, outcome);
    }

    /// containerd has committed what it unpacked into `id`.
    fn committed(&self, id: SnapshotId) {
        let _ = id;
    }
}
