//! The spans of a layer as one table.

use super::Compression;
use crate::{
    inflate::{MAX_RATIO, gzip},
    oci::Digest,
    ztoc::zinfo::{self, ZinfoError},
};
use std::ops::{Range, RangeInclusive};

/// One independently readable piece of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its bytes in the layer, of which `digest` is the digest. The first is shared with the span before if `bits != 0`.
    pub compressed: Range<u64>,
    /// Its bytes in the tar. May be empty at the end of the layer, where only padding follows.
    pub uncompressed: Range<u64>,
    /// How many high bits of the first byte belong to it, when not all: what `inflate_span` takes.
    pub bits: u8,
    /// Digest of the compressed bytes.
    pub digest: Digest,
    /// Where in the zTOC's bytes the end of its window is, as far as there is data before it; empty for none.
    pub window: Range<usize>,
}

/// All spans of a layer, in order, without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanTable {
    /// How to read a span.
    pub compression: Compression,
    /// At least one, unless the layer is an uncompressed one without a byte.
    pub spans: Vec<Span>,
    /// What the zTOC was built with: spans are larger than this, but for the last.
    pub span_size: u64,
    /// Size of the layer.
    pub compressed_size: u64,
    /// Size of the tar up to its end marker; the stream may be longer.
    pub uncompressed_size: u64,
}

impl SpanTable {
    /// The span that holds the byte at `uncompressed`; the last one for anything beyond the end.
    pub fn span_at(&self, uncompressed: u64) -> usize {
        // Of several spans that start at the same offset only the last has bytes.
        self.spans.partition_point(|span| span.uncompressed.start <= uncompressed).saturating_sub(1)
    }

    /// The spans that hold the bytes of `range`; none for an empty range.
    pub fn spans_of(&self, range: Range<u64>) -> RangeInclusive<usize> {
        if range.is_empty() || self.spans.is_empty() {
            return RangeInclusive::new(1, 0);
        }
        self.span_at(range.start)..=self.span_at(range.end - 1)
    }

    /// How many bytes of the layer come before span 0, covered by no digest: the first gzip header.
    pub fn header_len(&self) -> u64 {
        self.spans.first().map_or(0, |span| span.compressed.start)
    }

    /// Whether the Go snapshotter would mount it. It refuses spans without output (such as those of an empty first gzip
    /// member) and layers without spans; reading them is no problem here.
    pub fn mountable_by_go(&self) -> bool {
        let inner = self.spans.len().saturating_sub(1);
        !self.spans.is_empty() && self.spans[..inner].iter().all(|span| !span.uncompressed.is_empty())
    }

    /// Everything but the digests, checked. `zinfo`: where it lies in the `bytes` of the zTOC.
    pub(super) fn parse(
        compression: Compression,
        bytes: &[u8],
        zinfo: Range<usize>,
        digests: &[Digest],
        sizes: (u64, u64),
    ) -> Result<SpanTable, SpanError> {
        let (blob_at, blob) = (zinfo.start, &bytes[zinfo]);
        match compression {
            Compression::Gzip => gzip_table(blob, blob_at, digests, sizes),
            Compression::Uncompressed => tar_table(blob, digests, sizes),
        }
    }
}

/// Why spans are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// See there.
    #[error(transparent)]
    Zinfo(#[from] ZinfoError),
    /// Checkpoints, `max_span_id` and digests must be as many.
    #[error("{digests} span digests for {spans} spans")]
    Count {
        /// According to the checkpoints.
        spans: u64,
        /// According to the digests.
        digests: usize,
    },
    /// Offsets that do not grow, or point beyond the layer.
    #[error("span offsets are non-monotonic or outside of the layer at span {0}")]
    Offsets(usize),
    /// More output than DEFLATE can make.
    #[error("span {0} claims more bytes than its compressed bytes can hold")]
    Ratio(usize),
    /// The layer's size in the zTOC and in its zinfo differ, or the tar is larger than the layer it is.
    #[error("contradicting sizes")]
    Sizes,
}

fn gzip_table(blob: &[u8], blob_at: usize, digests: &[Digest], sizes: (u64, u64)) -> Result<SpanTable, SpanError> {
    let (compressed_size, uncompressed_size) = sizes;
    let (span_size, checkpoints) = zinfo::parse_gzip(blob)?;
    if checkpoints.len() != digests.len() {
        return Err(SpanError::Count { spans: checkpoints.len() as u64, digests: digests.len() });
    }
    let mut spans: Vec<Span> = Vec::with_capacity(checkpoints.len());
    for (index, (point, &digest)) in checkpoints.iter().zip(digests).enumerate() {
        let offsets = SpanError::Offsets(index);
        let next = checkpoints.get(index + 1);
        let compressed_end = next.map_or(compressed_size, |next| next.input);
        // Trailing padding is not part of the tar, so the last checkpoint may be beyond its end.
        let uncompressed_end = next.map_or(uncompressed_size.max(point.output), |next| next.output);
        let start = point.input.checked_sub((point.bits != 0).into()).ok_or(offsets)?;
        let first_is_first = index > 0
            || (point.output == 0 && point.bits == 0 && (10..=gzip::MAX_HEADER as u64).contains(&point.input));
        let empty_only_in_front = point.output < uncompressed_end || point.output == 0 || next.is_none();
        if point.input >= compressed_end || point.output > uncompressed_end || !first_is_first || !empty_only_in_front {
            return Err(offsets);
        }
        if uncompressed_end - point.output > (compressed_end - start).saturating_mul(MAX_RATIO) {
            return Err(SpanError::Ratio(index));
        }
        let known = usize::try_from(point.output).map_or(point.window.len(), |n| n.min(point.window.len()));
        spans.push(Span {
            compressed: start..compressed_end,
            uncompressed: point.output..uncompressed_end,
            bits: point.bits,
            digest,
            window: blob_at + point.window.end - known..blob_at + point.window.end,
        });
    }
    Ok(SpanTable { compression: Compression::Gzip, spans, span_size, compressed_size, uncompressed_size })
}

fn tar_table(blob: &[u8], digests: &[Digest], sizes: (u64, u64)) -> Result<SpanTable, SpanError> {
    let (compressed_size, uncompressed_size) = sizes;
    let (span_size, size) = zinfo::parse_tar(blob)?;
    if size != compressed_size || uncompressed_size > compressed_size {
        return Err(SpanError::Sizes);
    }
    let count = size.div_ceil(span_size);
    if count != digests.len() as u64 {
        return Err(SpanError::Count { spans: count, digests: digests.len() });
    }
    let span = |(index, &digest): (usize, &Digest)| {
        let start = index as u64 * span_size; // below `size`, as there are `count` of them
        let end = start.saturating_add(span_size);
        let (compressed_end, uncompressed_end) =
            if end >= size { (size, uncompressed_size.max(start)) } else { (end, end) };
        Span { compressed: start..compressed_end, uncompressed: start..uncompressed_end, bits: 0, digest, window: 0..0 }
    };
    let spans = digests.iter().enumerate().map(span).collect();
    Ok(SpanTable { compression: Compression::Uncompressed, spans, span_size, compressed_size, uncompressed_size })
}
