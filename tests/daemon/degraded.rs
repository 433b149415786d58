//! A daemon that cannot start properly still serves: what is mounted is read, what is new is refused with the reason, status and journal say so, and
//! what heals heals by itself.

use super::*;
use crate::support::command::{output, run};
use crate::support::daemon::convert;
use crate::support::grpc::{Client, snapshots};
use crate::support::image::{Form, Image, Layer, noise};
use crate::support::proxy::Proxy;
use crate::support::registry::{Kind, Registry, image_manifest};
use serde_json::Value;
use soci::layout::SnapshotId;
use soci::snapshot::label;
use soci::telemetry::catalog::Message;
use std::collections::HashMap;

const SOCI: &str = env!("CARGO_BIN_EXE_soci");
const FILE: usize = 4 << 20;

/// A daemon that has one lazy layer, on a slow link, so that most of it has still to come.
struct Lazy {
    running: Option<Running>,
    _registry: Registry,
    proxy: Proxy,
    config: String,
    site: Site,
}

impl Lazy {
    fn new(slot: &Slot, prepare: impl FnOnce(&Site)) -> Lazy {
        let site = Site::new(slot);
        prepare(&site);
        let registry = Registry::start(Kind::Docker28, &site.root);
        let proxy = Proxy::start(&registry.host);
        let config = format!("[[resolver.host.\"{0}\".mirrors]]\nhost = \"http://{0}\"\ninsecure = true\n", proxy.host);
        let mut layer = Layer::new();
        layer.file("data", noise(5, FILE));
        let (plain, layout) = (site.root.join("plain"), site.root.join("indexed"));
        Image::new(vec![layer.form(Form::GzipMembers(128 << 10))]).write(&plain);
        convert(&plain, &layout, &["--min-layer-size", "0", "--span-size", "262144"]);
        registry.push(&layout, "app", "v1");
        let (manifest, read) = image_manifest(&layout);
        let running = site.start(&config);
        proxy.shape(1_000_000, Duration::ZERO);
        let labels = [
            (label::TARGET, "chain-0".to_owned()),
            (label::IMAGE_REF, proxy.reference("app", "v1")),
            (label::MANIFEST_DIGEST, manifest.to_string()),
            (label::LAYER_DIGEST, read.layers[0].digest.to_string()),
        ];
        let labels: HashMap<String, String> = labels.map(|(k, v)| (k.to_owned(), v)).into();
        let status = snapshots::prepare(&Client::connect(&site.socket()), "extract", "", labels).unwrap_err();
        assert_eq!(status.code(), tonic::Code::AlreadyExists, "{status}");
        Lazy { running: Some(running), _registry: registry, proxy, config, site }
    }

    fn kill(&mut self) {
        self.running.take().unwrap().process.kill_9();
        // What is read from now on is read from the next daemon.
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
    }

    fn start(&mut self, config: &str) -> &Running {
        let running = self.site.start(config);
        self.running.insert(running)
    }

    fn log(&self) -> String {
        self.running.as_ref().unwrap().log()
    }

    /// All of the layer, most of which comes through the network.
    fn reads(&self) {
        self.proxy.shape(0, Duration::ZERO);
        let path = self.site.layout().snapshot_fs(SnapshotId(1)).join("data");
        assert!(std::fs::read(path).unwrap() == noise(5, FILE));
    }

    fn prepare(&self, key: &str) -> Result<(), tonic::Status> {
        snapshots::prepare(&Client::connect(&self.site.socket()), key, "chain-0", HashMap::new()).map(drop)
    }

    /// A container cannot be started, and its client hears why.
    fn refuses(&self, why: &str) {
        let status = self.prepare("container").unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
        assert!(status.message().contains("takes nothing new") && status.message().contains(why), "{status}");
    }

    fn status(&self) -> Value {
        let text = output(Command::new(SOCI).args(["status", "--json", "--daemon"]).arg(self.site.socket()));
        serde_json::from_str(&text).unwrap()
    }

    fn says(&self, reason: &str, why: &str) {
        let status = self.status();
        assert_eq!(status["state"], "degraded", "{status}");
        assert_eq!(status["trouble"]["reason"], reason, "{status}");
        assert!(status["trouble"]["error"].as_str().unwrap().contains(why), "{status}");
        assert!(self.log().contains(Message::Degraded.id()), "{}", self.log());
    }

    fn heals(&self) {
        let start = Instant::now();
        while self.prepare("later").is_err() {
            assert!(start.elapsed() < Duration::from_secs(30), "{}", self.log());
            std::thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(self.status()["state"], "serving");
        assert!(self.log().contains(Message::DegradedOver.id()), "{}", self.log());
    }
}

#[test]
fn privileged_with_a_broken_configuration_the_last_good_settings_serve_what_is_mounted() {
    let slot = Slot::take();
    let mut lazy = Lazy::new(&slot, |_| {});
    for broken in ["mount_timeout_sec = nonsense\n", "max_concurrency = 'many'\n"] {
        lazy.kill();
        lazy.start(broken);
        lazy.says("config", "config.toml:1:");
        lazy.refuses("config.toml:1:");
    }
    // A good file is taken without another restart.
    std::fs::write(lazy.site.root.join("config.toml"), &lazy.config).unwrap();
    lazy.running.as_ref().unwrap().process.signal(Signal::SIGHUP);
    lazy.heals();
    snapshots::remove(&Client::connect(&lazy.site.socket()), "later").unwrap();
    lazy.kill();
    lazy.start("mount_timeout_sec = nonsense\n");
    // The rest of the layer needs the mirror that only the last good settings name as one that speaks plain HTTP.
    lazy.reads();
    lazy.kill();
    let good = lazy.config.clone();
    lazy.start(&good);
    lazy.prepare("container").unwrap();
    assert_eq!(lazy.status()["state"], "serving");
}

#[test]
fn privileged_with_a_damaged_snapshot_database_what_is_mounted_is_served_and_the_database_left_alone() {
    let slot = Slot::take();
    let mut lazy = Lazy::new(&slot, |_| {});
    lazy.kill();
    let database = lazy.site.layout().snapshot_db();
    let good = std::fs::read(&database).unwrap();
    let damaged = vec![b'x'; good.len()];
    std::fs::write(&database, &damaged).unwrap();
    let config = lazy.config.clone();
    lazy.start(&config);
    lazy.says("records", "metadata.redb");
    lazy.refuses("metadata.redb");
    lazy.reads();
    std::thread::sleep(Duration::from_secs(6));
    assert!(std::fs::read(&database).unwrap() == damaged, "it is never replaced");
    std::fs::write(&database, &good).unwrap();
    lazy.heals();
    lazy.reads();
}

#[test]
fn privileged_with_a_full_disk_what_is_mounted_is_served_and_the_rest_again_when_there_is_room() {
    let slot = Slot::take();
    let mut lazy = Lazy::new(&slot, |site| {
        std::fs::create_dir_all(site.state()).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=48m", "tmpfs"]).arg(site.state()));
    });
    lazy.kill();
    let filler = lazy.site.state().join("filler");
    let _ = std::fs::write(&filler, vec![0; 64 << 20]); // as much as there is room for
    let config = lazy.config.clone();
    lazy.start(&config);
    lazy.says("disk", "no room");
    lazy.refuses("no room");
    lazy.reads();
    std::fs::remove_file(&filler).unwrap();
    lazy.heals();
}

#[test]
fn privileged_a_disk_that_fills_up_is_said_once_costs_no_read_anything_and_is_used_again_when_there_is_room() {
    let slot = Slot::take();
    let lazy = Lazy::new(&slot, |site| {
        std::fs::create_dir_all(site.state()).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=48m", "tmpfs"]).arg(site.state()));
    });
    let layers = lazy.site.layout().layers();
    let kept = || -> u64 {
        use std::os::unix::fs::MetadataExt;
        let blobs = std::fs::read_dir(&layers).unwrap().map(|layer| layer.unwrap().path().join("blob"));
        blobs.map(|blob| std::fs::metadata(blob).unwrap().blocks() * 512).sum()
    };
    let filler = lazy.site.state().join("filler");
    let _ = std::fs::write(&filler, vec![0; 64 << 20]); // as much as there is room for
    let kept_then = kept();
    assert!(kept_then < FILE as u64 / 2, "most of it has still to come: {kept_then}");
    for _ in 0..3 {
        lazy.reads();
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
    }
    assert!(kept() <= kept_then, "there was no room for it");
    assert_eq!(lazy.log().matches(Message::DiskFull.id()).count(), 1, "{}", lazy.log());
    std::fs::remove_file(&filler).unwrap();
    let start = Instant::now();
    while kept() < FILE as u64 {
        assert!(start.elapsed() < Duration::from_secs(60), "{} of {FILE} bytes are kept: {}", kept(), lazy.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    // And it is of use: nobody else is asked.
    lazy.proxy.down();
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
    lazy.reads();
}

#[test]
fn privileged_a_metrics_address_that_is_taken_does_not_leave_containers_alone() {
    let slot = Slot::take();
    let mut lazy = Lazy::new(&slot, |_| {});
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = format!("metrics_address = \"{}\"\n{}", taken.local_addr().unwrap(), lazy.config);
    lazy.kill();
    lazy.start(&config);
    lazy.says("config", "metrics_address");
    lazy.reads();
}

#[test]
fn privileged_a_broken_configuration_on_a_node_without_lazy_layers_is_an_error() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    site.start("").stop(Signal::SIGTERM);
    site.refused(&mut site.command("mount_timeout_sec = nonsense\n"), Duration::from_secs(20));
}
