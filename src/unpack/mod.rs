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
//! A worker of a second kind makes the tree out of another snapshot's `fs` instead ([`copy`]), for containers in a user namespace. It may read below
//! that one directory; everything else is as for a tar.
//!
//! Invariants:
//! * Every name is taken apart here; a system call only ever gets one component that is neither `.` nor `..`, relative to a descriptor of a directory
//!   that this process made, opened without following links. So links in the tree are never followed, whatever they point to.
//! * A worker can open files only by creating them, and directories; its filter of system calls refuses every other open. So even one that has been
//!   taken over cannot write to a disk through a device node of its own making.
//! * What the tree contains is what containerd's overlay unpack would have made of the same tar (whiteouts are 0:0 devices, opaque directories have
//!   `trusted.overlay.opaque=y`, `trusted.*` of the tar is ignored, the root entry's attributes are ignored), or it is refused: names through
//!   symlinks, `..`, and sparse entries are left to containerd.
//! * A directory gets its attributes last, so that neither set-group-ID bits nor default ACLs reach its files, and its time is not overwritten.
//!   (A directory that is only implied has the group of a set-group-ID directory above it all the same: containerd makes it there with mkdir(2), which
//!   gives it the group and the bit, then chmod(2), which takes the bit away.)
//! * Nothing is synced. Like containerd's unpack (with its default `sync_fs = false`), a layer may be lost when the machine loses power
//!   within seconds after the pull; the process dying loses nothing.
#![forbid(unsafe_code)]

mod apply;
mod copy;
mod directories;
mod refusal;
pub mod report;
pub mod spawner;
mod worker;

pub use apply::{Applier, Budget, Place, Stopped, unpack};
pub use refusal::{Detail, Refusal};
pub use spawner::{Order, Task};

/// Names in the worker's root directory.
pub const TREE: &std::ffi::CStr = c"tree";
pub const TRASH: &std::ffi::CStr = c"trash";
pub const IMPLIED: &std::ffi::CStr = c"implied";
