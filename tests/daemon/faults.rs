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
