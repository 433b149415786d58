//! The same work for many things, several at a time.

use super::interrupt;
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

/// Does `work` for each of `items`, `most` at a time. After a failure nothing new is begun; the first failure is the result.
pub fn each<T: Sync, E: Send>(most: usize, items: &[T], work: impl Fn(&T) -> Result<(), E> + Sync) -> Result<(), E> {
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let failed = || failure.lock().unwrap_or_else(PoisonError::into_inner);
    let run = || {
        while failed().is_none() && interrupt::stopped().is_none() {
            let Some(item) = items.get(next.fetch_add(1, Relaxed)) else { break };
            if let Err(error) = work(item) {
                failed().get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..most.min(items.len()) {
            scope.spawn(run);
        }
        run();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_done_once_and_a_failure_ends_it() {
        let sum = AtomicUsize::new(0);
        each(3, &(0..100).collect::<Vec<usize>>(), |n| {
            sum.fetch_add(*n, Relaxed);
            Ok::<_, ()>(())
        })
        .unwrap();
        assert_eq!(sum.into_inner(), 4950);
        let done = AtomicUsize::new(0);
        let failed = each(2, &[0; 1000], |_| if done.fetch_add(1, Relaxed) == 5 { Err("six") } else { Ok(()) });
        assert_eq!(failed, Err("six"));
        assert!(done.into_inner() < 20);
    }
}
