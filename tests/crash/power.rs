//! Power cuts: what was on the disk at one moment, and nothing of what the kernel still had in memory.
//!
//! ```text
//!   child ── writes ──▶ ext4 ── what it lets go, in its order ──▶ loop device ──▶ disk (a file on btrfs)
//!                                                                       the cut: a clone of that file, made in one moment
//! ```
//! The clone is then a disk whose machine lost power: mounted, its journal is replayed, and what the child had been promised must be there. The work
//! goes on from there to the next cut, as it would after a reboot.

use super::{Job, Random, Worker, content, layers, records, seeds};
use crate::support::command::{attempt, output, run, text};
use crate::support::slot::{Root, Slot};
use crate::support::undo::Undo;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const SHELF: &str = "1G";
const DISK: &str = "192M";

/// The filesystem whose files can be cloned.
struct Shelf {
    path: PathBuf,
    _undo: Undo,
}

impl Shelf {
    fn new(root: &Root) -> Shelf {
        let (image, path) = (root.join("shelf.img"), root.dir("shelf"));
        run(Command::new("truncate").args(["-s", SHELF]).arg(&image));
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&path));
        let undo = Undo::with({
            let path = path.clone();
            // What other tests start meanwhile may have a copy of the disk's mount in a namespace of its own, and keeps it for as long as it runs.
            move || run(Command::new("umount").arg("--lazy").arg(&path))
        });
        Shelf { path, _undo: undo }
    }
}

/// A layer that was checked here may still be examined.
fn unmount(at: &Path) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let done = attempt(Command::new("umount").arg(at));
        if done.status.success() {
            return;
        }
        let said = text(&done.stderr);
        assert!(said.contains("busy") && Instant::now() < deadline, "{said}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A disk with a mounted ext4.
struct Disk {
    file: PathBuf,
    at: PathBuf,
    mounted: bool,
}

impl Disk {
    fn mount(file: PathBuf, at: PathBuf) -> Disk {
        std::fs::create_dir_all(&at).unwrap();
        // Commits often: more different moments.
        run(Command::new("mount").args(["-o", "loop,commit=1"]).arg(&file).arg(&at));
        Disk { file, at, mounted: true }
    }

    /// What is on it at this moment, as another disk.
    fn cut(&self, to: &Path) {
        run(Command::new("cp").arg("--reflink=always").arg(&self.file).arg(to));
    }

    fn unmount(&mut self) {
        unmount(&self.at);
        self.mounted = false;
        std::fs::remove_file(&self.file).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg("-l").arg(&self.at).status();
        }
    }
}

/// Cuts, and what they found.
#[derive(Debug, Default)]
struct Found {
    cuts: usize,
    promises: usize,
    /// Promises of the content store.
    blobs: usize,
    marked: usize,
    torn: usize,
}

fn cuts(seed: u64, count: usize) -> Found {
    let slot = Slot::take();
    let root = slot.root();
    let shelf = Shelf::new(&root);
    let mut random = Random::new(seed);
    let first = shelf.path.join("disk-0");
    run(Command::new("truncate").args(["-s", DISK]).arg(&first));
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&first));
    let mut disk = Disk::mount(first, root.join("disk"));
    let mut found = Found::default();
    for cut in 1..=count {
        let place = |name: &str| {
            let path = disk.at.join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let job = |name: &str| Job { place: place(name), seed: seed * 1000 + cut as u64, steps: u64::MAX };
        let children = [(records::CHILD, "records"), (layers::CHILD, "layers"), (content::CHILD, "content")];
        let workers = children.map(|(child, place)| Worker::start(child, &job(place)));
        // The kernel writes back what is half a minute old; here it does so a while before the cut, in the middle of the work.
        std::thread::sleep(Duration::from_millis(400 + random.below(800) as u64));
        run(Command::new("sync").arg("-f").arg(&disk.at));
        std::thread::sleep(Duration::from_millis(random.below(900) as u64));
        let next = shelf.path.join(format!("disk-{cut}"));
        // What a child says after the cut is not promised: it is stopped from saying before the disk is copied.
        let [said, _, kept] = {
            for worker in &workers {
                worker.stop();
            }
            disk.cut(&next);
            workers.map(Worker::kill)
        };
        disk.unmount();
        disk = Disk::mount(next, root.join("disk"));
        let checked = std::panic::catch_unwind(|| {
            records::check(&disk.at.join("records"), &said, records::Ended::PowerCut);
            let mut marks = (0, 0);
            for image in layers::all() {
                let (marked, wrong) = layers::marks(&disk.at.join("layers"), &image);
                marks = (marks.0 + marked, marks.1 + wrong);
            }
            layers::check(&disk.at.join("layers"));
            content::check(&disk.at.join("content"), &kept, records::Ended::PowerCut);
            marks
        });
        match checked {
            Ok((marked, torn)) => {
                found.cuts += 1;
                let done = |said: &[String]| said.iter().filter(|line| line.starts_with("done ")).count();
                found.promises += done(&said);
                found.blobs += done(&kept);
                found.marked += marked;
                found.torn += torn;
            }
            Err(panic) => {
                eprintln!("seed {seed}, cut {cut}: {}\n{}", said.join("\n"), kept.join("\n"));
                std::panic::resume_unwind(panic);
            }
        }
    }
    disk.unmount();
    let _ = output(Command::new("sync").arg("-f").arg(root.path()));
    found
}

#[test]
fn privileged_twenty_power_cuts_leave_everything_consistent() {
    for seed in seeds(&[7]) {
        let found = cuts(seed, 20);
        eprintln!("seed {seed}: {found:?}");
        assert_eq!(found.cuts, 20);
        assert!(found.promises > 20 && found.blobs > 20 && found.marked > 0, "{found:?}");
    }
}
