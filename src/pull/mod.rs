//! Layers that arrive whole: downloaded, checked, unpacked, many at once.
//!
//! ```text
//!   Prepare ─▶ Pulls::pull ─▶ image: manifest + configuration ─▶ a job for each layer that is wanted of it ─▶ wait for one of them
//!
//!   job:  place ─▶ download ▶ sha256 ▶ inflate ▶ sha256 ▶ pipe ▶ unpacker ─▶ both digests right? ─▶ Pulled (not visible yet)
//!              │                                                                  │ no
//!              └─ another place, one more try; then one plain request ◀───────────┘ … then containerd
//! ```
//!
//! Invariants:
//! * What is unpacked becomes visible only when the sha256 of the compressed and of the uncompressed bytes are those of the manifest and of the
//!   image's configuration, and a client has asked for it by its name.
//! * There is one job for a layer at its place in an image (its chain ID), however many images, namespaces and requests want it. It ends with
//!   the last who wants it and not before: what one of them does harms no other ([`jobs`]).
//! * Nothing of a job outlives the process but a directory without record, which the next start sweeps.
//! * Memory is bounded: pieces ahead of their turn by one budget for the node ([`download`]), buffers by the number of jobs at work
//!   ([`pipeline`]), parts of layers that are inflated ahead by the number of helpers ([`parts`]).
//!
//! Absent on purpose: making files ([`Unpacker`], a process that can do nothing else), records of snapshots, the decision whether to pull.
#![forbid(unsafe_code)]

mod download;
mod flights;
mod front;
mod image;
mod job;
mod jobs;
mod parts;
mod pipeline;
mod programs;
mod shelf;

pub use jobs::{Parts, Pulls};
pub use programs::{Program, ProgramError, Programs};
pub use shelf::{Indexed, Known, Point, Shelf};

use crate::{
    layout::SnapshotId,
    oci::{Descriptor, Digest, Reference},
    snapshot::{Extent, NotPulled, Usage},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::{io, ops::Range, os::fd::OwnedFd};

/// Settings of the eager side. `None` is "choose yourself", everywhere.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Requests in flight, all images together.
    pub downloads: Option<usize>,
    /// Requests in flight for one image.
    pub downloads_per_image: Option<usize>,
    /// Bytes of one request.
    pub piece: Option<u64>,
    /// Layers being unpacked, all images together.
    pub unpacks: Option<usize>,
    /// Layers of one image being unpacked.
    pub unpacks_per_image: Option<usize>,
    pub programs: Programs,
    pub keep: Keep,
}

/// What becomes of compressed layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    /// They are gone when they are unpacked.
    #[default]
    Nowhere,
    /// They go to containerd's content store as well.
    InContainerd,
}

/// How large a layer may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub bytes: u64,
    pub inodes: u64,
}

/// Where in its image a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// There is nothing below that a whiteout could hide.
    Bottom,
    Above,
}

/// Makes files of tars, in directories that nobody sees yet. Names snapshots, never paths.
pub trait Unpacker: Send + Sync {
    /// Unpacks the tar that comes out of `tar` into a private directory of `id`. Comes back when the pipe is closed and all is
    /// there, or with the reason why not. Dropping the future does not stop it; [`Unpacker::discard`] does.
    fn unpack(
        &self,
        id: SnapshotId,
        tar: OwnedFd,
        depth: Depth,
        budget: Budget,
    ) -> BoxFuture<'_, Result<(), UnpackFailure>>;
    /// Stops what is under way for `id` and forgets what there is.
    fn discard(&self, id: SnapshotId) -> BoxFuture<'_, ()>;
    /// Makes it the content of the snapshot, above `parents`, nearest first; what it takes on disk.
    fn publish<'a>(&'a self, id: SnapshotId, parents: &'a [SnapshotId]) -> BoxFuture<'a, io::Result<Usage>>;
    /// What the disk has room for.
    fn room(&self) -> Budget;
}

/// Why a tar was not unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnpackFailure {
    /// Because of what is in it: another try would end the same way.
    Tar(String),
    /// Because of something else.
    Trouble(String),
}

/// containerd's content store. Everything here is an attempt: what fails is done without it.
pub trait Contents: Send + Sync {
    /// Size of a blob, if it is there. Soon, or not at all.
    fn size<'a>(&'a self, namespace: &'a str, blob: Digest) -> BoxFuture<'a, Option<u64>>;
    /// The bytes `range` of a blob, exactly, unverified.
    fn read<'a>(&'a self, namespace: &'a str, blob: Digest, range: Range<u64>) -> BoxFuture<'a, Result<Bytes, String>>;
    /// Begins to put a layer there. It is visible there when it was finished and has the digest that it should have.
    fn ingest<'a>(
        &'a self,
        namespace: &'a str,
        image: &'a Reference,
        manifest: Digest,
        blob: &'a Descriptor,
    ) -> BoxFuture<'a, Result<Box<dyn Ingest>, String>>;
    /// A layer that was put there for another namespace is this one's as well.
    fn adopt<'a>(
        &'a self,
        namespace: &'a str,
        image: &'a Reference,
        manifest: Digest,
        blob: &'a Descriptor,
    ) -> BoxFuture<'a, Result<(), String>>;
    /// The image has been pulled, or is not wanted any more: its layers need not be held there for us.
    fn let_go<'a>(&'a self, namespace: &'a str, manifest: Digest) -> BoxFuture<'a, ()>;
}

/// A blob on its way into containerd's content store. Dropped before its end, it is forgotten there.
pub trait Ingest: Send {
    fn put(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>>;
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<(), String>>;
}

/// Told what happens. Must not block.
pub trait Observer: Send + Sync {
    /// A layer's bytes begin to come, for this place.
    fn begins(&self, _: SnapshotId) {}
    /// No more bytes come for it.
    fn ends(&self, _: SnapshotId) {}
    /// A layer that should have been pulled here is left to containerd.
    fn not_pulled(&self, _: Extent, _: &NotPulled) {}
}
