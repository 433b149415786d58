use super::{HOLDER, Killed, eventually, run, somebody_else_is_answered, status_row};
use crate::support::leaks;
use soci::{
    fs::Journal,
    holder::{self, Held, How, Keeping},
    sys::{fuse, mountinfo, seqpacket, shared},
};
use std::{
    fs,
    io::{BufRead, BufReader},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixDatagram},
    },
    process::{Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// A root with a mount that must be gone at the end.
struct Lab(super::lab::Lab);

impl std::ops::Deref for Lab {
    type Target = super::lab::Lab;
    fn deref(&self) -> &super::lab::Lab {
        &self.0
    }
}

impl Lab {
    fn new() -> Lab {
        Lab(super::lab::Lab::new())
    }

    fn holder(&self) -> Killed {
        self.holder_with(&[])
    }

    fn holder_with(&self, more: &[&str]) -> Killed {
        let mut command = Command::new(HOLDER);
        Killed(command.arg("--root").arg(self.layout.root()).args(more).stdin(Stdio::null()).spawn().expect("spawn"))
    }

    fn obtain(&self) -> Held {
        let held = holder::obtain(&self.layout, How::Connect).expect("a descriptor");
        leaks::watch_connection(&self.layout.lazy());
        held
    }

    fn mounted(&self) -> bool {
        mountinfo::mount_at(&self.layout.lazy()).expect("mountinfo").is_some()
    }

    fn unmount(&self) -> ExitStatus {
        run(Command::new(HOLDER).arg("--unmount").arg("--root").arg(self.layout.root())).status
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.unmount();
        assert!(!self.mounted(), "a mount was left on {}", self.layout.lazy().display());
    }
}

/// As much of a daemon as it takes for `statfs` to be answered.
struct Daemon {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<OwnedFd>>,
}

impl Daemon {
    fn serve(device: OwnedFd) -> Daemon {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut request = vec![0; 2 << 20];
            while !stopped.load(Ordering::Relaxed) {
                let Ok(length) = fuse::read_request(device.as_fd(), &mut request, Duration::from_millis(50)) else {
                    continue;
                };
                let request = &request[..length];
                let opcode = u32::from_le_bytes(request[4..8].try_into().expect("a header"));
                let (error, body): (i32, &[u8]) = match opcode {
                    2 | 36 | 42 => continue, // FORGET, INTERRUPT, BATCH_FORGET take no reply
                    17 => (0, &[0; 80]),     // STATFS
                    _ => (-38, &[]),         // ENOSYS
                };
                let mut reply = u32::try_from(16 + body.len()).expect("small").to_le_bytes().to_vec();
                reply.extend(error.to_le_bytes());
                reply.extend(&request[8..16]);
                reply.extend(body);
                let _ = rustix::io::write(&device, &reply);
            }
            device
        });
        Daemon { stop, thread: Some(thread) }
    }

    /// Stops serving, without closing the descriptor.
    fn pause(mut self) -> OwnedFd {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("running").join().expect("join")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a daemon keeps of it while it serves.
fn duplicate(held: &Held) -> Held {
    let copy = |fd: &OwnedFd| fd.try_clone().expect("dup");
    Held { device: copy(&held.device), init: held.init, first: held.first, journal: held.journal.as_ref().map(copy) }
}

/// `statfs` of the mount, in a process of its own so that nothing here hangs.
fn answers(lab: &Lab) -> bool {
    run(Command::new("stat").arg("-f").arg(lab.layout.lazy())).status.success()
}

#[test]
fn privileged_the_descriptor_is_given_twice_and_works_both_times() {
    let lab = Lab::new();
    let holder = lab.holder();
    let first = lab.obtain();
    assert!(first.first);
    let daemon = Daemon::serve(first.device);
    assert!(answers(&lab));

    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let line = mounts.lines().find(|line| line.contains(&*lab.layout.lazy().to_string_lossy())).expect("mounted");
    assert!(line.starts_with("soci ") && line.contains(" fuse.rawBridge ro,"), "{line}");
    assert!(line.contains("allow_other") && line.contains("default_permissions"), "{line}");
    assert!(!line.contains("nosuid") && !line.contains("nodev"), "{line}");
    let device = mountinfo::mount_at(&lab.layout.lazy()).expect("mountinfo").expect("mounted").device;
    let knob = fs::read_to_string(format!("/sys/class/bdi/{device}/read_ahead_kb")).expect("knob");
    assert_eq!(knob.trim(), "1024");
    assert_eq!(fs::metadata(lab.layout.holder_socket()).expect("stat").permissions().mode() & 0o777, 0o600);

    // The daemon dies with the request of a reader in its hands or not yet read; the reader waits for the next daemon.
    drop(daemon.pause());
    let mut reader =
        Killed(Command::new("stat").arg("-f").arg(lab.layout.lazy()).stdout(Stdio::null()).spawn().expect("spawn"));
    thread::sleep(Duration::from_millis(100));
    assert!(reader.0.try_wait().expect("wait").is_none(), "it waits");
    let second = lab.obtain();
    assert!(!second.first);
    assert_eq!(second.init, first.init);
    let _daemon = Daemon::serve(second.device);
    assert!(reader.ended().success());
    drop(holder);
}

#[test]
fn privileged_the_holder_has_nothing_left_to_abuse() {
    let lab = Lab::new();
    let holder = lab.holder();
    drop(lab.obtain());
    for row in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status_row(holder.pid(), row), 16), Ok(0), "{row}");
    }
    assert_eq!(status_row(holder.pid(), "NoNewPrivs"), "1");
    assert_eq!(status_row(holder.pid(), "Seccomp"), "2");
    assert_eq!(status_row(holder.pid(), "Threads"), "1");
}

#[test]
fn privileged_a_second_holder_sees_the_first_and_leaves_in_peace() {
    let lab = Lab::new();
    let _first = lab.holder();
    let held = lab.obtain();
    let second = run(Command::new(HOLDER).arg("--root").arg(lab.layout.root()));
    assert!(second.status.success());
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(text.contains("another soci-mount holds"), "{text}");
    // Looking does not count as handing out, and the first goes on.
    let _daemon = Daemon::serve(held.device);
    assert!(answers(&lab));
    assert!(!lab.obtain().first);
}

#[test]
fn privileged_a_dead_mount_is_replaced() {
    let lab = Lab::new();
    let mut holder = lab.holder();
    drop(lab.obtain());
    holder.kill();
    assert!(lab.mounted() && !answers(&lab), "holder and daemon are gone: ENOTCONN");
    let _next = lab.holder();
    let held = lab.obtain();
    assert!(held.first, "it is a new mount");
    let _daemon = Daemon::serve(held.device);
    assert!(answers(&lab));
}

#[test]
fn privileged_a_new_holder_gets_the_descriptor_back_from_the_daemon() {
    let lab = Lab::new();
    let mut holder = lab.holder();
    let held = lab.obtain();
    let (spare, init) = (duplicate(&held), held.init);
    let daemon = Daemon::serve(held.device);
    holder.kill();
    assert!(answers(&lab), "the daemon needs no holder to serve");
    let mut next = lab.holder();
    let keep = |how| holder::ensure_kept(&lab.layout, &spare, how);
    let kept = eventually("the new holder listens", || keep(How::Connect).ok());
    assert_eq!(kept, Keeping::HandedIn);
    assert_eq!(keep(How::Connect).expect("asked"), Keeping::Already);
    // Without systemd the daemon starts the next one itself.
    next.kill();
    assert!(keep(How::Connect).is_err());
    assert_eq!(keep(How::SpawnChild).expect("started"), Keeping::HandedIn);
    drop((daemon, spare));
    let held = lab.obtain();
    assert!(!held.first);
    assert_eq!(held.init, init);
    let _daemon = Daemon::serve(held.device);
    assert!(answers(&lab));
}

#[test]
fn privileged_where_the_kernel_cannot_repeat_requests_a_journal_goes_wherever_the_descriptor_goes() {
    let lab = Lab::new();
    let mut holder = lab.holder_with(&["--no-resend"]);
    let held = lab.obtain();
    assert!(!held.init.can_resend());
    let identity = |held: &Held| shared::identity(held.journal.as_ref().expect("a journal").as_fd()).expect("stat");
    let first = identity(&held);
    drop(Journal::open(held.journal.as_ref().expect("a journal")).expect("an empty one"));
    assert_eq!(identity(&lab.obtain()), first, "every daemon gets the same");
    // The daemon keeps it for the next holder, too.
    let spare = duplicate(&held);
    let _daemon = Daemon::serve(held.device);
    holder.kill();
    let _next = lab.holder();
    let kept = eventually("the new holder listens", || holder::ensure_kept(&lab.layout, &spare, How::Connect).ok());
    assert_eq!(kept, Keeping::HandedIn);
    let again = lab.obtain();
    assert_eq!(identity(&again), first);
    assert!(Journal::open(again.journal.as_ref().expect("a journal")).expect("the same").inherited());
}

#[test]
fn privileged_a_daemon_without_any_capability_can_start_a_holder_for_what_it_serves() {
    let lab = Lab::new();
    let mut holder = lab.holder();
    let held = lab.obtain();
    let spare = duplicate(&held);
    let _daemon = Daemon::serve(held.device);
    holder.kill();
    // As the daemon's child would be: no capability to inherit, none to gain.
    let mut started = Command::new("setpriv");
    started.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", HOLDER, "--detach", "--root"]);
    let mut started = Killed(started.arg(lab.layout.root()).spawn().expect("spawn"));
    assert!(started.ended().success());
    let kept = holder::ensure_kept(&lab.layout, &spare, How::Connect).expect("kept");
    assert_eq!(kept, Keeping::HandedIn);
}

#[test]
fn privileged_when_daemon_and_holder_are_both_replaced_the_next_start_mounts_anew() {
    let lab = Lab::new();
    let mut holder = lab.holder();
    let daemon = Daemon::serve(lab.obtain().device);
    holder.kill();
    let mut empty = Command::new(HOLDER);
    empty.arg("--root").arg(lab.layout.root()).stdin(Stdio::null()).stderr(Stdio::piped());
    let mut empty = Killed(empty.spawn().expect("spawn"));
    let mut line = String::new();
    BufReader::new(empty.0.stderr.take().expect("piped")).read_line(&mut line).expect("a line");
    assert!(line.contains("waiting for the daemon"), "{line}");
    drop(daemon);
    // The daemon that starts now finds an empty holder, which ends, and starts another.
    let held = holder::obtain(&lab.layout, How::SpawnChild).expect("a new mount");
    assert!(held.first);
    assert!(!empty.ended().success());
    let _daemon = Daemon::serve(held.device);
    assert!(answers(&lab));
}

#[test]
fn privileged_when_both_keepers_die_the_copy_in_systemds_store_is_as_good() {
    for kernel in [&[][..], &["--no-resend"]] {
        the_store_is_as_good(kernel);
    }
}

fn the_store_is_as_good(kernel: &[&str]) {
    let lab = Lab::new();
    // systemd's side of its protocol: a datagram socket that descriptors are left at.
    let notify = lab.dir.path().join("notify");
    let manager = UnixDatagram::bind(&notify).expect("bind");
    manager.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    let mut command = Command::new(HOLDER);
    command.arg("--root").arg(lab.layout.root()).args(kernel).env("NOTIFY_SOCKET", &notify).stdin(Stdio::null());
    let mut holder = Killed(command.spawn().expect("spawn"));
    let mut stored = Vec::new();
    loop {
        let mut message = [0; 256];
        let (length, fds) = seqpacket::recv_with_fds(manager.as_fd(), &mut message).expect("a message");
        assert_eq!(message[..length].starts_with(b"FDSTORE=1\n"), !fds.is_empty());
        stored.extend(fds);
        if message[..length].starts_with(b"READY=1") {
            break;
        }
    }
    assert!(fuse::is_device(stored[0].as_fd()));
    assert_eq!(stored.len(), 1 + kernel.len());

    let first = lab.obtain();
    assert!(first.first);
    let daemon = Daemon::serve(first.device);
    assert!(answers(&lab));
    holder.kill();
    drop(daemon.pause());
    // They come back the way systemd passes descriptors on: from number 3 on, for the process named by LISTEN_PID. The youngest first, maybe.
    let journal = first.journal.as_ref().map(|fd| shared::identity(fd.as_fd()).expect("stat"));
    let number = stored.len();
    let mut fds = stored.into_iter().map(Stdio::from);
    let (device, journal_fd) = (fds.next().expect("a device"), fds.next().unwrap_or_else(Stdio::null));
    let script = format!(
        "exec 3<&1 4<&0 </dev/null >/dev/null; LISTEN_PID=$$ LISTEN_FDS={number} exec {HOLDER} --root {}",
        lab.layout.root().display()
    );
    let _next =
        Killed(Command::new("sh").args(["-c", &script]).stdout(device).stdin(journal_fd).spawn().expect("spawn"));
    let second = lab.obtain();
    assert!(!second.first, "the mount is the old one");
    assert_eq!(second.init, first.init);
    assert_eq!(second.journal.as_ref().map(|fd| shared::identity(fd.as_fd()).expect("stat")), journal);
    let _daemon = Daemon::serve(second.device);
    assert!(answers(&lab));
}

#[test]
fn privileged_a_daemon_without_systemd_starts_its_holder_in_a_session_of_its_own() {
    let lab = Lab::new();
    let held = holder::obtain(&lab.layout, How::SpawnChild).expect("started");
    assert!(held.first);
    let _daemon = Daemon::serve(held.device);
    assert!(answers(&lab));
    let pid = fs::read_dir("/proc").expect("proc").flatten().find_map(|entry| {
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        let ours = command.split(|b| *b == 0).any(|word| word == lab.layout.root().as_os_str().as_encoded_bytes());
        ours.then(|| entry.file_name().to_str()?.parse::<i32>().ok())?
    });
    let pid = rustix::process::Pid::from_raw(pid.expect("running"));
    assert_eq!(rustix::process::getsid(pid).ok(), pid);
    assert!(lab.unmount().success());
    assert!(!lab.mounted() && !lab.layout.holder_socket().exists());
}

#[test]
fn privileged_unmounting_ends_the_holder_and_is_harmless_twice() {
    let lab = Lab::new();
    let mut holder = lab.holder();
    drop(lab.obtain());
    assert!(lab.unmount().success());
    assert!(holder.ended().success());
    assert!(!lab.mounted());
    assert!(lab.unmount().success());
}

#[test]
fn privileged_other_users_are_not_given_the_descriptor() {
    let lab = Lab::new();
    let _holder = lab.holder();
    drop(lab.obtain());
    fs::set_permissions(lab.dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    fs::set_permissions(lab.layout.holder_socket(), fs::Permissions::from_mode(0o666)).expect("chmod");
    assert!(!somebody_else_is_answered(&lab.layout.holder_socket()));
    assert!(!lab.obtain().first, "root still is");
}
