//! The words of the OCI specifications: digests, references, descriptors, manifests, indexes and their canonical JSON.
//!
//! Invariant: a [`Digest`] is always a well-formed sha256 digest; a [`Reference`] always has a host and a repository.
//! Canonical JSON here is what the Go SOCI tools produce for the same values (`shared/spec/formats.md` 3.2), because
//! they re-serialise a SOCI index before they check its digest.
//!
//! Absent on purpose: I/O.
#![forbid(unsafe_code)]

mod chain;
mod digest;
mod idmap;
mod json;
mod manifest;
pub mod media_type;
mod platform;
mod reference;

pub use chain::Chain;
pub use digest::{Digest, Hasher, InvalidDigest};
pub use idmap::{IdMaps, InvalidIdMap};
pub use json::to_canonical_json;
pub use manifest::{Descriptor, ImageConfig, Index, Manifest, RootFs};
pub use platform::Platform;
pub use reference::{InvalidReference, Reference};

/// Annotation keys that SOCI defines (`formats.md` 3.3).
pub mod annotation {
    /// On a SOCI index: which tool built it.
    pub const BUILD_TOOL: &str = "com.amazon.soci.build-tool-identifier";
    /// On an image manifest (and its descriptor): digest of the v2 SOCI index.
    pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
    /// On the descriptor of a v2 SOCI index inside an image index: digest of the image manifest it belongs to.
    pub const IMAGE_MANIFEST_DIGEST: &str = "com.amazon.soci.image-manifest-digest";
    /// On a zTOC or prefetch descriptor: digest of the layer it describes.
    pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
    /// On a zTOC descriptor: media type of the layer it describes.
    pub const LAYER_MEDIA_TYPE: &str = "com.amazon.soci.image-layer-mediaType";
    /// On a zTOC descriptor: span size in bytes, decimal.
    pub const SPAN_SIZE: &str = "com.amazon.soci.span-size";
    /// On a zTOC descriptor: `true` when no entry of the layer has an xattr.
    pub const DISABLE_XATTRS: &str = "com.amazon.soci.disable-xattrs";
}

/// `Display`s as the value of [`annotation::BUILD_TOOL`] that the Go CLI writes; part of every zTOC's digest.
pub const BUILD_TOOL: &str = "AWS SOCI CLI v0.2";
