//! Where containerd finds us: a socket of our own, or the one systemd holds.

use crate::{layout::DEFAULT_ADDRESS, sys::process};
use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt, unix::net::UnixListener},
    path::{Path, PathBuf},
};

/// Why there is nothing to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("address {address:?}: protocol {protocol:?} is not supported; use a path, unix://PATH or fd://")]
    Protocol { address: String, protocol: String },
    #[error("cannot listen on {}; another path can be given with --address", path.display())]
    Bind { path: PathBuf, source: io::Error },
    #[error("systemd passed {0} sockets; exactly one is expected (see the unit's Sockets=)")]
    TooManySockets(usize),
    #[error("cannot receive systemd's sockets")]
    Inherit(#[source] io::Error),
}

/// A listening socket and what to call it.
pub struct Listening {
    pub listener: UnixListener,
    pub address: String,
}

impl Listening {
    /// The socket in the filesystem, which systemd's has, too.
    pub fn path(&self) -> PathBuf {
        let own = self.listener.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned));
        own.unwrap_or_else(|| PathBuf::from(DEFAULT_ADDRESS))
    }
}

/// Listens on `address`: a path, `unix://PATH`, or `fd://` for systemd's socket (the default path if there is none).
pub fn listen(address: &str) -> Result<Listening, ListenError> {
    match address.split_once("://") {
        None => bind(Path::new(address)),
        Some(("unix", path)) => bind(Path::new(path)),
        Some(("fd", _)) => inherited(),
        Some((protocol, _)) => {
            Err(ListenError::Protocol { address: address.to_owned(), protocol: protocol.to_owned() })
        }
    }
}

fn inherited() -> Result<Listening, ListenError> {
    let mut sockets: Vec<OwnedFd> = process::inherited_descriptors().map_err(ListenError::Inherit)?;
    match (sockets.pop(), sockets.len()) {
        (None, _) => {
            tracing::info!("socket activation: no file descriptors were passed");
            tracing::info!(address = DEFAULT_ADDRESS, "Listening on the default socket address");
            bind(Path::new(DEFAULT_ADDRESS))
        }
        (Some(socket), 0) => Ok(Listening { listener: socket.into(), address: "fd://".to_owned() }),
        (Some(_), more) => Err(ListenError::TooManySockets(more + 1)),
    }
}

fn bind(path: &Path) -> Result<Listening, ListenError> {
    let failed = |source| ListenError::Bind { path: path.to_owned(), source };
    if let Some(parent) = path.parent()
        && let Err(error) = fs::DirBuilder::new().mode(0o700).create(parent)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(failed(error));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    Ok(Listening { listener, address: path.display().to_string() })
}
