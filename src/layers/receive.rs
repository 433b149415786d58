//! Cuts what arrives into spans, compares each with its digest and stores it, while the next one still arrives.
//!
//! Small spans are held in memory until they are verified, so that their readers get them whatever the disk says. Large ones are
//! written and hashed piece by piece, and are present once the last piece has confirmed the digest.
//!
//! Memory per request: [`MAX_VERIFYING`] + 2 small spans, or two [`PIECE`]s of a large one.

use super::layer::{Arrival, Layer};
use crate::oci::{Digest, Hasher};
use bytes::{Bytes, BytesMut};
use std::{collections::VecDeque, io, ops::Range, sync::Arc};
use tokio::task::JoinHandle;

/// Spans of one request being verified and written while the next ones arrive.
const MAX_VERIFYING: usize = 2;
/// A span of more compressed bytes than this is written as it arrives. Four of the default size.
pub(super) const MAX_BUFFERED: u64 = 16 << 20;
/// A large span is written in pieces of this: some milliseconds of a fast link.
const PIECE: usize = 1 << 20;

/// A large span that has arrived in part.
pub(super) struct Partial {
    pub span: usize,
    /// Where in the blob the next byte goes.
    pub at: u64,
    hasher: Hasher,
}

/// What became of a span whose last byte is here.
enum Verdict {
    Kept,
    NoRoom(io::Error),
    Wrong,
}

/// What became of everything that arrived.
#[derive(Default)]
pub(super) struct Outcome {
    /// Spans that are verified and stored.
    pub kept: usize,
    /// A span that does not match its digest.
    pub wrong: Option<usize>,
    /// Why something could not be stored. Who waited has got it nevertheless, unless it is large.
    pub no_room: Option<io::Error>,
    /// That was a large one: it cannot go on.
    pub stuck: bool,
}

/// One response, arriving.
pub(super) struct Incoming {
    layer: Arc<Layer>,
    run: Range<usize>,
    /// The span that `buffer` is the beginning, or a piece, of.
    span: usize,
    /// Where `buffer` begins in the blob.
    at: u64,
    buffer: BytesMut,
    large: Option<Partial>,
    verifying: VecDeque<(usize, JoinHandle<Verdict>)>,
    outcome: Outcome,
}

impl Incoming {
    /// Everything of `run`, but for what is known already of its first span.
    pub fn new(layer: &Arc<Layer>, run: Range<usize>) -> Incoming {
        let large = layer.take_partial(run.start);
        let at = large.as_ref().map_or(layer.blob_range(&run).start, |partial| partial.at);
        Incoming {
            layer: layer.clone(),
            span: run.start,
            run,
            at,
            buffer: BytesMut::new(),
            large,
            verifying: VecDeque::new(),
            outcome: Outcome::default(),
        }
    }

    /// The bytes of the blob that are still to come.
    pub fn missing(&self) -> Range<u64> {
        let start = self.at + self.buffer.len() as u64;
        start..self.layer.blob_range(&self.run).end.max(start)
    }

    /// Nothing more is needed: all of it is here, or the rest would be of no use.
    pub fn is_over(&self) -> bool {
        self.span >= self.run.end || self.outcome.wrong.is_some() || self.outcome.stuck
    }

    fn is_large(&self) -> bool {
        self.layer.span_bytes(self.span) > MAX_BUFFERED
    }

    /// Takes the next bytes. Slower than they come: what is being verified has a bound.
    pub async fn take(&mut self, chunk: &[u8]) {
        self.buffer.extend_from_slice(chunk);
        while !self.is_over() {
            let Some(entry) = self.layer.table().spans.get(self.span) else { return };
            let end = entry.compressed.end;
            let here = self.buffer.len() as u64;
            if self.at + here >= end {
                let last = self.buffer.split_to((end - self.at) as usize).freeze();
                self.whole(last, end).await;
            } else if self.is_large() && self.buffer.len() >= PIECE {
                let piece = self.buffer.split().freeze();
                self.piece(piece).await;
            } else {
                return;
            }
        }
    }

    /// The last bytes of a span are here.
    async fn whole(&mut self, last: Bytes, end: u64) {
        let next = self.span + 1;
        // A span that starts inside a byte shares it with the one before.
        let shares =
            next < self.run.end && self.layer.table().spans.get(next).is_some_and(|s| s.compressed.start < end);
        if shares {
            let mut rest = BytesMut::with_capacity(self.buffer.len() + 1);
            rest.extend_from_slice(&last[last.len() - 1..]);
            rest.extend_from_slice(&self.buffer);
            self.buffer = rest;
        }
        let start = self.at;
        if self.is_large() {
            self.piece(last).await;
            self.confirm();
        } else {
            let task = verify(self.layer.clone(), self.span, start, last);
            self.verifying.push_back((self.span, task));
        }
        self.at = if shares { end - 1 } else { end };
        if !self.outcome.stuck {
            self.span = next;
        }
        while self.verifying.len() > MAX_VERIFYING {
            self.oldest().await;
        }
    }

    /// Writes and hashes a piece of a large span.
    async fn piece(&mut self, bytes: Bytes) {
        let (span, at, layer) = (self.span, self.at, self.layer.clone());
        let partial = self.large.take().unwrap_or(Partial { span, at, hasher: Hasher::new() });
        self.at = at + bytes.len() as u64;
        let task = self.layer.shared().runtime.spawn_blocking(move || {
            let mut hasher = partial.hasher;
            let covered = layer.table().spans.get(span).map_or(at, |entry| entry.compressed.start.max(at));
            hasher.update(bytes.get((covered - at) as usize..).unwrap_or_default());
            layer.files().write(at, &bytes)?;
            Ok(Partial { span, at: at + bytes.len() as u64, hasher })
        });
        match task.await.unwrap_or_else(|_| Err(io::Error::other("the daemon is stopping"))) {
            Ok(partial) => self.large = Some(partial),
            Err(error) => self.stuck(error),
        }
    }

    fn stuck(&mut self, error: io::Error) {
        self.outcome.no_room = Some(error);
        self.outcome.stuck = true;
    }

    /// All pieces of a large span are written.
    fn confirm(&mut self) {
        let Some(partial) = self.large.take() else { return };
        let digest = self.layer.table().spans.get(self.span).map(|entry| entry.digest);
        if Some(partial.hasher.finish()) != digest {
            self.outcome.wrong = self.outcome.wrong.or(Some(self.span));
            return;
        }
        match self.layer.files().keep(self.span) {
            Ok(()) => {
                self.outcome.kept += 1;
                self.layer.arrived(self.span, Arrival::OnDisk);
            }
            Err(error) => self.stuck(error),
        }
    }

    async fn oldest(&mut self) {
        let Some((span, task)) = self.verifying.pop_front() else { return };
        match task.await {
            Ok(Verdict::Kept) => self.outcome.kept += 1,
            Ok(Verdict::NoRoom(error)) => self.outcome.no_room = Some(error),
            Ok(Verdict::Wrong) | Err(_) => self.outcome.wrong = self.outcome.wrong.or(Some(span)),
        }
    }

    /// Waits for what is being verified. What there is of a large span is left for the next request.
    pub async fn finish(mut self) -> (Range<u64>, Outcome) {
        while !self.verifying.is_empty() {
            self.oldest().await;
        }
        if self.is_large() && !self.buffer.is_empty() && self.outcome.wrong.is_none() && self.span < self.run.end {
            let rest = self.buffer.split().freeze();
            self.piece(rest).await;
        }
        if let Some(partial) = self.large.take() {
            self.layer.leave_partial(partial);
        }
        (self.missing(), self.outcome)
    }
}

/// Compares `span` with its digest and stores it, in a thread that may block. `bytes` begin at `start` of the blob.
fn verify(layer: Arc<Layer>, span: usize, start: u64, bytes: Bytes) -> JoinHandle<Verdict> {
    let runtime = layer.shared().runtime.clone();
    runtime.spawn_blocking(move || {
        let Some(entry) = layer.table().spans.get(span) else { return Verdict::Wrong };
        let body = bytes.slice((entry.compressed.start.saturating_sub(start) as usize).min(bytes.len())..);
        if Digest::of(&body) != entry.digest {
            return Verdict::Wrong;
        }
        let written = match layer.shared().scheduler.has_quota(bytes.len() as u64) {
            true => layer.files().write(start, &bytes),
            false => Err(io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "[layer_store] max_size is used up, and what is here is in use or pinned",
            )),
        };
        match written.and_then(|()| layer.files().keep(span)) {
            Ok(()) => {
                layer.arrived(span, Arrival::Bytes(body));
                Verdict::Kept
            }
            Err(error) => {
                // What was written of it takes room, and nobody will read it.
                let _ = layer.files().punch(layer.own_bytes(span));
                layer.not_kept(span, body);
                Verdict::NoRoom(error)
            }
        }
    })
}
