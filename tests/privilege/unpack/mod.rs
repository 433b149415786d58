//! Layers unpacked by the real custodian: what becomes of good ones, of hostile ones, and when somebody dies meanwhile.

mod copy;
mod equal;
mod hostile;
mod life;

use super::lab::{Lab, block_on};
use crate::{
    formats::tar_writer::{Dialect, Member, TarWriter},
    support::tree,
};
use soci::{
    custodian::{Budget, Client, Place, UnpackError},
    layout::SnapshotId,
};
use std::{
    fs::File,
    io::Write,
    os::fd::OwnedFd,
    thread::{self, JoinHandle},
};

pub const PLENTY: Budget = Budget { bytes: 1 << 30, inodes: 100_000 };
/// A custodian as it is, and as on a kernel without openat2 and landlock.
pub const KERNELS: [&[&str]; 2] = [&[], &["--as-on-an-old-kernel"]];

/// A pipe with somebody who writes `tar` into it until nobody reads any more.
pub fn piped(tar: Vec<u8>) -> (OwnedFd, JoinHandle<()>) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    let writer = thread::spawn(move || {
        // The worker may refuse it half-way.
        let _ = File::from(write).write_all(&tar);
    });
    (read, writer)
}

/// Unpacks a tar and waits for the outcome.
pub fn unpack(client: &Client, id: u32, tar: Vec<u8>, place: Place, budget: Budget) -> Result<Budget, UnpackError> {
    let (read, writer) = piped(tar);
    let result = block_on(client.unpack(SnapshotId(id), read, place, budget));
    writer.join().expect("write");
    result
}

#[test]
fn privileged_a_layer_is_unpacked_and_published() {
    for arguments in KERNELS {
        let lab = Lab::new();
        let _unit = lab.as_a_unit(arguments);
        let content = lab.fs(1);
        std::os::unix::fs::chown(&content, Some(5), Some(6)).expect("chown");
        let client = lab.client();
        let members = [
            Member::new(b'5', "a/"),
            Member::file("a/b", vec![7; 1_000_000]),
            Member::file("c/d/e", "x"),
            Member { mode: 0o700, uid: 9, ..Member::new(b'5', "./") },
        ];
        let used = unpack(&client, 1, TarWriter::of(Dialect::Pax, &members), Place::Above, PLENTY).expect("unpacked");
        assert_eq!(used, Budget { bytes: 1_000_001, inodes: 5 });
        assert_eq!(tree::read(&content).len(), 1, "nothing is there before it is published");
        block_on(client.publish(SnapshotId(1), &[])).expect("published");
        let published = tree::read(&content);
        assert_eq!(published.len(), 6, "{published:?}");
        let root = &published[std::path::Path::new("")];
        assert_eq!((root.owner, root.mode), ((5, 6), 0o755), "the root is the snapshot's, whatever the tar says");
        assert!(!lab.layout.snapshot_unpack(SnapshotId(1)).exists());
        let error = block_on(client.publish(SnapshotId(1), &[])).expect_err("nothing is left to publish");
        assert!(error.to_string().contains("publish"), "{error}");
    }
}
