//! `SOCK_SEQPACKET` sockets of the Unix domain: whole messages, in order, with descriptors attached, from a peer the kernel vouches for.
//!
//! A message that is longer than the receiver's buffer is an error, not a prefix, and so is one with more descriptors than [`MAX_FDS`]; descriptors
//! that arrive with a refused message are closed.
#![forbid(unsafe_code)]

use super::context;
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
    time::Duration,
};

/// Descriptors one message may carry: those of a worker that unpacks (tar, directory, report).
pub const MAX_FDS: usize = 3;
/// Connections the kernel may hold for us before we accept them. There is one daemon; this leaves room for its operator.
const BACKLOG: i32 = 16;

/// Two connected sockets.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Connects to the socket at `path`.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    with_address(path, |address| rustix::net::connect(&socket, address))?;
    Ok(socket)
}

/// Connects to the socket at `path` if that can be done now: [`io::ErrorKind::WouldBlock`] where more connections wait to be taken than may.
pub fn connect_now(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    with_address(path, |address| rustix::net::connect(&socket, address))?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// A listening socket at `path`, which must not exist, with permission bits `mode`.
pub fn listen(path: &Path, mode: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    with_address(path, |address| rustix::net::bind(&socket, address))
        .map_err(|e| context(format_args!("binding {}", path.display()), e))?;
    // Nobody can connect before listen(2), so the moment under the umask's mode is harmless.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next connection.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    loop {
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            // The connection was gone before we took it, or a signal came: wait for the next.
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            other => return Ok(other?),
        }
    }
}

/// How long one send or receive may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    Endless,
    AtMost(Duration),
}

/// Bounds how long one send or receive on the socket may wait.
pub fn set_patience(socket: BorrowedFd<'_>, patience: Patience) -> io::Result<()> {
    let limit = match patience {
        Patience::Endless => None,
        Patience::AtMost(limit) => Some(limit),
    };
    sockopt::set_socket_timeout(socket, sockopt::Timeout::Recv, limit)?;
    sockopt::set_socket_timeout(socket, sockopt::Timeout::Send, limit)?;
    Ok(())
}

/// Whether to wait for room in the peer's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Send {
    Wait,
    OrFail,
}

/// Sends one message.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], how: Send) -> io::Result<()> {
    send_with_fds(socket, message, &[], how)
}

/// Sends one message with descriptors attached.
pub fn send_with_fds(socket: BorrowedFd<'_>, message: &[u8], fds: &[BorrowedFd<'_>], how: Send) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more descriptors than one message carries"));
    }
    let flags = match how {
        Send::Wait => SendFlags::NOSIGNAL,
        Send::OrFail => SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    };
    let sent =
        rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, &[IoSlice::new(message)], &mut control, flags))?;
    match sent == message.len() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::WriteZero, "a message was cut short")),
    }
}

/// Receives one message and its descriptors. Zero bytes mean that the peer is gone: nobody here sends empty messages.
pub fn recv_with_fds(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is longer than any that is expected"));
    }
    Ok((received.bytes, fds))
}

/// The user at the other end, as of when the connection was made.
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    // rustix's UCred holds a non-zero pid, which a peer in another pid namespace does not have; nix's does not mind.
    let credentials = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)?;
    Ok(credentials.uid())
}

/// An error unless the peer runs as our own user.
pub fn require_own_user(socket: BorrowedFd<'_>) -> io::Result<()> {
    let (peer, own) = (peer_uid(socket)?, rustix::process::geteuid().as_raw());
    match peer == own {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the peer runs as user {peer}; only user {own} is served"),
        )),
    }
}

fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Calls `act` with the address of `path`. A path too long for `sun_path` (108 bytes) goes through its directory's descriptor.
fn with_address(path: &Path, act: impl Fn(&SocketAddrUnix) -> rustix::io::Result<()>) -> io::Result<()> {
    match SocketAddrUnix::new(path) {
        Ok(address) => Ok(act(&address)?),
        Err(Errno::NAMETOOLONG) => {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(Errno::NAMETOOLONG.into());
            };
            let directory = openat(CWD, parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            let short = Path::new("/proc/self/fd").join(directory.as_fd().as_raw_fd().to_string()).join(name);
            Ok(act(&SocketAddrUnix::new(&short)?)?)
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_travels_with_its_descriptors_and_keeps_its_bounds() {
        let (a, b) = pair().expect("pair");
        let file = tempfile::tempfile().expect("file");
        send_with_fds(a.as_fd(), b"one", &[file.as_fd(), file.as_fd()], Send::Wait).expect("send");
        send(a.as_fd(), b"two", Send::OrFail).expect("send");
        let mut buffer = [0; 16];
        let (n, fds) = recv_with_fds(b.as_fd(), &mut buffer).expect("receive");
        assert_eq!((&buffer[..n], fds.len()), (&b"one"[..], 2));
        let (n, fds) = recv_with_fds(b.as_fd(), &mut buffer).expect("receive");
        assert_eq!((&buffer[..n], fds.len()), (&b"two"[..], 0));
        drop(a);
        assert_eq!(recv_with_fds(b.as_fd(), &mut buffer).expect("end").0, 0);
    }

    #[test]
    fn a_message_longer_than_the_buffer_is_refused_and_the_next_one_is_whole() {
        let (a, b) = pair().expect("pair");
        send(a.as_fd(), &[7; 64], Send::Wait).expect("send");
        send(a.as_fd(), b"ok", Send::Wait).expect("send");
        let mut buffer = [0; 8];
        assert_eq!(recv_with_fds(b.as_fd(), &mut buffer).expect_err("too long").kind(), io::ErrorKind::InvalidData);
        assert_eq!(recv_with_fds(b.as_fd(), &mut buffer).expect("receive").0, 2);
    }

    #[test]
    fn a_socket_below_a_very_long_path_can_be_bound_and_reached() {
        let dir = tempfile::tempdir().expect("temp");
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).expect("mkdir");
        let path = deep.join("x.sock");
        let listener = listen(&path, 0o600).expect("listen");
        let client = connect(&path).expect("connect");
        let served = accept(listener.as_fd()).expect("accept");
        assert_eq!(peer_uid(served.as_fd()).expect("peer"), rustix::process::geteuid().as_raw());
        require_own_user(client.as_fd()).expect("same user");
        assert_eq!(std::fs::metadata(&path).expect("stat").permissions().mode() & 0o777, 0o600);
    }
}
