//! The tool over a real containerd and real registries.

use super::{Ran, command};
use crate::support::{
    command::{attempt, output, text},
    containerd::{Containerd, Options, Version},
    registry::{Kind, Registry},
    slot::{Root, Slot},
};
use std::{
    ffi::OsStr,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// A containerd, and a root of its own for the tool. In the order in which they must go.
pub struct Lab {
    pub containerd: Containerd,
    pub state: PathBuf,
    pub root: Root,
    pub slot: Slot,
}

impl Lab {
    pub fn new(version: Version) -> Lab {
        let slot = Slot::take();
        let root = slot.root();
        let containerd = Containerd::start(&root, version, &Options::default());
        let state = root.join("soci");
        Lab { containerd, state, root, slot }
    }

    /// The tool, told where containerd and its own root are.
    pub fn command(&self) -> Command {
        let mut soci = command();
        soci.env("CONTAINERD_ADDRESS", &self.containerd.address).arg("--root").arg(&self.state);
        soci
    }

    pub fn soci<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        ran(self.command().args(args))
    }

    /// Imports the layout at `path` under exactly this name.
    pub fn import(&self, path: &Path, name: &str) {
        let tar = self.root.join("import.tar");
        output(Command::new("tar").arg("-C").arg(path).arg("-cf").arg(&tar).arg("."));
        let mut ctr = self.containerd.ctr();
        output(ctr.args(["images", "import", "--all-platforms", "--no-unpack", "--index-name", name]).arg(&tar));
    }

    /// Gets an image with all its platforms from a registry, without unpacking it.
    pub fn fetch(&self, reference: &str) {
        output(self.containerd.ctr().args(["content", "fetch", "--plain-http", "--all-platforms", reference]));
    }

    /// Has containerd collect what nothing refers to, and waits for it.
    pub fn collect(&self) {
        output(self.containerd.ctr().args(["leases", "create", "--id", "collect"]));
        output(self.containerd.ctr().args(["leases", "delete", "--sync", "collect"]));
    }

    pub fn has(&self, digest: &str) -> bool {
        self.containerd.content().iter().any(|have| have == digest)
    }

    /// Leases, the header left out.
    pub fn leases(&self) -> Vec<String> {
        let all = output(self.containerd.ctr().args(["leases", "ls"]));
        all.lines().skip(1).map(String::from).collect()
    }

    pub fn registry(&self, kind: Kind) -> (Root, Registry) {
        let root = self.slot.root();
        let registry = Registry::start(kind, &root);
        (root, registry)
    }

    /// What a check of the database by its own makers says, and its keys.
    pub fn bbolt(&self) -> Vec<String> {
        let bbolt = crate::support::tool("bbolt");
        let database = self.state.join("artifacts.db");
        assert_eq!(output(Command::new(&bbolt).arg("check").arg(&database)), "OK\n");
        let keys = output(Command::new(&bbolt).arg("keys").arg(&database).arg("soci_artifacts"));
        keys.lines().map(String::from).collect()
    }
}

pub fn ran(command: &mut Command) -> Ran {
    let done = attempt(command);
    let code = done.status.code().unwrap_or_else(|| -done.status.signal().unwrap());
    Ran { code, stdout: done.stdout, stderr: text(&done.stderr) }
}

/// Waits until `holds`.
#[track_caller]
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < until, "in thirty seconds it did not come to pass that {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The golden layouts, unpacked.
pub fn golden() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden-convert.tar.gz");
    super::tar(&["-C", dir.path().to_str().unwrap(), "-xzf", data]);
    dir
}

/// The input of a golden case.
pub fn case(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    dir.path().join("convert").join(name).join("in")
}
