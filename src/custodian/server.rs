//! Serving: workers that each take a message, act, and answer.
//!
//! A connection is served by [`WORKERS`] threads that receive from it directly: the kernel keeps messages whole and hands each to one of them, so
//! there is no queue of ours to fill. Measuring a large tree occupies one worker and delays nobody else's request. Two requests for one snapshot are
//! done one after the other, so that two removals do not trip over each other.
//!
//! Unpacking has a thread of its own per layer, which does nothing but wait: for the worker's report, and for the asker to let go of the leash. Letting
//! go, or a request to remove the snapshot, ends the worker at once. Whenever a worker does not report success, what it made is removed before anybody
//! hears of it.
#![forbid(unsafe_code)]

use super::{
    complain, implied,
    protocol::{Operation, Outcome, Reply, Request, Usage},
    tree::Snapshots,
};
use crate::{
    layout::SnapshotId,
    sys::seqpacket,
    unpack::{Budget, Order, Place, Task, report, spawner::Spawner},
};
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
    net::Shutdown,
};
use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// Requests of one connection that run at the same time. Removing is limited by the disk long before it is by this.
const WORKERS: usize = 4;
/// Connections served at the same time: the daemon's, and the next daemon's while the old one drains.
const CONNECTIONS: usize = 4;

/// Layers unpacked at the same time. More than a node has cores for, and few enough for the memory of so many workers.
const UNPACKS: usize = 32;

/// What is on this disk already may be on it once more, if there is room.
const COPIED: Budget = Budget { bytes: i64::MAX as u64, inodes: u64::MAX };

/// How long to wait when the machine cannot give us a connection.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// What a worker is started for.
#[derive(Debug, Clone, Copy)]
enum Labour {
    Unpack(Place, Budget),
    Copy(SnapshotId),
}

/// The custodian at work.
pub(super) struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    snapshots: Snapshots,
    spawner: Spawner,
    old_kernel: bool,
    /// Set where somebody starts the custodian again when it ends.
    is_replaceable: AtomicBool,
    /// Our ends of the reports of running workers. Leaf lock.
    running: Mutex<HashMap<SnapshotId, Arc<OwnedFd>>>,
    /// Snapshots somebody is working on. Leaf lock: nothing else is taken while it is held.
    busy: Mutex<HashSet<SnapshotId>>,
    /// Signalled, under `busy`, whenever a snapshot leaves the set.
    freed: Condvar,
}

impl Server {
    pub(super) fn new(snapshots: Snapshots, spawner: Spawner, old_kernel: bool) -> Server {
        Server {
            shared: Arc::new(Shared {
                snapshots,
                spawner,
                old_kernel,
                is_replaceable: AtomicBool::new(false),
                running: Mutex::default(),
                busy: Mutex::default(),
                freed: Condvar::new(),
            }),
        }
    }

    /// Serves one connection until its other end is closed.
    pub(super) fn serve_one(&self, socket: OwnedFd) -> io::Result<()> {
        seqpacket::require_own_user(socket.as_fd())?;
        for worker in self.start_workers(socket)? {
            if worker.join().is_err() {
                return Err(io::Error::other("a worker panicked"));
            }
        }
        Ok(())
    }

    /// Serves whoever connects as our own user, for ever.
    pub(super) fn serve_every(&self, listener: BorrowedFd<'_>) -> ! {
        self.shared.is_replaceable.store(true, Ordering::Relaxed);
        let mut connections: Vec<Vec<thread::JoinHandle<()>>> = Vec::new();
        loop {
            let socket = match seqpacket::accept(listener) {
                Ok(socket) => socket,
                Err(error) => {
                    // Out of descriptors or memory: requests that are being served give some back.
                    complain(format_args!("accepting: {error}"));
                    thread::sleep(ACCEPT_AGAIN);
                    continue;
                }
            };
            connections.retain(|workers| workers.iter().any(|worker| !worker.is_finished()));
            if connections.len() >= CONNECTIONS {
                complain(format_args!("refused a connection: {CONNECTIONS} are being served"));
                continue;
            }
            match seqpacket::require_own_user(socket.as_fd()).and_then(|()| self.start_workers(socket)) {
                Ok(workers) => connections.push(workers),
                Err(error) => complain(format_args!("refused a connection: {error}")),
            }
        }
    }

    fn start_workers(&self, socket: OwnedFd) -> io::Result<Vec<thread::JoinHandle<()>>> {
        let socket = Arc::new(socket);
        let start = |number| {
            let (shared, socket) = (self.shared.clone(), socket.clone());
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || shared.work(&socket))
        };
        (0..WORKERS).map(start).collect()
    }
}

impl Shared {
    fn work(self: Arc<Self>, socket: &Arc<OwnedFd>) {
        // One byte more than a request, so that an over-long message is seen to be one.
        let mut buffer = [0; Request::LEN + 1];
        loop {
            let (bytes, fds) = match seqpacket::recv_with_fds(socket.as_fd(), &mut buffer) {
                Ok((0, _)) => return,
                Ok((received, fds)) => (&buffer[..received], fds),
                // Too long: answered like any other garbage.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => (&buffer[..], Vec::new()),
                Err(error) => {
                    complain(format_args!("receiving: {error}"));
                    return;
                }
            };
            let (tag, outcome) = match Request::decode(bytes) {
                Ok(Request { tag, operation: Operation::Unpack { id, place, budget } }) => {
                    match self.start_worker(socket, tag, id, Labour::Unpack(place, budget), fds) {
                        Ok(()) => continue, // its own thread answers
                        Err(refused) => (tag, refused),
                    }
                }
                Ok(Request { tag, operation: Operation::Copy { id, from } }) => {
                    match self.start_worker(socket, tag, id, Labour::Copy(from), fds) {
                        Ok(()) => continue,
                        Err(refused) => (tag, refused),
                    }
                }
                Ok(Request { tag, operation }) => (tag, self.act(operation, fds)),
                Err(malformed) => {
                    complain(format_args!("refused a message: {malformed}"));
                    (Request::tag_of(bytes), Outcome::Malformed)
                }
            };
            if seqpacket::send(socket.as_fd(), &Reply { tag, outcome }.encode(), seqpacket::Send::Wait).is_err() {
                return; // the asker is gone, and the next receive would say so
            }
        }
    }

    fn act(&self, operation: Operation, fds: Vec<OwnedFd>) -> Outcome {
        let result = match operation {
            Operation::Hello => Ok(Usage::default()),
            Operation::Remove { id } => {
                let _turn = self.take_turn_from_worker(id);
                self.snapshots.remove(id).map(|()| Usage::default())
            }
            // Reading disturbs nobody.
            Operation::Usage { id } => self.snapshots.usage(id),
            Operation::OwnUpper { id, uid, gid } => {
                let _turn = self.take_turn(id);
                self.snapshots.own_upper(id, uid, gid).map(|()| Usage::default())
            }
            Operation::Publish { id, parents } => {
                let Ok([answers]) = <[OwnedFd; 1]>::try_from(fds) else { return Outcome::Malformed };
                let Some(answers) = read_answers(answers) else { return Outcome::Malformed };
                let _turn = self.take_turn(id);
                self.snapshots.publish(id, &parents, answers).map(|()| Usage::default())
            }
            Operation::Discard { id } => {
                let _turn = self.take_turn_from_worker(id);
                self.snapshots.discard(id).map(|()| Usage::default())
            }
            // Who dies in it is dead only when the disk has everything: that is why the daemon does not do this itself.
            Operation::Sync => self.snapshots.sync().map(|()| Usage::default()),
            // Have their own way, see `work`.
            Operation::Unpack { .. } | Operation::Copy { .. } => return Outcome::Malformed,
        };
        match result {
            Ok(usage) => Outcome::Done(usage),
            Err(errno) => Outcome::Failed(errno.raw_os_error()),
        }
    }

    fn start_worker(
        self: &Arc<Self>,
        socket: &Arc<OwnedFd>,
        tag: u64,
        id: SnapshotId,
        labour: Labour,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Outcome> {
        let [input, leash] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| Outcome::Malformed)?;
        let (shared, socket) = (self.clone(), socket.clone());
        let answer = move || {
            let outcome = shared.labour(id, labour, input, leash.as_fd());
            // The asker may be gone.
            let _ = seqpacket::send(socket.as_fd(), &Reply { tag, outcome }.encode(), seqpacket::Send::Wait);
        };
        match thread::Builder::new().name("unpack".into()).spawn(answer) {
            Ok(_) => Ok(()),
            Err(error) => Err(Outcome::Failed(error.raw_os_error().unwrap_or(libc_errno(Errno::AGAIN)))),
        }
    }

    fn labour(&self, id: SnapshotId, labour: Labour, input: OwnedFd, leash: BorrowedFd<'_>) -> Outcome {
        let _turn = self.take_turn(id);
        let outcome = match self.run_worker(id, labour, input, leash) {
            Ok(outcome) => outcome,
            Err(errno) => Outcome::Failed(libc_errno(errno)),
        };
        if !matches!(outcome, Outcome::Reported(Ok(_)))
            && let Err(error) = self.snapshots.discard(id)
        {
            complain(format_args!("removing what was unpacked of snapshot {id}: {error}; the next start removes it"));
        }
        outcome
    }

    fn run_worker(
        &self,
        id: SnapshotId,
        labour: Labour,
        input: OwnedFd,
        leash: BorrowedFd<'_>,
    ) -> Result<Outcome, Errno> {
        let (task, budget, source, mappings) = match labour {
            Labour::Unpack(place, budget) => (Task::Unpack(place), budget, input, None),
            Labour::Copy(from) => (Task::Copy, COPIED, self.snapshots.content(from)?, Some(input)),
        };
        let order = Order { task, budget, old_kernel: self.old_kernel };
        let failed = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let (ours, theirs) = seqpacket::pair().map_err(failed)?;
        let ours = Arc::new(ours);
        {
            let mut running = lock(&self.running);
            if running.len() >= UNPACKS {
                return Err(Errno::AGAIN);
            }
            running.insert(id, ours.clone());
        }
        let result = self.snapshots.begin_unpack(id).and_then(|work| {
            let mapped = mappings.as_ref().map(|file| file.as_fd());
            if let Err(error) = self.spawner.order(&order, source.as_fd(), work.as_fd(), theirs.as_fd(), mapped) {
                return Err(self.without_spawner(error));
            }
            // Ours are the last copies: the worker's own end must be the only one left.
            drop((source, mappings, theirs));
            Ok(await_report(&ours, leash))
        });
        lock(&self.running).remove(&id);
        result
    }

    /// The spawner is gone, and this process has too few capabilities to fork another one.
    fn without_spawner(&self, error: io::Error) -> Errno {
        complain(format_args!("the process that starts workers is gone: {error}"));
        if self.is_replaceable.load(Ordering::Relaxed) {
            // What is half unpacked is removed by the next custodian.
            std::process::exit(1);
        }
        complain("nothing can be unpacked until the daemon is started again");
        Errno::from_io_error(&error).unwrap_or(Errno::PIPE)
    }

    /// As [`Shared::take_turn`], but whoever is unpacking the snapshot has to stop.
    fn take_turn_from_worker(&self, id: SnapshotId) -> Turn<'_> {
        if let Some(report) = lock(&self.running).get(&id) {
            end_worker(report);
        }
        self.take_turn(id)
    }

    fn take_turn(&self, id: SnapshotId) -> Turn<'_> {
        let mut busy = lock(&self.busy);
        // `insert` is false while another turn holds `id`; its end notifies under the same lock, so the wake-up cannot fall between test and wait.
        while !busy.insert(id) {
            busy = self.freed.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        Turn { shared: self, id }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Sets and maps of numbers are valid whatever a panicking thread was doing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn libc_errno(errno: Errno) -> i32 {
    errno.raw_os_error()
}

/// Shutting down our side of a report makes the kernel kill the process at the other (see `sys::process::die_with`).
fn end_worker(report: &OwnedFd) {
    // An error means that it has ended.
    let _ = rustix::net::shutdown(report, Shutdown::Write);
}

/// Waits until the worker has reported or died, and makes it die when nobody holds the leash any more.
fn await_report(report: &OwnedFd, leash: BorrowedFd<'_>) -> Outcome {
    let mut held = true;
    loop {
        let mut poll = vec![PollFd::new(report, PollFlags::IN)];
        if held {
            poll.push(PollFd::from_borrowed_fd(leash, PollFlags::IN));
        }
        match rustix::event::poll(&mut poll, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Outcome::Failed(libc_errno(error)),
        }
        if poll.get(1).is_some_and(|leash| !leash.revents().is_empty()) {
            held = false;
            end_worker(report);
        }
        if !poll[0].revents().is_empty() {
            break;
        }
    }
    let mut buffer = [0; report::LEN + 1];
    match seqpacket::recv_with_fds(report.as_fd(), &mut buffer) {
        Ok((received @ 1.., _)) => match report::decode(&buffer[..received]) {
            Some(report) => Outcome::Reported(report),
            None => Outcome::WorkerDied,
        },
        _ => Outcome::WorkerDied,
    }
}

/// `None` for a file that is no list of answers, or too long for one.
fn read_answers(file: OwnedFd) -> Option<Vec<implied::Implied>> {
    let mut bytes = Vec::new();
    File::from(file).take(implied::MAX_FILE + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 <= implied::MAX_FILE).then_some(())?;
    implied::decode(&bytes)
}

/// The right to change one snapshot's directory.
struct Turn<'a> {
    shared: &'a Shared,
    id: SnapshotId,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.shared.busy).remove(&self.id);
        self.shared.freed.notify_all();
    }
}
