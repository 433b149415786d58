use super::{
    eventually,
    lab::{Lab, block_on, kill, processes},
    run, somebody_else_is_answered, status_row,
};
use proptest::prelude::*;
use rustix::mount::{MountFlags, UnmountFlags};
use soci::{
    custodian::{
        self,
        protocol::{Outcome, Reply, Request},
    },
    layout::{Layout, SnapshotId},
    sys::seqpacket,
};
use std::{
    fs,
    io::ErrorKind,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

#[test]
fn privileged_a_hostile_tree_is_removed_and_nothing_else() {
    let lab = Lab::new();
    let canary = lab.dir.path().join("canary");
    fs::create_dir(&canary).expect("mkdir");
    fs::write(canary.join("passwd"), b"root").expect("write");
    let content = lab.fs(1);
    symlink(&canary, content.join("etc")).expect("symlink");
    symlink("/proc/self/root", content.join("magic")).expect("symlink");
    fs::hard_link(canary.join("passwd"), content.join("shadow")).expect("link");
    // Somebody else's private directory, sticky, with a third party's file in it.
    fs::create_dir(content.join("home")).expect("mkdir");
    fs::write(content.join("home/file"), b"x").expect("write");
    chown(content.join("home/file"), Some(4711), Some(4711)).expect("chown");
    fs::set_permissions(content.join("home"), fs::Permissions::from_mode(0o1700)).expect("chmod");
    chown(content.join("home"), Some(12345), Some(12345)).expect("chown");
    // Deeper than any path.
    let mut at = rustix::fs::open(&content, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).expect("open");
    for _ in 0..2000 {
        rustix::fs::mkdirat(&at, "deep", rustix::fs::Mode::from_raw_mode(0o700)).expect("mkdir");
        at = rustix::fs::openat(&at, "deep", rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).expect("open");
    }
    drop(at);
    // A lazy layer.
    fs::create_dir_all(lab.layout.lazy().join("2")).expect("mkdir");
    fs::create_dir(lab.layout.snapshot(SnapshotId(2))).expect("mkdir");
    symlink(Layout::lazy_link(SnapshotId(2)), lab.layout.snapshot_fs(SnapshotId(2))).expect("symlink");

    let client = lab.client();
    block_on(async {
        client.remove_tree(SnapshotId(1)).await.expect("remove");
        client.remove_tree(SnapshotId(2)).await.expect("remove");
        client.remove_tree(SnapshotId(1)).await.expect("what is gone is removed");
    });
    assert!(lab.gone(1) && lab.gone(2));
    assert_eq!(fs::read(canary.join("passwd")).expect("still there"), b"root");
    assert!(lab.layout.lazy().join("2").exists());
}

#[test]
fn privileged_a_mount_left_inside_is_neither_entered_nor_emptied() {
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
        }
    }
    let lab = Lab::new();
    let content = lab.fs(1);
    let elsewhere = lab.dir.path().join("elsewhere");
    let points = [content.join("tmpfs"), content.join("a/bind")];
    for directory in [&elsewhere, &points[0], &points[1]] {
        fs::create_dir_all(directory).expect("mkdir");
    }
    fs::write(content.join("a/file"), b"x").expect("write");
    rustix::mount::mount("none", &points[0], "tmpfs", MountFlags::empty(), None).expect("mount");
    let tmpfs = Unmount(points[0].clone());
    rustix::mount::mount_bind(&elsewhere, &points[1]).expect("bind");
    let bind = Unmount(points[1].clone());
    for point in &points {
        fs::write(point.join("keep"), vec![1; 1 << 20]).expect("write");
    }

    let client = lab.client();
    block_on(async {
        let refused = client.remove_tree(SnapshotId(1)).await.expect_err("a mount is in the way");
        assert_eq!(refused.kind(), ErrorKind::ResourceBusy, "{refused}");
        let usage = client.usage(SnapshotId(1)).await.expect("usage");
        assert!(usage.size < 1 << 20, "mounts are not part of the snapshot: {usage:?}");
    });
    assert!(elsewhere.join("keep").exists() && points[0].join("keep").exists());
    assert!(content.join("a/file").exists(), "nothing went before it can all go");

    drop((tmpfs, bind));
    block_on(client.remove_tree(SnapshotId(1))).expect("remove");
    assert!(lab.gone(1));
    assert!(elsewhere.join("keep").exists());
}

#[test]
fn privileged_usage_is_what_du_says_and_ownership_goes_where_it_was_told() {
    let lab = Lab::new();
    let content = lab.fs(3);
    for n in 0..50usize {
        let directory = content.join(format!("d{}/e{}", n % 7, n % 5));
        fs::create_dir_all(&directory).expect("mkdir");
        fs::write(directory.join(format!("f{n}")), vec![1; n * 1000]).expect("write");
        fs::hard_link(directory.join(format!("f{n}")), content.join(format!("link{n}"))).expect("link");
    }
    fs::set_permissions(content.join("d1"), fs::Permissions::from_mode(0o700)).expect("chmod");
    chown(content.join("d1"), Some(12345), Some(12345)).expect("chown");
    let du = |option: &str| -> u64 {
        let output = run(Command::new("du").args(["-s", option]).arg(&content));
        String::from_utf8_lossy(&output.stdout).split_whitespace().next().expect("a number").parse().expect("a number")
    };
    let client = lab.client();
    block_on(async {
        let usage = client.usage(SnapshotId(3)).await.expect("usage");
        assert_eq!((usage.size, usage.inodes), (du("--block-size=1"), du("--inodes")));
        client.own_upper(SnapshotId(3), 1000, 2000).await.expect("chown");
        assert_eq!(client.usage(SnapshotId(99)).await.expect_err("no such snapshot").kind(), ErrorKind::NotFound);
    });
    let owner = fs::metadata(&content).expect("stat");
    assert_eq!((owner.uid(), owner.gid()), (1000, 2000));
    assert_eq!(fs::metadata(content.join("d0")).expect("stat").uid(), 0);
}

#[test]
fn privileged_many_requests_at_once_are_all_answered() {
    let lab = Lab::new();
    for id in 0..40 {
        fs::write(lab.fs(id).join("x"), b"x").expect("write");
    }
    let client = lab.client();
    let multi = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    multi.block_on(async {
        let asked: Vec<_> = (0..400u32)
            .map(|n| {
                let client = client.clone();
                tokio::spawn(async move {
                    match n % 2 {
                        0 => client.remove_tree(SnapshotId(n % 40)).await.map(drop),
                        _ => match client.usage(SnapshotId(n % 40)).await {
                            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                            _ => Ok(()),
                        },
                    }
                })
            })
            .collect();
        for answer in asked {
            answer.await.expect("join").expect("answer");
        }
    });
    assert!((0..40).step_by(2).all(|id| lab.gone(id)));
}

#[test]
fn privileged_the_custodian_keeps_three_capabilities_no_network_and_ends_with_its_daemon() {
    let lab = Lab::new();
    let client = lab.client();
    block_on(client.remove_tree(SnapshotId(1))).expect("serving");
    let pid = lab.custodian().expect("running");
    // CHOWN (0), DAC_OVERRIDE (1), FOWNER (3).
    for (row, expected) in [("CapEff", 0xb), ("CapPrm", 0xb), ("CapBnd", 0xb), ("CapInh", 0), ("CapAmb", 0)] {
        assert_eq!(u64::from_str_radix(&status_row(pid, row), 16), Ok(expected), "{row}");
    }
    assert_eq!(status_row(pid, "NoNewPrivs"), "1");
    assert_eq!(status_row(pid, "Seccomp"), "2");
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).expect("namespace");
    assert_ne!(network(&pid.to_string()), network("self"));
    drop(client);
    eventually("it ends", || processes(&lab.layout).is_empty().then_some(()));
}

#[test]
fn privileged_a_dead_child_is_reported_and_a_dead_unit_is_reconnected() {
    let lab = Lab::new();
    let client = lab.client();
    kill(lab.custodian().expect("running"));
    let error = block_on(client.remove_tree(SnapshotId(1))).expect_err("it is dead");
    assert!(error.to_string().contains("restart the daemon"), "{error}");

    let (mut unit, path) = lab.as_a_unit(&[]);
    let client = lab.client();
    block_on(client.remove_tree(SnapshotId(1))).expect("served by the unit");
    unit.kill();
    fs::remove_file(path).expect("remove");
    let error = block_on(client.remove_tree(SnapshotId(1))).expect_err("nobody listens");
    assert!(error.to_string().contains("not answering"), "{error}");
    let (_unit, _) = lab.as_a_unit(&[]);
    block_on(client.remove_tree(SnapshotId(1))).expect("connected again");
}

#[test]
fn privileged_other_users_are_not_served_by_the_custodian() {
    let lab = Lab::new();
    let (_unit, path) = lab.as_a_unit(&[]);
    // Even where an administrator opened the path to everybody.
    fs::set_permissions(lab.dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    fs::set_permissions(lab.layout.root(), fs::Permissions::from_mode(0o755)).expect("chmod");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("chmod");
    assert!(!somebody_else_is_answered(&path));
    block_on(lab.client().remove_tree(SnapshotId(1))).expect("root still is");
}

/// Sends one message and returns the reply.
fn exchange(socket: &OwnedFd, message: &[u8]) -> Reply {
    seqpacket::send(socket.as_fd(), message, seqpacket::Send::Wait).expect("send");
    let mut buffer = [0; Reply::LEN];
    let (received, _) = seqpacket::recv_with_fds(socket.as_fd(), &mut buffer).expect("receive");
    Reply::decode(&buffer[..received]).expect("a reply")
}

#[test]
fn privileged_garbage_gets_an_error_and_harms_nothing() {
    let lab = Lab::new();
    let (_unit, path) = lab.as_a_unit(&[]);
    let socket = seqpacket::connect(&path).expect("connect");
    let bytes = prop::collection::vec(any::<u8>(), 1..200);
    proptest!(ProptestConfig::with_cases(300), |(bytes in bytes)| {
        let reply = exchange(&socket, &bytes);
        if Request::decode(&bytes).is_err() {
            prop_assert_eq!(reply.outcome, Outcome::Malformed);
        }
    });
    // Descriptors that nobody asked for are closed, not collected.
    let file = tempfile::tempfile().expect("file");
    let hello = Request { tag: 5, operation: custodian::protocol::Operation::Hello };
    for _ in 0..2000 {
        let two = [file.as_fd(), file.as_fd()];
        seqpacket::send_with_fds(socket.as_fd(), &hello.encode(), &two, seqpacket::Send::Wait).expect("send");
        let mut buffer = [0; Reply::LEN];
        seqpacket::recv_with_fds(socket.as_fd(), &mut buffer).expect("receive");
        assert_eq!(Reply::decode(&buffer).map(|reply| reply.tag), Some(5));
    }
    assert!(Path::new(&path).exists());
}
