//! One life of a machine: what README tells people to do, and what happens to machines.

use super::{
    Next, Step,
    confined::{self, Watch},
    life, probe, readme,
    tools::{
        CONFIG, CUSTODIAN, DAEMON, Guest, HOLDER, PATIENCE, REGISTRY, ROOT, all_complete, attempt, edit, is_active,
        journal, main_pid, processes, property, replaced, run, shell, status, text, within,
    },
};
use crate::{Outcome, ensure};
use std::{fs, path::Path, time::Duration};

/// In this order.
pub const STEPS: &[Step] = &[
    Step { name: "install", run: install },
    Step { name: "enable", run: enable },
    Step { name: "lazy-container", run: lazy_container },
    Step { name: "image-without-index", run: image_without_index },
    Step { name: "pulled-image", run: pulled_image },
    Step { name: "logins", run: logins },
    Step { name: "reload", run: reload },
    Step { name: "journal", run: explained },
    Step { name: "confinement", run: confined::confinement },
    Step { name: "refusals", run: refusals },
    Step { name: "restart", run: restart },
    Step { name: "keepers", run: life::keepers },
    Step { name: "watchdog", run: life::watchdog },
    Step { name: "upgrade", run: upgrade },
    Step { name: "disk-full", run: disk_full },
    Step { name: "reboot", run: reboot },
    Step { name: "remove", run: remove },
    Step { name: "tarball", run: tarball },
];

const MOUNT: &str = "/var/lib/soci-snapshotter-grpc/snapshotter/lazy";

/// What makes containerd connect.
const ASK: &str = "ctr snapshots --snapshotter soci prepare probe && ctr snapshots --snapshotter soci rm probe";

/// Asks until there is an answer: containerd gives a connection less time than an overloaded machine may need for a start, and waits before it tries
/// again what was refused.
fn answered(what: &str) -> Outcome {
    let last = std::cell::RefCell::new(String::new());
    let asked = within(PATIENCE, what, || shell(ASK).map_err(|error| *last.borrow_mut() = error).ok());
    asked.map(drop).map_err(|error| format!("{error}: {}", last.borrow()))
}

/// Whether the mount of all lazy layers is there.
fn mounted() -> bool {
    fs::read_to_string("/proc/mounts").is_ok_and(|mounts| mounts.contains(&format!(" {MOUNT} fuse.rawBridge")))
}

/// `dnf install` from a local repository: everything is in its place, nothing runs.
fn install(_: &Guest) -> Outcome<Next> {
    shell("dnf -y -q install os-stub")?;
    readme::run("dnf install")?;
    let verified = attempt("rpm", &["-V", "soci-snapshotter"])?;
    ensure!(verified.stdout.is_empty(), "rpm -V: {}", text(&verified.stdout));
    run("soci-snapshotter-grpc", &["config", "check", "--strict"])?;
    run("soci", &["--version"])?;
    for path in [
        "/usr/share/licenses/soci-snapshotter/THIRD-PARTY-LICENCES",
        "/usr/share/man/man8/soci-snapshotter-grpc.8.gz",
        "/run/soci-snapshotter-grpc",
    ] {
        ensure!(Path::new(path).exists(), "{path} is missing");
    }
    let catalog = run("journalctl", &["--list-catalog", "--no-pager"])?;
    ensure!(catalog.contains("The SOCI snapshotter is ready"), "the journal does not know our messages");
    for unit in ["soci-snapshotter.socket", DAEMON, HOLDER, CUSTODIAN] {
        ensure!(!is_active(unit), "{unit} runs without having been asked");
        let found = property(unit, "LoadState");
        ensure!(found == "loaded", "{unit}: {found}");
    }
    let enabled = text(&attempt("systemctl", &["is-enabled", "soci-snapshotter.socket"])?.stdout);
    ensure!(enabled.trim() == "disabled", "after installation the socket is {enabled}");
    Ok(Next::Step)
}

/// `systemctl enable --now soci-snapshotter.socket`, containerd's configuration, and containerd's first connection.
fn enable(_: &Guest) -> Outcome<Next> {
    start_registry()?;
    configure_containerd()?;
    readme::run("systemctl enable")?;
    ensure!(!is_active(DAEMON), "the daemon runs before anybody has asked for it");
    readme::run("systemctl restart containerd")?;
    answered("the first connection starts the daemon")?;
    ensure!(is_active(DAEMON), "{}", status(DAEMON));
    ensure!(mounted(), "the mount is not seen by the rest of the machine");
    ensure!(is_active(HOLDER), "{}", status(HOLDER));
    let line = property(DAEMON, "StatusText");
    ensure!(line == "ready; no image is loaded lazily", "status: {line}");
    // Without the socket unit it works, too.
    run("systemctl", &["stop", "soci-snapshotter.socket", DAEMON])?;
    ensure!(
        !Path::new("/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock").exists(),
        "the stopped socket is still there"
    );
    run("systemctl", &["start", DAEMON])?;
    answered("the daemon serves the default path")?;
    run("systemctl", &["stop", DAEMON])?;
    run("systemctl", &["start", "soci-snapshotter.socket"])?;
    answered("the socket starts the daemon again")?;
    Ok(Next::Step)
}

/// `soci enable containerd`, which asks the containerd that runs.
fn configure_containerd() -> Outcome {
    let drop_in = "[Service]\nExecStartPre=\nExecStart=\nExecStart=/vm/bin/containerd\nEnvironment=PATH=/vm/bin:/usr/sbin:/usr/bin:/sbin:/bin\n";
    fs::create_dir_all("/etc/systemd/system/containerd.service.d").map_err(|error| error.to_string())?;
    fs::write("/etc/systemd/system/containerd.service.d/vm.conf", drop_in).map_err(|error| error.to_string())?;
    run("systemctl", &["daemon-reload"])?;
    run("systemctl", &["restart", "containerd"])?;
    readme::run("soci enable containerd").map(drop)
}

fn start_registry() -> Outcome {
    let config = format!(
        "version: 0.1\nlog: {{accesslog: {{disabled: false}}, level: warn}}\n\
         storage: {{filesystem: {{rootdirectory: /vm/registry}}}}\nhttp: {{addr: '{REGISTRY}'}}\n"
    );
    fs::write("/run/registry.yml", config).map_err(|error| error.to_string())?;
    run("systemd-run", &["--quiet", "--unit=vm-registry", "docker-registry", "serve", "/run/registry.yml"])?;
    within(PATIENCE, "the registry answers", || std::net::TcpStream::connect(REGISTRY).ok()).map(drop)
}

/// How many layers were made lazy since the boot.
fn layers_made_lazy() -> Outcome<usize> {
    Ok(journal(DAEMON, &["-o", "json"])?.matches("\"SOCI_REMOTE_SNAPSHOT_PREPARED\"").count())
}

/// The first pull and run: lazy, shown in the status line.
fn lazy_container(_: &Guest) -> Outcome<Next> {
    readme::run("ctr images pull")?;
    let found = readme::run("ctr run")?;
    ensure!(found.ends_with("hello\n"), "the container wrote {found:?}");
    ensure!(layers_made_lazy()? > 0, "no layer was made lazy: {}", journal(DAEMON, &[])?);
    let line = within(PATIENCE, "the status line shows the image", || {
        Some(property(DAEMON, "StatusText")).filter(|line| line.starts_with("1 image, 2 lazy layers, "))
    })?;
    ensure!(line.contains("MiB fetched; "), "status: {line}");
    all_complete("the image, in the background")?;
    // A healthy pull is a handful of lines.
    let lines = journal(DAEMON, &["-o", "cat"])?.lines().count();
    ensure!(lines < 40, "{lines} lines in the journal");
    Ok(Next::Step)
}

/// What `soci status` says about an image.
fn described(guest: &Guest, image: &str) -> Outcome<String> {
    let said = run("soci", &["status"])?;
    let found = said.split("\n\n").find(|part| part.trim_start().starts_with(&guest.reference(image)));
    found.map(str::to_owned).ok_or_else(|| format!("soci status does not know {image}: {said}"))
}

/// Bytes of an image's blobs that the registry sent: to containerd, and to us.
fn sent(image: &str) -> Outcome<(u64, u64)> {
    let said = journal("vm-registry.service", &["-o", "cat"])?;
    let get = format!("\"GET /v2/{image}/blobs/");
    let (mut to_containerd, mut to_us) = (0, 0);
    for line in said.lines().filter(|line| line.contains(&get)) {
        // … HTTP/1.1" STATUS BYTES "REFERRER" "CLIENT"
        let answer = line.split_once("HTTP/1.1\" ").map_or("", |(_, answer)| answer);
        let bytes: u64 = answer.split(' ').nth(1).and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
        match answer.contains("\"soci-snapshotter/") {
            true => to_us += bytes,
            false => to_containerd += bytes,
        }
    }
    Ok((to_containerd, to_us))
}

/// An image that has no SOCI index is left to containerd, and runs as well.
fn image_without_index(guest: &Guest) -> Outcome<Next> {
    guest.pull("soci", "plain")?;
    let found = guest.container("soci", "plain", &["/bin/cat", "/hello"])?;
    ensure!(found == "plain\n", "the container wrote {found:?}");
    let said = described(guest, "plain")?;
    ensure!(
        said.contains("1 layers: 0 lazy") && said.contains("0 pulled by the snapshotter, 1 by containerd"),
        "{said}"
    );
    // It was asked for a byte or two of it, to have connections.
    let (to_containerd, to_us) = sent("plain")?;
    ensure!(to_containerd > 1_000_000 && to_us < 1000, "{to_containerd} bytes went to containerd, {to_us} to us");
    Ok(Next::Step)
}

/// With `parallel_pull_as_fallback` it is pulled by us, unpacked by processes that can do nothing else, and is what its layers say.
fn pulled_image(guest: &Guest) -> Outcome<Next> {
    edit("parallel_pull_as_fallback = false", "parallel_pull_as_fallback = true")?;
    let pid = main_pid(DAEMON)?;
    run("systemctl", &["restart", DAEMON])?;
    replaced(DAEMON, pid)?;
    let workers = Watch::begin("soci-unpack");
    guest.pull("soci", "pulled")?;
    let seen = workers.end()?;
    let said = described(guest, "pulled")?;
    ensure!(
        said.contains("2 layers: 0 lazy") && said.contains("2 pulled by the snapshotter, 0 by containerd"),
        "{said}"
    );
    // containerd gets the image's configuration and no layer.
    let (to_containerd, to_us) = sent("pulled")?;
    ensure!(to_containerd < 10_000 && to_us > 25_165_824, "{to_containerd} bytes went to containerd, {to_us} to us");
    let look = "cd /data; md5sum <pulled | cut -c1-32; echo *; busybox stat -c '%a %u %g' /bin/busybox-suid; busybox stat -c '%t:%T' zero; \
                cat link";
    let found = guest.container("soci", "pulled", &["/bin/sh", "-c", look])?;
    let sum = shell("cat /vm/pulled-sum")?;
    let expected = format!("{}\nkept link pulled zero\n4755 7 8\n1:5\nkept\n", sum.trim());
    ensure!(found == expected, "the container saw {found:?}, not {expected:?}");
    for worker in &seen {
        confined::worker(worker)?;
    }
    ensure!(!seen.is_empty(), "no unpacking process was seen: {}", journal(CUSTODIAN, &["-n", "20"])?);
    Ok(Next::Step)
}

/// Docker's configuration in root's home, and a credential helper, under the unit.
fn logins(guest: &Guest) -> Outcome<Next> {
    let helper = "#!/bin/sh\n[ \"$1\" = get ] || exit 1\nread host\n\
                  echo \"$host\" >>/run/soci-snapshotter-grpc/helper-was-asked\n\
                  touch /root/written 2>/dev/null && echo writable >>/run/soci-snapshotter-grpc/helper-was-asked\n\
                  echo '{\"Username\":\"somebody\",\"Secret\":\"hush-hush\"}'\n";
    fs::write("/usr/local/bin/docker-credential-vm", helper).map_err(|error| error.to_string())?;
    shell(
        "chmod 755 /usr/local/bin/docker-credential-vm; mkdir -p /root/.docker; htpasswd=/vm/htpasswd; test -s $htpasswd",
    )?;
    fs::write("/root/.docker/config.json", "{\"credHelpers\":{\"127.0.0.1:5001\":\"vm\"}}")
        .map_err(|error| error.to_string())?;
    // A second registry over the same data, which wants a login.
    let config = "version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: /vm/registry}}\n\
                  http: {addr: '127.0.0.1:5001'}\nauth: {htpasswd: {realm: vm, path: /vm/htpasswd}}\n";
    fs::write("/run/registry-login.yml", config).map_err(|error| error.to_string())?;
    run(
        "systemd-run",
        &["--quiet", "--unit=vm-registry-login", "docker-registry", "serve", "/run/registry-login.yml"],
    )?;
    within(PATIENCE, "the registry answers", || std::net::TcpStream::connect("127.0.0.1:5001").ok())?;
    let before = layers_made_lazy()?;
    guest.pull_with_login("soci", "127.0.0.1:5001/late:1", "somebody:hush-hush")?;
    let asked = fs::read_to_string("/run/soci-snapshotter-grpc/helper-was-asked").unwrap_or_default();
    ensure!(asked.contains("127.0.0.1:5001"), "the credential helper was not run: {}", journal(DAEMON, &["-n", "20"])?);
    ensure!(!asked.contains("writable"), "a credential helper can write to /root");
    ensure!(layers_made_lazy()? > before, "no layer was made lazy: {}", journal(DAEMON, &["-n", "20"])?);
    let said = run("journalctl", &["--no-pager", "-b", "-o", "export"])?;
    ensure!(!said.contains("hush-hush") && !said.contains("aHVzaC1odXNo"), "the journal has the password");
    Ok(Next::Step)
}

/// A good change is applied, one that needs a restart is named, a bad one changes nothing and says why.
fn reload(_: &Guest) -> Outcome<Next> {
    let pid = main_pid(DAEMON)?;
    edit("max_bytes_per_sec = 0", "max_bytes_per_sec = 900000000")?;
    edit("cache_memory_mb = 16", "cache_memory_mb = 20")?;
    readme::run("soci-snapshotter-grpc config check")?;
    readme::run("systemctl reload")?;
    within(PATIENCE, "the change is said", || {
        let said = journal(DAEMON, &["-o", "json"]).ok()?;
        let found = said.contains("\"SOCI_APPLIED\":\"background_fetch.max_bytes_per_sec\"")
            && said.contains("\"SOCI_KEYS\":\"layer_store.cache_memory_mb\"");
        found.then_some(())
    })?;
    within(PATIENCE, "the status line names what needs a restart", || {
        property(DAEMON, "StatusText").ends_with("restart needed for layer_store.cache_memory_mb").then_some(())
    })?;
    edit("MaxRetries = 8", "MaxRetries = 'many'")?;
    let refused = attempt("systemctl", &["reload", DAEMON])?;
    ensure!(!refused.status.success(), "a bad configuration was reloaded");
    let said = journal(DAEMON, &["-o", "cat", "-n", "20"])?;
    ensure!(said.contains("config.toml:") && said.contains("http.MaxRetries"), "it is not said why: {said}");
    // Past the check that systemctl makes: the daemon itself refuses, too.
    run("kill", &["-HUP", &pid.to_string()])?;
    within(PATIENCE, "the daemon refuses", || {
        property(DAEMON, "StatusText").contains("CONFIGURATION NOT RELOADED").then_some(())
    })?;
    edit("MaxRetries = 'many'", "MaxRetries = 8")?;
    run("systemctl", &["reload", DAEMON])?;
    within(PATIENCE, "the status line is good again", || {
        (!property(DAEMON, "StatusText").contains("NOT RELOADED")).then_some(())
    })?;
    ensure!(main_pid(DAEMON)? == pid, "a reload replaced the daemon");
    Ok(Next::Step)
}

/// `journalctl -x` explains.
fn explained(_: &Guest) -> Outcome<Next> {
    let said = journal(DAEMON, &["-x"])?;
    for text in [
        "Subject: The SOCI snapshotter is ready",
        "What to do:",
        "Subject: The SOCI snapshotter has refused a changed configuration",
    ] {
        ensure!(said.contains(text), "journalctl -x does not say {text:?}: {said}");
    }
    ensure!(readme::run("journalctl -xu")?.contains("What to do:"), "README's way to the journal explains nothing");
    ensure!(readme::run("soci status")?.contains("127.0.0.1:5000/app"), "soci status does not know the image");
    ensure!(readme::run("soci explain")?.contains("lazy"), "soci explain does not say what became of the image");
    readme::run("soci doctor")?;
    ensure!(readme::run("systemctl status")?.contains("lazy layers"), "systemctl status has no status line");
    let found = run("journalctl", &["--no-pager", "-b", "-o", "cat", "SOCI_KEYS=layer_store.cache_memory_mb"])?;
    ensure!(!found.is_empty(), "the journal cannot be searched by our fields");
    Ok(Next::Step)
}

/// A forbidden act from inside each unit is refused: the unit runs a probe instead of its program.
fn refusals(_: &Guest) -> Outcome<Next> {
    shell("mkdir -p /root/.docker; [ -e /root/.docker/config.json ] || echo '{}' >/root/.docker/config.json")?;
    for role in probe::ROLES {
        let unit = role.unit();
        let directory = format!("/run/systemd/system/{unit}.d");
        fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
        let drop_in = format!(
            "[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nExecStart=\nExecStart=/vm/vm-tests probe {}\n",
            role.name()
        );
        fs::write(format!("{directory}/probe.conf"), drop_in).map_err(|error| error.to_string())?;
        run("systemctl", &["daemon-reload"])?;
        // Sockets would start it again, for everybody who asks.
        run("systemctl", &["stop", "soci-snapshotter.socket", "soci-custodian.socket", unit])?;
        let done = attempt("systemctl", &["start", unit])?;
        let said = journal(unit, &["-o", "cat", "-n", "40"])?;
        fs::remove_dir_all(&directory).map_err(|error| error.to_string())?;
        run("systemctl", &["daemon-reload"])?;
        let _ = attempt("systemctl", &["reset-failed", unit]);
        ensure!(done.status.success(), "in the place of {unit}: {said}");
    }
    run("systemctl", &["start", HOLDER, "soci-custodian.socket", "soci-snapshotter.socket", DAEMON])?;
    Ok(Next::Step)
}

/// `systemctl restart`, `kill -9` of each process and of all at once, under a container that reads.
fn restart(guest: &Guest) -> Outcome<Next> {
    let reader = guest.reader("app")?;
    let pid = main_pid(DAEMON)?;
    readme::run("systemctl restart soci-snapshotter")?;
    replaced(DAEMON, pid)?;
    reader.goes_on("systemctl restart")?;

    let pid = main_pid(DAEMON)?;
    run("kill", &["-9", &pid.to_string()])?;
    replaced(DAEMON, pid)?;
    reader.goes_on("kill -9 of the daemon")?;

    let pid = main_pid(HOLDER)?;
    run("kill", &["-9", &pid.to_string()])?;
    replaced(HOLDER, pid)?;
    reader.goes_on("kill -9 of soci-mount")?;

    // systemd's descriptor store is the only one left who has the connection.
    let (daemon, holder) = (main_pid(DAEMON)?, main_pid(HOLDER)?);
    run("kill", &["-9", &daemon.to_string(), &holder.to_string()])?;
    replaced(HOLDER, holder)?;
    replaced(DAEMON, daemon)?;
    reader.goes_on("kill -9 of the daemon and of soci-mount together")?;

    let pid = main_pid(CUSTODIAN)?;
    run("kill", &["-9", &pid.to_string()])?;
    within(PATIENCE, "the custodian is asked again", || guest.container("soci", "app", &["/bin/true"]).ok())?;
    reader.goes_on("kill -9 of the custodian")?;

    run("systemctl", &["restart", HOLDER])?;
    reader.goes_on("systemctl restart soci-mount")?;
    Ok(Next::Step)
}

/// A newer package under a container that reads: it reads on, the edited configuration stays, the daemon is the new one.
fn upgrade(guest: &Guest) -> Outcome<Next> {
    let reader = guest.reader("app")?;
    let config = fs::read(CONFIG).map_err(|error| error.to_string())?;
    let (daemon, holder) = (main_pid(DAEMON)?, main_pid(HOLDER)?);
    shell("dnf -y -q --enablerepo=vm-new upgrade soci-snapshotter")?;
    let installed = run("rpm", &["-q", "--qf", "%{RELEASE}", "soci-snapshotter"])?;
    ensure!(installed.starts_with("2."), "after the upgrade: {installed}");
    replaced(DAEMON, daemon)?;
    ensure!(main_pid(HOLDER)? == holder, "the upgrade replaced soci-mount, and with it the connection's keeper");
    reader.goes_on("the upgrade")?;
    ensure!(
        fs::read(CONFIG).map_err(|error| error.to_string())? == config,
        "the upgrade changed the edited configuration"
    );
    ensure!(
        text(&attempt("systemctl", &["is-enabled", "soci-snapshotter.socket"])?.stdout).trim() == "enabled",
        "the upgrade disabled the socket"
    );
    Ok(Next::Step)
}

/// No room for what is fetched: reads go on from the network, the status line says so, and when there is room again it is used.
fn disk_full(guest: &Guest) -> Outcome<Next> {
    let ballast = format!("{ROOT}/ballast");
    // Only what is read is fetched, so that there is something left to fetch when the disk is full.
    edit("disable = false", "disable = true")?;
    run("systemctl", &["reload", DAEMON])?;
    within(PATIENCE, "the background has stopped", || {
        journal(DAEMON, &["-o", "json"]).ok()?.contains("\"SOCI_APPLIED\":\"background_fetch.disable\"").then_some(())
    })?;
    guest.pull("soci", "huge")?;
    // An image three times as large as what is left can still be made lazy.
    let room = shell(&format!("df -m --output=avail {ROOT} | tail -n 1"))?;
    let room: u32 = room.trim().parse().map_err(|error| format!("df: {room}: {error}"))?;
    shell(&format!("fallocate -l {}M {ballast}", room.saturating_sub(16)))?;
    guest.pull("soci", "tight")?;
    let said = described(guest, "tight")?;
    ensure!(
        said.contains("1 lazy") && said.contains("0 pulled by the snapshotter, 0 by containerd"),
        "with 16 MiB left: {said}: {}",
        journal(DAEMON, &["-n", "20"])?
    );
    // What can be fetched again does not take the last of the room: another image can be, too.
    edit("disable = true", "disable = false")?;
    run("systemctl", &["reload", DAEMON])?;
    let is_full = || property(DAEMON, "StatusText").contains("DISK FULL").then_some(());
    let why = |error| {
        format!("{error}: {}; {}", property(DAEMON, "StatusText"), shell(&format!("df {ROOT}")).unwrap_or_default())
    };
    within(PATIENCE, "the background fills the disk, and the status line says so", is_full).map_err(why)?;
    let pulled = guest.pull("soci", "last").and_then(|_| described(guest, "last"));
    let said = pulled.map_err(|error| format!("{}: {error}", who_has_the_disk(&ballast)))?;
    ensure!(
        said.contains("1 lazy"),
        "with a disk full of fetched data: {said}: {}: {}",
        who_has_the_disk(&ballast),
        journal(DAEMON, &["-n", "20"])?
    );
    // Nothing left but for a container to be made: a directory or two.
    shell(&format!(
        "for size in 1M 4k; do dd if=/dev/zero of={ballast} bs=$size oflag=append conv=notrunc 2>/dev/null || :; sync -f {ballast}; done; \
         truncate -s -1M {ballast}; sync -f {ballast}"
    ))?;
    let room = shell(&format!("df -k --output=avail {ROOT} | tail -n 1"))?;
    ensure!(
        room.trim().parse().is_ok_and(|room: u32| (512..2048).contains(&room)),
        "{} KiB are left, not 1024",
        room.trim()
    );
    let expected = shell("cat /vm/huge-sum")?;
    let found = guest.container("soci", "huge", &["/bin/sh", "-c", "md5sum </data/huge | cut -c1-32"]);
    let found = found.map_err(|error| format!("{error}: {}", who_has_the_disk(&ballast)))?;
    ensure!(
        found.trim() == expected.trim(),
        "with a full disk a container read something else: {found} is not {expected}"
    );
    within(PATIENCE, "the status line says that the disk is full", is_full).map_err(why)?;
    fs::remove_file(&ballast).map_err(|error| error.to_string())?;
    all_complete("the rest, now that there is room again")?;
    let said = journal(DAEMON, &["-x"])?;
    ensure!(said.contains("Subject: There is no room for fetched data"), "the full disk is not in the journal");
    Ok(Next::Step)
}

/// Who has the disk.
fn who_has_the_disk(ballast: &str) -> String {
    let look = format!(
        "df -k {ROOT}; df -i {ROOT}; ls -ls {ballast}; ls -ls {ROOT}/snapshotter; cat /sys/fs/ext4/*/reserved_clusters; \
         du -ak {ROOT} | sort -n | tail -n 30"
    );
    shell(&format!("({look}) 2>&1")).unwrap_or_else(|error| error)
}

/// After a reboot containers start again from what is here: there is no registry any more.
fn reboot(guest: &Guest) -> Outcome<Next> {
    let mark = Path::new("/vm/rebooted");
    if !mark.exists() {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let time = fs::read_to_string("/proc/uptime").unwrap_or_default();
        fs::write(mark, format!("{id}{time}")).map_err(|error| error.to_string())?;
        return Ok(Next::Reboot);
    }
    ensure!(std::net::TcpStream::connect(REGISTRY).is_err(), "there is still a registry");
    ensure!(is_active(DAEMON), "nobody has started the daemon before containerd: {}", status(DAEMON));
    // By this it knows which layers an earlier boot may not have written. All were: what was pulled is used below, without a registry.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().replace('-', "");
    let told = property(DAEMON, "Environment");
    ensure!(told.contains(&format!("SOCI_BOOT_ID={boot}")), "the unit does not tell the boot's ID {boot}: {told}");
    let said = journal(DAEMON, &["-o", "cat"])?;
    ensure!(!said.contains("were not on disk yet"), "layers are taken for lost after a reboot: {said}");
    // It was started, and an overloaded machine may give it no time for seconds.
    within(PATIENCE, "containerd answers", || run("ctr", &["version"]).ok())
        .map_err(|error| format!("{error}: {} {}", status("containerd"), status(DAEMON)))?;
    let found = guest.container("soci", "app", &["/bin/cat", "/hello"]);
    let found = found.map_err(|error| format!("{error}: {} {}", status("containerd"), status(DAEMON)))?;
    ensure!(found == "hello\n", "the container wrote {found:?}");
    let expected = shell("cat /vm/huge-sum")?;
    let found = guest.container("soci", "huge", &["/bin/sh", "-c", "md5sum </data/huge | cut -c1-32"])?;
    ensure!(found.trim() == expected.trim(), "after the reboot a container read something else");
    let expected = shell("cat /vm/pulled-sum")?;
    let found = guest.container("soci", "pulled", &["/bin/sh", "-c", "md5sum </data/pulled | cut -c1-32"])?;
    ensure!(found.trim() == expected.trim(), "after the reboot a container of a pulled image read something else");
    let line = within(PATIENCE, "the status line shows the images", || {
        Some(property(DAEMON, "StatusText")).filter(|line| line.contains("; all complete"))
    })?;
    ensure!(!line.starts_with("1 image"), "images are missing after the reboot: {line}");
    Ok(Next::Step)
}

/// `dnf remove` while a lazily loaded container runs: it warns, does not hang, stops and unmounts everything, and leaves the data.
fn remove(guest: &Guest) -> Outcome<Next> {
    let reader = guest.reader("app")?;
    let begun = std::time::Instant::now();
    let said = readme::run("dnf remove")?;
    ensure!(begun.elapsed() < Duration::from_secs(60) + PATIENCE, "dnf remove took {:?}", begun.elapsed());
    ensure!(said.contains("still use layers that this package serves"), "no warning about running containers: {said}");
    ensure!(
        said.contains("were left in place") && said.contains(&format!("rm -rf {ROOT}")),
        "not said how to remove the data: {said}"
    );
    within(PATIENCE, "no process of ours is left", || {
        (processes("soci-snapshotte").is_empty()
            && processes("soci-mount").is_empty()
            && processes("soci-custodian").is_empty())
        .then_some(())
    })?;
    ensure!(!mounted(), "the mount is still there");
    ensure!(Path::new(&format!("{ROOT}/snapshotter/metadata.redb")).exists(), "the data is gone");
    for path in [
        "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock",
        "/usr/bin/soci",
        "/usr/lib/systemd/system/soci-mount.service",
    ] {
        ensure!(!Path::new(path).exists(), "{path} was left behind");
    }
    // The container was told, not left waiting.
    within(PATIENCE, "the container's reads fail", || (!reader.strange().is_empty()).then_some(()))?;
    drop(reader);
    let left = attempt("systemctl", &["list-units", "--no-legend", "--all", "soci-*"])?;
    ensure!(!text(&left.stdout).contains("running"), "units are left: {}", text(&left.stdout));
    readme::was_run()?;
    Ok(Next::Step)
}

/// The tar for those without rpm: what the package left is used again, and taken away again.
fn tarball(guest: &Guest) -> Outcome<Next> {
    shell("mkdir /opt/soci; cp /vm/dist/SHA256SUMS /vm/dist/soci-snapshotter-*-linux-x86_64.tar.gz /opt/soci/")?;
    let config = fs::read(CONFIG).ok();
    readme::run_below("Without packages", "/opt/soci")?;
    ensure!(config.is_none() || fs::read(CONFIG).ok() == config, "a configuration that was there was not kept");
    answered("the first connection starts the daemon")?;
    ensure!(mounted() && is_active(HOLDER), "{}", status(HOLDER));
    // There is no registry any more.
    let found = guest.container("soci", "app", &["/bin/cat", "/hello"])?;
    ensure!(found == "hello\n", "the container wrote {found:?}");
    let said = shell("/opt/soci/soci-snapshotter-*/install.sh --remove")?;
    ensure!(said.contains("were left in place"), "{said}");
    ensure!(!mounted() && processes("soci-").is_empty(), "something is left of it");
    for path in ["/usr/bin/soci", "/usr/lib/systemd/system/soci-mount.service", "/usr/libexec/soci-snapshotter"] {
        ensure!(!Path::new(path).exists(), "{path} was left behind");
    }
    Ok(Next::Step)
}
