//! The one inflate core: everything that decompresses a layer, from its start or from a checkpoint, goes through here.
//!
//! [`SpanInflater`] resumes at a checkpoint: some bits of a shared first byte, a window of the 32 KiB before, then
//! DEFLATE data that may run through the ends and headers of gzip members; [`inflate_span`] is the same for a span that is in
//! memory. [`LayerDecoder`] takes a whole layer from its first byte, gzip, zstd or neither, or from an [`Entry`] in its middle. [`Raw`] is the engine below them, which can
//! stop at block boundaries; [`gzip`] knows the wrapper around it.
//!
//! All input is hostile: too little is an error, never zeros; a wrong window gives an error or wrong bytes, never
//! undefined behaviour. A window is needed only as far back as data exists: a reference beyond it is an error.
//!
//! Absent on purpose: digests. Whoever fetched the bytes has verified them.
#![deny(unsafe_code)] // `raw` is the seam to zlib's C interface, the only place that may

mod entry;
pub mod gzip;
mod raw;
mod span;
mod stream;

pub use entry::{Entry, Marker, Place};
pub use raw::{Progress, Raw, State, Stop};
pub use span::{Moved, SpanInflater};
pub use stream::{LayerDecoder, StreamError};

/// How far back DEFLATE can refer, and so the size of a checkpoint's window.
pub const WINDOW: usize = 32768;

/// The most bytes one byte of DEFLATE can become: two bits for a match of 258 bytes.
pub const MAX_RATIO: u64 = 1032;

/// Bytes inflated at a time only to be skipped.
const SCRATCH: usize = 64 << 10;

/// Why a span does not give the bytes asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InflateError {
    /// Not DEFLATE, or not resumed with the right bits or window.
    #[error("invalid DEFLATE data")]
    Data,
    /// The header of a gzip member inside the span is broken.
    #[error("invalid gzip member inside a span")]
    Member(#[source] gzip::HeaderError),
    /// The compressed bytes end before all wanted bytes were produced.
    #[error("the compressed bytes end {missing} bytes early")]
    Short {
        /// How many uncompressed bytes are missing, skipped ones included.
        missing: u64,
    },
    /// More than 7 bits, or a window over 32 KiB.
    #[error("not a checkpoint")]
    Checkpoint,
}

/// Inflates part of one span, or of several consecutive ones, from the checkpoint of the first.
///
/// `compressed` are the bytes `[start_comp, end_comp)` of the layer, the first of them shared with the span before when
/// `bits != 0`. `window` is what the checkpoint stores, or as much of its end as there is data before the checkpoint: what
/// refers back further is refused. Fills `out` with the uncompressed bytes `[skip, skip + out.len())` counted from the checkpoint.
pub fn inflate_span(bits: u8, window: &[u8], compressed: &[u8], skip: u64, out: &mut [u8]) -> Result<(), InflateError> {
    let mut inflater = SpanInflater::new(bits, window)?;
    let mut input = compressed;
    let mut scratch = vec![0; usize::try_from(skip).map_or(SCRATCH, |skip| skip.min(SCRATCH))];
    let (mut skip, mut filled) = (skip, 0);
    while filled < out.len() {
        let target = if skip > 0 {
            let room = usize::try_from(skip).map_or(SCRATCH, |skip| skip.min(SCRATCH));
            &mut scratch[..room]
        } else {
            &mut out[filled..]
        };
        let moved = inflater.inflate(input, target)?;
        input = &input[moved.read..];
        if skip > 0 {
            skip -= moved.written as u64;
        } else {
            filled += moved.written;
        }
        if moved.written == 0 {
            return Err(InflateError::Short { missing: skip + (out.len() - filled) as u64 });
        }
    }
    Ok(())
}

/// What the first bytes of a layer say it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sniffed {
    /// Starts like a gzip member.
    Gzip,
    /// Starts like a zstd frame, skippable or not.
    Zstd,
    /// Starts with a tar header, or with the zeros of an empty archive.
    Tar,
    /// Anything else; bytes that are too few to tell included.
    Unknown,
}

/// Looks at the first bytes of a layer; 512 are enough.
pub fn sniff(start: &[u8]) -> Sniffed {
    match start {
        [0x1f, 0x8b, 8, ..] => Sniffed::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Sniffed::Zstd,
        _ if start.get(257..262) == Some(b"ustar") => Sniffed::Tar,
        _ if start.len() >= 512 && start[..512].iter().all(|&c| c == 0) => Sniffed::Tar,
        _ => Sniffed::Unknown,
    }
}
