//! Copying a layer that is on disk for a container whose users are others: every owner is translated, all else stays.
//!
//! The source is walked through descriptors: one component at a time, links never followed, one descriptor open whatever the depth. What is found
//! becomes the entries that a tar of it would have, and those are applied as any tar's are. Contents are shared where the filesystem can (XFS, btrfs),
//! and otherwise copied inside the kernel.

use super::{
    Applier, Budget, Refusal, Stopped,
    apply::{Content, LONGEST_PATH, OVERLAY_OPAQUE, Result, Why},
};
use crate::{
    oci::IdMaps,
    sys::beneath,
    tar::{Entry, Kind, Records, XATTR_PREFIX},
};
use rustix::{
    buffer::spare_capacity,
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, Stat},
    io::Errno,
};
use std::{collections::HashMap, ffi::CStr, mem::MaybeUninit};

/// Room for directory entries.
const LISTING: usize = 32 << 10;
/// XATTR_LIST_MAX and XATTR_SIZE_MAX.
const XATTR_MAX: usize = 65_536;
/// Bytes copied by one call, so that a signal to end is heard.
const PIECE: usize = 64 << 20;
const CAPABILITY: &[u8] = b"security.capability";

/// Copies the tree below `source`, not `source` itself. What it took.
pub fn copy(source: OwnedFd, maps: &IdMaps, mut applier: Applier) -> std::result::Result<Budget, Stopped> {
    let mut walk = Walk { maps, path: Vec::new(), links: HashMap::new() };
    walk.all(source, &mut applier).map_err(|why| why.at(&walk.path))?;
    applier.finish()
}

/// A directory that is being copied, while one of its descendants is.
struct Level {
    device: u64,
    inode: u64,
    /// Where its listing goes on.
    resume: u64,
    /// Length of its path.
    path: usize,
}

struct Walk<'a> {
    maps: &'a IdMaps,
    /// Of what is being copied, from the top, without a slash at either end.
    path: Vec<u8>,
    /// First names of files that have several, by inode.
    links: HashMap<u64, Vec<u8>>,
}

impl Walk<'_> {
    fn all(&mut self, source: OwnedFd, applier: &mut Applier) -> Result<()> {
        let device = rustix::fs::fstat(&source)?.st_dev;
        let mut buffer = vec![MaybeUninit::uninit(); LISTING];
        let mut above: Vec<Level> = Vec::new();
        let mut current = source;
        let mut here = 0;
        loop {
            let mut descend = None;
            let mut listing = RawDir::new(current.as_fd(), &mut buffer);
            while let Some(entry) = listing.next() {
                let entry = entry?;
                let name = entry.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                self.path.truncate(here);
                if here > 0 {
                    self.path.push(b'/');
                }
                self.path.extend_from_slice(name.to_bytes());
                if self.path.len() > LONGEST_PATH {
                    return Err(Refusal::NameTooLong.into());
                }
                let stat = rustix::fs::statat(&current, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if stat.st_dev != device {
                    // Somebody has mounted something in a layer.
                    return Err(Errno::XDEV.into());
                }
                // No image has sockets; what a committed container left of one is of no use to another.
                if FileType::from_raw_mode(stat.st_mode) == FileType::Socket {
                    continue;
                }
                if let Some(child) = self.one(current.as_fd(), name, &stat, applier)? {
                    descend = Some((child, entry.next_entry_cookie()));
                    break;
                }
            }
            match descend {
                Some((child, resume)) => {
                    let stat = rustix::fs::fstat(&current)?;
                    above.push(Level { device: stat.st_dev, inode: stat.st_ino, resume, path: here });
                    current = child;
                    here = self.path.len();
                }
                None => match above.pop() {
                    Some(level) => {
                        here = level.path;
                        current = climb(current.as_fd(), &level)?;
                    }
                    None => return Ok(()),
                },
            }
        }
    }

    /// Copies one thing. A directory is returned, for its content to follow.
    fn one(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &CStr,
        stat: &Stat,
        applier: &mut Applier,
    ) -> Result<Option<OwnedFd>> {
        let mut entry = self.entry(stat)?;
        if let Some(first) = self.first_name(stat, entry.kind) {
            (entry.kind, entry.link, entry.size) = (Kind::Hardlink, first, 0);
        }
        match entry.kind {
            Kind::Directory => {
                let child = beneath::open_nofollow(directory, name)?;
                entry.records =
                    self.xattrs(|b| rustix::fs::flistxattr(&child, b), |k, b| rustix::fs::fgetxattr(&child, k, b))?;
                applier.apply(&entry, &mut Nothing)?;
                let mut mark = [0; 2];
                if matches!(rustix::fs::fgetxattr(&child, OVERLAY_OPAQUE, &mut mark), Ok(1) if mark[0] == b'y') {
                    applier.hide_below(&self.path)?;
                }
                return Ok(Some(child));
            }
            // Repeats what the first name has: the change of owner takes file capabilities away.
            Kind::Hardlink => {
                rustix::process::fchdir(directory)?;
                entry.records =
                    self.xattrs(|b| rustix::fs::llistxattr(name, b), |k, b| rustix::fs::lgetxattr(name, k, b))?;
                applier.apply(&entry, &mut Nothing)?;
            }
            Kind::Regular => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
                entry.records =
                    self.xattrs(|b| rustix::fs::flistxattr(&file, b), |k, b| rustix::fs::fgetxattr(&file, k, b))?;
                applier.apply(&entry, &mut Source(file))?;
            }
            kind => {
                if kind == Kind::Symlink {
                    entry.link = rustix::fs::readlinkat(directory, name, Vec::new())?.into_bytes();
                }
                // There is no llistxattrat before Linux 6.13: a single component, relative to the directory we go to.
                rustix::process::fchdir(directory)?;
                entry.records =
                    self.xattrs(|b| rustix::fs::llistxattr(name, b), |k, b| rustix::fs::lgetxattr(name, k, b))?;
                applier.apply(&entry, &mut Nothing)?;
            }
        }
        Ok(None)
    }

    fn entry(&self, stat: &Stat) -> Result<Entry> {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::Regular,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::CharacterDevice => Kind::Char,
            FileType::BlockDevice => Kind::Block,
            FileType::Fifo => Kind::Fifo,
            // `all` has left sockets out.
            _ => return Err(Refusal::Unsupported.into()),
        };
        let (uid, gid) = match (kind, stat.st_rdev) {
            // A whiteout belongs to nobody.
            (Kind::Char, 0) => (stat.st_uid, stat.st_gid),
            _ => self.maps.host(stat.st_uid, stat.st_gid).ok_or(Refusal::Owner)?,
        };
        Ok(Entry {
            name: self.path.clone(),
            kind,
            link: Vec::new(),
            size: if kind == Kind::Regular { u64::try_from(stat.st_size).unwrap_or(0) } else { 0 },
            mode: i64::from(stat.st_mode & 0o7777),
            uid: uid.into(),
            gid: gid.into(),
            uname: Vec::new(),
            gname: Vec::new(),
            mtime: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            devmajor: rustix::fs::major(stat.st_rdev).into(),
            devminor: rustix::fs::minor(stat.st_rdev).into(),
            records: Records::new(),
            offset: 0,
        })
    }

    /// The first name of a file that has come before.
    fn first_name(&mut self, stat: &Stat, kind: Kind) -> Option<Vec<u8>> {
        #[allow(clippy::useless_conversion, reason = "the field has 32 bits on aarch64")]
        let links = u64::from(stat.st_nlink);
        if links < 2 || kind == Kind::Directory {
            return None;
        }
        let first = self.links.get(&stat.st_ino).cloned();
        if first.is_none() {
            self.links.insert(stat.st_ino, self.path.clone());
        }
        first
    }

    /// Extended attributes as a tar has them. What overlayfs notes for itself is not the layer's.
    fn xattrs(
        &self,
        list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
        get: impl Fn(&CStr, &mut [u8]) -> rustix::io::Result<usize>,
    ) -> Result<Records> {
        let mut records = Records::new();
        let mut names = vec![0; XATTR_MAX];
        let listed = match list(&mut names) {
            Ok(listed) => listed,
            Err(Errno::OPNOTSUPP) => 0,
            Err(error) => return Err(error.into()),
        };
        let mut rest = &names[..listed];
        while let Ok(name) = CStr::from_bytes_until_nul(rest) {
            rest = &rest[name.count_bytes() + 1..];
            if name.to_bytes().starts_with(b"trusted.") {
                continue;
            }
            let mut value = vec![0; XATTR_MAX];
            match get(name, &mut value) {
                Ok(length) => value.truncate(length),
                // A name without value: the security module's of a filesystem that keeps none.
                Err(Errno::NODATA | Errno::OPNOTSUPP) => continue,
                Err(error) => return Err(error.into()),
            }
            if name.to_bytes() == CAPABILITY {
                value = self.maps.file_capabilities(&value).into_owned();
            }
            records.insert([XATTR_PREFIX, name.to_bytes()].concat(), value);
        }
        Ok(records)
    }
}

/// Back to the directory we came from, or ESTALE if `..` is another one by now.
fn climb(from: BorrowedFd<'_>, level: &Level) -> Result<OwnedFd> {
    let parent = rustix::fs::openat(from, c"..", beneath::directory_flags(), Mode::empty())?;
    let stat = rustix::fs::fstat(&parent)?;
    if (stat.st_dev, stat.st_ino) != (level.device, level.inode) {
        return Err(Errno::STALE.into());
    }
    rustix::fs::seek(&parent, SeekFrom::Start(level.resume))?;
    Ok(parent)
}

/// The content of what has none.
struct Nothing;

impl Content for Nothing {
    fn move_content(&mut self, _: BorrowedFd<'_>, size: u64) -> Result<()> {
        match size {
            0 => Ok(()),
            _ => Err(Refusal::Truncated.into()),
        }
    }
}

/// A file of the source.
struct Source(OwnedFd);

impl Content for Source {
    fn move_content(&mut self, file: BorrowedFd<'_>, size: u64) -> Result<()> {
        if size == 0 || rustix::fs::ioctl_ficlone(file, &self.0).is_ok() {
            return Ok(());
        }
        let mut left = size;
        while left > 0 {
            let piece = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let copied = match rustix::fs::copy_file_range(&self.0, None, file, None, piece) {
                // Filesystems that cannot, and kernels that do not know the call (before 4.5).
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::XDEV | Errno::PERM) => {
                    self.through(file)?
                }
                Err(Errno::INTR) => continue,
                other => other?,
            };
            if copied == 0 {
                return Err(Refusal::Truncated.into());
            }
            left = left.saturating_sub(copied as u64);
        }
        Ok(())
    }
}

impl Source {
    /// Some bytes by way of this process.
    fn through(&self, file: BorrowedFd<'_>) -> std::result::Result<usize, Why> {
        let mut buffer = Vec::with_capacity(256 << 10);
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, spare_capacity(&mut buffer)))?;
        let mut rest = &buffer[..read];
        while !rest.is_empty() {
            rest = &rest[rustix::io::retry_on_intr(|| rustix::io::write(file, rest))?..];
        }
        Ok(read)
    }
}
