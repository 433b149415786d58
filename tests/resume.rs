//! What the death of each process, and of each of its parts, means for readers: a wait, and then the right bytes; or, for those that are killed
//! meanwhile, an end. And what an older build does with what a newer one has written: nothing.

use crate::support::command::{attempt, text};
use crate::support::containerd::{Version, container_name};
use crate::support::daemon::{Settings, built};
use crate::support::image::{Image, Layer, busybox, noise};
use crate::support::node::Node;
use crate::support::process::{kill_all, pids_rooted_in};
use crate::support::proxy::{Fault, Rule};
use crate::support::registry::image_manifest;
use crate::support::slot::Slot;
use crate::support::workload::until_ready;
use nix::libc;
use nix::sys::signal::Signal;
use redb::{ReadableDatabase, TableDefinition};
use soci::layout::{Layout, SnapshotId};
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const CONTENT: usize = 4 << 20;
/// What happens at once may take this long on a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A node with one image, whose data does not arrive.
struct Stalled {
    node: Node,
    reference: String,
    layout: PathBuf,
}

fn stalled(slot: &Slot, env: &[(&str, &str)]) -> Stalled {
    let env = env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let node = Node::with_settings(slot, Version::V22, Settings { env, ..Settings::default() });
    let mut data = Layer::new();
    data.file("data", noise(42, CONTENT));
    let (layout, _, reference) = node.publish("app", &Image::new(vec![busybox(), data]));
    let blob = image_manifest(&layout).1.layers[1].digest.to_string();
    node.proxy.rule(Rule::blobs(Fault::Hang).containing(&blob));
    node.containerd.pull("soci", &reference).unwrap();
    Stalled { node, reference, layout }
}

/// Another process that reads a file.
fn reader(path: &Path) -> Child {
    let mut child = Command::new("cat").arg(path).stdout(Stdio::piped()).spawn().unwrap();
    sleep(Duration::from_millis(500)); // it blocks now
    assert!(child.try_wait().unwrap().is_none(), "it does not wait");
    child
}

fn reads_the_right_bytes(mut reader: Child) {
    let mut got = Vec::new();
    reader.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    assert!(reader.wait().unwrap().success() && got == noise(42, CONTENT));
}

fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}: not within 30 s");
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn privileged_a_read_survives_the_death_of_the_holder_and_then_of_the_daemon() {
    let slot = Slot::take();
    for kernel in [&[][..], &[("SOCI_MOUNT_NO_RESEND", "1")]] {
        let mut stalled = stalled(&slot, kernel);
        let mounted =
            stalled.node.containerd.mount("soci", "default", &stalled.reference, &stalled.node.root.join("view"));
        let reader = reader(&mounted.path.join("data"));
        for _ in 0..2 {
            let daemon = &mut stalled.node.daemon;
            let holder = daemon.pids().into_iter().find(|(name, _)| name == "soci-mount").expect("a holder").1;
            let handed = daemon.log().matches("gave the FUSE descriptor to a new soci-mount").count();
            kill_all(&[holder]);
            eventually("a new holder has the descriptor", || {
                daemon.log().matches("gave the FUSE descriptor to a new soci-mount").count() > handed
            });
            daemon.crash_and_restart();
        }
        stalled.node.proxy.heal();
        reads_the_right_bytes(reader);
    }
}

#[test]
fn privileged_a_container_that_is_killed_while_the_daemon_is_dead_is_gone_before_the_next_one() {
    let slot = Slot::take();
    let mut stalled = stalled(&slot, &[]);
    let node = &mut stalled.node;
    let name = container_name();
    let arguments = ["sh", "-c", "echo READY; exec cat /data"].map(String::from);
    let mut run = node.containerd.run_command("soci", &stalled.reference, &name, &arguments);
    let mut ready = until_ready(&mut run, &["READY"], Duration::from_secs(60)).unwrap();
    sleep(Duration::from_millis(500)); // it blocks now
    let of_container = node.root.path().display().to_string();
    assert_eq!(pids_rooted_in(&of_container).len(), 1);
    node.daemon.kill();
    let start = Instant::now();
    node.containerd.kill(&name);
    eventually("its process is gone", || pids_rooted_in(&of_container).is_empty());
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    node.daemon.restart();
    ready.child.wait().unwrap();
}

#[test]
fn privileged_unmounting_waits_for_nobody_and_ends_the_wait_of_readers() {
    let slot = Slot::take();
    let mut stalled = stalled(&slot, &[]);
    let node = &mut stalled.node;
    let mounted = node.containerd.mount("soci", "default", &stalled.reference, &node.root.join("view"));
    let mut reader = reader(&mounted.path.join("data"));
    let other = node.containerd.mount("soci", "default", &stalled.reference, &node.root.join("other"));
    node.daemon.kill();
    let start = Instant::now();
    // The call that containerd makes. (umount(8) first asks for statistics of the filesystem, and so waits for a daemon.)
    nix::mount::umount2(&other.path, nix::mount::MntFlags::empty()).unwrap();
    let done = attempt(Command::new(built().join("soci-mount")).arg("--root").arg(&node.daemon.root).arg("--unmount"));
    assert!(done.status.success(), "{}", text(&done.stderr));
    // Nobody will ever answer it: that is what was asked for.
    eventually("the reader gets an error", || reader.try_wait().unwrap().is_some());
    assert!(!reader.wait().unwrap().success());
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    node.daemon.restart();
}

/// A thread of another process, standing still until the process ends.
struct Frozen(i32);

impl Frozen {
    fn new(thread: i32) -> Frozen {
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: neither request reads or writes memory of ours.
        let done = unsafe {
            [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT].map(|request| libc::ptrace(request, thread, nothing, nothing))
        };
        assert_eq!(done, [0, 0], "{}", std::io::Error::last_os_error());
        Frozen(thread)
    }

    /// A dead process is not gone before who watches it has looked.
    fn bury(self) {
        let mut status = 0;
        // SAFETY: the status is ours to write to.
        while unsafe { libc::waitpid(self.0, &mut status, libc::__WALL) } == self.0 && !libc::WIFSIGNALED(status) {}
    }
}

fn threads(pid: u32, name: &str) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap());
    tasks
        .filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name))
        .map(|task| task.file_name().to_str().unwrap().parse().unwrap())
        .collect()
}

#[test]
fn privileged_a_part_that_stands_still_stops_the_watchdog_and_the_next_daemon_goes_on() {
    let slot = Slot::take();
    let notify = slot.dir().join("notify");
    let systemd = UnixDatagram::bind(&notify).unwrap();
    systemd.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    // Read all the time, as systemd does: its queue is short.
    let (fed, feedings) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        loop {
            let is_watchdog = systemd.recv(&mut buffer).is_ok_and(|length| buffer[..length].starts_with(b"WATCHDOG=1"));
            if fed.send(is_watchdog).is_err() {
                return; // the test has ended
            }
        }
    });
    let notify = notify.display().to_string();
    let wedge = slot.dir().join("wedge");
    let named = wedge.display().to_string();
    let env = [("NOTIFY_SOCKET", &*notify), ("WATCHDOG_USEC", "500000"), ("SOCI_WEDGE_WORKER", &named)];
    let mut stalled = stalled(&slot, &env);
    let fed_within = |patience: Duration| {
        let start = Instant::now();
        while start.elapsed() < patience {
            if feedings.recv_timeout(Duration::from_millis(200)) == Ok(true) {
                return true;
            }
        }
        false
    };
    let mounted = stalled.node.containerd.mount("soci", "default", &stalled.reference, &stalled.node.root.join("view"));
    let reader = reader(&mounted.path.join("data"));
    // One of the threads that take requests; all that run tasks; and one of those, in the middle of a task: "worker 1 of the runtime", or the
    // runtime, when that one was about to wait for the timers and sockets of all.
    let parts: [(&str, usize, &str); 3] = [
        ("fuse-0", 1, "thread fuse-0 has stood still for"),
        ("soci", 64, "the runtime has stood still for"),
        ("", 0, "the runtime has stood still for"),
    ];
    for (name, freeze, said) in parts {
        let daemon = &mut stalled.node.daemon;
        assert!(fed_within(Duration::from_secs(20)), "it lives");
        let seen = daemon.log().matches(said).count();
        let frozen: Vec<Frozen> = threads(daemon.pid(), name).into_iter().take(freeze).map(Frozen::new).collect();
        match freeze {
            0 => fs::write(&wedge, "").unwrap(),
            _ => assert!(!frozen.is_empty(), "no thread is called {name}"),
        }
        let start = Instant::now();
        while fed_within(Duration::from_secs(3)) {
            assert!(start.elapsed() < Duration::from_secs(90), "{said}: nobody notices");
        }
        assert!(daemon.log().matches(said).count() > seen, "{said}");
        // What systemd does now.
        daemon.signal(Signal::SIGKILL);
        frozen.into_iter().for_each(Frozen::bury);
        daemon.crash_and_restart();
    }
    stalled.node.proxy.heal();
    reads_the_right_bytes(reader);
}

const FACTS: TableDefinition<&str, u64> = TableDefinition::new("facts");

fn database_schema(path: &Path, new: Option<u64>) -> u64 {
    let db = redb::Database::open(path).unwrap();
    if let Some(new) = new {
        let change = db.begin_write().unwrap();
        change.open_table(FACTS).unwrap().insert("schema", new).unwrap();
        change.commit().unwrap();
    }
    let read = db.begin_read().unwrap();
    let facts = read.open_table(FACTS).unwrap();
    facts.get("schema").unwrap().expect("it has a schema").value()
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Reads the data in a container. After each restart containerd waits a little before it connects again, and until then says so.
fn run_connected(node: &Node, reference: &str) -> Result<String, String> {
    let start = Instant::now();
    loop {
        match node.containerd.run("soci", reference, &["md5sum", "/data"]) {
            Err(error) if error.contains("connection error") && start.elapsed() < Duration::from_secs(60) => {
                sleep(Duration::from_millis(200));
            }
            ended => return ended,
        }
    }
}

#[test]
fn privileged_what_a_newer_version_has_written_is_refused_with_a_reason_and_left_as_it_is() {
    let slot = Slot::take();
    let Stalled { mut node, reference, layout } = stalled(&slot, &[]);
    node.proxy.heal();
    let digest = image_manifest(&layout).1.layers[1].digest;
    let state = Layout::new(&node.daemon.root);
    let layer = state.layer(&digest);
    let record = (1..100)
        .map(|id| state.snapshot_lazy_record(SnapshotId(id)))
        .find(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(&digest.to_string())))
        .expect("a record of the layer");
    type Change = fn(&Path);
    let rows: [(&str, PathBuf, Change); 4] = [
        ("snapshot database", state.snapshot_db(), |path| assert_eq!(database_schema(path, Some(99)), 99)),
        ("lazy.json", record, |path| {
            let text = fs::read_to_string(path).unwrap();
            assert!(text.contains("\"version\":1"));
            fs::write(path, text.replace("\"version\":1", "\"version\":99")).unwrap();
        }),
        // Magic, then the version.
        ("toc", layer.join("toc"), |path| edit(path, |bytes| bytes[8] = 99)),
        ("spans", layer.join("spans"), |path| edit(path, |bytes| bytes[7] = b'9')),
    ];
    for (name, path, change) in rows {
        node.daemon.stop();
        let good = fs::read(&path).unwrap();
        change(&path);
        let newer = fs::read(&path).unwrap();
        assert_ne!(good, newer, "{name}");
        let before = node.daemon.log().len();
        node.daemon.restart();
        let log = node.daemon.log()[before..].to_owned();
        assert!(log.contains("newer version"), "{name}:\n{log}");
        let ran = run_connected(&node, &reference);
        assert!(ran.is_err(), "{name}: nothing is started from what is not understood");
        node.daemon.stop();
        match name {
            // Opening it may write to it; what counts is what it says.
            "snapshot database" => assert_eq!(database_schema(&path, None), 99),
            _ => assert!(fs::read(&path).unwrap() == newer, "{name} was changed"),
        }
        // The newer version is installed again.
        fs::write(&path, good).unwrap();
        node.daemon.restart();
        run_connected(&node, &reference).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}
