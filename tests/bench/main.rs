//! `make bench`: ours beside what people use today, on this machine, in one run. Report in `target/bench/` (Markdown and JSON).
//!
//! ```text
//! make bench                                             every section, moderately short
//! make bench ARGS="images=redis,numpy engines=ctd2,ours n=1 sections=pull links=region"
//! ```
//! Sections: `pull` (pull, run, ready over a slow link), `eager` (the same of images without an index), `full` (a container that reads all of its
//! image), `ztoc` (building the index), `index` (the same from containerd, and from registry to registry), `reads` (through the mount, beside
//! overlayfs), `mount` (time to mount by number of files, memory by number of layers).
#![forbid(unsafe_code)]

#[path = "../support/mod.rs"]
mod support;

mod eager;
mod index;
mod mounts;
mod options;
mod pull;
mod reads;
mod report;
mod timed;
mod ztoc;

use options::{Options, Section};
use report::Report;

fn main() {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}\n\n{}", options::USAGE);
            std::process::exit(2);
        }
    };
    support::undo::on_signals();
    let mut report = Report::new(&options);
    for section in &options.sections {
        match section {
            Section::Pull => pull::measure(&options, pull::Reader::Workload, &mut report),
            Section::Full => pull::measure(&options, pull::Reader::Everything, &mut report),
            Section::Eager => eager::measure(&options, &mut report),
            Section::Ztoc => ztoc::measure(&options, &mut report),
            Section::Index => index::measure(&options, &mut report),
            Section::Reads => reads::measure(&options, &mut report),
            Section::Mount => mounts::measure(&options, &mut report),
        }
    }
    println!("\n{}", report.markdown());
    println!("report: {}", report.path().display());
}
