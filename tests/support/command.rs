//! Running a tool to its end and insisting that it succeeds.

use std::process::{Command, Output, Stdio};

/// Runs `command` without input; its output, or a panic with everything it said.
pub fn output(command: &mut Command) -> String {
    let done = attempt(command);
    assert!(
        done.status.success(),
        "{command:?} failed ({}):\n{}{}",
        done.status,
        text(&done.stdout),
        text(&done.stderr)
    );
    text(&done.stdout)
}

/// As [`output`], for those whose output nobody reads.
pub fn run(command: &mut Command) {
    output(command);
}

/// Runs `command` and returns whatever became of it.
pub fn attempt(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Runs `command` for its effect only, if it has one: undoing what may not have been done.
pub fn try_run(command: &mut Command) {
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `command("ip", "link set up")`: a command and its arguments, none of which contains a space.
pub fn command(program: &str, words: &str) -> Command {
    let mut command = Command::new(program);
    command.args(words.split_whitespace());
    command
}
