//! What layers an image has: digest, size, diff ID and chain ID of each.

use crate::oci::{Descriptor, Digest, ImageConfig, Manifest};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Largest manifest: what registries accept.
pub const MANIFEST_MAX: u64 = 4 << 20;
/// Largest image configuration. Those of large machine-learning images have some 50 kB.
pub const CONFIG_MAX: u64 = 8 << 20;

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayer {
    pub blob: Descriptor,
    pub diff_id: Digest,
    /// Name of the snapshot that has this layer and all below.
    pub chain_id: String,
}

/// An image, and what its downloads share.
pub struct Image {
    /// Bottom first.
    pub layers: Vec<ImageLayer>,
    /// Requests in flight, if the operator limits them.
    pub downloads: Option<Arc<Semaphore>>,
    /// Layers being unpacked, if the operator limits them.
    pub unpacks: Option<Arc<Semaphore>>,
}

/// Why an image's documents say nothing about its layers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    #[error("the manifest cannot be read: {0}")]
    Manifest(String),
    #[error("the image configuration cannot be read: {0}")]
    Config(String),
    #[error("the manifest lists {layers} layers, the image configuration {diff_ids}")]
    Count { layers: usize, diff_ids: usize },
}

/// Reads a manifest.
pub fn manifest(bytes: &[u8]) -> Result<Manifest, ImageError> {
    serde_json::from_slice(bytes).map_err(|e| ImageError::Manifest(e.to_string()))
}

/// The layers of the image with this manifest and this configuration.
pub fn layers(manifest: &Manifest, config: &[u8]) -> Result<Vec<ImageLayer>, ImageError> {
    let config: ImageConfig = serde_json::from_slice(config).map_err(|e| ImageError::Config(e.to_string()))?;
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        return Err(ImageError::Count { layers: manifest.layers.len(), diff_ids: diff_ids.len() });
    }
    let mut chain: Option<String> = None;
    let with_chain = manifest.layers.iter().zip(diff_ids).map(|(blob, diff_id)| {
        let chain_id = match &chain {
            None => diff_id.to_string(),
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()).to_string(),
        };
        chain = Some(chain_id.clone());
        ImageLayer { blob: blob.clone(), diff_id, chain_id }
    });
    Ok(with_chain.collect())
}

impl Image {
    /// Where the layer is that a client calls `chain_id`. An image may have the same layer twice; clients may have names of their own.
    pub fn find(&self, layer: &Digest, chain_id: &str) -> Option<usize> {
        let is_layer = |l: &&ImageLayer| l.blob.digest == *layer;
        self.layers
            .iter()
            .position(|l| is_layer(&l) && l.chain_id == chain_id)
            .or_else(|| self.layers.iter().position(|l| l.blob.digest == *layer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::media_type;

    fn parse(layers: &[&str], diff_ids: &[&str]) -> Result<Vec<ImageLayer>, ImageError> {
        let blobs = layers.iter().map(|l| Descriptor::of("layer", l.as_bytes())).collect();
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.into(),
            artifact_type: String::new(),
            config: Descriptor::of(media_type::OCI_CONFIG, b""),
            layers: blobs,
            subject: None,
            annotations: Default::default(),
        };
        let ids: Vec<String> = diff_ids.iter().map(|d| Digest::of(d.as_bytes()).to_string()).collect();
        let config = serde_json::json!({"rootfs": {"type": "layers", "diff_ids": ids}}).to_string();
        super::layers(&manifest, config.as_bytes())
    }

    #[test]
    fn chain_ids_are_those_of_the_image_specification() {
        let layers = parse(&["a", "b", "a"], &["A", "B", "A"]).unwrap();
        let (a, b) = (Digest::of(b"A"), Digest::of(b"B"));
        let second = Digest::of(format!("{a} {b}").as_bytes());
        let third = Digest::of(format!("{second} {a}").as_bytes());
        let chains: Vec<&str> = layers.iter().map(|l| l.chain_id.as_str()).collect();
        assert_eq!(chains, [a.to_string(), second.to_string(), third.to_string()]);
        let image = Image { layers, downloads: None, unpacks: None };
        let layer = Digest::of(b"a");
        assert_eq!(image.find(&layer, &third.to_string()), Some(2), "the same layer twice");
        assert_eq!(image.find(&layer, "a name of its own"), Some(0));
        assert_eq!(image.find(&Digest::of(b"x"), &third.to_string()), None);
    }

    #[test]
    fn documents_that_do_not_fit_are_refused() {
        assert_eq!(parse(&["a"], &["A", "B"]), Err(ImageError::Count { layers: 1, diff_ids: 2 }));
        assert!(matches!(manifest(b"{"), Err(ImageError::Manifest(_))));
    }
}
