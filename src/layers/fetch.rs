//! Moves spans from a source to the disk and to whoever waits for them.
//!
//! One request brings a run of neighbouring spans. What goes wrong has an answer each:
//!
//! * a body that ends early or cannot be read is continued behind the last whole span, after a while if nothing came;
//! * wrong bytes are asked for again from another host, or from another source;
//! * a source that does not have the blob is asked last from then on;
//! * sources that have trouble, all of them, are asked again from the first until the reader's time is up, ever more rarely;
//! * a body that falls silent while a reader waits is given up and asked for anew, over another connection or from another host, a few times,
//!   ever more patiently;
//! * a background request that is silent while a reader waits for it is made again as that reader's;
//! * what does not fit on the disk is given to who waits, and forgotten.

use super::{
    layer::Layer,
    receive::{Incoming, Outcome},
    scheduler::{OnTheirWay, Persistence, Scheduler, backoff},
    source::{Body, Remedy, Source, SourceError},
    spans::{Span, Ticket},
    split,
};
use crate::telemetry::catalog::say;
use crate::{fs::ReadError, registry::HostId};
use futures::future::BoxFuture;
use std::{
    io,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

/// So many bytes of a large span are worth going on at once.
const USEFUL: u64 = 1 << 20;
/// A failure that took so long is the answer to whatever the kernel asks right after it (`layer::ECHO`).
const WORTH_REMEMBERING: Duration = Duration::from_secs(1);
/// Between two rounds through all sources, at most: how late a recovery may be noticed. Requests that a sick host would not get are
/// not sent (`registry::endpoint`), so this is not about its load.
const MAX_ROUND: Duration = Duration::from_secs(5);
/// See [`MAX_ROUND`].
const MIN_ROUND: Duration = Duration::from_millis(100);

/// How often in one fetch a silent body is given up early. After that the silence may be the link's way, and the connection's own limit decides.
const MAX_SWITCHES: u32 = 3;

/// Why an attempt ended early.
enum Failure {
    Source(SourceError),
    /// The bytes of this span were not those the zTOC describes.
    Digest {
        span: usize,
    },
    /// A span that is too large for memory does not fit on the disk.
    Storage(io::Error),
    /// A reader waits, and the other side has sent nothing for too long; why, if that is known.
    Silent(Option<String>),
    /// A reader waits, and a body that had begun has stopped; another connection may do better.
    Stalled(Duration),
    /// Nobody needs it any more.
    Removed,
}

impl Failure {
    fn as_read_error(&self) -> ReadError {
        match self {
            Failure::Source(error) => ReadError::Fetch { reason: error.reason.clone() },
            Failure::Digest { span } => ReadError::Digest { span: *span },
            Failure::Storage(error) => ReadError::Storage { reason: error.to_string() },
            Failure::Silent(why) => ReadError::Fetch {
                reason: why.clone().unwrap_or_else(|| "the other side has stopped sending".to_owned()),
            },
            Failure::Stalled(after) => {
                ReadError::Fetch { reason: format!("the other side has stopped sending for {after:.1?}") }
            }
            Failure::Removed => ReadError::Removed,
        }
    }
}

/// On whose behalf something is fetched.
#[derive(Clone, Copy)]
enum Urgency {
    /// A reader has waited since then: worth retries until its budget ends.
    Reader { since: Instant },
    /// Nobody waits: what takes time is left for later.
    Nobody,
}

/// Spans that were taken. Those that did not arrive when their fetch ends, however it ends, are lost: nobody waits for ever.
pub(super) struct Taken {
    layer: Arc<Layer>,
    run: Range<usize>,
    ticket: Ticket,
    /// Hosts that have failed it before.
    avoid: Vec<HostId>,
}

impl Taken {
    /// `run` was taken a moment ago, by the caller.
    pub fn new(layer: Arc<Layer>, run: Range<usize>) -> Taken {
        let ticket = match layer.map().get(run.start) {
            Span::Fetching(ticket) => ticket,
            Span::Absent | Span::Present | Span::Evicting => Ticket::default(),
        };
        Taken { layer, run, ticket, avoid: Vec::new() }
    }

    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// The first spans of the run that are not here yet. What is here already is not touched again: it may be on its way out.
    pub fn left(&self) -> Option<Range<usize>> {
        let map = self.layer.map();
        let is_ours = |span: &usize| map.get(*span) == Span::Fetching(self.ticket);
        let first = self.run.clone().find(is_ours)?;
        let end = (first..self.run.end).find(|span| !is_ours(span)).unwrap_or(self.run.end);
        Some(first..end)
    }

    pub fn lose(&self, error: &ReadError) {
        for span in self.run.clone() {
            if self.layer.map().get(span) == Span::Fetching(self.ticket) {
                self.layer.lost(span, error);
            }
        }
    }

    /// Gives back what nobody waits for; what somebody does is taken still, by whoever gets the result.
    pub fn give_back(mut self, avoid: &[HostId]) -> Vec<Taken> {
        let run = std::mem::replace(&mut self.run, 0..0);
        let wanted = self.layer.give_back(run, self.ticket);
        let taken = |run| Taken { layer: self.layer.clone(), run, ticket: self.ticket, avoid: avoid.to_vec() };
        wanted.into_iter().map(taken).collect()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.lose(&ReadError::Fetch { reason: "the fetch was given up".into() });
    }
}

/// Fetches `taken` for readers who have waited `since`: retries within the budget, then tells them why not.
pub(super) async fn demand(scheduler: &Scheduler, taken: Taken, since: Instant) {
    let layer = taken.layer.clone();
    // A connection for each reader of a dead registry would help nobody.
    let waited = tokio::time::timeout(scheduler.settings().budget, layer.demands.acquire()).await;
    let Ok(Ok(_permit)) = waited else {
        let error = ReadError::Fetch { reason: "the registry answers none of the requests before this one".into() };
        return taken.lose(&error);
    };
    let mut attempts = Attempts::new(scheduler, &taken, Urgency::Reader { since });
    let result = attempts.run(&taken, None).await;
    let (rate, window, waiting) = scheduler.link();
    let (first, spans, took) = (taken.run.start, taken.run.len(), since.elapsed());
    tracing::debug!(layer = %layer.digest(), first, spans, ?took, rate, window, waiting, "demand");
    if let Err(failure) = result {
        let error = failure.as_read_error();
        if took >= WORTH_REMEMBERING {
            layer.remember_failure(taken.run.clone(), &error);
        }
        taken.lose(&error);
    }
}

/// Fetches `taken` because it may be read. If that fails it is left for later, unless a reader has come to wait for it meanwhile.
pub(super) async fn background(scheduler: &Scheduler, taken: Taken, ticket: OnTheirWay) {
    let layer = taken.layer.clone();
    let mut attempts = Attempts::new(scheduler, &taken, Urgency::Nobody);
    let spans = taken.run.len();
    match attempts.run(&taken, Some(ticket)).await {
        Ok(()) => {
            scheduler.succeeded(&layer);
            layer.shared().observer.background_fetched(&layer.digest(), spans);
        }
        Err(failure) => {
            if !matches!(failure, Failure::Silent(_) | Failure::Removed) {
                scheduler.failed(&layer);
                layer.shared().observer.background_failed(&layer.digest());
            }
            tracing::debug!(layer = %layer.digest(), error = %failure.as_read_error(), "background fetch failed, trying again later");
            let mut avoid = attempts.avoid;
            avoid.extend(attempts.host);
            for wanted in taken.give_back(&avoid) {
                scheduler.demand(wanted);
            }
        }
    }
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// An answer. Whoever asks for it has time limits and goes on to other hosts by itself.
    Opening,
    /// More of it.
    Body,
}

/// Attempts at one run, and what they have learnt.
struct Attempts<'a> {
    scheduler: &'a Scheduler,
    layer: &'a Arc<Layer>,
    urgency: Urgency,
    sources: Vec<Arc<dyn Source>>,
    source: usize,
    /// Who answers the current request, if it is known.
    host: Option<HostId>,
    avoid: Vec<HostId>,
    /// Who has fallen silent just now: not to be asked by the very next request, if there is anybody else.
    silent: Option<HostId>,
    /// How often that has happened.
    switches: u32,
    /// Failures of this source in a row without anything of use.
    failures: u32,
    mismatches: u32,
    /// Rounds through all sources.
    rounds: u32,
    /// A source of this round had trouble that time may heal.
    may_heal: bool,
}

impl<'a> Attempts<'a> {
    fn new(scheduler: &'a Scheduler, taken: &'a Taken, urgency: Urgency) -> Attempts<'a> {
        let (layer, avoid) = (&taken.layer, taken.avoid.clone());
        let sources = layer.sources();
        Attempts {
            scheduler,
            layer,
            urgency,
            sources,
            source: 0,
            host: None,
            avoid,
            silent: None,
            switches: 0,
            failures: 0,
            mismatches: 0,
            rounds: 0,
            may_heal: false,
        }
    }

    async fn run(&mut self, taken: &Taken, mut ticket: Option<OnTheirWay>) -> Result<(), Failure> {
        while let Some(left) = taken.left() {
            if self.layer.is_removed() {
                return Err(Failure::Removed);
            }
            let mut incoming = Incoming::new(self.layer, left.clone());
            let range = incoming.missing();
            let ticket = ticket.take().unwrap_or_else(|| self.scheduler.asked(self.layer, range.end - range.start));
            let received = self.receive(&mut incoming, &left, ticket).await;
            let (missing, outcome) = incoming.finish().await;
            let useful = outcome.kept > 0 || missing.start.saturating_sub(range.start) >= USEFUL;
            let Err(failure) = self.judge(received, missing, outcome) else { continue };
            match self.wait_after(&failure, useful) {
                Some(wait) => {
                    let (layer, error) = (self.layer.digest(), failure.as_read_error());
                    tracing::debug!(%layer, %error, ?wait, "fetching again");
                    tokio::time::sleep(wait).await;
                }
                None => return Err(failure),
            }
        }
        Ok(())
    }

    /// What has to be said about an attempt: wrong bytes first, because who sent them must not be asked again.
    fn judge(&mut self, received: Result<(), Failure>, missing: Range<u64>, outcome: Outcome) -> Result<(), Failure> {
        match &outcome.no_room {
            Some(error) => self.scheduler.no_room(error),
            None if outcome.kept > 0 => self.scheduler.has_room(),
            None => {}
        }
        if let Some(span) = outcome.wrong {
            let (layer, host) = (self.layer.digest(), self.host.take());
            say!(BadBytes, %layer, span, host = host.as_ref().map_or_else(|| "containerd".to_owned(), HostId::to_string), "fetched bytes do not match their digest, asking elsewhere");
            match host {
                Some(host) => self.avoid.push(host),
                None => self.source = (self.source + 1) % self.sources.len().max(1),
            }
            return Err(Failure::Digest { span });
        }
        received?;
        if missing.is_empty() {
            return Ok(());
        }
        if let (true, Some(error)) = (outcome.stuck, outcome.no_room) {
            return Err(Failure::Storage(error));
        }
        let reason = format!("the response ended {} bytes early", missing.end - missing.start);
        Err(Failure::Source(SourceError { reason, remedy: Remedy::Retry(None) }))
    }

    /// How long to wait before the next attempt; none if there is to be none.
    fn wait_after(&mut self, failure: &Failure, useful: bool) -> Option<Duration> {
        let settings = self.scheduler.settings();
        if useful {
            self.failures = 0;
        }
        let wait = match failure {
            Failure::Source(SourceError { remedy: Remedy::OtherSource, .. }) => self.next_source(),
            Failure::Source(SourceError { remedy: Remedy::Later, .. }) => {
                self.may_heal = true;
                self.next_source()
            }
            Failure::Source(SourceError { remedy: Remedy::Retry(hint), .. }) => match self.urgency {
                Urgency::Nobody => None,
                Urgency::Reader { .. } if useful => Some(Duration::ZERO),
                Urgency::Reader { .. } if self.failures < settings.retries => {
                    self.failures += 1;
                    let wait = backoff(settings.min_wait, settings.max_wait, self.failures);
                    Some(hint.unwrap_or(wait).min(settings.max_wait))
                }
                Urgency::Reader { .. } => {
                    self.may_heal = true;
                    self.next_source()
                }
            },
            Failure::Digest { .. } => {
                self.mismatches += 1;
                let wait = match self.mismatches {
                    // Another host is asked.
                    1 => Duration::ZERO,
                    more => backoff(settings.min_wait, settings.max_wait, more - 1),
                };
                match self.urgency {
                    Urgency::Nobody if self.mismatches > 1 => None,
                    _ => (self.mismatches <= settings.verification_retries.max(1)).then_some(wait),
                }
            }
            Failure::Stalled(_) => {
                self.switches += 1;
                self.silent = self.host.take();
                Some(Duration::ZERO)
            }
            Failure::Storage(_) | Failure::Silent(_) | Failure::Removed => None,
        };
        match self.urgency {
            // A last attempt at the very end of the time rather than none.
            Urgency::Reader { since } => {
                let left = settings.budget.saturating_sub(since.elapsed());
                wait.filter(|_| !left.is_zero()).map(|wait| wait.min(left))
            }
            Urgency::Nobody => wait,
        }
    }

    /// Goes on to the next source at once; after the last one, to the first after a while, if a reader waits and time may help.
    fn next_source(&mut self) -> Option<Duration> {
        if let Some(source) = self.sources.get(self.source) {
            self.layer.demote(source);
        }
        self.source += 1;
        self.failures = 0;
        if self.source < self.sources.len() {
            return Some(Duration::ZERO);
        }
        let again = self.may_heal && self.scheduler.settings().persistence == Persistence::WholeBudget;
        match self.urgency {
            Urgency::Reader { .. } if again => {
                // Images that were prepared meanwhile may have brought others.
                self.sources = self.layer.sources();
                (self.source, self.may_heal) = (0, false);
                self.rounds += 1;
                Some(backoff(MIN_ROUND, MAX_ROUND, self.rounds))
            }
            Urgency::Reader { .. } | Urgency::Nobody => None,
        }
    }

    /// One request.
    async fn receive(
        &mut self,
        incoming: &mut Incoming,
        run: &Range<usize>,
        mut ticket: OnTheirWay,
    ) -> Result<(), Failure> {
        let range = incoming.missing();
        if range.is_empty() {
            return Ok(());
        }
        let none =
            || Failure::Source(SourceError { reason: "no source for the layer".into(), remedy: Remedy::OtherSource });
        let source = self.sources.get(self.source).cloned().ok_or_else(none)?;
        let started = Instant::now();
        self.host = None;
        let avoid: Vec<HostId> = self.avoid.iter().cloned().chain(self.silent.take()).collect();
        let opening: BoxFuture<'_, _> = match self.urgency {
            Urgency::Reader { .. } => Box::pin(split::open(&source, range, &avoid)),
            Urgency::Nobody => source.open(range, &avoid),
        };
        let opened = self.patiently(opening, run, &mut ticket, Phase::Opening).await;
        if source.is_remote() {
            self.layer.shared().observer.range_request(&self.layer.digest(), started.elapsed());
        }
        let mut body: Box<dyn Body> = opened?;
        ticket.begun();
        self.host = body.host();
        while !incoming.is_over() {
            let Some(chunk) = self.patiently(body.chunk(), run, &mut ticket, Phase::Body).await? else { break };
            if self.layer.is_removed() {
                return Err(Failure::Removed);
            }
            ticket.arrived(chunk.len() as u64);
            incoming.take(&chunk).await;
        }
        Ok(())
    }

    /// Waits for the other side. When that takes long the scheduler is told, so that others need not wait too.
    async fn patiently<T>(
        &self,
        mut step: BoxFuture<'_, Result<T, SourceError>>,
        run: &Range<usize>,
        ticket: &mut OnTheirWay,
        phase: Phase,
    ) -> Result<T, Failure> {
        let begun = Instant::now();
        loop {
            let patience = match self.urgency {
                Urgency::Reader { since } => {
                    let left = self.scheduler.settings().budget.saturating_sub(since.elapsed());
                    self.scheduler.patience().min(left)
                }
                Urgency::Nobody => self.scheduler.patience(),
            };
            if let Ok(result) = tokio::time::timeout(patience, &mut step).await {
                return result.map_err(Failure::Source);
            }
            ticket.silent();
            if self.layer.is_removed() {
                return Err(Failure::Removed);
            }
            let give_up = match self.urgency {
                Urgency::Reader { since } => since.elapsed() >= self.scheduler.settings().budget,
                Urgency::Nobody => {
                    let map = self.layer.map();
                    run.clone().any(|span| map.is_wanted(span))
                }
            };
            if let (Urgency::Reader { .. }, Phase::Body) = (self.urgency, phase)
                && !give_up
                && self.switches < MAX_SWITCHES
                && begun.elapsed() >= self.scheduler.patience() * (1 << self.switches)
            {
                return Err(Failure::Stalled(begun.elapsed()));
            }
            if give_up {
                return Err(Failure::Silent(self.sources.get(self.source).and_then(|source| source.trouble())));
            }
        }
    }
}
