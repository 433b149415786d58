//! In the guest: kills the daemon, soci-mount, or both, restarts and replaces them, under containers whose every read is compared.

use super::life;
use super::tools::{
    DAEMON, HOLDER, PATIENCE, REGISTRY, attempt, is_active, journal, main_pid, property, replaced, run, shell, status,
    text, within,
};
use crate::{Outcome, ensure};
use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const CTR: &str = "/vm/bin/ctr";
const MODES: [&str; 5] = ["hash", "import", "build", "random", "random"];
/// No read may stall for longer than a restart takes. Emulated and shared machines are slow; what was seen is in the result.
const STALL: u64 = 60;

/// Release 2 of the package, if there are packages.
const NEWER: &str = "/vm/repo-new";
/// Of the upgrades, one in so many is dnf's: it takes some seconds, and the others a moment.
const BY_DNF: usize = 10;

/// The result line.
pub fn storm(kills: usize) -> Outcome<String> {
    if Path::new(NEWER).exists() {
        shell("dnf -y -q install os-stub && dnf -y -q install soci-snapshotter")?;
    }
    install("v1")?;
    shell(
        "cp /vm/units/* /usr/lib/systemd/system/; mkdir -p /etc/soci-snapshotter-grpc; cp /vm/config.toml /etc/soci-snapshotter-grpc/",
    )?;
    // What is read is fetched when it is read, so that there is something to fetch all the time.
    shell("sed -i 's/^disable = false/disable = true/' /etc/soci-snapshotter-grpc/config.toml")?;
    configure_containerd()?;
    run("systemctl", &["daemon-reload"])?;
    run("systemctl", &["enable", "--quiet", "--now", "soci-snapshotter.socket"])?;
    run("systemctl", &["restart", "containerd"])?;
    shell(&format!(
        "printf \"version: 0.1\\nlog: {{level: warn}}\\nstorage: {{filesystem: {{rootdirectory: /vm/registry}}}}\\nhttp: {{addr: '{REGISTRY}'}}\\n\" \
         >/run/registry.yml; systemd-run --quiet --unit=vm-registry docker-registry serve /run/registry.yml"
    ))?;
    within(PATIENCE, "the registry answers", || std::net::TcpStream::connect(REGISTRY).ok())?;

    let reference = format!("{REGISTRY}/storm:1");
    let pull = |snapshotter| run(CTR, &["images", "pull", "--plain-http", "--snapshotter", snapshotter, &reference]);
    within(PATIENCE, "containerd pulls", || pull("overlayfs").ok())?;
    let mut expected = Vec::new();
    for mode in MODES {
        let said = run(
            CTR,
            &["run", "--rm", "--snapshotter", "overlayfs", &reference, "oracle", "/usr/bin/storm", mode, "1"],
        )?;
        expected.push(said.lines().nth(1).unwrap_or_default().to_owned());
    }
    run(CTR, &["images", "rm", "--sync", &reference])?;
    within(PATIENCE, "the daemon serves", || pull("soci").ok())?;
    let lazy = journal(DAEMON, &["-o", "json"])?.matches("\"SOCI_REMOTE_SNAPSHOT_PREPARED\":\"true\"").count();
    ensure!(lazy > 0, "no layer was made lazy: {}", journal(DAEMON, &[])?);

    // What systemd does for us, under a reader of its own: a watchdog needs longer than the kills that follow are allowed to take.
    let mut reader = Worker::start(&reference, MODES[0], MODES.len())?;
    life::a_worker_that_stands_still(&|_| Ok(()))?;
    life::logins_of_both(&|_| Ok(()))?;
    life::an_emptied_store(&|_| Ok(()))?;
    reader.finish(&expected[0])?;

    let mut workers = Vec::new();
    for (number, mode) in MODES.into_iter().enumerate() {
        workers.push(Worker::start(&reference, mode, number)?);
    }
    let begun = Instant::now();
    let counts = strike(kills)?;
    let lasted = begun.elapsed().as_secs_f64();
    within(PATIENCE, "the daemon serves in the end", || is_active(DAEMON).then_some(()))?;
    let written_down = shell(&format!("ls -l /proc/{}/fd", main_pid(HOLDER)?))?.contains("memfd:soci-requests");

    let (mut reads, mut rounds, mut worst, mut p99, mut waited) = (0.0, 0.0, 0f64, 0f64, 0f64);
    for (worker, expected) in workers.iter_mut().zip(&expected) {
        let done = worker.finish(expected)?;
        reads += number(&done, "reads")?;
        rounds += number(&done, "rounds")?;
        worst = worst.max(number(&done, "worst")?);
        p99 = p99.max(number(&done, "p99")?);
        waited = waited.max(number(&done, "waited")?);
    }
    let said = journal(DAEMON, &["-o", "json"])?;
    let numbers = |field: &str| -> Vec<u64> {
        let field = format!("\"{field}\":\"");
        said.lines().filter_map(|line| line.split_once(&field)?.1.split_once('"')?.0.parse().ok()).collect()
    };
    let resumed: u64 = numbers("SOCI_REQUESTS").iter().sum();
    let mut starts = numbers("SOCI_MILLISECONDS");
    starts.sort();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let kernel = run("uname", &["-r"])?;
    let kernel = kernel.trim();
    let how = if written_down { "written down by us" } else { "repeated by the kernel" };
    ensure!((worst as u64) < STALL, "a read stalled for {worst} s");
    ensure!(kills < 20 || resumed > 0, "nothing was in the way of the kills: {}", journal(DAEMON, &["-n", "30"])?);
    Ok(format!(
        "storm on Linux {kernel}, requests {how}: {kills} kills in {lasted:.0} s ({counts}), {rounds} rounds, {reads} reads, 0 errors, worst stall \
         {worst:.2} s, p99 {:.1} ms, {resumed} reads resumed; a start answered after {} ms (median), {} ms (worst); the machine (load {}) kept \
         programs waiting for up to {waited:.2} s",
        p99 * 1000.0,
        starts.get(starts.len() / 2).unwrap_or(&0),
        starts.last().unwrap_or(&0),
        load.split(' ').next().unwrap_or("?")
    ))
}

pub fn install(version: &str) -> Outcome {
    shell(&format!(
        "install -D -m 755 -t /usr/bin /vm/{version}/soci-snapshotter-grpc; \
         install -D -m 755 -t /usr/libexec/soci-snapshotter /vm/{version}/soci-mount /vm/{version}/soci-custodian"
    ))
    .map(drop)
}

pub fn configure_containerd() -> Outcome {
    let mut text = String::from(
        "version = 3\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\"]\n",
    );
    text += "[proxy_plugins.soci]\n  type = \"snapshot\"\n  address = \"/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock\"\n";
    text += "  [proxy_plugins.soci.exports]\n    enable_remote_snapshot_annotations = \"true\"\n";
    text += "[plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n[plugins.\"io.containerd.transfer.v1.local\"]\n";
    for snapshotter in ["soci", "overlayfs"] {
        text += &format!(
            "  [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n    platform = \"linux/amd64\"\n    snapshotter = \"{snapshotter}\"\n"
        );
    }
    let drop_in = "[Service]\nExecStartPre=\nExecStart=\nExecStart=/vm/bin/containerd\nEnvironment=PATH=/vm/bin:/usr/sbin:/usr/bin:/sbin:/bin\n";
    for (path, text) in
        [("/etc/containerd/config.toml", &*text), ("/etc/systemd/system/containerd.service.d/vm.conf", drop_in)]
    {
        let parent = std::path::Path::new(path).parent().map_or(Ok(()), fs::create_dir_all);
        parent.and_then(|()| fs::write(path, text)).map_err(|error| format!("{path}: {error}"))?;
    }
    Ok(())
}

/// A number of a flat JSON document.
fn number(document: &str, name: &str) -> Outcome<f64> {
    let found = document.split_once(&format!("\"{name}\": ")).map(|(_, rest)| rest);
    let digits = found.and_then(|rest| rest.split([',', '}']).next()).and_then(|digits| digits.trim().parse().ok());
    digits.ok_or_else(|| format!("no {name} in {document}"))
}

/// Kills, again and again; how often what.
fn strike(kills: usize) -> Outcome<String> {
    let mut state = std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_nanos() as u64) | 1;
    let mut below = |limit: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % limit
    };
    let (mut crashes, mut holders, mut both, mut upgrades, mut restarts, mut by_dnf) = (0, 0, 0, 0, 0, 0);
    let mut version = 1;
    let has_packages = Path::new(NEWER).exists();
    let kill = |pids: &[u32]| {
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        attempt("sh", &["-c", &format!("kill -9 {}", pids.join(" "))]).map(drop)
    };
    for n in 0..kills {
        // Most of the time it gets as far as serving; sometimes it is killed on the way there.
        let patient = below(8) != 0;
        let daemon = within(PATIENCE, &format!("the daemon runs: {}", status(DAEMON)), || {
            main_pid(DAEMON).ok().filter(|_| !patient || is_active(DAEMON))
        })?;
        sleep(Duration::from_millis(below(300)));
        match (n % 20, below(20)) {
            (5, _) => {
                // systemd's descriptor store is the only one left.
                let holder = within(PATIENCE, "soci-mount runs", || main_pid(HOLDER).ok())?;
                both += 1;
                kill(&[daemon, holder])?;
            }
            (10, _) => {
                let holder = within(PATIENCE, "soci-mount runs", || main_pid(HOLDER).ok())?;
                holders += 1;
                kill(&[holder])?;
            }
            (15, _) if has_packages && (n / 20).is_multiple_of(BY_DNF) => {
                by_dnf += 1;
                exchange_package(daemon)?;
            }
            (15, _) => {
                upgrades += 1;
                version = 3 - version;
                install(&format!("v{version}"))?;
                attempt("systemctl", &["restart", DAEMON])?;
            }
            (_, 0) => {
                restarts += 1;
                attempt("systemctl", &["restart", DAEMON])?;
            }
            _ => {
                crashes += 1;
                kill(&[daemon])?;
            }
        }
        // Names and attributes, too, are to be asked for again. Not waited for: it may have to wait for the daemon.
        if below(10) == 0 {
            let _ = Command::new("sh").args(["-c", "echo 2 >/proc/sys/vm/drop_caches"]).stderr(Stdio::null()).spawn();
        }
        if n % 100 == 99 {
            let _ = fs::write(
                "/dev/console",
                format!("storm: {} kills, NRestarts={}\r\n", n + 1, property(DAEMON, "NRestarts")),
            );
        }
    }
    Ok(format!(
        "{crashes} of the daemon, {holders} of soci-mount, {both} of both at once, {restarts} restarts, {upgrades} upgrades by hand, {by_dnf} by dnf{}",
        if has_packages { "" } else { " (no packages: make vm-test makes them)" }
    ))
}

/// dnf puts the other release in the place of the one that is installed: its scriptlets replace the daemon, and nothing else.
fn exchange_package(daemon: u32) -> Outcome {
    let release = || run("rpm", &["-q", "--qf", "%{RELEASE}", "soci-snapshotter"]);
    // It may just have been killed.
    let (before, holder) = (release()?, within(PATIENCE, "soci-mount runs", || main_pid(HOLDER).ok())?);
    let exchange = if before.starts_with("1.") { "--enablerepo=vm-new upgrade" } else { "downgrade" };
    shell(&format!("dnf -y -q {exchange} soci-snapshotter"))?;
    let after = release()?;
    ensure!(before != after, "dnf {exchange} left release {before}");
    replaced(DAEMON, daemon)?;
    ensure!(main_pid(HOLDER)? == holder, "dnf {exchange} replaced soci-mount, and with it the connection's keeper");
    Ok(())
}

/// A container that reads until it is told to end.
struct Worker {
    mode: &'static str,
    name: String,
    log: String,
    child: Child,
}

impl Worker {
    fn start(reference: &str, mode: &'static str, number: usize) -> Outcome<Worker> {
        let (name, log) = (format!("worker-{number}"), format!("/vm/worker-{number}.log"));
        let sink = fs::File::create(&log).map_err(|error| error.to_string())?;
        let child = Command::new(CTR)
            .args(["run", "--rm", "--snapshotter", "soci", reference, &name, "/usr/bin/storm", mode, "0"])
            .stdin(Stdio::null())
            .stdout(sink.try_clone().map_err(|error| error.to_string())?)
            .stderr(sink)
            .spawn()
            .map_err(|error| error.to_string())?;
        let worker = Worker { mode, name, log, child };
        within(PATIENCE * 2, &format!("{mode} begins"), || worker.said().contains("READY").then_some(()))
            .map_err(|error| format!("{error}: {}", worker.said()))?;
        Ok(worker)
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What it counted, if everything it read was as expected.
    fn finish(&mut self, expected: &str) -> Outcome<String> {
        let told = attempt(CTR, &["tasks", "kill", "-s", "SIGTERM", &self.name])?;
        let ended = self.child.wait().map_err(|error| error.to_string())?;
        let said = self.said();
        ensure!(ended.success(), "{}: {ended}: {}{said}", self.mode, text(&told.stderr));
        let wrong = said.lines().find(|line| line.starts_with(self.mode) && *line != expected);
        ensure!(wrong.is_none(), "{}: {wrong:?}, not {expected}", self.mode);
        let done = said.lines().find_map(|line| line.strip_prefix("DONE "));
        done.map(str::to_owned).ok_or_else(|| format!("{}: {said}", self.mode))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
