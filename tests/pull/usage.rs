//! What a snapshot takes on disk: true for every kind.

use super::*;
use std::collections::BTreeMap;

/// Size and inodes by name, as `ctr` shows them to users.
fn usage(node: &Node, snapshotter: &str) -> BTreeMap<String, (u64, u64)> {
    let table = output(node.containerd.ctr().args(["snapshots", "--snapshotter", snapshotter, "usage", "-b"]));
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        let (name, size, inodes) = (words.next()?, words.next()?, words.next()?);
        Some((name.to_string(), (size.parse().ok()?, inodes.parse().ok()?)))
    };
    table.lines().filter_map(row).collect()
}

#[test]
fn privileged_usage_of_pulled_layers_is_what_overlayfs_says_of_them_and_of_lazy_ones_what_they_hold() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let (_, reference) = node.publish_plain("everything", &everything(6));
    node.containerd.pull("soci", &reference).unwrap();
    node.containerd.pull("overlayfs", &reference).unwrap();
    let (ours, theirs) = (usage(&node, "soci"), usage(&node, "overlayfs"));
    assert!(ours.len() >= 3 && ours.keys().eq(theirs.keys()), "{ours:?} {theirs:?}");
    for (name, (size, inodes)) in &ours {
        let (expected, expected_inodes) = theirs[name];
        assert_eq!(*inodes, expected_inodes, "{name}");
        // Filesystems differ by what they have allocated ahead.
        assert!(size.abs_diff(expected) <= expected / 20 + 16_384, "{name}: {size}, not {expected}");
    }
    // A container's own: what it has written.
    let script = "dd if=/dev/urandom of=/root/written bs=1024 count=3000 2>/dev/null; sleep 100";
    let name = crate::support::containerd::container_name();
    let arguments = ["sh", "-c", script].map(String::from);
    let mut child = node.containerd.run_command("soci", &reference, &name, &arguments).spawn().unwrap();
    eventually("it is counted", || usage(&node, "soci").get(&name).is_some_and(|(size, _)| *size >= 3_000_000));
    let (size, inodes) = usage(&node, "soci")[&name];
    assert!(size < 3_500_000 && inodes < 20, "{size} {inodes}");
    node.containerd.kill(&name);
    let _ = child.wait();
    // A lazy one: compressed bytes and tables, growing until all of it is here.
    let (layout, _, lazy) = node.publish("lazy", &Image::new(vec![busybox(), bulk("bulk", 91, 16)]));
    node.proxy.share_line(2_000_000);
    node.containerd.pull("soci", &lazy).unwrap();
    let chain = node.containerd.chain_id("default", &lazy);
    let layer = image_manifest(&layout).1.layers[1].size;
    let early = usage(&node, "soci")[&chain].0;
    node.proxy.share_line(0);
    eventually("it is complete", || usage(&node, "soci")[&chain].0 >= layer);
    let late = usage(&node, "soci")[&chain].0;
    assert!(early < late && late < layer + layer / 4, "{early}, then {late}, of {layer}");
}
