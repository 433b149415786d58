//! What the filesystem tells the rest of the product: counts, durations, failures. Called on FUSE threads: must not wait.

use super::read::ReadError;
use crate::layout::SnapshotId;
use crate::oci::Digest;
use std::time::Duration;

/// Operations that are counted per image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    Getattr,
    Getxattr,
    Listxattr,
    Lookup,
    Open,
    Readdir,
    Readlink,
    Read,
    /// GETATTR of a regular file.
    FileGetattr,
    WhiteoutGetattr,
}

impl Op {
    pub const ALL: [Op; 10] = [
        Op::Getattr,
        Op::Getxattr,
        Op::Listxattr,
        Op::Lookup,
        Op::Open,
        Op::Readdir,
        Op::Readlink,
        Op::Read,
        Op::FileGetattr,
        Op::WhiteoutGetattr,
    ];

    /// The name metrics and logs use.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Getattr => "node.Getattr",
            Op::Getxattr => "node.Getxattr",
            Op::Listxattr => "node.Listxattr",
            Op::Lookup => "node.Lookup",
            Op::Open => "node.Open",
            Op::Readdir => "node.Readdir",
            Op::Readlink => "node.Readlink",
            Op::Read => "file.Read",
            Op::FileGetattr => "file.Getattr",
            Op::WhiteoutGetattr => "whiteout.Getattr",
        }
    }
}

/// Operations whose failures are counted apart. Everything but reads is answered from memory that was checked when it was
/// mapped, so only reads can fail; the others exist as metric names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailedOp {
    FileRead,
    Other,
}

/// A failure of an operation, with what its log line carries.
pub struct Failure<'a> {
    pub snapshot: SnapshotId,
    pub layer: Digest,
    pub op: FailedOp,
    pub error: &'a ReadError,
    /// From the root of the layer.
    pub path: &'a [u8],
    /// Compressed bytes of the layer, and how many of them are here.
    pub size: u64,
    pub fetched: u64,
}

/// Implemented by whoever counts and logs. Every method does nothing by default.
pub trait Observer: Send + Sync {
    /// An operation on a layer's node was answered (or, for reads, begun). `path` is cheap to compute, but not free.
    fn operation(&self, _snapshot: SnapshotId, _op: Op, _path: &dyn Fn() -> Vec<u8>) {}
    /// A read was answered with `bytes` bytes, `took` after it was asked.
    fn read(&self, _snapshot: SnapshotId, _layer: &Digest, _bytes: usize, _took: Duration) {}
    /// A directory was listed, or a part of it.
    fn listing(&self, _snapshot: SnapshotId, _layer: &Digest, _took: Duration) {}
    fn failure(&self, _failure: &Failure<'_>) {}
    /// A read was given up because the process that waited for it is dying.
    fn interrupted(&self, _snapshot: SnapshotId) {}
}

/// Observes nothing.
pub struct Nobody;

impl Observer for Nobody {}
