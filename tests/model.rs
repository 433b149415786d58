//! The reference: whatever happens, a lazily loaded layer is what `tar` makes of the same bytes.
//!
//! A random layer is mounted and read at random, by several readers at once, while the registry fails, bytes arrive damaged, what is on disk rots,
//! spans are evicted, the kernel forgets what it had read, and the daemon is restarted on the same connection. Every byte and attribute is compared with
//! what `tar` unpacked. A run is a function of its seed, which is printed when it fails; `SOCI_MODEL_SEEDS=5,6` runs others.

use crate::fs::lab::{Member, Mount, Tar, pattern};
use crate::fs::{describe, until};
use crate::layers::lab::{Act, Image, Lab, Random, Script, gzip, quiet, streaming};
use soci::fs::wire::Resend;
use soci::fs::{Connection, HeaderCheck, LazyLayer, Nobody, OpaqueMark, Tree, Xattrs};
use soci::layers::toc::EntryKind;
use soci::layers::{Layer, Remedy};
use soci::layout::SnapshotId;
use soci::ztoc::Compression;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const ID: u32 = 7;
const READERS: u64 = 3;
const STEPS: usize = 60;
/// Of spans: so small that each file has several.
const SPAN: u64 = 40_000;

/// One of everything, at random.
fn random_tar(random: &mut Random) -> Tar {
    let mut members = vec![Member { mode: 0o755, ..Member::dir("./", 0o755) }];
    let mut dirs = vec![String::new()];
    let mut files: Vec<String> = Vec::new();
    for n in 0..60 {
        let dir = dirs[random.below(dirs.len() as u64) as usize].clone();
        let name = match random.below(6) {
            0 => format!("{dir}with blank {n}"),
            1 => format!("{dir}ünïcode-{n}"),
            2 => format!("{dir}{}-{n}", "long".repeat(30)),
            _ => format!("{dir}n{n}"),
        };
        let mode = [0o644, 0o600, 0o755, 0o4755, 0o2711, 0o1777, 0][random.below(7) as usize];
        let owner = [(0, 0), (1000, 1000), (65_534, 400_000)][random.below(3) as usize];
        let mtime = (random.below(1_700_000_000) as i64 - 50_000, random.below(1_000_000_000) as u32);
        let member = match random.below(12) {
            0 | 1 if dirs.len() < 12 => {
                dirs.push(format!("{name}/"));
                Member::dir(&name, 0o700 | mode)
            }
            2 => Member::link(&name, EntryKind::Symlink, &format!("../some/where/{n}")),
            3 => {
                // Only the header's own field has room for its target here.
                let targets: Vec<&String> = files.iter().filter(|file| file.len() < 100).collect();
                if !targets.is_empty() {
                    let to = targets[random.below(targets.len() as u64) as usize];
                    members.push(Member::link(&name, EntryKind::Hardlink, to));
                }
                continue;
            }
            4 => Member {
                device: (1 + random.below(200) as u32, random.below(70_000) as u32),
                ..Member::new(&name, EntryKind::Char)
            },
            5 => Member::new(&name, EntryKind::Fifo),
            _ => {
                files.push(name.clone());
                let size = [0, 1, 511, 4096, 30_000, 200_000][random.below(6) as usize];
                let content = pattern(random.next(), random.below(size + 1) as usize);
                let xattrs = match random.below(4) {
                    0 => vec![(b"user.note".to_vec(), pattern(n, 40)), (b"user.empty".to_vec(), Vec::new())],
                    _ => Vec::new(),
                };
                Member { xattrs, ..Member::file(&name, content) }
            }
        };
        let mode = match member.kind {
            // A link has no mode of its own.
            EntryKind::Directory | EntryKind::Symlink => member.mode,
            _ => mode,
        };
        members.push(Member { mode, owner, mtime, ..member });
    }
    Tar::new(members)
}

/// How likely a request goes wrong, in percent.
#[derive(Default)]
struct Weather(AtomicUsize);

fn source(image: &Image, weather: &Arc<Weather>, seed: u64) -> Arc<Script> {
    let (weather, random) = (weather.clone(), Mutex::new(Random::new(seed)));
    Script::new(image, move |request| {
        let mut random = random.lock().unwrap();
        if random.below(100) >= weather.0.load(Ordering::SeqCst) as u64 {
            return Act::default();
        }
        let somewhere = request.range.start + random.below(request.range.end - request.range.start);
        match random.below(4) {
            0 => Act { refuse: Some(Remedy::Retry(None)), ..Act::default() },
            1 => Act { corrupt: vec![somewhere], ..Act::default() },
            2 => Act { cut: Some(somewhere - request.range.start), ..Act::default() },
            _ => Act { delay: Duration::from_millis(1), extra: 7, ..Act::default() },
        }
    })
}

/// One life of the daemon.
struct Life {
    lab: Lab,
    layer: Arc<Layer>,
}

struct World {
    mount: Mount,
    home: tempfile::TempDir,
    image: Image,
    weather: Arc<Weather>,
    life: Option<Life>,
    lives: u64,
}

impl World {
    fn new(image: Image, resend: Resend) -> World {
        let mount = Mount::unserved(Arc::new(Nobody), resend);
        let home = tempfile::tempdir().unwrap();
        World { mount, home, image, weather: Arc::default(), life: None, lives: 0 }
    }

    fn start(&mut self, seed: u64) {
        self.lives += 1;
        let settings = if seed.is_multiple_of(3) { streaming() } else { quiet() };
        // Enough tries that bad weather is survived, as it is within the budget of a real daemon.
        let settings = soci::layers::Settings { retries: 60, verification_retries: 60, ..settings };
        let source = source(&self.image, &self.weather, seed);
        let (home, image) = (self.home.path(), &self.image);
        let (lab, layer) = self.mount.runtime.block_on(async {
            let lab =
                if seed.is_multiple_of(2) { Lab::at(home, settings) } else { Lab::spilling(home, settings, 1 << 20) };
            let layer = lab.try_open(image, source, ID).await.unwrap();
            (lab, layer)
        });
        let tree = Tree::new(OpaqueMark::Trusted, Arc::new(Nobody));
        let shown = LazyLayer {
            id: SnapshotId(ID),
            toc: layer.toc().clone(),
            implied: HashMap::new(),
            data: layer.clone(),
            headers: HeaderCheck::Required,
            xattrs: Xattrs::Shown,
            maps: None,
        };
        tree.add(shown).unwrap();
        self.mount.tree = Arc::new(tree);
        self.mount.serve(if self.lives == 1 { Connection::First } else { Connection::Resumed });
        self.life = Some(Life { lab, layer });
    }

    fn stop(&mut self) {
        // What is not answered by then is the next one's to answer.
        self.mount.stop(Duration::from_millis(50));
        self.mount.tree = Arc::new(Tree::new(OpaqueMark::Trusted, Arc::new(Nobody)));
        let Life { lab, layer } = self.life.take().unwrap();
        let gone = Arc::downgrade(&layer);
        drop((layer, lab));
        until("the layer is closed", || gone.strong_count() == 0);
    }

    /// Bytes of the blob on disk become others, as on a failing disk, while nobody looks.
    fn rot(&self, random: &mut Random) {
        let path = soci::layout::Layout::new(self.home.path()).layer(&self.image.layer).join("blob");
        let file = OpenOptions::new().write(true).open(path).unwrap();
        for _ in 0..3 {
            file.write_all_at(&[random.next() as u8; 20], random.below(self.image.blob.len() as u64 - 20)).unwrap();
        }
    }
}

/// Reads until it is told to end; counts what it compared.
fn read_on(root: &Path, files: &[(String, Vec<u8>)], seed: u64, end: &AtomicBool) -> usize {
    let mut random = Random::new(seed);
    let mut compared = 0;
    while !end.load(Ordering::SeqCst) {
        let (name, content) = &files[random.below(files.len() as u64) as usize];
        let file = File::open(root.join(name)).unwrap();
        let offset = random.below(content.len() as u64 + 10);
        let mut buffer = vec![0; 1 + random.below(70_000) as usize];
        let got = file.read_at(&mut buffer, offset).unwrap();
        let start = content.len().min(offset as usize);
        let expected = &content[start..content.len().min(start + buffer.len())];
        assert!(buffer[..got] == *expected, "{name} at {offset}, {got} of {} bytes", expected.len());
        compared += 1;
        if random.below(4) == 0 {
            let _ = nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }
    compared
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let tar = random_tar(&mut random);
    let blob = gzip(&tar.bytes, 6);
    let image = Image::of(tar.bytes.clone(), blob, Compression::Gzip, SPAN);
    // Both ways in which a restart answers what its predecessor had taken.
    let resend = if seed.is_multiple_of(2) { Resend::Wanted } else { Resend::Unwanted };
    let mut world = World::new(image, resend);
    let unpacked = world.mount.beside("unpacked");
    tar.unpack(&unpacked);
    let theirs = describe(&unpacked);
    let files: Vec<(String, Vec<u8>)> = tar
        .members
        .iter()
        .filter(|member| member.kind == EntryKind::Regular)
        .map(|member| (member.name.clone(), member.content.clone()))
        .collect();
    world.start(seed);
    let (end, root): (AtomicBool, PathBuf) = (AtomicBool::new(false), world.mount.at(ID));
    let (compared, events) = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|n| {
                let (root, files, end) = (&root, &files, &end);
                scope.spawn(move || read_on(root, files, seed * 10 + n, end))
            })
            .collect();
        // Readers must end, or the scope waits for ever for what a failed step leaves behind.
        let steps = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut events: HashMap<&str, usize> = HashMap::new();
            for step in 0..STEPS {
                let event = match random.below(10) {
                    0 | 1 => {
                        world.stop();
                        world.start(random.next());
                        "restart"
                    }
                    2 => {
                        world.stop();
                        world.rot(&mut random);
                        world.start(random.next());
                        "rot"
                    }
                    3 | 4 => {
                        world.weather.0.store(random.below(60) as usize, Ordering::SeqCst);
                        "weather"
                    }
                    5 | 6 => {
                        let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
                        "forget"
                    }
                    7 => {
                        let ours = describe(&root);
                        for (name, text) in &theirs {
                            assert_eq!(ours.get(name), Some(text), "{name}, step {step}");
                        }
                        assert_eq!(ours.len(), theirs.len(), "step {step}");
                        "compare"
                    }
                    _ => {
                        std::thread::sleep(Duration::from_millis(random.below(40)));
                        "wait"
                    }
                };
                *events.entry(event).or_default() += 1;
            }
            world.weather.0.store(0, Ordering::SeqCst);
            events
        }));
        world.weather.0.store(0, Ordering::SeqCst);
        end.store(true, Ordering::SeqCst);
        let compared: usize = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        (compared, steps.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let ours = describe(&root);
    assert!(theirs.iter().all(|(name, text)| ours.get(name) == Some(text)));
    assert!(compared > 20, "{compared}");
    eprintln!("seed {seed}: {} lives, {compared} reads compared, {events:?}", world.lives);
}

#[test]
fn privileged_a_lazy_tree_is_the_tar_whatever_happens_meanwhile() {
    let seeds = match std::env::var("SOCI_MODEL_SEEDS") {
        Ok(text) => text.split(',').map(|seed| seed.trim().parse().expect("numbers")).collect(),
        Err(_) => vec![11u64, 12, 13],
    };
    for seed in seeds {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("to run it again: SOCI_MODEL_SEEDS={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
