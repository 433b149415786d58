//! Readers, the background and fetches that come to nothing, in every order of their steps that chance finds: the span map and the scheduler with the
//! real locks' places, under shuttle, with readers, evictions and the scheduler's own loop as they really are. What is left out is what moves the bytes:
//! a fetch here is a thread that has them, or has not; and the clock, which has always come to where it was waited for.
//!
//! Checked: no span is fetched by two at a time, none is evicted while it is held, nobody who waits is forgotten, what is on its way is counted down to nothing, and the scheduler never
//! sleeps while there is something to fetch (it would sleep for ever, which shuttle reports as a deadlock).

use super::{Hands, OnTheirWay, Pace, Persistence, QuotaSettings, Scheduler, Settings};
use crate::{
    fs::ReadError,
    layers::{
        InflatedCache, Shared, Source, SourceError, Unobserved,
        fetch::Taken,
        files::{self, LayerFiles},
        layer::{Arrival, Layer, Parts, Ranking},
        prior::Ranked,
        source::Body,
        spans::Span,
        toc::{self, Toc},
        verdict::Condemned,
    },
    oci::Digest,
    registry::{HostId, Slot, Throttle},
    sync::explore,
    ztoc::{self, BuildOptions, Compression, Limits, SpanTable, Ztoc},
};
use futures::future::BoxFuture;
use shuttle::rand::Rng;
use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// So large that four of them are a window: the scheduler has to wait for what is on its way.
const SPAN: u64 = 1 << 20;
const SPANS: usize = 8;
/// Fetches that fail in one order.
const FAILURES: usize = 3;

/// Nobody asks it: fetches are made up.
struct Nothing;

impl Source for Nothing {
    fn open<'a>(&'a self, _: Range<u64>, _: &'a [HostId]) -> BoxFuture<'a, Result<Box<dyn Body>, SourceError>> {
        Box::pin(std::future::pending())
    }
    fn is_remote(&self) -> bool {
        true
    }
}

/// A layer on disk, to be opened anew for every order.
#[derive(Clone)]
struct Shelf {
    directory: PathBuf,
    digest: Digest,
    table: SpanTable,
    toc: Arc<Toc>,
    runtime: tokio::runtime::Handle,
    condemned: Arc<Condemned>,
}

impl Shelf {
    fn new(directory: &Path, runtime: &tokio::runtime::Runtime) -> Shelf {
        // One file of zeros in a tar.
        let size = SPAN * SPANS as u64 - 2048;
        let mut header = [0u8; 512];
        header[..1].copy_from_slice(b"f");
        header[100..107].copy_from_slice(b"0000644");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[148..156].copy_from_slice(b"        ");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut tar = header.to_vec();
        tar.resize(512 + (size as usize).next_multiple_of(512) + 1024, 0);
        let options = BuildOptions { span_size: SPAN, ..BuildOptions::default() };
        let built = ztoc::build(&tar[..], Compression::Uncompressed, &options).unwrap();
        let parsed = Ztoc::parse(&built.bytes, &Limits::default()).unwrap();
        let table = parsed.spans().clone();
        let digest = built.layer_digest;
        let toc = Toc::from_bytes(toc::build(&digest, &parsed).unwrap(), &digest).unwrap();
        let source = directory.join("source");
        std::fs::write(&source, &built.bytes).unwrap();
        let ztoc = Digest::of(&built.bytes);
        files::create(directory, &source, &ztoc, table.compressed_size, table.spans.len()).unwrap();
        let condemned = Arc::new(Condemned::open(directory.join("condemned")));
        Shelf {
            directory: directory.to_owned(),
            digest,
            table,
            toc: Arc::new(toc),
            runtime: runtime.handle().clone(),
            condemned,
        }
    }

    fn open(&self, pace: Pace) -> (Scheduler, Arc<Layer>) {
        let settings = Settings {
            pace,
            max_bytes_per_sec: None,
            retries: 0,
            persistence: Persistence::Retries,
            min_wait: Duration::ZERO,
            max_wait: Duration::ZERO,
            budget: Duration::from_secs(60),
            verification_retries: 0,
            quota: QuotaSettings::UNLIMITED,
        };
        let scheduler = Scheduler::new(settings, Throttle::new(None));
        let cache = InflatedCache::new(0);
        let shared = Shared::new(cache, scheduler.clone(), self.runtime.clone(), Arc::new(Unobserved));
        let spans = self.table.spans.len();
        let parts = Parts {
            number: 1,
            digest: self.digest,
            table: self.table.clone(),
            toc: self.toc.clone(),
            files: LayerFiles::open(&self.directory).unwrap(),
            ranking: Ranking::Known((0..spans).map(|span| Ranked { span, value: (spans - span) as f32 }).collect()),
            present: Vec::new(),
            source: Arc::new(Nothing),
            verdict: None,
            chain: None,
            condemned: self.condemned.clone(),
            limits: Limits::default(),
        };
        (scheduler, Layer::new(parts, Arc::new(shared)))
    }
}

/// What the threads of one order share.
#[derive(Clone)]
struct Run {
    scheduler: Scheduler,
    layer: Arc<Layer>,
    /// Fetches of each span that are under way.
    fetching: Arc<Vec<AtomicUsize>>,
    failures: Arc<AtomicUsize>,
    /// Nobody reads or damages anything any more.
    quiet: Arc<AtomicBool>,
}

impl Run {
    fn new(shelf: &Shelf) -> Run {
        let (scheduler, layer) = shelf.open(Pace::LineRate);
        let fetching = Arc::new((0..layer.table.spans.len()).map(|_| AtomicUsize::new(0)).collect::<Vec<_>>());
        let failures = Arc::new(AtomicUsize::new(FAILURES));
        let run = Run { scheduler, layer, fetching, failures, quiet: Arc::default() };
        run.fetch_demands();
        run
    }

    fn fails(&self) -> bool {
        shuttle::rand::thread_rng().gen_bool(0.3)
            && self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    }

    /// As `fetch::background` and `fetch::demand` do with what was taken, however it goes.
    fn bring(&self, taken: Taken, mut ticket: OnTheirWay, anybody_waits: bool) {
        let run = taken.left().expect("what is fetched was taken");
        for span in run.clone() {
            assert_eq!(self.fetching[span].fetch_add(1, Ordering::SeqCst), 0, "span {span} is fetched twice at a time");
        }
        ticket.begun();
        let mut left = run.clone();
        for span in run {
            shuttle::thread::yield_now();
            if self.fails() {
                break;
            }
            ticket.arrived(self.layer.span_bytes(span));
            self.fetching[span].fetch_sub(1, Ordering::SeqCst);
            left.start = span + 1;
            self.layer.arrived(span, Arrival::OnDisk);
        }
        drop(ticket);
        for span in left {
            self.fetching[span].fetch_sub(1, Ordering::SeqCst);
        }
        match anybody_waits {
            true => taken.lose(&ReadError::Removed),
            false => taken.give_back(&[]).into_iter().for_each(|wanted| self.scheduler.demand(wanted)),
        }
        self.scheduler.wake();
    }

    /// What the scheduler does about a demand here. It must not keep alive what keeps it.
    fn fetch_demands(&self) {
        let (fetching, failures, quiet) = (self.fetching.clone(), self.failures.clone(), self.quiet.clone());
        let instead = move |taken: Taken| {
            let layer = taken.layer().clone();
            let scheduler = layer.shared().scheduler.clone();
            let range = layer.blob_range(&taken.left().expect("what is demanded was taken"));
            let ticket = scheduler.asked(&layer, range.end - range.start);
            let me =
                Run { scheduler, layer, fetching: fetching.clone(), failures: failures.clone(), quiet: quiet.clone() };
            shuttle::thread::spawn(move || me.bring(taken, ticket, true));
        };
        assert!(self.scheduler.inner.instead.set(Box::new(instead)).is_ok());
    }

    /// Until it is here.
    fn read(&self, span: usize) {
        loop {
            self.scheduler.near(&self.layer, span + 1..(span + 3).min(self.fetching.len()));
            match shuttle::future::block_on(self.layer.here(span)) {
                Ok(_) => break,
                Err(ReadError::Removed) => {}
                Err(error) => panic!("who waited for span {span} was forgotten: {error}"),
            }
        }
    }

    /// Until it is here; then it stays while it is held, if nothing is found damaged.
    fn read_held(&self, span: usize) {
        self.read(span);
        // It may have been evicted already.
        if let Some(_held) = self.layer.hold(span) {
            shuttle::thread::yield_now();
            assert_eq!(self.layer.map().get(span), Span::Present, "span {span} was taken from under a reader");
        }
    }
}

impl Hands for Run {
    fn fetch(&self, scheduler: Scheduler, taken: Taken, ticket: OnTheirWay, slot: Slot) {
        let me = Run { scheduler, ..self.clone() };
        shuttle::thread::spawn(move || {
            let _slot = slot;
            me.bring(taken, ticket, false);
        });
    }
    fn sleep(&self, _: Instant) -> impl Future<Output = ()> + Send {
        shuttle::future::yield_now()
    }
    /// Everything is here for good.
    fn is_over(&self) -> bool {
        self.quiet.load(Ordering::SeqCst) && self.layer.is_complete()
    }
}

fn explored(
    times: usize,
    threads: impl Fn(&Run) -> Vec<shuttle::thread::JoinHandle<()>> + Send + Sync + Clone + 'static,
) {
    let directory = tempfile::tempdir().unwrap();
    // Never driven: what completing a layer starts is not asked for here.
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let shelf = Shelf::new(directory.path(), &runtime);
    assert!(shelf.table.spans.len() >= 4, "{}", shelf.table.spans.len());
    explore(
        move || {
            let run = Run::new(&shelf);
            let streaming = run.clone();
            let streaming =
                shuttle::thread::spawn(move || shuttle::future::block_on(streaming.scheduler.stream(&streaming)));
            run.scheduler.add(&run.layer);
            threads(&run).into_iter().for_each(|thread| thread.join().unwrap());
            run.quiet.store(true, Ordering::SeqCst);
            run.scheduler.wake();
            streaming.join().unwrap();
            assert!(run.layer.is_complete());
            // Fetches that others have overtaken may still be about to end.
            while run.scheduler.lock().on_their_way > 0 {
                shuttle::thread::yield_now();
            }
        },
        times,
    );
}

#[test]
fn shuttle_readers_and_the_background_get_everything_and_nobody_is_forgotten() {
    explored(2000, |run| {
        let reader = |spans: [usize; 3]| {
            let me = run.clone();
            shuttle::thread::spawn(move || spans.into_iter().for_each(|span| me.read(span)))
        };
        vec![reader([5, 0, 2]), reader([2, 3, 5])]
    });
}

#[test]
fn shuttle_what_is_found_damaged_comes_again_also_while_it_is_read() {
    explored(2000, |run| {
        let (reader, damage) = (run.clone(), run.clone());
        vec![
            shuttle::thread::spawn(move || [1, 4].into_iter().for_each(|span| reader.read(span))),
            shuttle::thread::spawn(move || {
                for span in [4, 1] {
                    damage.read(span);
                    damage.layer.discard(span);
                }
            }),
        ]
    });
}

#[test]
fn shuttle_what_is_evicted_comes_again_and_never_from_under_a_reader() {
    // Everything that can go, at once.
    const NOTHING: QuotaSettings = QuotaSettings { max: 0, high: 0, low: 0 };
    explored(2000, |run| {
        let (reader, other, eviction) = (run.clone(), run.clone(), run.clone());
        vec![
            shuttle::thread::spawn(move || [1, 4, 1].into_iter().for_each(|span| reader.read_held(span))),
            shuttle::thread::spawn(move || [4, 1].into_iter().for_each(|span| other.read_held(span))),
            shuttle::thread::spawn(move || {
                for _ in 0..2 {
                    eviction.scheduler.quota().evict(&NOTHING);
                    shuttle::thread::yield_now();
                }
            }),
        ]
    });
}
