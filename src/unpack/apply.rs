//! Applying entries, one system call at a time. See the module above for what holds.

use super::{
    Detail, IMPLIED, Refusal, TRASH, TREE,
    directories::{Attributes, Directories, ROOT},
};
use crate::{
    sys::beneath,
    tar::{Entry, Kind, Reader, TarError},
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, Dev, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
    pipe::SpliceFlags,
};
use std::ffi::{CStr, CString};

/// What is read from the pipe at a time. Small enough for the cache of a core.
const BUFFER: usize = 256 << 10;
/// From this much on, the rest of a file goes from pipe to file inside the kernel.
const SPLICE_FROM: u64 = 64 << 10;
/// PATH_MAX without its NUL.
pub(super) const LONGEST_PATH: usize = 4095;
/// The list of implied directories: as much as their names could take in memory, see `directories`.
const LONGEST_LIST: usize = 64 << 20;
/// Times outside of this become 1970, as containerd's do: its limit is what fits into 64 bits of nanoseconds.
const LATEST: i64 = i64::MAX / 1_000_000_000;
/// What ext4 holds of extended attributes besides the inode; over that, "no space" means too many of them.
const XATTR_BLOCK: usize = 3 << 10;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
pub(super) const OVERLAY_OPAQUE: &CStr = c"trusted.overlay.opaque";

/// How much a layer may unpack to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of content and extended attributes.
    pub bytes: u64,
    /// Names: files, directories, links and whiteouts.
    pub inodes: u64,
}

/// Where in the image the layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nothing is below it, so there is nothing that its whiteouts could hide: they are left out, as in containerd's unpack.
    Bottom,
    Above,
}

/// Why unpacking ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// The tar is to blame.
    Refused { why: Refusal, detail: Detail },
    /// The system refused with this errno.
    Failed { errno: i32, detail: Detail },
}

/// As [`Stopped`], before it is known at which entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Refused(Refusal),
    Failed(Errno),
}

impl From<Errno> for Why {
    fn from(error: Errno) -> Why {
        match error {
            Errno::NAMETOOLONG => Why::Refused(Refusal::NameTooLong),
            other => Why::Failed(other),
        }
    }
}

impl From<Refusal> for Why {
    fn from(refusal: Refusal) -> Why {
        Why::Refused(refusal)
    }
}

impl Why {
    pub(super) fn at(self, place: &[u8]) -> Stopped {
        let detail = Detail::new(place);
        match self {
            Why::Refused(why) => Stopped::Refused { why, detail },
            Why::Failed(error) => Stopped::Failed { errno: error.raw_os_error(), detail },
        }
    }
}

pub(super) type Result<T> = std::result::Result<T, Why>;

/// Unpacks the tar that arrives through `tar`, to its end. What it took of the budget.
pub fn unpack(tar: BorrowedFd<'_>, mut applier: Applier) -> std::result::Result<Budget, Stopped> {
    let mut stream = Stream { tar, buffer: vec![0; BUFFER], at: 0, end: 0, reader: Reader::new() };
    while stream.fill().map_err(|why| why.at(b"reading the tar"))? {
        let mut input = &stream.buffer[stream.at..stream.end];
        let next = stream.reader.next(&mut input).map_err(|error| refused(&error))?;
        stream.at = stream.end - input.len();
        if let Some(entry) = next {
            applier.apply(&entry, &mut stream).map_err(|why| why.at(&entry.name))?;
        }
    }
    stream.reader.finish().map_err(|error| refused(&error))?;
    applier.finish()
}

fn refused(error: &TarError) -> Stopped {
    Stopped::Refused { why: error.into(), detail: Detail::new(error.to_string().as_bytes()) }
}

/// Where the contents of files come from.
pub trait Content {
    /// Moves the content of the current entry, `size` bytes, into a file.
    fn move_content(&mut self, file: BorrowedFd<'_>, size: u64) -> Result<()>;
}

/// The tar as it comes out of the pipe.
struct Stream<'a> {
    tar: BorrowedFd<'a>,
    buffer: Vec<u8>,
    /// What of the buffer is not used yet.
    at: usize,
    end: usize,
    reader: Reader,
}

impl Stream<'_> {
    /// Whether there is something in the buffer, waiting for it if need be; if not, the tar has ended.
    fn fill(&mut self) -> Result<bool> {
        if self.at == self.end {
            self.at = 0;
            self.end = rustix::io::retry_on_intr(|| rustix::io::read(self.tar, &mut self.buffer[..]))?;
        }
        Ok(self.at < self.end)
    }

    /// From the pipe into the file without passing through here. 0 at the end of the tar.
    fn splice(&mut self, file: BorrowedFd<'_>, left: u64) -> Result<u64> {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 30);
        let moved =
            rustix::io::retry_on_intr(|| rustix::pipe::splice(self.tar, None, file, None, length, SpliceFlags::MOVE));
        match moved {
            // Not a pipe, or a filesystem that cannot: through the buffer then.
            Err(Errno::INVAL) if self.fill()? => {
                let length = usize::try_from(left).map_or(self.end - self.at, |l| l.min(self.end - self.at));
                let written = rustix::io::write(file, &self.buffer[self.at..self.at + length])?;
                self.at += written;
                Ok(written as u64)
            }
            Err(Errno::INVAL) => Ok(0),
            other => Ok(other? as u64),
        }
    }
}

impl Content for Stream<'_> {
    fn move_content(&mut self, file: BorrowedFd<'_>, size: u64) -> Result<()> {
        let mut left = size;
        while left > 0 {
            let moved = match self.at == self.end && left >= SPLICE_FROM {
                true => self.splice(file, left)?,
                false if self.fill()? => {
                    let length = usize::try_from(left).map_or(self.end - self.at, |l| l.min(self.end - self.at));
                    let piece = &self.buffer[self.at..self.at + length];
                    let written = rustix::io::retry_on_intr(|| rustix::io::write(file, piece))?;
                    self.at += written;
                    written as u64
                }
                false => 0,
            };
            if moved == 0 {
                return Err(Refusal::Truncated.into());
            }
            self.reader.pass(moved);
            left -= moved;
        }
        Ok(())
    }
}

/// Makes a tree out of entries.
pub struct Applier {
    work: OwnedFd,
    trash: OwnedFd,
    directories: Directories,
    place: Place,
    left: Budget,
    granted: Budget,
    trashed: u64,
    /// Owner of what this process creates: need not be set again.
    own: (u32, u32),
    /// The parent of the last entry as the tar spelt it, and its number.
    last: Option<(Vec<u8>, usize)>,
}

impl Applier {
    /// Unpacks into the directory `tree` of `work`, both empty so far.
    ///
    /// The process' umask must be 0.
    pub fn new(work: OwnedFd, place: Place, budget: Budget) -> std::result::Result<Applier, Errno> {
        let tree = beneath::open_nofollow(work.as_fd(), TREE)?;
        let trash = beneath::open_nofollow(work.as_fd(), TRASH)?;
        Ok(Applier {
            trash,
            directories: Directories::new(tree),
            work,
            place,
            left: budget,
            granted: budget,
            trashed: 0,
            own: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
            last: None,
        })
    }

    pub(super) fn apply(&mut self, entry: &Entry, content: &mut impl Content) -> Result<()> {
        let (path, name) = split(&entry.name)?;
        if name.is_empty() {
            return match entry.kind {
                // Attributes of the root are the snapshot's, not the layer's.
                Kind::Directory => Ok(()),
                _ => Err(Refusal::NamesRoot.into()),
            };
        }
        let parent = self.enter(path)?;
        if name == OPAQUE {
            if self.place == Place::Above {
                self.directories.set_opaque(parent);
            }
            return Ok(());
        }
        let wanted = attributes(entry)?;
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.hide(parent, hidden, &wanted);
        }
        let name = &component(name)?;
        self.spend(wanted.xattrs.iter().map(|(name, value)| (name.count_bytes() + value.len()) as u64).sum())?;
        match entry.kind {
            Kind::Directory => self.directory(parent, name, wanted),
            Kind::Regular => self.file(parent, name, entry.size, &wanted, content),
            Kind::Hardlink => self.hard_link(parent, name, &entry.link, &wanted),
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > LONGEST_PATH {
                    return Err(Refusal::SymlinkTarget.into());
                }
                self.spend(entry.link.len() as u64)?;
                self.create(parent, name, |directory| rustix::fs::symlinkat(entry.link.as_slice(), directory, name))?;
                self.dress_by_name(parent, name, FileType::Symlink, &wanted)
            }
            Kind::Char => self.node(parent, name, FileType::CharacterDevice, device(entry)?, &wanted),
            Kind::Block => self.node(parent, name, FileType::BlockDevice, device(entry)?, &wanted),
            Kind::Fifo => self.node(parent, name, FileType::Fifo, 0, &wanted),
        }
    }

    /// Marks the directory at `path`, which is there, as one that hides those below.
    pub(super) fn hide_below(&mut self, path: &[u8]) -> Result<()> {
        let number = self.enter(path)?;
        self.directories.set_opaque(number);
        Ok(())
    }

    fn spend(&mut self, bytes: u64) -> Result<()> {
        self.left.bytes = self.left.bytes.checked_sub(bytes).ok_or(Refusal::TooManyBytes)?;
        Ok(())
    }

    /// The number of the directory at `path`, made if it is not there.
    fn enter(&mut self, path: &[u8]) -> Result<usize> {
        if let Some((last, number)) = &self.last
            && last == path
        {
            return Ok(*number);
        }
        let mut at = ROOT;
        for part in path.split(|c| *c == b'/').filter(|part| !matches!(*part, b"" | b".")) {
            let part = &component(part)?;
            at = match self.directories.get(at, part) {
                Some(number) => number,
                None => self.make_directory(at, part).map_err(|why| match why {
                    Why::Failed(Errno::EXIST) => Refusal::ThroughNonDirectory.into(),
                    other => other,
                })?,
            };
        }
        self.last = Some((path.to_vec(), at));
        Ok(at)
    }

    fn make_directory(&mut self, parent: usize, name: &CStr) -> Result<usize> {
        self.left.inodes = self.left.inodes.checked_sub(1).ok_or(Refusal::TooManyInodes)?;
        rustix::fs::mkdirat(self.directories.fd(parent)?, name, Mode::RWXU)?;
        self.directories.add(parent, name)
    }

    /// Creates something under a name, in place of whatever an earlier entry put there.
    fn create<T>(
        &mut self,
        parent: usize,
        name: &CStr,
        make: impl Fn(BorrowedFd<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        self.left.inodes = self.left.inodes.checked_sub(1).ok_or(Refusal::TooManyInodes)?;
        match make(self.directories.fd(parent)?) {
            Err(Errno::EXIST) => {
                self.clear(parent, name)?;
                Ok(make(self.directories.fd(parent)?)?)
            }
            other => Ok(other?),
        }
    }

    fn clear(&mut self, parent: usize, name: &CStr) -> Result<()> {
        let directory = self.directories.get(parent, name).is_some();
        let above = self.directories.fd(parent)?;
        if !directory {
            return Ok(rustix::fs::unlinkat(above, name, AtFlags::empty())?);
        }
        rustix::fs::renameat(above, name, &self.trash, self.trashed.to_string())?;
        self.trashed += 1;
        self.directories.forget(parent, name);
        self.last = None;
        Ok(())
    }

    fn directory(&mut self, parent: usize, name: &CStr, wanted: Attributes) -> Result<()> {
        let number = match self.directories.get(parent, name) {
            Some(number) => number,
            None => match self.make_directory(parent, name) {
                Err(Why::Failed(Errno::EXIST)) => {
                    self.clear(parent, name)?;
                    self.make_directory(parent, name)?
                }
                made => made?,
            },
        };
        self.directories.set_attributes(number, wanted)
    }

    fn file(
        &mut self,
        parent: usize,
        name: &CStr,
        size: u64,
        wanted: &Attributes,
        content: &mut impl Content,
    ) -> Result<()> {
        self.spend(size)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(wanted.mode & 0o777);
        let file = self.create(parent, name, |directory| rustix::fs::openat(directory, name, flags, mode))?;
        content.move_content(file.as_fd(), size)?;
        if (wanted.uid, wanted.gid) != self.own {
            rustix::fs::fchown(&file, Some(Uid::from_raw(wanted.uid)), Some(Gid::from_raw(wanted.gid)))?;
        }
        set_xattrs(wanted, FileType::RegularFile, |name, value| {
            rustix::fs::fsetxattr(&file, name, value, XattrFlags::empty())
        })?;
        // After the owner, which takes set-ID bits away, and after ACLs, which are another view of the mode.
        if wanted.mode & 0o7000 != 0 || !wanted.xattrs.is_empty() {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(wanted.mode))?;
        }
        Ok(rustix::fs::futimens(&file, &times(wanted))?)
    }

    fn node(&mut self, parent: usize, name: &CStr, kind: FileType, device: Dev, wanted: &Attributes) -> Result<()> {
        let mode = Mode::from_raw_mode(wanted.mode & 0o777);
        self.create(parent, name, |directory| rustix::fs::mknodat(directory, name, kind, mode, device))?;
        self.dress_by_name(parent, name, kind, wanted)
    }

    /// Owner, mode, times and extended attributes of what cannot be opened harmlessly.
    fn dress_by_name(&mut self, parent: usize, name: &CStr, kind: FileType, wanted: &Attributes) -> Result<()> {
        let own = self.own;
        let directory = self.directories.fd(parent)?;
        if (wanted.uid, wanted.gid) != own {
            let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
            rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if !wanted.xattrs.is_empty() {
            // There is no lsetxattrat before Linux 6.13: a single component, relative to the directory we go to.
            rustix::process::fchdir(directory)?;
            set_xattrs(wanted, kind, |key, value| rustix::fs::lsetxattr(name, key, value, XattrFlags::empty()))?;
        }
        if kind != FileType::Symlink && (wanted.mode & 0o7000 != 0 || !wanted.xattrs.is_empty()) {
            rustix::fs::chmodat(directory, name, Mode::from_raw_mode(wanted.mode), AtFlags::empty())?;
        }
        Ok(rustix::fs::utimensat(directory, name, &times(wanted), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn hard_link(&mut self, parent: usize, name: &CStr, target: &[u8], wanted: &Attributes) -> Result<()> {
        let missing = || Why::from(Refusal::LinkTarget);
        let (path, base) = split(target)?;
        let base = &component(base).map_err(|_| missing())?;
        let mut at = ROOT;
        for part in path.split(|c| *c == b'/').filter(|part| !matches!(*part, b"" | b".")) {
            at = self.directories.get(at, &component(part)?).ok_or_else(missing)?;
        }
        if (at, base.as_c_str()) == (parent, name) || self.directories.get(at, base).is_some() {
            return Err(missing());
        }
        let from = rustix::io::dup(self.directories.fd(at)?)?;
        self.create(parent, name, |to| rustix::fs::linkat(&from, base, to, name, AtFlags::empty())).map_err(|why| {
            match why {
                Why::Failed(Errno::NOENT) => missing(),
                Why::Failed(Errno::MLINK) => Refusal::TooManyLinks.into(),
                other => other,
            }
        })?;
        self.dress_link(parent, name, wanted)
    }

    /// A link's entry repeats the attributes of its file. Where it says something else the last word counts, and file capabilities that it does not
    /// repeat are lost with the change of owner: all as in containerd's unpack.
    fn dress_link(&mut self, parent: usize, name: &CStr, wanted: &Attributes) -> Result<()> {
        let directory = self.directories.fd(parent)?;
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
        rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        if !wanted.xattrs.is_empty() {
            rustix::process::fchdir(directory)?;
            set_xattrs(wanted, kind, |key, value| rustix::fs::lsetxattr(name, key, value, XattrFlags::empty()))?;
        }
        if kind != FileType::Symlink {
            rustix::fs::chmodat(directory, name, Mode::from_raw_mode(wanted.mode), AtFlags::empty())?;
        }
        Ok(rustix::fs::utimensat(directory, name, &times(wanted), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// A whiteout: hides `hidden` of the layers below. An entry of that name in this layer counts more, whichever comes first.
    fn hide(&mut self, parent: usize, hidden: &[u8], wanted: &Attributes) -> Result<()> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(Refusal::Whiteout.into());
        }
        if self.place == Place::Bottom {
            return Ok(());
        }
        let name = &component(hidden)?;
        self.left.inodes = self.left.inodes.checked_sub(1).ok_or(Refusal::TooManyInodes)?;
        let own = self.own;
        let directory = self.directories.fd(parent)?;
        match rustix::fs::mknodat(directory, name, FileType::CharacterDevice, Mode::empty(), 0) {
            Err(Errno::EXIST) => return Ok(()),
            other => other?,
        }
        if (wanted.uid, wanted.gid) != own {
            let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
            rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// Gives directories their attributes and lists those that the tar only implies, each before what is in it.
    pub(super) fn finish(mut self) -> std::result::Result<Budget, Stopped> {
        let mut implied = Vec::new();
        for number in self.directories.remaining() {
            self.finish_directory(number, &mut implied).map_err(|why| why.at(&self.directories.path(number)))?;
        }
        self.write_list(&implied).map_err(|why| why.at(IMPLIED.to_bytes()))?;
        Ok(Budget { bytes: self.granted.bytes - self.left.bytes, inodes: self.granted.inodes - self.left.inodes })
    }

    fn finish_directory(&mut self, number: usize, implied: &mut Vec<u8>) -> Result<()> {
        let own = self.own;
        let wanted = self.directories.wanted(number).cloned();
        if self.directories.is_opaque(number) {
            rustix::fs::fsetxattr(self.directories.fd(number)?, OVERLAY_OPAQUE, b"y", XattrFlags::empty())?;
        }
        let Some(wanted) = wanted else { return self.finish_implied(number, implied) };
        let fd = self.directories.fd(number)?;
        if (wanted.uid, wanted.gid) != own {
            rustix::fs::fchown(fd, Some(Uid::from_raw(wanted.uid)), Some(Gid::from_raw(wanted.gid)))?;
        }
        set_xattrs(&wanted, FileType::Directory, |name, value| {
            rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty())
        })?;
        rustix::fs::fchmod(fd, Mode::from_raw_mode(wanted.mode))?;
        Ok(rustix::fs::futimens(fd, &times(&wanted))?)
    }

    fn finish_implied(&mut self, number: usize, implied: &mut Vec<u8>) -> Result<()> {
        if number == ROOT {
            return Ok(());
        }
        implied.extend_from_slice(&self.directories.path(number));
        implied.push(0);
        if implied.len() > LONGEST_LIST {
            return Err(Refusal::TooManyDirectories.into());
        }
        let group = self.directories.inherited_group(number);
        let fd = self.directories.fd(number)?;
        if let Some(group) = group {
            rustix::fs::fchown(fd, None, Some(Gid::from_raw(group)))?;
        }
        Ok(rustix::fs::fchmod(fd, Mode::from_raw_mode(0o755))?)
    }

    fn write_list(&self, list: &[u8]) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.work, IMPLIED, flags, Mode::RUSR | Mode::WUSR)?;
        let mut rest = list;
        while !rest.is_empty() {
            rest = &rest[rustix::io::retry_on_intr(|| rustix::io::write(&file, rest))?..];
        }
        Ok(())
    }
}

/// The parent's path and the last component; both may be empty. Trailing slashes and dots say nothing.
fn split(name: &[u8]) -> Result<(&[u8], &[u8])> {
    if name.len() > LONGEST_PATH {
        return Err(Refusal::NameTooLong.into());
    }
    let mut name = name;
    loop {
        name = match name {
            [rest @ .., b'/'] => rest,
            [b'.'] => b"",
            [rest @ .., b'/', b'.'] => rest,
            _ => break,
        }
    }
    Ok(match name.iter().rposition(|c| *c == b'/') {
        Some(slash) => (&name[..slash], &name[slash + 1..]),
        None => (b"", name),
    })
}

/// A name that the kernel may see.
fn component(name: &[u8]) -> Result<CString> {
    if name == b".." {
        return Err(Refusal::DotDot.into());
    }
    // The tar reader lets no NUL through.
    CString::new(name).map_err(|_| Refusal::NotATar.into())
}

fn attributes(entry: &Entry) -> Result<Attributes> {
    // Tars of old have negative ids (nobody is -2 there); the low half is what everybody takes.
    let (uid, gid) = (entry.uid as u32, entry.gid as u32);
    // chown(2) reads this one as "leave it".
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Refusal::Owner.into());
    }
    let mtime = if (0..LATEST).contains(&entry.mtime.0) { entry.mtime } else { (0, 0) };
    let mut xattrs = Vec::new();
    for (name, value) in entry.xattrs() {
        // An image has no business with overlayfs' and other administrators' attributes: containerd ignores them too.
        if !name.starts_with(b"trusted.") {
            xattrs.push((CString::new(name).map_err(|_| Refusal::Xattr)?, value.to_vec()));
        }
    }
    Ok(Attributes { mode: entry.mode as u32 & 0o7777, uid, gid, mtime, xattrs })
}

fn device(entry: &Entry) -> Result<Dev> {
    // Linux has 12 bits of major and 20 of minor number; mknod(2) would cut the rest off.
    match (u32::try_from(entry.devmajor), u32::try_from(entry.devminor)) {
        (Ok(major @ ..=0xfff), Ok(minor @ ..=0xf_ffff)) => Ok(rustix::fs::makedev(major, minor)),
        _ => Err(Refusal::Device.into()),
    }
}

fn times(wanted: &Attributes) -> Timestamps {
    let time = Timespec { tv_sec: wanted.mtime.0, tv_nsec: wanted.mtime.1.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn set_xattrs(
    wanted: &Attributes,
    kind: FileType,
    set: impl Fn(&CStr, &[u8]) -> std::result::Result<(), Errno>,
) -> Result<()> {
    let total: usize = wanted.xattrs.iter().map(|(name, value)| name.count_bytes() + value.len()).sum();
    for (name, value) in &wanted.xattrs {
        match set(name, value) {
            Ok(()) => {}
            // A filesystem without them, or a namespace this kernel does not know: left out, as containerd does.
            Err(Errno::OPNOTSUPP) => {}
            // Only files and directories can have these (xattr(7)).
            Err(Errno::PERM)
                if name.to_bytes().starts_with(b"user.")
                    && !matches!(kind, FileType::RegularFile | FileType::Directory) => {}
            Err(Errno::RANGE | Errno::TOOBIG | Errno::INVAL) => return Err(Refusal::Xattr.into()),
            Err(Errno::NOSPC) if total > XATTR_BLOCK => return Err(Refusal::Xattr.into()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
