//! The daemon's side: find or start the custodian, then ask it from any task.
//!
//! One socket carries everything. Requests are numbered; a thread receives replies and wakes whoever asked. When the custodian dies, waiting requests
//! fail; if it listens on a socket of its own (systemd), the next request connects again and is repeated once, as every request but unpacking may be
//! done twice without harm. A custodian that is our child cannot be started again by a daemon that has given up its capabilities: that is said plainly.
#![forbid(unsafe_code)]

use super::{
    implied::{self, Found, Implied},
    protocol::{MAX_PARENTS, Operation, Outcome, Reply, Request, Usage},
};
use crate::{
    layout::{Layout, SnapshotId},
    oci::IdMaps,
    sys::{
        process,
        seqpacket::{self, Patience},
    },
    unpack::{Budget, Detail, Place, Refusal, Stopped},
};
use futures::future::BoxFuture;
use std::{
    collections::HashMap,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Requests sent and not yet answered. What the socket's buffer holds of such messages (about 90) is never reached, so a send never waits.
const IN_FLIGHT: usize = 48;
/// Layers being unpacked; not part of [`IN_FLIGHT`], or they would keep everything else waiting. The custodian has twice as many workers.
const UNPACKING: usize = 16;
/// What a pipe without privilege may hold (/proc/sys/fs/pipe-max-size): the more, the less the two sides wait for each other.
const PIPE: usize = 1 << 20;
/// How long a custodian may take to say hello: systemd has to start it, on a machine that is booting. 11 s were seen on an overloaded one; giving up
/// means to begin anew, which is what such a machine can do least.
const HELLO: Duration = Duration::from_secs(60);

/// Why there is no custodian.
#[derive(Debug, thiserror::Error)]
pub enum CustodianError {
    #[error(transparent)]
    NotInstalled(#[from] process::HelperNotFound),
    #[error("cannot start {}", .program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("the custodian does not answer")]
    NoAnswer(#[source] io::Error),
}

/// A custodian that has said hello.
#[derive(Debug)]
pub struct Connection {
    layout: Layout,
    socket: OwnedFd,
    redial: Redial,
}

/// Why a layer was not unpacked, or not published. Nothing of it is left on disk.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The layer is to blame: trying again would end the same way. containerd accepts some of what is refused here.
    #[error("the layer cannot be unpacked here: {why} ({detail})")]
    Refused { why: Refusal, detail: Detail },
    /// The system is to blame: no space, no inodes, an I/O error.
    #[error("unpacking failed at {detail}")]
    Failed { detail: Detail, source: io::Error },
    /// Killed, by the out-of-memory killer perhaps, or because the snapshot was removed meanwhile.
    #[error("the process that unpacked the layer died")]
    WorkerDied,
    /// The custodian did not do it.
    #[error("the custodian cannot {doing}")]
    Custodian { doing: &'static str, source: io::Error },
}

/// A layer below one that is published.
pub enum Lower<'a> {
    /// It is on disk; the custodian looks for itself.
    Unpacked(SnapshotId),
    /// It is lazy; this says what it has under a path (no slash at either end).
    Lazy(SnapshotId, &'a (dyn Fn(&[u8]) -> Found + Sync)),
}

/// What to do when the connection ends.
#[derive(Debug, Clone)]
enum Redial {
    /// Connect again: somebody else keeps it running.
    At(PathBuf),
    /// It was our child.
    Impossible,
}

/// Connects to the custodian that listens for this root, or starts one as a child that ends with us.
///
/// Must be called before the daemon gives up its capabilities, or the child would have none either.
pub fn start(layout: &Layout) -> Result<Connection, CustodianError> {
    let path = layout.custodian_socket();
    match dial(&path) {
        Ok(socket) => return Ok(Connection { layout: layout.clone(), socket, redial: Redial::At(path) }),
        Err(error) if absent(&error) => {}
        Err(error) => return Err(CustodianError::NoAnswer(error)),
    }
    let program = process::find_helper("soci-custodian")?;
    let failed = |source| CustodianError::Start { program: program.clone(), source };
    let (ours, theirs) = seqpacket::pair().map_err(failed)?;
    // The child ends when it sees our end closed; nobody waits for it, and it leaves only when we do.
    Command::new(&program)
        .arg("--root")
        .arg(layout.root())
        .arg("--stdin")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        // Its own group: a ^C meant for the daemon must not take the custodian away while the daemon drains.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    hello(&ours).map_err(CustodianError::NoAnswer)?;
    Ok(Connection { layout: layout.clone(), socket: ours, redial: Redial::Impossible })
}

/// A file without a name, to be read from its start.
fn in_memory(label: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = std::fs::File::from(rustix::fs::memfd_create(label, rustix::fs::MemfdFlags::CLOEXEC)?);
    io::Write::write_all(&mut file, bytes)?;
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn dial(path: &Path) -> io::Result<OwnedFd> {
    let socket = seqpacket::connect(path)?;
    hello(&socket)?;
    Ok(socket)
}

fn hello(socket: &OwnedFd) -> io::Result<()> {
    seqpacket::set_patience(socket.as_fd(), Patience::AtMost(HELLO))?;
    let request = Request { tag: 0, operation: Operation::Hello };
    seqpacket::send(socket.as_fd(), &request.encode(), seqpacket::Send::Wait)?;
    let mut buffer = [0; Reply::LEN];
    let (received, _) = seqpacket::recv_with_fds(socket.as_fd(), &mut buffer)?;
    seqpacket::set_patience(socket.as_fd(), Patience::Endless)?;
    if received == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection; its own message says why"));
    }
    match Reply::decode(&buffer[..received]) {
        Some(reply) => reply.into_result().map(drop),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "it is of another version")),
    }
}

/// Asks the custodian. Cheap to clone; needs no particular runtime.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    redial: Redial,
    tags: AtomicU64,
    slots: Arc<Semaphore>,
    unpack_slots: Arc<Semaphore>,
    /// The connection in use. Taken before a link's `waiting`, held while connecting so that only one caller does.
    link: Mutex<Arc<Link>>,
}

struct Link {
    socket: OwnedFd,
    /// Who waits for which tag; `None` once the custodian is gone. Leaf lock.
    waiting: Mutex<Option<HashMap<u64, Waiter>>>,
}

struct Waiter {
    reply: oneshot::Sender<Reply>,
    /// Held until the reply came, even if nobody waits for it any more: the request still occupies the custodian.
    _slot: OwnedSemaphorePermit,
}

impl Client {
    pub fn new(connection: Connection) -> io::Result<Client> {
        let link = Link::start(connection.socket)?;
        Ok(Client {
            inner: Arc::new(Inner {
                layout: connection.layout,
                redial: connection.redial,
                tags: AtomicU64::new(1),
                slots: Arc::new(Semaphore::new(IN_FLIGHT)),
                unpack_slots: Arc::new(Semaphore::new(UNPACKING)),
                link: Mutex::new(link),
            }),
        })
    }

    /// Removes the snapshot's directory and everything in it.
    pub fn remove_tree(&self, id: SnapshotId) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move { self.ask(Operation::Remove { id }).await.map(drop) })
    }

    /// Measures the snapshot's content.
    pub fn usage(&self, id: SnapshotId) -> BoxFuture<'_, io::Result<Usage>> {
        Box::pin(self.ask(Operation::Usage { id }))
    }

    /// Gives the snapshot's content directory to another user.
    pub fn own_upper(&self, id: SnapshotId, uid: u32, gid: u32) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move { self.ask(Operation::OwnUpper { id, uid, gid }).await.map(drop) })
    }

    /// Unpacks the uncompressed tar that arrives through the pipe `tar`, up to its end, beside the snapshot's `fs`; what was unpacked and not published
    /// before is replaced. What it took of the budget.
    ///
    /// The pipe's writer gets EPIPE when unpacking ends early; this says why. Dropping the future kills the worker and removes what it made. A tar may
    /// end without an end marker, so closing the pipe early can look like success: only the digests tell, and what they tell decides on
    /// [`Client::publish`] or [`Client::discard`].
    pub async fn unpack(
        &self,
        id: SnapshotId,
        tar: OwnedFd,
        place: Place,
        budget: Budget,
    ) -> Result<Budget, UnpackError> {
        // A smaller pipe works too.
        let _ = rustix::pipe::fcntl_setpipe_size(&tar, PIPE);
        self.labour(Operation::Unpack { id, place, budget }, tar, "unpack the layer").await
    }

    /// Makes the `fs` of the snapshot `id` a copy of that of `from`, with its owners translated. `id` must be new, `from` is left alone.
    pub async fn copy(&self, from: SnapshotId, id: SnapshotId, maps: &IdMaps) -> Result<(), UnpackError> {
        let failed = |source| UnpackError::Custodian { doing: "copy the layer", source };
        let mappings = in_memory("soci-id-mappings", maps.to_string().as_bytes()).map_err(failed)?;
        self.labour(Operation::Copy { id, from }, mappings, "copy the layer").await?;
        self.publish(id, &[]).await
    }

    /// Has a worker do it. Ends early, and the worker with it, when the future is dropped.
    async fn labour(&self, operation: Operation, input: OwnedFd, doing: &'static str) -> Result<Budget, UnpackError> {
        let failed = |source: io::Error| UnpackError::Custodian { doing, source };
        // Held until the end: when its other end sees it closed, whoever waited for this has gone.
        let (theirs, leash) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let fds = [input.as_fd(), theirs.as_fd()];
        let slots = &self.inner.unpack_slots;
        let outcome = match self.inner.try_ask(&operation, &fds, slots).await {
            // Nobody has read from the input yet.
            Err(Lost::Unsent) => self.inner.try_ask(&operation, &fds, slots).await,
            other => other,
        };
        drop(leash);
        match outcome.map_err(|_| failed(self.inner.lost()))?.map_err(failed)? {
            Outcome::Reported(Ok(used)) => Ok(used),
            Outcome::Reported(Err(Stopped::Refused { why, detail })) => Err(UnpackError::Refused { why, detail }),
            Outcome::Reported(Err(Stopped::Failed { errno, detail })) => {
                Err(UnpackError::Failed { detail, source: io::Error::from_raw_os_error(errno) })
            }
            Outcome::WorkerDied => Err(UnpackError::WorkerDied),
            other => {
                let refused = Reply { tag: 0, outcome: other }.into_result();
                Err(failed(refused.err().unwrap_or_else(|| io::ErrorKind::InvalidData.into())))
            }
        }
    }

    /// Puts what was unpacked in the place of the snapshot's `fs`, which must be an empty directory. `parents` are the layers below, nearest first, all
    /// published: directories that the layer only implies look like theirs.
    pub async fn publish(&self, id: SnapshotId, parents: &[Lower<'_>]) -> Result<(), UnpackError> {
        let failed = |source| UnpackError::Custodian { doing: "publish the layer", source };
        if parents.len() > MAX_PARENTS {
            return Err(failed(io::Error::other(format!("{} layers below; at most {MAX_PARENTS} are", parents.len()))));
        }
        let answers = self.answers(id, parents).map_err(failed)?;
        let ids = parents.iter().map(|parent| match parent {
            Lower::Unpacked(id) | Lower::Lazy(id, _) => *id,
        });
        let operation = Operation::Publish { id, parents: ids.collect() };
        self.ask_with(operation, &[answers.as_fd()]).await.map(drop).map_err(failed)
    }

    /// Removes what was unpacked and not published, and ends whoever is still unpacking it.
    pub async fn discard(&self, id: SnapshotId) -> io::Result<()> {
        self.ask(Operation::Discard { id }).await.map(drop)
    }

    /// The directories that the layer implies and what lazy layers below have there, as a file for the custodian.
    fn answers(&self, id: SnapshotId, parents: &[Lower<'_>]) -> io::Result<OwnedFd> {
        // Small and just written: a few pages of page cache.
        let list = std::fs::read(self.inner.layout.snapshot_implied(id))?;
        let answer = |path: &[u8]| {
            let lazy = (0..).zip(parents).filter_map(|(place, parent)| match parent {
                Lower::Lazy(_, look) => Some((place, look(path))),
                Lower::Unpacked(_) => None,
            });
            Implied { path: path.to_vec(), lazy: lazy.collect() }
        };
        let implied: Vec<Implied> = list.split(|c| *c == 0).filter(|path| !path.is_empty()).map(answer).collect();
        in_memory("soci-implied", &implied::encode(&implied))
    }

    async fn ask(&self, operation: Operation) -> io::Result<Usage> {
        self.ask_with(operation, &[]).await
    }

    async fn ask_with(&self, operation: Operation, fds: &[BorrowedFd<'_>]) -> io::Result<Usage> {
        let answer = match self.inner.try_ask(&operation, fds, &self.inner.slots).await {
            Err(_) => self.inner.try_ask(&operation, fds, &self.inner.slots).await,
            answer => answer,
        };
        let outcome = answer.map_err(|_| self.inner.lost())??;
        Reply { tag: 0, outcome }.into_result()
    }
}

/// The connection ended before the reply came.
enum Lost {
    /// And before the request was sent.
    Unsent,
    Unanswered,
}

impl Inner {
    async fn try_ask(
        &self,
        operation: &Operation,
        fds: &[BorrowedFd<'_>],
        slots: &Arc<Semaphore>,
    ) -> Result<io::Result<Outcome>, Lost> {
        let slot = match slots.clone().acquire_owned().await {
            Ok(slot) => slot,
            Err(_) => return Err(Lost::Unsent), // never: the semaphore is not closed
        };
        let tag = self.tags.fetch_add(1, Ordering::Relaxed);
        let link = self.live_link()?;
        let (reply, answer) = oneshot::channel();
        match lock(&link.waiting).as_mut() {
            Some(waiting) => waiting.insert(tag, Waiter { reply, _slot: slot }),
            None => return Err(Lost::Unsent),
        };
        let request = Request { tag, operation: operation.clone() };
        let sent = seqpacket::send_with_fds(link.socket.as_fd(), &request.encode(), fds, seqpacket::Send::OrFail);
        if let Err(error) = sent {
            return match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    // The receiving thread may not have noticed yet; the next attempt must not find this link alive.
                    link.end();
                    Err(Lost::Unsent)
                }
                _ => {
                    if let Some(waiting) = lock(&link.waiting).as_mut() {
                        waiting.remove(&tag);
                    }
                    Ok(Err(error))
                }
            };
        }
        match answer.await {
            Ok(reply) => Ok(Ok(reply.outcome)),
            Err(_) => Err(Lost::Unanswered),
        }
    }

    fn live_link(&self) -> Result<Arc<Link>, Lost> {
        let mut link = lock(&self.link);
        if lock(&link.waiting).is_none() {
            let Redial::At(path) = &self.redial else { return Err(Lost::Unsent) };
            *link = seqpacket::connect(path).and_then(Link::start).map_err(|_| Lost::Unsent)?;
        }
        Ok(link.clone())
    }

    fn lost(&self) -> io::Error {
        let text = match &self.redial {
            Redial::At(path) => format!("the custodian at {} is not answering", path.display()),
            Redial::Impossible => {
                "the custodian has died and cannot be started again without capabilities: restart the daemon".to_owned()
            }
        };
        io::Error::new(io::ErrorKind::NotConnected, text)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Ends the receiving thread, and with the descriptor it holds a custodian that is our child. An error means that it ended already.
        let link = lock(&self.link);
        let _ = rustix::net::shutdown(&link.socket, rustix::net::Shutdown::Both);
    }
}

impl Link {
    fn start(socket: OwnedFd) -> io::Result<Arc<Link>> {
        let link = Arc::new(Link { socket, waiting: Mutex::new(Some(HashMap::new())) });
        let receiver = link.clone();
        thread::Builder::new().name("custodian".into()).spawn(move || receiver.receive())?;
        Ok(link)
    }

    fn receive(&self) {
        let mut buffer = [0; Reply::LEN];
        while let Ok((received @ 1.., _)) = seqpacket::recv_with_fds(self.socket.as_fd(), &mut buffer) {
            let Some(reply) = Reply::decode(&buffer[..received]) else { break };
            let waiter = lock(&self.waiting).as_mut().and_then(|waiting| waiting.remove(&reply.tag));
            if let Some(waiter) = waiter {
                // The asker may have lost interest.
                let _ = waiter.reply.send(reply);
            }
        }
        self.end();
    }

    /// Dropping the waiters tells each of them that no reply will come.
    fn end(&self) {
        *lock(&self.waiting) = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Maps and handles stay valid whatever a panicking thread was doing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl crate::snapshot::Disk for Client {
    fn remove_tree(&self, id: SnapshotId) -> BoxFuture<'_, io::Result<()>> {
        Client::remove_tree(self, id)
    }
    fn usage(&self, id: SnapshotId) -> BoxFuture<'_, io::Result<crate::snapshot::Usage>> {
        Box::pin(async move {
            let usage = Client::usage(self, id).await?;
            Ok(crate::snapshot::Usage { size: usage.size, inodes: usage.inodes })
        })
    }
    fn own_upper(&self, id: SnapshotId, uid: u32, gid: u32) -> BoxFuture<'_, io::Result<()>> {
        Client::own_upper(self, id, uid, gid)
    }
    fn copy<'a>(&'a self, from: SnapshotId, id: SnapshotId, maps: &'a IdMaps) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move { Client::copy(self, from, id, maps).await.map_err(io::Error::other) })
    }
}
