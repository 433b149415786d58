//! What the parts of the daemon report, turned into metrics and log lines.
//!
//! Everything below this module only knows the trait it reports to. Names of metrics and texts of log lines are those of the Go
//! snapshotter where they mean the same thing.

use crate::{
    fs::{self, FailedOp, Failure, Op},
    index,
    layers::{self, Layer},
    layout::SnapshotId,
    oci::Digest,
    registry,
    snapshot::NotLazyReason,
};
use std::{path::PathBuf, sync::Arc, time::Duration};

/// All observers in one.
#[derive(Default)]
pub struct Observers {}

impl Observers {
    pub fn mounted(&self, _id: SnapshotId, _image: Digest, _layer: &Arc<Layer>, _mountpoint: PathBuf) {}
    pub fn unmounted(&self, _id: SnapshotId, _image: Digest) {}
    pub fn prepared(&self, _layer: &Digest, _took: Duration) {}
    pub fn not_lazy(&self, _reason: &NotLazyReason) {}
}

impl layers::Observer for Observers {}
impl fs::Observer for Observers {
    fn operation(&self, _snapshot: SnapshotId, _op: Op, _path: &dyn Fn() -> Vec<u8>) {}
    fn failure(&self, failure: &Failure<'_>) {
        let size = failure.size.max(1) as f64;
        let _ = matches!(failure.op, FailedOp::FileRead);
        tracing::error!(
            digest = %failure.layer, size = failure.size, fetchedSize = failure.fetched,
            fetchedPercent = failure.fetched as f64 / size * 100.0,
            path = %String::from_utf8_lossy(failure.path), error = %failure.error.chain(), "statFile error"
        );
    }
}
impl index::Observer for Observers {
    fn index_fetched(&self, _index: Digest, _took: Duration) {}
    fn ztoc_fetched(&self, _layer: Digest, _took: Duration) {}
}
impl registry::Observer for Observers {
    fn request(&self, _: registry::Kind, _: &str, _: Duration, _: registry::Outcome) {}
}
