//! Getting an index and its blobs into the content store (`formats.md` 5.5), bytes as they came.
//!
//! zTOCs are what a first start waits for, so all come at once, and a large one in several ranges: at 10 ms of latency a
//! single connection spends more time growing its window than sending. One zTOC that cannot be had fails the index, as in
//! the Go snapshotter; an image that is half lazy by accident would be hard to explain. Prefetch artifacts are advice, and a
//! missing one is a warning.

use super::{
    BlobRef, ContentStore, DiscoverySettings, NoIndex, Observer, SociIndex, StoreError, ZtocDescriptor,
    discover::Found, prefetch, store::Ingest,
};
use crate::telemetry::{catalog::say, logs::ROUTINE_TARGET};
use crate::{
    oci::{Descriptor, Digest, Manifest, annotation, media_type},
    registry::{Class, HostId, RegistryError, Repository},
};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Largest index: what registries accept as a manifest.
pub(super) const INDEX_MAX: u64 = 4 << 20;
/// Blobs of one index fetched at a time.
const BLOBS_AT_ONCE: usize = 8;
/// A blob is fetched in ranges of at least this much …
const PIECE_MIN: u64 = 512 << 10;
/// … and at most this many.
const PIECES_MAX: u64 = 8;
/// Written at a time.
const WRITE: usize = 256 << 10;
/// How often a range is taken up again where its body broke off. The requests themselves are retried below this.
const RESUMES: u32 = 8;

/// The index `found`, with everything in it that is needed here.
pub(super) async fn index(
    repository: &Repository,
    store: &ContentStore,
    settings: &DiscoverySettings,
    observer: &dyn Observer,
    found: &Found,
) -> Result<SociIndex, NoIndex> {
    let manifest = read(&manifest(repository, store, found).await?)?;
    let mut index = plan(found.digest, manifest, settings)?;
    let mut seen = HashSet::new();
    let ztocs: Vec<_> =
        index.layers.iter().map(|(layer, z)| (*layer, BlobRef { digest: z.digest, size: z.size })).collect();
    let ztocs = ztocs.into_iter().filter(|(_, blob)| seen.insert(blob.digest));
    stream::iter(ztocs.map(Ok))
        .try_for_each_concurrent(BLOBS_AT_ONCE, |(layer, blob)| async move {
            let started = Instant::now();
            match ensure(repository, store, found.digest, blob).await? {
                Origin::Here => {}
                Origin::Fetched => observer.ztoc_fetched(layer, started.elapsed()),
            }
            Ok(())
        })
        .await?;
    let missing: HashSet<Digest> = stream::iter(index.prefetch.clone())
        .map(|(layer, blob)| async move {
            let result = ensure(repository, store, found.digest, blob).await;
            result.err().map(|error| {
                say!(PrefetchUnusable, digest = %blob.digest, error = %error, "cannot fetch the prefetch artifact");
                layer
            })
        })
        .buffer_unordered(BLOBS_AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    index.prefetch.retain(|layer, _| !missing.contains(layer));
    Ok(index)
}

/// Sees to it that `wanted`, a zTOC of the index `found`, is in the store.
pub(super) async fn ztoc(
    repository: &Repository,
    store: &ContentStore,
    settings: &DiscoverySettings,
    found: &Found,
    wanted: Digest,
) -> Result<(), NoIndex> {
    let index = preview(repository, store, settings, found).await?;
    let Some(ztoc) = index.layers.values().find(|ztoc| ztoc.digest == wanted) else {
        let what = format!("the SOCI index {} has no zTOC {wanted} any more", found.digest);
        return Err(NoIndex::Invalid { what });
    };
    ensure(repository, store, found.digest, BlobRef { digest: wanted, size: ztoc.size }).await.map(drop)
}

/// The index `found`, without its blobs.
pub(super) async fn preview(
    repository: &Repository,
    store: &ContentStore,
    settings: &DiscoverySettings,
    found: &Found,
) -> Result<SociIndex, NoIndex> {
    plan(found.digest, read(&manifest(repository, store, found).await?)?, settings)
}

/// The bytes of the index, from here or from the registry.
async fn manifest(repository: &Repository, store: &ContentStore, found: &Found) -> Result<Bytes, NoIndex> {
    if let Some(bytes) = store.read(found.digest, INDEX_MAX).await.map_err(NoIndex::Store)? {
        return Ok(bytes);
    }
    tracing::info!(digest = %found.digest, "fetching SOCI index from remote registry");
    let failed = |error| NoIndex::Index { index: found.digest, source: Box::new(error) };
    let fetched = repository.manifest(&found.digest.to_string()).await.map_err(failed)?;
    if let Some(size) = found.size
        && size != fetched.bytes.len() as u64
    {
        let what = format!("the SOCI index has {} bytes, not {size} as its descriptor says", fetched.bytes.len());
        return Err(NoIndex::Invalid { what });
    }
    // Before it is kept: what is no index has no business in the store.
    read(&fetched.bytes)?;
    store.put(found.digest, fetched.bytes.clone()).await.map_err(NoIndex::Store)?;
    Ok(fetched.bytes)
}

/// An index, if it is one.
fn read(bytes: &[u8]) -> Result<Manifest, NoIndex> {
    let invalid = |what: String| NoIndex::Invalid { what };
    if bytes.len() as u64 > INDEX_MAX {
        return Err(invalid(format!("the SOCI index is larger than {INDEX_MAX} bytes")));
    }
    let manifest: Manifest =
        serde_json::from_slice(bytes).map_err(|error| invalid(format!("the SOCI index cannot be read: {error}")))?;
    if !manifest.media_type.is_empty() && !media_type::is_manifest(&manifest.media_type) {
        return Err(invalid(format!("the SOCI index is not a manifest but {:?}", shortened(&manifest.media_type))));
    }
    match manifest.config.media_type.as_str() {
        media_type::SOCI_INDEX_V1 | media_type::SOCI_INDEX_V2 => Ok(manifest),
        other => Err(invalid(format!("unknown index version: {:?}", shortened(other)))),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Which blobs of the index belong to which layers. Pure.
fn plan(digest: Digest, manifest: Manifest, settings: &DiscoverySettings) -> Result<SociIndex, NoIndex> {
    let mut layers = HashMap::new();
    let mut prefetch = HashMap::new();
    let mut sizes = HashMap::new();
    for blob in &manifest.layers {
        let is_ztoc = blob.media_type == media_type::ZTOC;
        if !is_ztoc && blob.media_type != media_type::SOCI_PREFETCH {
            continue;
        }
        let Some(layer) = layer_of(blob) else {
            say!(IndexStrange, digest = %blob.digest, "a blob of the SOCI index does not say to which layer it belongs");
            continue;
        };
        if is_ztoc {
            if blob.size > settings.ztoc_max {
                let what = format!("zTOC {} has {} bytes, more than {}", blob.digest, blob.size, settings.ztoc_max);
                return Err(NoIndex::Invalid { what });
            }
            if *sizes.entry(blob.digest).or_insert(blob.size) != blob.size {
                return Err(NoIndex::Invalid { what: format!("zTOC {} has two sizes", blob.digest) });
            }
            let disable_xattrs = blob.annotations.get(annotation::DISABLE_XATTRS).is_some_and(|v| is_true(v));
            layers.insert(layer, ZtocDescriptor { digest: blob.digest, size: blob.size, disable_xattrs });
        } else if settings.prefetch && blob.size <= prefetch::MAX_SIZE {
            prefetch.entry(layer).or_insert(BlobRef { digest: blob.digest, size: blob.size });
        }
    }
    let total = sizes.values().fold(0u64, |sum, size| sum.saturating_add(*size));
    if total > settings.ztocs_max {
        let what = format!("the zTOCs of the SOCI index have {total} bytes, more than {}", settings.ztocs_max);
        return Err(NoIndex::Invalid { what });
    }
    Ok(SociIndex { digest, manifest, layers, prefetch })
}

fn layer_of(blob: &Descriptor) -> Option<Digest> {
    blob.annotations.get(annotation::LAYER_DIGEST)?.parse().ok()
}

/// As Go reads booleans.
fn is_true(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "TRUE" | "true" | "True")
}

/// Where a blob was found.
enum Origin {
    Here,
    Fetched,
}

/// Sees to it that a blob is in the store.
async fn ensure(
    repository: &Repository,
    store: &ContentStore,
    index: Digest,
    blob: BlobRef,
) -> Result<Origin, NoIndex> {
    if store.holds(blob.digest, blob.size).await.map_err(NoIndex::Store)? {
        return Ok(Origin::Here);
    }
    tracing::info!(target: ROUTINE_TARGET, digest = %blob.digest, "fetching artifact from remote");
    let failed = |error| match error {
        Error::Registry(error) => NoIndex::Blob { index, blob: blob.digest, source: Box::new(error) },
        Error::Store(error) => NoIndex::Store(error),
    };
    let first = fetch(repository, store, blob, &[]).await.map_err(failed)?;
    if let Fetched::Corrupt { from } = first {
        // From elsewhere, if there is an elsewhere; or once more.
        if let Fetched::Corrupt { .. } = fetch(repository, store, blob, &from).await.map_err(failed)? {
            let what =
                format!("the bytes of blob {} of the SOCI index {index} are not what they should be", blob.digest);
            return Err(NoIndex::Invalid { what });
        }
    }
    Ok(Origin::Fetched)
}

enum Fetched {
    Stored,
    Corrupt { from: Vec<HostId> },
}

enum Error {
    Registry(RegistryError),
    Store(StoreError),
}

async fn fetch(
    repository: &Repository,
    store: &ContentStore,
    blob: BlobRef,
    avoid: &[HostId],
) -> Result<Fetched, Error> {
    let ingest = store.ingest(blob.digest).await.map_err(Error::Store)?;
    let download = Download { repository, blob, avoid, ingest: &ingest, from: Mutex::default() };
    let pieces =
        stream::iter(pieces(blob.size).map(Ok)).try_for_each_concurrent(None, |range| download.piece(range)).await;
    match pieces {
        Err(Error::Registry(RegistryError::RangesUnsupported { .. })) => download.piece(0..blob.size).await?,
        other => other?,
    }
    let from = download.from.into_inner().unwrap_or_else(PoisonError::into_inner);
    match ingest.commit().await {
        Ok(()) => Ok(Fetched::Stored),
        Err(StoreError::Mismatch { .. }) => Ok(Fetched::Corrupt { from }),
        Err(error) => Err(Error::Store(error)),
    }
}

/// Cuts a blob into ranges to be fetched at the same time.
fn pieces(size: u64) -> impl Iterator<Item = Range<u64>> {
    let length = size.div_ceil(PIECES_MAX).max(PIECE_MIN);
    (0..size.div_ceil(length)).map(move |n| n * length..((n + 1) * length).min(size))
}

struct Download<'a> {
    repository: &'a Repository,
    blob: BlobRef,
    avoid: &'a [HostId],
    ingest: &'a Ingest,
    /// The hosts that served some of it.
    from: Mutex<Vec<HostId>>,
}

impl Download<'_> {
    /// Fetches `range`, taking it up where it breaks off.
    async fn piece(&self, range: Range<u64>) -> Result<(), Error> {
        let mut at = range.start;
        let mut resumes = 0;
        loop {
            let error = match self.stream(&mut at, range.end).await {
                Ok(()) => return Ok(()),
                Err(Error::Registry(error)) => error,
                Err(error) => return Err(error),
            };
            match error.class() {
                // The registry began with the whole blob and cannot go on in its middle.
                Class::RangesUnsupported if range.start == 0 && at > 0 => at = 0,
                // Requests were retried below; what is retried here is a body that broke off.
                Class::Retry(_) if at > range.start || resumes == 0 => {}
                _ => return Err(Error::Registry(error)),
            }
            resumes += 1;
            if resumes > RESUMES {
                return Err(Error::Registry(error));
            }
            tokio::time::sleep(Duration::from_millis(30) * resumes).await;
        }
    }

    async fn stream(&self, at: &mut u64, end: u64) -> Result<(), Error> {
        let mut body =
            self.repository.blob_range(self.blob.digest, *at..end, self.avoid).await.map_err(Error::Registry)?;
        {
            let mut from = self.from.lock().unwrap_or_else(PoisonError::into_inner);
            if !from.contains(&body.host()) {
                from.push(body.host());
            }
        }
        let mut ingest = self.ingest.clone();
        let mut pending = BytesMut::new();
        loop {
            let next = body.chunk().await;
            let ended = !matches!(next, Ok(Some(_)));
            if let Ok(Some(chunk)) = &next {
                pending.extend_from_slice(chunk);
            }
            if !pending.is_empty() && (ended || pending.len() >= WRITE) {
                let bytes = pending.split().freeze();
                let length = bytes.len() as u64;
                ingest.write(*at, bytes).await.map_err(Error::Store)?;
                *at += length;
            }
            match next {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(error) => return Err(Error::Registry(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(media_type: &str, content: &str, layer: &str, size: u64) -> Descriptor {
        let mut blob = Descriptor::new(media_type, Digest::of(content.as_bytes()), size);
        blob.annotations.insert(annotation::LAYER_DIGEST.into(), layer.into());
        blob
    }

    fn index_of(layers: Vec<Descriptor>) -> Manifest {
        Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.into(),
            artifact_type: String::new(),
            config: Descriptor::of(media_type::SOCI_INDEX_V2, b"{}"),
            layers,
            subject: None,
            annotations: Default::default(),
        }
    }

    #[test]
    fn only_soci_indexes_are_read() {
        let good = index_of(vec![]);
        assert_eq!(read(&good.to_canonical_json()), Ok(good.clone()));
        let mut image = good.clone();
        image.config.media_type = media_type::OCI_CONFIG.into();
        let mut list = good;
        list.media_type = media_type::OCI_INDEX.into();
        for bad in [image.to_canonical_json(), list.to_canonical_json(), b"{}".to_vec(), b"".to_vec()] {
            assert!(matches!(read(&bad), Err(NoIndex::Invalid { .. })));
        }
    }

    #[test]
    fn blobs_find_their_layers_the_last_ztoc_and_the_first_prefetch_win() {
        let layer = Digest::of(b"layer");
        let name = layer.to_string();
        let mut second = blob(media_type::ZTOC, "b", &name, 2);
        second.annotations.insert(annotation::DISABLE_XATTRS.into(), "true".into());
        let manifest = index_of(vec![
            blob(media_type::ZTOC, "a", &name, 1),
            second,
            blob(media_type::SOCI_PREFETCH, "p", &name, 3),
            blob(media_type::SOCI_PREFETCH, "q", &name, 3),
            blob(media_type::ZTOC, "c", "not a digest", 3),
            blob("text/plain", "d", &name, 3),
        ]);
        let settings = DiscoverySettings { prefetch: true, ..DiscoverySettings::default() };
        let index = plan(layer, manifest.clone(), &settings).unwrap();
        let ztoc = ZtocDescriptor { digest: Digest::of(b"b"), size: 2, disable_xattrs: true };
        assert_eq!(index.layers, HashMap::from([(layer, ztoc)]));
        assert_eq!(index.prefetch, HashMap::from([(layer, BlobRef { digest: Digest::of(b"p"), size: 3 })]));
        assert!(plan(layer, manifest, &DiscoverySettings::default()).unwrap().prefetch.is_empty());
    }

    #[test]
    fn ztocs_have_a_largest_size_each_and_together() {
        let name = Digest::of(b"layer").to_string();
        let settings = DiscoverySettings { ztoc_max: 10, ztocs_max: 15, ..DiscoverySettings::default() };
        let planned = |blobs: Vec<Descriptor>| plan(Digest::of(b""), index_of(blobs), &settings).is_ok();
        assert!(planned(vec![blob(media_type::ZTOC, "a", &name, 10)]));
        assert!(!planned(vec![blob(media_type::ZTOC, "a", &name, 11)]));
        assert!(!planned(vec![blob(media_type::ZTOC, "a", &name, 10), blob(media_type::ZTOC, "b", &name, 6)]));
        assert!(planned(vec![blob(media_type::ZTOC, "a", &name, 10), blob(media_type::ZTOC, "a", &name, 10)]));
        assert!(!planned(vec![blob(media_type::ZTOC, "a", &name, 10), blob(media_type::ZTOC, "a", &name, 9)]));
    }

    #[test]
    fn pieces_cover_a_blob_once() {
        for size in [0, 1, PIECE_MIN, PIECE_MIN + 1, 3 << 20, (64 << 20) + 7] {
            let mut at = 0;
            let mut count = 0;
            for piece in pieces(size) {
                assert_eq!(piece.start, at);
                assert!(!piece.is_empty());
                (at, count) = (piece.end, count + 1);
            }
            assert!(at == size && count <= PIECES_MAX, "{size}");
        }
    }
}
