//! On the development machine: what a guest needs is made once, each backend boots it, and what the guest wrote down decides.

mod backend;
pub mod cuts;
mod disk;
mod prepare;
pub mod storm;

use crate::Outcome;
use backend::Backend;
use std::{path::Path, process::ExitCode, time::Instant};

pub fn main(arguments: &[&str]) -> ExitCode {
    let mut steps = Vec::new();
    let mut backends = Vec::new();
    for argument in arguments {
        match (Backend::parse(argument), argument.strip_prefix("steps=")) {
            (Some(backend), _) => backends.push(backend),
            (None, Some(names)) => steps.extend(names.split(',').map(str::to_owned)),
            (None, None) => {
                eprintln!("usage: vm-tests [nspawn | nspawn-old | qemu | official=PATH:SHA256]… [steps=NAME,…]");
                return ExitCode::from(2);
            }
        }
    }
    if backends.is_empty() {
        backends = Backend::usual();
    }
    match run(&backends, &steps) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vm-tests: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(backends: &[Backend], steps: &[String]) -> Outcome<bool> {
    let suites: Vec<&str> = backends.iter().filter_map(Backend::suite).collect();
    let payload = prepare::payload(&suites)?;
    let mut summary = Vec::new();
    let mut good = true;
    for backend in backends {
        if let Some(reason) = backend.cannot_run() {
            summary.push(format!("skipped {backend}: {reason}"));
            continue;
        }
        println!("=== {backend}");
        let begun = Instant::now();
        let results = backend.run(&payload, steps)?;
        for line in results.lines() {
            println!("    {line}");
        }
        let passed = results.lines().any(|line| line == "end passed");
        good &= passed;
        let word = if passed { "passed" } else { "FAILED" };
        summary.push(format!("{word} {backend} in {:.0} s", begun.elapsed().as_secs_f32()));
    }
    println!("===");
    for line in summary {
        println!("{line}");
    }
    Ok(good)
}

/// The repository this was built from.
fn source() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}
