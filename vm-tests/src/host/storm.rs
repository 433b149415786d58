//! The storm under the shipped units: containers work while systemd restarts what is killed. In a container with systemd 252 (`nspawn`), and on an
//! emulated machine with kernel 6.1 (`qemu`), which cannot repeat requests.
//!
//! The units and programs of the working tree are put in place by hand; programs are those of `BUILT`, or else cargo's development build. Where the
//! packages of `make vm-test` were made before, the container has them below, and some of its upgrades are dnf's.

use super::{
    backend::{Place, boot_container, boot_debian, verdict},
    prepare::{self, Payload, cache, target},
    source,
};
use crate::{
    Outcome,
    guest::tools::{run, shell},
};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

/// A thousand kills take ten minutes on a machine that has nothing else to do.
const LIMIT: Duration = Duration::from_secs(60 * 60);
const KILLS: [(&str, usize); 2] = [("nspawn", 1000), ("qemu", 20)];

/// `storm [nspawn | qemu] [KILLS]`
pub fn main(words: &[&str]) -> ExitCode {
    let known = |kind: &str| KILLS.iter().find(|(name, _)| *name == kind).copied();
    let wanted = match words {
        [] => KILLS.to_vec(),
        [kind] => known(kind).into_iter().collect(),
        [kind, kills] => {
            known(kind).zip(kills.parse().ok()).map(|((kind, _), kills)| (kind, kills)).into_iter().collect()
        }
        _ => Vec::new(),
    };
    if wanted.is_empty() {
        eprintln!("usage: vm-tests storm [nspawn | qemu] [KILLS]");
        return ExitCode::from(2);
    }
    let mut good = true;
    for (kind, kills) in wanted {
        match one(kind, kills) {
            Ok(results) => {
                results.lines().for_each(|line| println!("{kind}: {line}"));
                good &= results.lines().any(|line| line == "end passed");
            }
            Err(error) => {
                eprintln!("{kind}: {error}");
                good = false;
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(kind: &'static str, kills: usize) -> Outcome<String> {
    let payload = Payload { work: target().join("vm"), guests: cache().join("guests") };
    fs::create_dir_all(&payload.work).map_err(|error| error.to_string())?;
    prepare::tools()?;
    prepare::root_filesystems(&payload, &["bookworm"])?;
    let built = built()?;
    image(&payload, &built)?;
    let place = Place::new()?;
    put(&payload.work.join("storm/registry"), &built, &place.path.join("vm"), &format!("storm {kills}"))?;
    if kind == "nspawn" {
        prepare::packages_at_hand(&payload, &place.path.join("vm"), prepare::Distribution::AmazonLinux2023)?;
    }
    let ended = match kind {
        "qemu" => boot_debian(&payload, &place),
        _ => boot_container(&place, &payload.guests.join("bookworm"), LIMIT),
    };
    verdict(kind, &place, ended)
}

pub fn built() -> Outcome<PathBuf> {
    if let Some(built) = env::var_os("BUILT") {
        return Ok(built.into());
    }
    shell(&format!("cd {} && cargo build --quiet --bins", source().display()))?;
    Ok(target().join("debug"))
}

/// The image that `tests/storm/storm.py` reads, in a registry's storage: this machine's Python and some data.
fn image(payload: &Payload, built: &Path) -> Outcome {
    let at = payload.work.join("storm");
    let script = format!(
        r#"rm -rf {at}; mkdir -p {at}/registry {at}/python/usr/bin {at}/data/data; cd {at}
        program=$(readlink -f /usr/bin/python3); library=$(/usr/bin/python3 -c 'import os; print(os.path.dirname(os.__file__))')
        for file in $program $(ldd $program | grep -o '/[^ ]*'); do mkdir -p python$(dirname $file); cp -L $file python$file; done
        [ $program = /usr/bin/python3 ] || ln -s $program python/usr/bin/python3
        mkdir -p python$library python/tmp python/proc python/sys python/dev python/etc python/run
        (cd $library; find . \( -name test -o -name tests -o -name __pycache__ -o -name idlelib -o -name tkinter -o -name ensurepip -o -name lib2to3 \
            -o -name dist-packages -o -name 'config-*' \) -prune -o -type f \( -name '*.py' -o -name '*.so' \) -print | cpio -pdm --quiet {at}/python$library)
        cp {source}/tests/storm/storm.py python/usr/bin/storm; chmod 755 python/usr/bin/storm
        for n in $(seq 12); do head -c 1048576 /dev/urandom >data/data/$n; done
        /usr/bin/python3 -c 'import hashlib, sys
for name in sys.argv[1:]:
    content = open("data/data/" + name, "rb").read()
    for offset in range(0, len(content), 65536):
        print("/data/" + name, offset, hashlib.sha256(content[offset:offset + 65536]).hexdigest())' $(seq 12) >sums; mv sums data/data/
        umoci init --layout storm.oci; umoci new --image storm.oci:latest
        for tree in python data; do tar -C $tree --owner=0 --group=0 --sort=name -cf $tree.tar .; umoci raw add-layer --image storm.oci:latest $tree.tar; done
        umoci config --image storm.oci:latest --architecture amd64 --os linux --config.cmd /usr/bin/storm --config.env PATH=/usr/bin
        {built}/soci convert --standalone storm.oci storm.soci --format oci-dir --min-layer-size 0 --span-size 262144
        printf "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {at}/registry}}}}\nhttp: {{addr: '127.0.0.1:5998'}}\n" >config.yml
        docker-registry serve config.yml & registry=$!; trap 'kill $registry' EXIT
        for n in $(seq 50); do bash -c ': </dev/tcp/127.0.0.1/5998' 2>/dev/null && break; sleep 0.1; done
        skopeo copy -q --all --dest-tls-verify=false oci:storm.soci docker://127.0.0.1:5998/storm:1
        rm -rf python data *.tar *.oci *.soci"#,
        at = at.display(),
        source = source().display(),
        built = built.display()
    );
    let made_from =
        format!("{script}{}", fs::read_to_string(source().join("tests/storm/storm.py")).unwrap_or_default());
    let done = at.join("done");
    if fs::read_to_string(&done).is_ok_and(|how| how == made_from) {
        return Ok(());
    }
    run("bash", &["-euc", &script])?;
    fs::write(done, made_from).map_err(|error| error.to_string())
}

/// What the guest sees as `/vm`: this program, the product twice (the second is another version by name), its units, containerd, the registry.
/// Its job is in `steps`.
pub fn put(registry: &Path, built: &Path, vm: &Path, steps: &str) -> Outcome {
    let own = env::current_exe().map_err(|error| error.to_string())?;
    let script = format!(
        r#"mkdir -p {vm}/bin {vm}/v1 {vm}/v2 {vm}/units; cp {own} {vm}/vm-tests; cp -r {registry} {vm}/; cp {source}/systemd/al2023/* {vm}/units/
        cp {cache}/bin/c2/containerd {cache}/bin/c2/ctr {cache}/bin/c2/containerd-shim-runc-v2 {vm}/bin/
        cp {source}/etc/soci-snapshotter-grpc/config.toml {vm}/; echo {steps} >{vm}/steps
        product=$(sed -n 's/^version = "\(.*\)"/\1/p' {source}/Cargo.toml | head -n 1); other=9${{product#?}}
        for program in soci-snapshotter-grpc soci-mount soci-custodian; do strip --strip-debug -o {vm}/v1/$program {built}/$program
            LC_ALL=C sed "s/$(echo $product | sed 's/\./\\./g')/$other/g" {vm}/v1/$program >{vm}/v2/$program; chmod 755 {vm}/v2/$program; done
        {vm}/v2/soci-snapshotter-grpc --version | grep -q " $other ""#,
        vm = vm.display(),
        own = own.display(),
        registry = registry.display(),
        cache = cache().display(),
        source = source().display(),
        built = built.display()
    );
    run("bash", &["-euc", &script]).map(drop)
}
