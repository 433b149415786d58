//! An index that lies about its layer, from the pull to the day after, with a real containerd; and what is left of images that were removed.

use crate::support::{
    command::{attempt, text},
    containerd::Version,
    daemon::{Layers, convert},
    image::{Image, Layer, busybox, prose},
    node::Node,
    registry::{blob_path, image_manifest, read_json, soci_index},
    slot::Slot,
};
use soci::{
    layout::Layout,
    oci::{Digest, Manifest, annotation},
    ztoc::{Limits, Ztoc},
};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const FILES: u64 = 4;

fn words(n: u64) -> Vec<u8> {
    prose(n + 1, 1 << 20)
}

/// An image whose second layer has text in several spans that refer back across their beginnings.
fn image() -> Image {
    let mut layer = Layer::new();
    layer.dir("words");
    for n in 0..FILES {
        layer.file(format!("words/{n}"), words(n));
    }
    Image::new(vec![busybox(), layer])
}

/// Makes it, with an index: its layout.
fn indexed(node: &Node, name: &str) -> PathBuf {
    let (plain, layout) = (node.root.join(&format!("{name}-plain")), node.root.join(name));
    image().write(&plain);
    convert(&plain, &layout, &["--min-layer-size", "0", "--span-size", "65536"]);
    layout
}

/// Changes the zTOC of the second layer, in place, and everything in the layout that has its digest.
fn forge(layout: &Path, change: impl FnOnce(&mut [u8])) -> Digest {
    let (_, manifest) = image_manifest(layout);
    let layer = manifest.layers[1].digest;
    let index: Manifest = read_json(&blob_path(layout, &soci_index(layout)));
    let of =
        |entry: &soci::oci::Descriptor| entry.annotations.get(annotation::LAYER_DIGEST) == Some(&layer.to_string());
    let ztoc = index.layers.iter().find(|entry| of(entry)).expect("a zTOC of the layer").digest;
    let mut bytes = fs::read(blob_path(layout, &ztoc)).unwrap();
    change(&mut bytes);
    let forged = Digest::of(&bytes);
    assert_ne!(forged, ztoc);
    fs::write(blob_path(layout, &forged), bytes).unwrap();
    let mut renamed = vec![(ztoc.hex(), forged.hex())];
    let mut next = 0;
    while let Some((old, new)) = renamed.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let Ok(document) = String::from_utf8(fs::read(&path).unwrap()) else { continue };
            if document.starts_with('{') && document.contains(&old) {
                // Digests are all of one length, so sizes are as they were.
                let document = document.replace(&old, &new);
                let before = path.file_name().unwrap().to_str().unwrap().to_owned();
                let after = Digest::of(document.as_bytes());
                fs::remove_file(&path).unwrap();
                fs::write(blob_path(layout, &after), document).unwrap();
                renamed.push((before, after.hex()));
            }
        }
    }
    let top = layout.join("index.json");
    let document = renamed.iter().fold(fs::read_to_string(&top).unwrap(), |text, (old, new)| text.replace(old, new));
    fs::write(top, document).unwrap();
    layer
}

/// Every file of the zTOC gets the bits of set-user-ID.
fn other_modes(ztoc: &mut [u8]) {
    let (from, to) = (0o644u64.to_le_bytes(), 0o4755u64.to_le_bytes());
    let places: Vec<usize> = (0..ztoc.len() - 8).filter(|at| ztoc[*at..*at + 8] == from).collect();
    assert_eq!(places.len() as u64, FILES);
    places.into_iter().for_each(|at| ztoc[at..at + 8].copy_from_slice(&to));
}

fn other_windows(ztoc: &mut [u8]) {
    let spans = Ztoc::parse(ztoc, &Limits::default()).unwrap().into_spans().spans;
    assert!(spans.len() > 3, "{} spans", spans.len());
    for span in &spans {
        // Letters become other letters.
        ztoc[span.window.clone()].iter_mut().for_each(|byte| *byte ^= 1);
    }
}

fn within(limit: Duration, what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

const SOON: Duration = Duration::from_secs(60);

fn soci(node: &Node, words: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soci"));
    text(&attempt(command.args(words).arg("--daemon").arg(&node.daemon.socket)).stdout)
}

/// `words/0` where a container would find it: in the one lazy layer that has it.
fn first_file(node: &Node) -> PathBuf {
    let lazy = node.daemon.lazy();
    let places = fs::read_dir(&lazy).unwrap().map(|entry| entry.unwrap().path().join("words/0"));
    places.into_iter().find(|place| place.exists()).expect("it is mounted")
}

fn is_refused(file: &File) -> bool {
    let error = |result: std::io::Result<usize>| result.err().and_then(|error| error.raw_os_error());
    error(file.read_at(&mut [0; 4096], 0)) == Some(nix::libc::EIO)
}

#[test]
fn privileged_an_index_that_lies_ends_the_reads_and_the_image_comes_back_without_it() {
    let slot = Slot::take();
    type Lie = fn(&mut [u8]);
    let lies: [(&str, Lie, &str); 2] =
        [("modes", other_modes, "the mode 4755, the layer 0644"), ("windows", other_windows, "")];
    for (name, lie, expected) in lies {
        let mut node = Node::new(&slot, Version::V22, "");
        let layout = indexed(&node, name);
        let layer = forge(&layout, lie);
        node.registry.push(&layout, name, "v1");
        let reference = node.proxy.reference(name, "v1");
        node.containerd.pull("soci", &reference).unwrap();
        assert_eq!(node.daemon.layers(), Layers { lazy: 2, ..Layers::default() }, "{name}");
        // A program that has the file open, and has read it.
        let open = File::open(first_file(&node)).unwrap();
        let _ = open.read_at(&mut [0; 4096], 0);

        within(SOON, "it is found out", || node.daemon.log().contains("is not what its SOCI index says"));
        let log = node.daemon.log();
        let line = log.lines().find(|line| line.contains("is not what its SOCI index says")).unwrap();
        for part in [layer.to_string().as_str(), reference.as_str(), expected] {
            assert!(line.contains(part), "{name}: {part:?} in {line}");
        }
        within(SOON, "what the kernel has kept goes, too", || is_refused(&open));
        assert!(node.daemon.metrics().contains("index_contradiction_count"));
        let status = soci(&node, &["status"]);
        assert!(status.contains("INDEX IS WRONG") && status.contains(expected), "{status}");
        assert!(soci(&node, &["status", "--json"]).contains("\"condemned\""));
        let refused = node.containerd.run("soci", &reference, &["true"]).unwrap_err();
        assert!(refused.contains("SOCI index is wrong"), "{refused}");

        node.daemon.crash_and_restart();
        assert!(is_refused(&open), "{name}: after a restart");
        assert!(is_refused(&File::open(first_file(&node)).unwrap()), "{name}: after a restart");
        assert!(node.containerd.run("soci", &reference, &["true"]).is_err());
        drop(open);

        node.containerd.remove_image(&reference);
        let before = node.daemon.layers();
        node.containerd.pull("soci", &reference).unwrap();
        let after = node.daemon.layers();
        assert_eq!((after.lazy - before.lazy, after.local - before.local), (1, 1), "{name}: {after:?}");
        assert!(node.daemon.log().contains("index-wrong"), "{name}");
        let listed = node.containerd.run("soci", &reference, &["sh", "-c", "md5sum /words/*; stat -c %a /words/0"]);
        let oracle = node.root.dir(&format!("{name}-oracle"));
        for n in 0..FILES {
            fs::write(oracle.join(n.to_string()), words(n)).unwrap();
        }
        let sums = attempt(Command::new("sh").arg("-c").arg("md5sum *; echo 644").current_dir(&oracle));
        assert_eq!(listed.unwrap().replace("/words/", ""), text(&sums.stdout), "{name}");
        node.containerd.remove_image(&reference);
    }
}

#[test]
fn privileged_what_is_honest_is_verified_and_stays_so() {
    let slot = Slot::take();
    let mut node = Node::new(&slot, Version::V22, "");
    let layout = indexed(&node, "honest");
    node.registry.push(&layout, "honest", "v1");
    let reference = node.proxy.reference("honest", "v1");
    node.containerd.pull("soci", &reference).unwrap();
    let verified = |node: &Node| soci(node, &["status", "--json"]).matches("\"verified\": true").count();
    within(SOON, "both layers are verified", || verified(&node) == 2);
    let verdict = |digest: &Digest| Layout::new(&node.daemon.root).layer(digest).join("verdict");
    let written = |path: &Path| fs::metadata(path).unwrap().ino();
    let (_, manifest) = image_manifest(&layout);
    let files: Vec<PathBuf> = manifest.layers.iter().map(|layer| verdict(&layer.digest)).collect();
    let before: Vec<u64> = files.iter().map(|path| written(path)).collect();
    node.daemon.crash_and_restart();
    assert_eq!(verified(&node), 2, "at once, from what is on disk");
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(files.iter().map(|path| written(path)).collect::<Vec<_>>(), before, "nothing was examined again");
    node.containerd.run("soci", &reference, &["cat", "/words/0"]).unwrap();
    node.containerd.remove_image(&reference);
}

#[test]
fn privileged_removing_an_image_removes_its_index_and_leaves_that_of_another() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, "");
    let blobs = Layout::new(&node.daemon.root).content().join("blobs/sha256");
    let here = |digest: &Digest| blobs.join(digest.hex()).exists();
    let count = || fs::read_dir(&blobs).map_or(0, Iterator::count);
    let published: Vec<(PathBuf, String)> = [("one", 3), ("two", 4)]
        .into_iter()
        .map(|(name, seed)| {
            // Nothing is shared: a layer that stays keeps the index that it came by.
            let mut layer = busybox();
            layer.file("text", prose(seed, 1 << 20));
            let (layout, _, reference) = node.publish(name, &Image::new(vec![layer]));
            (layout, reference)
        })
        .collect();
    let indexes: Vec<Digest> = published.iter().map(|(layout, _)| soci_index(layout)).collect();
    for (_, reference) in &published {
        node.containerd.pull("soci", reference).unwrap();
    }
    assert!(indexes.iter().all(here));
    let (one, two) = (&published[0].1, &published[1].1);
    node.containerd.remove_image(one);
    within(SOON, "the index of the removed image is gone", || !here(&indexes[0]));
    assert!(here(&indexes[1]), "the other is in use");
    node.containerd.run("soci", two, &["cat", "/text"]).unwrap();
    // It comes back as lazily as it came.
    let before = node.daemon.layers().lazy;
    node.containerd.pull("soci", one).unwrap();
    assert!(here(&indexes[0]) && node.daemon.layers().lazy > before);
    node.containerd.run("soci", one, &["cat", "/text"]).unwrap();
    node.containerd.remove_image(one);
    node.containerd.remove_image(two);
    within(SOON, "nothing is left", || count() == 0);
}
