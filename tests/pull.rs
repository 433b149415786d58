//! Layers that arrive whole (scenarios I-PF-*, I-PP*, I-PM6): through real containerds, a real registry, and one that misbehaves.

mod link;
mod parts;
mod sharing;
mod usage;
mod written;

use crate::support::command::{attempt, output, text};
use crate::support::containerd::{Containerd, Options, Version};
use crate::support::daemon::{Layers, convert};
use crate::support::grpc::cri;
use crate::support::image::{Form, Image, Layer, bulk, busybox, everything, noise};
use crate::support::node::Node;
use crate::support::proxy::{Fault, Rule};
use crate::support::registry::{Kind, Registry, blob_path, image_manifest};
use crate::support::slot::Slot;
use crate::support::tree;
use std::path::Path;
use std::time::{Duration, Instant};

const FALLBACK: &str = "[pull_modes.parallel_pull_unpack]\nparallel_pull_as_fallback = true\n";

fn local(layers: usize) -> Layers {
    Layers { local: layers, ..Layers::default() }
}

/// What the fallback leaves in the log: lazy loading was tried first.
fn fallen_back(layers: usize) -> Layers {
    Layers { local: layers, failed: layers, ..Layers::default() }
}

fn app(seed: u64, megabytes: usize) -> Image {
    Image::new(vec![busybox(), bulk("bulk", seed, megabytes)])
}

/// Differences between what overlayfs of the same containerd shows of the image and what we do.
fn differences(node: &Node, layout: &Path, reference: &str) -> Vec<String> {
    let ours = {
        let mount = node.containerd.mount("soci", "default", reference, &node.root.join("ours"));
        tree::read(&mount.path)
    };
    let theirs = {
        node.containerd.pull("overlayfs", reference).unwrap();
        let mount = node.containerd.mount("overlayfs", "default", reference, &node.root.join("theirs"));
        tree::read(&mount.path)
    };
    let free = tree::implied_directories(&tree::names_in_layers(layout));
    tree::differences(&theirs, &ours, &free)
}

/// Waits for what happens by itself.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(40), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn directories(node: &Node) -> usize {
    let layout = soci::layout::Layout::new(&node.daemon.root);
    std::fs::read_dir(layout.snapshots()).unwrap().count()
}

/// What is left of a node that has pulled and removed everything: nothing.
fn nothing_is_left(node: &Node) {
    node.nothing_is_left();
    eventually("workers are gone", || {
        node.daemon.pids().iter().filter(|(name, _)| name.contains("custodian")).count() <= 2
    });
}

#[test]
fn privileged_an_image_without_index_is_pulled_here_and_equals_the_unpacked_one_file_by_file() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let image = everything(4);
    let (layout, reference) = node.publish_plain("everything", &image);
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.daemon.layers(), fallen_back(image.layers.len()));
    assert_eq!(node.containerd.run("soci", &reference, &["cat", "/stack/replaced"]).unwrap(), "from above\n");
    assert_eq!(differences(&node, &layout, &reference), Vec::<String>::new());
    node.containerd.remove_image(&reference);
    assert_eq!(node.containerd.snapshots("soci"), Vec::<String>::new());
    nothing_is_left(&node);
}

#[test]
fn privileged_which_layers_are_lazy_local_or_containerds_follows_the_configuration() {
    let slot = Slot::take();
    let enable = "[pull_modes.parallel_pull_unpack]\nenable = true\n";
    let both = format!("{FALLBACK}enable = true\n");
    let discard = format!("{FALLBACK}discard_unpacked_layers = true\n");
    // Settings, whether the image has an index, and what becomes of its two layers.
    let cases: [(&str, &str, bool, Layers); 7] = [
        ("nothing", "", false, Layers { deferred: 2, failed: 2, ..Layers::default() }),
        ("fallback, index", FALLBACK, true, Layers { lazy: 2, ..Layers::default() }),
        ("fallback, no index", FALLBACK, false, fallen_back(2)),
        ("fallback, no index, discard", &discard, false, fallen_back(2)),
        ("enable, index", enable, true, local(2)),
        ("enable, no index", enable, false, local(2)),
        ("both, index", &both, true, local(2)),
    ];
    for (name, settings, indexed, expected) in cases {
        let node = Node::new(&slot, Version::V22, settings);
        let image = app(20, 2);
        let reference = match indexed {
            true => node.publish("app", &image).2,
            false => node.publish_plain("app", &image).1,
        };
        node.containerd.pull("soci", &reference).unwrap();
        assert_eq!(node.daemon.layers(), expected, "{name}");
        let searched = node.daemon.log().contains("fetching SOCI artifacts using index descriptor");
        assert_eq!(searched, expected.lazy > 0, "{name}");
        node.sums(&reference).unwrap();
        assert!(
            node.daemon.metrics().contains("local_mount_failure_count{layer=\"\"} 0") || {
                // The series exists from its first use on.
                !node.daemon.metrics().contains("local_mount_failure_count")
            }
        );
    }
}

#[test]
fn privileged_layers_of_an_indexed_image_that_have_no_ztoc_are_pulled_here_without_any_setting() {
    let slot = Slot::take();
    for version in [Version::V22, Version::V16] {
        let node = Node::new(&slot, version, "");
        let mut small = Layer::new();
        small.file("small/one", noise(1, 300_000));
        let mut implied = Layer::new();
        implied.file("tmp/below-a-sticky-directory", "its parent is in the lowest layer");
        let image = Image::new(vec![busybox(), small, bulk("bulk", 21, 4), implied]);
        let (plain, indexed) = (node.root.join("plain"), node.root.join("sparse"));
        image.write(&plain);
        convert(&plain, &indexed, &["--min-layer-size", "500000"]);
        node.registry.push(&indexed, "sparse", "v1");
        let reference = node.proxy.reference("sparse", "v1");
        let expected = Layers { lazy: 2, local: 2, failed: 2, deferred: 0 };
        if version == Version::V16 {
            cri::pull(&node.containerd.cri(), &reference).unwrap();
            assert_eq!(node.daemon.layers(), expected, "{version:?}");
            continue;
        }
        node.containerd.pull("soci", &reference).unwrap();
        assert_eq!(node.daemon.layers(), expected, "{version:?}");
        assert_eq!(differences(&node, &plain, &reference), Vec::<String>::new());
        node.containerd.remove_image(&reference);
        nothing_is_left(&node);
    }
}

#[test]
fn privileged_cri_and_the_labels_of_ctr_remote_and_nerdctl_pull_here_too() {
    let slot = Slot::take();
    for version in [Version::V16, Version::V22] {
        let node = Node::new(&slot, version, FALLBACK);
        let (_, reference) = node.publish_plain("app", &app(22, 3));
        let client = node.containerd.cri();
        cri::pull(&client, &reference).unwrap();
        assert_eq!(node.daemon.layers(), fallen_back(2), "{version:?}");
        let pod = cri::Pod::run(&client, "app", &reference, &["/bin/sleep", "1000"], &node.root.dir("logs")).unwrap();
        let (code, out, err) = pod.exec(&["/bin/sh", "-c", "cat /bulk/* | wc -c"]).unwrap();
        assert_eq!((code, text(&out).trim()), (0, "3145728"), "{version:?}: {}", text(&err));
        drop(pod);
        // Another image: the layers of the first are here, under names that all namespaces share.
        let (_, second) = node.publish_plain("second", &app(23, 3));
        for labels in [["-labels", "containerd"], ["-labels", "nerdctl"]] {
            node.containerd.rpull("soci", &second, &labels).unwrap();
            node.sums(&second).unwrap();
            node.containerd.remove_image(&second);
        }
    }
}

#[test]
fn privileged_every_form_of_a_layer_arrives_and_so_does_one_that_a_program_decompresses() {
    let slot = Slot::take();
    let forms = [Form::Gzip, Form::GzipMembers(100_000), Form::Tar, Form::Zstd];
    let gzip =
        "[pull_modes.parallel_pull_unpack.decompress_streams.gzip]\npath = \"/bin/gzip\"\nargs = [\"-d\", \"-c\"]\n";
    let zstd = "[pull_modes.parallel_pull_unpack.decompress_streams.zstd]\npath = \"/usr/bin/zstd\"\nargs = [\"-d\", \"-c\"]\n";
    for more in [String::new(), format!("concurrent_download_chunk_size = \"1000000b\"\n{gzip}{zstd}")] {
        let node = Node::new(&slot, Version::V22, &format!("{FALLBACK}max_concurrent_unpacks_per_image = 3\n{more}"));
        for (at, form) in forms.into_iter().enumerate() {
            // No two of them have a layer in common, or it would be here already.
            let mut first = busybox();
            first.file("etc/form", format!("{form:?}"));
            let image = Image::new(vec![first.form(form), bulk("bulk", 240 + at as u64, 5).form(form)]);
            let (layout, reference) = node.publish_plain(&format!("form-{at}"), &image);
            node.containerd.pull("soci", &reference).unwrap();
            assert_eq!(node.daemon.layers().deferred, 0, "{form:?}");
            assert_eq!(differences(&node, &layout, &reference), Vec::<String>::new(), "{form:?}");
        }
        assert_eq!(node.daemon.layers(), fallen_back(8));
        if !more.is_empty() {
            let (longest, _) = node
                .proxy
                .take_seen()
                .iter()
                .filter_map(|s| s.range.clone())
                .fold((0, 0), |(l, n), r| (l.max(r.end - r.start), n + 1));
            assert!(longest <= 1_000_000, "{longest}");
        }
    }
}

#[test]
fn privileged_what_containerd_has_is_not_fetched_and_what_is_fetched_it_gets() {
    let slot = Slot::take();
    let node = Node::with_content(&slot, Version::V22, FALLBACK, "type = \"containerd\"\n");
    let (layout, reference) = node.publish_plain("kept", &app(25, 6));
    let (_, manifest) = image_manifest(&layout);
    let layers: Vec<String> = manifest.layers.iter().map(|l| l.digest.to_string()).collect();
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.daemon.layers(), fallen_back(2));
    eventually("containerd has the layers", || layers.iter().all(|l| node.containerd.content().contains(l)));
    let leases = || output(node.containerd.ctr().args(["leases", "ls", "-q"]));
    assert!(leases().contains("soci-pull-"), "{}", leases());
    // Nothing of it is collected while the image is there, or the lease holds it.
    let _ = attempt(node.containerd.ctr().args(["content", "prune", "references"]));
    assert!(layers.iter().all(|l| node.containerd.content().contains(l)));
    for layer in &layers {
        output(node.containerd.ctr().args(["content", "get", layer]));
    }
    // The same layers for another snapshotter: nobody fetches anything.
    node.proxy.take_seen();
    node.containerd.pull("overlayfs", &reference).unwrap();
    let fetched = |seen: Vec<crate::support::proxy::Seen>| {
        seen.into_iter().filter(|s| layers.iter().any(|l| s.path.contains(l.as_str()))).map(|s| s.bytes).sum::<u64>()
    };
    assert_eq!(fetched(node.proxy.take_seen()), 0);
    output(node.containerd.ctr().args(["images", "rm", "--sync", &reference]));
    eventually("the lease has ended", || !leases().contains("soci-pull-"));
    eventually("the layers are gone", || {
        let _ = attempt(node.containerd.ctr().args(["content", "prune", "references"]));
        node.containerd.content().is_empty()
    });
    // And the other way round.
    node.containerd.pull("overlayfs", &reference).unwrap();
    node.proxy.take_seen();
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(fetched(node.proxy.take_seen()), 0);
    node.sums(&reference).unwrap();
}

#[test]
fn privileged_registries_that_misbehave_are_put_up_with() {
    let slot = Slot::take();
    let image = app(26, 12);
    let layout = slot.root().join("faulty");
    image.write(&layout);
    let (_, manifest) = image_manifest(&layout);
    let layer = manifest.layers[1].digest.to_string();
    let on = |fault: Fault, times: u64| Rule::blobs(fault).containing(&layer).times(times);
    let later = 1_000_000..u64::MAX;
    let ranged = |fault: Fault| Rule::blobs(fault).containing(&layer).overlapping(later.clone()).times(10_000);
    let cases: [(&str, Vec<Rule>); 12] = [
        ("5xx bursts", vec![on(Fault::Status(503), 4), on(Fault::Status(500), 2)]),
        ("429 with Retry-After", vec![on(Fault::RetryAfter(429, 1), 2)]),
        ("truncated bodies", vec![on(Fault::Truncate(70_000), 3)]),
        ("a corrupted body", vec![on(Fault::Corrupt(50_000), 1)]),
        ("corrupted bodies", vec![on(Fault::Corrupt(50_000), 2)]),
        ("resets", vec![on(Fault::Reset(100_000), 3)]),
        ("a stall", vec![on(Fault::Stall(Duration::from_secs(2)), 1)]),
        ("redirects that expire", vec![on(Fault::Redirect(Duration::from_millis(100)), 1_000)]),
        ("200 instead of 206", vec![on(Fault::WholeBlob, 10_000)]),
        ("ranges that were not asked for", vec![ranged(Fault::WrongRange(512))]),
        ("416 for ranges", vec![ranged(Fault::Status(416))]),
        ("403 for ranges", vec![ranged(Fault::Status(403))]),
    ];
    for (name, rules) in cases {
        let node = Node::new(&slot, Version::V22, FALLBACK);
        let (_, reference) = node.publish_plain("faulty", &image);
        rules.into_iter().for_each(|rule| node.proxy.rule(rule));
        node.containerd.pull("soci", &reference).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(node.daemon.layers(), fallen_back(2), "{name}");
        assert_eq!(node.sums(&reference).unwrap().lines().count(), 12, "{name}");
        if name.contains("ranges") || name.contains("200") {
            assert!(node.daemon.log().contains("does not serve ranges of blobs"), "{name}");
        }
    }
}

#[test]
fn privileged_content_that_does_not_match_is_refused_by_us_and_then_by_containerd() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    // A configuration that names another diff ID.
    let (layout, _) = node.publish_plain("honest", &app(27, 2));
    let (_, manifest) = image_manifest(&layout);
    let config = std::fs::read_to_string(blob_path(&layout, &manifest.config.digest)).unwrap();
    let lying = node.root.join("lying");
    let diff_id = &config[config.rfind("sha256:").unwrap()..][..71];
    let other = soci::oci::Digest::of(b"something else").to_string();
    rewrite(&layout, &lying, &config.replace(diff_id, &other));
    node.registry.push(&lying, "lying", "v1");
    let error = node.containerd.pull("soci", &node.proxy.reference("lying", "v1")).unwrap_err();
    assert!(error.contains("diff") || error.contains("digest"), "{error}");
    let log = node.daemon.log();
    assert!(log.contains("uncompressed digests did not match"), "{}", log);
    assert_eq!(node.daemon.layers().local, 1, "the honest layer");
    // A layer that never arrives whole: the pull fails, and leaves nothing.
    let (layout, reference) = node.publish_plain("broken", &app(28, 2));
    let (_, manifest) = image_manifest(&layout);
    let rule = Rule::blobs(Fault::Corrupt(1000)).containing(&manifest.layers[1].digest.to_string());
    node.proxy.rule(rule.times(100_000));
    node.containerd.pull("soci", &reference).unwrap_err();
    assert!(node.daemon.log().contains("compressed digests did not match"));
    node.proxy.heal();
    std::thread::sleep(Duration::from_secs(16)); // failures are believed for a while
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.sums(&reference).unwrap().lines().count(), 2);
}

/// The layout `from` with another image configuration, as `to`.
fn rewrite(from: &Path, to: &Path, config: &str) {
    use soci::oci::{Descriptor, Index, media_type};
    output(std::process::Command::new("cp").arg("-r").arg(from).arg(to));
    let (_, mut manifest) = image_manifest(from);
    let put = |media_type: &str, bytes: &[u8]| {
        let descriptor = Descriptor::of(media_type, bytes);
        std::fs::write(blob_path(to, &descriptor.digest), bytes).unwrap();
        descriptor
    };
    manifest.config = put(media_type::OCI_CONFIG, config.as_bytes());
    let new = put(media_type::OCI_MANIFEST, &manifest.to_canonical_json());
    let mut index: Index = crate::support::registry::read_json(&from.join("index.json"));
    (index.manifests[0].digest, index.manifests[0].size) = (new.digest, new.size);
    std::fs::write(to.join("index.json"), index.to_canonical_json()).unwrap();
}

#[test]
fn privileged_a_daemon_that_dies_during_a_pull_leaves_nothing_that_the_next_one_does_not_clean() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22, FALLBACK);
    let (layout, reference) = node.publish_plain("app", &app(29, 16));
    node.proxy.shape(3_000_000, Duration::from_millis(5));
    std::thread::scope(|scope| {
        let containerd = &node.containerd;
        let pull = scope.spawn(|| containerd.pull("soci", &reference));
        std::thread::sleep(Duration::from_secs(2));
        node.daemon.kill();
        // containerd asks a dead socket; whatever it says, it says it.
        let _ = pull.join().unwrap();
    });
    node.daemon.restart();
    eventually("what was begun is swept", || directories(&node) <= node.containerd.snapshots("soci").len());
    node.proxy.shape(0, Duration::ZERO);
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(differences(&node, &layout, &reference), Vec::<String>::new());
    node.containerd.remove_image(&reference);
    nothing_is_left(&node);
}

#[test]
fn privileged_fifty_pulls_of_one_image_fetch_it_once_and_those_that_are_cancelled_harm_nobody() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let (layout, reference) =
        node.publish_plain("popular", &Image::new(vec![busybox(), bulk("bulk", 30, 6), bulk("more", 31, 4)]));
    let (_, manifest) = image_manifest(&layout);
    node.proxy.shape(6_000_000, Duration::from_millis(2));
    let before = descriptors(&node);
    std::thread::scope(|scope| {
        let (containerd, reference) = (&node.containerd, reference.as_str());
        for number in 0..50u64 {
            scope.spawn(move || {
                let namespace = format!("n{}", number % 5);
                let mut command = containerd.ctr();
                command.args(["-n", &namespace, "images", "pull", "--plain-http", "--snapshotter", "soci", reference]);
                match number % 3 {
                    // Cut off somewhere in the middle.
                    0 => cancelled(&mut command, Duration::from_millis(200 + number * 37)),
                    _ => {
                        let done = attempt(&mut command);
                        assert!(done.status.success(), "{number}: {}", text(&done.stderr));
                    }
                }
            });
        }
        let daemon = &node.daemon;
        scope.spawn(move || kill_workers(daemon, Duration::from_secs(3)));
    });
    assert!(node.daemon.log().matches("starting soci-snapshotter-grpc").count() == 1, "it did not crash");
    for layer in &manifest.layers {
        let name = layer.digest.to_string();
        let bytes: u64 = node.proxy.take_seen().iter().filter(|s| s.path.contains(&name)).map(|s| s.bytes).sum();
        assert!(bytes <= layer.size * 4, "{name}: {bytes} of {}", layer.size);
    }
    for namespace in 0..5 {
        let namespace = format!("n{namespace}");
        let mount = node.containerd.mount("soci", &namespace, &reference, &node.root.join(&namespace));
        assert_eq!(std::fs::read_dir(mount.path.join("bulk")).unwrap().count(), 6);
        assert!(std::fs::read(mount.path.join("bulk/0000")).unwrap().len() == 1 << 20);
    }
    end_leases_of_the_dead(&node, &["n0", "n1", "n2", "n3", "n4"]);
    for namespace in 0..5 {
        let namespace = format!("n{namespace}");
        output(node.containerd.ctr().args(["-n", &namespace, "images", "rm", "--sync", &reference]));
    }
    settled(&node, before);
}

#[test]
fn privileged_fifty_images_at_once_with_cancels_dead_workers_and_collection_all_arrive() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let images: Vec<String> = (0..50u64)
        .map(|number| {
            let mut own = Layer::new();
            for file in 0..20 {
                own.file(format!("own/{file}"), noise(number * 100 + file, 20_000)).owner(1000, 1000);
            }
            own.dir("own/private").mode(0o700).owner(1000, 1000);
            // The lowest layer is the same for all.
            node.publish_plain(&format!("image-{number}"), &Image::new(vec![bulk("base", 99, 1), own])).1
        })
        .collect();
    let before = descriptors(&node);
    std::thread::scope(|scope| {
        for (number, reference) in images.iter().enumerate() {
            let containerd = &node.containerd;
            scope.spawn(move || {
                let mut command = containerd.ctr();
                command.args(["images", "pull", "--plain-http", "--snapshotter", "soci", reference]);
                if number % 5 == 0 {
                    return cancelled(&mut command, Duration::from_millis(100 + number as u64 * 20));
                }
                let done = attempt(&mut command);
                assert!(done.status.success(), "{number}: {}", text(&done.stderr));
                if number % 7 == 0 {
                    output(containerd.ctr().args(["images", "rm", "--sync", reference]));
                }
            });
        }
        let (daemon, containerd) = (&node.daemon, &node.containerd);
        scope.spawn(move || kill_workers(daemon, Duration::from_secs(4)));
        scope.spawn(move || {
            for _ in 0..10 {
                let _ = attempt(containerd.ctr().args(["content", "prune", "references"]));
                std::thread::sleep(Duration::from_millis(200));
            }
        });
    });
    for (number, reference) in images.iter().enumerate().filter(|(n, _)| n % 5 != 0 && n % 7 != 0) {
        let mount = node.containerd.mount("soci", "default", reference, &node.root.join(&format!("m{number}")));
        for file in 0..20 {
            let content = std::fs::read(mount.path.join(format!("own/{file}"))).unwrap();
            assert!(content == noise(number as u64 * 100 + file, 20_000), "{reference} {file}");
        }
    }
    end_leases_of_the_dead(&node, &["default"]);
    for reference in output(node.containerd.ctr().args(["images", "ls", "-q"])).lines() {
        output(node.containerd.ctr().args(["images", "rm", "--sync", reference]));
    }
    settled(&node, before);
}

/// Starts `command` and kills it after a while.
fn cancelled(command: &mut std::process::Command, after: Duration) {
    let null = std::process::Stdio::null;
    let mut child = command.stdin(null()).stdout(null()).stderr(null()).spawn().unwrap();
    std::thread::sleep(after);
    let _ = child.kill();
    let _ = child.wait();
}

/// Kills processes that unpack, one after another, for a while. The custodian itself is left alone: it is the oldest.
fn kill_workers(daemon: &crate::support::daemon::Daemon, during: Duration) {
    let permanent: Vec<u32> = daemon.pids().into_iter().map(|(_, pid)| pid).collect();
    let start = Instant::now();
    while start.elapsed() < during {
        for (name, pid) in daemon.pids() {
            if name.contains("custodian") && !permanent.contains(&pid) {
                let _ =
                    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL);
                break;
            }
        }
        std::thread::sleep(Duration::from_millis(150));
    }
}

fn descriptors(node: &Node) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", node.daemon.pid())).unwrap().count()
}

/// Ends the leases of clients that were killed: containerd would keep what they pulled for a day.
fn end_leases_of_the_dead(node: &Node, namespaces: &[&str]) {
    for namespace in namespaces {
        let leases = output(node.containerd.ctr().args(["-n", namespace, "leases", "ls", "-q"]));
        for lease in leases.lines().filter(|l| !l.starts_with("soci-")) {
            let _ = attempt(node.containerd.ctr().args(["-n", namespace, "leases", "rm", lease]));
        }
    }
}

/// After everything was removed: no directory, no worker, no mount, no lease, no descriptor is left.
fn settled(node: &Node, descriptors_before: usize) {
    // What a cancelled pull has left in containerd goes with its next collection.
    eventually("snapshots are gone", || {
        let _ = attempt(node.containerd.ctr().args(["content", "prune", "references"]));
        directories(node) == 0
    });
    nothing_is_left(node);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let root = node.daemon.root.display().to_string();
    assert_eq!(mounts.lines().filter(|l| l.contains(&root)).count(), 1, "the lazy mount alone");
    // Connections that are kept for the next request, and containerd's.
    eventually("descriptors are closed", || descriptors(node) <= descriptors_before + 40);
    let leases = output(node.containerd.ctr().args(["leases", "ls", "-q"]));
    assert!(!leases.contains("soci-"), "{leases}");
}

#[test]
fn privileged_bad_settings_end_the_start_with_what_is_wrong() {
    let slot = Slot::take();
    let root = slot.root();
    for (table, expected) in [
        ("max_concurrent_downloads = 2\nmax_concurrent_downloads_per_image = 5", "global download limit less than"),
        ("[pull_modes.parallel_pull_unpack.decompress_streams.gzip]\npath = \"/nowhere/unpigz\"", "/nowhere/unpigz"),
        ("[pull_modes.parallel_pull_unpack.decompress_streams.gzip]\npath = \"/tmp\"", "not a file"),
        ("concurrent_download_chunk_size = '1000m'", "invalid size format: 1000m"),
    ] {
        let config = root.join("config.toml");
        std::fs::write(&config, format!("{FALLBACK}{table}\n")).unwrap();
        let mut daemon = std::process::Command::new(env!("CARGO_BIN_EXE_soci-snapshotter-grpc"));
        daemon.arg("--root").arg(root.join("r")).arg("--address").arg(root.join("s")).arg("--config").arg(&config);
        let done = attempt(&mut daemon);
        assert!(!done.status.success(), "{table}");
        let said = format!("{}{}", text(&done.stdout), text(&done.stderr));
        assert!(said.contains(expected), "{table}: {said}");
        let unmount = attempt(
            std::process::Command::new(env!("CARGO_BIN_EXE_soci-mount"))
                .arg("--root")
                .arg(root.join("r"))
                .arg("--unmount"),
        );
        drop(unmount);
    }
}

#[test]
fn privileged_what_is_pulled_here_reads_the_same_in_another_containerd() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let (layout, reference) = node.publish_plain("app", &app(33, 3));
    node.containerd.pull("soci", &reference).unwrap();
    let root = slot.root();
    let registry = Registry::start(Kind::Docker28, &root);
    registry.push(&layout, "oracle", "v1");
    let oracle = Containerd::start(&root, Version::V16, &Options::default());
    oracle.pull("overlayfs", &registry.reference("oracle", "v1")).unwrap();
    let sums = oracle.run("overlayfs", &registry.reference("oracle", "v1"), &["sh", "-c", "cd /bulk && md5sum *"]);
    assert_eq!(node.sums(&reference).unwrap(), sums.unwrap());
}
