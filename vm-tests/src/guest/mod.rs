//! Inside the guest: runs the steps of the story that have not been run yet, writes down what became of each, and ends the machine.
//!
//! What survives a reboot is in `/vm/state`: a line per step that was begun and one per step that passed. A step may end with [`Next::Reboot`];
//! it is then called again after the boot.

mod confined;
mod cuts;
mod life;
pub mod probe;
pub mod readme;
mod storm;
pub mod story;
pub mod tools;

pub use cuts::{LAST, WORKING};

use crate::Outcome;
use std::{
    fs,
    io::Write,
    panic,
    path::Path,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

/// What comes after a step.
pub enum Next {
    Step,
    /// The machine is to be rebooted; the step goes on afterwards.
    Reboot,
}

/// A step of the story.
pub struct Step {
    pub name: &'static str,
    pub run: fn(&tools::Guest) -> Outcome<Next>,
}

const STATE: &str = "/vm/state";
const RESULTS: &str = "/vm/results";

pub fn main() -> ExitCode {
    let guest = tools::Guest;
    let done: Vec<String> = fs::read_to_string(STATE).unwrap_or_default().lines().map(str::to_owned).collect();
    let chosen = fs::read_to_string("/vm/steps").unwrap_or_default();
    if let Some(kills) = chosen.trim().strip_prefix("storm ").and_then(|kills| kills.parse().ok()) {
        let outcome = panic::catch_unwind(|| storm::storm(kills)).unwrap_or_else(|_| Err("it panicked".into()));
        append(RESULTS, outcome.as_ref().unwrap_or_else(|error| error));
        return end(outcome.is_ok());
    }
    if cuts::chosen() {
        return cuts::main();
    }
    let mut failed = false;
    for step in story::STEPS {
        let wanted = chosen.trim().is_empty() || chosen.split_whitespace().any(|name| name == step.name);
        if !wanted || done.iter().any(|name| name == step.name) {
            continue;
        }
        let begun = Instant::now();
        guest.say(&format!("begin {}", step.name));
        let outcome = panic::catch_unwind(|| (step.run)(&guest)).unwrap_or_else(|_| Err("the step panicked".into()));
        let took = begun.elapsed().as_secs_f32();
        match outcome {
            Ok(Next::Step) => {
                append(STATE, step.name);
                append(RESULTS, &format!("passed {} {took:.1}", step.name));
            }
            Ok(Next::Reboot) => {
                guest.say("rebooting");
                let _ = Command::new("systemctl").args(["--no-block", "reboot"]).status();
                // Whoever ends first ends the machine: wait to be ended.
                std::thread::sleep(Duration::from_secs(600));
            }
            Err(error) => {
                append(RESULTS, &format!("failed {} {took:.1} {}", step.name, error.replace('\n', "\n| ")));
                failed = true;
                break;
            }
        }
    }
    end(!failed)
}

/// Leaves the journal, and ends the machine.
fn end(passed: bool) -> ExitCode {
    let journal = Command::new("journalctl").args(["--no-pager", "-b", "-o", "short-precise"]).output();
    let _ = fs::write("/vm/journal", journal.map(|done| done.stdout).unwrap_or_default());
    append(RESULTS, if passed { "end passed" } else { "end failed" });
    let _ = Command::new("sync").status();
    let mut end = Command::new("systemctl");
    // In a container the manager ends; a machine is switched off.
    match Path::new("/run/systemd/container").exists() {
        true => end.args(["--force", "exit", "0"]),
        false => end.args(["--force", "poweroff"]),
    };
    let _ = end.status();
    ExitCode::SUCCESS
}

fn append(path: &str, line: &str) {
    let file = fs::File::options().create(true).append(true).open(path);
    if let Ok(mut file) = file {
        let _ = writeln!(file, "{line}");
        let _ = file.sync_all();
    }
}
