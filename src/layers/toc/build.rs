//! From a list of tar members to the flat file, in one pass and one traversal.
//!
//! What unpacking the tar over an empty directory would leave is what the tree shows. Where unpacking would fail, or would
//! follow a symlink out of the member's own path, the layer is refused: the caller then lets containerd unpack it.

use super::format::{self, Dirent, HEADER_LEN, Header, MAGIC, RawNode, VERSION};
use super::{Kind, ROOT};
use crate::oci::Digest;
pub use crate::tar::Kind as EntryKind;
use crate::ztoc::{FileRef, Ztoc};
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use zerocopy::IntoBytes;

/// Longest name of one file: `NAME_MAX`.
const MAX_NAME: usize = 255;
/// Deepest path: `PATH_MAX` bytes hold no more components. Bounds recursion in whoever walks the tree.
pub(super) const MAX_DEPTH: usize = 2048;
/// Longest symlink target: `PATH_MAX` less its terminator.
const MAX_LINK: usize = 4095;
/// Largest xattr value, and largest list of names: `XATTR_SIZE_MAX`, `XATTR_LIST_MAX`.
const MAX_XATTR: usize = 65536;
/// Most files of one layer: 16 times the largest layer we promise numbers for. Bounds memory on a hostile zTOC.
const MAX_NODES: usize = 16_000_000;
/// Longest header region that is worth verifying: one PAX and two GNU helpers of at most 1 MiB each, and their headers.
const MAX_HEADER: u64 = 4 << 20;

/// One tar member, in archive order. Names are raw: as the tar has them.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    pub name: &'a [u8],
    pub kind: EntryKind,
    /// Of the content, in the uncompressed layer.
    pub offset: u64,
    /// Of the member's header region, which ends at `offset`.
    pub header: u64,
    pub size: u64,
    /// Target of a symlink or hard link.
    pub link: &'a [u8],
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub devmajor: u32,
    pub devminor: u32,
    pub xattrs: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> From<FileRef<'a>> for Entry<'a> {
    fn from(file: FileRef<'a>) -> Entry<'a> {
        Entry {
            name: file.name,
            kind: file.kind,
            offset: file.offset,
            header: file.header,
            size: file.size,
            link: file.link,
            mode: file.mode,
            uid: file.uid,
            gid: file.gid,
            mtime: file.mtime,
            devmajor: file.devmajor,
            devminor: file.devminor,
            xattrs: file.xattrs().collect(),
        }
    }
}

/// Why a layer cannot be served file by file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    #[error("{0}: a name is longer than {MAX_NAME} bytes or contains a NUL")]
    Name(String),
    #[error("{0}: deeper than {MAX_DEPTH} directories")]
    TooDeep(String),
    #[error("{0}: symlink target is empty, longer than {MAX_LINK} bytes or contains a NUL")]
    LinkTarget(String),
    #[error("{0}: lies below something that is not a directory")]
    NotADirectory(String),
    #[error("{path}: hard link to {target}, which the layer doesn't have before it")]
    HardlinkTarget { path: String, target: String },
    #[error("{0}: hard link to a directory")]
    HardlinkToDirectory(String),
    #[error("the root is listed as something else than a directory")]
    Root,
    #[error("{0}: content or header lies outside of the layer")]
    Offsets(String),
    #[error("{0}: device number out of range")]
    Device(String),
    #[error("{0}: extended attributes exceed the kernel's limits")]
    Xattr(String),
    #[error("more than {MAX_NODES} files")]
    TooManyFiles,
    #[error("names, link targets or extended attributes take more than 4 GiB")]
    TooLarge,
}

struct Draft<'a> {
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    offset: u64,
    header_len: u32,
    mtime: (i64, u32),
    rdev: u32,
    link: &'a [u8],
    xattrs: u32,
    xattr_count: u16,
    flags: u16,
    parent: u32,
    name: &'a [u8],
}

impl<'a> Draft<'a> {
    /// An implied directory: attributes until whoever knows the layers below replaces them.
    fn implied(parent: u32, name: &'a [u8]) -> Draft<'a> {
        Draft {
            mode: Kind::Directory.mode_bits() | 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            offset: 0,
            header_len: 0,
            mtime: (0, 0),
            rdev: 0,
            link: &[],
            xattrs: 0,
            xattr_count: 0,
            flags: format::IMPLIED,
            parent,
            name,
        }
    }

    fn is_dir(&self) -> bool {
        self.mode & 0o170000 == Kind::Directory.mode_bits()
    }
}

/// Where a cleaned name leads.
enum Place<'a> {
    Root,
    Child(u32, &'a [u8]),
    /// Below a name that whiteouts reserve: never visible.
    Hidden,
}

struct Builder<'a> {
    drafts: Vec<Draft<'a>>,
    children: HashMap<(u32, &'a [u8]), u32>,
    whiteouts: HashMap<(u32, &'a [u8]), u32>,
    xattrs: Vec<u8>,
    xattr_blocks: HashMap<Vec<u8>, u32>,
    /// Raw name of the last member's directory, and its draft: tars list a directory's files together.
    last_dir: Option<(&'a [u8], u32)>,
    components: Vec<&'a [u8]>,
}

/// Builds the flat TOC of `layer` from its zTOC.
pub fn build(layer: &Digest, ztoc: &Ztoc<'_>) -> Result<Vec<u8>, BuildError> {
    build_entries(layer, ztoc.file_count(), ztoc.files().map(Entry::from))
}

/// Builds the flat TOC of `layer` from the members of its tar, of which there are about `expected`.
pub fn build_entries<'a>(
    layer: &Digest,
    expected: usize,
    entries: impl IntoIterator<Item = Entry<'a>>,
) -> Result<Vec<u8>, BuildError> {
    let expected = expected.min(MAX_NODES);
    let mut builder = Builder {
        drafts: Vec::with_capacity(expected + 1),
        children: HashMap::with_capacity(expected),
        whiteouts: HashMap::new(),
        xattrs: Vec::new(),
        xattr_blocks: HashMap::new(),
        last_dir: None,
        components: Vec::new(),
    };
    builder.drafts.push(Draft::implied(ROOT, &[]));
    for entry in entries {
        builder.add(entry)?;
    }
    builder.finish(layer)
}

/// The components of a tar name, as Go's `path.Clean("/" + name)` would leave them.
pub fn clean<'a>(name: &'a [u8], components: &mut Vec<&'a [u8]>) {
    components.clear();
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop();
            }
            _ => components.push(component),
        }
    }
}

fn display(name: &[u8]) -> String {
    String::from_utf8_lossy(&name[..name.len().min(200)]).into_owned()
}

impl<'a> Builder<'a> {
    fn push(&mut self, draft: Draft<'a>) -> Result<u32, BuildError> {
        if self.drafts.len() > MAX_NODES {
            return Err(BuildError::TooManyFiles);
        }
        let id = u32::try_from(self.drafts.len()).map_err(|_| BuildError::TooManyFiles)?;
        self.drafts.push(draft);
        Ok(id)
    }

    fn is_dir(&self, id: u32) -> bool {
        self.drafts[id as usize].is_dir()
    }

    /// Cleans a raw name into `self.components`, and checks them.
    fn clean(&mut self, name: &'a [u8]) -> Result<(), BuildError> {
        clean(name, &mut self.components);
        if self.components.len() > MAX_DEPTH {
            return Err(BuildError::TooDeep(display(name)));
        }
        match self.components.iter().any(|component| component.len() > MAX_NAME || component.contains(&0)) {
            true => Err(BuildError::Name(display(name))),
            false => Ok(()),
        }
    }

    /// Finds the directory of a raw name, creating what is missing on the way.
    fn locate(&mut self, name: &'a [u8]) -> Result<Place<'a>, BuildError> {
        let trimmed = name.strip_suffix(b"/").unwrap_or(name);
        let (raw_dir, last) = match trimmed.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&trimmed[..slash], &trimmed[slash + 1..]),
            None => (&[][..], trimmed),
        };
        let plain = !matches!(last, b"" | b"." | b"..") && last.len() <= MAX_NAME && !last.contains(&0);
        if plain
            && let Some((dir_name, dir)) = self.last_dir
            && dir_name == raw_dir
        {
            return Ok(Place::Child(dir, last));
        }
        self.clean(name)?;
        let components = std::mem::take(&mut self.components);
        let place = self.descend(name, &components);
        self.components = components;
        if plain && let Ok(Place::Child(dir, _)) = place {
            self.last_dir = Some((raw_dir, dir));
        }
        place
    }

    fn descend(&mut self, name: &[u8], components: &[&'a [u8]]) -> Result<Place<'a>, BuildError> {
        let Some((last, parents)) = components.split_last() else { return Ok(Place::Root) };
        if parents.iter().any(|component| component.starts_with(b".wh.")) {
            return Ok(Place::Hidden);
        }
        let mut dir = ROOT;
        for component in parents {
            dir = match self.children.get(&(dir, *component)) {
                Some(child) if self.is_dir(*child) => *child,
                Some(_) => return Err(BuildError::NotADirectory(display(name))),
                None => {
                    let child = self.push(Draft::implied(dir, component))?;
                    self.children.insert((dir, component), child);
                    child
                }
            };
        }
        Ok(Place::Child(dir, last))
    }

    /// The existing draft a raw name leads to, symlinks not followed.
    fn existing(&mut self, name: &'a [u8]) -> Result<Option<u32>, BuildError> {
        self.clean(name)?;
        let found =
            self.components.iter().try_fold(ROOT, |dir, component| self.children.get(&(dir, *component)).copied());
        Ok(found)
    }

    fn add(&mut self, entry: Entry<'a>) -> Result<(), BuildError> {
        let (dir, name) = match self.locate(entry.name)? {
            Place::Hidden => return Ok(()),
            Place::Child(dir, name) => (dir, name),
            Place::Root if entry.kind == EntryKind::Directory => {
                let draft = self.draft(&entry, Kind::Directory, ROOT, &[])?;
                return self.overwrite_dir(ROOT, draft);
            }
            Place::Root => return Err(BuildError::Root),
        };
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(dir, hidden, &entry);
        }
        let kind = match entry.kind {
            EntryKind::Hardlink => return self.hardlink(dir, name, &entry),
            EntryKind::Regular => Kind::Regular,
            EntryKind::Directory => Kind::Directory,
            EntryKind::Symlink => Kind::Symlink,
            EntryKind::Char => Kind::Char,
            EntryKind::Block => Kind::Block,
            EntryKind::Fifo => Kind::Fifo,
        };
        let draft = self.draft(&entry, kind, dir, name)?;
        if kind == Kind::Directory
            && let Some(existing) = self.children.get(&(dir, name)).copied()
            && self.is_dir(existing)
        {
            return self.overwrite_dir(existing, draft);
        }
        let id = self.push(draft)?;
        self.set_child(dir, name, id);
        Ok(())
    }

    fn set_child(&mut self, dir: u32, name: &'a [u8], id: u32) {
        if let Some(replaced) = self.children.insert((dir, name), id)
            && replaced != id
            && self.is_dir(replaced)
        {
            self.last_dir = None;
        }
    }

    /// A directory listed again keeps its children, and stays opaque if it was.
    fn overwrite_dir(&mut self, id: u32, draft: Draft<'a>) -> Result<(), BuildError> {
        let existing = &mut self.drafts[id as usize];
        let opaque = existing.flags & format::OPAQUE;
        *existing = draft;
        existing.flags |= opaque;
        Ok(())
    }

    fn whiteout(&mut self, dir: u32, hidden: &'a [u8], entry: &Entry<'a>) -> Result<(), BuildError> {
        match hidden {
            b".wh..opq" => self.drafts[dir as usize].flags |= format::OPAQUE,
            // Other names with the double prefix are AUFS's own bookkeeping; the rest cannot be the name of a file.
            b"" | b"." | b".." => {}
            _ if hidden.starts_with(b".wh.") => {}
            _ => {
                let draft = Draft {
                    mode: Kind::Char.mode_bits(),
                    mtime: entry.mtime,
                    flags: format::WHITEOUT,
                    ..Draft::implied(dir, hidden)
                };
                let id = self.push(draft)?;
                self.whiteouts.insert((dir, hidden), id);
            }
        }
        Ok(())
    }

    fn hardlink(&mut self, dir: u32, name: &'a [u8], entry: &Entry<'a>) -> Result<(), BuildError> {
        let target = self
            .existing(entry.link)?
            .ok_or_else(|| BuildError::HardlinkTarget { path: display(entry.name), target: display(entry.link) })?;
        if self.is_dir(target) {
            return Err(BuildError::HardlinkToDirectory(display(entry.name)));
        }
        self.set_child(dir, name, target);
        Ok(())
    }

    fn draft(&mut self, entry: &Entry<'a>, kind: Kind, dir: u32, name: &'a [u8]) -> Result<Draft<'a>, BuildError> {
        let mut draft = Draft {
            mode: kind.mode_bits() | entry.mode & 0o7777,
            uid: entry.uid,
            gid: entry.gid,
            mtime: (entry.mtime.0, entry.mtime.1.min(999_999_999)),
            flags: 0,
            ..Draft::implied(dir, name)
        };
        match kind {
            Kind::Regular => {
                let end = entry.offset.checked_add(entry.size).filter(|end| i64::try_from(*end).is_ok());
                let header_len = entry.offset.checked_sub(entry.header).filter(|len| *len <= MAX_HEADER);
                let (Some(_), Some(header_len)) = (end, header_len) else {
                    return Err(BuildError::Offsets(display(entry.name)));
                };
                draft.size = entry.size;
                draft.offset = entry.offset;
                draft.header_len = u32::try_from(header_len).map_err(|_| BuildError::Offsets(display(entry.name)))?;
            }
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > MAX_LINK || entry.link.contains(&0) {
                    return Err(BuildError::LinkTarget(display(entry.name)));
                }
                draft.size = entry.link.len() as u64;
                draft.link = entry.link;
            }
            Kind::Char | Kind::Block => {
                draft.rdev = device_number(entry.devmajor, entry.devminor)
                    .ok_or_else(|| BuildError::Device(display(entry.name)))?;
            }
            Kind::Directory | Kind::Fifo => {}
        }
        if !entry.xattrs.is_empty() {
            (draft.xattrs, draft.xattr_count) = self.xattr_block(entry)?;
        }
        Ok(draft)
    }

    /// Stores a member's xattrs; equal sets (SELinux labels) are stored once.
    fn xattr_block(&mut self, entry: &Entry<'a>) -> Result<(u32, u16), BuildError> {
        let error = || BuildError::Xattr(display(entry.name));
        let mut xattrs: Vec<_> = entry.xattrs.iter().filter(|(name, _)| is_served(name)).collect();
        xattrs.sort_by_key(|(name, _)| *name);
        xattrs.dedup_by_key(|(name, _)| *name);
        let mut block = Vec::new();
        let mut list_len = 0;
        for (name, value) in &xattrs {
            list_len += name.len() + 1;
            if name.is_empty() || name.contains(&0) || value.len() > MAX_XATTR || list_len > MAX_XATTR {
                return Err(error());
            }
            block.push(u8::try_from(name.len()).map_err(|_| error())?);
            block.extend_from_slice(&u32::try_from(value.len()).map_err(|_| error())?.to_le_bytes());
            block.extend_from_slice(name);
            block.extend_from_slice(value);
        }
        let count = u16::try_from(xattrs.len()).map_err(|_| error())?;
        if count == 0 {
            return Ok((0, 0));
        }
        let place = match self.xattr_blocks.entry(block) {
            Slot::Occupied(known) => *known.get(),
            Slot::Vacant(new) => {
                let place = u32::try_from(self.xattrs.len()).map_err(|_| BuildError::TooLarge)?;
                self.xattrs.extend_from_slice(new.key());
                *new.insert(place)
            }
        };
        Ok((place, count))
    }

    fn finish(mut self, layer: &Digest) -> Result<Vec<u8>, BuildError> {
        for (place, id) in std::mem::take(&mut self.whiteouts) {
            self.children.entry(place).or_insert(id);
        }
        let edges = sorted_edges(&self.drafts, std::mem::take(&mut self.children));
        let mut flat = Flat::default();
        // Draft ids by node number, and node numbers by draft id.
        let mut order = vec![ROOT];
        let mut numbers = vec![u32::MAX; self.drafts.len()];
        let mut records: Vec<RawNode> = Vec::with_capacity(self.drafts.len());
        numbers[ROOT as usize] = ROOT;
        records.push(self.record(ROOT));
        let mut at = 0;
        while let Some(&dir) = order.get(at) {
            if self.is_dir(dir) {
                let number = at;
                let children = edges.of(dir);
                records[number].a = length(flat.dirents.len() / size_of::<Dirent>())?.into();
                records[number].b = length(children.len())?.into();
                for &(name, child) in children {
                    let place = flat.name(name)?;
                    let draft = &self.drafts[child as usize];
                    let at_home = draft.parent == dir && draft.name == name;
                    if numbers[child as usize] == u32::MAX {
                        numbers[child as usize] = length(order.len())?;
                        order.push(child);
                        let mut record = self.record(child);
                        record.parent = length(number)?.into();
                        record.name = place.into();
                        if !at_home {
                            record.flags = (record.flags.get() | format::RENAMED).into();
                        }
                        if !draft.link.is_empty() {
                            record.a = length(flat.links.len())?.into();
                            record.b = length(draft.link.len())?.into();
                            flat.links.extend_from_slice(draft.link);
                        }
                        records.push(record);
                    }
                    let record = &mut records[numbers[child as usize] as usize];
                    if draft.is_dir() {
                        let parent = &mut records[number];
                        parent.nlink += 1;
                    } else {
                        record.nlink += 1;
                        if at_home {
                            record.parent = length(number)?.into();
                            record.name = place.into();
                            record.flags = (record.flags.get() & !format::RENAMED).into();
                        }
                    }
                    flat.dirents.extend_from_slice(
                        Dirent { name: place.into(), node: numbers[child as usize].into() }.as_bytes(),
                    );
                }
            }
            at += 1;
        }
        flat.assemble(layer, &records, &self.xattrs)
    }

    /// The record of a draft, before its place, name and links are known.
    fn record(&self, id: u32) -> RawNode {
        let draft = &self.drafts[id as usize];
        RawNode {
            size: draft.size.into(),
            offset: draft.offset.into(),
            mtime: draft.mtime.0.into(),
            mtime_nanos: draft.mtime.1.into(),
            mode: draft.mode.into(),
            uid: draft.uid.into(),
            gid: draft.gid.into(),
            nlink: if draft.is_dir() { 2 } else { 0 }.into(),
            a: draft.rdev.into(),
            b: 0.into(),
            header_len: draft.header_len.into(),
            parent: 0.into(),
            name: 0.into(),
            xattrs: draft.xattrs.into(),
            xattr_count: draft.xattr_count.into(),
            flags: draft.flags.into(),
        }
    }
}

/// Whether unpacking would set this xattr: containerd never sets `trusted.*`, where overlayfs keeps its own state.
pub fn is_served(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.")
}

/// The kernel's 32-bit encoding: 12 bits of major, 20 of minor.
fn device_number(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20).then_some(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

fn length(len: usize) -> Result<u32, BuildError> {
    u32::try_from(len).map_err(|_| BuildError::TooLarge)
}

/// All (directory, name, child), grouped by directory and sorted by name.
struct Edges<'a> {
    all: Vec<(&'a [u8], u32)>,
    starts: Vec<usize>,
}

impl<'a> Edges<'a> {
    fn of(&self, dir: u32) -> &[(&'a [u8], u32)] {
        &self.all[self.starts[dir as usize]..self.starts[dir as usize + 1]]
    }
}

fn sorted_edges<'a>(drafts: &[Draft<'a>], children: HashMap<(u32, &'a [u8]), u32>) -> Edges<'a> {
    // Counting sort by directory: `starts[dir]` first counts, then points.
    let mut starts = vec![0usize; drafts.len() + 1];
    for (dir, _) in children.keys() {
        starts[*dir as usize + 1] += 1;
    }
    for dir in 1..starts.len() {
        starts[dir] += starts[dir - 1];
    }
    let mut next = starts.clone();
    let mut all = vec![(&[][..], ROOT); children.len()];
    for ((dir, name), child) in children {
        let place = &mut next[dir as usize];
        all[*place] = (name, child);
        *place += 1;
    }
    for dir in 0..drafts.len() {
        all[starts[dir]..starts[dir + 1]].sort_unstable_by_key(|(name, _)| *name);
    }
    Edges { all, starts }
}

/// The variable sections of the file, as they grow.
#[derive(Default)]
struct Flat {
    dirents: Vec<u8>,
    names: Vec<u8>,
    links: Vec<u8>,
}

impl Flat {
    fn name(&mut self, name: &[u8]) -> Result<u32, BuildError> {
        let place = length(self.names.len())?;
        self.names.push(u8::try_from(name.len()).map_err(|_| BuildError::Name(display(name)))?);
        self.names.extend_from_slice(name);
        Ok(place)
    }

    fn assemble(self, layer: &Digest, nodes: &[RawNode], xattrs: &[u8]) -> Result<Vec<u8>, BuildError> {
        let mut flags = 0;
        for node in nodes {
            if node.xattr_count.get() != 0 {
                flags |= format::HAS_XATTRS;
            }
            if node.flags.get() & format::OPAQUE != 0 {
                flags |= format::HAS_OPAQUE;
            }
        }
        let mut header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            flags: flags.into(),
            layer: *layer.as_bytes(),
            nodes: length(nodes.len())?.into(),
            dirents: length(self.dirents.len() / size_of::<Dirent>())?.into(),
            names_len: length(self.names.len())?.into(),
            links_len: length(self.links.len())?.into(),
            xattrs_len: length(xattrs.len())?.into(),
            body_crc: 0.into(),
            header_crc: 0.into(),
        };
        let nodes = nodes.as_bytes();
        let sections = [nodes, &self.dirents, &self.names, &self.links, xattrs];
        let mut crc = crc32fast::Hasher::new();
        sections.iter().for_each(|section| crc.update(section));
        header.body_crc = crc.finalize().into();
        header.header_crc = crc32fast::hash(&header.as_bytes()[..HEADER_LEN - 4]).into();
        let mut out = Vec::with_capacity(HEADER_LEN + sections.iter().map(|section| section.len()).sum::<usize>());
        out.extend_from_slice(header.as_bytes());
        sections.iter().for_each(|section| out.extend_from_slice(section));
        Ok(out)
    }
}
