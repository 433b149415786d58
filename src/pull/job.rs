//! One layer: a place for it, its bytes, its files; and what is tried when something of that goes wrong.

use super::{
    Contents, Depth, Ingest, Keep, Observer, Settings, UnpackFailure, Unpacker,
    download::{DownloadError, Downloads, Manner, Sink, Wanted, from_contents},
    flights::{Flights, Role},
    image::{Image, ImageLayer},
    parts::Crew,
    pipeline::{self, Passed, PipelineError, Through},
    shelf::{Draft, Inflating, Shelf},
};
use crate::{
    layout::SnapshotId,
    oci::{Digest, Reference},
    registry::{HostId, Registry},
    snapshot::{NotPulled, Place, Places, Pulled, chain},
    telemetry::catalog::say,
};
use bytes::Bytes;
use std::{os::fd::OwnedFd, sync::Arc, time::Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Most a pipe can hold without privilege: the unpacker may pause that long without anybody noticing.
const PIPE: usize = 1 << 20;

/// What all jobs share.
pub(super) struct Workshop {
    pub settings: Settings,
    pub registry: Registry,
    pub contents: Arc<dyn Contents>,
    pub unpacker: Arc<dyn Unpacker>,
    pub observer: Arc<dyn Observer>,
    pub downloads: Downloads,
    pub flights: Flights,
    pub shelf: Arc<Shelf>,
    pub crew: Crew,
    /// Layers at work at a time.
    pub benches: Arc<Semaphore>,
}

/// What a job is to bring.
#[derive(Clone)]
pub(super) struct Order {
    pub namespace: String,
    pub reference: Reference,
    pub manifest: Digest,
    pub image: Arc<Image>,
    /// Which of its layers.
    pub index: usize,
}

impl Order {
    pub fn layer(&self) -> &ImageLayer {
        &self.image.layers[self.index]
    }
}

/// One attempt, and where its bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Contents,
    Registry(Manner),
}

/// How an attempt is made.
struct Try<'a> {
    origin: Origin,
    /// Others may do some of the work: bring the bytes, inflate parts. Not again where the result was wrong.
    help: Help,
    /// Hosts that have served wrong bytes.
    avoid: &'a [HostId],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Help {
    Welcome,
    Unwanted,
}

/// Why an attempt failed, and whether another one may not.
struct Failed {
    why: NotPulled,
    again: Again,
    /// Who served what turned out wrong.
    hosts: Vec<HostId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Again {
    Yes,
    No,
}

/// Brings a layer, or says why not.
pub(super) async fn run(shop: &Workshop, places: &dyn Places, order: &Order) -> Result<Pulled, NotPulled> {
    let layer = order.layer();
    let digest = layer.blob.digest;
    // The image's own limit first: who waits for it must not keep a bench from another image.
    let _image = permit(&order.image.unpacks).await;
    let _bench = permit(&Some(shop.benches.clone())).await;
    let is_there = shop.contents.size(&order.namespace, digest).await == Some(layer.blob.size);
    let contents = is_there.then_some(Origin::Contents);
    let registry = [Manner::Ranges, Manner::Ranges, Manner::Plain].map(Origin::Registry);
    let (mut avoid, mut help) = (Vec::new(), Help::Welcome);
    let mut last = NotPulled::Abandoned;
    for origin in contents.into_iter().chain(registry) {
        let started = Instant::now();
        match attempt(shop, places, order, Try { origin, help, avoid: &avoid }).await {
            Ok(place) => {
                tracing::debug!(layer = %digest, size = layer.blob.size, ?origin, took = ?started.elapsed(), "layer unpacked");
                return Ok(Pulled { place: Arc::new(tokio::sync::Mutex::new(Some(place))) });
            }
            Err(failed) => {
                if failed.again == Again::No {
                    return Err(failed.why);
                }
                tracing::info!(layer = %digest, error = %failed.why, "pulling the layer again");
                avoid.extend(failed.hosts);
                help = Help::Unwanted;
                last = failed.why;
            }
        }
    }
    Err(last)
}

async fn permit(semaphore: &Option<Arc<Semaphore>>) -> Option<OwnedSemaphorePermit> {
    match semaphore {
        // Never closed.
        Some(semaphore) => semaphore.clone().acquire_owned().await.ok(),
        None => None,
    }
}

/// While it lives, something may be written for its place. Dropped before [`Unpacking::done`], that is stopped first.
struct Unpacking {
    place: Option<Box<dyn Place>>,
    id: SnapshotId,
    unpacker: Arc<dyn Unpacker>,
    observer: Arc<dyn Observer>,
}

impl Unpacking {
    fn done(mut self) -> Option<Box<dyn Place>> {
        self.place.take()
    }
}

impl Drop for Unpacking {
    fn drop(&mut self) {
        self.observer.ends(self.id);
        let Some(place) = self.place.take() else { return };
        let (unpacker, id) = (self.unpacker.clone(), self.id);
        // The directory is nobody's, and so swept, once nothing writes to it any more. Without a runtime the next start sweeps.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                unpacker.discard(id).await;
                drop(place);
            });
        }
    }
}

async fn attempt(shop: &Workshop, places: &dyn Places, order: &Order, how: Try<'_>) -> Result<Box<dyn Place>, Failed> {
    let layer = order.layer();
    let digest = layer.blob.digest;
    let trouble =
        |why: String, again| Failed { why: NotPulled::Resources { layer: digest, why }, again, hosts: Vec::new() };
    let place = places.reserve().await.map_err(|e| trouble(chain(&e), Again::No))?;
    let id = place.id();
    let unpacking =
        Unpacking { place: Some(place), id, unpacker: shop.unpacker.clone(), observer: shop.observer.clone() };
    shop.observer.begins(id);
    let (read, write) = pipe().map_err(|e| trouble(e.to_string(), Again::Yes))?;
    let budget = shop.unpacker.room();
    let inflating = match how.help {
        Help::Welcome => {
            let (shelf, size) = (shop.shelf.clone(), layer.blob.size);
            // Files are read, of a large layer some megabytes.
            tokio::task::spawn_blocking(move || shelf.inflating(&digest, size)).await.unwrap_or(Inflating::Alone)
        }
        Help::Unwanted => Inflating::Alone,
    };
    let through = match shop.settings.programs.of(&layer.blob.media_type) {
        Some(program) => Through::Program(program),
        None => Through::Inflate(inflating, &shop.crew),
    };
    let pipeline =
        pipeline::start(write, through, budget.bytes.saturating_mul(2)).map_err(|e| trouble(chain(&e), Again::Yes))?;
    let worker = tokio::spawn({
        let unpacker = shop.unpacker.clone();
        let depth = if order.index == 0 { Depth::Bottom } else { Depth::Above };
        async move { unpacker.unpack(id, read, depth, budget).await }
    });
    let worker = AbortOnDrop(worker);
    let mut feed = Feed { layer: digest, input: pipeline.input, ingest: ingest(shop, order, how.origin).await };
    let fetched = bring(shop, order, &how, &mut feed).await;
    let Feed { input, ingest, .. } = feed;
    drop(input);
    let passed = pipeline.result.await.unwrap_or(Err(PipelineError::Aborted));
    shop.observer.ends(id);
    let unpacked = worker.join().await;
    let hosts = match &fetched {
        Ok(hosts) => hosts.clone(),
        Err(_) => Vec::new(),
    };
    if let Ok(passed) = &passed {
        let (bytes, parts) = (passed.bytes, passed.parts);
        tracing::debug!(layer = %digest, bytes, parts, "layer inflated");
    }
    let draft = judge(layer, fetched, passed, unpacked).map_err(|(why, again)| Failed { why, again, hosts })?;
    if let Some(draft) = draft {
        shop.shelf.keep(draft);
    }
    if let Some(ingest) = ingest
        && let Err(error) = ingest.finish().await
    {
        say!(LayerNotKept, layer = %digest, error, "cannot keep the layer in containerd's content store");
    }
    unpacking.done().ok_or_else(|| trouble("the place is gone".into(), Again::No))
}

/// The task's result, or its end.
struct AbortOnDrop(tokio::task::JoinHandle<Result<(), UnpackFailure>>);

impl AbortOnDrop {
    async fn join(mut self) -> Result<(), UnpackFailure> {
        (&mut self.0).await.unwrap_or(Err(UnpackFailure::Trouble("the work ended early".into())))
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn pipe() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // A smaller one is slower, nothing else: users have a limit on all their pipes together.
    let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE);
    Ok((read, write))
}

async fn bring(shop: &Workshop, order: &Order, how: &Try<'_>, feed: &mut Feed) -> Result<Vec<HostId>, DownloadError> {
    let blob = &order.layer().blob;
    match how.origin {
        Origin::Contents => {
            from_contents(shop.contents.as_ref(), &order.namespace, blob.digest, blob.size, feed).await?;
            Ok(Vec::new())
        }
        Origin::Registry(manner) => {
            let repository = shop.registry.repository(&order.reference).map_err(DownloadError::Registry)?;
            let wanted = |range| Wanted {
                repository: &repository,
                digest: blob.digest,
                size: blob.size,
                range,
                limit: order.image.downloads.clone(),
                avoid: how.avoid.to_vec(),
            };
            let whole = wanted(0..blob.size);
            if how.help == Help::Unwanted {
                return shop.downloads.fetch(&whole, manner, feed).await;
            }
            match shop.flights.join(blob.digest, feed) {
                Role::Leader(mut lead) => shop.downloads.fetch(&whole, manner, &mut lead).await,
                Role::Follower(follow, feed) => {
                    let mut hosts = match follow.from {
                        0 => Vec::new(),
                        from => shop.downloads.fetch(&wanted(0..from), manner, feed).await?,
                    };
                    let end = follow.pass(feed).await.ok_or(DownloadError::NotWanted)?;
                    if end < blob.size {
                        hosts.extend(shop.downloads.fetch(&wanted(end..blob.size), manner, feed).await?);
                    }
                    Ok(hosts)
                }
            }
        }
    }
}

async fn ingest(shop: &Workshop, order: &Order, origin: Origin) -> Option<Box<dyn Ingest>> {
    if shop.settings.keep == Keep::Nowhere || origin == Origin::Contents {
        return None;
    }
    let (blob, image) = (&order.layer().blob, &order.reference);
    match shop.contents.ingest(&order.namespace, image, order.manifest, blob).await {
        Ok(ingest) => Some(ingest),
        Err(error) => {
            say!(LayerNotKept, layer = %blob.digest, error, "cannot keep the layer in containerd's content store");
            None
        }
    }
}

/// Where the bytes go.
struct Feed {
    layer: Digest,
    input: mpsc::Sender<Bytes>,
    ingest: Option<Box<dyn Ingest>>,
}

impl Sink for Feed {
    async fn put(&mut self, bytes: Bytes) -> bool {
        if let Some(ingest) = &mut self.ingest
            && let Err(error) = ingest.put(bytes.clone()).await
        {
            say!(LayerNotKept, layer = %self.layer, error, "cannot keep the layer in containerd's content store");
            self.ingest = None;
        }
        self.input.send(bytes).await.is_ok()
    }
}

/// What became of an attempt; where inflating may begin the next time. What the bytes are comes before what became of them.
fn judge(
    layer: &ImageLayer,
    fetched: Result<Vec<HostId>, DownloadError>,
    passed: Result<Passed, PipelineError>,
    unpacked: Result<(), UnpackFailure>,
) -> Result<Option<Draft>, (NotPulled, Again)> {
    let digest = layer.blob.digest;
    let unpack = |why: String| NotPulled::Unpack { layer: digest, why };
    match fetched {
        Ok(_) | Err(DownloadError::NotWanted) => {}
        Err(error) => return Err((NotPulled::Fetch { layer: digest, why: error.to_string() }, Again::Yes)),
    }
    let passed = passed.map_err(|error| match &error {
        // Wrong bytes look like this too.
        PipelineError::Stream(_) | PipelineError::Program { .. } | PipelineError::TooLarge { .. } => {
            (unpack(chain(&error)), Again::Yes)
        }
        PipelineError::Start { .. } | PipelineError::Thread(_) | PipelineError::Aborted => {
            (NotPulled::Resources { layer: digest, why: chain(&error) }, Again::Yes)
        }
    })?;
    if passed.compressed != digest {
        return Err((NotPulled::Compressed { layer: digest, actual: passed.compressed }, Again::Yes));
    }
    if passed.uncompressed != layer.diff_id {
        let (expected, actual) = (layer.diff_id, passed.uncompressed);
        // What helpers have made is thrown away where it is seen to be wrong, and everything where it was not seen.
        let again = if passed.parts > 0 { Again::Yes } else { Again::No };
        return Err((NotPulled::Uncompressed { layer: digest, expected, actual }, again));
    }
    match unpacked {
        // With parts that can be guessed every time nothing needs to be written down.
        Ok(()) => Ok(passed.draft.filter(|_| passed.parts == 0)),
        Err(UnpackFailure::Tar(why)) => Err((unpack(why), Again::No)),
        Err(UnpackFailure::Trouble(why)) => Err((unpack(why), Again::Yes)),
    }
}
