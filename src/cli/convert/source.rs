//! What a layout holds: one image for one platform, or a list of images, resolved from `index.json` as the Go CLI does
//! (`formats.md` 4.6), and the platform of every entry.
//!
//! Where we deviate: an entry without platform takes it from its image's configuration (the Go CLI refuses the layout), and
//! several entries of `index.json` that are the same nested index count as one.

use super::ConvertError;
use crate::{
    cli::layout::{LayoutError, OciLayout, json},
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
}

/// Reads the image of a layout.
pub fn resolve(layout: &OciLayout) -> Result<Image, ConvertError> {
    let (root, made_up) = root(layout)?;
    let (mut base, single) = match &root {
        Root::List { index, .. } => ((**index).clone(), false),
        Root::Manifest(descriptor) => (list_of(vec![descriptor.clone()]), true),
    };
    base.media_type = media_type::OCI_INDEX.into();
    if base.manifests.len() > MAX_ENTRIES {
        return Err(ConvertError::TooMany { what: "manifests", limit: MAX_ENTRIES as u64 });
    }
    let mut kinds = Vec::with_capacity(base.manifests.len());
    let mut read = 0u64;
    for entry in &mut base.manifests {
        read = read.saturating_add(entry.size);
        if read > MAX_MANIFESTS {
            return Err(ConvertError::TooMany { what: "bytes of manifests", limit: MAX_MANIFESTS });
        }
        let kind = kind_of(layout, entry)?;
        if single && kind == Kind::Absent {
            layout.blob_of(entry)?;
        }
        let unnamed = entry.platform.as_ref().is_none_or(|p| p.os.is_empty() && p.architecture.is_empty());
        if let Kind::Image(manifest) = &kind
            && unnamed
        {
            entry.platform = platform_of_config(layout, &manifest.config)?;
        }
        kinds.push(kind);
    }
    let platforms: Vec<Platform> = base.manifests.iter().filter_map(|entry| platform_of(entry).cloned()).collect();
    let default = match platforms.first() {
        None => return Err(ConvertError::NoPlatforms),
        Some(first) if single => first.clone(),
        Some(_) => Platform::host(),
    };
    Ok(Image { base, kinds, made_up, platforms, default })
}

impl Image {
    /// The first image for `platform`: its place in the list, and its manifest.
    pub fn find(&self, platform: &Platform) -> Result<(usize, &Manifest), ConvertError> {
        let entries = self.base.manifests.iter().zip(&self.kinds).enumerate();
        let absent = || ConvertError::PlatformNotFound {
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
fn root(layout: &OciLayout) -> Result<(Root, Option<Vec<u8>>), ConvertError> {
    let mut top = layout.index()?;
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
        [] => return Err(ConvertError::EmptyLayout),
        [only] if !media_type::is_index(&only.media_type) => {
            return match media_type::is_manifest(&only.media_type) {
                true => Ok((Root::Manifest(only.clone()), None)),
                false => Err(ConvertError::NotAnImage(only.media_type.clone())),
            };
        }
        [nested] => {
            let bytes = layout.document(nested)?;
            let index = index(&nested.digest.to_string(), &bytes)?;
            Root::List { descriptor: Some(nested.clone()), index: Box::new(index) }
        }
        _ => Root::List { descriptor: None, index: Box::new(top) },
    };
    let Root::List { descriptor, mut index } = list else { return Ok((list, None)) };
    let before = index.manifests.len();
    if before > MAX_ENTRIES {
        return Err(ConvertError::TooMany { what: "manifests", limit: MAX_ENTRIES as u64 });
    }
    index.manifests.retain(|entry| layout.has(entry.digest));
    for entry in &mut index.manifests {
        name_type(layout, entry)?;
    }
    match (index.manifests.as_mut_slice(), descriptor) {
        ([], _) => Err(ConvertError::NothingAvailable),
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
fn index(what: &str, bytes: &[u8]) -> Result<Index, ConvertError> {
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
        return Err(ConvertError::ManifestForIndex(what.to_owned()));
    }
    Ok(json(what, bytes)?)
}

/// Fills in a missing media type from the document.
fn name_type(layout: &OciLayout, entry: &mut Descriptor) -> Result<(), ConvertError> {
    #[derive(Deserialize)]
    struct Shape {
        manifests: Option<serde::de::IgnoredAny>,
    }
    if entry.media_type.is_empty() && layout.has(entry.digest) {
        let shape: Shape = layout.parsed(entry)?;
        let name = if shape.manifests.is_some() { media_type::OCI_INDEX } else { media_type::OCI_MANIFEST };
        entry.media_type = name.to_owned();
    }
    Ok(())
}

fn kind_of(layout: &OciLayout, entry: &Descriptor) -> Result<Kind, LayoutError> {
    if media_type::is_index(&entry.media_type) {
        return Ok(Kind::Nested);
    }
    if entry.artifact_type == media_type::SOCI_INDEX_V2 {
        return Ok(Kind::SociIndex);
    }
    if !media_type::is_manifest(&entry.media_type) {
        return Ok(Kind::Unknown);
    }
    if !layout.has(entry.digest) {
        return Ok(Kind::Absent);
    }
    let manifest: Manifest = layout.parsed(entry)?;
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

fn platform_of_config(layout: &OciLayout, config: &Descriptor) -> Result<Option<Platform>, LayoutError> {
    let config: ImageConfig = layout.parsed(config)?;
    Ok(Some(config.platform.normalised()).filter(is_known))
}
