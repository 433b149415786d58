//! In the guest: works until the power is cut, and after each boot looks at what the cut has left.
//!
//! What survives for certain is in `/vm`, whose disk keeps everything: what containerd had said was done ([`Acts`]), and what each image
//! contains, as overlayfs showed it.

use super::{
    end, storm,
    tools::{
        CUSTODIAN, DAEMON, Guest, HOLDER, PATIENCE, REGISTRY, ROOT, attempt, is_active, journal, property, run, shell,
        text, within,
    },
};
use crate::{Outcome, ensure};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::Path,
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread::sleep,
    time::Duration,
};

const GUEST: Guest = Guest;
const CTR: &str = "/vm/bin/ctr";
const SOCKET: &str = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock";
const ACTS: &str = "/vm/acts";
/// Removed and pulled again and again: lazy ones, one that is pulled by us, and one that containerd unpacks into our directories.
const LAZY: [&str; 2] = ["app", "late"];
const PULLED: &str = "pulled";
/// Always there: containers are made of it.
const STEADY: &str = "last";
const IMAGES: [&str; 4] = [LAZY[0], LAZY[1], PULLED, STEADY];
/// Where the host looks for the moment from which it may cut.
pub const WORKING: &str = "working until the power is cut";
/// On the kernel's command line: the last boot, after which nothing is cut.
pub const LAST: &str = "vm.last";

/// Said of a layer that the kernel had not written when the power was cut.
const PULLED_AGAIN: &str = "a layer that was lost is here again";

/// Everything in an image: names, types, modes, owners, sizes, devices, and what is in files and links.
const LIST: &str = "(busybox find / -xdev ! -type d -exec busybox stat -c '%s %F %a %u %g %t:%T %N' {} +; \
                    busybox find / -xdev -type f -exec md5sum {} +) | busybox sort";

/// What was acknowledged, one line each, on the disk before anything else is done.
struct Acts(Mutex<fs::File>);

impl Acts {
    fn open() -> Outcome<Acts> {
        let file = fs::File::options().create(true).append(true).open(ACTS);
        file.map(|file| Acts(Mutex::new(file))).map_err(|error| format!("{ACTS}: {error}"))
    }

    fn say(&self, line: &str) -> Outcome {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(file, "{line}").and_then(|()| file.sync_all()).map_err(|error| format!("{ACTS}: {error}"))
    }

    /// What must be there: said to be, and not said to be about to go.
    fn promised() -> BTreeSet<String> {
        let mut there = BTreeSet::new();
        for line in fs::read_to_string(ACTS).unwrap_or_default().lines() {
            match line.split_once(' ') {
                Some(("has", what)) => drop(there.insert(what.to_owned())),
                Some(("loses", what)) => drop(there.remove(what)),
                _ => {}
            }
        }
        there
    }
}

/// What was looked at in all boots so far, in `/vm/counts`.
#[derive(Default)]
struct Counts(BTreeMap<String, u64>);

impl Counts {
    const PATH: &str = "/vm/counts";

    fn read() -> Counts {
        let text = fs::read_to_string(Counts::PATH).unwrap_or_default();
        let rows = text.lines().filter_map(|line| line.split_once(' '));
        Counts(rows.filter_map(|(name, count)| Some((name.to_owned(), count.parse().ok()?))).collect())
    }

    fn add(&mut self, name: &str, count: u64) {
        *self.0.entry(name.to_owned()).or_default() += count;
    }

    fn of(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or_default()
    }

    fn write(&self) -> Outcome {
        let text: String = self.0.iter().map(|(name, count)| format!("{name} {count}\n")).collect();
        fs::write(Counts::PATH, text).map_err(|error| error.to_string())
    }
}

/// One boot.
pub fn main() -> ExitCode {
    let last = fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split_whitespace().any(|word| word == LAST));
    let outcome = std::panic::catch_unwind(|| boot(last)).unwrap_or_else(|_| Err("it panicked".into()));
    super::append(super::RESULTS, outcome.as_ref().unwrap_or_else(|error| error));
    end(outcome.is_ok())
}

/// Ends after the last boot with the result, or with an error. In all others the machine ends.
fn boot(last: bool) -> Outcome<String> {
    let mut counts = Counts::read();
    let acts = Acts::open()?;
    GUEST.say(if last { "the last boot" } else { "a boot" });
    if Acts::promised().contains("installed") {
        look(&acts, &mut counts)?;
    } else {
        install()?;
        acts.say("has installed")?;
    }
    counts.add("boots", 1);
    counts.write()?;
    if last {
        nothing_stays()?;
        return Ok(format!(
            "{} boots, {} promised images ({} layers of them pulled again) and {} promised containers were there, {} snapshots known to both sides, {} bytes in {} files compared",
            counts.of("boots"),
            counts.of("promised"),
            counts.of("again"),
            counts.of("containers"),
            counts.of("snapshots"),
            counts.of("bytes"),
            counts.of("files"),
        ));
    }
    work(&acts)
}

/// Once: the units and programs of the working tree, and what each image contains.
fn install() -> Outcome {
    storm::install("v1")?;
    shell(
        "cp /vm/units/* /usr/lib/systemd/system/; mkdir -p /etc/soci-snapshotter-grpc; cp /vm/config.toml /etc/soci-snapshotter-grpc/; \
         install -m 755 /vm/v1/soci /usr/bin/; cd /etc/soci-snapshotter-grpc; \
         sed -i 's/^silence_period_msec = .*/silence_period_msec = 300/; s/^max_bytes_per_sec = .*/max_bytes_per_sec = 4000000/; \
                 s/^parallel_pull_as_fallback = .*/parallel_pull_as_fallback = true/' config.toml",
    )?;
    storm::configure_containerd()?;
    run("systemctl", &["daemon-reload"])?;
    run("systemctl", &["enable", "--quiet", "--now", "soci-snapshotter.socket", "soci-mount.service"])?;
    run("systemctl", &["enable", "--quiet", "soci-snapshotter.service"])?;
    run("systemctl", &["restart", "containerd"])?;
    run("systemctl", &["start", DAEMON])?;
    registry()?;
    answers()?;
    for image in IMAGES {
        GUEST.say(&format!("what {image} contains"));
        pull("overlayfs", image)?;
        fs::write(expectation(image), list("overlayfs", image)?).map_err(|error| error.to_string())?;
        run(CTR, &["images", "rm", "--sync", &reference(image)])?;
    }
    run("sync", &[]).map(drop)
}

/// containerd does, and through it the daemon. It gives a connection less time than an overloaded machine may need.
fn answers() -> Outcome {
    let probe =
        format!("{CTR} snapshots --snapshotter soci prepare probe && {CTR} snapshots --snapshotter soci rm probe");
    within(PATIENCE * 2, "containerd and the daemon answer", || shell(&probe).ok()).map(drop)
}

/// Starts the registry, at a speed at which pulls last long enough to be cut.
fn registry() -> Outcome {
    let config = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: /vm/registry}}}}\nhttp: {{addr: '{REGISTRY}'}}\n"
    );
    fs::write("/run/registry.yml", config).map_err(|error| error.to_string())?;
    run("systemd-run", &["--quiet", "--unit=vm-registry", "docker-registry", "serve", "/run/registry.yml"])?;
    within(PATIENCE, "the registry answers", || std::net::TcpStream::connect(REGISTRY).ok())?;
    shell("tc qdisc replace dev lo root tbf rate 200mbit burst 256kb latency 100ms").map(drop)
}

fn reference(image: &str) -> String {
    format!("{REGISTRY}/{image}:1")
}

fn expectation(image: &str) -> String {
    format!("/vm/expected-{image}")
}

fn pull(snapshotter: &str, image: &str) -> Outcome<String> {
    let arguments = ["images", "pull", "--plain-http", "--snapshotter", snapshotter, &reference(image)];
    // Before the last line is how far it came, a hundred times.
    run(CTR, &arguments).map_err(|error| error.lines().last().unwrap_or_default().to_owned())
}

/// Its first digits.
fn boot_id() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    boot.chars().take(8).collect()
}

/// What a container sees of an image.
fn list(snapshotter: &str, image: &str) -> Outcome<String> {
    // What an earlier boot has left of this is its own matter.
    let name = format!("list-{image}-{}", boot_id());
    run(CTR, &["run", "--rm", "--snapshotter", snapshotter, &reference(image), &name, "/bin/sh", "-c", LIST])
}

/// Every byte of an image is what overlayfs showed.
fn compare(image: &str, counts: &mut Counts) -> Outcome {
    let expected = fs::read_to_string(expectation(image)).map_err(|error| error.to_string())?;
    let found = list("soci", image)?;
    if found != expected {
        let differs = |of: &str, than: &str| -> Vec<String> {
            of.lines().filter(|line| !than.lines().any(|other| other == *line)).map(str::to_owned).collect()
        };
        return Err(format!(
            "{image} is not what it was: {} instead of {}",
            differs(&found, &expected).join("; "),
            differs(&expected, &found).join("; ")
        ));
    }
    for line in found.lines().filter(|line| line.contains(" regular file ")) {
        counts.add("bytes", line.split(' ').next().and_then(|size| size.parse().ok()).unwrap_or_default());
        counts.add("files", 1);
    }
    Ok(())
}

/// After a boot: everything is as consistent as if the machine had been shut down.
fn look(acts: &Acts, counts: &mut Counts) -> Outcome {
    for unit in [DAEMON, HOLDER] {
        within(PATIENCE, &format!("{unit} runs"), || is_active(unit).then_some(()))?;
    }
    let status = within(PATIENCE, "the daemon says that it serves", || {
        let status = run("soci", &["status", "--json"]).ok()?;
        (!status.contains("\"state\": \"starting\"")).then_some(status)
    })?;
    let healthy = status.contains("\"state\": \"serving\"")
        && status.contains("\"connection_kept\": true")
        && !status.contains("\"trouble\"");
    ensure!(healthy, "after a power cut the daemon is not well: {status}: {}", journal(DAEMON, &["-n", "30"])?);
    for unit in [DAEMON, HOLDER, CUSTODIAN] {
        ensure!(property(unit, "NRestarts") == "0", "{unit} had to be restarted: {}", journal(unit, &["-n", "30"])?);
    }
    answers()?;
    GUEST.say("looking around");
    let promised = Acts::promised();
    registry()?;
    for image in IMAGES.iter().filter(|image| promised.contains(**image)) {
        let said = run(CTR, &["images", "check", "--snapshotter", "soci", &format!("name=={}", reference(image))])?;
        ensure!(
            said.lines().any(|line| line.contains(" true")),
            "{image} was pulled before the cut, and is not unpacked: {said}"
        );
        compare(image, counts)?;
        counts.add("promised", 1);
    }
    for container in promised.iter().filter_map(|what| what.strip_prefix("container ")) {
        let wrote =
            run(CTR, &["tasks", "start", container]).map_err(|error| format!("{container} does not start: {error}"))?;
        ensure!(wrote == "hello\n", "{container} wrote {wrote:?}");
        counts.add("containers", 1);
    }
    let again = journal(DAEMON, &["-o", "cat"])?.matches(PULLED_AGAIN).count();
    counts.add("again", again as u64);
    // What was not finished stands in nobody's way.
    for image in IMAGES.into_iter().filter(|image| !promised.contains(*image)) {
        if image == PULLED {
            remove(image)?;
        }
        pull("soci", image).map_err(|error| format!("{image} cannot be pulled after the cut: {error}"))?;
        compare(image, counts)?;
    }
    both_know_the_same(acts, counts)
}

/// containerd's snapshots are ours, ours are containerd's, and each directory belongs to one of them.
fn both_know_the_same(acts: &Acts, counts: &mut Counts) -> Outcome {
    // Whatever was interrupted, its owner is gone. Removing an image makes containerd collect.
    shell(&format!("{CTR} leases ls -q | xargs -r {CTR} leases rm"))?;
    acts.say(&format!("loses {}", LAZY[0]))?;
    run(CTR, &["images", "rm", "--sync", &reference(LAZY[0])])?;
    // What containerd prepares has its key as the last part of the name.
    let theirs = run(CTR, &["snapshots", "--snapshotter", "soci", "ls"])?;
    let theirs: BTreeSet<&str> = theirs.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    let last = std::cell::RefCell::new(String::new());
    let agree = within(PATIENCE, "containerd and the daemon know the same snapshots", || {
        let ours = run(CTR, &["--address", SOCKET, "snapshots", "--snapshotter", "soci", "ls"]);
        let ours = ours.map_err(|error| *last.borrow_mut() = error).ok()?;
        let key = |line: &str| {
            let name = line.split_whitespace().next()?;
            // Layers that we bring are named by their chain alone.
            Some(name.splitn(3, '/').nth(2).unwrap_or(name).to_owned())
        };
        let ours: BTreeSet<String> = ours.lines().skip(1).filter_map(key).collect();
        let differs: Vec<String> = ours
            .iter()
            .filter(|key| !theirs.contains(key.as_str()))
            .map(|key| format!("only we know {key}"))
            .chain(theirs.iter().filter(|key| !ours.contains(**key)).map(|key| format!("only containerd knows {key}")))
            .collect();
        *last.borrow_mut() = differs.join("; ");
        differs.is_empty().then_some(ours.len())
    });
    let known = agree.map_err(|error| format!("{error}: {}", last.borrow()))?;
    counts.add("snapshots", known as u64);
    let left = std::cell::RefCell::new(String::new());
    within(PATIENCE, "there is a directory for each snapshot, and no other", || {
        *left.borrow_mut() = leftovers(known).err()?;
        None::<()>
    })
    .or_else(|error| if left.borrow().is_empty() { Ok(()) } else { Err(format!("{error}: {}", left.borrow())) })
}

fn names(directory: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// An error if there are directories that belong to nobody.
fn leftovers(known: usize) -> Outcome {
    let directories = names(&format!("{ROOT}/snapshotter/snapshots"));
    ensure!(
        directories.len() == known && directories.iter().all(|name| name.parse::<u32>().is_ok()),
        "{known} snapshots, but these directories: {directories:?}"
    );
    let mut records = String::new();
    for name in &directories {
        records += &fs::read_to_string(format!("{ROOT}/snapshotter/snapshots/{name}/lazy.json")).unwrap_or_default();
    }
    let layers = names(&format!("{ROOT}/layers/sha256"));
    let strange: Vec<&String> = layers.iter().filter(|layer| !records.contains(layer.as_str())).collect();
    ensure!(strange.is_empty(), "layers that no snapshot shows: {strange:?}");
    Ok(())
}

/// When everything is removed, nothing is left.
fn nothing_stays() -> Outcome {
    shell(&format!(
        "for c in $({CTR} containers ls -q); do {CTR} tasks rm -f $c 2>/dev/null || :; {CTR} containers rm $c; done; \
         {CTR} images ls -q | xargs -r {CTR} images rm --sync"
    ))?;
    let left = || [names(&format!("{ROOT}/snapshotter/snapshots")), names(&format!("{ROOT}/layers/sha256"))];
    within(PATIENCE, "everything goes with the last image", || left().iter().all(BTreeSet::is_empty).then_some(()))
        .map_err(|error| format!("{error}: {:?}", left()))
}

/// Pulls, makes containers and removes them, all at once, for ever. Ends with an error.
fn work(acts: &Acts) -> Outcome<String> {
    for container in Acts::promised().iter().filter_map(|what| what.strip_prefix("container ")) {
        acts.say(&format!("loses container {container}"))?;
    }
    for container in run(CTR, &["containers", "ls", "-q"])?.split_whitespace() {
        let _ = attempt(CTR, &["tasks", "rm", "-f", container]);
        run(CTR, &["containers", "rm", container])?;
    }
    pull("soci", STEADY)?;
    acts.say(&format!("has {STEADY}"))?;
    GUEST.say(WORKING);
    let failed = Mutex::new(None);
    let fail = |error: String| {
        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    };
    let over = || failed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
    std::thread::scope(|scope| {
        for job in [lazily, whole, containers] {
            scope.spawn(move || {
                let mut round = 0;
                while !over() {
                    round += 1;
                    if let Err(error) = job(acts, round) {
                        fail(error);
                    }
                }
            });
        }
    });
    let error = failed.into_inner().unwrap_or_else(PoisonError::into_inner).unwrap_or_default();
    Err(format!("working: {error}: {}", journal(DAEMON, &["-n", "30"])?))
}

fn remove(image: &str) -> Outcome {
    let gone = attempt(CTR, &["images", "rm", "--sync", &reference(image)])?;
    let said = text(&gone.stderr);
    ensure!(gone.status.success() || said.contains("not found"), "{image} is not removed: {said}");
    Ok(())
}

fn replace(acts: &Acts, image: &str) -> Outcome {
    acts.say(&format!("loses {image}"))?;
    remove(image)?;
    pull("soci", image)?;
    acts.say(&format!("has {image}"))
}

/// Lazy layers: one image stays while the other one is replaced, read a little, and fetched in the background.
fn lazily(acts: &Acts, round: usize) -> Outcome {
    let image = LAZY[round % LAZY.len()];
    replace(acts, image)?;
    let name = format!("look-{image}-{}-{round}", boot_id());
    let look = "dd if=/hello bs=1 count=5 2>/dev/null; for f in /data/*; do dd if=$f bs=64k skip=3 count=1 of=/dev/null 2>/dev/null; done";
    let reference = reference(image);
    let said = run(CTR, &["run", "--rm", "--snapshotter", "soci", &reference, &name, "/bin/sh", "-c", look])?;
    ensure!(said == "hello", "a container of {image} wrote {said:?}");
    sleep(Duration::from_millis(500));
    Ok(())
}

/// Layers that we unpack.
fn whole(acts: &Acts, _: usize) -> Outcome {
    replace(acts, PULLED)?;
    sleep(Duration::from_millis(700));
    Ok(())
}

/// Containers: some are made and removed, some stay until the next boot.
fn containers(acts: &Acts, round: usize) -> Outcome {
    let name = format!("c{}-{round}", boot_id());
    run(CTR, &["containers", "create", "--snapshotter", "soci", &reference(STEADY), &name, "/bin/cat", "/hello"])?;
    acts.say(&format!("has container {name}"))?;
    // The first: an emulated machine rarely comes to a third before its power is cut.
    if round % 3 != 1 {
        acts.say(&format!("loses container {name}"))?;
        run(CTR, &["containers", "rm", &name])?;
    }
    let temporary = format!("{name}-writes");
    let write = "cd /tmp; n=0; while [ $n -lt 20 ]; do n=$((n+1)); echo $n >$n; done; echo *";
    run(CTR, &["run", "--rm", "--snapshotter", "soci", &reference(STEADY), &temporary, "/bin/sh", "-c", write])
        .map(drop)
}

/// Whether the steps file says that this is the job.
pub fn chosen() -> bool {
    fs::read_to_string(Path::new("/vm/steps")).is_ok_and(|steps| steps.trim() == "power-cuts")
}
