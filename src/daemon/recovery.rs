//! After a start: every lazy layer is shown again, from local files and without the network, before anything else is done. Containers wait for
//! their reads; nobody waits for the rest.
//!
//! The snapshot database is not asked: after a crash it checks itself, and it syncs the disk, which a busy machine takes seconds for. What is
//! shown is what has a record beside its snapshot, which is written before the database hears of it. A record that the database does not know is
//! of a Prepare that a crash has cut off; it goes with the first sweep.
//!
//! A layer whose zTOC is damaged or gone is expected ([`crate::fs::Tree::expect`]): who reads it waits, as for anything else that is not here, while the
//! zTOC is brought from where it came from.

use super::{
    collect,
    lazy::{LazyMounts, NotRestored},
    record, systemd,
};
use crate::{layout::SnapshotId, telemetry::catalog::say};
use futures::StreamExt;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::Semaphore;

/// Layers that are opened at a time: enough to keep a disk busy.
const WIDTH: usize = 8;
/// Between two attempts to get a zTOC back: at first, and at most. Containers wait for it.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

/// What came of it.
pub(super) struct Shown {
    records: Vec<SnapshotId>,
    /// Those that could not be shown, and why.
    failed: HashMap<SnapshotId, String>,
    /// Those that are expected.
    expected: HashSet<SnapshotId>,
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
    let mut opened = futures::stream::iter(opened).buffer_unordered(WIDTH);
    let (mut failed, mut expected) = (HashMap::new(), HashSet::new());
    while let Some((id, result)) = opened.next().await {
        match result {
            Ok(()) => {}
            Err(NotRestored::Other(error)) => {
                failed.insert(id, error);
            }
            Err(NotRestored::ZtocLost(record, error)) => {
                say!(
                    LayerExpected,
                    snapshot = id.to_string(),
                    layer = %record.layer,
                    image = %record.image,
                    error,
                    "the index file of a lazily loaded layer has to be fetched again; what reads the layer waits for it"
                );
                lazy.tree.expect(id);
                lazy.state.waiting.add(id);
                expected.insert(id);
            }
        }
    }
    drop(opened);
    let slots = Arc::new(Semaphore::new(WIDTH));
    for id in &expected {
        tokio::spawn(restore(lazy.clone(), *id, slots.clone()));
    }
    Shown { records, failed, expected }
}

/// Shows a layer that is expected, as soon as that can be done.
async fn restore(lazy: Arc<LazyMounts>, id: SnapshotId, slots: Arc<Semaphore>) {
    let mut pause = PAUSE.0;
    while lazy.state.waiting.has(id) {
        let slot = slots.acquire().await;
        let restored = lazy.restore(id).await;
        drop(slot);
        match restored {
            // It was removed meanwhile.
            Ok(()) if !lazy.state.waiting.has(id) => return lazy.abandon(id),
            Ok(()) => {
                say!(LayerRestored, snapshot = id.to_string(), "the remote snapshot whose index file was lost is back");
                return lazy.state.waiting.forget(id);
            }
            Err(NotRestored::ZtocLost(_, error)) => {
                tracing::debug!(snapshot = id.to_string(), error, "the index file of a layer cannot be fetched yet");
            }
            Err(NotRestored::Other(error)) => {
                say_lost(id, &error);
                lazy.tree.give_up(id);
                return lazy.state.waiting.forget(id);
            }
        }
        lazy.state.waiting.rest(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

fn say_lost(id: SnapshotId, error: &str) {
    say!(
        LayerNotRestored,
        snapshot = id.to_string(),
        error,
        "failed to restore remote snapshot; what reads it gets ESTALE. It is tried again when a container is \
         started from it; if that does not help, remove the image and pull it again"
    );
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
            say_lost(**id, error);
        }
        if !all.is_empty() {
            let expected = all.iter().filter(|id| self.expected.contains(id)).count();
            let restored = all.len() - failed.len() - expected;
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
