//! What is unpacked beside a snapshot's `fs` until it is known to be right: making room for it, publishing it, throwing it away.
//!
//! Everything about it is in `<id>/unpack` (see [`crate::unpack`]), which is removed after a publish, after a failed unpack, and at the custodian's
//! next start.

use super::{
    implied::{self, Implied},
    tree::{CONTENT, Result, Snapshots, decimal},
};
use crate::{
    layout::SnapshotId,
    unpack::{TRASH, TREE},
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Gid, Mode, RawDir, Uid},
    io::Errno,
};
use std::{ffi::CStr, mem::MaybeUninit};

const UNPACK: &CStr = c"unpack";

impl Snapshots {
    /// An empty `unpack` with `tree` and `trash` in it.
    pub(super) fn begin_unpack(&self, id: SnapshotId) -> Result<OwnedFd> {
        let top = self.top(id)?;
        self.take_apart(top.as_fd(), UNPACK)?;
        rustix::fs::mkdirat(&top, UNPACK, Mode::RWXU)?;
        let work = self.open_child(top.as_fd(), UNPACK)?;
        for name in [TREE, TRASH] {
            rustix::fs::mkdirat(&work, name, Mode::RWXU)?;
        }
        Ok(work)
    }

    /// Removes what was unpacked and not published.
    pub(super) fn discard(&self, id: SnapshotId) -> Result<()> {
        match self.top(id) {
            Ok(top) => self.take_apart(top.as_fd(), UNPACK),
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Gives the implied directories their attributes, then puts the tree in the place of `fs`: an empty directory, whose owner and mode it takes.
    /// ENOENT if nothing was unpacked, ENOTEMPTY if there is something in `fs`, ELOOP or ENOTDIR if it is a lazy layer.
    pub(super) fn publish(&self, id: SnapshotId, parents: &[SnapshotId], implied: Vec<Implied>) -> Result<()> {
        let top = self.top(id)?;
        let work = self.open_child(top.as_fd(), UNPACK)?;
        let tree = self.open_child(work.as_fd(), TREE)?;
        let stands_in = rustix::fs::fstat(self.open_child(top.as_fd(), CONTENT)?)?;
        implied::dress(self, tree.as_fd(), parents, implied)?;
        rustix::fs::fchown(&tree, Some(Uid::from_raw(stands_in.st_uid)), Some(Gid::from_raw(stands_in.st_gid)))?;
        rustix::fs::fchmod(&tree, Mode::from_raw_mode(stands_in.st_mode & 0o7777))?;
        rustix::fs::renameat(&work, TREE, &top, CONTENT)?;
        // It is published. What cannot be removed now is removed at the next start.
        let _ = self.take_apart(top.as_fd(), UNPACK);
        Ok(())
    }

    /// Removes what an earlier custodian left unfinished. How many snapshots had something.
    pub(super) fn sweep(&self) -> Result<usize> {
        let mut swept = 0;
        // Its own descriptor, as a descriptor has one place in the listing.
        let listed = self.open_child(self.directory(), c".")?;
        let mut buffer = vec![MaybeUninit::uninit(); super::tree::LISTING];
        let mut listing = RawDir::new(listed, &mut buffer);
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let number = entry.file_name().to_str().ok().and_then(|name| name.parse().ok());
            let Some(id) = number.map(SnapshotId).filter(|id| decimal(*id).as_c_str() == entry.file_name()) else {
                continue;
            };
            let Ok(top) = self.top(id) else { continue };
            if self.open_child(top.as_fd(), UNPACK).is_ok() {
                self.take_apart(top.as_fd(), UNPACK)?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    fn top(&self, id: SnapshotId) -> Result<OwnedFd> {
        self.open_child(self.directory(), &decimal(id))
    }

    pub(super) fn open_child(&self, directory: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
        self.opener().open(directory, name)
    }
}
