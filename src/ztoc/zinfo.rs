//! The `checkpoints` vector of a zTOC: packed checkpoints for gzip, a FlatBuffer of three numbers for a plain tar.

use super::flatbuf::{Builder, OutOfBounds, Table, TooLarge};
use crate::inflate::WINDOW;
use std::ops::Range;

/// Number of checkpoints (i32) and span size (i64).
const HEADER: usize = 12;

/// Compressed offset (i64), uncompressed offset (i64), bits (u8), window; without padding.
const CHECKPOINT: usize = 8 + 8 + 1 + WINDOW;

/// What version 1 assumes of the checkpoint it does not store: a gzip header without optional fields.
const BARE_HEADER: u64 = 10;

/// Written in a tar zinfo; readers ignore it.
const TAR_VERSION: u32 = 2;

/// Why a zinfo is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ZinfoError {
    /// No bytes at all.
    #[error("empty checkpoints")]
    Empty,
    /// The length is neither that of version 1 nor of version 2.
    #[error("checkpoints of {0} bytes cannot be a gzip zinfo")]
    Length(usize),
    /// A number below zero, or bits above 7.
    #[error("checkpoint {0} is malformed")]
    Checkpoint(usize),
    /// A span size that is not positive, or a size below zero.
    #[error("malformed sizes in zinfo")]
    Size,
    /// A tar zinfo that points outside of itself.
    #[error("cannot unmarshal tar zinfo")]
    Bounds,
}

impl From<OutOfBounds> for ZinfoError {
    fn from(OutOfBounds: OutOfBounds) -> ZinfoError {
        ZinfoError::Bounds
    }
}

/// A checkpoint as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Compressed offset of the first whole byte after it.
    pub input: u64,
    /// Uncompressed offset.
    pub output: u64,
    /// Bits of the byte before `input` that belong to what follows.
    pub bits: u8,
    /// Where in the blob its window is; empty for the one that version 1 leaves out.
    pub window: Range<usize>,
}

/// A gzip zinfo in the making, version 2.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    count: usize,
}

impl Writer {
    pub fn new(span_size: u64) -> Writer {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&span_size.to_le_bytes());
        Writer { bytes, count: 0 }
    }

    /// `window`: the output before the checkpoint, at most 32 KiB, padded here with zeros in front.
    pub fn push(&mut self, input: u64, output: u64, bits: u8, window: [&[u8]; 2]) {
        self.bytes.extend_from_slice(&input.to_le_bytes());
        self.bytes.extend_from_slice(&output.to_le_bytes());
        self.bytes.push(bits);
        let pad = WINDOW - window[0].len() - window[1].len();
        self.bytes.resize(self.bytes.len() + pad, 0);
        self.bytes.extend_from_slice(window[0]);
        self.bytes.extend_from_slice(window[1]);
        self.count += 1;
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.bytes[..4].copy_from_slice(&(self.count as u32).to_le_bytes()); // 2^31 bytes hold 65,500 of them
        self.bytes
    }
}

/// The zinfo of an uncompressed layer.
pub fn tar(span_size: u64, size: u64) -> Result<Vec<u8>, TooLarge> {
    let mut builder = Builder::new();
    builder.start_table();
    builder.u32(0, TAR_VERSION);
    builder.i64(1, span_size.cast_signed());
    builder.i64(2, size.cast_signed());
    let root = builder.end_table();
    builder.finish(root)
}

/// Span size and layer size of a tar zinfo; the span size is positive.
pub fn parse_tar(blob: &[u8]) -> Result<(u64, u64), ZinfoError> {
    if blob.is_empty() {
        return Err(ZinfoError::Empty);
    }
    let root = Table::root(blob)?;
    let span_size = u64::try_from(root.i64(1)?).map_err(|_| ZinfoError::Size)?;
    let size = u64::try_from(root.i64(2)?).map_err(|_| ZinfoError::Size)?;
    if span_size == 0 { Err(ZinfoError::Size) } else { Ok((span_size, size)) }
}

/// Span size and checkpoints (at least one) of a gzip zinfo; the versions differ in length only.
pub fn parse_gzip(blob: &[u8]) -> Result<(u64, Vec<Checkpoint>), ZinfoError> {
    if blob.is_empty() {
        return Err(ZinfoError::Empty);
    }
    let length = ZinfoError::Length(blob.len());
    let Some((head, stored)) = blob.split_at_checked(HEADER) else {
        return Err(length);
    };
    let count = usize::try_from(i32::from_le_bytes([head[0], head[1], head[2], head[3]])).map_err(|_| length)?;
    let span_size = number(head, 4).ok_or(ZinfoError::Size)?;
    if count == 0 || !stored.len().is_multiple_of(CHECKPOINT) {
        return Err(length);
    }
    let mut checkpoints = Vec::new();
    match count.checked_sub(stored.len() / CHECKPOINT) {
        Some(0) => {}
        Some(1) => checkpoints.push(Checkpoint { input: BARE_HEADER, output: 0, bits: 0, window: 0..0 }),
        _ => return Err(length),
    }
    for (index, record) in stored.chunks_exact(CHECKPOINT).enumerate() {
        let malformed = ZinfoError::Checkpoint(checkpoints.len());
        let start = HEADER + index * CHECKPOINT + 17;
        checkpoints.push(Checkpoint {
            input: number(record, 0).ok_or(malformed)?,
            output: number(record, 8).ok_or(malformed)?,
            bits: if record[16] <= 7 { record[16] } else { return Err(malformed) },
            window: start..start + WINDOW,
        });
    }
    Ok((span_size, checkpoints))
}

/// A number that must not be negative.
fn number(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?.try_into().ok()?;
    u64::try_from(i64::from_le_bytes(bytes)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(count: i32, records: usize) -> Vec<u8> {
        let mut bytes = count.to_le_bytes().to_vec();
        bytes.extend_from_slice(&512u64.to_le_bytes());
        bytes.resize(HEADER + records * CHECKPOINT, 0);
        bytes
    }

    #[test]
    fn versions_are_told_apart_by_length_alone() {
        assert_eq!(parse_gzip(&blob(2, 2)).unwrap().1.len(), 2);
        let (span_size, v1) = parse_gzip(&blob(2, 1)).unwrap();
        assert_eq!((span_size, v1.len()), (512, 2));
        assert_eq!(v1[0], Checkpoint { input: 10, output: 0, bits: 0, window: 0..0 });
        assert_eq!(parse_gzip(&blob(1, 0)).unwrap().1.len(), 1);
        for (count, records) in [(0, 0), (-1, 0), (3, 1), (1, 2), (2, 0), (i32::MAX, 2), (131_006, 1), (0, 1)] {
            assert!(parse_gzip(&blob(count, records)).is_err(), "{count} {records}");
        }
        assert!(parse_gzip(&blob(2, 2)[1..]).is_err());
        assert!(parse_gzip(&[]).is_err());
        assert!(parse_gzip(&[1; 11]).is_err());
    }

    #[test]
    fn bits_and_negative_offsets_are_refused() {
        for (at, byte) in [(16, 8), (16, 255), (7, 0x80), (15, 0x80)] {
            let mut bytes = blob(1, 1);
            bytes[HEADER + at] = byte;
            assert_eq!(parse_gzip(&bytes), Err(ZinfoError::Checkpoint(0)));
        }
    }

    #[test]
    fn a_tar_zinfo_has_the_published_bytes() {
        let hex = |text: &str| -> Vec<u8> {
            (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
        };
        let full =
            hex("140000000000000000000a001c0018000c0004000a000000002800000000000000004000000000000000000002000000");
        assert_eq!(tar(4_194_304, 10_240).unwrap(), full);
        let empty = hex("0c00000008001400100004000800000000004000000000000000000002000000");
        assert_eq!(tar(4_194_304, 0).unwrap(), empty);
        assert_eq!(parse_tar(&full), Ok((4_194_304, 10_240)));
        assert_eq!(parse_tar(&empty), Ok((4_194_304, 0)));
        assert_eq!(parse_tar(&tar(0, 0).unwrap()), Err(ZinfoError::Size));
        assert_eq!(parse_tar(&tar(u64::MAX, 0).unwrap()), Err(ZinfoError::Size));
    }
}
