//! Prepare of a layer: lazy, else pulled here, else left to containerd; and what the log says about it.
//!
//! ```text
//! plan ──▶ lazy? ──no, for a reason──▶ pulled here? ──no, for a reason──▶ containerd gets the mounts of an empty snapshot
//!            │ yes                        │ yes
//!            └──▶ record under the chain id ◀──┘ ──▶ TargetExists
//! ```

use super::directories;
use super::directories::Access;
use super::disk::blocking;
use super::eager::{Extent, NotPulled, Wanted};
use super::error::{SnapshotError, chain};
use super::lazy::{Extraction, NotLazyReason, Outcome, Target};
use super::model::{Info, Kind, Labels, Timestamp, Usage, label};
use super::snapshotter::Inner;
use super::state::{self, Mount, Plan};
use super::store::{Change, Link};
use crate::layout::SnapshotId;
use crate::telemetry::catalog::say;
use tokio::sync::oneshot;

/// How often a layer is pulled again whose result somebody else took, and that then disappeared.
const TURNS: u32 = 3;

/// Ends when the caller has gone away.
pub(super) type Gone = oneshot::Receiver<std::convert::Infallible>;

impl Inner {
    /// Prepare of a layer that containerd is about to unpack.
    pub(super) async fn extract(
        &self,
        key: String,
        parent: Option<String>,
        labels: Labels,
        extraction: Extraction,
        gone: Gone,
    ) -> Result<Mount, SnapshotError> {
        let there = self.store.find(&extraction.chain_id)?;
        if let Some(there) = &there
            && is_target(there, &extraction, parent.as_deref())
        {
            log_prepared(&key, &extraction, there.is_lazy());
            return Err(SnapshotError::TargetExists(extraction.chain_id));
        }
        let parents = self.whole(self.precheck(&key, parent.as_deref())?).await?;
        let labels = state::extraction_labels(labels, &extraction);
        let making = self.make(Access::Writable).await?;
        let id = making.id;
        let info = Self::new_info(id, key.clone(), parent.clone(), Kind::Active, labels.clone());
        // Not durable yet: a crash before the commit below forgets a snapshot that nobody was told of.
        if let Err(error) = self.store.insert(info, Change::Soon).await {
            drop(making);
            self.removed.notify_one();
            return Err(error);
        }
        drop(making);

        let reason = match state::plan(&extraction, &self.pull) {
            Plan::Defer(reason) => reason,
            Plan::Lazy(_) if there.is_some() => NotLazyReason::NameTaken(extraction.chain_id.clone()),
            Plan::Lazy(target) => match self.make_lazy(id, target, &parents).await {
                Err(reason) => reason,
                Ok(()) => return self.commit_lazy(id, &key, parent.as_deref(), labels, &extraction).await,
            },
        };
        self.lazy.not_lazy(id, &reason);
        log_not_lazy(&key, &extraction, &reason);
        if let (Some(extent), Ok(target), None) = (state::eager(&reason, &self.pull), &extraction.target, &there) {
            let wanted = Wanted { target: target.clone(), chain_id: extraction.chain_id.clone(), extent };
            let layer = Layer { key: &key, parent: parent.as_deref(), parents: &parents, labels: &labels };
            match self.pull(layer, &extraction, &wanted, gone).await {
                Ok(taken) => {
                    if let Some(id) = taken {
                        self.lazy.decided(id, &extraction, Outcome::Pulled(&reason));
                    }
                    return Err(SnapshotError::TargetExists(extraction.chain_id));
                }
                Err(NotHere::Pull(why)) => {
                    self.eager.failed(extent, &why);
                    log_deferred(&key, &extraction, &reason, &why.to_string());
                }
                Err(NotHere::Fatal(error)) => {
                    self.discard(&key).await;
                    return Err(error);
                }
            }
        } else if matches!(reason, NotLazyReason::NoIndex { .. }) {
            log_left(&key, &extraction, &reason);
        } else {
            log_deferred(&key, &extraction, &reason, &reason.to_string());
        }
        self.lazy.decided(id, &extraction, Outcome::Left(&reason));
        self.lazy.deferred(id);
        let answered = async {
            self.check_available(&parents).await?;
            self.inherit_owner(id, &parents).await?;
            self.store.sync().await
        };
        match answered.await {
            Ok(()) => Ok(self.mount(id, Kind::Active, &parents)),
            Err(error) => {
                self.discard(&key).await;
                Err(error)
            }
        }
    }

    /// Makes the layer readable and points the snapshot at it.
    async fn make_lazy(&self, id: SnapshotId, target: &Target, parents: &[Link]) -> Result<(), NotLazyReason> {
        let ids: Vec<SnapshotId> = parents.iter().map(|link| link.id).collect();
        // The semaphore is never closed; a layer prepared without a slot would only be one too many.
        let _slot = self.slots.acquire().await.ok();
        self.lazy.prepare(id, target, &ids).await?;
        let layout = self.layout.clone();
        let linked = blocking(move || directories::link_to_lazy(&layout, id)).await;
        linked.map_err(|error| {
            self.lazy.remove(id);
            NotLazyReason::Unserved { layer: target.layer, why: error.to_string() }
        })
    }

    /// Commits a lazy layer under its chain id. Always an error: `TargetExists` is the good one.
    async fn commit_lazy(
        &self,
        id: SnapshotId,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
        extraction: &Extraction,
    ) -> Result<Mount, SnapshotError> {
        let (name, labels) = (&extraction.chain_id, state::lazy_labels(labels));
        // Usage is what the layer store holds at any time, see `usage`.
        match self.store.commit(key, name, labels, Usage::default(), Timestamp::now()).await {
            Ok(()) => {
                self.lazy.decided(id, extraction, Outcome::Lazy);
                log_prepared(key, extraction, true);
                Err(SnapshotError::TargetExists(name.clone()))
            }
            Err(SnapshotError::AlreadyExists(_)) => {
                // Somebody else prepared the same layer at the same time, and was first.
                self.discard(key).await;
                match self.store.find(name)? {
                    Some(there) if is_target(&there, extraction, parent) => {
                        log_prepared(key, extraction, there.is_lazy());
                        Err(SnapshotError::TargetExists(name.clone()))
                    }
                    _ => Err(SnapshotError::AlreadyExists(name.clone())),
                }
            }
            Err(error) => {
                self.discard(key).await;
                Err(error)
            }
        }
    }

    /// Takes back an active snapshot that nobody was told of.
    async fn discard(&self, key: &str) {
        if let Err(error) = self.store.remove(key, Change::Soon).await {
            say!(NotRemoved, key, error = chain(&error), "cannot take back a snapshot");
        }
        self.removed.notify_one();
    }

    /// Pulls the layer and commits it under its chain id. The new snapshot, unless somebody else was first.
    async fn pull(
        &self,
        layer: Layer<'_>,
        extraction: &Extraction,
        wanted: &Wanted,
        mut gone: Gone,
    ) -> Result<Option<SnapshotId>, NotHere> {
        if wanted.extent == Extent::Image {
            tracing::info!(key = layer.key, target = wanted.chain_id, "pulling the image in parallel");
        }
        let parents: Vec<SnapshotId> = layer.parents.iter().map(|link| link.id).collect();
        for _ in 0..TURNS {
            let pulled = tokio::select! {
                pulled = self.eager.pull(wanted) => pulled.map_err(NotHere::Pull)?,
                _ = &mut gone => return Err(NotHere::Fatal(SnapshotError::Aborted)),
            };
            // Whoever else waited for the same layer waits here until we are done with it.
            let mut place = pulled.place.lock().await;
            match self.store.find(&wanted.chain_id).map_err(|e| NotHere::Fatal(e.into()))? {
                Some(there) if is_target(&there, extraction, layer.parent) => {
                    self.discard(layer.key).await;
                    log_prepared(layer.key, extraction, there.is_lazy());
                    return Ok(None);
                }
                Some(_) => return Err(NotHere::Fatal(SnapshotError::AlreadyExists(wanted.chain_id.clone()))),
                None => {}
            }
            // Taken by somebody whose snapshot has been removed since.
            let Some(taken) = place.take() else { continue };
            let id = taken.id();
            let unpack = |why: String| NotHere::Pull(NotPulled::Unpack { layer: wanted.target.layer, why });
            self.inherit_owner(id, layer.parents).await.map_err(NotHere::Fatal)?;
            let usage = self.eager.publish(id, &parents).await.map_err(|e| unpack(e.to_string()))?;
            let labels = state::pulled_labels(layer.labels.clone(), wanted.extent);
            let parent = layer.parent.map(str::to_owned);
            let info = Info { usage, ..Self::new_info(id, wanted.chain_id.clone(), parent, Kind::Committed, labels) };
            self.store.replace(layer.key, info).await.map_err(NotHere::Fatal)?;
            taken.keep();
            self.writing.committed(id);
            self.removed.notify_one();
            log_prepared(layer.key, extraction, false);
            return Ok(Some(id));
        }
        Err(NotHere::Pull(NotPulled::Abandoned))
    }
}

/// The Prepare that a layer is pulled for.
struct Layer<'a> {
    key: &'a str,
    parent: Option<&'a str>,
    parents: &'a [Link],
    labels: &'a Labels,
}

/// Why a layer is not here after a pull.
enum NotHere {
    /// containerd may have more luck.
    Pull(NotPulled),
    /// Our records, or a caller that is gone.
    Fatal(SnapshotError),
}

/// Why a layer is not lazy, where that was tried.
fn log_not_lazy(key: &str, extraction: &Extraction, reason: &NotLazyReason) {
    let (target, image, layer) = names(extraction);
    if reason.was_tried() {
        say!(
            LayerNotLazy,
            "remote-snapshot-prepared" = "false",
            error = reason.to_string(),
            key,
            target,
            image,
            layer,
            reason = reason.code(),
            "failed to prepare remote snapshot"
        );
    }
    if matches!(reason, NotLazyReason::TooSmall { .. }) {
        tracing::info!(key, "layer size less than runtime min_layer_size, skipping remote snapshot preparation");
    }
}

/// The machine-read line of a layer of an image without index that is left to containerd.
fn log_left(key: &str, extraction: &Extraction, reason: &NotLazyReason) {
    let (target, image, layer) = names(extraction);
    say!(
        NoIndex,
        "defer-snapshot-runtime" = "true",
        key,
        target,
        image,
        layer,
        reason = reason.code(),
        "no valid SOCI index found; deferring to container runtime"
    );
}

/// The machine-read line of any other layer that is left to containerd: why it is not lazy, and what came in the way after that.
fn log_deferred(key: &str, extraction: &Extraction, reason: &NotLazyReason, error: &str) {
    let (target, image, layer) = names(extraction);
    say!(
        LeftToContainerd,
        "defer-snapshot-runtime" = "true",
        error,
        key,
        target,
        image,
        layer,
        reason = reason.code(),
        "failed to prepare local snapshot; deferring to container runtime"
    );
}

/// Whether containerd, searching for the target after ALREADY_EXISTS, will find `there`.
fn is_target(there: &Info, extraction: &Extraction, parent: Option<&str>) -> bool {
    there.kind == Kind::Committed
        && there.parent.as_deref() == parent
        && there.labels.get(label::TARGET) == Some(&extraction.chain_id)
}

/// The machine-read line of a layer that containerd need not unpack.
fn log_prepared(key: &str, extraction: &Extraction, lazy: bool) {
    let (target, image, layer) = names(extraction);
    if lazy {
        say!(
            LayerLazy,
            "remote-snapshot-prepared" = "true",
            key,
            target,
            image,
            layer,
            "remote snapshot successfully prepared."
        );
    } else {
        say!(
            LayerPulled,
            "local-snapshot-prepared" = "true",
            key,
            target,
            image,
            layer,
            "local snapshot successfully prepared"
        );
    }
}

/// What log lines call the layer: its chain id, and image and digest where the labels name them.
fn names(extraction: &Extraction) -> (&str, Option<String>, Option<String>) {
    let target = extraction.target.as_ref().ok();
    let (image, layer) = (target.map(|t| t.reference.to_string()), target.map(|t| t.layer.to_string()));
    (extraction.chain_id.as_str(), image, layer)
}
