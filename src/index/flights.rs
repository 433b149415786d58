//! Searches under way and their results: one per key, shared by all who ask.
//!
//! ```text
//!            first who asks           found
//!   nothing ───────────────▶ Running ───────▶ Done
//!                  ▲            │ failed
//!     time is over │            ▼
//!                  └───────── Failed (believed ever longer)
//! ```
//!
//! A search is a task of its own: that whoever started it leaves does not end it. The state is changed before the
//! result is sent, and whoever waits took its receiver from the state under the lock, so no wake-up is lost. A search
//! that ends without a result (it panicked, or the runtime stops) closes the channel, and the next who asks starts anew.

use crate::registry::bounded::Bounded;
use std::{
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

/// How long failures are believed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Belief {
    /// The first; each later one twice as long as the one before.
    pub first: Duration,
    /// Any: how late it may be noticed that what failed would work now.
    pub longest: Duration,
}

enum State<T, E> {
    Running { result: watch::Receiver<Option<Result<T, E>>>, last_wait: Option<Duration> },
    Done(T),
    Failed { error: E, until: Instant, wait: Duration },
}

/// The states of all keys.
pub(super) struct Flights<K, T, E> {
    states: Arc<Mutex<Bounded<K, State<T, E>>>>,
    belief: Belief,
    aborted: fn() -> E,
}

impl<K, T, E> Flights<K, T, E>
where
    K: Eq + Hash + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
    E: Clone + Send + Sync + 'static,
{
    /// `aborted` makes the error for a search that ended without a result.
    pub fn new(capacity: usize, belief: Belief, aborted: fn() -> E) -> Flights<K, T, E> {
        Flights { states: Arc::new(Mutex::new(Bounded::new(capacity))), belief, aborted }
    }

    /// The result for `key`: remembered, of a search under way, or of the search that `start` makes.
    pub async fn get<S, F>(&self, key: K, start: S) -> Result<T, E>
    where
        S: FnOnce() -> F,
        F: Future<Output = Result<T, E>> + Send + 'static,
    {
        let mut receiver = match self.join(&key) {
            Joined::Known(result) => return result,
            Joined::Running(receiver) => receiver,
            Joined::Start { sender, receiver, last_wait } => {
                let (states, belief) = (self.states.clone(), self.belief);
                let search = start();
                tokio::spawn(async move {
                    let result = search.await;
                    let state = match &result {
                        Ok(found) => State::Done(found.clone()),
                        Err(error) => {
                            let wait = last_wait.map_or(belief.first, |last| (last * 2).min(belief.longest));
                            State::Failed { error: error.clone(), until: Instant::now() + wait, wait }
                        }
                    };
                    states.lock().unwrap_or_else(PoisonError::into_inner).insert(key, state);
                    // Nobody may be waiting any more.
                    let _ = sender.send(Some(result));
                });
                receiver
            }
        };
        match receiver.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or_else(|| Err((self.aborted)())),
            Err(_) => Err((self.aborted)()),
        }
    }

    /// Does `work` while nothing runs and forgets all results with it. None, and nothing is done, if something runs.
    pub fn forget_during<R>(&self, work: impl FnOnce() -> R) -> Option<R> {
        // Held: whoever wants to begin a search waits.
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let runs = |state: &State<T, E>| matches!(state, State::Running { result, .. } if result.has_changed().is_ok());
        if states.values().any(runs) {
            return None;
        }
        states.clear();
        Some(work())
    }

    fn join(&self, key: &K) -> Joined<T, E> {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let last_wait = match states.get(key) {
            Some(State::Done(found)) => return Joined::Known(Ok(found.clone())),
            Some(State::Failed { error, until, .. }) if Instant::now() < *until => {
                return Joined::Known(Err(error.clone()));
            }
            Some(State::Failed { wait, .. }) => Some(*wait),
            Some(State::Running { result, last_wait }) => {
                if result.has_changed().is_ok() {
                    return Joined::Running(result.clone());
                }
                *last_wait
            }
            None => None,
        };
        let (sender, receiver) = watch::channel(None);
        states.insert(key.clone(), State::Running { result: receiver.clone(), last_wait });
        Joined::Start { sender, receiver, last_wait }
    }
}

enum Joined<T, E> {
    Known(Result<T, E>),
    Running(watch::Receiver<Option<Result<T, E>>>),
    Start {
        sender: watch::Sender<Option<Result<T, E>>>,
        receiver: watch::Receiver<Option<Result<T, E>>>,
        last_wait: Option<Duration>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    type Numbers = Flights<&'static str, u32, &'static str>;

    const MS: Duration = Duration::from_millis(1);

    fn flights() -> Numbers {
        Flights::new(8, Belief { first: 40 * MS, longest: 100 * MS }, || "aborted")
    }

    #[tokio::test]
    async fn all_who_ask_share_one_search_and_it_survives_its_starter() {
        let flights = flights();
        let runs = Arc::new(AtomicU32::new(0));
        let search = || {
            let runs = runs.clone();
            move || async move {
                tokio::time::sleep(50 * MS).await;
                Ok(runs.fetch_add(1, Ordering::SeqCst) + 1)
            }
        };
        let starter = tokio::time::timeout(10 * MS, flights.get("k", search())).await;
        assert!(starter.is_err(), "the starter leaves");
        let (a, b) = tokio::join!(flights.get("k", search()), flights.get("k", search()));
        assert_eq!((a, b, flights.get("k", search()).await), (Ok(1), Ok(1), Ok(1)));
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn failures_are_believed_ever_longer_and_then_not() {
        let flights = flights();
        let fail = || async { Err("no") };
        let works = || async { Ok(7) };
        let mut believed = Vec::new();
        for _ in 0..3 {
            assert_eq!(flights.get("k", fail).await, Err("no"));
            let wait = flights.wait("k");
            believed.push(wait);
            assert_eq!(flights.get("k", works).await, Err("no"), "believed without asking");
            tokio::time::sleep(wait).await;
        }
        assert_eq!(believed, [40 * MS, 80 * MS, 100 * MS]);
        assert_eq!(flights.get("k", works).await, Ok(7));
    }

    impl Numbers {
        fn wait(&self, key: &'static str) -> Duration {
            match self.states.lock().unwrap().get(key) {
                Some(State::Failed { wait, .. }) => *wait,
                _ => panic!("not failed"),
            }
        }
    }

    #[tokio::test]
    async fn a_search_that_dies_is_started_anew() {
        let flights = flights();
        let dies = || async {
            if flights_never() {
                return Ok(0);
            }
            panic!("as if by a bug")
        };
        assert_eq!(flights.get("k", dies).await, Err("aborted"));
        assert_eq!(flights.get("k", || async { Ok(7) }).await, Ok(7));
    }

    fn flights_never() -> bool {
        std::hint::black_box(false)
    }
}
