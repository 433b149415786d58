//! The storm: containers work on a lazily loaded image while the daemon is killed, restarted and replaced by another build, again and again. Every
//! byte they read is compared with what containerd unpacks from the same image.
//!
//! Half of the kills on the way this kernel has requests repeated, half on the way of kernels before 6.9. `SOCI_STORM_KILLS` asks for more of them.

use crate::support::command::{attempt, text};
use crate::support::containerd::{Containerd, Options, Version, container_name};
use crate::support::daemon::{Daemon, Settings, built, convert};
use crate::support::image::{Form, Image, Layer, busybox, noise, python};
use crate::support::node::Node;
use crate::support::registry::{Kind, Registry};
use crate::support::slot::Slot;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use soci::oci::Digest;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

/// What `RestartSec=` is in the unit.
const RESTART: Duration = Duration::from_millis(100);
/// Of each of two storms; 200 together.
const KILLS: usize = 100;
/// No read may stall longer than a restart takes, which is a fraction of a second. Debug builds on a machine that is busy with other tests are slow;
/// what was seen is in the result line.
const STALL: f64 = 20.0;
/// Files of a megabyte below /data, and the length of the blocks whose digests are in /data/sums (as in storm.py).
const FILES: u64 = 12;
const BLOCK: usize = 65_536;
const MODES: [&str; 5] = ["hash", "import", "build", "random", "random"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Resend,
    Journal,
}

#[test]
fn privileged_two_hundred_kills_and_not_one_wrong_byte_where_the_kernel_repeats_requests() {
    storm(Way::Resend);
}

#[test]
fn privileged_two_hundred_kills_and_not_one_wrong_byte_where_requests_are_written_down() {
    storm(Way::Journal);
}

fn image() -> Image {
    let mut script = Layer::new();
    script.file("usr/bin/storm", include_bytes!("storm/storm.py")).mode(0o755);
    let mut data = Layer::new();
    data.dir("data");
    let mut sums = String::new();
    for file in 0..FILES {
        let content = noise(file + 77, 1 << 20);
        for (index, block) in content.chunks(BLOCK).enumerate() {
            let digest = Digest::of(block);
            sums += &format!("/data/{file} {} {}\n", index * BLOCK, digest.hex());
        }
        data.file(format!("data/{file}"), content);
    }
    data.file("data/sums", sums);
    // Many small spans: as many chances to be in the middle of one.
    let members = Form::GzipMembers(128 << 10);
    Image::new(vec![busybox(), python().form(members), data.form(members), script])
}

/// What each mode says of an image that containerd has unpacked.
fn oracle(slot: &Slot, layout: &Path) -> BTreeMap<&'static str, String> {
    let root = slot.root();
    let registry = Registry::start(Kind::Docker28, &root);
    registry.push(layout, "oracle", "v1");
    let reference = registry.reference("oracle", "v1");
    let containerd = Containerd::start(&root, Version::V22, &Options::default());
    containerd.pull("overlayfs", &reference).unwrap();
    let said = |mode| {
        let out = containerd.run("overlayfs", &reference, &["/usr/bin/storm", mode, "1"]).unwrap();
        (mode, out.lines().nth(1).unwrap().to_owned())
    };
    MODES.into_iter().map(said).collect()
}

/// The same programs as another build: what they call their version is something else.
fn another_build(dir: &Path) -> PathBuf {
    let version = env!("CARGO_PKG_VERSION");
    let other = version.replacen("0.", "9.", 1);
    fs::create_dir_all(dir).unwrap();
    for name in ["soci-snapshotter-grpc", "soci-mount", "soci-custodian"] {
        let mut program = fs::read(built().join(name)).unwrap();
        let places: Vec<usize> = memchr(&program, version.as_bytes());
        for at in places {
            program[at..at + other.len()].copy_from_slice(other.as_bytes());
        }
        let path = dir.join(name);
        fs::write(&path, program).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let said = attempt(Command::new(dir.join("soci-snapshotter-grpc")).arg("--version"));
    assert!(text(&said.stdout).contains(&other), "{}", text(&said.stdout));
    dir.into()
}

fn memchr(bytes: &[u8], wanted: &[u8]) -> Vec<usize> {
    (0..bytes.len().saturating_sub(wanted.len())).filter(|at| bytes[*at..].starts_with(wanted)).collect()
}

/// Starts the daemon again when it has ended, as systemd does.
struct Supervisor {
    pid: Arc<AtomicUsize>,
    program: Arc<Mutex<PathBuf>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    fn start(command: impl Fn(&Path) -> Command + Send + 'static, log: &Path, program: PathBuf) -> Supervisor {
        let (pid, stop, program) =
            (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default(), Arc::new(Mutex::new(program)));
        let sink = File::options().append(true).open(log).unwrap();
        let thread = std::thread::spawn({
            let (pid, stop, program) = (pid.clone(), stop.clone(), program.clone());
            move || {
                while !stop.load(Ordering::SeqCst) {
                    let mut command = command(&program.lock().unwrap().clone());
                    command.stdin(Stdio::null()).stdout(sink.try_clone().unwrap()).stderr(sink.try_clone().unwrap());
                    let mut child: Child = command.spawn().unwrap();
                    pid.store(child.id() as usize, Ordering::SeqCst);
                    child.wait().unwrap();
                    pid.store(0, Ordering::SeqCst);
                    sleep(RESTART);
                }
            }
        });
        Supervisor { pid, program, stop, thread: Some(thread) }
    }

    fn signal(&self, signal: Signal) {
        loop {
            match self.pid.load(Ordering::SeqCst) {
                0 => sleep(Duration::from_millis(1)),
                pid => {
                    let _ = kill(Pid::from_raw(pid as i32), signal);
                    return;
                }
            }
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            self.signal(Signal::SIGTERM);
            let _ = thread.join();
        }
    }
}

/// What the killer does, from a seed that is in the result line.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[derive(Default)]
struct Counts {
    crashes: usize,
    restarts: usize,
    upgrades: usize,
}

fn storm(way: Way) {
    let slot = Slot::take();
    let kills = std::env::var("SOCI_STORM_KILLS").map_or(KILLS, |kills| kills.parse::<usize>().unwrap().div_ceil(2));
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let layouts = slot.root();
    let (plain, indexed) = (layouts.join("plain"), layouts.join("indexed"));
    image().write(&plain);
    convert(&plain, &indexed, &["--min-layer-size", "0", "--span-size", "262144"]);
    let expected = oracle(&slot, &plain);

    let env = match way {
        Way::Resend => vec![],
        Way::Journal => vec![("SOCI_MOUNT_NO_RESEND".to_owned(), "1".to_owned())],
    };
    let mut node = Node::with_settings(&slot, Version::V22, Settings { env, ..Settings::default() });
    let versions = [built(), another_build(&node.root.join("v9"))];
    node.registry.push(&indexed, "storm", "v1");
    let reference = node.proxy.reference("storm", "v1");
    node.proxy.shape(2_000_000, Duration::from_millis(2));
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.daemon.layers().lazy, 4);

    let mut workers: Vec<Worker> =
        MODES.iter().enumerate().map(|(n, mode)| Worker::start(&node, &reference, mode, n)).collect();
    let started = Instant::now();
    node.daemon.kill();
    let counts = {
        let daemon = &node.daemon;
        let supervisor = Supervisor::start(daemon.starter(), daemon.log_path(), versions[0].clone());
        let counts = strike(daemon, &supervisor, kills, &versions, seed);
        *supervisor.program.lock().unwrap() = built();
        counts
    };
    node.daemon.restart();
    let lasted = started.elapsed();
    let (mut reads, mut rounds, mut worst, mut p99, mut waited) = (0, 0, 0f64, 0f64, 0f64);
    for worker in &mut workers {
        let (lines, done) = worker.finish(&node);
        for line in lines {
            assert_eq!(&line, &expected[worker.mode], "{}, seed {seed}", worker.mode);
        }
        reads += done["reads"].as_u64().unwrap();
        rounds += done["rounds"].as_u64().unwrap();
        let most = |so_far: f64, what: &str| so_far.max(done[what].as_f64().unwrap());
        (worst, p99, waited) = (most(worst, "worst"), most(p99, "p99"), most(waited, "waited"));
    }
    let log = node.daemon.log();
    let numbers = |words: &str, field: &str| -> Vec<u64> {
        let lines = log.lines().filter(|line| line.contains(words));
        let number = |line| serde_json::from_str::<Value>(line).unwrap()[field].as_str().unwrap().parse().unwrap();
        lines.map(number).collect()
    };
    let resumed: u64 = numbers("took over the requests", "requests").iter().sum();
    let mut starts = numbers("reads are answered", "milliseconds");
    starts.sort();
    let Counts { crashes, restarts, upgrades } = counts;
    let how = if way == Way::Resend { "repeated by the kernel" } else { "written down by us" };
    // Past the test harness, which keeps what it captures to itself.
    let _ = writeln!(
        std::io::stderr(),
        "storm, requests {how}: {kills} kills in {:.0} s ({crashes} SIGKILL, {restarts} restarts, {upgrades} upgrades), {rounds} rounds, {reads} reads, \
         0 errors, worst stall {worst:.2} s, p99 {:.1} ms, {resumed} reads resumed; a start answered after {} ms (median), {} ms (worst); the machine \
         kept programs waiting for up to {waited:.2} s (seed {seed})",
        lasted.as_secs_f64(),
        p99 * 1000.0,
        starts[starts.len() / 2],
        starts[starts.len() - 1]
    );
    assert!(worst < STALL, "a read stalled for {worst} s, seed {seed}");
    assert!(resumed > 0 && rounds > MODES.len() as u64, "nothing was in the way of the kills");
    let images = node.containerd.ctr().args(["images", "ls", "-q"]).output().unwrap();
    text(&images.stdout).lines().for_each(|image| node.containerd.remove_image(image));
    node.nothing_is_left();
}

/// Kills the daemon, again and again.
fn strike(daemon: &Daemon, supervisor: &Supervisor, kills: usize, versions: &[PathBuf], seed: u64) -> Counts {
    let (mut chance, mut counts) = (Chance(seed), Counts::default());
    let mut version = 0;
    for _ in 0..kills {
        let starts = daemon.starts();
        // Most of the time it gets as far as serving; sometimes it is killed on the way there.
        let patience = if chance.below(8) == 0 { chance.below(150) } else { 10_000 };
        let begun = Instant::now();
        while daemon.starts() == starts && begun.elapsed() < Duration::from_millis(patience) {
            sleep(Duration::from_millis(5));
        }
        sleep(Duration::from_millis(chance.below(300)));
        match chance.below(20) {
            0 => {
                counts.restarts += 1;
                supervisor.signal(Signal::SIGTERM);
            }
            1 => {
                counts.upgrades += 1;
                version = 1 - version;
                *supervisor.program.lock().unwrap() = versions[version].clone();
                supervisor.signal(Signal::SIGTERM);
            }
            _ => {
                counts.crashes += 1;
                supervisor.signal(Signal::SIGKILL);
            }
        }
        if chance.below(10) == 0 {
            // Names and attributes, too, are to be asked for again. Never waited for: it may have to wait for the daemon.
            std::thread::spawn(|| fs::write("/proc/sys/vm/drop_caches", "2"));
        }
    }
    counts
}

/// A container that reads until it is told to end.
struct Worker {
    mode: &'static str,
    name: String,
    child: Child,
    out: PathBuf,
}

impl Worker {
    fn start(node: &Node, reference: &str, mode: &'static str, number: usize) -> Worker {
        let name = container_name();
        let arguments = ["/usr/bin/storm", mode, "0"].map(String::from);
        let mut command = node.containerd.run_command("soci", reference, &name, &arguments);
        let out = node.root.join(&format!("worker-{number}"));
        let sink = File::create(&out).unwrap();
        let child = command.stdin(Stdio::null()).stdout(sink.try_clone().unwrap()).stderr(sink).spawn().unwrap();
        let worker = Worker { mode, name, child, out };
        let begun = Instant::now();
        while !worker.said().contains("READY") {
            assert!(begun.elapsed() < Duration::from_secs(60), "{mode}: {}", worker.said());
            sleep(Duration::from_millis(10));
        }
        worker
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.out).unwrap_or_default()
    }

    /// What it said of each round, and in the end.
    fn finish(&mut self, node: &Node) -> (Vec<String>, Value) {
        let told = attempt(node.containerd.ctr().args(["tasks", "kill", "-s", "SIGTERM", &self.name]));
        let status = self.child.wait().unwrap();
        let said = self.said();
        assert!(status.success(), "{}: {status}; {}{said}", self.mode, text(&told.stderr));
        let lines = said.lines().filter(|line| line.starts_with(self.mode)).map(str::to_owned).collect();
        let done = said.lines().find_map(|line| line.strip_prefix("DONE ")).unwrap_or_else(|| panic!("{said}"));
        (lines, serde_json::from_str(done).unwrap())
    }
}
