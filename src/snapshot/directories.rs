//! Snapshot directories: making them, turning one into a lazy layer, finding those nobody owns.
//!
//! A directory is on disk before the record that names it: [`Unsettled`] collects them, and the writer of records has them synced, once for all
//! the records that it commits together.
//!
//! The daemon makes all of them itself and so owns them; what containers put in is not its business but [`super::Disk`]'s.
//! Everything here blocks and is called where that is allowed.

use crate::layout::{Layout, SnapshotId};
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

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

/// Directories that were made and that a power cut might still take. A record that is on disk must find its directory there, too.
#[derive(Debug)]
pub struct Unsettled {
    layout: Layout,
    ids: Mutex<Vec<SnapshotId>>,
}

impl Unsettled {
    pub fn new(layout: Layout) -> Unsettled {
        Unsettled { layout, ids: Mutex::default() }
    }

    /// The directory of `id` was made.
    pub fn made(&self, id: SnapshotId) {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).push(id);
    }

    /// Everything made before this call is on disk after it, under its name.
    pub fn settle(&self) -> io::Result<()> {
        let mut ids = std::mem::take(&mut *self.ids.lock().unwrap_or_else(PoisonError::into_inner));
        if ids.is_empty() {
            return Ok(());
        }
        let settled = ids.iter().try_for_each(|id| match sync(&self.layout.snapshot(*id)) {
            // Removed since.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        });
        settled.and_then(|()| sync(&self.layout.snapshots())).inspect_err(|_| {
            self.ids.lock().unwrap_or_else(PoisonError::into_inner).append(&mut ids);
        })
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    fs::File::open(directory)?.sync_all()
}

/// Owner of the root of a snapshot's filesystem. For a lazy layer this asks the lazy filesystem.
pub fn owner(layout: &Layout, id: SnapshotId) -> io::Result<(u32, u32)> {
    let metadata = fs::metadata(layout.snapshot_fs(id))?;
    Ok((metadata.uid(), metadata.gid()))
}

/// Points the snapshot's `fs` at the layer in the lazy filesystem. Its own `fs` must be empty, and is back after an error. What is missing is made.
pub fn link_to_lazy(layout: &Layout, id: SnapshotId) -> io::Result<()> {
    let path = layout.snapshot_fs(id);
    match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_symlink() => return Ok(()),
        Ok(_) => fs::remove_dir(&path)?,
        // The Go snapshotter makes these again, too: all that is in them is a mount.
        Err(e) if e.kind() == io::ErrorKind::NotFound => match make(&layout.snapshot(id), PRIVATE) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        },
        Err(e) => return Err(e),
    }
    std::os::unix::fs::symlink(Layout::lazy_link(id), &path).inspect_err(|_| {
        // Restores what the deferred layer will be unpacked into; if even that fails, its mounts will.
        let _ = make(&path, FS_MODE);
    })?;
    // A committed layer is never written to. Where it stays, nobody looks at it, and it goes with the snapshot.
    let _ = fs::remove_dir(layout.snapshot_work(id));
    Ok(())
}

/// What is beside one another in the directory of all snapshots.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// In order.
    pub ids: Vec<SnapshotId>,
    /// Names that are not ours: the Go snapshotter makes `new-*` and, for user namespaces, `<id>_<id>`.
    pub others: Vec<String>,
}

/// All snapshot directories.
pub fn list(layout: &Layout) -> io::Result<Found> {
    let mut found = Found::default();
    for entry in fs::read_dir(layout.snapshots())? {
        let name = entry?.file_name();
        match name.to_str().and_then(parse) {
            Some(id) => found.ids.push(id),
            None => found.others.push(name.to_string_lossy().into_owned()),
        }
    }
    found.ids.sort_unstable();
    found.others.sort_unstable();
    Ok(found)
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
        fs::create_dir(layout.snapshots().join("3_4")).unwrap();
        assert_eq!(list(&layout).unwrap(), Found { ids: vec![id], others: vec!["3_4".into()] });
        // All that was in it was the link.
        fs::remove_dir_all(layout.snapshot(id)).unwrap();
        link_to_lazy(&layout, id).unwrap();
        assert_eq!(fs::read_link(layout.snapshot_fs(id)).unwrap(), Path::new("../../lazy/4"));
    }
}
