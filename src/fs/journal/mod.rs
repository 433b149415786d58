//! The requests that were taken off the device and not answered yet, in memory that outlives the process.
//!
//! For kernels that cannot repeat them (before Linux 6.9 there is no `FUSE_NOTIFY_RESEND`): what a process has read from the device and takes
//! along into its death, nobody would ever answer. So requests are read *into* a shared file, which `soci-mount` and systemd's descriptor store
//! keep like the device itself, and the next daemon answers what it finds there.
//!
//! ```text
//!                 read(2)                              has to wait for content
//!   device ───────────────▶ landing (one per thread) ─────────────────────────▶ record (one per waiting read)
//!                              │ answered at once: emptied                         │ answered: freed
//! ```
//!
//! **Guaranteed**, wherever the process is killed: every request that the kernel has handed out and that is not answered is in a landing or in a
//! record, whole. (Bytes of a request are in the landing before `read(2)` returns, with its length first, and a process is not killed in
//! the middle of it. A record's number is written after its content, and only then is the landing emptied; stores of a thread before the
//! point where it is killed are done, those after it are not.)
//!
//! **Not guaranteed, and harmless:**
//! * *Answered, and still here* (killed between the answer and the next store): it is answered again. The kernel never uses a number twice,
//!   and refuses an answer for a number it does not wait for (ENOENT). Answers change nothing but metrics.
//! * *In a landing and in a record*: once is enough, the record is the one.
//! * *A landing that is not whole*: the kernel found no memory to finish the copy. It has then ended the request itself, and see above.
//! * *FORGET* takes no answer and we count nothing.
//! * *INTERRUPT* says it once. Which record it was about is noted there before its landing is emptied. One that came before its request was
//!   entered is only in the memory of the process: so reads found in landings count as interrupted. That costs a look at their
//!   readers' signals, no more (see `session`).
//! * *Two processes at once* is what the lock on the root directory excludes, which the kernel releases with the last thread of a dead
//!   daemon. If it happened they would answer the same things, and see above.
//! * *More reads waiting than there are records*: threads then wait with what they have in their landing, and the kernel keeps the rest.
//! * *All three keepers dead at once*: the mount is lost with the device, so nobody waits any more.
//!
//! The file's first word says of what version it is. One of another version is left alone: [`JournalError::Version`].

use super::wire::{InHeader, Operation, Request};
use crate::sys::shared::SharedMemory;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `"socijrn"` and a version, which is raised when anything below changes its place or meaning.
const MAGIC: u64 = u64::from_be_bytes(*b"socijrn\0");
const VERSION: u64 = 1;

/// Words (of eight bytes) before the landings: which version, and how many records were ever used. A page.
const HEADER: usize = 512;
const VERSION_AT: usize = 0;
const USED_AT: usize = 1;
/// Threads that may take requests.
pub const LANDINGS: usize = 64;
/// Of one landing: 8 KiB, `FUSE_MIN_READ_BUFFER`; more than the 4 KiB and a header that `MAX_WRITE` lets a request have.
const LANDING: usize = 1024;
/// As many as requests of the background the kernel has on the way (`MAX_BACKGROUND`).
const RECORDS: usize = 65_536;
/// Of one record: a cache line. State, number, node, offset, size, thread.
const RECORD: usize = 8;
const RECORDS_AT: usize = HEADER + LANDINGS * LANDING;

/// Length of the shared file, in bytes. What was never used takes no memory.
pub const SIZE: usize = (RECORDS_AT + RECORDS * RECORD) * 8;

const FREE: u64 = 0;
const WAITING: u64 = 1;
const INTERRUPTED: u64 = 2;

/// Why what the dead process had taken cannot be known.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("cannot map the journal of requests")]
    Map(#[from] io::Error),
    #[error("the journal of requests is of version {found}, and this build knows version {VERSION}")]
    Version { found: u64 },
    #[error("the journal of requests has {found} bytes, and this build needs {SIZE}")]
    Size { found: usize },
}

/// Where the words are. A seam for the test that kills the process at every store.
pub trait Words {
    fn load(&self, index: usize) -> u64;
    /// Not before the stores that come before it.
    fn store(&self, index: usize, value: u64);
    fn copy(&self, first: usize, bytes: usize, into: &mut Vec<u8>);
}

impl Words for SharedMemory {
    fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }
    fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }
    fn copy(&self, first: usize, bytes: usize, into: &mut Vec<u8>) {
        SharedMemory::copy(self, first, bytes, into);
    }
}

/// A read that waits for content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakenRead {
    pub unique: u64,
    pub node: u64,
    pub pid: u32,
    pub offset: u64,
    pub size: u32,
}

impl TakenRead {
    /// `None` for any other request: those are answered without waiting.
    pub fn of(request: &Request<'_>) -> Option<TakenRead> {
        match request.operation {
            Operation::Read { offset, size } => {
                Some(TakenRead { unique: request.unique, node: request.node, pid: request.pid, offset, size })
            }
            _ => None,
        }
    }

    pub fn request(&self) -> Request<'static> {
        let operation = Operation::Read { offset: self.offset, size: self.size };
        Request { unique: self.unique, node: self.node, pid: self.pid, operation }
    }
}

/// A record in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u32);

/// What a process that is gone has left unanswered.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Reads that waited, and whether somebody does not want them any more.
    pub reads: Vec<(Slot, TakenRead, Wanted)>,
    /// Landings that hold something.
    pub landings: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Still,
    /// An INTERRUPT came.
    Perhaps,
}

/// The shared file, in use by this process.
#[derive(Debug)]
pub struct Journal<W = SharedMemory> {
    words: W,
    /// Also held while a record's state changes.
    free: Mutex<Free>,
    /// Whether somebody wrote here before us.
    inherited: bool,
}

#[derive(Debug)]
struct Free {
    again: Vec<u32>,
    /// Records from here on were never used.
    used: u32,
}

impl Journal {
    /// Uses `file`, which is as `sys::shared::create` made it with [`SIZE`], or as an earlier process left it.
    pub fn open(file: &OwnedFd) -> Result<Journal, JournalError> {
        let words = SharedMemory::map(file.as_fd())?;
        match words.words() * size_of::<AtomicU64>() {
            found if found < SIZE => Err(JournalError::Size { found }),
            _ => Journal::adopt(words),
        }
    }

    /// One request, read from the device into a landing; its bytes. None, if the kernel has none ([`io::ErrorKind::WouldBlock`]).
    pub fn take(&self, device: &OwnedFd, landing: usize, request: &mut Vec<u8>) -> io::Result<()> {
        self.words.fill(device, landing_at(landing), LANDING)?;
        self.landed(landing, request);
        Ok(())
    }
}

impl<W: Words> Journal<W> {
    fn adopt(words: W) -> Result<Journal<W>, JournalError> {
        let inherited = match words.load(VERSION_AT) {
            0 => {
                words.store(VERSION_AT, MAGIC | VERSION);
                false
            }
            found if found == MAGIC | VERSION => true,
            found if found & !0xff == MAGIC => return Err(JournalError::Version { found: found & 0xff }),
            found => return Err(JournalError::Version { found }),
        };
        let used = (words.load(USED_AT) as usize).min(RECORDS) as u32;
        let again = (0..used).rev().filter(|record| words.load(record_at(*record)) == FREE).collect();
        Ok(Journal { words, free: Mutex::new(Free { again, used }), inherited })
    }

    /// Whether an earlier process kept this journal: then nothing it took is missing.
    pub fn inherited(&self) -> bool {
        self.inherited
    }

    /// What is here before anything is taken.
    pub fn left(&self) -> Left {
        let used = self.free().used;
        let read = |record: u32| {
            let at = record_at(record);
            let wanted = match self.words.load(at) {
                WAITING => Wanted::Still,
                INTERRUPTED => Wanted::Perhaps,
                // Free, or nothing that we ever write.
                _ => return None,
            };
            let [unique, node, offset, size, pid] = [1, 2, 3, 4, 5].map(|word| self.words.load(at + word));
            let narrow = |value: u64| u32::try_from(value).unwrap_or(0);
            let read = TakenRead { unique, node, offset, size: narrow(size), pid: narrow(pid) };
            Some((Slot(record), read, wanted))
        };
        Left {
            reads: (0..used).filter_map(read).collect(),
            landings: (0..LANDINGS).filter(|landing| self.words.load(landing_at(*landing)) != 0).collect(),
        }
    }

    /// The request in a landing. Not a whole one, if the kernel could not finish it.
    pub fn landed(&self, landing: usize, request: &mut Vec<u8>) {
        request.clear();
        let at = landing_at(landing);
        self.words.copy(at, size_of::<InHeader>(), request);
        let len = request.first_chunk().map_or(0, |len| u32::from_ne_bytes(*len)) as usize;
        request.clear();
        self.words.copy(at, len.min(LANDING * 8), request);
    }

    /// What is in the landing is answered, or is in a record, or takes no answer.
    pub fn empty(&self, landing: usize) {
        // Length and kind: the first word of every request.
        self.words.store(landing_at(landing), 0);
    }

    /// Writes a read down that will be answered later; `None` while there is no room.
    pub fn keep(&self, read: &TakenRead) -> Option<Slot> {
        let mut free = self.free();
        let record = match free.again.pop() {
            Some(record) => record,
            None if (free.used as usize) < RECORDS => {
                let record = free.used;
                free.used += 1;
                self.words.store(USED_AT, u64::from(free.used));
                record
            }
            None => return None,
        };
        let at = record_at(record);
        let content = [read.unique, read.node, read.offset, read.size.into(), read.pid.into()];
        for (word, value) in (at + 1..).zip(content) {
            self.words.store(word, value);
        }
        self.words.store(at, WAITING);
        Some(Slot(record))
    }

    /// An INTERRUPT came for a read, perhaps just after its end.
    pub fn interrupted(&self, slot: Slot) {
        let _guard = self.free();
        if self.words.load(record_at(slot.0)) == WAITING {
            self.words.store(record_at(slot.0), INTERRUPTED);
        }
    }

    /// A read is answered.
    pub fn settle(&self, slot: Slot) {
        let mut free = self.free();
        self.words.store(record_at(slot.0), FREE);
        free.again.push(slot.0);
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn landing_at(landing: usize) -> usize {
    HEADER + landing % LANDINGS * LANDING
}

fn record_at(record: u32) -> usize {
    RECORDS_AT + record as usize * RECORD
}

#[cfg(test)]
mod tests;
