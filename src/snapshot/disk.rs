//! What a daemon without capabilities cannot do to a container's files.

use super::model::Usage;
use crate::layout::{Layout, SnapshotId};
use crate::oci::IdMaps;
use futures::future::BoxFuture;
use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Acts on snapshot directories with the privilege that a container's files need. Names snapshots, never paths.
pub trait Disk: Send + Sync {
    /// Removes the snapshot's directory. One that is not there is removed already.
    fn remove_tree(&self, id: SnapshotId) -> BoxFuture<'_, io::Result<()>>;
    /// Measures the snapshot's `fs`.
    fn usage(&self, id: SnapshotId) -> BoxFuture<'_, io::Result<Usage>>;
    /// Gives the snapshot's `fs` itself to this owner.
    fn own_upper(&self, id: SnapshotId, uid: u32, gid: u32) -> BoxFuture<'_, io::Result<()>>;
    /// Has everything on disk that was written into the directories of snapshots before this call.
    fn sync(&self) -> BoxFuture<'_, io::Result<()>>;
    /// Makes the `fs` of `id`, an empty directory, a copy of that of `from`, with the owners that `maps` gives.
    fn copy<'a>(&'a self, from: SnapshotId, id: SnapshotId, maps: &'a IdMaps) -> BoxFuture<'a, io::Result<()>>;
}

/// [`Disk`] with this process's own privilege: for tests, and for a daemon that runs without a custodian.
#[derive(Debug, Clone)]
pub struct InProcessDisk {
    layout: Layout,
}

impl InProcessDisk {
    pub fn new(layout: Layout) -> InProcessDisk {
        InProcessDisk { layout }
    }
}

/// Runs what blocks where it blocks nobody.
pub(super) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(io::Error::other)?
}

impl Disk for InProcessDisk {
    fn remove_tree(&self, id: SnapshotId) -> BoxFuture<'_, io::Result<()>> {
        let path = self.layout.snapshot(id);
        Box::pin(blocking(move || match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }))
    }

    fn usage(&self, id: SnapshotId) -> BoxFuture<'_, io::Result<Usage>> {
        let path = self.layout.snapshot_fs(id);
        Box::pin(blocking(move || measure(&path)))
    }

    fn own_upper(&self, id: SnapshotId, uid: u32, gid: u32) -> BoxFuture<'_, io::Result<()>> {
        let path = self.layout.snapshot_fs(id);
        Box::pin(blocking(move || std::os::unix::fs::lchown(path, Some(uid), Some(gid))))
    }

    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        let path = self.layout.snapshots();
        Box::pin(blocking(move || Ok(rustix::fs::syncfs(std::fs::File::open(path)?)?)))
    }

    fn copy<'a>(&'a self, _: SnapshotId, _: SnapshotId, _: &'a IdMaps) -> BoxFuture<'a, io::Result<()>> {
        // What it takes to do this safely is the custodian's worker.
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }
}

/// Disk usage as containerd counts it: allocated blocks of every inode once. Files that vanish meanwhile do not count.
fn measure(root: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = match std::fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if metadata.nlink() > 1 && !metadata.is_dir() && !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        usage.size += metadata.blocks() * 512;
        usage.inodes += 1;
        if metadata.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                pending.push(entry?.path());
            }
        }
    }
    Ok(usage)
}
