//! What the eager side stands on: the custodian for files, containerd for content, the scheduler and the metrics to be told.

use super::{
    implied::{self, Shown},
    lazy::LazyMounts,
    observe::Observers,
};
use crate::{
    config::{self, Config},
    custodian::{self, Lower},
    fs::ImpliedAttrs,
    grpc::{content::ContainerdContent, ingest},
    layers::Scheduler,
    layout::{Layout, SnapshotId},
    oci::{Descriptor, Digest, Reference},
    pull::{
        self, Budget, Contents, Depth, Indexed, Ingest, Keep, Known, ProgramError, Programs, Settings, UnpackFailure,
        Unpacker,
    },
    registry,
    snapshot::{Extent, NotPulled, Usage, chain},
    sys::map::Mapping,
    ztoc::{Compression, Limits, Span, Ztoc},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::{fs::File, io, ops::Range, os::fd::OwnedFd, sync::Arc, time::Duration};

/// How long a pull waits to hear whether containerd has a blob; a healthy one answers in a millisecond.
const PATIENCE: Duration = Duration::from_millis(500);
/// Where the filesystem does not say: more than any layer has. The disk's own limit holds anyway.
const UNKNOWN_ROOM: Budget = Budget { bytes: 1 << 40, inodes: 50_000_000 };

/// The Go daemon's default of `max_concurrent_downloads_per_image`.
const GO_DOWNLOADS_PER_IMAGE: u64 = 3;
/// The Go daemon's default of `max_concurrent_unpacks_per_image`.
const GO_UNPACKS_PER_IMAGE: u64 = 1;

/// The eager side's settings, as configured.
pub fn settings(config: &Config) -> Result<Settings, ProgramError> {
    let pull = &config.pull_modes.parallel_pull_unpack;
    let streams = &pull.decompress_streams;
    let named = streams.iter().map(|(name, s)| (name.clone(), (s.path.clone(), s.args.clone()))).collect();
    let count = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    let most = |limit: config::Limit| match limit {
        config::Limit::Unlimited => None,
        config::Limit::At(limit) => Some(count(limit)),
    };
    // The Go snapshotter's own numbers are nobody's choice: its sample file lists them too.
    let unless = |default: u64, limit: config::Limit| most(limit).filter(|limit| *limit as u64 != default);
    let wanted = pull.enable || pull.parallel_pull_as_fallback;
    Ok(Settings {
        downloads: most(pull.max_concurrent_downloads),
        downloads_per_image: unless(GO_DOWNLOADS_PER_IMAGE, pull.max_concurrent_downloads_per_image),
        piece: match pull.concurrent_download_chunk_size {
            config::ChunkSize::WholeLayer => None,
            config::ChunkSize::Bytes(bytes) => Some(bytes),
        },
        unpacks: most(pull.max_concurrent_unpacks),
        unpacks_per_image: unless(GO_UNPACKS_PER_IMAGE, pull.max_concurrent_unpacks_per_image),
        // As with the Go snapshotter, programs are for parallel pulls.
        programs: if wanted { Programs::check(&named)? } else { Programs::default() },
        keep: match config.content_store.kind {
            config::ContentStoreType::Containerd if wanted && !pull.discard_unpacked_layers => Keep::InContainerd,
            config::ContentStoreType::Containerd | config::ContentStoreType::Soci => Keep::Nowhere,
        },
    })
}

/// Checkpoints of layers that were loaded lazily, from their zTOCs.
pub fn indexed(layout: Layout) -> Indexed {
    Box::new(move |layer| {
        let file = File::open(layout.layer_ztoc(layer)).ok()?;
        let bytes = Mapping::of(&file).ok()?;
        let ztoc = Ztoc::parse(&bytes, &Limits::default()).ok()?;
        let point = |span: &Span| pull::Point {
            input: span.compressed.start + u64::from(span.bits != 0),
            bits: span.bits,
            window: span.window.start as u64..span.window.end as u64,
        };
        let table = ztoc.spans();
        (table.compression == Compression::Gzip).then(|| Known::new(file, table.spans.iter().map(point).collect()))
    })
}

/// containerd's content store, for pulls.
pub struct Content(pub ContainerdContent);

impl Content {
    async fn begin(
        &self,
        namespace: &str,
        image: &Reference,
        manifest: Digest,
        blob: &Descriptor,
    ) -> Result<ingest::Ingest, String> {
        let source = (format!("containerd.io/distribution.source.{}", image.host), image.repository.clone());
        let layer = ingest::Layer { digest: blob.digest, size: blob.size, labels: [source].into() };
        self.0.ingest(namespace, &manifest, layer).await.map_err(|e| chain(&e))
    }
}

impl Contents for Content {
    fn size<'a>(&'a self, namespace: &'a str, blob: Digest) -> BoxFuture<'a, Option<u64>> {
        Box::pin(async move {
            let size = tokio::time::timeout(PATIENCE, self.0.size(namespace, &blob)).await;
            size.ok().and_then(Result::ok).flatten()
        })
    }

    fn read<'a>(&'a self, namespace: &'a str, blob: Digest, range: Range<u64>) -> BoxFuture<'a, Result<Bytes, String>> {
        Box::pin(async move { self.0.read(namespace, &blob, range).await.map_err(|e| chain(&e)) })
    }

    fn ingest<'a>(
        &'a self,
        namespace: &'a str,
        image: &'a Reference,
        manifest: Digest,
        blob: &'a Descriptor,
    ) -> BoxFuture<'a, Result<Box<dyn Ingest>, String>> {
        Box::pin(async move {
            let ingest = self.begin(namespace, image, manifest, blob).await?;
            Ok(Box::new(Ingesting(ingest)) as Box<dyn Ingest>)
        })
    }

    fn adopt<'a>(
        &'a self,
        namespace: &'a str,
        image: &'a Reference,
        manifest: Digest,
        blob: &'a Descriptor,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let ingest = self.begin(namespace, image, manifest, blob).await?;
            ingest.adopt().await.map_err(|e| chain(&e))
        })
    }

    fn let_go<'a>(&'a self, namespace: &'a str, manifest: Digest) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            if let Err(error) = self.0.end_lease(namespace, &manifest).await {
                tracing::debug!(error = chain(&error), "containerd ends the lease of a pull by itself");
            }
        })
    }
}

struct Ingesting(ingest::Ingest);

impl Ingest for Ingesting {
    fn put(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move { self.0.put(bytes).await.map_err(|e| chain(&e)) })
    }
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async move { self.0.finish().await.map_err(|e| chain(&e)) })
    }
}

/// Tells the scheduler that a pull needs the link, and the metrics that one failed.
pub struct Told {
    pub scheduler: Scheduler,
    pub observers: Arc<Observers>,
}

impl pull::Observer for Told {
    fn begins(&self, id: SnapshotId) {
        self.scheduler.make_way(u64::from(id.0));
    }
    fn ends(&self, id: SnapshotId) {
        self.scheduler.way_is_free(u64::from(id.0));
    }
    fn not_pulled(&self, _: Extent, _: &NotPulled) {
        self.observers.not_pulled();
    }
}

/// Hears of every exchange with a registry: as the metrics do, and whether a registry has had enough.
pub struct Exchanges {
    pub observers: Arc<Observers>,
    pub throttle: registry::Throttle,
}

impl registry::Observer for Exchanges {
    fn request(&self, kind: registry::Kind, host: &str, took: Duration, outcome: registry::Outcome) {
        if let registry::Outcome::Answered(429 | 503) = outcome {
            self.throttle.complaint();
        }
        registry::Observer::request(self.observers.as_ref(), kind, host, took, outcome);
    }
}

/// The custodian, as who unpacks. It looks into unpacked layers itself; of lazy ones it is told.
pub struct Custodian {
    client: Arc<custodian::Client>,
    layout: Layout,
    lazy: std::sync::OnceLock<std::sync::Weak<LazyMounts>>,
}

impl Custodian {
    pub fn new(client: Arc<custodian::Client>, layout: Layout) -> Custodian {
        Custodian { client, layout, lazy: std::sync::OnceLock::new() }
    }

    /// Where to look lazy layers up.
    pub fn show(&self, lazy: &Arc<LazyMounts>) {
        // Once, at start.
        let _ = self.lazy.set(Arc::downgrade(lazy));
    }
}

impl Unpacker for Custodian {
    fn unpack(
        &self,
        id: SnapshotId,
        tar: OwnedFd,
        depth: Depth,
        budget: Budget,
    ) -> BoxFuture<'_, Result<(), UnpackFailure>> {
        Box::pin(async move {
            let place = match depth {
                Depth::Bottom => custodian::Place::Bottom,
                Depth::Above => custodian::Place::Above,
            };
            let budget = custodian::Budget { bytes: budget.bytes, inodes: budget.inodes };
            match self.client.unpack(id, tar, place, budget).await {
                Ok(_) => Ok(()),
                Err(error @ custodian::UnpackError::Refused { .. }) => Err(UnpackFailure::Tar(chain(&error))),
                Err(error) => Err(UnpackFailure::Trouble(chain(&error))),
            }
        })
    }

    fn discard(&self, id: SnapshotId) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            if let Err(error) = self.client.discard(id).await {
                tracing::debug!(snapshot = %id, %error, "cannot discard what was unpacked; it goes with the directory");
            }
        })
    }

    fn publish<'a>(&'a self, id: SnapshotId, parents: &'a [SnapshotId]) -> BoxFuture<'a, io::Result<Usage>> {
        Box::pin(async move {
            let lazy = self.lazy.get().and_then(std::sync::Weak::upgrade);
            let shown: Vec<Option<Arc<Shown>>> =
                parents.iter().map(|parent| lazy.as_ref().and_then(|lazy| lazy.shown(*parent))).collect();
            let look: Vec<_> = shown
                .iter()
                .map(|shown| shown.as_ref().map(|shown| move |path: &[u8]| found(implied::find_lazy(shown, path))))
                .collect();
            let lower: Vec<Lower<'_>> = parents
                .iter()
                .zip(&look)
                .map(|(parent, look)| match look {
                    Some(look) => Lower::Lazy(*parent, look),
                    None => Lower::Unpacked(*parent),
                })
                .collect();
            self.client.publish(id, &lower).await.map_err(|e| io::Error::other(chain(&e)))?;
            let usage = self.client.usage(id).await?;
            Ok(Usage { size: usage.size, inodes: usage.inodes })
        })
    }

    fn room(&self) -> Budget {
        let Ok(stat) = rustix::fs::statvfs(self.layout.root()) else { return UNKNOWN_ROOM };
        // Filesystems that make inodes as they go say that they have none.
        let inodes = if stat.f_files == 0 { UNKNOWN_ROOM.inodes } else { stat.f_favail };
        Budget { bytes: stat.f_bavail.saturating_mul(stat.f_frsize), inodes }
    }
}

fn found(found: implied::Found) -> custodian::Found {
    match found {
        implied::Found::Directory(ImpliedAttrs { mode, uid, gid, mtime, xattrs }) => {
            custodian::Found::Directory(custodian::DirectoryAttributes { mode, uid, gid, mtime, xattrs })
        }
        implied::Found::SomethingElse => custodian::Found::SomethingElse,
        implied::Found::Nothing => custodian::Found::Nothing,
    }
}
