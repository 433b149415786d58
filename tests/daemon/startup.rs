//! Starting, refusing to start, ending: what operators and containerd rely on (scenarios I-ST1, I-ST4 to I-ST10, I-RN11).

use super::*;
use crate::support::command::{attempt, text};
use crate::support::grpc::{Client, snapshots};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;

fn answers(socket: &Path) {
    let client = Client::connect(socket);
    snapshots::prepare(&client, "probe", "", HashMap::new()).unwrap();
    snapshots::remove(&client, "probe").unwrap();
}

/// `row` of every thread of a process.
fn rows(pid: u32, row: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let value = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix(row)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {row}")).trim().to_owned()
    };
    status.map(value).collect()
}

#[test]
fn privileged_no_thread_of_the_daemon_has_any_power_when_the_first_request_comes() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let running = site.start("");
    let pid = running.process.pid();
    let check = |when: &str| {
        for row in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            let found = rows(pid, row);
            assert!(found.len() > 4 && found.iter().all(|mask| *mask == "0000000000000000"), "{when}: {row} {found:?}");
        }
        assert!(rows(pid, "NoNewPrivs").iter().all(|row| row == "1"), "{when}");
        assert!(rows(pid, "Seccomp").iter().all(|row| row == "2"), "{when}");
    };
    check("before any request");
    answers(&site.socket());
    check("after some");
    assert_eq!(running.stop(Signal::SIGTERM).0.code(), Some(0));
}

#[test]
fn privileged_the_packaged_configuration_an_empty_one_and_metrics_beside_the_socket_boot() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let packaged = include_str!("../../etc/soci-snapshotter-grpc/config.toml");
    site.start(packaged).stop(Signal::SIGTERM);
    site.start("").stop(Signal::SIGTERM);
    std::fs::remove_dir_all(site.root.join("run")).unwrap();
    let metrics = site.root.join("run/metrics");
    let running = site.start(&format!("metrics_address = '{}'\nmetrics_network = 'unix'", metrics.display()));
    answers(&site.socket());
    let mut stream = UnixStream::connect(metrics).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("soci_fs"), "{answer}");
    drop(running);
}

/// Runs the daemon's default paths on directories of the test's own, which nobody else sees.
fn with_private_paths(site: &Site, script: &str, arguments: &str) -> Running {
    let scratch = site.root.dir("scratch");
    let setup = format!(
        "mount -t tmpfs none /run && mkdir {0}/upper {0}/work && \
         mount -t overlay -o lowerdir=/etc,upperdir={0}/upper,workdir={0}/work overlay /etc && \
         rm -rf /etc/soci-snapshotter-grpc && {script} && exec {DAEMON} --root {1} {arguments}",
        scratch.display(),
        site.state().display()
    );
    site.run(Command::new("unshare").args(["-m", "sh", "-ec", &setup]))
}

#[test]
fn privileged_without_a_file_at_the_default_path_or_with_an_empty_one_it_boots_and_fd_falls_back() {
    let slot = Slot::take();
    for script in ["true", "mkdir /etc/soci-snapshotter-grpc && touch /etc/soci-snapshotter-grpc/config.toml"] {
        let site = Site::new(&slot);
        let running = with_private_paths(&site, script, "--address fd://");
        running.wait_for(STARTED);
        let log = running.log();
        assert!(log.contains("no file descriptors were passed"), "{log}");
        assert!(log.contains("Listening on the default socket address"), "{log}");
        let inside = format!("/proc/{}/root{}", running.process.pid(), soci::layout::DEFAULT_ADDRESS);
        answers(Path::new(&inside));
        assert_eq!(running.stop(Signal::SIGTERM).0.code(), Some(0));
    }
}

#[test]
fn privileged_a_socket_that_systemd_passes_is_served() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let path = site.root.join("activated");
    let listener = UnixListener::bind(&path).unwrap();
    // Connects before there is a daemon, as containerd does.
    let early = UnixStream::connect(&path).unwrap();
    let script = format!(
        "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec {DAEMON} --root {} --address fd:// --config /dev/null",
        site.state().display()
    );
    let log = site.root.join("daemon.log");
    let sink = || Stdio::from(std::fs::File::options().create(true).append(true).open(&log).unwrap());
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .stdin(OwnedFd::from(listener))
        .stdout(sink())
        .stderr(sink())
        .spawn()
        .unwrap();
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    eventually("it starts", || said().contains(STARTED));
    answers(&path);
    drop(early);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{}", said());
    assert!(path.exists(), "the socket is systemd's");
}

#[test]
fn privileged_what_is_wrong_with_the_configuration_is_said_at_once() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let soon = Duration::from_secs(2);
    let bad = "[pull_modes.parallel_pull_unpack]\nenable = true\ndiscard_unpacked_layers = true\n\
               concurrent_download_chunk_size = \"badstring\"";
    let log = site.refused(&mut site.command(bad), soon);
    assert!(log.contains("config.toml:4:34: ") && log.contains("invalid size format: badstring"), "{log}");
    let missing = site.root.join("missing.toml");
    let log = site.refused(site.bare().arg("--config").arg(&missing), soon);
    assert!(log.contains("failed to open config file") && log.contains("missing.toml"), "{log}");
    let log = site.refused(&mut site.command("max_concurrency = 'many'"), soon);
    assert!(log.contains("config.toml:1:19: max_concurrency: "), "{log}");
    assert!(!site.state().exists(), "a daemon that cannot read its configuration touches nothing");
}

#[test]
fn config_check_says_what_the_daemon_would_say() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    let check = |text: &str, more: &[&str]| {
        std::fs::write(&path, text).unwrap();
        let mut command = Command::new(DAEMON);
        let done = attempt(command.args(["config", "check"]).args(more).arg("--config").arg(&path));
        (done.status.code(), text_of(&done.stdout), text_of(&done.stderr))
    };
    let name = path.display();
    assert_eq!(check("debug = true", &[]), (Some(0), format!("{name}: ok\n"), String::new()));
    let (code, out, warning) = check("max_concurency = 3", &[]);
    assert_eq!((code, out), (Some(0), format!("{name}: ok\n")));
    let expected =
        format!("warning: {name}:1:1: max_concurency: unknown key, ignored; did you mean max_concurrency?\n");
    assert_eq!(warning, expected);
    let (code, out, _) = check("max_concurency = 3", &["--strict"]);
    assert_eq!((code, out), (Some(1), String::new()));
    let (code, _, error) = check("[http]\nMaxRetries = -", &[]);
    assert_eq!(code, Some(1));
    assert!(error.contains(&format!("{name}:2:")), "{error}");
}

#[test]
fn config_check_says_who_decides_about_each_registry() {
    let dir = tempfile::tempdir().unwrap();
    let (path, certs) = (dir.path().join("config.toml"), dir.path().join("certs.d"));
    let hosts = |host: &str, text: &str| {
        std::fs::create_dir_all(certs.join(host)).unwrap();
        std::fs::write(certs.join(host).join("hosts.toml"), text).unwrap();
    };
    hosts("both.example", "[host.\"https://file.example\"]\n  capabilities = [\"pull\"]\n");
    hosts("_default", "[host.\"https://default.example\"]\n");
    let text = format!(
        "[registry]\nconfig_path = '{}'\n[[resolver.host.\"both.example\".mirrors]]\nhost = 'https://resolver.example'\n\
         [[resolver.host.\"only.example\".mirrors]]\nhost = 'https://resolver.example'\n",
        certs.display()
    );
    std::fs::write(&path, text).unwrap();
    let check = |more: &[&str]| {
        let done = attempt(Command::new(DAEMON).args(["config", "check"]).args(more).arg("--config").arg(&path));
        (done.status.code(), text_of(&done.stdout), text_of(&done.stderr))
    };
    let (code, out, warnings) = check(&[]);
    assert_eq!(code, Some(0), "{warnings}");
    let (config, certs_d) = (path.display(), certs.display());
    for line in [
        format!(
            "both.example: {certs_d}/both.example/hosts.toml decides: https://file.example/v2 (pull), then https://both.example/v2"
        ),
        format!("only.example: [resolver.host] in {config} decides: https://resolver.example/v2"),
        format!("only.example: {certs_d}/_default/hosts.toml is not used"),
        format!("_default: {certs_d}/_default/hosts.toml decides: https://default.example/v2"),
    ] {
        assert!(out.lines().any(|l| l.starts_with(&line)), "{line:?} is not in\n{out}");
    }
    let unused = format!(
        "warning: both.example: [resolver.host.\"both.example\"] is not used, because {certs_d}/both.example/hosts.toml decides\n"
    );
    assert_eq!(warnings, unused);
    assert_eq!(check(&["--strict"]).0, Some(1), "what has no effect is an error to those who want to know");
    // A file that cannot be understood says where.
    hosts("both.example", "server = 7\n");
    let (code, _, error) = check(&[]);
    assert_eq!(code, Some(1));
    assert!(
        error.contains(&format!("images of both.example cannot be had: {certs_d}/both.example/hosts.toml:1:10: ")),
        "{error}"
    );
    std::fs::write(&path, "[registry]\nconfig_path = '/nonexistent'\n").unwrap();
    assert!(check(&[]).2.contains("registry.config_path: /nonexistent is not a directory"));
}

fn text_of(bytes: &[u8]) -> String {
    text(bytes)
}

#[test]
fn privileged_it_ends_within_five_seconds_whatever_its_clients_do_and_starts_again() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let running = site.start("");
        answers(&site.socket());
        // One that says nothing, one that stays connected after a request.
        let silent = UnixStream::connect(site.socket()).unwrap();
        let client = Client::connect(&site.socket());
        snapshots::prepare(&client, &format!("left-{signal}"), "", HashMap::new()).unwrap();
        let (status, took) = running.stop(signal);
        assert_eq!(status.code(), Some(0), "{signal}");
        assert!(took < Duration::from_secs(5), "{signal} took {took:?}");
        drop((silent, client));
    }
    let running = site.start("");
    let client = Client::connect(&site.socket());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        snapshots::stat(&client, &format!("left-{signal}")).unwrap();
    }
    drop(running);
}

#[test]
fn privileged_a_second_daemon_on_the_same_root_is_refused_and_the_first_one_goes_on() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let first = site.start("");
    let log = site.refused(&mut site.command(""), Duration::from_secs(15));
    assert!(log.contains("another soci-snapshotter-grpc uses ") && log.contains("--root"), "{log}");
    answers(&site.socket());
    assert_eq!(first.stop(Signal::SIGTERM).0.code(), Some(0));
}

#[test]
fn privileged_a_socket_that_nobody_serves_any_more_is_replaced() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    site.start("").process.kill_9();
    assert!(site.socket().exists());
    assert!(UnixStream::connect(site.socket()).is_err());
    let running = site.start("");
    answers(&site.socket());
    drop(running);
}

#[test]
fn privileged_what_stands_in_the_way_is_named_with_what_to_do() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let limit = Duration::from_secs(20);
    let says = |command: &mut Command, words: &[&str]| {
        let log = site.refused(command, limit);
        for word in words {
            assert!(log.contains(word), "{word:?} is not in\n{log}");
        }
    };
    std::fs::write(site.root.join("file"), "").unwrap();
    let elsewhere = |root: &Path| {
        let mut command = Command::new(DAEMON);
        command.arg("--root").arg(root).args(["--config", "/dev/null", "--address"]).arg(site.socket());
        command
    };
    let under_a_file = site.root.join("file/root");
    says(
        &mut elsewhere(&under_a_file),
        &["cannot prepare the root directory", "file/root", "--root", "Not a directory"],
    );
    let read_only = site.root.dir("read-only");
    let script = format!(
        "mount -t tmpfs -o ro none {0} && exec {DAEMON} --root {0}/x --config /dev/null --address {1}",
        read_only.display(),
        site.socket().display()
    );
    says(Command::new("unshare").args(["-m", "sh", "-ec", &script]), &["read-only/x", "Read-only file system"]);

    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = port.local_addr().unwrap().to_string();
    let metrics = format!("metrics_address = '{taken}'");
    says(&mut site.command(&metrics), &["cannot serve metrics", &taken, "metrics_address", "Address already in use"]);
    let debug = format!("debug_address = '{taken}'");
    says(&mut site.command(&debug), &["cannot serve", &taken, "debug_address"]);
    says(site.bare().args(["--config", "/dev/null", "--address", "tcp://x"]), &["tcp", "unix://PATH", "fd://"]);
    let nowhere = site.root.join("no/such/sock");
    let mut command = site.bare();
    says(command.args(["--config", "/dev/null", "--address"]).arg(nowhere), &["cannot listen on", "no/such/sock"]);

    // A daemon that was installed without its helpers.
    let alone = site.root.dir("bin").join("soci-snapshotter-grpc");
    std::fs::copy(DAEMON, &alone).unwrap();
    let mut command = Command::new(alone);
    command.env_remove("SOCI_LIBEXEC").arg("--root").arg(site.root.join("fresh")).args(["--config", "/dev/null"]);
    says(
        command.arg("--address").arg(site.socket()),
        &["soci-mount is not installed", "/usr/libexec/soci-snapshotter"],
    );
}

#[test]
fn privileged_a_root_that_cannot_carry_overlays_is_refused_unless_told_not_to_look() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    // An overlay cannot be the upper layer of another one.
    let scratch = site.root.dir("scratch");
    let script = |more: &str| {
        let scratch = scratch.display();
        let config = site.root.join("config.toml");
        std::fs::write(&config, more).unwrap();
        format!(
            "cd {scratch} && mkdir -p l u w m && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w overlay m && \
             exec {DAEMON} --root {scratch}/m/state --config {} --address {}",
            config.display(),
            site.socket().display()
        )
    };
    let looking = script("");
    let log = site.refused(Command::new("unshare").args(["-m", "sh", "-ec", &looking]), Duration::from_secs(10));
    assert!(log.contains("an overlay mount there fails") && log.contains("skip_check_snapshotter_supported"), "{log}");
    let trusting = script("skip_check_snapshotter_supported = true");
    let running = site.run(Command::new("unshare").args(["-m", "sh", "-ec", &trusting]));
    running.wait_for(STARTED);
    assert!(running.log().contains("skipped snapshotter is supported check"));
    kill_all(&pids_naming(&scratch.display().to_string()));
}
