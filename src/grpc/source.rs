//! A blob in containerd's content store as a source of a lazy layer: what is there is never fetched.

use super::content::ContainerdContent;
use crate::{
    layers::{Body, Remedy, Source, SourceError},
    oci::Digest,
    registry::HostId,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::{ops::Range, time::Duration};

/// How long a Prepare waits to hear whether containerd has the layer; a healthy one answers in a millisecond, and one that hangs (it
/// waits for us) must not be waited for.
const PATIENCE: Duration = Duration::from_millis(200);
/// One call's worth of a blob.
const PIECE: u64 = 1 << 20;

/// A blob in containerd's content store.
pub struct ContainerdBlob {
    pub content: ContainerdContent,
    pub namespace: String,
    pub blob: Digest,
}

impl ContainerdBlob {
    /// Whether it is there, as far as can be learnt quickly.
    pub async fn is_there(&self) -> bool {
        let size = self.content.size(&self.namespace, &self.blob);
        matches!(tokio::time::timeout(PATIENCE, size).await, Ok(Ok(Some(_))))
    }
}

impl Source for ContainerdBlob {
    fn open<'a>(&'a self, range: Range<u64>, _: &'a [HostId]) -> BoxFuture<'a, Result<Box<dyn Body>, SourceError>> {
        let (content, namespace, blob) = (self.content.clone(), self.namespace.clone(), self.blob);
        Box::pin(async move { Ok(Box::new(Pieces { content, namespace, blob, left: range }) as Box<dyn Body>) })
    }

    fn is_remote(&self) -> bool {
        false
    }
}

struct Pieces {
    content: ContainerdContent,
    namespace: String,
    blob: Digest,
    left: Range<u64>,
}

impl Body for Pieces {
    fn chunk(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        Box::pin(async move {
            if self.left.is_empty() {
                return Ok(None);
            }
            let piece = self.left.start..self.left.end.min(self.left.start + PIECE);
            match self.content.read(&self.namespace, &self.blob, piece.clone()).await {
                Ok(bytes) => {
                    self.left.start = piece.end;
                    Ok(Some(bytes))
                }
                // What does not come from containerd comes from the registry.
                Err(error) => Err(SourceError {
                    reason: format!("containerd's content store: {}", crate::snapshot::chain(&error)),
                    remedy: Remedy::OtherSource,
                }),
            }
        })
    }

    fn host(&self) -> Option<HostId> {
        None
    }
}
