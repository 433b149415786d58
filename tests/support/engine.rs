//! What is compared: ways of getting from an image in a registry to a running container.

use super::containerd::{self, Containerd, Version};
use super::daemon::{Daemon, Layers, Settings};
use super::docker::Docker;
use super::grpc::{Client, cri};
use super::process::Usage;
use super::slot::Root;
use std::process::Command;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// containerd 1.6, overlayfs, pulled through CRI (its `ctr` unpacks only after everything was fetched, as no product does).
    Ctd16,
    /// containerd 2.2, overlayfs, pulled through the transfer service, default settings.
    Ctd2,
    /// The same with four layers unpacked at a time.
    Ctd2Par,
    /// Docker, overlay2.
    Docker,
    /// Ours under containerd 2.2, transfer service.
    Ours,
    /// Ours under containerd 1.6, CRI.
    Ours16,
    /// Ours under containerd 2.2 with images that have no index, and `parallel_pull_as_fallback` the only setting.
    Fallback,
}

impl Kind {
    pub const ALL: [(&str, Kind); 7] = [
        ("ctd16", Kind::Ctd16),
        ("ctd2", Kind::Ctd2),
        ("ctd2par", Kind::Ctd2Par),
        ("docker", Kind::Docker),
        ("ours", Kind::Ours),
        ("ours16", Kind::Ours16),
        ("fallback", Kind::Fallback),
    ];

    pub fn parse(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|(n, _)| *n == name).map(|(_, k)| k)
    }

    pub fn name(self) -> &'static str {
        Kind::ALL.into_iter().find(|(_, k)| *k == self).map(|(n, _)| n).expect("ALL has them all")
    }

    /// Whether it pulls images with an index.
    pub fn is_lazy(self) -> bool {
        matches!(self, Kind::Ours | Kind::Ours16)
    }

    /// Whether our daemon is part of it.
    pub fn is_ours(self) -> bool {
        self.is_lazy() || self == Kind::Fallback
    }

    fn version(self) -> Version {
        match self {
            Kind::Ctd16 | Kind::Ours16 => Version::V16,
            Kind::Ctd2 | Kind::Ctd2Par | Kind::Ours | Kind::Fallback | Kind::Docker => Version::V22,
        }
    }
}

/// One of them, running. The order of fields is the order of their end: containerd before the snapshotter it uses.
pub struct Engine {
    pub kind: Kind,
    runtime: Runtime,
    pub daemon: Option<Daemon>,
}

enum Runtime {
    Docker(Docker),
    Containerd { containerd: Containerd, cri: Option<Client> },
}

impl Engine {
    /// Starts `kind` in `root`, to pull from the registry at `host`; `settings` are for our daemon.
    pub fn start(kind: Kind, root: &Root, host: &str, settings: &Settings) -> Engine {
        if kind == Kind::Docker {
            return Engine { kind, runtime: Runtime::Docker(Docker::start(root, host)), daemon: None };
        }
        let daemon = kind.is_ours().then(|| {
            let mut settings = settings.clone();
            if kind == Kind::Fallback {
                settings.more += "\n[pull_modes.parallel_pull_unpack]\nparallel_pull_as_fallback = true\n";
            }
            settings.plain_http.push(host.to_string());
            settings.containerd = Some(root.join("ctd/sock"));
            Daemon::start(root, &settings)
        });
        let by_cri = kind.version() == Version::V16;
        let options = containerd::Options {
            soci: daemon.as_ref().map(|d| d.socket.clone()),
            pause: by_cri.then(|| "none.invalid/pause:0".to_string()), // no pod is run
            plain_http: vec![host.to_string()],
            parallel_unpacks: (kind == Kind::Ctd2Par).then_some(4),
            ..Default::default()
        };
        let containerd = Containerd::start(root, kind.version(), &options);
        let cri = by_cri.then(|| containerd.cri());
        Engine { kind, runtime: Runtime::Containerd { containerd, cri }, daemon }
    }

    pub fn snapshotter(&self) -> &'static str {
        if self.kind.is_ours() { "soci" } else { "overlayfs" }
    }

    /// The containerd namespace its images and containers are in.
    pub fn namespace(&self) -> &'static str {
        if matches!(self.runtime, Runtime::Containerd { cri: Some(_), .. }) { "k8s.io" } else { "default" }
    }

    pub fn pull(&self, reference: &str) -> Result<(), String> {
        match &self.runtime {
            Runtime::Docker(docker) => docker.pull(reference),
            Runtime::Containerd { cri: Some(client), .. } => {
                cri::pull(client, reference).map(drop).map_err(|e| e.to_string())
            }
            Runtime::Containerd { containerd, cri: None } => containerd.pull(self.snapshotter(), reference),
        }
    }

    /// The command that runs a container of a pulled image in the foreground.
    pub fn run_command(&self, reference: &str, name: &str, arguments: &[String]) -> Command {
        match &self.runtime {
            Runtime::Docker(docker) => docker.run_command(reference, name, arguments),
            Runtime::Containerd { containerd, .. } => {
                let mut command = containerd.run_command(self.snapshotter(), reference, name, arguments);
                command.env("CONTAINERD_NAMESPACE", self.namespace());
                command
            }
        }
    }

    pub fn kill(&self, name: &str) {
        match &self.runtime {
            Runtime::Docker(docker) => docker.kill(name),
            Runtime::Containerd { containerd, .. } => containerd.kill(name),
        }
    }

    /// The containerd below, unless it is Docker's.
    pub fn containerd(&self) -> Option<&Containerd> {
        match &self.runtime {
            Runtime::Docker(_) => None,
            Runtime::Containerd { containerd, .. } => Some(containerd),
        }
    }

    /// What its long-running processes have used.
    pub fn usage(&self) -> Vec<(String, Usage)> {
        let runtime = match &self.runtime {
            Runtime::Docker(docker) => ("dockerd", docker.process.pid()),
            Runtime::Containerd { containerd, .. } => ("containerd", containerd.process.pid()),
        };
        let ours = self.daemon.iter().flat_map(Daemon::pids);
        std::iter::once((runtime.0.to_string(), runtime.1))
            .chain(ours)
            .map(|(name, pid)| (name, Usage::of(pid)))
            .collect()
    }

    /// Its long-running processes.
    pub fn pids(&self) -> Vec<u32> {
        let runtime = match &self.runtime {
            Runtime::Docker(docker) => docker.process.pid(),
            Runtime::Containerd { containerd, .. } => containerd.process.pid(),
        };
        // dockerd has a containerd of its own.
        let children = super::process::descendants(runtime);
        let ours = self.daemon.iter().flat_map(Daemon::pids).map(|(_, pid)| pid);
        std::iter::once(runtime).chain(children).chain(ours).collect()
    }

    /// How many layers were lazy, of an engine that can.
    pub fn layers(&self) -> Option<Layers> {
        self.daemon.as_ref().map(Daemon::layers)
    }
}
