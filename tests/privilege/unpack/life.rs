//! Who dies when, what the others say, and that nothing is left.

use super::{
    super::{
        Killed, eventually,
        lab::{Lab, block_on, kill, processes},
        status_row,
    },
    PLENTY, unpack,
};
use crate::formats::tar_writer::{Dialect, Member, TarWriter};
use crate::support::needs_root;
use soci::{
    custodian::{Client, Place, UnpackError},
    layout::SnapshotId,
};
use std::{fs, io::Write, path::Path, thread};

const ID: SnapshotId = SnapshotId(1);

/// A layer half unpacked: the worker waits for the rest. What becomes of it, and the pipe that it waits for.
struct Halfway {
    outcome: thread::JoinHandle<Result<soci::custodian::Budget, UnpackError>>,
    pipe: fs::File,
    worker: u32,
}

impl Halfway {
    fn reach(lab: &Lab, client: &Client) -> Halfway {
        lab.fs(ID.0);
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
        let asked = client.clone();
        let outcome = thread::spawn(move || block_on(asked.unpack(ID, read, Place::Above, PLENTY)));
        let mut tar = TarWriter::new(Dialect::Pax);
        tar.add(&Member::file("d/one", "1"));
        tar.add(&Member { size: Some(1_000_000), ..Member::file("d/two", "2") });
        let mut pipe = fs::File::from(write);
        pipe.write_all(&tar.bytes).expect("write");
        let begun = lab.layout.snapshot_unpack(ID).join("tree/d/two");
        eventually("the second file is begun", || begun.exists().then_some(()));
        Halfway { outcome, pipe, worker: lab.workers()[0] }
    }

    fn result(self) -> UnpackError {
        self.outcome.join().expect("join").expect_err("it was ended")
    }
}

fn whole_layer() -> Vec<u8> {
    TarWriter::of(Dialect::Pax, &[Member::file("d/one", "1")])
}

fn nothing_is_left(lab: &Lab) {
    eventually("what was unpacked is gone", || (!lab.layout.snapshot_unpack(ID).exists()).then_some(()));
    eventually("the worker is gone", || lab.workers().is_empty().then_some(()));
}

fn it_works_again(client: &Client) {
    unpack(client, ID.0, whole_layer(), Place::Above, PLENTY).expect("unpacked");
    block_on(client.publish(ID, &[])).expect("published");
}

#[test]
fn privileged_a_worker_that_is_killed_is_reported_and_the_layer_can_be_unpacked_again() {
    let lab = Lab::new();
    let client = lab.client();
    let halfway = Halfway::reach(&lab, &client);
    kill(halfway.worker);
    let error = halfway.result();
    assert!(matches!(error, UnpackError::WorkerDied), "{error}");
    // Not only later: before anybody hears of it.
    assert!(!lab.layout.snapshot_unpack(ID).exists());
    nothing_is_left(&lab);
    it_works_again(&client);
}

#[test]
fn privileged_whoever_stops_waiting_ends_the_worker() {
    let lab = Lab::new();
    lab.fs(ID.0);
    let client = lab.client();
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    block_on(async {
        let unpacking = client.unpack(ID, read, Place::Above, PLENTY);
        let given_up = tokio::time::timeout(std::time::Duration::from_millis(300), unpacking).await;
        assert!(given_up.is_err(), "nobody writes, so it cannot end");
    });
    // Even while its pipe stays open.
    nothing_is_left(&lab);
    drop(write);
    it_works_again(&client);
}

#[test]
fn privileged_removing_or_discarding_a_snapshot_ends_its_worker() {
    let lab = Lab::new();
    let client = lab.client();
    let halfway = Halfway::reach(&lab, &client);
    block_on(client.discard(ID)).expect("discarded");
    assert!(matches!(halfway.result(), UnpackError::WorkerDied));
    nothing_is_left(&lab);
    let halfway = Halfway::reach(&lab, &client);
    block_on(client.remove_tree(ID)).expect("removed");
    assert!(lab.gone(ID.0));
    assert!(matches!(halfway.result(), UnpackError::WorkerDied));
    nothing_is_left(&lab);
}

#[test]
fn privileged_a_custodian_that_is_killed_takes_its_workers_along_and_the_next_one_cleans_up() {
    let lab = Lab::new();
    let (mut unit, path) = lab.as_a_unit(&[]);
    let client = lab.client();
    let halfway = Halfway::reach(&lab, &client);
    unit.kill();
    let error = halfway.result();
    assert!(error.to_string().contains("cannot unpack"), "{error}");
    eventually("spawner and worker are gone", || processes(&lab.layout).is_empty().then_some(()));
    assert!(lab.layout.snapshot_unpack(ID).exists(), "this is what the next one finds");
    fs::remove_file(path).expect("remove");
    let _unit = lab.as_a_unit(&[]);
    it_works_again(&client);
    nothing_is_left(&lab);
}

#[test]
fn privileged_what_an_earlier_custodian_left_is_removed_at_the_next_start() {
    let lab = Lab::new();
    for id in [3, 4] {
        fs::write(lab.fs(id).join("published"), "keep").expect("write");
        fs::create_dir_all(lab.layout.snapshot_unpack(SnapshotId(id)).join("tree/half")).expect("mkdir");
    }
    let _client = lab.client();
    for id in [3, 4] {
        assert!(!lab.layout.snapshot_unpack(SnapshotId(id)).exists());
        assert!(lab.layout.snapshot_fs(SnapshotId(id)).join("published").exists());
    }
}

fn end_spawner(lab: &Lab) {
    kill(eventually("it runs", || lab.spawner()));
    eventually("it is gone", || lab.spawner().is_none().then_some(()));
}

#[test]
fn privileged_without_its_spawner_a_unit_ends_to_be_started_again_and_a_child_serves_the_rest() {
    let lab = Lab::new();
    lab.fs(ID.0);
    let client = lab.client();
    end_spawner(&lab);
    let error = unpack(&client, ID.0, whole_layer(), Place::Above, PLENTY).expect_err("nobody forks");
    assert!(matches!(error, UnpackError::Custodian { .. }), "{error}");
    assert!(!lab.layout.snapshot_unpack(ID).exists());
    block_on(client.usage(ID)).expect("the rest is served");
    drop(client);

    let lab = Lab::new();
    lab.fs(ID.0);
    let (mut unit, _): (Killed, _) = lab.as_a_unit(&[]);
    let client = lab.client();
    end_spawner(&lab);
    unpack(&client, ID.0, whole_layer(), Place::Above, PLENTY).expect_err("nobody forks");
    assert!(!unit.ended().success(), "systemd starts it again");
}

#[test]
fn privileged_a_worker_can_reach_its_directory_and_nothing_else() {
    for arguments in super::KERNELS {
        let lab = Lab::new();
        let _unit = lab.as_a_unit(arguments);
        let client = lab.client();
        let halfway = Halfway::reach(&lab, &client);
        let pid = halfway.worker;
        // CHOWN (0), DAC_OVERRIDE (1), FOWNER (3), FSETID (4), SYS_ADMIN (21), MKNOD (27), SETFCAP (31).
        let capabilities = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 21 | 1 << 27 | 1u64 << 31;
        for (row, expected) in [("CapEff", capabilities), ("CapPrm", capabilities), ("CapInh", 0), ("CapAmb", 0)] {
            assert_eq!(u64::from_str_radix(&status_row(pid, row), 16), Ok(expected), "{row}");
        }
        assert_eq!(status_row(pid, "NoNewPrivs"), "1");
        assert_eq!(status_row(pid, "Seccomp"), "2");
        // More filters than the spawner's.
        assert_eq!(status_row(pid, "Seccomp_filters"), "2");
        let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).expect("link");
        assert_eq!(link("root"), lab.layout.snapshot_unpack(ID), "its root directory is the only one it has");
        assert_ne!(link("ns/net"), fs::read_link("/proc/self/ns/net").expect("link"));
        let beneath = |path: &Path| path.starts_with(lab.layout.snapshot_unpack(ID));
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("fd").flatten() {
            let number: u32 = entry.file_name().to_str().expect("a number").parse().expect("a number");
            let target = fs::read_link(entry.path()).expect("link");
            let text = target.to_string_lossy().into_owned();
            let anonymous = text.starts_with("pipe:") || text.starts_with("socket:");
            assert!(number <= 2 || anonymous || beneath(&target), "descriptor {number} is {text}");
        }
        drop(halfway.pipe);
        let error = halfway.outcome.join().expect("join").expect_err("cut short");
        assert!(error.to_string().contains("ends in the middle"), "{error}");
        nothing_is_left(&lab);
    }
}

#[test]
fn privileged_a_worker_that_was_taken_over_cannot_open_a_device_or_anything_else_that_exists() {
    needs_root();
    let output = super::super::run(std::process::Command::new(std::env::current_exe().expect("own path")).args([
        "--exact",
        "privilege::unpack::life::helper_a_confined_worker",
        "--ignored",
        "--nocapture",
    ]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("CONFINED"), "{text}");
}

#[test]
#[ignore = "run by the test above"]
fn helper_a_confined_worker() {
    use rustix::{
        fs::{CWD, FileType, Mode, OFlags, ResolveFlags, makedev, mknodat, openat, openat2},
        io::Errno,
    };
    use soci::sys::{process::SingleThread, seccomp};
    let dir = tempfile::tempdir().expect("temp");
    // SAFETY: the other thread of this process only waits for this one, so it holds no lock that the child could need.
    match unsafe { nix::unistd::fork() }.expect("fork") {
        nix::unistd::ForkResult::Parent { child } => {
            let ended = nix::sys::wait::waitpid(child, None).expect("wait");
            assert_eq!(ended, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
        nix::unistd::ForkResult::Child => {
            let attempt = || {
                let alone = SingleThread::prove().expect("alone");
                seccomp::confine(seccomp::Role::Worker, &alone).expect("confined");
                let node = dir.path().join("node");
                // /dev/zero, which would open for anybody.
                mknodat(CWD, &node, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(1, 5)).expect("made");
                let none = Mode::empty();
                for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR | OFlags::CREATE, OFlags::PATH, OFlags::EXCL]
                {
                    assert_eq!(openat(CWD, &node, flags, none).expect_err("refused"), Errno::PERM, "{flags:?}");
                }
                let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                assert_eq!(openat(CWD, &node, new, none).expect_err("it exists"), Errno::EXIST);
                assert_eq!(openat(CWD, &node, OFlags::DIRECTORY, none).expect_err("a node"), Errno::NOTDIR);
                let plain = openat2(CWD, &node, OFlags::WRONLY, none, ResolveFlags::empty());
                assert_eq!(plain.expect_err("refused"), Errno::PERM);
                openat(CWD, dir.path().join("file"), new, Mode::RUSR).expect("new files are what it makes");
                let socket =
                    rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None);
                assert_eq!(socket.expect_err("refused"), Errno::PERM);
                eprintln!("CONFINED");
            };
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt));
            soci::sys::process::exit_now(i32::from(ended.is_err()))
        }
    }
}
