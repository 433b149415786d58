//! Building a zTOC from a layer in one pass, from anything that can be read once.
//!
//! ```text
//!   reader thread          calling thread                              span thread
//!   read, hash the layer ─▶ inflate, stop at blocks, check CRC ─cuts──▶ hash each span ─┐
//!        ▲                  list the tar ──(if asked)─▶ diff ID thread                  │
//!        └────────────────────── buffers, again and again ──────────────────────────────┘
//! ```
//!
//! Queues are short and buffers go round, so memory is bounded by the zTOC being built and a few MiB.

use super::{
    Compression,
    flatbuf::TooLarge,
    listing::Listing,
    scan,
    write::{self, Parts},
    zinfo,
};
use crate::{
    inflate::gzip::HeaderError,
    oci::{BUILD_TOOL, Digest, Hasher},
    tar::TarError,
};
use std::{
    io::{self, Read},
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread,
};

/// Compressed bytes that travel together. Half of a second-level cache, much more than what a hand-over costs.
const CHUNK: usize = 256 << 10;

/// Chunks waiting between two threads: enough to keep the slowest busy, a few MiB in all.
const QUEUE: usize = 4;

/// How to build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Spans get larger than this, the last one excepted.
    pub span_size: u64,
    /// Recorded in the zTOC, and so part of its digest.
    pub build_tool: String,
    /// Whether to compute the digest of the uncompressed layer on the way; a zTOC does not need it.
    pub diff_id: DiffId,
}

/// See [`BuildOptions::diff_id`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiffId {
    /// Saves a quarter of the CPU time.
    Skip,
    /// On a thread of its own.
    Compute,
}

impl Default for BuildOptions {
    /// Those of the Go tools.
    fn default() -> BuildOptions {
        BuildOptions { span_size: super::DEFAULT_SPAN_SIZE, build_tool: BUILD_TOOL.to_owned(), diff_id: DiffId::Skip }
    }
}

/// A zTOC and what was learned on the way.
#[derive(Debug, Clone)]
pub struct Built {
    /// The zTOC.
    pub bytes: Vec<u8>,
    /// Its digest.
    pub digest: Digest,
    /// Digest of the layer as read.
    pub layer_digest: Digest,
    /// Size of the layer as read.
    pub layer_size: u64,
    /// Digest of the uncompressed layer, if asked for.
    pub diff_id: Option<Digest>,
    /// Some entry has an extended attribute.
    pub has_xattrs: bool,
    /// Some directory is opaque.
    pub has_opaque: bool,
    /// Number of entries.
    pub files: usize,
    /// Number of spans.
    pub spans: usize,
    /// For the operator; the zTOC is good nevertheless.
    pub warnings: Vec<String>,
}

/// Why there is no zTOC.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// This layer has none; others of the image may.
    #[error("the layer cannot be indexed")]
    NotIndexable(#[from] NotIndexable),
    /// The layer could not be read to its end.
    #[error("cannot read the layer")]
    Io(#[from] io::Error),
    /// A span size that no zTOC can have.
    #[error("span size {0} is out of range")]
    SpanSize(u64),
}

/// What is wrong with a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotIndexable {
    /// What it holds is no tar, or one that a zTOC cannot describe.
    #[error("error while reading tar header")]
    Tar(#[from] TarError),
    /// A member header; at the start of the layer or, as garbage, after a member.
    #[error("bad gzip member at offset {offset}")]
    GzipHeader {
        /// In the layer.
        offset: u64,
        /// Why.
        source: HeaderError,
    },
    /// The compressed data itself.
    #[error("corrupt DEFLATE data before offset {0}")]
    Deflate(u64),
    /// CRC or length.
    #[error("gzip checksum mismatch in the member ending at offset {0}")]
    GzipChecksum(u64),
    /// It ends in the middle.
    #[error("the gzip data is truncated")]
    GzipTruncated,
    /// Links, directories or devices with a size: the Go snapshotter looks for the next entry in the wrong place.
    #[error("an entry without content claims a size")]
    Oversized,
    /// Over 2 GiB: 65,500 spans, or tens of millions of files.
    #[error("its zTOC would be too large")]
    TooLarge,
}

impl From<TooLarge> for NotIndexable {
    fn from(TooLarge: TooLarge) -> NotIndexable {
        NotIndexable::TooLarge
    }
}

/// Builds the zTOC of `layer`, reading it to its end.
///
/// When the layer turns out to be unusable the rest is not read; a read that is under way is waited for.
pub fn build(layer: impl Read + Send, compression: Compression, options: &BuildOptions) -> Result<Built, BuildError> {
    let usable = options.span_size <= i64::MAX as u64 && (compression == Compression::Gzip || options.span_size > 0);
    if !usable {
        return Err(BuildError::SpanSize(options.span_size));
    }
    let (scanned, digests, layer_digest, layer_size, diff_id) = thread::scope(|scope| {
        let (chunks_in, chunks) = sync_channel(QUEUE);
        let (marked_in, marked) = sync_channel(QUEUE);
        let (spare_in, spare) = channel();
        let reader = scope.spawn(move || read(layer, &chunks_in, &spare));
        let hasher = scope.spawn(move || hash_spans(&marked, &spare_in));
        let (diff, diff_hasher) = match (options.diff_id, compression) {
            (DiffId::Compute, Compression::Gzip) => {
                let (pieces_in, pieces) = sync_channel::<Vec<u8>>(QUEUE);
                let (spare_in, spare) = channel();
                (Some((pieces_in, spare)), Some(scope.spawn(move || hash_all(&pieces, &spare_in))))
            }
            _ => (None, None),
        };
        let mut source = Source::new(chunks, marked_in);
        let scanned = match compression {
            Compression::Gzip => scan::gzip(&mut source, options.span_size, diff),
            Compression::Uncompressed => scan::tar(&mut source, options.span_size),
        };
        drop(source); // lets the other threads end
        // A broken-off read looks like a truncated layer, so its own error comes first.
        let (layer_digest, layer_size) = join(reader)?;
        let digests = join(hasher);
        let diff_id = match compression {
            Compression::Uncompressed => Some(layer_digest),
            Compression::Gzip => diff_hasher.map(join),
        };
        Ok::<_, BuildError>((scanned?, digests, layer_digest, layer_size, diff_id))
    })?;

    let listed = scanned.listing.finish().map_err(NotIndexable::Tar)?;
    let mut warnings = listed.warnings;
    if scanned.empty_spans {
        warnings.push("it starts with empty gzip blocks: the Go snapshotter cannot mount it".to_owned());
    }
    let zinfo = match scanned.zinfo {
        Some(zinfo) => zinfo,
        None => zinfo::tar(options.span_size, layer_size).map_err(NotIndexable::from)?,
    };
    let (files, spans) = (listed.rows.len(), digests.len());
    let bytes = write::serialise(Parts {
        compression,
        build_tool: options.build_tool.clone(),
        compressed_size: layer_size,
        uncompressed_size: listed.archive_size,
        rows: listed.rows,
        zinfo,
        digests,
    })
    .map_err(NotIndexable::from)?;
    Ok(Built {
        digest: Digest::of(&bytes),
        bytes,
        layer_digest,
        layer_size,
        diff_id,
        has_xattrs: listed.has_xattrs,
        has_opaque: listed.has_opaque,
        files,
        spans,
        warnings,
    })
}

fn join<T>(handle: thread::ScopedJoinHandle<'_, T>) -> T {
    handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What a scan found, apart from what other threads compute.
pub struct Scanned {
    pub listing: Listing,
    /// Of gzip only; that of a tar follows from its size.
    pub zinfo: Option<Vec<u8>>,
    /// Some span but the last has no output.
    pub empty_spans: bool,
}

/// Fills chunks until the layer ends or nobody wants more.
fn read(mut layer: impl Read, chunks: &SyncSender<Vec<u8>>, spare: &Receiver<Vec<u8>>) -> io::Result<(Digest, u64)> {
    let mut hasher = Hasher::new();
    let mut size = 0;
    loop {
        let mut chunk = spare.try_recv().unwrap_or_default();
        chunk.resize(CHUNK, 0);
        let mut filled = 0;
        while filled < CHUNK {
            match layer.read(&mut chunk[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        chunk.truncate(filled);
        hasher.update(&chunk);
        size += filled as u64;
        let is_last = filled < CHUNK;
        if (filled > 0 && chunks.send(chunk).is_err()) || is_last {
            return Ok((hasher.finish(), size));
        }
    }
}

/// A chunk of the layer, and where in it spans start.
struct Marked {
    bytes: Vec<u8>,
    cuts: Vec<Cut>,
}

/// The start of a span, which ends the one before.
struct Cut {
    at: usize,
    /// The byte before it belongs to both.
    shared: bool,
}

fn hash_spans(chunks: &Receiver<Marked>, spare: &Sender<Vec<u8>>) -> Vec<Digest> {
    let mut digests = Vec::new();
    let mut span: Option<Hasher> = None; // none before the first cut: the gzip header has no digest
    let mut last_byte = 0;
    for Marked { bytes, cuts } in chunks {
        let mut from = 0;
        for cut in cuts {
            let mut next = Hasher::new();
            if cut.shared {
                next.update(&[if cut.at > 0 { bytes[cut.at - 1] } else { last_byte }]);
            }
            if let Some(mut done) = span.replace(next) {
                done.update(&bytes[from..cut.at]);
                digests.push(done.finish());
            }
            from = cut.at;
        }
        if let Some(span) = &mut span {
            span.update(&bytes[from..]);
        }
        last_byte = bytes.last().copied().unwrap_or(last_byte);
        drop(spare.send(bytes)); // the reader may have ended
    }
    digests.extend(span.map(Hasher::finish));
    digests
}

fn hash_all(pieces: &Receiver<Vec<u8>>, spare: &Sender<Vec<u8>>) -> Digest {
    let mut hasher = Hasher::new();
    for piece in pieces {
        hasher.update(&piece);
        drop(spare.send(piece));
    }
    hasher.finish()
}

/// The layer as the scan sees it: a chunk at a time, each passed on to the span thread when it is used up.
pub struct Source {
    chunks: Receiver<Vec<u8>>,
    marked: SyncSender<Marked>,
    chunk: Vec<u8>,
    at: usize,
    base: u64,
    cuts: Vec<Cut>,
}

impl Source {
    fn new(chunks: Receiver<Vec<u8>>, marked: SyncSender<Marked>) -> Source {
        Source { chunks, marked, chunk: Vec::new(), at: 0, base: 0, cuts: Vec::new() }
    }

    /// Offset in the layer of the next byte.
    pub fn position(&self) -> u64 {
        self.base + self.at as u64
    }

    /// What is left of the chunk; empty only at the end of the layer or before `refill`.
    pub fn available(&self) -> &[u8] {
        &self.chunk[self.at..]
    }

    pub fn advance(&mut self, count: usize) {
        self.at += count;
    }

    /// Gets the next chunk once this one is used up. False at the end of the layer.
    pub fn refill(&mut self) -> bool {
        if self.at < self.chunk.len() {
            return true;
        }
        match self.chunks.recv() {
            Ok(next) => {
                self.base += self.chunk.len() as u64;
                self.pass_on(next);
                true
            }
            Err(_) => false,
        }
    }

    fn pass_on(&mut self, next: Vec<u8>) {
        let bytes = std::mem::replace(&mut self.chunk, next);
        let cuts = std::mem::take(&mut self.cuts);
        self.at = 0;
        if !bytes.is_empty() {
            drop(self.marked.send(Marked { bytes, cuts })); // the span thread ends only after us
        }
    }

    /// A span starts at the current position; it `shares` the byte before.
    pub fn cut(&mut self, shared: bool) {
        self.cut_ahead(0, shared);
    }

    /// A span starts `ahead` of the current position, within what is available.
    pub fn cut_ahead(&mut self, ahead: usize, shared: bool) {
        self.cuts.push(Cut { at: self.at + ahead, shared });
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.pass_on(Vec::new());
    }
}
