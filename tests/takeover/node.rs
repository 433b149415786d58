//! A whole node: containerd, whose own metadata names the snapshots, and containers that are started from them.

use super::go::{self, Content};
use crate::support::command::{attempt, output};
use crate::support::containerd::Version;
use crate::support::image::{Image, bulk, busybox};
use crate::support::node::Node;
use crate::support::registry::{blob_path, image_manifest, read_json, soci_index};
use crate::support::slot::{Slot, mounts_below};
use soci::layout::Layout;
use soci::snapshot::Info;
use soci::telemetry::catalog::Message;
use std::collections::HashMap;
use std::time::{Duration, Instant};

struct Taken {
    node: Node,
    lazy: String,
    plain: String,
    /// What a container printed before.
    sums: [String; 2],
    infos: Vec<Info>,
    listed: Vec<String>,
}

/// A node with a lazily loaded image, one that is not, and a container's snapshot with a file in it, left by the Go snapshotter.
fn node(slot: &Slot, content: Content) -> Taken {
    let mut node = Node::new(slot, Version::V22, "mount_timeout_sec = 3\n");
    let (layout, layers, lazy) = node.publish("lazy", &Image::new(vec![busybox(), bulk("bulk", 31, 6)]));
    // No layer of it is at the bottom of the other one, too: what is committed is shared.
    let (_, plain) = node.publish_plain("plain", &Image::new(vec![bulk("bulk", 32, 2), busybox()]));
    for reference in [&lazy, &plain] {
        node.containerd.pull("soci", reference).unwrap();
    }
    assert_eq!(node.daemon.layers().lazy, layers);
    let sums = [&lazy, &plain].map(|reference| node.sums(reference).unwrap());
    // A container that was stopped and will be started again.
    output(node.containerd.ctr().args(["containers", "create", "--snapshotter", "soci", &lazy, "kept"]));
    let listed = listed(&node);
    if content == Content::Nothing {
        // containerd 2.2 has pulled the index along with the image.
        let index = soci_index(&layout);
        let parts: soci::oci::Manifest = read_json(&blob_path(&layout, &index));
        let digests = parts.layers.iter().map(|layer| layer.digest).chain([index]);
        for digest in digests {
            output(node.containerd.ctr().args(["content", "rm", &digest.to_string()]));
        }
    }
    node.daemon.stop();
    let infos = go::leave(&node.daemon.root, &[image_manifest(&layout).0], content);
    assert_eq!(infos.iter().filter(|info| info.is_lazy()).count(), layers);
    Taken { node, lazy, plain, sums, infos, listed }
}

/// Snapshots that containerd knows, but for those of containers that have ended: it removes them when it finds the time.
fn listed(node: &Node) -> Vec<String> {
    node.containerd.snapshots("soci").into_iter().filter(|name| !name.starts_with("lab-")).collect()
}

impl Taken {
    fn layout(&self) -> Layout {
        Layout::new(&self.node.daemon.root)
    }

    /// Everything that containerd knew it finds again.
    fn is_as_it_was(&self) {
        // containerd takes a second to find the daemon again.
        let start = Instant::now();
        let list = || attempt(self.node.containerd.ctr().args(["snapshots", "--snapshotter", "soci", "ls"]));
        while !list().status.success() {
            assert!(start.elapsed() < Duration::from_secs(30), "{}", self.node.daemon.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(listed(&self.node), self.listed);
        let client = self.node.daemon.client();
        for info in self.infos.iter().filter(|info| !info.name.contains("/lab-")) {
            let stat = crate::support::grpc::snapshots::stat(&client, &info.name).unwrap();
            assert_eq!(stat.parent, info.parent.clone().unwrap_or_default());
            assert_eq!(stat.labels, info.labels.clone().into_iter().collect::<HashMap<_, _>>());
        }
        let stale: Vec<_> = mounts_below(&self.layout().snapshots());
        assert_eq!(stale, Vec::<std::path::PathBuf>::new(), "the dead mounts are gone");
    }

    fn eventually_runs(&self) {
        let start = Instant::now();
        loop {
            match self.node.sums(&self.lazy) {
                Ok(sums) => return assert_eq!(sums, self.sums[0]),
                Err(error) => {
                    assert!(start.elapsed() < Duration::from_secs(120), "{error}\n{}", self.node.daemon.log())
                }
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

#[test]
fn privileged_containers_run_from_gos_snapshots_and_what_is_here_needs_no_registry() {
    let slot = Slot::take();
    let mut taken = node(&slot, Content::Artifacts);
    // Index and zTOCs are here, the manifest that names them is in containerd; only spans are missing.
    taken.node.proxy.down();
    taken.node.daemon.restart();
    taken.is_as_it_was();
    assert_eq!(taken.node.sums(&taken.plain).unwrap(), taken.sums[1]);
    let lazy: Vec<&Info> = taken.infos.iter().filter(|info| info.is_lazy()).collect();
    let start = Instant::now();
    while !lazy.iter().all(|info| taken.layout().snapshot_lazy_record(info.id).exists()) {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", taken.node.daemon.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    taken.node.proxy.up();
    taken.eventually_runs();
    // From now on they are as if they had been pulled here.
    taken.node.daemon.crash_and_restart();
    taken.is_as_it_was();
    taken.eventually_runs();
    let log = taken.node.daemon.log();
    assert_eq!(log.matches(Message::TakenOver.id()).count(), 1);
    assert!(!log.contains(Message::NotTakenOver.id()) && !log.contains(Message::LayerNotRestored.id()), "{log}");
    // The container that was made under Go starts.
    let out = output(taken.node.containerd.ctr().args(["snapshots", "--snapshotter", "soci", "mounts", "/x", "kept"]));
    assert!(out.contains("lowerdir="), "{out}");
    output(taken.node.containerd.ctr().args(["containers", "rm", "kept"]));
    for reference in [&taken.lazy, &taken.plain] {
        taken.node.containerd.remove_image(reference);
    }
    assert_eq!(listed(&taken.node), Vec::<String>::new());
    let gone = || std::fs::read_dir(taken.layout().snapshots()).unwrap().count() == 0;
    let start = Instant::now();
    while !gone() {
        assert!(start.elapsed() < Duration::from_secs(60), "directories of removed snapshots stay");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(taken.layout().go_snapshot_db().exists());
}

#[test]
fn privileged_what_cannot_be_had_yet_waits_and_recovers_by_itself() {
    let slot = Slot::take();
    let mut taken = node(&slot, Content::Nothing);
    taken.node.proxy.down();
    taken.node.daemon.restart();
    taken.is_as_it_was();
    // What needs no registry works meanwhile, and what does is refused within its bound.
    assert_eq!(taken.node.sums(&taken.plain).unwrap(), taken.sums[1]);
    let start = Instant::now();
    let refused = taken.node.sums(&taken.lazy).unwrap_err();
    assert!(refused.contains("unavailable") && start.elapsed() < Duration::from_secs(30), "{refused}");
    let start = Instant::now();
    while !taken.node.daemon.log().contains(Message::TakeoverWaits.id()) {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", taken.node.daemon.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    // A restart forgets nothing.
    taken.node.daemon.crash_and_restart();
    taken.node.proxy.up();
    taken.eventually_runs();
    assert!(!taken.node.daemon.log().contains(Message::NotTakenOver.id()));
}
