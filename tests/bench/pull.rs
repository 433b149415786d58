//! Pull, run, ready: every engine on every image over a slow link, each run on a fresh filesystem, the engines taking turns.

use crate::options::{Options, Section};
use crate::report::{Report, median, table};
use crate::support::containerd::container_name;
use crate::support::daemon::{Layers, Settings, convert};
use crate::support::engine::{Engine, Kind};
use crate::support::link::{Link, Shape};
use crate::support::registry::{self, Registry};
use crate::support::slot::{Root, Slot};
use crate::support::workload::{READ_ALL, of, until_ready};
use crate::support::{cache, suite_image};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What the container does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// What the image is for.
    Workload,
    /// Reads every file.
    Everything,
}

/// How long a container may take to become ready.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often the link is looked at.
const SAMPLE: Duration = Duration::from_millis(20);
/// An image counts as complete when nothing has come for this long.
const QUIET: Duration = Duration::from_millis(400);
/// How long we wait for that.
const COMPLETE_WITHIN: Duration = Duration::from_secs(120);

/// One run.
struct Run {
    pull: f64,
    run: f64,
    /// MB received until the pull was done, until ready, and until nothing more came.
    mb_pull: f64,
    mb_ready: f64,
    mb_complete: f64,
    /// Seconds from the start of the pull until the last byte.
    complete: f64,
    /// Share of the link's rate in use between the first and the last span (see `utilisation`).
    utilisation: f64,
    layers: Option<Layers>,
    usage: Vec<(String, u64, f64)>,
    timeline: Vec<(f64, u64)>,
}

impl Run {
    fn ready(&self) -> f64 {
        self.pull + self.run
    }
}

pub fn measure(options: &Options, reader: Reader, report: &mut Report) {
    let section = match reader {
        Reader::Workload => Section::Pull,
        Reader::Everything => Section::Full,
    };
    let (plan, engines) = (options.plan(section), options.engines(section));
    let slot = Slot::take();
    let root = slot.root();
    let mut link = Link::up(&slot);
    report.note(&format!("TCP congestion control: {}.", link.congestion_control()));
    let registry = Registry::start_behind(&link, registry::Kind::Distribution3, &root, &cache().join("registry"));
    let images: BTreeSet<&String> = plan.iter().flat_map(|(_, images)| images).collect();
    for image in images {
        publish(image, &root, &registry, options, engines.iter().any(|e| e.is_lazy()));
    }
    for (shape, images) in &plan {
        link.shape(*shape);
        let case = Case { reader, slot: &slot, link: &link, shape: *shape, registry: &registry, options };
        let mut rows = Vec::new();
        for image in images {
            let mut runs: Vec<Vec<Run>> = engines.iter().map(|_| Vec::new()).collect();
            for turn in 0..options.runs {
                for (engine, runs) in engines.iter().zip(&mut runs) {
                    match case.run(*engine, image, turn) {
                        Ok(run) => {
                            eprintln!("{}", progress(image, *engine, &run));
                            report.record(record(image, *engine, reader, *shape, turn, &run));
                            runs.push(run);
                        }
                        Err(error) => {
                            eprintln!("{image:10} {:8} FAILED\n{error}", engine.name());
                            report.record(
                                json!({"section": "pull", "image": image, "engine": engine.name(), "error": error}),
                            );
                        }
                    }
                }
            }
            rows.push((image.clone(), runs));
        }
        report.section(&summary(options.runs, &engines, reader, *shape, &rows));
    }
}

/// Pushes an image, and with an index under another tag.
fn publish(image: &str, root: &Root, registry: &Registry, options: &Options, indexed: bool) {
    eprintln!("# pushing {image}");
    let layout = suite_image(image);
    registry.push(&layout, image, "latest");
    if indexed {
        let converted = root.join(&format!("soci-{image}"));
        let size = options.min_layer.map(|n| n.to_string());
        let flags: Vec<&str> = size.iter().flat_map(|n| ["--min-layer-size", n]).collect();
        convert(&layout, &converted, &flags);
        registry.push(&converted, image, "soci");
    }
}

/// What all runs of one table share.
struct Case<'a> {
    reader: Reader,
    slot: &'a Slot,
    link: &'a Link,
    shape: Shape,
    registry: &'a Registry,
    options: &'a Options,
}

impl Case<'_> {
    fn run(&self, kind: Kind, image: &str, turn: usize) -> Result<Run, String> {
        let link = self.link;
        let root = self.slot.fresh_root();
        let settings = Settings { more: self.options.config.clone(), ..Default::default() };
        let engine = Engine::start(kind, &root, &self.registry.host, &settings);
        let reference = self.registry.reference(image, if kind.is_lazy() { "soci" } else { "latest" });
        let name = container_name();
        let (command, marks) = match self.reader {
            Reader::Workload => (of(image).command, of(image).ready),
            Reader::Everything => (READ_ALL, of("numpy").ready),
        };
        let arguments: Vec<String> = command.iter().map(|a| a.to_string()).collect();

        let received = link.received();
        let mb = |bytes: u64| (bytes - received) as f64 / 1e6;
        let result = std::thread::scope(|scope| {
            let done = Arc::new(AtomicBool::new(false));
            let start = Instant::now();
            let sampler = scope.spawn({
                let done = done.clone();
                move || sample(link, start, received, &done)
            });
            let outcome = (|| {
                engine.pull(&reference)?;
                let pull = start.elapsed().as_secs_f64();
                let mb_pull = mb(link.received());
                let mut ready = until_ready(&mut engine.run_command(&reference, &name, &arguments), marks, PATIENCE)?;
                let run = start.elapsed().as_secs_f64() - pull;
                let mb_ready = mb(link.received());
                // Before the wait: what follows is the background's.
                let usage = engine
                    .usage()
                    .into_iter()
                    .map(|(name, u)| (name, u.rss_peak_kb / 1024, u.cpu.as_secs_f64()))
                    .collect();
                if kind.is_lazy() {
                    wait_for_quiet(link);
                }
                engine.kill(&name);
                let _ = ready.child.wait();
                Ok((pull, run, mb_pull, mb_ready, usage))
            })();
            done.store(true, Ordering::Relaxed);
            let timeline = sampler.join().unwrap();
            outcome.map(|(pull, run, mb_pull, mb_ready, usage)| Run {
                pull,
                run,
                mb_pull,
                mb_ready,
                mb_complete: timeline.last().map_or(0.0, |s| s.1 as f64 / 1e6),
                complete: last_byte(&timeline),
                utilisation: utilisation(&timeline, self.shape),
                layers: engine.layers(),
                usage,
                timeline,
            })
        });
        if let (Some(dir), Some(daemon)) = (&self.options.keep, &engine.daemon) {
            std::fs::create_dir_all(dir).unwrap();
            std::fs::write(
                dir.join(format!("{image}-{}-{}mbit-{turn}.log", kind.name(), self.shape.mbit)),
                daemon.log(),
            )
            .unwrap();
        }
        result
    }
}

/// Seconds since the start and bytes since the start.
fn sample(link: &Link, start: Instant, received: u64, done: &AtomicBool) -> Vec<(f64, u64)> {
    let mut timeline = Vec::new();
    while !done.load(Ordering::Relaxed) {
        timeline.push((start.elapsed().as_secs_f64(), link.received() - received));
        std::thread::sleep(SAMPLE);
    }
    timeline.push((start.elapsed().as_secs_f64(), link.received() - received));
    timeline
}

fn wait_for_quiet(link: &Link) {
    let start = Instant::now();
    let (mut bytes, mut since) = (link.received(), Instant::now());
    while since.elapsed() < QUIET && start.elapsed() < COMPLETE_WITHIN {
        std::thread::sleep(SAMPLE);
        // Keep-alives and acknowledgements are not an image.
        if link.received() > bytes + 2_000 {
            (bytes, since) = (link.received(), Instant::now());
        }
    }
}

fn last_byte(timeline: &[(f64, u64)]) -> f64 {
    let total = timeline.last().map_or(0, |s| s.1);
    timeline.iter().find(|s| s.1 + 2_000 >= total).map_or(0.0, |s| s.0)
}

/// The share of the link that was in use from the first span until the image was complete. What comes before the first span (manifests,
/// the index, zTOCs) and the trickle after the last are cut off at 3 % and 99 % of the bytes.
fn utilisation(timeline: &[(f64, u64)], shape: Shape) -> f64 {
    let total = timeline.last().map_or(0, |s| s.1) as f64;
    let at = |share: f64| timeline.iter().find(|s| s.1 as f64 >= total * share);
    match (at(0.03), at(0.99)) {
        (Some(from), Some(to)) if to.0 > from.0 && shape.mbit > 0 => {
            (to.1 - from.1) as f64 / (to.0 - from.0) / shape.bytes_per_second()
        }
        _ => 0.0,
    }
}

fn progress(image: &str, engine: Kind, run: &Run) -> String {
    let usage: Vec<String> = run.usage.iter().map(|(name, rss, cpu)| format!("{name} {rss} MB {cpu:.1} s")).collect();
    format!(
        "{image:10} {:8} pull {:6.2} run {:6.2} ready {:6.2}  {:6.1} MB until ready, {:6.1} MB in all after {:5.2} s, link {:3.0} %  {}{}",
        engine.name(),
        run.pull,
        run.run,
        run.ready(),
        run.mb_ready,
        run.mb_complete,
        run.complete,
        run.utilisation * 100.0,
        usage.join(", "),
        run.layers.map_or(String::new(), |l| format!("  {l:?}")),
    )
}

fn record(image: &str, engine: Kind, reader: Reader, shape: Shape, turn: usize, run: &Run) -> serde_json::Value {
    json!({
        "section": if reader == Reader::Workload { "pull" } else { "full" },
        "image": image, "engine": engine.name(), "mbit": shape.mbit, "delay_us": shape.delay_us, "turn": turn,
        "pull": run.pull, "run": run.run, "ready": run.ready(),
        "mb_pull": run.mb_pull, "mb_ready": run.mb_ready, "mb_complete": run.mb_complete, "complete": run.complete,
        "utilisation": run.utilisation,
        "lazy": run.layers.map(|l| l.lazy), "deferred": run.layers.map(|l| l.deferred), "failed": run.layers.map(|l| l.failed),
        "processes": run.usage.iter().map(|(name, rss, cpu)| json!({"name": name, "rss_peak_mb": rss, "cpu_s": cpu})).collect::<Vec<_>>(),
        "timeline": run.timeline.iter().map(|(t, b)| json!([(t * 1000.0).round(), b])).collect::<Vec<_>>(),
    })
}

/// Ready times as ratios to containerd 2.x, as the issue states them for the region link.
const TARGETS: [(&str, f64); 7] = [
    ("redis", 0.35),
    ("numpy", 0.45),
    ("node", 0.33),
    ("postgres", 0.48),
    ("rabbitmq", 0.75),
    ("ffmpeg", 0.50),
    ("tensorflow", 0.60),
];

fn summary(
    runs_each: usize,
    engines: &[Kind],
    reader: Reader,
    shape: Shape,
    rows: &[(String, Vec<Vec<Run>>)],
) -> String {
    let of = |runs: &[Run], what: fn(&Run) -> f64| median(runs.iter().map(what).collect());
    let mut head = vec!["image".to_string()];
    head.extend(engines.iter().map(|e| e.name().to_string()));
    let base = engines.iter().position(|e| *e == Kind::Ctd2);
    let ours = engines.iter().position(|e| *e == Kind::Ours);
    let compared = base.zip(ours);
    if compared.is_some() {
        head.extend(["ours ÷ ctd2".to_string(), "target".to_string(), "link in use".to_string()]);
    }
    let mut body = Vec::new();
    for (image, runs) in rows {
        let mut row = vec![image.clone()];
        row.extend(runs.iter().map(|runs| match runs.len() {
            0 => "failed".to_string(),
            _ => format!(
                "{:.2} + {:.2} = **{:.2}** ({:.0} MB)",
                of(runs, |r| r.pull),
                of(runs, |r| r.run),
                of(runs, Run::ready),
                of(runs, |r| r.mb_ready)
            ),
        }));
        if let Some((base, ours)) = compared {
            let ratio = of(&runs[ours], Run::ready) / of(&runs[base], Run::ready);
            let target = match reader {
                Reader::Everything => Some(1.0),
                Reader::Workload if shape == Shape::REGION => TARGETS.iter().find(|t| t.0 == image).map(|t| t.1),
                Reader::Workload => None,
            };
            row.push(if ratio.is_finite() { format!("**{ratio:.2}**") } else { "–".into() });
            row.push(target.map_or("–".into(), |t| format!("≤ {t:.2}")));
            row.push(if runs[ours].is_empty() {
                "–".into()
            } else {
                format!("{:.0} %", of(&runs[ours], |r| r.utilisation) * 100.0)
            });
        }
        body.push(row);
    }
    let what = match reader {
        Reader::Workload => "Pull + run = ready, seconds (MB received until ready)",
        Reader::Everything => {
            "A container that reads every file of its image: pull + run = done, seconds (MB received)"
        }
    };
    let mut out = format!("## {what}; {shape}; medians of {}\n\n{}", runs_each, table(&head, &body));
    out += "\nPeak RSS (MB) and CPU (s) until ready:\n\n";
    let mut body = Vec::new();
    for (image, runs) in rows {
        let mut row = vec![image.clone()];
        row.extend(runs.iter().map(|runs| {
            runs.last().map_or("–".into(), |r| {
                r.usage.iter().map(|(n, m, c)| format!("{n} {m} MB, {c:.1} s")).collect::<Vec<_>>().join("; ")
            })
        }));
        body.push(row);
    }
    out + &table(&head[..=engines.len()], &body)
}
