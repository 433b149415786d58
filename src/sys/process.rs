//! Facts about this process, descriptors it was given, and where its helpers are installed.

use super::context;
use std::{
    ffi::OsString,
    fmt::Display,
    io::{self, Write},
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Where packages install the helpers that only the daemon starts.
pub const LIBEXEC: &str = "/usr/libexec/soci-snapshotter";
/// Names a directory that is searched for helpers before any other. For tests and for trying a build without installing it.
pub const LIBEXEC_ENV: &str = "SOCI_LIBEXEC";

/// Proof that the thread that has it was the only one of its process, and may confine itself without leaving another one behind.
///
/// It cannot go to another thread. It is meant for the first lines of a `main`: whoever starts threads and keeps the proof is lying.
#[derive(Debug)]
pub struct SingleThread(PhantomData<*const ()>);

impl SingleThread {
    pub fn prove() -> io::Result<SingleThread> {
        let tasks =
            std::fs::read_dir("/proc/self/task").map_err(|e| context("counting threads in /proc/self/task", e))?;
        match tasks.count() {
            1 => Ok(SingleThread(PhantomData)),
            n => Err(io::Error::other(format!(
                "privileges can only be dropped before threads are started; there are {n} threads"
            ))),
        }
    }
}

/// The descriptors that systemd passed to this process (`LISTEN_FDS`), in its order; empty when there are none or they are for another process.
///
/// Must be called once, at start: each call would claim the same descriptors.
pub fn inherited_descriptors() -> io::Result<Vec<OwnedFd>> {
    let numbers = sd_notify::listen_fds()?;
    // SAFETY: systemd's protocol says that descriptors 3.. belong to the process named by LISTEN_PID, which `listen_fds` checked to be us, and
    // nothing in this process has opened or closed them: by this function's contract it runs once, before anything else uses descriptors.
    Ok(numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}

/// Which of the two processes after [`fork`] this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    Parent,
    Child,
}

/// Forks. The child has a copy of everything, and must end with [`exit_now`].
pub fn fork(_: &SingleThread) -> io::Result<Forked> {
    // SAFETY: what makes fork dangerous are locks that other threads hold at that moment, and by the proof there are no other threads.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { .. } => Ok(Forked::Parent),
        nix::unistd::ForkResult::Child => Ok(Forked::Child),
    }
}

/// Ends the process at once: nothing that its parent registered to be done at exit is done twice.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { nix::libc::_exit(code) }
}

/// Closes every descriptor but standard input, output and error, and `kept`.
///
/// Must be called by a process that is about to run something of its own and has no other use for what it was given: whoever still owned one of them
/// would be left with a number.
pub fn close_all_but(kept: BorrowedFd<'_>, _: &SingleThread) -> io::Result<()> {
    let listed = std::fs::read_dir("/proc/self/fd").map_err(|e| context("listing /proc/self/fd", e))?;
    let numbers: Vec<i32> = listed.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2 && *number != kept.as_raw_fd()) {
        // SAFETY: by this function's contract nobody uses these numbers any more; that of the listing itself is closed already, which is harmless.
        unsafe { nix::libc::close(number) };
    }
    Ok(())
}

/// Children that end leave nothing behind that somebody would have to collect.
pub fn forget_children() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: ignoring a signal installs no handler, so there is no code that could run at a bad moment.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    Ok(())
}

/// From now on the kernel kills this process (SIGKILL) when the peer closes `socket`, shuts its end down, or sends anything.
///
/// An error if that has happened already.
pub fn die_with(socket: BorrowedFd<'_>) -> io::Result<()> {
    use nix::libc;
    let fd = socket.as_raw_fd();
    let set = |command: libc::c_int, value: libc::c_int| {
        // SAFETY: these commands of fcntl take a number by value and touch no memory of ours.
        match unsafe { libc::fcntl(fd, command, value) } {
            -1 => Err(context("asking for a signal when a socket closes", io::Error::last_os_error())),
            _ => Ok(()),
        }
    };
    // linux/fcntl.h, the same on every architecture; the libc crate has it for glibc on some only.
    const F_SETSIG: libc::c_int = 10;
    let own = nix::unistd::getpid().as_raw();
    set(libc::F_SETOWN, own)?;
    set(F_SETSIG, libc::SIGKILL)?;
    let flags = rustix::fs::fcntl_getfl(socket)?;
    set(libc::F_SETFL, flags.bits().cast_signed() | libc::O_ASYNC)?;
    // What happened before the last line sent no signal.
    let mut poll = [rustix::event::PollFd::from_borrowed_fd(socket, rustix::event::PollFlags::IN)];
    match rustix::event::poll(&mut poll, Some(&rustix::event::Timespec::default()))? {
        0 => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::BrokenPipe, "nobody is waiting any more")),
    }
}

/// A connection to whom `NOTIFY_SOCKET` names, for who cannot make one later or has descriptors to send; `None` when nobody listens.
pub fn notify_socket() -> io::Result<Option<OwnedFd>> {
    use std::os::{linux::net::SocketAddrExt, unix::ffi::OsStrExt};
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    match address.as_bytes().strip_prefix(b"@") {
        Some(name) => socket.connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?,
        None => socket.connect(&address)?,
    }
    Ok(Some(socket.into()))
}

/// Says something on standard error, for the helpers that have no log of their own.
///
/// Unlike `eprintln!` it does not panic when nobody reads standard error any more: a holder must not die of having been talkative.
pub fn complain(program: &str, message: impl Display) {
    let line = format!("{program}: {message}\n");
    // There is nobody left to tell.
    let _ = io::stderr().lock().write_all(line.as_bytes());
}

/// No helper of that name is installed.
#[derive(Debug, thiserror::Error)]
#[error("{name} is not installed: looked for it in {}", .searched.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
pub struct HelperNotFound {
    pub name: &'static str,
    pub searched: Vec<PathBuf>,
}

/// The executable of a helper: beside our own executable, or in [`LIBEXEC`]; [`LIBEXEC_ENV`] goes first.
pub fn find_helper(name: &'static str) -> Result<PathBuf, HelperNotFound> {
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned));
    find_helper_in(name, std::env::var_os(LIBEXEC_ENV), beside)
}

fn find_helper_in(
    name: &'static str,
    asked_for: Option<OsString>,
    beside: Option<PathBuf>,
) -> Result<PathBuf, HelperNotFound> {
    let asked_for = asked_for.filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let searched: Vec<PathBuf> = [asked_for, beside, Some(LIBEXEC.into())].into_iter().flatten().collect();
    match searched.iter().map(|dir| dir.join(name)).find(|path| path.is_file()) {
        Some(found) => Ok(found),
        None => Err(HelperNotFound { name, searched }),
    }
}

/// Asks the kernel to sacrifice this process last when memory runs out. Lowering the score takes CAP_SYS_RESOURCE; without it nothing changes.
pub fn shield_from_oom_killer() {
    // -900, not -1000: still killable if it were the one that leaks.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        tracing::debug!(%error, "the out-of-memory score stays as it is");
    }
}

/// Keeps the allocator from holding on to what it was given back: spans come and go by the megabyte, and glibc's growing thresholds and
/// per-thread arenas would keep the largest they ever were. Other allocators are left as they are.
pub fn tame_allocator() {
    // SAFETY: mallopt only stores numbers; called before there are other threads, it races with nobody.
    #[cfg(target_env = "gnu")]
    unsafe {
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, 256 << 10);
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_helper_is_an_error_that_names_every_place_searched() {
        let error = find_helper_in("soci-nothing", Some("/a".into()), Some("/b".into())).expect_err("not installed");
        assert_eq!(
            error.to_string(),
            "soci-nothing is not installed: looked for it in /a, /b, /usr/libexec/soci-snapshotter"
        );
    }

    #[test]
    fn the_directory_asked_for_wins() {
        let (one, two) = (tempfile::tempdir().expect("temp"), tempfile::tempdir().expect("temp"));
        for dir in [&one, &two] {
            std::fs::write(dir.path().join("soci-x"), "").expect("write");
        }
        let found = find_helper_in("soci-x", Some(two.path().into()), Some(one.path().into())).expect("found");
        assert_eq!(found, two.path().join("soci-x"));
    }
}
