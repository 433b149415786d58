//! What somebody at a terminal sees, and how much memory it takes: `soci` on a real pty, and with images of some hundred megabytes.

use super::lab::ran;
use crate::support::{
    image::{Form, Image, Layer, busybox, noise},
    process::Usage,
    proxy::Proxy,
    registry::{Kind, Registry},
    slot::{Root, Slot},
};
use serde_json::Value;
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Two registries, the first slow, with an image of noise.
struct Slow {
    source: Proxy,
    image: String,
    target: String,
    layers: Vec<String>,
    _registries: [Registry; 2],
    _root: Root,
    _slot: Slot,
}

impl Slow {
    fn new(layers: u64) -> Slow {
        let slot = Slot::take();
        let root = slot.root();
        let from = Registry::start(Kind::Distribution3, &root);
        let to = Registry::start(Kind::Referrers, &root);
        let layout = root.join("layout");
        let noisy = (0..layers).map(|n| {
            let mut layer = Layer::new().form(Form::Tar);
            layer.file(format!("noise-{n}"), noise(n, 6 << 20));
            layer
        });
        Image::new(noisy.collect()).write(&layout);
        from.push(&layout, "lab/noise", "v1");
        let (_, manifest) = crate::support::registry::image_manifest(&layout);
        let source = Proxy::start(&from.host);
        // About two seconds for each, all at once.
        source.shape(3 << 20, Duration::ZERO);
        Slow {
            image: source.reference("lab/noise", "v1"),
            target: to.reference("lab/noise", "soci"),
            layers: manifest.layers.iter().map(|layer| layer.digest.hex()[..12].to_owned()).collect(),
            source,
            _registries: [from, to],
            _root: root,
            _slot: slot,
        }
    }

    /// `soci convert --registry MORE… FROM TO` with a terminal for stdout and stderr; what appeared on it.
    fn on_a_terminal(&self, more: &str, target: &str) -> String {
        let soci = env!("CARGO_BIN_EXE_soci");
        let line = format!("{soci} convert --registry --min-layer-size 0 {more} {} {target}", self.image);
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env("TERM", "xterm");
        let done = ran(&mut script);
        assert_eq!(done.code, 0, "{}", done.text());
        done.text().to_owned()
    }
}

#[test]
fn privileged_a_terminal_shows_how_each_layer_gets_on() {
    let slow = Slow::new(3);
    let screen = slow.on_a_terminal("", &slow.target);
    // Bars are drawn over one another; each has the layer, how much of it is through, and of how much.
    let drawn: Vec<&str> = screen.split(['\r', '\n']).filter(|line| line.contains("MiB")).collect();
    for layer in &slow.layers {
        let of_it: Vec<&&str> = drawn.iter().filter(|line| line.contains(layer.as_str())).collect();
        assert!(of_it.iter().any(|line| line.contains("/6.0")), "{layer} of 6 MiB: {of_it:?}");
        let mut states: Vec<&&&str> = of_it.iter().collect();
        states.dedup();
        assert!(states.len() > 3, "{layer} does not move: {of_it:?}");
    }
    // All at once: the last layer was on the screen before the first was done.
    let first_line = screen.find(" -> ztoc ").unwrap();
    assert!(slow.layers.iter().all(|layer| screen[..first_line].contains(layer.as_str())), "one after another");
    // The lines stay, whole; and at the end nothing is left of the bars.
    for layer in &slow.layers {
        let kept = screen
            .lines()
            .any(|line| line.contains(&format!("layer sha256:{layer}")) && line.contains(" -> ztoc sha256:"));
        assert!(kept, "{screen:?}");
    }
    let end = screen.rsplit("\u{1b}[2K").next().unwrap();
    assert!(!end.contains("MiB"), "{end:?}");
}

#[test]
fn privileged_quiet_and_json_are_what_scripts_read_also_on_a_terminal() {
    let slow = Slow::new(2);
    let quiet = slow.on_a_terminal("--quiet", &slow.target);
    assert!(quiet.starts_with("sha256:") && quiet.trim().len() == 71 && !quiet.contains('\u{1b}'), "{quiet:?}");
    slow.source.shape(0, Duration::ZERO);
    // Without a terminal there are no bars, with --json nothing but the document is on stdout.
    let args = ["convert", "--registry", "--min-layer-size", "0", "--json", &slow.image, &slow.target];
    let json = super::soci(args).ok();
    let document: Value = serde_json::from_str(json.text()).unwrap();
    assert_eq!(document["image"]["digest"], quiet.trim());
    assert_eq!((json.stderr.as_str(), document["warnings"].as_array().unwrap().len()), ("", 0));
    // On a terminal with --json there are bars, on stderr, and stdout can go into a file.
    let file = tempfile::NamedTempFile::new().unwrap();
    let other = format!("{} > {}", slow.target.replace(":soci", ":other"), file.path().display());
    slow.source.shape(3 << 20, Duration::ZERO);
    let screen = slow.on_a_terminal("--json --force", &other);
    assert!(screen.contains("MiB"), "{screen:?}");
    let same: Value = serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap();
    assert_eq!(same["image"], document["image"]);
}

/// MiB that the tool takes beside the layers, not optimised and with its code in memory, and some to spare: 16 were seen.
const ITSELF: u64 = 48;

/// Runs it to its end; the largest its memory was, in bytes.
fn peak(running: &mut Child) -> u64 {
    let (mut peak, until) = (0, Instant::now() + Duration::from_secs(300));
    loop {
        peak = Usage::of(running.id()).rss_peak_kb.max(peak);
        if let Some(status) = running.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return peak << 10;
        }
        assert!(Instant::now() < until, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Layers that hardly compress, and layers that compress a hundred times over, so that what they inflate to says nothing about what they take.
fn heavy(layout: &Path) -> u64 {
    let mut layers = vec![busybox()];
    for n in 0..5 {
        let mut layer = Layer::new();
        for part in 0..3 {
            layer.file(format!("noise-{n}-{part}"), noise(n * 3 + part, 16 << 20));
        }
        layers.push(layer);
    }
    for n in 0..2_u8 {
        let mut layer = Layer::new();
        for part in 0..3 {
            layer.file(format!("zeros-{n}-{part}"), vec![n; 48 << 20]);
        }
        layers.push(layer);
    }
    Image::new(layers).write(layout);
    let (_, manifest) = crate::support::registry::image_manifest(layout);
    manifest.layers.iter().map(|layer| layer.size).sum()
}

#[test]
fn privileged_memory_stays_within_its_bound_and_layers_go_side_by_side_within_it() {
    let slot = Slot::take();
    let root = slot.root();
    let (from, to) = (Registry::start(Kind::Distribution3, &root), Registry::start(Kind::Docker28, &root));
    let layout = root.join("layout");
    let bytes = heavy(&layout);
    assert!(bytes > 240 << 20, "{bytes}");
    from.push(&layout, "lab/heavy", "v1");
    let source = Proxy::start(&from.host);
    let image = source.reference("lab/heavy", "v1");
    let convert = |bound: &str, tag: &str| {
        let mut soci = super::command();
        soci.args(["convert", "--registry", "--quiet", "--min-layer-size", "0"]);
        soci.args(["--max-memory", bound, &image, &to.reference(&format!("lab/{tag}"), "soci")]);
        soci.stdout(Stdio::null()).spawn().unwrap()
    };
    // One layer at a time, or four. Either way it is what they are let in for, and what the tool takes by itself; not what they are.
    let (least, much) = (peak(&mut convert("32MiB", "least")), peak(&mut convert("1GiB", "much")));
    eprintln!("{bytes} bytes of layers: {} MiB of memory with 32 MiB, {} MiB with 1 GiB", least >> 20, much >> 20);
    assert!(least < (32 + ITSELF) << 20, "{least}");
    assert!(much < (4 * 24 + ITSELF) << 20, "{much}");
    // As many layers at once as the bound has room for.
    let at_once = |bound: &str, tag: &str| {
        source.shape(1 << 20, Duration::ZERO);
        let mut running = convert(bound, tag);
        let mut most = 0;
        let until = Instant::now() + Duration::from_secs(4);
        while Instant::now() < until {
            most = source.downloads().max(most);
            std::thread::sleep(Duration::from_millis(10));
        }
        running.kill().unwrap();
        running.wait().unwrap();
        source.shape(0, Duration::ZERO);
        most
    };
    assert_eq!(at_once("32MiB", "one"), 1);
    assert!(at_once("1GiB", "several") >= 4);
}
