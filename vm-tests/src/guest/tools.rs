//! What an operator has at hand in the guest, as functions.

use crate::{Outcome, ensure};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
    time::{Duration, Instant},
};

pub const CONFIG: &str = "/etc/soci-snapshotter-grpc/config.toml";
pub const ROOT: &str = "/var/lib/soci-snapshotter-grpc";
pub const DAEMON: &str = "soci-snapshotter.service";
pub const HOLDER: &str = "soci-mount.service";
pub const CUSTODIAN: &str = "soci-custodian.service";
/// The registry of the guest.
pub const REGISTRY: &str = "127.0.0.1:5000";
/// containerd 2: it sends the labels that a lazy pull needs. The distribution's own, 1.4 or 1.6, is replaced by it.
const CTR: &str = "/vm/bin/ctr";

/// The machine the story is about.
pub struct Guest;

/// A command's output as text, and an error with everything it said unless it succeeded.
pub fn run(program: &str, arguments: &[&str]) -> Outcome<String> {
    let done = attempt(program, arguments)?;
    let said = format!("{}{}", text(&done.stdout), text(&done.stderr));
    ensure!(done.status.success(), "{program} {}: {}: {said}", arguments.join(" "), done.status);
    Ok(text(&done.stdout))
}

/// The same of a line for the shell.
pub fn shell(line: &str) -> Outcome<String> {
    run("sh", &["-ec", line])
}

pub fn attempt(program: &str, arguments: &[&str]) -> Outcome<Output> {
    Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Polls until there is a value.
pub fn within<T>(limit: Duration, what: &str, mut poll: impl FnMut() -> Option<T>) -> Outcome<T> {
    let begun = Instant::now();
    loop {
        if let Some(value) = poll() {
            return Ok(value);
        }
        ensure!(begun.elapsed() < limit, "in vain for {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until everything is fetched, for as long as the status line shows that more and more is.
pub fn all_complete(what: &str) -> Outcome {
    let mut last = (String::new(), Instant::now());
    loop {
        let line = property(DAEMON, "StatusText");
        if line.contains("; all complete") {
            return Ok(());
        }
        if line != last.0 {
            last = (line, Instant::now());
        }
        ensure!(last.1.elapsed() < PATIENCE, "nothing was fetched for {PATIENCE:?}: {what}: {}", last.0);
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Emulated machines are slow.
pub const PATIENCE: Duration = Duration::from_secs(90);

impl Guest {
    /// A line on the console.
    pub fn say(&self, line: &str) {
        eprintln!("vm-test: {line}");
        let _ = fs::write("/dev/console", format!("vm-test: {line}\r\n"));
    }

    /// The image `name` of the guest's registry, by a snapshotter.
    pub fn pull(&self, snapshotter: &str, name: &str) -> Outcome<String> {
        let reference = self.reference(name);
        run(CTR, &["images", "pull", "--plain-http", "--snapshotter", snapshotter, &reference])
    }

    /// The same from a registry that wants a login.
    pub fn pull_with_login(&self, snapshotter: &str, reference: &str, login: &str) -> Outcome<String> {
        run(CTR, &["images", "pull", "--plain-http", "--user", login, "--snapshotter", snapshotter, reference])
    }

    pub fn reference(&self, name: &str) -> String {
        format!("{REGISTRY}/{name}:1")
    }

    /// Runs a program of an image to its end; what it wrote.
    pub fn container(&self, snapshotter: &str, image: &str, command: &[&str]) -> Outcome<String> {
        let name = format!("c{}", std::process::id() as u128 + Instant::now().elapsed().as_nanos() + nonce());
        let reference = self.reference(image);
        let mut arguments = vec!["run", "--rm", "--net-host", "--snapshotter", snapshotter, &reference, &name];
        arguments.extend(command);
        run(CTR, &arguments)
    }

    /// A container that reads the whole of `image` again and again, past every cache, and compares what it read.
    pub fn reader(&self, image: &str) -> Outcome<Reader> {
        let name = format!("reader{}", nonce());
        let log = PathBuf::from(format!("/vm/{name}.log"));
        let sums = shell("cat /vm/sums")?;
        fs::write(&log, "").map_err(|error| error.to_string())?;
        let script = format!(
            "while :; do for f in 0 1 2 3; do s=$(dd if=/data/$f bs=128k iflag=direct 2>/dev/null | md5sum | cut -c1-32); \
             case '{}' in *$f:$s*) echo tick;; *) echo \"WRONG $f $s\";; esac; done; done",
            sums.trim().replace('\n', " ")
        );
        let reference = self.reference(image);
        let child = Command::new(CTR)
            .args(["run", "--rm", "--net-host", "--snapshotter", "soci", &reference, &name, "/bin/sh", "-c", &script])
            .stdin(std::process::Stdio::null())
            .stdout(fs::File::options().append(true).open(&log).map_err(|error| error.to_string())?)
            .stderr(fs::File::options().append(true).open(&log).map_err(|error| error.to_string())?)
            .spawn()
            .map_err(|error| error.to_string())?;
        let reader = Reader { name, log, child };
        reader.goes_on("it has just been started")?;
        Ok(reader)
    }
}

fn nonce() -> u128 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map(|since| since.as_micros()).unwrap_or_default()
}

/// See [`Guest::reader`]. Ends when it is dropped.
pub struct Reader {
    name: String,
    log: PathBuf,
    child: std::process::Child,
}

impl Reader {
    /// What it wrote, without what ctr has to say about the machine.
    fn log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().filter(|line| !line.contains("level=warning")).map(|line| format!("{line}\n")).collect()
    }

    /// Every read so far was right, and it reads on: two more files, so that one was read after this was asked.
    pub fn goes_on(&self, when: &str) -> Outcome {
        let before = self.log().matches("tick").count();
        within(PATIENCE, &format!("the reading container goes on after {when}: {}", self.log()), || {
            let log = self.log();
            (log.matches("tick").count() >= before + 2 || log.lines().any(|line| line != "tick")).then_some(())
        })?;
        let log = self.log();
        let strange: Vec<&str> = log.lines().filter(|line| *line != "tick").collect();
        ensure!(strange.is_empty(), "the reading container after {when}: {}", strange.join("; "));
        Ok(())
    }

    /// What it wrote that is no success.
    pub fn strange(&self) -> String {
        self.log().lines().filter(|line| *line != "tick").collect::<Vec<_>>().join("; ")
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = attempt(CTR, &["tasks", "kill", "-s", "SIGKILL", &self.name]);
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = attempt(CTR, &["tasks", "rm", "-f", &self.name]);
        let _ = attempt(CTR, &["containers", "rm", &self.name]);
    }
}

pub fn property(unit: &str, name: &str) -> String {
    run("systemctl", &["show", "--property", name, unit])
        .ok()
        .and_then(|line| line.trim().split_once('=').map(|(_, value)| value.to_owned()))
        .unwrap_or_default()
}

pub fn main_pid(unit: &str) -> Outcome<u32> {
    let pid = property(unit, "MainPID");
    match pid.parse() {
        Ok(0) | Err(_) => Err(format!("{unit} does not run: {}", status(unit))),
        Ok(pid) => Ok(pid),
    }
}

/// Waits until the unit runs, as another process than `before`.
pub fn replaced(unit: &str, before: u32) -> Outcome<u32> {
    within(PATIENCE, &format!("{unit} runs anew: {}", status(unit)), || {
        main_pid(unit).ok().filter(|pid| *pid != before && property(unit, "ActiveState") == "active")
    })
}

pub fn is_active(unit: &str) -> bool {
    property(unit, "ActiveState") == "active"
}

pub fn status(unit: &str) -> String {
    attempt("systemctl", &["status", "--no-pager", "--lines=15", "--full", unit])
        .map(|done| text(&done.stdout))
        .unwrap_or_default()
}

/// What a unit has said since the story's beginning of this boot.
pub fn journal(unit: &str, more: &[&str]) -> Outcome<String> {
    let mut arguments = vec!["--no-pager", "-b", "-u", unit];
    arguments.extend(more);
    run("journalctl", &arguments)
}

/// Rows of `/proc/PID/status`.
pub fn row(pid: u32, name: &str) -> Outcome<String> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.map(|value| value.trim().to_owned()).ok_or_else(|| format!("{path} has no {name}"))
}

/// Processes whose name begins so.
pub fn processes(name: &str) -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with(name)))
        .collect()
}

/// Changes one line of the configuration.
pub fn edit(line: &str, to: &str) -> Outcome {
    let text = fs::read_to_string(CONFIG).map_err(|error| error.to_string())?;
    let count = text.lines().filter(|found| *found == line).count();
    ensure!(count == 1, "{CONFIG} has the line {line:?} {count} times");
    let changed: Vec<&str> = text.lines().map(|found| if found == line { to } else { found }).collect();
    fs::write(CONFIG, changed.join("\n") + "\n").map_err(|error| error.to_string())
}
