//! Serving: workers that each take a message, act, and answer.
//!
//! A connection is served by [`WORKERS`] threads that receive from it directly: the kernel keeps messages whole and hands each to one of them, so
//! there is no queue of ours to fill. Measuring a large tree occupies one worker and delays nobody else's request. Two requests for one snapshot are
//! done one after the other, so that two removals do not trip over each other.
#![forbid(unsafe_code)]

use super::{
    complain,
    protocol::{Operation, Outcome, Reply, Request, Usage},
    tree::Snapshots,
};
use crate::{layout::SnapshotId, sys::seqpacket};
use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// Requests of one connection that run at the same time. Removing is limited by the disk long before it is by this.
const WORKERS: usize = 4;
/// Connections served at the same time: the daemon's, and the next daemon's while the old one drains.
const CONNECTIONS: usize = 4;

/// How long to wait when the machine cannot give us a connection.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// The custodian at work.
pub(super) struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    snapshots: Snapshots,
    /// Snapshots somebody is working on. Leaf lock: nothing else is taken while it is held.
    busy: Mutex<HashSet<SnapshotId>>,
    /// Signalled, under `busy`, whenever a snapshot leaves the set.
    freed: Condvar,
}

impl Server {
    pub(super) fn new(snapshots: Snapshots) -> Server {
        Server { shared: Arc::new(Shared { snapshots, busy: Mutex::default(), freed: Condvar::new() }) }
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
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || shared.work(socket.as_fd()))
        };
        (0..WORKERS).map(start).collect()
    }
}

impl Shared {
    fn work(&self, socket: BorrowedFd<'_>) {
        // One byte more than a request, so that an over-long message is seen to be one.
        let mut buffer = [0; Request::LEN + 1];
        loop {
            let bytes = match seqpacket::recv_with_fds(socket, &mut buffer) {
                Ok((0, _)) => return,
                Ok((received, _)) => &buffer[..received],
                // Too long: answered like any other garbage.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => &buffer[..],
                Err(error) => {
                    complain(format_args!("receiving: {error}"));
                    return;
                }
            };
            let reply = match Request::decode(bytes) {
                Ok(request) => Reply { tag: request.tag, outcome: self.act(request.operation) },
                Err(malformed) => {
                    complain(format_args!("refused a message: {malformed}"));
                    Reply { tag: Request::tag_of(bytes), outcome: Outcome::Malformed }
                }
            };
            if seqpacket::send(socket, &reply.encode(), seqpacket::Send::Wait).is_err() {
                return; // the asker is gone, and the next receive would say so
            }
        }
    }

    fn act(&self, operation: Operation) -> Outcome {
        let result = match operation {
            Operation::Hello => Ok(Usage::default()),
            Operation::Remove { id } => {
                let _turn = self.take_turn(id);
                self.snapshots.remove(id).map(|()| Usage::default())
            }
            // Reading disturbs nobody.
            Operation::Usage { id } => self.snapshots.usage(id),
            Operation::OwnUpper { id, uid, gid } => {
                let _turn = self.take_turn(id);
                self.snapshots.own_upper(id, uid, gid).map(|()| Usage::default())
            }
        };
        match result {
            Ok(usage) => Outcome::Done(usage),
            Err(errno) => Outcome::Failed(errno.raw_os_error()),
        }
    }

    fn take_turn(&self, id: SnapshotId) -> Turn<'_> {
        let mut busy = self.lock();
        // `insert` is false while another turn holds `id`; its end notifies under the same lock, so the wake-up cannot fall between test and wait.
        while !busy.insert(id) {
            busy = self.freed.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        Turn { shared: self, id }
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<SnapshotId>> {
        // A set of numbers is valid whatever a panicking thread was doing.
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to change one snapshot's directory.
struct Turn<'a> {
    shared: &'a Shared,
    id: SnapshotId,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.shared.lock().remove(&self.id);
        self.shared.freed.notify_all();
    }
}
