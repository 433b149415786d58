//! The root directory: made, ours alone, and fit to carry overlay filesystems. Everything here needs the powers of the start.

use crate::{layout::Layout, snapshot};
use rustix::{
    fs::{FileType, FlockOperation, Mode, OFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};
use std::{
    ffi::CString,
    fs, io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long a predecessor may take to end after it was told to: it gives itself five seconds.
const PREDECESSOR: Duration = Duration::from_secs(6);

/// Why the root directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("cannot prepare the root directory {}; another one can be given with --root", path.display())]
    Prepare { path: PathBuf, source: io::Error },
    #[error("another soci-snapshotter-grpc uses {}: stop it, or give this one another --root", .0.display())]
    InUse(PathBuf),
    #[error(
        "{} cannot carry container filesystems: its filesystem does not tell files from directories when it lists them \
         (XFS made with ftype=0); put --root on another filesystem, or set skip_check_snapshotter_supported",
        .0.display()
    )]
    NoFileTypes(PathBuf),
    #[error(
        "{} cannot carry container filesystems: an overlay mount there fails (is it on an overlay filesystem itself?); \
         put --root on another filesystem, or set skip_check_snapshotter_supported",
        path.display()
    )]
    NoOverlay { path: PathBuf, source: io::Error },
}

/// As long as it lives, no other daemon uses this root. The kernel ends it with the process, however that ends.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "held for its lock")] OwnedFd);

/// Makes the root directory and takes it.
pub fn claim(layout: &Layout) -> Result<Claim, RootError> {
    let failed = |source: io::Error| RootError::Prepare { path: layout.root().to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(layout.root()).map_err(failed)?;
    snapshot::make_parents(layout).map_err(failed)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(layout.root(), flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    let deadline = Instant::now() + PREDECESSOR;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Claim(directory)),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Err(Errno::WOULDBLOCK) => return Err(RootError::InUse(layout.root().to_owned())),
            Err(error) => return Err(failed(error.into())),
        }
    }
}

/// Whether it could be found out.
#[derive(Debug, PartialEq, Eq)]
pub enum Checked {
    Works,
    /// We may not mount; who starts containers may.
    MayNotMount,
    /// The disk is full. It worked before it was, or there would be nothing on it.
    NoRoom,
}

/// Tries what containers need of the filesystem below `layout`, and leaves nothing behind.
pub fn check_overlay(layout: &Layout) -> Result<Checked, RootError> {
    let path = layout.snapshotter();
    let failed = |source: io::Error| RootError::Prepare { path: path.clone(), source };
    let full = |error: &io::Error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    let place = match tempfile::Builder::new().prefix("check-").tempdir_in(&path) {
        Err(error) if full(&error) => return Ok(Checked::NoRoom),
        place => place.map_err(failed)?,
    };
    let inside = |name: &str| place.path().join(name);
    for name in ["lower1", "lower2", "upper", "work", "merged"] {
        match fs::create_dir(inside(name)) {
            Err(error) if full(&error) => return Ok(Checked::NoRoom),
            made => made.map_err(failed)?,
        }
    }
    if !tells_file_types(place.path()).map_err(failed)? {
        return Err(RootError::NoFileTypes(path));
    }
    let mut options = Vec::new();
    for (key, name) in [("lowerdir=", "lower1"), (":", "lower2"), (",upperdir=", "upper"), (",workdir=", "work")] {
        options.extend_from_slice(key.as_bytes());
        options.extend_from_slice(inside(name).as_os_str().as_bytes());
    }
    let options = CString::new(options).map_err(|e| failed(e.into()))?;
    let merged = inside("merged");
    match rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str()) {
        Ok(()) => {
            rustix::mount::unmount(&merged, UnmountFlags::DETACH).map_err(|e| failed(e.into()))?;
            Ok(Checked::Works)
        }
        Err(Errno::PERM) => Ok(Checked::MayNotMount),
        Err(Errno::NOSPC | Errno::DQUOT) => Ok(Checked::NoRoom),
        Err(error) => Err(RootError::NoOverlay { path, source: error.into() }),
    }
}

/// overlayfs finds whiteouts by the type in a directory's listing.
fn tells_file_types(directory: &Path) -> io::Result<bool> {
    let opened = rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for entry in rustix::fs::Dir::new(opened)? {
        if entry?.file_type() == FileType::Unknown {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_taken_once_and_is_free_again_when_its_daemon_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().join("a/b"));
        let first = claim(&layout).unwrap();
        let second = claim(&layout).unwrap_err();
        assert!(matches!(second, RootError::InUse(_)), "{second}");
        assert!(second.to_string().contains("a/b"), "{second}");
        drop(first);
        claim(&layout).unwrap();
    }

    #[test]
    fn a_root_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = claim(&Layout::new(dir.path().join("file/root"))).unwrap_err();
        assert!(error.to_string().contains("file/root; another one can be given with --root"), "{error}");
    }

    #[test]
    fn the_check_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        snapshot::make_parents(&layout).unwrap();
        // What it finds depends on where temporary files live; that it cleans up does not.
        let _ = check_overlay(&layout);
        let left: Vec<_> = fs::read_dir(layout.snapshotter()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["snapshots"]);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
    }
}
