//! Reads a complete layer once more and finds out whether what is shown of it is what is in it.
//!
//! Span digests cover the compressed bytes. They don't cover where a zTOC says that inflating a span begins (its checkpoint's window and
//! bits), nor the table of contents: names, offsets, modes, owners. A zTOC that lies there shows content that the layer does not have.
//!
//! ```text
//! blob ─▶ sha256                                              = the layer's digest?
//!   └──▶ spans, each inflated from its own checkpoint ─▶ sha256 = a diff ID that an image gives it?  ── yes ─▶ all is proven
//!                          └──▶ tar headers = the zTOC's entries?                                └── no ──▶ inflated once more, from
//!                                                                                                           its start, to compare with
//! ```
//! What the spans give is what readers see. If all of it together has the diff ID, no byte is wrong, and one pass was enough.
//!
//! Memory: two buffers of [`PIECE`], an inflater, and one tar header at a time.

use super::files::{LayerFiles, PIECE};
use super::verdict::Verdict;
use crate::{
    inflate::{LayerDecoder, SpanInflater},
    oci::{Chain, Digest, Hasher},
    tar,
    ztoc::{Compression, FileRef, Kind, Span, SpanTable, Ztoc},
};
use std::io;

/// Longest name that is repeated in words.
const MAX_SHOWN: usize = 200;

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Examined {
    /// Nobody needs the layer any more.
    GivenUp,
    /// The bytes on disk are not the layer: by what they are instead, or because there are too few.
    OtherBytes(Option<Digest>),
    /// They are.
    Layer(Verdict),
}

/// A complete layer, and what is claimed of it.
pub(super) struct Subject<'a> {
    pub layer: Digest,
    pub files: &'a LayerFiles,
    pub ztoc: &'a Ztoc<'a>,
    pub table: &'a SpanTable,
    pub claims: &'a [Chain],
    /// Asked before each piece, and may take its time: whether to go on.
    pub goes_on: &'a dyn Fn() -> bool,
}

impl Subject<'_> {
    /// Blocks on disk and processor.
    pub fn examine(&self) -> io::Result<Examined> {
        let shown = match self.shown() {
            Ok(Some(shown)) => shown,
            Ok(None) => return Ok(Examined::GivenUp),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Examined::OtherBytes(None)),
            Err(error) => return Err(error),
        };
        if shown.layer != self.layer {
            return Ok(Examined::OtherBytes(Some(shown.layer)));
        }
        if let Some(reason) = shown.trouble {
            return Ok(Examined::Layer(Verdict::Contradicts { reason }));
        }
        let Content { all, marked, listing, .. } = shown.content;
        let diff_id = all.finish();
        let is_claimed = self.claims.iter().any(|chain| chain.holds(&diff_id));
        if is_claimed || self.table.compression == Compression::Uncompressed {
            return Ok(Examined::Layer(match listing.finish() {
                Some(reason) => Verdict::Contradicts { reason },
                None => Verdict::Genuine { diff_id },
            }));
        }
        self.compare(marked)
    }

    /// Compares what is shown, of which `shown` is the digest up to the end that the zTOC gives, with the layer inflated from its start.
    fn compare(&self, shown: Option<Digest>) -> io::Result<Examined> {
        let contradicts = |reason: String| Ok(Examined::Layer(Verdict::Contradicts { reason }));
        let truth = match self.truth()? {
            Some(Ok(truth)) => truth,
            Some(Err(reason)) => return contradicts(reason),
            None => return Ok(Examined::GivenUp),
        };
        if truth.marked != shown || shown.is_none() {
            return contradicts("the zTOC's checkpoints do not give the content of the layer".to_owned());
        }
        match truth.listing.finish() {
            Some(reason) => contradicts(reason),
            None => Ok(Examined::Layer(Verdict::Genuine { diff_id: truth.all.finish() })),
        }
    }

    fn content(&self) -> Content<'_> {
        Content::new(self.table.uncompressed_size, Listing::new(self.ztoc.files()))
    }

    /// What readers see, and the digest of the blob. None if nobody needs it any more.
    fn shown(&self) -> io::Result<Option<Shown<'_>>> {
        let mut blob = Blob { files: self.files, hasher: Hasher::new(), hashed: 0 };
        let (mut content, mut trouble) = (self.content(), None);
        let (mut buffer, mut out) = (vec![0; PIECE], vec![0; PIECE]);
        let last = self.table.spans.len().saturating_sub(1);
        for (number, span) in self.table.spans.iter().enumerate() {
            let mut reading = Reading::new(self.table.compression, span, self.files.ztoc(), number == last);
            let mut at = span.compressed.start;
            while at < span.compressed.end {
                if !(self.goes_on)() {
                    return Ok(None);
                }
                let n = buffer.len().min((span.compressed.end - at) as usize);
                blob.read(at, &mut buffer[..n])?;
                at += n as u64;
                reading.take(&buffer[..n], &mut out, &mut content);
            }
            trouble = trouble.or(reading.finish().map(|why| format!("span {number} cannot be inflated: {why}")));
        }
        blob.skip_to(self.table.compressed_size, &mut buffer)?;
        Ok(Some(Shown { layer: blob.hasher.finish(), content, trouble }))
    }

    /// The layer as everybody else unpacks it. None if nobody needs it any more; an error in words if it cannot be unpacked.
    fn truth(&self) -> io::Result<Option<Result<Content<'_>, String>>> {
        let mut content = self.content();
        let (mut buffer, mut out) = (vec![0; PIECE], vec![0; PIECE]);
        let mut decoder = LayerDecoder::new();
        let mut at = 0;
        while at < self.table.compressed_size {
            if !(self.goes_on)() {
                return Ok(None);
            }
            let n = buffer.len().min((self.table.compressed_size - at) as usize);
            self.files.read(at, &mut buffer[..n])?;
            at += n as u64;
            let mut rest = &buffer[..n];
            loop {
                match decoder.decode(rest, &mut out) {
                    Ok(moved) if moved.read == 0 && moved.written == 0 => break,
                    Ok(moved) => {
                        rest = &rest[moved.read..];
                        content.push(&out[..moved.written]);
                    }
                    Err(error) => return Ok(Some(Err(format!("the layer cannot be decompressed: {error}")))),
                }
            }
        }
        Ok(Some(match decoder.is_whole() {
            true => Ok(content),
            false => Err("the layer ends in the middle".to_owned()),
        }))
    }
}

struct Shown<'a> {
    layer: Digest,
    content: Content<'a>,
    /// A span that does not give what the zTOC says.
    trouble: Option<String>,
}

/// The blob, hashed as it is read, every byte once.
struct Blob<'a> {
    files: &'a LayerFiles,
    hasher: Hasher,
    hashed: u64,
}

impl Blob<'_> {
    fn read(&mut self, at: u64, out: &mut [u8]) -> io::Result<()> {
        if at > self.hashed {
            self.skip_to(at, &mut vec![0; PIECE])?;
        }
        self.files.read(at, out)?;
        // A byte that two spans share was hashed with the first.
        let known = (self.hashed - at) as usize;
        self.hasher.update(out.get(known..).unwrap_or_default());
        self.hashed = self.hashed.max(at + out.len() as u64);
        Ok(())
    }

    fn skip_to(&mut self, end: u64, buffer: &mut [u8]) -> io::Result<()> {
        while self.hashed < end {
            let n = buffer.len().min((end - self.hashed) as usize);
            self.files.read(self.hashed, &mut buffer[..n])?;
            self.hasher.update(&buffer[..n]);
            self.hashed += n as u64;
        }
        Ok(())
    }
}

/// One span on its way from compressed bytes to what readers see.
struct Reading {
    how: How,
    /// Bytes that the zTOC says are still to come.
    left: u64,
    /// What follows the tar belongs to the layer, too.
    is_last: bool,
    failure: Option<String>,
}

enum How {
    Inflated(Box<SpanInflater>),
    Plain,
    /// Nothing more comes of it.
    Ended,
}

impl Reading {
    fn new(compression: Compression, span: &Span, ztoc: &[u8], is_last: bool) -> Reading {
        let left = span.uncompressed.end - span.uncompressed.start;
        let window = ztoc.get(span.window.clone()).unwrap_or_default();
        let (how, failure) = match compression {
            Compression::Uncompressed => (How::Plain, None),
            Compression::Gzip => match SpanInflater::new(span.bits, window) {
                Ok(inflater) => (How::Inflated(Box::new(inflater)), None),
                Err(error) => (How::Ended, Some(error.to_string())),
            },
        };
        Reading { how, left, is_last, failure }
    }

    fn take(&mut self, mut input: &[u8], out: &mut [u8], content: &mut Content<'_>) {
        loop {
            let room = match (self.left, self.is_last) {
                (0, false) => return,
                (0, true) => out.len(),
                (left, _) => out.len().min(usize::try_from(left).unwrap_or(usize::MAX)),
            };
            let written = match &mut self.how {
                How::Ended => return,
                How::Plain => {
                    let n = input.len().min(room);
                    content.push(&input[..n]);
                    input = &input[n..];
                    n
                }
                How::Inflated(inflater) => match inflater.inflate(input, &mut out[..room]) {
                    Ok(moved) => {
                        content.push(&out[..moved.written]);
                        input = &input[moved.read..];
                        moved.written
                    }
                    Err(error) => {
                        // What follows the last member of a layer need not be gzip.
                        self.failure = (self.left > 0).then(|| error.to_string());
                        self.how = How::Ended;
                        return;
                    }
                },
            };
            if written == 0 {
                return;
            }
            self.left = self.left.saturating_sub(written as u64);
        }
    }

    fn finish(self) -> Option<String> {
        self.failure.or((self.left > 0).then(|| format!("it ends {} bytes early", self.left)))
    }
}

/// Uncompressed bytes, going by.
struct Content<'a> {
    all: Hasher,
    at: u64,
    /// Where the tar ends, as the zTOC has it; and the digest up to there.
    mark: u64,
    marked: Option<Digest>,
    listing: Listing<'a>,
}

impl<'a> Content<'a> {
    fn new(mark: u64, listing: Listing<'a>) -> Content<'a> {
        let marked = (mark == 0).then(|| Hasher::new().finish());
        Content { all: Hasher::new(), at: 0, mark, marked, listing }
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.at + bytes.len() as u64;
        let (before, after) = match self.at < self.mark && self.mark <= end {
            true => bytes.split_at((self.mark - self.at) as usize),
            false => (&[][..], bytes),
        };
        self.all.update(before);
        if !before.is_empty() {
            self.marked = Some(self.all.clone().finish());
        }
        self.all.update(after);
        self.at = end;
        self.listing.push(bytes);
    }
}

/// The tar, compared with the zTOC's entries one by one.
struct Listing<'a> {
    reader: tar::Reader,
    entries: Box<dyn Iterator<Item = FileRef<'a>> + 'a>,
    difference: Option<String>,
}

impl<'a> Listing<'a> {
    fn new(entries: impl Iterator<Item = FileRef<'a>> + 'a) -> Listing<'a> {
        Listing { reader: tar::Reader::new(), entries: Box::new(entries), difference: None }
    }

    fn push(&mut self, mut bytes: &[u8]) {
        while self.difference.is_none() {
            match self.reader.next(&mut bytes) {
                Ok(Some(entry)) => {
                    self.difference = match self.entries.next() {
                        Some(listed) => difference(&entry, &listed),
                        None => Some(format!("its table of contents leaves out {}", shown(&entry.name))),
                    };
                }
                Ok(None) => return,
                Err(error) => self.difference = Some(format!("the tar in it cannot be read: {error}")),
            }
        }
    }

    fn finish(mut self) -> Option<String> {
        let more = || {
            self.entries
                .next()
                .map(|entry| format!("its table of contents has {}, the layer has not", shown(entry.name)))
        };
        self.difference.or_else(more)
    }
}

fn shown(name: &[u8]) -> String {
    format!("\"{}\"", String::from_utf8_lossy(&name[..name.len().min(MAX_SHOWN)]).escape_debug())
}

/// What the zTOC says otherwise of a member than its headers do. Of what has no meaning for its kind, nothing is compared.
fn difference(entry: &tar::Entry, listed: &FileRef<'_>) -> Option<String> {
    let says = |what: &str, listed: String, real: String| {
        let name = shown(&entry.name);
        Some(format!("its table of contents gives {name} the {what} {listed}, the layer {real}"))
    };
    if entry.name != listed.name {
        return Some(format!(
            "its table of contents has {} where the layer has {}",
            shown(listed.name),
            shown(&entry.name)
        ));
    }
    if entry.kind != listed.kind {
        return says("type", listed.kind.as_str().to_owned(), entry.kind.as_str().to_owned());
    }
    // As 32-bit numbers: zTOCs have no others.
    let owner = (entry.uid as u32, entry.gid as u32);
    let devices = (entry.devmajor as u32, entry.devminor as u32);
    let mode = entry.mode as u32 & 0o7777;
    if entry.offset != listed.offset {
        return says("offset", listed.offset.to_string(), entry.offset.to_string());
    }
    if entry.kind.has_content() && entry.size != listed.size {
        return says("size", listed.size.to_string(), entry.size.to_string());
    }
    if matches!(entry.kind, Kind::Symlink | Kind::Hardlink) && entry.link != listed.link {
        return says("target", shown(listed.link), shown(&entry.link));
    }
    if entry.kind == Kind::Hardlink {
        return None;
    }
    if mode != listed.mode & 0o7777 {
        return says("mode", format!("{:04o}", listed.mode & 0o7777), format!("{mode:04o}"));
    }
    if owner != (listed.uid, listed.gid) {
        return says("owner", format!("{}:{}", listed.uid, listed.gid), format!("{}:{}", owner.0, owner.1));
    }
    if matches!(entry.kind, Kind::Char | Kind::Block) && devices != (listed.devmajor, listed.devminor) {
        let listed = format!("{}:{}", listed.devmajor, listed.devminor);
        return says("device number", listed, format!("{}:{}", devices.0, devices.1));
    }
    let (mut real, mut claimed): (Vec<_>, Vec<_>) = (entry.xattrs().collect(), listed.xattrs().collect());
    if !real.is_empty() || !claimed.is_empty() {
        real.sort_unstable();
        claimed.sort_unstable();
        if real != claimed {
            let names =
                |list: &[(&[u8], &[u8])]| list.iter().map(|(name, _)| shown(name)).collect::<Vec<_>>().join(" ");
            return says(
                "extended attributes",
                format!("[{}]", names(&claimed)),
                format!("[{}] with other values", names(&real)),
            );
        }
    }
    None
}
