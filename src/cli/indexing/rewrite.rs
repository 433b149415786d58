//! The new image index: images rewritten in canonical form with a pointer to their SOCI index, SOCI indexes added
//! (`formats.md` 4.2, steps 4 to 8).
//!
//! What the Go CLI does to images is done here too, for the same digests: every image that is present is rewritten, indexed or
//! not, and takes the annotations of its manifest in place of those its descriptor had (attestations of BuildKit have the form of
//! images, and lose their `vnd.docker.reference.*` there). SOCI indexes, artifacts and nested indexes it mangles are left as
//! they are here.

use super::{
    IndexingError, PerPlatform,
    source::{Image, Kind, list_of},
};
use crate::{
    cli::{
        blobs::{BlobError, New, Sink, json},
        layout::{LayoutError, OciLayout, write::Staging},
        output::Console,
    },
    oci::{Descriptor, Digest, Index, Manifest, annotation, media_type},
};
use std::collections::BTreeSet;

/// Indexes inside indexes. Nobody nests deeper than one.
const MAX_DEPTH: usize = 4;
/// Blobs of one image: as many as an archive may have entries.
const MAX_BLOBS: usize = 1 << 20;

/// The converted image.
pub struct Rewritten {
    /// Its index.
    pub target: Descriptor,
    pub index: Index,
    /// New digest of each entry of the image's list, in its order.
    pub entries: Vec<Digest>,
}

/// Makes the new index, and keeps the rewritten manifests and it.
pub fn rewrite(image: &Image, converted: &[PerPlatform<'_>], sink: &dyn Sink) -> Result<Rewritten, IndexingError> {
    let mut index = image.base.clone();
    for (at, kind) in image.kinds.iter().enumerate() {
        let Kind::Image(manifest) = kind else { continue };
        let original = image.base.manifests[at].digest;
        // By digest: the same manifest may be listed twice.
        let soci = converted.iter().find(|c| image.base.manifests[c.place].digest == original);
        let soci = soci.and_then(|c| c.index.as_ref());
        let manifest = rewritten_manifest(manifest, soci);
        let entry = &mut index.manifests[at];
        (entry.digest, entry.size) = sink.put(New::Manifest(&manifest))?;
        entry.media_type = media_type::OCI_MANIFEST.into();
        entry.annotations = manifest.annotations;
    }
    let entries: Vec<Digest> = index.manifests.iter().map(|entry| entry.digest).collect();
    for platform in converted {
        let Some(soci) = &platform.index else { continue };
        let mut entry = soci.clone();
        entry.annotations.insert(annotation::IMAGE_MANIFEST_DIGEST.into(), entries[platform.place].to_string());
        entry.platform = Some(platform.platform.clone());
        entry.artifact_type = media_type::SOCI_INDEX_V2.into();
        let earlier = index.manifests.iter_mut().find(|e| {
            e.artifact_type == media_type::SOCI_INDEX_V2
                && e.platform.as_ref().is_some_and(|p| p.matches(&platform.platform))
        });
        match earlier {
            Some(earlier) => *earlier = entry,
            None => index.manifests.push(entry),
        }
    }
    let (digest, size) = sink.put(New::List(&index))?;
    Ok(Rewritten { target: Descriptor::new(media_type::OCI_INDEX, digest, size), index, entries })
}

/// `index.json` of a layout with this image.
pub fn layout_index(target: &Descriptor) -> Vec<u8> {
    list_of(vec![target.clone()]).to_canonical_json()
}

/// Every blob of the converted image that the new layout can have.
pub fn reachable(
    target: &Descriptor,
    layout: &OciLayout,
    staging: &Staging,
    console: &Console,
) -> Result<BTreeSet<Digest>, IndexingError> {
    let mut walk = Walk { layout, staging, console, reachable: BTreeSet::new() };
    walk.visit(target, 0)?;
    Ok(walk.reachable)
}

fn rewritten_manifest(manifest: &Manifest, soci: Option<&Descriptor>) -> Manifest {
    let mut manifest = manifest.clone();
    manifest.media_type = media_type::OCI_MANIFEST.into();
    manifest.config.media_type = media_type::OCI_CONFIG.into();
    if let Some(soci) = soci {
        manifest.annotations.insert(annotation::INDEX_DIGEST.into(), soci.digest.to_string());
    }
    manifest
}

/// Collects the blobs that belong to the image.
struct Walk<'a> {
    layout: &'a OciLayout,
    staging: &'a Staging,
    console: &'a Console,
    reachable: BTreeSet<Digest>,
}

impl Walk<'_> {
    fn visit(&mut self, descriptor: &Descriptor, depth: usize) -> Result<(), IndexingError> {
        if depth > MAX_DEPTH {
            return Err(IndexingError::TooMany { what: "levels of nested indexes", limit: MAX_DEPTH as u64 });
        }
        if !self.note(descriptor)? {
            return Ok(());
        }
        if media_type::is_index(&descriptor.media_type) {
            let index: Index = self.document(descriptor)?;
            for entry in &index.manifests {
                self.visit(entry, depth + 1)?;
            }
        } else if media_type::is_manifest(&descriptor.media_type) {
            let manifest: Manifest = self.document(descriptor)?;
            for child in std::iter::once(&manifest.config).chain(&manifest.layers) {
                self.note(child)?;
            }
        }
        Ok(())
    }

    /// Adds a blob; says whether it is new and present. One that is absent, of a platform that was not converted, is only warned
    /// about: it was absent before.
    fn note(&mut self, descriptor: &Descriptor) -> Result<bool, IndexingError> {
        let digest = descriptor.digest;
        if self.reachable.contains(&digest) {
            return Ok(false);
        }
        if self.staging.blob(digest).is_none() {
            match self.layout.blob_of(descriptor) {
                Ok(_) => {}
                Err(LayoutError::Missing { .. }) => {
                    if !super::select::is_foreign(&descriptor.media_type) {
                        self.console.warn(format!("blob {digest} is not in the layout, and so not in the output"));
                    }
                    return Ok(false);
                }
                Err(e) => return Err(BlobError::from(e).into()),
            }
        }
        if self.reachable.len() == MAX_BLOBS {
            return Err(IndexingError::TooMany { what: "blobs", limit: MAX_BLOBS as u64 });
        }
        Ok(self.reachable.insert(digest))
    }

    fn document<T: serde::de::DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T, IndexingError> {
        match self.staging.blob(descriptor.digest) {
            Some(blob) => {
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut blob.reader(), &mut bytes)
                    .map_err(|source| BlobError::Read { what: descriptor.digest.to_string(), source })?;
                Ok(json(&descriptor.digest.to_string(), &bytes)?)
            }
            None => Ok(self.layout.parsed(descriptor).map_err(BlobError::from)?),
        }
    }
}
