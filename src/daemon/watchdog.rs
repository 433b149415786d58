//! Whether every part that containers wait for still moves; systemd hears of it, and restarts a daemon of which one part does not.
//!
//! ```text
//!   FUSE threads        each counts its turns, idle ones every two seconds
//!   runtime's workers   parked, or a worker's count of parks and its busy time move
//!   the runtime         answers a small task, which waits for a timer and takes the locks that everything else goes through
//!        │
//!        ▼ looked at every second by a thread of its own, which waits for none of them
//!   nothing stands still for [`STUCK`] ──▶ WATCHDOG=1; else the journal hears what does, and systemd nothing any more (`WatchdogSec=`)
//! ```
//!
//! A single worker that stands still is enough: what it has in its hands, and the task that it was about to run next, are lost to everybody.
//!
//! Absent on purpose: the threads that inflate and write to disk. They may stand still for as long as a disk does, and a restart heals no disk.

use super::systemd::{self, Told};
use crate::{fs::Pulse, telemetry::catalog::say};
use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::runtime::Handle;

/// What has not moved for so long stands still. Nothing that is looked at waits for a network, or computes for so long.
const STUCK: Duration = Duration::from_secs(20);
/// Between two looks, at most.
const LOOK: Duration = Duration::from_secs(1);
/// For tests: the path of a file. When it appears, the daemon removes it, and one of its workers stands still from then on.
const WEDGE: &str = "SOCI_WEDGE_WORKER";

/// What one part shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sign {
    /// It has nothing to do.
    Idle,
    /// It has; another number than before means that it moved.
    Busy(u64),
}

/// A part that stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stuck {
    part: String,
    still: Duration,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} has stood still for {} s", self.part, self.still.as_secs())
    }
}

/// What was seen of each part so far.
#[derive(Debug, Default)]
struct Seen(HashMap<String, (Sign, Duration)>);

impl Seen {
    /// Looks at all parts, `passed` after the last look: the one that has stood still for longest, if that is too long.
    fn look(&mut self, passed: Duration, signs: impl IntoIterator<Item = (String, Sign)>) -> Option<Stuck> {
        let mut longest: Option<Stuck> = None;
        for (part, sign) in signs {
            let (before, still) = self.0.get(&part).copied().unwrap_or((Sign::Idle, Duration::ZERO));
            let still = if sign == before && sign != Sign::Idle { still + passed } else { Duration::ZERO };
            self.0.insert(part.clone(), (sign, still));
            if still >= STUCK && longest.as_ref().is_none_or(|other| still > other.still) {
                longest = Some(Stuck { part, still });
            }
        }
        longest
    }
}

/// A worker of the runtime. tokio counts its parks and unparks together, so an odd number is that of a parked one; its busy time is brought up to
/// date every few dozen tasks, so a worker with a lot to do moves as well.
fn worker(parks: u64, busy: Duration) -> Sign {
    match parks % 2 {
        1 => Sign::Idle,
        _ => Sign::Busy(parks.wrapping_add(busy.as_nanos() as u64)),
    }
}

/// A task that the runtime is asked to run, again and again; `touch` takes the locks that everything else goes through.
struct Probe<T> {
    runtime: Handle,
    touch: Arc<T>,
    asked: u64,
    answered: Arc<AtomicU64>,
}

impl<T: Fn() + Send + Sync + 'static> Probe<T> {
    fn sign(&mut self) -> Sign {
        let answered = self.answered.load(Ordering::Acquire);
        if answered < self.asked {
            return Sign::Busy(answered);
        }
        self.asked += 1;
        let (touch, answers, number) = (self.touch.clone(), self.answered.clone(), self.asked);
        self.runtime.spawn(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            touch();
            answers.store(number, Ordering::Release);
        });
        Sign::Busy(answered)
    }
}

/// Watches, if systemd wants to hear of it, for as long as the process lives.
pub fn start(runtime: Handle, pulse: Pulse, touch: impl Fn() + Send + Sync + 'static) {
    wedge_when_told(&runtime);
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let probe = Probe { runtime: runtime.clone(), touch: Arc::new(touch), asked: 0, answered: Arc::default() };
    let watch = move || watch(limit, &runtime, &pulse, probe);
    if let Err(error) = std::thread::Builder::new().name("watchdog".into()).spawn(watch) {
        // systemd will restart a daemon that it does not hear of, which costs nothing.
        tracing::info!(%error, "cannot start the watchdog's thread");
    }
}

fn watch<T: Fn() + Send + Sync + 'static>(limit: Duration, runtime: &Handle, pulse: &Pulse, mut probe: Probe<T>) {
    let (pause, metrics) = (LOOK.min(limit / 5), runtime.metrics());
    let (mut seen, mut said, mut looked) = (Seen::default(), false, Instant::now());
    let mut told: Option<Instant> = None;
    loop {
        let threads = pulse.beats().map(|(name, beats)| (format!("thread {name}"), Sign::Busy(beats)));
        let workers = (0..metrics.num_workers()).map(|number| {
            let sign = worker(metrics.worker_park_unpark_count(number), metrics.worker_total_busy_duration(number));
            (format!("worker {number} of the runtime"), sign)
        });
        let signs: Vec<(String, Sign)> =
            threads.chain(workers).chain([("the runtime".to_owned(), probe.sign())]).collect();
        // Where this thread had to wait, too, the whole process was stopped, or the machine is overloaded: nobody is to blame for that.
        let passed = looked.elapsed().min(pause * 2);
        looked = Instant::now();
        match seen.look(passed, signs) {
            None => {
                said = false;
                if told.is_none_or(|at| at.elapsed() >= limit / 3) && systemd::alive() == Told::Taken {
                    told = Some(Instant::now());
                }
            }
            Some(stuck) if !said => {
                said = true;
                say!(Stuck, error = stuck.to_string(), "something stands still: systemd is to restart this daemon");
            }
            Some(_) => {}
        }
        std::thread::sleep(pause);
    }
}

/// See [`WEDGE`].
fn wedge_when_told(runtime: &Handle) {
    let Some(path) = std::env::var_os(WEDGE) else { return };
    runtime.spawn(async move {
        while std::fs::remove_file(&path).is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        loop {
            std::thread::park();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn look(seen: &mut Seen, signs: &[(&str, Sign)]) -> Option<Stuck> {
        seen.look(SECOND, signs.iter().map(|(part, sign)| ((*part).to_owned(), *sign)))
    }

    #[test]
    fn what_moves_or_has_nothing_to_do_is_not_stuck_and_what_does_not_move_is_named() {
        let mut seen = Seen::default();
        for turn in 0..100 {
            let signs = [("moves", Sign::Busy(turn)), ("rests", Sign::Idle), ("stands", Sign::Busy(7))];
            let stuck = look(&mut seen, &signs);
            match turn {
                // The first look is the first that can be compared with.
                0..20 => assert_eq!(stuck, None, "{turn}"),
                _ => assert_eq!(stuck.unwrap().to_string(), format!("stands has stood still for {turn} s")),
            }
        }
        assert_eq!(look(&mut seen, &[("stands", Sign::Busy(8))]), None, "it moves again");
        assert_eq!(look(&mut seen, &[("stands", Sign::Busy(8))]), None, "and has its time again");
    }

    #[test]
    fn the_one_that_has_stood_still_for_longest_is_named() {
        let mut seen = Seen::default();
        for turn in 0..30 {
            look(&mut seen, &[("first", Sign::Busy(0)), ("second", Sign::Busy(turn.min(5)))]);
        }
        let signs = [("second", Sign::Busy(5)), ("first", Sign::Busy(0))];
        assert_eq!(look(&mut seen, &signs).unwrap().part, "first");
    }

    #[test]
    fn a_worker_that_blocks_shows_it_and_its_parked_or_busy_colleagues_show_something_else() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
        let (release, wait) = std::sync::mpsc::channel::<()>();
        runtime.spawn(async move { wait.recv().is_ok() });
        // One has a lot to do and never rests.
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        runtime.spawn({
            let stop = stop.clone();
            async move {
                while !stop.load(Ordering::Relaxed) {
                    tokio::task::yield_now().await;
                }
            }
        });
        let metrics = runtime.metrics();
        let signs =
            || (0..3).map(|n| worker(metrics.worker_park_unpark_count(n), metrics.worker_total_busy_duration(n)));
        // Until it has begun to block.
        std::thread::sleep(Duration::from_millis(500));
        let mut still: Vec<(usize, Sign)> = signs().enumerate().filter(|(_, sign)| *sign != Sign::Idle).collect();
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(50));
            let now: Vec<Sign> = signs().collect();
            still.retain(|(number, sign)| now[*number] == *sign);
        }
        assert_eq!(still.len(), 1, "{still:?}");
        stop.store(true, Ordering::Relaxed);
        drop(release);
    }
}
