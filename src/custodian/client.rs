//! The daemon's side: find or start the custodian, then ask it from any task.
//!
//! One socket carries everything. Requests are numbered; a thread receives replies and wakes whoever asked. The first request is a greeting, which
//! nobody waits for: containers' reads need no custodian, so a daemon starts without one, and requests wait behind the greeting.
//!
//! When the custodian dies, waiting requests are sent once more to the one that listens now, as every request but unpacking may be done twice without
//! harm; if there is none, they fail with the reason, and the next one connects again. The same goes for one that says nothing: it has [`HELLO`] to
//! answer the greeting, and where a later answer takes long, whoever listens is greeted on a second connection ([`DOUBT`]). A custodian that is our
//! child cannot be started again by a daemon that has given up its capabilities: that is said plainly, and another that listens will do.
#![forbid(unsafe_code)]

use super::{
    implied::{self, Found, Implied},
    protocol::{MAX_PARENTS, Operation, Outcome, Reply, Request, Usage},
};
use crate::{
    layout::{Layout, SnapshotId},
    oci::IdMaps,
    snapshot::chain,
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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

/// Requests sent and not yet answered. What the socket's buffer holds of such messages (about 90) is never reached, so a send never waits.
const IN_FLIGHT: usize = 48;
/// Layers being unpacked; not part of [`IN_FLIGHT`], or they would keep everything else waiting. The custodian has twice as many workers.
const UNPACKING: usize = 16;
/// What a pipe without privilege may hold (/proc/sys/fs/pipe-max-size): the more, the less the two sides wait for each other.
const PIPE: usize = 1 << 20;
/// How long a custodian may take to say hello: systemd has to start it, on a machine that is booting. 11 s were seen on an overloaded one; giving up
/// means to begin anew, which is what such a machine can do least.
const HELLO: Duration = Duration::from_secs(60);
/// The tag of the greeting. Other requests are numbered from 1.
const GREETING: u64 = 0;
/// When nothing was heard for so long while somebody waits (a large tree takes its time), whoever listens is asked whether it is alive, and has as
/// long to answer.
const DOUBT: Duration = Duration::from_secs(10);
/// An answer that was under way when doubt became certainty is in the socket by then.
const LAST_LOOK: Duration = Duration::from_millis(100);

/// Why there is no custodian.
#[derive(Debug, thiserror::Error)]
enum CustodianError {
    #[error(transparent)]
    NotInstalled(#[from] process::HelperNotFound),
    #[error("cannot start {}", .program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("cannot connect to it")]
    Connect(#[source] io::Error),
}

/// The way to the custodian. It has not said anything yet, and there may be none.
#[derive(Debug)]
pub struct Connection {
    layout: Layout,
    /// Or why there is none.
    socket: Result<OwnedFd, String>,
    origin: Origin,
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

/// Where the custodian of the first connection came from. Later ones are those that listen.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// Somebody else keeps it running.
    Unit,
    /// It was our child.
    Child,
    /// It could not be had.
    Nowhere,
}

/// Connects to the custodian that listens for this root, or starts one as a child that ends with us. Waits for neither, and succeeds without one.
///
/// Must be called before the daemon gives up its capabilities, or the child would have none either.
pub fn start(layout: &Layout) -> Connection {
    let (socket, origin) = match seqpacket::connect_now(&layout.custodian_socket()) {
        Ok(socket) => (Ok(socket), Origin::Unit),
        Err(error) if absent(&error) => (spawn(layout), Origin::Child),
        Err(error) => (Err(CustodianError::Connect(error)), Origin::Unit),
    };
    let origin = if matches!((&socket, origin), (Err(_), Origin::Child)) { Origin::Nowhere } else { origin };
    Connection { layout: layout.clone(), socket: socket.map_err(|error| chain(&error)), origin }
}

fn spawn(layout: &Layout) -> Result<OwnedFd, CustodianError> {
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
    Ok(ours)
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

/// Greets whoever listens at `path`, and waits for anything to come back.
fn answers(path: &Path) -> io::Result<()> {
    let socket = seqpacket::connect_now(path)?;
    greet(&socket, DOUBT)?;
    let mut buffer = [0; Reply::LEN];
    // Who has too many connections closes this one, and is alive.
    seqpacket::recv_with_fds(socket.as_fd(), &mut buffer).map(drop)
}

/// Says hello, and bounds how long anything may take to be heard.
fn greet(socket: &OwnedFd, patience: Duration) -> io::Result<()> {
    seqpacket::set_patience(socket.as_fd(), Patience::AtMost(patience))?;
    let request = Request { tag: GREETING, operation: Operation::Hello };
    seqpacket::send(socket.as_fd(), &request.encode(), seqpacket::Send::OrFail)
}

/// Asks the custodian. Cheap to clone; needs no particular runtime.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    origin: Origin,
    tags: AtomicU64,
    slots: Arc<Semaphore>,
    unpack_slots: Arc<Semaphore>,
    /// The connection in use, or why there is none. Taken before a link's `waiting`, held while connecting so that only one caller does.
    link: Mutex<Result<Arc<Link>, Ended>>,
}

struct Link {
    number: u64,
    socket: OwnedFd,
    /// Who waits for which tag; `None` once the custodian is gone. Leaf lock.
    waiting: Mutex<Option<HashMap<u64, Waiter>>>,
    /// Changes before `waiting` is emptied, so that whoever is woken finds the reason.
    standing: watch::Sender<Standing>,
}

/// How far a connection has come.
#[derive(Debug, Clone)]
enum Standing {
    /// The custodian has been greeted.
    Greeted,
    /// And has answered.
    Answered,
    Ended(Ended),
}

/// Why a connection is of no use any more.
#[derive(Debug, Clone)]
struct Ended {
    why: String,
    how: HowEnded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HowEnded {
    Closed,
    /// It is open, and nobody answers.
    Silent,
}

struct Waiter {
    reply: oneshot::Sender<Reply>,
    /// Held until the reply came, even if nobody waits for it any more: the request still occupies the custodian.
    _slot: OwnedSemaphorePermit,
}

impl Client {
    /// A client of what [`start`] found. Starts a thread.
    pub fn new(connection: Connection) -> Client {
        let Connection { layout, socket, origin } = connection;
        let link = match socket {
            // A custodian that has ended already does not even hear the greeting.
            Ok(socket) => {
                Link::start(0, socket, &layout.custodian_socket()).map_err(|error| Ended::closed(error.to_string()))
            }
            Err(why) => Err(Ended::closed(why)),
        };
        Client {
            inner: Arc::new(Inner {
                layout,
                origin,
                tags: AtomicU64::new(1),
                slots: Arc::new(Semaphore::new(IN_FLIGHT)),
                unpack_slots: Arc::new(Semaphore::new(UNPACKING)),
                link: Mutex::new(link),
            }),
        }
    }

    /// Waits until the custodian has answered a greeting, on a new connection if there is none; or fails with the reason. Gives the number of the
    /// connection: with another one, what was asked of the one before may have failed. Costs nothing while it lives.
    pub async fn greeted(&self) -> io::Result<u64> {
        let link = self.inner.live_link().map_err(|ended| self.inner.lost(&ended))?;
        let mut standing = link.standing.subscribe();
        let outcome = match standing.wait_for(|now| !matches!(now, Standing::Greeted)).await.as_deref() {
            Ok(Standing::Ended(ended)) => Err(ended.clone()),
            // The sender is in `link`, which is here.
            Ok(_) | Err(_) => Ok(link.number),
        };
        outcome.map_err(|ended| self.inner.lost(&ended))
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
            Err(Lost::Unsent(_)) => self.inner.try_ask(&operation, &fds, slots).await,
            other => other,
        };
        drop(leash);
        match outcome.map_err(|lost| failed(self.inner.lost(lost.ended())))?.map_err(failed)? {
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
            // Who is silent would be so once more, for as long.
            Err(lost) if lost.ended().how == HowEnded::Closed => {
                self.inner.try_ask(&operation, fds, &self.inner.slots).await
            }
            answer => answer,
        };
        let outcome = answer.map_err(|lost| self.inner.lost(lost.ended()))??;
        Reply { tag: 0, outcome }.into_result()
    }
}

/// The connection ended before the reply came.
enum Lost {
    /// And before the request was sent.
    Unsent(Ended),
    Unanswered(Ended),
}

impl Lost {
    fn ended(&self) -> &Ended {
        match self {
            Lost::Unsent(ended) | Lost::Unanswered(ended) => ended,
        }
    }
}

impl Ended {
    fn closed(why: impl Into<String>) -> Ended {
        Ended { why: why.into(), how: HowEnded::Closed }
    }
    fn silent(why: impl Into<String>) -> Ended {
        Ended { why: why.into(), how: HowEnded::Silent }
    }
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
            Err(closed) => return Err(Lost::Unsent(Ended::closed(closed.to_string()))), // never: nobody closes the semaphore
        };
        let tag = self.tags.fetch_add(1, Ordering::Relaxed);
        let link = self.live_link().map_err(Lost::Unsent)?;
        let (reply, answer) = oneshot::channel();
        match lock(&link.waiting).as_mut() {
            Some(waiting) => waiting.insert(tag, Waiter { reply, _slot: slot }),
            None => return Err(Lost::Unsent(link.why())),
        };
        let request = Request { tag, operation: operation.clone() };
        let sent = seqpacket::send_with_fds(link.socket.as_fd(), &request.encode(), fds, seqpacket::Send::OrFail);
        if let Err(error) = sent {
            return match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    // The receiving thread may not have noticed yet; the next attempt must not find this link alive.
                    link.end(Ended::closed(error.to_string()));
                    Err(Lost::Unsent(link.why()))
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
            Err(_) => Err(Lost::Unanswered(link.why())),
        }
    }

    fn live_link(&self) -> Result<Arc<Link>, Ended> {
        let mut standing = lock(&self.link);
        let ended = match &*standing {
            Ok(link) if link.is_live() => return Ok(link.clone()),
            Ok(link) => link.why(),
            Err(ended) => ended.clone(),
        };
        let path = self.layout.custodian_socket();
        let number = self.tags.fetch_add(1, Ordering::Relaxed);
        let fresh = seqpacket::connect_now(&path).and_then(|socket| Link::start(number, socket, &path));
        *standing = fresh.map_err(|error| match (self.origin, absent(&error)) {
            // That nobody else listens is as it should be, and not what is wrong.
            (Origin::Child | Origin::Nowhere, true) => ended,
            _ if error.kind() == io::ErrorKind::WouldBlock => Ended::silent("connections to it are not taken any more"),
            _ => Ended::closed(error.to_string()),
        });
        standing.clone()
    }

    fn lost(&self, ended: &Ended) -> io::Error {
        let (path, why) = (self.layout.custodian_socket(), &ended.why);
        let path = path.display();
        let text = match self.origin {
            Origin::Unit => format!("the custodian at {path} is not answering: {why}"),
            Origin::Child => {
                format!(
                    "the custodian has gone and cannot be started again without capabilities: restart the daemon ({why})"
                )
            }
            Origin::Nowhere => format!("there is no custodian: {why}; restart the daemon when there can be"),
        };
        io::Error::new(io::ErrorKind::NotConnected, text)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Ends the receiving thread, and with the descriptor it holds a custodian that is our child. An error means that it ended already.
        if let Ok(link) = &*lock(&self.link) {
            let _ = rustix::net::shutdown(&link.socket, rustix::net::Shutdown::Both);
        }
    }
}

impl Link {
    /// Greets whoever is at the other end, and listens to them. `listener` is where a custodian that is no child of ours takes connections.
    fn start(number: u64, socket: OwnedFd, listener: &Path) -> io::Result<Arc<Link>> {
        greet(&socket, HELLO)?;
        let waiting = Mutex::new(Some(HashMap::new()));
        let link = Arc::new(Link { number, socket, waiting, standing: watch::Sender::new(Standing::Greeted) });
        let (receiver, listener) = (link.clone(), listener.to_owned());
        thread::Builder::new().name("custodian".into()).spawn(move || {
            let ended = receiver.receive(&listener);
            receiver.end(ended);
        })?;
        Ok(link)
    }

    fn receive(&self, listener: &Path) -> Ended {
        let mut buffer = [0; Reply::LEN];
        let mut is_doubted = false;
        loop {
            let reply = match seqpacket::recv_with_fds(self.socket.as_fd(), &mut buffer) {
                Ok((0, _)) => return Ended::closed("it closed the connection; its own message says why"),
                Ok((received, _)) => Reply::decode(&buffer[..received]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match (&*self.standing.borrow(), is_doubted) {
                        (Standing::Answered, false) => {}
                        (Standing::Answered, true) => return Ended::silent("it has stopped answering"),
                        _ => return Ended::silent(format!("no answer within {} s", HELLO.as_secs())),
                    }
                    is_doubted = self.is_waited_for() && is_silent(listener);
                    let patience = if is_doubted { LAST_LOOK } else { DOUBT };
                    if let Err(error) = seqpacket::set_patience(self.socket.as_fd(), Patience::AtMost(patience)) {
                        return Ended::closed(error.to_string());
                    }
                    continue;
                }
                Err(error) => return Ended::closed(error.to_string()),
            };
            let Some(reply) = reply else { return Ended::closed("it is of another version") };
            if reply.tag == GREETING {
                if reply.into_result().is_err() {
                    return Ended::closed("it is of another version");
                }
                self.standing.send_replace(Standing::Answered);
            } else if let Some(waiter) = lock(&self.waiting).as_mut().and_then(|waiting| waiting.remove(&reply.tag)) {
                // The asker may have lost interest.
                let _ = waiter.reply.send(reply);
            }
            is_doubted = false;
            if let Err(error) = seqpacket::set_patience(self.socket.as_fd(), Patience::AtMost(DOUBT)) {
                return Ended::closed(error.to_string());
            }
        }
    }

    fn is_live(&self) -> bool {
        lock(&self.waiting).is_some()
    }

    fn is_waited_for(&self) -> bool {
        lock(&self.waiting).as_ref().is_some_and(|waiting| !waiting.is_empty())
    }

    /// Dropping the waiters tells each of them that no reply will come. The first reason stays.
    fn end(&self, ended: Ended) {
        self.standing.send_if_modified(|now| match now {
            Standing::Ended(_) => false,
            Standing::Greeted | Standing::Answered => {
                *now = Standing::Ended(ended);
                true
            }
        });
        *lock(&self.waiting) = None;
    }

    /// Why it has ended.
    fn why(&self) -> Ended {
        match &*self.standing.borrow() {
            Standing::Ended(ended) => ended.clone(),
            Standing::Greeted | Standing::Answered => Ended::closed("the connection has ended"),
        }
    }
}

/// Whether the custodian that listens there takes no connection, or does not answer on it. One that listens nowhere is believed to be busy.
fn is_silent(listener: &Path) -> bool {
    answers(listener).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
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
    fn sync(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move { self.ask(Operation::Sync).await.map(drop) })
    }
    fn copy<'a>(&'a self, from: SnapshotId, id: SnapshotId, maps: &'a IdMaps) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move { Client::copy(self, from, id, maps).await.map_err(io::Error::other) })
    }
}
