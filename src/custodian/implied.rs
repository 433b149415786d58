//! Attributes of directories that a layer implies but does not list: they come from the nearest layer below that has the directory, as in containerd's
//! unpack, or `/tmp` would lose its sticky bit to a layer that only adds a file to it. What no layer below has stays 0755, root.
//!
//! Layers are unpacked at the same time, so this is known only when a layer is published: then all below it are. The custodian looks into layers that
//! are unpacked on disk; that takes the right to enter other users' directories. It never looks into lazy ones: a read there would be answered by the
//! daemon, or never. For those the daemon sends what it knows as data, in a file whose bytes are checked like any message's:
//!
//! ```text
//! file        directory*                                                  little endian; at most 64 MiB
//! directory   path: bytes | number of answers u32 | answer*
//! answer      parent u32 (place in the request's list) | 0 u8 (it is something else there)
//!                                                      | 1 u8 mode u32 uid u32 gid u32 seconds i64 nanoseconds u32 number of xattrs u32 xattr*
//! xattr       name: bytes | value: bytes                                  bytes: length u32, then so many
//! ```

use super::tree::{Opener, Result, Snapshots};
use crate::layout::SnapshotId;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};
use std::{
    collections::HashSet,
    ffi::{CStr, CString, OsStr},
    os::unix::ffi::OsStrExt,
};

/// More than the paths of all directories that a worker may make, see `unpack::directories`.
pub(super) const MAX_FILE: u64 = 64 << 20;
/// Limits of the kernel (linux/limits.h): XATTR_LIST_MAX and XATTR_SIZE_MAX.
const XATTRS: usize = 64 << 10;
/// S_ISGID.
const SET_GROUP_ID: u32 = 0o2000;

/// What a directory looks like.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DirectoryAttributes {
    /// Permission bits, 0o7777.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Names with their prefix (`user.…`).
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a layer has under a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    Directory(DirectoryAttributes),
    SomethingElse,
    Nothing,
}

/// A directory that the layer implies, and what the lazy layers below have there: by place in the list of parents, in rising order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Implied {
    pub path: Vec<u8>,
    pub lazy: Vec<(u32, Found)>,
}

/// As bytes. Layers that have nothing need not be mentioned, and are not.
pub(super) fn encode(list: &[Implied]) -> Vec<u8> {
    let mut out = Vec::new();
    let number = |out: &mut Vec<u8>, n: u32| out.extend_from_slice(&n.to_le_bytes());
    let bytes = |out: &mut Vec<u8>, b: &[u8]| {
        out.extend_from_slice(&u32::try_from(b.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(b);
    };
    for implied in list {
        bytes(&mut out, &implied.path);
        let answers: Vec<_> = implied.lazy.iter().filter(|(_, found)| *found != Found::Nothing).collect();
        number(&mut out, answers.len() as u32);
        for (parent, found) in answers {
            number(&mut out, *parent);
            let Found::Directory(attributes) = found else {
                out.push(0);
                continue;
            };
            out.push(1);
            for n in [attributes.mode, attributes.uid, attributes.gid] {
                number(&mut out, n);
            }
            out.extend_from_slice(&attributes.mtime.0.to_le_bytes());
            number(&mut out, attributes.mtime.1);
            number(&mut out, attributes.xattrs.len() as u32);
            for (name, value) in &attributes.xattrs {
                bytes(&mut out, name);
                bytes(&mut out, value);
            }
        }
    }
    out
}

/// Total: `None` for bytes that `encode` would not have written.
pub(super) fn decode(mut input: &[u8]) -> Option<Vec<Implied>> {
    let mut list = Vec::new();
    while !input.is_empty() {
        let mut implied = Implied { path: take_bytes(&mut input)?, lazy: Vec::new() };
        for _ in 0..take_number(&mut input)? {
            let parent = take_number(&mut input)?;
            let found = match take(&mut input, 1)? {
                [0] => Found::SomethingElse,
                [1] => Found::Directory(take_attributes(&mut input)?),
                _ => return None,
            };
            if implied.lazy.last().is_some_and(|(last, _)| *last >= parent) {
                return None;
            }
            implied.lazy.push((parent, found));
        }
        list.push(implied);
    }
    Some(list)
}

fn take<'a>(input: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = input.split_at_checked(count)?;
    *input = rest;
    Some(taken)
}

fn take_number(input: &mut &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(take(input, 4)?.try_into().ok()?))
}

fn take_bytes(input: &mut &[u8]) -> Option<Vec<u8>> {
    let length = take_number(input)?;
    Some(take(input, usize::try_from(length).ok()?)?.to_vec())
}

fn take_attributes(input: &mut &[u8]) -> Option<DirectoryAttributes> {
    let [mode, uid, gid] = [take_number(input)?, take_number(input)?, take_number(input)?];
    let seconds = i64::from_le_bytes(take(input, 8)?.try_into().ok()?);
    let mut attributes =
        DirectoryAttributes { mode, uid, gid, mtime: (seconds, take_number(input)?), xattrs: Vec::new() };
    for _ in 0..take_number(input)? {
        attributes.xattrs.push((take_bytes(input)?, take_bytes(input)?));
    }
    Some(attributes)
}

/// Gives each of `list` in `tree` the attributes it has in the nearest of `parents`. In the list a directory comes before what is in it.
pub(super) fn dress(
    snapshots: &Snapshots,
    tree: BorrowedFd<'_>,
    parents: &[SnapshotId],
    mut list: Vec<Implied>,
) -> Result<()> {
    let everything: HashSet<Vec<u8>> = list.iter().map(|implied| implied.path.clone()).collect();
    for (place, parent) in (0..).zip(parents) {
        if list.is_empty() {
            break;
        }
        // A lazy layer's is a link, and one that is gone has nothing.
        let content = match snapshots.content(*parent) {
            Ok(content) => Some(content),
            Err(Errno::LOOP | Errno::NOTDIR | Errno::NOENT) => None,
            Err(error) => return Err(error),
        };
        let mut left = Vec::new();
        for implied in list {
            let said = implied.lazy.iter().find(|(at, _)| *at == place).map(|(_, found)| found.clone());
            let found = match (said, &content) {
                (Some(found), _) => found,
                (None, Some(content)) => look(snapshots.opener(), content, &implied.path)?,
                (None, None) => Found::Nothing,
            };
            match found {
                Found::Directory(attributes) => apply(snapshots, tree, &implied.path, &attributes)?,
                Found::SomethingElse => {}
                Found::Nothing => left.push(implied),
            }
        }
        list = left;
    }
    inherit(snapshots.opener(), tree, &everything, &list)
}

/// What no layer has is as mkdir(2) makes it, below a directory that got a set-group-ID bit just now: with the bit and the group.
fn inherit(opener: Opener, tree: BorrowedFd<'_>, implied: &HashSet<Vec<u8>>, list: &[Implied]) -> Result<()> {
    for Implied { path, .. } in list {
        let Some(slash) = path.iter().rposition(|c| *c == b'/') else { continue };
        let above = &path[..slash];
        // Below a directory that the layer lists, the worker has seen to it.
        if !implied.contains(above) {
            continue;
        }
        let stat = rustix::fs::fstat(walk(opener, tree, above)?)?;
        if stat.st_mode & SET_GROUP_ID != 0 {
            let directory = walk(opener, tree, path)?;
            rustix::fs::fchown(&directory, None, Some(Gid::from_raw(stat.st_gid)))?;
            rustix::fs::fchmod(&directory, Mode::from_raw_mode(SET_GROUP_ID | 0o755))?;
        }
    }
    Ok(())
}

/// What a layer on disk has at `path`. Its links are followed inside of it, as a program in the container would see it.
fn look(opener: Opener, content: &OwnedFd, path: &[u8]) -> Result<Found> {
    let opened = match opener {
        Opener::Kernel => {
            let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
            rustix::fs::openat2(content, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), inside)
        }
        // Without openat2 links are not followed: what is behind one counts as something else.
        Opener::Compare { .. } => match walk(opener, content.as_fd(), path) {
            Err(Errno::LOOP | Errno::NOTDIR) => return Ok(Found::SomethingElse),
            other => other,
        },
    };
    let opened = match opened {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NAMETOOLONG | Errno::AGAIN) => {
            return Ok(Found::Nothing);
        }
        other => other?,
    };
    let stat = rustix::fs::fstat(&opened)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Directory {
        return Ok(Found::SomethingElse);
    }
    // O_PATH gives no extended attributes.
    let readable = opener.open(opened.as_fd(), c".")?;
    Ok(Found::Directory(DirectoryAttributes {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
        xattrs: xattrs(readable.as_fd())?,
    }))
}

fn xattrs(directory: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; XATTRS];
    let length = match rustix::fs::flistxattr(directory, &mut names) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        other => other?,
    };
    let mut out = Vec::new();
    // overlayfs' own attributes and the like stay with their layer, as in containerd.
    for name in names[..length].split(|c| *c == 0).filter(|n| !n.is_empty() && !n.starts_with(b"trusted.")) {
        let mut value = vec![0; XATTRS];
        if let Ok(length) = rustix::fs::fgetxattr(directory, OsStr::from_bytes(name), &mut value) {
            value.truncate(length);
            out.push((name.to_vec(), value));
        }
    }
    Ok(out)
}

/// The directory at `path`, one component after the other, none of which may be a link.
fn walk(opener: Opener, from: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    let mut at = opener.open(from, c".")?;
    for part in path.split(|c| *c == b'/').filter(|part| !matches!(*part, b"" | b".")) {
        let name = CString::new(part).map_err(|_| Errno::INVAL)?;
        if part == b".." {
            return Err(Errno::INVAL);
        }
        at = opener.open(at.as_fd(), &name)?;
    }
    Ok(at)
}

fn apply(snapshots: &Snapshots, tree: BorrowedFd<'_>, path: &[u8], wanted: &DirectoryAttributes) -> Result<()> {
    let directory = walk(snapshots.opener(), tree, path)?;
    rustix::fs::fchown(&directory, Some(Uid::from_raw(wanted.uid)), Some(Gid::from_raw(wanted.gid)))?;
    for (name, value) in &wanted.xattrs {
        let name: &CStr = &CString::new(name.as_slice()).map_err(|_| Errno::INVAL)?;
        match rustix::fs::fsetxattr(&directory, name, value, XattrFlags::empty()) {
            // Labels of a security module that this process may not set: the module gives the directory one of its own.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(error) => return Err(error),
        }
    }
    rustix::fs::fchmod(&directory, Mode::from_raw_mode(wanted.mode & 0o7777))?;
    let time = Timespec { tv_sec: wanted.mtime.0, tv_nsec: wanted.mtime.1.into() };
    rustix::fs::futimens(&directory, &Timestamps { last_access: time, last_modification: time })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lists() -> impl Strategy<Value = Vec<Implied>> {
        let text = || prop::collection::vec(any::<u8>(), 0..8);
        let numbers = (any::<u32>(), any::<u32>(), any::<u32>(), any::<i64>(), any::<u32>());
        let attributes = (numbers, prop::collection::vec((text(), text()), 0..3)).prop_map(
            |((mode, uid, gid, seconds, nanoseconds), xattrs)| DirectoryAttributes {
                mode,
                uid,
                gid,
                mtime: (seconds, nanoseconds),
                xattrs,
            },
        );
        let found = prop_oneof![attributes.prop_map(Found::Directory), Just(Found::SomethingElse)];
        let lazy = prop::collection::btree_map(any::<u32>(), found, 0..4).prop_map(|map| map.into_iter().collect());
        prop::collection::vec((text(), lazy).prop_map(|(path, lazy)| Implied { path, lazy }), 0..4)
    }

    proptest! {
        #[test]
        fn proptest_lists_survive_the_journey_and_broken_ones_are_noticed(list in lists(), at: prop::sample::Index, byte: u8) {
            let mut bytes = encode(&list);
            prop_assert_eq!(decode(&bytes), Some(list));
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
                if let Some(list) = decode(&bytes) {
                    prop_assert_eq!(encode(&list), bytes.clone());
                }
                let _ = decode(&bytes[..at]);
            }
        }
    }
}
