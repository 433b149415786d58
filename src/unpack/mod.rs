//! Unpacking a layer: a tar from a pipe becomes a directory tree, and nothing else on the machine changes.
//!
//! This runs in a process of its own per layer ([`worker`]), forked by a process that does nothing but fork ([`spawner`]) for the custodian. The tar
//! is a stranger's: whatever is in it, and whatever bug of ours it finds, can damage only the directory it is unpacked into.
//!
//! ```text
//!   snapshots/<id>/unpack/          the worker's root directory (chroot, landlock), made and removed by the custodian
//!       tree/                       becomes snapshots/<id>/fs when both digests are right
//!       trash/                      directories that later entries of the same tar replaced
//!       implied                     names of directories that the tar implies but does not list, parents first, each followed by NUL
//! ```
//!
//! Invariants:
//! * Every name is taken apart here; a system call only ever gets one component that is neither `.` nor `..`, relative to a descriptor of a directory
//!   that this process made, opened without following links. So links in the tree are never followed, whatever they point to.
//! * What the tree contains is what containerd's overlay unpack would have made of the same tar (whiteouts are 0:0 devices, opaque directories have
//!   `trusted.overlay.opaque=y`, `trusted.*` of the tar is ignored, the root entry's attributes are ignored), or it is refused: names through
//!   symlinks, `..`, and sparse entries are left to containerd.
//! * A directory gets its attributes last, so that neither set-group-ID bits nor default ACLs reach its files, and its time is not overwritten.
//!   (Directories that are only implied inherit a set-group-ID bit and the group all the same, as they would from mkdir(2).)
//! * Nothing is synced. Like containerd's unpack (with its default `sync_fs = false`), a layer may be lost when the machine loses power
//!   within seconds after the pull; the process dying loses nothing.
#![forbid(unsafe_code)]

mod apply;
mod directories;
mod refusal;
pub mod report;
pub mod spawner;
mod worker;

pub use apply::{Applier, Budget, Place, Stopped, unpack};
pub use refusal::{Detail, Refusal};
pub use spawner::Order;

/// Names in the worker's root directory.
pub const TREE: &std::ffi::CStr = c"tree";
pub const TRASH: &std::ffi::CStr = c"trash";
pub const IMPLIED: &std::ffi::CStr = c"implied";
