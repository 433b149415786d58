//! containerd as a place of blobs: images are read from it, SOCI artifacts kept in it or in the soci content store.
//!
//! Everything new is written under a lease, and refers to what it needs by labels, before anything refers to *it*: so containerd never
//! collects half of an index, and what a command that failed has written goes with its lease (`formats.md` 4.5).

use super::{
    args::Global,
    artifacts::{Artifacts, ArtifactsError, Kind},
    blobs::{BlobError, Blobs, New, Sink, checked},
    interrupt::Stopped,
    layout::MAX_DOCUMENT,
    remote::Remote,
};
use crate::{
    grpc::containerd::{Containerd, ContainerdError, Image, Lease},
    index::{ContentStore, StoreError as ContentError},
    layout::Layout,
    oci::{Descriptor, Digest, Index, Manifest},
};
use bytes::Bytes;
use futures::stream;
use std::{
    collections::BTreeMap,
    io::{self, Read},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Prefix of the labels by which a blob or image keeps other blobs.
pub const REFERS: &str = "containerd.io/gc.ref.content";
/// As the Go tools.
const DIAL: Duration = Duration::from_secs(10);
/// Largest zTOC that is read back: what the reader of zTOCs accepts.
const MAX_ARTIFACT: u64 = 1 << 30;

/// Where SOCI artifacts are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    Containerd,
    Soci,
}

impl StoreKind {
    /// The value of `--content-store`.
    pub fn parse(text: &str) -> Result<StoreKind, SessionError> {
        match text {
            "containerd" | "" => Ok(StoreKind::Containerd),
            "soci" => Ok(StoreKind::Soci),
            other => Err(SessionError::UnknownStore(other.to_owned())),
        }
    }
}

/// Why a command could not begin.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("unknown content store type: {0}; must be one of [soci containerd]")]
    UnknownStore(String),
    #[error("image {0:?}: not found{hint}", hint = hint(.0))]
    NoImage(String),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    #[error("cannot use the soci content store")]
    Content(#[from] ContentError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// What people get wrong about names: containerd knows images by their full names.
fn hint(name: &str) -> &'static str {
    let first = name.split('/').next().unwrap_or_default();
    match name.contains('/') && (first.contains(['.', ':']) || first == "localhost") {
        true => " (`ctr images ls` lists what there is in a namespace; --namespace selects it)",
        false => " (containerd knows images by their full names, such as docker.io/library/NAME:TAG)",
    }
}

/// containerd, the database and the content store, as the global flags name them.
pub struct Session {
    pub remote: Remote,
    pub containerd: Containerd,
    pub artifacts: Artifacts,
    pub store: Store,
}

/// Where SOCI artifacts are kept.
#[derive(Debug, Clone)]
pub enum Store {
    Containerd,
    Soci(ContentStore),
}

/// The database, without anything else.
pub fn artifacts(global: &Global) -> Result<Artifacts, ArtifactsError> {
    let artifacts = Artifacts::new(&Layout::new(&global.root));
    artifacts.prepare()?;
    Ok(artifacts)
}

impl Session {
    /// Connects to what the global flags name.
    pub fn open(global: &Global) -> Result<Session, SessionError> {
        let kind = StoreKind::parse(&global.content_store)?;
        let artifacts = artifacts(global)?;
        let remote = Remote::new().map_err(SessionError::Runtime)?;
        let patience = if global.timeout.is_zero() { DIAL } else { global.timeout.min(DIAL) };
        let containerd = remote.wait(Containerd::connect(&global.address, &global.namespace, patience))??;
        let store = match kind {
            StoreKind::Containerd => Store::Containerd,
            StoreKind::Soci => Store::Soci(ContentStore::soci(&Layout::new(&global.root))?),
        };
        Ok(Session { remote, containerd, artifacts, store })
    }

    /// The image of that exact name.
    pub fn image(&self, name: &str) -> Result<Image, SessionError> {
        let found = self.remote.wait(self.containerd.image(name))??;
        found.ok_or_else(|| SessionError::NoImage(name.to_owned()))
    }

    /// A SOCI artifact of at most `max` bytes from the store, its digest checked; `None` if it is not there.
    pub fn artifact(&self, digest: Digest) -> Result<Option<Vec<u8>>, BlobError> {
        match &self.store {
            Store::Soci(store) => {
                let found = self.remote.wait(store.read(digest, MAX_ARTIFACT))??;
                Ok(found.map(Into::into))
            }
            Store::Containerd => {
                let Some(info) = self.remote.wait(self.containerd.info(digest))?? else { return Ok(None) };
                let bytes = self.whole(digest, info.size, MAX_ARTIFACT)?;
                bytes.map(|bytes| checked(&Descriptor::new("", digest, info.size), bytes)).transpose()
            }
        }
    }

    fn whole(&self, digest: Digest, size: u64, max: u64) -> Result<Option<Bytes>, BlobError> {
        if size > max {
            return Err(BlobError::TooLarge { what: digest.to_string(), size });
        }
        let read = async {
            let Some(mut reader) = self.containerd.read(digest, size).await? else { return Ok(None) };
            let mut bytes = Vec::new();
            while let Some(chunk) = reader.chunk().await? {
                bytes.extend_from_slice(&chunk);
            }
            Ok::<_, ContainerdError>(Some(Bytes::from(bytes)))
        };
        Ok(self.remote.wait(read)??)
    }

    /// A place to keep new blobs in.
    pub fn keeper(&self, purpose: Purpose) -> Result<Keeper<'_>, BlobError> {
        let lease = self.remote.wait(self.containerd.lease())??;
        let containerd = self.containerd.under(&lease);
        Ok(Keeper { session: self, purpose, containerd, lease: Some(lease), placed: Mutex::default() })
    }
}

impl Blobs for Session {
    fn place(&self) -> String {
        "containerd (`ctr content fetch --all-platforms IMAGE` gets what it lacks of an image)".to_owned()
    }

    fn has(&self, digest: Digest) -> Result<bool, BlobError> {
        Ok(self.remote.wait(self.containerd.info(digest))??.is_some())
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), BlobError> {
        let (digest, expected) = (descriptor.digest, descriptor.size);
        match self.remote.wait(self.containerd.info(digest))?? {
            None => Err(BlobError::Missing { digest, place: self.place() }),
            Some(info) if info.size != expected => Err(BlobError::Size { digest, expected, actual: info.size }),
            Some(_) => Ok(()),
        }
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, BlobError> {
        let bytes = self.whole(descriptor.digest, descriptor.size, MAX_DOCUMENT)?;
        checked(descriptor, bytes.ok_or_else(|| BlobError::Missing { digest: descriptor.digest, place: self.place() })?)
    }

    fn open(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, BlobError> {
        let found = self.remote.wait(self.containerd.read(descriptor.digest, descriptor.size))??;
        let reader = found.ok_or_else(|| BlobError::Missing { digest: descriptor.digest, place: self.place() })?;
        let chunks = stream::try_unfold(reader, |mut reader| async move {
            Ok::<_, ContainerdError>(reader.chunk().await?.map(|chunk| (chunk, reader)))
        });
        Ok(Box::new(self.remote.reader(chunks)))
    }
}

/// What blobs are kept for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// An index, which is the store's alone.
    Index,
    /// An image, which is containerd's to run and to push: it gets all of it. The soci store gets the SOCI artifacts as well, so that
    /// the daemon finds them there.
    Image,
}

/// Keeps new blobs under a lease, which is given back when this is dropped.
pub struct Keeper<'s> {
    session: &'s Session,
    purpose: Purpose,
    containerd: Containerd,
    lease: Option<Lease>,
    /// Files that are new in the soci content store, which has no leases: removed unless all goes well.
    placed: Mutex<Vec<Digest>>,
}

impl Keeper<'_> {
    /// containerd, under the lease.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// All is done and recorded: what was kept stays.
    pub fn done(self) {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn in_containerd(
        &self,
        digest: Digest,
        bytes: Vec<u8>,
        labels: &BTreeMap<String, String>,
    ) -> Result<(), BlobError> {
        Ok(self.session.remote.wait(self.containerd.write(digest, bytes.into(), labels))??)
    }

    fn in_soci(&self, store: &ContentStore, digest: Digest, bytes: Vec<u8>) -> Result<(), BlobError> {
        let size = bytes.len() as u64;
        if !self.session.remote.wait(store.holds(digest, size))?? {
            self.placed.lock().unwrap_or_else(PoisonError::into_inner).push(digest);
            self.session.remote.wait(store.put(digest, bytes.into()))??;
        }
        Ok(())
    }
}

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        if let Store::Soci(store) = &self.session.store {
            for digest in self.placed.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                let _ = std::fs::remove_file(store.path(&digest));
            }
        }
        if let Some(lease) = self.lease.take() {
            // If it cannot be given back now, containerd does it in a day.
            let _ = self.session.remote.wait_briefly(lease.give_back());
        }
    }
}

impl Sink for Keeper<'_> {
    fn put(&self, new: New<'_>) -> Result<(Digest, u64), BlobError> {
        let bytes = new.bytes();
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        let labels = labels(&new);
        match (&self.session.store, self.purpose, &new) {
            (Store::Soci(store), Purpose::Index, _) => self.in_soci(store, digest, bytes)?,
            (Store::Soci(store), Purpose::Image, New::Blob(_) | New::SociIndex(_)) => {
                self.in_containerd(digest, bytes.clone(), &labels)?;
                self.in_soci(store, digest, bytes)?;
            }
            (Store::Soci(_), Purpose::Image, _) | (Store::Containerd, ..) => {
                self.in_containerd(digest, bytes, &labels)?;
            }
        }
        Ok((digest, size))
    }

    fn known_ztoc(&self, layer: &Descriptor, span_size: u64) -> Result<Option<Vec<u8>>, BlobError> {
        let rows = match self.session.artifacts.rows() {
            Ok(rows) => rows,
            Err(ArtifactsError::Stopped(stopped)) => return Err(stopped.into()),
            // Whoever records the result will say what is wrong with the database.
            Err(_) => return Ok(None),
        };
        let found =
            rows.of_kind(Kind::Ztoc).find(|(_, row)| row.describes == Some(layer.digest) && row.span_size == span_size);
        let Some((digest, _)) = found else { return Ok(None) };
        match self.session.artifact(digest) {
            // A damaged one is built again.
            Err(BlobError::Digest { .. } | BlobError::Size { .. } | BlobError::TooLarge { .. }) => Ok(None),
            other => other,
        }
    }
}

/// What a blob refers to, in containerd's words.
fn labels(new: &New<'_>) -> BTreeMap<String, String> {
    let numbered = |name: &str, all: &[Descriptor]| -> Vec<(String, String)> {
        all.iter().enumerate().map(|(i, d)| (format!("{REFERS}.{name}.{i}"), d.digest.to_string())).collect()
    };
    let config = |manifest: &Manifest| (format!("{REFERS}.config"), manifest.config.digest.to_string());
    match new {
        New::Blob(_) | New::MadeUp(_) => BTreeMap::new(),
        New::SociIndex(manifest) => numbered("ztoc", &manifest.layers).into_iter().chain([config(manifest)]).collect(),
        New::Manifest(manifest) => numbered("l", &manifest.layers).into_iter().chain([config(manifest)]).collect(),
        New::List(Index { manifests, .. }) => numbered("m", manifests).into_iter().collect(),
    }
}
