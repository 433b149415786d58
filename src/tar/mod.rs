//! Reads tar headers the way Go's `archive/tar` does, because a zTOC must list what that reader lists.
//!
//! [`Reader`] is pushed bytes as they arrive and hands out one [`Entry`] per *logical* member: PAX `x` and GNU `L`/`K`
//! helpers are folded into the member they describe. [`parse_entry`] reads one member back from its header region.
//!
//! Two differences from Go's SOCI tools, both so that legal archives can be indexed: PAX global headers (`g`) are
//! skipped (their records apply to nothing: containerd ignores them too), and contiguous files (`7`) are regular files.
//!
//! Every length is bounded: a helper member holds at most 1 MiB, everything else is a 512-byte block.
//!
//! Absent on purpose: contents. The reader skips them, and never sanitises a name.
#![forbid(unsafe_code)]

mod header;
mod pax;
mod reader;

pub use pax::{Records, XATTR_PREFIX, is_sparse};
pub use reader::Reader;

/// The unit of everything in a tar: headers take one block, contents are padded to whole ones.
pub const BLOCK: u64 = 512;

/// Go's limit for the data of one helper member (`x`, `g`, `L`, `K`); larger is an error there and here.
pub const MAX_HELPER: u64 = 1 << 20;

/// What a member is. Named as zTOCs name them by [`Kind::as_str`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Has content.
    Regular,
    /// May be listed more than once.
    Directory,
    /// Its target is `link`.
    Symlink,
    /// Another name, `link`, of the same archive.
    Hardlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 7] =
        [Kind::Regular, Kind::Directory, Kind::Symlink, Kind::Hardlink, Kind::Char, Kind::Block, Kind::Fifo];

    /// The `type` of a zTOC entry.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Regular => "reg",
            Kind::Directory => "dir",
            Kind::Symlink => "symlink",
            Kind::Hardlink => "hardlink",
            Kind::Char => "char",
            Kind::Block => "block",
            Kind::Fifo => "fifo",
        }
    }

    /// The inverse of [`Kind::as_str`].
    pub fn from_name(name: &[u8]) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.as_str().as_bytes() == name)
    }

    /// Whether a data section follows the header. Other kinds have none, whatever their `size` says.
    pub const fn has_content(self) -> bool {
        matches!(self, Kind::Regular)
    }
}

/// One logical member, values as the headers gave them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Raw bytes, not normalised; directories usually end in `/`.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Target of a symlink or hard link; usually empty otherwise.
    pub link: Vec<u8>,
    /// Size of the content; for kinds without content whatever the header says.
    pub size: u64,
    /// Unmasked: may hold file type bits.
    pub mode: i64,
    /// Owner. zTOCs keep the low 32 bits.
    pub uid: i64,
    /// Group. zTOCs keep the low 32 bits.
    pub gid: i64,
    /// Name of the owner.
    pub uname: Vec<u8>,
    /// Name of the group.
    pub gname: Vec<u8>,
    /// Seconds since 1970 (rounded down) and the nanoseconds after them.
    pub mtime: (i64, u32),
    /// Major device number.
    pub devmajor: i64,
    /// Minor device number.
    pub devminor: i64,
    /// All PAX records of the member, not only extended attributes.
    pub records: Records,
    /// Where its content starts: the offset just after its headers, counted from where the reader started.
    pub offset: u64,
}

impl Entry {
    /// Extended attributes: name without prefix, value.
    pub fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.records.iter().filter_map(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?, value.as_slice())))
    }
}

/// Why bytes are not a tar we can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// A header that Go's reader refuses too.
    #[error("invalid tar header at offset {offset}: {problem}")]
    Header {
        /// Where the block starts.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The archive ends inside a header or a member's data.
    #[error("the tar ends inside {0}")]
    Truncated(&'static str),
    /// Sparse members: the sizes in a zTOC cannot describe them.
    #[error("unsupported sparse tar entry at offset {offset}")]
    Sparse {
        /// Where its header starts.
        offset: u64,
    },
    /// A type flag nobody can unpack.
    #[error("unsupported input tar entry {:?} at offset {offset}", char::from(*.flag))]
    Unsupported {
        /// Where its header starts.
        offset: u64,
        /// The flag.
        flag: u8,
    },
    /// [`parse_entry`]: the region holds no member, or more than the headers of one.
    #[error("{0} bytes are not the headers of exactly one tar entry")]
    Region(usize),
}

/// Reads the member whose headers, helpers included, are exactly `region`.
pub fn parse_entry(region: &[u8]) -> Result<Entry, TarError> {
    let mut reader = Reader::new();
    let mut rest = region;
    match reader.next(&mut rest)? {
        Some(entry) if rest.is_empty() => Ok(entry),
        _ => Err(TarError::Region(region.len())),
    }
}
