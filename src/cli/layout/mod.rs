//! OCI image layouts: a directory or a tar file with `index.json`, `oci-layout` and `blobs/sha256/<hex>`.
//!
//! A layout is hostile input. The only names joined to its path are constants and the hex of a parsed [`Digest`]; documents
//! are bounded ([`MAX_DOCUMENT`]) and checked against their digest before anything is read from them; a blob is a regular file
//! opened once, or bytes of the archive, and is never loaded.
//!
//! Reading is here; [`archive`] finds the blobs of a tar file, [`identify`] says what a path is when it is no layout, and
//! [`write`] makes new layouts.

pub mod archive;
mod blob;
pub mod identify;
pub mod write;

pub use blob::{Blob, Trust};

use super::interrupt::Stopped;
use crate::oci::{Descriptor, Digest, Index};
use archive::Archive;
use identify::Identity;
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Largest manifest, index or configuration that is read: the limit registries put on a manifest (`formats.md` 5.6).
pub const MAX_DOCUMENT: u64 = 4 << 20;

const INDEX: &str = "index.json";
const MARKER: &str = "oci-layout";
const BLOBS: &str = "blobs/sha256";
/// The only version of the image layout there is.
const VERSION: &str = "1.0.0";

/// Why a layout could not be read. `Display` leaves the cause to `source`.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    #[error("failed to access input {}", path.display())]
    Access { path: PathBuf, source: io::Error },
    #[error("failed to read index.json from {}: {identity}", path.display())]
    NotALayout { path: PathBuf, identity: Identity },
    #[error("{} is an OCI layout of version {version:?}; only {VERSION} is known", path.display())]
    Version { path: PathBuf, version: String },
    #[error("failed to read {what}")]
    Read { what: String, source: io::Error },
    #[error("{what} has {size} bytes; documents of more than {MAX_DOCUMENT} are not read")]
    TooLarge { what: String, size: u64 },
    #[error("blob {digest} not found in {}", path.display())]
    Missing { digest: Digest, path: PathBuf },
    #[error("blob {digest} has {actual} bytes, but its descriptor says {expected}")]
    Size { digest: Digest, expected: u64, actual: u64 },
    #[error("blob {expected} is damaged: its bytes have the digest {actual}")]
    Digest { expected: Digest, actual: Digest },
    #[error("{what} is not what it should be")]
    Json { what: String, source: serde_json::Error },
    #[error("{} is damaged: {why}, at byte {at}", path.display())]
    Tar { path: PathBuf, at: u64, why: &'static str },
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl LayoutError {
    fn read(what: impl ToString, source: io::Error) -> LayoutError {
        LayoutError::Read { what: what.to_string(), source }
    }
}

/// An OCI layout that can be read.
#[derive(Debug)]
pub struct OciLayout {
    path: PathBuf,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Directory,
    Archive(Archive),
}

#[derive(Deserialize)]
struct Marker {
    #[serde(default, rename = "imageLayoutVersion")]
    version: String,
}

impl OciLayout {
    /// Opens a layout, or says what `path` is instead. `index.json` exists afterwards, and the version is right.
    pub fn open(path: &Path) -> Result<OciLayout, LayoutError> {
        let layout = OciLayout::open_store(path)?;
        let found = match &layout.form {
            Form::Directory => path.join(INDEX).try_exists().unwrap_or(false),
            Form::Archive(archive) => archive.index.is_some(),
        };
        if !found {
            let identity = match &layout.form {
                Form::Directory => identify::directory(path),
                Form::Archive(archive) => identify::archive(archive),
            };
            return Err(LayoutError::NotALayout { path: path.to_owned(), identity });
        }
        Ok(layout)
    }

    /// Opens a layout of which only the blobs matter: `index.json` may be missing.
    pub fn open_store(path: &Path) -> Result<OciLayout, LayoutError> {
        let access = |source| LayoutError::Access { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(access)?;
        let form = if metadata.is_dir() {
            Form::Directory
        } else if metadata.is_file() {
            let file = std::fs::File::open(path).map_err(access)?;
            match identify::file(&file).map_err(access)? {
                Identity::Tar => Form::Archive(Archive::scan(path, file)?),
                identity => return Err(LayoutError::NotALayout { path: path.to_owned(), identity }),
            }
        } else {
            return Err(LayoutError::NotALayout { path: path.to_owned(), identity: Identity::Special });
        };
        let layout = OciLayout { path: path.to_owned(), form };
        if let Some(marker) = layout.member(MARKER)? {
            let marker: Marker = json(MARKER, &marker)?;
            if marker.version != VERSION {
                return Err(LayoutError::Version { path: layout.path, version: marker.version });
            }
        }
        Ok(layout)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `index.json`.
    pub fn index(&self) -> Result<Index, LayoutError> {
        let bytes = self.member(INDEX)?.ok_or_else(|| LayoutError::Access {
            path: self.path.join(INDEX),
            source: io::ErrorKind::NotFound.into(),
        })?;
        json(INDEX, &bytes)
    }

    /// Whether the blob is there.
    pub fn has(&self, digest: Digest) -> bool {
        match &self.form {
            Form::Directory => self.blob_path(digest).is_file(),
            Form::Archive(archive) => archive.blobs.contains_key(&digest),
        }
    }

    /// The blob, opened.
    pub fn blob(&self, digest: Digest) -> Result<Blob, LayoutError> {
        let found = match &self.form {
            Form::Directory => Blob::open(&self.blob_path(digest)).map_err(|e| LayoutError::read(digest, e))?,
            Form::Archive(archive) => archive.blob(digest),
        };
        found.ok_or_else(|| LayoutError::Missing { digest, path: self.path.clone() })
    }

    /// The blob of a descriptor, opened; it has the size that the descriptor says.
    pub fn blob_of(&self, descriptor: &Descriptor) -> Result<Blob, LayoutError> {
        let (digest, expected) = (descriptor.digest, descriptor.size);
        let blob = self.blob(digest)?;
        match blob.len() {
            actual if actual == expected => Ok(blob),
            actual => Err(LayoutError::Size { digest, expected, actual }),
        }
    }

    /// The bytes of a small blob: bounded, and of the size and digest that the descriptor says.
    pub fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, LayoutError> {
        let blob = self.blob_of(descriptor)?;
        read_whole(&blob, descriptor.digest, MAX_DOCUMENT)
    }

    /// A small blob that is known by its digest only.
    pub fn document_named(&self, digest: Digest, limit: u64) -> Result<Vec<u8>, LayoutError> {
        read_whole(&self.blob(digest)?, digest, limit)
    }

    /// [`OciLayout::document`], parsed.
    pub fn parsed<T: DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T, LayoutError> {
        json(&descriptor.digest.to_string(), &self.document(descriptor)?)
    }

    /// The digests of all blobs that are regular files, in order.
    pub fn digests(&self) -> Result<Vec<Digest>, LayoutError> {
        let mut digests: Vec<Digest> = match &self.form {
            Form::Archive(archive) => archive.blobs.keys().copied().collect(),
            Form::Directory => {
                let directory = self.path.join(BLOBS);
                let failed = |e| LayoutError::read(directory.display(), e);
                let entries = match std::fs::read_dir(&directory) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                    other => other.map_err(failed)?,
                };
                let mut digests = Vec::new();
                for entry in entries {
                    let entry = entry.map_err(failed)?;
                    let digest = entry.file_name().to_str().and_then(|name| Digest::from_hex(name).ok());
                    if let Some(digest) = digest.filter(|_| entry.file_type().is_ok_and(|t| t.is_file())) {
                        digests.push(digest);
                    }
                }
                digests
            }
        };
        digests.sort_unstable();
        Ok(digests)
    }

    fn blob_path(&self, digest: Digest) -> PathBuf {
        self.path.join(BLOBS).join(digest.hex())
    }

    /// A file beside the blobs, bounded like every document.
    fn member(&self, name: &'static str) -> Result<Option<Vec<u8>>, LayoutError> {
        let blob = match &self.form {
            Form::Directory => Blob::open(&self.path.join(name)).map_err(|e| LayoutError::read(name, e))?,
            Form::Archive(archive) => archive.member(name),
        };
        let Some(blob) = blob else { return Ok(None) };
        if blob.len() > MAX_DOCUMENT {
            return Err(LayoutError::TooLarge { what: name.into(), size: blob.len() });
        }
        let mut bytes = Vec::new();
        blob.reader().read_to_end(&mut bytes).map_err(|e| LayoutError::read(name, e))?;
        Ok(Some(bytes))
    }
}

fn read_whole(blob: &Blob, digest: Digest, limit: u64) -> Result<Vec<u8>, LayoutError> {
    if blob.len() > limit {
        return Err(LayoutError::TooLarge { what: digest.to_string(), size: blob.len() });
    }
    let mut bytes = Vec::new();
    blob.reader().read_to_end(&mut bytes).map_err(|e| LayoutError::read(digest, e))?;
    match Digest::of(&bytes) {
        actual if actual == digest => Ok(bytes),
        actual => Err(LayoutError::Digest { expected: digest, actual }),
    }
}

/// Parses a document; the error names it.
pub fn json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, LayoutError> {
    serde_json::from_slice(bytes).map_err(|source| LayoutError::Json { what: what.to_owned(), source })
}
