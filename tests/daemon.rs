//! The daemon as it really runs: the built programs, started as root, told to stop, killed, and started again.

#[path = "daemon/connections.rs"]
mod connections;
#[path = "daemon/custodian.rs"]
mod custodian;
#[path = "daemon/degraded.rs"]
mod degraded;
#[path = "daemon/faults.rs"]
mod faults;
#[path = "daemon/lazy.rs"]
mod lazy;
#[path = "daemon/lost.rs"]
mod lost;
#[path = "daemon/reload.rs"]
mod reload;
#[path = "daemon/restart.rs"]
mod restart;
#[path = "daemon/startup.rs"]
mod startup;

use crate::support::process::{Process, kill_all, pids_naming};
use crate::support::slot::{Root, Slot, unmount_below};
use nix::sys::signal::Signal;
use soci::layout::Layout;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

const DAEMON: &str = env!("CARGO_BIN_EXE_soci-snapshotter-grpc");
/// What every client waits for.
const STARTED: &str = "successfully started";

/// A place for one daemon at a time; nothing of it is left when the test ends.
struct Site {
    root: Root,
}

impl Drop for Site {
    fn drop(&mut self) {
        // The mount and its holder outlive the daemon on purpose.
        kill_all(&pids_naming(&self.state().display().to_string()));
        unmount_below(self.root.path());
    }
}

impl Site {
    fn new(slot: &Slot) -> Site {
        Site { root: slot.root() }
    }

    /// Its `--root`.
    fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    fn layout(&self) -> Layout {
        Layout::new(self.state())
    }

    fn socket(&self) -> PathBuf {
        self.root.join("run/sock")
    }

    /// The daemon with its own root directory and nothing else.
    fn bare(&self) -> Command {
        let mut command = Command::new(DAEMON);
        command.arg("--root").arg(self.state());
        command
    }

    /// The daemon with its own root directory, socket and configuration.
    fn command(&self, config: &str) -> Command {
        let path = self.root.join("config.toml");
        std::fs::write(&path, config).unwrap();
        let mut command = self.bare();
        command.arg("--address").arg(self.socket()).arg("--config").arg(path).args(["--log-level", "debug"]);
        command
    }

    fn run(&self, command: &mut Command) -> Running {
        let log = self.root.join("daemon.log");
        let skip = std::fs::metadata(&log).map_or(0, |m| m.len() as usize);
        Running { process: Process::start("soci-snapshotter-grpc", command, &log), log, skip }
    }

    /// Starts it and waits until it answers.
    fn start(&self, config: &str) -> Running {
        let running = self.run(&mut self.command(config));
        running.wait_for(STARTED);
        running
    }

    /// Its log, when it has failed to start within `limit`.
    fn refused(&self, command: &mut Command, limit: Duration) -> String {
        let running = self.run(command);
        running.wait_for_end(limit);
        let log = running.log();
        assert_eq!(running.process.stop().code(), Some(1), "{log}");
        assert!(log.contains("\"level\":\"fatal\""), "{log}");
        log
    }
}

/// One life of the daemon.
struct Running {
    process: Process,
    log: PathBuf,
    /// What earlier ones have logged.
    skip: usize,
}

impl Running {
    fn log(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes[self.skip..]).into_owned()
    }

    fn wait_for(&self, text: &str) {
        self.process.wait_until(&format!("it logs {text:?}"), || self.log().contains(text));
    }

    fn wait_for_end(&self, limit: Duration) {
        let start = Instant::now();
        while self.process.is_running() {
            assert!(start.elapsed() < limit, "still running after {limit:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Tells it to end; how it ended and how long that took.
    fn stop(self, signal: Signal) -> (ExitStatus, Duration) {
        let start = Instant::now();
        self.process.signal(signal);
        self.wait_for_end(Duration::from_secs(30));
        (self.process.stop(), start.elapsed())
    }
}

/// Waits, ten seconds at most, until `condition` holds.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
