//! Where the compressed bytes of a layer come from.

use crate::oci::Digest;
use crate::registry::{HostId, RangeBody, RegistryError, Repository};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::{ops::Range, time::Duration};

/// Why bytes did not come, and whether asking again can help.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reason}")]
pub struct SourceError {
    pub reason: String,
    pub remedy: Remedy,
}

/// What to do about a [`SourceError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Time may heal it; the other side may have said how much.
    Retry(Option<Duration>),
    /// This source will not have it, another one may.
    OtherSource,
    /// This source has trouble and was asked often enough for now. Another one may do; and time may heal it.
    Later,
}

/// Something that has a layer's blob.
pub trait Source: Send + Sync {
    /// The bytes `range` of the blob, as they arrive. `avoid` names hosts that have just served wrong bytes.
    fn open<'a>(&'a self, range: Range<u64>, avoid: &'a [HostId]) -> BoxFuture<'a, Result<Box<dyn Body>, SourceError>>;

    /// Whether asking it is a request to a registry, for metrics.
    fn is_remote(&self) -> bool;

    /// What is known to be wrong with it at the moment.
    fn trouble(&self) -> Option<String> {
        None
    }
}

/// Bytes on their way.
pub trait Body: Send {
    /// The next piece; `None` after exactly the bytes that were asked for.
    fn chunk(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>>;
    /// Who sends them.
    fn host(&self) -> Option<HostId>;
}

/// A blob in a registry, or in any of its mirrors.
pub struct RegistrySource {
    pub repository: Repository,
    pub blob: Digest,
}

impl Source for RegistrySource {
    fn open<'a>(&'a self, range: Range<u64>, avoid: &'a [HostId]) -> BoxFuture<'a, Result<Box<dyn Body>, SourceError>> {
        Box::pin(async move {
            match self.repository.blob_range(self.blob, range.clone(), avoid).await {
                Ok(body) => Ok(Box::new(body) as Box<dyn Body>),
                // Everything before it comes too, and is of no use: slow beats impossible.
                Err(RegistryError::RangesUnsupported { .. }) => {
                    let body = self.repository.blob_range(self.blob, 0..range.end, avoid).await;
                    let body = body.map_err(|e| SourceError { reason: e.to_string(), remedy: remedy(&e) })?;
                    Ok(Box::new(Behind { body, skip: range.start }) as Box<dyn Body>)
                }
                // The registry client has tried every host as often as the settings say.
                Err(error) => Err(SourceError { reason: error.to_string(), remedy: remedy(&error) }),
            }
        })
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn trouble(&self) -> Option<String> {
        self.repository.trouble()
    }
}

/// Logins are renewed, certificates too, and mirrors get their blobs back; what the registry does not have or do stays so.
fn remedy(error: &RegistryError) -> Remedy {
    match error {
        RegistryError::Unavailable { .. }
        | RegistryError::Unauthorized { .. }
        | RegistryError::Untrusted { .. }
        | RegistryError::Malformed { .. }
        | RegistryError::RangesUnsupported { .. }
        | RegistryError::DigestMismatch { .. } => Remedy::Later,
        RegistryError::NotFound { .. }
        | RegistryError::TooLarge { .. }
        | RegistryError::Refused { .. }
        | RegistryError::Setup { .. } => Remedy::OtherSource,
    }
}

impl Body for RangeBody {
    fn chunk(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        Box::pin(async move {
            // What broke off in the middle may go on in another request.
            RangeBody::chunk(self).await.map_err(|e| SourceError { reason: e.to_string(), remedy: Remedy::Retry(None) })
        })
    }

    fn host(&self) -> Option<HostId> {
        Some(RangeBody::host(self))
    }
}

/// What follows the first bytes of a body.
struct Behind {
    body: RangeBody,
    /// Bytes to leave out.
    skip: u64,
}

impl Body for Behind {
    fn chunk(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        Box::pin(async move {
            loop {
                let Some(mut chunk) = Body::chunk(&mut self.body).await? else { return Ok(None) };
                let skipped = chunk.split_to(usize::try_from(self.skip).unwrap_or(usize::MAX).min(chunk.len()));
                self.skip -= skipped.len() as u64;
                if !chunk.is_empty() {
                    return Ok(Some(chunk));
                }
            }
        })
    }

    fn host(&self) -> Option<HostId> {
        Some(RangeBody::host(&self.body))
    }
}
