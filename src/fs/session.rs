//! Serving one FUSE connection: threads that read requests, tasks that wait for content, and a way to stop without a trace.
//!
//! ```text
//!   /dev/fuse ──▶ thread 1…N ── everything but content ──▶ answered on the spot
//!   (one fd,        │  └────── content in memory ────────▶ answered on the spot
//!    shared)        └── content elsewhere ──▶ task ── read ──▶ answered from the task
//!                         INTERRUPT ──▶ watch: is the reader's thread dying? ──▶ task dropped, EINTR
//! ```
//!
//! A request about a layer that the tree expects ([`Tree::expect`]) waits in a task, too, and is handled when the layer has come.
//!
//! All threads share one descriptor. (Were it cloned per thread, closing a clone would abort the requests read through it.)
//! It is read without blocking, and awaited with `EPOLLEXCLUSIVE`, so that a request wakes one idle thread and
//! [`Session::stop`] wakes them all.
//!
//! Stopping: nothing new is read, reads under way get some time, what is left is dropped *without an answer*. The
//! connection stays open as long as anybody holds the descriptor, and the next session gets everything unanswered again
//! ([`Connection::Resumed`]): from the kernel, or where that cannot repeat it, out of the [`Journal`].
//!
//! Interrupts: the kernel sends one for *any* signal to a thread that waits for a single request, and once only. Ending a
//! page fault with EINTR because of a timer's signal would kill the program with SIGBUS; not ending it when the thread is
//! killed would leave a process that nothing can remove. So the thread's pending signals are looked at, until the read ends.

use super::answer::{self, Outcome};
use super::dying::is_dying;
use super::errno::{Errno, Refusal};
use super::inflight::{Entered, Inflight, Known, Waiting};
use super::journal::{self, Journal, Left, Slot, TakenRead, Wanted};
use super::observer::{FailedOp, Failure};
use super::read::{self, ReadError};
use super::tree::{Layer, Tree};
use super::wire::{self, InitParams, Request};
use crate::layers::toc::{Kind, Node};
use crate::layout::SnapshotId;
use crate::telemetry::catalog::say;
use bytes::Bytes;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::OFlags;
use std::collections::HashSet;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// How often a signalled reader is looked at. Its container is to be gone within a second of being killed.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// How often [`Session::stop`] looks whether reads have ended.
const DRAIN_INTERVAL: Duration = Duration::from_millis(5);
/// How often a thread that has nothing to do shows that it lives.
const BEAT: Duration = Duration::from_secs(2);
/// Between two looks whether the journal has room again.
const ROOM_INTERVAL: Duration = Duration::from_millis(5);
/// How long an interrupt for a request nobody knows may be early, where nothing is known of what a dead process read.
const ORPHAN_DELAY: Duration = Duration::from_secs(1);

/// Whether somebody served this connection before us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connection {
    First,
    /// There may be requests that our predecessor read and did not answer.
    Resumed,
}

/// How to serve.
#[derive(Debug)]
pub struct SessionOptions {
    /// Threads that read the device; one answers cold metadata at two thirds of the speed of four. At most [`journal::LANDINGS`].
    pub threads: usize,
    pub connection: Connection,
    /// Where requests are read into, on a kernel that cannot repeat them. Without it, what a process that dies has taken waits until its
    /// reader is killed.
    pub journal: Option<Journal>,
    /// How long a request waits for a layer that is expected. Then it fails with EIO.
    pub patience: Duration,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        let patience = Duration::from_secs(300);
        SessionOptions { threads: 4, connection: Connection::Resumed, journal: None, patience }
    }
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Reads that were dropped without an answer; the next session gets them again.
    pub unanswered: usize,
}

/// How often each thread was seen. One that has nothing to do shows itself every [`BEAT`]; none of them waits for a network.
#[derive(Debug, Clone)]
pub struct Pulse(Arc<[Beat]>);

#[derive(Debug)]
struct Beat {
    thread: String,
    seen: AtomicU64,
}

impl Beat {
    fn now(&self) {
        self.seen.fetch_add(1, Ordering::Relaxed);
    }
}

impl Pulse {
    fn new(threads: usize) -> Pulse {
        let beat = |number| Beat { thread: format!("fuse-{number}"), seen: AtomicU64::new(0) };
        Pulse((0..threads).map(beat).collect())
    }

    /// Each thread's name, and a number that changes as long as it lives.
    pub fn beats(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|beat| (&*beat.thread, beat.seen.load(Ordering::Relaxed)))
    }
}

/// Threads serving a connection. Dropping it stops them at once.
pub struct Session {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What the kernel keeps, seen from here.
#[derive(Clone)]
pub struct Kernel(Weak<Shared>);

impl Kernel {
    /// Has it drop the content of all files of a layer, also where it is mapped: the next access is a read. Blocks while files are being read.
    pub fn forget_content(&self, id: SnapshotId) {
        let Some(shared) = self.0.upgrade() else { return };
        let Some(layer) = shared.tree.get(id) else { return };
        for node in 0..layer.toc.len() {
            if layer.toc.node(node).is_some_and(|node| node.kind == Kind::Regular) {
                // Of most it has nothing, and says so.
                let _ = rustix::io::write(&shared.device, &wire::node_changed_notification(layer.node_id(node)));
            }
        }
    }
}

struct Shared {
    device: OwnedFd,
    init: InitParams,
    journal: Option<Journal>,
    /// Whether there may be requests that a dead process took and of which nothing is known.
    orphans: bool,
    pulse: Pulse,
    /// Requests that were taken before, and nobody has been told of.
    resumed: AtomicUsize,
    tree: Arc<Tree>,
    runtime: Handle,
    inflight: Inflight,
    stopping: AtomicBool,
    /// Readable once the session stops.
    wake: OwnedFd,
    patience: Duration,
    /// True once the kernel has closed the connection.
    closed: watch::Sender<bool>,
}

impl Session {
    /// Starts to serve `device`, on which the INIT handshake is over.
    pub fn start(
        device: OwnedFd,
        init: InitParams,
        tree: Arc<Tree>,
        runtime: Handle,
        options: SessionOptions,
    ) -> io::Result<Session> {
        // Of the open file, so shared with whoever else holds the descriptor; nobody else reads it.
        rustix::fs::fcntl_setfl(&device, rustix::fs::fcntl_getfl(&device)? | OFlags::NONBLOCK)?;
        let resumed = options.connection == Connection::Resumed;
        let threads = options.threads.clamp(1, journal::LANDINGS);
        let known = init.can_resend() || options.journal.as_ref().is_some_and(Journal::inherited);
        let shared = Arc::new(Shared {
            device,
            init,
            journal: options.journal,
            orphans: resumed && !known,
            pulse: Pulse::new(threads),
            resumed: AtomicUsize::new(0),
            tree,
            runtime,
            inflight: Inflight::new(),
            stopping: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            patience: options.patience,
            closed: watch::channel(false).0,
        });
        let mut session = Session { shared: shared.clone(), threads: Vec::new() };
        if let Some(journal) = &shared.journal {
            shared.answer_what_was_left(journal);
        }
        for number in 0..options.threads.clamp(1, journal::LANDINGS) {
            let (shared, poll) = (shared.clone(), Poll::new(&shared)?);
            let thread = std::thread::Builder::new()
                .name(format!("fuse-{number}"))
                .spawn(move || shared.serve(number, &poll))?;
            session.threads.push(thread);
        }
        if resumed && init.can_resend() {
            match rustix::io::write(&shared.device, &wire::resend_notification()) {
                Ok(_) => {}
                Err(Errno::NODEV) => shared.close(),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(session)
    }

    /// Drops the kernel's cached listing of the mount's root, after layers came or went.
    pub fn root_changed(&self) {
        // Not cached, or not mounted: nothing to drop.
        let _ = rustix::io::write(&self.shared.device, &wire::root_changed_notification());
    }

    /// A way to have the kernel forget.
    pub fn kernel(&self) -> Kernel {
        Kernel(Arc::downgrade(&self.shared))
    }

    /// Shows whether the threads live.
    pub fn pulse(&self) -> Pulse {
        self.shared.pulse.clone()
    }

    /// Reads that wait for content.
    pub fn waiting(&self) -> usize {
        self.shared.inflight.len()
    }

    /// Ends when the kernel has closed the connection: unmounted or aborted.
    pub async fn closed(&self) {
        let mut closed = self.shared.closed.subscribe();
        // The sender lives as long as `self`.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Reads nothing new, gives reads that wait until `patience` is over, and leaves the mount as it is. Blocks.
    pub fn stop(mut self, patience: Duration) -> Drained {
        self.join();
        let deadline = Instant::now() + patience;
        while self.shared.inflight.len() > 0 && Instant::now() < deadline && !*self.shared.closed.borrow() {
            std::thread::sleep(DRAIN_INTERVAL);
        }
        Drained { unanswered: self.shared.inflight.abandon() }
    }

    fn join(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Fails only if the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended, too.
            let _ = thread.join();
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.join();
        self.shared.inflight.abandon();
    }
}

/// Whether a request needs its landing no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handled {
    Done,
    /// The session stops before there was room for it.
    NotNow,
    /// It is about this snapshot's layer, which is expected.
    Expected(SnapshotId),
}

/// A request that waits for its layer.
enum Kept {
    /// As it came.
    Bytes(Box<[u8]>),
    /// As it was written down.
    Read(TakenRead),
}

impl Kept {
    fn request(&self) -> Option<Request<'_>> {
        match self {
            Kept::Bytes(bytes) => Request::parse(bytes).ok(),
            Kept::Read(read) => Some(read.request()),
        }
    }
}

/// Waits for a request or for the end of the session. One per thread, as exclusive wake-ups need.
struct Poll(OwnedFd);

impl Poll {
    fn new(shared: &Shared) -> io::Result<Poll> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let any = epoll::EventData::new_u64(0);
        epoll::add(&poll, &shared.device, any, epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE)?;
        epoll::add(&poll, &shared.wake, any, epoll::EventFlags::IN)?;
        Ok(Poll(poll))
    }

    fn wait(&self) {
        let mut event = [std::mem::MaybeUninit::uninit(); 1];
        let limit = rustix::event::Timespec { tv_sec: BEAT.as_secs() as i64, tv_nsec: 0 };
        // Whatever woke us, the device is read next.
        let _ = epoll::wait(&self.0, &mut event[..], Some(&limit));
    }
}

impl Shared {
    fn close(&self) {
        self.closed.send_replace(true);
    }

    fn serve(self: &Arc<Shared>, number: usize, poll: &Poll) {
        let mut request = vec![0; self.init.read_buffer_len()];
        let mut buffer = Vec::new();
        while !self.stopping.load(Ordering::SeqCst) {
            self.pulse.0[number].now();
            let taken = match &self.journal {
                Some(journal) => journal.take(&self.device, number, &mut request).map(|()| request.len()),
                None => rustix::io::read(&self.device, &mut request[..]).map_err(Into::into),
            };
            match taken {
                Ok(len) => self.handle_in(number, &request[..len], &mut buffer),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => {
                        self.tell_resumed();
                        poll.wait();
                    }
                    // NOENT: the request was given up while it was being read.
                    Some(Errno::INTR | Errno::NOENT) => {}
                    Some(Errno::NODEV | Errno::CONNABORTED) => return self.close(),
                    _ => {
                        say!(FuseBroken, %error, "cannot read FUSE requests");
                        return self.close();
                    }
                },
            }
        }
    }

    /// Requests that a process before us took are in the journal; the kernel will not send them again.
    fn answer_what_was_left(self: &Arc<Shared>, journal: &Journal) {
        let Left { reads, landings } = journal.left();
        let known: HashSet<u64> = reads.iter().map(|(_, read, _)| read.unique).collect();
        let mut buffer = Vec::new();
        for (slot, read, wanted) in reads {
            self.resumed.fetch_add(1, Ordering::Relaxed);
            if let Handled::Expected(id) = self.handle(&read.request(), &mut buffer, Some(slot)) {
                self.wait_for_layer(id, Kept::Read(read), Some(slot));
            }
            if wanted == Wanted::Perhaps && self.inflight.contains(read.unique) {
                self.watch(read.unique, read.pid);
            }
        }
        let mut request = Vec::new();
        for landing in landings {
            journal.landed(landing, &mut request);
            let read = Request::parse(&request).ok().as_ref().and_then(TakenRead::of);
            if read.is_none_or(|read| !known.contains(&read.unique)) {
                self.resumed.fetch_add(1, Ordering::Relaxed);
                self.handle_in(landing, &request, &mut buffer);
            } else {
                journal.empty(landing);
            }
            if let Some(read) = read.filter(|read| self.inflight.contains(read.unique)) {
                self.watch(read.unique, read.pid);
            }
        }
    }

    /// Once the kernel's queue is empty, all that it repeats has come.
    fn tell_resumed(&self) {
        if self.resumed.load(Ordering::Relaxed) > 0 {
            let requests = self.resumed.swap(0, Ordering::Relaxed);
            if requests > 0 {
                tracing::info!(
                    requests = requests.to_string(),
                    "took over the requests that the daemon before this one had not answered"
                );
            }
        }
    }

    /// Handles the request in `bytes`, which is also in the journal's landing.
    fn handle_in(self: &Arc<Shared>, landing: usize, bytes: &[u8], buffer: &mut Vec<u8>) {
        match Request::parse(bytes) {
            Ok(request) => {
                if request.was_taken_before() {
                    self.resumed.fetch_add(1, Ordering::Relaxed);
                }
                let handled = match self.handle(&request, buffer, None) {
                    Handled::Expected(id) => self.wait_for_layer(id, Kept::Bytes(bytes.into()), None),
                    handled => handled,
                };
                if handled == Handled::NotNow {
                    // Left where it is, for the next session.
                    return;
                }
            }
            Err(error) => say!(FuseBroken, %error, "unreadable FUSE request"),
        }
        if let Some(journal) = &self.journal {
            journal.empty(landing);
        }
    }

    /// `slot`: where a read is written down already.
    fn handle(self: &Arc<Shared>, request: &Request<'_>, buffer: &mut Vec<u8>, slot: Option<Slot>) -> Handled {
        match answer::answer(&self.tree, request, buffer) {
            Outcome::Reply => self.write(request.unique, &[IoSlice::new(buffer)]),
            Outcome::Silent => {}
            Outcome::Read { layer, node, range } => {
                let started = Instant::now();
                match read::try_read(&layer, &node, range.clone()) {
                    Some(outcome) => self.finish_read(request.unique, &layer, &node, started, outcome),
                    None => return self.start_read(request, Arc::clone(&layer), node, range, started, slot),
                }
            }
            Outcome::Interrupt(unique) => self.interrupt(unique),
            Outcome::Expected(id) => return Handled::Expected(id),
        }
        self.settle(slot);
        Handled::Done
    }

    /// Writes a read down, where that is needed, before it leaves its landing; `None` if the session stops first.
    fn write_down(&self, journal: &Journal, read: &TakenRead) -> Option<Slot> {
        loop {
            match journal.keep(read) {
                None if !self.stopping.load(Ordering::SeqCst) => {
                    // Full of reads that wait for the network, which is not our fault.
                    self.pulse.0.iter().for_each(Beat::now);
                    std::thread::sleep(ROOM_INTERVAL);
                }
                slot => return slot,
            }
        }
    }

    /// The read in `slot` is answered.
    fn settle(&self, slot: Option<Slot>) {
        if let (Some(journal), Some(slot)) = (&self.journal, slot) {
            journal.settle(slot);
        }
    }

    /// One write is one answer.
    fn write(&self, unique: u64, parts: &[IoSlice<'_>]) {
        let error = loop {
            match rustix::io::writev(&self.device, parts) {
                Ok(_) => return,
                Err(Errno::INTR) => {}
                // The request was given up, or somebody answered it before us; or everything was.
                Err(Errno::NOENT | Errno::NODEV) => return,
                Err(error) => break error,
            }
        };
        say!(FuseBroken, %error, unique, "cannot answer a FUSE request");
        // Something is better than a reader that waits for ever.
        let _ = rustix::io::write(&self.device, &wire::error_reply(unique, Errno::IO));
    }

    fn finish_read(
        &self,
        unique: u64,
        layer: &Layer,
        node: &Node,
        started: Instant,
        outcome: Result<Bytes, ReadError>,
    ) {
        match outcome {
            Ok(bytes) => {
                let header = wire::ok_reply(unique, bytes.len());
                self.write(unique, &[IoSlice::new(&header), IoSlice::new(&bytes)]);
                self.tree.observer.read(layer.id, &layer.data.digest(), bytes.len(), started.elapsed());
            }
            Err(error) => {
                let header = wire::error_reply(unique, Errno::from(&error));
                self.write(unique, &[IoSlice::new(&header)]);
                layer.set_last_error(error.chain());
                self.tree.observer.failure(&Failure {
                    snapshot: layer.id,
                    layer: layer.data.digest(),
                    op: FailedOp::FileRead,
                    error: &error,
                    path: &layer.toc.path(node.index),
                    size: layer.data.compressed_size(),
                    fetched: layer.data.fetched(),
                });
            }
        }
    }

    fn start_read(
        self: &Arc<Shared>,
        request: &Request<'_>,
        layer: Arc<Layer>,
        node: Node,
        range: Range<u64>,
        started: Instant,
        slot: Option<Slot>,
    ) -> Handled {
        let (unique, pid) = (request.unique, request.pid);
        let slot = match (slot, &self.journal, TakenRead::of(request)) {
            (None, Some(journal), Some(read)) => match self.write_down(journal, &read) {
                None => return Handled::NotNow,
                slot => slot,
            },
            (slot, ..) => slot,
        };
        // The task must not keep the session alive: tasks outlive it when the runtime is slow to drop them.
        let shared = Arc::downgrade(self);
        let guard = Answer { shared, unique, layer, node, started };
        let start = || Waiting {
            task: self
                .runtime
                .spawn(async move {
                    let outcome = read::read(&guard.layer, &guard.node, range).await;
                    guard.give(outcome);
                })
                .abort_handle(),
            pid,
            slot,
        };
        if self.inflight.enter(unique, start) == Entered::Interrupted {
            self.note_interrupted(slot);
            self.watch(unique, pid);
        }
        Handled::Done
    }

    /// Handles the request again when the layer has come, or is not expected any more.
    fn wait_for_layer(self: &Arc<Shared>, id: SnapshotId, kept: Kept, slot: Option<Slot>) -> Handled {
        // It has been read before.
        let Some(request) = kept.request() else { return Handled::Done };
        let (unique, pid) = (request.unique, request.pid);
        let slot = match (slot, &self.journal) {
            (None, Some(journal)) => {
                let Some(read) = TakenRead::of(&request) else {
                    // Nothing but reads can be written down, and what is not would wait for ever if we die.
                    self.write(unique, &[IoSlice::new(&wire::error_reply(unique, Refusal::Stale.into()))]);
                    return Handled::Done;
                };
                match self.write_down(journal, &read) {
                    None => return Handled::NotNow,
                    slot => slot,
                }
            }
            (slot, _) => slot,
        };
        // As with reads, the task must not keep the session alive.
        let (shared, tree, patience) = (Arc::downgrade(self), self.tree.clone(), self.patience);
        let wait = async move {
            let outcome = tokio::time::timeout(patience, tree.arrival(id)).await;
            let Some(shared) = shared.upgrade() else { return };
            let Some(waiting) = shared.inflight.take(unique) else { return };
            if outcome.is_err() {
                shared.write(unique, &[IoSlice::new(&wire::error_reply(unique, Errno::IO))]);
                return shared.settle(waiting.slot);
            }
            let Some(request) = kept.request() else { return };
            if let Handled::Expected(id) = shared.handle(&request, &mut Vec::new(), waiting.slot) {
                shared.wait_for_layer(id, kept, waiting.slot);
            }
            // An interrupt comes once, and may have come before.
            if shared.inflight.contains(unique) {
                shared.watch(unique, pid);
            }
        };
        let start = || Waiting { task: self.runtime.spawn(wait).abort_handle(), pid, slot };
        if self.inflight.enter(unique, start) == Entered::Interrupted {
            self.note_interrupted(slot);
            self.watch(unique, pid);
        }
        Handled::Done
    }

    fn note_interrupted(&self, slot: Option<Slot>) {
        if let (Some(journal), Some(slot)) = (&self.journal, slot) {
            journal.interrupted(slot);
        }
    }

    fn interrupt(self: &Arc<Shared>, unique: u64) {
        match self.inflight.interrupt(unique) {
            Known::Waiting(pid, slot) => {
                self.note_interrupted(slot);
                self.watch(unique, pid);
            }
            Known::Unknown if self.orphans => {
                // Read by a process that died, on a kernel that will not repeat it, and written down nowhere: only this can end it.
                let shared = self.clone();
                self.runtime.spawn(async move {
                    tokio::time::sleep(ORPHAN_DELAY).await;
                    if !shared.inflight.contains(unique) {
                        let _ = rustix::io::write(&shared.device, &wire::error_reply(unique, Errno::INTR));
                    }
                });
            }
            Known::Unknown => {}
        }
    }

    /// Ends the read as soon as its reader is dying.
    fn watch(self: &Arc<Shared>, unique: u64, pid: u32) {
        let shared = Arc::downgrade(self);
        self.runtime.spawn(async move {
            while let Some(shared) = Weak::upgrade(&shared).filter(|shared| shared.inflight.contains(unique)) {
                if is_dying(pid) {
                    if let Some(waiting) = shared.inflight.take(unique) {
                        waiting.task.abort();
                        let header = wire::error_reply(unique, Errno::from(&ReadError::Interrupted));
                        shared.write(unique, &[IoSlice::new(&header)]);
                        shared.settle(waiting.slot);
                    }
                    return;
                }
                drop(shared);
                tokio::time::sleep(WATCH_INTERVAL).await;
            }
        });
    }
}

/// The duty to answer one read, held by its task.
struct Answer {
    shared: Weak<Shared>,
    unique: u64,
    layer: Arc<Layer>,
    node: Node,
    started: Instant,
}

impl Answer {
    fn give(&self, outcome: Result<Bytes, ReadError>) {
        if let Some(shared) = self.shared.upgrade()
            && let Some(waiting) = shared.inflight.take(self.unique)
        {
            shared.finish_read(self.unique, &self.layer, &self.node, self.started, outcome);
            shared.settle(waiting.slot);
        }
    }
}

impl Drop for Answer {
    /// A read that panicked must not leave its reader waiting. One that was dropped is answered elsewhere, or by the next
    /// session.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.give(Err(ReadError::Panicked));
        }
    }
}
