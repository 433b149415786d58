//! Where `index info` and `ztoc` find blobs: containerd's content store, the `soci` one below `--root`, an OCI layout, or a plain file.

use super::{
    args::Global,
    blobs::BlobError,
    containerd::{Session, SessionError, StoreKind},
    layout::{LayoutError, MAX_DOCUMENT, OciLayout},
};
use crate::{
    layout::Layout,
    oci::{Digest, Manifest, annotation, media_type},
    ztoc::Limits,
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Why a blob was not found. The words are searched for by scripts.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("invalid checksum digest format: {0:?} is neither a digest (sha256: and 64 hexadecimal digits) nor a file")]
    InvalidDigest(String),
    #[error("couldn't retrieve artifact for {digest}, not found in {}", path.display())]
    NotFound { digest: Digest, path: PathBuf },
    #[error(
        "couldn't retrieve artifact for {0}, not found in containerd's content store (--namespace and --content-store select where to look)"
    )]
    NotInContainerd(Digest),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("failed to read {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} has more than {limit} bytes", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// A SOCI artifact: its bytes, which have its digest.
pub struct Artifact {
    pub digest: Digest,
    pub bytes: Vec<u8>,
    /// Where other blobs of the same image may be.
    pub store: Option<OciLayout>,
}

/// Finds what `operand` names: a digest in a store, or a file.
pub fn find(operand: &OsStr, layout: Option<&Path>, global: &Global) -> Result<Artifact, StoreError> {
    let text = operand.to_string_lossy();
    if let Ok(digest) = text.parse::<Digest>() {
        if layout.is_none() && StoreKind::parse(&global.content_store)? == StoreKind::Containerd {
            let session = Session::open(global)?;
            let bytes = session.artifact(digest)?.ok_or(StoreError::NotInContainerd(digest))?;
            return Ok(Artifact { digest, bytes, store: None });
        }
        let store = open(layout, global)?;
        let not_found = |path: &Path| StoreError::NotFound { digest, path: path.to_owned() };
        let store = store.map_err(|path| not_found(&path))?;
        let limit = u64::try_from(Limits::default().bytes).unwrap_or(u64::MAX);
        let bytes = match store.document_named(digest, limit) {
            Err(LayoutError::Missing { .. }) => return Err(not_found(store.path())),
            other => other?,
        };
        return Ok(Artifact { digest, bytes, store: Some(store) });
    }
    let path = Path::new(operand);
    if !path.is_file() {
        return Err(StoreError::InvalidDigest(text.into_owned()));
    }
    let bytes = read(path)?;
    let store = match layout {
        Some(layout) => Some(OciLayout::open(layout)?),
        None => around(path),
    };
    Ok(Artifact { digest: Digest::of(&bytes), bytes, store })
}

/// The store to look in; `Err` is where it would be.
fn open(layout: Option<&Path>, global: &Global) -> Result<Result<OciLayout, PathBuf>, StoreError> {
    if let Some(layout) = layout {
        return Ok(Ok(OciLayout::open(layout)?));
    }
    let path = Layout::new(&global.root).content();
    match path.is_dir() {
        true => Ok(Ok(OciLayout::open_store(&path)?)),
        false => Ok(Err(path)),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, StoreError> {
    let failed = |source| StoreError::File { path: path.to_owned(), source };
    let limit = u64::try_from(Limits::default().bytes).unwrap_or(u64::MAX);
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(StoreError::TooLarge { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

/// The layout that a file is a blob of.
fn around(path: &Path) -> Option<OciLayout> {
    let real = path.canonicalize().ok()?;
    OciLayout::open(real.parent()?.parent()?.parent()?).ok()
}

/// The layer that a zTOC describes: a zTOC does not say, the SOCI index that lists it does.
pub fn layer_of(store: &OciLayout, ztoc: Digest) -> Result<Option<Digest>, StoreError> {
    let mut absent = None;
    for digest in store.digests()? {
        let blob = store.blob(digest)?;
        let mut first = [0];
        if blob.len() > MAX_DOCUMENT || blob.read_at(&mut first, 0).is_err() || first != *b"{" {
            continue;
        }
        let Some(manifest) = soci_index(&store.document_named(digest, MAX_DOCUMENT)?) else { continue };
        let entries = manifest.layers.iter().filter(|entry| entry.digest == ztoc);
        for layer in entries.filter_map(|entry| entry.annotations.get(annotation::LAYER_DIGEST)?.parse().ok()) {
            if store.has(layer) {
                return Ok(Some(layer));
            }
            absent = Some(layer);
        }
    }
    Ok(absent)
}

/// Reads bytes as a SOCI index.
pub fn soci_index(bytes: &[u8]) -> Option<Manifest> {
    let manifest: Manifest = serde_json::from_slice(bytes).ok()?;
    let kind = manifest.config.media_type.as_str();
    matches!(kind, media_type::SOCI_INDEX_V1 | media_type::SOCI_INDEX_V2).then_some(manifest)
}
