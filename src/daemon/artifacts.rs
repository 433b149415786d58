//! SOCI indexes and zTOCs that containerd's content store has: `content_store.type = "containerd"`.
//!
//! `soci create` and `soci convert` put them there by default, and so does an import. What is found is copied into our own store under
//! the same digests, checked on the way; from then on it is like something a registry sent: containerd may delete it, or not run.
//!
//! Everything here is an attempt. What it does not find, or cannot read, is looked for in the registry.

use crate::{
    grpc::content::{ContainerdContent, ContentError},
    index::{ContentStore, StoreError},
    oci::{Digest, Manifest, annotation, media_type},
};
use bytes::Bytes;
use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

/// Largest manifest and SOCI index: what registries accept.
const MANIFEST_MAX: u64 = 4 << 20;
/// Largest zTOC that is copied: it passes through memory in one piece. The zTOC of an 8 GB layer is smaller.
const BLOB_MAX: u64 = 64 << 20;
/// How long a Prepare may wait for a containerd that is slow to say whether it has the first of it.
const PATIENCE: Duration = Duration::from_millis(200);
/// Indexes remembered as copied; beyond, they are looked at again.
const REMEMBERED: usize = 4096;

/// Copies artifacts out of containerd's content store.
pub struct Artifacts {
    content: ContainerdContent,
    store: ContentStore,
    /// Indexes that are here with everything in them. Held while copying: forty layers of one image ask at once.
    copied: tokio::sync::Mutex<HashSet<Digest>>,
}

#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("containerd's content store")]
    Content(#[from] ContentError),
    #[error("our content store")]
    Store(#[from] StoreError),
    #[error("{0} cannot be read")]
    Unreadable(Digest, #[source] serde_json::Error),
}

/// What is read of an image manifest; the rest may be as it likes.
#[derive(serde::Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: Option<BTreeMap<String, serde_json::Value>>,
}

impl Artifacts {
    pub fn new(content: ContainerdContent, store: ContentStore) -> Artifacts {
        Artifacts { content, store, copied: tokio::sync::Mutex::default() }
    }

    /// Forgets what was copied: it may not be here any more.
    pub async fn forget(&self) {
        self.copied.lock().await.clear();
    }

    /// Copies what containerd has in `namespace` of the SOCI index of an image: `explicit`, or the one its manifest names.
    pub async fn bring(&self, namespace: &str, manifest: Digest, explicit: Option<&str>) {
        let explicit = explicit.filter(|text| !text.is_empty()).map(str::parse);
        match explicit {
            Some(Err(_)) => {} // discovery says what is wrong with it
            Some(Ok(index)) => self.bring_index(namespace, index).await,
            None => match self.annotated(namespace, manifest).await {
                Ok(Some(index)) => self.bring_index(namespace, index).await,
                Ok(None) => {}
                Err(error) => not_copied(manifest, &error),
            },
        }
    }

    async fn bring_index(&self, namespace: &str, index: Digest) {
        let mut copied = self.copied.lock().await;
        if copied.contains(&index) {
            return;
        }
        match self.copy_index(namespace, index).await {
            Ok(true) => {
                if copied.len() >= REMEMBERED {
                    copied.clear();
                }
                copied.insert(index);
            }
            Ok(false) => {}
            Err(error) => not_copied(index, &error),
        }
    }

    /// The index that the manifest's annotation names. A manifest that has one is kept, as discovery does.
    async fn annotated(&self, namespace: &str, manifest: Digest) -> Result<Option<Digest>, CopyError> {
        let of = |bytes: &Bytes| -> Result<Option<Digest>, CopyError> {
            let read: Annotated = serde_json::from_slice(bytes).map_err(|e| CopyError::Unreadable(manifest, e))?;
            let annotations = read.annotations.unwrap_or_default();
            Ok(annotations.get(annotation::INDEX_DIGEST).and_then(|v| v.as_str()?.parse().ok()))
        };
        if let Some(here) = self.store.read(manifest, MANIFEST_MAX).await? {
            return of(&here);
        }
        let Some(there) = self.read(namespace, manifest, MANIFEST_MAX).await? else { return Ok(None) };
        let found = of(&there)?;
        if found.is_some() {
            self.store.put(manifest, there).await?;
        }
        Ok(found)
    }

    /// Whether the index is here now, with everything in it.
    async fn copy_index(&self, namespace: &str, index: Digest) -> Result<bool, CopyError> {
        let bytes = match self.store.read(index, MANIFEST_MAX).await? {
            Some(here) => here,
            None => match self.read(namespace, index, MANIFEST_MAX).await? {
                Some(there) => there,
                None => return Ok(false),
            },
        };
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| CopyError::Unreadable(index, e))?;
        let wanted = |media_type: &str| matches!(media_type, media_type::ZTOC | media_type::SOCI_PREFETCH);
        let (mut complete, mut blobs) = (true, 0usize);
        for blob in manifest.layers.iter().filter(|blob| wanted(&blob.media_type)) {
            if self.store.holds(blob.digest, blob.size).await? {
                continue;
            }
            match self.read(namespace, blob.digest, BLOB_MAX.min(blob.size)).await? {
                Some(bytes) => {
                    self.store.put(blob.digest, bytes).await?;
                    blobs += 1;
                }
                None => complete = false,
            }
        }
        // Last, so that an index that is here is one whose blobs were looked for.
        self.store.put(index, bytes).await?;
        if blobs > 0 {
            tracing::info!(digest = %index, blobs = blobs.to_string(), "copied a SOCI index from containerd's content store");
        }
        Ok(complete)
    }

    /// A blob of at most `max` bytes that containerd has.
    async fn read(&self, namespace: &str, digest: Digest, max: u64) -> Result<Option<Bytes>, CopyError> {
        let asked = tokio::time::timeout(PATIENCE, self.content.size(namespace, &digest)).await;
        let size = asked.unwrap_or(Err(ContentError::Timeout))?;
        match size {
            Some(size) if size <= max => Ok(Some(self.content.read(namespace, &digest, 0..size).await?)),
            Some(_) | None => Ok(None),
        }
    }
}

fn not_copied(digest: Digest, error: &CopyError) {
    let error = crate::snapshot::chain(error);
    tracing::debug!(%digest, error, "cannot copy SOCI artifacts from containerd's content store; asking the registry");
}
