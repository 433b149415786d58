//! Stopping early: Ctrl-C, SIGTERM, SIGHUP and `--timeout`.
//!
//! A signal only sets a flag. Whoever copies, hashes or inflates asks [`check`] between two pieces of work, and gives up with
//! [`Stopped`]; so temporary files go away by being dropped, and nothing is left behind. A second signal ends the process at once.
//! Signals that were ignored when we were started (`nohup`, background jobs of a script) stay ignored.

use nix::sys::signal::{SigSet, Signal, raise};
use std::{
    io,
    sync::atomic::{AtomicI32, Ordering::SeqCst},
    time::Duration,
};

const RUNNING: i32 = 0;
const TIMED_OUT: i32 = -1;

/// [`RUNNING`], [`TIMED_OUT`], or the number of the signal that asked us to stop.
static REASON: AtomicI32 = AtomicI32::new(RUNNING);

/// Somebody asked this process to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// By a signal.
    #[error("interrupted")]
    Signal(i32),
    /// By `--timeout`. The words are those of the Go tools.
    #[error("context deadline exceeded")]
    Timeout,
}

impl From<Stopped> for io::Error {
    fn from(stopped: Stopped) -> io::Error {
        // Not `Interrupted`: std's loops retry that kind.
        io::Error::other(stopped)
    }
}

/// Why the process should stop, if it should.
pub fn stopped() -> Option<Stopped> {
    match REASON.load(SeqCst) {
        RUNNING => None,
        TIMED_OUT => Some(Stopped::Timeout),
        signal => Some(Stopped::Signal(signal)),
    }
}

/// `Err` once the process should stop.
pub fn check() -> Result<(), Stopped> {
    stopped().map_or(Ok(()), Err)
}

/// Watches for signals from now on. Called while the process has one thread, so that every later one inherits the mask.
pub fn watch(timeout: Option<Duration>) -> io::Result<()> {
    let ignored = ignored_signals();
    let mut watched = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        if ignored & (1 << (signal as u32 - 1)) == 0 {
            watched.add(signal);
        }
    }
    watched.thread_block()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        while let Ok(signal) = watched.wait() {
            let before = REASON.compare_exchange(RUNNING, signal as i32, SeqCst, SeqCst);
            if before.is_err() {
                die_of(signal as i32);
            }
        }
    })?;
    if let Some(timeout) = timeout {
        std::thread::Builder::new().name("timeout".into()).spawn(move || {
            std::thread::sleep(timeout);
            let _ = REASON.compare_exchange(RUNNING, TIMED_OUT, SeqCst, SeqCst);
        })?;
    }
    Ok(())
}

/// Ends the process the way an unhandled `signal` would have, so that shells and supervisors see the truth.
pub fn die_of(signal: i32) -> ! {
    if let Ok(signal) = Signal::try_from(signal) {
        let mut set = SigSet::empty();
        set.add(signal);
        let _ = raise(signal);
        let _ = set.thread_unblock();
    }
    std::process::exit(128 + signal)
}

fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap_or("0");
    u64::from_str_radix(mask.trim(), 16).unwrap_or(0)
}
