//! `soci create`: a v1 SOCI index for each platform of an image in containerd.
//!
//! Where we deviate from the Go CLI: with several platforms each index is kept by a label of its own on the image record
//! (`….soci-index.<platform>`, beside the `….soci-index` of the last one, which the Go CLI alone sets), so that containerd collects
//! none of them; and layers are indexed as many at a time as there are processors, straight from containerd, not by way of temporary files.

use super::{
    args::{self, Global},
    artifacts::ArtifactsError,
    blobs::BlobError,
    containerd::{REFERS, Session, SessionError},
    indexing::{self, IndexingError, PerPlatform, Places, Plan, Version, report, source},
    interrupt::Stopped,
    layout::{LayoutError, write::WriteError},
    output::{Console, Lines},
    recording::{self, Record},
};
use crate::{
    grpc::containerd::ContainerdError,
    oci::{Digest, Platform},
};
use std::{
    collections::BTreeMap,
    io::{self, Write},
};

/// Why an image was not indexed, or not converted: `convert` begins as `create` does. The words of the first variants are searched for by
/// scripts.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("source image needs to be specified")]
    NoSource,
    #[error("destination needs to be specified")]
    NoDestination,
    #[error("the destination image must be a tagged ref of the form \"registry/repository:tag\": {0}")]
    Destination(String),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Indexing(#[from] IndexingError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(transparent)]
    Remote(#[from] super::registry::RemoteError),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Runs the command.
pub fn run(args: &args::Create, global: &Global) -> Result<(), CreateError> {
    let name = args.operands.first().filter(|name| !name.is_empty()).ok_or(CreateError::NoSource)?;
    let plan = Plan::new(&args.indexing)?;
    let console = Console::new(Lines::of(args.indexing.json, args.indexing.quiet));
    if args.registry {
        return Ok(super::registry::create(args, &plan, name, global, &console)?);
    }
    let session = Session::open(global)?;
    let named = session.image(name)?;
    let image = source::of_target(&session, &named.target)?;
    let mut indexed = select(&plan, &image)?;
    let keeper = session.keeper(super::containerd::Purpose::Index)?;
    let places =
        Places { image: name, blobs: &session, sink: &keeper, console: &console, workers: indexing::processors() };
    indexing::build_layers(&plan, places, &mut indexed)?;
    for at in 0..indexed.len() {
        let manifest = &image.base.manifests[indexed[at].place];
        indexing::add_index(&plan, places, &mut indexed[at], Version::V1, Some(manifest))?;
        let Some(index) = &indexed[at].index else {
            return Err(IndexingError::EmptyIndex(indexing::why_empty(&plan, &indexed[at..=at])).into());
        };
        let mut labels = BTreeMap::from([(format!("{REFERS}.soci-index"), index.digest.to_string())]);
        if indexed.len() > 1 {
            labels.insert(label_of(&indexed[at].platform), index.digest.to_string());
        }
        let record = Record {
            platform: &indexed[at],
            version: Version::V1,
            span_size: plan.span_size,
            image: named.target.digest,
            manifest: manifest.digest,
            original: manifest.digest,
        };
        // First what keeps it, then what knows it: a row without its blob would be the worse half.
        session.remote.wait(keeper.containerd().label_image(&named, &labels))??;
        recording::record(&session.artifacts, &[record])?;
    }
    keeper.done();
    print(&args.indexing, &indexed, || report::created(&named.target, &indexed, &image, &console))
        .map_err(CreateError::Output)
}

/// Prints what `--json` or `--quiet` leave to be printed.
pub fn print(args: &args::Indexing, indexed: &[PerPlatform<'_>], report: impl FnOnce() -> Vec<u8>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        out.write_all(&report())?;
    } else if args.quiet {
        indexed.iter().filter_map(|p| p.index.as_ref()).try_for_each(|index| writeln!(out, "{}", index.digest))?;
    }
    out.flush()
}

/// The label by which the index of one of several platforms is kept.
fn label_of(platform: &Platform) -> String {
    format!("{REFERS}.soci-index.{}", platform.to_string().replace('/', "-"))
}

/// The platforms to index, strictly: an image that is one manifest is what it is, and an entry without platform hides what follows.
pub fn select<'a>(plan: &Plan, image: &'a source::Image) -> Result<Vec<PerPlatform<'a>>, IndexingError> {
    let mut selected = Vec::new();
    for platform in plan.platforms(image, &Platform::host()) {
        let (place, manifest) = if image.single {
            match &image.kinds[0] {
                source::Kind::Image(manifest) => (0, manifest.as_ref()),
                _ => return Err(IndexingError::NotAnImage(image.base.manifests[0].media_type.clone())),
            }
        } else {
            strictly(image, &platform)?
        };
        selected.push(PerPlatform::new(platform, place, manifest));
    }
    Ok(selected)
}

fn strictly<'a>(
    image: &'a source::Image,
    platform: &Platform,
) -> Result<(usize, &'a crate::oci::Manifest), IndexingError> {
    let unnamed = |at: usize| IndexingError::NoPlatformNamed { manifest: image.base.manifests[at].digest };
    match (image.find(platform), image.unnamed) {
        (Ok((place, manifest)), None) => Ok((place, manifest)),
        (Ok((place, manifest)), Some(at)) if place < at => Ok((place, manifest)),
        (_, Some(at)) => Err(unnamed(at)),
        (Err(error), None) => Err(error),
    }
}

/// Digests of the manifests of an image's platforms, for commands that only look.
pub fn manifests(image: &source::Image, wanted: &[Platform]) -> Result<Vec<(Platform, Digest)>, IndexingError> {
    let mut found = Vec::new();
    for platform in wanted {
        let place = if image.single { 0 } else { strictly(image, platform)?.0 };
        found.push((platform.clone(), image.base.manifests[place].digest));
    }
    Ok(found)
}
