//! What a layer costs before it is read: time to mount against the number of its files, and memory against the number of layers.

use crate::options::Options;
use crate::report::{Report, table};
use crate::support::daemon::{Daemon, Layers, Settings, convert};
use crate::support::grpc::{Client, snapshots};
use crate::support::image::{Image, Layer, busybox, crowd};
use crate::support::process::Usage;
use crate::support::registry::{Kind, Registry, image_manifest};
use crate::support::slot::{Root, Slot};
use serde_json::json;
use soci::oci::Digest;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Numbers of files in a layer.
const FILES: [usize; 4] = [1_000, 10_000, 100_000, 1_000_000];
/// Layers of the image that is mounted for its memory.
const LAYERS: usize = 100;

struct Lab {
    root: Root,
    registry: Registry,
    daemon: Daemon,
    client: Client,
}

impl Lab {
    fn new(slot: &Slot, options: &Options) -> Lab {
        let root = slot.fresh_root();
        let registry = Registry::start(Kind::Distribution3, &root);
        let settings =
            Settings { more: options.config.clone(), plain_http: vec![registry.host.clone()], ..Default::default() };
        let daemon = Daemon::start(&root, &settings);
        let client = daemon.client();
        Lab { root, registry, daemon, client }
    }

    /// Makes an image of `layers`, indexes it and pushes it; its layout as converted.
    fn publish(&self, name: &str, layers: Vec<Layer>) -> PathBuf {
        let (plain, converted) = (self.root.join(&format!("{name}-plain")), self.root.join(name));
        Image::new(layers).write(&plain);
        convert(&plain, &converted, &["--min-layer-size", "0"]);
        self.registry.push(&converted, name, "v1");
        converted
    }

    /// Prepares a layer as containerd does, under a chain id of our choosing; seconds, if it became lazy.
    fn prepare(&self, name: &str, layout: &Path, layer: usize, parent: &str, chain: &str) -> Option<f64> {
        let (manifest_digest, manifest) = image_manifest(layout);
        let digests: Vec<String> = manifest.layers[layer..].iter().map(|l| l.digest.to_string()).collect();
        let label = |key: &str| format!("containerd.io/snapshot/cri.{key}");
        let labels = HashMap::from([
            (label("image-ref"), self.registry.reference(name, "v1")),
            (label("manifest-digest"), manifest_digest.to_string()),
            (label("layer-digest"), digests[0].clone()),
            (label("image-layers"), digests.iter().take(40).cloned().collect::<Vec<_>>().join(",")),
            ("containerd.io/snapshot.ref".to_string(), chain.to_string()),
        ]);
        let before = self.daemon.layers().lazy;
        let start = Instant::now();
        let answer = snapshots::prepare(&self.client, &format!("extract-{chain}"), parent, labels);
        let took = start.elapsed().as_secs_f64();
        let lazy = answer.is_err_and(|s| s.code() == tonic::Code::AlreadyExists);
        (lazy && self.daemon.layers().lazy > before).then_some(took)
    }

    fn rss(&self) -> Vec<(String, u64)> {
        self.daemon.pids().into_iter().map(|(name, pid)| (name, Usage::of(pid).rss_now_kb)).collect()
    }
}

pub fn measure(options: &Options, report: &mut Report) {
    let slot = Slot::take();
    mount_time(&Lab::new(&slot, options), report);
    memory(&Lab::new(&slot, options), report);
}

fn mount_time(lab: &Lab, report: &mut Report) {
    let mut rows = Vec::new();
    for files in FILES {
        let name = format!("crowd-{files}");
        let layout = lab.publish(&name, vec![crowd(files)]);
        let chain = |which: &str| Digest::of(format!("{name} {which}").as_bytes()).to_string();
        let first = lab.prepare(&name, &layout, 0, "", &chain("first"));
        // The same layer under other names: its TOC is there, what is left is the mount.
        let again: Vec<f64> =
            (0..5).filter_map(|i| lab.prepare(&name, &layout, 0, "", &chain(&i.to_string()))).collect();
        let again = crate::report::median(again);
        report.record(json!({"section": "mount", "files": files, "first": first, "again": again, "rss_kb": lab.daemon.usage().rss_now_kb}));
        let text = first.map_or("not lazy".to_string(), |s| format!("{s:.3} s"));
        rows.push(vec![
            files.to_string(),
            text,
            format!("{:.1} ms", again * 1000.0),
            format!("{} MB", lab.daemon.usage().rss_now_kb / 1024),
        ]);
        eprintln!("{}", rows.last().expect("just pushed").join("  "));
    }
    let head = [
        "files",
        "first Prepare: index, zTOC, TOC, mount (≤ 3 s for the TOC)",
        "again: mount (< 50 ms)",
        "RSS afterwards",
    ]
    .map(String::from);
    report.section(&format!("## Mounting a layer, by its number of files\n\n{}", table(&head, &rows)));
}

fn memory(lab: &Lab, report: &mut Report) {
    let mut rows = Vec::new();
    let mut note = |state: &str, report: &mut Report| {
        std::thread::sleep(Duration::from_secs(2));
        let rss = lab.rss();
        report.record(json!({"section": "memory", "state": state, "rss_kb": rss}));
        let text: Vec<String> = rss.iter().map(|(name, kb)| format!("{name} {:.1} MB", *kb as f64 / 1024.0)).collect();
        eprintln!("{state}: {}", text.join(", "));
        rows.push(vec![state.to_string(), text.join(", ")]);
    };
    note("idle (≤ 20 MB)", report);
    let mut layers = vec![busybox()];
    layers.extend((1..LAYERS).map(|i| {
        let mut layer = Layer::new();
        for f in 0..100 {
            layer.file(format!("layer-{i}/{f}"), format!("file {f} of layer {i}"));
        }
        layer
    }));
    let layout = lab.publish("stack", layers);
    let mut parent = String::new();
    for layer in 0..LAYERS {
        let chain = Digest::of(format!("stack {layer}").as_bytes()).to_string();
        if lab.prepare("stack", &layout, layer, &parent, &chain).is_none() {
            eprintln!("layer {layer} is not lazy: {:?}", lab.daemon.layers());
            break;
        }
        parent = chain;
    }
    let Layers { lazy, .. } = lab.daemon.layers();
    note(&format!("{lazy} lazy layers of 100 files"), report);
    report.section(&format!("## Memory\n\n{}", table(&["state", "RSS"].map(String::from), &rows)));
}
