//! Metrics, with the names that dashboards and alerts of the Go snapshotter already use.
//!
//! ```text
//!   Metrics ─┬─ LayerMetrics per layer digest      counted by its readers without a lock
//!            ├─ the same for what concerns no layer (label layer="")
//!            ├─ ImageOperations per manifest       closed and shown once, when its window is over
//!            └─ mounted layers                     asked when somebody scrapes
//! ```
//!
//! A series appears with its first observation, as there; only `background_fetch_work_queue_evicted` exists from the start.
//!
//! Rendering is by hand. prometheus-client, the crate one would take, appends `_total` to every counter, and these names have none; it also has no
//! way to leave out a series that was never touched. The text format is two kinds of line, and that is [`text`].
//!
//! Absent on purpose: the Go runtime's own metrics, and OpenMetrics or protobuf, which scrapers only take when offered.
#![forbid(unsafe_code)]

mod families;
mod text;

pub use families::{Count, FuseFailure, ImageOperation, MicrosecondOperation, MillisecondOperation};

use crate::{
    oci::Digest,
    telemetry::{limit::Limiter, logs::ROUTINE_TARGET},
};
use families::{Family, HISTOGRAM_MICROSECONDS, HISTOGRAM_MILLISECONDS};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use text::{Histogram, Writer};

/// `fuse_failure_state` says "something is wrong now" and not how often, so it moves once in this long.
const FAILURE_WINDOW: Duration = Duration::from_secs(5 * 60);
/// Images whose operations are being or have been counted. A node that has run more than this many in one life of the daemon forgets one for each.
const MOST_IMAGES: usize = 1024;

/// The registry. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    /// What no layer is to blame for.
    general: Arc<LayerMetrics>,
    /// Keyed by the `layer` label, which for `soci_index_fetch` is the index' digest. Leaf lock, as are the others here.
    layers: Mutex<BTreeMap<Digest, Arc<LayerMetrics>>>,
    /// Keyed by manifest.
    images: Mutex<BTreeMap<Digest, Arc<ImageOperations>>>,
    mounted: Mutex<Option<MountedLayers>>,
    background_queue: Mutex<Option<u64>>,
    failures: Arc<Limiter>,
}

/// Asked at scrape time for every lazily mounted layer.
type MountedLayers = Box<dyn Fn() -> Vec<MountedLayer> + Send + Sync>;

/// One lazily mounted layer, as of now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountedLayer {
    pub digest: Digest,
    /// `…/snapshots/<id>/fs`, as containerd sees it.
    pub mountpoint: String,
    /// Compressed bytes that came over the network.
    pub fetched: u64,
    /// Compressed size.
    pub size: u64,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

impl Metrics {
    pub fn new() -> Metrics {
        let failures = Arc::new(Limiter::new(FAILURE_WINDOW));
        let general = LayerMetrics::new(failures.clone(), None);
        Metrics {
            inner: Arc::new(Inner {
                general: Arc::new(general),
                layers: Mutex::default(),
                images: Mutex::default(),
                mounted: Mutex::default(),
                background_queue: Mutex::default(),
                failures,
            }),
        }
    }

    /// The counters of one layer, to be kept by whoever counts.
    pub fn layer(&self, layer: Digest) -> Arc<LayerMetrics> {
        lock(&self.inner.layers)
            .entry(layer)
            .or_insert_with(|| {
                Arc::new(LayerMetrics::new(self.inner.failures.clone(), Some(self.inner.general.clone())))
            })
            .clone()
    }

    /// Drops a layer's series: it was removed from the disk. The Go snapshotter keeps them for ever, and grows.
    pub fn forget_layer(&self, layer: &Digest) {
        lock(&self.inner.layers).remove(layer);
    }

    /// Counters with an empty `layer` label.
    pub fn general(&self) -> &LayerMetrics {
        &self.inner.general
    }

    /// Says that background fetching is on, so that an eviction counter of 0 is shown.
    pub fn background_fetch_enabled(&self) {
        self.inner.general.counts[Count::BackgroundFetchWorkQueueEvicted.index()].show();
    }

    /// Sets how many layers wait for background fetching. (The Go snapshotter adds up what it should set.)
    pub fn set_background_queue(&self, layers: u64) {
        *lock(&self.inner.background_queue) = Some(layers);
    }

    /// Sets who is asked for the mounted layers. Called on a scraper's thread: it must not wait for anything.
    pub fn set_mounted_layers(&self, ask: impl Fn() -> Vec<MountedLayer> + Send + Sync + 'static) {
        *lock(&self.inner.mounted) = Some(Box::new(ask));
    }

    /// The operation counters of an image, to be kept by its layers; and whether this is its first use, which starts the window
    /// (see [`Metrics::show_image_operations_after`]).
    pub fn image(&self, manifest: Digest) -> (Arc<ImageOperations>, FirstUse) {
        let mut images = lock(&self.inner.images);
        if let Some(known) = images.get(&manifest) {
            return (known.clone(), FirstUse::No);
        }
        if images.len() >= MOST_IMAGES {
            images.pop_first();
        }
        let fresh = Arc::new(ImageOperations::default());
        images.insert(manifest, fresh.clone());
        (fresh, FirstUse::Yes)
    }

    /// Ends the window of an image: its ten series appear, zeros included, and count no further. Logs them, too.
    pub fn show_image_operations(&self, manifest: &Digest) {
        let Some(operations) = lock(&self.inner.images).get(manifest).cloned() else { return };
        if operations.closed.swap(true, Ordering::Relaxed) {
            return;
        }
        for operation in ImageOperation::ALL {
            let calls = operations.calls[operation.index()].load(Ordering::Relaxed);
            tracing::info!(target: ROUTINE_TARGET, "fuse operation count for image {manifest}: {} = {calls}", operation.label());
        }
    }

    /// [`Metrics::show_image_operations`] when `window` has passed.
    pub async fn show_image_operations_after(&self, manifest: Digest, window: Duration) {
        tokio::time::sleep(window).await;
        self.show_image_operations(&manifest);
    }

    /// Everything, in text format 0.0.4.
    pub fn render(&self) -> String {
        let layers: Vec<(String, Arc<LayerMetrics>)> =
            lock(&self.inner.layers).iter().map(|(digest, metrics)| (digest.to_string(), metrics.clone())).collect();
        let all: Vec<(&str, &LayerMetrics)> = std::iter::once(("", &*self.inner.general))
            .chain(layers.iter().map(|(digest, metrics)| (digest.as_str(), &**metrics)))
            .collect();
        let mut out = Writer::new();
        write_histograms(&mut out, &HISTOGRAM_MILLISECONDS, &all, |layer| &layer.milliseconds);
        write_histograms(&mut out, &HISTOGRAM_MICROSECONDS, &all, |layer| &layer.microseconds);
        out.family(&families::OPERATION_COUNT);
        for (digest, layer) in &all {
            for (operation, count) in families::counts().zip(&layer.counts) {
                if let Some(value) = count.value() {
                    out.sample("", &[("layer", digest), ("operation_type", operation)], value);
                }
            }
        }
        out.family(&families::BYTES_SERVED);
        for (digest, layer) in &all {
            if let Some(bytes) = layer.bytes_served.value() {
                out.sample("", &[("layer", digest), ("operation_type", families::BYTES_SERVED_OPERATION)], bytes);
            }
        }
        self.write_images(&mut out);
        self.write_mounted(&mut out);
        out.finish()
    }

    fn write_images(&self, out: &mut Writer) {
        out.family(&families::IMAGE_OPERATIONS);
        if let Some(queued) = *lock(&self.inner.background_queue) {
            out.sample("", &[("image", ""), ("operation_type", families::BACKGROUND_QUEUE_OPERATION)], queued);
        }
        for (manifest, operations) in lock(&self.inner.images).iter() {
            if !operations.closed.load(Ordering::Relaxed) {
                continue;
            }
            for operation in ImageOperation::ALL {
                let calls = operations.calls[operation.index()].load(Ordering::Relaxed);
                out.sample("", &[("image", &manifest.to_string()), ("operation_type", operation.label())], calls);
            }
        }
    }

    fn write_mounted(&self, out: &mut Writer) {
        let mut mounted = lock(&self.inner.mounted).as_ref().map_or_else(Vec::new, |ask| ask());
        mounted.sort_by(|a, b| (&a.digest, &a.mountpoint).cmp(&(&b.digest, &b.mountpoint)));
        let mut write = |family: &Family, value: fn(&MountedLayer) -> u64| {
            out.family(family);
            for layer in &mounted {
                let labels = [("digest", &*layer.digest.to_string()), ("mountpoint", &*layer.mountpoint)];
                out.sample("", &labels, value(layer));
            }
        };
        write(&families::LAYER_FETCHED, |layer| layer.fetched);
        write(&families::LAYER_SIZE, |layer| layer.size);
    }
}

fn write_histograms<const N: usize>(
    out: &mut Writer,
    family: &families::HistogramFamily<N>,
    layers: &[(&str, &LayerMetrics)],
    of: impl Fn(&LayerMetrics) -> &[Histogram; N],
) {
    out.family(&family.family);
    for (digest, layer) in layers {
        for (operation, histogram) in family.operations.iter().zip(of(layer)) {
            histogram.write(out, &[("layer", digest), ("operation_type", operation)]);
        }
    }
}

/// Whether an image is seen for the first time in this daemon's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstUse {
    Yes,
    No,
}

/// Counters of one layer. Counting is a few relaxed additions: an observer never waits.
pub struct LayerMetrics {
    milliseconds: [Histogram; MillisecondOperation::NUMBER],
    microseconds: [Histogram; MicrosecondOperation::NUMBER],
    counts: [Counter; families::COUNTS],
    bytes_served: Counter,
    failures: Arc<Limiter>,
    /// Where the state of all layers together is kept; `None` if that is here.
    general: Option<Arc<LayerMetrics>>,
}

impl LayerMetrics {
    fn new(failures: Arc<Limiter>, general: Option<Arc<LayerMetrics>>) -> LayerMetrics {
        LayerMetrics {
            milliseconds: std::array::from_fn(|_| Histogram::milliseconds()),
            microseconds: std::array::from_fn(|_| Histogram::microseconds()),
            counts: Default::default(),
            bytes_served: Counter::default(),
            failures,
            general,
        }
    }

    /// Observes how long something took that takes milliseconds.
    pub fn took(&self, operation: MillisecondOperation, duration: Duration) {
        self.milliseconds[operation.index()].observe(duration);
    }

    /// Observes how long something took that takes microseconds.
    pub fn took_micros(&self, operation: MicrosecondOperation, duration: Duration) {
        self.microseconds[operation.index()].observe(duration);
    }

    pub fn count(&self, what: Count) {
        self.counts[what.index()].add(1);
    }

    /// Counts a READ that was answered with `bytes` after `duration`: three series at once.
    pub fn read(&self, bytes: u64, duration: Duration) {
        self.took_micros(MicrosecondOperation::SynchronousRead, duration);
        self.count(Count::SynchronousRead);
        self.bytes_served.add(bytes);
    }

    /// Counts a FUSE operation that failed internally, and raises the failure state of the daemon.
    pub fn failed(&self, what: FuseFailure) {
        self.counts[Count::Fuse(what).index()].add(1);
        if self.failures.allow().is_some() {
            self.general.as_deref().unwrap_or(self).count(Count::FuseFailureState);
        }
    }
}

/// A counter that is not shown before it was touched.
#[derive(Default)]
struct Counter {
    value: AtomicU64,
    shown: AtomicBool,
}

impl Counter {
    fn add(&self, more: u64) {
        self.value.fetch_add(more, Ordering::Relaxed);
        self.show();
    }

    fn show(&self) {
        if !self.shown.load(Ordering::Relaxed) {
            self.shown.store(true, Ordering::Relaxed);
        }
    }

    fn value(&self) -> Option<u64> {
        self.shown.load(Ordering::Relaxed).then(|| self.value.load(Ordering::Relaxed))
    }
}

/// How often each operation was called on an image's layers, until its window ended.
#[derive(Default)]
pub struct ImageOperations {
    calls: [AtomicU64; ImageOperation::ALL.len()],
    closed: AtomicBool,
}

impl ImageOperations {
    pub fn count(&self, operation: ImageOperation) {
        if !self.closed.load(Ordering::Relaxed) {
            self.calls[operation.index()].fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Maps and options of numbers are valid whatever a panicking thread was doing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
