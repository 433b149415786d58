//! The daemon's side: get the descriptor, starting the holder if need be, and give it back to a new holder when the old one died.
#![forbid(unsafe_code)]

use super::{
    InitParams, Kept,
    protocol::{MAX_MESSAGE, Reply, Request, Status, misunderstood},
};
use crate::{
    layout::Layout,
    sys::{
        process,
        seqpacket::{self, Patience},
    },
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// How long the holder may take to answer one question; it does nothing that waits.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a holder may take to start: open, mount, INIT, perhaps detaching dead mounts. systemd may be starting it, too.
const START: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

/// What a daemon serves with.
#[derive(Debug)]
pub struct Held {
    /// The FUSE connection.
    pub device: OwnedFd,
    /// What was negotiated on it.
    pub init: InitParams,
    /// Nobody has served this mount before.
    pub first: bool,
    /// Where requests are read into, on a kernel that cannot repeat them.
    pub journal: Option<OwnedFd>,
}

/// What to do when no holder answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Wait for one: systemd runs it.
    Connect,
    /// Start one, as nobody's child, so that it outlives us.
    SpawnChild,
}

/// Why there is no descriptor.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    #[error(transparent)]
    NotInstalled(#[from] process::HelperNotFound),
    #[error("cannot start {}", .program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("soci-mount failed ({0}); its own message says why")]
    Ended(ExitStatus),
    #[error("no soci-mount answers at {}", .socket.display())]
    Nobody { socket: PathBuf, source: io::Error },
    #[error("soci-mount gave an answer that makes no sense")]
    Protocol(#[source] io::Error),
}

/// Gets the descriptor of the FUSE connection, waiting for or starting a holder as told. Blocks, for a bounded time.
pub fn obtain(layout: &Layout, how: How) -> Result<Held, HolderError> {
    let deadline = Instant::now() + START;
    let mut child: Option<Child> = None;
    loop {
        let error = match try_obtain(layout) {
            Ok(held) => return Ok(held),
            // It found itself without a descriptor and ends; the next one will mount anew. Or nobody is there yet.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(HolderError::Protocol(error)),
            Err(error) => error,
        };
        if Instant::now() > deadline {
            return Err(HolderError::Nobody { socket: layout.holder_socket(), source: error });
        }
        if how == How::SpawnChild {
            match child.as_mut().map(Child::try_wait) {
                // A holder answered it, and will answer us; if not, we start over.
                Some(Ok(Some(status))) if status.success() => child = None,
                Some(Ok(Some(status))) => return Err(HolderError::Ended(status)),
                Some(Ok(None) | Err(_)) => {}
                None => child = Some(spawn(layout)?),
            }
        }
        std::thread::sleep(POLL);
    }
}

/// What became of [`ensure_kept`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    /// A holder has the descriptor.
    Already,
    /// A new holder had none, and was given ours.
    HandedIn,
}

/// Sees to it that a holder has the descriptor besides us. To be called every now and then (it blocks, so not on a runtime's thread): a holder that
/// died and was restarted has none.
///
/// A daemon without systemd restarts it itself. That takes no capability, because there is nothing to mount.
pub fn ensure_kept(layout: &Layout, held: &Held, how: How) -> Result<Keeping, HolderError> {
    let status = match (ask_status(layout), how) {
        (Err(error), How::SpawnChild) if absent(&error) => {
            let mut child = spawn(layout)?;
            match child.wait() {
                Ok(status) if !status.success() => return Err(HolderError::Ended(status)),
                _ => ask_status(layout),
            }
        }
        (other, _) => other,
    };
    match status.map_err(|source| HolderError::Nobody { socket: layout.holder_socket(), source })? {
        Status::Holding => return Ok(Keeping::Already),
        Status::Empty => {}
    }
    let mut message = Request::Keep.encode().to_vec();
    let parameters = serde_json::to_vec(&held.init).map_err(|e| HolderError::Protocol(e.into()))?;
    message.extend(parameters);
    let descriptors: Vec<_> = std::iter::once(&held.device).chain(&held.journal).map(AsFd::as_fd).collect();
    match converse(layout, &message, &descriptors) {
        Ok((Reply::Done, ..)) => Ok(Keeping::HandedIn),
        Ok((other, ..)) => Err(HolderError::Protocol(unexpected(other))),
        Err(error) => Err(HolderError::Protocol(error)),
    }
}

fn spawn(layout: &Layout) -> Result<Child, HolderError> {
    let program = process::find_helper("soci-mount")?;
    Command::new(&program)
        .arg("--root")
        .arg(layout.root())
        .arg("--detach")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // READY is for the unit the daemon runs in, and the daemon's to tell.
        .env_remove("NOTIFY_SOCKET")
        .spawn()
        .map_err(|source| HolderError::Start { program, source })
}

fn try_obtain(layout: &Layout) -> io::Result<Held> {
    let (reply, body, fds) = converse(layout, &Request::Give.encode(), &[])?;
    let first = match reply {
        Reply::First => true,
        Reply::Resumed => false,
        // Not an error of the protocol: it is about to end.
        Reply::Is(Status::Empty) => {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the holder has no descriptor"));
        }
        other => return Err(unexpected(other)),
    };
    let init = serde_json::from_slice(&body).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    match Kept::received(fds, init) {
        Some(Kept { device, init, journal }) => Ok(Held { device, init, first, journal }),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "no FUSE descriptor came with the answer")),
    }
}

pub(super) fn ask(layout: &Layout, request: Request) -> io::Result<Reply> {
    converse(layout, &request.encode(), &[]).map(|(reply, ..)| reply)
}

pub(super) fn ask_status(layout: &Layout) -> io::Result<Status> {
    match ask(layout, Request::Status)? {
        Reply::Is(status) => Ok(status),
        other => Err(unexpected(other)),
    }
}

/// Nobody listens: there is no socket, or it is left over.
pub(super) fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn converse(layout: &Layout, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<(Reply, Vec<u8>, Vec<OwnedFd>)> {
    let socket = seqpacket::connect(&layout.holder_socket())?;
    // What comes from there is served to containers: it must not be somebody else's socket.
    seqpacket::require_own_user(socket.as_fd())?;
    seqpacket::set_patience(socket.as_fd(), Patience::AtMost(ANSWER))?;
    seqpacket::send_with_fds(socket.as_fd(), message, fds, seqpacket::Send::Wait)?;
    let mut buffer = [0; MAX_MESSAGE];
    let (received, fds) = seqpacket::recv_with_fds(socket.as_fd(), &mut buffer)?;
    if received == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the holder closed the connection"));
    }
    match Reply::decode(&buffer[..received]) {
        Some((reply, body)) => Ok((reply, body.to_vec(), fds)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, misunderstood(&buffer[..received]))),
    }
}

fn unexpected(reply: Reply) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the holder answered {reply:?}"))
}
