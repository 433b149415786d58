//! How many requests for layers are in flight at a time, of all who download: pulls, readers of lazy layers, and the background.
//!
//! Nothing is to be tuned: the number climbs while more requests bring more bytes, goes back when they do not, and is halved when a registry
//! says that it is too much. What the operator wrote down is a ceiling, for pulls and the background together.
//!
//! Who waits for a read comes first: it is never held back, it counts, and while it is in flight pulls send few requests and take what comes
//! slowly ([`Throttle::give_way`]), so that the link is the reader's.
//!
//! [`Climb`] decides, without a clock; [`Throttle`] counts.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// At first: enough that slow start of each connection does not show, few enough for any registry.
const START: usize = 4;
/// More than this has never been seen to help a link, and registries limit connections.
const MOST: usize = 16;
/// How long a rate is measured.
const SLICE: Duration = Duration::from_millis(300);
/// More requests are worth it when they bring this much more.
const GROWTH: f64 = 1.08;
/// Slices without a new attempt after one that brought nothing: links change within minutes, not within seconds.
const REST: u32 = 20;
/// Slices without a new attempt after a registry has complained.
const LONG_REST: u32 = 100;
/// Requests of pulls while somebody waits for a read.
const BESIDE_READERS: usize = 2;
/// How long a pull waits before it takes the next bytes, while somebody waits for a read: enough for the connections' buffers to fill and the
/// others to stop sending, short enough that a pull never stands still.
const GIVE_WAY: Duration = Duration::from_millis(100);
/// Of so long …
const TURN: Duration = Duration::from_millis(1250);
/// … pulls give way for so long, and share the link for the rest: a container that reads without end must not stop them.
const READERS_SHARE: Duration = Duration::from_secs(1);
/// A read that has waited this long has other trouble than the link.
const READERS_HURRY: Duration = Duration::from_secs(2);

/// The decision.
#[derive(Debug)]
struct Climb {
    limit: usize,
    most: usize,
    /// The limit and the rate before the last step up.
    before: Option<(usize, f64)>,
    rest: u32,
}

impl Climb {
    fn new(most: usize) -> Climb {
        Climb { limit: START.min(most), most, before: None, rest: 0 }
    }

    /// A slice is over: bytes per second, and whether all requests that were allowed were in flight.
    fn slice(&mut self, rate: f64, full: bool) {
        if !full {
            // It says nothing about the limit.
            self.before = None;
            return;
        }
        match self.before.take() {
            Some((limit, earlier)) if rate < earlier * GROWTH => {
                self.limit = limit;
                self.rest = REST;
                return;
            }
            _ => {}
        }
        if self.rest > 0 {
            self.rest -= 1;
        } else if self.limit < self.most {
            self.before = Some((self.limit, rate));
            self.limit = (self.limit + 2).min(self.most);
        }
    }

    /// The registry said 429 or 503.
    fn complaint(&mut self) {
        // Of requests that were refused together, one counts.
        if self.rest < LONG_REST - 3 {
            self.limit = (self.limit / 2).max(1);
        }
        self.before = None;
        self.rest = LONG_REST;
    }
}

struct State {
    climb: Climb,
    /// Requests of pulls and of the background.
    in_flight: usize,
    /// Requests that somebody's read waits for, and when the last of them began.
    readers: usize,
    read: Option<Instant>,
    waiting: usize,
    since: Option<Instant>,
    bytes: u64,
    /// At some moment of the slice there was room that nobody wanted.
    slack: bool,
}

/// The count of requests in flight, and its limit. Cheap to clone.
#[derive(Clone)]
pub struct Throttle(Arc<Inner>);

impl State {
    fn is_read(&self) -> bool {
        self.readers > 0 && self.read.is_some_and(|at| at.elapsed() < READERS_HURRY)
    }

    /// How many requests pulls and the background may have in flight.
    fn limit(&self) -> usize {
        // The operator's ceiling is about the registry: to that they all are the same.
        let left = self.climb.most.saturating_sub(self.readers).max(1);
        let limit = self.climb.limit.min(left);
        if self.is_read() { limit.min(BESIDE_READERS) } else { limit }
    }
}

struct Inner {
    state: Mutex<State>,
    freed: Notify,
    /// Whose turn it is follows from the time since then.
    begun: Instant,
    /// The operator has set a limit.
    is_limited: bool,
}

/// The right to one request; empty where nobody counts.
pub struct Slot(Option<Throttle>);

/// A request that a read waits for.
pub struct Reading(Throttle);

impl Throttle {
    /// `most`: what the operator allows, if anything.
    pub fn new(most: Option<usize>) -> Throttle {
        let climb = Climb::new(most.unwrap_or(MOST).max(1));
        let state =
            State { climb, in_flight: 0, readers: 0, read: None, waiting: 0, since: None, bytes: 0, slack: false };
        let inner =
            Inner { state: Mutex::new(state), freed: Notify::new(), begun: Instant::now(), is_limited: most.is_some() };
        Throttle(Arc::new(inner))
    }

    /// What the operator allows, if that was said.
    pub fn ceiling(&self) -> Option<usize> {
        self.0.is_limited.then(|| self.lock().climb.most)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for one more.
    pub async fn slot(&self) -> Slot {
        let mut waits = Waits { throttle: self, counted: false };
        loop {
            let mut freed = std::pin::pin!(self.0.freed.notified());
            // From here on a slot that is freed is heard of, each by one who waits.
            freed.as_mut().enable();
            {
                let mut state = self.lock();
                if state.in_flight < state.limit() {
                    state.in_flight += 1;
                    return Slot(Some(self.clone()));
                }
                if !waits.counted {
                    waits.counted = true;
                    state.waiting += 1;
                }
            }
            // Time alone ends the hurry of a read.
            let _ = tokio::time::timeout(READERS_HURRY, freed).await;
        }
    }

    /// A slot for what nobody waits for, if there is room and nobody else wants it. Without the operator's limit there is always: the background
    /// knows by itself when to stop.
    pub fn background(&self) -> Option<Slot> {
        if !self.0.is_limited {
            return Some(Slot(None));
        }
        let mut state = self.lock();
        if state.waiting > 0 || state.in_flight >= state.limit() {
            return None;
        }
        state.in_flight += 1;
        Some(Slot(Some(self.clone())))
    }

    /// A request is sent that somebody's read waits for.
    pub fn reading(&self) -> Reading {
        let mut state = self.lock();
        state.readers += 1;
        state.read = Some(Instant::now());
        drop(state);
        Reading(self.clone())
    }

    /// Before a pull takes more bytes: leaves the link to a read that waits, for a moment.
    pub async fn give_way(&self) {
        if is_readers_turn(self.0.begun.elapsed()) && self.lock().is_read() {
            tokio::time::sleep(GIVE_WAY).await;
        }
    }

    /// `bytes` of a layer arrived.
    pub fn arrived(&self, bytes: u64) {
        let now = Instant::now();
        let mut state = self.lock();
        state.bytes += bytes;
        state.slack |= state.waiting == 0;
        let Some(since) = state.since else {
            (state.since, state.bytes) = (Some(now), 0);
            return;
        };
        let passed = now.saturating_duration_since(since);
        if passed < SLICE {
            return;
        }
        let (rate, full) = (state.bytes as f64 / passed.as_secs_f64(), !state.slack);
        let before = state.climb.limit;
        // A pause in between is nobody's rate.
        state.climb.slice(rate, full && passed < SLICE * 4);
        (state.since, state.bytes, state.slack) = (Some(now), 0, false);
        let more = state.climb.limit.saturating_sub(before);
        drop(state);
        (0..more).for_each(|_| self.0.freed.notify_one());
    }

    /// A registry asked for fewer requests.
    pub fn complaint(&self) {
        self.lock().climb.complaint();
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.lock().readers -= 1;
        self.0.0.freed.notify_one();
    }
}

/// Whether pulls give way to reads, so long after the beginning.
fn is_readers_turn(elapsed: Duration) -> bool {
    elapsed.as_micros() % TURN.as_micros() < READERS_SHARE.as_micros()
}

/// Somebody waits; forgotten when the wait ends, however it ends.
struct Waits<'a> {
    throttle: &'a Throttle,
    counted: bool,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if self.counted {
            self.throttle.lock().waiting -= 1;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Slot(Some(throttle)) = self else { return };
        throttle.lock().in_flight -= 1;
        throttle.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rates of a link that carries `link`, and gives each request at most `each`.
    fn settle(climb: &mut Climb, link: f64, each: f64) -> usize {
        for _ in 0..100 {
            let rate = (climb.limit as f64 * each).min(link);
            climb.slice(rate, true);
        }
        climb.limit
    }

    #[test]
    fn it_climbs_while_that_helps_and_no_further() {
        assert_eq!(settle(&mut Climb::new(MOST), 1e9, 1e9), START, "one request fills the link");
        assert!(settle(&mut Climb::new(MOST), 100e6, 10e6) >= 10, "ten requests fill it");
        assert_eq!(settle(&mut Climb::new(MOST), 1e9, 1e6), MOST);
        assert_eq!(settle(&mut Climb::new(2), 1e9, 1e6), 2, "the operator's ceiling");
    }

    #[test]
    fn complaints_are_heard_once_and_remembered() {
        let mut climb = Climb::new(MOST);
        settle(&mut climb, 1e9, 1e6);
        (0..10).for_each(|_| climb.complaint());
        assert_eq!(climb.limit, MOST / 2);
        climb.slice(1e6, true);
        assert_eq!(climb.limit, MOST / 2);
        for _ in 0..20 {
            climb.complaint();
            (0..50).for_each(|_| climb.slice(1e6, true));
        }
        assert_eq!(climb.limit, 1);
    }

    #[test]
    fn slices_that_were_not_full_prove_nothing() {
        let mut climb = Climb::new(MOST);
        for _ in 0..100 {
            climb.slice(1e6, false);
        }
        assert_eq!(climb.limit, START);
    }

    #[tokio::test]
    async fn slots_are_handed_on() {
        let throttle = Throttle::new(Some(1));
        let first = throttle.slot().await;
        let waiting = tokio::spawn({
            let throttle = throttle.clone();
            async move { drop(throttle.slot().await) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(first);
        waiting.await.unwrap();
        // Who stops waiting is forgotten.
        let held = throttle.slot().await;
        let given_up = tokio::time::timeout(Duration::from_millis(10), throttle.slot()).await;
        assert!(given_up.is_err());
        assert_eq!(throttle.lock().waiting, 0);
        drop(held);
    }

    #[tokio::test]
    async fn a_pull_leaves_the_link_to_a_read_and_does_not_stand_still() {
        let throttle = Throttle::new(None);
        let reading = throttle.reading();
        let slots = [throttle.slot().await, throttle.slot().await];
        let third = tokio::time::timeout(Duration::from_millis(50), throttle.slot()).await;
        assert!(third.is_err(), "two beside a reader");
        let start = Instant::now();
        while !is_readers_turn(throttle.0.begun.elapsed()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        throttle.give_way().await;
        assert!(start.elapsed() >= GIVE_WAY);
        assert!(is_readers_turn(TURN) && !is_readers_turn(TURN - Duration::from_millis(1)));
        drop(reading);
        let third = throttle.slot().await;
        let at_once = throttle.give_way();
        assert!(futures::FutureExt::now_or_never(at_once).is_some());
        drop((slots, third));
    }

    #[tokio::test]
    async fn the_ceiling_is_for_all_and_readers_go_through_it() {
        let throttle = Throttle::new(Some(2));
        let background = throttle.background().unwrap();
        let pull = throttle.slot().await;
        assert!(throttle.background().is_none());
        let readers = [throttle.reading(), throttle.reading(), throttle.reading()];
        drop(background);
        let waits = tokio::time::timeout(Duration::from_millis(20), throttle.slot()).await;
        assert!(waits.is_err(), "readers count");
        drop(readers);
        let second = throttle.slot().await;
        drop((pull, second));
        let unlimited = Throttle::new(None);
        let all: Vec<_> = (0..50).map(|_| unlimited.background().unwrap()).collect();
        drop((unlimited.slot().await, all));
    }
}
