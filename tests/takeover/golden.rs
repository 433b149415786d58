//! The database that the Go snapshotter wrote.

use super::go;
use crate::support::command::run;
use crate::support::grpc::{Client, Empty, snapshots};
use crate::support::process::{Process, kill_all, pids_naming};
use crate::support::slot::{Root, Slot, unmount_below};
use soci::layout::{Layout, SnapshotId};
use soci::snapshot::{Kind, import};
use soci::telemetry::catalog::Message;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

#[derive(serde::Deserialize)]
struct Expected {
    snapshots_as_containerd_sees_them: Vec<Row>,
    tree: Vec<String>,
}

#[derive(serde::Deserialize)]
struct Row {
    containerd: Containerd,
    usage: String,
    mounts: String,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Containerd {
    kind: String,
    name: String,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    labels: HashMap<String, String>,
    created: String,
    updated: String,
}

impl Row {
    /// Bytes and inodes, as containerd printed them.
    fn usage(&self) -> (u64, u64) {
        let words: Vec<&str> = self.usage.lines().nth(1).unwrap().split_whitespace().collect();
        (words[1].parse().unwrap(), words[2].parse().unwrap())
    }
}

fn expected() -> Expected {
    serde_json::from_slice(&go::golden("expected.json")).unwrap()
}

fn nanoseconds(text: &str) -> i128 {
    text.parse::<jiff::Timestamp>().unwrap().as_nanosecond()
}

#[test]
fn every_snapshot_comes_out_of_gos_database_as_containerd_knew_it() {
    let import = import(&go::golden("metadata.db")).unwrap();
    assert_eq!(import.refused, []);
    let expected = expected();
    assert_eq!(import.infos.len(), expected.snapshots_as_containerd_sees_them.len());
    let at = |t: soci::snapshot::Timestamp| i128::from(t.seconds) * 1_000_000_000 + i128::from(t.nanos);
    for row in &expected.snapshots_as_containerd_sees_them {
        let theirs = &row.containerd;
        // containerd's own name of a container's snapshot is the end of ours.
        let ours = import.infos.iter().find(|info| info.name.ends_with(&theirs.name)).expect(&theirs.name);
        let kind = if theirs.kind == "Active" { Kind::Active } else { Kind::Committed };
        assert_eq!((ours.kind, &ours.parent), (kind, &theirs.parent), "{}", theirs.name);
        for (key, value) in &theirs.labels {
            assert_eq!(ours.labels.get(key), Some(value), "{}: {key}", theirs.name);
        }
        // containerd's times are its own, taken just after or before.
        for (time, text) in [(ours.created, &theirs.created), (ours.updated, &theirs.updated)] {
            assert!((at(time) - nanoseconds(text)).abs() < 2_000_000_000, "{}: {time:?} {text}", theirs.name);
        }
        if kind == Kind::Committed {
            assert_eq!((ours.usage.size, ours.usage.inodes), row.usage(), "{}", theirs.name);
        } else {
            let directory = format!("snapshots/{}/fs", ours.id);
            assert!(row.mounts.contains(&directory), "{} {directory}", row.mounts);
        }
    }
    let mut numbers: Vec<u32> = import.infos.iter().map(|info| info.id.0).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2, 3, 5, 6]);
    assert!(import.last_id >= 6, "{}", import.last_id);
    let lazy: Vec<SnapshotId> = import.infos.iter().filter(|info| info.is_lazy()).map(|info| info.id).collect();
    assert_eq!(lazy, [SnapshotId(1)]);
}

#[test]
fn a_database_with_flipped_bytes_is_read_or_refused_and_never_more() {
    let good = go::golden("metadata.db");
    let whole = import(&good).unwrap();
    let (mut read, mut refused) = (0, 0);
    let mut check = |bytes: &[u8]| match import(bytes) {
        Ok(import) => {
            assert!(import.infos.len() + import.refused.len() <= 4096);
            for info in &import.infos {
                assert!(info.parent.as_ref().is_none_or(|p| import.infos.iter().any(|i| i.name == *p)));
            }
            read += 1;
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            refused += 1;
        }
    };
    // A seed of its own for every run would find more, and nobody could run it again.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let used: Vec<usize> = (0..good.len()).filter(|at| good[*at] != 0).collect();
    for at in used.iter().step_by(3) {
        let mut bytes = good.clone();
        bytes[*at] ^= 1 << next(8);
        check(&bytes);
    }
    for _ in 0..1000 {
        let mut bytes = good.clone();
        for _ in 0..1 + next(8) {
            // Heads of pages and elements more often than the rest of them.
            let page = next(bytes.len() / 4096) * 4096;
            let width = if next(2) == 0 { 64 } else { 4096 };
            bytes[page + next(width)] = next(256) as u8;
        }
        check(&bytes);
    }
    for _ in 0..200 {
        check(&good[..next(good.len())]);
    }
    assert!(read > 100 && refused > 100, "{read} read, {refused} refused");
    assert_eq!(import(&good).unwrap(), whole);
}

/// A daemon on a copy of the golden root.
struct Site {
    root: Root,
    process: Option<Process>,
}

impl Drop for Site {
    fn drop(&mut self) {
        drop(self.process.take());
        kill_all(&pids_naming(&self.state().display().to_string()));
        unmount_below(self.root.path());
    }
}

impl Site {
    fn new(slot: &Slot) -> Site {
        let site = Site { root: slot.root(), process: None };
        for entry in expected().tree {
            let mut words = entry.splitn(3, ' ');
            let (kind, mode, name) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            let path = site.state().join(name.trim_start_matches('.').trim_start_matches('/'));
            let mode = std::os::unix::fs::PermissionsExt::from_mode(u32::from_str_radix(mode, 8).unwrap());
            match kind {
                "d" => std::fs::create_dir_all(&path).unwrap(),
                _ => std::fs::write(&path, name).unwrap(),
            }
            std::fs::set_permissions(&path, mode).unwrap();
        }
        std::fs::write(site.state().join("content/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        std::fs::write(site.state().join("content/index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
        std::fs::write(site.layout().go_snapshot_db(), go::golden("metadata.db")).unwrap();
        for id in [2, 3, 6] {
            std::fs::write(site.layout().snapshot_fs(SnapshotId(id)).join("file"), format!("of {id}")).unwrap();
        }
        std::fs::write(site.layout().snapshot_fs(SnapshotId(5)).join("written"), "by the container").unwrap();
        site
    }

    fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    fn layout(&self) -> Layout {
        Layout::new(self.state())
    }

    fn socket(&self) -> PathBuf {
        self.root.join("sock")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.root.join("log")).unwrap_or_default()
    }

    fn launch(&mut self) -> &Process {
        let config = self.root.join("config.toml");
        // The registry of the golden images is nowhere.
        let text = "[resolver.host.\"10.88.0.2:5000\"]\n[[resolver.host.\"10.88.0.2:5000\".mirrors]]\n\
                    host = \"http://127.0.0.1:1\"\ninsecure = true\n";
        std::fs::write(&config, format!("mount_timeout_sec = 1\n{text}")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_soci-snapshotter-grpc"));
        command.arg("--root").arg(self.state()).arg("--address").arg(self.socket()).arg("--config").arg(config);
        let process = Process::start("soci-snapshotter-grpc", &mut command, &self.root.join("log"));
        self.process.insert(process)
    }

    fn start(&mut self) -> Client {
        let before = self.log().matches("successfully started").count();
        self.launch();
        let process = self.process.as_ref().unwrap();
        process.wait_until("it has started", || self.log().matches("successfully started").count() > before);
        Client::connect(&self.socket())
    }

    /// Its log, when it has refused to start.
    fn refused(&mut self) -> String {
        self.launch();
        let start = Instant::now();
        while self.process.as_ref().unwrap().is_running() {
            assert!(start.elapsed() < Duration::from_secs(30), "{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(self.process.take());
        self.log()
    }
}

fn usage(client: &Client, key: &str) -> snapshots::Usage {
    let key = snapshots::Key { snapshotter: "soci".into(), key: key.into() };
    client.call(snapshots::USAGE, key).unwrap()
}

fn mounts(client: &Client, key: &str) -> Result<Vec<snapshots::Mount>, tonic::Status> {
    let key = snapshots::Key { snapshotter: "soci".into(), key: key.into() };
    client.call::<_, snapshots::Mounts>(snapshots::MOUNTS, key).map(|m| m.mounts)
}

#[test]
fn privileged_a_daemon_on_gos_root_serves_its_snapshots_and_keeps_its_database() {
    let slot = Slot::take();
    let mut site = Site::new(&slot);
    let database = std::fs::read(site.layout().go_snapshot_db()).unwrap();
    std::fs::create_dir(site.layout().snapshots().join("1_5")).unwrap();
    // What a crash in the middle of an import leaves.
    std::fs::write(site.layout().snapshotter().join("metadata.redb.new"), "torn").unwrap();
    let taken = import(&database).unwrap().infos;
    for life in 0..2 {
        let client = site.start();
        for info in &taken {
            let stat = snapshots::stat(&client, &info.name).unwrap();
            assert_eq!(stat.parent, info.parent.clone().unwrap_or_default());
            assert_eq!(stat.labels, info.labels.clone().into_iter().collect());
            let kind = [Kind::View, Kind::Active, Kind::Committed][stat.kind as usize - 1];
            assert_eq!(kind, info.kind);
            if info.kind == Kind::Committed && !info.is_lazy() {
                let usage = usage(&client, &info.name);
                assert_eq!((usage.size as u64, usage.inodes as u64), (info.usage.size, info.usage.inodes));
            }
        }
        let named = |id: u32| taken.iter().find(|info| info.id.0 == id).unwrap().name.clone();
        // Of the image without index, a container can be started at once.
        let snapshots = site.layout().snapshots().display().to_string();
        let key = format!("default/9/local-{life}");
        let local = snapshots::prepare(&client, &key, &named(6), HashMap::new()).unwrap();
        let lower = format!("lowerdir={snapshots}/6/fs");
        assert!(local[0].options.contains(&lower), "{local:?}");
        // Of the lazy one not before its index can be had, and its client hears so soon.
        let started = Instant::now();
        let refused = snapshots::prepare(&client, "default/9/lazy", &named(3), HashMap::new()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
        assert_eq!(mounts(&client, &named(5)).unwrap_err().code(), tonic::Code::Unavailable);
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        let log = site.log();
        assert!(log.contains(Message::TakeoverWaits.id()) && log.contains("redis:soci"), "{log}");
        assert_eq!(log.matches(Message::TakenOver.id()).count(), 1, "once, not in every life: {log}");
        assert!(!log.contains(Message::NotTakenOver.id()) && !log.contains(Message::LinkLost.id()), "{log}");
        assert!(log.contains(Message::StrangeDirectories.id()) && log.contains("1_5"), "{log}");
        site.process.take().unwrap().kill_9();
    }
    let client = site.start();
    // What is removed goes with its directory; what is left stays as it was.
    let of = |id: u32| taken.iter().find(|info| info.id.0 == id).unwrap().name.clone();
    for key in ["default/9/local-0".to_owned(), "default/9/local-1".to_owned(), of(6), of(5), of(3), of(2), of(1)] {
        assert!(site.layout().snapshot(SnapshotId(5)).exists() || key != of(5));
        snapshots::remove(&client, &key).unwrap();
    }
    let _: Empty = client
        .call(
            "/containerd.services.snapshots.v1.Snapshots/Cleanup",
            snapshots::Key { snapshotter: "soci".into(), key: String::new() },
        )
        .unwrap();
    let left: Vec<String> = std::fs::read_dir(site.layout().snapshots())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(left, ["1_5"], "what cannot be taken over is left alone");
    let next = snapshots::prepare(&client, "default/9/next", "", HashMap::new()).unwrap();
    assert!(next[0].source.ends_with("/fs"), "{next:?}");
    let number: u32 =
        Path::new(&next[0].source).parent().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
    assert!(number > 6, "{number} was somebody's");
    assert_eq!(std::fs::read(site.layout().go_snapshot_db()).unwrap(), database, "kept for the way back");
}

#[test]
fn privileged_a_go_snapshotter_that_still_runs_and_a_database_that_cannot_be_read_are_reasons_to_refuse() {
    let slot = Slot::take();
    let mut site = Site::new(&slot);
    let path = site.layout().go_snapshot_db();
    let good = std::fs::read(&path).unwrap();
    {
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let _held = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
        let log = site.refused();
        assert!(log.contains("Go snapshotter that was here before is still running"), "{log}");
    }
    for (what, bytes) in [
        ("not a bbolt database", vec![b'x'; 4096]),
        ("meta pages", {
            let mut torn = good.clone();
            torn[40] ^= 1;
            torn[4096 + 40] ^= 1;
            torn
        }),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let log = site.refused();
        assert!(log.contains("metadata.db") && log.contains(what) && log.contains("pull them again"), "{log}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert!(!site.layout().snapshot_db().exists(), "no empty database in its place");
    }
    std::fs::write(&path, &good).unwrap();
    site.start();
    assert!(site.log().contains(Message::TakenOver.id()));
}

#[test]
fn privileged_what_the_go_snapshotter_did_after_it_was_taken_over_is_said() {
    let slot = Slot::take();
    let mut site = Site::new(&slot);
    site.start();
    site.process.take().unwrap().kill_9();
    let path = site.layout().go_snapshot_db();
    let mut bytes = std::fs::read(&path).unwrap();
    // One more transaction that changes nothing: the older meta page becomes the newer one.
    let database = soci::bolt::read(&bytes).unwrap();
    let commit = database.commit(&database.root);
    for (page, data) in commit.pages.iter().chain([&commit.meta]) {
        let at = usize::try_from(database.offset(*page)).unwrap();
        bytes.resize(bytes.len().max(at + data.len()), 0);
        bytes[at..at + data.len()].copy_from_slice(data);
    }
    std::fs::write(&path, bytes).unwrap();
    assert!(!site.log().contains(Message::PredecessorChanged.id()));
    site.start();
    assert!(site.log().contains(Message::PredecessorChanged.id()), "{}", site.log());
}

/// The manual's commands for going back, but for those that need systemd.
fn way_back() -> Vec<&'static str> {
    let manual = include_str!("../../packaging/man/soci-snapshotter-grpc.8");
    let section = manual.split(".Sh GOING BACK").nth(1).unwrap().split(".Sh EXIT").next().unwrap();
    section.lines().filter(|line| line.starts_with("find ") || line.starts_with("mv ")).collect()
}

#[test]
fn privileged_the_way_back_in_the_manual_leaves_what_the_go_snapshotter_needs() {
    let slot = Slot::take();
    let mut site = Site::new(&slot);
    let before = std::fs::read(site.layout().go_snapshot_db()).unwrap();
    site.start();
    site.process.take().unwrap().kill_9();
    let soci_mount = Path::new(env!("CARGO_BIN_EXE_soci-mount"));
    run(Command::new(soci_mount).arg("--root").arg(site.state()).arg("--unmount"));
    let commands = way_back();
    assert_eq!(commands.len(), 2);
    for command in commands {
        run(Command::new("sh").args(["-ec", command]).current_dir(site.layout().snapshotter()));
    }
    assert_eq!(std::fs::read(site.layout().go_snapshot_db()).unwrap(), before);
    for id in [1, 2, 3, 5, 6].map(SnapshotId) {
        // It makes `fs` of what it loads lazily again where that is missing, and mounts on it.
        let fs = std::fs::symlink_metadata(site.layout().snapshot_fs(id));
        assert!(site.layout().snapshot(id).is_dir() && fs.is_err() == (id.0 == 1), "{id}");
    }
    assert_eq!(std::fs::read(site.layout().snapshot_fs(SnapshotId(5)).join("written")).unwrap(), b"by the container");
    // And here again.
    site.start();
    assert_eq!(site.log().matches(Message::TakenOver.id()).count(), 2);
}
