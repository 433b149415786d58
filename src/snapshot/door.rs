//! Whether clients reach the snapshotter, and whether it takes anything new.
//!
//! ```text
//!   closed ── the records can be opened ──▶ open, refusing ◀──────▶ open
//!                                              what is wrong comes and goes
//! ```
//!
//! A daemon that cannot start properly still serves what is mounted. Its clients are told why nothing else works, with the same words in every
//! answer, instead of finding nobody.

use super::{SnapshotError, Snapshotter};
use std::sync::{Arc, PoisonError, RwLock};

/// In front of a [`Snapshotter`] that may not be there yet. Cheap to clone; all clones are one door.
#[derive(Clone)]
pub struct Door(Arc<RwLock<Behind>>);

struct Behind {
    /// `None`: the records cannot be read.
    snapshotter: Option<Snapshotter>,
    /// Why nothing new is taken.
    refusal: Option<String>,
}

impl From<Snapshotter> for Door {
    fn from(snapshotter: Snapshotter) -> Door {
        Door(Arc::new(RwLock::new(Behind { snapshotter: Some(snapshotter), refusal: None })))
    }
}

impl Door {
    /// Nobody gets in before [`Door::open`].
    pub fn closed() -> Door {
        Door(Arc::new(RwLock::new(Behind { snapshotter: None, refusal: None })))
    }

    /// The records can be read from now on.
    pub fn open(&self, snapshotter: Snapshotter) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).snapshotter = Some(snapshotter);
    }

    /// Nothing new is taken, for this reason; or again.
    pub fn refuse(&self, why: Option<String>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).refusal = why;
    }

    /// For what makes a snapshot.
    pub fn admit(&self) -> Result<Snapshotter, SnapshotError> {
        let behind = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match (&behind.snapshotter, &behind.refusal) {
            (Some(snapshotter), None) => Ok(snapshotter.clone()),
            (_, why) => Err(SnapshotError::Refused(why.clone().unwrap_or_else(|| STARTING.to_owned()))),
        }
    }

    /// For everything else.
    pub fn enter(&self) -> Result<Snapshotter, SnapshotError> {
        let behind = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let closed = || SnapshotError::Refused(behind.refusal.clone().unwrap_or_else(|| STARTING.to_owned()));
        behind.snapshotter.clone().ok_or_else(closed)
    }
}

const STARTING: &str = "it is starting";
