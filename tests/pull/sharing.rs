//! Pulls that share their work, and what becomes of work that nobody wants any more.

use super::*;
use std::process::Child;

/// Bytes of each layer that came from the registry.
fn fetched(node: &Node, layout: &Path) -> Vec<(u64, u64)> {
    let seen = node.proxy.take_seen();
    let (_, manifest) = image_manifest(layout);
    let bytes = |name: String| seen.iter().filter(|s| s.path.contains(&name)).map(|s| s.bytes).sum();
    manifest.layers.iter().map(|layer| (bytes(layer.digest.to_string()), layer.size)).collect()
}

fn pull_in(node: &Node, namespace: &str, reference: &str) -> Child {
    let mut command = node.containerd.ctr();
    command.args(["-n", namespace, "images", "pull", "--plain-http", "--snapshotter", "soci", reference]);
    let null = std::process::Stdio::null;
    command.stdin(null()).stdout(null()).stderr(null()).spawn().unwrap()
}

#[test]
fn privileged_pulls_of_one_image_in_several_namespaces_fetch_each_layer_once() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let image = Image::new(vec![busybox(), bulk("bulk", 50, 5), bulk("more", 51, 5)]);
    let (layout, reference) = node.publish_plain("shared", &image);
    node.proxy.share_line(8_000_000);
    let pulls: Vec<Child> =
        ["a", "b", "c", "d"].iter().map(|namespace| pull_in(&node, namespace, &reference)).collect();
    for mut pull in pulls {
        assert!(pull.wait().unwrap().success());
    }
    for (bytes, size) in fetched(&node, &layout) {
        // Connections are opened with requests for single bytes.
        assert!((size..size + 100).contains(&bytes), "{bytes} of {size}");
    }
    for namespace in ["a", "b", "c", "d"] {
        let mount = node.containerd.mount("soci", namespace, &reference, &node.root.join(namespace));
        assert_eq!(std::fs::read_dir(mount.path.join("more")).unwrap().count(), 5);
    }
}

#[test]
fn privileged_a_layer_that_two_images_have_above_different_ones_is_fetched_once() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let published: Vec<_> = (0..2)
        .map(|number| {
            let mut below = busybox();
            below.file("etc/number", format!("{number}"));
            node.publish_plain(&format!("image-{number}"), &Image::new(vec![below, bulk("bulk", 52, 16)]))
        })
        .collect();
    node.proxy.share_line(6_000_000);
    let mut first = pull_in(&node, "default", &published[0].1);
    // The second comes when some of it has gone by.
    std::thread::sleep(Duration::from_millis(1000));
    let mut second = pull_in(&node, "other", &published[1].1);
    assert!(first.wait().unwrap().success() && second.wait().unwrap().success());
    let (bytes, size) = fetched(&node, &published[0].0)[1];
    eprintln!("{bytes} of {size}");
    assert!(bytes < size * 17 / 10, "{bytes} of {size}: only what had gone by is fetched again");
    for (namespace, (_, reference)) in ["default", "other"].iter().zip(&published) {
        let mount = node.containerd.mount("soci", namespace, reference, &node.root.join(namespace));
        let read: usize = std::fs::read_dir(mount.path.join("bulk"))
            .unwrap()
            .map(|entry| std::fs::read(entry.unwrap().path()).unwrap().len())
            .sum();
        assert_eq!(read, 16 << 20);
    }
    assert_eq!(node.daemon.layers().deferred, 0);
}

#[test]
fn privileged_an_image_with_the_same_layer_twice_fetches_it_once() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let image = Image::new(vec![busybox(), bulk("bulk", 53, 8), bulk("more", 54, 2), bulk("bulk", 53, 8)]);
    let (layout, reference) = node.publish_plain("twice", &image);
    node.proxy.share_line(6_000_000);
    node.containerd.pull("soci", &reference).unwrap();
    let (bytes, size) = fetched(&node, &layout)[1];
    assert!(bytes < size * 3 / 2, "{bytes} of {size}");
    assert_eq!(node.daemon.layers(), fallen_back(4));
    assert_eq!(differences(&node, &layout, &reference), Vec::<String>::new());
}

/// Waits until nothing more comes from the registry; how long that took.
fn quiet(node: &Node) -> Duration {
    let start = Instant::now();
    loop {
        node.proxy.take_most_at_once();
        std::thread::sleep(Duration::from_millis(600));
        if node.proxy.take_most_at_once() == 0 && node.proxy.at_once() == 0 {
            return start.elapsed();
        }
        assert!(start.elapsed() < Duration::from_secs(30), "it goes on and on");
    }
}

#[test]
fn privileged_what_a_cancelled_pull_has_begun_is_given_up_at_once_and_another_pull_of_it_goes_on() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let image = Image::new(vec![busybox(), bulk("bulk", 55, 24), bulk("more", 56, 24), bulk("most", 57, 24)]);
    let (_, reference) = node.publish_plain("cancelled", &image);
    node.proxy.share_line(2_000_000);
    let mut pull = pull_in(&node, "default", &reference);
    eventually("layers are coming", || node.proxy.at_once() > 2);
    pull.kill().unwrap();
    pull.wait().unwrap();
    let took = quiet(&node);
    eprintln!("quiet after {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    eventually("what was begun is gone", || directories(&node) <= node.containerd.snapshots("soci").len());
    // Of two, the one that is left gets all of it.
    let mut first = pull_in(&node, "default", &reference);
    let mut second = pull_in(&node, "other", &reference);
    eventually("layers are coming", || node.proxy.at_once() > 2);
    first.kill().unwrap();
    first.wait().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(node.proxy.at_once() > 0, "the other one goes on");
    node.proxy.share_line(0);
    assert!(second.wait().unwrap().success());
    let mount = node.containerd.mount("soci", "other", &reference, &node.root.join("other"));
    assert_eq!(std::fs::read_dir(mount.path.join("most")).unwrap().count(), 24);
    end_leases_of_the_dead(&node, &["default"]);
}

#[test]
fn privileged_collections_during_a_pull_take_nothing_of_it_from_containerd_and_leave_nothing_there() {
    let slot = Slot::take();
    let node = Node::with_content(&slot, Version::V22, FALLBACK, "type = \"containerd\"\n");
    let image = Image::new(vec![busybox(), bulk("bulk", 65, 8), bulk("more", 66, 8)]);
    let (layout, reference) = node.publish_plain("collected", &image);
    let (_, manifest) = image_manifest(&layout);
    let layers: Vec<String> = manifest.layers.iter().map(|layer| layer.digest.to_string()).collect();
    node.proxy.share_line(3_000_000);
    let mut cut_off = pull_in(&node, "other", &reference);
    let mut pull = pull_in(&node, "default", &reference);
    let mut collections = 0;
    while pull.try_wait().unwrap().is_none() {
        for namespace in ["default", "other"] {
            let _ = attempt(node.containerd.ctr().args(["-n", namespace, "content", "prune", "references"]));
        }
        collections += 1;
        if collections == 4 {
            let _ = cut_off.kill();
        }
        std::thread::sleep(Duration::from_millis(150));
    }
    assert!(pull.wait().unwrap().success());
    let _ = cut_off.wait();
    assert!(collections > 5, "{collections}");
    eventually("containerd has all layers", || layers.iter().all(|l| node.containerd.content().contains(l)));
    let _ = attempt(node.containerd.ctr().args(["content", "prune", "references"]));
    assert!(layers.iter().all(|l| node.containerd.content().contains(l)));
    node.sums(&reference).unwrap();
    // When the image goes, so does everything, in both namespaces.
    end_leases_of_the_dead(&node, &["default", "other"]);
    for namespace in ["default", "other"] {
        let _ = attempt(node.containerd.ctr().args(["-n", namespace, "images", "rm", "--sync", &reference]));
    }
    let left = |namespace: &str| {
        let _ = attempt(node.containerd.ctr().args(["-n", namespace, "content", "prune", "references"]));
        let content = output(node.containerd.ctr().args(["-n", namespace, "content", "ls", "-q"]));
        let active = output(node.containerd.ctr().args(["-n", namespace, "content", "active"]));
        let leases = output(node.containerd.ctr().args(["-n", namespace, "leases", "ls", "-q"]));
        content.lines().count() + active.lines().skip(1).count() + leases.lines().count()
    };
    eventually("nothing is left in containerd", || left("default") + left("other") == 0);
    eventually("nor here", || directories(&node) == 0);
}

#[test]
fn privileged_removing_an_image_gives_up_what_only_it_needed() {
    use crate::support::grpc::snapshots;
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let image = Image::new(vec![busybox(), bulk("bulk", 58, 24), bulk("more", 59, 24)]);
    let (layout, reference) = node.publish_plain("removed", &image);
    let (manifest, document) = image_manifest(&layout);
    let config: serde_json::Value = crate::support::registry::read_json(&blob_path(&layout, &document.config.digest));
    let chain = config["rootfs"]["diff_ids"][0].as_str().unwrap().to_string();
    node.proxy.share_line(2_000_000);
    // As a client does that is about to prepare the other layers, and then is told to remove the image.
    let labels = [
        ("containerd.io/snapshot.ref", chain.clone()),
        ("containerd.io/snapshot/cri.image-ref", reference.clone()),
        ("containerd.io/snapshot/cri.manifest-digest", manifest.to_string()),
        ("containerd.io/snapshot/cri.layer-digest", document.layers[0].digest.to_string()),
    ];
    let labels = labels.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    let client = node.daemon.client();
    let answer = snapshots::prepare(&client, "extract-1", "", labels).unwrap_err();
    assert_eq!(answer.code(), tonic::Code::AlreadyExists, "{answer}");
    eventually("the other layers are coming", || node.proxy.at_once() > 1);
    snapshots::remove(&client, &chain).unwrap();
    let took = quiet(&node);
    assert!(took < Duration::from_secs(15), "{took:?}");
    eventually("what was begun is gone", || directories(&node) == 0);
}
