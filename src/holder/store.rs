//! The second keeper: systemd's descriptor store, for the moment in which both the holder and the daemon die.
//!
//! The unit of `soci-mount` has `FileDescriptorStoreMax=`. What is put there survives the death of the process and comes back to the next one
//! (not after `systemctl stop`, which empties the store: so never the only keeper). systemd 219 stores descriptors without names, so what comes
//! back is recognised by being a FUSE device, or the anonymous file whose number is in a file beside the holder's socket, with what was negotiated.
//!
//! The connection to systemd is opened before the holder confines itself; afterwards it could not be.
#![forbid(unsafe_code)]

use super::{InitParams, Kept, complain};
use crate::{
    layout::Layout,
    sys::{
        fuse, process,
        seqpacket::{self, Patience},
        shared,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

const READY: &[u8] = b"READY=1";
/// How long systemd may take to make room for [`READY`]. A start that it does not hear of it repeats, and the daemon keeps the connection meanwhile.
const READY_PATIENCE: Duration = Duration::from_secs(10);
/// Puts a descriptor there. The names are for people (`systemd-analyze fdstore`); systemd 219 ignores them.
const PUT_DEVICE: &[u8] = b"FDSTORE=1\nFDNAME=fuse";
const PUT_JOURNAL: &[u8] = b"FDSTORE=1\nFDNAME=requests";
const PUT_LOGINS: &[u8] = b"FDSTORE=1\nFDNAME=logins";
const FORGET_LOGINS: &[u8] = b"FDSTOREREMOVE=1\nFDNAME=logins";
/// Removes those of connections that are gone; systemd removes dead devices itself. 219 does not know how, and keeps some empty files.
const FORGET_JOURNALS: &[u8] = b"FDSTOREREMOVE=1\nFDNAME=requests";

/// What a later holder must know of what it finds in the store.
#[derive(Serialize, Deserialize)]
struct Parameters {
    #[serde(flatten)]
    init: InitParams,
    /// [`shared::identity`] of the journal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    journal: Option<u64>,
}

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

    fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) {
        let Some(notify) = &self.notify else { return };
        if let Err(error) = seqpacket::send_with_fds(notify.as_fd(), message, fds, seqpacket::Send::OrFail) {
            complain(format_args!("leaving a copy of a descriptor with systemd: {error}"));
        }
    }

    /// Tells systemd that we are. Waits for it, but not for ever.
    pub(super) fn ready(&self) {
        let Some(notify) = &self.notify else { return };
        let told = seqpacket::set_patience(notify.as_fd(), Patience::AtMost(READY_PATIENCE))
            .and_then(|()| seqpacket::send(notify.as_fd(), READY, seqpacket::Send::Wait));
        if let Err(error) = told {
            complain(format_args!("telling systemd that we are ready: {error}"));
        }
    }

    pub(super) fn put(&self, kept: &Kept) {
        self.send(PUT_DEVICE, &[kept.device.as_fd()]);
        if let Some(journal) = &kept.journal {
            self.send(FORGET_JOURNALS, &[]);
            self.send(PUT_JOURNAL, &[journal.as_fd()]);
        }
    }

    /// systemd 219 cannot forget and stops taking more at some point: then it has older logins than the holder.
    pub(super) fn put_logins(&self, logins: BorrowedFd<'_>) {
        self.send(FORGET_LOGINS, &[]);
        self.send(PUT_LOGINS, &[logins]);
    }
}

/// What an earlier holder left with systemd: its connection, if that is alive, and logins.
pub(super) fn inherited(layout: &Layout) -> io::Result<(Option<Kept>, Option<OwnedFd>)> {
    let (devices, others): (Vec<_>, Vec<_>) =
        process::inherited_descriptors()?.into_iter().partition(|fd| fuse::is_device(fd.as_fd()));
    let (logins, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|fd| super::are_logins(fd.as_fd()));
    // The last one is the youngest.
    Ok((connection(layout, devices, others)?, logins.into_iter().next_back()))
}

fn connection(layout: &Layout, devices: Vec<OwnedFd>, others: Vec<OwnedFd>) -> io::Result<Option<Kept>> {
    let Some(device) = devices.into_iter().rfind(|fd| fuse::is_connected(fd.as_fd())) else { return Ok(None) };
    let path = layout.holder_parameters();
    let parameters = std::fs::read(&path).and_then(|text| serde_json::from_slice(&text).map_err(io::Error::other));
    let Parameters { init, journal } = match parameters {
        Ok(parameters) => parameters,
        Err(error) => {
            complain(format_args!("{}: {error}", path.display()));
            return Ok(None);
        }
    };
    let is_it = |fd: &OwnedFd| shared::is_shared(fd.as_fd()) && shared::identity(fd.as_fd()).ok() == journal;
    Ok(Some(Kept { device, init, journal: others.into_iter().find(is_it) }))
}

/// Writes down what was negotiated on the connection of the mount that was just made.
pub(super) fn remember(layout: &Layout, kept: &Kept) -> io::Result<()> {
    let journal = kept.journal.as_ref().map(|fd| shared::identity(fd.as_fd())).transpose()?;
    let text = serde_json::to_vec(&Parameters { init: kept.init, journal }).map_err(io::Error::other)?;
    let (path, new) = (layout.holder_parameters(), layout.holder_parameters().with_extension("new"));
    std::fs::write(&new, text)?;
    std::fs::rename(new, path)
}
