//! A layer's bytes, in order, from wherever they are.
//!
//! ```text
//!   containerd's content store ─────────────────────────────────────────────────┐
//!   registry, ranges:   [piece 0][piece 1][piece 2]…   several at a time ─ in order ┼─▶ sink
//!   registry, stream:   one plain request  ─────────────────────────────────────┘
//! ```
//! A registry that mishandles ranges (200, another range than asked for, 416, 403) is asked with one plain request from then on, for
//! [`REMEMBERED`].
//!
//! Memory: pieces that have arrived before their turn are counted against one budget of the node ([`AHEAD_BYTES`]); the piece whose turn
//! it is needs none, so every download always goes on.

use super::Contents;
use crate::{
    oci::Digest,
    registry::{Class, HostId, RangeBody, RegistryError, Repository, Slot, Throttle},
};
use bytes::Bytes;
use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
};

/// Bytes that have arrived before their turn, all layers together: ten times what a link of 1 Gbit/s and 20 ms
/// holds. More would only be weight while the disk is slower than the registry.
const AHEAD_BYTES: usize = 24 << 20;
/// Pieces of one layer in flight or waiting for their turn.
const AHEAD_PIECES: usize = 8;
/// Without the operator's word a layer is cut into pieces of a quarter of it, within these bounds: so that a small one has several
/// connections as well, and a request's round trip is small beside its body.
const PIECE_MIN: u64 = 1 << 20;
/// See [`PIECE_MIN`]. Also the most the operator can ask for: pieces wait in memory.
const PIECE_MAX: u64 = 4 << 20;
/// What the operator's own size may be.
const PIECE_LIMIT: u64 = 16 << 20;
/// How long a registry that mishandles ranges is asked without.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// How often in a row a body that breaks off without a byte is asked for again. The requests themselves are retried below this.
const RESUMES: u32 = 8;
/// What is read of containerd's content store at a time.
const LOCAL_PIECE: u64 = 1 << 20;

/// Why a layer's bytes did not come.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DownloadError {
    #[error("{0}")]
    Registry(RegistryError),
    #[error("containerd's content store: {0}")]
    Contents(String),
    /// What takes the bytes has ended; it says why.
    #[error("nobody takes the bytes")]
    NotWanted,
    /// The runtime is ending.
    #[error("the download was given up")]
    Aborted,
}

/// What all downloads share.
pub struct Downloads {
    throttle: Throttle,
    memory: Arc<Semaphore>,
    /// Bytes of a piece, if the operator chose.
    piece: Option<u64>,
    /// Image hosts that mishandle ranges, and since when.
    rangeless: Mutex<HashMap<String, Instant>>,
}

/// Takes the bytes of a layer in order.
pub trait Sink: Send {
    /// False when no more are wanted.
    fn put(&mut self, bytes: Bytes) -> impl Future<Output = bool> + Send;
}

impl<S: Sink> Sink for &mut S {
    fn put(&mut self, bytes: Bytes) -> impl Future<Output = bool> + Send {
        (**self).put(bytes)
    }
}

/// One layer to be downloaded.
pub struct Wanted<'a> {
    pub repository: &'a Repository,
    pub digest: Digest,
    /// Of the whole blob.
    pub size: u64,
    /// What of it is wanted.
    pub range: Range<u64>,
    /// The operator's limit for one image.
    pub limit: Option<Arc<Semaphore>>,
    /// Hosts that have served wrong bytes.
    pub avoid: Vec<HostId>,
}

/// How to ask the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// In ranges, unless the registry is known to mishandle them.
    Ranges,
    /// With one plain request.
    Plain,
}

impl Downloads {
    pub fn new(throttle: Throttle, piece: Option<u64>) -> Downloads {
        let memory = Arc::new(Semaphore::new(AHEAD_BYTES >> 10));
        Downloads { throttle, memory, piece: piece.map(|p| p.clamp(1, PIECE_LIMIT)), rangeless: Mutex::default() }
    }

    /// Brings what is wanted of the layer to `sink`; the hosts that served it.
    pub async fn fetch(
        &self,
        wanted: &Wanted<'_>,
        manner: Manner,
        sink: &mut impl Sink,
    ) -> Result<Vec<HostId>, DownloadError> {
        let host = wanted.repository.reference().host.clone();
        let mut delivered = wanted.range.start;
        let error = match manner {
            Manner::Ranges if !self.is_rangeless(&host) => match self.ranges(wanted, &mut delivered, sink).await {
                Err(DownloadError::Registry(error)) if is_about_ranges(&error) => Some(error),
                other => return other,
            },
            Manner::Ranges | Manner::Plain => None,
        };
        let hosts = self.plain(wanted, delivered, sink).await?;
        if let Some(error) = error {
            tracing::info!(
                host,
                %error,
                "the registry does not serve ranges of blobs as it should; for an hour layers are fetched with one request each"
            );
            self.rangeless.lock().unwrap_or_else(PoisonError::into_inner).insert(host, Instant::now());
        }
        Ok(hosts)
    }

    fn is_rangeless(&self, host: &str) -> bool {
        let mut hosts = self.rangeless.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|_, since| since.elapsed() < REMEMBERED);
        hosts.contains_key(host)
    }

    fn piece_bytes(&self, size: u64) -> u64 {
        self.piece.unwrap_or_else(|| (size / 4).clamp(PIECE_MIN, PIECE_MAX))
    }

    async fn ranges(
        &self,
        wanted: &Wanted<'_>,
        delivered: &mut u64,
        sink: &mut impl Sink,
    ) -> Result<Vec<HostId>, DownloadError> {
        let step = self.piece_bytes(wanted.size);
        let mut hosts = Vec::new();
        let mut queue: VecDeque<Piece> = VecDeque::new();
        let mut next = wanted.range.start;
        loop {
            self.ahead(wanted, step, &mut next, &mut queue);
            let Some(piece) = queue.front_mut() else { return Ok(hosts) };
            match piece.chunks.recv().await {
                Some(Ok(Chunk::Bytes(bytes))) => {
                    let length = bytes.len() as u64;
                    if !sink.put(bytes).await {
                        return Err(DownloadError::NotWanted);
                    }
                    *delivered += length;
                }
                Some(Ok(Chunk::From(host))) => {
                    if !hosts.contains(&host) {
                        hosts.push(host);
                    }
                }
                Some(Err(error)) => return Err(error),
                None if *delivered == piece.end => {
                    queue.pop_front();
                }
                None => return Err(DownloadError::Aborted),
            }
        }
    }

    /// Starts as many pieces as there is memory for, and always the one whose turn it is.
    fn ahead(&self, wanted: &Wanted<'_>, step: u64, next: &mut u64, queue: &mut VecDeque<Piece>) {
        while *next < wanted.range.end && queue.len() < AHEAD_PIECES {
            let range = *next..(*next + step).min(wanted.range.end);
            let kibibytes = (range.end - range.start).div_ceil(1024) as u32;
            let memory = match self.memory.clone().try_acquire_many_owned(kibibytes) {
                Ok(memory) => Some(memory),
                Err(_) if queue.is_empty() => None,
                Err(_) => return,
            };
            *next = range.end;
            queue.push_back(self.start(wanted, range, memory));
        }
    }

    fn start(&self, wanted: &Wanted<'_>, range: Range<u64>, memory: Option<OwnedSemaphorePermit>) -> Piece {
        // Bounded by what a piece is; it was counted before.
        let (sender, chunks) = mpsc::unbounded_channel();
        let work = Work {
            repository: wanted.repository.clone(),
            digest: wanted.digest,
            throttle: self.throttle.clone(),
            limit: wanted.limit.clone(),
            avoid: wanted.avoid.clone(),
        };
        let end = range.end;
        let task = tokio::spawn(async move {
            if let Err(error) = work.fetch(range, &sender).await {
                let _ = sender.send(Err(error));
            }
        });
        Piece { end, chunks, task, _memory: memory }
    }

    /// One plain request, again from the start where it breaks off. The first `skip` bytes are not wanted any more.
    async fn plain(&self, wanted: &Wanted<'_>, skip: u64, sink: &mut impl Sink) -> Result<Vec<HostId>, DownloadError> {
        let _slot = slot(&self.throttle, &wanted.limit).await;
        let (mut delivered, mut failures) = (skip, 0);
        loop {
            let opened = wanted.repository.blob_stream(wanted.digest, wanted.size, &wanted.avoid).await;
            let mut body = opened.map_err(DownloadError::Registry)?;
            let before = delivered;
            let mut at = 0;
            let broken = loop {
                match body.chunk().await {
                    Ok(None) => return Ok(vec![body.host()]),
                    Ok(Some(mut chunk)) => {
                        let length = chunk.len() as u64;
                        self.throttle.give_way().await;
                        self.throttle.arrived(length);
                        at += length;
                        if at <= delivered {
                            continue;
                        }
                        let new = at - delivered;
                        let known = length - new;
                        // Less than the chunk's length.
                        let mut chunk = chunk.split_off(known as usize);
                        chunk.truncate(
                            usize::try_from(wanted.range.end.saturating_sub(delivered)).unwrap_or(usize::MAX),
                        );
                        if !sink.put(chunk).await {
                            return Err(DownloadError::NotWanted);
                        }
                        delivered = at;
                        // Of a whole blob the end is still to come: whether there is more than there should be.
                        if delivered >= wanted.range.end && wanted.range.end < wanted.size {
                            return Ok(vec![body.host()]);
                        }
                    }
                    Err(error) => break error,
                }
            };
            failures = if delivered > before { 0 } else { failures + 1 };
            if failures > RESUMES || !is_worth_it(&broken) {
                return Err(DownloadError::Registry(broken));
            }
            tracing::debug!(error = %broken, "fetching the layer again");
            tokio::time::sleep(Duration::from_millis(50) * (failures + 1)).await;
        }
    }
}

/// The layer's bytes from containerd's content store.
pub async fn from_contents(
    contents: &dyn Contents,
    namespace: &str,
    digest: Digest,
    size: u64,
    sink: &mut impl Sink,
) -> Result<(), DownloadError> {
    let mut at = 0;
    while at < size {
        let end = (at + LOCAL_PIECE).min(size);
        let bytes = contents.read(namespace, digest, at..end).await.map_err(DownloadError::Contents)?;
        if !sink.put(bytes).await {
            return Err(DownloadError::NotWanted);
        }
        at = end;
    }
    Ok(())
}

/// A piece of a layer on its way.
struct Piece {
    end: u64,
    chunks: mpsc::UnboundedReceiver<Result<Chunk, DownloadError>>,
    task: JoinHandle<()>,
    /// Given back when the piece has had its turn.
    _memory: Option<OwnedSemaphorePermit>,
}

enum Chunk {
    From(HostId),
    Bytes(Bytes),
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Fetches one piece.
struct Work {
    repository: Repository,
    digest: Digest,
    throttle: Throttle,
    limit: Option<Arc<Semaphore>>,
    avoid: Vec<HostId>,
}

/// The right to send a request: first the image's, then the node's.
async fn slot(throttle: &Throttle, limit: &Option<Arc<Semaphore>>) -> (Option<OwnedSemaphorePermit>, Slot) {
    let image = match limit {
        // Never closed.
        Some(limit) => limit.clone().acquire_owned().await.ok(),
        None => None,
    };
    (image, throttle.slot().await)
}

impl Work {
    async fn fetch(
        &self,
        range: Range<u64>,
        out: &mpsc::UnboundedSender<Result<Chunk, DownloadError>>,
    ) -> Result<(), DownloadError> {
        let _slot = slot(&self.throttle, &self.limit).await;
        let (mut at, mut failures) = (range.start, 0);
        loop {
            let opened = self.repository.blob_range(self.digest, at..range.end, &self.avoid).await;
            let body = opened.map_err(DownloadError::Registry)?;
            // Who serves it is known before its bytes are used.
            let _ = out.send(Ok(Chunk::From(body.host())));
            let before = at;
            let Err(error) = self.pass(body, &mut at, out).await else { return Ok(()) };
            failures = if at > before { 0 } else { failures + 1 };
            if failures > RESUMES || !is_worth_it(&error) {
                return Err(DownloadError::Registry(error));
            }
            tracing::debug!(%error, "fetching the rest of a piece");
            tokio::time::sleep(Duration::from_millis(50) * (failures + 1)).await;
        }
    }

    async fn pass(
        &self,
        mut body: RangeBody,
        at: &mut u64,
        out: &mpsc::UnboundedSender<Result<Chunk, DownloadError>>,
    ) -> Result<(), RegistryError> {
        while let Some(bytes) = body.chunk().await? {
            self.throttle.give_way().await;
            self.throttle.arrived(bytes.len() as u64);
            *at += bytes.len() as u64;
            if out.send(Ok(Chunk::Bytes(bytes))).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Whether a plain request may succeed where a request for a range got this answer.
fn is_about_ranges(error: &RegistryError) -> bool {
    match error {
        RegistryError::RangesUnsupported { .. }
        | RegistryError::Malformed { .. }
        | RegistryError::Refused { .. }
        | RegistryError::Unauthorized { .. } => true,
        RegistryError::Unavailable { .. }
        | RegistryError::NotFound { .. }
        | RegistryError::DigestMismatch { .. }
        | RegistryError::TooLarge { .. }
        | RegistryError::Untrusted { .. }
        | RegistryError::Setup { .. } => false,
    }
}

/// Whether a body that broke off with this is worth another request.
fn is_worth_it(error: &RegistryError) -> bool {
    matches!(error.class(), Class::Retry(_) | Class::Permanent)
}
