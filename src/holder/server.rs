//! The holder's whole life after it gave up its powers: one peer at a time, one question each.
#![forbid(unsafe_code)]

use super::{
    Kept, complain,
    protocol::{MAX_MESSAGE, Reply, Request, Status},
    store::Store,
};
use crate::sys::seqpacket::{self, Patience};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

/// How long a peer may keep the holder waiting: it sends its question with its first breath.
const PEER_PATIENCE: Duration = Duration::from_secs(2);

/// How long to wait when the machine cannot give us a connection.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// What the holder has.
pub(super) enum Holding {
    /// Nothing: the mount is served, by a daemon that may hand the descriptor in.
    Empty,
    /// A mount that nobody served yet.
    Fresh(Kept),
    /// A mount that a daemon served, or serves.
    Used(Kept),
}

pub(super) struct Server {
    listener: OwnedFd,
    holding: Holding,
    store: Store,
}

/// Whether to go on after a peer was served.
enum Next {
    Serve,
    /// The mount is gone: asked to stop.
    Stop,
    /// The daemon has lost the descriptor too, so the mount is dead and whoever restarts us gets a new one.
    Lost,
}

impl Server {
    pub(super) fn new(listener: OwnedFd, holding: Holding, store: Store) -> Server {
        Server { listener, holding, store }
    }

    pub(super) fn serve(mut self) -> io::Result<()> {
        loop {
            let peer = match seqpacket::accept(self.listener.as_fd()) {
                Ok(peer) => peer,
                // The machine is out of descriptors or memory. What we hold is worth waiting for better times.
                Err(error) => {
                    complain(format_args!("accepting: {error}"));
                    std::thread::sleep(ACCEPT_AGAIN);
                    continue;
                }
            };
            // One peer's trouble is not ours.
            match self.serve_peer(peer.as_fd()) {
                Ok(Next::Serve) => {}
                Ok(Next::Stop) => return Ok(()),
                Ok(Next::Lost) => {
                    return Err(io::Error::other(
                        "the daemon was restarted while no holder had the descriptor: the mount is lost",
                    ));
                }
                Err(error) => complain(error),
            }
        }
    }

    fn serve_peer(&mut self, peer: BorrowedFd<'_>) -> io::Result<Next> {
        seqpacket::require_own_user(peer)?;
        seqpacket::set_patience(peer, Patience::AtMost(PEER_PATIENCE))?;
        let mut buffer = [0; MAX_MESSAGE];
        let (received, fds) = seqpacket::recv_with_fds(peer, &mut buffer)?;
        if received == 0 {
            return Ok(Next::Serve);
        }
        match Request::decode(&buffer[..received]) {
            Some((Request::Give, _)) => self.give(peer),
            Some((Request::Status, _)) => {
                let status = match self.holding {
                    Holding::Empty => Status::Empty,
                    Holding::Fresh(_) | Holding::Used(_) => Status::Holding,
                };
                answer(peer, Reply::Is(status))?;
                Ok(Next::Serve)
            }
            Some((Request::Keep, parameters)) => {
                let reply = self.keep(fds, parameters);
                answer(peer, reply)?;
                Ok(Next::Serve)
            }
            Some((Request::Stop, _)) => {
                answer(peer, Reply::Done)?;
                Ok(Next::Stop)
            }
            None => {
                answer(peer, Reply::Refused)?;
                Err(io::Error::new(io::ErrorKind::InvalidData, "refused a message that is no request"))
            }
        }
    }

    fn give(&mut self, peer: BorrowedFd<'_>) -> io::Result<Next> {
        let (reply, kept) = match &self.holding {
            Holding::Empty => {
                answer(peer, Reply::Is(Status::Empty))?;
                return Ok(Next::Lost);
            }
            Holding::Fresh(kept) => (Reply::First, kept),
            Holding::Used(kept) => (Reply::Resumed, kept),
        };
        let mut message = reply.encode().to_vec();
        message.extend(serde_json::to_vec(&kept.init).map_err(io::Error::other)?);
        seqpacket::send_with_fds(peer, &message, &kept.descriptors(), seqpacket::Send::Wait)?;
        self.holding = match std::mem::replace(&mut self.holding, Holding::Empty) {
            Holding::Fresh(kept) => Holding::Used(kept),
            other => other,
        };
        Ok(Next::Serve)
    }

    /// Takes the descriptor from a daemon, if we have none and it is one.
    fn keep(&mut self, fds: Vec<OwnedFd>, parameters: &[u8]) -> Reply {
        let kept = serde_json::from_slice(parameters).ok().and_then(|init| Kept::received(fds, init));
        match (&self.holding, kept) {
            (Holding::Empty, Some(kept)) => {
                self.store.put(&kept);
                self.holding = Holding::Used(kept);
                Reply::Done
            }
            _ => Reply::Refused,
        }
    }
}

fn answer(peer: BorrowedFd<'_>, reply: Reply) -> io::Result<()> {
    seqpacket::send(peer, &reply.encode(), seqpacket::Send::Wait)
}
