//! A cgroup of the second version, for one number: the CPU time of processes that come and go, those that nobody waits for included.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub struct Cgroup(PathBuf);

impl Cgroup {
    /// A new one; `None` where there is no such hierarchy, or it is not ours to use.
    pub fn new(name: &str) -> Option<Cgroup> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let mount = mounts.lines().find_map(|line| {
            let mut words = line.split(' ');
            let (_, path, kind) = (words.next()?, words.next()?, words.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        })?;
        let path = mount.join(format!("soci-lab-{}-{name}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Cgroup(path))
    }

    /// Moves a process there. Its future children are born there.
    pub fn add(&self, pid: u32) -> bool {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).is_ok()
    }

    /// CPU time of all that were ever in it.
    pub fn cpu(&self) -> Option<Duration> {
        let stat = fs::read_to_string(self.0.join("cpu.stat")).ok()?;
        let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
        micros.trim().parse().ok().map(Duration::from_micros)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What still lives there goes back to where it came from, or the directory would stay.
        let parent = self.0.parent().map(Path::to_owned).unwrap_or_default();
        for pid in fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(parent.join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}
