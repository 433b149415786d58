//! Docker: dockerd with its own roots and the overlay2 driver, for comparison.

use super::command::{attempt, output, text, try_run};
use super::process::{Process, kill_all, pids_naming};
use super::slot::Root;
use super::undo::Undo;
use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Docker {
    socket: PathBuf,
    pub process: Process,
    _undo: Undo,
}

impl Docker {
    /// Pulls from `insecure` (a `host:port`) over plain HTTP.
    pub fn start(root: &Root, insecure: &str) -> Docker {
        let dir = root.dir("docker");
        let socket = dir.join("sock");
        let config = serde_json::json!({
            "insecure-registries": [insecure], "data-root": dir.join("data"), "exec-root": dir.join("exec"),
            "bridge": "none", "iptables": false, "storage-driver": "overlay2",
        });
        std::fs::write(dir.join("daemon.json"), config.to_string()).unwrap();
        // Its containerd and shims are in process groups of their own.
        let undo = Undo::with({
            let dir = dir.clone();
            move || kill_all(&pids_naming(&format!("{}/", dir.display())))
        });
        let mut command = Command::new("dockerd");
        command
            .arg("--config-file")
            .arg(dir.join("daemon.json"))
            .arg("-H")
            .arg(format!("unix://{}", socket.display()))
            .arg("-p")
            .arg(dir.join("pid"));
        let process = Process::start("dockerd", &mut command, &root.join("dockerd.log"));
        let docker = Docker { socket, process, _undo: undo };
        docker.process.wait_until("it answers", || attempt(docker.client().arg("version")).status.success());
        docker
    }

    pub fn client(&self) -> Command {
        let mut command = Command::new("docker");
        command.arg("-H").arg(format!("unix://{}", self.socket.display()));
        command
    }

    pub fn pull(&self, reference: &str) -> Result<(), String> {
        let done = attempt(self.client().args(["pull", "-q", reference]));
        if done.status.success() { Ok(()) } else { Err(text(&done.stderr)) }
    }

    pub fn run_command(&self, reference: &str, name: &str, arguments: &[String]) -> Command {
        let mut command = self.client();
        command.args(["run", "--rm", "--net", "host", "--name", name, reference]).args(arguments);
        command
    }

    pub fn kill(&self, name: &str) {
        try_run(self.client().args(["rm", "-f", name]));
    }

    pub fn data(&self) -> &Path {
        self.socket.parent().unwrap()
    }

    pub fn version(&self) -> String {
        output(self.client().args(["version", "--format", "{{.Server.Version}}"])).trim().to_string()
    }
}
