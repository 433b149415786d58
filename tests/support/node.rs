//! A node: registry, daemon and containerd, as the end-to-end tests use them.

use super::containerd::{Containerd, Options, Version};
use super::daemon::{Daemon, Settings, convert};
use super::image::{Image, pause};
use super::proxy::Proxy;
use super::registry::{Kind, Registry};
use super::slot::{Root, Slot};
use soci::layout::Layout;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Directories go with containerd's cleanup or with our own sweep, which comes some seconds later.
const GONE_WITHIN: Duration = Duration::from_secs(20);

/// A registry (behind a proxy that may misbehave), our daemon, and a containerd that uses it.
///
/// Dropped in this order: containerd before the snapshotter it uses, the registry last.
pub struct Node {
    pub containerd: Containerd,
    pub daemon: Daemon,
    pub proxy: Proxy,
    pub registry: Registry,
    pub root: Root,
}

impl Node {
    pub fn new(slot: &Slot, version: Version, more: &str) -> Node {
        Node::with_content(slot, version, more, "")
    }

    /// As [`Node::new`], with `content` in the table `content_store`.
    pub fn with_content(slot: &Slot, version: Version, more: &str, content: &str) -> Node {
        let settings = Settings { more: more.to_string(), content_store: content.to_string(), ..Settings::default() };
        Node::with_settings(slot, version, settings)
    }

    /// As [`Node::new`]; the registry and containerd are added to `settings`.
    pub fn with_settings(slot: &Slot, version: Version, settings: Settings) -> Node {
        let root = slot.root();
        let registry = Registry::start(Kind::Docker28, &root);
        let proxy = Proxy::start(&registry.host);
        let settings =
            Settings { plain_http: vec![proxy.host.clone()], containerd: Some(root.join("ctd/sock")), ..settings };
        let daemon = Daemon::start(&root, &settings);
        let pause_layout = root.join("pause");
        pause().write(&pause_layout);
        registry.push(&pause_layout, "pause", "v1");
        let options = Options {
            soci: Some(daemon.socket.clone()),
            pause: Some(proxy.reference("pause", "v1")),
            plain_http: vec![proxy.host.clone()],
            ..Options::default()
        };
        let containerd = Containerd::start(&root, version, &options);
        Node { containerd, daemon, proxy, registry, root }
    }

    /// Makes `image`, indexes every layer of it and pushes it: its layout, its number of layers and what to pull.
    pub fn publish(&self, name: &str, image: &Image) -> (PathBuf, usize, String) {
        let (plain, indexed) = (self.root.join(&format!("{name}-plain")), self.root.join(name));
        image.write(&plain);
        convert(&plain, &indexed, &["--min-layer-size", "0"]);
        self.registry.push(&indexed, name, "v1");
        (indexed, image.layers.len(), self.proxy.reference(name, "v1"))
    }

    /// Pushes `image` as it is, without an index: its layout and what to pull.
    pub fn publish_plain(&self, name: &str, image: &Image) -> (PathBuf, String) {
        let layout = self.root.join(name);
        image.write(&layout);
        self.registry.push(&layout, name, "v1");
        (layout, self.proxy.reference(name, "v1"))
    }

    /// To be called when all images and containers were removed. Panics unless nothing of them is left, soon: snapshots, leases, directories of
    /// snapshots and layers, descriptors of the daemon.
    pub fn nothing_is_left(&self) {
        let layout = Layout::new(&self.daemon.root);
        let names = |directory: PathBuf| -> Vec<String> {
            let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            entries.map(|entry| entry.path().display().to_string()).collect()
        };
        let left = || {
            let mut left = names(layout.layers());
            left.extend(names(layout.snapshots()));
            left.extend(self.containerd.snapshots("soci").into_iter().map(|key| format!("snapshot {key}")));
            left.extend(self.containerd.leases());
            left.extend(self.daemon.left_open());
            left
        };
        let start = Instant::now();
        while !left().is_empty() && start.elapsed() < GONE_WITHIN {
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(left(), Vec::<String>::new(), "of images that were removed");
    }

    /// `md5sum` of every file below /bulk, run in a container.
    pub fn sums(&self, reference: &str) -> Result<String, String> {
        self.containerd.run("soci", reference, &["sh", "-c", "cd /bulk && md5sum *"])
    }
}
