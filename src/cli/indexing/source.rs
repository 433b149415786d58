//! What a layout, an image record or a tag names: one image for one platform, or a list of images (of a layout, resolved from
//! `index.json` as the Go CLI does, `formats.md` 4.6), and the platform of every entry.
//!
//! Where we deviate: an entry without platform takes it from its image's configuration (the Go CLI refuses the layout), and
//! several entries of `index.json` that are the same nested index count as one.

use super::IndexingError;
use crate::{
    cli::{
        blobs::{self, BlobError, Blobs, json},
        layout::OciLayout,
    },
    oci::{Descriptor, ImageConfig, Index, Manifest, Platform, media_type},
};
use serde::Deserialize;

/// Entries of one index. The longest lists of official images have some twenty platforms, each with an attestation.
const MAX_ENTRIES: usize = 1000;
/// Bytes of all manifests together: they stay in memory, parsed.
const MAX_MANIFESTS: u64 = 64 << 20;
/// Docker's name for an image configuration.
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// What an entry of an index is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// An image of one platform (attestations of BuildKit have this form too).
    Image(Box<Manifest>),
    /// The SOCI index of an earlier conversion.
    SociIndex,
    /// An artifact that only has the form of an image.
    Artifact,
    /// An index inside the index.
    Nested,
    /// Something that is neither manifest nor index.
    Unknown,
    /// Its blob is not in the layout.
    Absent,
}

/// The image that is going to be converted.
#[derive(Debug)]
pub struct Image {
    /// The list to which SOCI indexes are going to be added. Every image has its platform where it has one at all.
    pub base: Index,
    /// What each entry of `base.manifests` is.
    pub kinds: Vec<Kind>,
    /// A list that had to be made up because the layout's own does not fit; the Go CLI stores it, so we do.
    pub made_up: Option<Vec<u8>>,
    /// The platforms there are, in the order of the entries.
    pub platforms: Vec<Platform>,
    /// The platform to index unless told otherwise.
    pub default: Platform,
    /// What was named is one manifest, not a list.
    pub single: bool,
    /// The first entry that names no platform itself.
    pub unnamed: Option<usize>,
}

/// Reads the image of a layout.
pub fn of_layout(layout: &OciLayout) -> Result<Image, IndexingError> {
    let (root, made_up) = root(layout)?;
    let (base, single) = match &root {
        Root::List { index, .. } => ((**index).clone(), false),
        Root::Manifest(descriptor) => (list_of(vec![descriptor.clone()]), true),
    };
    resolve(layout, base, single, made_up)
}

/// Reads the image that a record of containerd or a tag of a registry names.
pub fn of_target(blobs: &dyn Blobs, target: &Descriptor) -> Result<Image, IndexingError> {
    if media_type::is_manifest(&target.media_type) {
        let target = Descriptor::new(&target.media_type, target.digest, target.size);
        return resolve(blobs, list_of(vec![target]), true, None);
    }
    if !media_type::is_index(&target.media_type) {
        return Err(IndexingError::NotAnImage(target.media_type.clone()));
    }
    let mut base = index(&target.digest.to_string(), &blobs.document(target)?)?;
    for entry in &mut base.manifests {
        name_type(blobs, entry)?;
    }
    resolve(blobs, base, false, None)
}

fn resolve(blobs: &dyn Blobs, mut base: Index, single: bool, made_up: Option<Vec<u8>>) -> Result<Image, IndexingError> {
    base.media_type = media_type::OCI_INDEX.into();
    if base.manifests.len() > MAX_ENTRIES {
        return Err(IndexingError::TooMany { what: "manifests", limit: MAX_ENTRIES as u64 });
    }
    let mut kinds = Vec::with_capacity(base.manifests.len());
    let (mut read, mut first_unnamed) = (0u64, None);
    for (at, entry) in base.manifests.iter_mut().enumerate() {
        read = read.saturating_add(entry.size);
        if read > MAX_MANIFESTS {
            return Err(IndexingError::TooMany { what: "bytes of manifests", limit: MAX_MANIFESTS });
        }
        let kind = kind_of(blobs, entry)?;
        if single && kind == Kind::Absent {
            blobs.check(entry)?;
        }
        let unnamed = entry.platform.as_ref().is_none_or(|p| p.os.is_empty() && p.architecture.is_empty());
        if unnamed && !single && first_unnamed.is_none() {
            first_unnamed = Some(at);
        }
        if let Kind::Image(manifest) = &kind
            && unnamed
        {
            entry.platform = platform_of_config(blobs, &manifest.config)?;
        }
        kinds.push(kind);
    }
    let platforms: Vec<Platform> = base.manifests.iter().filter_map(|entry| platform_of(entry).cloned()).collect();
    let default = match platforms.first() {
        None => {
            let nested = kinds.iter().position(|kind| *kind == Kind::Nested);
            return Err(
                nested.map_or(IndexingError::NoPlatforms, |at| IndexingError::NestedList(base.manifests[at].digest))
            );
        }
        Some(first) if single => first.clone(),
        Some(_) => Platform::host(),
    };
    Ok(Image { base, kinds, made_up, platforms, default, single, unnamed: first_unnamed })
}

impl Image {
    /// The first image for `platform`: its place in the list, and its manifest.
    pub fn find(&self, platform: &Platform) -> Result<(usize, &Manifest), IndexingError> {
        let entries = self.base.manifests.iter().zip(&self.kinds).enumerate();
        let absent = || IndexingError::PlatformNotFound {
            wanted: platform.to_string(),
            found: self.platforms.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        };
        for (at, (entry, kind)) in entries {
            let matches = platform_of(entry).is_some_and(|p| p.matches(platform));
            match kind {
                Kind::Image(manifest) if matches => return Ok((at, manifest)),
                Kind::Absent if matches => return Err(absent()),
                _ => {}
            }
        }
        Err(absent())
    }
}

enum Root {
    Manifest(Descriptor),
    List { descriptor: Option<Descriptor>, index: Box<Index> },
}

/// A plain index of these entries.
pub fn list_of(manifests: Vec<Descriptor>) -> Index {
    Index {
        schema_version: 2,
        media_type: media_type::OCI_INDEX.into(),
        artifact_type: String::new(),
        manifests,
        subject: None,
        annotations: Default::default(),
    }
}

/// What `index.json` points at, without the entries whose blobs are absent; and the list that had to be made up for it.
fn root(layout: &OciLayout) -> Result<(Root, Option<Vec<u8>>), IndexingError> {
    let mut top = layout.index().map_err(BlobError::from)?;
    if let [only] = top.manifests.as_mut_slice() {
        name_type(layout, only)?;
    }
    if let Some(first) = top.manifests.first()
        && media_type::is_index(&first.media_type)
        && top.manifests.iter().all(|entry| entry.digest == first.digest)
    {
        top.manifests.truncate(1);
    }
    let list = match top.manifests.as_slice() {
        [] => return Err(IndexingError::EmptyLayout),
        [only] if !media_type::is_index(&only.media_type) => {
            return match media_type::is_manifest(&only.media_type) {
                true => Ok((Root::Manifest(only.clone()), None)),
                false => Err(IndexingError::NotAnImage(only.media_type.clone())),
            };
        }
        [nested] => {
            let bytes = layout.document(nested).map_err(BlobError::from)?;
            let index = index(&nested.digest.to_string(), &bytes)?;
            Root::List { descriptor: Some(nested.clone()), index: Box::new(index) }
        }
        _ => Root::List { descriptor: None, index: Box::new(top) },
    };
    let Root::List { descriptor, mut index } = list else { return Ok((list, None)) };
    let before = index.manifests.len();
    if before > MAX_ENTRIES {
        return Err(IndexingError::TooMany { what: "manifests", limit: MAX_ENTRIES as u64 });
    }
    index.manifests.retain(|entry| layout.has(entry.digest));
    for entry in &mut index.manifests {
        name_type(layout, entry)?;
    }
    match (index.manifests.as_mut_slice(), descriptor) {
        ([], _) => Err(IndexingError::NothingAvailable),
        ([only], _) if media_type::is_manifest(&only.media_type) => Ok((Root::Manifest(only.clone()), None)),
        (left, Some(descriptor)) if left.len() == before => {
            Ok((Root::List { descriptor: Some(descriptor), index }, None))
        }
        (_, descriptor) => {
            let stated = descriptor.map(|d| d.media_type).unwrap_or_else(|| index.media_type.clone());
            index.media_type = if stated.is_empty() { media_type::OCI_INDEX.into() } else { stated };
            let made_up = Index { media_type: index.media_type.clone(), ..list_of(index.manifests.clone()) };
            let bytes = made_up.to_canonical_json();
            Ok((Root::List { descriptor: None, index: Box::new(made_up) }, Some(bytes)))
        }
    }
}

/// Parses an index; what claims to be, or looks like, a manifest is refused.
fn index(what: &str, bytes: &[u8]) -> Result<Index, IndexingError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Shape {
        #[serde(default)]
        media_type: Option<String>,
        config: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
        fs_layers: Option<serde::de::IgnoredAny>,
    }
    let shape: Shape = json(what, bytes)?;
    let claims = shape.media_type.is_some_and(|m| media_type::is_manifest(&m));
    if claims || shape.config.is_some() || shape.layers.is_some() || shape.fs_layers.is_some() {
        return Err(IndexingError::ManifestForIndex(what.to_owned()));
    }
    Ok(json(what, bytes)?)
}

/// Fills in a missing media type from the document.
fn name_type(blobs: &dyn Blobs, entry: &mut Descriptor) -> Result<(), IndexingError> {
    #[derive(Deserialize)]
    struct Shape {
        manifests: Option<serde::de::IgnoredAny>,
    }
    if entry.media_type.is_empty() && blobs.has(entry.digest)? {
        let shape: Shape = blobs::parsed(blobs, entry)?;
        let name = if shape.manifests.is_some() { media_type::OCI_INDEX } else { media_type::OCI_MANIFEST };
        entry.media_type = name.to_owned();
    }
    Ok(())
}

fn kind_of(blobs: &dyn Blobs, entry: &Descriptor) -> Result<Kind, BlobError> {
    if media_type::is_index(&entry.media_type) {
        return Ok(Kind::Nested);
    }
    if entry.artifact_type == media_type::SOCI_INDEX_V2 {
        return Ok(Kind::SociIndex);
    }
    if !media_type::is_manifest(&entry.media_type) {
        return Ok(Kind::Unknown);
    }
    if !blobs.has(entry.digest)? {
        return Ok(Kind::Absent);
    }
    let manifest: Manifest = match blobs::parsed(blobs, entry) {
        Err(e) if e.is_missing() => return Ok(Kind::Absent),
        other => other?,
    };
    Ok(match manifest.config.media_type.as_str() {
        media_type::OCI_CONFIG | DOCKER_CONFIG => Kind::Image(Box::new(manifest)),
        media_type::SOCI_INDEX_V1 | media_type::SOCI_INDEX_V2 => Kind::SociIndex,
        _ => Kind::Artifact,
    })
}

/// The platform that a descriptor names; `unknown` is the platform of attestations, and none.
fn platform_of(entry: &Descriptor) -> Option<&Platform> {
    entry.platform.as_ref().filter(|p| is_known(p))
}

fn is_known(p: &Platform) -> bool {
    !matches!(p.os.as_str(), "" | "unknown") && !matches!(p.architecture.as_str(), "" | "unknown")
}

fn platform_of_config(blobs: &dyn Blobs, config: &Descriptor) -> Result<Option<Platform>, BlobError> {
    let config: ImageConfig = blobs::parsed(blobs, config)?;
    Ok(Some(config.platform.normalised()).filter(is_known))
}
