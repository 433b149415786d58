//! Everything the guests need, made once and kept until what it is made from changes: packages in two releases, repositories, a package that
//! stands for the distribution, images in a registry's storage, root filesystems, and this program for an old glibc.

use super::source;
use crate::{
    Outcome, ensure,
    guest::tools::{run, shell},
};
use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// What is shown to a guest as `/vm`, one per distribution, and where root filesystems are.
pub struct Payload {
    pub work: PathBuf,
    pub guests: PathBuf,
}

/// A distribution that a package is made for, and what its libraries and systemd offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    AmazonLinux2,
    AmazonLinux2023,
}

impl Distribution {
    pub fn tag(self) -> &'static str {
        match self {
            Distribution::AmazonLinux2 => "amzn2",
            Distribution::AmazonLinux2023 => "amzn2023",
        }
    }

    /// Newest minor version of glibc 2, and systemd's.
    fn limits(self) -> (u32, u32) {
        match self {
            Distribution::AmazonLinux2 => (26, 219),
            Distribution::AmazonLinux2023 => (34, 252),
        }
    }
}

pub fn cache() -> PathBuf {
    match env::var_os("SOCI_LAB_CACHE") {
        Some(dir) => dir.into(),
        None => PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/soci-lab"),
    }
}

pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| source().join("target"), PathBuf::from)
}

/// Makes what is missing for guests of these suites of Debian.
pub fn payload(suites: &[&str]) -> Outcome<Payload> {
    let (work, guests) = (target().join("vm"), cache().join("guests"));
    fs::create_dir_all(&work).map_err(|error| error.to_string())?;
    tools()?;
    packages()?;
    let payload = Payload { work, guests };
    for distribution in [Distribution::AmazonLinux2, Distribution::AmazonLinux2023] {
        repositories(&payload, distribution)?;
    }
    program(&payload)?;
    let soci = match env::var_os("BUILT") {
        Some(built) => PathBuf::from(built).join("soci"),
        None => target().join("package/x86_64-unknown-linux-gnu/release/soci"),
    };
    images(&payload, &soci)?;
    root_filesystems(&payload, suites)?;
    Ok(payload)
}

pub fn tools() -> Outcome {
    shell("for name in systemd-nspawn umoci skopeo mke2fs mmdebstrap qemu-system-x86_64 htpasswd createrepo_c cpio; do \
           command -v $name >/dev/null || missing=yes; done; [ -z \"${missing:-}\" ] || { apt-get -q update || :; \
           DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends systemd-container umoci skopeo e2fsprogs mmdebstrap \
           qemu-system-x86 seabios apache2-utils createrepo-c cpio </dev/null; }")
    .map(drop)
}

/// Whether the packages of that release were made.
fn built(release: &str) -> bool {
    let at = target().join("rpm/RPMS/x86_64");
    ["amzn2", "amzn2023"].iter().all(|dist| {
        fs::read_dir(&at).is_ok_and(|mut found| {
            found.any(|entry| {
                entry.is_ok_and(|entry| {
                    entry.file_name().to_string_lossy().ends_with(&format!("-{release}.{dist}.x86_64.rpm"))
                })
            })
        })
    })
}

/// For a guest that can do without packages: those that were made for another one, as `repo` and `repo-new` in `vm`.
pub fn packages_at_hand(payload: &Payload, vm: &Path, distribution: Distribution) -> Outcome {
    if !built("1") || !built("2") {
        return Ok(());
    }
    repositories(payload, distribution)?;
    let at = payload.work.join(distribution.tag());
    shell(&format!("cp -r {0}/repo {0}/repo-new {1}/", at.display(), vm.display())).map(drop)
}

/// Two releases, so that one can be an upgrade of the other. `SOCI_VM_PACKAGES=keep` takes those that are there.
fn packages() -> Outcome {
    let keep = env::var("SOCI_VM_PACKAGES").is_ok_and(|value| value == "keep");
    for release in ["1", "2"] {
        if keep && built(release) {
            continue;
        }
        println!("packages, release {release}");
        let build = source().join("packaging/build.sh");
        // The tar, for those without rpm, is made from the first.
        let more = if release == "1" { "dist" } else { "" };
        shell(&format!("RELEASE={release} ARCHES=x86_64 {} rpm {more} >&2", build.display()))?;
    }
    Ok(())
}

/// `repo` has release 1 and the stand-in for the distribution, `repo-new` release 2.
fn repositories(payload: &Payload, distribution: Distribution) -> Outcome {
    let at = payload.work.join(distribution.tag());
    let rpms = target().join("rpm/RPMS/x86_64");
    let stub = stand_in(payload, distribution)?;
    let tag = distribution.tag();
    shell(&format!(
        "rm -rf {0}/repo {0}/repo-new; mkdir -p {0}/repo {0}/repo-new; cp {stub} {1}/soci-snapshotter-*-1.{tag}.x86_64.rpm {0}/repo/; \
         cp {1}/soci-snapshotter-*-2.{tag}.x86_64.rpm {0}/repo-new/; createrepo_c -q {0}/repo; createrepo_c -q {0}/repo-new",
        at.display(),
        rpms.display(),
        stub = stub.display()
    ))
    .map(drop)
}

/// A package that provides what the distribution does, and nothing newer: if ours needs more, dnf refuses it.
fn stand_in(payload: &Payload, distribution: Distribution) -> Outcome<PathBuf> {
    let (glibc, systemd) = distribution.limits();
    let mut provides = vec![format!("systemd = {systemd}")];
    provides.extend(
        ["ca-certificates", "container-selinux", "policycoreutils", "/bin/sh", "rtld(GNU_HASH)"].map(str::to_owned),
    );
    let old = ["2.2.5", "2.2.6", "2.3", "2.3.2", "2.3.3", "2.3.4"].map(str::to_owned);
    let versions: Vec<String> = old.into_iter().chain((4..=glibc).map(|minor| format!("2.{minor}"))).collect();
    for library in ["libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"] {
        provides.push(format!("{library}()(64bit)"));
        provides.extend(versions.iter().map(|version| format!("{library}(GLIBC_{version})(64bit)")));
    }
    provides.push("libgcc_s.so.1()(64bit)".into());
    provides.extend(
        ["3.0", "3.3", "3.3.1", "3.4", "4.2.0", "4.3.0"].map(|version| format!("libgcc_s.so.1(GCC_{version})(64bit)")),
    );
    let at = payload.work.join(distribution.tag());
    fs::create_dir_all(&at).map_err(|error| error.to_string())?;
    let lines: String = provides.iter().map(|what| format!("Provides: {what}\n")).collect();
    let spec = format!(
        "Name: os-stub\nVersion: 1\nRelease: 1\nSummary: Stands for the distribution\nLicense: Apache-2.0\nBuildArch: x86_64\nAutoReqProv: no\n\
         {lines}%description\nWhat {} offers.\n%files\n",
        distribution.tag()
    );
    let path = at.join("os-stub.spec");
    fs::write(&path, spec).map_err(|error| error.to_string())?;
    run(
        "rpmbuild",
        &[
            "-bb",
            "--quiet",
            "--target",
            "x86_64",
            "--define",
            &format!("_topdir {}/stub", at.display()),
            &path.display().to_string(),
        ],
    )?;
    Ok(at.join("stub/RPMS/x86_64/os-stub-1-1.x86_64.rpm"))
}

/// This program, for the oldest glibc of any guest.
fn program(payload: &Payload) -> Outcome {
    // Its own, so that nobody waits for a build of the packages.
    let target = payload.work.join("target");
    let zig = cache().join("zig/bin");
    shell(&format!(
        "cd {} && PATH={}:$PATH CARGO_TARGET_DIR={} cargo zigbuild --quiet --locked --package vm-tests --target x86_64-unknown-linux-gnu.2.26",
        source().display(),
        zig.display(),
        target.display()
    ))?;
    let built = target.join("x86_64-unknown-linux-gnu/debug/vm-tests");
    fs::copy(built, payload.work.join("vm-tests")).map(drop).map_err(|error| error.to_string())
}

/// Images with an index and images without one, as a registry keeps them: nothing has to be pushed in a guest.
pub fn images(payload: &Payload, soci: &Path) -> Outcome {
    let at = payload.work.join("images");
    let script = format!(
        r#"rm -rf {at}; mkdir -p {at}/base/bin {at}/registry; cd {at}
        cp /bin/busybox base/bin/; for name in sh cat dd md5sum cut true sleep echo; do ln -s busybox base/bin/$name; done
        echo hello >base/hello; mkdir base/tmp base/proc base/sys base/dev base/etc
        mkdir -p app/data late/data huge/data
        for n in 0 1 2 3; do head -c 6291456 /dev/urandom >app/data/$n; echo "$n:$(md5sum <app/data/$n | cut -c1-32)" >>sums; done
        head -c 16777216 /dev/urandom >late/data/late; head -c 50331648 /dev/urandom >huge/data/huge; md5sum <huge/data/huge | cut -c1-32 >huge-sum
        mkdir -p tight/data; head -c 50331648 /dev/urandom >tight/data/tight
        mkdir -p last/data; head -c 8388608 /dev/urandom >last/data/last
        # No layer in common with the others, or there would be nothing to pull.
        cp -a base plain; echo plain >plain/hello
        cp -a base low; echo low >low/hello; mkdir -p low/data high/data; echo gone >low/data/gone; echo kept >low/data/kept
        cp /bin/busybox low/bin/busybox-suid; chown 7:8 low/bin/busybox-suid; chmod 4755 low/bin/busybox-suid; mknod low/data/zero c 1 5
        : >high/data/.wh.gone; ln low/data/kept low/data/link; head -c 25165824 /dev/urandom >high/data/pulled
        md5sum <high/data/pulled | cut -c1-32 >pulled-sum
        tar -C low --numeric-owner --sort=name -cf low.tar .; tar -C high --owner=0 --group=0 --sort=name -cf high.tar .
        for tree in base app late huge tight last plain; do tar -C $tree --owner=0 --group=0 --sort=name -cf $tree.tar .; done
        make() {{ # make NAME LAYER…
            local name=$1; shift
            umoci init --layout $name.oci; umoci new --image $name.oci:latest
            for layer; do umoci raw add-layer --image $name.oci:latest $layer.tar; done
            umoci config --image $name.oci:latest --architecture amd64 --os linux --config.cmd /bin/sh --config.env PATH=/bin
        }}
        make app base app; make late base late; make huge base huge; make tight base tight; make last base last; make plain plain; make pulled low high
        for name in app late huge tight last; do {soci} convert --standalone $name.oci $name.soci --format oci-dir --min-layer-size 0; done
        printf "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {at}/registry}}}}\nhttp: {{addr: '127.0.0.1:5999'}}\n" >config.yml
        docker-registry serve config.yml & registry=$!; trap 'kill $registry' EXIT
        for n in $(seq 50); do bash -c ': </dev/tcp/127.0.0.1/5999' 2>/dev/null && break; sleep 0.1; done
        for name in app late huge tight last; do skopeo copy -q --all --dest-tls-verify=false oci:$name.soci docker://127.0.0.1:5999/$name:1; done
        for name in plain pulled; do skopeo copy -q --dest-tls-verify=false oci:$name.oci docker://127.0.0.1:5999/$name:1; done
        htpasswd -Bbn somebody hush-hush >htpasswd
        rm -rf base app late huge tight last plain low high *.tar *.oci *.soci"#,
        at = at.display(),
        soci = soci.display()
    );
    // Kept as long as they would be made in the same way.
    let done = at.join("done");
    if fs::read_to_string(&done).is_ok_and(|how| how == script) {
        return Ok(());
    }
    println!("images");
    run("bash", &["-euc", &script])?;
    fs::write(done, script).map_err(|error| error.to_string())
}

const PACKAGES: &str = "systemd,systemd-sysv,dbus,udev,kmod,containerd,runc,docker-registry,dnf,rpm,iproute2,procps,ca-certificates,busybox-static,\
                        e2fsprogs,man-db-";

pub fn root_filesystems(payload: &Payload, suites: &[&str]) -> Outcome {
    for suite in suites {
        let more = if *suite == "bookworm" { ",linux-image-cloud-amd64,initramfs-tools-" } else { "" };
        let at = payload.guests.join(suite);
        if at.join("usr/bin/systemctl").exists() || at.join("bin/systemctl").exists() {
            continue;
        }
        println!("a {suite} guest (once per machine)");
        let packages = format!("{}{more}", PACKAGES.replace(",man-db-", ""));
        shell(&format!(
            "mkdir -p {0}; apt-config dump | grep -E '^Acquire::(http|https|Check|Retries)' >{0}/apt.conf || :; rm -rf {1}.part; \
             mmdebstrap --quiet --variant=minbase --mode=root --format=directory --aptopt={0}/apt.conf --include={packages} {suite} {1}.part && mv {1}.part {1}",
            payload.guests.display(),
            at.display()
        ))?;
    }
    Ok(())
}

/// Fills `vm`, the directory that a guest sees as `/vm`.
pub fn fill(payload: &Payload, vm: &Path, distribution: Distribution, steps: &[String]) -> Outcome {
    let images = payload.work.join("images");
    let bin = cache().join("bin");
    let containerd = match distribution {
        Distribution::AmazonLinux2 => {
            let setup = source().join("tests/lab/setup.sh");
            shell(&format!("SOCI_LAB_STATIC=yes {} >&2", setup.display()))?;
            bin.join("static")
        }
        Distribution::AmazonLinux2023 => bin.join("c2"),
    };
    ensure!(containerd.join("containerd").exists(), "run `make setup` first");
    shell(&format!(
        "mkdir -p {vm}/bin; cp {work}/vm-tests {vm}/; cp -r {work}/{tag}/repo {work}/{tag}/repo-new {dist} {vm}/; \
         cd {images}; cp -r registry sums huge-sum pulled-sum htpasswd {vm}/; \
         cd {containerd}; cp containerd ctr containerd-shim-runc-v2 {vm}/bin/",
        vm = vm.display(),
        work = payload.work.display(),
        tag = distribution.tag(),
        dist = target().join("dist").display(),
        images = images.display(),
        containerd = containerd.display()
    ))?;
    fs::write(vm.join("steps"), steps.join("\n")).map_err(|error| error.to_string())
}

/// Makes a root filesystem run the story: its unit, and dnf's two repositories.
pub fn equip(root: &Path) -> Outcome {
    let write = |path: &str, text: &str| -> Outcome {
        let path = root.join(path);
        let parent = path.parent().map_or(Ok(()), fs::create_dir_all);
        parent.and_then(|()| fs::write(&path, text)).map_err(|error| format!("{}: {error}", path.display()))
    };
    write(
        "etc/systemd/system/vm-test.service",
        "[Unit]\nDescription=The story\nAfter=multi-user.target\nRequiresMountsFor=/vm\n[Service]\nType=simple\n\
         Environment=HOME=/root PATH=/vm/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8\n\
         # In a container the version 1 hierarchies are read-only; runc needs them.\n\
         ExecStartPre=-/bin/sh -c 'for d in /sys/fs/cgroup/*/; do mount -o remount,rw,bind $d; done'\n\
         ExecStart=/vm/vm-tests guest\nKillMode=process\n",
    )?;
    write(
        "etc/systemd/system/vm.target",
        "[Unit]\nRequires=multi-user.target\nWants=vm-test.service\nAfter=multi-user.target\nAllowIsolate=yes\n",
    )?;
    // Its package starts one; the story has its own.
    let _ = std::os::unix::fs::symlink("/dev/null", root.join("etc/systemd/system/docker-registry.service"));
    let link = root.join("etc/systemd/system/default.target");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink("vm.target", &link).map_err(|error| error.to_string())?;
    write("etc/dnf/dnf.conf", "[main]\ngpgcheck=0\ninstall_weak_deps=False\nreposdir=/etc/yum.repos.d\nkeepcache=0\n")?;
    write(
        "etc/yum.repos.d/vm.repo",
        "[vm]\nname=vm\nbaseurl=file:///vm/repo\ngpgcheck=0\n[vm-new]\nname=vm-new\nbaseurl=file:///vm/repo-new\ngpgcheck=0\nenabled=0\n",
    )?;
    write("etc/systemd/journald.conf.d/vm.conf", "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n")?;
    write("etc/hostname", "vm\n")?;
    write("etc/hosts", "127.0.0.1 localhost vm\n")
}
