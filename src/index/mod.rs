//! SOCI indexes: which one belongs to an image, and getting it here with all its zTOCs.
//!
//! Invariants:
//! * [`Indexes::get`] gives an index only when its bytes, and those of every zTOC in it, are in the content store as they
//!   were fetched, and have the digests and sizes they should have.
//! * At most one search per image is under way; all who ask meanwhile share its result, and it goes on when they leave.
//! * A found index is remembered. A failure is remembered for one second, then two, up to a minute: long enough that an
//!   image of forty layers is not searched for forty times, short enough that an index pushed later is seen.
//! * An image is never refused: every way not to find an index is a [`NoIndex`] with its reason.
//!
//! Absent on purpose: reading zTOCs (`ztoc`), deciding what becomes of an image without an index (`snapshot`).
#![forbid(unsafe_code)]

mod discover;
mod fetch;
mod flights;
pub mod prefetch;
mod store;

pub use store::{ContentStore, InUse, StoreError};

use crate::telemetry::{catalog::say, logs::ROUTINE_TARGET};
use crate::{
    oci::{Digest, Manifest, Reference, annotation},
    registry::{Class, Registry, RegistryError},
};
use flights::{Belief, Flights};
use prefetch::Prefetch;
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

/// Images remembered. An index of a large image takes some ten kB.
const CAPACITY: usize = 1024;
/// How long it is believed that an image has no index.
const BELIEF: Belief = Belief { first: Duration::from_secs(1), longest: Duration::from_secs(60) };
/// A search that takes longer has failed, whatever it waits for. Time enough for 180 MB of zTOCs at 3 Mbit/s.
const TIME_LIMIT: Duration = Duration::from_secs(600);

/// Which ways of finding an index are on, and how large what it names may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscoverySettings {
    /// `pull_modes.soci_v1.enable`: the referrers API.
    pub v1: bool,
    /// `pull_modes.soci_v2.enable`: the annotation of the image manifest.
    pub v2: bool,
    /// `prefetch.enable`: also fetch what says which spans to load first.
    pub prefetch: bool,
    /// Largest zTOC.
    pub ztoc_max: u64,
    /// Largest sum of the zTOCs of one index.
    pub ztocs_max: u64,
}

impl Default for DiscoverySettings {
    fn default() -> DiscoverySettings {
        // A layer of 20 GB in 4 MiB spans has a zTOC of 160 MB, most of it the spans' windows.
        DiscoverySettings { v1: false, v2: true, prefetch: false, ztoc_max: 512 << 20, ztocs_max: 4 << 30 }
    }
}

/// Where an index is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ways {
    /// As [`DiscoverySettings`] say.
    Configured,
    /// For an image that was loaded lazily before: among what is here, then in every way there is, whatever is configured now.
    All,
}

/// The image to find an index for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageTarget {
    pub reference: Reference,
    /// The manifest of the platform.
    pub manifest: Digest,
    /// Value of the label that names an index, as it was given; an empty one names none.
    pub explicit: Option<String>,
}

/// A SOCI index whose zTOCs are here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SociIndex {
    pub digest: Digest,
    pub manifest: Manifest,
    /// By layer. A layer that is not in it cannot be loaded lazily.
    pub layers: HashMap<Digest, ZtocDescriptor>,
    /// By layer; only where an artifact was asked for and could be had.
    pub prefetch: HashMap<Digest, BlobRef>,
}

impl SociIndex {
    /// Indexed layers with their zTOCs, in the order of the index: bottom first.
    pub fn layers_in_order(&self) -> impl Iterator<Item = (Digest, ZtocDescriptor)> {
        let listed =
            self.manifest.layers.iter().filter_map(|l| l.annotations.get(annotation::LAYER_DIGEST)?.parse().ok());
        let mut seen = std::collections::HashSet::new();
        listed
            .filter(move |layer| seen.insert(*layer))
            .filter_map(|layer: Digest| Some((layer, *self.layers.get(&layer)?)))
    }
}

/// The zTOC of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZtocDescriptor {
    pub digest: Digest,
    pub size: u64,
    /// No entry of the layer has an xattr.
    pub disable_xattrs: bool,
}

/// A blob in the content store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobRef {
    pub digest: Digest,
    pub size: u64,
}

/// Why there is no index to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoIndex {
    #[error("all lazy pull modes are disabled")]
    Disabled,
    #[error("the given SOCI index digest {0:?} is not a sha256 digest")]
    InvalidExplicit(String),
    #[error("the image has no SOCI index")]
    NotFound,
    #[error("cannot ask the registry for the SOCI index")]
    Discovery(#[source] RegistryError),
    #[error("cannot fetch the SOCI index {index}")]
    Index { index: Digest, source: Box<RegistryError> },
    #[error("cannot fetch blob {blob} of the SOCI index {index}")]
    Blob { index: Digest, blob: Digest, source: Box<RegistryError> },
    #[error("{what}")]
    Invalid { what: String },
    #[error("cannot keep the SOCI index")]
    Store(#[source] StoreError),
    #[error("the SOCI index was not here after {} s", .0.as_secs())]
    TimedOut(Duration),
    /// The search ended without a result, as when the daemon stops.
    #[error("the search for the SOCI index was given up")]
    Aborted,
}

impl NoIndex {
    /// Whether it will be so tomorrow: what is looked for is not there, or is not what it should be. Registries come back, and logins are renewed.
    pub fn is_final(&self) -> bool {
        match self {
            NoIndex::Discovery(error) => is_missing(error),
            NoIndex::Index { source, .. } | NoIndex::Blob { source, .. } => is_missing(source),
            NoIndex::Disabled | NoIndex::InvalidExplicit(_) | NoIndex::NotFound | NoIndex::Invalid { .. } => true,
            NoIndex::Store(_) | NoIndex::TimedOut(_) | NoIndex::Aborted => false,
        }
    }
}

fn is_missing(error: &RegistryError) -> bool {
    matches!(error.class(), Class::NotFound | Class::Mismatch)
}

/// Told how long things took; for metrics. Must not block.
pub trait Observer: Send + Sync {
    /// An index with all its blobs, found here or fetched, or the attempt.
    fn index_fetched(&self, index: Digest, took: Duration);
    /// A zTOC that had to be fetched.
    fn ztoc_fetched(&self, layer: Digest, took: Duration);
}

struct Unobserved;

impl Observer for Unobserved {
    fn index_fetched(&self, _: Digest, _: Duration) {}
    fn ztoc_fetched(&self, _: Digest, _: Duration) {}
}

/// The indexes of all images. Cheap to clone.
#[derive(Clone)]
pub struct Indexes {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    store: ContentStore,
    settings: RwLock<DiscoverySettings>,
    observer: Arc<dyn Observer>,
    flights: Flights<Key, Arc<SociIndex>, NoIndex>,
}

/// What the result of a search depends on. The repository is part of it: another one may have what this one lacks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    locator: String,
    manifest: Digest,
    explicit: Option<Digest>,
    ways: Ways,
}

impl Indexes {
    pub fn new(registry: Registry, store: ContentStore, settings: DiscoverySettings) -> Indexes {
        Indexes::observed(registry, store, settings, Arc::new(Unobserved))
    }

    /// As [`Indexes::new`]; `observer` is told how long things took.
    pub fn observed(
        registry: Registry,
        store: ContentStore,
        settings: DiscoverySettings,
        observer: Arc<dyn Observer>,
    ) -> Indexes {
        let flights = Flights::new(CAPACITY, BELIEF, || NoIndex::Aborted);
        Indexes { inner: Arc::new(Inner { registry, store, settings: RwLock::new(settings), observer, flights }) }
    }

    /// The index of `image`, when it and all its zTOCs are here. Cancel-safe: the search goes on for the next who asks.
    pub async fn get(&self, image: &ImageTarget) -> Result<Arc<SociIndex>, NoIndex> {
        self.search(image, Ways::Configured).await
    }

    /// As [`Indexes::get`], looking where `ways` says.
    pub async fn search(&self, image: &ImageTarget, ways: Ways) -> Result<Arc<SociIndex>, NoIndex> {
        let explicit = explicit(image)?;
        let settings = self.inner.settings();
        if explicit.is_none() && !settings.v1 && !settings.v2 && ways == Ways::Configured {
            return Err(NoIndex::Disabled);
        }
        let key = Key { locator: image.reference.locator(), manifest: image.manifest, explicit, ways };
        let (inner, image) = (self.inner.clone(), image.clone());
        self.inner
            .flights
            .get(key, move || async move {
                match tokio::time::timeout(TIME_LIMIT, inner.find(&image, explicit, ways)).await {
                    Ok(result) => result.map(Arc::new),
                    Err(_) => Err(NoIndex::TimedOut(TIME_LIMIT)),
                }
            })
            .await
    }

    /// The index that [`Indexes::get`] would give, by what is written in it: none of its blobs is fetched, so they may be missing or wrong.
    pub async fn preview(&self, image: &ImageTarget) -> Result<Arc<SociIndex>, NoIndex> {
        let explicit = explicit(image)?;
        let inner = &self.inner;
        let repository = inner.registry.repository(&image.reference).map_err(NoIndex::Discovery)?;
        let found =
            discover::find(&repository, &inner.store, &inner.settings(), image.manifest, explicit, Ways::Configured)
                .await?;
        fetch::preview(&repository, &inner.store, &inner.settings(), &found).await.map(Arc::new)
    }

    /// Brings a zTOC here that was here before, and is damaged or gone. `index`: which SOCI index of the image named it, if that is known. Unlike a
    /// search, a failure is not remembered: somebody waits for the next attempt.
    pub async fn bring_back(&self, image: &ImageTarget, index: Option<Digest>, ztoc: Digest) -> Result<(), NoIndex> {
        let inner = &self.inner;
        let work = async {
            let repository = inner.registry.repository(&image.reference).map_err(NoIndex::Discovery)?;
            // What was accepted once is accepted again, whatever is configured now.
            let settings = inner.settings();
            let found = discover::find(&repository, &inner.store, &settings, image.manifest, index, Ways::All).await?;
            fetch::ztoc(&repository, &inner.store, &settings, &found, ztoc).await
        };
        tokio::time::timeout(TIME_LIMIT, work).await.unwrap_or(Err(NoIndex::TimedOut(TIME_LIMIT)))
    }

    /// Other settings for searches that begin from now on.
    pub fn reconfigure(&self, settings: DiscoverySettings) {
        *self.inner.settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// Removes what is not in use from the content store; see [`ContentStore::collect`]. None if that had to be left
    /// for later, because something is being looked for. Blocks; searches that begin meanwhile wait. What earlier searches have found and is
    /// not in use yet must be held back by the caller.
    pub fn collect(&self, in_use: &InUse) -> Option<Result<usize, StoreError>> {
        self.inner.flights.forget_during(|| self.inner.store.collect(in_use))
    }

    /// Where the zTOC of an index that [`Indexes::get`] gave is.
    pub fn ztoc_path(&self, ztoc: &Digest) -> PathBuf {
        self.inner.store.path(ztoc)
    }

    /// Which spans of `layer` to load first, if the index says so. What cannot be read is named in the log.
    pub async fn prefetch(&self, index: &SociIndex, layer: &Digest) -> Option<Prefetch> {
        let blob = index.prefetch.get(layer)?;
        tracing::info!(target: ROUTINE_TARGET, digest = %blob.digest, layer = %layer, "Loading prefetch artifact");
        let read = self.inner.store.read(blob.digest, prefetch::MAX_SIZE).await;
        let parsed = match read {
            Ok(Some(bytes)) => prefetch::parse(&bytes).map_err(|e| e.to_string()),
            Ok(None) => Err("it is not in the content store".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        match parsed {
            Ok(parsed) => {
                tracing::info!(
                    target: ROUTINE_TARGET,
                    digest = %blob.digest,
                    "Successfully loaded prefetch artifact with {} span ranges",
                    parsed.len()
                );
                Some(parsed)
            }
            Err(error) => {
                say!(PrefetchUnusable, digest = %blob.digest, error, "cannot use the prefetch artifact");
                None
            }
        }
    }
}

/// The index that the image's client named.
fn explicit(image: &ImageTarget) -> Result<Option<Digest>, NoIndex> {
    match image.explicit.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| NoIndex::InvalidExplicit(text.chars().take(100).collect())),
    }
}

impl Inner {
    fn settings(&self) -> DiscoverySettings {
        *self.settings.read().unwrap_or_else(PoisonError::into_inner)
    }

    async fn find(&self, image: &ImageTarget, explicit: Option<Digest>, ways: Ways) -> Result<SociIndex, NoIndex> {
        let repository = self.registry.repository(&image.reference).map_err(NoIndex::Discovery)?;
        let settings = self.settings();
        let found = discover::find(&repository, &self.store, &settings, image.manifest, explicit, ways).await?;
        // Read by tests and scripts: this text, and text fields only.
        tracing::info!(
            digest = %found.digest,
            image = %image.reference,
            "fetching SOCI artifacts using index descriptor"
        );
        let started = Instant::now();
        let index = fetch::index(&repository, &self.store, &settings, self.observer.as_ref(), &found).await;
        self.observer.index_fetched(found.digest, started.elapsed());
        index
    }
}
