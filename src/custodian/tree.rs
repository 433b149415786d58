//! Acting on hostile directory trees through descriptors.
//!
//! A container wrote these trees: directories 2,000 or 200,000 deep, symlinks to `/etc`, foreign owners, and perhaps a mount that somebody left
//! inside. Every step names one component below a descriptor we hold, opened so that it cannot be a symlink and cannot be another mount.
//!
//! * **Removing** keeps two descriptors open whatever the depth: a directory that is not empty has its sub-directories moved up beside `fs`, and is then
//!   empty. Nothing is recursive and no path is ever longer than one name.
//! * **Measuring** keeps one descriptor open, and per level the directory's identity and the place in its listing. It climbs by `..` and believes the
//!   result only if it is the directory it came from; a tree that was rearranged meanwhile is measured again.
//!
//! A snapshot in which something is mounted is not removed (EBUSY). One that is mounted while we are at work, or in a way the mount table does not
//! show, is still never entered: it stays, the rest goes, EBUSY again.
#![forbid(unsafe_code)]

use super::protocol::Usage;
use crate::{
    layout::SnapshotId,
    sys::{
        beneath::{self, directory_flags},
        mountinfo::Mounts,
    },
};
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, FileType, Gid, Mode, OFlags, RawDir, SeekFrom, Uid},
    io::Errno,
};
use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read},
    mem::MaybeUninit,
    path::{Path, PathBuf},
};

/// Room for directory entries: an entry is at most 280 bytes, and 32 KiB is what libc's readdir uses.
pub(super) const LISTING: usize = 32 * 1024;
/// How often a tree that changes under us is measured anew before giving up.
const MEASURES: usize = 5;
/// Directories of ours that hold what was moved up; a name no snapshot directory has of itself.
const MOVED_UP: &str = ".gone-";
pub(super) const CONTENT: &CStr = c"fs";

pub(super) type Result<T> = std::result::Result<T, Errno>;

/// `<root>/snapshotter/snapshots`, and the best way this kernel has to open what is in it.
pub(super) struct Snapshots {
    directory: OwnedFd,
    opener: Opener,
    /// What the mount table calls the directory. Only compared, never opened.
    path: PathBuf,
    mounts: Mounts,
}

/// How to open a child without being led elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opener {
    /// openat2 (Linux 5.6) refuses symlinks and mounts itself.
    Kernel,
    /// O_NOFOLLOW, then compare mounts: by id, as a bind mount of the same filesystem has the same device.
    Compare { mount: u64 },
}

impl Snapshots {
    /// `old_kernel` goes without openat2 even where there is one.
    pub(super) fn open(path: &Path, old_kernel: bool) -> io::Result<Snapshots> {
        let directory = rustix::fs::openat(rustix::fs::CWD, path, directory_flags(), Mode::empty())?;
        let opener = match beneath::open(directory.as_fd(), c".") {
            Ok(_) if !old_kernel => Opener::Kernel,
            // EPERM: a container's seccomp profile from before openat2 existed.
            Ok(_) | Err(Errno::NOSYS | Errno::PERM) => Opener::Compare { mount: mount_id(directory.as_fd())? },
            Err(error) => return Err(error.into()),
        };
        Ok(Snapshots { directory, opener, path: path.canonicalize()?, mounts: Mounts::open()? })
    }

    /// Removes the directory of a snapshot.
    pub(super) fn remove(&self, id: SnapshotId) -> Result<()> {
        match self.mounts.any_below(&self.path.join(id.to_string())) {
            Ok(false) => self.take_apart(self.directory.as_fd(), &decimal(id)),
            Ok(true) => Err(Errno::BUSY),
            Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        }
    }

    /// Removes the directory `name` of `above`, if there is one.
    pub(super) fn take_apart(&self, above: BorrowedFd<'_>, name: &CStr) -> Result<()> {
        let top = match self.opener.open(above, name) {
            Ok(top) => top,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut removal = Removal { opener: self.opener, top: top.as_fd(), moved_up: 0, refused: None };
        while removal.pass()? {}
        match (rustix::fs::unlinkat(above, name, AtFlags::REMOVEDIR), removal.refused) {
            (Ok(()) | Err(Errno::NOENT), _) => Ok(()),
            (Err(_), Some(first)) => Err(first),
            (Err(error), None) => Err(error),
        }
    }

    /// Measures the content of a snapshot; nothing if it is a link into the lazy mount.
    pub(super) fn usage(&self, id: SnapshotId) -> Result<Usage> {
        let mut attempt = 1;
        loop {
            let content = match self.content(id) {
                Err(Errno::LOOP | Errno::NOTDIR) => return Ok(Usage::default()),
                other => other?,
            };
            match (measure(self.opener, content), attempt) {
                (Err(Errno::STALE), ..MEASURES) => attempt += 1,
                (result, _) => return result,
            }
        }
    }

    /// Gives the content directory itself to another user.
    pub(super) fn own_upper(&self, id: SnapshotId, uid: u32, gid: u32) -> Result<()> {
        let content = self.content(id)?;
        rustix::fs::fchown(content, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
    }

    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    pub(super) fn opener(&self) -> Opener {
        self.opener
    }

    /// Has everything on disk that was written to the filesystem of the snapshots.
    pub(super) fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.directory)
    }

    pub(super) fn content(&self, id: SnapshotId) -> Result<OwnedFd> {
        let top = self.opener.open(self.directory.as_fd(), &decimal(id))?;
        self.opener.open(top.as_fd(), CONTENT)
    }
}

pub(super) fn decimal(id: SnapshotId) -> CString {
    // Digits contain no NUL, so the fallback is never taken; an empty name would be refused by the kernel.
    CString::new(id.to_string()).unwrap_or_default()
}

impl Opener {
    /// The directory `name` in `directory`: ELOOP or ENOTDIR if it is something else, EXDEV if something is mounted on it.
    pub(super) fn open(self, directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
        match self {
            Opener::Kernel => beneath::open(directory, name),
            Opener::Compare { mount } => {
                let opened = beneath::open_nofollow(directory, name)?;
                match mount_id(opened.as_fd())? == mount {
                    true => Ok(opened),
                    false => Err(Errno::XDEV),
                }
            }
        }
    }
}

/// The id of the mount a descriptor is on, from fdinfo (Linux 3.15): the kernels that lack openat2 also lack statx' mount id.
fn mount_id(fd: BorrowedFd<'_>) -> Result<u64> {
    // Not std's open, which is another call in musl: one that the filter refuses.
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let file = rustix::fs::openat(rustix::fs::CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut info = String::new();
    File::from(file).read_to_string(&mut info).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok()).ok_or(Errno::IO)
}

/// What a directory entry is, when that is cheap to know.
fn is_directory(directory: BorrowedFd<'_>, name: &CStr, listed: FileType) -> Result<bool> {
    match listed {
        FileType::Unknown => {
            let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
        }
        known => Ok(known == FileType::Directory),
    }
}

fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// One snapshot directory on its way out.
struct Removal<'a> {
    opener: Opener,
    top: BorrowedFd<'a>,
    /// Numbers used for directories that were moved up.
    moved_up: u64,
    /// The first thing that would not go.
    refused: Option<Errno>,
}

impl Removal<'_> {
    /// Goes through the top directory once. Whether another pass may find more to do: something went, and something may be left.
    fn pass(&mut self) -> Result<bool> {
        rustix::fs::seek(self.top, SeekFrom::Start(0))?;
        let mut buffer = vec![MaybeUninit::uninit(); LISTING];
        let mut listing = RawDir::new(self.top, &mut buffer);
        let mut progress = false;
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let name = entry.file_name();
            if is_dots(name) {
                continue;
            }
            progress |= match remove_entry(self.top, name, entry.file_type()) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => self.hollow(name),
                other => self.note(other),
            };
        }
        Ok(progress)
    }

    /// Empties the directory `name` of the top directory: files go, sub-directories move up. Then removes it.
    fn hollow(&mut self, name: &CStr) -> bool {
        let directory = match self.opener.open(self.top, name) {
            Ok(directory) => directory,
            Err(error) => return self.note(Err(error)),
        };
        let mut buffer = vec![MaybeUninit::uninit(); LISTING];
        let mut listing = RawDir::new(directory.as_fd(), &mut buffer);
        let mut progress = false;
        while let Some(entry) = listing.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => return self.note(Err(error)) || progress,
            };
            let child = entry.file_name();
            if is_dots(child) {
                continue;
            }
            progress |= match remove_entry(directory.as_fd(), child, entry.file_type()) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    let moved = self.move_up(directory.as_fd(), child);
                    self.note(moved)
                }
                other => self.note(other),
            };
        }
        match rustix::fs::unlinkat(self.top, name, AtFlags::REMOVEDIR) {
            // Entries may escape one listing while it shrinks; the next pass comes back for them.
            Err(Errno::NOTEMPTY | Errno::EXIST) => progress,
            other => self.note(other) || progress,
        }
    }

    fn move_up(&mut self, from: BorrowedFd<'_>, name: &CStr) -> Result<()> {
        loop {
            let target = format!("{MOVED_UP}{}", self.moved_up);
            self.moved_up += 1;
            match rustix::fs::renameat(from, name, self.top, &target) {
                // Left there by a removal that was interrupted.
                Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
                other => return other,
            }
        }
    }

    /// Whether it went; if not, why, for the report.
    fn note(&mut self, outcome: Result<()>) -> bool {
        match outcome {
            Ok(()) => true,
            Err(Errno::NOENT) => false,
            Err(error) => {
                // EXDEV only says how we noticed a mount; EBUSY is what it means.
                self.refused.get_or_insert(if error == Errno::XDEV { Errno::BUSY } else { error });
                false
            }
        }
    }
}

/// Removes a file, or a directory if it is empty.
fn remove_entry(directory: BorrowedFd<'_>, name: &CStr, listed: FileType) -> Result<()> {
    let flags = if is_directory(directory, name, listed)? { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    rustix::fs::unlinkat(directory, name, flags)
}

/// A directory that is being measured, while one of its descendants is.
struct Level {
    device: u64,
    inode: u64,
    /// Where its listing goes on.
    resume: u64,
}

/// Adds up a tree, the directory itself included. ESTALE if it was rearranged while we were in it.
fn measure(opener: Opener, content: OwnedFd) -> Result<Usage> {
    let root = rustix::fs::fstat(&content)?;
    let mut usage = Usage { size: bytes_on_disk(&root), inodes: 1 };
    // Names still to come of files that have several. An entry leaves when its last name was seen.
    let mut names_left: HashMap<u64, u64> = HashMap::new();
    let mut buffer = vec![MaybeUninit::uninit(); LISTING];
    let mut above: Vec<Level> = Vec::new();
    let mut current = content;
    loop {
        let mut descend = None;
        let mut listing = RawDir::new(current.as_fd(), &mut buffer);
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let name = entry.file_name();
            if is_dots(name) {
                continue;
            }
            let stat = match rustix::fs::statat(&current, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                other => other?,
            };
            if stat.st_dev != root.st_dev {
                continue;
            }
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                match opener.open(current.as_fd(), name) {
                    // Gone, replaced, or something is mounted on it.
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => continue,
                    opened => descend = Some((opened?, entry.next_entry_cookie())),
                }
            } else if !first_sight(&mut names_left, stat.st_ino, links(&stat)) {
                continue;
            }
            usage.size = usage.size.saturating_add(bytes_on_disk(&stat));
            usage.inodes += 1;
            if descend.is_some() {
                break;
            }
        }
        match descend {
            Some((child, resume)) => {
                let here = rustix::fs::fstat(&current)?;
                above.push(Level { device: here.st_dev, inode: here.st_ino, resume });
                current = child;
            }
            None => match above.pop() {
                Some(level) => current = climb(current.as_fd(), &level)?,
                None => return Ok(usage),
            },
        }
    }
}

/// Back to the directory we came from, or ESTALE if `..` is another one by now.
fn climb(from: BorrowedFd<'_>, level: &Level) -> Result<OwnedFd> {
    let parent = rustix::fs::openat(from, c"..", directory_flags(), Mode::empty())?;
    let stat = rustix::fs::fstat(&parent)?;
    if (stat.st_dev, stat.st_ino) != (level.device, level.inode) {
        return Err(Errno::STALE);
    }
    rustix::fs::seek(&parent, SeekFrom::Start(level.resume))?;
    Ok(parent)
}

/// Whether an inode is seen for the first time.
fn first_sight(names_left: &mut HashMap<u64, u64>, inode: u64, links: u64) -> bool {
    if links < 2 {
        return true;
    }
    match names_left.get_mut(&inode) {
        None => {
            names_left.insert(inode, links - 1);
            true
        }
        Some(left) => {
            *left -= 1;
            if *left == 0 {
                names_left.remove(&inode);
            }
            false
        }
    }
}

#[allow(clippy::useless_conversion, reason = "the field has 32 bits on aarch64")]
fn links(stat: &rustix::fs::Stat) -> u64 {
    u64::from(stat.st_nlink)
}

fn bytes_on_disk(stat: &rustix::fs::Stat) -> u64 {
    // st_blocks counts 512-byte units whatever the filesystem's block size is (stat(2)).
    u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512)
}

#[cfg(test)]
mod tests;
