//! What was decided for each layer, and why: for `soci status` and `soci explain`.
//!
//! Kept in memory, for layers whose snapshots exist, [`MOST`] of them. A lazy layer has a record on disk beside it, so that a new daemon knows of it
//! again; of what containerd or we pulled as a whole, a new daemon knows nothing, and says so.

use crate::{
    layout::SnapshotId,
    snapshot::{Extraction, Outcome},
    telemetry::status::Mode,
};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

/// Layers remembered; beyond, the oldest are forgotten. A node with a hundred images of forty layers has fewer.
const MOST: usize = 4096;

/// One layer's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub image: String,
    pub manifest: String,
    pub namespace: String,
    pub layer: String,
    pub mode: Mode,
    /// In one word: `indexed`, or the code of a [`crate::snapshot::NotLazyReason`].
    pub reason: &'static str,
    pub why: String,
    pub at: SystemTime,
}

/// All of them, by snapshot.
#[derive(Default)]
pub struct Decisions {
    /// Leaf lock.
    of: Mutex<BTreeMap<SnapshotId, Decision>>,
}

/// Why a lazy layer is lazy.
pub const INDEXED: &str = "indexed";

impl Decisions {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, Decision>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what became of a layer.
    pub fn record(&self, id: SnapshotId, extraction: &Extraction, outcome: Outcome<'_>) {
        let (mode, reason, why) = match outcome {
            Outcome::Lazy => (Mode::Lazy, INDEXED, "the image's SOCI index has a zTOC for it".to_owned()),
            Outcome::Pulled(reason) => (Mode::Pulled, reason.code(), reason.to_string()),
            Outcome::Left(reason) => (Mode::Containerd, reason.code(), reason.to_string()),
        };
        let (image, manifest, layer) = match &extraction.target {
            Ok(target) => (target.reference.to_string(), target.manifest.to_string(), target.layer.to_string()),
            // The labels did not name them; the chain id is what containerd knows the layer by.
            Err(_) => (String::new(), String::new(), extraction.chain_id.clone()),
        };
        let namespace = extraction.namespace.clone();
        let decision = Decision { image, manifest, namespace, layer, mode, reason, why, at: SystemTime::now() };
        let mut of = self.lock();
        of.insert(id, decision);
        if of.len() > MOST {
            of.pop_first();
        }
    }

    /// The snapshot is gone.
    pub fn forget(&self, id: SnapshotId) {
        self.lock().remove(&id);
    }

    pub fn all(&self) -> BTreeMap<SnapshotId, Decision> {
        self.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        oci::Digest,
        snapshot::{NotLazyReason, Target},
    };

    #[test]
    fn a_decision_is_kept_until_its_snapshot_goes_and_the_oldest_goes_first() {
        let digest = Digest::of(b"x");
        let target = Target {
            namespace: "n".into(),
            reference: "h/r:t".parse().unwrap(),
            manifest: digest,
            layer: digest,
            chain: None,
            size: None,
            index: None,
            layers: vec![(digest, None)],
        };
        let extraction = Extraction { chain_id: "c".into(), namespace: "n".into(), size: None, target: Ok(target) };
        let decisions = Decisions::default();
        for id in 0..=MOST as u32 {
            decisions.record(SnapshotId(id), &extraction, Outcome::Left(&NotLazyReason::NoZtoc(digest)));
        }
        assert!(!decisions.all().contains_key(&SnapshotId(0)));
        decisions.record(SnapshotId(1), &extraction, Outcome::Lazy);
        let all = decisions.all();
        let of = |id| (all[&SnapshotId(id)].mode, all[&SnapshotId(id)].reason, all[&SnapshotId(id)].image.as_str());
        assert_eq!((of(1), of(2)), ((Mode::Lazy, INDEXED, "h/r:t"), (Mode::Containerd, "no-ztoc", "h/r:t")));
        decisions.forget(SnapshotId(1));
        assert_eq!(decisions.all().len(), MOST - 1);
    }
}
