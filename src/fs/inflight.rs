//! Reads that wait in a task, by the kernel's request number, so that an interrupt can end them.
//!
//! Invariant: a read is answered by whoever takes its entry out, so exactly once.
//!
//! An interrupt may overtake its request: one thread has read the request and not yet entered it here, another has read the
//! interrupt. Such interrupts are remembered and found by the request when it arrives; the others among them are late, for
//! requests that were answered in the meantime, and fall out of the bounded memory. (Request numbers are never reused.)

use super::journal::Slot;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::task::AbortHandle;

/// Threads that enter and take reads should rarely meet.
const SHARDS: usize = 64;
/// Interrupts remembered per shard; only as many as threads can be early, the rest is history.
const EARLY: usize = 64;

/// A read under way.
pub(super) struct Waiting {
    pub task: AbortHandle,
    /// The thread that asked.
    pub pid: u32,
    /// Where it is written down, on kernels that need that.
    pub slot: Option<Slot>,
}

/// What is known about the request an interrupt names.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// It waits, on behalf of that thread.
    Waiting(u32, Option<Slot>),
    /// It is on its way, or over, or was read by a process that died.
    Unknown,
}

/// Whether an interrupt came before the request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entered {
    Quietly,
    Interrupted,
}

#[derive(Default)]
struct Shard {
    waiting: HashMap<u64, Waiting>,
    early: VecDeque<u64>,
}

pub(super) struct Inflight {
    /// Each lock is held for one map operation, or for spawning one task.
    shards: [Mutex<Shard>; SHARDS],
}

impl Inflight {
    pub fn new() -> Inflight {
        Inflight { shards: std::array::from_fn(|_| Mutex::default()) }
    }

    fn shard(&self, unique: u64) -> MutexGuard<'_, Shard> {
        // Requests have even numbers.
        self.shards[(unique / 2) as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a read and enters it; its task cannot take the entry before it is there.
    pub fn enter(&self, unique: u64, start: impl FnOnce() -> Waiting) -> Entered {
        let mut shard = self.shard(unique);
        let early = shard.early.iter().position(|interrupted| *interrupted == unique);
        let waiting = start();
        shard.waiting.insert(unique, waiting);
        match early {
            Some(at) => {
                shard.early.remove(at);
                Entered::Interrupted
            }
            None => Entered::Quietly,
        }
    }

    /// Whoever gets the entry answers the request.
    pub fn take(&self, unique: u64) -> Option<Waiting> {
        self.shard(unique).waiting.remove(&unique)
    }

    /// An interrupt came for that request.
    pub fn interrupt(&self, unique: u64) -> Known {
        let mut shard = self.shard(unique);
        if let Some(waiting) = shard.waiting.get(&unique) {
            return Known::Waiting(waiting.pid, waiting.slot);
        }
        if shard.early.len() == EARLY {
            shard.early.pop_front();
        }
        shard.early.push_back(unique);
        Known::Unknown
    }

    pub fn contains(&self, unique: u64) -> bool {
        self.shard(unique).waiting.contains_key(&unique)
    }

    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).waiting.len()).sum()
    }

    /// Ends all reads without answering them: the next process will.
    pub fn abandon(&self) -> usize {
        let mut abandoned = 0;
        for shard in &self.shards {
            let waiting = std::mem::take(&mut shard.lock().unwrap_or_else(PoisonError::into_inner).waiting);
            abandoned += waiting.len();
            waiting.values().for_each(|waiting| waiting.task.abort());
        }
        abandoned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(pid: u32) -> Waiting {
        Waiting { task: tokio::spawn(std::future::pending::<()>()).abort_handle(), pid, slot: None }
    }

    #[tokio::test]
    async fn an_interrupt_finds_its_request_whichever_comes_first() {
        let inflight = Inflight::new();
        assert_eq!(inflight.enter(2, || waiting(7)), Entered::Quietly);
        assert_eq!(inflight.interrupt(2), Known::Waiting(7, None));
        assert_eq!(inflight.interrupt(4), Known::Unknown);
        assert_eq!(inflight.enter(4, || waiting(7)), Entered::Interrupted);
        assert_eq!(inflight.len(), 2);
    }

    #[tokio::test]
    async fn an_entry_is_taken_once() {
        let inflight = Inflight::new();
        inflight.enter(2, || waiting(7));
        assert!(inflight.contains(2) && inflight.take(2).is_some());
        assert!(!inflight.contains(2) && inflight.take(2).is_none());
    }

    #[tokio::test]
    async fn interrupts_of_requests_that_are_over_are_forgotten_in_time() {
        let inflight = Inflight::new();
        (0..100_000).for_each(|unique| {
            inflight.interrupt(unique * 2);
        });
        assert!(inflight.shards.iter().all(|shard| shard.lock().unwrap().early.len() <= EARLY));
        assert_eq!(inflight.enter(2, || waiting(7)), Entered::Quietly);
        assert_eq!(inflight.enter(199_998, || waiting(7)), Entered::Interrupted);
    }

    #[tokio::test]
    async fn abandoned_reads_are_not_there_to_be_answered() {
        let inflight = Inflight::new();
        (0..10).for_each(|unique| {
            inflight.enter(unique * 2, || waiting(7));
        });
        assert_eq!((inflight.abandon(), inflight.len()), (10, 0));
        assert!(inflight.take(2).is_none());
    }
}
