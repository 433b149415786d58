//! The daemon's side: find or start the custodian, then ask it from any task.
//!
//! One socket carries everything. Requests are numbered; a thread receives replies and wakes whoever asked. When the custodian dies, waiting requests
//! fail; if it listens on a socket of its own (systemd), the next request connects again and is repeated once, as every request here may be done
//! twice without harm. A custodian that is our child cannot be started again by a daemon that has given up its capabilities: that is said plainly.
#![forbid(unsafe_code)]

use super::protocol::{Operation, Reply, Request, Usage};
use crate::{
    layout::{Layout, SnapshotId},
    sys::{
        process,
        seqpacket::{self, Patience},
    },
};
use futures::future::BoxFuture;
use std::{
    collections::HashMap,
    io,
    os::{
        fd::{AsFd, OwnedFd},
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

/// Requests sent and not yet answered. What the socket's buffer holds of 24-byte messages (about 250) is never reached, so a send never waits.
const IN_FLIGHT: usize = 64;
/// How long a custodian may take to say hello: systemd has to start it, on a machine that is booting.
const HELLO: Duration = Duration::from_secs(10);

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
    socket: OwnedFd,
    redial: Redial,
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
        Ok(socket) => return Ok(Connection { socket, redial: Redial::At(path) }),
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
    Ok(Connection { socket: ours, redial: Redial::Impossible })
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
    redial: Redial,
    tags: AtomicU64,
    slots: Arc<Semaphore>,
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
                redial: connection.redial,
                tags: AtomicU64::new(1),
                slots: Arc::new(Semaphore::new(IN_FLIGHT)),
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

    async fn ask(&self, operation: Operation) -> io::Result<Usage> {
        match self.inner.try_ask(operation).await {
            Err(Lost) => match self.inner.try_ask(operation).await {
                Err(Lost) => Err(self.inner.lost()),
                Ok(reply) => reply,
            },
            Ok(reply) => reply,
        }
    }
}

/// The connection ended before the reply came.
struct Lost;

impl Inner {
    async fn try_ask(&self, operation: Operation) -> Result<io::Result<Usage>, Lost> {
        let slot = match self.slots.clone().acquire_owned().await {
            Ok(slot) => slot,
            Err(_) => return Err(Lost), // never: the semaphore is not closed
        };
        let tag = self.tags.fetch_add(1, Ordering::Relaxed);
        let link = self.live_link()?;
        let (reply, answer) = oneshot::channel();
        match lock(&link.waiting).as_mut() {
            Some(waiting) => waiting.insert(tag, Waiter { reply, _slot: slot }),
            None => return Err(Lost),
        };
        let request = Request { tag, operation };
        if let Err(error) = seqpacket::send(link.socket.as_fd(), &request.encode(), seqpacket::Send::OrFail) {
            return match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    // The receiving thread may not have noticed yet; the next attempt must not find this link alive.
                    link.end();
                    Err(Lost)
                }
                _ => {
                    if let Some(waiting) = lock(&link.waiting).as_mut() {
                        waiting.remove(&tag);
                    }
                    Ok(Err(error))
                }
            };
        }
        answer.await.map(Reply::into_result).map_err(|_| Lost)
    }

    fn live_link(&self) -> Result<Arc<Link>, Lost> {
        let mut link = lock(&self.link);
        if lock(&link.waiting).is_none() {
            let Redial::At(path) = &self.redial else { return Err(Lost) };
            *link = seqpacket::connect(path).and_then(Link::start).map_err(|_| Lost)?;
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
}
