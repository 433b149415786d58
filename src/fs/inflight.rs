//! Reads that wait in a task, by the kernel's request number, so that an interrupt can end them.
//!
//! Invariant: a read is answered by whoever takes its entry out, so exactly once.
//!
//! An interrupt may overtake its request: one thread has read the request and not yet entered it here, another has read the
//! interrupt. Such interrupts are remembered and found by the request when it arrives; the others among them are late, for
//! requests that were answered in the meantime, and fall out of the bounded memory. (Request numbers are never reused.)

use super::journal::Slot;
use crate::sync::{Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use std::sync::PoisonError;
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

    /// Reads are entered and answered, interrupted, and drained, in every order that chance finds: each is answered once, or left for the next process
    /// without an answer, and never both.
    #[test]
    fn shuttle_each_read_is_answered_once_or_left_to_the_next_process() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
        const READS: u64 = 4;
        // Never driven: the tasks only stand for work.
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let task = runtime.spawn(std::future::pending::<()>()).abort_handle();
        let body = move || {
            let inflight = Arc::new(Inflight::new());
            let answers: Arc<Vec<AtomicUsize>> = Arc::new((0..READS).map(|_| AtomicUsize::new(0)).collect());
            let stopping = Arc::new(AtomicBool::new(false));
            let answer = |unique: u64| {
                let (inflight, answers) = (inflight.clone(), answers.clone());
                move || {
                    if inflight.take(unique).is_some() {
                        answers[unique as usize / 2].fetch_add(1, Ordering::SeqCst);
                    }
                }
            };
            let mut threads = Vec::new();
            // Two threads that read the device, each with its requests; the work on a request begins before it is entered.
            for first in [0, 1] {
                let (inflight, stopping, task) = (inflight.clone(), stopping.clone(), task.clone());
                let works: Vec<_> = (first..READS).step_by(2).map(|n| (n * 2, answer(n * 2))).collect();
                threads.push(shuttle::thread::spawn(move || {
                    let mut begun = Vec::new();
                    for (unique, work) in works {
                        if stopping.load(Ordering::SeqCst) {
                            break;
                        }
                        let mut running = None;
                        let entered = inflight.enter(unique, || {
                            running = Some(shuttle::thread::spawn(work));
                            Waiting { task: task.clone(), pid: 7, slot: None }
                        });
                        begun.push((unique, entered, running.unwrap()));
                    }
                    begun.into_iter().map(|(unique, _, running)| (unique, running)).collect::<Vec<_>>()
                }));
            }
            // One that reads interrupts, and answers what it finds waiting.
            let (interrupted, interrupter) = (inflight.clone(), [answer(0), answer(2)]);
            let interrupter = shuttle::thread::spawn(move || {
                for (unique, end) in [0, 2].into_iter().zip(interrupter) {
                    if let Known::Waiting(7, None) = interrupted.interrupt(unique) {
                        end();
                    }
                }
            });
            // The end: nothing new is read, what is under way gets some time, the rest is left.
            stopping.store(true, Ordering::SeqCst);
            let begun: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
            for _ in 0..3 {
                if inflight.len() == 0 {
                    break;
                }
                shuttle::thread::yield_now();
            }
            let left = inflight.abandon();
            let entered = begun.len();
            begun.into_iter().for_each(|(_, running)| running.join().unwrap());
            interrupter.join().unwrap();
            let answered: Vec<usize> = answers.iter().map(|n| n.load(Ordering::SeqCst)).collect();
            assert!(answered.iter().all(|n| *n <= 1), "{answered:?}");
            assert_eq!(answered.iter().sum::<usize>() + left, entered, "{answered:?}");
            assert_eq!(inflight.len(), 0);
        };
        crate::sync::explore(body, 2000);
    }
}
