//! What the parts of the daemon report, turned into metrics and log lines.
//!
//! Everything below this module only knows the trait it reports to. Names of metrics and texts of log lines are those of the Go
//! snapshotter where they mean the same thing.

use super::{
    decisions::{self, Decisions},
    record::LazyRecord,
    served::Served,
    systemd::Progress,
};
use crate::{
    config::Config,
    fs::{self, FailedOp, Failure, Op},
    index,
    layers::{self, Layer, Verdict},
    layout::SnapshotId,
    oci::Digest,
    registry,
    snapshot::NotLazyReason,
    telemetry::{
        catalog::say,
        metrics::{
            Count, FirstUse, FuseFailure, ImageOperation, ImageOperations, LayerMetrics, Metrics, MicrosecondOperation,
            MillisecondOperation, MountedLayer,
        },
        status::{self, Mode},
    },
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::mpsc;

/// Whether each FUSE operation is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationLog {
    On,
    Off,
}

impl OperationLog {
    pub fn of(config: &Config) -> OperationLog {
        match config.fuse.log_fuse_operations || config.debug {
            true => OperationLog::On,
            false => OperationLog::Off,
        }
    }
}

/// What is counted for one mounted layer.
struct Mounted {
    served: Weak<Served>,
    mountpoint: String,
    counters: Arc<LayerMetrics>,
    image: Arc<ImageOperations>,
    record: LazyRecord,
    errors: Mutex<Errors>,
}

impl Mounted {
    fn layer(&self) -> Option<Arc<Layer>> {
        self.served.upgrade().map(|served| served.layer.clone())
    }
}

/// Reads of a layer that failed.
#[derive(Default)]
struct Errors {
    count: u64,
    last: Option<String>,
    said: Option<Instant>,
}

/// The kernel asks for a page that failed again before the program is told: that is one failure, and one line.
const ONE_FAILURE: Duration = Duration::from_secs(1);

/// All observers in one.
pub struct Observers {
    metrics: Metrics,
    /// Whether each FUSE operation is logged.
    log_operations: AtomicBool,
    /// From the first use of an image to the report of its operations.
    window: Duration,
    /// Read by every FUSE request, written when layers come and go.
    mounted: RwLock<HashMap<SnapshotId, Mounted>>,
    pub decisions: Decisions,
    /// Snapshots whose content must not be read any more, also not out of the kernel's memory.
    condemned: mpsc::UnboundedSender<SnapshotId>,
    /// For whoever can tell the kernel.
    condemnations: Mutex<Option<mpsc::UnboundedReceiver<SnapshotId>>>,
}

impl Observers {
    pub fn new(metrics: Metrics, operations: OperationLog, window: Duration) -> Arc<Observers> {
        let (condemned, condemnations) = mpsc::unbounded_channel();
        let observers = Arc::new(Observers {
            condemned,
            condemnations: Mutex::new(Some(condemnations)),
            metrics,
            log_operations: AtomicBool::new(operations == OperationLog::On),
            window,
            mounted: RwLock::default(),
            decisions: Decisions::default(),
        });
        let weak = Arc::downgrade(&observers);
        observers.metrics.set_mounted_layers(move || weak.upgrade().map(|o| o.layers()).unwrap_or_default());
        observers
    }

    fn layers(&self) -> Vec<MountedLayer> {
        let mounted = self.mounted.read().unwrap_or_else(PoisonError::into_inner);
        let layers = mounted.values().filter_map(|m| Some((m.layer()?, m.mountpoint.clone())));
        layers
            .map(|(layer, mountpoint)| {
                let (fetched, size) = layer.progress();
                MountedLayer { digest: layer.digest(), mountpoint, fetched, size }
            })
            .collect()
    }

    pub fn log_operations(&self, operations: OperationLog) {
        self.log_operations.store(operations == OperationLog::On, Ordering::Relaxed);
    }

    /// How far the lazily loaded images are.
    pub fn progress(&self, background: layers::Background) -> Progress {
        let mounted = self.mounted.read().unwrap_or_else(PoisonError::into_inner);
        let images: HashSet<_> = mounted.values().map(|m| Arc::as_ptr(&m.image)).collect();
        let layers: HashMap<_, _> =
            mounted.values().filter_map(|m| m.layer()).map(|layer| (layer.digest(), layer.progress())).collect();
        Progress {
            images: images.len(),
            layers: layers.len(),
            fetched: layers.values().map(|(fetched, _)| fetched).sum(),
            size: layers.values().map(|(_, size)| size).sum(),
            incomplete: layers.values().filter(|(fetched, size)| fetched < size).count(),
            background,
        }
    }

    /// A layer was put into the tree.
    pub fn mounted(&self, id: SnapshotId, record: &LazyRecord, served: &Arc<Served>, mountpoint: PathBuf) {
        let image = record.manifest;
        let (operations, first) = self.metrics.image(image);
        if first == FirstUse::Yes {
            let (metrics, window) = (self.metrics.clone(), self.window);
            tokio::spawn(async move { metrics.show_image_operations_after(image, window).await });
        }
        let mounted = Mounted {
            served: Arc::downgrade(served),
            mountpoint: mountpoint.display().to_string(),
            counters: self.metrics.layer(served.layer.digest()),
            image: operations,
            record: record.clone(),
            errors: Mutex::default(),
        };
        self.mounted.write().unwrap_or_else(PoisonError::into_inner).insert(id, mounted);
        // The kernel may have kept what an earlier daemon was about to take from it.
        if served.trouble().is_some() {
            let _ = self.condemned.send(id);
        }
    }

    /// Snapshots that turn out to show what their image does not have, as that is found out. For one taker.
    pub fn condemnations(&self) -> Option<mpsc::UnboundedReceiver<SnapshotId>> {
        self.condemnations.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A layer was taken out of the tree.
    pub fn unmounted(&self, id: SnapshotId) {
        let mut mounted = self.mounted.write().unwrap_or_else(PoisonError::into_inner);
        let Some(gone) = mounted.remove(&id) else { return };
        if let Some(layer) = gone.layer()
            && !mounted.values().any(|m| m.layer().is_some_and(|other| Arc::ptr_eq(&other, &layer)))
        {
            self.metrics.forget_layer(&layer.digest());
        }
    }

    /// A layer became lazy, `took` after it was asked for.
    pub fn prepared(&self, layer: &Digest, took: Duration) {
        self.metrics.layer(*layer).took(MillisecondOperation::Mount, took);
    }

    pub fn not_lazy(&self, reason: &NotLazyReason) {
        if reason.is_failure() {
            self.metrics.general().count(Count::FuseMountFailure);
        }
    }

    /// A layer that should have been pulled here is left to containerd.
    pub fn not_pulled(&self) {
        self.metrics.general().count(Count::LocalMountFailure);
    }

    /// Every layer that is mounted or that something was decided about, by image.
    pub fn images(&self) -> Vec<status::Image> {
        type Key = (String, String, String);
        let mut images: BTreeMap<Key, BTreeMap<SnapshotId, status::Layer>> = BTreeMap::new();
        let decided = self.decisions.all();
        for (id, decision) in &decided {
            let key = (decision.image.clone(), decision.manifest.clone(), decision.namespace.clone());
            let layer = status::Layer {
                layer: decision.layer.clone(),
                snapshot: id.0,
                mode: decision.mode,
                reason: decision.reason.to_owned(),
                why: decision.why.clone(),
                decided: rfc3339(decision.at),
                lazy: None,
            };
            images.entry(key).or_default().insert(*id, layer);
        }
        for (id, mounted) in self.mounted.read().unwrap_or_else(PoisonError::into_inner).iter() {
            let Some(served) = mounted.served.upgrade() else { continue };
            let layer = &served.layer;
            let record = &mounted.record;
            let key = (record.image.to_string(), record.manifest.to_string(), record.namespace.clone());
            let entry = images.entry(key).or_default().entry(*id).or_insert_with(|| status::Layer {
                layer: record.layer.to_string(),
                snapshot: id.0,
                mode: Mode::Lazy,
                reason: decisions::INDEXED.to_owned(),
                why: "an earlier daemon mounted it".to_owned(),
                decided: String::new(),
                lazy: None,
            });
            let (fetched, size) = layer.progress();
            let errors = mounted.errors.lock().unwrap_or_else(PoisonError::into_inner);
            entry.lazy = Some(status::Lazy {
                size,
                fetched: fetched.min(size),
                fetched_percent: status::Lazy::percent(fetched, size),
                mountpoint: mounted.mountpoint.clone(),
                read_errors: errors.count,
                last_error: errors.last.clone(),
                verified: layer.verdict().is_some() && served.trouble().is_none(),
                condemned: served.trouble().map(str::to_owned),
            });
        }
        let image = |((image, manifest, namespace), layers): (Key, BTreeMap<_, _>)| status::Image {
            image,
            manifest,
            namespace,
            layers: layers.into_values().collect(),
        };
        images.into_iter().map(image).collect()
    }

    /// The incident message.
    fn contradicts(&self, layer: &Layer, image: Option<&str>, ztoc: Option<&Digest>, error: &str) {
        self.metrics.layer(layer.digest()).count(Count::IndexContradiction);
        say!(
            LayerContradictsIndex,
            layer = %layer.digest(),
            image = image.unwrap_or("an image that is being prepared"),
            ztoc = ztoc.map(tracing::field::display),
            error,
            "the layer is not what its SOCI index says: its files cannot be read from now on. Treat it as an incident; remove the image, and pull it again without that index"
        );
    }

    fn with(&self, id: SnapshotId, act: impl FnOnce(&Mounted)) {
        if let Some(mounted) = self.mounted.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
            act(mounted);
        }
    }
}

impl layers::Observer for Observers {
    fn demand_fetch(&self, layer: &Digest, spans: usize) {
        let counters = self.metrics.layer(*layer);
        (0..spans).for_each(|_| counters.count(Count::SynchronousReadRemoteFetch));
    }
    fn range_request(&self, layer: &Digest, took: Duration) {
        self.metrics.layer(*layer).took(MillisecondOperation::RemoteRegistryGet, took);
    }
    fn background_fetched(&self, layer: &Digest, spans: usize) {
        let counters = self.metrics.layer(*layer);
        (0..spans).for_each(|_| counters.count(Count::BackgroundSpanFetch));
    }
    fn background_failed(&self, layer: &Digest) {
        self.metrics.layer(*layer).count(Count::BackgroundSpanFetchFailure);
    }
    fn evicted(&self, layer: &Digest, _bytes: u64) {
        self.metrics.layer(*layer).count(Count::SpanEvicted);
    }
    fn layer_complete(&self, layer: &Layer, took: Duration) {
        self.metrics.layer(layer.digest()).took(MillisecondOperation::BackgroundFetch, took);
    }
    fn layer_examined(&self, layer: &Layer) {
        let mut wrong = Vec::new();
        for (id, mounted) in self.mounted.read().unwrap_or_else(PoisonError::into_inner).iter() {
            let served = mounted.served.upgrade().filter(|served| std::ptr::eq(&*served.layer, layer));
            if let Some(reason) = served.and_then(|served| served.trouble().map(str::to_owned)) {
                wrong.push((*id, mounted.record.image.to_string(), mounted.record.ztoc, reason));
            }
        }
        // An index that no snapshot uses yet is no less wrong.
        if let (true, Some(Verdict::Contradicts { reason })) = (wrong.is_empty(), layer.verdict()) {
            self.contradicts(layer, None, None, reason);
        }
        for (id, image, ztoc, reason) in wrong {
            self.contradicts(layer, Some(&image), Some(&ztoc), &reason);
            let _ = self.condemned.send(id);
        }
    }
    fn toc_built(&self, layer: &Digest, took: Duration) {
        self.metrics.layer(*layer).took(MillisecondOperation::InitMetadataStore, took);
    }
}

/// A moment as `soci status` shows it.
pub fn rfc3339(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at).unwrap_or_default().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn image_operation(op: Op) -> ImageOperation {
    match op {
        Op::Getattr => ImageOperation::NodeGetattr,
        Op::Getxattr => ImageOperation::NodeGetxattr,
        Op::Listxattr => ImageOperation::NodeListxattr,
        Op::Lookup => ImageOperation::NodeLookup,
        Op::Open => ImageOperation::NodeOpen,
        Op::Readdir => ImageOperation::NodeReaddir,
        Op::Readlink => ImageOperation::NodeReadlink,
        Op::Read => ImageOperation::FileRead,
        Op::FileGetattr => ImageOperation::FileGetattr,
        Op::WhiteoutGetattr => ImageOperation::WhiteoutGetattr,
    }
}

impl fs::Observer for Observers {
    fn operation(&self, snapshot: SnapshotId, op: Op, path: &dyn Fn() -> Vec<u8>) {
        self.with(snapshot, |mounted| mounted.image.count(image_operation(op)));
        if self.log_operations.load(Ordering::Relaxed) {
            tracing::debug!(operation = op.name(), path = %String::from_utf8_lossy(&path()), "FUSE operation");
        }
    }

    fn read(&self, snapshot: SnapshotId, _layer: &Digest, bytes: usize, took: Duration) {
        self.with(snapshot, |mounted| mounted.counters.read(bytes as u64, took));
    }

    fn listing(&self, snapshot: SnapshotId, _layer: &Digest, took: Duration) {
        self.with(snapshot, |mounted| mounted.counters.took_micros(MicrosecondOperation::NodeReaddir, took));
    }

    fn failure(&self, failure: &Failure<'_>) {
        let what = match failure.op {
            FailedOp::FileRead => FuseFailure::FileRead,
            FailedOp::Other => FuseFailure::Unknown,
        };
        self.metrics.layer(failure.layer).failed(what);
        let error = failure.error.chain();
        let (mut image, mut is_news) = (None, true);
        self.with(failure.snapshot, |mounted| {
            image = Some(mounted.record.image.to_string());
            let mut errors = mounted.errors.lock().unwrap_or_else(PoisonError::into_inner);
            errors.count += 1;
            let last = Some(format!("{}: {error}", String::from_utf8_lossy(failure.path)));
            is_news = errors.last != last || errors.said.is_none_or(|said| said.elapsed() >= ONE_FAILURE);
            if is_news {
                (errors.last, errors.said) = (last, Some(Instant::now()));
            }
        });
        if !is_news {
            return;
        }
        say!(
            ReadFailed,
            image,
            layer = %failure.layer,
            reason = failure.error.code(),
            digest = %failure.layer,
            size = failure.size,
            fetchedSize = failure.fetched,
            fetchedPercent = failure.fetched as f64 * 100.0 / failure.size.max(1) as f64,
            path = %String::from_utf8_lossy(failure.path),
            error,
            "statFile error"
        );
    }
}

impl index::Observer for Observers {
    fn index_fetched(&self, index: Digest, took: Duration) {
        self.metrics.layer(index).took(MillisecondOperation::SociIndexFetch, took);
    }
    fn ztoc_fetched(&self, layer: Digest, took: Duration) {
        self.metrics.layer(layer).took(MillisecondOperation::ZtocFetch, took);
    }
}

impl registry::Observer for Observers {
    fn request(&self, _: registry::Kind, host: &str, took: Duration, outcome: registry::Outcome) {
        tracing::trace!(host, took = ?took, outcome = ?outcome, "registry request");
    }
}
