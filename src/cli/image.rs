//! An image as its registry has it, seen with the daemon's settings: for `soci explain` and `soci doctor`.
//!
//! The registry is asked with the hosts, time-outs and logins of the daemon's configuration; manifests are fetched, layers and zTOCs are not, and
//! nothing is kept.

use super::interrupt::{self, Stopped};
use crate::{
    config::Config,
    daemon,
    index::{ContentStore, ImageTarget, Indexes, NoIndex, SociIndex, StoreError},
    layout::Layout,
    oci::{Descriptor, Digest, Index, Manifest, Platform, Reference, media_type},
    registry::{RegistryError, Repository},
};
use std::{io, sync::Arc, time::Duration};

/// For all requests together, beside what the configuration allows each.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why an image could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot ask the registry of {image}")]
    Registry { image: String, source: Box<RegistryError> },
    #[error("{image} is not an image that can be understood: {why}")]
    Strange { image: String, why: String },
    #[error("{image} has no image for {platform}")]
    NoPlatform { image: String, platform: String },
    #[error("the registry of {image} has not answered within {} s", PATIENCE.as_secs())]
    Patience { image: String },
    #[error("cannot look at images")]
    Setup(#[source] io::Error),
    #[error("cannot look at images")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// What the registry has.
#[derive(Debug)]
pub struct Image {
    pub manifest: Digest,
    /// Bottom first.
    pub layers: Vec<Descriptor>,
    /// Its zTOCs were not fetched.
    pub index: Result<SociIndex, NoIndex>,
}

/// Asks for `reference` as a daemon with `config` would.
pub fn look(reference: &Reference, config: &Config, explicit: Option<String>) -> Result<Image, ImageError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ImageError::Setup)?;
    let image = reference.to_string();
    runtime.block_on(async {
        tokio::select! {
            looked = ask(reference, config, explicit) => looked,
            () = tokio::time::sleep(PATIENCE) => Err(ImageError::Patience { image }),
            stopped = stop() => Err(stopped.into()),
        }
    })
}

async fn stop() -> Stopped {
    loop {
        if let Some(stopped) = interrupt::stopped() {
            return stopped;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn ask(reference: &Reference, config: &Config, explicit: Option<String>) -> Result<Image, ImageError> {
    let image = reference.to_string();
    let failed = |source| ImageError::Registry { image: image.clone(), source: Box::new(source) };
    let registry = daemon::registry_of(config).map_err(failed)?;
    let repository = registry.repository(reference).map_err(failed)?;
    let (manifest, layers) = manifest(reference, &repository).await?;
    // Discovery keeps what it finds; here that is nobody's business but ours.
    let place = tempfile::tempdir().map_err(ImageError::Setup)?;
    let store = ContentStore::soci(&Layout::new(place.path()))?;
    let indexes = Indexes::new(registry, store, daemon::discovery(config));
    let target = ImageTarget { reference: reference.clone(), manifest, explicit };
    let index = indexes.preview(&target).await;
    Ok(Image { manifest, layers, index: index.map(|index| Arc::try_unwrap(index).unwrap_or_else(|i| (*i).clone())) })
}

/// The manifest for this platform and its layers.
async fn manifest(reference: &Reference, repository: &Repository) -> Result<(Digest, Vec<Descriptor>), ImageError> {
    let image = reference.to_string();
    let failed = |source| ImageError::Registry { image: image.clone(), source: Box::new(source) };
    let strange = |why: String| ImageError::Strange { image: image.clone(), why };
    let target = match (&reference.digest, &reference.tag) {
        (Some(digest), _) => digest.to_string(),
        (None, Some(tag)) => tag.clone(),
        (None, None) => "latest".to_owned(),
    };
    let mut fetched = repository.manifest(&target).await.map_err(failed)?;
    if media_type::is_index(&fetched.media_type) {
        let index: Index = serde_json::from_slice(&fetched.bytes).map_err(|e| strange(e.to_string()))?;
        let platform = Platform::host();
        let wanted =
            |m: &&Descriptor| m.artifact_type.is_empty() && m.platform.as_ref().is_some_and(|p| p.matches(&platform));
        let chosen = index.manifests.iter().find(wanted);
        let chosen =
            chosen.ok_or_else(|| ImageError::NoPlatform { image: image.clone(), platform: platform.to_string() })?;
        fetched = repository.manifest(&chosen.digest.to_string()).await.map_err(failed)?;
    }
    let manifest: Manifest = serde_json::from_slice(&fetched.bytes).map_err(|e| strange(e.to_string()))?;
    Ok((fetched.digest, manifest.layers))
}
