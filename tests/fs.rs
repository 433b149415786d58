//! The lazy filesystem under the real kernel: what it shows is what `tar` unpacks, and nobody waits for somebody else.

pub(crate) mod lab;

pub(crate) use lab::until;
use lab::{Member, Mount, Overlay, Place, Source, Tar, layer, pattern};
use soci::fs::wire::Resend;
use soci::fs::{Connection, ReadError};
use soci::layers::toc::EntryKind;
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// One of everything an image may contain.
fn sample() -> Tar {
    let long = format!("usr/share/{}/{}", "d".repeat(120), "f".repeat(200));
    Tar::new([
        Member { mtime: (1_500_000_000, 123_456_789), ..Member::dir("./", 0o755) },
        Member::dir("usr/", 0o755),
        Member::dir("usr/share/", 0o711),
        Member::dir(&format!("usr/share/{}", "d".repeat(120)), 0o700),
        Member::file(&long, "long names"),
        Member { owner: (1000, 400_000), ..Member::dir("home", 0o2775) },
        Member { mode: 0o4755, owner: (0, 5), ..Member::file("usr/suid", pattern(1, 10_000)) },
        Member::dir("tmp", 0o1777),
        Member::file("empty", ""),
        Member::file("big", pattern(2, 3 << 20)),
        Member { mtime: (-86_400, 500_000_000), ..Member::file("old", "before 1970") },
        Member::link("usr/link", EntryKind::Symlink, "../somewhere/else"),
        Member::link("hard", EntryKind::Hardlink, "usr/suid"),
        Member::link("usr/hard", EntryKind::Hardlink, "./hard"),
        Member { device: (1, 3), mode: 0o666, ..Member::new("null", EntryKind::Char) },
        Member { device: (259, 70_000), mode: 0o660, owner: (0, 6), ..Member::new("disk", EntryKind::Block) },
        Member::new("pipe", EntryKind::Fifo),
        Member {
            xattrs: vec![
                (b"user.long".to_vec(), pattern(9, 300)),
                (b"user.empty".to_vec(), Vec::new()),
                (b"security.capability".to_vec(), [&[1, 0, 0, 2, 0, 4][..], &[0; 14]].concat()),
            ],
            ..Member::file("usr/attributed", "x")
        },
        Member::dir("many", 0o755),
    ])
    .and((0..3000).map(|n| Member::file(&format!("many/file-{n}"), format!("{n}\n"))))
}

trait And {
    fn and(self, members: impl Iterator<Item = Member>) -> Tar;
}

impl And for Tar {
    fn and(self, members: impl Iterator<Item = Member>) -> Tar {
        Tar::new(self.members.into_iter().chain(members))
    }
}

/// All that can be seen of a file from outside; inode numbers as the set of names that share one.
pub(crate) fn describe(root: &Path) -> BTreeMap<String, String> {
    fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut list = vec![0; 65536];
        let len = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
        list[..len]
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| {
                let mut value = vec![0; 65536];
                let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
                (name.to_vec(), value[..len].to_vec())
            })
            .collect()
    }
    fn walk(root: &Path, path: &Path, inodes: &mut BTreeMap<u64, String>, out: &mut BTreeMap<String, String>) {
        let meta = std::fs::symlink_metadata(path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        let kind = meta.file_type();
        let content = match () {
            () if kind.is_file() => format!("{:?}", soci::oci::Digest::of(&std::fs::read(path).unwrap())),
            () if kind.is_symlink() => format!("{:?}", std::fs::read_link(path).unwrap()),
            () if kind.is_char_device() || kind.is_block_device() => format!("{:x}", meta.rdev()),
            () => String::new(),
        };
        let first = inodes.entry(meta.ino()).or_insert(name.clone()).clone();
        let size = if kind.is_dir() { 0 } else { meta.size() };
        let text = format!(
            "{:o} {}:{} {size} {}.{:09} links {} same as {first:?} {content} {:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.nlink(),
            xattrs(path),
        );
        out.insert(name, text);
        if kind.is_dir() {
            let mut children: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
            children.sort();
            children.iter().for_each(|child| walk(root, child, inodes, out));
        }
    }
    let mut out = BTreeMap::new();
    walk(root, root, &mut BTreeMap::new(), &mut out);
    out
}

/// The ways in which a request finds its way to the next process: this kernel's, and that of older ones.
const WAYS: [Resend; 2] = [Resend::Wanted, Resend::Unwanted];

fn serve_resumable(tar: &Tar, resend: Resend) -> (Mount, Arc<Source>) {
    let mut mount = Mount::unserved(Arc::new(soci::fs::Nobody), resend);
    let source = Source::new(&tar.bytes, Place::Disk);
    mount.tree.add(layer(7, tar, &source)).unwrap();
    mount.serve(Connection::First);
    (mount, source)
}

fn serve(tar: &Tar, place: Place) -> (Mount, Arc<Source>) {
    let mount = Mount::new();
    let source = Source::new(&tar.bytes, place);
    mount.tree.add(layer(7, tar, &source)).unwrap();
    (mount, source)
}

#[test]
fn privileged_a_layer_shows_exactly_what_tar_unpacks() {
    let tar = sample();
    for place in [Place::Memory, Place::Disk] {
        let (mount, _) = serve(&tar, place);
        let unpacked = mount.beside("unpacked");
        tar.unpack(&unpacked);
        let (ours, theirs) = (describe(&mount.at(7)), describe(&unpacked));
        for (name, text) in &theirs {
            assert_eq!(ours.get(name), Some(text), "{name}");
        }
        assert_eq!(ours.len(), theirs.len());
        // From the kernel's memory, the second time.
        assert_eq!(describe(&mount.at(7)), theirs);
    }
}

#[test]
fn privileged_any_part_of_a_file_equals_the_source() {
    let (mount, _) = serve(&sample(), Place::Disk);
    let content = pattern(2, 3 << 20);
    let file = std::fs::File::open(mount.at(7).join("big")).unwrap();
    let mut buffer = vec![0; 4 << 20];
    for offset in [0, 1, 4095, 4096, 131_071, 1 << 20, (3 << 20) - 1, 3 << 20, (3 << 20) + 1, 1 << 40] {
        for size in [1, 4096, 131_073, 4 << 20] {
            let got = file.read_at(&mut buffer[..size], offset).unwrap();
            let start = (offset as usize).min(content.len());
            let end = (start + size).min(content.len());
            assert!(buffer[..got] == content[start..end], "{offset} {size}");
        }
    }
}

#[test]
fn privileged_whiteouts_and_opaque_directories_mean_to_overlayfs_what_they_should() {
    let lower = Tar::new([
        Member::file("kept", "lower"),
        Member::file("gone", "lower"),
        Member::file("both", "lower"),
        Member::file("dir/inside", "lower"),
        Member::file("opaque/hidden", "lower"),
    ]);
    let upper = Tar::new([
        Member::file(".wh.gone", ""),
        Member::file(".wh.both", ""),
        Member::file("both", "upper"),
        Member::file("dir/.wh.inside", ""),
        Member::dir("opaque", 0o755),
        Member::file("opaque/.wh..wh..opq", ""),
        Member { xattrs: vec![(b"user.x".to_vec(), b"y".to_vec())], ..Member::file("opaque/new", "upper") },
    ]);
    let mount = Mount::new();
    for (id, tar) in [(1, &lower), (2, &upper)] {
        mount.tree.add(layer(id, tar, &Source::new(&tar.bytes, Place::Disk))).unwrap();
    }
    let raw = std::fs::symlink_metadata(mount.at(2).join("gone")).unwrap();
    assert!(raw.file_type().is_char_device() && raw.rdev() == 0 && raw.mode() & 0o7777 == 0);
    assert!(!mount.at(2).join(".wh.gone").exists() && !mount.at(2).join("opaque/.wh..wh..opq").exists());
    let overlay = Overlay::new(mount.beside("merged"), &[mount.at(2), mount.at(1)]);
    let names = |path: &str| {
        let mut names: Vec<_> = std::fs::read_dir(overlay.0.join(path))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["both", "dir", "kept", "opaque"]);
    assert_eq!(names("dir"), [""; 0]);
    assert_eq!(names("opaque"), ["new"]);
    assert!(!overlay.0.join("gone").exists() && !overlay.0.join("opaque/hidden").exists());
    assert_eq!(std::fs::read_to_string(overlay.0.join("both")).unwrap(), "upper");
    assert_eq!(std::fs::read_to_string(overlay.0.join("kept")).unwrap(), "lower");
    let mut value = [0; 8];
    assert_eq!(rustix::fs::getxattr(overlay.0.join("opaque/new"), "user.x", &mut value[..]).unwrap(), 1);
    assert_eq!(rustix::fs::getxattr(mount.at(2).join("opaque"), "trusted.overlay.opaque", &mut value[..]).unwrap(), 1);
}

/// What getxattr(2) answers when it is asked for the size only. (rustix answers an empty buffer itself.)
fn xattr_size(path: &Path, name: &std::ffi::CStr) -> isize {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: both strings end in NUL, and a size of 0 says that there is no buffer.
    unsafe { nix::libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) }
}

#[test]
fn privileged_xattr_buffers_that_are_too_small_and_names_that_are_not_there_are_told_apart() {
    use rustix::io::Errno;
    let (mount, _) = serve(&sample(), Place::Memory);
    let path = mount.at(7).join("usr/attributed");
    let get = |name: &str, len: usize| rustix::fs::getxattr(&path, name, &mut vec![0; len][..]);
    assert_eq!(get("security.capability", 20), Ok(20));
    assert_eq!(get("user.long", 300), Ok(300));
    assert_eq!(xattr_size(&path, c"user.long"), 300);
    assert_eq!(get("user.long", 299), Err(Errno::RANGE));
    assert_eq!(get("user.empty", 10), Ok(0));
    assert_eq!(get("user.none", 10), Err(Errno::NODATA));
    assert_eq!(get("trusted.overlay.opaque", 10), Err(Errno::NODATA));
    let list = |path: &Path, len: usize| rustix::fs::listxattr(path, &mut vec![0; len][..]);
    assert_eq!(list(&path, 100), Ok("security.capability\0user.empty\0user.long\0".len()));
    assert_eq!(list(&path, 5), Err(Errno::RANGE));
    assert_eq!(list(&mount.at(7).join("empty"), 5), Ok(0));
}

#[test]
fn privileged_nothing_can_be_changed() {
    let (mount, _) = serve(&sample(), Place::Memory);
    // Also behind a mount that would allow it.
    let at = mount.at(7);
    let erofs = |outcome: std::io::Result<()>| assert_eq!(outcome.unwrap_err().raw_os_error(), Some(30));
    for flags in [nix::mount::MsFlags::empty(), nix::mount::MsFlags::MS_RDONLY] {
        let remount = flags | nix::mount::MsFlags::MS_REMOUNT;
        nix::mount::mount(None::<&str>, &mount.path(), None::<&str>, remount, None::<&str>).unwrap();
        erofs(std::fs::write(at.join("new"), "x"));
        erofs(std::fs::create_dir(at.join("new")));
        erofs(std::fs::remove_file(at.join("empty")));
        erofs(std::fs::remove_dir(at.join("tmp")));
        erofs(std::fs::rename(at.join("empty"), at.join("other")));
        erofs(std::fs::hard_link(at.join("empty"), at.join("other")));
        erofs(std::os::unix::fs::symlink("x", at.join("other")));
        erofs(std::fs::set_permissions(at.join("empty"), std::os::unix::fs::PermissionsExt::from_mode(0o777)));
        erofs(std::os::unix::fs::chown(at.join("empty"), Some(1), Some(1)));
        let flags = rustix::fs::XattrFlags::empty();
        erofs(rustix::fs::setxattr(at.join("empty"), "user.x", b"y", flags).map_err(Into::into));
    }
}

#[test]
fn privileged_the_state_file_is_found_by_name_only_and_is_never_old() {
    let tar = sample();
    let (mount, source) = serve(&tar, Place::Disk);
    let path = mount.at(7).join(".soci-snapshotter").join(format!("{}.json", soci::oci::Digest::of(&tar.bytes)));
    let read = || serde_json::from_slice::<serde_json::Value>(&std::fs::read(&path).unwrap()).unwrap();
    assert!(!describe(&mount.at(7)).keys().any(|name| name.contains("soci-snapshotter")));
    assert_eq!(read()["size"], tar.bytes.len());
    for fetched in [0, 10, 20, 21, 300, 4000, 4001] {
        source.served.store(fetched, Ordering::SeqCst);
        assert_eq!(read()["fetchedSize"], fetched);
    }
    source.served.store(tar.bytes.len() as u64, Ordering::SeqCst);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"fetchedPercent\":100}") || text.contains("\"fetchedPercent\":100} "), "{text}");
    let modes = [&path, path.parent().unwrap()].map(|path| std::fs::metadata(path).unwrap().mode());
    assert_eq!(modes, [0o100400, 0o040500]);
}

#[test]
fn privileged_a_failed_read_is_eio_is_reported_and_heals() {
    let tar = sample();
    let (mount, source) = serve(&tar, Place::Disk);
    *source.failing.lock().unwrap() = Some(ReadError::Digest { span: 3 });
    let path = mount.at(7).join("usr/suid");
    assert_eq!(std::fs::read(&path).unwrap_err().raw_os_error(), Some(5));
    let state = mount.at(7).join(".soci-snapshotter").join(format!("{}.json", soci::oci::Digest::of(&tar.bytes)));
    assert!(std::fs::read_to_string(&state).unwrap().contains("span digests do not match"));
    *source.failing.lock().unwrap() = None;
    assert!(std::fs::read(&path).unwrap() == pattern(1, 10_000));
}

#[test]
fn privileged_layers_come_and_go_under_a_mount_that_stays() {
    let (mount, _) = serve(&sample(), Place::Memory);
    let tar = Tar::new([Member::file("f", "later")]);
    let late = mount.at(8).join("f");
    let names = || {
        let mut names: Vec<_> =
            std::fs::read_dir(mount.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert!(!late.exists());
    assert_eq!(names(), ["7"]);
    mount.tree.add(layer(8, &tar, &Source::new(&tar.bytes, Place::Memory))).unwrap();
    assert_eq!(std::fs::read_to_string(&late).unwrap(), "later");
    assert_eq!(names(), ["7", "8"]);
    mount.tree.remove(soci::layout::SnapshotId(7)).unwrap();
    assert!(!mount.at(7).exists() && late.exists());
    assert_eq!(names(), ["8"]);
    mount.unmount();
    mount
        .runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(5), mount.session().closed()).await })
        .unwrap();
}

/// A reader in a process of its own.
fn reader(path: &Path, direct: bool) -> std::process::Child {
    let mut command = Command::new("dd");
    command.arg(format!("if={}", path.display())).arg("bs=4096").stdout(Stdio::piped()).stderr(Stdio::null());
    if direct {
        // Direct I/O makes one request and waits for it itself, so it is the one that sends interrupts.
        command.arg("iflag=direct");
    }
    command.spawn().unwrap()
}

fn signal(child: &std::process::Child, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
}

#[test]
fn privileged_a_killed_reader_is_gone_within_a_second() {
    let (mount, source) = serve(&sample(), Place::Disk);
    source.shut();
    for direct in [true, false] {
        let mut child = reader(&mount.at(7).join("big"), direct);
        source.until_waiting(1);
        std::thread::sleep(Duration::from_millis(50));
        let killed = Instant::now();
        signal(&child, nix::sys::signal::Signal::SIGKILL);
        child.wait().unwrap();
        assert!(killed.elapsed() < Duration::from_secs(1), "{:?} direct {direct}", killed.elapsed());
        if direct {
            until("the read was dropped", || source.dropped.load(Ordering::SeqCst) == 1);
            assert_eq!(mount.session().waiting(), 0);
        }
    }
    source.open();
    assert!(std::fs::read(mount.at(7).join("big")).unwrap() == pattern(2, 3 << 20));
}

#[test]
fn privileged_a_signal_that_does_not_kill_does_not_end_a_read() {
    let (mount, source) = serve(&sample(), Place::Disk);
    source.shut();
    let mut child = reader(&mount.at(7).join("usr/suid"), true);
    source.until_waiting(1);
    // dd reports its progress on SIGUSR1.
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(100));
        signal(&child, nix::sys::signal::Signal::SIGUSR1);
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(mount.session().waiting(), 1);
    source.open();
    let mut got = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    assert!(child.wait().unwrap().success() && got == pattern(1, 10_000));
}

#[test]
fn privileged_a_deadly_signal_after_a_harmless_one_is_seen() {
    let (mount, source) = serve(&sample(), Place::Disk);
    source.shut();
    let mut child = reader(&mount.at(7).join("big"), true);
    source.until_waiting(1);
    std::thread::sleep(Duration::from_millis(100));
    signal(&child, nix::sys::signal::Signal::SIGUSR1);
    std::thread::sleep(Duration::from_millis(200));
    let killed = Instant::now();
    signal(&child, nix::sys::signal::Signal::SIGTERM);
    child.wait().unwrap();
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
}

#[test]
fn privileged_two_hundred_readers_that_wait_on_one_layer_do_not_delay_another() {
    let stuck = Tar::new((0..200).map(|n| Member::file(&format!("f{n}"), pattern(n, 50_000))));
    let lively = Tar::new((0..400).map(|n| Member::file(&format!("f{n}"), pattern(n, 50_000))));
    let mount = Mount::new();
    let (dead, alive) = (Source::new(&stuck.bytes, Place::Disk), Source::new(&lively.bytes, Place::Disk));
    mount.tree.add(layer(1, &stuck, &dead)).unwrap();
    mount.tree.add(layer(2, &lively, &alive)).unwrap();
    dead.shut();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..200)
            .map(|n| (n, mount.at(1).join(format!("f{n}"))))
            .map(|(n, path)| {
                scope.spawn(move || {
                    assert!(std::fs::read(path).unwrap() == pattern(n, 50_000));
                })
            })
            .collect();
        dead.until_waiting(200);
        let mut worst = Duration::ZERO;
        for n in 0..400 {
            let started = Instant::now();
            assert!(std::fs::read(mount.at(2).join(format!("f{n}"))).unwrap().len() == 50_000);
            worst = worst.max(started.elapsed());
        }
        dead.open();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        eprintln!("worst of 400 reads beside 200 that wait: {worst:?}");
        assert!(worst < Duration::from_millis(50), "{worst:?}");
    });
}

#[test]
fn privileged_stopping_waits_for_reads_that_end_in_time() {
    let (mut mount, source) = serve(&sample(), Place::Disk);
    source.shut();
    let path = mount.at(7).join("usr/suid");
    let reader = std::thread::spawn(move || std::fs::read(path).unwrap());
    source.until_waiting(1);
    std::thread::spawn({
        let source = source.clone();
        move || {
            std::thread::sleep(Duration::from_millis(200));
            source.open();
        }
    });
    assert_eq!(mount.stop(Duration::from_secs(10)).unanswered, 0);
    // The reader has more questions than that one.
    mount.serve(Connection::Resumed);
    assert!(reader.join().unwrap() == pattern(1, 10_000));
}

#[test]
fn privileged_what_one_session_leaves_unanswered_the_next_one_answers() {
    for resend in WAYS {
        let (mut mount, source) = serve_resumable(&sample(), resend);
        source.shut();
        let mut children: Vec<_> = [true, false].map(|direct| reader(&mount.at(7).join("usr/suid"), direct)).into();
        source.until_waiting(2);
        assert!(mount.stop(Duration::from_millis(50)).unanswered >= 2);
        source.open();
        // Asked while nobody serves.
        let path = mount.at(7).join("many/file-17");
        let asked = std::thread::spawn(move || std::fs::read_to_string(path).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        mount.serve(Connection::Resumed);
        for child in &mut children {
            let mut got = Vec::new();
            child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
            assert!(child.wait().unwrap().success() && got == pattern(1, 10_000), "{resend:?}");
        }
        assert_eq!(asked.join().unwrap(), "17\n");
    }
}

#[test]
fn privileged_a_reader_that_is_killed_while_nobody_serves_is_gone_when_somebody_does() {
    for resend in WAYS {
        let (mut mount, source) = serve_resumable(&sample(), resend);
        source.shut();
        // Killed before its server ends, after it, and while it was known to be doomed already.
        let mut children: Vec<_> = (0..3).map(|_| reader(&mount.at(7).join("usr/suid"), true)).collect();
        source.until_waiting(3);
        signal(&children[0], nix::sys::signal::Signal::SIGUSR1); // dd reports its progress; the kernel says INTERRUPT, and not again
        std::thread::sleep(Duration::from_millis(200));
        mount.stop(Duration::from_millis(20));
        signal(&children[0], nix::sys::signal::Signal::SIGTERM);
        signal(&children[1], nix::sys::signal::Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(100));
        mount.serve(Connection::Resumed);
        for (number, child) in children.iter_mut().enumerate().take(2) {
            until(&format!("{resend:?}: reader {number} is gone"), || child.try_wait().unwrap().is_some());
        }
        source.open();
        assert!(children[2].wait().unwrap().success());
    }
}

/// What the server process is told: the negotiated parameters, and whether its layer answers.
const SERVER: &str = "SOCI_TEST_FUSE_SERVER";

/// Serves the descriptor on its standard input until it is killed, with the journal on its standard error output. Started by the test below, in a
/// process of its own.
#[test]
#[ignore = "the other half of the next test, which starts it"]
fn server_to_be_killed() {
    use soci::fs::{InitParams, Journal, Nobody, OpaqueMark, Session, SessionOptions, Tree};
    use std::os::fd::AsFd;
    let Ok((init, connection, gate)) = std::env::var(SERVER).map(|text| {
        let words: Vec<_> = text.splitn(3, ' ').map(str::to_owned).collect();
        let connection = if words[1] == "first" { Connection::First } else { Connection::Resumed };
        let init: InitParams = serde_json::from_str(&words[2]).unwrap();
        (init, connection, words[0].clone())
    }) else {
        return;
    };
    let tar = sample();
    let source = Source::new(&tar.bytes, Place::Disk);
    if gate == "shut" {
        source.shut();
    }
    let tree = Arc::new(Tree::new(OpaqueMark::Trusted, Arc::new(Nobody)));
    tree.add(layer(7, &tar, &source)).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let device = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let journal =
        (!init.can_resend()).then(|| Journal::open(&std::io::stderr().as_fd().try_clone_to_owned().unwrap()).unwrap());
    let options = SessionOptions { connection, journal, ..SessionOptions::default() };
    let session = Session::start(device, init, tree, runtime.handle().clone(), options).unwrap();
    runtime.block_on(session.closed());
}

#[test]
fn privileged_readers_do_not_notice_that_the_server_was_killed_again_and_again() {
    for resend in WAYS {
        killed_again_and_again(resend);
    }
}

fn killed_again_and_again(resend: Resend) {
    let mount = Mount::unserved(Arc::new(soci::fs::Nobody), resend);
    let server = |gate: &str, connection: &str| {
        let init = serde_json::to_string(&mount.init).unwrap();
        let journal = mount.journal.as_ref().map_or_else(Stdio::null, |file| file.try_clone().unwrap().into());
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fs::server_to_be_killed", "--ignored"])
            .env(SERVER, format!("{gate} {connection} {init}"))
            .stdin(mount.duplicate())
            .stdout(Stdio::null())
            .stderr(journal)
            .spawn()
            .unwrap()
    };
    let mut serving = server("shut", "first");
    let mut waiting = [true, false].map(|direct| reader(&mount.at(7).join("usr/suid"), direct));
    std::thread::sleep(Duration::from_millis(300));
    let at = mount.at(7);
    let busy = std::thread::spawn(move || {
        let mut worst = Duration::ZERO;
        for n in 0..3000 {
            let started = Instant::now();
            assert_eq!(std::fs::read_to_string(at.join(format!("many/file-{n}"))).unwrap(), format!("{n}\n"));
            worst = worst.max(started.elapsed());
        }
        worst
    });
    for _ in 0..4 {
        signal(&serving, nix::sys::signal::Signal::SIGKILL);
        serving.wait().unwrap();
        serving = server("open", "resumed");
        std::thread::sleep(Duration::from_millis(100));
    }
    for child in &mut waiting {
        let mut got = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
        assert!(child.wait().unwrap().success() && got == pattern(1, 10_000), "{resend:?}");
    }
    eprintln!("{resend:?}: worst read beside four kills: {:?}", busy.join().unwrap());
    mount.unmount();
    drop(mount);
    until("the server ends with the mount", || serving.try_wait().unwrap().is_some());
}
