//! Lazy layers that another snapshotter mounted and we have not yet: those of a Go snapshotter whose records were taken over.
//!
//! Their snapshots are committed and say in their labels which layer of which image they are; the index, the zTOC and what the layer implies are not
//! beside them, because the Go snapshotter kept that in memory. So they are made lazy as at their first Prepare, by their labels: from the content
//! store where that has everything, else from the registry.
//!
//! ```text
//!   labels name no layer ──▶ named, given up
//!   labels name one ──▶ waiting ── its lazy parents are mounted, index and zTOC are had ──▶ mounted, with a record of its own
//!                          ▲  │ not now: named once
//!                          └──┘ after a second, two, … a minute; at once when a container is started from it
//! ```
//!
//! Nothing waits for this but containers that are started from such a layer, and they for a bounded time. The next start of the daemon finds what
//! is missing by the absence of a record, so nothing about it is written down.

use super::lazy::LazyMounts;
use crate::{
    grpc::labels,
    layout::SnapshotId,
    oci::Chain,
    snapshot::{Info, Snapshotter, StoreError, Target, chain},
    telemetry::catalog::say,
};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{Notify, Semaphore};

/// Layers worked on at a time.
const WIDTH: usize = 8;
/// Between two attempts: at first, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// What takes longer is said, whether or not it comes to something.
const SOON: Duration = Duration::from_secs(5);
/// How long a container that is started waits for a layer where the configuration sets no bound.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which layers wait, and who waits for them. Cheap to make; the tasks of [`adopt`] work on it.
#[derive(Debug, Default)]
pub struct Waiting {
    ids: Mutex<HashSet<SnapshotId>>,
    /// One layer less waits, or somebody is in a hurry. A waiter registers before it looks at `ids`, so no wake-up is lost.
    changed: Notify,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, HashSet<SnapshotId>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether that layer waits.
    pub fn has(&self, id: SnapshotId) -> bool {
        self.lock().contains(&id)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// That layer waits from now on.
    pub fn add(&self, id: SnapshotId) {
        self.lock().insert(id);
    }

    /// Waits until somebody is in a hurry, or one layer less waits; `limit` at most. Then for a moment more: somebody in a hurry, over and over,
    /// does not make it a storm.
    pub async fn rest(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.changed.notified()).await;
        tokio::time::sleep(PAUSE.0 / 4).await;
    }

    /// Nobody needs that layer any more, or it is mounted.
    pub fn forget(&self, id: SnapshotId) {
        if self.lock().remove(&id) {
            self.changed.notify_waiters();
        }
    }

    /// Has everything that waits tried again now, and waits until that layer does not wait any more.
    pub async fn hurry(&self, id: SnapshotId, patience: Option<Duration>) {
        let gone = async {
            loop {
                let mut changed = std::pin::pin!(self.changed.notified());
                changed.as_mut().enable();
                if !self.has(id) {
                    return;
                }
                changed.await;
            }
        };
        self.changed.notify_waiters();
        let _ = tokio::time::timeout(patience.unwrap_or(PATIENCE), gone).await;
    }
}

/// A layer that waits.
struct Adoptee {
    info: Info,
    target: Target,
    parents: Vec<SnapshotId>,
    /// Those of them that are lazy: what the layer takes from below is asked of them.
    lazy_parents: Vec<SnapshotId>,
}

impl Adoptee {
    /// Says that it waits, once; whether that is said now.
    fn waits(&self, said: bool, reason: &str, error: &str) -> bool {
        if !said {
            say!(
                TakeoverWaits,
                snapshot = %self.info.id,
                image = %self.target.reference,
                layer = %self.target.layer,
                reason,
                error,
                "a lazily loaded layer of the Go snapshotter cannot be mounted yet; it is tried again"
            );
        }
        true
    }
}

/// Finds the lazy layers that have no record of ours, and begins to make them lazy. Gives the numbers of those that have one.
pub fn adopt(snapshotter: &Snapshotter, lazy: &Arc<LazyMounts>) -> Result<Vec<SnapshotId>, StoreError> {
    let (mut recorded, mut adoptees) = (Vec::new(), Vec::new());
    for info in snapshotter.lazy_layers()? {
        if lazy.layout.snapshot_lazy_record(info.id).exists() {
            recorded.push(info.id);
            continue;
        }
        let links = snapshotter.parents(&info).map_err(|error| chain(&error));
        let target = labels::committed(&info.labels).map_err(|reason| chain(&reason));
        match links.and_then(|links| Ok((links, target?))) {
            Ok((links, target)) => adoptees.push(Adoptee {
                target: Target { chain: Chain::of_names(info.parent.as_deref(), &info.name), ..target },
                parents: links.iter().map(|link| link.id).collect(),
                lazy_parents: links.iter().filter(|link| link.lazy).map(|link| link.id).collect(),
                info,
            }),
            Err(error) => {
                say!(NotTakenOver, snapshot = info.name, error, "a lazily loaded layer is not taken over");
            }
        }
    }
    // All of them before the first task looks for its parents.
    lazy.state.waiting.lock().extend(adoptees.iter().map(|adoptee| adoptee.info.id));
    let slots = Arc::new(Semaphore::new(WIDTH));
    for adoptee in adoptees {
        tokio::spawn(mount(lazy.clone(), adoptee, slots.clone()));
    }
    Ok(recorded)
}

async fn mount(lazy: Arc<LazyMounts>, adoptee: Adoptee, slots: Arc<Semaphore>) {
    let id = adoptee.info.id;
    let waiting = &lazy.state.waiting;
    let (mut pause, mut said) = (PAUSE.0, false);
    loop {
        let mut changed = std::pin::pin!(waiting.changed.notified());
        changed.as_mut().enable();
        if !waiting.has(id) {
            return;
        }
        if adoptee.lazy_parents.iter().all(|parent| lazy.is_mounted(*parent)) {
            let slot = slots.acquire().await;
            let mut adopting = std::pin::pin!(lazy.adopt(id, &adoptee.target, &adoptee.parents));
            let soon = tokio::time::timeout(SOON, &mut adopting).await;
            let adopted = match soon {
                Ok(adopted) => adopted,
                Err(_) => {
                    said |= adoptee.waits(said, "slow", "no answer yet");
                    adopting.await
                }
            };
            drop(slot);
            match adopted {
                Ok(()) if waiting.has(id) => {
                    let (snapshot, image) = (id.to_string(), adoptee.target.reference.to_string());
                    tracing::info!(snapshot, image, "a lazily loaded layer of the Go snapshotter is mounted");
                    return waiting.forget(id);
                }
                // It was removed meanwhile.
                Ok(()) => return lazy.abandon(id),
                Err(reason) => said |= adoptee.waits(said, reason.code(), &chain(&reason)),
            }
        }
        let _ = tokio::time::timeout(pause, changed).await;
        // Somebody in a hurry, over and over, does not make it a storm.
        tokio::time::sleep(PAUSE.0 / 4).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}
