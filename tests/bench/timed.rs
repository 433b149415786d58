//! What a command costs, and how long a piece of work takes.

use crate::report::median;
use crate::support::process::Usage;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    pub wall: f64,
    pub cpu: f64,
    pub rss_peak_kb: u64,
}

/// Runs `command` to its end, its output thrown away.
pub fn cost(command: &mut Command) -> Cost {
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    let start = Instant::now();
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let pid = child.id();
    let done = AtomicBool::new(false);
    let (wall, peak) = std::thread::scope(|scope| {
        // The high-water mark goes with the memory when the process ends, so it is looked at until then.
        let sampler = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(Ordering::Relaxed) {
                peak = Usage::of(pid).rss_peak_kb.max(peak);
                std::thread::sleep(Duration::from_millis(3));
            }
            peak
        });
        let _ = waitid(Id::Pid(nix::unistd::Pid::from_raw(pid as i32)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        let wall = start.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        (wall, sampler.join().unwrap())
    });
    // Not waited for yet: its times are still there.
    let cpu = Usage::of(pid).cpu.as_secs_f64();
    let status = child.wait().unwrap();
    assert!(status.success(), "{command:?}: {status}");
    Cost { wall, cpu, rss_peak_kb: peak }
}

/// Seconds that `work` takes.
pub fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Medians of `work` on each of two, taking turns, each turn preceded by `before`.
pub fn interleaved<T>(turns: usize, pair: [&T; 2], mut before: impl FnMut(), mut work: impl FnMut(&T)) -> [f64; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..turns {
        for (which, times) in pair.iter().zip(&mut times) {
            before();
            times.push(seconds(|| work(which)));
        }
    }
    times.map(median)
}
