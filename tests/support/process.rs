//! A long-running program: its log in a file, its process group gone when it is dropped.

use super::undo::Undo;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a program may take to become ready. Debug builds on a busy two-core machine are slow.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// How long a program may take to end after SIGTERM before it is killed.
const GONE_WITHIN: Duration = Duration::from_secs(10);

pub struct Process {
    pub name: String,
    log: PathBuf,
    child: Arc<Mutex<Child>>,
    pid: u32,
    undo: Option<Undo>,
}

impl Process {
    /// Starts `command` in a process group of its own, appending what it says to `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Process {
        let sink =
            File::options().create(true).append(true).open(log).unwrap_or_else(|e| panic!("{}: {e}", log.display()));
        let child = command
            .stdin(Stdio::null())
            .stdout(sink.try_clone().unwrap())
            .stderr(sink)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("{name}: {command:?}: {e}"));
        let pid = child.id();
        let child = Arc::new(Mutex::new(child));
        let undo = Undo::with({
            let child = child.clone();
            move || {
                end(&mut child.lock().unwrap(), GONE_WITHIN);
            }
        });
        Process { name: name.into(), log: log.into(), child, pid, undo: Some(undo) }
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn is_running(&self) -> bool {
        matches!(self.child.lock().unwrap().try_wait(), Ok(None))
    }

    /// Waits until `path` exists (a socket, mostly).
    pub fn wait_for_path(&self, path: &Path) -> &Process {
        self.wait_until(&format!("{} exists", path.display()), || path.exists())
    }

    /// Waits until the log contains `text`.
    pub fn wait_for_log(&self, text: &str) -> &Process {
        self.wait_until(&format!("it logs '{text}'"), || self.log().contains(text))
    }

    /// Waits until somebody accepts connections at `address`.
    pub fn wait_for_tcp(&self, reachable: impl Fn() -> bool) -> &Process {
        self.wait_until("it accepts connections", reachable)
    }

    pub fn wait_until(&self, what: &str, mut condition: impl FnMut() -> bool) -> &Process {
        let start = Instant::now();
        while !condition() {
            let running = self.is_running();
            assert!(
                running && start.elapsed() < READY_WITHIN,
                "waited for {} until {what}; it {}:\n{}",
                self.name,
                if running { "is still running" } else { "ended" },
                self.tail(40)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        self
    }

    pub fn log(&self) -> String {
        super::command::text(&std::fs::read(&self.log).unwrap_or_default())
    }

    pub fn tail(&self, lines: usize) -> String {
        let log = self.log();
        let short = |line: &str| line.chars().take(300).collect::<String>();
        let all: Vec<String> = log.lines().map(short).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// SIGTERM and wait; the exit status. Killed if it does not listen.
    pub fn stop(mut self) -> ExitStatus {
        let status = end(&mut self.child.lock().unwrap(), GONE_WITHIN);
        self.undo.take();
        status
    }

    /// `kill -9` of this one process (not of its group) and wait.
    pub fn kill_9(mut self) {
        let mut child = self.child.lock().unwrap();
        let _ = kill(pid(&child), Signal::SIGKILL);
        let _ = child.wait();
        drop(child);
        self.undo.take();
    }

    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid as i32), signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the end of {}'s log ({}):\n{}\n---", self.name, self.log.display(), self.tail(15));
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

fn end(child: &mut Child, patience: Duration) -> ExitStatus {
    let group = pid(child);
    if let Ok(Some(status)) = child.try_wait() {
        let _ = killpg(group, Signal::SIGKILL); // what it left in its group
        return status;
    }
    let _ = kill(group, Signal::SIGTERM);
    let start = Instant::now();
    loop {
        match child.try_wait().expect("wait for a child of ours") {
            Some(status) => {
                let _ = killpg(group, Signal::SIGKILL);
                return status;
            }
            None if start.elapsed() > patience => {
                let _ = killpg(group, Signal::SIGKILL);
                return child.wait().expect("wait for a child of ours");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// What the kernel says a process has used so far.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Usage {
    pub rss_now_kb: u64,
    pub rss_peak_kb: u64,
    /// User and system time, of the process and of the children it has waited for.
    pub cpu: Duration,
}

impl Usage {
    /// Nothing, if there is no such process (any more).
    pub fn of(pid: u32) -> Usage {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let kb = |key: &str| {
            status
                .lines()
                .find_map(|l| l.strip_prefix(key))
                .and_then(|v| v.split_whitespace().next())
                .and_then(|n| n.parse().ok())
                .unwrap_or(0)
        };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // After the parenthesised name: state is field 3 of proc(5); utime, stime, cutime and cstime are 14 to 17, in ticks of 10 ms.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks: u64 = fields.get(11..15).unwrap_or(&[]).iter().filter_map(|f| f.parse::<u64>().ok()).sum();
        Usage { rss_now_kb: kb("VmRSS:"), rss_peak_kb: kb("VmHWM:"), cpu: Duration::from_millis(ticks * 10) }
    }
}

/// Names of what the lab starts. Somebody's editor or `tail -f` on one of our logs is none of our business.
const OURS: [&str; 9] = ["containerd", "dockerd", "docker", "soci", "registry", "referrers", "nfqdelay", "ctr", "runc"];

/// The lab's processes whose command line contains `text`.
pub fn pids_naming(text: &str) -> Vec<u32> {
    let ours = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| OURS.iter().any(|o| c.starts_with(o)))
    };
    all_pids()
        .filter(ours)
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|c| super::command::text(&c).replace('\0', " ").contains(text))
        })
        .collect()
}

/// The processes whose root filesystem is an overlay or bind mount that names `text`: what runs in a container made from there.
pub fn pids_rooted_in(text: &str) -> Vec<u32> {
    let rooted = |pid: &u32| {
        // Of a mountinfo line, field 4 is the root within the filesystem, 5 the mount point.
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        mounts.lines().any(|l| l.split(' ').nth(4) == Some("/") && l.contains(text))
    };
    all_pids().filter(rooted).collect()
}

fn all_pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").into_iter().flatten().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
}

/// The children of a process, and theirs.
pub fn descendants(pid: u32) -> Vec<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
    };
    let all: Vec<(u32, u32)> = all_pids().filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        let of = found[at];
        found.extend(all.iter().filter(|(_, parent)| *parent == of).map(|(pid, _)| *pid));
        at += 1;
    }
    found.split_off(1)
}

/// Ends processes by id, those of a containerd's shims say, and waits until they are gone.
pub fn kill_all(pids: &[u32]) {
    for &pid in pids {
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) && pids.iter().any(|pid| is_alive(*pid)) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A zombie is not alive: whoever should have waited for it is not us.
pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|s| !s.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}
