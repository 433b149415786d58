//! Layers unpacked by the real custodian.

use super::{
    lab::{Lab, block_on},
    privileged,
};
use crate::{
    formats::tar_writer::{Dialect, Member, TarWriter},
    support::tree,
};
use soci::{
    custodian::{Budget, Client, Place, UnpackError},
    layout::SnapshotId,
};
use std::{fs::File, io::Write, os::fd::OwnedFd};

const PLENTY: Budget = Budget { bytes: 1 << 30, inodes: 100_000 };

/// Sends a tar through a pipe and waits for the outcome.
fn unpack(client: &Client, id: u32, tar: Vec<u8>, place: Place, budget: Budget) -> Result<Budget, UnpackError> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    let writer = std::thread::spawn(move || {
        // The worker may refuse it half-way.
        let _ = File::from(write).write_all(&tar);
    });
    let result = block_on(client.unpack(SnapshotId(id), OwnedFd::from(read), place, budget));
    writer.join().expect("write");
    result
}

#[test]
fn privileged_a_layer_is_unpacked_and_published() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    lab.fs(1);
    let client = lab.client();
    let tar = TarWriter::of(
        Dialect::Pax,
        &[Member::new(b'5', "a/"), Member::file("a/b", vec![7; 1_000_000]), Member::file("c/d/e", "x")],
    );
    let used = unpack(&client, 1, tar, Place::Above, PLENTY).expect("unpacked");
    assert_eq!(used, Budget { bytes: 1_000_001, inodes: 5 });
    block_on(client.publish(SnapshotId(1), &[])).expect("published");
    let tree = tree::read(&lab.fs(1));
    assert_eq!(tree.len(), 6, "{tree:?}");
    assert!(!lab.layout.snapshot_unpack(SnapshotId(1)).exists());
}
