//! How many requests for layers are in flight at a time.
//!
//! Nothing is to be tuned: the number climbs while more requests bring more bytes, goes back when they do not, and is halved when a registry
//! says that it is too much. What the operator wrote down is a ceiling.
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
    in_flight: usize,
    waiting: usize,
    since: Option<Instant>,
    bytes: u64,
    /// At some moment of the slice there was room that nobody wanted.
    slack: bool,
}

/// The count of requests in flight, and its limit. Cheap to clone.
#[derive(Clone)]
pub struct Throttle(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    freed: Notify,
}

/// The right to one request.
pub struct Slot(Throttle);

impl Throttle {
    /// `most`: what the operator allows, if anything.
    pub fn new(most: Option<usize>) -> Throttle {
        let climb = Climb::new(most.unwrap_or(MOST).max(1));
        let state = State { climb, in_flight: 0, waiting: 0, since: None, bytes: 0, slack: false };
        Throttle(Arc::new(Inner { state: Mutex::new(state), freed: Notify::new() }))
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
                if state.in_flight < state.climb.limit {
                    state.in_flight += 1;
                    return Slot(self.clone());
                }
                if !waits.counted {
                    waits.counted = true;
                    state.waiting += 1;
                }
            }
            freed.await;
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
        self.0.lock().in_flight -= 1;
        self.0.0.freed.notify_one();
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
}
