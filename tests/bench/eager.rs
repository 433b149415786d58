//! Images without an index: pulled here with one setting, beside containerd, Docker, and what `curl` needs for the same bytes.

use crate::options::{Options, Section};
use crate::report::{Report, median, table};
use crate::support::cgroup::Cgroup;
use crate::support::containerd::container_name;
use crate::support::daemon::{Daemon, Settings};
use crate::support::engine::{Engine, Kind};
use crate::support::link::{Link, Shape};
use crate::support::registry::{self, Registry, image_manifest};
use crate::support::slot::{Root, Slot};
use crate::support::workload::{of, until_ready};
use crate::support::{cache, suite_image};
use serde_json::json;
use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a container may take to become ready.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often memory is looked at. Short enough for a process that unpacks a small layer.
const SAMPLE: Duration = Duration::from_millis(25);

#[derive(Clone, Copy)]
struct Run {
    pull: f64,
    run: f64,
    /// MB of all processes of the engine together, at their worst moment during the pull.
    rss: f64,
    /// The same of our daemon with its helpers and workers.
    rss_ours: f64,
    /// CPU seconds of the pull, those of processes that ended meanwhile included.
    cpu: f64,
    /// Seconds from the first byte of the largest layer until its files were there, by our daemon's log.
    largest: f64,
    /// Seconds of a second pull, after the image was removed, and parts of layers that were inflated ahead of their turn in it.
    again: f64,
    parts: u64,
}

/// Seconds that the largest layer needs at least: on the link alone, to be inflated by one core, to be written.
#[derive(Clone, Copy)]
struct Bounds {
    link: f64,
    inflate: f64,
    write: f64,
}

impl Bounds {
    fn of(image: &str, registry: &Registry, root: &Root) -> Bounds {
        let layout = suite_image(image);
        let (_, manifest) = image_manifest(&layout);
        let layer = manifest.layers.iter().max_by_key(|layer| layer.size).expect("an image has layers");
        let blob = registry::blob_path(&layout, &layer.digest);
        let (tar, out) = (root.join("layer.tar"), root.dir("written"));
        let timed = |command: &mut Command| {
            let start = Instant::now();
            assert!(command.status().unwrap().success(), "{command:?}");
            start.elapsed().as_secs_f64()
        };
        let link = timed(
            Command::new("curl")
                .args(["--silent", "--fail", "-o", "/dev/null"])
                .arg(format!("http://{}/v2/{image}/blobs/{}", registry.host, layer.digest)),
        );
        let to = |path: &std::path::Path| std::fs::File::create(path).unwrap();
        let gunzip = || {
            let mut command = Command::new("gzip");
            command.args(["-dc"]).arg(&blob);
            command
        };
        let inflate = timed(gunzip().stdout(to(std::path::Path::new("/dev/null"))));
        timed(gunzip().stdout(to(&tar)));
        let write = timed(Command::new("tar").arg("-xpf").arg(&tar).arg("--numeric-owner").arg("-C").arg(&out));
        Bounds { link, inflate, write }
    }

    fn most(self) -> f64 {
        self.link.max(self.inflate).max(self.write)
    }
}

pub fn measure(options: &Options, report: &mut Report) {
    let (plan, engines) = (options.plan(Section::Eager), options.engines(Section::Eager));
    let slot = Slot::take();
    let root = slot.root();
    let mut link = Link::up(&slot);
    let registry = Registry::start_behind(&link, registry::Kind::Distribution3, &root, &cache().join("registry"));
    let images: BTreeSet<&String> = plan.iter().flat_map(|(_, images)| images).collect();
    for image in images {
        eprintln!("# pushing {image}");
        registry.push(&suite_image(image), image, "latest");
    }
    for (shape, images) in &plan {
        link.shape(*shape);
        let mut body = Vec::new();
        for image in images {
            let bounds = Bounds::of(image, &registry, &slot.fresh_root());
            eprintln!(
                "{image:10} largest layer: {:.2} s on the link, {:.2} s to inflate by one core (gzip -dc), {:.2} s to write (tar -x)",
                bounds.link, bounds.inflate, bounds.write
            );
            let mut curls = Vec::new();
            let mut runs: Vec<Vec<Run>> = engines.iter().map(|_| Vec::new()).collect();
            for turn in 0..options.runs {
                curls.push(curl(image, &registry));
                for (kind, runs) in engines.iter().zip(&mut runs) {
                    match run(*kind, image, &slot, &registry, options) {
                        Ok(run) => {
                            eprintln!(
                                "{image:10} {:8} pull {:6.2} run {:5.2}  {:4.0} MB (ours {:.0})  {:5.1} CPU s   largest layer {:.2}  again {:.2} ({} parts)  (curl {:.2})",
                                kind.name(),
                                run.pull,
                                run.run,
                                run.rss,
                                run.rss_ours,
                                run.cpu,
                                run.largest,
                                run.again,
                                run.parts,
                                curls[turn],
                            );
                            report.record(json!({
                                "section": "eager", "image": image, "engine": kind.name(), "mbit": shape.mbit, "turn": turn, "curl": curls[turn],
                                "pull": run.pull, "run": run.run, "rss_mb": run.rss, "rss_ours_mb": run.rss_ours, "cpu_s": run.cpu,
                                "largest_layer": run.largest, "again": run.again, "parts": run.parts, "bound_link": bounds.link, "bound_inflate": bounds.inflate, "bound_write": bounds.write,
                            }));
                            runs.push(run);
                        }
                        Err(error) => eprintln!("{image:10} {:8} FAILED\n{error}", kind.name()),
                    }
                }
            }
            body.push(row(image, &engines, median(curls), bounds, &runs));
        }
        report.section(&summary(options.runs, &engines, *shape, &body));
    }
}

fn bytes(image: &str) -> u64 {
    image_manifest(&suite_image(image)).1.layers.iter().map(|l| l.size).sum()
}

/// Seconds that curl needs for all layers at once.
fn curl(image: &str, registry: &Registry) -> f64 {
    let (_, manifest) = image_manifest(&suite_image(image));
    let mut command = Command::new("curl");
    command.args(["--silent", "--fail", "--parallel", "--parallel-immediate"]);
    for layer in &manifest.layers {
        command.args(["-o", "/dev/null"]).arg(format!("http://{}/v2/{image}/blobs/{}", registry.host, layer.digest));
    }
    let start = Instant::now();
    assert!(command.status().unwrap().success(), "{command:?}");
    start.elapsed().as_secs_f64()
}

fn run(kind: Kind, image: &str, slot: &Slot, registry: &Registry, options: &Options) -> Result<Run, String> {
    let root = slot.fresh_root();
    let settings = Settings { more: options.config.clone(), log_level: "debug".into(), ..Default::default() };
    let cgroup = Cgroup::new(kind.name());
    let engine = Engine::start(kind, &root, &registry.host, &settings);
    let reference = registry.reference(image, "latest");
    let name = container_name();
    let arguments: Vec<String> = of(image).command.iter().map(|a| a.to_string()).collect();
    // Workers are nobody's children for long, so their time is counted by the kernel, for all that is born of the engine.
    let cgroup = cgroup.filter(|cgroup| engine.pids().iter().all(|pid| cgroup.add(*pid)));
    let cpu = || match cgroup.as_ref().and_then(Cgroup::cpu) {
        Some(cpu) => cpu.as_secs_f64(),
        None => engine.usage().iter().map(|(_, u)| u.cpu.as_secs_f64()).sum::<f64>(),
    };
    let (before, done) = (cpu(), AtomicBool::new(false));
    let of_whom = Mutex::new(Vec::<String>::new());
    let (peak, peak_ours) = (AtomicU64::new(0), AtomicU64::new(0));
    let start = Instant::now();
    let pulled = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let usage = engine.usage();
                let sum = |of: &dyn Fn(&str) -> bool| -> u64 {
                    usage.iter().filter(|(name, _)| of(name)).map(|(_, u)| u.rss_now_kb).sum()
                };
                peak.fetch_max(sum(&|_| true), Ordering::Relaxed);
                let ours = sum(&|name| name.starts_with("soci"));
                if peak_ours.fetch_max(ours, Ordering::Relaxed) < ours {
                    *of_whom.lock().unwrap() =
                        usage.iter().map(|(name, u)| format!("{name} {}", u.rss_now_kb / 1024)).collect();
                }
                std::thread::sleep(SAMPLE);
            }
        });
        let pulled = engine.pull(&reference);
        let took = start.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        pulled.map(|()| took)
    });
    let pull = pulled?;
    let cpu = cpu() - before;
    if let Some(dir) = &options.keep
        && let Some(daemon) = &engine.daemon
    {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join(format!("{image}-{}.log", kind.name())), daemon.log()).unwrap();
    }
    let start = Instant::now();
    let mut ready = until_ready(&mut engine.run_command(&reference, &name, &arguments), of(image).ready, PATIENCE)?;
    let run = start.elapsed().as_secs_f64();
    engine.kill(&name);
    let _ = ready.child.wait();
    let (again, parts) = match &engine.daemon {
        Some(daemon) => again(&engine, daemon, &reference)?,
        None => (0.0, 0),
    };
    eprintln!("{image:10} {:8} MB at the worst moment: {}", kind.name(), of_whom.into_inner().unwrap().join(", "));
    let largest = engine.daemon.as_ref().map_or(0.0, |daemon| largest(&daemon.log()));
    let megabytes = |kibibytes: AtomicU64| kibibytes.into_inner() as f64 / 1024.0;
    Ok(Run { pull, run, rss: megabytes(peak), rss_ours: megabytes(peak_ours), cpu, largest, again, parts })
}

/// Removes the image and pulls it again, with what the first pull has left behind.
fn again(engine: &Engine, daemon: &Daemon, reference: &str) -> Result<(f64, u64), String> {
    let Some(containerd) = engine.containerd() else { return Ok((0.0, 0)) };
    containerd.remove_image(reference);
    let gone = Instant::now();
    while !containerd.snapshots("soci").is_empty() && gone.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(100));
    }
    let before = daemon.log().len();
    let start = Instant::now();
    engine.pull(reference)?;
    let took = start.elapsed().as_secs_f64();
    let log = daemon.log();
    let parts = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        (line["msg"] == "layer inflated").then(|| line["parts"].as_u64()).flatten()
    };
    Ok((took, log[before..].lines().filter_map(parts).sum()))
}

/// How long the largest layer took the first time, by what the daemon says of each.
fn largest(log: &str) -> f64 {
    let unpacked = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        (line["msg"] == "layer unpacked").then_some(())?;
        let size = line["size"].as_u64().or_else(|| line["size"].as_str()?.parse().ok())?;
        let took = line["took"].as_str()?;
        let seconds = match (took.strip_suffix("ms"), took.strip_suffix("µs")) {
            (Some(ms), _) => ms.parse::<f64>().ok()? / 1e3,
            (_, Some(us)) => us.parse::<f64>().ok()? / 1e6,
            _ => took.strip_suffix('s')?.parse().ok()?,
        };
        Some((size, seconds))
    };
    let mut all: Vec<(u64, f64)> = log.lines().filter_map(unpacked).collect();
    all.sort_by_key(|(size, _)| std::cmp::Reverse(*size));
    all.first().map_or(0.0, |(_, seconds)| *seconds)
}

fn row(image: &str, engines: &[Kind], curl: f64, bounds: Bounds, runs: &[Vec<Run>]) -> Vec<String> {
    let megabytes = bytes(image) as f64 / 1e6;
    let of = |runs: &[Run], what: fn(&Run) -> f64| median(runs.iter().map(what).collect());
    let mut row = vec![image.to_string(), format!("{megabytes:.0}"), format!("{curl:.2}")];
    row.extend(runs.iter().map(|runs| match runs.len() {
        0 => "failed".into(),
        _ => format!(
            "{:.2} + {:.2} = **{:.2}**; {:.0} MB (ours {:.0}); {:.1} CPU s/GB",
            of(runs, |r| r.pull),
            of(runs, |r| r.run),
            of(runs, |r| r.pull + r.run),
            of(runs, |r| r.rss),
            of(runs, |r| r.rss_ours),
            of(runs, |r| r.cpu) * 1000.0 / megabytes,
        ),
    }));
    let pull_of = |kind: Kind| {
        engines.iter().position(|e| *e == kind).map(|at| of(&runs[at], |r| r.pull)).filter(|pull| pull.is_finite())
    };
    let fallback =
        engines.iter().position(|e| *e == Kind::Fallback).map(|at| &runs[at]).filter(|runs| !runs.is_empty());
    let Some(fallback) = fallback else {
        row.extend(["–"; 4].map(String::from));
        return row;
    };
    let (ours, largest, again) = (of(fallback, |r| r.pull), of(fallback, |r| r.largest), of(fallback, |r| r.again));
    let ratio = |other: Option<f64>| other.map_or("–".into(), |other| format!("**{:.2}**", ours / other));
    row.extend([ratio(pull_of(Kind::Docker)), ratio(pull_of(Kind::Ctd2)), ratio(Some(curl))]);
    row.push(format!(
        "{:.0} % ({largest:.2} s; link {:.2}, inflate {:.2}, write {:.2}); pulled again in {again:.2} s",
        100.0 * bounds.most() / largest,
        bounds.link,
        bounds.inflate,
        bounds.write
    ));
    row
}

fn summary(runs: usize, engines: &[Kind], shape: Shape, body: &[Vec<String>]) -> String {
    let mut head = vec!["image".to_string(), "MB".to_string(), "curl".to_string()];
    head.extend(engines.iter().map(|e| e.name().to_string()));
    head.extend(
        [
            "÷ docker (≤ 0.5)",
            "÷ ctd2 (≤ 0.6)",
            "÷ curl (or ≤ 1.1)",
            "largest layer: share of what it needs at least (≥ 90 %)",
        ]
        .map(String::from),
    );
    let link = if shape.mbit == 0 { "unshaped".to_string() } else { shape.to_string() };
    format!(
        "## Images without an index; {link}; medians of {runs}\n\nPull + run = ready, seconds; memory of all processes of the engine together at most (our daemon and workers: ≤ 150 MB); CPU of the pull per compressed GB, workers included\n\n{}",
        table(&head, body)
    )
}
