//! What a test leaves behind on the machine: mounts, FUSE connections, processes, descriptors of this process. The directories of a lab tell whose
//! it is, because tests run at the same time.
//!
//! What a daemon has open ([`descriptors`]) is compared by tests that have removed all images (`Node::nothing_is_left`).
//!
//! Guards end what they started by force if need be, so some look first whether the product's own way was enough and [`report`] if not.

use super::process::{is_alive, pids_naming, pids_rooted_in};
use super::slot::mounts_below;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Processes that were told to end, and connections whose last user is just going, get so long.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// What is known of labs that are in use, by their directory.
#[derive(Default)]
struct Known {
    connections: BTreeMap<PathBuf, BTreeSet<u32>>,
    reports: BTreeMap<PathBuf, Vec<String>>,
}

static KNOWN: Mutex<Known> = Mutex::new(Known { connections: BTreeMap::new(), reports: BTreeMap::new() });

fn known() -> MutexGuard<'static, Known> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The FUSE connection that is mounted at `point` now is to be gone in the end.
pub fn watch_connection(point: &Path) {
    if let Some(minor) = minors(|mount| Path::new(mount) == point).pop_first() {
        known().connections.entry(point.into()).or_default().insert(minor);
    }
}

/// Something below `dir` was not as it should be; the check fails with it.
pub fn report(dir: &Path, what: String) {
    known().reports.entry(dir.into()).or_default().push(what);
}

/// Panics if something is left of what happened below `dir`, unless the test has failed anyway.
pub fn check(dir: &Path) {
    let start = Instant::now();
    let mut left = remaining(dir);
    while !left.is_empty() && start.elapsed() < GONE_WITHIN {
        std::thread::sleep(Duration::from_millis(20));
        left = remaining(dir);
    }
    let mut known = known();
    let below = |path: &PathBuf| path.starts_with(dir);
    known.connections.retain(|path, _| !below(path));
    let reported: Vec<PathBuf> = known.reports.keys().filter(|path| below(path)).cloned().collect();
    left.extend(reported.iter().flat_map(|path| known.reports.remove(path).unwrap_or_default()));
    drop(known);
    if !left.is_empty() {
        let left = left.join("\n  ");
        match std::thread::panicking() {
            true => eprintln!("left behind in {}:\n  {left}", dir.display()),
            false => panic!("left behind in {}:\n  {left}", dir.display()),
        }
    }
}

/// What is there at the moment.
pub fn remaining(dir: &Path) -> Vec<String> {
    let needle = format!("{}/", dir.display());
    let mut left: Vec<String> = mounts_below(dir).iter().map(|mount| format!("mount {}", mount.display())).collect();
    let mut pids: BTreeSet<u32> = pids_naming(&needle).into_iter().collect();
    pids.extend(pids_rooted_in(&needle));
    for pid in pids.into_iter().filter(|pid| is_alive(*pid)) {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        left.push(format!("process {pid}: {}", super::command::text(&words).replace('\0', " ")));
    }
    let own = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    left.extend(
        own.filter_map(|fd| fs::read_link(fd.path()).ok())
            .filter(|path| path.starts_with(dir))
            .map(|path| format!("open file {}", path.display())),
    );
    let connections: BTreeSet<u32> = {
        let known = known();
        known
            .connections
            .iter()
            .filter(|(path, _)| path.starts_with(dir))
            .flat_map(|(_, minors)| minors.clone())
            .collect()
    };
    let alive: Vec<u32> = connections
        .into_iter()
        .filter(|minor| Path::new(&format!("/sys/fs/fuse/connections/{minor}")).exists())
        .collect();
    if !alive.is_empty() {
        // Numbers are used again: what somebody else has mounted by now is his.
        let others = minors(|mount| !Path::new(mount).starts_with(dir));
        left.extend(
            alive.into_iter().filter(|minor| !others.contains(minor)).map(|minor| format!("FUSE connection {minor}")),
        );
    }
    left
}

/// How many of each kind of descriptor a process has; numbers in names are left out.
pub type Descriptors = BTreeMap<String, usize>;

/// Connections to registries that are kept for a while.
const KEPT: &str = "kept connection";
/// Local connections that come with containerd, at any time after a start: its own to us, and ours to it.
const CONTAINERDS: (&str, usize) = ("socket:[]", 4);

/// What a process has open.
pub fn descriptors(pid: u32) -> Descriptors {
    let tables =
        ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default());
    // Of proc_pid_net(5)'s lines, word 3 is the state (1: established), word 9 the inode.
    let established = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.get(3) == Some(&"01")).then(|| format!("socket:[{}]", words.get(9).unwrap_or(&"")))
    };
    let connections: BTreeSet<String> = tables.iter().flat_map(|table| table.lines().filter_map(established)).collect();
    let mut found = Descriptors::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let name = link.display().to_string();
        let kind = match connections.contains(&name) {
            true => KEPT.to_owned(),
            false => name.replace(|c: char| c.is_ascii_digit(), ""),
        };
        *found.entry(kind).or_default() += 1;
    }
    found
}

/// What there is more of now than there was before, beyond `connections` that are kept for a while.
pub fn more_open(before: &Descriptors, now: &Descriptors, connections: usize) -> Vec<String> {
    let allowed = |kind: &str| match kind {
        KEPT => connections,
        _ if kind == CONTAINERDS.0 => CONTAINERDS.1 + before.get(kind).copied().unwrap_or(0),
        _ => before.get(kind).copied().unwrap_or(0),
    };
    let more = now.iter().filter(|(kind, count)| **count > allowed(kind));
    more.map(|(kind, count)| format!("{count} of {kind}, where there were {}", allowed(kind))).collect()
}

/// The device numbers of mounts whose mount point is wanted.
fn minors(wanted: impl Fn(&str) -> bool) -> BTreeSet<u32> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let of_line = |line: &str| {
        let mut words = line.split(' ').skip(2);
        let (device, _root, point) = (words.next()?, words.next()?, words.next()?);
        wanted(point).then(|| device.strip_prefix("0:")?.parse().ok())?
    };
    mounts.lines().filter_map(of_line).collect()
}
