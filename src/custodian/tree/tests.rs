use super::*;
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
};

/// Both ways of opening, on every test: the second is what an old kernel gets.
fn with_each_opener(test: impl Fn(Snapshots, &Path)) {
    for old_kernel in [false, true] {
        let dir = tempfile::tempdir().expect("temp");
        test(Snapshots::open(dir.path(), old_kernel).expect("open"), dir.path());
    }
}

fn deep(base: &Path, levels: usize) {
    let mut at = rustix::fs::openat(rustix::fs::CWD, base, directory_flags(), Mode::empty()).expect("open");
    for _ in 0..levels {
        rustix::fs::mkdirat(&at, "directory", Mode::from_raw_mode(0o700)).expect("mkdir");
        rustix::fs::openat(
            &at,
            "file",
            rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
            Mode::from_raw_mode(0o600),
        )
        .expect("create");
        at = rustix::fs::openat(&at, "directory", directory_flags(), Mode::empty()).expect("open");
    }
}

#[test]
fn a_tree_far_deeper_than_a_path_can_name_is_measured_and_removed() {
    with_each_opener(|snapshots, dir| {
        fs::create_dir_all(dir.join("7/fs")).expect("mkdir");
        deep(&dir.join("7/fs"), 3000);
        assert_eq!(snapshots.usage(SnapshotId(7)).expect("usage").inodes, 6001);
        snapshots.remove(SnapshotId(7)).expect("remove");
        assert!(!dir.join("7").exists());
    });
}

#[test]
fn wide_directories_inside_each_other_are_removed_completely() {
    with_each_opener(|snapshots, dir| {
        for a in 0..40 {
            for b in 0..20 {
                let at = dir.join(format!("1/fs/{a}/{b}"));
                fs::create_dir_all(&at).expect("mkdir");
                fs::write(at.join("x"), b"x").expect("write");
            }
        }
        // What an interrupted removal leaves.
        fs::create_dir_all(dir.join("1/.gone-0/rest")).expect("mkdir");
        fs::write(dir.join("1/.gone-1"), b"").expect("write");
        snapshots.remove(SnapshotId(1)).expect("remove");
        assert!(!dir.join("1").exists());
    });
}

#[test]
fn symlinks_are_removed_and_never_followed() {
    with_each_opener(|snapshots, dir| {
        let canary = tempfile::tempdir().expect("temp");
        fs::write(canary.path().join("keep"), b"me").expect("write");
        fs::create_dir_all(dir.join("3/fs/sub")).expect("mkdir");
        symlink(canary.path(), dir.join("3/fs/sub/out")).expect("symlink");
        symlink(canary.path(), dir.join("3/out")).expect("symlink");
        symlink("../../lazy/9", dir.join("3/lazy")).expect("symlink");
        snapshots.remove(SnapshotId(3)).expect("remove");
        assert!(!dir.join("3").exists());
        assert!(canary.path().join("keep").exists());

        // The snapshot's own name is a symlink: not ours to touch.
        symlink(canary.path(), dir.join("4")).expect("symlink");
        assert!(snapshots.remove(SnapshotId(4)).is_err());
        assert!(snapshots.own_upper(SnapshotId(4), 1, 1).is_err());
        assert!(canary.path().join("keep").exists());
    });
}

#[test]
fn a_lazy_layer_takes_no_room_and_its_link_cannot_be_given_away() {
    with_each_opener(|snapshots, dir| {
        fs::create_dir_all(dir.join("5")).expect("mkdir");
        symlink("../../lazy/5", dir.join("5/fs")).expect("symlink");
        assert_eq!(snapshots.usage(SnapshotId(5)), Ok(Usage::default()));
        assert!(snapshots.own_upper(SnapshotId(5), 1, 1).is_err());
        assert_eq!(snapshots.usage(SnapshotId(6)), Err(Errno::NOENT));
        assert_eq!(snapshots.remove(SnapshotId(6)), Ok(()));
    });
}

#[test]
fn hard_links_are_counted_once_and_holes_not_at_all() {
    with_each_opener(|snapshots, dir| {
        let content = dir.join("2/fs");
        fs::create_dir_all(content.join("a/b")).expect("mkdir");
        fs::write(content.join("one"), vec![1; 100_000]).expect("write");
        for name in ["a/two", "a/b/three", "four"] {
            fs::hard_link(content.join("one"), content.join(name)).expect("link");
        }
        // A name outside the tree: its last link is never seen.
        fs::write(content.join("shared"), b"s").expect("write");
        fs::hard_link(content.join("shared"), dir.join("2/elsewhere")).expect("link");
        fs::File::create(content.join("sparse")).and_then(|f| f.set_len(1 << 30)).expect("sparse");
        let expected: u64 = ["", "a", "a/b", "one", "shared", "sparse"]
            .iter()
            .map(|name| fs::symlink_metadata(content.join(name)).expect("stat").blocks() * 512)
            .sum();
        assert_eq!(snapshots.usage(SnapshotId(2)), Ok(Usage { size: expected, inodes: 6 }));
    });
}

#[test]
fn permission_bits_of_directories_do_not_matter_to_root() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    with_each_opener(|snapshots, dir| {
        fs::create_dir_all(dir.join("8/work/work")).expect("mkdir");
        fs::write(dir.join("8/work/work/x"), b"").expect("write");
        fs::set_permissions(dir.join("8/work/work"), fs::Permissions::from_mode(0o000)).expect("chmod");
        snapshots.remove(SnapshotId(8)).expect("remove");
        assert!(!dir.join("8").exists());
    });
}

#[test]
fn privileged_a_mount_that_the_table_did_not_show_is_still_not_entered() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    use rustix::mount::{UnmountFlags, mount_bind, unmount};
    with_each_opener(|snapshots, dir| {
        let canary = tempfile::tempdir().expect("temp");
        fs::write(canary.path().join("keep"), b"me").expect("write");
        let (point, file) = (dir.join("1/fs/point"), dir.join("1/fs/file"));
        fs::create_dir_all(&point).expect("mkdir");
        fs::write(&file, b"").expect("write");
        fs::create_dir_all(dir.join("1/fs/other/deep")).expect("mkdir");
        if mount_bind(canary.path(), &point).is_err() {
            return; // not allowed to mount here
        }
        mount_bind(canary.path().join("keep"), &file).expect("bind");
        let outcome = (snapshots.remove(SnapshotId(1)), snapshots.take_apart(snapshots.directory(), c"1"));
        for mounted in [&point, &file] {
            unmount(mounted, UnmountFlags::DETACH).expect("unmount");
        }
        assert_eq!(outcome, (Err(Errno::BUSY), Err(Errno::BUSY)));
        assert!(canary.path().join("keep").exists());
        assert!(!dir.join("1/fs/other").exists());
        snapshots.remove(SnapshotId(1)).expect("remove");
    });
}
