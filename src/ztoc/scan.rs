//! Scanning a layer: finds where spans start and feeds the tar inside to the listing.
//!
//! Where a checkpoint may be follows from the data alone, not from the inflate library: after the header of each gzip
//! member, and after each DEFLATE block that is not the final one of its member. It is taken if nothing was output yet, or
//! if more than the span size was output since the last one taken. That is why inflating has to stop at blocks only
//! when enough was output: before, it runs freely.

use super::{
    MAX_BYTES,
    build::{NotIndexable, Scanned, Source},
    listing::Listing,
    zinfo,
};
use crate::inflate::{Raw, State, Stop, WINDOW, gzip};
use std::sync::mpsc::{Receiver, SyncSender};

/// Output that is inflated before it is looked at: stays within a second-level cache.
const OUTPUT: usize = 256 << 10;

/// Where pieces of output go to be hashed, and where empty ones come back from.
pub type DiffPieces = Option<(SyncSender<Vec<u8>>, Receiver<Vec<u8>>)>;

/// Scans an uncompressed layer: a span every `span_size` bytes.
pub fn tar(source: &mut Source, span_size: u64) -> Result<Scanned, NotIndexable> {
    let mut listing = Listing::default();
    let mut next = 0;
    while source.refill() {
        let len = source.available().len();
        let end = source.position() + len as u64;
        while next < end {
            source.cut_ahead((next - source.position()) as usize, false);
            next = next.saturating_add(span_size);
        }
        listing.push(source.available())?;
        source.advance(len);
    }
    Ok(Scanned { listing, zinfo: None, empty_spans: false })
}

/// Scans a gzip layer of one or more members.
pub fn gzip(source: &mut Source, span_size: u64, diff: DiffPieces) -> Result<Scanned, NotIndexable> {
    let mut scan = Scan {
        source,
        span_size,
        output: Output { piece: vec![0; OUTPUT], ..Output::default() },
        diff,
        listing: Listing::default(),
        zinfo: zinfo::Writer::new(span_size),
        last: 0,
        empty_spans: false,
    };
    let mut raw = Raw::new();
    loop {
        scan.member_header()?;
        scan.candidate(0)?;
        scan.member_data(&mut raw)?;
        scan.member_trailer()?;
        raw.reset();
        if !scan.source.refill() {
            break;
        }
    }
    scan.flush()?;
    Ok(Scanned { listing: scan.listing, zinfo: Some(scan.zinfo.finish()), empty_spans: scan.empty_spans })
}

struct Scan<'s> {
    source: &'s mut Source,
    span_size: u64,
    output: Output,
    diff: DiffPieces,
    listing: Listing,
    zinfo: zinfo::Writer,
    /// Output offset of the last checkpoint.
    last: u64,
    empty_spans: bool,
}

/// The uncompressed stream, of which one piece and what a window needs are kept.
#[derive(Default)]
struct Output {
    piece: Vec<u8>,
    filled: usize,
    /// How much of the piece is part of `crc`.
    summed: usize,
    /// Offset of the piece in the stream.
    base: u64,
    /// Up to 32 KiB in front of the piece.
    before: Vec<u8>,
    crc: crc32fast::Hasher,
    member_start: u64,
}

impl Output {
    fn position(&self) -> u64 {
        self.base + self.filled as u64
    }

    fn sum(&mut self) {
        self.crc.update(&self.piece[self.summed..self.filled]);
        self.summed = self.filled;
    }

    /// The last 32 KiB, in two parts.
    fn window(&self) -> [&[u8]; 2] {
        let here = &self.piece[self.filled.saturating_sub(WINDOW)..self.filled];
        let missing = WINDOW - here.len();
        [&self.before[self.before.len().saturating_sub(missing)..], here]
    }
}

impl Scan<'_> {
    fn member_header(&mut self) -> Result<(), NotIndexable> {
        let offset = self.source.position();
        let parse =
            |bytes: &[u8]| gzip::header_len(bytes).map_err(|source| NotIndexable::GzipHeader { offset, source });
        if let Some(len) = parse(self.source.available())? {
            self.source.advance(len);
            return Ok(());
        }
        // It continues in the next chunk: collect it.
        let mut header = Vec::new();
        loop {
            let before = header.len();
            let available = self.source.available();
            let taken = available.len().min(gzip::MAX_HEADER - before);
            header.extend_from_slice(&available[..taken]);
            match parse(&header)? {
                Some(len) => {
                    self.source.advance(len - before);
                    return Ok(());
                }
                None => self.source.advance(taken),
            }
            if !self.source.refill() {
                return Err(NotIndexable::GzipTruncated);
            }
        }
    }

    /// Takes a checkpoint here if the rule says so.
    fn candidate(&mut self, bits: u8) -> Result<(), NotIndexable> {
        let at = self.output.position();
        if at != 0 && at - self.last <= self.span_size {
            return Ok(());
        }
        self.empty_spans |= at == 0 && self.zinfo.count() > 0;
        self.zinfo.push(self.source.position(), at, bits, self.output.window());
        self.source.cut(bits != 0);
        self.last = at;
        if self.zinfo.len() > MAX_BYTES { Err(NotIndexable::TooLarge) } else { Ok(()) }
    }

    fn member_data(&mut self, raw: &mut Raw) -> Result<(), NotIndexable> {
        loop {
            if self.output.filled == self.output.piece.len() {
                self.flush()?;
            }
            let at = self.output.position();
            // No checkpoint can be taken before this much more was output.
            let free = if at == 0 { 0 } else { self.last.saturating_add(self.span_size).saturating_sub(at) };
            let room = &mut self.output.piece[self.output.filled..];
            let (stop, room) = match usize::try_from(free) {
                Ok(0) => (Stop::Block, room),
                Ok(free) if free < room.len() => (Stop::Never, &mut room[..free]),
                _ => (Stop::Never, room),
            };
            let (had_input, room_len) = (!self.source.available().is_empty(), room.len());
            let step = raw
                .inflate(self.source.available(), room, stop)
                .map_err(|_| NotIndexable::Deflate(self.source.position()))?;
            self.source.advance(step.read);
            self.output.filled += step.written;
            match step.state {
                State::End => return Ok(()),
                State::BlockEnd { last: true, .. } => {}
                State::BlockEnd { last: false, bits } => self.candidate(bits)?,
                State::Inside if had_input && step.read == 0 && step.written == 0 => {
                    return Err(NotIndexable::Deflate(self.source.position()));
                }
                // With room left, only input can be missing.
                State::Inside if step.written < room_len && !self.source.refill() => {
                    return Err(NotIndexable::GzipTruncated);
                }
                State::Inside => {}
            }
        }
    }

    fn member_trailer(&mut self) -> Result<(), NotIndexable> {
        let mut trailer = [0; gzip::TRAILER];
        for byte in &mut trailer {
            if !self.source.refill() {
                return Err(NotIndexable::GzipTruncated);
            }
            *byte = self.source.available()[0];
            self.source.advance(1);
        }
        self.output.sum();
        let crc = std::mem::take(&mut self.output.crc).finalize();
        let len = (self.output.position() - self.output.member_start) as u32; // modulo 2^32, by definition
        self.output.member_start = self.output.position();
        if gzip::trailer(trailer) == (crc, len) {
            Ok(())
        } else {
            Err(NotIndexable::GzipChecksum(self.source.position()))
        }
    }

    /// Hands the piece on and starts the next.
    fn flush(&mut self) -> Result<(), NotIndexable> {
        let output = &mut self.output;
        output.sum();
        let piece = &output.piece[..output.filled];
        self.listing.push(piece)?;
        let window: Vec<u8> = output.window().concat();
        output.before = window;
        output.base += output.filled as u64;
        if let Some((pieces, spare)) = &self.diff {
            let mut next = spare.try_recv().unwrap_or_default();
            next.resize(OUTPUT, 0);
            let mut full = std::mem::replace(&mut output.piece, next);
            full.truncate(output.filled);
            drop(pieces.send(full)); // the hashing thread ends only after us
        }
        output.filled = 0;
        output.summed = 0;
        Ok(())
    }
}
