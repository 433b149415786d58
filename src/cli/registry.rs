//! `soci create --registry` and `soci convert --registry`: from registry to registry, without containerd and without disk.
//!
//! ```text
//!   source ══ layer, once ══▶ builder ──▶ zTOC ──▶ destination
//!                  ╚═══════════════════════════▶ destination, if it does not have the layer
//! ```
//!
//! A layer that the destination has (or can mount from another of its repositories) is only read to be indexed; one that was indexed
//! before, with the same span size, is not even read. Memory is that of the layers being indexed (`--max-memory`); nothing is
//! written anywhere else. Run again, what arrived is not sent again, and the result is the same.

use super::{
    access,
    args::{self, Global},
    blobs::{self, BlobError, Blobs, New, Sink, checked},
    convert, create,
    indexing::{self, IndexingError, Places, Plan, Version, report, rewrite, source},
    interrupt::Stopped,
    layout::MAX_DOCUMENT,
    output::Console,
    parallel, push,
    remote::Remote,
    store::soci_index,
};
use crate::{
    oci::{Descriptor, Digest, Index, InvalidReference, Manifest, Reference, annotation, media_type},
    registry::{Class, Pushed, RangeBody, RegistryError, Repository, Upload},
};
use bytes::Bytes;
use futures::{Stream, stream};
use std::{
    collections::{HashMap, HashSet},
    io::{self, Read, Write},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::mpsc, task::JoinHandle};

/// Layers on their way at a time, at least: one alone does not fill a link.
const TRANSFERS: usize = 4;
/// Pieces of a layer that wait to be sent on, while the builder has them already. A piece is what came at once: some 100 KB.
const BEHIND: usize = 16;
/// How often a transfer is taken up again where it broke off, without a byte in between.
const RESUMES: u32 = 8;
/// Largest zTOC that is used again: what the reader of zTOCs accepts.
const MAX_ZTOC: u64 = 1 << 30;

/// Why it did not get there.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    #[error("image {image}")]
    Source { image: String, source: Box<BlobError> },
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Access(#[from] access::AccessError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Indexing(#[from] IndexingError),
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// A transfer that could not be completed.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("cannot download it")]
    Download(#[source] RegistryError),
    #[error("cannot upload it")]
    Upload(#[source] RegistryError),
    #[error("the upload was given up")]
    GivenUp,
}

/// Source and destination.
struct Transfer<'a> {
    remote: Remote,
    source: Repository,
    target: Repository,
    console: &'a Console,
    /// Blobs that are in the destination.
    present: Mutex<HashSet<Digest>>,
    /// zTOCs that the destination has, by layer and span size.
    known: HashMap<(Digest, u64), Descriptor>,
    /// Held by each upload that is under way.
    under_way: Arc<()>,
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        // Uploads that nobody feeds any more are being cancelled: the registry is not to keep half a layer for a week.
        let under_way = &self.under_way;
        let _ = self.remote.wait_briefly(async {
            while Arc::strong_count(under_way) > 1 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
}

/// What is on its way to the destination.
enum Piece {
    Bytes(Bytes),
    End,
}

impl Transfer<'_> {
    fn wait<T>(&self, future: impl Future<Output = Result<T, RegistryError>>) -> Result<T, BlobError> {
        Ok(self.remote.wait(future)??)
    }

    fn is_one_repository(&self) -> bool {
        let (a, b) = (self.source.reference(), self.target.reference());
        (&a.host, &a.repository) == (&b.host, &b.repository)
    }

    fn present(&self, digest: Digest) -> bool {
        self.present.lock().unwrap_or_else(PoisonError::into_inner).contains(&digest)
    }

    fn note(&self, digest: Digest) {
        self.present.lock().unwrap_or_else(PoisonError::into_inner).insert(digest);
    }

    /// Whether the destination has the blob, or could take it over from the source within the registry.
    fn arrived(&self, digest: Digest) -> Result<bool, BlobError> {
        if self.is_one_repository() || self.present(digest) {
            return Ok(true);
        }
        let mut there = self.wait(self.target.has_blob(digest))?;
        if !there && self.source.reference().host == self.target.reference().host {
            there = self.wait(self.target.mount(digest, &self.source.reference().repository))?;
        }
        if there {
            self.note(digest);
        }
        Ok(there)
    }

    /// Sees to it that the destination has a blob.
    fn bring(&self, blob: &Descriptor) -> Result<(), BlobError> {
        if self.arrived(blob.digest)? {
            return Ok(());
        }
        let reader = self.open(blob)?;
        let mut reader = self.console.progress(blob.digest.hex()[..12].to_owned(), blob.size, reader);
        let copied = io::copy(&mut reader, &mut io::sink());
        super::interrupt::check()?;
        copied.map_err(|source| BlobError::Read { what: format!("blob {}", blob.digest), source })?;
        self.note(blob.digest);
        Ok(())
    }

    /// Sees to it that the destination has what a manifest refers to. What vendors keep stays with them.
    fn bring_all(&self, manifest: &Manifest) -> Result<(), BlobError> {
        let ours = |blob: &&Descriptor| !indexing::select::is_foreign(&blob.media_type);
        let blobs: Vec<&Descriptor> = std::iter::once(&manifest.config).chain(&manifest.layers).filter(ours).collect();
        parallel::each(TRANSFERS, &blobs, |blob| self.bring(blob))
    }

    /// Sees to it that the destination has a manifest or list of the source, as it is.
    fn bring_tree(&self, entry: &Descriptor, depth: usize) -> Result<(), BlobError> {
        if self.is_one_repository() || depth > 4 || self.wait(self.target.has_manifest(entry.digest))? {
            return Ok(());
        }
        let bytes = match self.document(entry) {
            Err(error) if error.is_missing() => {
                self.console.warn(format!(
                    "{} is named by the image, but {} does not have it",
                    entry.digest,
                    self.place()
                ));
                return Ok(());
            }
            other => other?,
        };
        if media_type::is_index(&entry.media_type) {
            let index: Index = blobs::json(&entry.digest.to_string(), &bytes)?;
            index.manifests.iter().try_for_each(|entry| self.bring_tree(entry, depth + 1))?;
        } else {
            self.bring_all(&blobs::json(&entry.digest.to_string(), &bytes)?)?;
        }
        self.wait(self.target.push_manifest(&entry.digest.to_string(), &entry.media_type, bytes.into()))?;
        Ok(())
    }

    /// Puts a manifest under its digest, unless it is there.
    fn put_manifest(&self, media_type: &str, bytes: Vec<u8>) -> Result<Pushed, BlobError> {
        let digest = Digest::of(&bytes);
        if self.wait(self.target.has_manifest(digest))? {
            return Ok(Pushed::Stored);
        }
        self.wait(self.target.push_manifest(&digest.to_string(), media_type, bytes.into()))
    }

    /// Notes the zTOCs that SOCI indexes of the destination list.
    fn learn(&mut self, indexes: &[Digest]) {
        for digest in indexes {
            // Whatever is wrong with them, they are only used to save work.
            let Ok(fetched) = self.wait(self.target.manifest(&digest.to_string())) else { continue };
            let Some(index) = soci_index(&fetched.bytes) else { continue };
            for blob in index.layers.into_iter().filter(|blob| blob.media_type == media_type::ZTOC) {
                let annotation = |key: &str| blob.annotations.get(key);
                let layer = annotation(annotation::LAYER_DIGEST).and_then(|d| d.parse().ok());
                let span_size = annotation(annotation::SPAN_SIZE).and_then(|n| n.parse().ok());
                if let (Some(layer), Some(span_size)) = (layer, span_size) {
                    self.known.insert((layer, span_size), blob);
                }
            }
        }
    }
}

impl Blobs for Transfer<'_> {
    fn place(&self) -> String {
        self.source.reference().locator()
    }

    fn has(&self, _: Digest) -> Result<bool, BlobError> {
        // Asking for each would take as long as getting it; whoever needs it finds out.
        Ok(true)
    }

    fn has_layer(&self, digest: Digest) -> Result<bool, BlobError> {
        self.wait(self.source.has_blob(digest))
    }

    fn check(&self, _: &Descriptor) -> Result<(), BlobError> {
        Ok(())
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, BlobError> {
        let digest = descriptor.digest;
        if descriptor.size > MAX_DOCUMENT {
            return Err(BlobError::TooLarge { what: digest.to_string(), size: descriptor.size });
        }
        let is_manifest =
            media_type::is_manifest(&descriptor.media_type) || media_type::is_index(&descriptor.media_type);
        let fetched = match is_manifest {
            true => self.wait(self.source.manifest(&digest.to_string())).map(|fetched| fetched.bytes),
            false => self.wait(self.source.blob(digest, MAX_DOCUMENT)),
        };
        match fetched {
            Err(BlobError::Registry(RegistryError::NotFound { .. })) => {
                Err(BlobError::Missing { digest, place: self.place() })
            }
            other => checked(descriptor, other?),
        }
    }

    fn open(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, BlobError> {
        let down = download(self.source.clone(), descriptor);
        if self.arrived(descriptor.digest)? {
            return Ok(Box::new(self.remote.reader(down)));
        }
        let upload = self.wait(self.target.upload())?;
        let (send, receive) = mpsc::channel(BEHIND);
        let (digest, under_way) = (descriptor.digest, self.under_way.clone());
        let task = self.remote.spawn(async move {
            let _under_way = under_way;
            forward(upload, receive, digest).await
        });
        Ok(Box::new(self.remote.reader(both(down, send, task))))
    }
}

impl Sink for Transfer<'_> {
    fn put(&self, new: New<'_>) -> Result<(Digest, u64), BlobError> {
        let bytes = new.bytes();
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        match new {
            New::Blob(_) | New::MadeUp(_) => {
                self.wait(self.target.push_blob(digest, bytes.into()))?;
                self.note(digest);
            }
            New::SociIndex(manifest) => {
                let pushed = self.put_manifest(media_type::OCI_MANIFEST, bytes)?;
                if let (Some(subject), Pushed::Stored) = (&manifest.subject, pushed) {
                    push::make_known(|future| self.wait(future), &self.target, subject.digest, digest, size, manifest)?;
                }
            }
            New::Manifest(manifest) => {
                self.bring_all(manifest)?;
                self.put_manifest(media_type::OCI_MANIFEST, bytes)?;
            }
            New::List(index) => {
                index.manifests.iter().try_for_each(|entry| self.bring_tree(entry, 0))?;
                self.put_manifest(media_type::OCI_INDEX, bytes)?;
            }
        }
        Ok((digest, size))
    }

    fn known_ztoc(&self, layer: &Descriptor, span_size: u64) -> Result<Option<Vec<u8>>, BlobError> {
        let Some(blob) = self.known.get(&(layer.digest, span_size)) else { return Ok(None) };
        // Only when there is nothing else to read the layer for.
        if !self.arrived(layer.digest)? {
            return Ok(None);
        }
        Ok(self.wait(self.target.blob(blob.digest, blob.size.min(MAX_ZTOC))).ok().map(Into::into))
    }
}

/// The bytes of a blob, taken up again where they break off.
fn download(repository: Repository, blob: &Descriptor) -> impl Stream<Item = Result<Bytes, Broken>> + Send + use<> {
    struct State {
        repository: Repository,
        digest: Digest,
        at: u64,
        size: u64,
        body: Option<RangeBody>,
        failures: u32,
    }
    let state = State { repository, digest: blob.digest, at: 0, size: blob.size, body: None, failures: 0 };
    stream::try_unfold(state, |mut state| async move {
        loop {
            if state.at == state.size {
                return Ok(None);
            }
            let next = match &mut state.body {
                None => match state.repository.blob_range(state.digest, state.at..state.size, &[]).await {
                    Ok(body) => {
                        state.body = Some(body);
                        continue;
                    }
                    // The requests below are retried themselves.
                    Err(error) => return Err(Broken::Download(error)),
                },
                Some(body) => body.chunk().await,
            };
            match next {
                Ok(Some(chunk)) => {
                    state.at += chunk.len() as u64;
                    state.failures = 0;
                    return Ok(Some((chunk, state)));
                }
                // The body gives exactly what was asked for, so there is none only when all came.
                Ok(None) => return Ok(None),
                Err(error) => {
                    state.failures += 1;
                    state.body = None;
                    let Class::Retry(wait) = error.class() else { return Err(Broken::Download(error)) };
                    if state.failures > RESUMES {
                        return Err(Broken::Download(error));
                    }
                    tokio::time::sleep(wait.max(Duration::from_millis(100) * state.failures)).await;
                }
            }
        }
    })
}

/// What is downloaded, also sent on. It ends when the destination has all of it.
fn both(
    down: impl Stream<Item = Result<Bytes, Broken>> + Send + 'static,
    send: mpsc::Sender<Piece>,
    task: JoinHandle<Result<(), RegistryError>>,
) -> impl Stream<Item = Result<Bytes, Broken>> + Send {
    struct Both<S> {
        down: std::pin::Pin<Box<S>>,
        send: mpsc::Sender<Piece>,
        task: JoinHandle<Result<(), RegistryError>>,
    }
    async fn end(task: JoinHandle<Result<(), RegistryError>>) -> Result<(), Broken> {
        task.await.map_err(|_| Broken::GivenUp)?.map_err(Broken::Upload)
    }
    stream::try_unfold(Some(Both { down: Box::pin(down), send, task }), |state| async move {
        let Some(mut state) = state else { return Ok(None) };
        match futures::StreamExt::next(&mut state.down).await.transpose()? {
            Some(chunk) => match state.send.send(Piece::Bytes(chunk.clone())).await {
                Ok(()) => Ok(Some((chunk, Some(state)))),
                // The upload has ended early, and says why.
                Err(_) => end(state.task).await.and(Err(Broken::GivenUp)),
            },
            None => {
                let _ = state.send.send(Piece::End).await;
                end(state.task).await.map(|()| None)
            }
        }
    })
}

async fn forward(mut upload: Upload, mut pieces: mpsc::Receiver<Piece>, digest: Digest) -> Result<(), RegistryError> {
    while let Some(piece) = pieces.recv().await {
        match piece {
            Piece::Bytes(bytes) => upload.write(bytes).await?,
            Piece::End => return upload.finish(digest).await,
        }
    }
    // Whoever reads the layer has given up.
    upload.cancel().await;
    Ok(())
}

/// Where both are, and what the source's name stands for there.
fn open<'a>(
    access: &args::Access,
    (source, destination): (&Reference, &Reference),
    global: &Global,
    console: &'a Console,
) -> Result<(Transfer<'a>, Descriptor), RemoteError> {
    let remote = Remote::new().map_err(RemoteError::Runtime)?;
    let registry = access::registry(access, &[source, destination], global)?;
    let (source, target) = (registry.repository(source)?, registry.repository(destination)?);
    let named = resolve(&remote, &source)?;
    let (present, known, under_way) = (Mutex::default(), HashMap::new(), Arc::default());
    Ok((Transfer { remote, source, target, console, present, known, under_way }, named))
}

/// What a reference names, and where.
fn resolve(remote: &Remote, repository: &Repository) -> Result<Descriptor, RemoteError> {
    let reference = repository.reference();
    // A familiar name has the one or the other.
    let target = reference.digest.map(|digest| digest.to_string()).or(reference.tag.clone()).unwrap_or_default();
    let failed =
        |error: RegistryError| RemoteError::Source { image: reference.to_string(), source: Box::new(error.into()) };
    let fetched = remote.wait(repository.manifest(&target))?.map_err(failed)?;
    let mut descriptor = Descriptor::new(&fetched.media_type, fetched.digest, fetched.bytes.len() as u64);
    if !media_type::is_manifest(&descriptor.media_type) && !media_type::is_index(&descriptor.media_type) {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Shape {
            #[serde(default)]
            media_type: String,
        }
        // Some registries do not say what they have; the document may.
        if let Ok(shape) = serde_json::from_slice::<Shape>(&fetched.bytes) {
            descriptor.media_type = shape.media_type;
        }
    }
    Ok(descriptor)
}

fn workers() -> usize {
    indexing::processors().max(TRANSFERS)
}

/// `soci create --registry`.
pub fn create(
    args: &args::Create,
    plan: &Plan,
    name: &str,
    global: &Global,
    console: &Console,
) -> Result<(), RemoteError> {
    let reference = Reference::familiar(name)?;
    let (mut transfer, target) = open(&args.access, (&reference, &reference), global, console)?;
    let image = source::of_target(&transfer, &target)?;
    let mut indexed = create::select(plan, &image)?;
    if plan.reuse == indexing::Reuse::Allowed {
        let mut indexes = Vec::new();
        for platform in &indexed {
            let manifest = image.base.manifests[platform.place].digest;
            let listed = transfer.wait(transfer.target.referrers(manifest, media_type::SOCI_INDEX_V1))?;
            indexes.extend(listed.iter().map(|index| index.digest));
        }
        transfer.learn(&indexes);
    }
    let places = Places { image: name, blobs: &transfer, sink: &transfer, console, workers: workers() };
    indexing::build_layers(plan, places, &mut indexed)?;
    for at in 0..indexed.len() {
        let manifest = &image.base.manifests[indexed[at].place];
        indexing::add_index(plan, places, &mut indexed[at], Version::V1, Some(manifest))?;
        if indexed[at].index.is_none() {
            return Err(IndexingError::EmptyIndex(indexing::why_empty(plan, &indexed[at..=at])).into());
        }
    }
    create::print(&args.indexing, &indexed, || report::created(&target, &indexed, &image, console))
        .map_err(RemoteError::Output)
}

/// `soci convert --registry`.
pub fn convert(
    args: &args::Convert,
    plan: &Plan,
    source: &str,
    destination: &Reference,
    global: &Global,
    console: &Console,
) -> Result<(), RemoteError> {
    let reference = Reference::familiar(source)?;
    let (mut transfer, target) = open(&args.access, (&reference, destination), global, console)?;
    let image = source::of_target(&transfer, &target)?;
    let mut indexed = convert::select(plan, &image)?;
    let tag = destination.tag.clone().unwrap_or_default();
    let before = match transfer.wait(transfer.target.manifest(&tag)) {
        Ok(fetched) => Some(fetched),
        Err(BlobError::Registry(RegistryError::NotFound { .. })) => None,
        Err(error) => return Err(error.into()),
    };
    if plan.reuse == indexing::Reuse::Allowed
        && let Some(before) = &before
        && let Ok(index) = serde_json::from_slice::<Index>(&before.bytes)
    {
        let indexes = index.manifests.iter().filter(|entry| entry.artifact_type == media_type::SOCI_INDEX_V2);
        transfer.learn(&indexes.map(|entry| entry.digest).collect::<Vec<_>>());
    }
    let places = Places { image: source, blobs: &transfer, sink: &transfer, console, workers: workers() };
    convert::index(plan, places, &mut indexed)?;
    let result = rewrite::rewrite(&image, &indexed, &transfer)?;
    if before.is_none_or(|before| before.digest != result.target.digest) {
        let bytes = result.index.to_canonical_json();
        transfer.wait(transfer.target.push_manifest(&tag, media_type::OCI_INDEX, bytes.into()))?;
    }
    if args.indexing.quiet && !args.indexing.json {
        return writeln!(io::stdout().lock(), "{}", result.target.digest).map_err(RemoteError::Output);
    }
    let output = report::Output::Image { reference: destination.to_string() };
    create::print(&args.indexing, &[], || report::converted(&result, &indexed, &image, output, console))
        .map_err(RemoteError::Output)
}
