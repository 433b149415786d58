//! Reading through the lazy mount beside overlayfs on ext4: the same image, complete, mounted as a container would see it.
//!
//! *hot*: everything cached by the kernel. *local*: a new mount, the kernel's caches dropped, the image on disk.

use crate::options::Options;
use crate::report::{Report, table};
use crate::support::daemon::{Settings, convert};
use crate::support::engine::{Engine, Kind};
use crate::support::image::{Image, Layer, busybox, noise, prose};
use crate::support::link::Link;
use crate::support::registry::{self, Registry};
use crate::support::slot::{Root, Slot};
use crate::support::{cache, suite_image};
use crate::timed::interleaved;
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Bytes of the file that is read from end to end.
const BIG: usize = 128 << 20;

/// Its name, what is done, and the least share of native speed that is wanted (hot).
type Work = (&'static str, fn(&Tree), Option<f64>);

const WORK: [Work; 9] = [
    ("read every file", read_all, Some(0.9)),
    ("walk, size of everything", walk, Some(0.95)),
    ("small files, five times", small_files, Some(0.75)),
    ("stat of random paths", random_stats, Some(0.75)),
    ("random 4 KiB reads", random_reads, None),
    ("exec python3", exec, Some(0.95)),
    ("sequential 128 MiB", sequential, Some(0.65)),
    ("mmap and touch 128 MiB", mmap, None),
    ("ls -laR", list, None),
];

/// An image's root, the paths in it, and the image with the big file.
struct Tree {
    root: PathBuf,
    files: Vec<PathBuf>,
    small: Vec<PathBuf>,
    shuffled: Vec<PathBuf>,
    big: PathBuf,
}

pub fn measure(options: &Options, report: &mut Report) {
    let slot = Slot::take();
    let root = slot.fresh_root();
    let link = Link::up(&slot);
    let registry = Registry::start_behind(&link, registry::Kind::Distribution3, &root, &cache().join("registry"));
    let numpy = suite_image("numpy");
    let big = root.join("big-image");
    let mut layer = Layer::new();
    let content: Vec<u8> = (0..BIG >> 20)
        .flat_map(|i| if i % 2 == 0 { noise(i as u64, 1 << 20) } else { prose(i as u64, 1 << 20) })
        .collect();
    layer.file("big", content);
    Image::new(vec![busybox(), layer]).write(&big);
    for (layout, name) in [(&numpy, "numpy"), (&big, "big")] {
        registry.push(layout, name, "latest");
        let converted = root.join(&format!("soci-{name}"));
        convert(layout, &converted, &["--min-layer-size", "0"]);
        registry.push(&converted, name, "soci");
    }
    let settings = Settings { more: options.config.clone(), ..Default::default() };
    let engines = [Kind::Ctd2, Kind::Ours].map(|kind| {
        let root = slot.fresh_root();
        let engine = Engine::start(kind, &root, &registry.host, &settings);
        let tag = if kind.is_lazy() { "soci" } else { "latest" };
        for image in ["numpy", "big"] {
            engine.pull(&registry.reference(image, tag)).unwrap_or_else(|e| panic!("{}: {e}", kind.name()));
        }
        (engine, root, tag)
    });
    // Reading everything once makes the image complete and fills the caches.
    let mount = |(engine, root, tag): &(Engine, Root, &'static str), turn: &str| {
        let containerd = engine.containerd().expect("both are containerds");
        let at = |image: &str| {
            let reference = registry.reference(image, tag);
            containerd.mount(
                engine.snapshotter(),
                engine.namespace(),
                &reference,
                &root.join(&format!("{image}-{turn}")),
            )
        };
        (at("numpy"), at("big"))
    };
    let turns = options.runs.max(3);
    let mut rows = Vec::new();
    {
        let mounts = [mount(&engines[0], "hot"), mount(&engines[1], "hot")];
        let trees = [tree(&mounts[0].0.path, &mounts[0].1.path), tree(&mounts[1].0.path, &mounts[1].1.path)];
        for tree in &trees {
            read_all(tree);
            sequential(tree);
        }
        std::thread::sleep(Duration::from_secs(2)); // what the daemon still writes to disk
        for (name, work, target) in WORK {
            trees.iter().for_each(work);
            let times = interleaved(turns, [&trees[0], &trees[1]], || (), work);
            rows.push(row(report, "hot", name, times, target));
        }
    }
    const LOCAL: [&str; 4] = ["read every file", "walk, size of everything", "exec python3", "sequential 128 MiB"];
    for (name, work, _) in WORK.into_iter().filter(|w| LOCAL.contains(&w.0)) {
        let mut times = [Vec::new(), Vec::new()];
        for turn in 0..turns {
            for (engine, times) in engines.iter().zip(&mut times) {
                let (image, big) = mount(engine, &format!("{turn}{}", name.len()));
                let tree = tree_unread(&image.path, &big.path);
                std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
                times.push(crate::timed::seconds(|| work(&tree)));
            }
        }
        rows.push(row(report, "local", name, times.map(crate::report::median), None));
    }
    let head = ["state", "work", "overlayfs on ext4", "ours", "native ÷ ours", "wanted"].map(String::from);
    report.section(&format!(
        "## Reads through the mount, medians of {turns}, seconds (1.0 is parity, more is better)\n\n{}",
        table(&head, &rows)
    ));
}

fn row(report: &mut Report, state: &str, name: &str, [native, ours]: [f64; 2], target: Option<f64>) -> Vec<String> {
    report.record(json!({"section": "reads", "state": state, "work": name, "native": native, "ours": ours}));
    eprintln!("{state:6} {name:26} native {native:8.4} ours {ours:8.4}  {:.2}", native / ours);
    let target = target.map_or("–".into(), |t| format!("≥ {t:.2}"));
    vec![
        state.into(),
        name.into(),
        format!("{native:.4}"),
        format!("{ours:.4}"),
        format!("**{:.2}**", native / ours),
        target,
    ]
}

/// The tree and what is in it.
fn tree(root: &Path, big: &Path) -> Tree {
    let mut tree = tree_unread(root, big);
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() {
                tree.files.push(entry.path());
            }
        }
    }
    tree.files.sort();
    tree.small = tree.files.iter().filter(|f| f.starts_with(root.join("usr/share"))).cloned().collect();
    // The same pseudo-random order on both sides.
    tree.shuffled = tree.files.clone();
    let mut state = 1u64;
    for i in (1..tree.shuffled.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        tree.shuffled.swap(i, (state >> 33) as usize % (i + 1));
    }
    tree
}

fn tree_unread(root: &Path, big: &Path) -> Tree {
    Tree { root: root.into(), files: Vec::new(), small: Vec::new(), shuffled: Vec::new(), big: big.join("big") }
}

fn read(path: &Path, buffer: &mut [u8]) {
    let mut file = File::open(path).unwrap();
    while file.read(buffer).unwrap_or_else(|e| panic!("{}: {e}", path.display())) > 0 {}
}

fn read_all(tree: &Tree) {
    let mut buffer = vec![0; 1 << 17];
    visit(&tree.root, &mut |path, kind| {
        if kind.is_file() {
            read(path, &mut buffer);
        }
    });
}

fn walk(tree: &Tree) {
    visit(&tree.root, &mut |path, _| {
        std::fs::symlink_metadata(path).unwrap();
    });
}

fn visit(dir: &Path, seen: &mut impl FnMut(&Path, std::fs::FileType)) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        seen(&entry.path(), kind);
        if kind.is_dir() {
            visit(&entry.path(), seen);
        }
    }
}

fn small_files(tree: &Tree) {
    let mut buffer = vec![0; 1 << 17];
    for _ in 0..5 {
        tree.small.iter().for_each(|f| read(f, &mut buffer));
    }
}

fn random_stats(tree: &Tree) {
    for path in &tree.shuffled {
        std::fs::symlink_metadata(path).unwrap();
    }
}

fn random_reads(tree: &Tree) {
    let file = File::open(&tree.big).unwrap();
    let mut state = 7u64;
    let mut buffer = [0; 4096];
    for _ in 0..20_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let page = (state >> 33) % (BIG as u64 / 4096);
        file.read_exact_at(&mut buffer, page * 4096).unwrap();
    }
}

fn sequential(tree: &Tree) {
    read(&tree.big, &mut vec![0; 1 << 20]);
}

fn exec(tree: &Tree) {
    for _ in 0..5 {
        quiet(Command::new("chroot").arg(&tree.root).args(["/usr/bin/python3", "-S", "-c", "pass"]));
    }
}

fn mmap(tree: &Tree) {
    const TOUCH: &str = "import mmap,sys\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\nsum(m[i] for i in range(0,len(m),4096))";
    quiet(Command::new("/usr/bin/python3").args(["-S", "-c", TOUCH]).arg(&tree.big));
}

fn list(tree: &Tree) {
    quiet(Command::new("ls").arg("-laR").arg(&tree.root));
}

fn quiet(command: &mut Command) {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}
