//! Building zTOCs: `soci convert` of whole images beside `gzip -dc` of the same layers.

use crate::options::{Options, Section};
use crate::report::{Report, median, table};
use crate::support::registry::{blob_path, image_manifest};
use crate::support::slot::Slot;
use crate::support::suite_image;
use crate::timed::{Cost, cost};
use serde_json::json;
use std::process::Command;

/// What the Go builder took for the same images on the machine of `field/baselines.md`, and what `gzip -dc` of them took there: ratios hold
/// between machines. Wall, CPU seconds, MB of RSS; the `gzip` seconds are scaled from the one layer that was measured (7.4 s for 1.56 GB).
const GO: [(&str, f64, f64, u64, f64); 2] = [("ffmpeg", 5.5, 7.0, 58, 3.1), ("tensorflow", 12.2, 14.0, 147, 8.4)];

pub fn measure(options: &Options, report: &mut Report) {
    let slot = Slot::take();
    let mut rows = Vec::new();
    let (_, images) = options.plan(Section::Ztoc).remove(0); // the link is of no interest here
    for image in &images {
        let layout = suite_image(image);
        let (_, manifest) = image_manifest(&layout);
        let (mut gzip, mut ours, mut unpacked) = (Vec::new(), Vec::new(), 0);
        for _ in 0..options.runs.max(1) {
            let root = slot.fresh_root();
            // A fresh filesystem has no cached blobs: both read the layout from the page cache.
            let layers: Vec<_> = manifest.layers.iter().map(|l| blob_path(&layout, &l.digest)).collect();
            let costs: Vec<Cost> = layers.iter().map(|l| cost(Command::new("gzip").arg("-dc").arg(l))).collect();
            gzip.push((costs.iter().map(|c| c.wall).sum::<f64>(), costs.iter().map(|c| c.cpu).sum::<f64>()));
            let mut convert = Command::new(env!("CARGO_BIN_EXE_soci"));
            convert.args(["convert", "--standalone"]).arg(&layout).arg(root.join("out"));
            ours.push(cost(convert.args(["--format", "oci-dir", "--min-layer-size", "0"])));
            if unpacked == 0 {
                unpacked = layers.iter().map(|l| uncompressed_size(l)).sum::<u64>();
            }
        }
        let of = |what: fn(&Cost) -> f64| median(ours.iter().map(what).collect());
        let (wall, cpu) = (of(|c| c.wall), of(|c| c.cpu));
        let rss = ours.iter().map(|c| c.rss_peak_kb).max().unwrap_or(0) / 1024;
        let (gzip_wall, gzip_cpu) =
            (median(gzip.iter().map(|g| g.0).collect()), median(gzip.iter().map(|g| g.1).collect()));
        report.record(json!({
            "section": "ztoc", "image": image, "unpacked": unpacked, "wall": wall, "cpu": cpu, "rss_peak_mb": rss,
            "gzip_wall": gzip_wall, "gzip_cpu": gzip_cpu,
        }));
        let target = GO.iter().find(|g| g.0 == image).map(|(_, w, c, _, g)| (w / g / 3.0, c / g / 3.0));
        let target = |pick: fn((f64, f64)) -> f64| target.map_or("–".to_string(), |t| format!("≤ {:.2}", pick(t)));
        rows.push(vec![
            image.clone(),
            format!("{:.0} MB", unpacked as f64 / 1e6),
            format!("{gzip_wall:.1} s, {gzip_cpu:.1} s"),
            format!("{wall:.1} s, {cpu:.1} s"),
            format!("{:.0}", unpacked as f64 / 1e6 / wall),
            format!("**{:.2}** ({})", wall / gzip_wall, target(|t| t.0)),
            format!("**{:.2}** ({})", cpu / gzip_cpu, target(|t| t.1)),
            format!("{rss} MB"),
        ]);
        eprintln!("{}", rows.last().expect("just pushed").join("  "));
    }
    let head = [
        "image",
        "unpacked",
        "gzip -dc: wall, CPU",
        "soci convert: wall, CPU",
        "MB/s",
        "wall ÷ gzip (a third of Go's)",
        "CPU ÷ gzip (a third of Go's)",
        "peak RSS",
    ];
    report.section(&format!("## Building the index\n\n{}", table(&head.map(String::from), &rows)));
}

fn uncompressed_size(layer: &std::path::Path) -> u64 {
    let done = Command::new("sh").args(["-c", "gzip -dc \"$0\" | wc -c"]).arg(layer).output().unwrap();
    String::from_utf8_lossy(&done.stdout).trim().parse().unwrap_or(0)
}
