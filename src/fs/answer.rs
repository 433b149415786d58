//! What the tree says to each request. No I/O and no waiting: reads of content come back as [`Outcome::Read`].

use super::errno::{Errno, Refusal};
use super::observer::Op;
use super::read;
use super::state_file::{self, StateFile};
use super::tree::{Layer, Missing, ROOT_NODE, Target, Tree, Xattrs, is_layer_root};
use super::wire::{DirBuffer, Listing, Operation, Reply, Request, Ttl};
use crate::layers::toc::{Kind, Node, ROOT};
use crate::layout::SnapshotId;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Largest listing that is put together at once; kernels ask for 4 KiB to 1 MiB.
const MAX_LISTING: u32 = 1 << 20;

/// What to do about a request.
pub(super) enum Outcome {
    /// The buffer holds the whole answer.
    Reply,
    /// No answer is due.
    Silent,
    /// Content of a file: from memory at once, or from a task.
    Read { layer: Arc<Layer>, node: Node, range: Range<u64> },
    /// The request with that number is no longer wanted.
    Interrupt(u64),
    /// It is about a layer that is not here yet: to be asked again when it is.
    Expected(SnapshotId),
}

/// Answers `request` into `buffer`.
pub(super) fn answer(tree: &Tree, request: &Request<'_>, buffer: &mut Vec<u8>) -> Outcome {
    let reply = Reply::new(buffer, request.unique);
    let refused = match request.operation {
        Operation::Silent => return Outcome::Silent,
        Operation::Interrupt { unique } => return Outcome::Interrupt(unique),
        Operation::Acknowledge => {
            reply.ok();
            return Outcome::Reply;
        }
        Operation::Statfs => {
            reply.statfs(tree.statfs());
            return Outcome::Reply;
        }
        Operation::Optional => Refusal::DoWithout,
        Operation::Ioctl => Refusal::NoIoctl,
        Operation::Mutation => Refusal::ReadOnly,
        Operation::Malformed => Refusal::Malformed,
        _ => match tree.target(request.node) {
            Ok(target) => return on_target(tree, target, request, reply),
            Err(Missing::Expected(id)) => return Outcome::Expected(id),
            Err(Missing::Gone) => Refusal::Stale,
        },
    };
    reply.error(refused.into());
    Outcome::Reply
}

fn on_target(tree: &Tree, target: Target, request: &Request<'_>, reply: Reply<'_>) -> Outcome {
    if let Target::Node(layer, node) = &target {
        let op = match request.operation {
            Operation::Lookup { .. } => Some(Op::Lookup),
            Operation::Getattr if node.whiteout => Some(Op::WhiteoutGetattr),
            Operation::Getattr if node.kind == Kind::Regular => Some(Op::FileGetattr),
            Operation::Getattr => Some(Op::Getattr),
            Operation::Readlink => Some(Op::Readlink),
            Operation::Read { .. } => Some(Op::Read),
            Operation::Readdir { .. } => Some(Op::Readdir),
            Operation::Getxattr { .. } => Some(Op::Getxattr),
            Operation::Listxattr { .. } => Some(Op::Listxattr),
            Operation::Open => Some(Op::Open),
            _ => None,
        };
        if let Some(op) = op {
            tree.observer.operation(layer.id, op, &|| layer.toc.path(node.index));
        }
    }
    match request.operation {
        Operation::Lookup { name } => {
            if let (Target::Root, Err(Missing::Expected(id))) = (&target, tree.by_name(name)) {
                return Outcome::Expected(id);
            }
            lookup(tree, &target, name, reply);
        }
        Operation::Getattr => getattr(tree, &target, reply),
        Operation::Readlink => match &target {
            Target::Node(layer, node) if node.kind == Kind::Symlink => reply.bytes(layer.toc.link_target(node.index)),
            _ => reply.error(Refusal::NotThatKind.into()),
        },
        Operation::Readdir { offset, size, listing } => list(tree, &target, offset, size, listing, reply),
        Operation::Getxattr { name, size } => getxattr(tree, &target, name, size, reply),
        Operation::Listxattr { size } => listxattr(tree, &target, size, reply),
        Operation::Read { offset, size } => return content(target, offset, size, reply),
        // No-open: the kernel caches as if KEEP_CACHE had been said, and never asks again.
        _ => reply.error(Refusal::DoWithout.into()),
    }
    Outcome::Reply
}

fn content(target: Target, offset: u64, size: u32, reply: Reply<'_>) -> Outcome {
    match target {
        Target::Node(layer, node) => match read::plan(&node, offset, size) {
            Some(range) => return Outcome::Read { layer, node, range },
            None => reply.error(Refusal::NotThatKind.into()),
        },
        Target::StateFile(layer) => reply.bytes(&layer.state_file.read(offset, size)),
        Target::Root | Target::StateDir(_) => reply.error(Refusal::NotThatKind.into()),
    }
    Outcome::Reply
}

fn lookup(tree: &Tree, target: &Target, name: &[u8], reply: Reply<'_>) {
    match target {
        Target::Root => match tree.by_name(name) {
            // Neither the entry nor its absence is kept: snapshots come and go.
            Ok(layer) => match layer.toc.node(ROOT) {
                Some(root) => reply.entry(layer.node_id(ROOT), layer.attr(&root), Ttl::None, Ttl::Forever),
                None => reply.error(Refusal::Stale.into()),
            },
            Err(_) => reply.error(Refusal::NoEntry.into()),
        },
        Target::Node(_, node) if !node.is_dir() => reply.error(Refusal::NotADirectory.into()),
        Target::Node(layer, node) => match layer.toc.lookup(node.index, name).and_then(|child| layer.toc.node(child)) {
            Some(child) => reply.entry(layer.node_id(child.index), layer.attr(&child), Ttl::Forever, Ttl::Forever),
            None if is_layer_root(node) && name == state_file::DIRECTORY => {
                reply.entry(layer.state_dir_id(), layer.state_dir_attr(), Ttl::Forever, Ttl::Forever);
            }
            None => reply.no_entry_forever(),
        },
        Target::StateDir(layer) if name == StateFile::name(layer).as_bytes() => {
            reply.entry(layer.state_file_id(), layer.state_file_attr(), Ttl::None, Ttl::None);
        }
        Target::StateDir(_) => reply.no_entry_forever(),
        Target::StateFile(_) => reply.error(Refusal::NotADirectory.into()),
    }
}

fn getattr(tree: &Tree, target: &Target, reply: Reply<'_>) {
    match target {
        // Its times tell the kernel whether the listing it keeps is still right.
        Target::Root => reply.attr(tree.root_attr(), Ttl::None),
        Target::Node(layer, node) => reply.attr(layer.attr(node), Ttl::Forever),
        Target::StateDir(layer) => reply.attr(layer.state_dir_attr(), Ttl::Forever),
        Target::StateFile(layer) => reply.attr(layer.state_file_attr(), Ttl::None),
    }
}

/// Offsets of a listing: 0 is the start, 1 is behind `.`, 2 behind `..`; of a layer's directory, n + 2 is behind the nth
/// child; of the root, id + 2 is behind layer id. So a listing goes on in the right place whatever happened in between.
const AFTER_DOT: u64 = 1;
const AFTER_DOTS: u64 = 2;

fn list(tree: &Tree, target: &Target, offset: u64, size: u32, listing: Listing, reply: Reply<'_>) {
    let size = size.min(MAX_LISTING);
    let dots = |buffer: &mut DirBuffer<'_>, own: u64, parent: u64| {
        let mut add = |ino: u64, next: u64, name: &[u8]| match listing {
            Listing::Names => buffer.add(ino, Kind::Directory.mode_bits(), next, name),
            Listing::Plus => buffer.add_dot(ino, next, name),
        };
        (offset >= AFTER_DOT || add(own, AFTER_DOT, b".")) && (offset >= AFTER_DOTS || add(parent, AFTER_DOTS, b".."))
    };
    match target {
        Target::Root => reply.listing(size, |buffer| {
            if !dots(buffer, ROOT_NODE, ROOT_NODE) {
                return;
            }
            // Id 0 is never a layer.
            let mut after = u32::try_from(offset.saturating_sub(AFTER_DOTS)).unwrap_or(u32::MAX);
            while let Some(layer) = tree.next_after(after) {
                after = layer.id.0;
                let Some(root) = layer.toc.node(ROOT) else { continue };
                let (attr, next) = (layer.attr(&root), u64::from(after) + AFTER_DOTS);
                let name = layer.id.to_string();
                let fitted = match listing {
                    Listing::Names => buffer.add(attr.ino, attr.mode, next, name.as_bytes()),
                    Listing::Plus => buffer.add_plus(attr.ino, attr, Ttl::None, next, name.as_bytes()),
                };
                if !fitted {
                    return;
                }
            }
        }),
        Target::Node(layer, node) if node.is_dir() => {
            let started = Instant::now();
            let parent = if is_layer_root(node) { ROOT_NODE } else { layer.node_id(node.parent) };
            reply.listing(size, |buffer| {
                if !dots(buffer, layer.node_id(node.index), parent) {
                    return;
                }
                let skip = usize::try_from(offset.saturating_sub(AFTER_DOTS)).unwrap_or(usize::MAX);
                for (next, (name, child)) in (AFTER_DOTS + 1..).zip(layer.toc.children(node.index)).skip(skip) {
                    let Some(child) = layer.toc.node(child) else { continue };
                    let fitted = match listing {
                        Listing::Names => buffer.add(layer.node_id(child.index), child.mode, next, name),
                        Listing::Plus => {
                            let attr = layer.attr(&child);
                            buffer.add_plus(attr.ino, attr, Ttl::Forever, next, name)
                        }
                    };
                    if !fitted {
                        return;
                    }
                }
            });
            tree.observer.listing(layer.id, &layer.data.digest(), started.elapsed());
        }
        // Its one file is found by name only, as the directory itself.
        Target::StateDir(layer) => reply.listing(size, |buffer| {
            dots(buffer, layer.state_dir_id(), layer.node_id(ROOT));
        }),
        Target::Node(..) | Target::StateFile(_) => reply.error(Refusal::NotADirectory.into()),
    }
}

/// The xattrs of a node: the opaque mark first, then the layer's own, or those the layers below lend to an implied directory.
fn xattrs<'a>(tree: &'a Tree, layer: &'a Layer, node: &Node) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
    let mark = node.opaque.then(|| (tree.opaque.name(), &b"y"[..]));
    let shown = layer.xattrs == Xattrs::Shown;
    let implied = layer.implied.get(&node.index).filter(|_| node.implied && shown);
    let lent = implied.into_iter().flat_map(|attrs| attrs.xattrs.iter().map(|(name, value)| (&name[..], &value[..])));
    let own = (shown && node.has_xattrs).then(|| layer.toc.xattrs(node.index)).into_iter().flatten();
    mark.into_iter().chain(lent).chain(own)
}

fn getxattr(tree: &Tree, target: &Target, name: &[u8], size: u32, reply: Reply<'_>) {
    let value = match target {
        Target::Node(layer, node) => {
            let value = xattrs(tree, layer, node).find(|(known, _)| *known == name).map(|(_, value)| value);
            value.map(|value| match &layer.maps {
                Some(maps) if name == b"security.capability" => maps.file_capabilities(value),
                _ => Cow::Borrowed(value),
            })
        }
        Target::Root | Target::StateDir(_) | Target::StateFile(_) => None,
    };
    match value {
        Some(value) => sized(&[&value], size, reply),
        // Never ENOSYS: the kernel would stop asking for every layer of the mount.
        None => reply.error(Refusal::NoAttribute.into()),
    }
}

fn listxattr(tree: &Tree, target: &Target, size: u32, reply: Reply<'_>) {
    match target {
        Target::Node(layer, node) => {
            let names: Vec<&[u8]> = xattrs(tree, layer, node).flat_map(|(name, _)| [name, b"\0"]).collect();
            sized(&names, size, reply);
        }
        Target::Root | Target::StateDir(_) | Target::StateFile(_) => sized(&[], size, reply),
    }
}

/// Answers with the bytes, with their number when that is what was asked, or with "too small a buffer".
fn sized(parts: &[&[u8]], size: u32, reply: Reply<'_>) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    match (u32::try_from(len), size) {
        // The TOC has none longer than the kernel's own limit; an implied directory's may add up to more.
        (Err(_), _) => reply.error(Errno::TOOBIG),
        (Ok(len), _) if len > XATTR_MAX => reply.error(Errno::TOOBIG),
        (Ok(len), 0) => reply.xattr_size(len),
        (Ok(len), size) if len > size => reply.error(Refusal::SmallBuffer.into()),
        _ => reply.bytes(&parts.concat()),
    }
}

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`.
const XATTR_MAX: u32 = 65_536;
