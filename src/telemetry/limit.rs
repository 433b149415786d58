//! Saying something once, or once in a while.
#![forbid(unsafe_code)]

use std::{
    collections::HashSet,
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Remembers what was said already.
#[derive(Debug)]
pub struct Once<K> {
    /// Leaf lock.
    said: Mutex<HashSet<K>>,
}

/// Keys remembered before starting over. What bounds the memory costs a repeated line in the worst case.
const MOST_KEYS: usize = 4096;

impl<K> Default for Once<K> {
    fn default() -> Once<K> {
        Once { said: Mutex::default() }
    }
}

impl<K: Eq + Hash> Once<K> {
    pub fn new() -> Once<K> {
        Once::default()
    }

    /// Whether `key` comes up for the first time.
    pub fn is_first(&self, key: K) -> bool {
        let mut said = lock(&self.said);
        if said.len() >= MOST_KEYS && !said.contains(&key) {
            said.clear();
        }
        said.insert(key)
    }

    /// Lets `key` be said again, because what it was about has changed.
    pub fn forget(&self, key: &K) {
        lock(&self.said).remove(key);
    }
}

/// Lets one event through per period and counts the others.
#[derive(Debug)]
pub struct Limiter {
    period: Duration,
    /// Leaf lock.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    suppressed: u64,
}

/// An event that may be reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// Events since the last one that was let through.
    pub suppressed: u64,
}

impl Limiter {
    pub const fn new(period: Duration) -> Limiter {
        Limiter { period, state: Mutex::new(State { last: None, suppressed: 0 }) }
    }

    /// Counts an event; `Some` if it is the one to be reported.
    pub fn allow(&self) -> Option<Allowed> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<Allowed> {
        let mut state = lock(&self.state);
        match state.last {
            Some(last) if now.saturating_duration_since(last) < self.period => {
                state.suppressed += 1;
                None
            }
            _ => {
                state.last = Some(now);
                Some(Allowed { suppressed: std::mem::take(&mut state.suppressed) })
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Both states are valid at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_event_per_period_is_let_through_and_the_others_are_counted() {
        let limiter = Limiter::new(Duration::from_secs(60));
        let start = Instant::now();
        assert_eq!(limiter.allow_at(start), Some(Allowed { suppressed: 0 }));
        for second in 1..60 {
            assert_eq!(limiter.allow_at(start + Duration::from_secs(second)), None);
        }
        assert_eq!(limiter.allow_at(start + Duration::from_secs(60)), Some(Allowed { suppressed: 59 }));
    }

    #[test]
    fn a_key_is_first_once_until_it_is_forgotten_and_memory_is_bounded() {
        let once = Once::new();
        assert!(once.is_first(0));
        assert!(!once.is_first(0));
        once.forget(&0);
        assert!(once.is_first(0));
        for key in 1..10_000 {
            assert!(once.is_first(key));
        }
        assert!(once.said.lock().expect("lock").len() <= MOST_KEYS);
    }
}
