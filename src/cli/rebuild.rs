//! `soci rebuild-db`: makes `artifacts.db` agree with the content store. Forgets what is gone, records the SOCI indexes that are there
//! with their zTOCs and prefetch artifacts.
//!
//! Where we deviate from the Go CLI: containerd is asked for its content (the Go CLI walks a directory that need not be containerd's),
//! v2 indexes are found as well, prefetch artifacts are recorded as what they are, the image of an index is recorded also where it has
//! several platforms, and an index whose image is not in containerd is left out with a warning instead of failing the command.

use super::{
    args::Global,
    artifacts::{ArtifactsError, Kind, Row, Rows},
    blobs::{self, BlobError},
    containerd::{Session, SessionError, Store},
    indexing::source,
    interrupt::{self, Stopped},
    layout::{LayoutError, MAX_DOCUMENT, OciLayout},
    output::{Console, Lines},
    store::soci_index,
};
use crate::{
    grpc::containerd::ContainerdError,
    layout::Layout,
    oci::{Descriptor, Digest, ImageConfig, Manifest, annotation, media_type},
};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Blobs that are shorter cannot be an index.
const SHORTEST: u64 = 10;

/// Why the database was not rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error("failed to add new artifacts to db")]
    Blob(#[from] BlobError),
    #[error("failed to add new artifacts to db")]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// An image manifest as an index may refer to it.
struct Known {
    image: Digest,
    platform: String,
}

/// What is to be recorded about an index.
struct Found {
    digest: Digest,
    size: u64,
    manifest: Manifest,
    known: Known,
    describes: Digest,
}

/// Runs the command.
pub fn run(global: &Global) -> Result<(), RebuildError> {
    let session = Session::open(global)?;
    let console = Console::new(Lines::Nowhere);
    let present: BTreeMap<Digest, u64> = match &session.store {
        Store::Containerd => {
            let all = session.remote.wait(session.containerd.all_content())??;
            all.into_iter().map(|info| (info.digest, info.size)).collect()
        }
        Store::Soci(_) => {
            let layout = OciLayout::open_store(&Layout::new(&global.root).content())?;
            let digests = layout.digests()?.into_iter();
            digests.map(|digest| Ok((digest, layout.blob(digest)?.len()))).collect::<Result<_, LayoutError>>()?
        }
    };
    let (manifests, converted) = images(&session, &console)?;
    let before = session.artifacts.rows()?;
    let mut found = Vec::new();
    for (digest, size) in &present {
        interrupt::check()?;
        if !(SHORTEST..=MAX_DOCUMENT).contains(size) || before.get(*digest).is_some() {
            continue;
        }
        let bytes = match session.artifact(*digest) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => continue,
            Err(BlobError::Stopped(stopped)) => return Err(stopped.into()),
            Err(error) => {
                console.warn(format!("blob {digest} is passed over: {}", super::output::chain(&error)));
                continue;
            }
        };
        let Some(manifest) = soci_index(&bytes) else { continue };
        let describes = manifest.subject.as_ref().map(|s| s.digest).or_else(|| converted.get(digest).copied());
        let Some(describes) = describes else {
            console.warn(format!("SOCI index {digest} is not recorded: no image in containerd refers to it"));
            continue;
        };
        let known = match manifests.get(&describes) {
            Some(known) => Known { image: known.image, platform: known.platform.clone() },
            None => match platform(&session, &manifest) {
                Ok(Some(platform)) => Known { image: describes, platform },
                Ok(None) => {
                    console.warn(format!(
                        "SOCI index {digest} is not recorded: its image manifest {describes} is not in containerd (pull the image)"
                    ));
                    continue;
                }
                Err(BlobError::Stopped(stopped)) => return Err(stopped.into()),
                Err(error) => {
                    let why = super::output::chain(&error);
                    console.warn(format!("SOCI index {digest} is not recorded: its image cannot be read: {why}"));
                    continue;
                }
            },
        };
        found.push(Found { digest: *digest, size: *size, manifest, known, describes });
    }
    let now = jiff::Timestamp::now();
    session.artifacts.change(|rows| {
        let gone: Vec<Digest> = rows.iter().map(|(digest, _)| digest).filter(|d| !present.contains_key(d)).collect();
        gone.into_iter().for_each(|digest| rows.remove(digest));
        found.iter().for_each(|index| add(rows, index, &present, now));
    })?;
    Ok(())
}

/// Manifests by digest, and of v2 indexes the manifest that each belongs to.
type Images = (HashMap<Digest, Known>, HashMap<Digest, Digest>);

/// The manifests of all images in containerd, and which manifest each v2 index in them belongs to.
fn images(session: &Session, console: &Console) -> Result<Images, RebuildError> {
    let (mut manifests, mut converted, mut seen) = (HashMap::new(), HashMap::new(), HashSet::new());
    for record in session.remote.wait(session.containerd.all_images())?? {
        if !seen.insert(record.target.digest) {
            continue;
        }
        let image = match source::of_target(session, &record.target) {
            Ok(image) => image,
            Err(error) => {
                interrupt::check()?;
                let why = super::output::chain(&error);
                console.warn(format!("image {} is passed over: {why}", record.name));
                continue;
            }
        };
        for entry in &image.base.manifests {
            if entry.artifact_type == media_type::SOCI_INDEX_V2 {
                let of = entry.annotations.get(annotation::IMAGE_MANIFEST_DIGEST).and_then(|d| d.parse().ok());
                converted.extend(of.map(|manifest: Digest| (entry.digest, manifest)));
            } else if let Some(platform) = &entry.platform {
                let known = Known { image: record.target.digest, platform: platform.to_string() };
                manifests.entry(entry.digest).or_insert(known);
            }
        }
    }
    Ok((manifests, converted))
}

/// The platform of the manifest that an index refers to, where no image record leads to it.
fn platform(session: &Session, index: &Manifest) -> Result<Option<String>, BlobError> {
    let read = || -> Result<Option<String>, BlobError> {
        let Some(subject) = &index.subject else { return Ok(None) };
        let manifest: Manifest = blobs::parsed(session, subject)?;
        let config: ImageConfig = blobs::parsed(session, &manifest.config)?;
        Ok(Some(config.platform.normalised().to_string()))
    };
    match read() {
        Err(error) if error.is_missing() => Ok(None),
        other => other,
    }
}

fn add(rows: &mut Rows, index: &Found, present: &BTreeMap<Digest, u64>, now: jiff::Timestamp) {
    let row = |kind, size, describes: Option<Digest>, media_type: &str| Row {
        kind,
        size,
        describes,
        image: None,
        platform: String::new(),
        location: describes.filter(|_| kind != Kind::Prefetch).map(|d| d.to_string()).unwrap_or_default(),
        media_type: media_type.to_owned(),
        artifact_type: String::new(),
        created_at: Some(now),
        span_size: 0,
    };
    let is_here = |blob: &&Descriptor| present.contains_key(&blob.digest);
    for blob in index.manifest.layers.iter().filter(is_here) {
        let annotation = |key: &str| blob.annotations.get(key);
        let layer = annotation(annotation::LAYER_DIGEST).and_then(|d| d.parse().ok());
        let kind = if blob.media_type == media_type::SOCI_PREFETCH { Kind::Prefetch } else { Kind::Ztoc };
        let span_size = annotation(annotation::SPAN_SIZE).and_then(|n| n.parse().ok()).unwrap_or(0);
        let span_size = if kind == Kind::Ztoc { span_size } else { 0 };
        rows.put(blob.digest, &Row { span_size, ..row(kind, blob.size, layer, &blob.media_type) });
    }
    let artifact_type = index.manifest.config.media_type.clone();
    let platform = index.known.platform.clone();
    let image = Some(index.known.image);
    let of_index = row(Kind::Index, index.size, Some(index.describes), media_type::OCI_MANIFEST);
    rows.put(index.digest, &Row { image, platform, artifact_type, ..of_index });
}
