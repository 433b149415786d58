//! `soci explain IMAGE`: for each layer, what was decided on this node and why, and what would be decided now.
//!
//! The first is what the daemon remembers, the second what the registry and the daemon's configuration say. Either may be missing: a daemon that
//! does not run, an image it has never seen, a registry that is out of reach. What is known is printed, and what is not, and why.

use super::{
    args, daemon,
    image::{self, Image},
    output,
    status::json,
};
use crate::{
    config::{self, Config, MinLayerSize},
    index::NoIndex,
    oci::{Descriptor, InvalidReference, Reference},
    telemetry::status::{self, Mode, Status},
};
use serde::Serialize;
use std::{
    collections::HashMap,
    fmt::Write as _,
    io::{self, Write},
};

/// Why nothing can be explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    #[error("say which image: soci explain IMAGE")]
    NoImage,
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    #[error("cannot use the daemon's configuration; another file can be named with --config")]
    Config(#[from] config::ConfigError),
    #[error(
        "nothing is known of {image}: the daemon has not seen it ({daemon}), and the registry could not be asked ({registry})"
    )]
    Unknown { image: String, daemon: String, registry: String },
    #[error("cannot print")]
    Print(#[from] io::Error),
}

/// Everything, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Explanation {
    image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<String>,
    /// The SOCI index that the registry has for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<String>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    no_index: Option<String>,
    /// Why the registry could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    registry_error: Option<String>,
    /// Why the daemon could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    daemon_error: Option<String>,
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct Layer {
    layer: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    /// What was decided on this node.
    #[serde(skip_serializing_if = "Option::is_none")]
    here: Option<status::Layer>,
    /// What would be decided if it were pulled now.
    #[serde(skip_serializing_if = "Option::is_none")]
    now: Option<Verdict>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Verdict {
    mode: Mode,
    reason: &'static str,
    why: String,
}

/// Prints it.
pub fn run(args: &args::Explain) -> Result<(), ExplainError> {
    let [name] = args.operands.as_slice() else { return Err(ExplainError::NoImage) };
    let reference: Reference = name.parse()?;
    let config = config::load(&args.config)?.config;
    let status = daemon::ask(&args.daemon.daemon);
    let image = image::look(&reference, &config, args.index.clone());
    let known = status.as_ref().is_ok_and(|status| status.images.iter().any(|i| i.image == *name));
    let words = |error: &dyn std::error::Error| output::chain(error);
    if let (false, Err(registry)) = (known, &image) {
        let daemon = status.as_ref().err().map_or("it has no layer of it".to_owned(), |e| words(e));
        return Err(ExplainError::Unknown { image: name.clone(), daemon, registry: words(registry) });
    }
    let explanation = Explanation {
        image: name.clone(),
        manifest: image.as_ref().ok().map(|image| image.manifest.to_string()),
        index: image.as_ref().ok().and_then(|image| Some(image.index.as_ref().ok()?.digest.to_string())),
        no_index: image.as_ref().ok().and_then(|image| Some(words(image.index.as_ref().err()?))),
        registry_error: image.as_ref().err().map(|e| words(e)),
        daemon_error: status.as_ref().err().map(|e| words(e)),
        layers: layers(name, status.as_ref().ok(), image.as_ref().ok(), &config),
    };
    let text = if args.json { json(&explanation)? } else { text(&explanation) };
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

fn layers(name: &str, status: Option<&Status>, image: Option<&Image>, config: &Config) -> Vec<Layer> {
    let all = status.into_iter().flat_map(|status| &status.images);
    let mut here: HashMap<&str, &status::Layer> = HashMap::new();
    // A layer that another image brought is here for this one, too; what was said for this one wins.
    let (own, others): (Vec<_>, Vec<_>) = all.partition(|image| image.image == name);
    for layer in others.iter().chain(&own).flat_map(|image| &image.layers) {
        here.insert(&layer.layer, layer);
    }
    match image {
        Some(image) => image
            .layers
            .iter()
            .map(|layer| Layer {
                layer: layer.digest.to_string(),
                size: Some(layer.size),
                here: here.get(layer.digest.to_string().as_str()).map(|layer| (*layer).clone()),
                now: Some(verdict(layer, image, config)),
            })
            .collect(),
        None => own
            .iter()
            .flat_map(|image| &image.layers)
            .map(|layer| Layer { layer: layer.layer.clone(), size: None, here: Some(layer.clone()), now: None })
            .collect(),
    }
}

/// What the daemon would do with the layer. Pure.
fn verdict(layer: &Descriptor, image: &Image, config: &Config) -> Verdict {
    let parallel = &config.pull_modes.parallel_pull_unpack;
    if parallel.enable {
        let why = "pull_modes.parallel_pull_unpack.enable is set: every image is pulled as a whole".to_owned();
        return Verdict { mode: Mode::Pulled, reason: "parallel-pull", why };
    }
    let index = match &image.index {
        Ok(index) => index,
        Err(error) => {
            let (mode, who) = match parallel.parallel_pull_as_fallback {
                true => (Mode::Pulled, "pulled here (parallel_pull_as_fallback)"),
                false => (Mode::Containerd, "left to containerd"),
            };
            let help = match error {
                NoIndex::NotFound => "; soci convert makes an image with an index",
                NoIndex::Disabled => "; see [pull_modes] in the configuration",
                _ => "",
            };
            let why = format!("{}, so it is {who}{help}", output::chain(error));
            return Verdict { mode, reason: "no-index", why };
        }
    };
    if let MinLayerSize::Bytes(min) = config.snapshotter.min_layer_size
        && layer.size < min
    {
        let why = format!(
            "it has {} bytes, less than snapshotter.min_layer_size ({min}); clients that do not say sizes get it lazily if it has a zTOC",
            layer.size
        );
        return Verdict { mode: Mode::Pulled, reason: "too-small", why };
    }
    match index.layers.get(&layer.digest) {
        Some(ztoc) => {
            let why = format!("its SOCI index {} has a zTOC for it ({})", index.digest, output::bytes(ztoc.size));
            Verdict { mode: Mode::Lazy, reason: "indexed", why }
        }
        None => {
            let why = format!(
                "its SOCI index {} has no zTOC for it: whoever made the index left it out, as soci does with layers below --min-layer-size",
                index.digest
            );
            Verdict { mode: Mode::Pulled, reason: "no-ztoc", why }
        }
    }
}

fn text(explanation: &Explanation) -> String {
    let Explanation { image, manifest, index, no_index, registry_error, daemon_error, layers } = explanation;
    let mut out = format!("{image}\n");
    // Writing to a String cannot fail.
    if let Some(manifest) = manifest {
        let _ = writeln!(out, "  manifest   {manifest}");
    }
    if let Some(index) = index {
        let _ = writeln!(out, "  SOCI index {index}");
    }
    if let Some(why) = no_index {
        let _ = writeln!(out, "  no SOCI index: {why}");
    }
    if let Some(error) = registry_error {
        let _ = writeln!(out, "  the registry could not be asked: {error}");
    }
    if let Some(error) = daemon_error {
        let _ = writeln!(out, "  the daemon could not be asked: {error}");
    }
    for layer in layers {
        let size = layer.size.map(|size| format!("  {}", output::bytes(size))).unwrap_or_default();
        let _ = writeln!(out, "\n{}{size}", layer.layer);
        match (&layer.here, daemon_error) {
            (Some(here), _) => {
                let at = if here.decided.is_empty() { String::new() } else { format!(" ({})", here.decided) };
                let _ = writeln!(out, "  on this node: {}, {}: {}{at}", here.mode.name(), here.reason, here.why);
                if let Some(lazy) = &here.lazy {
                    let (fetched, size) = (output::bytes(lazy.fetched), output::bytes(lazy.size));
                    let verified = if lazy.verified { ", verified as a whole" } else { "" };
                    let _ =
                        writeln!(out, "                {fetched} of {size} here ({}%){verified}", lazy.fetched_percent);
                    if let Some(why) = &lazy.condemned {
                        let _ = writeln!(
                            out,
                            "                INDEX IS WRONG: {why}\n                Its files cannot be read and no container can be started from it. Remove the image and pull it again:\n                the layer will be pulled as a whole. Find out who made the index."
                        );
                    }
                }
            }
            (None, None) => out.push_str("  on this node: nothing is known of it; it was not pulled since the daemon started, or came with another image\n"),
            (None, Some(_)) => {}
        }
        if let Some(now) = &layer.now {
            let _ = writeln!(out, "  pulled now:   {}, {}: {}", now.mode.name(), now.reason, now.why);
        }
    }
    out
}
