//! Where the blobs of an image are read from, and where new ones are put: the same conversion runs over OCI layouts, containerd
//! and registries.
//!
//! Invariant: what [`Blobs::document`] gives has the digest and size of its descriptor. What [`Blobs::open`] gives has not been
//! checked: whoever reads a layer hashes it on the way.

use super::{
    interrupt::{self, Stopped},
    layout::{
        LayoutError, MAX_DOCUMENT, OciLayout,
        write::{Staging, WriteError},
    },
};
use crate::{
    grpc::containerd::ContainerdError,
    index::StoreError as ContentError,
    oci::{Descriptor, Digest, Hasher, Index, Manifest},
    registry::RegistryError,
};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use std::io::{self, Read};

/// Why a blob could not be read or kept. `Display` leaves the cause to `source`.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("blob {digest} not found in {place}")]
    Missing { digest: Digest, place: String },
    #[error("blob {digest} has {actual} bytes, but its descriptor says {expected}")]
    Size { digest: Digest, expected: u64, actual: u64 },
    #[error("blob {expected} is damaged: its bytes have the digest {actual}")]
    Digest { expected: Digest, actual: Digest },
    #[error("{what} has {size} bytes; documents of more than {MAX_DOCUMENT} are not read")]
    TooLarge { what: String, size: u64 },
    #[error("{what} is not what it should be")]
    Json { what: String, source: serde_json::Error },
    #[error("failed to read {what}")]
    Read { what: String, source: io::Error },
    #[error(transparent)]
    Layout(LayoutError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(transparent)]
    Registry(RegistryError),
    #[error("the registry refuses (log in with `docker login HOST`, or pass --user NAME:PASSWORD)")]
    Denied(#[source] RegistryError),
    #[error(
        "this may not be the registry (--tlscacert names the authority of its certificate, --tlscert and --tlskey our own, --plain-http is for \
         registries without TLS)"
    )]
    Untrusted(#[source] RegistryError),
    #[error("the content store failed")]
    Content(#[from] ContentError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl From<LayoutError> for BlobError {
    fn from(error: LayoutError) -> BlobError {
        match error {
            LayoutError::Missing { digest, path } => BlobError::Missing { digest, place: path.display().to_string() },
            other => BlobError::Layout(other),
        }
    }
}

impl From<RegistryError> for BlobError {
    fn from(error: RegistryError) -> BlobError {
        match error {
            RegistryError::Unauthorized { .. } => BlobError::Denied(error),
            RegistryError::Untrusted { .. } => BlobError::Untrusted(error),
            other => BlobError::Registry(other),
        }
    }
}

impl BlobError {
    /// Whether the blob is simply not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, BlobError::Missing { .. })
    }
}

/// A place that has the blobs of an image.
pub trait Blobs: Sync {
    /// What the place is called in messages.
    fn place(&self) -> String;

    /// Whether the blob is there, as far as can be said without asking a registry for each.
    fn has(&self, digest: Digest) -> Result<bool, BlobError>;

    /// Fails if the blob is not there or has another size.
    fn check(&self, descriptor: &Descriptor) -> Result<(), BlobError>;

    /// The bytes of a manifest, index or configuration.
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, BlobError>;

    /// A layer, to be read once. Reading fails when the process should stop.
    fn open(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, BlobError>;

    /// Whether a layer is there, where that decides something.
    fn has_layer(&self, digest: Digest) -> Result<bool, BlobError> {
        self.has(digest)
    }
}

/// [`Blobs::document`], parsed.
pub fn parsed<T: DeserializeOwned>(blobs: &dyn Blobs, descriptor: &Descriptor) -> Result<T, BlobError> {
    json(&descriptor.digest.to_string(), &blobs.document(descriptor)?)
}

/// Parses a document; the error names it.
pub fn json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, BlobError> {
    serde_json::from_slice(bytes).map_err(|source| BlobError::Json { what: what.to_owned(), source })
}

/// Checks the bytes of a document against its descriptor.
pub fn checked(descriptor: &Descriptor, bytes: Bytes) -> Result<Vec<u8>, BlobError> {
    let (digest, expected, actual) = (descriptor.digest, descriptor.size, bytes.len() as u64);
    if actual != expected {
        return Err(BlobError::Size { digest, expected, actual });
    }
    match Digest::of(&bytes) {
        actual if actual == digest => Ok(bytes.into()),
        actual => Err(BlobError::Digest { expected: digest, actual }),
    }
}

/// Reads a blob to its end and says what its digest is.
pub fn digest_of(blobs: &dyn Blobs, descriptor: &Descriptor) -> Result<Digest, BlobError> {
    let (mut hasher, mut reader, mut buffer) = (Hasher::new(), blobs.open(descriptor)?, vec![0; 256 << 10]);
    loop {
        let read = reader.read(&mut buffer);
        interrupt::check()?;
        match read.map_err(|source| BlobError::Read { what: descriptor.digest.to_string(), source })? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

/// A new blob, and what it is: containerd is told what it refers to, a registry whether it is a manifest.
#[derive(Debug, Clone, Copy)]
pub enum New<'a> {
    /// A zTOC, a prefetch artifact, a configuration.
    Blob(&'a [u8]),
    SociIndex(&'a Manifest),
    Manifest(&'a Manifest),
    List(&'a Index),
    /// A list in the form that it had to be made up in, which nothing refers to.
    MadeUp(&'a [u8]),
}

impl New<'_> {
    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            New::Blob(bytes) | New::MadeUp(bytes) => bytes.to_vec(),
            New::SociIndex(manifest) | New::Manifest(manifest) => manifest.to_canonical_json(),
            New::List(index) => index.to_canonical_json(),
        }
    }
}

/// A place that keeps new blobs.
pub trait Sink: Sync {
    /// Keeps a blob; digest and size.
    fn put(&self, new: New<'_>) -> Result<(Digest, u64), BlobError>;

    /// A zTOC of this layer and span size that is there already, if it may be used again.
    fn known_ztoc(&self, layer: &Descriptor, span_size: u64) -> Result<Option<Vec<u8>>, BlobError>;
}

impl Blobs for OciLayout {
    fn place(&self) -> String {
        self.path().display().to_string()
    }

    fn has(&self, digest: Digest) -> Result<bool, BlobError> {
        Ok(OciLayout::has(self, digest))
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), BlobError> {
        Ok(self.blob_of(descriptor).map(drop)?)
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, BlobError> {
        Ok(OciLayout::document(self, descriptor)?)
    }

    fn open(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, BlobError> {
        Ok(Box::new(self.blob_of(descriptor)?.reader()))
    }
}

impl Sink for Staging {
    fn put(&self, new: New<'_>) -> Result<(Digest, u64), BlobError> {
        let bytes = new.bytes();
        Ok((Staging::put(self, &bytes)?, bytes.len() as u64))
    }

    fn known_ztoc(&self, _: &Descriptor, _: u64) -> Result<Option<Vec<u8>>, BlobError> {
        Ok(None)
    }
}
