//! The flat TOC of one layer: every file's attributes, found by name or number without a heap object per file.
//!
//! A zTOC lists a tar's members in archive order; a filesystem needs a tree. [`build`] turns the one into the
//! other once, applying what unpacking the tar would (names cleaned, parents implied, duplicates, hard links, whiteouts),
//! refuses whatever it cannot represent, and writes a file that is used as it lies on disk from then on:
//!
//! ```text
//! header   magic version layer counts flags crc(body) crc(header)
//! nodes    72 bytes each, breadth first: number 0 is the root, a directory's children are neighbours
//! dirents  8 bytes each: name, node; a directory's are contiguous and sorted bytewise
//! names    length byte + bytes            links    symlink targets            xattrs   blocks of name and value
//! ```
//!
//! Invariants: the file is a pure function of the zTOC, so node numbers survive a rebuild; a file that opens has the checksum
//! it was written with; every accessor is total, also on a file whose checksum is right and whose content is not.
//!
//! Absent on purpose: anything that depends on other layers. Attributes of directories that the layer only implies
//! ([`Toc::implied_dirs`]) are chosen per snapshot, by whoever knows the layers below.

#![forbid(unsafe_code)]

mod build;
mod format;
mod open;
#[cfg(test)]
mod tests;

pub use build::{BuildError, Entry, EntryKind, build, build_entries, clean, is_served};
pub use open::{File, OpenError, Toc};

/// Number of the root directory.
pub const ROOT: u32 = 0;

/// What a node is. Whiteouts are character devices 0/0, as overlayfs wants them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Regular,
    Directory,
    Symlink,
    Char,
    Block,
    Fifo,
}

impl Kind {
    /// The type bits of `st_mode`.
    pub const fn mode_bits(self) -> u32 {
        match self {
            Kind::Fifo => 0o010000,
            Kind::Char => 0o020000,
            Kind::Directory => 0o040000,
            Kind::Block => 0o060000,
            Kind::Regular => 0o100000,
            Kind::Symlink => 0o120000,
        }
    }

    const fn of_mode(mode: u32) -> Option<Kind> {
        Some(match mode & 0o170000 {
            0o010000 => Kind::Fifo,
            0o020000 => Kind::Char,
            0o040000 => Kind::Directory,
            0o060000 => Kind::Block,
            0o100000 => Kind::Regular,
            0o120000 => Kind::Symlink,
            _ => return None,
        })
    }
}

/// One file's attributes, copied out of the flat file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    pub index: u32,
    pub kind: Kind,
    /// `st_mode`, type bits included.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Length of a regular file or a symlink's target; 0 otherwise.
    pub size: u64,
    /// Seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    pub nlink: u32,
    /// `st_rdev` in the kernel's 32-bit encoding; 0 unless a device.
    pub rdev: u32,
    /// Where the content starts in the uncompressed layer; meaningful for regular files only.
    pub offset: u64,
    /// How many bytes before `offset` the member's tar header (with its PAX and GNU helpers) starts.
    pub header_len: u32,
    /// The directory that lists it; the root's is the root.
    pub parent: u32,
    /// The layer doesn't list this directory: it exists because of what is inside.
    pub implied: bool,
    /// The directory hides what lower layers have at its place.
    pub opaque: bool,
    /// Made by a `.wh.` member.
    pub whiteout: bool,
    /// The name under which the tar has this file was replaced by a later member; only a hard link is left.
    pub renamed: bool,
    pub has_xattrs: bool,
}

impl Node {
    pub fn is_dir(&self) -> bool {
        self.kind == Kind::Directory
    }

    /// The member's header region in the uncompressed layer.
    pub fn header(&self) -> std::ops::Range<u64> {
        self.offset.saturating_sub(self.header_len.into())..self.offset
    }
}
