//! Attributes of directories that a layer implies but does not list.
//!
//! umoci and BuildKit write layers without entries for parent directories that did not change. containerd's unpack copies mode,
//! owner, times and xattrs of such a directory from the nearest lower layer that has it; a lazily loaded layer must do the same,
//! or `/tmp` loses its sticky bit for every container above it. What a layer has nowhere below is 0755, root.

use crate::{
    fs::ImpliedAttrs,
    layers::toc::{Kind, ROOT, Toc},
};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use std::{
    collections::HashMap,
    ffi::OsStr,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    sync::Arc,
};

/// As many symlinks as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// A lazily loaded layer, as far as those above care.
pub struct Shown {
    pub toc: Arc<Toc>,
    /// What it took itself from the layers below.
    pub implied: HashMap<u32, ImpliedAttrs>,
}

/// One layer below, nearest first in a slice of them.
pub enum Below {
    Lazy(Arc<Shown>),
    /// A layer that is unpacked on disk: an open descriptor of its root.
    Unpacked(OwnedFd),
}

/// What a layer has under a path.
pub enum Found {
    Directory(ImpliedAttrs),
    SomethingElse,
    Nothing,
}

/// The attributes of every directory that `toc` implies, by node.
pub fn attributes(toc: &Toc, below: &[Below]) -> HashMap<u32, ImpliedAttrs> {
    let mut out = HashMap::new();
    for (node, path) in toc.implied_dirs() {
        for layer in below {
            match layer.find(&path) {
                Found::Directory(attributes) => {
                    out.insert(node, attributes);
                    break;
                }
                Found::SomethingElse => break,
                Found::Nothing => {}
            }
        }
    }
    out
}

impl Below {
    fn find(&self, path: &[u8]) -> Found {
        match self {
            Below::Lazy(layer) => find_lazy(layer, path),
            Below::Unpacked(root) => find_unpacked(root, path),
        }
    }
}

/// What a lazy layer has under `path`.
pub fn find_lazy(layer: &Shown, path: &[u8]) -> Found {
    let toc = &layer.toc;
    let Some(index) = follow(toc, path) else { return Found::Nothing };
    let Some(node) = toc.node(index) else { return Found::Nothing };
    if node.kind != Kind::Directory {
        return Found::SomethingElse;
    }
    if node.implied {
        // What this layer took from below it holds for it; what it found nowhere is no answer.
        return layer.implied.get(&index).map_or(Found::Nothing, |a| Found::Directory(a.clone()));
    }
    Found::Directory(ImpliedAttrs {
        mode: node.mode & 0o7777,
        uid: node.uid,
        gid: node.gid,
        mtime: node.mtime,
        xattrs: toc.xattrs(index).map(|(name, value)| (name.to_vec(), value.to_vec())).collect(),
    })
}

/// The node at `path`, symlinks followed as if the layer were the root of everything.
fn follow(toc: &Toc, path: &[u8]) -> Option<u32> {
    let mut left: Vec<Vec<u8>> = path.split(|c| *c == b'/').rev().map(<[u8]>::to_vec).collect();
    let (mut at, mut links) = (ROOT, 0);
    while let Some(name) = left.pop() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                at = toc.node(at)?.parent;
                continue;
            }
            _ => {}
        }
        let next = toc.lookup(at, &name)?;
        if toc.node(next)?.kind != Kind::Symlink {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return None;
        }
        let target = toc.link_target(next);
        if target.first() == Some(&b'/') {
            at = ROOT;
        }
        left.extend(target.split(|c| *c == b'/').rev().map(<[u8]>::to_vec));
    }
    Some(at)
}

fn find_unpacked(root: &OwnedFd, path: &[u8]) -> Found {
    let path = if path.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(path) };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened = match rustix::fs::openat2(root, path, flags, Mode::empty(), inside) {
        // Kernels before 5.6: without following links out of the layer there is only the plain walk.
        Err(rustix::io::Errno::NOSYS) => rustix::fs::openat(root, path, flags | OFlags::NOFOLLOW, Mode::empty()),
        result => result,
    };
    let Ok(directory) = opened else { return Found::Nothing };
    let Ok(stat) = rustix::fs::statat(&directory, "", AtFlags::EMPTY_PATH) else { return Found::Nothing };
    if stat.st_mode & 0o170000 != 0o040000 {
        return Found::SomethingElse;
    }
    Found::Directory(ImpliedAttrs {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
        xattrs: xattrs_of(&directory),
    })
}

/// What of a directory's xattrs a process without capabilities may read; overlayfs' own stay with their layer.
fn xattrs_of(directory: &OwnedFd) -> Vec<(Vec<u8>, Vec<u8>)> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(directory));
    let mut names = vec![0; 64 << 10];
    let Ok(length) = rustix::fs::listxattr(&path, &mut names) else { return Vec::new() };
    let mut out = Vec::new();
    for name in names[..length].split(|c| *c == 0).filter(|n| !n.is_empty() && !n.starts_with(b"trusted.overlay.")) {
        let mut value = vec![0; 64 << 10];
        if let Ok(length) = rustix::fs::getxattr(&path, OsStr::from_bytes(name), &mut value) {
            value.truncate(length);
            out.push((name.to_vec(), value));
        }
    }
    out
}
