//! What an operator asks on a node: `soci status`, `explain`, `doctor`, `enable` and `disable`, with real containerds.

use crate::support::{
    command::{attempt, text},
    containerd::{Containerd, Options, Version},
    daemon::{Daemon, Settings, convert},
    grpc::cri,
    image::{Image, bulk, busybox, pause},
    proxy::Proxy,
    registry::{Kind, Registry},
    slot::{Root, Slot},
};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

const SOCI: &str = env!("CARGO_BIN_EXE_soci");

/// A registry, our daemon, and a containerd that has never heard of it.
pub struct Node {
    pub containerd: Containerd,
    pub daemon: Daemon,
    pub proxy: Proxy,
    pub registry: Registry,
    pub root: Root,
}

impl Node {
    pub fn new(slot: &Slot, version: Version) -> Node {
        let root = slot.root();
        let registry = Registry::start(Kind::Docker28, &root);
        let proxy = Proxy::start(&registry.host);
        let settings = Settings {
            plain_http: vec![proxy.host.clone()],
            containerd: Some(root.join("ctd/sock")),
            ..Settings::default()
        };
        let daemon = Daemon::start(&root, &settings);
        let pause_layout = root.join("pause");
        pause().write(&pause_layout);
        registry.push(&pause_layout, "pause", "v1");
        let options = Options {
            pause: Some(proxy.reference("pause", "v1")),
            plain_http: vec![proxy.host.clone()],
            ..Options::default()
        };
        let containerd = Containerd::start(&root, version, &options);
        Node { containerd, daemon, proxy, registry, root }
    }

    /// An image of two layers whose index has zTOCs for layers of at least `min` bytes: its reference.
    fn publish(&self, name: &str, min: &str) -> String {
        let (plain, indexed) = (self.root.join(&format!("{name}-plain")), self.root.join(name));
        Image::new(vec![busybox(), bulk("bulk", 1, 4)]).write(&plain);
        convert(&plain, &indexed, &["--min-layer-size", min]);
        self.registry.push(&indexed, name, "v1");
        self.proxy.reference(name, "v1")
    }

    fn config(&self) -> PathBuf {
        self.containerd.dir().join("config.toml")
    }

    /// `soci`, for this node's daemon and containerd.
    fn soci(&self, words: &[&str]) -> Output {
        let mut command = Command::new(SOCI);
        command.args(words).arg("--daemon").arg(&self.daemon.socket);
        if !matches!(words[0], "status" | "explain") {
            command.arg("--address").arg(&self.containerd.address).arg("--root").arg(&self.daemon.root);
        }
        if matches!(words[0], "doctor" | "explain") {
            command.arg("--config").arg(self.daemon.socket.with_file_name("config.toml"));
        }
        attempt(&mut command)
    }

    pub fn succeeds(&self, words: &[&str]) -> String {
        let done = self.soci(words);
        assert!(done.status.success(), "{words:?}: {}\n{}{}", done.status, text(&done.stdout), text(&done.stderr));
        text(&done.stdout)
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.succeeds(&[words, &["--json"]].concat())).unwrap()
    }

    /// Exit code and findings.
    fn doctor(&self, words: &[&str]) -> (i32, Vec<Value>) {
        let done = self.soci(&[&["doctor", "--json"], words].concat());
        let report: Value =
            serde_json::from_slice(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&done.stderr)));
        let code = done.status.code().unwrap();
        assert_eq!(report["healthy"], code == 0, "{report}");
        (code, report["findings"].as_array().unwrap().clone())
    }
}

fn problems(findings: &[Value]) -> Vec<&Value> {
    findings.iter().filter(|f| f["verdict"] == "problem").collect()
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn privileged_enable_makes_both_containerds_pull_lazily_doctor_agrees_and_disable_restores_every_byte() {
    let slot = Slot::take();
    for version in [Version::V16, Version::V22] {
        let mut node = Node::new(&slot, version);
        let image = node.publish("app", "0");
        let before = bytes(&node.config());
        let (code, findings) = node.doctor(&[]);
        assert_eq!(code, 1, "{version:?}: {findings:#?}");
        let unknown = problems(&findings);
        assert!(
            unknown.iter().any(|f| f["check"] == "containerd" && f["fix"].as_str().unwrap().contains("soci enable")),
            "{unknown:#?}"
        );

        let shown = node.succeeds(&["enable", "cri", "--dry-run"]);
        assert!(
            shown.contains("+  snapshotter = \"soci\"")
                || shown.contains("+snapshotter = \"soci\"")
                || shown.contains("snapshotter = \"soci\""),
            "{shown}"
        );
        assert!(shown.contains("Nothing was changed."), "{shown}");
        assert_eq!(bytes(&node.config()), before);

        node.succeeds(&["enable", "cri"]);
        assert_ne!(bytes(&node.config()), before);
        assert!(node.succeeds(&["enable", "cri"]).contains("Everything is there already."));
        let (_, findings) = node.doctor(&[]);
        assert!(
            findings.iter().any(|f| f["found"].as_str().unwrap().contains("was changed after containerd was started")),
            "{findings:#?}"
        );
        node.containerd.restart();
        cri::pull(&node.containerd.cri(), &image).unwrap();
        assert_eq!(node.daemon.layers().lazy, 2, "{version:?}: {}", node.daemon.log());
        let (code, findings) = node.doctor(&[&image]);
        assert_eq!(code, 0, "{version:?}: {:#?}", problems(&findings));
        // A client that names the snapshotter: in 2.2 that is the transfer service.
        match version {
            Version::V16 => node.containerd.rpull("soci", &image, &["-labels", "containerd"]).unwrap(),
            Version::V22 => node.containerd.pull("soci", &image).unwrap(),
        }
        let ran = node.containerd.run("soci", &image, &["sh", "-c", "cat /bulk/* | wc -c"]).unwrap();
        assert_eq!(ran.trim(), "4194304");

        let socket = format!("unix://{}", node.daemon.socket.display());
        let status = attempt(Command::new(SOCI).args(["status", "--json", "--daemon", &socket]));
        assert!(status.status.success() && text(&status.stdout).contains(&image), "{}", text(&status.stderr));

        node.succeeds(&["disable", "cri"]);
        assert_eq!(bytes(&node.config()), before, "{version:?}");
        assert!(!node.containerd.dir().join("soci-enable.json").exists());
        assert!(node.succeeds(&["disable", "cri"]).contains("has changed nothing"));
    }
}

#[test]
fn privileged_a_file_of_its_own_is_used_where_the_configuration_imports_one_unless_containerd_would_lose_something() {
    let slot = Slot::take();
    let root = slot.root();
    for (program, version, cri_plugin) in [
        (PathBuf::from("/usr/bin/containerd"), 2, "io.containerd.grpc.v1.cri"),
        (crate::support::tool("c2/containerd"), 3, "io.containerd.cri.v1.images"),
    ] {
        let directory = root.dir(&format!("etc{version}"));
        let (config, drop_in) = (directory.join("config.toml"), directory.join("conf.d/90-soci-snapshotter.toml"));
        std::fs::create_dir_all(directory.join("conf.d")).unwrap();
        let original = format!(
            "version = {version} # of the site\nimports = [\"{}/conf.d/*.toml\"]\n\n[plugins.\"{cri_plugin}\"]\n  max_concurrent_downloads = 9 # measured\n",
            directory.display()
        );
        // Kept somewhere else, as configuration management does.
        let kept = root.join(&format!("kept{version}.toml"));
        std::fs::write(&kept, &original).unwrap();
        std::os::unix::fs::symlink(&kept, &config).unwrap();
        let soci = |words: &[&str]| {
            let mut command = Command::new(SOCI);
            command.args(words).args(["--address", "/nonexistent"]).arg("--containerd").arg(&program);
            let done = attempt(command.arg("--containerd-config").arg(&config));
            assert!(done.status.success(), "{words:?}: {}", text(&done.stderr));
            text(&done.stdout)
        };
        let comes_to =
            || crate::support::command::output(Command::new(&program).arg("-c").arg(&config).args(["config", "dump"]));
        soci(&["enable", "containerd"]);
        assert!(drop_in.exists());
        assert_eq!(std::fs::read_to_string(&config).unwrap(), original);
        soci(&["enable", "cri"]);
        let dump = comes_to();
        assert!(dump.contains("max_concurrent_downloads = 9"), "{dump}");
        assert!(dump.contains("disable_snapshot_annotations = false"), "{dump}");
        // 1.x would replace the whole section of a plugin by the one that is imported.
        assert_eq!(std::fs::read_to_string(&config).unwrap() == original, version == 3);
        let text = std::fs::read_to_string(&config).unwrap();
        assert!(text.contains("# of the site") && text.contains("# measured"), "{text}");
        soci(&["disable", "containerd"]);
        assert_eq!(std::fs::read_to_string(&config).unwrap(), original);
        assert!(!drop_in.exists());
        // What somebody changes meanwhile stays, and only our part goes.
        std::fs::write(&config, original.replace("imports", "#imports")).unwrap();
        soci(&["enable", "cri"]);
        let edited = std::fs::read_to_string(&config).unwrap().replace("= 9 # measured", "= 11 # measured again");
        std::fs::write(&config, edited).unwrap();
        assert!(soci(&["enable", "--undo", "cri"]).contains("was changed since"));
        let left = std::fs::read_to_string(&config).unwrap();
        assert!(left.contains("= 11 # measured again") && !left.contains("snapshotter"), "{left}");
        assert!(config.is_symlink() && std::fs::read_to_string(&kept).unwrap() == left);
        let files: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(files.len(), 2, "nothing else is left: {files:?}");
    }
}

#[test]
fn a_configuration_from_the_days_of_containerd_1_is_good_for_containerd_2() {
    let root = tempfile::tempdir().unwrap();
    let config = root.path().join("config.toml");
    let original = "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/x\"\n";
    std::fs::write(&config, original).unwrap();
    let program = crate::support::tool("c2/containerd");
    let soci = |words: &[&str]| {
        let mut command = Command::new(SOCI);
        command.args(words).args(["--address", "/nonexistent"]).arg("--containerd").arg(&program);
        let done = attempt(command.arg("--containerd-config").arg(&config));
        assert!(done.status.success(), "{words:?}: {}", text(&done.stderr));
    };
    for target in ["containerd", "cri"] {
        soci(&["enable", target]);
        let dump =
            crate::support::command::output(Command::new(&program).arg("-c").arg(&config).args(["config", "dump"]));
        // What "ctr images pull --snapshotter soci" needs, and what unpacked before.
        let unpacks: Vec<&str> = dump.split("unpack_config]]").skip(1).collect();
        assert_eq!(unpacks.len(), 2, "{dump}");
        assert!(unpacks[0].contains("'overlayfs'") && unpacks[1].contains("'soci'"), "{dump}");
        assert!(dump.contains("'/x'"), "{dump}");
        soci(&["disable", target]);
        assert_eq!(std::fs::read_to_string(&config).unwrap(), original);
    }
}

#[test]
fn enable_says_what_is_in_the_way_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let config = root.path().join("config.toml");
    for (content, wanted) in [
        ("disabled_plugins = [\"cri\"]\n", "version = 2"),
        ("version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n", "disabled_plugins"),
        ("version = 2\nproxy_plugins = 7\n", "config.toml"),
        ("version = \n", "config.toml"),
    ] {
        std::fs::write(&config, content).unwrap();
        let mut command = Command::new(SOCI);
        command.args([
            "enable",
            "cri",
            "--address",
            "/nonexistent",
            "--containerd",
            "/usr/bin/containerd",
            "--containerd-config",
        ]);
        let done = attempt(command.arg(&config));
        assert_eq!(done.status.code(), Some(1));
        assert!(text(&done.stderr).contains(wanted), "{content:?}: {}", text(&done.stderr));
        assert_eq!(std::fs::read_to_string(&config).unwrap(), content);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    }
    for (target, wanted) in [("docker", "daemon.json"), ("k3s", "config-v3.toml.tmpl")] {
        let done = attempt(Command::new(SOCI).args(["enable", target]));
        assert!(done.status.success() && text(&done.stdout).contains(wanted));
    }
}

#[test]
fn privileged_status_and_explain_tell_each_layer_s_mode_and_why() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22);
    // busybox is about a megabyte and gets no zTOC.
    let (mixed, plain) = (node.publish("mixed", "2000000"), node.proxy.reference("plain", "v1"));
    node.registry.push(&node.root.join("mixed-plain"), "plain", "v1");
    // Before anybody has pulled it, the registry knows.
    let before = node.json(&["explain", &mixed]);
    assert_eq!(before["layers"][0]["now"]["reason"], "no-ztoc");
    assert_eq!(before["layers"][1]["now"]["mode"], "lazy");
    assert!(
        before["index"].as_str().unwrap().starts_with("sha256:") && before["layers"][1].get("here").is_none(),
        "{before}"
    );
    let without = node.json(&["explain", &plain]);
    assert!(without["no_index"].as_str().unwrap().contains("no SOCI index"), "{without}");
    assert_eq!(without["layers"][0]["now"]["reason"], "no-index");

    node.succeeds(&["enable", "containerd"]);
    node.containerd.restart();
    node.containerd.pull("soci", &mixed).unwrap();
    let status = node.json(&["status"]);
    assert_eq!((&status["state"], &status["connection_kept"]), (&"serving".into(), &true.into()), "{status}");
    let images = status["images"].as_array().unwrap();
    assert_eq!(images.len(), 1, "{status}");
    assert_eq!(images[0]["image"], mixed.as_str());
    let layers = images[0]["layers"].as_array().unwrap();
    let of = |mode: &str| layers.iter().filter(|l| l["mode"] == mode).count();
    assert_eq!((of("lazy"), layers.len()), (1, 2), "{status}");
    let lazy = layers.iter().find(|l| l["mode"] == "lazy").unwrap();
    assert!(lazy["lazy"]["size"].as_u64().unwrap() > 1_000_000 && lazy["reason"] == "indexed", "{lazy}");
    let after = node.json(&["explain", &mixed]);
    assert_eq!(after["layers"][0]["here"]["reason"], "no-ztoc");
    assert_eq!(after["layers"][1]["here"]["mode"], "lazy");
    let shown = node.succeeds(&["status"]);
    assert!(shown.contains(&mixed) && shown.contains("1 lazy"), "{shown}");
    // All of it comes, and then it is all here.
    node.containerd.run("soci", &mixed, &["sh", "-c", "cat /bulk/* >/dev/null"]).unwrap();
    let whole = |node: &Node| {
        let status = node.json(&["status"]);
        let layers = status["images"][0]["layers"].as_array().unwrap().clone();
        layers.iter().any(|l| l["lazy"]["fetched_percent"] == 100)
    };
    let start = std::time::Instant::now();
    while !whole(&node) {
        assert!(start.elapsed().as_secs() < 20, "{}", node.succeeds(&["status"]));
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    // A restart forgets nothing that is lazy, and the registry is not needed to say so.
    node.daemon.crash_and_restart();
    node.proxy.down();
    let explained = node.json(&["explain", &mixed]);
    assert!(explained["registry_error"].is_string() && explained["layers"][0]["here"]["mode"] == "lazy", "{explained}");
    let unknown = node.soci(&["explain", &node.proxy.reference("other", "v1")]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("nothing is known of"), "{}", text(&unknown.stderr));
    // Somebody who is not root gets nothing.
    let socket = node.daemon.socket.with_extension("status");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).unwrap().permissions());
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    node.daemon.stop();
    let gone = node.soci(&["status"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains("is it running?"), "{}", text(&gone.stderr));
}

#[test]
fn privileged_doctor_says_whether_the_registry_lets_this_node_in() {
    let slot = Slot::take();
    let root = slot.root();
    let registry = Registry::start(Kind::Guarded, &root);
    let layout = root.join("layout");
    Image::new(vec![bulk("bulk", 1, 1)]).write(&layout);
    registry.push(&layout, "private", "v1");
    let image = registry.reference("private", "v1");
    let (config, docker) = (root.join("config.toml"), root.dir("docker"));
    let host = &registry.host;
    std::fs::write(
        &config,
        format!("[[resolver.host.\"{host}\".mirrors]]\nhost = \"http://{host}\"\ninsecure = true\n"),
    )
    .unwrap();
    let ask = || {
        let mut command = Command::new(SOCI);
        command.args(["doctor", "--json", "--config"]).arg(&config).arg(&image);
        let done = attempt(command.env("DOCKER_CONFIG", &docker).env("HOME", root.path()));
        assert!(!text(&done.stdout).contains("dTpw") && !text(&done.stderr).contains("dTpw"), "logins are not shown");
        let report: Value = serde_json::from_slice(&done.stdout).unwrap();
        report["findings"].as_array().unwrap().clone()
    };
    let of = |findings: &[Value], check: &str| findings.iter().find(|f| f["check"] == check).cloned().unwrap();
    let without = ask();
    assert_eq!(of(&without, "login")["verdict"], "skipped", "{without:#?}");
    let refused = of(&without, "registry");
    assert!(refused["verdict"] == "problem" && refused["fix"].as_str().unwrap().contains("docker login"), "{refused}");
    std::fs::write(docker.join("config.json"), format!("{{\"auths\":{{\"{host}\":{{\"auth\":\"dTpw\"}}}}}}")).unwrap();
    let with = ask();
    assert_eq!(
        (&of(&with, "login")["verdict"], &of(&with, "registry")["verdict"]),
        (&"ok".into(), &"ok".into()),
        "{with:#?}"
    );
    assert_eq!(of(&with, "index")["verdict"], "warning", "it has no index: {with:#?}");
}

#[test]
fn privileged_doctor_names_a_daemon_that_is_gone_a_bad_configuration_and_a_registry_out_of_reach() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22);
    node.succeeds(&["enable", "containerd"]);
    node.containerd.restart();
    let image = node.publish("app", "0");
    let of = |findings: &[Value], check: &str| {
        findings.iter().find(|f| f["check"] == check && f["verdict"] == "problem").cloned()
    };
    node.proxy.down();
    let (code, findings) = node.doctor(&[&image]);
    assert_eq!(code, 1);
    assert!(of(&findings, "registry").unwrap()["fix"].as_str().unwrap().contains("curl"), "{findings:#?}");
    node.proxy.up();
    let config = node.daemon.socket.with_file_name("config.toml");
    let good = bytes(&config);
    std::fs::write(&config, "mount_timeout_sec = 'soon'\n").unwrap();
    let (_, findings) = node.doctor(&[]);
    let found = of(&findings, "configuration").unwrap();
    assert!(found["found"].as_str().unwrap().contains("config.toml:1:"), "{found}");
    std::fs::write(&config, good).unwrap();
    node.daemon.stop();
    let (code, findings) = node.doctor(&[]);
    assert_eq!(code, 1);
    assert!(of(&findings, "socket").or(of(&findings, "snapshotter")).is_some(), "{findings:#?}");
    let words = text(&node.soci(&["doctor"]).stdout);
    assert!(words.contains("PROBLEM") && words.contains("fix: "), "{words}");
}
