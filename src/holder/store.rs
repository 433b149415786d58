//! The second keeper: systemd's descriptor store, for the moment in which both the holder and the daemon die.
//!
//! The unit of `soci-mount` has `FileDescriptorStoreMax=`. What is put there survives the death of the process and comes back to the next one
//! (not after `systemctl stop`, which empties the store: so never the only keeper). systemd 219 stores descriptors without names, so what comes
//! back is recognised by being a FUSE device. What was negotiated on it is in a file beside the holder's socket.
//!
//! The connection to systemd is opened before the holder confines itself; afterwards it could not be.
#![forbid(unsafe_code)]

use super::{InitParams, complain};
use crate::{
    layout::Layout,
    sys::{fuse, process, seqpacket},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Puts a descriptor there. The name is for people (`systemd-analyze fdstore`); systemd 219 ignores it.
const PUT: &[u8] = b"FDSTORE=1\nFDNAME=fuse";

/// Where a copy of the descriptor can be left.
pub(super) struct Store {
    notify: Option<OwnedFd>,
}

impl Store {
    /// systemd's, if it started us.
    pub(super) fn open() -> Store {
        match process::notify_socket() {
            Ok(notify) => Store { notify },
            Err(error) => {
                complain(format_args!("no copy of the FUSE descriptor can be left with systemd: {error}"));
                Store { notify: None }
            }
        }
    }

    pub(super) fn put(&self, device: BorrowedFd<'_>) {
        let Some(notify) = &self.notify else { return };
        if let Err(error) = seqpacket::send_with_fds(notify.as_fd(), PUT, &[device], seqpacket::Send::OrFail) {
            complain(format_args!("leaving a copy of the FUSE descriptor with systemd: {error}"));
        }
    }
}

/// What an earlier holder left with systemd, if its connection is alive.
pub(super) fn inherited(layout: &Layout) -> io::Result<Option<(OwnedFd, InitParams)>> {
    let mut devices = process::inherited_descriptors()?.into_iter().filter(|fd| fuse::is_device(fd.as_fd()));
    // The last one is the youngest.
    let Some(device) = devices.rfind(|fd| fuse::is_connected(fd.as_fd())) else { return Ok(None) };
    let path = layout.holder_parameters();
    let parameters = match std::fs::read(&path).map(|text| serde_json::from_slice(&text)) {
        Ok(Ok(parameters)) => parameters,
        Ok(Err(error)) => {
            complain(format_args!("{}: {error}", path.display()));
            return Ok(None);
        }
        Err(error) => {
            complain(format_args!("{}: {error}", path.display()));
            return Ok(None);
        }
    };
    Ok(Some((device, parameters)))
}

/// Writes down what was negotiated on the connection of the mount that was just made.
pub(super) fn remember(layout: &Layout, init: &InitParams) -> io::Result<()> {
    let text = serde_json::to_vec(init).map_err(io::Error::other)?;
    let (path, new) = (layout.holder_parameters(), layout.holder_parameters().with_extension("new"));
    std::fs::write(&new, text)?;
    std::fs::rename(new, path)
}
