//! Snapshots: their records, their directories, and what containerd may do with them.
//!
//! * [`Store`] keeps records in one transactional database: a record exists or it does not, whatever dies when.
//! * [`import`] reads the records of the Go snapshotter that was on this node before, once.
//! * [`state`] decides, without a clock, a lock or a disk: lazy or deferred, which mounts.
//! * [`Snapshotter`] acts: containerd's snapshotter semantics over both, for the gRPC service to translate.
//!
//! ```text
//!             Prepare ref=T, lazy                                     Remove              sweep
//!   (nothing) ───────────────────▶ Active ──▶ Committed under T ──────────────▶ directory ─────▶ (nothing)
//!      │                                        ▲                    ▲          without record
//!      │ Prepare          ┌──────▶ Active ──────┘ Commit             │
//!      ├──────────────────┘          └───────────────────────────────┤
//!      │ View                                                        │
//!      └─────────────────────────▶ View ─────────────────────────────┘
//! ```
//!
//! Invariants:
//! * A record always has its directory: directories are made, and synced, before their record and removed after it. So a power cut may leave a
//!   directory without record, never a record without directory. What is in them is written soon afterwards, and known to be or not (`written`).
//! * A snapshot's number is never reused, not even for a directory whose record was never written.
//! * A directory whose number this database never gave out is not ours, and never removed.
//! * `ALREADY_EXISTS` for a layer means that a committed snapshot under its chain id can be listed.
//! * An operation that started is finished even if its caller goes away.
//!
//! Absent on purpose: what makes a layer readable ([`LazyLayers`]) or pulls it ([`EagerLayers`]), what needs privilege ([`Disk`]), and labels as strings
//! (`grpc::labels` makes an [`Extraction`] of them).
#![forbid(unsafe_code)]

mod directories;
mod disk;
mod door;
mod eager;
mod error;
mod extract;
mod lazy;
mod mapped;
mod model;
mod record;
mod snapshotter;
pub mod state;
mod store;
mod takeover;
#[cfg(test)]
mod tests;
mod written;

pub use directories::make_parents;
pub use disk::{Disk, InProcessDisk};
pub use door::Door;
pub use eager::{EagerLayers, Extent, NeverEager, NotPulled, Place, Places, Pulled, Wanted};
pub use error::{SnapshotError, StoreError, chain};
pub use lazy::{Extraction, LazyLayers, NotLazyReason, Outcome, Target};
pub use model::{BootId, Info, Kind, Labels, Timestamp, Usage, label};
pub use snapshotter::{Options, Snapshotter};
pub use state::{Mount, MountKind, Pull};
pub use store::{Change, Link, Store};
pub use takeover::{Import, NotImported, Refused, import};
