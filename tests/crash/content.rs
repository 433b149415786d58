//! The content store: indexes and zTOCs under their digests, put there and collected.

use super::records::Ended;
use super::{Job, Promised, Random, at_every_change, runtime, say, seeds};
use crate::support::image::noise;
use bytes::Bytes;
use soci::index::{ContentStore, InUse};
use soci::layout::Layout;
use soci::oci::Digest;
use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// zTOCs, named by their number.
const ZTOCS: usize = 8;
/// Index `n` names every second zTOC, from the `n`th on.
const INDEXES: usize = 2;
/// Of leftovers that belong to nobody.
const OLD: Duration = Duration::from_secs(2 * 24 * 3600);

fn ztoc(n: usize) -> Bytes {
    noise(7_000 + n as u64, 3_000 + 40_000 * n).into()
}

fn named_by(index: usize) -> impl Iterator<Item = usize> {
    (index..ZTOCS).step_by(INDEXES)
}

/// zTOCs first, then indexes.
fn blobs() -> Vec<(Digest, Bytes)> {
    let of = |bytes: Bytes| (Digest::of(&bytes), bytes);
    let ztocs: Vec<_> = (0..ZTOCS).map(|n| of(ztoc(n))).collect();
    let index = |n: usize| {
        let named = named_by(n).map(|n| serde_json::json!({ "digest": ztocs[n].0, "size": ztocs[n].1.len() }));
        serde_json::json!({ "schemaVersion": 2, "layers": named.collect::<Vec<_>>() }).to_string()
    };
    let indexes: Vec<_> = (0..INDEXES).map(|n| of(index(n).into())).collect();
    [ztocs, indexes].concat()
}

#[test]
#[ignore = "run by the tests below, which kill it"]
fn child() {
    let Some(job) = Job::mine() else { return };
    let blobs = blobs();
    runtime().block_on(async {
        let layout = Layout::new(&job.place);
        let store = ContentStore::soci(&layout).unwrap();
        let mut random = Random::new(job.seed);
        for _ in 0..job.steps {
            if random.below(5) > 0 {
                // Several come at once.
                let first = random.below(blobs.len());
                let some = [first, (first + 1 + random.below(blobs.len() - 1)) % blobs.len()];
                some.iter().for_each(|n| say(&format!("begin put {n}")));
                let put = some.map(|n| store.put(blobs[n].0, blobs[n].1.clone()));
                futures::future::try_join_all(put).await.unwrap();
                some.iter().for_each(|n| say(&format!("done put {n}")));
            } else {
                // All that one index does not name, if it is here.
                let index = random.below(INDEXES);
                let mut kept = HashSet::from([ZTOCS + index]);
                if store.path(&blobs[ZTOCS + index].0).exists() {
                    kept.extend(named_by(index));
                }
                let gone: Vec<usize> = (0..blobs.len()).filter(|n| !kept.contains(n)).collect();
                gone.iter().for_each(|n| say(&format!("begin del {n}")));
                let in_use = InUse { indexes: HashSet::from([blobs[ZTOCS + index].0]), ..InUse::default() };
                store.collect(&in_use).unwrap();
                gone.iter().for_each(|n| say(&format!("done del {n}")));
            }
        }
    });
}

/// Opens what is left: what is there is whole, what was promised is there, and what unfinished writes left goes when it is old.
pub fn check(root: &Path, said: &[String], ended: Ended) {
    let (blobs, layout) = (blobs(), Layout::new(root));
    // A crash before the first directory was made.
    let store = ContentStore::soci(&layout).unwrap();
    serde_json::from_slice::<serde_json::Value>(&std::fs::read(layout.content_index()).unwrap()).unwrap();
    for entry in std::fs::read_dir(layout.content().join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(Digest::of(&bytes).hex(), name, "a blob of {} bytes has another's name", bytes.len());
    }
    runtime().block_on(async {
        for (name, there) in Promised::read(said).names {
            let (digest, bytes) = &blobs[name.parse::<usize>().unwrap()];
            let is_there = store.holds(*digest, bytes.len() as u64).await.unwrap();
            match there {
                Some(true) => assert!(is_there, "blob {name} is lost"),
                // Nothing is synced when something is removed: it may be back, whole.
                Some(false) => assert!(ended == Ended::PowerCut || !is_there, "blob {name} is still there"),
                None => {}
            }
        }
        // It can be gone on with.
        for (digest, bytes) in &blobs {
            store.put(*digest, bytes.clone()).await.unwrap();
            assert!(store.holds(*digest, bytes.len() as u64).await.unwrap());
        }
    });
    let ingest = || std::fs::read_dir(layout.content().join("ingest")).unwrap().map(|entry| entry.unwrap().path());
    for left in ingest() {
        std::fs::File::open(left).unwrap().set_modified(SystemTime::now() - OLD).unwrap();
    }
    ContentStore::soci(&layout).unwrap();
    assert_eq!(ingest().count(), 0);
    store.collect(&InUse::default()).unwrap();
    assert_eq!(std::fs::read_dir(layout.content().join("blobs/sha256")).unwrap().count(), 0);
}

pub const CHILD: &str = "crash::content::child";

#[test]
fn the_content_store_is_killed_at_every_write_and_keeps_what_it_has_whole() {
    let mut places = 0;
    for seed in seeds(&[1]) {
        places += at_every_change(CHILD, seed, 12, |root, said| check(root, said, Ended::Killed));
    }
    assert!(places > 50, "{places}");
    eprintln!("killed at {places} places");
}
