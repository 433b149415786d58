//! README, executed: the commands that the story runs are taken from there, so what people are told to do is what was done.

use super::tools::{REGISTRY, shell};
use crate::{Outcome, ensure};
use std::{fs, io::Write};

const README: &str = include_str!("../../../README.md");
/// What comes after the page.
const END: &str = "\n## Try it";
const RUN: &str = "/vm/readme-was-run";

/// What differs between the page and this machine: where packages and images are, and that nobody answers questions.
const HERE: [(&str, &str); 6] = [
    ("dnf install ./", "dnf -y -q install /vm/repo/"),
    ("dnf remove", "dnf -y remove"),
    ("systemctl status", "systemctl status --no-pager"),
    ("journalctl -x", "journalctl --no-pager -x"),
    ("images pull --snapshotter", "images pull --plain-http --snapshotter"),
    ("registry.example", REGISTRY),
];

/// The commands of the first page, as they are printed.
fn commands() -> Vec<&'static str> {
    commands_in(README.split(END).next().unwrap_or_default())
}

fn commands_in(text: &'static str) -> Vec<&'static str> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in text.lines() {
        match line.strip_prefix("```") {
            Some(kind) => inside = kind == "console",
            None if inside => found
                .extend(line.strip_prefix("# ").map(|command| command.split("  #").next().unwrap_or_default().trim())),
            None => {}
        }
    }
    found
}

/// `amzn2` or `amzn2023`: whose package is in this machine's repository.
fn distribution() -> Outcome<String> {
    Ok(shell("ls /vm/repo | sed -n 's/^soci-snapshotter-[0-9].*\\.\\(amzn[0-9]*\\)\\.x86_64\\.rpm$/\\1/p'")?
        .trim()
        .to_owned())
}

/// Runs the page's one command that begins so; what it printed.
pub fn run(begin: &str) -> Outcome<String> {
    let matching: Vec<&str> = commands().into_iter().filter(|command| command.starts_with(begin)).collect();
    let [command] = matching[..] else {
        return Err(format!("README's first page has {} commands that begin with {begin:?}", matching.len()));
    };
    if let Ok(mut file) = fs::File::options().create(true).append(true).open(RUN) {
        let _ = writeln!(file, "{command}");
    }
    let here = HERE.iter().fold(command.to_owned(), |command, (there, here)| command.replace(there, here));
    // The page names the package for Amazon Linux 2023.
    let here = here.replace(".amzn2023.", &format!(".{}.", distribution()?));
    shell(&format!("{here} 2>&1"))
}

/// Runs what follows a heading, up to the end of the first commands there, in `directory`.
pub fn run_below(heading: &str, directory: &str) -> Outcome {
    let below = README.split(&format!("\n## {heading}\n")).nth(1).unwrap_or_default();
    let end = below.match_indices("\n```").nth(1).map_or(0, |(end, _)| end);
    let commands = commands_in(&below[..end]);
    ensure!(!commands.is_empty(), "README has no commands below {heading:?}");
    // The page's tar has static programs; that of programs which the tests were built with says in its name that they are not.
    let is_dynamic = shell(&format!("ls {directory}"))?.contains("-dynamic-linux-");
    for command in commands {
        let here = if is_dynamic { command.replace("-linux-", "-dynamic-linux-") } else { command.to_owned() };
        shell(&format!("cd {directory}; {here} 2>&1")).map_err(|error| format!("{command}: {error}"))?;
    }
    Ok(())
}

/// An error if the page has a command that nobody ran.
pub fn was_run() -> Outcome {
    let run = fs::read_to_string(RUN).unwrap_or_default();
    let missing: Vec<&str> =
        commands().into_iter().filter(|command| !run.lines().any(|line| line == *command)).collect();
    ensure!(missing.is_empty(), "commands of README's first page that were not run: {}", missing.join("; "));
    Ok(())
}
