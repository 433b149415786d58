//! One lazily loaded layer: what of it is here, who waits for the rest, and where the rest comes from. How it is read is in `read`.
//!
//! Invariant: no byte leaves a layer that was not covered by a span digest of the zTOC.
//! Invariant: whoever waits for a span is told: that it is here, why it will not come, or that the layer was removed.
//! Lock order: the scheduler's state before `order` before `map`; all for moments, never across an await.

use super::{
    ahead::Ahead,
    cache::InflatedCache,
    files::LayerFiles,
    large::Placings,
    prior::{self, Ranked},
    receive::Partial,
    scheduler::Scheduler,
    scratch::Scratch,
    source::Source,
    spans::{self, SpanMap},
    toc::Toc,
    verdict::{Condemned, Verdict},
};
use crate::{
    fs::ReadError,
    oci::{Chain, Digest},
    sync::{Mutex, MutexGuard},
    ztoc::{Compression, Limits, Span, SpanTable},
};
use bytes::Bytes;
use std::{
    collections::HashMap,
    ops::{Range, RangeInclusive},
    sync::{
        Arc, OnceLock, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// A span of more bytes than this, compressed or not, is never held in memory whole; see `large`.
/// Eight of the default size: builders end a span at the first block boundary after `span_size`.
pub(super) const MAX_IN_MEMORY: u64 = 32 << 20;
/// Memory that may be used for inflating at a time, on the whole node, cached results not counted: a few spans of any size, and
/// more of the default size than there are cores.
const MAX_INFLATING: u64 = 4 * MAX_IN_MEMORY;
/// Requests for blocked readers in flight, per layer: a dead registry must not collect connections without end.
const MAX_DEMANDS: usize = 16;
/// Sources of one layer: images come and go, the newest few are enough.
const MAX_SOURCES: usize = 8;

/// The kernel asks again, twice, for a page of a read that failed, before the program is told. So long after a failure these get the same
/// answer, or the program would wait three times as long as the settings say. Longer than the kernel takes, shorter than anybody's
/// decision to try again.
const ECHO: Duration = Duration::from_millis(200);
/// Failures remembered for that, per layer.
const MAX_ECHOES: usize = 64;

/// How a span came to who waited for it.
#[derive(Debug, Clone)]
pub(super) enum Arrival {
    /// Its compressed bytes, so that a full disk fails nobody.
    Bytes(Bytes),
    /// It is in the blob.
    OnDisk,
}

type Waiter = oneshot::Sender<Result<Arrival, ReadError>>;

/// What all layers of a node share.
pub struct Shared {
    pub cache: InflatedCache,
    pub scheduler: Scheduler,
    pub runtime: tokio::runtime::Handle,
    pub observer: Arc<dyn super::Observer>,
    /// Kibibytes of [`MAX_INFLATING`].
    inflating: Arc<Semaphore>,
    /// Completed layers are read back one at a time: nobody waits for that.
    pub(super) completing: Semaphore,
    /// Where inflated spans go that memory has no room for.
    spill: Option<Spill>,
}

/// The second level behind the memory cache, and who fills it ahead of reads.
pub struct Spill {
    pub scratch: Scratch,
    pub ahead: Ahead,
}

impl Shared {
    pub fn new(
        cache: InflatedCache,
        scheduler: Scheduler,
        runtime: tokio::runtime::Handle,
        observer: Arc<dyn super::Observer>,
    ) -> Shared {
        let inflating = Arc::new(Semaphore::new((MAX_INFLATING >> 10) as usize));
        Shared { cache, scheduler, runtime, observer, inflating, completing: Semaphore::new(1), spill: None }
    }

    /// The same with a second level.
    pub fn spilling(self, spill: Spill) -> Shared {
        Shared { spill: Some(spill), ..self }
    }

    pub(super) fn scratch(&self) -> Option<&Scratch> {
        self.spill.as_ref().map(|spill| &spill.scratch)
    }

    /// Waits until so much memory may be used for inflating.
    pub(super) async fn memory(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let kibibytes = (bytes.min(MAX_INFLATING) >> 10) as u32;
        // Never closed.
        self.inflating.clone().acquire_many_owned(kibibytes).await.ok()
    }
}

/// A layer that is mounted, or about to be.
pub struct Layer {
    /// Number in this process; the cache's key.
    pub(super) number: u64,
    digest: Digest,
    pub(super) table: SpanTable,
    toc: Arc<Toc>,
    pub(super) files: LayerFiles,
    map: Mutex<SpanMap<Waiter>>,
    /// Spans whose digest was compared by this process, on arrival or on the first read from disk.
    checked: Vec<AtomicBool>,
    /// Held while a span that is read in pieces is checked.
    pub(super) checking: Arc<tokio::sync::Mutex<()>>,
    sources: RwLock<Vec<Arc<dyn Source>>>,
    order: Mutex<Order>,
    fetched: AtomicU64,
    /// When each span was read from disk last; see `Quota::now`.
    pub(super) read_at: Vec<AtomicU32>,
    /// Spans that are being read from the blob, and how often. Leaf lock.
    pub(super) held: Mutex<HashMap<usize, u32>>,
    /// Spans that could not be had a moment ago. Leaf lock.
    echoes: Mutex<HashMap<usize, (Instant, ReadError)>>,
    /// Large spans that were given up in the middle.
    partials: Mutex<HashMap<usize, Partial>>,
    pub(super) placings: Placings,
    pub(super) demands: Arc<Semaphore>,
    pub(super) last_span: AtomicU64,
    pub(super) streak: AtomicU64,
    pub(super) opened: Instant,
    removed: AtomicBool,
    /// What became of comparing the whole layer with its index.
    pub(super) verdict: OnceLock<Verdict>,
    /// It is being compared, so all of it has to stay. Changed under the map's lock.
    pub(super) judging: AtomicBool,
    /// How often its beginning was fetched again, because of what came of that.
    pub(super) doubts: AtomicU32,
    /// What images say of its diff ID. Leaf lock.
    pub(super) claims: std::sync::Mutex<Vec<Chain>>,
    pub(super) condemned: Arc<Condemned>,
    pub(super) limits: Limits,
    shared: Arc<Shared>,
    me: Weak<Layer>,
}

/// The streaming order and how far it was followed.
struct Order {
    ranking: Ranking,
    ranked: Vec<Ranked>,
    /// Everything before is present or taken; moved back when a span is lost.
    cursor: usize,
    /// Value of each span, by span.
    values: Vec<f32>,
}

/// What the streaming order is made of.
#[derive(Debug)]
pub enum Ranking {
    Known(Vec<Ranked>),
    /// The paths of all files, by [`prior::rank`], which takes longer than the rest of opening a layer: reads do not need it, so it is done when
    /// the background asks first.
    Later {
        interest: f32,
    },
    /// That is under way.
    Begun {
        interest: f32,
    },
}

impl Order {
    fn new(ranking: Ranking, spans: usize) -> Order {
        let mut order = Order { ranking, ranked: Vec::new(), cursor: 0, values: vec![0.0; spans] };
        if let Ranking::Known(ranked) = &mut order.ranking {
            let ranked = std::mem::take(ranked);
            order.fill(ranked);
        }
        order
    }

    fn fill(&mut self, ranked: Vec<Ranked>) {
        for rank in &ranked {
            if let Some(value) = self.values.get_mut(rank.span) {
                *value = rank.value;
            }
        }
        (self.ranking, self.ranked, self.cursor) = (Ranking::Known(Vec::new()), ranked, 0);
    }
}

/// The parts of a [`Layer`].
pub struct Parts {
    pub number: u64,
    pub digest: Digest,
    pub table: SpanTable,
    pub toc: Arc<Toc>,
    pub files: LayerFiles,
    pub ranking: Ranking,
    pub present: Vec<usize>,
    pub source: Arc<dyn Source>,
    /// What was found out before.
    pub verdict: Option<Verdict>,
    pub chain: Option<Chain>,
    pub condemned: Arc<Condemned>,
    /// Of its zTOC.
    pub limits: Limits,
}

impl Layer {
    /// A layer from its parts.
    pub fn new(parts: Parts, shared: Arc<Shared>) -> Arc<Layer> {
        let count = parts.table.spans.len();
        let fetched = parts.present.iter().map(|&span| share(&parts.table, span)).sum::<u64>();
        let layer = Arc::new_cyclic(|me| Layer {
            number: parts.number,
            digest: parts.digest,
            toc: parts.toc,
            files: parts.files,
            map: Mutex::new(SpanMap::new(count, parts.present.into_iter())),
            checked: (0..count).map(|_| AtomicBool::new(false)).collect(),
            checking: Arc::default(),
            sources: RwLock::new(vec![parts.source]),
            order: Mutex::new(Order::new(parts.ranking, count)),
            fetched: AtomicU64::new(fetched),
            read_at: (0..count).map(|_| AtomicU32::new(0)).collect(),
            held: Mutex::default(),
            echoes: Mutex::default(),
            partials: Mutex::default(),
            placings: Placings::default(),
            demands: Arc::new(Semaphore::new(MAX_DEMANDS)),
            last_span: AtomicU64::new(u64::MAX),
            streak: AtomicU64::new(0),
            table: parts.table,
            opened: Instant::now(),
            removed: AtomicBool::new(false),
            verdict: parts.verdict.map_or_else(OnceLock::new, OnceLock::from),
            judging: AtomicBool::new(false),
            doubts: AtomicU32::new(0),
            claims: std::sync::Mutex::new(parts.chain.into_iter().collect()),
            condemned: parts.condemned,
            limits: parts.limits,
            shared,
            me: me.clone(),
        });
        layer.shared.scheduler.quota().add(Arc::downgrade(&layer), fetched);
        layer.keep_quota();
        layer
    }

    /// Evicts, in a thread of its own, if it is time to.
    fn keep_quota(&self) {
        let scheduler = self.shared.scheduler.clone();
        if scheduler.quota().begin(&scheduler.settings().quota) {
            self.shared.runtime.spawn_blocking(move || scheduler.quota().evict(&scheduler.settings().quota));
        }
    }

    fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of each span. May take a while.
    pub(super) fn values(&self) -> Vec<f32> {
        self.rank();
        self.order().values.clone()
    }

    /// Works the streaming order out, if that has not been done.
    fn rank(&self) {
        let interest = match self.order().ranking {
            Ranking::Later { interest } | Ranking::Begun { interest } => interest,
            Ranking::Known(_) => return,
        };
        let ranked = prior::rank(&self.table, &self.toc, interest);
        self.order().fill(ranked);
    }

    /// Has it worked out by somebody else.
    fn rank_soon(&self) {
        let Some(layer) = self.arc() else { return };
        self.shared.runtime.spawn_blocking(move || {
            layer.rank();
            layer.shared.scheduler.wake();
        });
    }

    pub(super) fn is_being_judged(&self) -> bool {
        self.judging.load(Ordering::SeqCst)
    }

    /// `span` is not on disk any more.
    pub(super) fn left(&self, span: usize) {
        let bytes = share(&self.table, span);
        self.fetched.fetch_sub(bytes, Ordering::Relaxed);
        self.shared.scheduler.quota().shrank(bytes);
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
    /// None only while the layer is being dropped, when nobody asks.
    pub(super) fn arc(&self) -> Option<Arc<Layer>> {
        self.me.upgrade()
    }
    pub(super) fn map(&self) -> MutexGuard<'_, SpanMap<Waiter>> {
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
        sources.truncate(MAX_SOURCES);
    }
    pub(super) fn sources(&self) -> Vec<Arc<dyn Source>> {
        self.sources.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
    /// `source` will not have the layer: the others come before it from now on.
    pub(super) fn demote(&self, source: &Arc<dyn Source>) {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = sources.iter().position(|s| Arc::ptr_eq(s, source)) {
            let source = sources.remove(at);
            sources.push(source);
        }
    }

    /// The bytes of the blob to ask for to get `run`. The blob's header, which no digest covers, comes with span 0.
    pub(super) fn blob_range(&self, run: &Range<usize>) -> Range<u64> {
        let spans = self.table.spans.get(run.clone()).unwrap_or_default();
        let start = if run.start == 0 { 0 } else { spans.first().map_or(0, |span| span.compressed.start) };
        start..spans.last().map_or(start, |span| span.compressed.end)
    }
    /// Bytes of the blob that `span` shares with no other: spans may begin in the middle of a byte.
    pub(super) fn own_bytes(&self, span: usize) -> Range<u64> {
        let begin = |span: &Span| span.compressed.start + u64::from(span.bits != 0);
        let Some(entry) = self.table.spans.get(span) else { return 0..0 };
        let end = match self.table.spans.get(span + 1) {
            Some(next) if next.bits != 0 => next.compressed.start,
            _ => entry.compressed.end,
        };
        begin(entry)..end
    }

    pub(super) fn span_bytes(&self, span: usize) -> u64 {
        self.table.spans.get(span).map_or(0, |s| s.compressed.end - s.compressed.start)
    }

    /// The most valuable span that nobody has taken, and its value.
    pub(super) fn candidate(&self) -> Option<(usize, f32)> {
        if self.is_removed() {
            return None;
        }
        let mut order = self.order();
        match order.ranking {
            Ranking::Later { interest } => {
                order.ranking = Ranking::Begun { interest };
                drop(order);
                self.rank_soon();
                return None;
            }
            Ranking::Begun { .. } => return None,
            Ranking::Known(_) => {}
        }
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
        if self.is_removed() {
            return None;
        }
        let order = self.order();
        let least = order.values.get(first).copied().unwrap_or(0.0) / 2.0;
        let values = &order.values;
        let mut bytes = self.span_bytes(first);
        let mut map = self.map();
        map.take_run(first, |span| {
            bytes = bytes.saturating_add(self.span_bytes(span));
            bytes <= max_bytes && values.get(span).is_some_and(|value| *value >= least)
        })
    }

    /// Takes the first run of absent spans within `listed`, of at most `max_bytes`.
    pub(super) fn take_listed(&self, listed: Range<usize>, max_bytes: u64) -> Option<Range<usize>> {
        if self.is_removed() {
            return None;
        }
        let mut map = self.map();
        let first = listed.clone().find(|span| map.get(*span) == spans::Span::Absent)?;
        let mut bytes = self.span_bytes(first);
        map.take_run(first, |span| {
            bytes = bytes.saturating_add(self.span_bytes(span));
            span < listed.end && bytes <= max_bytes
        })
    }

    /// Whether this process has compared the digest of `span`, which is present.
    pub(super) fn is_checked(&self, span: usize) -> bool {
        self.checked.get(span).is_some_and(|checked| checked.load(Ordering::Acquire))
    }
    pub(super) fn set_checked(&self, span: usize, checked: bool) {
        if let Some(flag) = self.checked.get(span) {
            flag.store(checked, Ordering::Release);
        }
    }

    /// `span` is in the blob, whole and verified: tells the readers, remembers it.
    pub(super) fn arrived(&self, span: usize, arrival: Arrival) {
        self.set_checked(span, true);
        let (waiting, is_news, missing) = {
            let mut map = self.map();
            let is_news = map.get(span) != spans::Span::Present;
            (map.arrived(span), is_news, map.missing())
        };
        if !waiting.is_empty() {
            self.touch(span);
        }
        if waiting.is_empty()
            && self.table.compression == Compression::Gzip
            && let Some(spill) = &self.shared.spill
        {
            spill.ahead.arrived(self.me.clone(), span);
        }
        for waiter in waiting {
            let _ = waiter.send(Ok(arrival.clone()));
        }
        if is_news {
            let bytes = share(&self.table, span);
            self.fetched.fetch_add(bytes, Ordering::Relaxed);
            self.shared.scheduler.quota().grew(bytes);
            self.keep_quota();
            if missing == 0 {
                self.completed();
            }
        }
    }

    /// `span` arrived whole and verified, but there is no room for it: its readers get it, the next ones fetch it again.
    pub(super) fn not_kept(&self, span: usize, bytes: Bytes) {
        self.end_wait(span, || Ok(Arrival::Bytes(bytes.clone())));
    }

    /// `span` could not be had; whoever waits for it is told why.
    pub(super) fn lost(&self, span: usize, error: &ReadError) {
        self.end_wait(span, || Err(error.clone()));
    }

    fn end_wait(&self, span: usize, answer: impl Fn() -> Result<Arrival, ReadError>) {
        let waiting = self.map().lost(span);
        self.rewind();
        for waiter in waiting {
            let _ = waiter.send(answer());
        }
    }

    /// Gives back the spans of `run` that were taken and that nobody waits for; returns those that somebody does.
    pub(super) fn give_back(&self, run: Range<usize>, ticket: spans::Ticket) -> Vec<Range<usize>> {
        let mut wanted: Vec<Range<usize>> = Vec::new();
        let mut map = self.map();
        for span in run {
            if map.give_back(span, ticket) || map.get(span) != spans::Span::Fetching(ticket) {
                continue;
            }
            match wanted.last_mut() {
                Some(last) if last.end == span => last.end += 1,
                _ => wanted.push(span..span + 1),
            }
        }
        drop(map);
        self.rewind();
        wanted
    }

    pub(super) fn rewind(&self) {
        self.order().cursor = 0;
    }

    /// `span` on disk is not what it should be.
    pub(super) fn discard(&self, span: usize) {
        let _ = self.files.forget(span);
        self.set_checked(span, false);
        let was_here = {
            let mut map = self.map();
            let was_here = map.get(span) == spans::Span::Present;
            if was_here {
                // Nobody waits for what is present.
                map.lost(span);
            }
            was_here
        };
        if was_here {
            self.left(span);
            self.rewind();
            self.shared.scheduler.wake();
        }
    }

    /// `run` could not be had, after a long time.
    pub(super) fn remember_failure(&self, run: Range<usize>, error: &ReadError) {
        let (mut echoes, now) = (self.echoes.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        echoes.retain(|_, (at, _)| now.saturating_duration_since(*at) < ECHO);
        for span in run.take(MAX_ECHOES - echoes.len().min(MAX_ECHOES)) {
            echoes.insert(span, (now, error.clone()));
        }
    }

    /// Why one of `spans` could not be had a moment ago.
    pub(super) fn echo(&self, spans: RangeInclusive<usize>) -> Option<ReadError> {
        let echoes = self.echoes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut echoes = echoes.iter().filter(|(span, (at, _))| spans.contains(span) && at.elapsed() < ECHO);
        echoes.next().map(|(_, (_, error))| error.clone())
    }

    /// Where a large span was left, to go on there.
    pub(super) fn take_partial(&self, span: usize) -> Option<Partial> {
        self.partials.lock().unwrap_or_else(PoisonError::into_inner).remove(&span)
    }
    pub(super) fn leave_partial(&self, partial: Partial) {
        self.partials.lock().unwrap_or_else(PoisonError::into_inner).insert(partial.span, partial);
    }

    /// The last snapshot of the layer is gone: nothing more is fetched, and nobody waits any longer.
    pub(super) fn retire(&self) {
        self.removed.store(true, Ordering::SeqCst);
        // Who waits has looked at `removed` under this lock.
        let waiting = self.map().abandon();
        for waiter in waiting {
            let _ = waiter.send(Err(ReadError::Removed));
        }
    }
    pub(super) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::SeqCst)
    }

    /// What was inflated of it is not needed again.
    pub(super) fn forget_inflated(&self) {
        self.shared.cache.forget(self.number);
        if let Some(scratch) = self.shared.scratch() {
            scratch.forget(self.number);
        }
    }
}

/// The bytes of the blob that `span` accounts for, so that all of them make up the blob: the header goes with the first, and a byte
/// that two spans share with the second.
fn share(table: &SpanTable, span: usize) -> u64 {
    let start = |entry: &Span| entry.compressed.start;
    let own = if span == 0 { 0 } else { table.spans.get(span).map_or(0, start) };
    table.spans.get(span + 1).map_or(table.compressed_size, start).saturating_sub(own)
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.shared.scheduler.quota().shrank(self.fetched.load(Ordering::Relaxed));
        self.forget_inflated();
    }
}
