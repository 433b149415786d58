//! Indexing an image: which layers get a zTOC, building them, the SOCI index, the rewritten image (`formats.md` 3, 4, 6).
//!
//! ```text
//!   source ──▶ select ──▶ build ──▶ prefetch ──▶ SOCI index ──▶ rewrite (v2)
//!   the image  which      zTOCs,    spans of     v1: subject    manifests that point at it,
//!   there is   layers     several   named files  v2: none       a new list
//!                         at a time
//! ```
//!
//! The same over OCI layouts, containerd and registries: blobs are read from a [`Blobs`] and kept in a [`Sink`]. `create` goes as far
//! as the index (v1), `convert` to the end (v2).
//!
//! The result has the digests that the Go CLI gives the same input. Where we deviate, always towards a result:
//! * a layer that cannot be indexed (damaged, sparse, trailing garbage, not a layer) is left without a zTOC and a warning says
//!   so; the Go CLI fails the image. A layer that is *missing* still fails it: the image is incomplete.
//! * platforms that the image does not name are read from image configurations ([`source`]).
//! * entries of the list that are not images (SOCI indexes of an earlier conversion, artifacts, nested indexes) are carried
//!   over untouched; the Go CLI rewrites them into something that cannot be decoded ([`rewrite`]).

mod build;
mod prefetch;
pub mod report;
pub mod rewrite;
pub mod select;
pub mod source;

use super::{
    args,
    blobs::{BlobError, Blobs, New, Sink},
    interrupt::Stopped,
    output::Console,
    values::{self, BadPlatform},
};
use crate::oci::{BUILD_TOOL, Descriptor, Digest, Manifest, Platform, annotation, media_type};
pub use build::{Budget, Built, Outcome};
use build::{Job, Options};
use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::PathBuf,
};

/// The configuration of every SOCI index.
const EMPTY_CONFIG: &[u8] = b"{}";
/// Span sizes from here on make sense: a span carries a window of 32 KiB in the zTOC.
const MIN_SPAN: u64 = 64 << 10;
/// Span sizes up to here make sense: a reader fetches and inflates a whole span for one byte of it, and the daemon takes no span of more
/// than 256 MiB ([`crate::ztoc::Limits`]), to which the last block may add.
const MAX_SPAN: u64 = 128 << 20;

/// Why an image was not indexed. The words of the first variants are searched for by scripts.
#[derive(Debug, thiserror::Error)]
pub enum IndexingError {
    #[error("optimization {0} is not a valid optimization [xattr]")]
    Optimization(String),
    #[error("span size must be >= 0")]
    SpanSize,
    #[error(
        "a span size of {0} bytes makes no sense: spans from 65536 (64 KiB) to 134217728 (128 MiB) do, and 4194304 (4 MiB, the default) \
         suits nearly every image; smaller ones make the index larger than what it saves, larger ones are fetched whole for a single byte"
    )]
    SpanSizeSense(u64),
    #[error("min layer size must be >= 0")]
    MinLayerSize,
    #[error("no ztocs created, all layers either skipped or produced errors{0}")]
    EmptyIndex(String),
    #[error("image does not support any platforms")]
    NoPlatforms,
    #[error("image manifest for {wanted}: not found (the image is for: {found})")]
    PlatformNotFound { wanted: String, found: String },
    #[error(
        "manifest should have proper platform: {manifest} in the image's list names none; `soci convert` reads it from the image's \
         configuration and makes a v2 index"
    )]
    NoPlatformNamed { manifest: Digest },
    #[error(
        "manifest should have proper platform: the image's list has another list in it, {0}, which no runtime looks into; convert it with \
         --standalone, or import it so that its name stands for the inner list"
    )]
    NestedList(Digest),
    #[error("index.json contains no manifests")]
    EmptyLayout,
    #[error("manifest list contains no entries with available blobs")]
    NothingAvailable,
    #[error("{0}: media-type: expected index but found manifest")]
    ManifestForIndex(String),
    #[error("it is a {0:?}, which is neither an image nor a list of images")]
    NotAnImage(String),
    #[error("the image has more than {limit} {what}")]
    TooMany { what: &'static str, limit: u64 },
    #[error("failed to parse prefetch files: {}: {why}", path.display())]
    PrefetchList { path: PathBuf, why: String },
    #[error(transparent)]
    Platform(#[from] BadPlatform),
    #[error("errors encountered while building soci layers; layer {layer} of {image}")]
    Layer { image: String, layer: Digest, source: Box<BlobError> },
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
    #[error("failed to start a thread")]
    Thread(#[source] io::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// What to do, checked.
pub struct Plan {
    pub platforms: Wanted,
    pub span_size: u64,
    pub min_layer_size: u64,
    mark_xattrs: bool,
    pub reuse: Reuse,
    prefetch: Vec<String>,
    memory: Budget,
}

/// Which platforms.
pub enum Wanted {
    Default,
    All,
    These(Vec<Platform>),
}

impl Wanted {
    /// Reads the flags.
    pub fn new(flags: &args::Platforms) -> Result<Wanted, BadPlatform> {
        Ok(if flags.all_platforms {
            Wanted::All
        } else if flags.platform.is_empty() {
            Wanted::Default
        } else {
            let parsed = flags.platform.iter().map(|p| values::platform(p.trim()));
            Wanted::These(parsed.collect::<Result<_, _>>()?)
        })
    }
}

/// Whether zTOCs that are there already are used again, and reported so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    Allowed,
    Forbidden,
}

/// Which kind of SOCI index: found through the image manifest it refers to, or named by a rewritten one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

impl Version {
    /// Type of the configuration, and of the artifact.
    pub fn artifact_type(self) -> &'static str {
        match self {
            Version::V1 => media_type::SOCI_INDEX_V1,
            Version::V2 => media_type::SOCI_INDEX_V2,
        }
    }
}

impl Plan {
    /// Reads the flags.
    pub fn new(args: &args::Indexing) -> Result<Plan, IndexingError> {
        if let Some(unknown) = args.optimizations.iter().map(|o| o.trim()).find(|o| *o != "xattr") {
            return Err(IndexingError::Optimization(unknown.to_owned()));
        }
        let platforms = Wanted::new(&args.platforms)?;
        let span_size = u64::try_from(args.span_size).map_err(|_| IndexingError::SpanSize)?;
        // Zero is a checkpoint at every block: what the Go CLI makes of it can be compared.
        if span_size != 0 && !(MIN_SPAN..=MAX_SPAN).contains(&span_size) {
            return Err(IndexingError::SpanSizeSense(span_size));
        }
        Ok(Plan {
            platforms,
            prefetch: prefetch::paths(&args.prefetch_file, args.prefetch_files_json.as_deref())?,
            span_size,
            min_layer_size: u64::try_from(args.min_layer_size).map_err(|_| IndexingError::MinLayerSize)?,
            mark_xattrs: !args.optimizations.is_empty(),
            reuse: if args.force { Reuse::Forbidden } else { Reuse::Allowed },
            memory: Budget::new(args.max_memory),
        })
    }

    /// The platforms to index, each once; the first spelling counts, as the result shows it. `default` if none were named.
    pub fn platforms(&self, image: &source::Image, default: &Platform) -> Vec<Platform> {
        let all = match &self.platforms {
            Wanted::Default => std::slice::from_ref(default),
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
}

/// Everything that was learned about one platform.
pub struct PerPlatform<'a> {
    pub platform: Platform,
    /// Its place in the list of the image.
    pub place: usize,
    pub manifest: &'a Manifest,
    pub outcomes: Vec<Outcome>,
    /// Prefetch artifacts by layer.
    pub prefetch: BTreeMap<Digest, Descriptor>,
    /// The SOCI index, unless it would be empty.
    pub index: Option<Descriptor>,
}

impl<'a> PerPlatform<'a> {
    /// Nothing is known yet.
    pub fn new(platform: Platform, place: usize, manifest: &'a Manifest) -> PerPlatform<'a> {
        PerPlatform { platform, place, manifest, outcomes: Vec::new(), prefetch: BTreeMap::new(), index: None }
    }

    /// Layers that have a zTOC.
    pub fn built(&self) -> impl Iterator<Item = (&Descriptor, &Built)> {
        let layers = self.manifest.layers.iter().zip(&self.outcomes);
        layers.filter_map(|(layer, outcome)| Some((layer, outcome.built()?)))
    }
}

/// Where from, where to, and who is told.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// What the image is called, in errors.
    pub image: &'a str,
    pub blobs: &'a dyn Blobs,
    pub sink: &'a dyn Sink,
    pub console: &'a Console,
    /// Layers at a time.
    pub workers: usize,
}

/// As many layers at a time as there are processors.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// Decides about every layer and builds the zTOCs; prints a line for each layer in image order, as soon as it is known.
pub fn build_layers(plan: &Plan, places: Places<'_>, platforms: &mut [PerPlatform<'_>]) -> Result<(), IndexingError> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut known = HashMap::new();
    let mut steps: Vec<Vec<Step>> = Vec::new();
    for platform in platforms.iter() {
        let layers = platform.manifest.layers.iter();
        steps.push(layers.map(|layer| step(plan, places, layer, &mut jobs, &mut known)).collect::<Result<_, _>>()?);
    }
    let options = Options {
        image: places.image,
        span_size: plan.span_size,
        prefetch: &plan.prefetch,
        reuse: plan.reuse,
        workers: places.workers,
        memory: &plan.memory,
    };
    let console = places.console;
    build::run(&jobs, &options, places.blobs, places.sink, console, |results| {
        // Which platform first had the zTOC: a later one finds that it exists.
        let mut first: HashMap<usize, usize> = HashMap::new();
        for (at, platform) in platforms.iter_mut().enumerate() {
            for (layer, step) in platform.manifest.layers.iter().zip(&steps[at]) {
                let outcome = match step {
                    Step::Decided(outcome) => outcome.clone(),
                    Step::Job(job) => match results.get(*job)? {
                        Err(why) => Outcome::NotIndexable(why.clone()),
                        Ok(built) => {
                            let shared = *first.entry(*job).or_insert(at) != at || built.known;
                            let reused = shared && plan.reuse == Reuse::Allowed;
                            Outcome::Indexed { built: built.clone(), reused }
                        }
                    },
                };
                outcome.print(layer, plan.min_layer_size, console).map_err(IndexingError::Output)?;
                platform.outcomes.push(outcome);
            }
        }
        Ok(())
    })
}

fn failed(image: &str, layer: &Descriptor, source: BlobError) -> IndexingError {
    match source {
        BlobError::Stopped(stopped) => IndexingError::Stopped(stopped),
        source => IndexingError::Layer { image: image.to_owned(), layer: layer.digest, source: Box::new(source) },
    }
}

enum Step {
    Decided(Outcome),
    Job(usize),
}

fn step(
    plan: &Plan,
    places: Places<'_>,
    layer: &Descriptor,
    jobs: &mut Vec<Job>,
    known: &mut HashMap<(Digest, crate::ztoc::Compression), usize>,
) -> Result<Step, IndexingError> {
    let compression = match select::layer_type(&layer.media_type) {
        select::LayerType::Prefetch => return Ok(Step::Decided(Outcome::Prefetch)),
        select::LayerType::NotALayer => return Ok(Step::Decided(Outcome::NotALayer)),
        _ if select::is_foreign(&layer.media_type) && !places.blobs.has_layer(layer.digest)? => {
            return Ok(Step::Decided(Outcome::Foreign));
        }
        // The image must be complete even where nothing is built.
        kind => {
            places.blobs.check(layer).map_err(|source| failed(places.image, layer, source))?;
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

/// Makes the prefetch artifacts and the SOCI index of a platform whose layers were built; none if it would be empty.
pub fn add_index(
    plan: &Plan,
    places: Places<'_>,
    platform: &mut PerPlatform<'_>,
    version: Version,
    subject: Option<&Descriptor>,
) -> Result<(), IndexingError> {
    let (sink, console) = (places.sink, places.console);
    let mut descriptors: Vec<Descriptor> =
        platform.built().map(|(layer, built)| ztoc_descriptor(plan, layer, built)).collect();
    let mut artifacts = BTreeMap::new();
    if !plan.prefetch.is_empty() {
        let found: Vec<_> = platform.built().map(|(layer, built)| (layer.digest, built.prefetch.as_slice())).collect();
        let (ranges, nowhere) = prefetch::assign(&plan.prefetch, &found);
        for path in nowhere {
            console.warn(format!("prefetch file {path} not found in any layer"));
        }
        for (layer, _) in platform.built() {
            let Some(ranges) = ranges.get(&layer.digest) else { continue };
            let (digest, size) = sink.put(New::Blob(&prefetch::artifact(ranges.clone())))?;
            let line = format!("Created prefetch artifact for layer {}: {digest}", layer.digest);
            console.line(&line).map_err(IndexingError::Output)?;
            let mut descriptor = Descriptor::new(media_type::SOCI_PREFETCH, digest, size);
            descriptor.annotations.insert(annotation::LAYER_DIGEST.into(), layer.digest.to_string());
            descriptors.push(descriptor.clone());
            artifacts.insert(layer.digest, descriptor);
        }
    }
    platform.prefetch = artifacts;
    if descriptors.is_empty() {
        return Ok(());
    }
    let (config, config_size) = sink.put(New::Blob(EMPTY_CONFIG))?;
    let index = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.into(),
        artifact_type: String::new(),
        config: Descriptor::new(version.artifact_type(), config, config_size),
        layers: descriptors,
        subject: subject.map(|s| Descriptor::new(&s.media_type, s.digest, s.size)),
        annotations: BTreeMap::from([(annotation::BUILD_TOOL.to_owned(), BUILD_TOOL.to_owned())]),
    };
    let (digest, size) = sink.put(New::SociIndex(&index))?;
    platform.index = Some(Descriptor::new(media_type::OCI_MANIFEST, digest, size));
    Ok(())
}

/// What to say to somebody whose image has no layer that was indexed.
pub fn why_empty(plan: &Plan, platforms: &[PerPlatform<'_>]) -> String {
    let layers = || platforms.iter().flat_map(|p| p.manifest.layers.iter().zip(&p.outcomes));
    let too_small = layers().filter(|(_, outcome)| matches!(outcome, Outcome::TooSmall)).map(|(layer, _)| layer.size);
    match too_small.max() {
        Some(size) if size < plan.min_layer_size => {
            format!(" (the largest layer that is too small has {size} bytes: --min-layer-size {size} would index it)")
        }
        _ => String::new(),
    }
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
