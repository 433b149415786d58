//! Power cuts: layers that were unpacked and not on disk yet are pulled again. What the kernel had only in its memory is lost by hand here, by emptying
//! files; `make vm-test ARGS=power-cuts` takes the power from a machine.

use super::*;
use crate::support::grpc::snapshots;
use soci::layout::{Layout, SnapshotId};
use soci::snapshot::{Store, label};
use soci::telemetry::catalog::Message;
use std::collections::HashMap;
use std::path::PathBuf;

/// Longer than a daemon rests between two attempts, also on a machine that is busy with other things.
const LATER: Duration = Duration::from_secs(180);

fn layout(node: &Node) -> Layout {
    Layout::new(&node.daemon.root)
}

/// Snapshots that are not known to be on disk, by the records of a daemon that is not running.
fn unwritten(node: &Node) -> Vec<SnapshotId> {
    let store = Store::open(&layout(node).snapshot_db(), 1, None, || Ok(None), || Ok(())).unwrap();
    store.unwritten().unwrap().into_iter().map(|(id, _)| id).collect()
}

/// Pulls the image and kills the daemon before it had the disk written, which a busy machine may make take several turns.
fn pull_and_kill(node: &mut Node, reference: &str, layers: usize) {
    for _ in 0..20 {
        node.containerd.pull("soci", reference).unwrap();
        node.daemon.kill();
        if unwritten(node).len() == layers {
            return;
        }
        node.daemon.restart();
        node.containerd.remove_image(reference);
        eventually("the image is gone", || node.containerd.snapshots("soci").is_empty());
    }
    panic!("the disk was always faster");
}

/// Regular files below `path`.
fn files(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).into_iter().flatten() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files(&entry.path()));
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    found
}

/// Empties every file of every snapshot.
fn lose_what_was_not_written(node: &Node) {
    let files = files(&layout(node).snapshots());
    assert!(!files.is_empty());
    for file in files {
        std::fs::File::options().write(true).open(file).unwrap().set_len(0).unwrap();
    }
}

fn lower(options: &[String]) -> Vec<PathBuf> {
    let list = options.iter().find_map(|option| option.strip_prefix("lowerdir=")).unwrap();
    list.split(':').map(PathBuf::from).collect()
}

#[test]
fn privileged_layers_that_were_not_on_disk_when_the_power_failed_are_pulled_again_before_anybody_sees_them() {
    let slot = Slot::take();
    // Fewer attempts than by default: what cannot be had is to fail soon.
    let mut node = Node::new(&slot, Version::V22, &format!("{FALLBACK}[blob]\nmax_retries = 1\n"));
    let mut implied = Layer::new();
    implied.file("tmp/below-a-sticky-directory", "its parent is in the lowest layer");
    let image = Image::new(vec![busybox(), bulk("bulk", 61, 3), implied]);
    let (plain, reference) = node.publish_plain("app", &image);
    pull_and_kill(&mut node, &reference, 3);
    lose_what_was_not_written(&node);
    node.proxy.down();
    node.daemon.power_failed();
    assert!(node.daemon.log().contains(Message::LayersLost.id()), "{}", node.daemon.log());
    let refused = node.sums(&reference).unwrap_err();
    assert!(refused.contains("was not on disk yet when the machine went down"), "{refused}");
    // Each attempt is many requests.
    let start = Instant::now();
    while !node.daemon.log().contains(Message::LayerStillLost.id()) {
        assert!(start.elapsed() < LATER, "the journal does not say why: {}", node.daemon.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    node.proxy.up();
    let start = Instant::now();
    while let Err(error) = node.sums(&reference) {
        assert!(start.elapsed() < LATER, "{error}");
    }
    assert_eq!(differences(&node, &plain, &reference), Vec::<String>::new());
    // What is there is written, also at a stop: the next power cut costs nothing.
    node.daemon.stop();
    assert_eq!(unwritten(&node), []);
    node.proxy.take_seen();
    node.daemon.power_failed();
    node.sums(&reference).unwrap();
    assert!(node.proxy.take_seen().iter().all(|seen| !seen.path.contains("/blobs/")));
    node.containerd.remove_image(&reference);
    nothing_is_left(&node);
}

#[test]
fn privileged_without_anybody_asking_lost_layers_come_back_and_what_runs_no_more_can_be_removed() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22, FALLBACK);
    let (_, reference) = node.publish_plain("app", &app(62, 3));
    pull_and_kill(&mut node, &reference, 2);
    lose_what_was_not_written(&node);
    let before = unwritten(&node);
    node.daemon.power_failed();
    let here = |node: &Node| files(&layout(node).snapshots()).iter().any(|file| file.ends_with("bin/busybox"));
    let full = |node: &Node| {
        let files = files(&layout(node).snapshots());
        !files.is_empty()
            && files.iter().filter(|file| file.ends_with("bin/busybox")).all(|file| file.metadata().unwrap().len() > 0)
    };
    eventually("the layers are here", || here(&node) && full(&node));
    eventually("what was lost is swept", || {
        before.iter().all(|id| !layout(&node).snapshot(*id).exists()) && directories(&node) == 2
    });
    node.containerd.remove_image(&reference);
    nothing_is_left(&node);
    // One that is removed before it was had again.
    pull_and_kill(&mut node, &reference, 2);
    node.proxy.down();
    node.daemon.power_failed();
    node.containerd.remove_image(&reference);
    nothing_is_left(&node);
}

#[test]
fn privileged_copies_for_a_user_namespace_are_made_again_with_what_they_were_made_of() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22, FALLBACK);
    let (_, reference) = node.publish_plain("app", &app(63, 1));
    let labels: HashMap<String, String> =
        [label::UID_MAPPING, label::GID_MAPPING].map(|key| (key.to_owned(), "0:70000:65536".to_owned())).into();
    for turn in 0.. {
        assert!(turn < 20, "the disk was always faster");
        node.containerd.pull("soci", &reference).unwrap();
        let top = node.containerd.chain_id("default", &reference);
        snapshots::prepare(&node.daemon.client(), "in-a-namespace", &top, labels.clone()).unwrap();
        node.daemon.kill();
        if unwritten(&node).len() == 4 {
            break;
        }
        node.daemon.restart();
        snapshots::remove(&node.daemon.client(), "in-a-namespace").unwrap();
        node.containerd.remove_image(&reference);
        eventually("the image is gone", || node.containerd.snapshots("soci").is_empty());
    }
    lose_what_was_not_written(&node);
    node.daemon.power_failed();
    let mounts = snapshots::mounts(&node.daemon.client(), "in-a-namespace").unwrap();
    let lower = lower(&mounts[0].options);
    assert_eq!(lower.len(), 2);
    let busybox = lower[1].join("bin/busybox").metadata().unwrap();
    assert!(busybox.len() > 0);
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&busybox), 70_000);
    // And are found the next time.
    assert_eq!(snapshots::mounts(&node.daemon.client(), "in-a-namespace").unwrap(), mounts);
    snapshots::remove(&node.daemon.client(), "in-a-namespace").unwrap();
    node.containerd.remove_image(&reference);
    nothing_is_left(&node);
}

#[test]
fn privileged_what_containerd_has_unpacked_is_pulled_again_where_its_labels_name_it() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22, "");
    let (_, reference) = node.publish_plain("app", &app(64, 3));
    pull_and_kill(&mut node, &reference, 2);
    assert_eq!(node.daemon.layers().local, 0);
    lose_what_was_not_written(&node);
    node.daemon.power_failed();
    assert!(node.daemon.log().contains(Message::LayersLost.id()), "{}", node.daemon.log());
    node.sums(&reference).unwrap();
    node.containerd.remove_image(&reference);
    nothing_is_left(&node);
}
