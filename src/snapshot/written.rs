//! Whether the files of unpacked layers are on disk, and what is done where they are not.
//!
//! Nobody waits for the disk when a layer is committed: its files are in the kernel's memory, which writes them when it likes. A power cut before that
//! leaves a record, and containerd's knowledge of it, with files that are empty or missing. So a record carries the boot it was made in until the
//! filesystem was synced, which is done as soon as a pull comes to rest:
//!
//! ```text
//!   committed ──▶ marked with the boot ───── sync ─────▶ written
//!                     │ found by another boot
//!                     ▼
//!                   lost ──▶ pulled again, into a directory with another number ──▶ marked with this boot …
//! ```
//! Invariant: a lost layer is in no mount. Nothing of an earlier boot is mounted any more, and what is asked for now waits until the layer is whole
//! ([`Inner::whole`]); so its directory can be replaced.
//!
//! Layers that containerd has unpacked without saying of which image they are cannot be pulled again. They are used as they are, as other snapshotters
//! use all of theirs, and the journal says so.

use super::eager::Wanted;
use super::error::{SnapshotError, StoreError, chain};
use super::mapped;
use super::model::{BootId, Info};
use super::snapshotter::Inner;
use super::store::{Change, Link, Store};
use crate::layout::SnapshotId;
use crate::telemetry::catalog::say;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// A sync waits until so long after the last commit, and until nothing is being unpacked here, which it would slow down.
const REST: Duration = Duration::from_secs(1);
/// But no longer than this after the first: by then the kernel writes of itself (`vm.dirty_expire_centisecs`).
const LATEST: Duration = Duration::from_secs(30);
/// From the start to the first attempt to have lost layers again, if nobody asks for them. Then twice as long each time, up to [`SELDOM`].
const SOON: Duration = Duration::from_secs(1);
/// See [`SOON`].
const SELDOM: Duration = Duration::from_secs(300);
/// Layers named in the journal; the rest is counted.
const NAMED: usize = 20;

/// A layer whose files a power cut may have taken. Locked by who pulls it again; holds the number that it has then.
type Lost = Arc<tokio::sync::Mutex<Option<SnapshotId>>>;

/// What is known of the disk.
pub(super) struct Writing {
    /// Committed since the last sync.
    pending: Mutex<BTreeSet<SnapshotId>>,
    /// Something is pending, or all this is being dropped.
    pub(super) wake: Arc<Notify>,
    /// One sync at a time.
    syncing: tokio::sync::Mutex<()>,
    lost: Mutex<BTreeMap<SnapshotId, Lost>>,
    /// `None`: nothing is marked.
    boot: Option<BootId>,
    /// The layer that a record is about, if its labels say it.
    layer_of: fn(&Info) -> Option<Wanted>,
}

impl Writing {
    /// Looks through the marks in `store`: those of this boot are pending, the layers of others are lost.
    pub(super) async fn open(
        store: &Store,
        boot: Option<BootId>,
        layer_of: fn(&Info) -> Option<Wanted>,
    ) -> Result<Writing, StoreError> {
        let (mut pending, mut lost) = (BTreeSet::new(), BTreeMap::new());
        let (mut again, mut as_they_are) = (Vec::new(), Vec::new());
        for (id, marked) in store.unwritten()? {
            let Some(name) = store.name(id)? else { continue };
            let Some(info) = store.find(&name)? else { continue };
            if boot.is_none_or(|boot| boot == marked) {
                pending.insert(id);
            } else if mapped::is_mapped(&info) {
                // Copied again when it is needed.
                discard(store, &name).await?;
            } else if layer_of(&info).is_some() {
                again.push(name);
                lost.insert(id, Lost::default());
            } else {
                as_they_are.push((id, name));
            }
        }
        if !again.is_empty() {
            say!(
                LayersLost,
                layers = again.len().to_string(),
                names = named(&again),
                "layers were not on disk yet when the machine went down; they are pulled again"
            );
        }
        if !as_they_are.is_empty() {
            let (ids, names): (Vec<_>, Vec<_>) = as_they_are.into_iter().unzip();
            say!(
                LayersDoubtful,
                layers = names.len().to_string(),
                names = named(&names),
                "layers that containerd has unpacked were not on disk yet when the machine went down; files in them may be empty"
            );
            // Once is enough; on a full disk it is said again.
            if let Err(error) = store.written(ids).await {
                tracing::debug!(error = chain(&error), "what was said of these layers is said again at the next start");
            }
        }
        let wake = Arc::new(Notify::new());
        if !pending.is_empty() {
            wake.notify_one();
        }
        Ok(Writing {
            pending: Mutex::new(pending),
            wake,
            syncing: tokio::sync::Mutex::default(),
            lost: Mutex::new(lost),
            boot,
            layer_of,
        })
    }

    /// The record of `id` was committed.
    pub(super) fn committed(&self, id: SnapshotId) {
        if self.boot.is_none() {
            return;
        }
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        self.wake.notify_one();
    }

    fn lost(&self, id: SnapshotId) -> Option<Lost> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Lost layers that nobody has pulled yet. Who is pulling one just now may fail.
    fn still_lost(&self) -> Vec<SnapshotId> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.iter().filter(|(_, lost)| lost.try_lock().map_or(true, |now| now.is_none())).map(|(id, _)| *id).collect()
    }
}

async fn discard(store: &Store, name: &str) -> Result<(), StoreError> {
    store.remove(name, Change::Durable).await.map(drop).map_err(records)
}

fn records(error: SnapshotError) -> StoreError {
    match error {
        SnapshotError::Store(error) => error,
        other => StoreError::Inconsistent(other.to_string()),
    }
}

fn named(names: &[String]) -> String {
    names[..names.len().min(NAMED)].join(" ")
}

/// Syncs after commits, as long as there is a snapshotter.
pub(super) async fn writer(inner: Weak<Inner>, wake: Arc<Notify>) {
    loop {
        wake.notified().await;
        if inner.strong_count() == 0 {
            return;
        }
        let latest = Instant::now() + LATEST;
        loop {
            let more = tokio::time::timeout(REST, wake.notified()).await.is_ok();
            let Some(inner) = inner.upgrade() else { return };
            if Instant::now() >= latest || !(more || inner.is_unpacking()) {
                inner.sync().await;
                break;
            }
        }
    }
}

/// Has lost layers pulled again before anybody asks for them, until all are here.
pub(super) async fn mender(inner: Weak<Inner>) {
    let mut wait = SOON;
    let mut told = BTreeSet::new();
    loop {
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(SELDOM);
        let Some(inner) = inner.upgrade() else { return };
        let lost = inner.writing.still_lost();
        if lost.is_empty() {
            return;
        }
        for id in lost {
            if let Err(error) = inner.mend_chain(id).await {
                let error = chain(&error);
                if told.insert(id) {
                    say!(LayerStillLost, snapshot = %id, error, "a layer that was lost cannot be pulled again yet");
                } else {
                    tracing::debug!(snapshot = %id, error, "a layer that was lost cannot be pulled again yet");
                }
            }
        }
    }
}

impl Inner {
    /// Has on disk what was committed until now.
    pub(super) async fn sync(&self) {
        let _one = self.writing.syncing.lock().await;
        // Those that are committed during the sync are for the next one.
        let ids = self.writing.pending.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if ids.is_empty() {
            return;
        }
        let synced = match self.disk.sync().await {
            Ok(()) => self.store.written(ids.iter().copied().collect()).await.map_err(|error| chain(&error)),
            Err(error) => Err(error.to_string()),
        };
        match synced {
            Ok(()) => {
                let mut pending = self.writing.pending.lock().unwrap_or_else(PoisonError::into_inner);
                pending.retain(|id| !ids.contains(id));
            }
            // Tried again with the next layer, and after a restart.
            Err(error) => say!(NotSynced, error, "cannot write unpacked layers to disk"),
        }
    }

    /// `links`, nearest first, when none of them is lost any more: those that were have another number.
    pub(super) async fn whole(&self, mut links: Vec<Link>) -> Result<Vec<Link>, SnapshotError> {
        for at in (0..links.len()).rev() {
            if let Some(lost) = self.writing.lost(links[at].id) {
                links[at].id = self.mend(&lost, links[at].id, &links[at + 1..]).await?;
            }
        }
        Ok(links)
    }

    async fn mend_chain(&self, id: SnapshotId) -> Result<(), SnapshotError> {
        match self.store.name(id)? {
            Some(name) => self.whole(self.store.chain(Some(&name))?).await.map(drop),
            None => {
                self.writing.lost.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                Ok(())
            }
        }
    }

    /// The number of a lost layer above `parents`, when its content is there again.
    async fn mend(&self, lost: &Lost, id: SnapshotId, parents: &[Link]) -> Result<SnapshotId, SnapshotError> {
        let mut now = lost.lock().await;
        if let Some(id) = *now {
            return Ok(id);
        }
        let gone = || SnapshotError::NotFound(id.to_string());
        let info = self.store.get(&self.store.name(id)?.ok_or_else(gone)?)?;
        let failed = |why: String| SnapshotError::Lost { name: info.name.clone(), why };
        let wanted = (self.writing.layer_of)(&info).ok_or_else(|| failed("its labels do not name it".into()))?;
        let pulled = self.eager.pull(&wanted).await.map_err(|why| failed(why.to_string()))?;
        let mut place = pulled.place.lock().await;
        let taken = place.take().ok_or_else(|| failed("somebody else has taken what was pulled".into()))?;
        let to = taken.id();
        self.inherit_owner(to, parents).await?;
        let below: Vec<SnapshotId> = parents.iter().map(|link| link.id).collect();
        let usage = self.eager.publish(to, &below).await.map_err(|error| failed(error.to_string()))?;
        self.store.renumber(&info.name, to, usage).await?;
        taken.keep();
        *now = Some(to);
        self.writing.committed(to);
        self.removed.notify_one();
        tracing::info!(snapshot = %to, name = info.name, layer = %wanted.target.layer, "a layer that was lost is here again");
        Ok(to)
    }
}
