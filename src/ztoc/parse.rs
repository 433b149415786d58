//! Reading zTOCs: everything is checked by [`Ztoc::parse`], nothing is copied but the span table.

use super::{
    Compression, Kind, SpanTable,
    flatbuf::{OutOfBounds, Table, Vector},
    spans::SpanError,
    time,
};
use crate::{
    oci::Digest,
    tar::{self, BLOCK, XATTR_PREFIX},
};
use std::{borrow::Cow, ops::Range};

/// How large a zTOC may be. Nothing in the format limits it below 2 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of the zTOC itself.
    pub bytes: usize,
    /// Entries, directories and links included.
    pub files: usize,
    /// Spans: gzip cannot have more than 65,500, so this is for plain tars cut very finely.
    pub spans: usize,
    /// One span, compressed or not, as it has to be in memory to be verified and inflated. Deflaters end a block after a
    /// few MiB of output, so a span is larger than the span size by that much at most.
    pub span: u64,
    /// Headers of one entry, helper members included: what is inflated to verify a file. Go's reader takes 1 MiB of
    /// each of three kinds of helper, global headers may repeat.
    pub header: u64,
    /// Name, link target, user name, xattr: none of them can be over 1 MiB in a tar that Go's reader accepts.
    pub text: usize,
}

impl Default for Limits {
    /// Ten times what the largest known images need, and more.
    fn default() -> Limits {
        Limits {
            bytes: 1 << 30,
            files: 1 << 24,
            spans: 1 << 20,
            span: 256 << 20,
            header: 8 << 20,
            text: tar::MAX_HELPER as usize,
        }
    }
}

/// Strings may be shared by many entries, so walking them all could take far longer than the zTOC is large. No more than
/// this many times its size: enough for any writer that shares owners and labels, far from quadratic.
const MAX_SHARING: usize = 16;

/// Why bytes are not a zTOC we can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZtocError {
    /// One of [`Limits`].
    #[error("zTOC over the limit: {0}")]
    Limit(&'static str),
    /// Not a FlatBuffer, or one that points outside of itself.
    #[error("cannot unmarshal ztoc: offsets out of bounds")]
    Bounds,
    /// A table without which nothing works.
    #[error("cannot unmarshal ztoc: missing {0}")]
    Missing(&'static str),
    /// Only gzip (1) and plain tar (2) exist.
    #[error("unexpected compression algorithm: {0}")]
    Algorithm(i8),
    /// A size below zero.
    #[error("negative archive size")]
    Size,
    /// `max_span_id + 1` must be the number of digests.
    #[error("max span ID {max_span_id} with {digests} span digests")]
    MaxSpanId {
        /// As given.
        max_span_id: i32,
        /// How many there are.
        digests: usize,
    },
    /// Not `sha256:` and 64 hex digits.
    #[error("the digest of span {0} is malformed")]
    Digest(usize),
    /// See there.
    #[error("invalid spans")]
    Spans(#[source] SpanError),
    /// An entry that contradicts itself or its neighbours.
    #[error("invalid toc entry {index}: {problem}")]
    Entry {
        /// In the order of the zTOC.
        index: usize,
        /// What is wrong.
        problem: &'static str,
    },
}

impl From<OutOfBounds> for ZtocError {
    fn from(OutOfBounds: OutOfBounds) -> ZtocError {
        ZtocError::Bounds
    }
}

/// A zTOC that has been checked (see the invariants in [`crate::ztoc`]).
#[derive(Debug, Clone)]
pub struct Ztoc<'a> {
    root: Table<'a>,
    spans: SpanTable,
    files: Vector<'a>,
    /// Indexes of `files` by content offset; `None` when they are in that order, as all known builders write them.
    order: Option<Vec<u32>>,
}

/// One entry. Borrows everything from the zTOC's bytes.
#[derive(Debug, Clone, Copy)]
pub struct FileRef<'a> {
    /// Raw, as in the tar: not cleaned, not necessarily UTF-8; without NUL.
    pub name: &'a [u8],
    /// What it is.
    pub kind: Kind,
    /// Where its content starts in the uncompressed tar, and its headers end.
    pub offset: u64,
    /// Where its headers start, helper members included.
    pub header: u64,
    /// Size of the content of a regular file; of other kinds what their header said, which means nothing.
    pub size: u64,
    /// Target of a link.
    pub link: &'a [u8],
    /// Low 32 bits of the header's mode, file type bits included if somebody put them there.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Name of the owner.
    pub uname: &'a [u8],
    /// Name of the group.
    pub gname: &'a [u8],
    /// Seconds since 1970 (rounded down) and nanoseconds. The year 1 if the zTOC holds no time.
    pub mtime: (i64, u32),
    /// Low 32 bits.
    pub devmajor: u32,
    /// Low 32 bits.
    pub devminor: u32,
    records: Vector<'a>,
}

impl<'a> FileRef<'a> {
    /// All PAX records: key, value. Values may hold NUL.
    pub fn pax_records(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let records = self.records;
        (0..records.len()).filter_map(move |index| record(&records, index).ok())
    }

    /// Extended attributes: name without prefix, value.
    pub fn xattrs(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        self.pax_records().filter_map(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?, value)))
    }

    /// The bytes of its content in the uncompressed tar; empty for anything but regular files.
    pub fn content(&self) -> Range<u64> {
        let size = if self.kind.has_content() { self.size } else { 0 };
        self.offset..self.offset + size
    }
}

fn record<'a>(records: &Vector<'a>, index: usize) -> Result<(&'a [u8], &'a [u8]), OutOfBounds> {
    let table = records.table(index)?;
    Ok((table.bytes(0)?, table.bytes(1)?))
}

impl<'a> Ztoc<'a> {
    /// Reads a zTOC, checking all of it.
    pub fn parse(bytes: &'a [u8], limits: &Limits) -> Result<Ztoc<'a>, ZtocError> {
        if bytes.len() > limits.bytes.min(super::MAX_BYTES) {
            return Err(ZtocError::Limit("bytes"));
        }
        let root = Table::root(bytes)?;
        root.bytes(0)?;
        root.bytes(1)?;
        let size = |slot| u64::try_from(root.i64(slot)?).map_err(|_| ZtocError::Size);
        let (compressed_size, uncompressed_size) = (size(2)?, size(3)?);
        let toc = root.table(4)?.ok_or(ZtocError::Missing("toc"))?;
        let info = root.table(5)?.ok_or(ZtocError::Missing("compression_info"))?;

        let compression = match info.scalar(0)?.map_or(1, i8::from_le_bytes) {
            1 => Compression::Gzip,
            2 => Compression::Uncompressed,
            other => return Err(ZtocError::Algorithm(other)),
        };
        let max_span_id = info.i32(1)?;
        let digest_strings = info.vector(2)?;
        if i64::from(max_span_id) + 1 != digest_strings.len() as i64 {
            return Err(ZtocError::MaxSpanId { max_span_id, digests: digest_strings.len() });
        }
        if digest_strings.len() > limits.spans {
            return Err(ZtocError::Limit("spans"));
        }
        let mut digests = Vec::with_capacity(digest_strings.len());
        for index in 0..digest_strings.len() {
            let digest = std::str::from_utf8(digest_strings.string(index)?).ok().and_then(|text| text.parse().ok());
            digests.push(digest.ok_or(ZtocError::Digest(index))?);
        }
        let digests: Vec<Digest> = digests;
        let blob = info.place(3)?.ok_or(ZtocError::Missing("checkpoints"))?;
        let sizes = (compressed_size, uncompressed_size);
        let spans = SpanTable::parse(compression, bytes, blob, &digests, sizes).map_err(ZtocError::Spans)?;
        let len = |range: &Range<u64>| range.end - range.start;
        if spans.spans.iter().any(|span| len(&span.compressed).max(len(&span.uncompressed)) > limits.span) {
            return Err(ZtocError::Limit("size of a span"));
        }

        let files = toc.vector(0)?;
        if files.len() > limits.files {
            return Err(ZtocError::Limit("files"));
        }
        let mut ztoc = Ztoc { root, spans, files, order: None };
        ztoc.order = ztoc.content_order()?;
        ztoc.check_files(limits, bytes.len().saturating_mul(MAX_SHARING))?;
        Ok(ztoc)
    }

    /// Always `0.9` so far; any is accepted.
    pub fn version(&self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.root.bytes(0).unwrap_or_default())
    }

    /// Who built it.
    pub fn build_tool(&self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.root.bytes(1).unwrap_or_default())
    }

    /// Its spans.
    pub fn spans(&self) -> &SpanTable {
        &self.spans
    }

    /// Its spans, kept; the entries are let go.
    pub fn into_spans(self) -> SpanTable {
        self.spans
    }

    /// How many entries [`Ztoc::files`] gives.
    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// All entries in the order of their contents, which is the order of the tar. Allocates nothing.
    pub fn files(&self) -> impl Iterator<Item = FileRef<'a>> + '_ {
        let mut header = 0;
        (0..self.files.len()).map_while(move |position| {
            // Parsing has read each of them, so none can fail now.
            let file = self.file(self.in_order(position), header).ok()?;
            header = next_header(&file);
            Some(file)
        })
    }

    fn in_order(&self, position: usize) -> usize {
        match &self.order {
            Some(order) => order.get(position).map_or(usize::MAX, |&index| index as usize),
            None => position,
        }
    }

    fn content_order(&self) -> Result<Option<Vec<u32>>, ZtocError> {
        let offset = |index: usize| self.files.table(index)?.i64(2);
        let mut last = i64::MIN;
        let mut sorted = true;
        for index in 0..self.files.len() {
            let this = offset(index)?;
            sorted &= last <= this;
            last = this;
        }
        if sorted {
            return Ok(None);
        }
        let mut order: Vec<u32> = (0..self.files.len() as u32).collect(); // offsets of 4 bytes each, in under 2 GiB
        order.sort_by_key(|&index| offset(index as usize).unwrap_or_default());
        Ok(Some(order))
    }

    fn check_files(&self, limits: &Limits, mut budget: usize) -> Result<(), ZtocError> {
        let mut header = 0;
        for position in 0..self.files.len() {
            let index = self.in_order(position);
            let invalid = |problem| ZtocError::Entry { index, problem };
            let file = self.file(index, header)?;
            let headers = file.offset.checked_sub(header).ok_or(invalid("overlaps the entry before it"))?;
            if headers < BLOCK || headers % BLOCK != 0 {
                return Err(invalid("no tar header in front of it"));
            }
            if headers > limits.header {
                return Err(ZtocError::Limit("headers of one entry"));
            }
            let end = if file.kind.has_content() { file.offset.checked_add(file.size) } else { Some(file.offset) };
            if end.is_none_or(|end| end > self.spans.uncompressed_size) {
                return Err(invalid("ends beyond the archive"));
            }
            for text in [file.name, file.link, file.uname, file.gname] {
                if text.contains(&0) {
                    return Err(invalid("NUL in a string"));
                }
                charge(&mut budget, text, limits)?;
            }
            for index in 0..file.records.len() {
                let (key, value) = record(&file.records, index)?;
                charge(&mut budget, key, limits)?;
                charge(&mut budget, value, limits)?;
            }
            if tar::is_sparse(file.pax_records()) {
                return Err(invalid("sparse"));
            }
            header = next_header(&file);
        }
        Ok(())
    }

    fn file(&self, index: usize, header: u64) -> Result<FileRef<'a>, ZtocError> {
        let invalid = |problem| ZtocError::Entry { index, problem };
        let table = self.files.table(index)?;
        let number = |slot| u64::try_from(table.i64(slot)?).map_err(|_| invalid("negative offset or size"));
        Ok(FileRef {
            name: table.bytes(0)?,
            kind: Kind::from_name(table.bytes(1)?).ok_or(invalid("unknown type"))?,
            offset: number(2)?,
            header,
            size: number(3)?,
            link: table.bytes(4)?,
            mode: table.i64(5)? as u32,
            uid: table.u32(6)?,
            gid: table.u32(7)?,
            uname: table.bytes(8)?,
            gname: table.bytes(9)?,
            mtime: time::parse(table.bytes(10)?),
            devmajor: table.i64(11)? as u32,
            devminor: table.i64(12)? as u32,
            records: table.vector(13)?,
        })
    }
}

/// Where the headers of the following entry start. Unlike Go we know that only regular files have data, so a hard link
/// that carries the size of its target does not shift what follows.
fn next_header(file: &FileRef<'_>) -> u64 {
    // Only wraps for an entry that the next check refuses: contents end within the archive.
    file.content().end.wrapping_add(BLOCK - 1) / BLOCK * BLOCK
}

/// The four bytes are those of a string's length: reading an empty one costs time, too.
fn charge(budget: &mut usize, text: &[u8], limits: &Limits) -> Result<(), ZtocError> {
    if text.len() > limits.text {
        return Err(ZtocError::Limit("length of a string"));
    }
    *budget = budget.checked_sub(text.len() + 4).ok_or(ZtocError::Limit("shared strings"))?;
    Ok(())
}
