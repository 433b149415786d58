//! What lazy layers leave behind, and what brings them back: restarts, failures in the middle, removal (scenarios I-PL11, I-RN12 to
//! I-RN15, I-PF1).

use super::*;
use crate::support::command::run;
use crate::support::containerd::{Containerd, Options, Version};
use crate::support::daemon::convert;
use crate::support::grpc::{Client, Empty, snapshots};
use crate::support::image::{Form, Image, Layer, noise};
use crate::support::proxy::{Fault, Proxy, Rule, Seen};
use crate::support::registry::{Kind, Registry, blob_path, image_manifest, read_json, soci_index};
use soci::layout::SnapshotId;
use soci::oci::{Digest, Manifest};
use soci::snapshot::label;
use soci::telemetry::catalog::Message;
use std::collections::HashMap;
use std::path::Path;

/// Of each file: large enough for several spans of the size used here.
pub(super) const FILE: usize = 1 << 20;
pub(super) const SPANS: [&str; 4] = ["--min-layer-size", "0", "--span-size", "262144"];
/// A span can only end where a block of the compressed stream does; the lab's compressor makes few.
pub(super) const MEMBERS: Form = Form::GzipMembers(128 << 10);

/// An image of some layers; layer `n` has the file `data/<n>` of [`FILE`] bytes of noise.
pub(super) struct Published {
    pub(super) reference: String,
    pub(super) manifest: Digest,
    pub(super) layers: Vec<Digest>,
    pub(super) layout: PathBuf,
}

pub(super) fn content(n: usize) -> Vec<u8> {
    noise(n as u64 + 1, FILE)
}

/// Made and indexed in the site's directory; whoever wants it elsewhere takes it from there.
pub(super) fn image(site: &Site, layers: usize, reference: &str, more: &[&str]) -> Published {
    image_of(site, layers, reference, MEMBERS, &[&SPANS[..], more].concat())
}

/// The same with other spans.
pub(super) fn image_of(site: &Site, layers: usize, reference: &str, form: Form, flags: &[&str]) -> Published {
    let layer = |n: usize| {
        let mut layer = Layer::new();
        layer.dir("data");
        layer.file(format!("data/{n}"), content(n));
        layer.form(form)
    };
    let (plain, layout) = (site.root.join("plain"), site.root.join("indexed"));
    Image::new((0..layers).map(layer).collect()).write(&plain);
    convert(&plain, &layout, flags);
    let (manifest, read) = image_manifest(&layout);
    let layers = read.layers.iter().map(|l| l.digest).collect();
    Published { reference: reference.into(), manifest, layers, layout }
}

impl Published {
    /// Prepares layer `n` as containerd does before it would download it; true if it need not.
    pub(super) fn prepare(&self, client: &Client, key: &str, n: usize) -> bool {
        let parent = n.checked_sub(1).map_or(String::new(), chain);
        let labels = HashMap::from(
            [
                (label::TARGET, chain(n)),
                (label::IMAGE_REF, self.reference.clone()),
                (label::MANIFEST_DIGEST, self.manifest.to_string()),
                (label::LAYER_DIGEST, self.layers[n].to_string()),
            ]
            .map(|(k, v)| (k.to_owned(), v)),
        );
        match snapshots::prepare(client, key, &parent, labels) {
            Err(status) if status.code() == tonic::Code::AlreadyExists => true,
            Err(status) => panic!("{status}"),
            Ok(_) => false,
        }
    }

    pub(super) fn prepare_all(&self, client: &Client) {
        for n in 0..self.layers.len() {
            assert!(self.prepare(client, &format!("extract-{n}"), n), "layer {n}");
        }
    }
}

pub(super) fn chain(n: usize) -> String {
    format!("chain-{n}")
}

pub(super) fn registry_and_proxy(site: &Site) -> (Registry, Proxy, String) {
    let registry = Registry::start(Kind::Docker28, &site.root);
    let proxy = Proxy::start(&registry.host);
    let config = format!("[[resolver.host.\"{0}\".mirrors]]\nhost = \"http://{0}\"\ninsecure = true\n", proxy.host);
    (registry, proxy, config)
}

pub(super) fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(super) fn cleanup(client: &Client) {
    client.call::<_, Empty>("/containerd.services.snapshots.v1.Snapshots/Cleanup", Empty {}).unwrap();
}

/// Removes what containerd would remove of an image with `layers` layers; nothing of it is left on disk.
pub(super) fn remove_everything(site: &Site, client: &Client, layers: usize) {
    for n in (0..layers).rev() {
        snapshots::remove(client, &chain(n)).unwrap();
    }
    cleanup(client);
    nothing_is_left(site);
}

pub(super) fn nothing_is_left(site: &Site) {
    let layout = site.layout();
    eventually("layers are off the disk", || names(&layout.layers()).is_empty());
    assert_eq!(names(&layout.snapshots()), Vec::<String>::new());
    assert_eq!(names(&layout.lazy()), Vec::<String>::new());
}

#[test]
fn privileged_lazy_layers_survive_a_kill_and_leave_nothing_when_they_are_removed() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = image(&site, 2, &proxy.reference("app", "v1"), &[]);
    registry.push(&image.layout, "app", "v1");
    let running = site.start(&config);
    image.prepare_all(&Client::connect(&site.socket()));
    running.process.kill_9();
    proxy.take_seen();
    let running = site.start(&config);
    let client = Client::connect(&site.socket());
    let layout = site.layout();
    for n in 0..2 {
        let path = layout.snapshot_fs(SnapshotId(n as u32 + 1)).join(format!("data/{n}"));
        assert!(std::fs::read(path).unwrap() == content(n), "layer {n}");
    }
    snapshots::prepare(&client, "container", &chain(1), HashMap::new()).unwrap();
    snapshots::remove(&client, "container").unwrap();
    remove_everything(&site, &client, 2);
    assert_eq!(running.stop(Signal::SIGTERM).0.code(), Some(0));
}

#[test]
fn privileged_of_two_prepares_at_once_one_layer_stays_and_goes_with_its_snapshot() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = image(&site, 1, &proxy.reference("app", "v1"), &[]);
    registry.push(&image.layout, "app", "v1");
    let _running = site.start(&config);
    let client = Client::connect(&site.socket());
    std::thread::scope(|scope| {
        let prepares: Vec<_> = (0..6)
            .map(|i| {
                scope.spawn({
                    let (image, client) = (&image, &client);
                    move || image.prepare(client, &format!("ns-{i}"), 0)
                })
            })
            .collect();
        assert!(prepares.into_iter().all(|p| p.join().unwrap()));
    });
    cleanup(&client);
    assert_eq!((names(&site.layout().snapshots()).len(), names(&site.layout().lazy()).len()), (1, 1));
    remove_everything(&site, &client, 1);
}

#[test]
fn privileged_a_layer_that_could_not_be_restored_comes_back_when_it_is_needed_or_goes_for_good() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let config = format!("mount_timeout_sec = 2\n{config}");
    let image = image(&site, 1, &proxy.reference("app", "v1"), &[]);
    registry.push(&image.layout, "app", "v1");
    let running = site.start(&config);
    image.prepare_all(&Client::connect(&site.socket()));
    let (layout, away) = (site.layout(), site.root.dir("away"));
    let paths = [layout.layer(&image.layers[0]), layout.content().join("blobs/sha256")];
    let hide = || {
        for (i, path) in paths.iter().enumerate() {
            std::fs::rename(path, away.join(i.to_string())).unwrap();
            let _ = std::fs::create_dir(path);
        }
    };
    running.stop(Signal::SIGTERM);
    hide();
    // From where it could be had otherwise.
    proxy.down();
    let running = site.start(&config);
    assert!(running.log().contains(Message::LayerExpected.id()), "{}", running.log());
    let client = Client::connect(&site.socket());
    let refused = snapshots::prepare(&client, "container", &chain(0), HashMap::new()).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    for (i, path) in paths.iter().enumerate() {
        std::fs::remove_dir_all(path).unwrap();
        std::fs::rename(away.join(i.to_string()), path).unwrap();
    }
    eventually("it is tried again", || snapshots::prepare(&client, "container", &chain(0), HashMap::new()).is_ok());
    assert!(running.log().contains("is back"), "{}", running.log());
    proxy.up();
    assert!(std::fs::read(layout.snapshot_fs(SnapshotId(1)).join("data/0")).unwrap() == content(0));
    snapshots::remove(&client, "container").unwrap();

    running.stop(Signal::SIGTERM);
    hide();
    let running = site.start(&config);
    remove_everything(&site, &Client::connect(&site.socket()), 1);
    drop(running);
}

#[test]
fn privileged_a_layer_that_takes_too_long_to_load_lazily_is_pulled_instead_and_the_late_one_undone() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = image(&site, 1, &proxy.reference("app", "v1"), &[]);
    registry.push(&image.layout, "app", "v1");
    proxy.rule(Rule::blobs(Fault::Stall(Duration::from_secs(3))));
    let running = site.start(&format!("mount_timeout_sec = 1\n[http]\nResponseHeaderTimeoutMsec = 60000\n{config}"));
    let client = Client::connect(&site.socket());
    assert!(image.prepare(&client, "extract", 0), "{}", running.log());
    assert!(running.log().contains("timeout waiting for layer"), "{}", running.log());
    let layout = site.layout();
    let index: Manifest = read_json(&blob_path(&image.layout, &soci_index(&image.layout)));
    let ztoc = index.layers[0].digest.to_string();
    let arrived = |seen: &Seen| seen.path.contains(&ztoc) && seen.bytes > 0;
    eventually("the zTOC arrives all the same", || proxy.take_seen().iter().any(arrived));
    eventually("its layer is let go", || names(&layout.layers()).is_empty() && names(&layout.lazy()).is_empty());
    for snapshot in names(&layout.snapshots()) {
        assert!(std::fs::symlink_metadata(layout.snapshots().join(snapshot).join("fs")).unwrap().is_dir());
    }
    snapshots::remove(&client, &chain(0)).unwrap();
    cleanup(&client);
    nothing_is_left(&site);
}

#[test]
fn privileged_an_index_that_only_containerd_has_is_used_where_the_configuration_says_so() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    // No such registry.
    let image = image(&site, 2, "registry.invalid/app:v1", &[]);
    let containerd = Containerd::start(&site.root, Version::V16, &Options::default());
    let archive = site.root.join("image.tar");
    run(Command::new("tar").arg("-C").arg(&image.layout).arg("-cf").arg(&archive).arg("."));
    let name = ["--index-name", &image.reference];
    run(containerd.ctr().args(["images", "import", "--all-platforms", "--no-unpack"]).args(name).arg(&archive));
    let with = |kind: &str| {
        let address = site.root.join("ctd/sock");
        format!(
            "[http]\nMaxRetries = -1\n[content_store]\ntype = '{kind}'\ncontainerd_address = '{}'\n",
            address.display()
        )
    };
    let running = site.start(&with("soci"));
    assert!(!image.prepare(&Client::connect(&site.socket()), "extract", 0), "no registry, no index");
    running.stop(Signal::SIGTERM);
    let running = site.start(&with("containerd"));
    let client = Client::connect(&site.socket());
    image.prepare_all(&client);
    for n in 0..2 {
        let path = site.layout().lazy().join((n + 2).to_string()).join(format!("data/{n}"));
        assert!(std::fs::read(&path).unwrap() == content(n), "{}\n{}", path.display(), running.log());
    }
}

#[test]
fn privileged_what_a_prefetch_artifact_lists_is_fetched_before_anybody_reads_and_nothing_else_is() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let mut layer = Layer::new();
    layer.dir("data");
    for n in 0..8 {
        layer.file(format!("data/{n}"), content(n));
    }
    let (plain, layout) = (site.root.join("plain"), site.root.join("indexed"));
    Image::new(vec![layer.form(MEMBERS)]).write(&plain);
    convert(&plain, &layout, &[&SPANS[..], &["--prefetch-file", "data/5"]].concat());
    let (manifest, read) = image_manifest(&layout);
    let layers = read.layers.iter().map(|l| l.digest).collect();
    let image = Published { reference: proxy.reference("app", "v1"), manifest, layers, layout };
    registry.push(&image.layout, "app", "v1");
    let running = site.start(&format!("[prefetch]\nenable = true\n[background_fetch]\ndisable = true\n{config}"));
    image.prepare_all(&Client::connect(&site.socket()));
    let log = running.log();
    assert!(log.contains("Successfully loaded prefetch artifact with 1 span ranges"), "{log}");
    let blob = site.layout().layer(&image.layers[0]).join("blob");
    let held = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&blob).unwrap()) * 512;
    eventually("the listed spans are here", || held() >= FILE as u64);
    std::thread::sleep(Duration::from_millis(300));
    assert!(held() < 3 * FILE as u64, "only what was listed: {}", held());
    proxy.down();
    let path = site.layout().snapshot_fs(SnapshotId(1)).join("data/5");
    assert!(std::fs::read(path).unwrap() == content(5), "read without the registry");
}
