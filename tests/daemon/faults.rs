//! Registries with trouble, seen from a container: reads through FUSE from a real registry behind a proxy that misbehaves.

use super::lazy::*;
use super::*;
use crate::support::grpc::Client;
use crate::support::image::Form;
use crate::support::proxy::{Chaos, Tokens};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Faults in `make test`. `make storm` asks for more with the variable `SOCI_FAULTS`.
const FAULTS: u64 = 300;
/// Programs that read at the same time.
const READERS: u64 = 8;
/// Of one read: less than a span, so that each span is asked for by itself.
const BLOCK: usize = 16 << 10;
const LAYERS: usize = 8;
/// Small, for many requests.
const SMALL: [&str; 4] = ["--min-layer-size", "0", "--span-size", "65536"];
/// Nothing that is read comes ahead of its read, and silence is noticed soon.
const IMPATIENT: &str = "[background_fetch]\ndisable = true\n[http]\nResponseHeaderTimeoutMsec = 1000\n";

fn faults_wanted() -> u64 {
    std::env::var("SOCI_FAULTS").ok().map_or(FAULTS, |text| text.parse().expect("SOCI_FAULTS is a number"))
}

/// What all readers have seen.
#[derive(Default)]
struct Tally {
    reads: AtomicU64,
    wrong: AtomicU64,
    failed: AtomicU64,
    /// Milliseconds.
    worst: AtomicU64,
}

impl Tally {
    /// Reads every block of the file `n` once, in an order of its own, past the kernel's guesses about what comes next.
    fn read_all(&self, file: &Path, n: usize, reader: u64) {
        let (expected, file) = (content(n), File::open(file).unwrap());
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        let blocks = (FILE / BLOCK) as u64;
        for step in 0..blocks {
            // 5 is coprime to the number of blocks, so each block comes once.
            let at = ((step * 5 + reader * blocks / READERS) % blocks) as usize * BLOCK;
            let mut out = vec![0; BLOCK];
            let begun = Instant::now();
            match file.read_exact_at(&mut out, at as u64) {
                Ok(()) if out == expected[at..at + BLOCK] => {}
                Ok(()) => drop(self.wrong.fetch_add(1, Ordering::Relaxed)),
                Err(error) => {
                    eprintln!("block at {at} of file {n}: {error}");
                    self.failed.fetch_add(1, Ordering::Relaxed);
                }
            }
            self.worst.fetch_max(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Where the file `n` is, below the mount.
fn place(site: &Site, n: usize) -> std::path::PathBuf {
    let lazy = site.layout().lazy();
    let places = names(&lazy).into_iter().map(|id| lazy.join(id).join(format!("data/{n}")));
    places.into_iter().find(|place| place.exists()).expect("the file is in one of the layers")
}

#[test]
fn privileged_a_start_without_the_registry_serves_what_is_here_and_the_rest_when_it_is_back() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = image(&site, 2, &proxy.reference("app", "v1"), &[]);
    registry.push(&image.layout, "app", "v1");
    proxy.tokens(Some(Tokens { valid_for: Duration::from_secs(1) }));
    let config = format!("{IMPATIENT}{config}[snapshotter]\nallow_invalid_mounts_on_restart = true\n");
    let running = site.start(&config);
    image.prepare_all(&Client::connect(&site.socket()));
    assert!(std::fs::read(place(&site, 0)).unwrap() == content(0));
    running.process.kill_9();
    // The registry is gone, and what it gave us to show it is worth nothing when it comes back.
    proxy.down();
    proxy.revoke_tokens();
    let begun = Instant::now();
    let running = site.start(&config);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    drop_caches(&place(&site, 0));
    assert!(std::fs::read(place(&site, 0)).unwrap() == content(0), "what is here needs nobody");
    let missing = place(&site, 1);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| std::fs::read(&missing));
        // Longer than the registry client's own attempts take.
        std::thread::sleep(Duration::from_secs(12));
        assert!(!reader.is_finished(), "it waits:\n{}", running.log());
        proxy.up();
        let back = Instant::now();
        assert!(reader.join().unwrap().unwrap() == content(1));
        assert!(back.elapsed() < Duration::from_secs(20), "{:?} after the registry was back", back.elapsed());
    });
    remove_everything(&site, &Client::connect(&site.socket()), 2);
    running.stop(Signal::SIGTERM);
    // Nothing is left of the image, also not of its index.
    let running = site.start(&config);
    eventually("the content store is empty", || names(&site.layout().content().join("blobs/sha256")).is_empty());
    drop(running);
}

/// Has the kernel forget what it has read of a file.
fn drop_caches(file: &Path) {
    let file = File::open(file).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn privileged_a_node_with_a_quota_reads_images_larger_than_it() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = image_of(&site, LAYERS, &proxy.reference("app", "v1"), Form::GzipMembers(32 << 10), &SMALL);
    registry.push(&image.layout, "app", "v1");
    let metrics = crate::support::registry::free_port();
    let quota = "[layer_store]\nmax_size = '2mb'\n";
    let running = site.start(&format!("metrics_address = \"127.0.0.1:{metrics}\"\n{IMPATIENT}{quota}{config}"));
    let client = Client::connect(&site.socket());
    image.prepare_all(&client);
    for _ in 0..3 {
        for n in 0..LAYERS {
            let place = place(&site, n);
            drop_caches(&place);
            assert!(std::fs::read(&place).unwrap() == content(n), "{}", running.log());
        }
    }
    let layers = site.layout().layers();
    let used = || -> u64 {
        use std::os::unix::fs::MetadataExt;
        names(&layers)
            .iter()
            .map(|layer| std::fs::metadata(layers.join(layer).join("blob")).unwrap().blocks() * 512)
            .sum()
    };
    // The blocks at the ends of a span may stay.
    eventually("it takes no more than it may", || used() <= (2 << 20) + (LAYERS as u64 * 16 * 8192));
    let (_, text) = crate::support::registry::get(&format!("http://127.0.0.1:{metrics}/metrics"));
    assert!(text.contains("layer_store_evicted_spans"), "{text}");
    remove_everything(&site, &client, LAYERS);
}

/// `make storm` runs this with 10,000 faults.
#[test]
fn privileged_random_faults_that_heal_are_never_seen_by_a_reader() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = image_of(&site, LAYERS, &proxy.reference("app", "v1"), Form::GzipMembers(32 << 10), &SMALL);
    registry.push(&image.layout, "app", "v1");
    proxy.tokens(Some(Tokens { valid_for: Duration::from_secs(2) }));
    let running = site.start(&format!("{IMPATIENT}{config}"));
    let client = Client::connect(&site.socket());
    let tally = Tally::default();
    let (wanted, begun) = (faults_wanted(), Instant::now());
    let faults = || proxy.faults().values().sum::<u64>();
    let mut rounds = 0;
    while faults() < wanted {
        proxy.heal();
        image.prepare_all(&client);
        let containing = image.layers.iter().map(|layer| format!("/blobs/{layer}")).collect();
        proxy.chaos(Chaos { seed: 17 + rounds, containing, one_in: 2 });
        let ids: Vec<String> = names(&site.layout().lazy());
        assert_eq!(ids.len(), LAYERS);
        std::thread::scope(|scope| {
            for reader in 0..READERS {
                let (tally, lazy, ids) = (&tally, site.layout().lazy(), &ids);
                scope.spawn(move || {
                    for turn in 0..LAYERS {
                        let n = (turn + reader as usize) % LAYERS;
                        let place = ids.iter().map(|id| lazy.join(id).join(format!("data/{n}"))).find(|p| p.exists());
                        tally.read_all(&place.expect("the file is in one of the layers"), n, reader);
                    }
                });
            }
        });
        remove_everything(&site, &client, LAYERS);
        rounds += 1;
    }
    let Tally { reads, wrong, failed, worst } = tally;
    let (reads, wrong, failed, worst) =
        (reads.into_inner(), wrong.into_inner(), failed.into_inner(), worst.into_inner());
    println!(
        "fault storm: {} faults {:?} in {rounds} rounds, {reads} reads, {wrong} wrong, {failed} failed, worst wait {worst} ms, {:.0?}",
        faults(),
        proxy.faults(),
        begun.elapsed()
    );
    assert_eq!((wrong, failed), (0, 0), "{}", running.log());
}
