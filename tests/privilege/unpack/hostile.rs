//! One row per attack: what is refused and with which words, what is harmless and why, and that nothing outside of the directory changed.

use super::{super::lab::Lab, KERNELS, unpack};
use crate::{
    formats::tar_writer::{Dialect, Member, TarWriter},
    support::{image::noise, tree},
};
use soci::{
    custodian::{Budget, Place, Refusal, UnpackError},
    layout::SnapshotId,
};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    os::unix::{
        ffi::OsStringExt,
        fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

const ID: u32 = 7;
const BUDGET: Budget = Budget { bytes: 4 << 20, inodes: 3000 };

/// What a row expects.
enum Expect {
    /// Refused, for this reason, naming this.
    Refused(Refusal, &'static str),
    /// Unpacked; then these paths are of these kinds.
    Made(Vec<(PathBuf, &'static str)>),
}
use Expect::{Made, Refused};

struct Row {
    what: &'static str,
    tar: Vec<u8>,
    expect: Expect,
}

fn row(what: &'static str, members: &[Member], expect: Expect) -> Row {
    Row { what, tar: TarWriter::of(Dialect::Pax, members), expect }
}

fn dir(name: impl Into<Vec<u8>>) -> Member {
    Member { mode: 0o755, ..Member::new(b'5', name) }
}

fn file(name: impl Into<Vec<u8>>) -> Member {
    Member { mode: 0o666, ..Member::file(name, "pwned") }
}

fn link(name: &str, target: impl Into<Vec<u8>>) -> Member {
    Member { mode: 0o777, ..Member::new(b'2', name).linked(target) }
}

fn hard_link(name: &str, target: impl Into<Vec<u8>>) -> Member {
    Member { mode: 0o6777, uid: 4242, ..Member::new(b'1', name).linked(target) }
}

fn made(paths: &[(&str, &'static str)]) -> Expect {
    Made(paths.iter().map(|(path, kind)| (PathBuf::from(path), *kind)).collect())
}

/// `outside` is a directory with a file `passwd` in it, as an absolute path.
fn rows(outside: &str) -> Vec<Row> {
    let passwd = format!("{outside}/passwd");
    let out = || link("out", outside);
    let through = |what| Refused(Refusal::ThroughNonDirectory, what);
    let target = |what| Refused(Refusal::LinkTarget, what);
    let mut rows = vec![
        // Names.
        row("an absolute name is one below the root", &[file(passwd.clone())], made(&[(&passwd[1..], "file")])),
        row("a name that goes up", &[file("../../../passwd")], Refused(Refusal::DotDot, "../../../passwd")),
        row(
            "a name that goes up to the worker's own files",
            &[file("../implied")],
            Refused(Refusal::DotDot, "implied"),
        ),
        row("a name that goes down and up", &[dir("a"), file("a/../../passwd")], Refused(Refusal::DotDot, "a/..")),
        row("a directory called dot-dot", &[dir("a/..")], Refused(Refusal::DotDot, "a/..")),
        row("a file that is the root", &[file("./")], Refused(Refusal::NamesRoot, "./")),
        row("a link that is the root", &[link("/", outside)], Refused(Refusal::NamesRoot, "/")),
        row("a file without a name", &[file("")], Refused(Refusal::NamesRoot, "\"\"")),
        row(
            "a name that is not UTF-8",
            &[file(b"\xff\xfe/\xe9".to_vec())],
            Made(vec![(PathBuf::from(OsString::from_vec(b"\xff\xfe/\xe9".to_vec())), "file")]),
        ),
        row("a name with control characters", &[file("a\n\x1b[2J")], made(&[("a\n\x1b[2J", "file")])),
        row("a part too long", &[file("x".repeat(300))], Refused(Refusal::NameTooLong, "xxx")),
        row("a name too long", &[file("x/".repeat(2500) + "y")], Refused(Refusal::NameTooLong, "x/x/")),
        row("as deep as a name can be", &[file("d/".repeat(1900) + "f")], made(&[("d/d/d/d/d", "directory")])),
        // Through links.
        row("a file below a link", &[out(), file("out/passwd")], through("out/passwd")),
        row("a file deep below a link", &[out(), file("out/a/b/passwd")], through("out/a/b/passwd")),
        row("a file below a link to dot-dot", &[link("up", "../.."), file("up/passwd")], through("up/passwd")),
        row("a file below a link to magic", &[link("p", "/proc/self/cwd"), file("p/x")], through("p/x")),
        row("a file below a link within the layer", &[dir("a"), link("l", "a"), file("l/x")], through("l/x")),
        row("a file below a file", &[file("f"), file("f/x")], through("f/x")),
        row(
            "a directory made a link after use",
            &[file("d/x"), link("d", outside), file("d/passwd")],
            through("d/passwd"),
        ),
        row(
            "a directory of the path made a link after use",
            &[file("d/e/f/x"), link("d/e", outside), file("d/e/f/passwd")],
            through("d/e/f/passwd"),
        ),
        row(
            "a directory swapped to and fro",
            &[file("d/x"), link("d", outside), dir("d"), file("d/passwd")],
            made(&[("d", "directory"), ("d/passwd", "file")]),
        ),
        row(
            "a directory of the name of a link",
            &[out(), Member { mode: 0o700, ..dir("out") }, file("out/passwd")],
            made(&[("out/passwd", "file")]),
        ),
        row("a file of the name of a link", &[link("l", passwd.clone()), file("l")], made(&[("l", "file")])),
        row(
            "a device of the name of a link",
            &[link("l", passwd.clone()), Member::new(b'6', "l")],
            made(&[("l", "fifo")]),
        ),
        row(
            "a link with set-ID bits, an owner and attributes",
            &[Member { mode: 0o6777, uid: 77, ..link("l", passwd.clone()).record("SCHILY.xattr.user.x", "y") }],
            made(&[("l", "symlink")]),
        ),
        row("a whiteout below a link", &[out(), file("out/.wh.passwd")], through("out/.wh.passwd")),
        row("an opaque marker below a link", &[out(), file("out/.wh..wh..opq")], through("out/.wh..wh..opq")),
        row("a link to nothing", &[link("l", "")], Refused(Refusal::SymlinkTarget, "\"l\"")),
        row("a link to too much", &[link("l", "x".repeat(5000))], Refused(Refusal::SymlinkTarget, "\"l\"")),
        // Hard links.
        row("a hard link outside", &[hard_link("h", passwd.clone())], target("\"h\"")),
        row("a hard link up", &[hard_link("h", "../../../passwd")], Refused(Refusal::DotDot, "\"h\"")),
        row("a hard link through a link", &[out(), hard_link("h", "out/passwd")], target("\"h\"")),
        row("a hard link to a link", &[link("l", passwd.clone()), hard_link("h", "l")], made(&[("h", "symlink")])),
        row(
            "a file over a hard link to a link",
            &[link("l", passwd.clone()), hard_link("h", "l"), file("h")],
            made(&[("l", "symlink"), ("h", "file")]),
        ),
        row("a hard link to a directory", &[dir("d"), hard_link("h", "d")], target("\"h\"")),
        row("a hard link to the root", &[hard_link("h", "/")], target("\"h\"")),
        row("a hard link to itself", &[file("h"), hard_link("h", "h")], target("\"h\"")),
        row("a hard link to what comes later", &[hard_link("h", "f"), file("f")], target("\"h\"")),
        row(
            "a hard link to what was replaced",
            &[file("d/f"), link("d", outside), hard_link("h", "d/f")],
            target("\"h\""),
        ),
        // Things that are no files.
        row(
            "devices",
            &[Member { dev: (1, 3), ..Member::new(b'3', "null") }, Member { dev: (8, 0), ..Member::new(b'4', "disk") }],
            made(&[("null", "character device"), ("disk", "block device")]),
        ),
        row(
            "a device below a link",
            &[out(), Member { dev: (8, 0), ..Member::new(b'4', "out/disk") }],
            through("out/disk"),
        ),
        row(
            "a major number too large",
            &[Member { dev: (4096, 0), ..Member::new(b'3', "n") }],
            Refused(Refusal::Device, "\"n\""),
        ),
        row(
            "a minor number too large",
            &[Member { dev: (0, 1 << 20), ..Member::new(b'3', "n") }],
            Refused(Refusal::Device, "\"n\""),
        ),
        row("an entry of no known type", &[Member::new(b'V', "label")], Refused(Refusal::Unsupported, "tar entry 'V'")),
        row(
            "an owner that chown leaves out",
            &[Member { uid: 0xffff_ffff, ..file("f") }],
            Refused(Refusal::Owner, "\"f\""),
        ),
        // Whiteouts.
        row("a whiteout of nothing", &[file("a/.wh.")], Refused(Refusal::Whiteout, "a/.wh.")),
        row("a whiteout of the directory", &[file("a/.wh..")], Refused(Refusal::Whiteout, "a/.wh..")),
        row("a whiteout of the directory above", &[file("a/.wh...")], Refused(Refusal::Whiteout, "a/.wh...")),
        row("a whiteout of what the layer has", &[file("x"), file(".wh.x")], made(&[("x", "file")])),
        row("a whiteout, then the file", &[file(".wh.x"), file("x")], made(&[("x", "file")])),
        row("a whiteout twice", &[file(".wh.x"), file(".wh.x")], made(&[("x", "character device")])),
        row(
            "a whiteout with content",
            &[Member::file(".wh.x", vec![1; 100_000]), file("y")],
            made(&[("x", "character device"), ("y", "file")]),
        ),
        row("a whiteout that is a directory", &[dir(".wh.x"), file("y")], made(&[("x", "character device")])),
        row("a whiteout of a link outside", &[out(), file(".wh.out")], made(&[("out", "symlink")])),
        // Too much of something.
        row(
            "a size that nobody has",
            &[Member { size: Some(1 << 62), ..file("f") }],
            Refused(Refusal::TooManyBytes, "\"f\""),
        ),
        row(
            "a size in PAX",
            &[file("f").record("size", "9223372036854775807")],
            Refused(Refusal::TooManyBytes, "\"f\""),
        ),
        row(
            "a bomb",
            &(0..5).map(|n| Member::file(format!("z{n}"), vec![0; 1 << 20])).collect::<Vec<_>>(),
            Refused(Refusal::TooManyBytes, "z4"),
        ),
        row(
            "more files than allowed",
            &(0..3001).map(|n| Member::file(format!("f{n}"), "")).collect::<Vec<_>>(),
            Refused(Refusal::TooManyInodes, "f3000"),
        ),
        row(
            "more directories than allowed",
            &[file("d/".repeat(1600) + "f"), file("e/".repeat(1600) + "f")],
            Refused(Refusal::TooManyInodes, "e/e/"),
        ),
        row("a file again and again", &vec![file("f"); 3001], Refused(Refusal::TooManyInodes, "\"f\"")),
        row(
            "a full directory replaced again and again",
            &(0..300).flat_map(|_| [dir("d"), file("d/a/b/c"), file("d")]).collect::<Vec<_>>(),
            made(&[("d", "file")]),
        ),
        row("a sparse file of GNU", &[Member::new(b'S', "s")], Refused(Refusal::Sparse, "offset")),
        row(
            "a sparse file of PAX",
            &[file("s").record("GNU.sparse.major", "1").record("GNU.sparse.minor", "0")],
            Refused(Refusal::Sparse, "offset"),
        ),
        row(
            "an attribute too large",
            &[file("f").record("SCHILY.xattr.user.x", vec![b'x'; 70_000])],
            Refused(Refusal::Xattr, "\"f\""),
        ),
        row("an attribute without a name", &[file("f").record("SCHILY.xattr.", "x")], Refused(Refusal::Xattr, "\"f\"")),
        row(
            "capabilities that are none",
            &[file("f").record("SCHILY.xattr.security.capability", "x")],
            Refused(Refusal::Xattr, "\"f\""),
        ),
        row(
            "overlayfs' own attributes",
            &[dir("d").record("SCHILY.xattr.trusted.overlay.redirect", "/etc")],
            made(&[("d", "directory")]),
        ),
        row(
            "attributes of a namespace nobody knows",
            &[file("f").record("SCHILY.xattr.bogus.x", "y")],
            made(&[("f", "file")]),
        ),
        // What is no tar.
        Row { what: "noise", tar: noise(1, 100_000), expect: Refused(Refusal::NotATar, "offset 0") },
        Row { what: "nothing at all", tar: Vec::new(), expect: Made(vec![]) },
    ];
    let whole = TarWriter::of(Dialect::Pax, &[Member::file("f", vec![1; 100_000]), file("x".repeat(150))]);
    for (what, length) in
        [("cut in a header", 100), ("cut in a file", 5000), ("cut in a PAX header", 512 + 100_352 + 600)]
    {
        rows.push(Row { what, tar: whole[..length].to_vec(), expect: Refused(Refusal::Truncated, "the tar ends") });
    }
    // A file's content ends inside of the applier, which knows its name, not inside of the tar reader.
    let Some(Row { expect, .. }) = rows.iter_mut().find(|row| row.what == "cut in a file") else { return rows };
    *expect = Refused(Refusal::Truncated, "\"f\"");
    // Several small ones are more than an inode and a block can hold.
    let flood = (0..100).fold(file("f"), |f, n| f.record(&format!("SCHILY.xattr.user.{n}"), vec![b'x'; 3000]));
    rows.push(row("a flood of attributes", &[flood], Refused(Refusal::Xattr, "\"f\"")));
    rows
}

#[test]
fn privileged_hostile_tars_are_refused_with_a_reason_and_change_nothing_outside() {
    for arguments in KERNELS {
        let lab = Lab::new();
        let _unit = lab.as_a_unit(arguments);
        let client = lab.client();
        // Everything around the directory that is unpacked into, above it and beside it.
        let outside = lab.dir.path().join("outside");
        fs::create_dir(&outside).expect("mkdir");
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o751)).expect("chmod");
        fs::write(outside.join("passwd"), b"root").expect("write");
        fs::set_permissions(outside.join("passwd"), fs::Permissions::from_mode(0o640)).expect("chmod");
        fs::write(lab.dir.path().join("passwd"), b"root").expect("write");
        fs::write(lab.fs(6).join("passwd"), b"root").expect("write");
        fs::write(lab.layout.snapshot(SnapshotId(6)).join("passwd"), b"root").expect("write");
        symlink("/", lab.fs(8).join("passwd")).expect("symlink");
        lab.fs(ID);
        fs::write(lab.layout.snapshot(SnapshotId(ID)).join("passwd"), b"root").expect("write");
        let world = || {
            let mut world = tree::read(lab.dir.path());
            let inside = Path::new("root/snapshotter/snapshots").join(ID.to_string()).join("unpack");
            world.retain(|path, _| !path.starts_with(&inside));
            // Its own directory gains and loses `unpack`.
            let own = inside.parent().expect("a parent").to_owned();
            world
                .into_iter()
                .map(|(path, node)| (path.clone(), if path == own { None } else { Some(node) }))
                .collect::<BTreeMap<_, _>>()
        };
        let before = world();
        for row in rows(outside.to_str().expect("UTF-8")) {
            let what = row.what;
            let result = unpack(&client, ID, row.tar, Place::Above, BUDGET);
            assert_eq!(world(), before, "{what}: something outside has changed");
            let unpacked = lab.layout.snapshot_unpack(SnapshotId(ID));
            match (row.expect, result) {
                (Refused(reason, words), Err(UnpackError::Refused { why, detail })) => {
                    let message = UnpackError::Refused { why, detail }.to_string();
                    assert_eq!(why, reason, "{what}: {message}");
                    assert!(message.contains(words), "{what}: {message}");
                    assert!(!unpacked.exists(), "{what}: something is left");
                }
                (Made(paths), Ok(_)) => {
                    let inside = tree::read(&unpacked.join("tree"));
                    for (path, kind) in paths {
                        assert_eq!(inside.get(&path).map(|node| node.kind), Some(kind), "{what}: {}", path.display());
                    }
                    let trusted = |name: &OsString| name.to_string_lossy().starts_with("trusted.");
                    assert!(inside.values().all(|node| !node.xattrs.keys().any(trusted)), "{what}: {inside:?}");
                }
                (_, result) => panic!("{what}: {result:?}"),
            }
        }
    }
}

#[test]
fn privileged_a_full_disk_is_an_error_that_says_so_and_leaves_nothing() {
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
        }
    }
    let lab = Lab::new();
    fs::create_dir_all(lab.layout.snapshots()).expect("mkdir");
    let mounted = rustix::mount::mount(
        "none",
        lab.layout.snapshots(),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=1m,nr_inodes=100"),
    );
    mounted.expect("mount");
    let _mounted = Unmount(lab.layout.snapshots());
    lab.fs(ID);
    let client = lab.client();
    let bytes = TarWriter::of(Dialect::Pax, &[Member::file("big", vec![1; 3 << 20])]);
    let files = TarWriter::of(Dialect::Pax, &(0..200).map(|n| Member::file(format!("f{n}"), "")).collect::<Vec<_>>());
    for (tar, at) in [(bytes, "big"), (files, "f9")] {
        match unpack(&client, ID, tar, Place::Above, BUDGET) {
            Err(UnpackError::Failed { detail, source }) => {
                assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{source}");
                assert!(detail.to_string().contains(at), "{detail}");
            }
            other => panic!("{other:?}"),
        }
        assert!(!lab.layout.snapshot_unpack(SnapshotId(ID)).exists());
    }
}
