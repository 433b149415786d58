//! The privileged processes as they really run: `soci-mount` and `soci-custodian`, started as root, attacked and killed.
//!
//! Needs root and FUSE, and fails without them.

mod custodian;
mod daemon;
mod holder;
pub mod lab;
mod unpack;

use std::{
    fs::File,
    io::Read,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

pub const CUSTODIAN: &str = env!("CARGO_BIN_EXE_soci-custodian");
pub const HOLDER: &str = env!("CARGO_BIN_EXE_soci-mount");
/// Names the socket that [`helper_somebody_else_connects`] tries.
const FOREIGN_SOCKET: &str = "SOCI_TEST_FOREIGN_SOCKET";
const NOBODY: u32 = 65534;

/// Puts the helpers where a daemon that runs from this test's executable finds them: beside it.
pub fn install_helpers() {
    let exe = std::env::current_exe().expect("own path");
    for program in [CUSTODIAN, HOLDER] {
        let link = exe.with_file_name(Path::new(program).file_name().expect("a file"));
        // A build directory that was copied from another place links to that place's helpers.
        if std::fs::read_link(&link).is_ok_and(|target| target == Path::new(program)) {
            continue;
        }
        let fresh = link.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
        std::os::unix::fs::symlink(program, &fresh).expect("symlink");
        std::fs::rename(fresh, link).expect("rename");
    }
}

/// A process that does not outlive its test.
pub struct Killed(pub Child);

impl Killed {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Waits for the end, at most ten seconds.
    pub fn ended(&mut self) -> std::process::ExitStatus {
        eventually("the process ends", || self.0.try_wait().expect("wait"))
    }

    pub fn kill(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("wait");
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Polls until there is a value, at most ten seconds.
pub fn eventually<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A row of `/proc/PID/task/*/status`, which must be the same in every thread.
pub fn status_row(pid: u32, row: &str) -> String {
    let mut rows: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("alive")
        .map(|task| {
            let status = std::fs::read_to_string(task.expect("task").path().join("status")).expect("status");
            let line = status.lines().find_map(|line| line.strip_prefix(row)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {row}")).trim().to_owned()
        })
        .collect();
    rows.dedup();
    assert_eq!(rows.len(), 1, "{row} differs between threads: {rows:?}");
    rows.remove(0)
}

/// Runs a program with a time limit, for commands that a broken mount could hang.
pub fn run(command: &mut Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let status = eventually("a command ends", || child.try_wait().expect("wait"));
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    child.stdout.take().expect("piped").read_to_end(&mut stdout).expect("read");
    child.stderr.take().expect("piped").read_to_end(&mut stderr).expect("read");
    Output { status, stdout, stderr }
}

/// What another user gets who connects to `socket` and sends `message`: whether a reply came.
pub fn somebody_else_is_answered(socket: &Path) -> bool {
    // Our executable may be below a directory that others cannot enter, so it is run through a descriptor.
    let exe = File::open(std::env::current_exe().expect("own path")).expect("open");
    let output = run(Command::new("/proc/self/fd/0")
        .args(["--exact", "privilege::helper_somebody_else_connects", "--ignored", "--nocapture"])
        .env(FOREIGN_SOCKET, socket)
        .stdin(exe)
        .uid(NOBODY)
        .gid(NOBODY));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("CONNECTED"), "{text}");
    text.contains("ANSWERED")
}

#[test]
#[ignore = "run by those that ask somebody_else_is_answered"]
fn helper_somebody_else_connects() {
    use soci::sys::seqpacket;
    use std::os::fd::AsFd;
    let path = std::env::var_os(FOREIGN_SOCKET).expect("whose socket");
    let socket = seqpacket::connect(Path::new(&path)).expect("connect");
    eprintln!("CONNECTED as {}", rustix::process::geteuid().as_raw());
    // Both protocols refuse by closing, so sending may fail already.
    let _ = seqpacket::send(socket.as_fd(), b"soci\x01\x01", seqpacket::Send::Wait);
    let mut buffer = [0; 4096];
    if matches!(seqpacket::recv_with_fds(socket.as_fd(), &mut buffer), Ok((1.., _))) {
        eprintln!("ANSWERED");
    }
}
