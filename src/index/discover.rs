//! Which index belongs to an image (`formats.md` 5.1 to 5.3).
//!
//! An index that was named wins, whatever is enabled. Then the annotation of the image manifest (v2), then the first of the
//! manifest's referrers (v1). Only "there is none" goes on to the next; trouble, and an index that is named but missing, do
//! not: another index than the one the image was published with would be a surprise.

use super::{ContentStore, DiscoverySettings, NoIndex, Ways};
use crate::{
    oci::{Digest, annotation, media_type},
    registry::Repository,
};
use bytes::Bytes;
use std::collections::HashMap;

/// An index by its digest, with its size where the registry told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub digest: Digest,
    pub size: Option<u64>,
}

/// What discovery reads of an image manifest; the rest may be as it likes.
#[derive(serde::Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: Option<HashMap<String, serde_json::Value>>,
}

pub(super) async fn find(
    repository: &Repository,
    store: &ContentStore,
    settings: &DiscoverySettings,
    manifest: Digest,
    explicit: Option<Digest>,
    ways: Ways,
) -> Result<Found, NoIndex> {
    if let Some(digest) = explicit {
        tracing::debug!(digest = %digest, "using provided soci index digest");
        return Ok(Found { digest, size: None });
    }
    tracing::debug!("index digest not provided");
    let all = DiscoverySettings { v1: true, v2: true, ..*settings };
    let settings = match ways {
        Ways::Configured => settings,
        Ways::All => &all,
    };
    if ways == Ways::All
        && let Ok(Some(digest)) = store.index_of(manifest).await
    {
        tracing::debug!(digest = %digest, "using a soci v1 index that is here already");
        return Ok(Found { digest, size: None });
    }
    if !settings.v1 && !settings.v2 {
        return Err(NoIndex::Disabled);
    }
    if settings.v2 {
        tracing::debug!("checking for soci v2 index annotation");
        if let Some(digest) = annotated(repository, store, manifest).await? {
            tracing::debug!(digest = %digest, "using soci v2 index annotation");
            return Ok(Found { digest, size: None });
        }
        tracing::debug!("soci v2 index annotation not found");
    } else {
        tracing::debug!("soci v2 is disabled");
    }
    if settings.v1 {
        tracing::debug!("checking for soci v1 index via referrers API");
        let referrers = repository.referrers(manifest, media_type::SOCI_INDEX_V1).await.map_err(NoIndex::Discovery)?;
        if let Some(first) = referrers.first() {
            tracing::debug!(digest = %first.digest, "using soci v1 index via referrers API");
            return Ok(Found { digest: first.digest, size: Some(first.size) });
        }
        tracing::debug!("soci v1 referrers not found");
    } else {
        tracing::debug!("soci v1 is disabled");
    }
    Err(NoIndex::NotFound)
}

/// The v2 annotation of the image manifest. A manifest that has one is kept, so that it is found without the registry next
/// time; manifests are named by their digest, it cannot change.
async fn annotated(repository: &Repository, store: &ContentStore, manifest: Digest) -> Result<Option<Digest>, NoIndex> {
    if let Ok(Some(local)) = store.read(manifest, super::fetch::INDEX_MAX).await
        && let Some(digest) = annotation_of(&local)?
    {
        return Ok(Some(digest));
    }
    let fetched = repository.manifest(&manifest.to_string()).await.map_err(NoIndex::Discovery)?;
    let found = annotation_of(&fetched.bytes)?;
    if found.is_some()
        && let Err(error) = store.put(manifest, fetched.bytes).await
    {
        // Only the next search is slower for it.
        tracing::debug!(digest = %manifest, error = %error, "cannot keep the image manifest");
    }
    Ok(found)
}

fn annotation_of(manifest: &Bytes) -> Result<Option<Digest>, NoIndex> {
    let invalid = |what: &str| NoIndex::Invalid { what: format!("the image manifest {what}") };
    let manifest: Annotated = serde_json::from_slice(manifest).map_err(|_| invalid("cannot be read"))?;
    let annotations = manifest.annotations.unwrap_or_default();
    match annotations.get(annotation::INDEX_DIGEST).and_then(|v| v.as_str()) {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| invalid("names a SOCI index that is not a sha256 digest")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotation_is_read_and_anything_around_it_is_not() {
        let of = |text: String| annotation_of(&text.into());
        let digest = Digest::of(b"x");
        let with =
            |value: &str| format!(r#"{{"config":7,"annotations":{{"a":1,"com.amazon.soci.index-digest":{value}}}}}"#);
        assert_eq!(of(with(&format!("\"{digest}\""))), Ok(Some(digest)));
        assert_eq!(of(with("\"\"")), Ok(None));
        assert_eq!(of("{}".into()), Ok(None));
        assert_eq!(of(r#"{"annotations":null}"#.into()), Ok(None));
        assert!(of(with("\"sha512:00\"")).is_err());
        assert!(of("[".into()).is_err());
    }
}
