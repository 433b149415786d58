//! Where guests run.

use super::prepare::{Distribution, Payload, cache, equip, fill};
use crate::{
    Outcome, ensure,
    guest::tools::{run, shell, text},
};
use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Debian 12 in a container: systemd 252, containerd 2.2, the package for Amazon Linux 2023.
    Nspawn,
    /// Debian 11 in a container: systemd 247, the package and the units for Amazon Linux 2.
    NspawnOld,
    /// Debian 12 on an emulated machine: kernel 6.1, cgroup v2.
    Qemu,
    /// An image that Amazon publishes, for the distribution its name says.
    Official { path: PathBuf, sha256: String },
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backend::Nspawn => f.write_str("nspawn (systemd 252)"),
            Backend::NspawnOld => f.write_str("nspawn-old (systemd 247, units for 219)"),
            Backend::Qemu => f.write_str("qemu (kernel 6.1)"),
            Backend::Official { path, .. } => write!(f, "official {}", path.display()),
        }
    }
}

/// A whole story takes one minute in a container and some on an emulated machine.
const NSPAWN_LIMIT: Duration = Duration::from_secs(15 * 60);
const QEMU_LIMIT: Duration = Duration::from_secs(60 * 60);

impl Backend {
    pub fn parse(word: &str) -> Option<Backend> {
        match word {
            "nspawn" => Some(Backend::Nspawn),
            "nspawn-old" => Some(Backend::NspawnOld),
            "qemu" => Some(Backend::Qemu),
            _ => {
                let (path, sha256) = word.strip_prefix("official=")?.rsplit_once(':')?;
                Some(Backend::Official { path: path.into(), sha256: sha256.to_lowercase() })
            }
        }
    }

    /// What `make vm-test` runs.
    pub fn usual() -> Vec<Backend> {
        let mut all = vec![Backend::Nspawn, Backend::NspawnOld, Backend::Qemu];
        for variable in ["SOCI_VM_AL2", "SOCI_VM_AL2023"] {
            let given = std::env::var(variable).unwrap_or_default();
            // One that is not given is listed all the same, so that its absence is seen.
            let (path, sha256) = given.rsplit_once(':').unwrap_or(("", ""));
            let path = if path.is_empty() { format!("({variable})").into() } else { path.into() };
            all.push(Backend::Official { path, sha256: sha256.to_lowercase() });
        }
        all
    }

    /// Why this machine cannot run it.
    pub fn cannot_run(&self) -> Option<String> {
        let root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
        match self {
            _ if !root => Some("it needs root".into()),
            Backend::Official { path, .. } if !path.exists() => {
                Some(format!("no image: give one as official=PATH:SHA256 or in {}", path.display()))
            }
            Backend::Official { path, sha256 } => match run("sha256sum", &[&path.display().to_string()]) {
                Ok(found) if found.starts_with(sha256) && sha256.len() == 64 => None,
                Ok(found) => {
                    Some(format!("its sha256 is {}, not {sha256}", found.split(' ').next().unwrap_or_default()))
                }
                Err(error) => Some(error),
            },
            _ => None,
        }
    }

    /// The Debian that it boots.
    pub fn suite(&self) -> Option<&'static str> {
        match self {
            Backend::Nspawn | Backend::Qemu => Some("bookworm"),
            Backend::NspawnOld => Some("bullseye"),
            Backend::Official { .. } => None,
        }
    }

    fn distribution(&self) -> Distribution {
        match self {
            Backend::NspawnOld => Distribution::AmazonLinux2,
            Backend::Official { path, .. } if !path.to_string_lossy().contains("2023") => Distribution::AmazonLinux2,
            _ => Distribution::AmazonLinux2023,
        }
    }

    /// What the guest wrote down.
    pub fn run(&self, payload: &Payload, steps: &[String]) -> Outcome<String> {
        let place = Place::new()?;
        match self {
            Backend::Nspawn | Backend::NspawnOld => self.container(payload, steps, &place),
            Backend::Qemu | Backend::Official { .. } => self.machine(payload, steps, &place),
        }
    }

    fn container(&self, payload: &Payload, steps: &[String], place: &Place) -> Outcome<String> {
        fill(payload, &place.path.join("vm"), self.distribution(), steps)?;
        let suite = payload.guests.join(self.suite().unwrap_or_default());
        let ended = boot_container(place, &suite, NSPAWN_LIMIT);
        verdict(&self.to_string(), place, ended)
    }

    fn machine(&self, payload: &Payload, steps: &[String], place: &Place) -> Outcome<String> {
        fill(payload, &place.path.join("vm"), self.distribution(), steps)?;
        let ended = match self {
            Backend::Official { path, .. } => {
                shell(&format!(
                    "cd {}; qemu-img create -q -f qcow2 -F qcow2 -b {} root.img",
                    place.path.display(),
                    path.display()
                ))?;
                seed(&place.path)?;
                let machine = Machine::new(place, place.path.join("root.img"), Vec::new())?;
                let drives =
                    ["file=root.img,if=virtio,format=qcow2", "file=seed.img,if=virtio,format=raw", VM_DISK, DATA_DISK];
                machine.run(place, &drives.map(String::from))
            }
            _ => boot_debian(payload, place),
        };
        verdict(&self.to_string(), place, ended)
    }
}

/// Boots the root filesystem in `suite` as a container, with the place's `vm` as `/vm`, and waits until it has ended itself.
pub fn boot_container(place: &Place, suite: &Path, limit: Duration) -> Outcome {
    let at = |name: &str| place.path.join(name);
    for name in ["upper", "work", "root", "vm", "data", "containerd"] {
        fs::create_dir_all(at(name)).map_err(|error| error.to_string())?;
    }
    let options =
        format!("lowerdir={},upperdir={},workdir={}", suite.display(), at("upper").display(), at("work").display());
    run("mount", &["-t", "overlay", "overlay", "-o", &options, &at("root").display().to_string()])?;
    // A small disk of its own, which can be full.
    shell(&format!(
        "truncate -s 400M {0}; mkfs.ext4 -q -F -m 0 {0}; mount -o loop {0} {1}",
        at("data.img").display(),
        at("data").display()
    ))?;
    equip(&at("root"))?;
    // 133 is what it ends with when the guest wants to be rebooted. A cgroup of its own in each hierarchy of version 1; the guest's systemd would take over ours.
    let script = format!(
        "for h in /sys/fs/cgroup/*/; do mkdir -p $h/{name} 2>/dev/null || continue; \
           for f in cpuset.cpus cpuset.mems; do [ ! -e $h/$f ] || cat $h/$f >$h/{name}/$f; done; \
           echo $$ >$h/{name}/cgroup.procs 2>/dev/null || :; done; \
         code=133; while [ $code = 133 ]; do code=0; systemd-nspawn -q -D {root} --machine={name} --register=no --keep-unit -b --console=pipe --private-network --capability=all \
           --system-call-filter=@keyring --system-call-filter=bpf --bind=/dev/fuse --bind={vm}:/vm \
           --bind={data}:/var/lib/soci-snapshotter-grpc --bind={containerd}:/var/lib/containerd || code=$?; done",
        name = place.name,
        root = at("root").display(),
        vm = at("vm").display(),
        data = at("data").display(),
        containerd = at("containerd").display()
    );
    let log = fs::File::create(at("console")).map_err(|error| error.to_string())?;
    let mut command = Command::new("bash");
    command
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stderr(log.try_clone().map_err(|error| error.to_string())?)
        .stdout(log);
    wait(command.spawn().map_err(|error| error.to_string())?, limit, &at("console"))
}

/// Boots Debian 12 with its kernel 6.1 on an emulated machine, and waits until it has switched itself off.
pub fn boot_debian(payload: &Payload, place: &Place) -> Outcome {
    let machine = Machine::debian(payload, place)?;
    let root = format!("file={},if=virtio,format=raw,snapshot=on", machine.root.display());
    machine.run(place, &[&root, VM_DISK, DATA_DISK].map(String::from))
}

/// An emulated machine.
pub struct Machine {
    /// Where its files are.
    at: PathBuf,
    pub root: PathBuf,
    pub data: PathBuf,
    /// What says which system it starts.
    system: Vec<String>,
}

const VM_DISK: &str = "file=vm.img,if=virtio,format=raw";
const DATA_DISK: &str = "file=data.img,if=virtio,format=raw";

impl Machine {
    /// With the story's disk: payload in, results out; and one that can be full.
    fn new(place: &Place, root: PathBuf, system: Vec<String>) -> Outcome<Machine> {
        let at = place.path.clone();
        shell(&format!(
            "cd {}; mke2fs -q -F -t ext4 -L vm -d vm vm.img 1G; truncate -s 400M data.img; mke2fs -q -F -t ext4 -m 0 -L data data.img",
            at.display()
        ))?;
        let data = at.join("data.img");
        Ok(Machine { at, root, data, system })
    }

    /// Debian 12 with its kernel 6.1.
    pub fn debian(payload: &Payload, place: &Place) -> Outcome<Machine> {
        let (root, kernel) = emulated_root(payload, &place.path)?;
        let initrd = initrd(payload, &place.path)?;
        let system = ["-kernel", &kernel.display().to_string(), "-initrd", &initrd.display().to_string()];
        Machine::new(place, root, system.map(String::from).to_vec())
    }

    /// Switches it on, with these drives in this order, and `words` for its kernel.
    pub fn start(&self, drives: &[String], words: &str) -> Outcome<Child> {
        let hardware = "-nodefaults -no-user-config -display none -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 2048 -serial file:console";
        // An emulated timer that is late is there all the same.
        let line =
            format!("console=ttyS0 root=/dev/vda rw quiet no_timer_check net.ifnames=0 systemd.show_status=0 {words}");
        let log = fs::File::create(self.at.join("qemu.log")).map_err(|error| error.to_string())?;
        let _ = fs::remove_file(self.at.join("console"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(hardware.split(' ')).args(&self.system);
        if !self.system.is_empty() {
            command.args(["-append", &line]);
        }
        command
            .args(drives.iter().flat_map(|drive| ["-drive", drive]))
            .current_dir(&self.at)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(|error| error.to_string())?)
            .stderr(log);
        command.spawn().map_err(|error| error.to_string())
    }

    /// Switches it on, and waits until it has switched itself off.
    fn run(&self, place: &Place, drives: &[String]) -> Outcome {
        let ended = wait(self.start(drives, "")?, QEMU_LIMIT, &self.at.join("console"));
        self.collect(place);
        ended
    }

    /// What the guest has left on the story's disk.
    pub fn collect(&self, place: &Place) {
        for name in ["results", "journal"] {
            // The guest's file system as it was left; nothing has to be mounted for that.
            let dump = format!("dump /{name} {}", place.path.join("vm").join(name).display());
            let _ = run("debugfs", &["-R", &dump, &self.at.join("vm.img").display().to_string()]);
        }
    }
}

/// The results, and everything that helps where they are bad.
pub fn verdict(name: &str, place: &Place, ended: Outcome) -> Outcome<String> {
    let read = |name: &str| fs::read(place.path.join(name)).map(|bytes| text(&bytes)).unwrap_or_default();
    let mut results = read("vm/results");
    if let Err(error) = ended {
        results += &format!("end failed: {error}\n");
    }
    if !results.lines().any(|line| line == "end passed") {
        let keep = std::env::temp_dir().join(format!("vm-tests-{}", name.split(' ').next().unwrap_or_default()));
        fs::create_dir_all(&keep).map_err(|error| error.to_string())?;
        for name in ["console", "qemu.log", "vm/journal", "vm/results"] {
            let file = Path::new(name).file_name().unwrap_or_default();
            let _ = fs::copy(place.path.join(name), keep.join(file));
        }
        results += &format!("(console and journal are in {})\n", keep.display());
    }
    Ok(results)
}

/// Waits for a guest to end itself.
fn wait(mut child: Child, limit: Duration, console: &Path) -> Outcome {
    let begun = Instant::now();
    let why = loop {
        match child.try_wait() {
            Ok(Some(_)) => return Ok(()),
            Ok(None) if begun.elapsed() > limit => break format!("the guest did not end within {limit:?}"),
            Ok(None) if fs::read(console).is_ok_and(|said| text(&said).contains("end Kernel panic")) => {
                break "the guest's kernel panicked".into();
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(200)),
            Err(error) => break error.to_string(),
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    Err(why)
}

/// The Debian 12 root filesystem as a disk, made once; and its kernel.
fn emulated_root(payload: &Payload, place: &Path) -> Outcome<(PathBuf, PathBuf)> {
    let guest = payload.guests.join("bookworm");
    let kernel = fs::read_dir(guest.join("boot"))
        .map_err(|error| error.to_string())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains("/vmlinuz-"))
        .ok_or("the guest has no kernel")?;
    let (upper, tree, image) = (place.join("upper"), place.join("tree"), place.join("root.img"));
    // What equips it goes on top: the guest itself stays as it was installed.
    for directory in [&upper, &tree, &place.join("work")] {
        fs::create_dir_all(directory).map_err(|error| error.to_string())?;
    }
    let options =
        format!("lowerdir={},upperdir={},workdir={}", guest.display(), upper.display(), place.join("work").display());
    run("mount", &["-t", "overlay", "overlay", "-o", &options, &tree.display().to_string()])?;
    equip(&tree)?;
    shell(&format!(
        "cd {}; mkdir -p vm var/lib/soci-snapshotter-grpc; rm -f boot/initrd*; \
         printf '/dev/vdb /vm ext4 defaults 0 0\\n/dev/vdc /var/lib/soci-snapshotter-grpc ext4 defaults 0 0\\n' >etc/fstab; \
         for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer; do rm -f etc/systemd/system/*.wants/$unit; done",
        tree.display()
    ))?;
    run(
        "mke2fs",
        &["-q", "-F", "-t", "ext4", "-d", &tree.display().to_string(), &image.display().to_string(), "2500M"],
    )?;
    run("umount", &[&tree.display().to_string()])?;
    Ok((image, kernel))
}

/// The least that finds the disk: busybox and the modules on the way to an ext4 on virtio.
fn initrd(payload: &Payload, place: &Path) -> Outcome<PathBuf> {
    let script = r#"mkdir -p initrd/bin initrd/lib initrd/dev initrd/proc initrd/sys initrd/root; cp /bin/busybox initrd/bin/; ln -sf busybox initrd/bin/sh
        modules=$(ls -d $1/lib/modules/*/ | head -n 1)
        # The guest's own modprobe: this machine may have none.
        list=$(for m in virtio_pci virtio_blk ext4 crc32c_generic crc32c-intel; do chroot $1 /sbin/modprobe -S $(basename $modules) --show-depends $m 2>/dev/null || :; done |
            sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++')
        case $list in *virtio_blk*) ;; *) echo "no module for the disk in $modules: $list" >&2; exit 1 ;; esac
        : >initrd/list; for file in $list; do cp $1$file initrd/lib/; basename $file >>initrd/list; done
        printf '#!/bin/sh\nb=/bin/busybox\n$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev\n\
while read m; do $b insmod /lib/$m; done </list\nn=0; while [ ! -b /dev/vda ] && [ $n -lt 200 ]; do $b sleep 0.1; n=$((n+1)); done\n\
$b mount -t ext4 /dev/vda /root\nfor d in dev proc sys; do $b mount --move /$d /root/$d; done\nexec $b switch_root /root /lib/systemd/systemd\n' >initrd/init
        chmod 755 initrd/init; cd initrd; find . | cpio -o -H newc --quiet | gzip -1 >../initrd.img"#;
    let done = Command::new("bash")
        .args(["-euc", script, "initrd"])
        .arg(payload.guests.join("bookworm"))
        .current_dir(place)
        .output()
        .map_err(|error| error.to_string())?;
    ensure!(done.status.success(), "initrd: {}", text(&done.stderr));
    Ok(place.join("initrd.img"))
}

/// What tells cloud-init of an official image to mount our disks, bring containerd and run the story.
fn seed(place: &Path) -> Outcome {
    let user_data = "#cloud-config\nruncmd:\n- mkdir -p /vm /var/lib/soci-snapshotter-grpc\n- mount LABEL=vm /vm\n- mount LABEL=data /var/lib/soci-snapshotter-grpc\n\
                     - HOME=/root /vm/vm-tests guest\n";
    fs::write(place.join("user-data"), user_data).map_err(|error| error.to_string())?;
    fs::write(place.join("meta-data"), "instance-id: vm\nlocal-hostname: vm\n").map_err(|error| error.to_string())?;
    shell(&format!(
        "cd {}; truncate -s 1M seed.img; mkfs.vfat -n cidata seed.img >/dev/null; mcopy -i seed.img user-data meta-data ::",
        place.display()
    ))
    .map(drop)
}

/// A directory for one run; nothing of it is left when it is dropped.
pub struct Place {
    pub path: PathBuf,
    name: String,
}

impl Place {
    pub fn new() -> Outcome<Place> {
        let name = format!("soci-vm-{}", std::process::id());
        let path = PathBuf::from("/var/tmp").join(&name);
        fs::create_dir_all(&path).map_err(|error| error.to_string())?;
        let _ = cache();
        Ok(Place { path, name })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Whoever is left in the guest's cgroups holds its mounts.
        let _ = shell(&format!(
            "for h in /sys/fs/cgroup/*/{name}; do [ -d $h ] || continue; \
               find $h -name cgroup.procs -exec cat {{}} + 2>/dev/null | xargs -r kill -9 2>/dev/null || :; sleep 0.2; \
               find $h -depth -type d -exec rmdir {{}} + 2>/dev/null || :; done; \
             for n in 1 2 3; do awk '$2 ~ \"^{path}/\" {{print $2}}' /proc/mounts | sort -r | xargs -r umount -l 2>/dev/null || :; done; rm -rf {path}",
            name = self.name,
            path = self.path.display()
        ));
    }
}
