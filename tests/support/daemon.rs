//! Our daemon, as an operator without systemd would start it.

use super::command::{attempt, run};
use super::grpc::Client;
use super::leaks;
use super::process::{Process, Usage, kill_all, pids_naming};
use super::slot::{Root, mounts_below, unmount_below};
use super::undo::Undo;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// What of the configuration a test chooses. The rest is the default.
#[derive(Clone, Default)]
pub struct Settings {
    /// `host:port` of registries that speak plain HTTP.
    pub plain_http: Vec<String>,
    /// containerd's socket, which it looks at for blobs it need not fetch.
    pub containerd: Option<PathBuf>,
    /// TOML to begin the file with: top-level keys, then tables.
    pub more: String,
    /// More of the table `content_store`.
    pub content_store: String,
    /// `--log-level`; info if empty.
    pub log_level: String,
    /// Environment (`DOCKER_CONFIG`, proxies).
    pub env: Vec<(String, String)>,
}

pub struct Daemon {
    pub root: PathBuf,
    pub socket: PathBuf,
    pub metrics: String,
    settings: Settings,
    log: PathBuf,
    process: Option<Process>,
    /// What it had open when it was started first, and there were no images.
    open_at_first: leaks::Descriptors,
    /// The mount and its holder outlive the daemon: that is their purpose. Dropped last.
    _undo: Undo,
}

impl Daemon {
    pub fn start(root: &Root, settings: &Settings) -> Daemon {
        let dir = root.dir("soci");
        let log = root.join("soci.log");
        let undo = Undo::with({
            let dir = dir.clone();
            let log = log.clone();
            move || clean_up(&dir, &log)
        });
        let metrics = format!("127.0.0.1:{}", super::registry::free_port());
        let socket = dir.join("sock");
        let mut daemon = Daemon {
            root: dir.join("root"),
            socket,
            metrics,
            settings: settings.clone(),
            log,
            process: None,
            open_at_first: leaks::Descriptors::new(),
            _undo: undo,
        };
        daemon.launch();
        daemon.open_at_first = leaks::descriptors(daemon.pid());
        daemon
    }

    fn config(&self) -> String {
        let mut out = format!("metrics_address = \"{}\"\n{}\n", self.metrics, self.settings.more);
        if let Some(socket) = &self.settings.containerd {
            out += &format!(
                "[content_store]\ncontainerd_address = \"{}\"\n{}",
                socket.display(),
                self.settings.content_store
            );
        }
        for host in &self.settings.plain_http {
            out += &format!("[[resolver.host.\"{host}\".mirrors]]\nhost = \"http://{host}\"\ninsecure = true\n");
        }
        out
    }

    /// Makes the command that starts the program in a directory with this daemon's root, socket and configuration.
    pub fn starter(&self) -> impl Fn(&Path) -> Command + Send + 'static {
        let config = self.socket.with_file_name("config.toml");
        std::fs::write(&config, self.config()).unwrap();
        let (root, socket, settings) = (self.root.clone(), self.socket.clone(), self.settings.clone());
        move |bin: &Path| {
            let level = if settings.log_level.is_empty() { "info" } else { &settings.log_level };
            let mut command = Command::new(bin.join("soci-snapshotter-grpc"));
            command.arg("--root").arg(&root).arg("--address").arg(&socket).arg("--config").arg(&config);
            command.args(["--log-level", level]).envs(settings.env.iter().map(|(k, v)| (k, v)));
            command
        }
    }

    fn launch(&mut self) {
        let seen = self.starts();
        let process = Process::start("soci-snapshotter-grpc", &mut self.starter()(&built()), &self.log);
        process.wait_until("it has started", || self.starts() > seen);
        self.process = Some(process);
        leaks::watch_connection(&self.lazy());
    }

    /// What it has open that it had not at first. For when all images are gone.
    pub fn left_open(&self) -> Vec<String> {
        leaks::more_open(&self.open_at_first, &leaks::descriptors(self.pid()), KEPT_CONNECTIONS)
    }

    /// How often it has said that it is ready.
    pub fn starts(&self) -> usize {
        self.log().matches(STARTED).count()
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    fn process(&self) -> &Process {
        self.process.as_ref().expect("the daemon is running")
    }

    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// `kill -9`, and a new one in its place: what a crash and a restart by systemd look like.
    pub fn crash_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    /// Starts it on a machine that has gone down without warning since: it is told that this is another boot.
    pub fn power_failed(&mut self) {
        let boot = (self.starts() + 1).to_string();
        self.settings.env.push(("SOCI_BOOT_ID".into(), format!("{boot:0>32}")));
        self.restart();
    }

    pub fn kill(&mut self) {
        self.process.take().expect("the daemon is running").kill_9();
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        self.process().signal(signal);
    }

    /// SIGTERM; panics unless it exits 0.
    pub fn stop(&mut self) {
        let status = self.process.take().expect("the daemon is running").stop();
        assert!(status.success(), "the daemon ended with {status} on SIGTERM");
    }

    /// Starts it again, after [`Daemon::kill`] or [`Daemon::stop`].
    pub fn restart(&mut self) {
        self.launch();
    }

    pub fn log(&self) -> String {
        super::command::text(&std::fs::read(&self.log).unwrap_or_default())
    }

    /// What became of the layers it was asked for so far.
    pub fn layers(&self) -> Layers {
        Layers::of(&self.log())
    }

    /// A client of its snapshots service.
    pub fn client(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// The text of the metrics endpoint.
    pub fn metrics(&self) -> String {
        super::registry::get(&format!("http://{}/metrics", self.metrics)).1
    }

    /// The daemon, its holder and its custodian.
    pub fn pids(&self) -> Vec<(String, u32)> {
        let mut all = vec![("soci-snapshotter-grpc".to_string(), self.pid())];
        for pid in helpers(&self.root) {
            if pid != self.pid() {
                all.push((comm(pid), pid));
            }
        }
        all
    }

    pub fn usage(&self) -> Usage {
        Usage::of(self.pid())
    }

    /// The mount point of all lazy layers.
    pub fn lazy(&self) -> PathBuf {
        soci::layout::Layout::new(&self.root).lazy()
    }
}

/// Connections that it may keep to one registry: [`soci::registry::HttpSettings::idle_connections`] of them.
const KEPT_CONNECTIONS: usize = 32;

/// The word every client waits for.
const STARTED: &str = "successfully started";

/// Counts of the log lines that say what was done with a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layers {
    /// Mounted lazily.
    pub lazy: usize,
    /// Asked for lazily, in vain.
    pub failed: usize,
    /// Pulled by us.
    pub local: usize,
    /// Left to containerd.
    pub deferred: usize,
}

impl Layers {
    pub fn of(log: &str) -> Layers {
        let count = |key: &str, value: &str| log.matches(&format!("\"{key}\":\"{value}\"")).count();
        Layers {
            lazy: count("remote-snapshot-prepared", "true"),
            failed: count("remote-snapshot-prepared", "false"),
            local: count("local-snapshot-prepared", "true"),
            deferred: count("defer-snapshot-runtime", "true"),
        }
    }
}

fn comm(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_string()
}

/// Processes of the product that serve `root`.
fn helpers(root: &Path) -> Vec<u32> {
    pids_naming(&root.display().to_string()).into_iter().filter(|pid| comm(*pid).starts_with("soci")).collect()
}

/// After the daemon: unmounts, as the manual says, and insists if that did not help, which is a leak.
fn clean_up(dir: &Path, log: &Path) {
    let root = dir.join("root");
    kill_all(&helpers(&root).into_iter().filter(|pid| comm(*pid).starts_with("soci-snap")).collect::<Vec<_>>());
    let done = attempt(Command::new(built().join("soci-mount")).arg("--root").arg(&root).arg("--unmount"));
    if !done.status.success() && log.exists() {
        leaks::report(dir, format!("soci-mount --unmount: {}: {}", done.status, super::command::text(&done.stderr)));
    }
    let left = || (mounts_below(&root), helpers(&root));
    let start = Instant::now();
    while left() != (vec![], vec![]) && start.elapsed() < GONE_WITHIN {
        std::thread::sleep(Duration::from_millis(10));
    }
    if left() != (vec![], vec![]) {
        let (mounts, pids) = left();
        let names: Vec<String> = pids.iter().map(|pid| format!("{} {pid}", comm(*pid))).collect();
        leaks::report(dir, format!("after soci-mount --unmount: mounts {mounts:?}, processes {names:?}"));
    }
    unmount_below(&root);
    kill_all(&helpers(&root));
}

/// Where the product's programs are.
pub fn built() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_soci-snapshotter-grpc")).parent().expect("in a directory").into()
}

/// Helpers end by themselves when their daemon has.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// `soci convert --standalone`: the image of one layout with an index, in another layout. `more`: further flags, `--min-layer-size` say.
pub fn convert(from: &Path, to: &Path, more: &[&str]) {
    let _ = std::fs::remove_dir_all(to);
    let mut command = Command::new(env!("CARGO_BIN_EXE_soci"));
    run(command.args(["convert", "--standalone"]).arg(from).arg(to).args(["--format", "oci-dir"]).args(more));
}
