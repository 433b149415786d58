//! containerd with a root of its own: 1.6 as Debian has it, 2.2 as `setup.sh` built it. And what `ctr` does with it.

use super::command::{attempt, output, text};
use super::grpc::Client;
use super::process::{Process, kill_all, pids_naming};
use super::slot::Root;
use super::undo::Undo;
use soci::oci::{Digest, ImageConfig, Index, Manifest, Platform};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    /// 1.6 from Debian.
    V16,
    /// 2.2 from the cache. `ctr images pull` goes through its transfer service.
    V22,
}

/// Settings beside the version.
#[derive(Clone, Default)]
pub struct Options {
    /// The socket of a snapshotter to be known as `soci`.
    pub soci: Option<PathBuf>,
    /// Enables CRI, with this image for the sandboxes; it uses `soci` if there is one.
    pub pause: Option<String>,
    /// `host:port` of registries that speak plain HTTP (for CRI; `ctr` is told on its command line).
    pub plain_http: Vec<String>,
    /// Layers unpacked at a time (2.2 only; its default is 1).
    pub parallel_unpacks: Option<u32>,
    /// Leaves `disable_snapshot_annotations` at its default (true), as nodes do that know nothing of lazy loading.
    pub no_annotations: bool,
}

pub struct Containerd {
    pub version: Version,
    pub process: Process,
    pub address: PathBuf,
    dir: PathBuf,
    /// Ends containers and shims, which are in groups of their own. After `process` in the struct, hence dropped later.
    _undo: Undo,
}

impl Containerd {
    pub fn start(root: &Root, version: Version, options: &Options) -> Containerd {
        let dir = root.dir("ctd");
        let address = dir.join("sock");
        for host in &options.plain_http {
            let hosts = dir.join("hosts").join(host);
            std::fs::create_dir_all(&hosts).unwrap();
            std::fs::write(hosts.join("hosts.toml"), format!("server = \"http://{host}\"\n[host.\"http://{host}\"]\n"))
                .unwrap();
        }
        std::fs::write(dir.join("config.toml"), config(version, options, &dir)).unwrap();
        let undo = Undo::with({
            let dir = dir.clone();
            move || kill_all(&remains(&dir))
        });
        let process = launch(version, &dir, &root.join("containerd.log"));
        let containerd = Containerd { version, process, address, dir, _undo: undo };
        containerd.process.wait_until("it answers", || attempt(containerd.ctr().arg("version")).status.success());
        containerd
    }

    /// Ends it and starts it again, with the configuration as it is by now.
    pub fn restart(&mut self) {
        self.process.signal(nix::sys::signal::Signal::SIGTERM);
        let start = std::time::Instant::now();
        while self.process.is_running() {
            assert!(start.elapsed().as_secs() < 20, "containerd does not end");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        self.process = launch(self.version, &self.dir, &self.dir.with_file_name("containerd.log"));
        self.process.wait_until("it answers", || attempt(self.ctr().arg("version")).status.success());
    }

    /// `ctr` talking to this containerd in its default namespace.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new(program(self.version, "ctr"));
        command.arg("-a").arg(&self.address);
        command
    }

    /// A CRI client (images and runtime are one socket). Waits until CRI has finished starting.
    pub fn cri(&self) -> Client {
        let client = Client::connect(&self.address);
        self.process.wait_until("CRI answers", || super::grpc::cri::list_images(&client).is_ok());
        client
    }

    /// `ctr images pull`. In 2.2 that is the transfer service.
    pub fn pull(&self, snapshotter: &str, reference: &str) -> Result<(), String> {
        succeeded(self.ctr().args(["images", "pull", "--plain-http", "--snapshotter", snapshotter, reference]))
    }

    /// As `ctr-remote images rpull --use-containerd-labels` and nerdctl pull: `arguments` as in `tests/lab/rpull/main.go`.
    pub fn rpull(&self, snapshotter: &str, reference: &str, arguments: &[&str]) -> Result<(), String> {
        succeeded(
            Command::new(super::tool("rpull"))
                .arg("-a")
                .arg(&self.address)
                .args(["-snapshotter", snapshotter])
                .args(arguments)
                .arg(reference),
        )
    }

    /// The command that runs a container in the foreground on the host's network, removing it when it ends.
    pub fn run_command(&self, snapshotter: &str, reference: &str, name: &str, arguments: &[String]) -> Command {
        let mut command = self.ctr();
        command.args(["run", "--rm", "--net-host", "--snapshotter", snapshotter, reference, name]).args(arguments);
        command
    }

    /// Runs a container to its end; its output if it succeeded.
    pub fn run(&self, snapshotter: &str, reference: &str, arguments: &[&str]) -> Result<String, String> {
        let arguments: Vec<String> = arguments.iter().map(|a| a.to_string()).collect();
        let done = attempt(&mut self.run_command(snapshotter, reference, &container_name(), &arguments));
        if done.status.success() {
            Ok(text(&done.stdout))
        } else {
            Err(format!("{}: {}{}", done.status, text(&done.stdout), text(&done.stderr)))
        }
    }

    /// SIGKILL to a container's first process.
    pub fn kill(&self, name: &str) {
        for namespace in ["default", "k8s.io"] {
            let _ = attempt(self.ctr().args(["-n", namespace, "tasks", "kill", "-s", "SIGKILL", name]));
        }
    }

    /// Removes an image and waits until its snapshots are gone with it.
    pub fn remove_image(&self, reference: &str) {
        output(self.ctr().args(["images", "rm", "--sync", reference]));
    }

    /// Leases that somebody has not given back.
    pub fn leases(&self) -> Vec<String> {
        let of = |namespace: &str| {
            let leases = attempt(self.ctr().args(["-n", namespace, "leases", "ls", "-q"]));
            let lines: Vec<String> =
                text(&leases.stdout).lines().map(|id| format!("lease {id} of {namespace}")).collect();
            lines
        };
        NAMESPACES.into_iter().flat_map(of).collect()
    }

    /// `ctr snapshots ls`: keys.
    pub fn snapshots(&self, snapshotter: &str) -> Vec<String> {
        let list = output(self.ctr().args(["snapshots", "--snapshotter", snapshotter, "ls"]));
        list.lines().skip(1).filter_map(|l| l.split_whitespace().next().map(String::from)).collect()
    }

    /// Digests in the content store.
    pub fn content(&self) -> Vec<String> {
        output(self.ctr().args(["content", "ls", "-q"])).lines().map(String::from).collect()
    }

    /// Mounts the root filesystem of a pulled image read-only, as a container would see it. (`ctr images mount` does the same in 1.6; that
    /// of 2.2 cannot mount what its own mount manager returns.)
    pub fn mount(&self, snapshotter: &str, namespace: &str, reference: &str, target: &Path) -> ImageMount {
        std::fs::create_dir_all(target).unwrap();
        let key = container_name();
        let snapshots = || {
            let mut ctr = self.ctr();
            ctr.args(["-n", namespace, "snapshots", "--snapshotter", snapshotter]);
            ctr
        };
        // `ctr snapshots view` does not hold on to what it makes: containerd's garbage collector may be quicker than we are.
        let held = (0..10).any(|_| {
            output(snapshots().args(["view", &key, &self.chain_id(namespace, reference)]));
            attempt(snapshots().args(["label", &key, "containerd.io/gc.root=lab"])).status.success()
        });
        assert!(held, "a view of {reference} was collected ten times");
        let mut remove = snapshots();
        remove.args(["rm", &key]);
        let undo = Undo::with({
            let target = target.to_path_buf();
            move || {
                super::slot::unmount_below(&target);
                let _ = attempt(&mut remove);
            }
        });
        let mount = output(snapshots().arg("mounts").arg(target).arg(&key));
        output(Command::new("sh").args(["-c", &mount]));
        ImageMount { path: target.into(), _undo: undo }
    }

    /// The name of an image's topmost snapshot: of the digests of its layers, folded.
    pub fn chain_id(&self, namespace: &str, reference: &str) -> String {
        let images = output(self.ctr().args(["-n", namespace, "images", "ls"]));
        let line = images.lines().find(|l| l.split_whitespace().next() == Some(reference));
        let mut digest = line
            .and_then(|l| l.split_whitespace().find(|w| w.starts_with("sha256:")))
            .expect("the image was pulled")
            .to_string();
        let content = |digest: &str| output(self.ctr().args(["-n", namespace, "content", "get", digest]));
        let mut manifest = content(&digest);
        if let Ok(index) = serde_json::from_str::<Index>(&manifest)
            && !index.manifests.is_empty()
        {
            let host = Platform::host();
            let runs_here = |p: &Platform| p.architecture == host.architecture && p.os == host.os;
            let image = index
                .manifests
                .iter()
                .find(|m| m.artifact_type.is_empty() && m.platform.as_ref().is_some_and(runs_here));
            digest = image.expect("an image for this platform").digest.to_string();
            manifest = content(&digest);
        }
        let manifest: Manifest = serde_json::from_str(&manifest).unwrap();
        let config: ImageConfig = serde_json::from_str(&content(&manifest.config.digest.to_string())).unwrap();
        let chain = config.rootfs.diff_ids.iter().map(|d| d.to_string());
        chain
            .reduce(|below, layer| Digest::of(format!("{below} {layer}").as_bytes()).to_string())
            .expect("an image has layers")
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// An image mounted with [`Containerd::mount`].
pub struct ImageMount {
    pub path: PathBuf,
    _undo: Undo,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for namespace in NAMESPACES {
            let tasks = attempt(self.ctr().args(["-n", namespace, "tasks", "ls", "-q"]));
            for task in text(&tasks.stdout).lines() {
                let _ = attempt(self.ctr().args(["-n", namespace, "tasks", "kill", "-s", "SIGKILL", task]));
                let _ = attempt(self.ctr().args(["-n", namespace, "tasks", "rm", "-f", task]));
            }
        }
        // What a client leases while it pulls or starts something must be given back when that has failed, too.
        self.leases().into_iter().for_each(|lease| super::leaks::report(&self.dir, lease));
    }
}

/// Those that tests use.
const NAMESPACES: [&str; 2] = ["default", "k8s.io"];

/// A container name that nobody else on this machine uses: runc's state and the cgroups are shared by all containerds.
pub fn container_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("lab-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Shims of the containerd in `dir`, and processes whose root filesystem comes from there.
pub fn remains(dir: &Path) -> Vec<u32> {
    let needle = format!("{}/", dir.display());
    let mut pids = pids_naming(&needle);
    pids.extend(super::process::pids_rooted_in(&needle));
    pids
}

fn succeeded(command: &mut Command) -> Result<(), String> {
    let done = attempt(command);
    if done.status.success() { Ok(()) } else { Err(format!("{}{}", text(&done.stdout), text(&done.stderr))) }
}

fn program(version: Version, name: &str) -> PathBuf {
    match version {
        Version::V16 => Path::new("/usr/bin").join(name),
        Version::V22 => super::tool(&format!("c2/{name}")),
    }
}

fn launch(version: Version, dir: &Path, log: &Path) -> Process {
    let mut command = Command::new(program(version, "containerd"));
    command.arg("-c").arg(dir.join("config.toml"));
    if version == Version::V22 {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(super::cache().join("bin/c2")).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(dirs).unwrap());
    }
    Process::start("containerd", &mut command, log)
}

fn config(version: Version, options: &Options, dir: &Path) -> String {
    let at = dir.display();
    let mut out = format!(
        "version = {}\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n",
        match version {
            Version::V16 => 2,
            Version::V22 => 3,
        }
    );
    if options.pause.is_none() {
        out += "disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\"]\n";
    }
    out += &format!(
        "[grpc]\n  address = \"{at}/sock\"\n[plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"{at}/opt\"\n"
    );
    if version == Version::V22 {
        out +=
            "[plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n[plugins.\"io.containerd.transfer.v1.local\"]\n";
        if let Some(unpacks) = options.parallel_unpacks {
            out += &format!("  max_concurrent_unpacks = {unpacks}\n");
        }
        for snapshotter in options.soci.iter().map(|_| "soci").chain(["overlayfs"]) {
            out += &format!(
                "  [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n    platform = \"linux/amd64\"\n    snapshotter = \"{snapshotter}\"\n"
            );
        }
    }
    if let Some(socket) = &options.soci {
        out += &format!("[proxy_plugins.soci]\n  type = \"snapshot\"\n  address = \"{}\"\n", socket.display());
        if version == Version::V22 {
            out += "  capabilities = [\"remap-ids\", \"multi-remap-ids\"]\n";
        }
        out += "  [proxy_plugins.soci.exports]\n    enable_remote_snapshot_annotations = \"true\"\n";
    }
    if let Some(pause) = &options.pause {
        let snapshotter = if options.soci.is_some() { "soci" } else { "overlayfs" };
        let annotations = options.no_annotations;
        // Needed where CAP_SYS_RESOURCE and AppArmor are missing and PID 1 is not systemd: a container, say.
        let runtime = "restrict_oom_score_adj = true\n  disable_apparmor = true\n";
        out += &match version {
            Version::V16 => format!(
                "[plugins.\"io.containerd.grpc.v1.cri\"]\n  {runtime}  sandbox_image = \"{pause}\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"{at}/hosts\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"{snapshotter}\"\n  disable_snapshot_annotations = {annotations}\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n  SystemdCgroup = false\n"
            ),
            Version::V22 => format!(
                "[plugins.\"io.containerd.cri.v1.runtime\"]\n  {runtime}\
                 [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n\
                 [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.runc.options]\n  SystemdCgroup = false\n\
                 [plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"{snapshotter}\"\n  disable_snapshot_annotations = {annotations}\n\
                 [plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"{pause}\"\n\
                 [plugins.\"io.containerd.cri.v1.images\".registry]\n  config_path = \"{at}/hosts\"\n"
            ),
        };
    }
    out
}
