//! A layer that is inflated in parts: with many members, with what an earlier pull has left, with a zTOC; and with lies of all of them.

use super::*;
use crate::support::daemon::Settings;

/// A node that says in how many parts a layer was inflated.
fn node(slot: &Slot, more: &str) -> Node {
    let settings = Settings { more: more.into(), log_level: "debug".into(), ..Settings::default() };
    Node::with_settings(slot, Version::V22, settings)
}

/// Parts that helpers made of the layers pulled so far, of those of at least so many megabytes.
fn parts(node: &Node, megabytes: u64) -> Vec<u64> {
    let log = node.daemon.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let inflated = lines.filter(|line| line["msg"] == "layer inflated" || line["message"] == "layer inflated");
    let number = |value: &serde_json::Value| {
        value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok())).expect("a number")
    };
    inflated.filter(|line| number(&line["bytes"]) >= megabytes << 20).map(|line| number(&line["parts"])).collect()
}

/// Checkpoints that are kept.
fn kept(node: &Node) -> Vec<std::path::PathBuf> {
    let layout = soci::layout::Layout::new(&node.daemon.root);
    let entries = std::fs::read_dir(layout.checkpoints()).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn privileged_a_layer_that_is_pulled_again_is_inflated_in_parts_and_wrong_checkpoints_change_nothing() {
    let slot = Slot::take();
    let mut node = node(&slot, FALLBACK);
    let (layout, reference) = node.publish_plain("fat", &app(40, 36));
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(parts(&node, 30), [0], "nothing is known of it");
    let files = kept(&node);
    let [file] = files.as_slice() else { panic!("{files:?}") };
    let good = std::fs::read(file).unwrap();
    assert!(good.len() > 5 * 32_768 && good.len() < 40 * 32_768, "{}", good.len());
    node.containerd.remove_image(&reference);
    nothing_is_left(&node);
    // The next daemon knows them too.
    node.daemon.stop();
    node.daemon.restart();
    node.containerd.pull("soci", &reference).unwrap();
    let seen = parts(&node, 30);
    assert!(seen[1] > 0, "{seen:?}");
    assert_eq!(differences(&node, &layout, &reference), Vec::<String>::new());
    // Windows, positions, bits; and checkpoints of something else.
    let record = 17 + 32_768;
    type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
    let damages: [Damage<'_>; 4] = [
        &|bytes| (1..bytes.len() / record).for_each(|n| bytes[12 + n * record + 17 + 20_000] ^= 0xff),
        &|bytes| (1..bytes.len() / record).for_each(|n| bytes[12 + n * record] ^= 0x10),
        &|bytes| (1..bytes.len() / record).for_each(|n| bytes[12 + n * record + 16] ^= 1),
        &|bytes| bytes.truncate(100_000),
    ];
    for damage in damages {
        node.containerd.remove_image(&reference);
        nothing_is_left(&node);
        let mut bad = good.clone();
        damage(&mut bad);
        std::fs::write(file, &bad).unwrap();
        node.containerd.pull("soci", &reference).unwrap();
        assert_eq!(node.sums(&reference).unwrap().lines().count(), 36);
        assert_eq!(node.daemon.layers().deferred, 0, "no pull had to be left to containerd");
    }
    assert!(!node.daemon.log().contains("pulling the layer again"), "lies are seen before they do harm");
}

#[test]
fn privileged_a_layer_of_many_members_and_one_with_a_ztoc_are_inflated_in_parts_the_first_time() {
    let slot = Slot::take();
    let node = node(&slot, "[pull_modes.parallel_pull_unpack]\nenable = true\n");
    let members = Image::new(vec![busybox(), bulk("bulk", 41, 30).form(Form::GzipMembers(700_000))]);
    let (layout, reference) = node.publish_plain("members", &members);
    node.containerd.pull("soci", &reference).unwrap();
    let seen = parts(&node, 20);
    assert!(seen[0] > 0, "{seen:?}");
    assert!(kept(&node).is_empty(), "they can be found again");
    assert_eq!(differences(&node, &layout, &reference), Vec::<String>::new());
    drop(node);
    // The same layer in two images: loaded lazily with the one, pulled with the other.
    let node = self::node(&slot, FALLBACK);
    let (_, _, lazy) = node.publish("lazy", &app(42, 36));
    node.containerd.pull("soci", &lazy).unwrap();
    assert_eq!(node.daemon.layers(), Layers { lazy: 2, ..Layers::default() });
    let mut other = busybox();
    other.file("etc/other", "so that the names of the snapshots differ");
    let (layout, eager) = node.publish_plain("eager", &Image::new(vec![other, bulk("bulk", 42, 36)]));
    node.containerd.pull("soci", &eager).unwrap();
    let seen = parts(&node, 30);
    assert!(seen[0] > 0, "{seen:?}");
    assert_eq!(differences(&node, &layout, &eager), Vec::<String>::new());
}
