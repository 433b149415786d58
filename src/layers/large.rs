//! Spans too large for memory: inflated once, by whoever reads first, into a sparse file at their uncompressed offsets.
//!
//! ```text
//!   blob ──pieces──▶ digest compared ──pieces──▶ inflate ──pieces──▶ data ──▶ readers, as far as it has come
//! ```
//!
//! Invariant: what is in `data` below what [`Placed`] says was inflated from bytes that matched the span's digest.
//!
//! Where `data` does not fit on the disk the span is inflated for each read, from its start to the read's end. Slow, but it reads.

use super::{
    files::PIECE,
    layer::{Arrival, Layer},
    read::{TRIES, storage},
};
use crate::telemetry::catalog::say;
use crate::{
    fs::ReadError,
    inflate::{InflateError, SpanInflater},
    ztoc::Span,
};
use bytes::Bytes;
use std::{
    collections::HashMap,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// Readers are told of progress in steps of this: a few per read of the kernel's largest size would be too many.
const STEP: u64 = 4 << 20;
/// Zeros of at least this are left out of the sparse file.
const HOLE: usize = 64 << 10;
/// When there was no room, how long nobody tries again.
const FULL: Duration = Duration::from_secs(60);

/// How far a large span has been inflated.
#[derive(Debug, Clone)]
pub(super) enum Placed {
    /// Its first bytes are in `data`, so many.
    UpTo(u64),
    /// The same, and there is no room for more.
    NoRoom(u64, Instant),
    /// Its compressed bytes on disk were damaged, and are forgotten.
    Damaged,
    Failed(ReadError),
}

/// The large spans of one layer that are inflated, or being inflated. Locked for moments only.
pub(super) type Placings = Mutex<HashMap<usize, watch::Receiver<Placed>>>;

/// Why a span was not inflated to its end.
enum Halt {
    /// The compressed bytes could not be read.
    Source(io::Error),
    Inflate(InflateError),
    /// What was inflated could not be written.
    Sink(io::Error),
}

impl Layer {
    /// The bytes `part` of a large span.
    pub(super) async fn large(&self, span: usize, part: Range<u64>) -> Result<Bytes, ReadError> {
        for _ in 0..TRIES {
            let arrival = match self.here(span).await {
                Err(ReadError::Storage { .. }) => return self.in_passing(span, part).await,
                arrival => arrival?,
            };
            let mut placing = self.placing(span, &arrival)?;
            let wanted = part.end;
            let settled = placing.wait_for(|placed| !matches!(placed, Placed::UpTo(end) if *end < wanted)).await;
            let settled = settled.map_or(Placed::Damaged, |placed| placed.clone());
            let is_placed = match settled {
                Placed::UpTo(_) => true,
                Placed::NoRoom(end, _) => end >= wanted,
                Placed::Damaged => continue,
                Placed::Failed(error) => return Err(error),
            };
            if is_placed && let Ok(bytes) = self.placed_part(span, part.clone()).await {
                return Ok(bytes);
            }
            if let Some(bytes) = self.inflated_until(span, part.clone(), arrival).await? {
                return Ok(bytes);
            }
        }
        Err(ReadError::Storage { reason: format!("span {span} does not survive on disk") })
    }

    async fn placed_part(&self, span: usize, part: Range<u64>) -> Result<Bytes, ReadError> {
        self.blocking(move |layer| {
            let start = layer.entry(span)?.uncompressed.start;
            let data = layer.files.data(layer.table.uncompressed_size).map_err(|e| storage(&e))?;
            let mut out = vec![0; (part.end - part.start) as usize];
            data.read_exact_at(&mut out, start + part.start).map_err(|e| storage(&e))?;
            Ok(out.into())
        })
        .await
    }

    /// Finds out how far `span` is inflated, or begins it.
    fn placing(&self, span: usize, arrival: &Arrival) -> Result<watch::Receiver<Placed>, ReadError> {
        let entry = self.entry(span)?;
        let whole = entry.uncompressed.end - entry.uncompressed.start;
        let mut placings = self.placings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(placing) = placings.get(&span) {
            let goes_on = placing.has_changed().is_ok();
            let is_of_use = match &*placing.borrow() {
                Placed::UpTo(end) => goes_on || *end == whole,
                Placed::NoRoom(_, since) => since.elapsed() < FULL,
                Placed::Damaged | Placed::Failed(_) => false,
            };
            if is_of_use {
                return Ok(placing.clone());
            }
        }
        let (progress, placing) = watch::channel(Placed::UpTo(0));
        placings.insert(span, placing.clone());
        drop(placings);
        let layer = self.arc().ok_or(ReadError::Removed)?;
        let arrival = arrival.clone();
        // Its own task: a reader that is interrupted leaves the others what has been done.
        self.shared().runtime.spawn(async move {
            let held = match &arrival {
                Arrival::Bytes(bytes) => bytes.len(),
                Arrival::OnDisk => PIECE,
            };
            let memory = layer.shared().memory((held + PIECE) as u64).await;
            layer.shared().runtime.clone().spawn_blocking(move || {
                let _memory = memory;
                let placed = layer.place(span, &arrival, &progress);
                progress.send_replace(placed);
            });
        });
        Ok(placing)
    }

    /// Inflates `span` into `data`.
    fn place(&self, span: usize, arrival: &Arrival, progress: &watch::Sender<Placed>) -> Placed {
        let entry = match self.entry(span) {
            Ok(entry) => entry,
            Err(error) => return Placed::Failed(error),
        };
        let was_on_disk = matches!(arrival, Arrival::OnDisk);
        let held = self.hold(span);
        if was_on_disk && (held.is_none() || !self.is_good(span, entry)) {
            return Placed::Damaged;
        }
        let whole = entry.uncompressed.end - entry.uncompressed.start;
        let no_room = |placed: u64, error: &io::Error| {
            say!(NoRoomForSpan, layer = %self.digest(), span, %error, "no room for a large span; each read inflates it from its start");
            Placed::NoRoom(placed, Instant::now())
        };
        let claimed = self.files.claim(whole);
        let room = claimed.and_then(|claim| Ok((claim, self.files.data(self.table.uncompressed_size)?)));
        let (mut claim, data) = match room {
            Ok(room) => room,
            Err(error) => return no_room(0, &error),
        };
        let (mut placed, mut told) = (0, 0);
        let result = self.inflate_in_pieces(entry, arrival, whole, |bytes| {
            if self.is_removed() {
                return Err(io::ErrorKind::NotFound.into());
            }
            write_sparse(&data, entry.uncompressed.start + placed, bytes)?;
            claim.spend(bytes.len() as u64);
            placed += bytes.len() as u64;
            if placed - told >= STEP {
                told = placed;
                progress.send_replace(Placed::UpTo(placed));
            }
            Ok(())
        });
        match result {
            Ok(()) => Placed::UpTo(whole),
            Err(Halt::Sink(_)) if self.is_removed() => Placed::Failed(ReadError::Removed),
            Err(Halt::Sink(error)) => no_room(placed, &error),
            Err(Halt::Source(error)) => {
                self.damaged(span, Some(&error));
                Placed::Damaged
            }
            Err(Halt::Inflate(error)) => {
                self.suspect(span, entry, was_on_disk, &error).map_or_else(Placed::Failed, |()| Placed::Damaged)
            }
        }
    }

    /// The bytes `part` of a span whose bytes have been checked, inflated for this read only. None if it is damaged.
    async fn inflated_until(
        &self,
        span: usize,
        part: Range<u64>,
        arrival: Arrival,
    ) -> Result<Option<Bytes>, ReadError> {
        let memory = self.shared().memory(2 * PIECE as u64).await;
        self.blocking(move |layer| {
            let _memory = memory;
            let entry = layer.entry(span)?;
            let was_on_disk = matches!(arrival, Arrival::OnDisk);
            let held = layer.hold(span);
            if was_on_disk && (held.is_none() || !layer.is_good(span, entry)) {
                return Ok(None);
            }
            let mut excerpt = Excerpt::new(part);
            let until = excerpt.part.end;
            match layer.inflate_in_pieces(entry, &arrival, until, |bytes| {
                excerpt.pass(bytes);
                Ok(())
            }) {
                Ok(()) => Ok(Some(excerpt.taken.into())),
                Err(Halt::Source(error)) => {
                    layer.damaged(span, Some(&error));
                    Ok(None)
                }
                Err(Halt::Sink(error)) => Err(storage(&error)),
                Err(Halt::Inflate(error)) => layer.suspect(span, entry, was_on_disk, &error).map(|()| None),
            }
        })
        .await
    }

    /// Gives `sink` the first `until` uncompressed bytes of the span `entry`, piece by piece.
    fn inflate_in_pieces(
        &self,
        entry: &Span,
        arrival: &Arrival,
        until: u64,
        mut sink: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), Halt> {
        let window = self.files.ztoc().get(entry.window.clone()).unwrap_or_default();
        let mut inflater = SpanInflater::new(entry.bits, window).map_err(Halt::Inflate)?;
        let (mut buffer, mut out) = (Vec::new(), vec![0; PIECE]);
        let (mut at, mut written) = (entry.compressed.start, 0);
        while written < until {
            let missing = InflateError::Short { missing: until - written };
            let mut input: &[u8] = match arrival {
                Arrival::Bytes(bytes) => bytes.get((at - entry.compressed.start) as usize..).unwrap_or_default(),
                Arrival::OnDisk => {
                    buffer.resize((entry.compressed.end - at).min(PIECE as u64) as usize, 0);
                    self.files.read(at, &mut buffer).map_err(Halt::Source)?;
                    &buffer
                }
            };
            if input.is_empty() {
                return Err(Halt::Inflate(missing));
            }
            at += input.len() as u64;
            while written < until {
                let room = out.len().min(usize::try_from(until - written).unwrap_or(usize::MAX));
                let moved = inflater.inflate(input, &mut out[..room]).map_err(Halt::Inflate)?;
                input = &input[moved.read..];
                if moved.written == 0 {
                    break;
                }
                written += moved.written as u64;
                sink(&out[..moved.written]).map_err(Halt::Sink)?;
            }
        }
        Ok(())
    }
}

/// A part of what passes by.
pub(super) struct Excerpt {
    pub part: Range<u64>,
    at: u64,
    pub taken: Vec<u8>,
}

impl Excerpt {
    pub fn new(part: Range<u64>) -> Excerpt {
        Excerpt { part, at: 0, taken: Vec::new() }
    }

    pub fn pass(&mut self, bytes: &[u8]) {
        let end = self.at + bytes.len() as u64;
        let (from, to) = (self.part.start.clamp(self.at, end), self.part.end.clamp(self.at, end));
        self.taken.extend_from_slice(&bytes[(from - self.at) as usize..(to - self.at) as usize]);
        self.at = end;
    }

    pub fn is_whole(&self) -> bool {
        self.taken.len() as u64 == self.part.end - self.part.start
    }
}

/// Writes what is not zero; the file is as long as it will get, and reads as zeros where nothing was written.
fn write_sparse(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    for (number, piece) in bytes.chunks(HOLE).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, at + (number * HOLE) as u64)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_is_the_same_however_the_bytes_come() {
        let bytes: Vec<u8> = (0..100).collect();
        for step in [1, 7, 50, 100] {
            for part in [0..0, 0..100, 13..14, 30..70, 99..100] {
                let mut excerpt = Excerpt::new(part.clone());
                assert!(bytes.chunks(step).all(|chunk| {
                    excerpt.pass(chunk);
                    excerpt.taken.len() <= 100
                }));
                assert!(excerpt.is_whole());
                assert_eq!(excerpt.taken, bytes[part.start as usize..part.end as usize]);
            }
        }
    }
}
