//! `soci-mount`: makes the one FUSE mount and keeps its connection alive while daemons come and go.
//!
//! It mounts, answers the kernel's INIT while it still has CAP_SYS_ADMIN (without it the kernel caps what may be asked for), sets the read-ahead,
//! gives up every capability, and from then on only hands the `/dev/fuse` descriptor to processes of its own user. It never touches the mount
//! again, so nothing that happens to the daemon can hang it.
//!
//! ```text
//!             mount dead or absent                     Give: first, then resumed
//!   start ──┬─────────────────────▶ mount, INIT ─────▶ Holding ◀────────────────┐
//!           │ mount alive, holder gone                                          │ Keep: the daemon hands the descriptor in
//!           └─────────────────────────────────────────▶ Empty ──────────────────┘
//!                                                         │ Give: the daemon has lost it too
//!                                                         ▼
//!                                                        exit, so that whoever restarts us gets a fresh mount
//! ```
//!
//! Invariants:
//! * At most one holder per root: a lock on `<root>/snapshotter`, released by the kernel, says who.
//! * Whoever holds the mount's descriptors are this process and the daemon. While one of them lives, readers wait; when both are gone the kernel
//!   answers ENOTCONN for ever, and the next start detaches that mount and makes a new one.
//! * Under systemd a third copy is in its descriptor store ([`store`]), which outlives both of them when they die together.
//! * What the device's requests are read into where the kernel cannot repeat them ([`crate::fs::journal`]) goes everywhere the device goes. It is
//!   made here, empty, and never looked into.
//! * Unmounting takes the capability this process gave away, so it is done by a second, short-lived `soci-mount --unmount`.
//!
//! What a Go snapshotter that was here before has left mounted is detached first, as nobody else may.
//!
//! Absent on purpose: serving. A holder that parsed requests could be made to hang or die by them.
#![forbid(unsafe_code)]

mod client;
pub use crate::fs::wire::{InitParams, Resend, answer_init};
mod protocol;
mod server;
mod store;

pub use client::{Held, HolderError, How, Keeping, ensure_kept, keep_logins, kept_logins, obtain};

use crate::{
    fs::journal,
    layout::Layout,
    sys::{self, fuse, mountinfo, seqpacket, shared},
};
use clap::Parser;
use protocol::{Request, Status};
use rustix::fs::{FlockOperation, Mode, OFlags};
use server::{Holding, Server};
use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};
use store::Store;

/// `read_ahead_kb` of the mount: what made big sequential reads eight times cheaper (field/fuse.md, setting 9).
const READ_AHEAD_KB: u32 = 1024;
/// The kernel queues INIT while it mounts; this only bounds a kernel that does not.
const INIT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a mount may take to show whether anybody serves it. A daemon answers `statfs` from memory.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);
/// Dead mounts that may be stacked on one another before we suspect a loop.
const MAX_STACKED: usize = 64;

/// Mounts the snapshotter's FUSE filesystem and keeps its connection while the daemon restarts.
#[derive(Debug, Parser)]
#[command(name = "soci-mount", version)]
struct Args {
    /// The daemon's --root.
    #[arg(long, default_value = crate::layout::DEFAULT_ROOT)]
    root: PathBuf,
    /// Detach the mount and end the process that holds it, instead of becoming it.
    #[arg(long, conflicts_with = "detach")]
    unmount: bool,
    /// Return when the holder runs, in a session of its own.
    #[arg(long)]
    detach: bool,
    /// What --detach starts.
    #[arg(long, hide = true)]
    new_session: bool,
    /// Exit with 0 if somebody serves the mount on this path, with 1 if nobody does. A separate process because the question may never be answered.
    #[arg(long, hide = true, value_name = "PATH")]
    probe: Option<PathBuf>,
    /// For tests: treat this kernel as one that cannot repeat requests. The environment reaches a holder that a daemon starts.
    #[arg(long, hide = true, env = "SOCI_MOUNT_NO_RESEND", value_parser = clap::builder::FalseyValueParser::new())]
    no_resend: bool,
}

/// Everything `src/bin/soci-mount.rs` does.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let layout = Layout::new(&args.root);
    if let Some(point) = &args.probe {
        return probe(point);
    }
    let result = match (args.unmount, args.detach) {
        (true, _) => unmount(&layout),
        (false, true) => start_detached(&layout),
        (false, false) => {
            hold(&layout, args.new_session, if args.no_resend { Resend::Unwanted } else { Resend::Wanted })
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error);
            ExitCode::FAILURE
        }
    }
}

fn complain(message: impl std::fmt::Display) {
    sys::process::complain("soci-mount", message);
}

/// Starts the holder as nobody's child, in a session of its own, and returns when it answers: neither a signal to our group nor our end concerns it,
/// and the daemon has no dead child to bury one day.
fn start_detached(layout: &Layout) -> io::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--root")
        .arg(layout.root())
        .arg("--new-session")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + INIT_PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            return match status.success() {
                true => Ok(()), // another one answers
                false => Err(io::Error::other(format!("the holder ended: {status}"))),
            };
        }
        match client::ask_status(layout) {
            Ok(_) => return Ok(()),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error),
        }
    }
}

fn hold(layout: &Layout, new_session: bool, resend: Resend) -> io::Result<()> {
    if new_session {
        rustix::process::setsid().map_err(|e| sys::context("starting a session", e))?;
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(layout.snapshotter())?;
    let Some(lock) = lock_unless_held(layout)? else {
        return Ok(());
    };
    detach_predecessors(layout);
    let store = Store::open();
    let (kept, logins) = store::inherited(layout)?;
    let holding = match still_held(layout, kept)? {
        Some(holding) => holding,
        None => match mount_state(&layout.lazy())? {
            MountState::Served => {
                complain(format_args!(
                    "{} is mounted and served, but its holder is gone: waiting for the daemon to hand in the descriptor",
                    layout.lazy().display()
                ));
                Holding::Empty
            }
            MountState::Absent => mount(layout, resend)?,
        },
    };
    if let Holding::Fresh(kept) | Holding::Used(kept) = &holding {
        store.put(kept);
    }
    if let Some(logins) = &logins {
        store.put_logins(logins.as_fd());
    }
    let listener = listen(layout)?;
    sys::process::shield_from_oom_killer();
    std::env::set_current_dir("/")?;
    sys::drop_all_capabilities()?;
    store.ready();
    if new_session {
        let_go_of_stderr()?;
    }
    sys::seccomp::confine(sys::seccomp::Role::Holder, &sys::process::SingleThread::prove()?)?;
    let ended = Server::new(listener, holding, logins, store).serve();
    drop(lock);
    ended
}

/// What is inherited from the daemon's terminal or pipe would keep that open for as long as we live: `daemon 2>&1 | tee log` would never end.
fn let_go_of_stderr() -> io::Result<()> {
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    nix::unistd::dup2_stderr(null).map_err(Into::into)
}

/// The lock that makes us the holder; `None` while somebody else is.
fn try_lock(layout: &Layout) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(rustix::fs::CWD, layout.snapshotter(), flags, Mode::empty())?;
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The lock, or `None` if the process that has it answers: then there is nothing left for us to do. One that is about to end is waited for.
fn lock_unless_held(layout: &Layout) -> io::Result<Option<OwnedFd>> {
    let deadline = Instant::now() + INIT_PATIENCE;
    loop {
        if let Some(lock) = try_lock(layout)? {
            return Ok(Some(lock));
        }
        match client::ask_status(layout) {
            Ok(status) => {
                let what = match status {
                    Status::Holding => "holds",
                    Status::Empty => "waits for the descriptor of",
                };
                complain(format_args!("another soci-mount {what} {}; nothing to do", layout.lazy().display()));
                return Ok(None);
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => {
                return Err(io::Error::other(format!(
                    "another soci-mount has locked {} but does not answer: {error}",
                    layout.snapshotter().display()
                )));
            }
        }
    }
}

/// Detaches the mount, then tells the holder, if there is one, that its work is done.
fn unmount(layout: &Layout) -> io::Result<()> {
    let point = absolute(&layout.lazy())?;
    for _ in 0..MAX_STACKED {
        if mountinfo::mount_at(&point)?.is_none() {
            break;
        }
        fuse::detach(&point)?;
    }
    match client::ask(layout, Request::Stop) {
        Ok(_) => {}
        Err(error) if client::absent(&error) => {}
        Err(error) => return Err(error),
    }
    match std::fs::remove_file(layout.holder_socket()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What systemd kept while we were gone, if it belongs to what is mounted.
fn still_held(layout: &Layout, kept: Option<Kept>) -> io::Result<Option<Holding>> {
    let Some(kept) = kept else { return Ok(None) };
    let mount = mountinfo::mount_at(&absolute(&layout.lazy())?)?;
    if mount.is_none_or(|mount| mount.fstype != fuse::FSTYPE) {
        return Ok(None);
    }
    complain(format_args!("systemd has kept the FUSE descriptor of {}", layout.lazy().display()));
    Ok(Some(Holding::Used(kept)))
}

/// How a file of logins begins: what tells it from others that systemd gives back without names.
pub const LOGINS_MAGIC: &[u8; 8] = b"SOCILOG1";
/// Largest file of logins: some kB for each of the images that are remembered.
const MAX_LOGINS: usize = 32 << 20;

fn are_logins(fd: BorrowedFd<'_>) -> bool {
    shared::unseal(fd, MAX_LOGINS).is_ok_and(|bytes| zeroize::Zeroizing::new(bytes).starts_with(LOGINS_MAGIC))
}

/// What a daemon needs to go on where another one stopped.
struct Kept {
    device: OwnedFd,
    init: InitParams,
    /// On kernels that cannot repeat requests.
    journal: Option<OwnedFd>,
}

impl Kept {
    /// What goes with a message, in this order.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        std::iter::once(&self.device).chain(&self.journal).map(AsFd::as_fd).collect()
    }

    /// What came with one.
    fn received(fds: Vec<OwnedFd>, init: InitParams) -> Option<Kept> {
        let mut fds = fds.into_iter();
        let device = fds.next().filter(|fd| fuse::is_device(fd.as_fd()))?;
        let journal = fds.next();
        let sound = journal.as_ref().is_none_or(|fd| shared::is_shared(fd.as_fd()));
        (sound && fds.next().is_none()).then_some(Kept { device, init, journal })
    }
}

/// The Go snapshotter mounted each lazily loaded layer on its own directory, and leaves those mounts behind when it ends: nobody will ever answer
/// there again. One that is answered belongs to a Go snapshotter that still runs, and stays; the daemon says so.
fn detach_predecessors(layout: &Layout) {
    let snapshots = match layout.snapshots().canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return complain(format_args!("looking for mounts of a Go snapshotter: {error}")),
        Ok(snapshots) => snapshots,
    };
    let mounts = match mountinfo::mounts_two_below(&snapshots, Layout::FS) {
        Ok(mounts) => mounts,
        Err(error) => return complain(format_args!("looking for mounts of a Go snapshotter: {error}")),
    };
    let mut detached = 0;
    for mount in mounts.iter().filter(|mount| mount.fstype == fuse::FSTYPE) {
        let served = is_served(&mount.point);
        match served.and_then(|served| if served { Ok(false) } else { fuse::detach(&mount.point).map(|()| true) }) {
            Ok(true) => detached += 1,
            Ok(false) => complain(format_args!(
                "{} is mounted by another snapshotter that still runs: stop it, then start soci-mount again",
                mount.point.display()
            )),
            Err(error) => complain(error),
        }
    }
    if detached > 0 {
        complain(format_args!(
            "detached {detached} dead mounts that a Go snapshotter had left below {}",
            snapshots.display()
        ));
    }
}

enum MountState {
    /// Nothing is mounted (any more).
    Absent,
    /// A daemon serves what is mounted there.
    Served,
}

/// What is on the mount point, after dead mounts of earlier holders were detached.
fn mount_state(point: &Path) -> io::Result<MountState> {
    // A dead mount answers mkdir with EEXIST like a live directory does.
    match std::fs::DirBuilder::new().mode(0o711).create(point) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let point = absolute(point)?;
    for _ in 0..MAX_STACKED {
        let Some(mount) = mountinfo::mount_at(&point)? else {
            return Ok(MountState::Absent);
        };
        if mount.fstype != fuse::FSTYPE {
            return Err(io::Error::other(format!(
                "{} is the mount point of something else ({})",
                point.display(),
                mount.fstype
            )));
        }
        if is_served(&point)? {
            return Ok(MountState::Served);
        }
        complain(format_args!("detaching a dead mount from {}", point.display()));
        fuse::detach(&point)?;
    }
    Err(io::Error::other(format!("more than {MAX_STACKED} dead mounts on {}", point.display())))
}

/// The path as `/proc/self/mountinfo` spells it. The parent is resolved, never the mount point itself: that would ask whoever serves it.
fn absolute(point: &Path) -> io::Result<PathBuf> {
    match (point.parent(), point.file_name()) {
        (Some(parent), Some(name)) => match parent.canonicalize() {
            Ok(parent) => Ok(parent.join(name)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(point.to_owned()),
            Err(error) => Err(error),
        },
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} has no parent", point.display()))),
    }
}

/// Asks in another process, which is left behind if it gets no answer: it ends when the mount does.
fn is_served(point: &Path) -> io::Result<bool> {
    let mut child = Command::new(std::env::current_exe()?).arg("--probe").arg(point).stdin(Stdio::null()).spawn()?;
    let deadline = Instant::now() + PROBE_PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if Instant::now() > deadline {
            // Not dead, or the kernel would have said so: somebody has the descriptor and is slow.
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn probe(point: &Path) -> ExitCode {
    match rustix::fs::statfs(point) {
        // ENOTCONN: every descriptor of the connection is closed. ECONNABORTED: it was aborted by hand.
        Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED) => ExitCode::FAILURE,
        Ok(_) | Err(_) => ExitCode::SUCCESS,
    }
}

fn mount(layout: &Layout, resend: Resend) -> io::Result<Holding> {
    let point = absolute(&layout.lazy())?;
    let device = fuse::open_device()?;
    fuse::mount(device.as_fd(), &point)?;
    match negotiate(&device, &point, resend).and_then(|init| Ok((init, journal_for(&init)?))) {
        Ok((init, journal)) => {
            let kept = Kept { device, init, journal };
            if let Err(error) = store::remember(layout, &kept) {
                complain(format_args!("writing {}: {error}", layout.holder_parameters().display()));
            }
            Ok(Holding::Fresh(kept))
        }
        Err(error) => {
            // Leave nothing behind that would answer ENOTCONN.
            if let Err(also) = fuse::detach(&point) {
                complain(also);
            }
            Err(error)
        }
    }
}

fn journal_for(init: &InitParams) -> io::Result<Option<OwnedFd>> {
    match init.can_resend() {
        true => Ok(None),
        false => shared::create("soci-requests", journal::SIZE)
            .map(Some)
            .map_err(|e| sys::context("making the journal of requests", e)),
    }
}

fn negotiate(device: &OwnedFd, point: &Path, resend: Resend) -> io::Result<InitParams> {
    // FUSE_MIN_READ_BUFFER; INIT itself is 104 bytes.
    let mut request = vec![0; 8192];
    let length = fuse::read_request(device.as_fd(), &mut request, INIT_PATIENCE)?;
    let (init, reply) = answer_init(&request[..length], resend).map_err(io::Error::other)?;
    rustix::io::write(device, &reply).map_err(|e| sys::context("answering INIT", e))?;
    if let Err(error) = fuse::set_read_ahead(point, READ_AHEAD_KB) {
        // Slower, not wrong: /sys may be read-only in a container.
        complain(error);
    }
    Ok(init)
}

/// We have the lock, so a socket that is there belongs to nobody.
fn listen(layout: &Layout) -> io::Result<OwnedFd> {
    let path = layout.holder_socket();
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    seqpacket::listen(&path, 0o600)
}
