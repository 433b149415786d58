//! A zTOC that a disk has damaged or lost is fetched again when its layer is restored; until then who reads the layer waits, and nothing else does.

use super::lazy::*;
use super::restart::{BLOCK, block, try_block};
use super::*;
use crate::support::grpc::{Client, snapshots};
use crate::support::proxy::{Fault, Proxy, Rule};
use crate::support::registry::{Registry, blob_path, read_json, soci_index};
use soci::layout::SnapshotId;
use soci::oci::{Digest, Manifest};
use soci::telemetry::catalog::Message;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Stdio;
use std::sync::Arc;

/// Longer than a daemon rests between two attempts, also on a machine that is busy with other things.
const LATER: Duration = Duration::from_secs(120);
/// What could have been answered would have been by then.
const SETTLED: Duration = Duration::from_secs(2);

/// What a disk may do to a file.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Flip,
    Truncate,
    Empty,
    Remove,
    /// With everything else that is known of the layer, and half of the index that names it.
    RemoveAll,
}

struct Lab {
    running: Option<Running>,
    image: Published,
    index: Digest,
    ztoc: Digest,
    /// Reads come from the daemon, whatever the kernel has kept.
    data: Arc<File>,
    reads: usize,
    _registry: Registry,
    proxy: Proxy,
    config: String,
    /// Pretend that the kernel cannot repeat requests.
    old_kernel: bool,
    site: Site,
}

impl Lab {
    fn new(slot: &Slot, more: &str, old_kernel: bool) -> Lab {
        let site = Site::new(slot);
        let (registry, proxy, config) = registry_and_proxy(&site);
        let config = format!("mount_timeout_sec = 2\n{more}{config}");
        let image = image(&site, 1, &proxy.reference("app", "v1"), &[]);
        registry.push(&image.layout, "app", "v1");
        let index = soci_index(&image.layout);
        let ztoc = read_json::<Manifest>(&blob_path(&image.layout, &index)).layers[0].digest;
        let data = Arc::new(File::open("/dev/null").unwrap());
        let mut lab = Lab {
            running: None,
            image,
            index,
            ztoc,
            data,
            reads: 0,
            _registry: registry,
            proxy,
            config,
            old_kernel,
            site,
        };
        lab.start();
        // Index and zTOC come at once, or the layer would be left to containerd.
        assert!(lab.image.prepare(&lab.client(), "extract-0", 0), "{}", lab.log());
        let path = lab.path();
        assert!(std::fs::read(&path).unwrap() == content(0));
        lab.data = Arc::new(File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&path).unwrap());
        lab
    }

    fn path(&self) -> PathBuf {
        self.site.layout().snapshot_fs(SnapshotId(1)).join("data/0")
    }

    fn client(&self) -> Client {
        Client::connect(&self.site.socket())
    }

    fn log(&self) -> String {
        self.running.as_ref().unwrap().log()
    }

    fn kill(&mut self) {
        self.running.take().unwrap().process.kill_9();
    }

    fn start(&mut self) {
        let mut command = self.site.command(&self.config);
        if self.old_kernel {
            command.env("SOCI_MOUNT_NO_RESEND", "1");
        }
        let running = self.site.run(&mut command);
        running.wait_for(STARTED);
        self.running = Some(running);
    }

    /// The zTOC has two names: in the content store, and beside what is here of the layer.
    fn damage(&self, damage: Damage) {
        let layer = self.site.layout().layer(&self.image.layers[0]);
        let names = [self.site.layout().content_blob(&self.ztoc), layer.join("ztoc")];
        for name in &names {
            let length = std::fs::metadata(name).map_or(0, |file| file.len());
            let open = || File::options().write(true).open(name).unwrap();
            match damage {
                // Twice, where both are one file: each time to something else.
                Damage::Flip => {
                    let mut byte = [0];
                    File::open(name).unwrap().read_exact_at(&mut byte, length / 2).unwrap();
                    open().write_all_at(&[byte[0].wrapping_add(1)], length / 2).unwrap();
                }
                Damage::Truncate => open().set_len(length / 2 + 1).unwrap(),
                Damage::Empty => open().set_len(0).unwrap(),
                Damage::Remove | Damage::RemoveAll => std::fs::remove_file(name).unwrap(),
            }
        }
        if let Damage::RemoveAll = damage {
            std::fs::remove_dir_all(layer).unwrap();
            let index = File::options().write(true).open(self.site.layout().content_blob(&self.index)).unwrap();
            index.set_len(index.metadata().unwrap().len() / 2).unwrap();
        }
    }

    /// A read of what was not read before, in a thread.
    fn read(&mut self) -> Waits {
        let at = self.reads * BLOCK;
        self.reads += 1;
        let data = self.data.clone();
        Waits(std::thread::spawn(move || assert!(block(&data, at) == content(0)[at..at + BLOCK])))
    }

    fn says(&self, message: Message) {
        let start = Instant::now();
        while !self.log().contains(message.id()) {
            assert!(start.elapsed() < LATER, "{message:?} is not said: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn begins(&self, key: &str) -> Result<(), tonic::Status> {
        snapshots::prepare(&self.client(), key, &chain(0), HashMap::new()).map(drop)
    }
}

/// Something that waits for the layer.
struct Waits(std::thread::JoinHandle<()>);

impl Waits {
    fn still(&self) {
        assert!(!self.0.is_finished(), "it did not wait");
    }

    fn ends(self) {
        let start = Instant::now();
        while !self.0.is_finished() {
            assert!(start.elapsed() < LATER, "it still waits");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.0.join().unwrap();
    }
}

#[test]
fn privileged_a_ztoc_that_was_damaged_on_disk_is_fetched_again_at_the_next_start() {
    let slot = Slot::take();
    let mut lab = Lab::new(&slot, "", false);
    for damage in [Damage::Flip, Damage::Truncate, Damage::Empty, Damage::Remove, Damage::RemoveAll] {
        lab.kill();
        lab.damage(damage);
        lab.start();
        lab.says(Message::LayerExpected);
        lab.read().ends();
        lab.says(Message::LayerRestored);
        assert!(std::fs::read(lab.path()).unwrap() == content(0), "{damage:?}");
        lab.begins("container").unwrap();
        snapshots::remove(&lab.client(), "container").unwrap();
        // It is on disk again: the next start needs nobody.
        lab.kill();
        lab.proxy.down();
        lab.start();
        lab.read().ends();
        assert!(!lab.log().contains(Message::LayerExpected.id()), "{damage:?}: {}", lab.log());
        lab.proxy.up();
    }
    remove_everything(&lab.site, &lab.client(), 1);
}

/// What waits, and for whom, while the registry is away.
fn with_the_registry_away(old_kernel: bool) {
    let slot = Slot::take();
    let mut lab = Lab::new(&slot, "", old_kernel);
    lab.kill();
    lab.damage(Damage::Flip);
    lab.proxy.down();
    let early = lab.read();
    lab.start();
    lab.says(Message::LayerExpected);
    let late = lab.read();
    let open = lab.site.layout().lazy().join("1/data/not-there");
    let name = (!old_kernel).then(|| Waits(std::thread::spawn(move || assert!(std::fs::metadata(open).is_err()))));
    let input = Stdio::from(lab.data.try_clone().unwrap());
    let dd = ["iflag=direct", "bs=4096", "count=1", "skip=100", "status=none"];
    let mut killed = Command::new("dd").args(dd).stdin(input).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(SETTLED);
    assert!(killed.try_wait().unwrap().is_none(), "it waits, too");
    killed.kill().unwrap();
    eventually("who is killed waits no more", || killed.try_wait().unwrap().is_some());
    let status = lab.begins("container").unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    for waits in [&early, &late].into_iter().chain(&name) {
        waits.still();
    }
    // Another daemon's turn.
    lab.kill();
    lab.start();
    lab.says(Message::LayerExpected);
    lab.proxy.up();
    for waits in [early, late].into_iter().chain(name) {
        waits.ends();
    }
    lab.says(Message::LayerRestored);
    assert!(std::fs::read(lab.path()).unwrap() == content(0));
    lab.begins("container").unwrap();
    snapshots::remove(&lab.client(), "container").unwrap();
    remove_everything(&lab.site, &lab.client(), 1);
}

#[test]
fn privileged_who_reads_a_layer_without_its_ztoc_waits_for_the_registry_and_is_served_when_it_is_back() {
    with_the_registry_away(false);
}

#[test]
fn privileged_the_same_on_a_kernel_that_cannot_repeat_requests() {
    with_the_registry_away(true);
}

#[test]
fn privileged_waiting_for_a_ztoc_ends_with_an_error_and_begins_again_with_the_next_read() {
    let slot = Slot::take();
    let mut lab = Lab::new(&slot, "[blob]\nfetching_timeout_sec = 3\n", false);
    lab.kill();
    lab.damage(Damage::Remove);
    lab.proxy.down();
    lab.start();
    for _ in 0..2 {
        let begun = Instant::now();
        let error = std::fs::read(lab.path()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}");
        assert!(begun.elapsed() >= Duration::from_secs(3) && begun.elapsed() < LATER, "{:?}", begun.elapsed());
    }
    lab.proxy.up();
    lab.says(Message::LayerRestored);
    lab.read().ends();
    remove_everything(&lab.site, &lab.client(), 1);
}

#[test]
fn privileged_a_ztoc_that_the_registry_has_lost_as_well_is_not_waited_for_and_its_image_can_be_removed() {
    let slot = Slot::take();
    let mut lab = Lab::new(&slot, "", false);
    lab.kill();
    lab.damage(Damage::Truncate);
    lab.proxy.rule(Rule::all(Fault::Status(404)).containing(lab.ztoc.hex().as_str()));
    lab.start();
    lab.says(Message::LayerNotRestored);
    let error = try_block(&lab.data, 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::ESTALE), "{error}");
    assert!(std::fs::metadata(lab.path()).is_err());
    remove_everything(&lab.site, &lab.client(), 1);
}
