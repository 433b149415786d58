//! The content store: where fetched indexes and zTOCs are kept, under their digests.
//!
//! Invariant: a blob appears under its name only after its bytes matched that name. Nothing is synced to disk, so a power
//! failure may still leave a torn blob: what is found here is hashed once before it is relied on, and replaced if it is not
//! what it should be.

use crate::{
    layout::Layout,
    oci::{Digest, Hasher, media_type},
};
use bytes::Bytes;
use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

/// Version of the OCI image layout written and understood.
const LAYOUT_VERSION: &str = "1.0.0";
/// Leftovers in `ingest` that are older belong to nobody: no fetch takes as long.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// Largest list of a store's manifests that is read: some ten thousand of them.
const LISTING_MAX: u64 = 4 << 20;

/// What must stay in the content store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InUse {
    /// Of layers that are shown.
    pub ztocs: HashSet<Digest>,
    /// Those by which layers became lazy that are shown, with all that they name.
    pub indexes: HashSet<Digest>,
    /// zTOCs of layers of which that is not known: every index that names one of them stays.
    pub of_some_index: HashSet<Digest>,
}

/// `index.json`, as far as we care.
#[derive(Default, serde::Deserialize)]
struct Listing {
    #[serde(default)]
    manifests: Vec<Entry>,
}

#[derive(serde::Deserialize)]
struct Entry {
    digest: String,
}

/// What tells a SOCI index of the first version from other manifests.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<Config>,
    subject: Entry,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    media_type: String,
}

impl Listed {
    fn is_index_of(&self, manifest: Digest) -> bool {
        let config = self.config.as_ref().map(|config| config.media_type.as_str());
        let soci = [self.artifact_type.as_deref(), config].contains(&Some(media_type::SOCI_INDEX_V1));
        soci && self.subject.digest.parse() == Ok(manifest)
    }
}

/// Largest database of the soci tool that is looked through: a row takes some hundred bytes.
const MAX_RECORDS: u64 = 256 << 20;
/// Largest manifest or index that is looked into: what registries accept.
const MAX_MANIFEST: u64 = 4 << 20;

/// Why the store does not work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("{path}: {what}")]
    Io { path: String, what: String },
    #[error("{path} is of version {version:?}, not {LAYOUT_VERSION}")]
    Version { path: String, version: String },
    #[error("the content has digest {actual}, not {expected}")]
    Mismatch { expected: Digest, actual: Digest },
}

impl StoreError {
    fn io(path: &Path, error: &io::Error) -> StoreError {
        StoreError::Io { path: path.display().to_string(), what: error.to_string() }
    }
}

/// Where blobs are kept.
#[derive(Debug, Clone)]
pub enum ContentStore {
    /// An OCI image layout of our own: `content_store.type = "soci"`.
    Soci(OciLayout),
}

impl ContentStore {
    /// Opens the store below `layout`, or makes it.
    pub fn soci(layout: &Layout) -> Result<ContentStore, StoreError> {
        Ok(ContentStore::Soci(OciLayout::open(layout)?))
    }

    /// Where a blob is, if it is here.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        match self {
            ContentStore::Soci(layout) => layout.layout.content_blob(digest),
        }
    }

    /// A blob of at most `max` bytes. One that is not what its name says counts as absent.
    pub async fn read(&self, digest: Digest, max: u64) -> Result<Option<Bytes>, StoreError> {
        let path = self.path(&digest);
        blocking(move || {
            let Some(file) = open(&path)? else { return Ok(None) };
            let mut bytes = Vec::new();
            file.take(max.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| StoreError::io(&path, &e))?;
            let intact = bytes.len() as u64 <= max && Digest::of(&bytes) == digest;
            Ok(intact.then(|| bytes.into()))
        })
        .await
    }

    /// Whether a blob is here, with this size and with the bytes that its name says.
    pub async fn holds(&self, digest: Digest, size: u64) -> Result<bool, StoreError> {
        let path = self.path(&digest);
        blocking(move || {
            let Some(file) = open(&path)? else { return Ok(false) };
            let found = file.metadata().map_err(|e| StoreError::io(&path, &e))?.len();
            Ok(found == size && hash(file, &path)? == digest)
        })
        .await
    }

    /// The SOCI index here whose subject is that image manifest. Only a store that the Go snapshotter filled lists what is in it.
    pub async fn index_of(&self, manifest: Digest) -> Result<Option<Digest>, StoreError> {
        let ContentStore::Soci(layout) = self;
        let path = layout.layout.content_index();
        let listed = blocking(move || {
            let Some(file) = open(&path)? else { return Ok(Vec::new()) };
            let mut bytes = Vec::new();
            file.take(LISTING_MAX).read_to_end(&mut bytes).map_err(|e| StoreError::io(&path, &e))?;
            // A list that cannot be read lists nothing: it is looked at for the sake of speed only.
            let listing: Listing = serde_json::from_slice(&bytes).unwrap_or_default();
            Ok(listing.manifests.into_iter().filter_map(|entry| entry.digest.parse().ok()).collect::<Vec<Digest>>())
        });
        for digest in listed.await? {
            let Some(bytes) = self.read(digest, super::fetch::INDEX_MAX).await? else { continue };
            let read: Option<Listed> = serde_json::from_slice(&bytes).ok();
            if read.is_some_and(|read| read.is_index_of(manifest)) {
                return Ok(Some(digest));
            }
        }
        Ok(None)
    }

    /// Keeps `bytes`, which must have this digest.
    pub async fn put(&self, digest: Digest, bytes: Bytes) -> Result<(), StoreError> {
        let mut ingest = self.ingest(digest).await?;
        ingest.write(0, bytes).await?;
        ingest.commit().await
    }

    /// Removes what is not in use: indexes and zTOCs of images that are gone. An index that is in use stays, with
    /// everything it names, and so does what the soci tool has made here and has in its records. Returns how many blobs went. Blocks; only while
    /// nobody looks for an index, who might find half of one.
    pub fn collect(&self, in_use: &InUse) -> Result<usize, StoreError> {
        let ContentStore::Soci(layout) = self;
        let directory = layout.layout.content().join("blobs/sha256");
        let error = |e: io::Error| StoreError::io(&directory, &e);
        let mut blobs = Vec::new();
        let made_here = recorded(&layout.layout.artifacts_db())?;
        let mut kept: HashSet<Digest> = in_use.ztocs.union(&made_here).copied().collect();
        for entry in fs::read_dir(&directory).map_err(error)? {
            let entry = entry.map_err(error)?;
            let Some(digest) = entry.file_name().to_str().and_then(|name| Digest::from_hex(name).ok()) else {
                continue;
            };
            let named = named_in(&entry.path()).unwrap_or_default();
            let is_used = in_use.indexes.contains(&digest) || named.iter().any(|d| in_use.of_some_index.contains(d));
            if is_used || made_here.contains(&digest) {
                kept.insert(digest);
                kept.extend(named);
            }
            blobs.push((digest, entry.path()));
        }
        let mut removed = 0;
        for (_, path) in blobs.iter().filter(|(digest, _)| !kept.contains(digest)) {
            fs::remove_file(path).map_err(|e| StoreError::io(path, &e))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// A place to write a blob to, in any order.
    pub(super) async fn ingest(&self, digest: Digest) -> Result<Ingest, StoreError> {
        let ContentStore::Soci(layout) = self;
        let (directory, target) = (layout.ingest(), self.path(&digest));
        blocking(move || {
            let file = tempfile::Builder::new()
                .prefix(&format!("{}_", digest.hex()))
                .tempfile_in(&directory)
                .map_err(|e| StoreError::io(&directory, &e))?;
            Ok(Ingest { file: Arc::new(file), target, digest })
        })
        .await
    }
}

/// A blob being written. Dropped without a commit, it is gone.
#[derive(Clone)]
pub(super) struct Ingest {
    file: Arc<tempfile::NamedTempFile>,
    target: PathBuf,
    digest: Digest,
}

impl Ingest {
    /// Writes `bytes` at `at`.
    pub async fn write(&mut self, at: u64, bytes: Bytes) -> Result<(), StoreError> {
        let file = self.file.clone();
        blocking(move || file.as_file().write_all_at(&bytes, at).map_err(|e| StoreError::io(file.path(), &e))).await
    }

    /// Puts the blob under its name if its bytes are what the name says, and on disk: a snapshot that is committed next counts on its zTOC after a
    /// power cut, when there may be nobody to fetch it from again. Writers that are still about must be gone.
    pub async fn commit(self) -> Result<(), StoreError> {
        blocking(move || {
            let path = self.file.path().to_owned();
            let read = File::open(&path).map_err(|e| StoreError::io(&path, &e))?;
            let actual = hash(read, &path)?;
            if actual != self.digest {
                return Err(StoreError::Mismatch { expected: self.digest, actual });
            }
            self.file
                .as_file()
                .set_permissions(Permissions::from_mode(0o444))
                .and_then(|()| self.file.as_file().sync_data())
                .and_then(|()| fs::rename(&path, &self.target))
                .and_then(|()| settle(&self.target))
                .map_err(|e| StoreError::io(&self.target, &e))
        })
        .await
    }
}

/// An OCI image layout directory.
#[derive(Debug, Clone)]
pub struct OciLayout {
    layout: Layout,
}

impl OciLayout {
    fn open(layout: &Layout) -> Result<OciLayout, StoreError> {
        let this = OciLayout { layout: layout.clone() };
        let root = layout.content();
        for directory in [root.join("blobs/sha256"), this.ingest()] {
            fs::create_dir_all(&directory).map_err(|e| StoreError::io(&directory, &e))?;
        }
        let marker = root.join("oci-layout");
        match fs::read(&marker) {
            Ok(text) => check_version(&marker, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = format!("{{\"imageLayoutVersion\":\"{LAYOUT_VERSION}\"}}");
                write_new(&this.ingest(), &marker, text.as_bytes())?;
            }
            Err(error) => return Err(StoreError::io(&marker, &error)),
        }
        let index = root.join("index.json");
        if !index.exists() {
            write_new(&this.ingest(), &index, br#"{"schemaVersion":2,"manifests":[]}"#)?;
        }
        this.sweep();
        Ok(this)
    }

    fn ingest(&self) -> PathBuf {
        self.layout.content().join("ingest")
    }

    /// Removes what unfinished writes of the past left. Failing to is harmless.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(self.ingest()) else { return };
        for entry in entries.flatten() {
            let age =
                entry.metadata().and_then(|m| m.modified()).ok().and_then(|m| SystemTime::now().duration_since(m).ok());
            if age.is_some_and(|age| age > STALE) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn check_version(marker: &Path, text: &[u8]) -> Result<(), StoreError> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Marker {
        #[serde(default)]
        image_layout_version: String,
    }
    let version = serde_json::from_slice::<Marker>(text).map(|m| m.image_layout_version).unwrap_or_default();
    if version == LAYOUT_VERSION {
        return Ok(());
    }
    Err(StoreError::Version { path: marker.display().to_string(), version: version.chars().take(50).collect() })
}

/// What an index or manifest at `path` names; nothing for anything else.
fn named_in(path: &Path) -> Option<Vec<Digest>> {
    #[derive(serde::Deserialize)]
    struct Named {
        digest: Digest,
    }
    #[derive(serde::Deserialize)]
    struct Naming {
        #[serde(default)]
        config: Option<Named>,
        #[serde(default)]
        layers: Vec<Named>,
        #[serde(default)]
        blobs: Vec<Named>,
        #[serde(default)]
        manifests: Vec<Named>,
    }
    let mut file = File::open(path).ok()?;
    let mut text = [0; 1];
    file.read_exact(&mut text).ok()?;
    // zTOCs are large, and no JSON.
    if text != *b"{" || file.metadata().ok()?.len() > MAX_MANIFEST {
        return None;
    }
    let naming: Naming = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let all = naming.config.into_iter().chain(naming.layers).chain(naming.blobs).chain(naming.manifests);
    Some(all.map(|named| named.digest).collect())
}

/// The name of a file that is on disk is, too.
fn settle(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Every digest that is written anywhere in the soci tool's records. The tool may be changing them at this moment, and what it has deleted may
/// still be in a page that is not used again yet: more than there is does no harm.
fn recorded(database: &Path) -> Result<HashSet<Digest>, StoreError> {
    let error = |e: io::Error| StoreError::io(database, &e);
    let mut bytes = Vec::new();
    match File::open(database) {
        Ok(file) => file.take(MAX_RECORDS + 1).read_to_end(&mut bytes).map_err(error)?,
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(HashSet::new()),
        Err(other) => return Err(error(other)),
    };
    if bytes.len() as u64 > MAX_RECORDS {
        return Err(error(io::Error::other("too large to be looked through")));
    }
    let prefix = b"sha256:";
    let starts = bytes.windows(prefix.len()).enumerate().filter(|(_, window)| *window == prefix);
    let texts = starts.filter_map(|(at, _)| bytes.get(at + prefix.len()..at + prefix.len() + 64));
    Ok(texts.filter_map(|hex| Digest::from_hex(std::str::from_utf8(hex).ok()?).ok()).collect())
}

/// Writes a whole file or none; after a power cut, too.
fn write_new(ingest: &Path, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let error = |e: io::Error| StoreError::io(path, &e);
    let mut file = tempfile::NamedTempFile::new_in(ingest).map_err(error)?;
    file.write_all(bytes).map_err(error)?;
    file.as_file().set_permissions(Permissions::from_mode(0o644)).map_err(error)?;
    file.as_file().sync_data().map_err(error)?;
    file.persist(path).map_err(|e| error(e.error))?;
    settle(path).map_err(error)
}

fn open(path: &Path) -> Result<Option<File>, StoreError> {
    // Not through a link: names here are digests and nothing else.
    match OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io(path, &error)),
    }
}

fn hash(mut file: File, path: &Path) -> Result<Digest, StoreError> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(|e| StoreError::io(path, &e))? {
            0 => return Ok(hasher.finish()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(StoreError::Io { path: "content store".into(), what: format!("the work was given up: {error}") })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blobs(layout: &Layout) -> usize {
        fs::read_dir(layout.content().join("ingest")).unwrap().count()
            + fs::read_dir(layout.content().join("blobs/sha256")).unwrap().count()
    }

    #[tokio::test]
    async fn only_what_matches_its_name_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        let store = ContentStore::soci(&layout).unwrap();
        let (good, bytes) = (Digest::of(b"good"), Bytes::from_static(b"good"));
        store.put(good, bytes.clone()).await.unwrap();
        assert_eq!(store.read(good, 4).await.unwrap(), Some(bytes.clone()));
        assert_eq!(store.read(good, 3).await.unwrap(), None, "larger than allowed");
        assert!(store.holds(good, 4).await.unwrap() && !store.holds(good, 5).await.unwrap());
        assert!(matches!(store.put(Digest::of(b"x"), bytes).await, Err(StoreError::Mismatch { .. })));
        assert_eq!(blobs(&layout), 1, "nothing else is left");
        let mode = fs::metadata(store.path(&good)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o444);
    }

    #[tokio::test]
    async fn a_torn_blob_counts_as_absent_and_can_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = ContentStore::soci(&Layout::new(dir.path())).unwrap();
        let digest = Digest::of(b"good");
        fs::write(store.path(&digest), b"goo\0").unwrap();
        assert_eq!(store.read(digest, 9).await.unwrap(), None);
        assert!(!store.holds(digest, 4).await.unwrap());
        store.put(digest, Bytes::from_static(b"good")).await.unwrap();
        assert!(store.holds(digest, 4).await.unwrap());
    }

    #[tokio::test]
    async fn what_belongs_to_no_layer_is_collected_and_what_an_index_in_use_names_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        let store = ContentStore::soci(&layout).unwrap();
        let put = async |bytes: String| {
            let digest = Digest::of(bytes.as_bytes());
            store.put(digest, bytes.into()).await.unwrap();
            digest
        };
        let index = |ztocs: &[Digest]| {
            let layers: Vec<_> = ztocs.iter().map(|d| format!("{{\"digest\":\"{d}\",\"size\":1}}")).collect();
            format!("{{\"schemaVersion\":2,\"layers\":[{}]}}", layers.join(","))
        };
        let (used, sibling, gone) = (put("used".into()).await, put("sibling".into()).await, put("gone".into()).await);
        let (in_use, unused) = (put(index(&[used, sibling])).await, put(index(&[gone])).await);
        put("{not json".into()).await;
        let by_index = InUse { indexes: HashSet::from([in_use]), ..InUse::default() };
        let by_ztoc = InUse { of_some_index: HashSet::from([used]), ..InUse::default() };
        assert_eq!(store.collect(&by_index).unwrap(), 3);
        assert_eq!(store.collect(&by_ztoc).unwrap(), 0);
        for digest in [used, sibling, in_use] {
            assert!(store.path(&digest).exists());
        }
        assert!(!store.path(&gone).exists() && !store.path(&unused).exists());
        // Made with the soci tool, and not in use on this node.
        fs::write(layout.artifacts_db(), format!("\0\u{1}{in_use}{{}}sha256:short")).unwrap();
        assert_eq!(store.collect(&InUse::default()).unwrap(), 0);
        fs::remove_file(layout.artifacts_db()).unwrap();
        // A shared layer does not keep the index of another image.
        let shared = InUse { ztocs: HashSet::from([used]), ..InUse::default() };
        assert_eq!(store.collect(&shared).unwrap(), 2);
        assert_eq!(store.collect(&InUse::default()).unwrap(), 1);
        assert_eq!(blobs(&layout), 0);
    }

    #[test]
    fn an_existing_layout_is_taken_over_and_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        ContentStore::soci(&layout).unwrap();
        let index = layout.content().join("index.json");
        fs::write(&index, "{\"schemaVersion\":2,\"manifests\":[1]}").unwrap();
        ContentStore::soci(&layout).unwrap();
        assert!(fs::read_to_string(&index).unwrap().contains("[1]"), "index.json is left alone");
        fs::write(layout.content().join("oci-layout"), "{\"imageLayoutVersion\":\"2.0.0\"}").unwrap();
        assert!(matches!(ContentStore::soci(&layout), Err(StoreError::Version { .. })));
    }
}
