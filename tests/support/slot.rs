//! A share of the machine: a number nobody else holds, from which directories, addresses, interfaces and queues get their names.
//!
//! Tests run in parallel and several people test on one machine. The number is held by a file lock, so that it is free the moment its
//! owner is gone however it went; whoever takes it next removes what is left: processes, mounts, loop devices, the network namespace.

use super::command::{command, output, run, try_run};
use super::process::{kill_all, pids_naming};
use super::undo::Undo;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Directories and locks of all slots.
const BASE: &str = "/var/tmp/soci-lab";
/// 10.88.N.0/30 is the slot's network.
const SLOTS: u8 = 200;
/// The file behind a fresh filesystem. Sparse: only what is written takes room.
const FRESH_SIZE: &str = "40G";

pub struct Slot {
    number: u8,
    roots: AtomicU32,
    _lock: Flock<File>,
}

impl Slot {
    pub fn take() -> Slot {
        super::needs_root();
        fs::create_dir_all(BASE).unwrap();
        for number in 0..SLOTS {
            let file = File::options().create(true).append(true).open(format!("{BASE}/{number}.lock")).unwrap();
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                let slot = Slot { number, roots: AtomicU32::new(0), _lock: lock };
                slot.sweep();
                fs::DirBuilder::new().mode(0o711).create(slot.dir()).unwrap();
                return slot;
            }
        }
        panic!("all {SLOTS} slots of {BASE} are taken");
    }

    pub fn number(&self) -> u8 {
        self.number
    }

    /// The slot's directory. Paths of sockets start here, so it is short.
    pub fn dir(&self) -> PathBuf {
        format!("{BASE}/{}", self.number).into()
    }

    /// Removes whatever carries this slot's names. Nobody alive owns it.
    fn sweep(&self) {
        let dir = self.dir();
        kill_all(&super::containerd::remains(&dir));
        kill_all(&pids_naming(&format!("nfqdelay {} ", super::link::queue(self.number))));
        super::link::remove(self.number);
        remove_tree(&dir);
    }

    /// A new empty directory below the slot's, on the machine's own filesystem if overlay mounts can live there, else on a fresh one.
    pub fn root(&self) -> Root {
        let path = self.next_root();
        let filesystem = nix::sys::statfs::statfs(&path).unwrap().filesystem_type();
        let unfit = [nix::sys::statfs::OVERLAYFS_SUPER_MAGIC, nix::sys::statfs::TMPFS_MAGIC].contains(&filesystem);
        if unfit {
            fresh_ext4(path)
        } else {
            Root {
                _undo: Undo::with({
                    let path = path.clone();
                    move || remove_tree(&path)
                }),
                path,
            }
        }
    }

    /// A new ext4 of its own. Creating files soon after many were deleted costs ext4 milliseconds per file, so whatever is timed starts here.
    pub fn fresh_root(&self) -> Root {
        fresh_ext4(self.next_root())
    }

    fn next_root(&self) -> PathBuf {
        let path = self.dir().join(format!("r{}", self.roots.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&path).unwrap();
        path
    }
}

impl Drop for Slot {
    /// Everything that was started here was dropped before.
    fn drop(&mut self) {
        let left = std::panic::catch_unwind(AssertUnwindSafe(|| super::leaks::check(&self.dir())));
        remove_tree(&self.dir());
        if let Err(left) = left {
            std::panic::resume_unwind(left);
        }
        assert!(
            std::thread::panicking() || !self.dir().exists(),
            "{} cannot be removed: {:?}",
            self.dir().display(),
            fs::remove_dir_all(self.dir())
        );
    }
}

/// A directory that goes away with everything mounted in it.
pub struct Root {
    path: PathBuf,
    _undo: Undo,
}

impl Root {
    pub fn path(&self) -> &Path {
        &self.path
    }
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
    /// A directory in it, made now.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }
}

fn fresh_ext4(path: PathBuf) -> Root {
    let image = path.with_extension("img");
    let undo = Undo::with({
        let (path, image) = (path.clone(), image.clone());
        move || {
            remove_tree_keeping_disk(&path);
            detach(&image);
            let _ = fs::remove_file(&image);
        }
    });
    run(Command::new("truncate").args(["-s", FRESH_SIZE]).arg(&image));
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "nodiscard"]).arg(&image));
    // Direct I/O, or everything would be cached twice.
    let device = output(Command::new("losetup").args(["--direct-io=on", "-f", "--show"]).arg(&image));
    run(Command::new("mount").args(["-o", "noatime", device.trim()]).arg(&path));
    Root { path, _undo: undo }
}

fn detach(image: &Path) {
    let devices = command("losetup", "-n -O NAME -j").arg(image).output().map(|o| o.stdout).unwrap_or_default();
    for device in super::command::text(&devices).lines() {
        try_run(command("losetup", "-d").arg(device.trim()));
    }
}

/// Where something is mounted at or below `dir`, in the order of mounting.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let inside = |path: &Path| path.starts_with(dir);
    fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .filter_map(|l| l.split(' ').nth(1).map(PathBuf::from))
        .filter(|p| inside(p))
        .collect()
}

pub fn unmount_below(dir: &Path) {
    // Again while there are any: a mount may hide another at the same place.
    for _ in 0..4 {
        let mut mounts = mounts_below(dir);
        if mounts.is_empty() {
            return;
        }
        mounts.reverse();
        for mount in mounts {
            let _ =
                nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH | nix::mount::MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

/// Unmounts everything below `dir`, detaches the loop devices of images in it and removes it.
fn remove_tree(dir: &Path) {
    unmount_below(dir);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "img") {
            detach(&entry.path());
        }
    }
    let _ = fs::remove_dir_all(dir);
}

/// For a root that is a filesystem of its own: its files need no removing one by one.
fn remove_tree_keeping_disk(dir: &Path) {
    unmount_below(dir);
    let _ = fs::remove_dir(dir);
}
