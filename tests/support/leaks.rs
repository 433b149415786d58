//! What a test leaves behind on the machine: mounts, FUSE connections, processes, descriptors of this process. The directories of a lab tell whose
//! it is, because tests run at the same time.
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
