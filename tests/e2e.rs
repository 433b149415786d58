//! The product through real clients: containerd 1.6 by CRI and by the labels of ctr-remote and nerdctl, containerd 2.2 by its transfer service;
//! then the same with a registry that misbehaves, a daemon that dies and containers that are killed.

use crate::support::command::{attempt, text};
use crate::support::containerd::{Containerd, Options, Version, container_name};
use crate::support::daemon::{Daemon, Layers, Settings};
use crate::support::grpc::cri;
use crate::support::image::{Image, bulk, busybox, everything};
use crate::support::node::Node;
use crate::support::proxy::{Fault, Rule, Tokens};
use crate::support::registry::{Kind, Registry, image_manifest, soci_index};
use crate::support::slot::Slot;
use crate::support::tree;
use crate::support::workload::until_ready;
use std::path::Path;
use std::time::{Duration, Instant};

fn all_lazy(layers: usize) -> Layers {
    Layers { lazy: layers, ..Layers::default() }
}

fn bulk_image(seed: u64, megabytes: usize) -> Image {
    Image::new(vec![busybox(), bulk("bulk", seed, megabytes)])
}

/// What the same image prints when containerd unpacks it: the oracle for every read through us.
fn expected_sums(slot: &Slot, layout: &Path) -> String {
    let root = slot.root();
    let registry = Registry::start(Kind::Docker28, &root);
    registry.push(layout, "oracle", "v1");
    let reference = registry.reference("oracle", "v1");
    let containerd = Containerd::start(&root, Version::V16, &Options::default());
    containerd.pull("overlayfs", &reference).unwrap();
    containerd.run("overlayfs", &reference, &["sh", "-c", "cd /bulk && md5sum *"]).unwrap()
}

#[test]
fn privileged_a_lazy_image_equals_the_unpacked_one_file_by_file() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "");
    let (layout, layers, reference) = node.publish("everything", &everything(4));
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.daemon.layers(), all_lazy(layers));
    assert_eq!(node.containerd.run("soci", &reference, &["cat", "/stack/replaced"]).unwrap(), "from above\n");
    let ours = {
        let mount = node.containerd.mount("soci", "default", &reference, &node.root.join("ours"));
        tree::read(&mount.path)
    };
    let theirs = {
        node.containerd.pull("overlayfs", &reference).unwrap();
        let mount = node.containerd.mount("overlayfs", "default", &reference, &node.root.join("theirs"));
        tree::read(&mount.path)
    };
    let free = tree::implied_directories(&tree::names_in_layers(&layout));
    assert_eq!(tree::differences(&theirs, &ours, &free), Vec::<String>::new());

    node.containerd.remove_image(&reference);
    node.nothing_is_left();
}

#[test]
fn privileged_cri_pulls_lazily_and_runs_pods_on_both_containerds() {
    let slot = Slot::take();
    for version in [Version::V16, Version::V22] {
        let node = Node::new(&slot, version, "");
        let (_, layers, reference) = node.publish("app", &bulk_image(1, 4));
        let client = node.containerd.cri();
        cri::pull(&client, &reference).unwrap();
        assert_eq!(node.daemon.layers().lazy, layers, "{version:?}");
        let pod = cri::Pod::run(&client, "app", &reference, &["/bin/sleep", "1000"], &node.root.dir("logs")).unwrap();
        let (code, out, err) = pod.exec(&["/bin/sh", "-c", "cat /bulk/* | wc -c"]).unwrap();
        assert_eq!((code, text(&out).trim()), (0, "4194304"), "{version:?}: {}", text(&err));
    }
}

#[test]
fn privileged_the_labels_of_ctr_remote_and_nerdctl_make_layers_lazy() {
    let slot = Slot::take();
    for version in [Version::V16, Version::V22] {
        let node = Node::new(&slot, version, "");
        let (layout, layers, reference) = node.publish("app", &bulk_image(2, 4));
        let index = soci_index(&layout).to_string();
        let clients: [&[&str]; 2] = [&["-labels", "containerd"], &["-labels", "nerdctl", "-index", &index]];
        for (turn, labels) in clients.iter().enumerate() {
            node.containerd.rpull("soci", &reference, labels).unwrap();
            assert_eq!(node.daemon.layers(), all_lazy(layers * (turn + 1)), "{version:?} {labels:?}");
            node.sums(&reference).unwrap();
            node.containerd.remove_image(&reference);
            node.nothing_is_left();
        }
    }
}

#[test]
fn privileged_layers_below_min_layer_size_are_pulled_whole_when_the_client_says_sizes() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "[snapshotter]\nmin_layer_size = 2000000\n");
    let (_, _, reference) = node.publish("app", &bulk_image(3, 6));
    node.containerd.rpull("soci", &reference, &["-labels", "nerdctl"]).unwrap();
    // busybox is about a megabyte, the bulk about four.
    assert_eq!(node.daemon.layers(), Layers { lazy: 1, local: 1, ..Layers::default() });
    node.sums(&reference).unwrap();
}

#[test]
fn privileged_an_image_without_index_is_left_to_containerd() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "");
    let layout = node.root.join("plain");
    bulk_image(4, 2).write(&layout);
    node.registry.push(&layout, "plain", "v1");
    let reference = node.proxy.reference("plain", "v1");
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.daemon.layers().lazy, 0);
    assert_eq!(node.sums(&reference).unwrap(), expected_sums(&slot, &layout));
}

#[test]
fn privileged_faults_that_heal_are_never_seen_by_a_container() {
    let slot = Slot::take();
    let image = bulk_image(5, 24);
    let layout = slot.root().join("faulty");
    image.write(&layout);
    let expected = expected_sums(&slot, &layout);
    // The big layer's blob; the faults must hit it and not the image's metadata, which containerd fetches itself.
    let (_, manifest) = image_manifest(&layout);
    let layer = manifest.layers[1].digest.to_string();
    let on = |fault: Fault, times: u64| Rule::blobs(fault).containing(&layer).times(times);
    let cases: [(&str, Vec<Rule>); 9] = [
        ("5xx bursts", vec![on(Fault::Status(503), 4), on(Fault::Status(500), 2)]),
        ("429 with Retry-After", vec![on(Fault::RetryAfter(429, 1), 2)]),
        ("truncated bodies", vec![on(Fault::Truncate(70_000), 3)]),
        ("corrupted bodies", vec![on(Fault::Corrupt(50_000), 3)]),
        ("resets", vec![on(Fault::Reset(100_000), 3)]),
        ("slow and stalling", vec![on(Fault::Stall(Duration::from_secs(2)), 1), on(Fault::Slow(2_000_000), 2)]),
        ("200 instead of 206", vec![on(Fault::WholeBlob, 3)]),
        ("a range that is not the one asked for", vec![on(Fault::WrongRange(512), 2)]),
        ("redirects that expire", vec![on(Fault::Redirect(Duration::from_millis(100)), 1_000)]),
    ];
    for (name, rules) in cases {
        let node = Node::new(&slot, Version::V22, "");
        let (_, layers, reference) = node.publish("faulty", &image);
        rules.into_iter().for_each(|rule| node.proxy.rule(rule));
        node.containerd.pull("soci", &reference).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(node.daemon.layers(), all_lazy(layers), "{name}");
        assert_eq!(node.sums(&reference).as_ref(), Ok(&expected), "{name}");
    }
}

#[test]
fn privileged_tokens_that_expire_are_renewed() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "");
    let (layout, layers, reference) = node.publish("private", &bulk_image(6, 8));
    node.proxy.tokens(Some(Tokens { valid_for: Duration::from_secs(2) }));
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.daemon.layers(), all_lazy(layers));
    node.proxy.revoke_tokens();
    assert_eq!(node.sums(&reference).unwrap(), expected_sums(&slot, &layout));
}

#[test]
fn privileged_a_read_outlives_a_registry_that_is_down_for_a_while() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "");
    let (layout, _, reference) = node.publish("app", &bulk_image(7, 16));
    let expected = expected_sums(&slot, &layout);
    // Slow, so that the background has not fetched it all by the time the registry goes.
    node.proxy.shape(4_000_000, Duration::from_millis(5));
    node.containerd.pull("soci", &reference).unwrap();
    node.proxy.down();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| node.sums(&reference));
        std::thread::sleep(Duration::from_secs(3));
        node.proxy.shape(0, Duration::ZERO);
        node.proxy.up();
        assert_eq!(reader.join().unwrap().as_ref(), Ok(&expected));
    });
}

#[test]
fn privileged_a_read_that_outlives_its_budget_is_an_io_error_with_a_reason_and_the_next_one_tries_again() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "[blob]\nfetching_timeout_sec = 4\n[background_fetch]\ndisable = true\n");
    let (layout, _, reference) = node.publish("app", &bulk_image(13, 8));
    let layer = image_manifest(&layout).1.layers[1].digest.to_string();
    node.proxy.rule(Rule::blobs(Fault::Status(503)).containing(&layer));
    node.containerd.pull("soci", &reference).unwrap();
    let begun = Instant::now();
    let said = node.containerd.run("soci", &reference, &["cat", "/bulk/0000"]).unwrap_err();
    assert!(said.contains("Input/output error"), "{said}");
    assert!(begun.elapsed() >= Duration::from_secs(4), "all of the budget was used: {:?}", begun.elapsed());
    let log = node.daemon.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("statFile error")).collect();
    assert_eq!(lines.len(), 1, "one line says why: {lines:#?}");
    for part in [&layer, "503", "bulk/0000", "app:v1", "33dcc957cd52462a94ed25979d974d2d"] {
        assert!(lines[0].contains(part), "no '{part}' in {}", lines[0]);
    }
    let metrics = node.daemon.metrics();
    let counted = metrics.lines().find(|l| l.contains("fuse_file_read_failure_count") && l.contains(&layer));
    assert!(counted.is_some_and(|l| !l.ends_with(" 0")), "{counted:?}\n{metrics}");
    // Right after a failure the kernel asks again, and gets the same answer for a fifth of a second; a container may be as quick.
    std::thread::sleep(Duration::from_millis(300));
    node.proxy.heal();
    assert_eq!(node.sums(&reference).unwrap(), expected_sums(&slot, &layout));
}

#[test]
fn privileged_sigterm_ends_a_daemon_whose_readers_are_blocked_within_its_bound() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22, "");
    let (layout, _, reference) = node.publish("app", &bulk_image(14, 8));
    let layer = image_manifest(&layout).1.layers[1].digest.to_string();
    node.proxy.rule(Rule::blobs(Fault::Hang).containing(&layer));
    node.containerd.pull("soci", &reference).unwrap();
    let mounted = node.containerd.mount("soci", "default", &reference, &node.root.join("blocked"));
    // Another process: one that has lazy files open cannot start the daemon, because its child closes copies of them, which asks the daemon.
    let mut reader = std::process::Command::new("md5sum")
        .arg(mounted.path.join("bulk/0003"))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(500)); // it blocks now
    let start = Instant::now();
    node.daemon.stop();
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    // The read is not lost: the next daemon answers it.
    node.proxy.heal();
    node.daemon.restart();
    assert!(reader.wait().unwrap().success());
}

#[test]
fn privileged_a_container_reads_on_while_the_daemon_is_killed_and_restarted() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22, "");
    let (_, _, reference) = node.publish("app", &bulk_image(8, 16));
    node.proxy.shape(8_000_000, Duration::from_millis(5));
    node.containerd.pull("soci", &reference).unwrap();
    let script = "cd /bulk; echo READY; for i in 1 2 3 4 5 6; do cat * | md5sum || exit 1; sleep 0.5; done > /tmp/sums; \
                  uniq /tmp/sums | wc -l; echo DONE";
    let name = container_name();
    let arguments = ["sh", "-c", script].map(String::from);
    let mut command = node.containerd.run_command("soci", &reference, &name, &arguments);
    let log = node.root.join("container.log");
    let out = std::fs::File::create(&log).unwrap();
    // ctr's own warnings go to standard error, and so do the container's.
    let mut container = command.stdout(out).stderr(std::process::Stdio::null()).spawn().unwrap();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(700));
        node.daemon.crash_and_restart();
    }
    assert!(container.wait().unwrap().success());
    assert_eq!(std::fs::read_to_string(log).unwrap(), "READY\n1\nDONE\n");
    node.containerd.remove_image(&reference);
    node.nothing_is_left();
}

#[test]
fn privileged_a_restart_asks_the_network_for_nothing() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22, "");
    let (layout, _, reference) = node.publish("app", &bulk_image(9, 4));
    node.containerd.pull("soci", &reference).unwrap();
    let sums = node.sums(&reference).unwrap();
    assert_eq!(sums, expected_sums(&slot, &layout));
    node.daemon.stop();
    node.proxy.take_seen();
    node.proxy.down();
    node.daemon.restart();
    assert_eq!(node.sums(&reference).unwrap(), sums);
    assert!(node.proxy.take_seen().is_empty());
}

#[test]
fn privileged_a_container_that_waits_for_us_dies_within_a_second_of_sigkill() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "");
    let (layout, _, reference) = node.publish("app", &bulk_image(10, 8));
    let (_, manifest) = image_manifest(&layout);
    node.proxy.rule(Rule::blobs(Fault::Hang).containing(&manifest.layers[1].digest.to_string()));
    node.containerd.pull("soci", &reference).unwrap();
    let name = container_name();
    let arguments = ["sh", "-c", "echo READY; exec cat /bulk/0005"].map(String::from);
    let mut run = node.containerd.run_command("soci", &reference, &name, &arguments);
    let mut ready = until_ready(&mut run, &["READY"], Duration::from_secs(60)).unwrap();
    std::thread::sleep(Duration::from_millis(500)); // it blocks now
    let start = Instant::now();
    node.containerd.kill(&name);
    ready.child.wait().unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}, of which containerd's own part is a few hundred ms",
        start.elapsed()
    );
}

#[test]
fn privileged_blocked_readers_delay_nobody_else() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "");
    let (_, _, local) = node.publish("local", &bulk_image(11, 2));
    let (layout, _, remote) = node.publish("remote", &bulk_image(12, 32));
    node.containerd.pull("soci", &local).unwrap();
    node.sums(&local).unwrap();
    let (_, manifest) = image_manifest(&layout);
    node.proxy.rule(Rule::blobs(Fault::Hang).containing(&manifest.layers[1].digest.to_string()));
    node.containerd.pull("soci", &remote).unwrap();
    let near = node.containerd.mount("soci", "default", &local, &node.root.join("near"));
    let far = node.containerd.mount("soci", "default", &remote, &node.root.join("far"));
    std::thread::scope(|scope| {
        for reader in 0..200 {
            let path = far.path.join(format!("bulk/{:04}", reader % 32));
            scope.spawn(move || std::fs::read(path));
        }
        std::thread::sleep(Duration::from_secs(1));
        std::fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
        let mut worst = Duration::ZERO;
        for name in ["bulk/0000", "bulk/0001", "bin/busybox"] {
            let start = Instant::now();
            std::fs::read(near.path.join(name)).unwrap();
            worst = worst.max(start.elapsed());
        }
        node.proxy.heal();
        assert!(worst < Duration::from_millis(50), "{worst:?}");
    });
}

#[test]
fn privileged_the_daemon_has_no_capabilities_in_any_thread() {
    let slot = Slot::take();
    let root = slot.root();
    let daemon = Daemon::start(&root, &Settings::default());
    for task in std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let value = |key: &str| {
            status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_else(|| panic!("no {key}")).trim().to_string()
        };
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(value(set), "0000000000000000", "{set}");
        }
        assert_eq!(value("NoNewPrivs:"), "1");
    }
}

#[test]
fn privileged_nothing_stays_mounted_after_unmount() {
    let slot = Slot::take();
    let root = slot.root();
    let mut daemon = Daemon::start(&root, &Settings::default());
    let lazy = daemon.lazy();
    let mounted =
        || std::fs::read_to_string("/proc/self/mounts").unwrap().lines().any(|l| l.split(' ').nth(1) == lazy.to_str());
    assert!(mounted());
    daemon.stop();
    assert!(mounted(), "the mount outlives the daemon");
    let done = attempt(
        std::process::Command::new(env!("CARGO_BIN_EXE_soci-mount")).arg("--root").arg(&daemon.root).arg("--unmount"),
    );
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(!mounted());
}

#[test]
fn privileged_a_container_in_a_user_namespace_sees_its_own_owners_on_every_kind_of_layer() {
    let slot = Slot::take();
    // busybox is small enough to be pulled, the rest is lazy.
    let mixed = "[snapshotter]\nmin_layer_size = 2000000\n";
    for (settings, lazy) in [("", 2), (mixed, 1)] {
        let node = Node::new(&slot, Version::V22, settings);
        let mut top = bulk("bulk", 11, 3);
        top.file("bulk/ours", "of 1000").owner(1000, 1000);
        let (_, layers, reference) = node.publish("app", &Image::new(vec![busybox(), top]));
        node.containerd.rpull("soci", &reference, &["-labels", "nerdctl"]).unwrap();
        assert_eq!((node.daemon.layers().lazy, layers), (lazy, 2), "{settings}");
        let name = container_name();
        let run = |command: &str| {
            let mut ctr = node.containerd.ctr();
            ctr.args(["run", "--rm", "--snapshotter", "soci", "--remap-labels"]);
            ctr.args(["--uidmap", "0:12345:1001", "--gidmap", "0:12345:1001"]);
            let done = attempt(ctr.args([&reference, &name, "sh", "-c", command]));
            assert!(done.status.success(), "{settings}: {}{}", text(&done.stdout), text(&done.stderr));
            text(&done.stdout)
        };
        let inside = run(
            "id -u; stat -c %u:%g /bin/busybox /bulk/ours; echo x > /bulk/new; stat -c %u /bulk/new; cat /proc/self/uid_map",
        );
        let words: Vec<&str> = inside.split_whitespace().collect();
        assert_eq!(words, ["0", "0:0", "1000:1000", "0", "0", "12345", "1001"], "{settings}");
        // containerd has removed the container; what was made for it goes, the image stays.
        node.containerd.run("soci", &reference, &["cat", "/bulk/ours"]).unwrap();
        node.containerd.remove_image(&reference);
        let snapshots = node.daemon.lazy().with_file_name("snapshots");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::fs::read_dir(&snapshots).unwrap().next().is_some() {
            assert!(Instant::now() < deadline, "mapped layers are swept");
            std::thread::sleep(Duration::from_millis(100));
        }
        if settings.is_empty() {
            // (A layer that was pulled instead of being made lazy has been opened ahead, and is kept for a while.)
            node.nothing_is_left();
        }
    }
}
