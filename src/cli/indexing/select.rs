//! Which layers get a zTOC, by media type and size (`formats.md` 3.4). Pure.

use crate::ztoc::Compression;

/// What a media type says about an entry of `layers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerType {
    /// An ordinary layer that can be indexed.
    Indexable(Compression),
    /// A layer in a form that cannot: its name, as the skip line gives it.
    Unsupported(String),
    /// A prefetch artifact, which is no layer.
    Prefetch,
    /// Nothing that is known to be a layer. The Go CLI fails the image; we leave the entry alone and say so.
    NotALayer,
}

/// Reads a media type.
pub fn layer_type(media_type: &str) -> LayerType {
    if media_type == crate::oci::media_type::SOCI_PREFETCH {
        return LayerType::Prefetch;
    }
    let mut parts = media_type.split('+');
    let base = parts.next().unwrap_or_default();
    let mut suffixes: Vec<&str> = parts.collect();
    suffixes.sort_unstable();
    // The Go CLI takes `+gzip+encrypted` for gzip, fails on the ciphertext, and fails the image.
    let suffix = suffixes.iter().find(|s| **s == "encrypted").or(suffixes.last()).copied();
    let unsupported = |name: &str| LayerType::Unsupported(name.to_owned());
    match (base, suffix) {
        ("application/vnd.oci.image.layer.v1.tar", None) => LayerType::Indexable(Compression::Uncompressed),
        (
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.oci.image.layer.nondistributable.v1.tar",
            Some("gzip"),
        ) => LayerType::Indexable(Compression::Gzip),
        (
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.oci.image.layer.nondistributable.v1.tar",
            suffix,
        ) => unsupported(suffix.unwrap_or_default()),
        (docker, suffix) => {
            let kind = docker
                .strip_prefix("application/vnd.docker.image.rootfs.")
                .map(|rest| rest.strip_prefix("foreign.").unwrap_or(rest));
            match (kind, suffix) {
                (Some("diff.tar"), None) => LayerType::Indexable(Compression::Uncompressed),
                (Some("diff.tar.gzip"), None) => LayerType::Indexable(Compression::Gzip),
                (Some("diff.tar.zstd"), None) => unsupported("zstd"),
                (Some("diff.tar" | "diff.tar.gzip" | "diff.tar.zstd"), Some(suffix)) => unsupported(suffix),
                _ => LayerType::NotALayer,
            }
        }
    }
}

/// Whether the layer may be kept by its vendor, and so be absent from a complete image.
pub fn is_foreign(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.oci.image.layer.nondistributable.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.foreign.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_specification() {
        let gzip = LayerType::Indexable(Compression::Gzip);
        let tar = LayerType::Indexable(Compression::Uncompressed);
        let skip = |name: &str| LayerType::Unsupported(name.into());
        for (media_type, want) in [
            ("application/vnd.oci.image.layer.v1.tar", tar.clone()),
            ("application/vnd.oci.image.layer.v1.tar+gzip", gzip.clone()),
            ("application/vnd.oci.image.layer.v1.tar+zstd", skip("zstd")),
            ("application/vnd.oci.image.layer.v1.tar+encrypted", skip("encrypted")),
            ("application/vnd.oci.image.layer.v1.tar+zstd+encrypted", skip("encrypted")),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", skip("encrypted")),
            ("application/vnd.oci.image.layer.v1.tar+lz4", skip("lz4")),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar", skip("")),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", skip("zstd")),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", gzip.clone()),
            ("application/vnd.docker.image.rootfs.diff.tar", tar.clone()),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar", tar),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip.clone()),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", gzip),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", skip("zstd")),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip+encrypted", skip("encrypted")),
            ("application/vnd.amazon.soci.prefetch.v1+json", LayerType::Prefetch),
            ("application/vnd.oci.image.layer.v2.tar", LayerType::NotALayer),
            ("application/vnd.in-toto+json", LayerType::NotALayer),
            ("", LayerType::NotALayer),
        ] {
            assert_eq!(layer_type(media_type), want, "{media_type}");
        }
    }
}
