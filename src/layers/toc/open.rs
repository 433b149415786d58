//! Reading the flat file: a checksum once, then slices.

use super::format::{self, Dirent, HEADER_LEN, Header, MAGIC, RawNode, VERSION};
use super::{Kind, Node, ROOT};
use crate::oci::Digest;
use crate::sys::map::Mapping;
use std::{io, ops::Deref, ops::Range, path::Path};
use zerocopy::{FromBytes, IntoBytes};

/// Why a flat TOC cannot be used. All but `Io` and `Newer` mean: build it again.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot read the flat TOC")]
    Io(#[from] io::Error),
    /// It may number inodes in another way, and the kernel remembers them.
    #[error("the flat TOC was written by a newer version (format {0}, this one knows {VERSION})")]
    Newer(u32),
    #[error("not a flat TOC of version {VERSION}")]
    OtherFormat,
    #[error("the flat TOC belongs to layer {0}")]
    OtherLayer(Digest),
    #[error("the flat TOC is damaged")]
    Damaged,
}

enum Bytes {
    Mapped(Mapping),
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// An open flat TOC. Cheap to query from many threads; costs no memory per file.
pub struct Toc {
    bytes: Bytes,
    layer: Digest,
    flags: u32,
    nodes: Range<usize>,
    dirents: Range<usize>,
    names: Range<usize>,
    links: Range<usize>,
    xattrs: Range<usize>,
}

/// A regular file, as the scheduler wants to see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct File<'a> {
    pub node: u32,
    pub parent: u32,
    pub name: &'a [u8],
    /// Of the content, in the uncompressed layer.
    pub offset: u64,
    pub size: u64,
    pub mode: u32,
}

/// Longest chain of parents that is followed; `build` makes none longer.
const MAX_CLIMB: usize = super::build::MAX_DEPTH + 1;

impl Toc {
    /// Maps and checks the flat TOC at `path`, which must belong to `layer`.
    pub fn open(path: &Path, layer: &Digest) -> Result<Toc, OpenError> {
        let file = std::fs::File::open(path)?;
        if file.metadata()?.len() < HEADER_LEN as u64 {
            return Err(OpenError::Damaged);
        }
        let toc = Toc::check(Bytes::Mapped(Mapping::of(&file)?), layer)?;
        if let Bytes::Mapped(map) = &toc.bytes {
            // Only memory accounting is at stake.
            let _ = map.release_pages();
        }
        Ok(toc)
    }

    /// The same for a TOC that was just built and is still in memory.
    pub fn from_bytes(bytes: Vec<u8>, layer: &Digest) -> Result<Toc, OpenError> {
        Toc::check(Bytes::Owned(bytes), layer)
    }

    fn check(bytes: Bytes, layer: &Digest) -> Result<Toc, OpenError> {
        let (header, body) = Header::ref_from_prefix(&bytes).map_err(|_| OpenError::Damaged)?;
        if header.magic == MAGIC && header.version.get() > VERSION {
            return Err(OpenError::Newer(header.version.get()));
        }
        if header.magic != MAGIC || header.version.get() != VERSION {
            return Err(OpenError::OtherFormat);
        }
        if crc32fast::hash(&header.as_bytes()[..HEADER_LEN - 4]) != header.header_crc.get() {
            return Err(OpenError::Damaged);
        }
        let owner = Digest::from_bytes(header.layer);
        if owner != *layer {
            return Err(OpenError::OtherLayer(owner));
        }
        let mut end = HEADER_LEN;
        let mut section = |count: u32, size: usize| -> Option<Range<usize>> {
            let start = end;
            end = start.checked_add(usize::try_from(count).ok()?.checked_mul(size)?)?;
            Some(start..end)
        };
        let sections = (|| {
            Some((
                section(header.nodes.get(), size_of::<RawNode>())?,
                section(header.dirents.get(), size_of::<Dirent>())?,
                section(header.names_len.get(), 1)?,
                section(header.links_len.get(), 1)?,
                section(header.xattrs_len.get(), 1)?,
            ))
        })();
        let (nodes, dirents, names, links, xattrs) = sections.ok_or(OpenError::Damaged)?;
        if end != bytes.len() || header.nodes.get() == 0 || crc32fast::hash(body) != header.body_crc.get() {
            return Err(OpenError::Damaged);
        }
        let (layer, flags) = (owner, header.flags.get());
        Ok(Toc { bytes, layer, flags, nodes, dirents, names, links, xattrs })
    }

    /// The layer this TOC describes.
    pub fn layer(&self) -> Digest {
        self.layer
    }

    /// Number of nodes; their numbers are `0..len`.
    pub fn len(&self) -> u32 {
        u32::try_from(self.raw_nodes().len()).unwrap_or(u32::MAX)
    }

    /// Never: there is always a root.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether any file has an xattr (opaque directories not counted).
    pub fn has_xattrs(&self) -> bool {
        self.flags & format::HAS_XATTRS != 0
    }

    /// Whether any directory is opaque.
    pub fn has_opaque(&self) -> bool {
        self.flags & format::HAS_OPAQUE != 0
    }

    fn section(&self, range: &Range<usize>) -> &[u8] {
        self.bytes.get(range.clone()).unwrap_or(&[])
    }

    fn raw_nodes(&self) -> &[RawNode] {
        <[RawNode]>::ref_from_bytes(self.section(&self.nodes)).unwrap_or(&[])
    }

    fn raw(&self, node: u32) -> Option<&RawNode> {
        self.raw_nodes().get(node as usize)
    }

    fn dirents(&self, dir: u32) -> &[Dirent] {
        let all = <[Dirent]>::ref_from_bytes(self.section(&self.dirents)).unwrap_or(&[]);
        self.raw(dir)
            .filter(|raw| Kind::of_mode(raw.mode.get()) == Some(Kind::Directory))
            .and_then(|raw| {
                let first = raw.a.get() as usize;
                all.get(first..first.checked_add(raw.b.get() as usize)?)
            })
            .unwrap_or(&[])
    }

    fn name_at(&self, place: u32) -> &[u8] {
        self.section(&self.names)
            .get(place as usize..)
            .and_then(<[u8]>::split_first)
            .and_then(|(len, rest)| rest.get(..usize::from(*len)))
            .unwrap_or(&[])
    }

    /// The node of that number.
    pub fn node(&self, index: u32) -> Option<Node> {
        let raw = self.raw(index)?;
        let mode = raw.mode.get();
        let kind = Kind::of_mode(mode)?;
        let flags = raw.flags.get();
        Some(Node {
            index,
            kind,
            mode,
            uid: raw.uid.get(),
            gid: raw.gid.get(),
            size: raw.size.get(),
            mtime: (raw.mtime.get(), raw.mtime_nanos.get()),
            nlink: raw.nlink.get(),
            rdev: if matches!(kind, Kind::Char | Kind::Block) { raw.a.get() } else { 0 },
            offset: raw.offset.get(),
            header_len: raw.header_len.get(),
            parent: raw.parent.get(),
            implied: flags & format::IMPLIED != 0,
            opaque: flags & format::OPAQUE != 0,
            whiteout: flags & format::WHITEOUT != 0,
            renamed: flags & format::RENAMED != 0,
            has_xattrs: raw.xattr_count.get() != 0,
        })
    }

    /// The child of `dir` called `name`.
    pub fn lookup(&self, dir: u32, name: &[u8]) -> Option<u32> {
        let dirents = self.dirents(dir);
        let at = dirents.binary_search_by(|dirent| self.name_at(dirent.name.get()).cmp(name)).ok()?;
        Some(dirents[at].node.get())
    }

    /// The node at a path; empty components and `.` are skipped, symlinks are not followed.
    pub fn resolve(&self, path: &[u8]) -> Option<u32> {
        path.split(|byte| *byte == b'/')
            .filter(|name| !matches!(*name, b"" | b"."))
            .try_fold(ROOT, |dir, name| self.lookup(dir, name))
    }

    /// The children of `dir`, sorted bytewise by name. Nothing for what is not a directory.
    pub fn children(&self, dir: u32) -> impl ExactSizeIterator<Item = (&[u8], u32)> {
        self.dirents(dir).iter().map(|dirent| (self.name_at(dirent.name.get()), dirent.node.get()))
    }

    /// The name under which `node` was listed in the tar; empty for the root.
    pub fn name(&self, node: u32) -> &[u8] {
        self.raw(node).map_or(&[], |raw| self.name_at(raw.name.get()))
    }

    /// Path of `node` from the root of the layer, without a leading slash; empty for the root.
    pub fn path(&self, node: u32) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = node;
        while at != ROOT && names.len() < MAX_CLIMB {
            let Some(raw) = self.raw(at) else { break };
            names.push(self.name_at(raw.name.get()));
            at = raw.parent.get();
        }
        names.reverse();
        names.join(&b'/')
    }

    /// The target of a symlink; empty for anything else.
    pub fn link_target(&self, node: u32) -> &[u8] {
        self.raw(node)
            .filter(|raw| Kind::of_mode(raw.mode.get()) == Some(Kind::Symlink))
            .and_then(|raw| {
                let first = raw.a.get() as usize;
                self.section(&self.links).get(first..first.checked_add(raw.b.get() as usize)?)
            })
            .unwrap_or(&[])
    }

    /// The xattrs of a node, sorted by name.
    pub fn xattrs(&self, node: u32) -> impl Iterator<Item = (&[u8], &[u8])> {
        let (mut block, count) = self.raw(node).map_or((&[][..], 0), |raw| {
            let block = self.section(&self.xattrs).get(raw.xattrs.get() as usize..);
            (block.unwrap_or(&[]), raw.xattr_count.get())
        });
        (0..count).map_while(move |_| {
            let (name, value, rest) = format::split_xattr(block)?;
            block = rest;
            Some((name, value))
        })
    }

    /// Directories that the layer implies without listing them, with their paths; the root (path empty) may be one.
    pub fn implied_dirs(&self) -> impl Iterator<Item = (u32, Vec<u8>)> {
        (0u32..)
            .zip(self.raw_nodes())
            .filter(|(_, raw)| raw.flags.get() & format::IMPLIED != 0)
            .map(|(index, _)| (index, self.path(index)))
    }

    /// All regular files, once each, in node order (a directory's files are neighbours).
    pub fn files(&self) -> impl Iterator<Item = File<'_>> {
        (0u32..).zip(self.raw_nodes()).filter(|(_, raw)| Kind::of_mode(raw.mode.get()) == Some(Kind::Regular)).map(
            |(node, raw)| File {
                node,
                parent: raw.parent.get(),
                name: self.name_at(raw.name.get()),
                offset: raw.offset.get(),
                size: raw.size.get(),
                mode: raw.mode.get(),
            },
        )
    }
}

impl std::fmt::Debug for Toc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Toc").field("layer", &self.layer).field("nodes", &self.len()).finish_non_exhaustive()
    }
}
