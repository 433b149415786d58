//! A crash at any moment leaves something that can be gone on with: the snapshot database, the layer store and the content store are killed at every
//! write, and cut off from power, and each time what is left is opened and compared with what had been promised.
//!
//! The work is done by a child: this program, once more, with one of the ignored tests below. It says on its standard output what it begins and what
//! it has been answered, so its parent knows what must be there. `crash/crashat.c`, preloaded into it, kills it.

#[path = "crash/content.rs"]
mod content;
#[path = "crash/layers.rs"]
mod layers;
#[path = "crash/power.rs"]
mod power;
#[path = "crash/records.rs"]
mod records;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where a child works, and how.
const PLACE: &str = "SOCI_TEST_CRASH_PLACE";
const SEED: &str = "SOCI_TEST_CRASH_SEED";
const STEPS: &str = "SOCI_TEST_CRASH_STEPS";
/// Begins each line that a child says to its parent; the test harness prints others.
const SAID: &str = "@";

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// What a child was told.
struct Job {
    place: PathBuf,
    seed: u64,
    steps: u64,
}

impl Job {
    /// Of this process, if it is a child.
    fn mine() -> Option<Job> {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
        Some(Job { place: std::env::var_os(PLACE)?.into(), seed: number(SEED)?, steps: number(STEPS)? })
    }

    fn command(&self, half: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", half, "--ignored", "--nocapture", "--test-threads=1"]);
        command.env(PLACE, &self.place).env(SEED, self.seed.to_string()).env(STEPS, self.steps.to_string());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// Says a line to the parent, at once.
fn say(line: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{SAID}{line}").unwrap();
    out.flush().unwrap();
}

/// Lines that a child said, the last of them whole.
fn said(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(|line| line.strip_prefix(SAID)).map(str::to_owned).collect()
}

/// The library that kills, built once.
fn crashat() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let library = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("crashat-{}.so", std::process::id()));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/crash/crashat.c");
        crate::support::command::run(
            Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).arg("-ldl"),
        );
        library
    })
}

/// How a write ends that is not to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Before,
    Torn,
}

/// Runs `half` so that it dies at its `n`-th change; what it said, and whether it came to its end before.
fn killed_at(half: &str, job: &Job, n: u64, cut: Cut) -> (Vec<String>, bool) {
    let mut command = job.command(half);
    command.env("LD_PRELOAD", crashat()).env("CRASHAT_ROOT", &job.place).env("CRASHAT_N", n.to_string());
    if cut == Cut::Torn {
        command.env("CRASHAT_TORN", "1");
    }
    let done = command.output().unwrap();
    let killed = done.status.signal() == Some(9);
    assert!(killed || done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    (said(&done.stdout), !killed)
}

/// Kills `half` at each of its changes and has `check` look at what is left. Gives the number of places where it died.
///
/// Two at a time. Every other write is torn in its middle instead of not begun; which ones changes with the seed.
fn at_every_change(half: &str, seed: u64, steps: u64, check: impl Fn(&Path, &[String]) + Sync) -> u64 {
    let (next, ended) = (AtomicU64::new(1), AtomicU64::new(u64::MAX));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::SeqCst);
                    if n >= ended.load(Ordering::SeqCst) {
                        return;
                    }
                    let cut = if (n + seed).is_multiple_of(2) { Cut::Torn } else { Cut::Before };
                    let place = tempfile::Builder::new().prefix("crash-").tempdir().unwrap();
                    let job = Job { place: place.path().to_owned(), seed, steps };
                    let (said, whole) = killed_at(half, &job, n, cut);
                    if whole {
                        ended.fetch_min(n, Ordering::SeqCst);
                    }
                    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(place.path(), &said)));
                    if let Err(panic) = checked {
                        eprintln!("{half}, seed {seed}, killed at change {n} ({cut:?}), after {said:#?}");
                        std::panic::resume_unwind(panic);
                    }
                }
            });
        }
    });
    ended.load(Ordering::SeqCst) - 1
}

/// A child that works until it is ended.
struct Worker {
    child: Child,
    reader: Option<std::thread::JoinHandle<Vec<u8>>>,
}

impl Worker {
    fn start(half: &str, job: &Job) -> Worker {
        let mut child = job.command(half).stderr(Stdio::null()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut out, &mut bytes).unwrap();
            bytes
        });
        Worker { child, reader: Some(reader) }
    }

    /// It does and says nothing from now on.
    fn stop(&self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    }

    /// What it had said before it was killed.
    fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        said(&self.reader.take().unwrap().join().unwrap())
    }
}

/// xorshift: the same numbers on every run.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % bound
    }
}

/// Seeds of a run: fixed, and with `SOCI_CRASH_SEEDS=5,6` others.
fn seeds(fixed: &[u64]) -> Vec<u64> {
    match std::env::var("SOCI_CRASH_SEEDS") {
        Ok(text) => text.split(',').map(|seed| seed.trim().parse().expect("numbers")).collect(),
        Err(_) => fixed.to_vec(),
    }
}

/// What must be so by now: for each name whether it is there, unless the last thing begun concerns it.
#[derive(Debug, Default)]
struct Promised {
    /// `None`: it may be there or not.
    names: BTreeMap<String, Option<bool>>,
}

impl Promised {
    /// Lines are `begin WORD names…` and `done WORD names…`; `put a` makes a name, `del a` removes it, `move a b` does both.
    fn read(said: &[String]) -> Promised {
        let mut promised = Promised::default();
        for line in said {
            let words: Vec<&str> = line.split(' ').collect();
            let (is, was): (Vec<&str>, Vec<&str>) = match words[1] {
                "put" => (vec![words[2]], vec![]),
                "del" => (vec![], vec![words[2]]),
                "move" => (vec![words[3]], vec![words[2]]),
                _ => continue,
            };
            let done = words[0] == "done";
            for (names, there) in [(is, true), (was, false)] {
                for name in names {
                    promised.names.insert(name.to_owned(), done.then_some(there));
                }
            }
        }
        promised
    }
}
