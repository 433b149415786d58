//! After a start: every lazy layer is shown again, from local files and without the network, before anything else is done. Containers wait for
//! their reads; nobody waits for the rest.
//!
//! The snapshot database is not asked: after a crash it checks itself, and it syncs the disk, which a busy machine takes seconds for. What is
//! shown is what has a record beside its snapshot, which is written before the database hears of it. A record that the database does not know is
//! of a Prepare that a crash has cut off; it goes with the first sweep.

use super::{collect, lazy::LazyMounts, record, systemd};
use crate::{layout::SnapshotId, telemetry::catalog::say};
use futures::StreamExt;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Layers that are opened at a time: enough to keep a disk busy.
const WIDTH: usize = 8;

/// What came of it.
pub(super) struct Shown {
    records: Vec<SnapshotId>,
    /// Those that could not be shown, and why.
    failed: HashMap<SnapshotId, String>,
}

/// Shows every layer that has a record.
pub(super) async fn show(lazy: &Arc<LazyMounts>) -> Shown {
    let records = record::all(&lazy.layout);
    if !records.is_empty() {
        let _ = systemd::status(&format!("starting: restoring {} lazy layers from local disk", records.len()));
    }
    let opened = records.iter().map(|id| {
        let (lazy, id) = (lazy.clone(), *id);
        async move { (id, lazy.recover(id).await) }
    });
    let failed = futures::stream::iter(opened)
        .buffer_unordered(WIDTH)
        .filter_map(async |(id, result)| result.err().map(|error| (id, error)))
        .collect()
        .await;
    Shown { records, failed }
}

impl Shown {
    /// Whether there may be containers that depend on this daemon.
    pub(super) fn anything(&self) -> bool {
        !self.records.is_empty()
    }

    /// Says what became of the layers that there are: those that the database knows (`known`), or where it cannot be read, all. Whether all of
    /// them are shown.
    pub(super) fn tell(&self, known: Option<&[SnapshotId]>) -> bool {
        let all: HashSet<SnapshotId> = known.unwrap_or(&self.records).iter().copied().collect();
        let mut failed: Vec<(&SnapshotId, &String)> = self.failed.iter().filter(|(id, _)| all.contains(id)).collect();
        failed.sort();
        for (id, error) in &failed {
            say!(
                LayerNotRestored,
                snapshot = id.to_string(),
                error,
                "failed to restore remote snapshot; what reads it gets ESTALE. It is tried again when a container is \
                 started from it; if that does not help, remove the image and pull it again"
            );
        }
        if !all.is_empty() {
            let restored = all.len() - failed.len();
            tracing::info!(layers = all.len().to_string(), restored = restored.to_string(), "lazy layers restored");
        }
        failed.is_empty()
    }
}

/// Removes what no snapshot refers to: layers of the store, indexes and zTOCs. Only to be called when it is known which snapshots there are, and
/// all of them are shown.
pub(super) async fn sweep(lazy: &Arc<LazyMounts>) {
    let me = lazy.clone();
    let _ = tokio::task::spawn_blocking(move || me.store.sweep()).await;
    collect::collect(lazy).await;
}
