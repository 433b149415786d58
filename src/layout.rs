//! Where everything lives: the only module that joins paths below the product's root and run directories.
//!
//! ```text
//! <root>/                         0700, default /var/lib/soci-snapshotter-grpc
//!   artifacts.db                  what the soci tool made here (bbolt, shared with the Go CLI)
//!   content/                      OCI layout: SOCI indexes and zTOCs as fetched
//!   checkpoints/<hex>             where inflating a pulled layer can begin: a zinfo
//!   layers/sha256/<hex>/          one lazily loaded layer: ztoc toc blob spans verdict
//!   layers/condemned/<hex>-<hex>  layer and zTOC of which the one is not what the other says
//!   snapshotter/metadata.redb     snapshot records
//!   snapshotter/metadata.db       those of a Go snapshotter that was here before (bbolt); read once, kept
//!   snapshotter/lazy/             the one FUSE mount; <id>/ is the layer of snapshot <id>
//!   snapshotter/snapshots/<id>/   fs (directory, or symlink to ../../lazy/<id>), work, lazy.json, unpack
//!   settings.toml                 the settings of the last good start
//!   holder.sock                   the holder of the FUSE descriptor
//!   holder.json                   what was negotiated on the connection it made last
//!   custodian.sock                the custodian's: its own socket unit listens here
//! ```
#![forbid(unsafe_code)]

use crate::oci::Digest;
use std::path::{Path, PathBuf};

/// Default of `--root`.
pub const DEFAULT_ROOT: &str = "/var/lib/soci-snapshotter-grpc/";
/// Default of `--config`.
pub const DEFAULT_CONFIG: &str = "/etc/soci-snapshotter-grpc/config.toml";
/// Default of `--address`.
pub const DEFAULT_ADDRESS: &str = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock";

/// Where the daemon that serves containerd on `socket` answers `soci status`: beside it, and on the same filesystem, which never fills up.
pub fn status_socket(socket: &Path) -> PathBuf {
    match socket.extension() {
        Some(extension) if extension == "status" => socket.with_extension("status.status"),
        _ => socket.with_extension("status"),
    }
}

/// A snapshot's number: decimal in paths, never reused, below 2^32 so that it fits the upper half of an inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(pub u32);

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The product's directories below one root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Name of a snapshot's content within its directory.
    pub const FS: &'static str = "fs";

    /// The layout below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Layout {
        Layout { root: root.into() }
    }
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// The OCI layout that holds SOCI indexes and zTOCs.
    pub fn content(&self) -> PathBuf {
        self.root.join("content")
    }
    /// Its list of manifests, which only the Go snapshotter writes entries to.
    pub fn content_index(&self) -> PathBuf {
        self.content().join("index.json")
    }
    /// The soci tool's record of the artifacts it made.
    pub fn artifacts_db(&self) -> PathBuf {
        self.root.join("artifacts.db")
    }
    /// A blob of the OCI layout.
    pub fn content_blob(&self, digest: &Digest) -> PathBuf {
        self.content().join("blobs/sha256").join(digest.hex())
    }
    /// Parent of all layer directories.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers/sha256")
    }
    /// Directory of one lazily loaded layer.
    pub fn layer(&self, layer: &Digest) -> PathBuf {
        self.layers().join(layer.hex())
    }
    /// What is known of zTOCs that are wrong about their layers.
    pub fn condemned(&self) -> PathBuf {
        self.root.join("layers/condemned")
    }
    /// Checkpoints of pulled layers, by digest.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }
    /// The zTOC of a lazily loaded layer.
    pub fn layer_ztoc(&self, layer: &Digest) -> PathBuf {
        self.layer(layer).join("ztoc")
    }
    pub fn snapshotter(&self) -> PathBuf {
        self.root.join("snapshotter")
    }
    pub fn snapshot_db(&self) -> PathBuf {
        self.snapshotter().join("metadata.redb")
    }
    /// The snapshot records of a Go snapshotter that was here before.
    pub fn go_snapshot_db(&self) -> PathBuf {
        self.snapshotter().join("metadata.db")
    }
    /// Mount point of the one FUSE mount.
    pub fn lazy(&self) -> PathBuf {
        self.snapshotter().join("lazy")
    }
    /// Parent of all snapshot directories.
    pub fn snapshots(&self) -> PathBuf {
        self.snapshotter().join("snapshots")
    }
    pub fn snapshot(&self, id: SnapshotId) -> PathBuf {
        self.snapshots().join(id.to_string())
    }
    /// Content of a snapshot: a directory, or for a lazy layer a symlink to [`Layout::lazy_link`].
    pub fn snapshot_fs(&self, id: SnapshotId) -> PathBuf {
        self.snapshot(id).join(Layout::FS)
    }
    /// Overlay work directory of an active snapshot.
    pub fn snapshot_work(&self, id: SnapshotId) -> PathBuf {
        self.snapshot(id).join("work")
    }
    /// What a worker is unpacking for the snapshot, until it is known to be right; see `crate::unpack`.
    pub fn snapshot_unpack(&self, id: SnapshotId) -> PathBuf {
        self.snapshot(id).join("unpack")
    }
    /// The directories that an unpacked, not yet published layer implies.
    pub fn snapshot_implied(&self, id: SnapshotId) -> PathBuf {
        self.snapshot_unpack(id).join("implied")
    }
    /// What is needed to serve a lazy layer again after a restart: layer, zTOC, image, attributes of implied directories.
    pub fn snapshot_lazy_record(&self, id: SnapshotId) -> PathBuf {
        self.snapshot(id).join("lazy.json")
    }
    /// Target of the `fs` symlink of a lazy layer, relative to the snapshot's directory.
    pub fn lazy_link(id: SnapshotId) -> PathBuf {
        Path::new("../../lazy").join(id.to_string())
    }
    /// The settings of the last good start.
    pub fn settings_kept(&self) -> PathBuf {
        self.root.join("settings.toml")
    }
    pub fn holder_socket(&self) -> PathBuf {
        self.root.join("holder.sock")
    }
    /// What was negotiated on the FUSE connection that the holder made last.
    pub fn holder_parameters(&self) -> PathBuf {
        self.root.join("holder.json")
    }
    pub fn custodian_socket(&self) -> PathBuf {
        self.root.join("custodian.sock")
    }
}
