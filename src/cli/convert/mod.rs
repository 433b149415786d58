//! `soci convert`: an image in, the same image with its SOCI indexes out (`formats.md` 3, 4, 6).
//!
//! ```text
//!   source ──▶ select ──▶ build ──▶ prefetch ──▶ rewrite ──▶ layout::write
//!   the image  which      zTOCs,    spans of     manifests,   one rename
//!   it holds   layers     2 at a    named files  new index
//!                         time
//! ```
//!
//! The result has the digests that the Go CLI gives the same input. Where we deviate, always towards a result:
//! * a layer that cannot be indexed (damaged, sparse, trailing garbage, not a layer) is left without a zTOC and a warning says
//!   so; the Go CLI fails the image. A layer that is *missing* still fails it: the image is incomplete.
//! * platforms that the layout does not name are read from image configurations ([`source`]).
//! * entries of the index that are not images (SOCI indexes of an earlier conversion, artifacts, nested indexes) are carried
//!   over untouched; the Go CLI rewrites them into something that cannot be decoded ([`rewrite`]).

mod build;
mod prefetch;
mod report;
mod rewrite;
mod select;
mod source;

use super::{
    args::{self, Format},
    interrupt::Stopped,
    layout::{
        LayoutError, OciLayout,
        write::{Destination, Staging, WriteError},
    },
    output::{Console, Lines},
    values::{self, BadPlatform},
};
use crate::oci::{BUILD_TOOL, Descriptor, Digest, Manifest, Platform, annotation, media_type};
use build::{Built, Job, Outcome};
use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// The configuration of every SOCI index.
const EMPTY_CONFIG: &[u8] = b"{}";

/// Why an image was not converted. The words of the first variants are searched for by scripts.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error("source image needs to be specified")]
    NoSource,
    #[error("destination needs to be specified")]
    NoDestination,
    #[error("optimization {0} is not a valid optimization [xattr]")]
    Optimization(String),
    #[error("span size must be >= 0")]
    SpanSize,
    #[error("min layer size must be >= 0")]
    MinLayerSize,
    #[error("no ztocs created, all layers either skipped or produced errors")]
    EmptyIndex,
    #[error("image does not support any platforms")]
    NoPlatforms,
    #[error("image manifest for {wanted}: not found (the image is for: {found})")]
    PlatformNotFound { wanted: String, found: String },
    #[error("index.json contains no manifests")]
    EmptyLayout,
    #[error("manifest list contains no entries with available blobs")]
    NothingAvailable,
    #[error("{0}: media-type: expected index but found manifest")]
    ManifestForIndex(String),
    #[error("index.json points at a {0:?}, which is neither an image nor a list of images")]
    NotAnImage(String),
    #[error("the image has more than {limit} {what}")]
    TooMany { what: &'static str, limit: u64 },
    #[error("failed to parse prefetch files: {}: {why}", path.display())]
    PrefetchList { path: PathBuf, why: String },
    #[error(
        "this build of soci cannot read or write images in containerd yet: save the image as an OCI layout \
         (`ctr images export`, `skopeo copy`, `docker save`) and convert that with --standalone SOURCE DESTINATION"
    )]
    NeedsContainerd,
    #[error(transparent)]
    Platform(#[from] BadPlatform),
    #[error("errors encountered while building soci layers")]
    Layer(#[source] LayoutError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
    #[error("failed to start a thread")]
    Thread(#[source] io::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// What to do, checked.
struct Plan {
    platforms: Wanted,
    span_size: u64,
    min_layer_size: u64,
    mark_xattrs: bool,
    reuse: Reuse,
    prefetch: Vec<String>,
}

enum Wanted {
    Default,
    All,
    These(Vec<Platform>),
}

/// Whether a layer that two platforms share is reported as built once. (It is built once in any case.)
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reuse {
    Allowed,
    Forbidden,
}

impl Plan {
    fn new(args: &args::Convert) -> Result<Plan, ConvertError> {
        if let Some(unknown) = args.optimizations.iter().map(|o| o.trim()).find(|o| *o != "xattr") {
            return Err(ConvertError::Optimization(unknown.to_owned()));
        }
        let platforms = if args.platforms.all_platforms {
            Wanted::All
        } else if args.platforms.platform.is_empty() {
            Wanted::Default
        } else {
            let parsed = args.platforms.platform.iter().map(|p| values::platform(p.trim()));
            Wanted::These(parsed.collect::<Result<_, _>>()?)
        };
        Ok(Plan {
            platforms,
            prefetch: prefetch::paths(&args.prefetch_file, args.prefetch_files_json.as_deref())?,
            span_size: u64::try_from(args.span_size).map_err(|_| ConvertError::SpanSize)?,
            min_layer_size: u64::try_from(args.min_layer_size).map_err(|_| ConvertError::MinLayerSize)?,
            mark_xattrs: !args.optimizations.is_empty(),
            reuse: if args.force { Reuse::Forbidden } else { Reuse::Allowed },
        })
    }
}

/// Runs the command.
pub fn run(args: &args::Convert) -> Result<(), ConvertError> {
    let source = args.operands.first().filter(|o| !o.is_empty()).ok_or(ConvertError::NoSource)?;
    let destination = args.operands.get(1).filter(|o| !o.is_empty()).ok_or(ConvertError::NoDestination)?;
    let plan = Plan::new(args)?;
    if !args.standalone {
        return Err(ConvertError::NeedsContainerd);
    }
    standalone(&plan, Path::new(source), Path::new(destination), args.format, args.json)
}

/// Everything that was learned about one platform.
struct Converted<'a> {
    platform: Platform,
    /// Its place in the list of the image.
    place: usize,
    manifest: &'a Manifest,
    outcomes: Vec<Outcome>,
    /// Prefetch artifacts by layer.
    prefetch: BTreeMap<Digest, Digest>,
    /// The SOCI index, unless it would be empty.
    index: Option<Descriptor>,
}

fn standalone(plan: &Plan, source: &Path, destination: &Path, format: Format, json: bool) -> Result<(), ConvertError> {
    let layout = OciLayout::open(source)?;
    let target = Destination::check(destination, format)?;
    let lines = match (json, target.is_stdout()) {
        (true, _) => Lines::Nowhere,
        (false, true) => Lines::Stderr,
        (false, false) => Lines::Stdout,
    };
    let stdout_taken = target.is_stdout();
    let console = Console::new(lines);
    let image = source::resolve(&layout)?;
    let staging = Staging::new(target)?;
    if let Some(list) = &image.made_up {
        staging.put(list)?;
    }

    let mut converted = Vec::new();
    for platform in wanted(&plan.platforms, &image) {
        let (place, manifest) = image.find(&platform)?;
        let (index, outcomes, prefetch) = (None, Vec::new(), BTreeMap::new());
        converted.push(Converted { platform, place, manifest, outcomes, prefetch, index });
    }
    build_layers(plan, &layout, &staging, &console, &mut converted)?;
    for platform in &mut converted {
        add_prefetch_and_index(plan, &staging, &console, platform)?;
    }
    if converted.iter().all(|c| c.index.is_none()) {
        return Err(ConvertError::EmptyIndex);
    }
    for platform in converted.iter().filter(|c| c.index.is_none()) {
        console.warn(format!("no layer of {} was indexed; it stays without a SOCI index", platform.platform));
    }

    let result = rewrite::rewrite(&image, &converted, &layout, &staging, &console)?;
    let report = json.then(|| report::document(&result, &converted, &image, destination, format, &console));
    staging.publish(&layout, &result.reachable, &result.layout_index)?;
    if let Some(report) = report {
        let write = |out: &mut dyn Write| out.write_all(&report).and_then(|()| out.flush());
        let written = if stdout_taken { write(&mut io::stderr().lock()) } else { write(&mut io::stdout().lock()) };
        written.map_err(ConvertError::Output)?;
    }
    Ok(())
}

/// The platforms to index, each once; the first spelling counts, as the result shows it.
fn wanted(wanted: &Wanted, image: &source::Image) -> Vec<Platform> {
    let all = match wanted {
        Wanted::Default => std::slice::from_ref(&image.default),
        Wanted::All => &image.platforms,
        Wanted::These(platforms) => platforms,
    };
    let mut distinct: Vec<Platform> = Vec::new();
    for platform in all {
        if !distinct.iter().any(|p| p.matches(platform)) {
            distinct.push(platform.clone());
        }
    }
    distinct
}

/// Decides about every layer and builds the zTOCs; prints a line for each layer in image order, as soon as it is known.
fn build_layers(
    plan: &Plan,
    layout: &OciLayout,
    staging: &Staging,
    console: &Console,
    converted: &mut [Converted<'_>],
) -> Result<(), ConvertError> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut known = HashMap::new();
    let mut steps: Vec<Vec<Step>> = Vec::new();
    for platform in converted.iter() {
        let layers = platform.manifest.layers.iter();
        steps.push(layers.map(|layer| step(plan, layout, layer, &mut jobs, &mut known)).collect::<Result<_, _>>()?);
    }
    let options = build::Options { span_size: plan.span_size, prefetch: &plan.prefetch };
    build::run(&jobs, &options, layout, staging, console, |results| {
        // Which platform first had the zTOC: a later one finds that it exists.
        let mut first: HashMap<usize, usize> = HashMap::new();
        for (at, platform) in converted.iter_mut().enumerate() {
            for (layer, step) in platform.manifest.layers.iter().zip(&steps[at]) {
                let outcome = match step {
                    Step::Decided(outcome) => outcome.clone(),
                    Step::Job(job) => match results.get(*job)? {
                        Err(why) => Outcome::NotIndexable(why.clone()),
                        Ok(built) => {
                            let shared = *first.entry(*job).or_insert(at) != at;
                            let reused = shared && plan.reuse == Reuse::Allowed;
                            Outcome::Indexed { built: built.clone(), reused }
                        }
                    },
                };
                outcome.print(layer, plan.min_layer_size, console).map_err(ConvertError::Output)?;
                platform.outcomes.push(outcome);
            }
        }
        Ok(())
    })
}

enum Step {
    Decided(Outcome),
    Job(usize),
}

fn step(
    plan: &Plan,
    layout: &OciLayout,
    layer: &Descriptor,
    jobs: &mut Vec<Job>,
    known: &mut HashMap<(Digest, crate::ztoc::Compression), usize>,
) -> Result<Step, ConvertError> {
    let compression = match select::layer_type(&layer.media_type) {
        select::LayerType::Prefetch => return Ok(Step::Decided(Outcome::Prefetch)),
        select::LayerType::NotALayer => return Ok(Step::Decided(Outcome::NotALayer)),
        _ if select::is_foreign(&layer.media_type) && !layout.has(layer.digest) => {
            return Ok(Step::Decided(Outcome::Foreign));
        }
        // The image must be complete even where nothing is built.
        kind => {
            layout.blob_of(layer).map_err(ConvertError::Layer)?;
            kind
        }
    };
    if layer.size < plan.min_layer_size {
        return Ok(Step::Decided(Outcome::TooSmall));
    }
    match compression {
        select::LayerType::Indexable(compression) => {
            let job = *known.entry((layer.digest, compression)).or_insert_with(|| {
                jobs.push(Job { layer: layer.clone(), compression });
                jobs.len() - 1
            });
            Ok(Step::Job(job))
        }
        select::LayerType::Unsupported(name) => Ok(Step::Decided(Outcome::Unsupported(name))),
        select::LayerType::Prefetch | select::LayerType::NotALayer => Ok(Step::Decided(Outcome::NotALayer)),
    }
}

fn add_prefetch_and_index(
    plan: &Plan,
    staging: &Staging,
    console: &Console,
    converted: &mut Converted<'_>,
) -> Result<(), ConvertError> {
    let layers = || converted.manifest.layers.iter().zip(&converted.outcomes);
    let built = || layers().filter_map(|(layer, outcome)| Some((layer, outcome.built()?)));
    let mut descriptors: Vec<Descriptor> = built().map(|(layer, built)| ztoc_descriptor(plan, layer, built)).collect();
    if !plan.prefetch.is_empty() {
        let found: Vec<_> = built().map(|(layer, built)| (layer.digest, built.prefetch.as_slice())).collect();
        let (ranges, nowhere) = prefetch::assign(&plan.prefetch, &found);
        for path in nowhere {
            console.warn(format!("prefetch file {path} not found in any layer"));
        }
        let mut artifacts = BTreeMap::new();
        for (layer, _) in built() {
            let Some(ranges) = ranges.get(&layer.digest) else { continue };
            let bytes = prefetch::artifact(ranges.clone());
            let digest = staging.put(&bytes)?;
            let line = format!("Created prefetch artifact for layer {}: {digest}", layer.digest);
            console.line(&line).map_err(ConvertError::Output)?;
            let mut descriptor = Descriptor::new(media_type::SOCI_PREFETCH, digest, bytes.len() as u64);
            descriptor.annotations.insert(annotation::LAYER_DIGEST.into(), layer.digest.to_string());
            descriptors.push(descriptor);
            artifacts.insert(layer.digest, digest);
        }
        converted.prefetch = artifacts;
    }
    if !descriptors.is_empty() {
        let config = Descriptor::new(media_type::SOCI_INDEX_V2, staging.put(EMPTY_CONFIG)?, EMPTY_CONFIG.len() as u64);
        let index = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.into(),
            artifact_type: String::new(),
            config,
            layers: descriptors,
            subject: None,
            annotations: BTreeMap::from([(annotation::BUILD_TOOL.to_owned(), BUILD_TOOL.to_owned())]),
        };
        let bytes = index.to_canonical_json();
        converted.index = Some(Descriptor::new(media_type::OCI_MANIFEST, staging.put(&bytes)?, bytes.len() as u64));
    }
    Ok(())
}

fn ztoc_descriptor(plan: &Plan, layer: &Descriptor, built: &Built) -> Descriptor {
    let mut descriptor = Descriptor::new(media_type::ZTOC, built.ztoc, built.size);
    let mut annotate = |key: &str, value: String| drop(descriptor.annotations.insert(key.to_owned(), value));
    annotate(annotation::LAYER_DIGEST, layer.digest.to_string());
    annotate(annotation::LAYER_MEDIA_TYPE, layer.media_type.clone());
    annotate(annotation::SPAN_SIZE, plan.span_size.to_string());
    if plan.mark_xattrs && !built.needs_xattrs {
        annotate(annotation::DISABLE_XATTRS, "true".into());
    }
    descriptor
}
