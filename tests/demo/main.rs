//! `make demo`: one real image, started twice behind a slow link: pulled by containerd's overlayfs, and lazily by soci-snapshotter.
//!
//! ```text
//! make demo                                numpy, 500 Mbit/s, 10 ms each way, containerd 2.2
//! make demo ARGS="image=redis containerd=1.6"
//! make demo ARGS="engines=ctd2,ctd16"      any two of the bench's engines: without ours, a check of the demo itself
//! ```
//! Exits 0 if both containers printed the same, both root filesystems are the same file by file, layers were lazy, and nothing is left.
#![forbid(unsafe_code)]

#[path = "../support/mod.rs"]
mod support;

use std::process::ExitCode;
use std::time::{Duration, Instant};
use support::containerd::container_name;
use support::daemon::{Layers, Settings, convert};
use support::engine::{Engine, Kind};
use support::link::{Link, Shape};
use support::registry::{self, Registry, image_manifest};
use support::slot::{Root, Slot, mounts_below};
use support::tree::{self, Tree};
use support::workload::{self, until_ready};

/// How many differences are worth printing.
const SHOWN: usize = 40;

fn main() -> ExitCode {
    // A failure is a sentence to whoever runs this, not a stack.
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload().downcast_ref::<String>().cloned();
        let message = message.or_else(|| panic.payload().downcast_ref::<&str>().map(|m| m.to_string()));
        eprintln!("\nThe demo could not go on: {}", message.unwrap_or_default());
    }));
    match std::panic::catch_unwind(demo) {
        Ok(true) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

struct Choice {
    image: String,
    theirs: Kind,
    ours: Kind,
}

fn choice() -> Choice {
    let mut choice = Choice { image: "numpy".into(), theirs: Kind::Ctd2, ours: Kind::Ours };
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some(("image", image)) => choice.image = image.into(),
            Some(("containerd", "1.6")) => (choice.theirs, choice.ours) = (Kind::Ctd16, Kind::Ours16),
            Some(("containerd", "2.2")) => (choice.theirs, choice.ours) = (Kind::Ctd2, Kind::Ours),
            Some(("engines", pair)) => {
                let kinds: Vec<Kind> = pair.split(',').filter_map(Kind::parse).collect();
                let [theirs, ours] = kinds[..] else { panic!("engines= takes two names, as the bench has them") };
                (choice.theirs, choice.ours) = (theirs, ours);
            }
            _ if argument.starts_with("--") => (), // flags of cargo's own harness
            _ => panic!("'{argument}' is not understood; there are image=NAME and containerd=1.6 or 2.2"),
        }
    }
    choice
}

/// What one way of starting the container gave.
struct Outcome {
    pull: f64,
    start: f64,
    /// MB over the link until the container was ready.
    fetched: f64,
    line: String,
    tree: Tree,
    layers: Option<Layers>,
}

fn demo() -> bool {
    let choice = choice();
    support::undo::on_signals();
    let slot = Slot::take();
    let dir = slot.dir();
    let passed = play(&choice, &slot);
    drop(slot);
    let left = mounts_below(&dir);
    if !left.is_empty() || dir.exists() {
        println!("\nLeft behind, which should not be: {} {left:?}", dir.display());
        return false;
    }
    passed
}

fn play(choice: &Choice, slot: &Slot) -> bool {
    let image = choice.image.as_str();
    let layout = support::suite_image(image);
    let (_, manifest) = image_manifest(&layout);
    let megabytes = manifest.layers.iter().map(|l| l.size).sum::<u64>() as f64 / 1e6;
    println!("The image: {image}, {} layers, {megabytes:.0} MB compressed.", manifest.layers.len());

    let root = slot.root();
    let indexed = root.join("indexed");
    if choice.ours.is_lazy() {
        let start = Instant::now();
        convert(&layout, &indexed, &[]);
        let took = start.elapsed().as_secs_f64();
        println!("The index: `soci convert` took {took:.1} s and added {:.1} MB.", added(&layout, &indexed));
    }

    let mut link = Link::up(slot);
    let registry = Registry::start_behind(&link, registry::Kind::Distribution3, &root, &root.join("storage"));
    registry.push(&layout, image, "latest");
    if choice.ours.is_lazy() {
        registry.push(&indexed, image, "soci");
    }
    link.shape(Shape::REGION);
    println!("The registry: {} behind a link of {}.\n", registry.host, Shape::REGION);

    println!("Pulling and running it with {} …", title(choice.theirs));
    let theirs = start_once(choice.theirs, image, &registry, &link, slot.fresh_root());
    println!("Pulling and running it with {} …\n", title(choice.ours));
    let ours = start_once(choice.ours, image, &registry, &link, slot.fresh_root());

    println!("{:18}{:>9}{:>9}{:>9}{:>14}", "", "pull", "start", "ready", "fetched");
    for (name, o) in [(title(choice.theirs), &theirs), (title(choice.ours), &ours)] {
        println!("{name:18}{:>7.2} s{:>7.2} s{:>7.2} s{:>11.1} MB", o.pull, o.start, o.pull + o.start, o.fetched);
    }
    let saved = (theirs.pull + theirs.start) - (ours.pull + ours.start);
    println!(
        "{:18}{saved:>25.2} s{:>11.1} MB   (ready in {:.0} % of the time)\n",
        "saved",
        theirs.fetched - ours.fetched,
        100.0 * (ours.pull + ours.start) / (theirs.pull + theirs.start)
    );

    let layers = ours.layers.unwrap_or_default();
    // What servers log has the time in it; programs print the same twice.
    let same_line = theirs.line == ours.line || !theirs.line.starts_with("READY");
    let free = tree::implied_directories(&tree::names_in_layers(&layout));
    let differences = tree::differences(&theirs.tree, &ours.tree, &free);
    let bytes: u64 = theirs.tree.values().map(|n| n.size).sum();
    let verdict = |good: bool| if good { "yes" } else { "NO" };
    if choice.ours.is_lazy() {
        println!(
            "layers that were lazy:     {} of {} ({} left to containerd)",
            layers.lazy,
            manifest.layers.len(),
            layers.deferred
        );
    }
    println!("both printed the same:     {}: {}", verdict(same_line), ours.line);
    let what = format!("{} paths, {:.0} MB, compared file by file", theirs.tree.len(), bytes as f64 / 1e6);
    println!("same root filesystem:      {}: {what}", verdict(differences.is_empty()));
    for difference in differences.iter().take(SHOWN) {
        println!("  {difference}");
    }
    if differences.len() > SHOWN {
        println!("  … and {} more", differences.len() - SHOWN);
    }
    if !same_line {
        println!("  overlayfs printed: {}", theirs.line);
    }
    // Layers that are too small for an index are containerd's.
    let lazily = !choice.ours.is_lazy() || layers.lazy == indexed_layers(&indexed);
    lazily && same_line && differences.is_empty()
}

fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::Ctd2 | Kind::Ctd16 | Kind::Ctd2Par => "overlayfs",
        Kind::Docker => "Docker",
        Kind::Ours | Kind::Ours16 | Kind::Fallback => "soci-snapshotter",
    }
}

fn start_once(kind: Kind, image: &str, registry: &Registry, link: &Link, root: Root) -> Outcome {
    let work = workload::of(image);
    let engine = Engine::start(kind, &root, &registry.host, &Settings::default());
    let reference = registry.reference(image, if kind.is_lazy() { "soci" } else { "latest" });
    let name = container_name();
    let command: Vec<String> = work.command.iter().map(|a| a.to_string()).collect();

    let received = link.received();
    let start = Instant::now();
    engine.pull(&reference).unwrap_or_else(|e| panic!("the pull with {} failed: {e}", kind.name()));
    let pull = start.elapsed().as_secs_f64();
    let mut run = engine.run_command(&reference, &name, &command);
    let mut ready = until_ready(&mut run, work.ready, Duration::from_secs(300))
        .unwrap_or_else(|e| panic!("the container with {} did not become ready: {e}", kind.name()));
    let after = start.elapsed().as_secs_f64() - pull;
    let fetched = (link.received() - received) as f64 / 1e6;
    engine.kill(&name);
    let _ = ready.child.wait();

    let containerd = engine.containerd().expect("the demo compares containerds");
    let mount = containerd.mount(engine.snapshotter(), engine.namespace(), &reference, &root.join("mnt"));
    let tree = tree::read(&mount.path);
    drop(mount);
    Outcome { pull, start: after, fetched, line: ready.line, tree, layers: engine.layers() }
}

/// The number of layers that the SOCI index of a converted layout describes.
fn indexed_layers(layout: &std::path::Path) -> usize {
    let index = registry::soci_index(layout);
    let index: soci::oci::Manifest = registry::read_json(&registry::blob_path(layout, &index));
    index.layers.len()
}

/// MB of the blobs that are in `to` and not in `from`.
fn added(from: &std::path::Path, to: &std::path::Path) -> f64 {
    let blobs = std::fs::read_dir(to.join("blobs/sha256")).unwrap().flatten();
    let new = blobs.filter(|b| !from.join("blobs/sha256").join(b.file_name()).exists());
    new.map(|b| b.metadata().unwrap().len()).sum::<u64>() as f64 / 1e6
}
