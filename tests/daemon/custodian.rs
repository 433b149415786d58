//! A custodian that says nothing, has died, or was never there: containers read, and what needs it waits for the next one or fails with the reason.

use super::lazy::*;
use super::*;
use crate::privilege::lab::{as_a_unit, kill, processes};
use crate::support::grpc::{Client, snapshots};
use crate::support::proxy::Proxy;
use crate::support::registry::Registry;
use soci::layout::SnapshotId;
use soci::sys::seqpacket;
use soci::telemetry::catalog::Message;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

/// Less than a daemon would wait for a custodian's first word (60 s), and enough for a machine that is busy with other things.
const SOON: Duration = Duration::from_secs(25);
/// For what happens by itself some seconds after something else.
const LATER: Duration = Duration::from_secs(120);

/// A daemon with a lazy layer, and the snapshot of a container (number 2) above it.
struct Lab {
    running: Option<Running>,
    /// Reads come from the daemon, whatever the kernel has kept.
    data: File,
    reads: usize,
    _registry: Registry,
    _proxy: Proxy,
    config: String,
    site: Site,
}

impl Lab {
    fn new(slot: &Slot) -> Lab {
        let site = Site::new(slot);
        let (registry, proxy, config) = registry_and_proxy(&site);
        let image = image(&site, 1, &proxy.reference("app", "v1"), &[]);
        registry.push(&image.layout, "app", "v1");
        let running = site.start(&config);
        let client = Client::connect(&site.socket());
        image.prepare_all(&client);
        snapshots::prepare(&client, "container", &chain(0), HashMap::new()).unwrap();
        let path = site.layout().snapshot_fs(SnapshotId(1)).join("data/0");
        assert!(std::fs::read(&path).unwrap() == content(0));
        let data = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&path).unwrap();
        Lab { running: Some(running), data, reads: 0, _registry: registry, _proxy: proxy, config, site }
    }

    fn layout(&self) -> Layout {
        self.site.layout()
    }

    fn client(&self) -> Client {
        Client::connect(&self.site.socket())
    }

    fn log(&self) -> String {
        self.running.as_ref().unwrap().log()
    }

    fn kill(&mut self) {
        self.running.take().unwrap().process.kill_9();
        eventually("its custodian ends with it", || processes(&self.layout()).is_empty());
    }

    fn run(&mut self, command: &mut Command) {
        let running = self.site.run(command);
        self.running = Some(running);
    }

    /// Reads what was not read before, without waiting for anybody.
    fn reads(&mut self) {
        let at = self.reads * super::restart::BLOCK;
        self.reads += 1;
        let begun = Instant::now();
        assert!(super::restart::block(&self.data, at) == content(0)[at..at + super::restart::BLOCK]);
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    }

    fn started(&self) {
        let begun = Instant::now();
        self.running.as_ref().unwrap().wait_for(STARTED);
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    }

    /// A container can be started, and ended.
    fn runs(&self, key: &str) {
        let client = self.client();
        snapshots::prepare(&client, key, &chain(0), HashMap::new()).unwrap();
        snapshots::remove(&client, key).unwrap();
    }

    /// Asking how large the container is fails, and says why.
    fn refuses(&self, why: &str) {
        let status = snapshots::usage(&self.client(), "container").unwrap_err();
        assert!(status.message().contains(why), "{status}");
    }

    fn says(&self, message: Message) {
        later(&format!("{message:?}"), || self.log().contains(message.id()));
    }

    /// There is a custodian: it measures, and removes what was to be removed meanwhile.
    fn works(&self) {
        later("it measures", || match snapshots::usage(&self.client(), "container") {
            Ok(usage) => usage.inodes > 0,
            Err(status) => {
                assert!(status.message().contains("custodian"), "{status}");
                false
            }
        });
        let all = || names(&self.layout().snapshots());
        later("what was removed is gone", || all() == ["1", "2"]);
    }
}

fn later(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LATER, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn privileged_with_a_custodian_that_says_nothing_reads_are_answered_and_removals_done_by_the_next_one() {
    let slot = Slot::take();
    let mut lab = Lab::new(&slot);
    lab.kill();
    // Systemd has the socket, and what it started is stuck.
    let silent = seqpacket::listen(&lab.layout().custodian_socket(), 0o600).unwrap();
    lab.run(&mut lab.site.command(&lab.config));
    lab.reads();
    let connection = seqpacket::accept(silent.as_fd()).unwrap();
    lab.started();
    lab.runs("another");
    let log = lab.log();
    assert!(log.find("reads are answered") < log.find(STARTED), "{log}");
    lab.says(Message::CustodianGone);
    lab.reads();
    let _unit = as_a_unit(&lab.layout(), &[]);
    drop((connection, silent));
    lab.works();
    lab.says(Message::CustodianBack);
    lab.reads();
}

#[test]
fn privileged_a_custodian_that_dies_or_stops_answering_disturbs_no_read_and_is_found_again_when_it_is_back() {
    let slot = Slot::take();
    let mut lab = Lab::new(&slot);
    let (child, _) = processes(&lab.layout()).into_iter().find(|(_, name)| name == "soci-custodian").unwrap();
    kill(child);
    lab.reads();
    lab.refuses("restart the daemon");
    lab.runs("another");
    lab.reads();
    let unit = as_a_unit(&lab.layout(), &[]);
    lab.works();
    // Something holds it up, a disk perhaps.
    let pid = nix::unistd::Pid::from_raw(unit.pid() as i32);
    nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
    lab.refuses("it has stopped answering");
    lab.reads();
    lab.runs("a third");
    nix::sys::signal::kill(pid, Signal::SIGCONT).unwrap();
    lab.works();
    lab.reads();
}

#[test]
fn privileged_a_daemon_without_any_custodian_serves_what_is_mounted_and_begins_no_new_node() {
    let slot = Slot::take();
    let mut lab = Lab::new(&slot);
    // An installation that has lost a part.
    let bin = lab.site.root.dir("bin");
    let daemon = bin.join("soci-snapshotter-grpc");
    std::fs::copy(DAEMON, &daemon).unwrap();
    std::os::unix::fs::symlink(crate::privilege::HOLDER, bin.join("soci-mount")).unwrap();
    let incomplete = |site: &Site, root: &std::path::Path, config: &str| {
        let whole = site.command(config);
        let mut command = Command::new(&daemon);
        command.arg("--root").arg(root).args(whole.get_args().skip(2));
        command
    };
    lab.kill();
    lab.run(&mut incomplete(&lab.site, &lab.site.state(), &lab.config));
    lab.reads();
    lab.started();
    lab.refuses("soci-custodian is not installed");
    lab.runs("another");
    lab.says(Message::CustodianGone);
    let _unit = as_a_unit(&lab.layout(), &[]);
    lab.works();
    lab.reads();
    lab.running.take().unwrap().stop(Signal::SIGTERM);
    let log = lab.site.refused(&mut incomplete(&lab.site, &lab.site.root.join("state-of-another"), &lab.config), SOON);
    assert!(log.contains("soci-custodian is not installed"), "{log}");
}
