//! Images without an index: pulled here with one setting, beside containerd, Docker, and what `curl` needs for the same bytes.

use crate::options::{Options, Section};
use crate::report::{Report, median, table};
use crate::support::containerd::container_name;
use crate::support::daemon::Settings;
use crate::support::engine::{Engine, Kind};
use crate::support::link::{Link, Shape};
use crate::support::registry::{self, Registry, image_manifest};
use crate::support::slot::Slot;
use crate::support::workload::{of, until_ready};
use crate::support::{cache, suite_image};
use serde_json::json;
use std::collections::BTreeSet;
use std::process::Command;
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
    /// CPU seconds of the pull.
    cpu: f64,
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
            let mut curls = Vec::new();
            let mut runs: Vec<Vec<Run>> = engines.iter().map(|_| Vec::new()).collect();
            for turn in 0..options.runs {
                curls.push(curl(image, &registry));
                for (kind, runs) in engines.iter().zip(&mut runs) {
                    match run(*kind, image, &slot, &registry, options) {
                        Ok(run) => {
                            eprintln!(
                                "{image:10} {:8} pull {:6.2} run {:5.2}  {:4.0} MB  {:5.1} CPU s   (curl {:.2})",
                                kind.name(),
                                run.pull,
                                run.run,
                                run.rss,
                                run.cpu,
                                curls[turn],
                            );
                            report.record(json!({
                                "section": "eager", "image": image, "engine": kind.name(), "mbit": shape.mbit, "turn": turn, "curl": curls[turn],
                                "pull": run.pull, "run": run.run, "rss_mb": run.rss, "cpu_s": run.cpu,
                            }));
                            runs.push(run);
                        }
                        Err(error) => eprintln!("{image:10} {:8} FAILED\n{error}", kind.name()),
                    }
                }
            }
            body.push(row(image, &engines, median(curls), &runs));
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
    let settings = Settings { more: options.config.clone(), ..Default::default() };
    let engine = Engine::start(kind, &root, &registry.host, &settings);
    let reference = registry.reference(image, "latest");
    let name = container_name();
    let arguments: Vec<String> = of(image).command.iter().map(|a| a.to_string()).collect();
    let cpu = || engine.usage().iter().map(|(_, u)| u.cpu.as_secs_f64()).sum::<f64>();
    let (before, done, peak) = (cpu(), AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    let pulled = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let all: u64 = engine.usage().iter().map(|(_, u)| u.rss_now_kb).sum();
                peak.fetch_max(all, Ordering::Relaxed);
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
    Ok(Run { pull, run, rss: peak.into_inner() as f64 / 1024.0, cpu })
}

fn row(image: &str, engines: &[Kind], curl: f64, runs: &[Vec<Run>]) -> Vec<String> {
    let megabytes = bytes(image) as f64 / 1e6;
    let of = |runs: &[Run], what: fn(&Run) -> f64| median(runs.iter().map(what).collect());
    let mut row = vec![image.to_string(), format!("{megabytes:.0}"), format!("{curl:.2}")];
    row.extend(runs.iter().map(|runs| match runs.len() {
        0 => "failed".into(),
        _ => format!(
            "{:.2} + {:.2} = **{:.2}**; {:.0} MB; {:.1} CPU s/GB",
            of(runs, |r| r.pull),
            of(runs, |r| r.run),
            of(runs, |r| r.pull + r.run),
            of(runs, |r| r.rss),
            of(runs, |r| r.cpu) * 1000.0 / megabytes,
        ),
    }));
    let pull_of = |kind: Kind| {
        engines.iter().position(|e| *e == kind).map(|at| of(&runs[at], |r| r.pull)).filter(|pull| pull.is_finite())
    };
    let Some(ours) = pull_of(Kind::Fallback) else { return row };
    let ratio = |other: Option<f64>| other.map_or("–".into(), |other| format!("**{:.2}**", ours / other));
    row.extend([ratio(pull_of(Kind::Docker)), ratio(pull_of(Kind::Ctd2)), ratio(Some(curl))]);
    row
}

fn summary(runs: usize, engines: &[Kind], shape: Shape, body: &[Vec<String>]) -> String {
    let mut head = vec!["image".to_string(), "MB".to_string(), "curl".to_string()];
    head.extend(engines.iter().map(|e| e.name().to_string()));
    head.extend(["÷ docker (≤ 0.5)", "÷ ctd2 (≤ 0.6)", "÷ curl (or ≤ 1.1)"].map(String::from));
    let link = if shape.mbit == 0 { "unshaped".to_string() } else { shape.to_string() };
    format!(
        "## Images without an index; {link}; medians of {runs}\n\nPull + run = ready, seconds; memory of all processes of the engine together at most; CPU of the pull per compressed GB\n\n{}",
        table(&head, body)
    )
}
