//! Snapshots: records, directories, links.

use super::{Job, Promised, Random, at_every_change, runtime, say, seeds};
use futures::future::BoxFuture;
use soci::config::Config;
use soci::layout::{Layout, SnapshotId};
use soci::oci::Digest;
use soci::snapshot::{
    Extraction, InProcessDisk, Info, Kind, Labels, LazyLayers, NeverEager, NotLazyReason, Options, Pull, SnapshotError,
    Snapshotter, Target, Usage,
};
use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Makes every layer lazy: a directory where the lazy filesystem would show it. What it would need for that is the layer store's business.
struct EveryLayer(Layout);

impl LazyLayers for EveryLayer {
    fn prepare<'a>(
        &'a self,
        id: SnapshotId,
        _: &'a Target,
        _: &'a [SnapshotId],
    ) -> BoxFuture<'a, Result<(), NotLazyReason>> {
        show(&self.0, id);
        Box::pin(async { Ok(()) })
    }
    fn available(&self, _: SnapshotId) -> BoxFuture<'_, bool> {
        Box::pin(async { true })
    }
    fn remove(&self, _: SnapshotId) {}
    fn usage(&self, _: SnapshotId) -> Usage {
        Usage::default()
    }
}

fn show(layout: &Layout, id: SnapshotId) {
    std::fs::create_dir_all(layout.lazy().join(id.to_string())).unwrap();
}

async fn open(root: &Path) -> Snapshotter {
    let layout = Layout::new(root);
    let pull = Pull::from(&Config::default());
    let options = Options { sweep_after: Duration::from_secs(3600), ..Options::new(layout.clone(), pull) };
    let (lazy, disk) = (Arc::new(EveryLayer(layout.clone())), Arc::new(InProcessDisk::new(layout.clone())));
    let snapshots = Snapshotter::open(options, lazy, Arc::new(NeverEager), disk).await.unwrap();
    snapshots.lazy_layers().unwrap().iter().for_each(|info| show(&layout, info.id));
    snapshots
}

fn extraction(chain: &str) -> Extraction {
    let layer = Digest::of(chain.as_bytes());
    let target = Target {
        namespace: "default".into(),
        reference: "registry.example/image:1".parse().unwrap(),
        manifest: Digest::of(b"manifest"),
        layer,
        chain: None,
        size: None,
        index: None,
        layers: vec![(layer, None)],
    };
    Extraction { chain_id: chain.into(), namespace: "default".into(), size: None, target: Ok(target) }
}

/// The number in the path of a mount's own directory.
fn number(mount: &soci::snapshot::Mount) -> u32 {
    let own = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    let path = Path::new(own.unwrap_or(&mount.source));
    path.parent().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap()
}

#[test]
#[ignore = "run by the tests below, which kill it"]
fn child() {
    let Some(job) = Job::mine() else { return };
    runtime().block_on(async {
        let snapshots = open(&job.place).await;
        let layout = Layout::new(&job.place);
        let mut random = Random::new(job.seed);
        for step in 0..job.steps {
            let all = snapshots.page(None, usize::MAX, |_| true).await.unwrap();
            let of = |kind: Kind| all.iter().filter(|info| info.kind == kind).collect::<Vec<&Info>>();
            let (committed, active) = (of(Kind::Committed), of(Kind::Active));
            let parents: HashSet<&str> = all.iter().filter_map(|info| info.parent.as_deref()).collect();
            let leaves: Vec<&Info> = all.iter().filter(|info| !parents.contains(info.name.as_str())).collect();
            let parent = match random.below(committed.len() + 1) {
                0 => None,
                n => Some(committed[n - 1].name.clone()),
            };
            let name = format!("{}-{step}", job.seed);
            let what = random.below(100);
            if what < 25 {
                let name = format!("layer-{name}");
                say(&format!("begin put {name}"));
                let key = format!("extract-{name}");
                let made = snapshots.prepare(key, parent, Labels::new(), Some(extraction(&name))).await;
                assert!(matches!(made, Err(SnapshotError::TargetExists(_))), "{made:?}");
                say(&format!("done put {name}"));
            } else if what < 50 {
                let name = format!("active-{name}");
                say(&format!("begin put {name}"));
                let mount = snapshots.prepare(name.clone(), parent, Labels::new(), None).await.unwrap();
                let id = number(&mount);
                std::fs::write(layout.snapshot_fs(SnapshotId(id)).join("payload"), &name).unwrap();
                say(&format!("done put {name} {id}"));
            } else if what < 70 && !active.is_empty() {
                let key = active[random.below(active.len())].name.clone();
                let name = format!("committed-{name}");
                say(&format!("begin move {key} {name}"));
                snapshots.commit(name.clone(), key.clone(), Labels::new()).await.unwrap();
                say(&format!("done move {key} {name}"));
            } else if what < 76 && !all.is_empty() {
                let name = all[random.below(all.len())].name.clone();
                let labels = Labels::from([("label".to_owned(), step.to_string())]);
                snapshots.update(name, labels, &["labels.label".to_owned()]).await.unwrap();
            } else if what < 92 && !leaves.is_empty() {
                let name = leaves[random.below(leaves.len())].name.clone();
                say(&format!("begin del {name}"));
                snapshots.remove(name.clone()).await.unwrap();
                say(&format!("done del {name}"));
            } else {
                snapshots.cleanup().await.unwrap();
            }
        }
    });
}

/// How the process ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// What it had written is there.
    Killed,
    /// What was not synced may be gone.
    PowerCut,
}

/// Opens what is left and compares it with what was promised, and with itself.
pub fn check(root: &Path, said: &[String], ended: Ended) {
    let promised = Promised::read(said);
    let layout = Layout::new(root);
    runtime().block_on(async {
        let snapshots = open(root).await;
        let all = snapshots.page(None, usize::MAX, |_| true).await.unwrap();
        let names: BTreeSet<&str> = all.iter().map(|info| info.name.as_str()).collect();
        for (name, there) in &promised.names {
            if let Some(there) = there {
                assert_eq!(names.contains(name.as_str()), *there, "{name}");
            }
        }
        let mut numbers = HashSet::new();
        for info in &all {
            assert!(numbers.insert(info.id), "number {} twice", info.id);
            snapshots.parents(info).unwrap();
            let is_dir = |path: std::path::PathBuf| std::fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
            assert!(is_dir(layout.snapshot(info.id)), "{}", info.name);
            // An extraction that was cut off is an active snapshot, which containerd removes.
            if info.is_lazy() {
                assert_eq!(std::fs::read_link(layout.snapshot_fs(info.id)).unwrap(), Layout::lazy_link(info.id));
            } else if !info.name.starts_with("extract-") {
                assert!(is_dir(layout.snapshot_fs(info.id)), "{}", info.name);
            }
            if info.kind == Kind::Active && !info.name.starts_with("extract-") {
                assert!(layout.snapshot_work(info.id).is_dir(), "{}", info.name);
            }
            if ended == Ended::Killed && info.name.starts_with("committed-") {
                assert!(layout.snapshot_fs(info.id).join("payload").exists(), "{}", info.name);
            }
        }
        // What no record knows goes, and nothing else.
        snapshots.cleanup().await.unwrap();
        let mut left: Vec<u32> = std::fs::read_dir(layout.snapshots())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        let mut recorded: Vec<u32> = all.iter().map(|info| info.id.0).collect();
        left.sort_unstable();
        recorded.sort_unstable();
        assert_eq!(left, recorded, "a record for each directory and a directory for each record");
        // It goes on, with a number that nobody ever had.
        let next = number(&snapshots.prepare("next".into(), None, Labels::new(), None).await.unwrap());
        let given: Vec<u32> = said.iter().filter_map(|line| line.split(' ').nth(3)?.parse().ok()).collect();
        assert!(!given.contains(&next) && !recorded.contains(&next), "{next} comes again");
        snapshots.remove("next".into()).await.unwrap();
    });
}

pub const CHILD: &str = "crash::records::child";

#[test]
fn the_snapshot_database_is_killed_at_every_write_and_always_opens_consistent() {
    let mut places = 0;
    for seed in seeds(&[1]) {
        places += at_every_change(CHILD, seed, 20, |root, said| check(root, said, Ended::Killed));
    }
    assert!(places > 100, "{places}");
    eprintln!("killed at {places} places");
}

/// The database of the Go snapshotter, imported again and again.
#[test]
#[ignore = "run by the test below, which kills it"]
fn importing_child() {
    let Some(job) = Job::mine() else { return };
    runtime().block_on(async { drop(open(&job.place).await) });
}

#[test]
fn a_takeover_that_is_killed_at_any_write_is_done_again_or_is_done() {
    let golden = crate::takeover::golden_database();
    let expected = soci::snapshot::import(&golden).unwrap().infos;
    let mut places = 0;
    for n in 1.. {
        let place = tempfile::tempdir().unwrap();
        let layout = Layout::new(place.path());
        std::fs::create_dir_all(layout.snapshots()).unwrap();
        for info in &expected {
            std::fs::create_dir_all(layout.snapshot_fs(info.id)).unwrap();
        }
        std::fs::write(layout.go_snapshot_db(), &golden).unwrap();
        let job = Job { place: place.path().to_owned(), seed: 0, steps: 0 };
        let cut = if n % 2 == 0 { super::Cut::Torn } else { super::Cut::Before };
        let (_, whole) = super::killed_at("crash::records::importing_child", &job, n, cut);
        runtime().block_on(async {
            let snapshots = open(place.path()).await;
            let mut all = snapshots.page(None, usize::MAX, |_| true).await.unwrap();
            all.sort_by_key(|info| info.id);
            let mut wanted = expected.clone();
            wanted.sort_by_key(|info| info.id);
            assert_eq!(all, wanted, "killed at {n}");
            snapshots.cleanup().await.unwrap();
            for info in &expected {
                assert!(std::fs::symlink_metadata(layout.snapshot_fs(info.id)).is_ok(), "killed at {n}");
            }
        });
        assert_eq!(std::fs::read(layout.go_snapshot_db()).unwrap(), golden);
        if whole {
            break;
        }
        places = n;
    }
    assert!(places > 10, "{places}");
    eprintln!("killed at {places} places");
}
