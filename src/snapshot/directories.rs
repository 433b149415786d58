//! Snapshot directories: making them, turning one into a lazy layer, finding those nobody owns.
//!
//! The daemon makes all of them itself and so owns them; what containers put in is not its business but [`super::Disk`]'s.
//! Everything here blocks and is called where that is allowed.

use crate::layout::{Layout, SnapshotId};
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// Only root looks into a snapshot's directory from outside.
const PRIVATE: u32 = 0o700;
/// The root of a container's filesystem, until something else is mounted on it: everybody may list it.
const FS_MODE: u32 = 0o755;
/// containerd's mode for overlay work directories.
const WORK_MODE: u32 = 0o711;

/// Makes one directory with exactly this mode, whatever the umask.
fn make(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Makes the directories above all snapshots.
pub fn make_parents(layout: &Layout) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(PRIVATE).create(layout.root())?;
    for path in [layout.snapshotter(), layout.snapshots()] {
        match make(&path, PRIVATE) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
    Ok(())
}

/// Whether a snapshot is going to be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    Writable,
}

/// Makes the directory of a new snapshot; nothing of it remains after an error.
pub fn create(layout: &Layout, id: SnapshotId, access: Access) -> io::Result<()> {
    let build = || {
        make(&layout.snapshot(id), PRIVATE)?;
        make(&layout.snapshot_fs(id), FS_MODE)?;
        match access {
            Access::Writable => make(&layout.snapshot_work(id), WORK_MODE),
            Access::ReadOnly => Ok(()),
        }
    };
    build().inspect_err(|e| {
        if e.kind() != io::ErrorKind::AlreadyExists {
            // The caller hears of the first error; a directory that stays is swept later.
            let _ = fs::remove_dir_all(layout.snapshot(id));
        }
    })
}

/// Owner of the root of a snapshot's filesystem. For a lazy layer this asks the lazy filesystem.
pub fn owner(layout: &Layout, id: SnapshotId) -> io::Result<(u32, u32)> {
    let metadata = fs::metadata(layout.snapshot_fs(id))?;
    Ok((metadata.uid(), metadata.gid()))
}

/// Points the snapshot's `fs` at the layer in the lazy filesystem. Its own `fs` must be empty, and is back after an error.
pub fn link_to_lazy(layout: &Layout, id: SnapshotId) -> io::Result<()> {
    let path = layout.snapshot_fs(id);
    if fs::symlink_metadata(&path)?.is_symlink() {
        return Ok(());
    }
    fs::remove_dir(&path)?;
    std::os::unix::fs::symlink(Layout::lazy_link(id), &path).inspect_err(|_| {
        // Restores what the deferred layer will be unpacked into; if even that fails, its mounts will.
        let _ = make(&path, FS_MODE);
    })?;
    // A committed layer is never written to. Where it stays, nobody looks at it, and it goes with the snapshot.
    let _ = fs::remove_dir(layout.snapshot_work(id));
    Ok(())
}

/// Numbers of all snapshot directories.
pub fn list(layout: &Layout) -> io::Result<Vec<SnapshotId>> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(layout.snapshots())? {
        // Other names are not ours: the Go snapshotter makes `new-*` and `<id>_<id>`.
        if let Some(id) = entry?.file_name().to_str().and_then(parse) {
            ids.push(id);
        }
    }
    ids.sort_unstable();
    Ok(ids)
}

/// A number as we write it: no sign, no leading zero.
fn parse(name: &str) -> Option<SnapshotId> {
    let id = name.parse::<u32>().ok()?;
    (id.to_string() == name).then_some(SnapshotId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_we_would_write_are_numbers() {
        assert_eq!(parse("17"), Some(SnapshotId(17)));
        for name in ["", "017", "+1", "-1", "new-123", "3_4", "4294967296", "1 "] {
            assert_eq!(parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_lazy_layer_is_a_link_and_linking_twice_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        make_parents(&layout).unwrap();
        let id = SnapshotId(4);
        create(&layout, id, Access::Writable).unwrap();
        assert_eq!(fs::metadata(layout.snapshot_work(id)).unwrap().mode() & 0o7777, 0o711);
        link_to_lazy(&layout, id).unwrap();
        link_to_lazy(&layout, id).unwrap();
        assert_eq!(fs::read_link(layout.snapshot_fs(id)).unwrap(), Path::new("../../lazy/4"));
        assert!(!layout.snapshot_work(id).exists());
        assert_eq!(create(&layout, id, Access::ReadOnly).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(list(&layout).unwrap(), [id]);
    }
}
