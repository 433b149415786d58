//! What each process may do, is in, and has open: looked up in `/proc`, where a process cannot tell stories about itself.

use super::{
    Next,
    tools::{CUSTODIAN, DAEMON, Guest, HOLDER, ROOT, main_pid, processes, row},
};
use crate::{Outcome, ensure};
use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

/// CHOWN, DAC_OVERRIDE and FOWNER: removing, measuring and assigning.
const CUSTODIAN_KEEPS: u64 = 0b1011;
/// The same, and FSETID, SYS_ADMIN (`trusted.*` attributes), MKNOD and SETFCAP: what files in layers can have.
const WORKER_KEEPS: u64 = 0b1011 | 1 << 4 | 1 << 21 | 1 << 27 | 1 << 31;

const CAPABILITIES: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

fn mask(text: &str) -> Outcome<u64> {
    u64::from_str_radix(text, 16).map_err(|error| format!("{text}: {error}"))
}

fn space(pid: u32, kind: &str) -> Outcome<String> {
    let link = fs::read_link(format!("/proc/{pid}/ns/{kind}")).map_err(|error| format!("{pid}: {error}"))?;
    Ok(link.display().to_string())
}

fn open(pid: u32) -> Outcome<Vec<String>> {
    let list = fs::read_dir(format!("/proc/{pid}/fd")).map_err(|error| format!("{pid}: {error}"))?;
    Ok(list.flatten().filter_map(|fd| fs::read_link(fd.path()).ok()).map(|to| to.display().to_string()).collect())
}

/// An error if the process has anything open that does not begin like one of `known`.
fn only(pid: u32, open: &[String], known: &[&str]) -> Outcome {
    let strange: Vec<&str> =
        open.iter().map(String::as_str).filter(|to| !known.iter().any(|known| to.starts_with(known))).collect();
    ensure!(strange.is_empty(), "{pid} has open: {}", strange.join(", "));
    Ok(())
}

/// Each of the long-lived processes.
pub fn confinement(_: &Guest) -> Outcome<Next> {
    let (daemon, holder, custodian) = (main_pid(DAEMON)?, main_pid(HOLDER)?, main_pid(CUSTODIAN)?);
    for (pid, allowed) in [(daemon, 0), (holder, 0), (custodian, CUSTODIAN_KEEPS)] {
        for name in CAPABILITIES {
            let found = mask(&row(pid, name)?)?;
            let expected = if matches!(name, "CapInh" | "CapAmb") { 0 } else { allowed };
            ensure!(found == expected, "{name} of {pid} is {found:#x}, not {expected:#x}");
        }
        // Of every thread: a filter that one of them escaped would be none.
        let threads = fs::read_dir(format!("/proc/{pid}/task")).map_err(|error| error.to_string())?.flatten();
        for thread in threads.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
            ensure!(row(thread, "NoNewPrivs")? == "1", "thread {thread} of {pid} may gain privileges");
            ensure!(row(thread, "Seccomp")? == "2", "thread {thread} of {pid} has no seccomp filter");
            ensure!(mask(&row(thread, "CapEff")?)? == allowed, "thread {thread} of {pid} may do more than the others");
        }
    }
    ensure!(space(daemon, "mnt")? != space(1, "mnt")?, "the daemon has no mount namespace of its own");
    ensure!(space(holder, "mnt")? == space(1, "mnt")?, "the holder's mount is hidden in a namespace");
    ensure!(space(custodian, "mnt")? != space(1, "mnt")?, "the custodian has no mount namespace of its own");
    ensure!(space(custodian, "net")? != space(1, "net")?, "the custodian has the machine's network");
    // What it keeps for the next daemon: FUSE, the journal of requests (kernels before 6.9), logins.
    let kept = ["/dev/fuse", "/memfd:soci-requests", "/memfd:soci-logins"];
    let at = format!("{ROOT}/snapshotter");
    only(holder, &open(holder)?, &[&kept[..], &["/dev/null", "socket:", &at]].concat())?;
    // It looks at its table of mounts before it removes anything, and speaks to the process that starts unpacking ones.
    let mounts = format!("/proc/{custodian}/mountinfo");
    only(custodian, &open(custodian)?, &["/dev/null", "socket:", &mounts, &format!("{ROOT}/snapshotter/snapshots")])?;
    let of_daemon = open(daemon)?;
    only(daemon, &of_daemon, &["/dev/fuse", "/dev/null", "socket:", "anon_inode:", "pipe:", "/memfd:", ROOT])?;
    let devices = of_daemon.iter().filter(|to| *to == "/dev/fuse").count();
    ensure!((1..=2).contains(&devices), "the daemon has {devices} FUSE descriptors");
    for spawner in processes("soci-spawner") {
        ensure!(row(spawner, "NoNewPrivs")? == "1", "the spawner may gain privileges");
        ensure!(row(spawner, "Seccomp")? == "2", "the spawner has no seccomp filter");
        ensure!(space(spawner, "net")? != space(1, "net")?, "the spawner has the machine's network");
        ensure!(mask(&row(spawner, "CapBnd")?)? >> 38 == 0, "the spawner may do what its unit does not allow");
    }
    Ok(Next::Step)
}

/// What was last seen of a short-lived process.
#[derive(Debug, Clone)]
pub struct Seen {
    pid: u32,
    rows: BTreeMap<&'static str, String>,
    net: String,
    root: String,
    open: Vec<String>,
}

/// Looks for processes of a name until it is told to end. One that is seen before it has confined itself is looked at again: what counts is the
/// last look.
pub struct Watch {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<u32, Seen>>,
}

impl Watch {
    pub fn begin(name: &'static str) -> Watch {
        let ended = Arc::new(AtomicBool::new(false));
        let until = ended.clone();
        let thread = std::thread::spawn(move || {
            let mut seen = BTreeMap::new();
            while !until.load(Ordering::Relaxed) {
                for pid in processes(name) {
                    if let Ok(now) = look(pid) {
                        seen.insert(pid, now);
                    }
                }
            }
            seen
        });
        Watch { ended, thread }
    }

    pub fn end(self) -> Outcome<Vec<Seen>> {
        self.ended.store(true, Ordering::Relaxed);
        let seen = self.thread.join().map_err(|_| "watching has failed".to_owned())?;
        Ok(seen.into_values().collect())
    }
}

fn look(pid: u32) -> Outcome<Seen> {
    let mut rows = BTreeMap::new();
    for name in CAPABILITIES.into_iter().chain(["NoNewPrivs", "Seccomp"]) {
        rows.insert(name, row(pid, name)?);
    }
    let root = fs::read_link(format!("/proc/{pid}/root")).map_err(|error| error.to_string())?;
    Ok(Seen { pid, rows, net: space(pid, "net")?, root: root.display().to_string(), open: open(pid)? })
}

/// A process that unpacks a layer: it sees nothing but that layer's directory, and has no network.
pub fn worker(seen: &Seen) -> Outcome {
    let what = format!("an unpacking process was {seen:?}");
    for name in ["CapPrm", "CapEff"] {
        let found = mask(seen.rows.get(name).ok_or(&what)?)?;
        ensure!(found & !WORKER_KEEPS == 0, "{name} is {found:#x}: {what}");
    }
    ensure!(seen.rows.get("NoNewPrivs").is_some_and(|row| row == "1"), "{what}");
    ensure!(seen.rows.get("Seccomp").is_some_and(|row| row == "2"), "{what}");
    ensure!(seen.net != space(1, "net")?, "it has the machine's network: {what}");
    ensure!(seen.root.starts_with(&format!("{ROOT}/snapshotter/snapshots/")), "{what}");
    only(seen.pid, &seen.open, &["/dev/null", "socket:", "pipe:", "anon_inode:", "/memfd:", "/proc/", "/", ROOT])
}
