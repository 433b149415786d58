//! `soci push`: the newest v1 index of each platform of an image goes to the image's registry, with everything it lists, and is made
//! known there as referring to the image's manifest.
//!
//! Children before parents, so that nothing in the registry ever names what is not there. What is there is not sent again. The lines
//! are those of the Go CLI. Where we deviate: an index that is in the registry but is not listed as a referrer (a push that broke off
//! in between) is listed now.

use super::{
    access,
    args::{self, Global},
    artifacts::{ArtifactsError, Kind, Row},
    blobs::{self, BlobError, Blobs},
    containerd::{Session, SessionError},
    create,
    indexing::{IndexingError, Wanted, source},
    interrupt::Stopped,
    output::{Console, Lines},
    parallel,
    values::BadPlatform,
};
use crate::{
    oci::{Descriptor, Digest, InvalidReference, Manifest, Platform, Reference, media_type},
    registry::{Pushed, RegistryError, Repository},
};
use bytes::Bytes;
use serde::Serialize;
use std::{
    collections::HashSet,
    io::{self, Read, Write},
    sync::{Mutex, PoisonError},
};

/// As the Go CLI.
const DEFAULT_UPLOADS: usize = 3;
/// What is handed to an upload at a time.
const READ: usize = 256 << 10;
/// The Go CLI's words, spelling included: they are looked for.
const V2: &str = "[WARN] Skippping SOCI index manifest v2. You should push the whole image with higher level tools like finch or nerdctl.";

/// Why an index was not pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    #[error("please provide an image reference to push")]
    NoImage,
    #[error("unexpected value for flag existing-index: {0}, expected types [warn skip allow]")]
    ExistingIndex(String),
    #[error(
        "could not find any soci index manifest v1 to push for platform {platform}: make one with `soci create --platform {platform} {image}`"
    )]
    NoIndex { platform: String, image: String },
    #[error("{image} has no registry to push to")]
    Reference { image: String, source: InvalidReference },
    #[error("failed to fetch list of referrers of {manifest}")]
    Referrers { manifest: Digest, source: Box<BlobError> },
    #[error("error pushing graph to remote: {what}")]
    Push { what: String, source: Box<BlobError> },
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Access(#[from] access::AccessError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    #[error(transparent)]
    Image(#[from] IndexingError),
    #[error(transparent)]
    Platform(#[from] BadPlatform),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Existing {
    Warn,
    Skip,
    Allow,
}

/// An index that is going to be pushed.
struct Chosen {
    platform: Platform,
    manifest: Digest,
    index: Digest,
    size: u64,
}

/// What `--json` prints of a platform.
#[derive(Serialize)]
struct Told {
    platform: String,
    manifest: Digest,
    index: Digest,
    status: &'static str,
}

/// Runs the command.
pub fn run(args: &args::Push, global: &Global) -> Result<(), PushError> {
    let name = args.operands.first().filter(|name| !name.is_empty()).ok_or(PushError::NoImage)?;
    let existing = match args.existing_index.as_str() {
        "warn" => Existing::Warn,
        "skip" => Existing::Skip,
        "allow" => Existing::Allow,
        other => return Err(PushError::ExistingIndex(other.to_owned())),
    };
    let console = Console::new(Lines::of(args.json, args.quiet));
    let uploads = match usize::try_from(args.max_concurrent_uploads).ok().filter(|n| *n <= 1 << 10) {
        Some(0) => DEFAULT_UPLOADS,
        Some(n) => n,
        None => {
            console.warn(format!(
                "--max-concurrent-uploads {} is too many; {DEFAULT_UPLOADS} it is",
                args.max_concurrent_uploads
            ));
            DEFAULT_UPLOADS
        }
    };
    let wanted = Wanted::new(&args.platforms)?;
    let session = Session::open(global)?;
    let record = session.image(name)?;
    let image = source::of_target(&session, &record.target)?;
    let platforms = match wanted {
        Wanted::Default => vec![Platform::host()],
        Wanted::All => image.platforms.clone(),
        Wanted::These(platforms) => platforms,
    };
    let chosen = choose(&session, name, &create::manifests(&image, &platforms)?)?;
    let reference: Reference = name.parse().map_err(|source| PushError::Reference { image: name.clone(), source })?;
    let registry = access::registry(&args.access, &[&reference], global)?;
    let repository = registry.repository(&reference)?;
    let push =
        Push { session: &session, repository, console: &console, json: args.json, uploads, done: Mutex::default() };
    let mut told = Vec::new();
    for index in &chosen {
        let status = push.platform(index, existing)?;
        if args.quiet && !args.json && status != "skipped" {
            writeln!(io::stdout().lock(), "{}", index.index).map_err(PushError::Output)?;
        }
        let platform = index.platform.to_string();
        told.push(Told { platform, manifest: index.manifest, index: index.index, status });
    }
    if args.json {
        let text = serde_json::to_string_pretty(&told).unwrap_or_default();
        writeln!(io::stdout().lock(), "{text}").map_err(PushError::Output)?;
    }
    Ok(())
}

/// The newest v1 index of each platform; all are found before anything is sent.
fn choose(session: &Session, image: &str, manifests: &[(Platform, Digest)]) -> Result<Vec<Chosen>, PushError> {
    let rows = session.artifacts.rows()?;
    let mut chosen = Vec::new();
    for (platform, manifest) in manifests {
        let of_this = rows.of_kind(Kind::Index).filter(|(_, row)| row.describes == Some(*manifest));
        let (v1, other): (Vec<_>, Vec<_>) =
            of_this.partition(|(_, row): &(Digest, Row)| row.artifact_type == media_type::SOCI_INDEX_V1);
        if other.iter().any(|(_, row)| row.artifact_type == media_type::SOCI_INDEX_V2) {
            super::say(V2);
        }
        let newest = v1.into_iter().max_by_key(|(_, row)| row.created_at);
        let (index, row) =
            newest.ok_or_else(|| PushError::NoIndex { platform: platform.to_string(), image: image.to_owned() })?;
        chosen.push(Chosen { platform: platform.clone(), manifest: *manifest, index, size: row.size });
    }
    Ok(chosen)
}

struct Push<'a> {
    session: &'a Session,
    repository: Repository,
    console: &'a Console,
    json: bool,
    uploads: usize,
    /// Blobs that are in the registry.
    done: Mutex<HashSet<Digest>>,
}

impl Push<'_> {
    fn line(&self, text: String) -> Result<(), PushError> {
        self.console.line(&text).map_err(PushError::Output)
    }

    /// What became of one platform.
    fn platform(&self, chosen: &Chosen, existing: Existing) -> Result<&'static str, PushError> {
        if existing != Existing::Allow && self.is_there(chosen, existing)? == Existing::Skip {
            return Ok("skipped");
        }
        self.line(format!("pushing soci index with digest: {}", chosen.index))?;
        let failed = |source: BlobError| match source {
            BlobError::Stopped(stopped) => PushError::Stopped(stopped),
            source => PushError::Push { what: format!("SOCI index {}", chosen.index), source: Box::new(source) },
        };
        let bytes = self.session.artifact(chosen.index).map_err(failed)?;
        let bytes = bytes.ok_or_else(|| {
            failed(BlobError::Missing {
                digest: chosen.index,
                place: "the content store (`soci create` makes it again)".into(),
            })
        })?;
        let manifest: Manifest = blobs::json(&chosen.index.to_string(), &bytes).map_err(failed)?;
        let was_there = self.wait(self.repository.has_manifest(chosen.index)).map_err(failed)?;
        let pushed = if was_there {
            self.line(format!("skipped artifact with digest: {}", chosen.index))?;
            Pushed::Stored
        } else {
            let blobs: Vec<&Descriptor> = std::iter::once(&manifest.config).chain(&manifest.layers).collect();
            let subject = manifest.subject.as_ref();
            if let Some(subject) = subject {
                self.image(subject).map_err(failed)?;
            }
            parallel::each(self.uploads, &blobs, |blob| self.artifact(blob)).map_err(failed)?;
            self.line(format!("pushing artifact with digest: {}", chosen.index))?;
            let target = chosen.index.to_string();
            let put = self.repository.push_manifest(&target, media_type::OCI_MANIFEST, bytes.into());
            let pushed = self.wait(put).map_err(failed)?;
            self.line(format!("successfully pushed artifact with digest: {}", chosen.index))?;
            pushed
        };
        if pushed == Pushed::Stored {
            self.make_known(chosen, &manifest).map_err(failed)?;
        }
        Ok(if was_there { "exists" } else { "pushed" })
    }

    fn wait<T>(&self, future: impl Future<Output = Result<T, RegistryError>>) -> Result<T, BlobError> {
        Ok(self.session.remote.wait(future)??)
    }

    /// What to do about the indexes that are in the registry already.
    fn is_there(&self, chosen: &Chosen, existing: Existing) -> Result<Existing, PushError> {
        self.line("checking if a soci index already exists in remote repository...".to_owned())?;
        let failed =
            |source: RegistryError| PushError::Referrers { manifest: chosen.manifest, source: Box::new(source.into()) };
        let listed = self.repository.referrers(chosen.manifest, media_type::SOCI_INDEX_V1);
        let listed = self.session.remote.wait(listed)?.map_err(failed)?;
        let found = match listed.as_slice() {
            [] => return Ok(Existing::Allow),
            [one] => format!("soci index found in remote repository with digest: {}", one.digest),
            _ => "multiple soci indices found in remote repository".to_owned(),
        };
        if existing == Existing::Skip {
            self.line(format!("{found}: skipping pushing artifacts for image manifest: {}", chosen.manifest))?;
        } else if self.json {
            self.console.warn(format!("{found}: pushing index anyway"));
        } else {
            // Also where nothing else is printed: the Go CLI does.
            writeln!(io::stdout().lock(), "[WARN] {found}: pushing index anyway").map_err(PushError::Output)?;
        }
        Ok(existing)
    }

    /// A zTOC, prefetch artifact or configuration, from the content store.
    fn artifact(&self, blob: &Descriptor) -> Result<(), BlobError> {
        let digest = blob.digest;
        if !self.done.lock().unwrap_or_else(PoisonError::into_inner).insert(digest) {
            return Ok(());
        }
        if self.wait(self.repository.has_blob(digest))? {
            return self.say(format!("skipped artifact with digest: {digest}"));
        }
        self.say(format!("pushing artifact with digest: {digest}"))?;
        let missing =
            || BlobError::Missing { digest, place: "the content store (`soci create` makes it again)".into() };
        let bytes = self.session.artifact(digest)?.ok_or_else(missing)?;
        self.wait(self.repository.push_blob(digest, Bytes::from(bytes)))?;
        self.say(format!("successfully pushed artifact with digest: {digest}"))
    }

    fn say(&self, line: String) -> Result<(), BlobError> {
        self.console.line(&line).map_err(|source| BlobError::Read { what: "stdout".into(), source })
    }

    /// The image that the index is about: usually there. If it is not, and is in containerd, it goes up first.
    fn image(&self, subject: &Descriptor) -> Result<(), BlobError> {
        if self.wait(self.repository.has_manifest(subject.digest))? {
            return self.say(format!("skipped artifact with digest: {}", subject.digest));
        }
        let bytes = self.session.document(subject)?;
        let manifest: Manifest = blobs::json(&subject.digest.to_string(), &bytes)?;
        let blobs: Vec<&Descriptor> = std::iter::once(&manifest.config).chain(&manifest.layers).collect();
        parallel::each(self.uploads, &blobs, |blob| self.layer(blob))?;
        self.say(format!("pushing artifact with digest: {}", subject.digest))?;
        self.wait(self.repository.push_manifest(&subject.digest.to_string(), &subject.media_type, bytes.into()))?;
        self.say(format!("successfully pushed artifact with digest: {}", subject.digest))
    }

    fn layer(&self, blob: &Descriptor) -> Result<(), BlobError> {
        let digest = blob.digest;
        if self.wait(self.repository.has_blob(digest))? {
            return self.say(format!("skipped artifact with digest: {digest}"));
        }
        self.say(format!("pushing artifact with digest: {digest}"))?;
        let reader = self.session.open(blob)?;
        let mut reader = self.console.progress(digest.hex()[..12].to_owned(), blob.size, reader);
        let mut upload = self.wait(self.repository.upload())?;
        let mut buffer = vec![0; READ];
        loop {
            let read =
                reader.read(&mut buffer).map_err(|source| BlobError::Read { what: digest.to_string(), source })?;
            if read == 0 {
                break;
            }
            self.wait(upload.write(Bytes::copy_from_slice(&buffer[..read])))?;
        }
        self.wait(upload.finish(digest))?;
        self.say(format!("successfully pushed artifact with digest: {digest}"))
    }

    /// Lists the index among the referrers of its subject, where the registry has not done so.
    fn make_known(&self, chosen: &Chosen, manifest: &Manifest) -> Result<(), BlobError> {
        let Some(subject) = &manifest.subject else { return Ok(()) };
        make_known(|future| self.wait(future), &self.repository, subject.digest, chosen.index, chosen.size, manifest)
    }
}

/// See [`Repository::refer`]; asks first whether it is listed.
pub fn make_known(
    wait: impl Fn(futures::future::BoxFuture<'_, Result<(), RegistryError>>) -> Result<(), BlobError>,
    repository: &Repository,
    subject: Digest,
    index: Digest,
    size: u64,
    manifest: &Manifest,
) -> Result<(), BlobError> {
    let mut referrer = Descriptor::new(media_type::OCI_MANIFEST, index, size);
    referrer.artifact_type = manifest.config.media_type.clone();
    referrer.annotations = manifest.annotations.clone();
    wait(Box::pin(async move {
        let listed = repository.referrers(subject, &referrer.artifact_type).await?;
        if listed.iter().any(|known| known.digest == index) {
            return Ok(());
        }
        repository.refer(subject, &referrer).await
    }))
}
