//! One lazily loaded layer: reads of uncompressed bytes become spans, spans become bytes on disk.
//!
//! ```text
//! read(range) ─▶ spans ─▶ inflated cache ─▶ blob on disk ─▶ fetch (demand), ahead of everything else
//!                  └────▶ what comes next, hinted to the scheduler
//! ```
//!
//! Invariant: no byte leaves this module that was not covered by a span digest of the zTOC.
//! Lock order: `order` before `map`, both for moments, never across an await.

use super::{
    cache::InflatedCache,
    files::{self, LayerFiles, OnDisk},
    prior::Ranked,
    scheduler::Scheduler,
    source::Source,
    spans::{self, SpanMap},
    toc::Toc,
};
use crate::{
    fs::{LayerData, ReadError},
    oci::Digest,
    ztoc::{Compression, Span, SpanTable},
};
use bytes::Bytes;
use futures::future::{BoxFuture, try_join_all};
use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};
use tokio::sync::oneshot;

/// A span of more uncompressed bytes than this is not held in memory whole; it is inflated as far as each read needs.
/// Four of the default size: builders end a span at the first block boundary after `span_size`.
const MAX_IN_MEMORY: u64 = 32 << 20;

/// What a waiting reader gets: the compressed bytes themselves, so that a full disk fails nobody.
pub(super) type Arrival = Result<Bytes, ReadError>;

/// What all layers of a node share.
pub struct Shared {
    pub cache: InflatedCache,
    pub scheduler: Scheduler,
    pub runtime: tokio::runtime::Handle,
    pub observer: Arc<dyn super::Observer>,
}

/// A layer that is mounted, or about to be.
pub struct Layer {
    /// Number in this process; the cache's key.
    number: u64,
    digest: Digest,
    table: SpanTable,
    toc: Arc<Toc>,
    files: LayerFiles,
    map: Mutex<SpanMap<oneshot::Sender<Arrival>>>,
    /// Spans whose digest was compared by this process, on arrival or on the first read from disk.
    checked: Vec<AtomicBool>,
    sources: RwLock<Vec<Arc<dyn Source>>>,
    order: Mutex<Order>,
    fetched: AtomicU64,
    last_span: AtomicU64,
    streak: AtomicU64,
    opened: Instant,
    shared: Arc<Shared>,
    me: Weak<Layer>,
}

/// The streaming order and how far it was followed.
pub(super) struct Order {
    ranked: Vec<Ranked>,
    /// Everything before is present or taken; moved back when a span is lost.
    cursor: usize,
    /// Value of each span, by span.
    values: Vec<f32>,
}

/// The parts of a [`Layer`].
pub struct Parts {
    pub number: u64,
    pub digest: Digest,
    pub table: SpanTable,
    pub toc: Arc<Toc>,
    pub files: LayerFiles,
    pub ranked: Vec<Ranked>,
    pub present: Vec<usize>,
    pub source: Arc<dyn Source>,
}

impl Layer {
    /// A layer from its parts.
    pub fn new(parts: Parts, shared: Arc<Shared>) -> Arc<Layer> {
        let count = parts.table.spans.len();
        let mut values = vec![0.0; count];
        let ranked = parts.ranked;
        for rank in &ranked {
            if let Some(value) = values.get_mut(rank.span) {
                *value = rank.value;
            }
        }
        let span_bytes = |i: &usize| parts.table.spans.get(*i).map_or(0, |s| s.compressed.end - s.compressed.start);
        let fetched = parts.present.iter().map(|i| span_bytes(i)).sum::<u64>();
        Arc::new_cyclic(|me| Layer {
            number: parts.number,
            digest: parts.digest,
            toc: parts.toc,
            files: parts.files,
            map: Mutex::new(SpanMap::new(count, parts.present.into_iter())),
            checked: (0..count).map(|_| AtomicBool::new(false)).collect(),
            sources: RwLock::new(vec![parts.source]),
            order: Mutex::new(Order { ranked, cursor: 0, values }),
            fetched: AtomicU64::new(fetched),
            last_span: AtomicU64::new(u64::MAX),
            streak: AtomicU64::new(0),
            table: parts.table,
            opened: Instant::now(),
            shared,
            me: me.clone(),
        })
    }

    pub fn digest(&self) -> Digest {
        self.digest
    }
    pub fn toc(&self) -> &Arc<Toc> {
        &self.toc
    }
    pub fn files(&self) -> &LayerFiles {
        &self.files
    }
    pub fn table(&self) -> &SpanTable {
        &self.table
    }
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
    fn arc(&self) -> Option<Arc<Layer>> {
        self.me.upgrade()
    }
    pub(super) fn map(&self) -> MutexGuard<'_, SpanMap<oneshot::Sender<Arrival>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether every span is here.
    pub fn is_complete(&self) -> bool {
        self.map().missing() == 0
    }
    /// Compressed bytes that are here, and the size of the blob.
    pub fn progress(&self) -> (u64, u64) {
        (self.fetched.load(Ordering::Relaxed).min(self.table.compressed_size), self.table.compressed_size)
    }

    /// Another place to get the blob from, tried before those known.
    pub fn add_source(&self, source: Arc<dyn Source>) {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        sources.insert(0, source);
        // Images come and go; the newest few are enough.
        sources.truncate(8);
    }
    pub(super) fn sources(&self) -> Vec<Arc<dyn Source>> {
        self.sources.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The bytes of the blob to ask for to get `run`. The blob's header, which no digest covers, comes with span 0.
    pub(super) fn blob_range(&self, run: &Range<usize>) -> Range<u64> {
        let start = if run.start == 0 { 0 } else { self.table.spans[run.start].compressed.start };
        start..self.table.spans[run.end - 1].compressed.end
    }
    pub(super) fn span_bytes(&self, span: usize) -> u64 {
        self.table.spans.get(span).map_or(0, |s| s.compressed.end - s.compressed.start)
    }

    /// The most valuable span that nobody has taken, and its value.
    pub(super) fn candidate(&self) -> Option<(usize, f32)> {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let map = self.map();
        while let Some(&Ranked { span, value }) = order.ranked.get(order.cursor) {
            if map.get(span) == spans::Span::Absent {
                return Some((span, value));
            }
            order.cursor += 1;
        }
        None
    }

    /// Takes a run of absent spans that starts at `first`: at most `max_bytes`, of neighbours worth at least half as much.
    pub(super) fn take_background(&self, first: usize, max_bytes: u64) -> Option<Range<usize>> {
        let order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let least = order.values.get(first).copied().unwrap_or(0.0) / 2.0;
        let values = &order.values;
        let mut bytes = self.span_bytes(first);
        let mut map = self.map();
        map.take_run(first, |span| {
            bytes += self.span_bytes(span);
            bytes <= max_bytes && values[span] >= least
        })
    }

    /// Takes the first run of absent spans within `listed`, of at most `max_bytes`.
    pub(super) fn take_listed(&self, listed: Range<usize>, max_bytes: u64) -> Option<Range<usize>> {
        let mut map = self.map();
        let first = listed.clone().find(|span| map.get(*span) == spans::Span::Absent)?;
        let mut bytes = self.span_bytes(first);
        map.take_run(first, |span| {
            bytes += self.span_bytes(span);
            span < listed.end && bytes <= max_bytes
        })
    }

    /// `span` arrived whole and verified: tells the readers, remembers it.
    pub(super) fn arrived(&self, span: usize, bytes: Bytes) {
        self.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.checked[span].store(true, Ordering::Relaxed);
        let (waiting, missing) = {
            let mut map = self.map();
            (map.arrived(span), map.missing())
        };
        for waiter in waiting {
            let _ = waiter.send(Ok(bytes.clone()));
        }
        if missing == 0 {
            self.completed();
        }
    }

    /// `span` arrived whole and verified, but there is no room for it: its readers get it, the next ones fetch it again.
    pub(super) fn not_kept(&self, span: usize, bytes: Bytes) {
        let waiting = self.map().lost(span);
        for waiter in waiting {
            let _ = waiter.send(Ok(bytes.clone()));
        }
        if let Some(layer) = self.arc() {
            self.shared.scheduler.failed(&layer);
        }
    }

    /// Gives back the spans of `run` that were taken and that nobody waits for; returns those that somebody does.
    pub(super) fn give_back(&self, run: Range<usize>) -> Vec<usize> {
        let wanted = {
            let mut map = self.map();
            run.filter(|span| !map.give_back(*span) && map.get(*span) == spans::Span::Fetching).collect()
        };
        self.order.lock().unwrap_or_else(PoisonError::into_inner).cursor = 0;
        wanted
    }

    /// `span` could not be had; whoever waits for it is told why.
    pub(super) fn lost(&self, span: usize, error: Option<&ReadError>) {
        let waiting = self.map().lost(span);
        self.order.lock().unwrap_or_else(PoisonError::into_inner).cursor = 0;
        for waiter in waiting {
            let error = error.cloned().unwrap_or(ReadError::Fetch { reason: "the fetch was given up".into() });
            let _ = waiter.send(Err(error));
        }
    }

    /// All spans are here: compares the whole blob with the layer's digest, once, beside everything else.
    fn completed(&self) {
        let Some(layer) = self.arc() else { return };
        self.shared.runtime.spawn_blocking(move || {
            match layer.files.blob_digest(layer.table.compressed_size) {
                Ok(digest) if digest == layer.digest => {
                    tracing::debug!(layer = %layer.digest, "layer complete, its digest matches");
                }
                Ok(digest) => tracing::error!(
                    layer = %layer.digest, found = %digest,
                    "every span of the layer matches its zTOC, but the layer does not match its digest: the SOCI index is wrong; rebuild and push it"
                ),
                Err(error) => tracing::warn!(layer = %layer.digest, error = %error, "cannot read the completed layer back"),
            }
            layer.shared.observer.layer_complete(&layer, layer.opened.elapsed());
        });
    }

    /// The compressed bytes of `span`, fetched if need be.
    async fn compressed(&self, span: usize) -> Result<Option<Bytes>, ReadError> {
        let (receiver, runs) = {
            let mut map = self.map();
            if map.get(span) == spans::Span::Present {
                return Ok(None);
            }
            let runs = map.take_wanted(span..=span);
            let (sender, receiver) = oneshot::channel();
            map.wait(span, sender);
            (receiver, runs)
        };
        self.demand(runs);
        match receiver.await {
            Ok(arrival) => arrival.map(Some),
            Err(_) => Err(ReadError::Fetch { reason: "the daemon is stopping".into() }),
        }
    }

    /// Starts fetching `runs` at once.
    fn demand(&self, runs: Vec<Range<usize>>) {
        let Some(layer) = self.arc() else { return };
        for run in runs {
            self.shared.observer.demand_fetch(&self.digest, run.len());
            self.shared.scheduler.demand(layer.clone(), run);
        }
    }

    /// The compressed bytes of a span that is present; checks the digest the first time this process reads it.
    fn from_disk(&self, span: usize) -> Result<Option<Vec<u8>>, ReadError> {
        let entry = &self.table.spans[span];
        let check = !self.checked[span].load(Ordering::Relaxed);
        match self.files.read_span(entry, check) {
            Ok(OnDisk::Good(bytes)) => {
                self.checked[span].store(true, Ordering::Relaxed);
                Ok(Some(bytes))
            }
            Ok(OnDisk::Damaged) => {
                tracing::warn!(layer = %self.digest, span, "span on disk is damaged, fetching it again");
                self.discard(span);
                Ok(None)
            }
            Err(error) => {
                tracing::warn!(layer = %self.digest, span, error = %error, "span on disk cannot be read, fetching it again");
                self.discard(span);
                Ok(None)
            }
        }
    }

    fn discard(&self, span: usize) {
        let _ = self.files.forget(span);
        self.fetched.fetch_sub(self.span_bytes(span), Ordering::Relaxed);
        self.lost(span, None);
    }

    /// Bytes `[skip, skip + length)` of `span`, uncompressed, in a thread that may block.
    async fn uncompressed(&self, span: usize, skip: u64, length: u64) -> Result<Bytes, ReadError> {
        let layer = self.arc().ok_or(ReadError::Fetch { reason: "the layer is being removed".into() })?;
        // A damaged span is fetched again at most as often as it takes to know that the disk is the trouble.
        for _ in 0..3 {
            let asked = Instant::now();
            let fetched = self.compressed(span).await?;
            let waited = asked.elapsed();
            let layer = layer.clone();
            let inflating = self.shared.runtime.spawn_blocking(move || {
                let on_disk;
                let compressed: &[u8] = match &fetched {
                    Some(bytes) => bytes,
                    None => match layer.from_disk(span)? {
                        Some(bytes) => {
                            on_disk = bytes;
                            &on_disk
                        }
                        None => return Ok(None),
                    },
                };
                let mut out = vec![0; length as usize];
                files::inflate(&layer.table, &layer.table.spans[span], layer.files.ztoc(), compressed, skip, &mut out)
                    .map_err(|e| ReadError::Inflate { span, reason: e.to_string() })?;
                Ok(Some(Bytes::from(out)))
            });
            match inflating.await {
                Ok(Ok(Some(bytes))) => {
                    tracing::debug!(layer = %self.digest, span, waited = ?waited, took = ?asked.elapsed(), "span inflated");
                    return Ok(bytes);
                }
                Ok(Ok(None)) => continue,
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(ReadError::Fetch { reason: "the daemon is stopping".into() }),
            }
        }
        Err(ReadError::Fetch { reason: format!("span {span} does not survive on disk") })
    }

    fn key(&self, span: usize) -> super::cache::Key {
        (self.number, span)
    }

    fn entry(&self, span: usize) -> Result<&Span, ReadError> {
        self.table.spans.get(span).ok_or(ReadError::OutOfRange { range: 0..0 })
    }

    /// The part of `range` that lies in `span`, relative to the span's start.
    fn part(entry: &Span, range: &Range<u64>) -> Range<u64> {
        let start = range.start.max(entry.uncompressed.start) - entry.uncompressed.start;
        let end = range.end.min(entry.uncompressed.end).saturating_sub(entry.uncompressed.start);
        start..end.max(start)
    }

    async fn read_part(&self, span: usize, range: &Range<u64>) -> Result<Bytes, ReadError> {
        let entry = self.entry(span)?;
        let part = Self::part(entry, range);
        let whole = entry.uncompressed.end - entry.uncompressed.start;
        if self.table.compression == Compression::Uncompressed || whole > MAX_IN_MEMORY {
            return self.uncompressed(span, part.start, part.end - part.start).await;
        }
        let inflated = self.shared.cache.get_or_inflate(self.key(span), || self.uncompressed(span, 0, whole)).await?;
        Ok(inflated.slice(part.start as usize..part.end as usize))
    }

    /// Tells the scheduler what is likely to be read after `spans`.
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
            self.shared.scheduler.near(&layer, last + 1..(last + 1 + ahead).min(self.table.spans.len()));
        }
    }
}

impl LayerData for Layer {
    fn try_read(&self, range: Range<u64>) -> Option<Bytes> {
        if range.start >= range.end || range.end > self.table.uncompressed_size {
            return None;
        }
        let spans = self.table.spans_of(range.clone());
        let (first, last) = (*spans.start(), *spans.end());
        if first == last {
            let inflated = self.shared.cache.get(self.key(first))?;
            let part = Self::part(self.table.spans.get(first)?, &range);
            self.hint(first, last);
            return Some(inflated.slice(part.start as usize..part.end as usize));
        }
        None
    }

    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ReadError>> {
        Box::pin(async move {
            if range.start >= range.end {
                return Ok(Bytes::new());
            }
            if range.end > self.table.uncompressed_size {
                return Err(ReadError::OutOfRange { range });
            }
            let spans = self.table.spans_of(range.clone());
            let (first, last) = (*spans.start(), *spans.end());
            // Everything this read needs is asked for at once, as few requests.
            let runs = self.map().take_wanted(first..=last);
            self.demand(runs);
            self.hint(first, last);
            if first == last {
                return self.read_part(first, &range).await;
            }
            let parts = try_join_all((first..=last).map(|span| self.read_part(span, &range))).await?;
            Ok(parts.concat().into())
        })
    }

    fn fetched(&self) -> u64 {
        self.progress().0
    }
    fn compressed_size(&self) -> u64 {
        self.table.compressed_size
    }
    fn digest(&self) -> Digest {
        self.digest
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.shared.cache.forget(self.number);
    }
}
