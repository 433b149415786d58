//! A layer copied for a container in a user namespace: everything is the same but the owners.

use super::{
    super::lab::{Lab, block_on},
    KERNELS, PLENTY, unpack,
};
use crate::{
    formats::tar_writer::{Dialect, Member, TarWriter},
    support::{
        image::{Form, Kind, Layer},
        tree::{self, Tree},
    },
};
use soci::{
    custodian::{Client, Place, Refusal, UnpackError},
    layout::SnapshotId,
    oci::IdMaps,
};
use std::{fs, os::unix::fs::symlink, path::Path};

const FROM: SnapshotId = SnapshotId(1);
const TO: SnapshotId = SnapshotId(2);

fn maps() -> IdMaps {
    IdMaps::new("0:12345:1000,1000:22222:1", "0:12345:1001").expect("mappings")
}

/// `cap_net_raw+ep`, version 2, as setcap writes it.
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A layer with one of everything.
fn everything() -> Vec<u8> {
    let mut layer = Layer::new().form(Form::Tar);
    layer.dir("d").mode(0o2750).owner(0, 7).xattr("user.of", b"d");
    layer.file("d/plain", vec![7; 200_000]).owner(5, 6).mtime(1_234_567_890, 987_654_321);
    layer.hardlink("d/again", "d/plain").owner(5, 6).mtime(1_234_567_890, 987_654_321);
    layer.file("set-id", "x").mode(0o6755).owner(1000, 1000);
    layer.file("capable", "y").mode(0o755).xattr("security.capability", &NET_RAW);
    layer.hardlink("capable-too", "capable").mode(0o755).xattr("security.capability", &NET_RAW);
    layer.file("empty", "").mode(0o000);
    layer.symlink("link", "/etc/passwd").owner(3, 3);
    layer.add("null", Kind::Char(1, 3)).mode(0o666);
    layer.add("disk", Kind::Block(8, 0)).owner(0, 6);
    layer.add("pipe", Kind::Fifo);
    layer.whiteout("gone");
    layer.dir("hides");
    layer.opaque("hides");
    layer.file("hides/here", "z");
    let mut tar = Vec::new();
    layer.write(&mut tar).expect("tar");
    tar
}

fn prepare(lab: &Lab, client: &Client, tar: Vec<u8>) -> Tree {
    let content = lab.fs(FROM.0);
    unpack(client, FROM.0, tar, Place::Above, PLENTY).expect("unpacked");
    block_on(client.publish(FROM, &[])).expect("published");
    lab.fs(TO.0);
    tree::read(&content)
}

#[test]
fn privileged_a_copy_differs_from_its_original_in_its_owners_only() {
    for arguments in KERNELS {
        let lab = Lab::new();
        let _unit = lab.as_a_unit(arguments);
        let client = lab.client();
        let original = prepare(&lab, &client, everything());
        block_on(client.copy(FROM, TO, &maps())).expect("copied");

        let mut expected = original.clone();
        for (path, node) in &mut expected {
            let is_whiteout = node.kind == "character device" && node.device == 0;
            if !is_whiteout && path != Path::new("") {
                node.owner = maps().host(node.owner.0, node.owner.1).expect("mapped");
            }
            if let Some(capability) = node.xattrs.get_mut("security.capability".as_ref() as &std::ffi::OsStr) {
                assert_eq!(capability[..], NET_RAW);
                *capability = [&[1, 0, 0, 3], &NET_RAW[4..], &12345u32.to_le_bytes()].concat();
            }
        }
        let copy = tree::read(&lab.layout.snapshot_fs(TO));
        assert!(copy.len() > 14, "{}", copy.len());
        let own_time = [Path::new("").to_owned()].into();
        assert_eq!(tree::differences(&expected, &copy, &own_time), Vec::<String>::new(), "{arguments:?}");
        assert_eq!(copy[Path::new("set-id")].owner, (22222, 13345));
        assert_eq!(tree::read(&lab.layout.snapshot_fs(FROM)), original, "the original is as it was");
        assert!(!lab.layout.snapshot_unpack(TO).exists());
    }
}

#[test]
fn privileged_what_cannot_be_copied_is_named_and_leaves_nothing() {
    let lab = Lab::new();
    let client = lab.client();
    let tar =
        TarWriter::of(Dialect::Pax, &[Member::file("a/kept", "1"), Member { uid: 5000, ..Member::file("a/who", "2") }]);
    prepare(&lab, &client, tar);
    let error = block_on(client.copy(FROM, TO, &maps())).expect_err("5000 is nobody there");
    assert!(matches!(&error, UnpackError::Refused { why: Refusal::Owner, .. }), "{error}");
    assert!(error.to_string().contains("a/who"), "{error}");
    let nothing = |id| {
        assert_eq!(fs::read_dir(lab.layout.snapshot_fs(id)).expect("fs").count(), 0);
        assert!(!lab.layout.snapshot_unpack(id).exists());
    };
    nothing(TO);
    // Another snapshot's place may be a link to somewhere else: a lazy layer, or worse.
    let third = SnapshotId(3);
    fs::remove_dir(lab.fs(third.0)).expect("empty");
    symlink("/etc", lab.layout.snapshot_fs(third)).expect("link");
    block_on(client.copy(third, TO, &maps())).expect_err("a link is not followed");
    nothing(TO);
    block_on(client.copy(SnapshotId(9), TO, &maps())).expect_err("there is no such snapshot");
    nothing(TO);
}

#[test]
fn privileged_a_deep_tree_is_copied_with_few_descriptors() {
    let lab = Lab::new();
    let client = lab.client();
    let depth = 300; // more than a worker has descriptors
    let path = format!("{}file", "d/".repeat(depth));
    let original = prepare(&lab, &client, TarWriter::of(Dialect::Pax, &[Member::file(path.as_str(), "deep")]));
    assert_eq!(original.len(), depth + 2);
    block_on(client.copy(FROM, TO, &maps())).expect("copied");
    let copy = tree::read(&lab.layout.snapshot_fs(TO));
    assert_eq!(copy.keys().collect::<Vec<_>>(), original.keys().collect::<Vec<_>>());
    assert_eq!(copy.values().last().expect("file").owner, (12345, 12345));
}
