//! Moves spans from a source to the disk and to whoever waits for them.
//!
//! One request brings a run of neighbouring spans. Each is verified and stored as soon as its last byte is here, while the next
//! one still arrives.

use super::{
    layer::Layer,
    scheduler::{OnTheirWay, Scheduler, backoff},
    source::{Remedy, Source, SourceError},
    spans::Span,
    split,
};
use crate::{fs::ReadError, oci::Digest, registry::HostId};
use bytes::{Bytes, BytesMut};
use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;

/// Spans of one request being verified and written while the next ones arrive.
const MAX_VERIFYING: usize = 2;

/// Why an attempt ended early.
enum Failure {
    Source(SourceError),
    /// The bytes of this span were not those the zTOC describes.
    Digest { span: usize },
}

impl Failure {
    fn as_read_error(&self) -> ReadError {
        match self {
            Failure::Source(error) => ReadError::Fetch { reason: error.reason.clone() },
            Failure::Digest { span } => ReadError::Digest { span: *span },
        }
    }
}

/// Fetches `run` for readers that wait: retries within the budget, then tells them why not.
pub(super) async fn demand(scheduler: &Scheduler, layer: Arc<Layer>, run: Range<usize>) {
    let range = layer.blob_range(&run);
    let (begun, bytes) = (Instant::now(), range.end - range.start);
    persist(scheduler, &layer, run.clone(), scheduler.asked(bytes)).await;
    let (rate, window, waiting) = scheduler.link();
    tracing::debug!(layer = %layer.digest(), first = run.start, spans = run.len(), bytes, took = ?begun.elapsed(), rate, window, waiting, "demand");
}

/// Fetches `run` because it may be read. If that fails it is left for later, unless a reader has come to wait for it meanwhile.
pub(super) async fn background(scheduler: &Scheduler, layer: Arc<Layer>, run: Range<usize>, ticket: OnTheirWay) {
    let mut attempt = Attempt::new(&layer, Urgency::Background);
    match attempt.run(&run, ticket).await {
        Ok(()) => {
            scheduler.succeeded(&layer);
            layer.shared().observer.background_fetched(&layer.digest(), run.len());
        }
        Err(failure) => {
            scheduler.failed(&layer);
            let error = failure.as_read_error();
            layer.shared().observer.background_failed(&layer.digest());
            tracing::debug!(layer = %layer.digest(), error = %error, "background fetch failed, trying again later");
            for span in layer.give_back(run) {
                demand(scheduler, layer.clone(), span..span + 1).await;
            }
        }
    }
}

async fn persist(scheduler: &Scheduler, layer: &Arc<Layer>, run: Range<usize>, ticket: OnTheirWay) {
    let settings = scheduler.settings();
    let begun = Instant::now();
    let (mut failures, mut mismatches) = (0, 0);
    let mut attempt = Attempt::new(layer, Urgency::Demand);
    let mut ticket = Some(ticket);
    loop {
        let Some(left) = still_fetching(layer, &run) else { return };
        let this = ticket.take().unwrap_or_else(|| {
            let range = layer.blob_range(&left);
            scheduler.asked(range.end - range.start)
        });
        let Err(failure) = attempt.run(&left, this).await else { return };
        let error = failure.as_read_error();
        let wait = match &failure {
            Failure::Source(SourceError { remedy, .. }) => {
                failures += 1;
                let wait = backoff(settings.min_wait, settings.max_wait, failures);
                match remedy {
                    Remedy::Retry(hint) => (failures <= settings.retries).then(|| hint.unwrap_or(wait).min(settings.max_wait)),
                    Remedy::OtherSource => attempt.next_source().then_some(Duration::ZERO),
                }
            }
            Failure::Digest { .. } => {
                mismatches += 1;
                let wait = backoff(settings.min_wait, settings.max_wait, mismatches);
                (mismatches <= settings.verification_retries.max(1)).then_some(wait)
            }
        };
        match wait.filter(|wait| begun.elapsed() + *wait < settings.budget) {
            Some(wait) => {
                tracing::debug!(layer = %layer.digest(), error = %error, attempt = failures + mismatches, "fetching again");
                tokio::time::sleep(wait).await;
            }
            None => {
                for span in run {
                    if layer.map().get(span) == Span::Fetching {
                        layer.lost(span, Some(&error));
                    }
                }
                return;
            }
        }
    }
}

/// The smallest part of `run` that holds everything of it that is not here yet.
fn still_fetching(layer: &Layer, run: &Range<usize>) -> Option<Range<usize>> {
    let map = layer.map();
    let first = run.clone().find(|s| map.get(*s) == Span::Fetching)?;
    let last = run.clone().rev().find(|s| map.get(*s) == Span::Fetching)?;
    Some(first..last + 1)
}

/// Whether somebody waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Urgency {
    Demand,
    Background,
}

/// Attempts at one run, and what they have learnt.
struct Attempt {
    layer: Arc<Layer>,
    urgency: Urgency,
    sources: Vec<Arc<dyn Source>>,
    source: usize,
    avoid: Vec<HostId>,
}

/// Said once per process: every later line would say the same.
static DISK_TROUBLE: AtomicBool = AtomicBool::new(false);

impl Attempt {
    fn new(layer: &Arc<Layer>, urgency: Urgency) -> Attempt {
        Attempt { layer: layer.clone(), urgency, sources: layer.sources(), source: 0, avoid: Vec::new() }
    }

    /// Goes on to the next source; false after the last.
    fn next_source(&mut self) -> bool {
        self.source += 1;
        self.source < self.sources.len()
    }

    async fn run(&mut self, run: &Range<usize>, mut ticket: OnTheirWay) -> Result<(), Failure> {
        let gone = || SourceError { reason: "no source for the layer".into(), remedy: Remedy::Retry(None) };
        let source = self.sources.get(self.source).cloned().ok_or_else(gone).map_err(Failure::Source)?;
        let range = self.layer.blob_range(run);
        let started = Instant::now();
        let opened = match self.urgency {
            Urgency::Demand => split::open(&source, range.clone(), &self.avoid).await,
            Urgency::Background => source.open(range.clone(), &self.avoid).await,
        };
        self.layer.shared().observer.range_request(&self.layer.digest(), started.elapsed());
        let mut body = opened.map_err(Failure::Source)?;
        ticket.begun();
        let host = body.host();
        let mut buffer = BytesMut::new();
        let mut start = range.start;
        let mut span = run.start;
        let mut verifying: std::collections::VecDeque<(usize, JoinHandle<bool>)> = Default::default();
        let mut wrong = None;
        while span < run.end {
            let Some(chunk) = body.chunk().await.map_err(Failure::Source)? else { break };
            ticket.arrived(chunk.len() as u64);
            buffer.extend_from_slice(&chunk);
            while span < run.end && start + buffer.len() as u64 >= self.layer.table().spans[span].compressed.end {
                let end = self.layer.table().spans[span].compressed.end;
                let bytes = buffer.split_to((end - start) as usize).freeze();
                // A span that starts inside a byte shares it with the one before.
                let shared = (span + 1 < run.end) && self.layer.table().spans[span + 1].compressed.start < end;
                if shared {
                    let mut rest = BytesMut::with_capacity(buffer.len() + 1);
                    rest.extend_from_slice(&bytes[bytes.len() - 1..]);
                    rest.extend_from_slice(&buffer);
                    buffer = rest;
                }
                verifying.push_back((span, self.verify(span, start, bytes)));
                start = if shared { end - 1 } else { end };
                span += 1;
                while verifying.len() > MAX_VERIFYING {
                    wrong = wrong.or(oldest(&mut verifying).await);
                }
            }
        }
        while !verifying.is_empty() {
            wrong = wrong.or(oldest(&mut verifying).await);
        }
        if let Some(span) = wrong {
            if let Some(host) = host {
                self.avoid.push(host);
            }
            return Err(Failure::Digest { span });
        }
        if span < run.end {
            let reason = format!("the response ended {} bytes early", range.end - start - buffer.len() as u64);
            return Err(Failure::Source(SourceError { reason, remedy: Remedy::Retry(None) }));
        }
        Ok(())
    }

    /// Compares `span` with its digest and stores it, in a thread that may block. `bytes` begin at `start` of the blob.
    fn verify(&self, span: usize, start: u64, bytes: Bytes) -> JoinHandle<bool> {
        let layer = self.layer.clone();
        self.layer.shared().runtime.spawn_blocking(move || {
            let entry = &layer.table().spans[span];
            let body = bytes.slice((entry.compressed.start - start) as usize..);
            if Digest::of(&body) != entry.digest {
                return false;
            }
            match layer.files().store(span, start, &bytes) {
                Ok(()) => layer.arrived(span, body),
                Err(error) => {
                    if !DISK_TROUBLE.swap(true, Ordering::Relaxed) {
                        tracing::error!(layer = %layer.digest(), error = %error,
                            "cannot keep fetched data on disk; reads go on from the network, and every read of this data fetches it again");
                    }
                    layer.not_kept(span, body);
                }
            }
            true
        })
    }
}

async fn oldest(verifying: &mut std::collections::VecDeque<(usize, JoinHandle<bool>)>) -> Option<usize> {
    let (span, task) = verifying.pop_front()?;
    match task.await {
        Ok(true) => None,
        Ok(false) | Err(_) => Some(span),
    }
}
