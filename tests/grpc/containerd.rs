//! The service behind a real containerd, spoken to by `ctr`.

use super::lab::*;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A containerd with its own root whose proxy plugin `soci` is `socket`.
struct Containerd {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Containerd {
    fn start(socket: &Path) -> Containerd {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = '{}'\nstate = '{}'\ndisabled_plugins = ['io.containerd.grpc.v1.cri', \
             'io.containerd.internal.v1.opt']\n[grpc]\naddress = '{}'\n[ttrpc]\naddress = '{}'\n\
             [proxy_plugins.soci]\ntype = 'snapshot'\naddress = '{}'\n",
            path("root"),
            path("state"),
            path("c.sock"),
            path("t.sock"),
            socket.display()
        );
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        let mut command = Command::new("containerd");
        command.arg("--config").arg(path("config.toml")).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("containerd is installed (make setup)");
        Containerd { child, dir }
    }

    /// What `ctr` prints; both streams, and whether it succeeded.
    async fn ctr(&self, args: &str) -> (bool, String) {
        let mut command = tokio::process::Command::new("ctr");
        command.arg("--address").arg(self.dir.path().join("c.sock")).args(args.split_whitespace());
        let output = command.output().await.unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        (output.status.success(), text)
    }
}

#[tokio::test]
async fn privileged_containerd_and_ctr_see_a_healthy_snapshotter() {
    needs_root();
    let lab = lab().await;
    let containerd = Containerd::start(&lab.root.path().join("s.sock"));
    let deadline = Instant::now() + Duration::from_secs(30);
    while !containerd.ctr("version").await.0 {
        assert!(Instant::now() < deadline, "containerd does not start");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (_, plugins) = containerd.ctr("plugins ls").await;
    let row = plugins.lines().find(|line| line.contains("io.containerd.snapshotter.v1") && line.contains("soci"));
    assert!(row.is_some_and(|row| row.contains("ok")), "{plugins}");
    let soci = "snapshots --snapshotter soci";
    for (args, ok, expected) in [
        (format!("{soci} prepare one"), true, ""),
        (format!("{soci} prepare one"), false, "already exists"),
        (format!("{soci} commit base one"), true, ""),
        (format!("{soci} prepare two base"), true, ""),
        (format!("{soci} mounts /mnt two"), true, "mount -t"),
        (format!("{soci} prepare three nobody"), false, "not found"),
        (format!("{soci} rm base"), false, "cannot remove"),
        (format!("{soci} label two key=value"), true, ""),
        (format!("{soci} info two"), true, "\"key\": \"value\""),
        (format!("{soci} usage two"), true, "two"),
        (format!("{soci} ls"), true, "Committed"),
        (format!("{soci} rm two"), true, ""),
        (format!("{soci} rm base"), true, ""),
    ] {
        let (succeeded, text) = containerd.ctr(&args).await;
        assert!(succeeded == ok, "{args}: {text}");
        assert!(text.contains(expected), "{args}: {text}");
    }
    // containerd's garbage collector calls Remove and then Cleanup.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !lab.names(&[]).await.is_empty() || !lab.directories().is_empty() {
        assert!(Instant::now() < deadline, "{:?} {:?}", lab.names(&[]).await, lab.directories());
        // What one collection has missed is for the next one, which comes with the next removal.
        containerd.ctr(&format!("{soci} prepare another")).await;
        containerd.ctr(&format!("{soci} rm another")).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
