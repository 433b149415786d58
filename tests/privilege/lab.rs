//! A root directory with a custodian, as every test here starts from.

use super::{CUSTODIAN, Killed, install_helpers};
use crate::support::{leaks, needs_root};
use soci::{
    custodian::{self, Client},
    layout::{Layout, SnapshotId},
    sys::seqpacket,
};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
};

pub struct Lab {
    pub dir: tempfile::TempDir,
    pub layout: Layout,
}

impl Drop for Lab {
    /// Whoever was started here was declared later, and so has ended.
    fn drop(&mut self) {
        leaks::check(self.dir.path());
    }
}

impl Lab {
    /// An empty root whose directories do not exist yet.
    pub fn new() -> Lab {
        needs_root();
        install_helpers();
        let dir = tempfile::tempdir().expect("temp");
        let layout = Layout::new(dir.path().join("root"));
        Lab { dir, layout }
    }

    /// The content directory of a snapshot, made if it does not exist.
    pub fn fs(&self, id: u32) -> PathBuf {
        let path = self.layout.snapshot_fs(SnapshotId(id));
        fs::create_dir_all(&path).expect("mkdir");
        path
    }

    /// Talks to the custodian, a new child if none listens.
    pub fn client(&self) -> Client {
        let client = Client::new(custodian::start(&self.layout));
        block_on(client.greeted()).expect("it answers");
        client
    }

    pub fn gone(&self, id: u32) -> bool {
        !self.layout.snapshot(SnapshotId(id)).exists()
    }

    /// A custodian as systemd starts it: listening on a socket it was given.
    pub fn as_a_unit(&self, arguments: &[&str]) -> (Killed, PathBuf) {
        (as_a_unit(&self.layout, arguments), self.layout.custodian_socket())
    }

    /// The custodian of this root.
    pub fn custodian(&self) -> Option<u32> {
        processes(&self.layout).into_iter().find(|(_, name)| name == "soci-custodian").map(|(pid, _)| pid)
    }

    /// The process that forks workers.
    pub fn spawner(&self) -> Option<u32> {
        processes(&self.layout).into_iter().find(|(_, name)| name == "soci-spawner").map(|(pid, _)| pid)
    }

    /// Processes that are unpacking something.
    pub fn workers(&self) -> Vec<u32> {
        processes(&self.layout).into_iter().filter(|(_, name)| name == "soci-unpack").map(|(pid, _)| pid).collect()
    }
}

/// A custodian as systemd starts it: listening on a socket it was given, which replaces one that is there.
pub fn as_a_unit(layout: &Layout, arguments: &[&str]) -> Killed {
    fs::create_dir_all(layout.snapshots()).expect("mkdir");
    let path = layout.custodian_socket();
    let fresh = path.with_extension("fresh");
    let listener = seqpacket::listen(&fresh, 0o600).expect("listen");
    fs::rename(fresh, path).expect("rename");
    let child = Command::new("sh")
        .args(["-c", r#"exec 3<&0; LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@""#, CUSTODIAN, "--root"])
        .arg(layout.root())
        .args(arguments)
        .stdin(Stdio::from(listener))
        .spawn()
        .expect("spawn");
    Killed(child)
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(future)
}

/// The custodian's processes for this root: pid and name. Zombies have no command line and do not count.
pub fn processes(layout: &Layout) -> Vec<(u32, String)> {
    let of_root = |entry: fs::DirEntry| {
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        let mut words = command.split(|b| *b == 0);
        let is_it = words.next()?.ends_with(b"soci-custodian")
            && words.any(|word| word == layout.root().as_os_str().as_encoded_bytes());
        let name = fs::read_to_string(entry.path().join("comm")).ok()?.trim().to_owned();
        is_it.then(|| Some((entry.file_name().to_str()?.parse().ok()?, name)))?
    };
    fs::read_dir("/proc").expect("proc").flatten().filter_map(of_root).collect()
}

pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().expect("pid")).expect("pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
}
