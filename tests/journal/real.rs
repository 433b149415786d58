//! A real journald: what the daemon says arrives with its fields, `journalctl -x` explains it, a healthy pull is a handful of lines, and nothing of
//! a login is in any of them.

use crate::support::{
    command::{attempt, output, run},
    daemon::convert,
    grpc::{Client, snapshots},
    image::{Image, bulk},
    process::{Process, kill_all, pids_naming},
    proxy::{Fault, Proxy, Rule, Tokens},
    registry::{Kind, Registry, image_manifest},
    slot::{Root, Slot, unmount_below},
    undo::Undo,
};
use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;
use soci::{oci::Digest, snapshot::label, telemetry::catalog::Message};
use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const DAEMON: &str = env!("CARGO_BIN_EXE_soci-snapshotter-grpc");
const JOURNALD: &str = "/usr/lib/systemd/systemd-journald";
const RUN: &str = "/run/systemd/journal";

/// The machine's journald, or one of our own where PID 1 is not systemd.
struct Journald {
    namespace: Option<String>,
    _process: Option<Process>,
    _undo: Option<Undo>,
    /// There is one /run on a machine, and there may be several who test. Dropped last.
    _turn: Flock<File>,
}

impl Journald {
    fn get(slot: &Slot, root: &Root) -> Journald {
        let file = File::options().create(true).append(true).open("/var/tmp/soci-lab/journal.lock").unwrap();
        let turn = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
        if Path::new(RUN).join("socket").exists() {
            return Journald { namespace: None, _process: None, _undo: None, _turn: turn };
        }
        let namespace = format!("soci-test-{}", slot.number());
        let directory = format!("/run/systemd/journal.{namespace}");
        std::fs::create_dir_all(&directory).unwrap();
        let log = root.join("journald.log");
        let process = Process::start("systemd-journald", Command::new(JOURNALD).arg(&namespace), &log);
        process.wait_for_path(&Path::new(&directory).join("socket"));
        let _ = std::fs::remove_file(RUN);
        symlink(&directory, RUN).unwrap();
        let undo = Undo::with({
            let namespace = namespace.clone();
            move || {
                let _ = std::fs::remove_file(RUN);
                let _ = std::fs::remove_dir_all(directory);
                for base in ["/run/log/journal", "/var/log/journal"] {
                    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
                        if entry.file_name().to_string_lossy().ends_with(&format!(".{namespace}")) {
                            let _ = std::fs::remove_dir_all(entry.path());
                        }
                    }
                }
            }
        });
        Journald { namespace: Some(namespace), _process: Some(process), _undo: Some(undo), _turn: turn }
    }

    /// `journalctl` for what process `pid` has said.
    fn ctl(&self, pid: u32) -> Command {
        let mut command = Command::new("journalctl");
        command.args(["--no-pager", "-q"]);
        if let Some(namespace) = &self.namespace {
            command.arg(format!("--namespace={namespace}"));
        }
        command.arg(format!("_PID={pid}"));
        command
    }

    fn entries(&self, pid: u32) -> Vec<Value> {
        let text = output(self.ctl(pid).args(["-o", "json"]));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn wait_for(&self, pid: u32, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            if let Some(found) = self.entries(pid).into_iter().find(&condition) {
                return found;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "not in the journal: {what}\n{:#?}", self.entries(pid));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What `journalctl -x` prints, with our catalog compiled into a database of its own: the machine's is left alone.
    fn explained(&self, pid: u32, root: &Root) -> String {
        let (sources, database) = (root.dir("catalog"), root.dir("catalog-database"));
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/soci-snapshotter.catalog");
        std::fs::copy(ours, sources.join("soci-snapshotter.catalog")).unwrap();
        let script = format!(
            "mount --bind {} /usr/lib/systemd/catalog && mount --bind {} /var/lib/systemd/catalog && journalctl --update-catalog && exec \"$@\"",
            sources.display(),
            database.display()
        );
        let mut ctl = self.ctl(pid);
        ctl.arg("-x");
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &script, "sh"]).arg(ctl.get_program()).args(ctl.get_args());
        output(&mut command)
    }
}

/// A registry that wants a login, an image in it, and the daemon under journald.
struct Site {
    journald: Journald,
    daemon: Process,
    socket: PathBuf,
    registry: Registry,
    proxy: Proxy,
    _undo: Undo,
    root: Root,
}

/// In the docker configuration; nobody may ever see it.
const PASSWORD: &str = "hunter2-in-the-open";

impl Site {
    fn start(slot: &Slot, level: &str) -> Site {
        let root = slot.root();
        let journald = Journald::get(slot, &root);
        let registry = Registry::start(Kind::Docker28, &root);
        let proxy = Proxy::start(&registry.host);
        let docker = root.dir("docker");
        let auth = base64(format!("somebody:{PASSWORD}").as_bytes());
        let text = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{auth}\"}}}}}}", proxy.host);
        std::fs::write(docker.join("config.json"), text).unwrap();
        let config = root.join("config.toml");
        let text = format!("[[resolver.host.\"{0}\".mirrors]]\nhost = \"http://{0}\"\ninsecure = true\n", proxy.host);
        std::fs::write(&config, text).unwrap();
        let (state, socket) = (root.join("state"), root.join("run/sock"));
        let undo = Undo::with({
            let (state, dir) = (state.clone(), root.path().to_owned());
            move || {
                kill_all(&pids_naming(&state.display().to_string()));
                unmount_below(&dir);
            }
        });
        // What systemd does for a service whose output goes to the journal; systemd-cat does not tell JOURNAL_STREAM.
        let script = "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec \"$@\"";
        let mut command = Command::new("systemd-cat");
        command.args(["-t", "soci-test", "--level-prefix=false", "sh", "-c", script, "sh", DAEMON]);
        command.arg("--root").arg(&state).arg("--address").arg(&socket).arg("--config").arg(&config);
        command.args(["--log-level", level]).env("DOCKER_CONFIG", &docker);
        let daemon = Process::start("soci-snapshotter-grpc", &mut command, &root.join("daemon.log"));
        let site = Site { journald, daemon, socket, registry, proxy, _undo: undo, root };
        site.said(Message::Started);
        site
    }

    /// Waits for the message; its entry in the journal.
    fn said(&self, message: Message) -> Value {
        let is_it = |entry: &Value| entry["MESSAGE_ID"] == message.id();
        self.journald.wait_for(self.daemon.pid(), message.name(), is_it)
    }

    /// Publishes an image of `layers` layers, indexed or not: its reference, its manifest, its layers.
    fn publish(&self, name: &str, layers: usize, indexed: bool) -> (String, Digest, Vec<Digest>) {
        let (plain, layout) = (self.root.join(&format!("{name}-plain")), self.root.join(name));
        Image::new((0..layers).map(|n| bulk(&format!("d{n}"), n as u64 + 1, 1)).collect()).write(&plain);
        let layout = match indexed {
            true => {
                convert(&plain, &layout, &["--min-layer-size", "0"]);
                layout
            }
            false => plain,
        };
        self.registry.push(&layout, name, "v1");
        let (manifest, read) = image_manifest(&layout);
        (self.proxy.reference(name, "v1"), manifest, read.layers.iter().map(|l| l.digest).collect())
    }

    /// Prepares every layer as containerd does; how many were lazy.
    fn pull(&self, name: &str, (reference, manifest, layers): &(String, Digest, Vec<Digest>)) -> usize {
        let client = Client::connect(&self.socket);
        let mut lazy = 0;
        for (n, layer) in layers.iter().enumerate() {
            let parent = n.checked_sub(1).map_or(String::new(), |n| format!("{name}-{n}"));
            let labels = [
                (label::TARGET, format!("{name}-{n}")),
                (label::IMAGE_REF, reference.clone()),
                (label::MANIFEST_DIGEST, manifest.to_string()),
                (label::LAYER_DIGEST, layer.to_string()),
            ];
            let labels: HashMap<String, String> = labels.map(|(k, v)| (k.to_owned(), v)).into();
            match snapshots::prepare(&client, &format!("extract-{name}-{n}"), &parent, labels) {
                Err(status) => {
                    assert_eq!(status.code(), tonic::Code::AlreadyExists, "{status}");
                    lazy += 1;
                }
                // What containerd does with it is not the subject here; the next layer needs a parent, so it ends.
                Ok(_) => break,
            }
        }
        lazy
    }
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[test]
fn privileged_messages_have_their_fields_and_journalctl_explains_them() {
    let slot = Slot::take();
    let site = Site::start(&slot, "info");
    let lazy = site.publish("lazy", 3, true);
    assert_eq!(site.pull("lazy", &lazy), 3);
    let plain = site.publish("plain", 1, false);
    assert_eq!(site.pull("plain", &plain), 0);
    let entry = site.said(Message::NoIndex);
    assert_eq!(entry["SOCI_IMAGE"], plain.0.as_str());
    assert_eq!(entry["SOCI_LAYER"], plain.2[0].to_string().as_str());
    assert_eq!(entry["SOCI_REASON"], "no-index");
    assert_eq!(entry["PRIORITY"], "4");
    let tried = site.said(Message::LayerNotLazy);
    assert!(tried["MESSAGE"].as_str().unwrap().contains("the image has no SOCI index"), "{tried}");
    assert_eq!(site.said(Message::LayerLazy)["SOCI_IMAGE"], lazy.0.as_str());
    let explained = site.journald.explained(site.daemon.pid(), &site.root);
    for text in [
        "Subject: An image has no SOCI index",
        "Defined-By: soci-snapshotter",
        &format!("No SOCI index was found for {}, so its layers are", plain.0),
        &format!("soci explain {}", plain.0),
        "Subject: The SOCI snapshotter is ready",
    ] {
        assert!(explained.contains(text), "{text:?} is not in:\n{explained}");
    }
}

#[test]
fn privileged_a_healthy_pull_is_a_handful_of_lines_at_the_default_level() {
    let slot = Slot::take();
    let site = Site::start(&slot, "info");
    let image = site.publish("large", 12, true);
    let before = site.journald.entries(site.daemon.pid()).len();
    assert_eq!(site.pull("large", &image), 12);
    site.said(Message::LayerLazy);
    std::thread::sleep(Duration::from_secs(1));
    let entries = site.journald.entries(site.daemon.pid());
    let lines: Vec<&str> = entries[before..].iter().filter_map(|e| e["MESSAGE"].as_str()).collect();
    assert!(lines.len() <= 5, "{lines:#?}");
}

#[test]
fn privileged_nothing_of_a_login_or_a_signed_address_is_ever_said_not_even_at_trace() {
    let slot = Slot::take();
    let site = Site::start(&slot, "trace");
    let image = site.publish("private", 3, true);
    site.proxy.tokens(Some(Tokens { valid_for: Duration::from_secs(1) }));
    site.proxy.rule(Rule::blobs(Fault::Redirect(Duration::from_millis(500))).times(1_000));
    assert_eq!(site.pull("private", &image), 3);
    // Long enough for tokens and addresses to expire and be renewed while layers stream.
    for n in 1..=3u32 {
        let path = site.root.join(&format!("state/snapshotter/snapshots/{n}/fs/d{}", n - 1));
        run(Command::new("sh").arg("-c").arg(format!("cat {}/* >/dev/null", path.display())));
        std::thread::sleep(Duration::from_millis(700));
    }
    let seen = site.proxy.take_seen();
    let shown: Vec<String> = seen.iter().filter_map(|s| s.authorization.clone()).collect();
    assert!(shown.iter().any(|a| a.starts_with("Bearer ")), "logins were used: {seen:?}");
    let text = output(site.journald.ctl(site.daemon.pid()).args(["-o", "export", "-a"])).to_lowercase();
    assert!(text.lines().filter(|l| l.starts_with("message=")).count() > 30, "trace lines are there:\n{text}");
    let words = [
        "password",
        "passwd",
        "secret",
        "credential",
        "token",
        "api_key",
        "api-key",
        "apikey",
        "access_key",
        "oauth",
        "bearer",
        "basic auth",
        "authorization: basic",
        "private key",
        "certificate",
        &PASSWORD.to_lowercase(),
        &base64(format!("somebody:{PASSWORD}").as_bytes()).to_lowercase(),
    ];
    // journald's own fields quote our command line; everything else counts.
    let ours = text.lines().filter(|l| !l.starts_with('_'));
    for line in ours {
        for word in words {
            assert!(!line.contains(word), "{word:?} in {line}");
        }
        for value in shown.iter().filter_map(|a| a.split(' ').nth(1)) {
            assert!(!line.contains(&value.to_lowercase()), "what was sent to the registry is in {line}");
        }
    }
    // Queries are named, their values are not.
    for address in text.split_whitespace().filter(|w| w.contains("http://") && w.contains('?')) {
        let query = address.split('?').nth(1).unwrap_or_default();
        for pair in query.trim_end_matches(['"', ',', ')', ':', ';', '.']).split('&') {
            assert!(pair.ends_with("=redacted") || !pair.contains('='), "{address}");
        }
    }
}

#[test]
fn privileged_without_journald_lines_are_on_stderr() {
    // JOURNAL_STREAM names another stream: a shell that redirected it.
    let slot = Slot::take();
    let root = slot.root();
    let done = attempt(
        Command::new(DAEMON)
            .env("JOURNAL_STREAM", "1:1")
            .args(["--root"])
            .arg(root.join("state"))
            .args(["--config", "/nonexistent/config.toml"]),
    );
    let text = crate::support::command::text(&done.stderr);
    assert!(text.contains("\"level\":\"fatal\"") && text.contains(Message::CannotStart.id()), "{text}");
}
