//! What `create` and `convert` write into `artifacts.db` about an image they indexed.

use super::{
    artifacts::{Artifacts, ArtifactsError, Kind, Row},
    indexing::{PerPlatform, Version},
};
use crate::oci::{Digest, Platform, media_type};
use jiff::Timestamp;

/// An indexed platform, as it is recorded.
pub struct Record<'a> {
    pub platform: &'a PerPlatform<'a>,
    pub version: Version,
    pub span_size: u64,
    /// What the image's name stands for: an index, or a manifest.
    pub image: Digest,
    /// The manifest that the SOCI index belongs to, and what it was before `convert` rewrote it.
    pub manifest: Digest,
    pub original: Digest,
}

/// Records platforms that have an index; all of them or, after a failure, none.
pub fn record(artifacts: &Artifacts, records: &[Record<'_>]) -> Result<(), ArtifactsError> {
    let now = Timestamp::now();
    artifacts.change(|rows| {
        for record in records {
            let Some(index) = &record.platform.index else { continue };
            let blob = |kind, layer: Digest, size, media_type: &str| Row {
                kind,
                size,
                describes: Some(layer),
                image: None,
                platform: String::new(),
                location: if kind == Kind::Ztoc { layer.to_string() } else { String::new() },
                media_type: media_type.to_owned(),
                artifact_type: String::new(),
                created_at: Some(now),
                span_size: if kind == Kind::Ztoc { record.span_size } else { 0 },
            };
            for (layer, built) in record.platform.built().filter(|(_, built)| !built.known) {
                rows.put(built.ztoc, &blob(Kind::Ztoc, layer.digest, built.size, media_type::ZTOC));
            }
            for (layer, artifact) in &record.platform.prefetch {
                rows.put(artifact.digest, &blob(Kind::Prefetch, *layer, artifact.size, media_type::SOCI_PREFETCH));
            }
            rows.put(index.digest, &index_row(record.version, index.size, record, &record.platform.platform, now));
        }
    })
}

fn index_row(version: Version, size: u64, record: &Record<'_>, platform: &Platform, now: Timestamp) -> Row {
    Row {
        kind: Kind::Index,
        size,
        describes: Some(record.manifest),
        image: Some(record.image),
        platform: platform.to_string(),
        location: record.original.to_string(),
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: version.artifact_type().to_owned(),
        created_at: Some(now),
        span_size: 0,
    }
}
