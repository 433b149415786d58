//! Reads of uncompressed bytes: which spans, and how each gives its part.
//!
//! ```text
//! read(range) ─▶ spans ─┬ ordinary ─▶ inflated cache ─▶ inflated in memory ─┐
//!                  │    ├ large ────▶ `large`: inflated to a file ──────────┤
//!                  │    └ plain ────▶ read where it lies ───────────────────┴▶ in the blob, or fetched ahead of everything else
//!                  └──▶ what comes next, hinted to the scheduler
//! ```

use super::{
    fetch::Taken,
    layer::{Arrival, Layer, MAX_IN_MEMORY},
    receive::MAX_BUFFERED,
    scratch::Put,
    spans,
};
use crate::telemetry::catalog::say;
use crate::{
    fs::{LayerData, ReadError},
    inflate::{self, InflateError},
    oci::Digest,
    ztoc::{Compression, Span},
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, future::BoxFuture};
use std::{ops::Range, sync::atomic::Ordering, time::Instant};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// How often a span is fetched because what is on disk is damaged, until it is clear that the disk is the trouble.
pub(super) const TRIES: usize = 3;
/// Parts of one read that are inflated at the same time. A read is a megabyte at most, so with spans of any sensible size it has two.
const PARTS: usize = 4;
/// So many spans of a program or library that is in use are wanted next: half a second of an ordinary link at most, because large libraries
/// are rarely used as a whole.
const IN_USE: usize = 8;

/// How a span is read.
enum Way {
    /// Inflated as a whole, in memory.
    Ordinary,
    /// Too large for that.
    Large,
    /// Not compressed.
    Plain,
}

pub(super) fn stopping() -> ReadError {
    ReadError::Fetch { reason: "the daemon is stopping".into() }
}

/// It was evicted between two steps; the loop around them goes on.
fn evicted(span: usize) -> ReadError {
    ReadError::Storage { reason: format!("span {span} was evicted") }
}

pub(super) fn storage(error: &std::io::Error) -> ReadError {
    ReadError::Storage { reason: error.to_string() }
}

impl Layer {
    pub(super) fn entry(&self, span: usize) -> Result<&Span, ReadError> {
        self.table.spans.get(span).ok_or(ReadError::OutOfRange { range: 0..0 })
    }

    /// Starts fetching `runs`, which were taken, at once.
    fn demand(&self, runs: Vec<Range<usize>>) {
        let Some(layer) = self.arc() else { return };
        for run in runs {
            self.shared().observer.demand_fetch(&self.digest(), run.len());
            self.shared().scheduler.demand(Taken::new(layer.clone(), run));
        }
    }

    /// Waits until `span` is here, fetched if need be.
    pub(super) async fn here(&self, span: usize) -> Result<Arrival, ReadError> {
        let (receiver, runs) = {
            let mut map = self.map();
            if map.get(span) == spans::Span::Present {
                return Ok(Arrival::OnDisk);
            }
            // Looked at under the lock: `retire` tells everybody who waits.
            if self.is_removed() {
                return Err(ReadError::Removed);
            }
            let runs = map.take_wanted(span..=span);
            let (sender, receiver) = oneshot::channel();
            map.wait(span, sender);
            (receiver, runs)
        };
        self.demand(runs);
        receiver.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Runs `work` on this layer in a thread that may block.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Layer) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, ReadError> {
        let layer = self.arc().ok_or(ReadError::Removed)?;
        self.shared().runtime.spawn_blocking(move || work(&layer)).await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Whether the bytes of `span`, which is present, are what they should be. Damaged ones are forgotten.
    pub(super) fn is_good(&self, span: usize, entry: &Span) -> bool {
        let Some(_held) = self.hold(span) else { return false };
        if self.is_checked(span) {
            return true;
        }
        let trouble = match self.files.is_intact(entry) {
            Ok(true) => {
                self.set_checked(span, true);
                return true;
            }
            Ok(false) => None,
            Err(error) => Some(error),
        };
        self.damaged(span, trouble.as_ref());
        false
    }

    pub(super) fn damaged(&self, span: usize, trouble: Option<&std::io::Error>) {
        say!(SpanDamaged, layer = %self.digest(), span, ?trouble, "span on disk is damaged, fetching it again");
        self.discard(span);
    }

    /// The whole of an ordinary span, inflated.
    async fn inflated(&self, span: usize) -> Result<Bytes, ReadError> {
        let entry = self.entry(span)?;
        let size = entry.uncompressed.end - entry.uncompressed.start;
        let asked = Instant::now();
        for _ in 0..TRIES {
            let arrival = match self.here(span).await {
                Err(ReadError::Storage { .. }) if self.span_bytes(span) > MAX_BUFFERED => {
                    return self.in_passing(span, 0..size).await;
                }
                // It shared its request with a large one; alone it needs no disk.
                Err(ReadError::Storage { .. }) => continue,
                arrival => arrival?,
            };
            let waited = asked.elapsed();
            let memory = self.shared().memory(size + self.span_bytes(span)).await;
            let (inflated, memory) = self.blocking(move |layer| Ok((layer.inflate(span, arrival)?, memory))).await?;
            if let Some(bytes) = inflated {
                self.spill(span, bytes.clone(), memory);
                tracing::debug!(layer = %self.digest(), span, ?waited, took = ?asked.elapsed(), "span inflated");
                return Ok(bytes);
            }
        }
        Err(ReadError::Storage { reason: format!("span {span} does not survive on disk") })
    }

    /// None if what is on disk is damaged.
    fn inflate(&self, span: usize, arrival: Arrival) -> Result<Option<Bytes>, ReadError> {
        let entry = self.entry(span)?;
        let (compressed, was_on_disk) = match arrival {
            Arrival::Bytes(bytes) => (bytes, false),
            Arrival::OnDisk => match self.load(span, entry) {
                Some(bytes) => (bytes, true),
                None => return Ok(None),
            },
        };
        let mut out = vec![0; (entry.uncompressed.end - entry.uncompressed.start) as usize];
        let window = self.files.ztoc().get(entry.window.clone()).unwrap_or_default();
        match inflate::inflate_span(entry.bits, window, &compressed, 0, &mut out) {
            Ok(()) => Ok(Some(out.into())),
            Err(error) => self.suspect(span, entry, was_on_disk, &error).map(|()| None),
        }
    }

    /// Keeps an inflated span in the scratch file, after its reader was answered: writing it takes as long as inflating it.
    fn spill(&self, span: usize, bytes: Bytes, memory: Option<OwnedSemaphorePermit>) {
        if let (Some(layer), Some(_)) = (self.arc(), self.shared().scratch()) {
            self.shared().runtime.spawn_blocking(move || {
                let _memory = memory;
                if let Some(scratch) = layer.shared().scratch() {
                    scratch.put((layer.number, span), &bytes, Put::Wanted);
                }
            });
        }
    }

    /// A part of a span that was inflated before and is still in the scratch file.
    async fn spilled(&self, span: usize, part: &Range<u64>) -> Option<Bytes> {
        let key = (self.number, span);
        if !self.shared().scratch()?.holds(key) {
            return None;
        }
        let part = part.clone();
        let read = self.blocking(move |layer| Ok(layer.shared().scratch().and_then(|scratch| scratch.read(key, part))));
        read.await.ok().flatten()
    }

    /// Inflates `span` into the scratch file while there is room, for the thread that does this with idle time.
    pub(super) fn inflate_ahead(&self, span: usize) {
        let (Ok(entry), Some(scratch)) = (self.entry(span), self.shared().scratch()) else { return };
        let (length, key) = (entry.uncompressed.end - entry.uncompressed.start, (self.number, span));
        let is_ordinary = matches!(self.way(entry), Way::Ordinary);
        if length == 0 || !is_ordinary || !scratch.has_room(length) || scratch.holds(key) || self.is_removed() {
            return;
        }
        let Some(compressed) = self.load(span, entry) else { return };
        let mut out = vec![0; length as usize];
        let window = self.files.ztoc().get(entry.window.clone()).unwrap_or_default();
        // What does not inflate is left for a reader to find.
        if inflate::inflate_span(entry.bits, window, &compressed, 0, &mut out).is_ok() {
            scratch.put(key, &out, Put::Ahead);
        }
    }

    /// The compressed bytes of a span that is present, checked when this process reads it for the first time. None if they are damaged.
    fn load(&self, span: usize, entry: &Span) -> Option<Bytes> {
        let _held = self.hold(span)?;
        let mut bytes = vec![0; (entry.compressed.end - entry.compressed.start) as usize];
        let trouble = match self.files.read(entry.compressed.start, &mut bytes) {
            Ok(()) if self.is_checked(span) || Digest::of(&bytes) == entry.digest => {
                self.set_checked(span, true);
                return Some(bytes.into());
            }
            Ok(()) => None,
            Err(error) => Some(error),
        };
        self.damaged(span, trouble.as_ref());
        None
    }

    /// `span` does not inflate. Where its bytes have changed on disk since they were checked it is worth another try.
    pub(super) fn suspect(
        &self,
        span: usize,
        entry: &Span,
        was_on_disk: bool,
        error: &InflateError,
    ) -> Result<(), ReadError> {
        if was_on_disk {
            self.set_checked(span, false);
            if !self.is_good(span, entry) {
                return Ok(());
            }
        }
        Err(ReadError::Inflate { span, reason: error.to_string() })
    }

    /// A part of a span that is not compressed.
    async fn plain(&self, span: usize, part: Range<u64>) -> Result<Bytes, ReadError> {
        let start = self.entry(span)?.compressed.start;
        let length = (part.end - part.start) as usize;
        for _ in 0..TRIES {
            match self.here(span).await {
                Ok(Arrival::Bytes(bytes)) => {
                    let range = part.start as usize..part.end as usize;
                    let inside = bytes.get(range.clone()).is_some();
                    return inside.then(|| bytes.slice(range)).ok_or(ReadError::OutOfRange { range: part });
                }
                Ok(Arrival::OnDisk) => {}
                Err(ReadError::Storage { .. }) if self.span_bytes(span) > MAX_BUFFERED => {
                    return self.in_passing(span, part).await;
                }
                // It shared its request with a large one; alone it needs no disk.
                Err(ReadError::Storage { .. }) => continue,
                Err(error) => return Err(error),
            }
            if !self.is_checked(span) {
                // One reader checks, the others wait for it; a span may be a gigabyte.
                let guard = self.checking.clone().lock_owned().await;
                let checked = self.blocking(move |layer| {
                    let _guard = guard;
                    Ok(layer.is_good(span, layer.entry(span)?))
                });
                if !checked.await? {
                    continue;
                }
            }
            let read = self.blocking(move |layer| {
                let mut out = vec![0; length];
                let Some(_held) = layer.hold(span) else { return Err(evicted(span)) };
                let result = layer.files.read(start + part.start, &mut out).map_err(|e| storage(&e));
                if result.is_err() {
                    layer.discard(span);
                }
                result.map(|()| Bytes::from(out))
            });
            match read.await {
                Err(ReadError::Storage { .. }) => continue,
                result => return result,
            }
        }
        Err(ReadError::Storage { reason: format!("span {span} does not survive on disk") })
    }

    fn way(&self, entry: &Span) -> Way {
        let size = |range: &Range<u64>| range.end - range.start;
        match self.table.compression {
            Compression::Uncompressed => Way::Plain,
            Compression::Gzip if size(&entry.uncompressed).max(size(&entry.compressed)) > MAX_IN_MEMORY => Way::Large,
            Compression::Gzip => Way::Ordinary,
        }
    }

    async fn read_part(&self, span: usize, range: &Range<u64>) -> Result<Bytes, ReadError> {
        let entry = self.entry(span)?;
        let part = part(entry, range);
        match self.way(entry) {
            Way::Plain => self.plain(span, part).await,
            Way::Large => self.large(span, part).await,
            Way::Ordinary => {
                if let Some(inflated) = self.shared().cache.get((self.number, span)) {
                    return Ok(inflated.slice(part.start as usize..part.end as usize));
                }
                if let Some(bytes) = self.spilled(span, &part).await {
                    return Ok(bytes);
                }
                let inflated = self.shared().cache.get_or_inflate((self.number, span), || self.inflated(span)).await?;
                Ok(inflated.slice(part.start as usize..part.end as usize))
            }
        }
    }

    /// Tells the scheduler what is likely to be read after the spans from `first` to `last`.
    fn hint(&self, first: usize, last: usize) {
        let before = self.last_span.swap(last as u64, Ordering::Relaxed);
        if before == last as u64 {
            return;
        }
        let sequential = before != u64::MAX && (first as u64 == before || first as u64 == before + 1);
        let streak = if sequential { self.streak.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
        if !sequential {
            self.streak.store(0, Ordering::Relaxed);
        }
        let ahead = 1usize << streak.min(5);
        if let Some(layer) = self.arc() {
            self.shared().scheduler.near(&layer, last + 1..(last + 1 + ahead).min(self.table.spans.len()));
        }
    }
}

/// The part of `range` that lies in the span `entry`, relative to the span's start.
fn part(entry: &Span, range: &Range<u64>) -> Range<u64> {
    let start = range.start.max(entry.uncompressed.start) - entry.uncompressed.start;
    let end = range.end.min(entry.uncompressed.end).saturating_sub(entry.uncompressed.start);
    start.min(end)..end
}

impl LayerData for Layer {
    fn try_read(&self, range: Range<u64>) -> Option<Bytes> {
        if range.start >= range.end || range.end > self.table.uncompressed_size || self.refusal().is_some() {
            return None;
        }
        let spans = self.table.spans_of(range.clone());
        let (first, last) = (*spans.start(), *spans.end());
        if first != last {
            return None;
        }
        let part = part(self.table.spans.get(first)?, &range);
        let bytes = match self.shared().cache.get((self.number, first)) {
            Some(inflated) => inflated.slice(part.start as usize..part.end as usize),
            None => self.shared().scratch()?.try_read((self.number, first), part)?,
        };
        self.hint(first, last);
        Some(bytes)
    }

    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ReadError>> {
        Box::pin(async move {
            if let Some(refusal) = self.refusal() {
                return Err(refusal);
            }
            if range.start >= range.end {
                return Ok(Bytes::new());
            }
            if range.end > self.table.uncompressed_size {
                return Err(ReadError::OutOfRange { range });
            }
            let spans = self.table.spans_of(range.clone());
            let (first, last) = (*spans.start(), *spans.end());
            if let Some(error) = self.echo(first..=last) {
                return Err(error);
            }
            // Everything this read needs is asked for at once, as few requests.
            let runs = if self.is_removed() { Vec::new() } else { self.map().take_wanted(first..=last) };
            self.demand(runs);
            self.hint(first, last);
            if first == last {
                return self.read_part(first, &range).await;
            }
            let parts = futures::stream::iter(first..=last).map(|span| self.read_part(span, &range)).buffered(PARTS);
            let parts: Vec<Bytes> = parts.try_collect().await?;
            Ok(parts.concat().into())
        })
    }

    fn in_use(&self, file: Range<u64>, touched: u64) {
        if file.is_empty() || file.end > self.table.uncompressed_size {
            return;
        }
        let next = self.table.span_at(touched) + 1;
        let end = *self.table.spans_of(file).end() + 1;
        if let (true, Some(layer)) = (next < end, self.arc()) {
            self.shared().scheduler.near(&layer, next..end.min(next + IN_USE));
        }
    }

    fn fetched(&self) -> u64 {
        self.progress().0
    }
    fn compressed_size(&self) -> u64 {
        self.table.compressed_size
    }
    fn digest(&self) -> Digest {
        Layer::digest(self)
    }
}
