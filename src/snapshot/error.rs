//! Every way a snapshot operation can fail. `grpc::status` says which gRPC code each one is.

use crate::layout::SnapshotId;
use crate::oci::InvalidIdMap;
use std::io;
use std::path::PathBuf;

/// An operation that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("snapshot {0}: not found")]
    NotFound(String),
    #[error("missing parent {0:?}: not found")]
    ParentNotFound(String),
    #[error("snapshot {0}: already exists")]
    AlreadyExists(String),
    /// The layer is there, committed under its chain id: what containerd wants to hear of a lazy layer.
    #[error("target snapshot {0:?}: already exists")]
    TargetExists(String),
    #[error("parent {0:?} is not committed snapshot: invalid argument")]
    ParentNotCommitted(String),
    #[error("{what} must have 1 to {max} bytes and not start with \".mapped/\": invalid argument")]
    InvalidName { what: &'static str, max: usize },
    #[error("cannot update {field:?} field on snapshot {name:?}: invalid argument")]
    ImmutableField { field: String, name: String },
    #[error("snapshot {0} is not active: failed precondition")]
    NotActive(String),
    #[error("snapshot {0} is committed: failed to get active mount: failed precondition")]
    NotMountable(String),
    #[error("cannot remove snapshot {0} with child: failed precondition")]
    HasChildren(String),
    #[error("layer \"{0}\" unavailable: unavailable")]
    Unavailable(SnapshotId),
    /// Its files were not on disk when the machine went down, see `written`.
    #[error(
        "layer {name:?} was not on disk yet when the machine went down, and cannot be pulled again: {why}. Try again, or remove the image and \
         pull it: unavailable"
    )]
    Lost { name: String, why: String },
    /// What the layer shows is not what the image has.
    #[error(
        "layer \"{id}\" cannot be used, its SOCI index is wrong: {why}. Remove the image and pull it again: failed precondition"
    )]
    Condemned { id: SnapshotId, why: String },
    /// The daemon could not start properly, see [`super::Door`].
    #[error("soci-snapshotter takes nothing new: {0}")]
    Refused(String),
    #[error("context has no namespace attached")]
    NoNamespace,
    /// In the labels of a Prepare for a container in a user namespace.
    #[error("label {label}: invalid argument")]
    IdMapping { label: &'static str, source: InvalidIdMap },
    /// A layer cannot be shown with a user namespace's owners.
    #[error("layer {id} for a user namespace: {why}")]
    NotMapped { id: SnapshotId, why: String },
    #[error("snapshot numbers are used up")]
    IdsExhausted,
    #[error("directory of snapshot {id}")]
    Directory { id: SnapshotId, source: io::Error },
    #[error("snapshot records")]
    Store(#[from] StoreError),
    /// The task that did it panicked.
    #[error("the operation ended early")]
    Aborted,
}

/// What can be wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("snapshot database {} is in use by another process", path.display())]
    InUse { path: PathBuf },
    #[error(
        "snapshot database {} has schema {found}, this version knows up to {known}: it was written by a newer version",
        path.display()
    )]
    Newer { path: PathBuf, found: u64, known: u64 },
    /// Never repaired by guessing and never replaced by an empty one: containerd's own records name these snapshots.
    #[error(
        "snapshot database {} is damaged: {what}. It is left as it is: bring back a copy, or remove the images of this \
         snapshotter from containerd, move the file away and pull them again",
        path.display()
    )]
    Damaged { path: PathBuf, what: String },
    #[error(
        "the Go snapshotter that was here before is still running: it has its database {} open. Stop it, then start this one; \
         nothing was changed",
        path.display()
    )]
    PredecessorRuns { path: PathBuf },
    /// As with [`StoreError::Damaged`]: containerd's records name the snapshots in it.
    #[error(
        "the database {} of the Go snapshotter that was here before cannot be read: {what}. Nothing was taken over or changed: bring \
         back a copy, or remove the images of this snapshotter from containerd, move the file away and pull them again",
        path.display()
    )]
    PredecessorDamaged { path: PathBuf, what: String },
    #[error("record of snapshot {name:?} is damaged")]
    DamagedRecord { name: String, source: serde_json::Error },
    #[error("the records of snapshots contradict each other: {0}")]
    Inconsistent(String),
    #[error("snapshot database {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Database(#[from] Box<redb::Error>),
    #[error("cannot sync the directories of new snapshots to disk")]
    Unsettled(#[source] io::Error),
    /// A transaction shared by several operations failed; this is what the first one said.
    #[error("transaction failed: {0}")]
    Batch(String),
    #[error("the snapshot database is closed")]
    Closed,
}

impl StoreError {
    pub(super) fn database(error: impl Into<redb::Error>) -> StoreError {
        StoreError::Database(Box::new(error.into()))
    }
}

/// An error and its sources, outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
