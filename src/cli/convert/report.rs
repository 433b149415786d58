//! What `--json` prints: one document, for pipelines. Keys are only ever added.

use super::{Converted, build::Outcome, rewrite::Rewritten, source::Image};
use crate::{
    cli::{args::Format, output::Console},
    oci::Digest,
};
use serde::Serialize;
use std::path::Path;

#[derive(Serialize)]
struct Document<'a> {
    /// The converted image: digest, media type and size of its index.
    image: Target<'a>,
    output: Output,
    platforms: Vec<Platform<'a>>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct Target<'a> {
    digest: Digest,
    media_type: &'a str,
    size: u64,
}

#[derive(Serialize)]
struct Output {
    path: String,
    format: &'static str,
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

/// The document, with a newline.
pub fn document(
    result: &Rewritten,
    converted: &[Converted<'_>],
    image: &Image,
    path: &Path,
    format: Format,
    console: &Console,
) -> Vec<u8> {
    let platforms = converted.iter().map(|c| Platform {
        platform: c.platform.to_string(),
        manifest: result.entries[c.place],
        original_manifest: image.base.manifests[c.place].digest,
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
                prefetch: c.prefetch.get(&layer.digest).copied(),
            })
            .collect(),
    });
    let document = Document {
        image: Target { digest: result.target.digest, media_type: &result.target.media_type, size: result.target.size },
        output: Output { path: path.display().to_string(), format: format.name() },
        platforms: platforms.collect(),
        warnings: console.warnings(),
    };
    // Writing plain structs to memory cannot fail; an empty document would tell the reader that it did.
    let mut bytes = serde_json::to_vec_pretty(&document).unwrap_or_default();
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
