//! zTOCs: where each file of a layer is, and where inflating can start.
//!
//! A layer is cut into *spans*. A gzip span starts at a *checkpoint*: a bit position between two DEFLATE blocks, and the
//! 32 KiB of output before it. With both, [`crate::inflate::inflate_span`] produces the span from its own bytes alone.
//!
//! [`build`] makes a zTOC from a layer in one pass, byte for byte what the Go SOCI tools make of it (times in UTC).
//! [`Ztoc::parse`] reads one as hostile input: whatever [`Ztoc`], [`SpanTable`] and [`FileRef`] say afterwards holds:
//!
//! * spans are in order and follow each other; their compressed ranges lie within the layer and overlap by at most the one
//!   byte whose bits two spans share; no span claims more output than DEFLATE could make of its bytes; span 0 starts at 0;
//! * every span has a digest; windows lie within the zTOC's bytes;
//! * files are in order of their contents, none overlaps another's content or headers, all lie within the archive, and at
//!   least one header block is in front of each;
//! * names, link targets and user names hold no NUL; sizes of repeated strings are bounded by the size of the zTOC.
//!
//! Absent on purpose: the meaning of names (cleaning, `..`, whiteouts, hard links), which belongs to the file tree.
#![forbid(unsafe_code)]

mod build;
mod flatbuf;
mod listing;
mod parse;
mod scan;
mod spans;
mod time;
mod write;
mod zinfo;

pub use crate::tar::Kind;
pub use build::{BuildError, BuildOptions, Built, DiffId, NotIndexable, build};
pub use parse::{FileRef, Limits, Ztoc, ZtocError};
pub use spans::{Span, SpanError, SpanTable};
pub use zinfo::ZinfoError;

/// What spans are made of. Zstd has no checkpoints and so no zTOC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// One or more gzip members.
    Gzip,
    /// A plain tar.
    Uncompressed,
}

impl Compression {
    /// The name used in command output.
    pub const fn as_str(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Uncompressed => "uncompressed",
        }
    }
}

/// The only version there is.
pub const VERSION: &str = "0.9";

/// Span size of the Go tools unless told otherwise.
pub const DEFAULT_SPAN_SIZE: u64 = 1 << 22;

/// Name of the marker that makes a directory opaque. A layer holding one needs its xattr handling even without xattrs.
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// FlatBuffers offsets are signed 32-bit numbers, so no zTOC is larger.
const MAX_BYTES: usize = i32::MAX as usize;
