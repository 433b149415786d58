//! What `--json` prints: one document, for pipelines. Keys are only ever added.

use super::{PerPlatform, build::Outcome, rewrite::Rewritten, source::Image};
use crate::{
    cli::output::Console,
    oci::{Descriptor, Digest},
};
use serde::Serialize;

#[derive(Serialize)]
struct Document<'a> {
    /// The image: of `convert`, the converted one; of `create`, the one that was indexed.
    image: Target<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<Output>,
    platforms: Vec<Platform<'a>>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct Target<'a> {
    digest: Digest,
    media_type: &'a str,
    size: u64,
}

/// Where the result is.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Output {
    Layout { path: String, format: &'static str },
    Image { reference: String },
}

#[derive(Serialize)]
struct Platform<'a> {
    platform: String,
    manifest: Digest,
    original_manifest: Digest,
    /// `null` when no layer was indexed.
    soci_index: Option<Digest>,
    layers: Vec<Layer<'a>>,
}

#[derive(Serialize)]
struct Layer<'a> {
    digest: Digest,
    media_type: &'a str,
    size: u64,
    #[serde(flatten)]
    status: Status<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefetch: Option<Digest>,
}

#[derive(Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
enum Status<'a> {
    Indexed {
        ztoc: Digest,
        ztoc_size: u64,
    },
    /// By choice or by form.
    Skipped {
        reason: String,
    },
    /// It should have been indexed, and could not be.
    Failed {
        reason: &'a str,
    },
}

/// What there is to say about each platform. `entries` are the manifests as they are afterwards.
fn platforms<'a>(indexed: &'a [PerPlatform<'_>], image: &'a Image, entries: Option<&'a [Digest]>) -> Vec<Platform<'a>> {
    let platforms = indexed.iter().map(|c| {
        let original = image.base.manifests[c.place].digest;
        Platform {
            platform: c.platform.to_string(),
            manifest: entries.map_or(original, |entries| entries[c.place]),
            original_manifest: original,
            soci_index: c.index.as_ref().map(|index| index.digest),
            layers: c
                .manifest
                .layers
                .iter()
                .zip(&c.outcomes)
                .map(|(layer, outcome)| Layer {
                    digest: layer.digest,
                    media_type: &layer.media_type,
                    size: layer.size,
                    status: status(outcome),
                    prefetch: c.prefetch.get(&layer.digest).map(|artifact| artifact.digest),
                })
                .collect(),
        }
    });
    platforms.collect()
}

/// What `convert` did: the document, with a newline.
pub fn converted(
    result: &Rewritten,
    indexed: &[PerPlatform<'_>],
    image: &Image,
    output: Output,
    console: &Console,
) -> Vec<u8> {
    render(&Document {
        image: Target { digest: result.target.digest, media_type: &result.target.media_type, size: result.target.size },
        output: Some(output),
        platforms: platforms(indexed, image, Some(&result.entries)),
        warnings: console.warnings(),
    })
}

/// What `create` did: the document, with a newline.
pub fn created(target: &Descriptor, indexed: &[PerPlatform<'_>], image: &Image, console: &Console) -> Vec<u8> {
    render(&Document {
        image: Target { digest: target.digest, media_type: &target.media_type, size: target.size },
        output: None,
        platforms: platforms(indexed, image, None),
        warnings: console.warnings(),
    })
}

fn render(document: &impl Serialize) -> Vec<u8> {
    // Writing plain structs to memory cannot fail; an empty document would tell the reader that it did.
    let mut bytes = serde_json::to_vec_pretty(document).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

fn status(outcome: &Outcome) -> Status<'_> {
    let skipped = |reason: &str| Status::Skipped { reason: reason.to_owned() };
    match outcome {
        Outcome::Indexed { built, .. } => Status::Indexed { ztoc: built.ztoc, ztoc_size: built.size },
        Outcome::TooSmall => skipped("smaller than min-layer-size"),
        Outcome::Unsupported(name) => Status::Skipped { reason: format!("unsupported compression {name:?}") },
        Outcome::Foreign => skipped("not in the layout: its vendor keeps it"),
        Outcome::Prefetch => skipped("prefetch artifact"),
        Outcome::NotALayer => skipped("not a layer media type"),
        Outcome::NotIndexable(reason) => Status::Failed { reason },
    }
}
