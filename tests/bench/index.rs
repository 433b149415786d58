//! Indexing where images live: `soci create` and `soci convert` from containerd beside `gzip -dc` of the same layers, and `soci convert
//! --registry` beside `skopeo copy` between the same two registries.

use crate::options::{Options, Section};
use crate::report::{Report, median, table};
use crate::support::containerd::{Containerd, Options as Settings, Version};
use crate::support::registry::{Kind, Registry, blob_path, image_manifest};
use crate::support::slot::{Root, Slot};
use crate::support::suite_image;
use crate::timed::{Cost, cost};
use serde_json::json;
use std::process::Command;

/// Medians of several runs.
struct Costs(Vec<Cost>);

impl Costs {
    fn of(&self, what: fn(&Cost) -> f64) -> f64 {
        median(self.0.iter().map(what).collect())
    }
    fn wall(&self) -> f64 {
        self.of(|c| c.wall)
    }
    fn cpu(&self) -> f64 {
        self.of(|c| c.cpu)
    }
    fn rss_mb(&self) -> u64 {
        self.0.iter().map(|c| c.rss_peak_kb).max().unwrap_or(0) / 1024
    }
}

pub fn measure(options: &Options, report: &mut Report) {
    let slot = Slot::take();
    let mut rows = Vec::new();
    let (_, images) = options.plan(Section::Index).remove(0); // the link is of no interest here
    for image in &images {
        let layout = suite_image(image);
        let root = slot.fresh_root();
        let from = Registry::start(Kind::Distribution3, &root);
        from.push(&layout, "lab/image", "v1");
        let reference = from.reference("lab/image", "v1");
        let containerd = Containerd::start(&root, Version::V22, &Settings::default());
        crate::support::command::output(containerd.ctr().args(["content", "fetch", "--plain-http", &reference]));
        let soci = |words: &[&str]| {
            let mut soci = Command::new(env!("CARGO_BIN_EXE_soci"));
            soci.env("CONTAINERD_ADDRESS", &containerd.address).arg("--root").arg(root.join("soci")).args(words);
            soci
        };
        let (_, manifest) = image_manifest(&layout);
        let [mut gzip, mut create, mut convert, mut copy, mut remote] = [const { Vec::new() }; 5];
        for _ in 0..options.runs.max(1) {
            let layers = manifest
                .layers
                .iter()
                .map(|l| cost(Command::new("gzip").arg("-dc").arg(blob_path(&layout, &l.digest))));
            gzip.push(layers.fold(Cost::default(), |a, b| Cost {
                wall: a.wall + b.wall,
                cpu: a.cpu + b.cpu,
                rss_peak_kb: 0,
            }));
            create.push(cost(&mut soci(&["create", "--force", "--min-layer-size", "0", &reference])));
            let other = from.reference("lab/image", "soci");
            convert.push(cost(&mut soci(&["convert", "--force", "--min-layer-size", "0", &reference, &other])));
            // Each into a registry that has nothing yet.
            let fresh = || -> (Root, Registry) {
                let root = slot.fresh_root();
                let registry = Registry::start(Kind::Distribution3, &root);
                (root, registry)
            };
            let (_root, to) = fresh();
            let mut skopeo = Command::new("skopeo");
            skopeo.args(["copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false"]);
            copy.push(cost(
                skopeo.args([format!("docker://{reference}"), format!("docker://{}", to.reference("lab/image", "v1"))]),
            ));
            drop((to, _root));
            let (_root, to) = fresh();
            let words =
                ["convert", "--registry", "--min-layer-size", "0", &reference, &to.reference("lab/image", "soci")];
            remote.push(cost(&mut soci(&words)));
        }
        let [gzip, create, convert, copy, remote] = [gzip, create, convert, copy, remote].map(Costs);
        for (what, costs) in
            [("gzip", &gzip), ("create", &create), ("convert", &convert), ("skopeo", &copy), ("registry", &remote)]
        {
            report.record(json!({
                "section": "index", "image": image, "what": what, "wall": costs.wall(), "cpu": costs.cpu(), "rss_peak_mb": costs.rss_mb(),
            }));
        }
        let both = |c: &Costs| format!("{:.1} s, {:.1} s", c.wall(), c.cpu());
        let ratio = |c: &Costs, to: &Costs| format!("**{:.2}**, **{:.2}**", c.wall() / to.wall(), c.cpu() / to.cpu());
        rows.push(vec![
            image.clone(),
            both(&gzip),
            both(&create),
            both(&convert),
            ratio(&convert, &gzip),
            both(&copy),
            both(&remote),
            ratio(&remote, &copy),
            format!("{} MB", remote.rss_mb()),
        ]);
        eprintln!("{}", rows.last().expect("just pushed").join("  "));
    }
    let head = [
        "image",
        "gzip -dc: wall, CPU",
        "create",
        "convert",
        "convert ÷ gzip",
        "skopeo copy --all",
        "convert --registry",
        "÷ skopeo",
        "its peak RSS",
    ];
    report.section(&format!(
        "## Indexing in containerd and between registries\n\nCPU is that of the command alone; containerd and the registries are not in it.\n\n{}",
        table(&head.map(String::from), &rows)
    ));
}
