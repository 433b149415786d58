//! Who may use the network next: one scheduler for all layers of the node.
//!
//! * **Demand**: a reader waits. Sent at once, ahead of everything, never limited.
//! * **Listed**: what the author of an index wants fetched first, whatever the pace of the background.
//! * **Near**: what follows what was just read. Next in line.
//! * **Background**: everything else of every mounted image, most likely first.
//!
//! Near and background requests are sent while fewer bytes are on their way than the link holds ([`Window`]); bytes of demand
//! count. So the link is full while anything is missing, and a blocked read finds at most one window of other bytes before its own.
//!
//! Pulls are asked for a share of the link ([`Scheduler::make_way`]) and, where the operator limits requests, for their leave ([`Throttle`]);
//! they in turn give way to demand.
//!
//! Absent on purpose: the bytes. `fetch` moves them; this module only decides.

use super::{
    fetch::{self, Taken},
    layer::Layer,
    quota::{Quota, QuotaSettings},
    window::{MIN_BYTES, Window},
};
use crate::{
    registry::{Slot, Throttle},
    sync::{Mutex, MutexGuard},
    telemetry::catalog::say,
};
use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    pin::pin,
    sync::{Arc, PoisonError, RwLock, Weak},
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// Hints kept; older ones are forgotten. Two per core of a large node.
const MAX_NEAR: usize = 256;
/// Ranges of prefetch artifacts kept; what does not fit is background like the rest. An artifact names a few files of a layer.
const MAX_LISTED: usize = 4096;
/// Largest background request. A request costs about a round trip of nobody's time, and a blocked read waits behind it.
pub(super) const MAX_REQUEST: u64 = 8 << 20;

/// How long another's download may hold the background back. A layer that is not worth an index (10 MB) needs seconds on a slow link.
const MAKE_WAY: Duration = Duration::from_secs(20);

/// A request that has been silent for this long no longer counts as on its way, and its layer is left alone until it goes on: a host
/// that is stuck must not stop the others. Much longer than any round trip.
const MIN_PATIENCE: Duration = Duration::from_secs(1);
/// The same where a slow link explains the silence. Shorter than the time after which a silent connection is given up.
const MAX_PATIENCE: Duration = Duration::from_secs(8);
/// Silent requests at a time, all layers together; with more, the trouble is on our side.
const MAX_SILENT: usize = 64;
/// While the disk is full nothing is fetched that nobody waits for, but for a try now and then.
const MIN_FULL: Duration = Duration::from_secs(1);
/// See [`MIN_FULL`].
const MAX_FULL: Duration = Duration::from_secs(60);
/// While the quota leaves no room for what nobody waits for, how often that is looked at: images are removed now and then.
const QUOTA_CHECK: Duration = Duration::from_secs(5);
/// The operator's limit of requests is used up: how soon to look again.
const FULL_HOUSE: Duration = Duration::from_millis(50);
/// Under a limit, requests are cut so that so many make a second's worth.
const REQUESTS_PER_SECOND: u64 = 4;

/// So long after a reader had to wait, the next one is expected to: reads that miss come one after another, with a program's own work
/// in between.
const CAUTION: Duration = Duration::from_secs(2);
/// While nobody waits, so many windows may be on their way: the link must not run dry when a processor is busy elsewhere. A first
/// blocked read finds that much in front of it: three made a container of numpy start a fifth later than one did.
const EASE: u64 = 2;

/// How fast the background may stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// As fast as the link goes.
    LineRate,
    /// One span per period, after the silence that follows each new image: what the Go snapshotter does.
    Every { period: Duration, silence: Duration },
    /// Not at all.
    Off,
}

/// What becomes of what is missing and nobody waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Background {
    /// It is fetched.
    #[default]
    Streaming,
    /// It stays away until it is read.
    Off,
    /// The layer store is as large as it may be without anybody's need: nothing is fetched ahead of reads.
    AtQuota,
    /// Nothing can be kept on disk, so nothing is fetched ahead of reads.
    NoRoom,
}

/// How long a reader's fetch goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// Until every source has failed as often as `retries` says.
    Retries,
    /// Until the budget ends, whatever `retries` says, as long as time may heal what is wrong.
    WholeBudget,
}

/// Retries and limits of fetching.
#[derive(Debug, Clone)]
pub struct Settings {
    pub pace: Pace,
    /// Bytes per second that near and background requests may use together.
    pub max_bytes_per_sec: Option<u64>,
    /// Attempts after the first at one source, of a fetch somebody waits for.
    pub retries: u32,
    /// What happens when all sources have failed so often.
    pub persistence: Persistence,
    pub min_wait: Duration,
    pub max_wait: Duration,
    /// A reader waits no longer than this for a span.
    pub budget: Duration,
    /// Attempts after a span did not match its digest.
    pub verification_retries: u32,
    pub quota: QuotaSettings,
}

struct Active {
    layer: Weak<Layer>,
    /// Background fetching failed: not before this.
    resume: Option<Instant>,
    failures: u32,
    /// Requests that have stopped sending.
    silent: usize,
}

/// Whether there is room on the disk for what is fetched.
#[derive(Default)]
enum Disk {
    #[default]
    HasRoom,
    /// One request then, to see.
    Full { until: Instant, tries: u32 },
}

#[derive(Default)]
struct State {
    active: Vec<Active>,
    listed: VecDeque<(Weak<Layer>, Range<usize>)>,
    /// When a reader last had to wait.
    demanded: Option<Instant>,
    near: VecDeque<(Weak<Layer>, usize)>,
    window: Window,
    /// Bytes asked for that are expected, those of silent requests not counted.
    on_their_way: u64,
    /// Silent requests.
    silent: usize,
    disk: Disk,
    /// Bytes that may be sent for at the moment, under a limit; refilled as time passes.
    allowance: f64,
    refilled: Option<Instant>,
    next_tick: Option<Instant>,
    /// Downloads of somebody else on this node that are more urgent than streaming, until when at the latest.
    others: HashMap<u64, Instant>,
}

struct Inner {
    state: Mutex<State>,
    wake: Notify,
    settings: RwLock<Arc<Settings>>,
    quota: Quota,
    /// Shared with pulls.
    throttle: Throttle,
    /// What is done with a demand where the orders of threads are explored: there is no runtime.
    #[cfg(test)]
    instead: std::sync::OnceLock<Box<dyn Fn(Taken) + Send + Sync>>,
}

/// The scheduler; cheap to clone.
#[derive(Clone)]
pub struct Scheduler {
    inner: Arc<Inner>,
}

enum Next {
    Fetch(Arc<Layer>, Range<usize>),
    WaitUntil(Instant),
    Wait,
}

impl Scheduler {
    /// `throttle`: of all requests for layers of this node.
    pub fn new(settings: Settings, throttle: Throttle) -> Scheduler {
        let settings = RwLock::new(Arc::new(settings));
        let inner = Inner {
            state: Mutex::default(),
            wake: Notify::new(),
            settings,
            quota: Quota::new(),
            throttle,
            #[cfg(test)]
            instead: std::sync::OnceLock::new(),
        };
        Scheduler { inner: Arc::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn settings(&self) -> Arc<Settings> {
        self.inner.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn quota(&self) -> &Quota {
        &self.inner.quota
    }

    /// Whether so many bytes more may be kept on disk.
    pub(super) fn has_quota(&self, bytes: u64) -> bool {
        self.inner.quota.admits(bytes, &self.settings().quota)
    }

    /// Bytes of spans that are on disk, and how many may be.
    pub fn usage(&self) -> (u64, u64) {
        (self.inner.quota.used(), self.settings().quota.max)
    }

    /// Other settings, from the next decision on.
    pub fn reconfigure(&self, settings: Settings) {
        *self.inner.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        let mut state = self.lock();
        // A former pace may have put the next request an hour off.
        state.next_tick = None;
        state.allowance = state.allowance.max(0.0);
        drop(state);
        self.wake();
    }

    /// What becomes of what is missing and nobody waits for.
    pub fn background(&self) -> Background {
        let settings = self.settings();
        match (&self.lock().disk, settings.pace) {
            (Disk::Full { .. }, _) => Background::NoRoom,
            _ if !self.inner.quota.has_room_ahead(&settings.quota) => Background::AtQuota,
            (Disk::HasRoom, Pace::Off) => Background::Off,
            (Disk::HasRoom, Pace::LineRate | Pace::Every { .. }) => Background::Streaming,
        }
    }

    /// Streams `layer` until it is complete.
    pub fn add(&self, layer: &Arc<Layer>) {
        let mut state = self.lock();
        state.active.retain(|a| a.layer.strong_count() > 0);
        if !state.active.iter().any(|a| a.layer.as_ptr() == Arc::as_ptr(layer)) {
            state.active.push(Active { layer: Arc::downgrade(layer), resume: None, failures: 0, silent: 0 });
        }
        if let Pace::Every { silence, .. } = self.settings().pace {
            state.next_tick = Some(Instant::now() + silence);
        }
        drop(state);
        self.inner.wake.notify_one();
    }

    /// So many requests at once, or as many as the operator allows.
    pub fn within_limit(&self, requests: usize) -> usize {
        self.inner.throttle.ceiling().map_or(requests, |most| requests.min(most))
    }

    /// Fetches what was taken, because a reader waits.
    pub(super) fn demand(&self, taken: Taken) {
        let (scheduler, since) = (self.clone(), Instant::now());
        self.lock().demanded = Some(since);
        #[cfg(test)]
        if let Some(instead) = self.inner.instead.get() {
            return instead(taken);
        }
        let reading = self.inner.throttle.reading();
        taken.layer().shared().runtime.clone().spawn(async move {
            let _reading = reading;
            fetch::demand(&scheduler, taken, since).await;
            scheduler.wake();
        });
    }

    /// `spans` of `layer` are wanted before anything else that nobody waits for.
    pub fn prefetch(&self, layer: &Arc<Layer>, spans: Range<usize>) {
        layer.pin(spans.clone());
        let mut state = self.lock();
        if state.listed.len() < MAX_LISTED {
            state.listed.push_back((Arc::downgrade(layer), spans));
        }
        drop(state);
        self.wake();
    }

    /// Something may be fetched that could not be, or was not there, a moment ago.
    pub(super) fn wake(&self) {
        self.inner.wake.notify_one();
    }

    /// `spans` of `layer` are likely to be read next.
    pub(super) fn near(&self, layer: &Arc<Layer>, spans: Range<usize>) {
        if spans.is_empty() || self.settings().pace != Pace::LineRate {
            return;
        }
        let mut state = self.lock();
        for span in spans.rev() {
            state.near.push_front((Arc::downgrade(layer), span));
        }
        state.near.truncate(MAX_NEAR);
        drop(state);
        self.inner.wake.notify_one();
    }

    /// Somebody else on this node begins a download that a pull waits for: until [`Scheduler::way_is_free`], streaming goes on with one
    /// request at a time, so that both have a fair share of the link.
    pub fn make_way(&self, who: u64) {
        self.lock().others.insert(who, Instant::now() + MAKE_WAY);
    }

    /// That download is over.
    pub fn way_is_free(&self, who: u64) {
        if self.lock().others.remove(&who).is_some() {
            self.inner.wake.notify_one();
        }
    }

    /// Bytes that were asked for and have not arrived; dropped with the request.
    pub(super) fn asked(&self, layer: &Arc<Layer>, bytes: u64) -> OnTheirWay {
        self.lock().on_their_way += bytes;
        OnTheirWay::new(self, layer, bytes)
    }

    /// Whether nothing is on its way and nobody has waited for a while.
    pub(super) fn is_quiet(&self) -> bool {
        let state = self.lock();
        state.on_their_way == 0 && state.demanded.is_none_or(|at| at.elapsed() >= CAUTION)
    }

    /// How long a request may be silent before that means something: all that is on its way may come first, and a registry that always
    /// takes its time has a window to match.
    pub(super) fn patience(&self) -> Duration {
        let state = self.lock();
        let queue = match state.window.rate() {
            0 => 0.0,
            rate => state.on_their_way.max(state.window.bytes()) as f64 / rate as f64,
        };
        (MIN_PATIENCE + Duration::from_secs_f64(2.0 * queue.min(MAX_PATIENCE.as_secs_f64()))).min(MAX_PATIENCE)
    }

    /// What was fetched could not be stored.
    pub(super) fn no_room(&self, error: &std::io::Error) {
        let mut state = self.lock();
        if let Disk::HasRoom = state.disk {
            say!(DiskFull, %error, "cannot keep fetched data on disk; reads go on from the network, and each fetches its data again");
            state.disk = Disk::Full { until: Instant::now() + MIN_FULL, tries: 0 };
        }
    }

    /// What was fetched could be stored.
    pub(super) fn has_room(&self) {
        let mut state = self.lock();
        if let Disk::Full { .. } = state.disk {
            say!(DiskHasRoom, "fetched data can be kept on disk again");
            state.disk = Disk::HasRoom;
            drop(state);
            self.wake();
        }
    }

    /// Background fetching of `layer` failed: leaves it alone for a while.
    pub(super) fn failed(&self, layer: &Arc<Layer>) {
        let settings = self.settings();
        let (mut state, now) = (self.lock(), Instant::now());
        // Of requests that were on their way together, one counts.
        if let Some(active) =
            state.active(&Arc::downgrade(layer)).filter(|active| active.resume.is_none_or(|at| at <= now))
        {
            active.failures = (active.failures + 1).min(16);
            let wait =
                backoff(settings.min_wait.max(Duration::from_millis(500)), Duration::from_secs(60), active.failures);
            active.resume = Some(now + wait);
        }
    }

    pub(super) fn succeeded(&self, layer: &Arc<Layer>) {
        let mut state = self.lock();
        if let Some(active) = state.active(&Arc::downgrade(layer)) {
            active.failures = 0;
            active.resume = None;
        }
    }

    fn next(&self, now: Instant) -> Next {
        let settings = self.settings();
        let mut state = self.lock();
        let idle = settings.pace == Pace::Off && state.listed.is_empty();
        let calm = state.demanded.map(|at| at + CAUTION).filter(|calm| *calm > now);
        if idle || state.on_their_way >= state.window.bytes() * EASE {
            return Next::Wait;
        }
        if let Some(calm) = calm
            && state.on_their_way >= state.window.bytes()
        {
            return Next::WaitUntil(calm);
        }
        state.others.retain(|_, until| *until > now);
        if state.on_their_way > 0 && !state.others.is_empty() {
            return Next::Wait;
        }
        if state.silent >= MAX_SILENT {
            return Next::Wait;
        }
        if !self.inner.quota.has_room_ahead(&settings.quota) {
            return Next::WaitUntil(now + QUOTA_CHECK);
        }
        if let Disk::Full { until, .. } = state.disk
            && until > now
        {
            return Next::WaitUntil(until);
        }
        if let Some(limit) = settings.max_bytes_per_sec {
            let passed = state.refilled.map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
            state.refilled = Some(now);
            // A second's worth may be saved up; a request may overdraw, the next one waits for that.
            state.allowance = (state.allowance + passed * limit as f64).min(limit as f64);
            if state.allowance < 0.0 {
                return Next::WaitUntil(
                    now + Duration::from_secs_f64((-state.allowance / limit as f64).clamp(0.001, 60.0)),
                );
            }
        }
        let largest = (state.window.bytes() / 2).clamp(MIN_BYTES, MAX_REQUEST);
        let largest = settings.max_bytes_per_sec.map_or(largest, |limit| largest.min(limit / REQUESTS_PER_SECOND));
        // When a source that has failed may be tried again.
        let resume = state.active.iter().filter_map(|active| active.resume).filter(|at| *at > now).min();
        if let Some((layer, run)) = state.take_listed(now, largest) {
            self.charge(&mut state, &layer, &run);
            return Next::Fetch(layer, run);
        }
        let max_bytes = match settings.pace {
            Pace::LineRate => largest,
            Pace::Every { .. } => 0,
            Pace::Off => return resume.map_or(Next::Wait, Next::WaitUntil),
        };
        if let (Pace::Every { .. }, Some(tick)) = (settings.pace, state.next_tick)
            && tick > now
        {
            return Next::WaitUntil(tick);
        }
        while let Some((layer, span)) = state.near.pop_front() {
            let Some(layer) = layer.upgrade() else { continue };
            if state.active(&Arc::downgrade(&layer)).is_some_and(|active| !active.is_welcome(now)) {
                continue;
            }
            if let Some(run) = layer.take_background(span, max_bytes) {
                self.charge(&mut state, &layer, &run);
                return Next::Fetch(layer, run);
            }
        }
        state.active.retain(|a| a.layer.strong_count() > 0);
        let mut best: Option<(Arc<Layer>, usize, f32)> = None;
        for active in state.active.iter().filter(|active| active.is_welcome(now)) {
            let Some(layer) = active.layer.upgrade() else { continue };
            if let Some((span, value)) = layer.candidate()
                && best.as_ref().is_none_or(|(_, _, v)| value > *v)
            {
                best = Some((layer, span, value));
            }
        }
        if let Some((layer, span, _)) = best
            && let Some(run) = layer.take_background(span, max_bytes)
        {
            self.charge(&mut state, &layer, &run);
            if let Pace::Every { period, .. } = settings.pace {
                state.next_tick = Some(now + period);
            }
            return Next::Fetch(layer, run);
        }
        resume.map_or(Next::Wait, Next::WaitUntil)
    }

    fn charge(&self, state: &mut State, layer: &Layer, run: &Range<usize>) {
        let range = layer.blob_range(run);
        // Counted here and handed to the fetch, so that the next decision already sees it.
        state.on_their_way += range.end - range.start;
        if let Disk::Full { until, tries } = &mut state.disk {
            *tries = (*tries + 1).min(16);
            *until = Instant::now() + backoff(MIN_FULL, MAX_FULL, *tries);
        }
        if self.settings().max_bytes_per_sec.is_some() {
            state.allowance -= (range.end - range.start) as f64;
        }
    }

    /// Decides until the runtime ends.
    pub async fn run(self) {
        self.stream(&Tokio).await;
    }

    /// Decides, and has done what was decided, until it is over.
    async fn stream(&self, hands: &impl Hands) {
        while !hands.is_over() {
            let Some(slot) = self.inner.throttle.background() else {
                hands.sleep(Instant::now() + FULL_HOUSE).await;
                continue;
            };
            match self.next(Instant::now()) {
                Next::Fetch(layer, run) => {
                    let range = layer.blob_range(&run);
                    let ticket = OnTheirWay::new(self, &layer, range.end - range.start);
                    hands.fetch(self.clone(), Taken::new(layer, run), ticket, slot);
                }
                Next::WaitUntil(at) => {
                    drop(slot);
                    let (sleep, wake) = (pin!(hands.sleep(at)), pin!(self.inner.wake.notified()));
                    futures::future::select(sleep, wake).await;
                }
                Next::Wait => {
                    drop(slot);
                    self.inner.wake.notified().await;
                }
            }
        }
    }

    /// Best recent rate (bytes/s), the window, and bytes on their way: for logs.
    pub(super) fn link(&self) -> (u64, u64, u64) {
        let state = self.lock();
        (state.window.rate(), state.window.bytes(), state.on_their_way)
    }

    /// Layers with something missing.
    pub fn queue_length(&self) -> usize {
        let layers: Vec<_> = self.lock().active.iter().filter_map(|a| a.layer.upgrade()).collect();
        layers.iter().filter(|l| !l.is_complete()).count()
    }
}

/// Who does what was decided. A seam for the exploration, which has neither a runtime nor a clock.
trait Hands: Sync {
    /// Begins to fetch what nobody waits for, and wakes the scheduler when that has ended.
    fn fetch(&self, scheduler: Scheduler, taken: Taken, ticket: OnTheirWay, slot: Slot);
    fn sleep(&self, until: Instant) -> impl Future<Output = ()> + Send;
    fn is_over(&self) -> bool;
}

struct Tokio;

impl Hands for Tokio {
    fn fetch(&self, scheduler: Scheduler, taken: Taken, ticket: OnTheirWay, slot: Slot) {
        tokio::spawn(async move {
            let _slot = slot;
            fetch::background(&scheduler, taken, ticket).await;
            scheduler.wake();
        });
    }
    fn sleep(&self, until: Instant) -> impl Future<Output = ()> + Send {
        tokio::time::sleep_until(until.into())
    }
    fn is_over(&self) -> bool {
        false
    }
}

/// The wait before attempt `attempt` (1 is the first retry): doubling from `min` to `max`.
pub(super) fn backoff(min: Duration, max: Duration, attempt: u32) -> Duration {
    min.saturating_mul(1 << attempt.saturating_sub(1).min(20)).min(max)
}

impl Active {
    /// Whether its source has neither failed lately nor gone silent.
    fn is_welcome(&self, now: Instant) -> bool {
        self.silent == 0 && self.resume.is_none_or(|at| at <= now)
    }
}

impl State {
    fn active(&mut self, layer: &Weak<Layer>) -> Option<&mut Active> {
        self.active.iter_mut().find(|a| a.layer.ptr_eq(layer))
    }

    /// Takes the first listed spans of a layer that may be asked now.
    fn take_listed(&mut self, now: Instant, max_bytes: u64) -> Option<(Arc<Layer>, Range<usize>)> {
        let unwelcome: Vec<_> = self.active.iter().filter(|a| !a.is_welcome(now)).map(|a| a.layer.as_ptr()).collect();
        let mut at = 0;
        while let Some((listed, spans)) = self.listed.get_mut(at) {
            if unwelcome.contains(&listed.as_ptr()) {
                at += 1;
                continue;
            }
            let taken = listed.upgrade().and_then(|layer| Some((layer.take_listed(spans.clone(), max_bytes)?, layer)));
            match taken {
                Some((run, layer)) => {
                    spans.start = run.end;
                    return Some((layer, run));
                }
                None => self.listed.remove(at),
            };
        }
        None
    }
}

/// Bytes that were asked for. Dropping it forgets those that did not come.
pub(super) struct OnTheirWay {
    scheduler: Scheduler,
    layer: Weak<Layer>,
    left: u64,
    sent: Instant,
    begun: bool,
    /// Nothing has come for long: `left` is not counted.
    silent: bool,
}

impl OnTheirWay {
    /// For bytes that are counted already.
    fn new(scheduler: &Scheduler, layer: &Arc<Layer>, bytes: u64) -> OnTheirWay {
        OnTheirWay {
            scheduler: scheduler.clone(),
            layer: Arc::downgrade(layer),
            left: bytes,
            sent: Instant::now(),
            begun: false,
            silent: false,
        }
    }

    /// The response has begun.
    pub(super) fn begun(&mut self) {
        if !self.begun {
            self.begun = true;
            let now = Instant::now();
            self.scheduler.lock().window.first_byte(now - self.sent, now);
        }
    }

    /// Nothing has come for longer than [`Scheduler::patience`].
    pub(super) fn silent(&mut self) {
        if self.silent {
            return;
        }
        self.silent = true;
        let mut state = self.scheduler.lock();
        state.on_their_way = state.on_their_way.saturating_sub(self.left);
        state.silent += 1;
        if let Some(active) = state.active(&self.layer) {
            active.silent += 1;
        }
        drop(state);
        self.scheduler.wake();
    }

    fn speaks(&mut self, state: &mut State) {
        if !self.silent {
            return;
        }
        self.silent = false;
        state.on_their_way += self.left;
        state.silent = state.silent.saturating_sub(1);
        if let Some(active) = state.active(&self.layer) {
            active.silent = active.silent.saturating_sub(1);
        }
    }

    /// `bytes` arrived.
    pub(super) fn arrived(&mut self, bytes: u64) {
        let scheduler = self.scheduler.clone();
        let room = {
            let mut state = scheduler.lock();
            self.speaks(&mut state);
            let bytes = bytes.min(self.left);
            self.left -= bytes;
            state.on_their_way = state.on_their_way.saturating_sub(bytes);
            state.window.arrived(bytes, Instant::now());
            state.on_their_way < state.window.bytes() * EASE
        };
        if room {
            scheduler.wake();
        }
    }
}

impl Drop for OnTheirWay {
    fn drop(&mut self) {
        let scheduler = self.scheduler.clone();
        {
            let mut state = scheduler.lock();
            self.speaks(&mut state);
            state.on_their_way = state.on_their_way.saturating_sub(self.left);
        }
        scheduler.wake();
    }
}

#[cfg(test)]
#[path = "explored.rs"]
mod explored;
