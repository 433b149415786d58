//! The locks whose interleavings are explored: std's, and in the unit tests that say so, shuttle's.
//!
//! [`explore`] runs a test many times, each time with another order of its threads' steps: at every lock, another thread may go on. A thread that waits
//! for ever in one of these orders is found as a deadlock. Locks made outside of it are std's, so all other tests are as they were.
#![forbid(unsafe_code)]

#[cfg(not(test))]
pub use std::sync::{Mutex, MutexGuard};

#[cfg(test)]
pub use explored::{Mutex, MutexGuard, explore};

#[cfg(test)]
mod explored {
    use shuttle::scheduler::{PctScheduler, RandomScheduler};
    use std::cell::Cell;
    use std::ops::{Deref, DerefMut};
    use std::sync::{LockResult, PoisonError};

    thread_local! {
        /// All threads of an exploration are one thread of the system.
        static EXPLORING: Cell<bool> = const { Cell::new(false) };
    }

    /// Of each explored thread. Some of ours build large values on it, in code that is not optimised.
    const STACK: usize = 1 << 20;

    /// Runs `test` in that many orders: half of them chosen at random, half with few switches at random places. `SOCI_EXPLORE=100` makes it a
    /// hundred times as many.
    pub fn explore(test: impl Fn() + Send + Sync + Clone + 'static, times: usize) {
        let within = move || {
            // Leaves the flag as it was when the order ends in a panic, too.
            struct Back(bool);
            impl Drop for Back {
                fn drop(&mut self) {
                    EXPLORING.set(self.0);
                }
            }
            let _back = Back(EXPLORING.replace(true));
            test();
        };
        let more = std::env::var("SOCI_EXPLORE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
        let times = times * more;
        let mut config = shuttle::Config::new();
        config.stack_size = STACK;
        shuttle::Runner::new(RandomScheduler::new(times / 2), config.clone()).run(within.clone());
        shuttle::Runner::new(PctScheduler::new(3, times / 2), config).run(within);
    }

    pub enum Mutex<T> {
        Plain(std::sync::Mutex<T>),
        Explored(shuttle::sync::Mutex<T>),
    }

    pub enum MutexGuard<'a, T> {
        Plain(std::sync::MutexGuard<'a, T>),
        Explored(shuttle::sync::MutexGuard<'a, T>),
    }

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Mutex<T> {
            match EXPLORING.get() {
                true => Mutex::Explored(shuttle::sync::Mutex::new(value)),
                false => Mutex::Plain(std::sync::Mutex::new(value)),
            }
        }

        pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
            match self {
                Mutex::Plain(lock) => {
                    lock.lock().map(MutexGuard::Plain).map_err(|e| PoisonError::new(MutexGuard::Plain(e.into_inner())))
                }
                Mutex::Explored(lock) => lock
                    .lock()
                    .map(MutexGuard::Explored)
                    .map_err(|e| PoisonError::new(MutexGuard::Explored(e.into_inner()))),
            }
        }
    }

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Mutex<T> {
            Mutex::new(T::default())
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            match self {
                MutexGuard::Plain(guard) => guard,
                MutexGuard::Explored(guard) => guard,
            }
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            match self {
                MutexGuard::Plain(guard) => guard,
                MutexGuard::Explored(guard) => guard,
            }
        }
    }
}
