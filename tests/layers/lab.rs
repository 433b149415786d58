//! Layers with all their zTOCs, a source that does what a test says, and a store to put both into.

pub use crate::formats::tar_writer::{Dialect, Member, TarWriter};
use bytes::Bytes;
use flate2::{Compression as Level, write::GzEncoder};
use futures::future::BoxFuture;
use soci::{
    layers::{
        Ahead, Body, InflatedCache, Layer, LayerStore, Observer, OpenError, Pace, Persistence, QuotaSettings, Remedy,
        Scheduler, Scratch, Settings, Shared, Source, SourceError, Spill, Verdict, Wanted,
    },
    layout::{Layout, SnapshotId},
    oci::Digest,
    registry::HostId,
    ztoc::{self, BuildOptions, Compression, Limits},
};
use std::{
    fs,
    io::Write,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Bytes that compress a little, different for each seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..len).map(|at| if at / 50 % 3 == 0 { b'a' + (at % 7) as u8 } else { random.next() as u8 & 0x3f }).collect()
}

/// Bytes that don't compress.
pub fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.next() as u8).collect()
}

/// xorshift: the same numbers on every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    /// A range of at most `longest` bytes, not empty, of the first `size`.
    pub fn range(&mut self, size: u64, longest: u64) -> Range<u64> {
        let start = self.below(size);
        start..(start + 1 + self.below(longest)).min(size)
    }
}

/// A tar of `files` files of `size` bytes of noise.
pub fn tar(seed: u64, files: usize, size: usize) -> Vec<u8> {
    let file = |n: usize| Member::file(format!("dir/file{n}"), noise(seed + n as u64, size));
    TarWriter::of(Dialect::Pax, &(0..files).map(file).collect::<Vec<_>>())
}

pub fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A layer with its zTOC.
#[derive(Clone)]
pub struct Image {
    pub tar: Bytes,
    pub blob: Bytes,
    pub ztoc: Bytes,
    pub layer: Digest,
    pub spans: Vec<ztoc::Span>,
    /// Of the tar, as far as the zTOC goes.
    pub size: u64,
}

impl Image {
    pub fn of(tar: Vec<u8>, blob: Vec<u8>, compression: Compression, span_size: u64) -> Image {
        let options = BuildOptions { span_size, ..BuildOptions::default() };
        let built = ztoc::build(&blob[..], compression, &options).unwrap();
        let parsed = ztoc::Ztoc::parse(&built.bytes, &Limits::default()).unwrap();
        let (spans, size) = (parsed.spans().spans.clone(), parsed.spans().uncompressed_size);
        let layer = built.layer_digest;
        Image { tar: tar.into(), blob: blob.into(), ztoc: built.bytes.into(), layer, spans, size }
    }
    /// Gzip with spans of about `span_size`, most of which begin inside a byte.
    pub fn gzip(seed: u64, span_size: u64) -> Image {
        let tar = tar(seed, 20, 60_000);
        let blob = gzip(&tar, 6);
        Image::of(tar, blob, Compression::Gzip, span_size)
    }
    /// Gzip of that many files of `size` bytes of noise.
    pub fn of_noise(seed: u64, files: usize, size: usize, span_size: u64) -> Image {
        let tar = tar(seed, files, size);
        let blob = gzip(&tar, 6);
        let image = Image::of(tar, blob, Compression::Gzip, span_size);
        assert!(image.spans.len() > 4, "faster levels write one block, and so one span");
        image
    }
    pub fn plain(seed: u64, span_size: u64) -> Image {
        let tar = tar(seed, 20, 60_000);
        Image::of(tar.clone(), tar, Compression::Uncompressed, span_size)
    }
    /// Where a byte in the middle of `span` is in the blob.
    pub fn middle(&self, span: usize) -> u64 {
        let range = &self.spans[span].compressed;
        (range.start + range.end) / 2
    }
    /// Uncompressed bytes of `span`.
    pub fn of_span(&self, span: usize) -> Range<u64> {
        self.spans[span].uncompressed.clone()
    }
    pub fn bytes(&self, range: Range<u64>) -> &[u8] {
        &self.tar[range.start as usize..range.end as usize]
    }
}

/// What was asked of a [`Script`].
#[derive(Debug, Clone)]
pub struct Request {
    pub number: usize,
    pub range: Range<u64>,
    pub avoid: Vec<HostId>,
    pub at: Instant,
}

/// What a [`Script`] does about a request.
#[derive(Clone, Default)]
pub struct Act {
    pub refuse: Option<Remedy>,
    pub open_delay: Duration,
    pub host: Option<HostId>,
    /// Bytes of the blob that are changed on the way.
    pub corrupt: Vec<u64>,
    /// The body ends after so many bytes, as if that were all.
    pub cut: Option<u64>,
    /// Nothing comes after so many bytes.
    pub stall: Option<u64>,
    /// Bytes per chunk; 0 for the usual 16 KiB.
    pub chunk: usize,
    /// Before each chunk.
    pub delay: Duration,
    /// Sent after the last byte that was asked for.
    pub extra: usize,
    pub panic: bool,
}

type Behaviour = Box<dyn Fn(&Request) -> Act + Send + Sync>;

/// A source that has a blob in memory and does what it is told.
pub struct Script {
    blob: Bytes,
    behaviour: Behaviour,
    log: Mutex<Vec<Request>>,
    sent: Arc<AtomicUsize>,
    place: Place,
}

/// Where a [`Script`] is. What is remote is asked for in several pieces by readers that wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Here,
    Remote,
}

impl Script {
    pub fn new(image: &Image, behaviour: impl Fn(&Request) -> Act + Send + Sync + 'static) -> Arc<Script> {
        Script::at(Place::Here, image, behaviour)
    }
    pub fn at(place: Place, image: &Image, behaviour: impl Fn(&Request) -> Act + Send + Sync + 'static) -> Arc<Script> {
        Arc::new(Script {
            place,
            blob: image.blob.clone(),
            behaviour: Box::new(behaviour),
            log: Mutex::default(),
            sent: Arc::default(),
        })
    }
    pub fn good(image: &Image) -> Arc<Script> {
        Script::new(image, |_| Act::default())
    }
    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }
    /// How often the byte at `offset` of the blob was asked for.
    pub fn asked_for(&self, offset: u64) -> usize {
        self.requests().iter().filter(|request| request.range.contains(&offset)).count()
    }
    pub fn sent(&self) -> usize {
        self.sent.load(Ordering::SeqCst)
    }
}

impl Source for Script {
    fn open<'a>(&'a self, range: Range<u64>, avoid: &'a [HostId]) -> BoxFuture<'a, Result<Box<dyn Body>, SourceError>> {
        Box::pin(async move {
            let request = {
                let mut log = self.log.lock().unwrap();
                let (number, avoid) = (log.len(), avoid.to_vec());
                log.push(Request { number, range: range.clone(), avoid, at: Instant::now() });
                log[number].clone()
            };
            let act = (self.behaviour)(&request);
            assert!(!act.panic, "the source panics, as it was told");
            tokio::time::sleep(act.open_delay).await;
            if let Some(remedy) = act.refuse {
                return Err(SourceError { reason: "refused, as told".into(), remedy });
            }
            let mut data = self.blob.slice(range.start as usize..range.end as usize);
            if !act.corrupt.is_empty() || act.extra > 0 {
                let mut changed = data.to_vec();
                for offset in act.corrupt.iter().filter(|offset| range.contains(offset)) {
                    changed[(offset - range.start) as usize] ^= 0x55;
                }
                changed.resize(changed.len() + act.extra, 0);
                data = changed.into();
            }
            Ok(Box::new(Sending { data, at: 0, act, sent: self.sent.clone() }) as Box<dyn Body>)
        })
    }

    fn is_remote(&self) -> bool {
        self.place == Place::Remote
    }
}

struct Sending {
    data: Bytes,
    at: usize,
    act: Act,
    sent: Arc<AtomicUsize>,
}

impl Body for Sending {
    fn chunk(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        Box::pin(async move {
            let limit = |bytes: Option<u64>| bytes.map_or(usize::MAX, |n| n as usize);
            let (cut, stall) = (limit(self.act.cut), limit(self.act.stall));
            if self.at >= stall {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(self.act.delay).await;
            let step = if self.act.chunk == 0 { 16 << 10 } else { self.act.chunk };
            let end = (self.at + step).min(self.data.len()).min(cut).min(stall);
            if self.at >= end {
                return Ok(None);
            }
            let chunk = self.data.slice(self.at..end);
            self.at = end;
            self.sent.fetch_add(chunk.len(), Ordering::SeqCst);
            Ok(Some(chunk))
        })
    }
    fn host(&self) -> Option<HostId> {
        self.act.host.clone()
    }
}

/// A source that must not be needed.
pub struct Unneeded;

impl Source for Unneeded {
    fn open<'a>(&'a self, range: Range<u64>, _: &'a [HostId]) -> BoxFuture<'a, Result<Box<dyn Body>, SourceError>> {
        panic!("bytes {range:?} are here and were asked for nevertheless");
    }
    fn is_remote(&self) -> bool {
        true
    }
}

/// Nothing in the background, and quick to give up.
pub fn quiet() -> Settings {
    Settings {
        pace: Pace::Off,
        max_bytes_per_sec: None,
        retries: 3,
        persistence: Persistence::Retries,
        min_wait: Duration::from_millis(2),
        max_wait: Duration::from_millis(20),
        budget: Duration::from_secs(20),
        verification_retries: 2,
        quota: QuotaSettings::UNLIMITED,
    }
}

pub fn streaming() -> Settings {
    Settings { pace: Pace::LineRate, ..quiet() }
}

/// What an [`Observer`] was told.
#[derive(Default)]
pub struct Seen {
    pub complete: AtomicUsize,
    pub contradictions: AtomicUsize,
    pub background_failures: AtomicUsize,
    pub evicted: AtomicUsize,
}

impl Observer for Seen {
    fn background_failed(&self, _: &Digest) {
        self.background_failures.fetch_add(1, Ordering::SeqCst);
    }
    fn evicted(&self, _: &Digest, _: u64) {
        self.evicted.fetch_add(1, Ordering::SeqCst);
    }
    fn layer_complete(&self, _: &Layer, _: Duration) {
        self.complete.fetch_add(1, Ordering::SeqCst);
    }
    fn layer_examined(&self, layer: &Layer) {
        if let Some(Verdict::Contradicts { .. }) = layer.verdict() {
            self.contradictions.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Too small for any layer here, so that spans are inflated again.
const CACHE: u64 = 200_000;

/// A store with a scheduler that runs: one life of the daemon.
pub struct Lab {
    pub layout: Layout,
    pub store: Arc<LayerStore>,
    pub seen: Arc<Seen>,
    pub scheduler: Scheduler,
    running: tokio::task::JoinHandle<()>,
}

impl Lab {
    /// The daemon starts with what is at `root`.
    pub fn at(root: &Path, settings: Settings) -> Lab {
        Lab::sharing(root, settings, |shared| shared)
    }

    /// The same with a scratch file of that size.
    pub fn spilling(root: &Path, settings: Settings, bytes: u64) -> Lab {
        let scratch = Scratch::create(root, bytes).unwrap();
        Lab::sharing(root, settings, |shared| shared.spilling(Spill { scratch, ahead: Ahead::start().unwrap() }))
    }

    fn sharing(root: &Path, settings: Settings, with: impl FnOnce(Shared) -> Shared) -> Lab {
        let layout = Layout::new(root);
        let (seen, scheduler) =
            (Arc::new(Seen::default()), Scheduler::new(settings, soci::registry::Throttle::new(None)));
        let runtime = tokio::runtime::Handle::current();
        let cache = InflatedCache::new(CACHE);
        let shared = with(Shared::new(cache, scheduler.clone(), runtime, seen.clone()));
        let store = Arc::new(LayerStore::new(layout.clone(), Arc::new(shared), Limits::default()));
        let running = tokio::spawn(scheduler.clone().run());
        Lab { layout, store, seen, scheduler, running }
    }

    pub fn wanted(&self, image: &Image, source: Arc<dyn Source>) -> Wanted {
        let ztoc = Digest::of(&image.ztoc);
        let ztoc_path = self.layout.content_blob(&ztoc);
        // As the content store does it: whole, or not under its name; what a crash has torn is fetched again.
        if fs::read(&ztoc_path).ok().map(|bytes| Digest::of(&bytes)) != Some(ztoc) {
            fs::create_dir_all(ztoc_path.parent().unwrap()).unwrap();
            static NEXT: AtomicUsize = AtomicUsize::new(0);
            let new = ztoc_path.with_extension(format!("new{}", NEXT.fetch_add(1, Ordering::Relaxed)));
            fs::write(&new, &image.ztoc).unwrap();
            fs::rename(new, &ztoc_path).unwrap();
        }
        Wanted { layer: image.layer, ztoc, ztoc_path, depth: 0, source, chain: None }
    }

    pub async fn try_open(&self, image: &Image, source: Arc<dyn Source>, user: u32) -> Result<Arc<Layer>, OpenError> {
        let layer = self.store.open(self.wanted(image, source), SnapshotId(user)).await?;
        self.scheduler.add(&layer);
        Ok(layer)
    }

    pub async fn open(&self, image: &Image, source: Arc<dyn Source>) -> Arc<Layer> {
        self.try_open(image, source, 1).await.unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// Waits until `is_so`, or fails the test.
pub async fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The result of `work`, which must not take longer than `limit`.
pub async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(limit, work).await.expect("it took too long")
}

/// Long enough for whatever ends at all, on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);
