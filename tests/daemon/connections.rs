//! The way to a registry: connections that spoil what comes over them or fall silent, and a name that cannot be resolved for a while.

use super::lazy::*;
use super::*;
use crate::support::grpc::Client;
use crate::support::proxy::{Fault, Rule};
use crate::support::registry::{Kind, Registry};
use soci::layout::SnapshotId;

const NOTHING_AHEAD: &str = "[background_fetch]\ndisable = true\n";

#[test]
fn privileged_bytes_that_came_wrong_are_asked_for_again_over_a_new_connection() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = image(&site, 1, &proxy.reference("app", "v1"), &[]);
    registry.push(&image.layout, "app", "v1");
    let _running = site.start(&format!("{NOTHING_AHEAD}{config}"));
    let client = Client::connect(&site.socket());
    image.prepare_all(&client);
    let path = site.layout().snapshot_fs(SnapshotId(1)).join("data/0");
    proxy.take_seen();
    proxy.rule(Rule::blobs(Fault::Corrupt(20_000)).containing(&image.layers[0].to_string()).times(1));
    assert!(std::fs::read(path).unwrap() == content(0));
    assert_eq!(proxy.faults().values().sum::<u64>(), 1, "{:?}", proxy.faults());
    let seen: Vec<_> = proxy.take_seen().into_iter().filter(|seen| seen.range.is_some()).collect();
    // What was asked for twice was spoilt the first time.
    let again = seen.iter().enumerate().find_map(|(at, second)| {
        let wanted = second.range.clone()?;
        let first = seen[..at].iter().find(|first| {
            first.range.as_ref().is_some_and(|range| range.start <= wanted.start && wanted.start < range.end)
        })?;
        Some((at, first.clone(), second.clone()))
    });
    let (at, first, second) = again.unwrap_or_else(|| panic!("nothing was asked for twice: {seen:?}"));
    assert_ne!(first.connection, second.connection);
    let earlier = seen[..at].iter().filter(|seen| seen.connection == second.connection).count();
    assert_eq!(earlier, 0, "nothing went over that connection before: {seen:?}");
    remove_everything(&site, &client, 1);
}

#[test]
fn privileged_a_body_that_falls_silent_holds_a_reader_for_much_less_than_the_connection_may_be_silent() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = image(&site, 1, &proxy.reference("app", "v1"), &[]);
    registry.push(&image.layout, "app", "v1");
    let running = site.start(&format!("{NOTHING_AHEAD}{config}"));
    let client = Client::connect(&site.socket());
    image.prepare_all(&client);
    let path = site.layout().snapshot_fs(SnapshotId(1)).join("data/0");
    proxy.rule(Rule::blobs(Fault::Freeze(20_000)).containing(&image.layers[0].to_string()).times(1));
    let begun = Instant::now();
    assert!(std::fs::read(path).unwrap() == content(0));
    assert_eq!(proxy.faults().values().sum::<u64>(), 1, "{:?}", proxy.faults());
    // The connection's own limit is ten seconds.
    assert!(begun.elapsed() < Duration::from_secs(7), "{:?}\n{}", begun.elapsed(), running.log());
    remove_everything(&site, &client, 1);
}

#[test]
fn privileged_a_name_that_cannot_be_resolved_for_a_while_is_waited_for() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let registry = Registry::start(Kind::Docker28, &site.root);
    let proxy = crate::support::proxy::Proxy::start(&registry.host);
    let port = proxy.host.rsplit(':').next().unwrap().to_owned();
    let name = format!("registry.soci.test:{port}");
    let image = image(&site, 1, &format!("{name}/app:v1"), &[]);
    registry.push(&image.layout, "app", "v1");
    let config =
        format!("{NOTHING_AHEAD}[[resolver.host.\"{name}\".mirrors]]\nhost = \"http://{name}\"\ninsecure = true\n");
    // The resolver is the machine's; its files are this test's, in a mount namespace of the daemon's own.
    let (hosts, resolver) = (site.root.join("hosts"), site.root.join("resolv.conf"));
    let resolves = |it: bool| {
        let line = if it { "127.0.0.1 registry.soci.test\n" } else { "" };
        // In place: it is mounted.
        std::fs::write(&hosts, format!("127.0.0.1 localhost\n{line}")).unwrap();
    };
    resolves(true);
    std::fs::write(&resolver, "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n").unwrap();
    let daemon = site.command(&config);
    let mut command = Command::new("unshare");
    // Slave: what others unmount meanwhile goes here, too.
    command.args(["--mount", "--propagation", "slave", "sh", "-c"]);
    command.arg(
        "mount --bind \"$1\" /etc/hosts && if [ -e /etc/resolv.conf ]; then mount --bind \"$2\" /etc/resolv.conf; fi; shift 2; exec \"$@\"",
    );
    command.arg("sh").args([&hosts, &resolver]).arg(daemon.get_program()).args(daemon.get_args());
    let running = site.run(&mut command);
    running.wait_for(STARTED);
    let client = Client::connect(&site.socket());
    image.prepare_all(&client);
    // What it has mounted is seen where it is.
    let inside = PathBuf::from(format!("/proc/{}/root", running.process.pid()));
    let place = site.layout().lazy().join("1/data/0");
    let path = inside.join(place.strip_prefix("/").unwrap());
    resolves(false);
    // No connection is left from before; and what was under way (prepare looks something up after its answer) has ended and been written down.
    proxy.down();
    std::thread::sleep(Duration::from_millis(500));
    proxy.take_seen();
    proxy.up();
    let (early, seen, read, waited) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| std::fs::read(&path));
        std::thread::sleep(Duration::from_secs(4));
        let (early, seen) = (reader.is_finished(), proxy.take_seen());
        // Before anything is asserted: the scope ends with the reader.
        resolves(true);
        let healed = Instant::now();
        (early, seen, reader.join().unwrap(), healed.elapsed())
    });
    assert!(!early, "it waits:\n{}", running.log());
    assert!(seen.is_empty(), "nobody could be asked: {seen:?}");
    assert!(read.unwrap() == content(0));
    assert!(waited < Duration::from_secs(60), "{waited:?}\n{}", running.log());
    snapshots_go(&client);
    assert_eq!(running.stop(Signal::SIGTERM).0.code(), Some(0));
}

fn snapshots_go(client: &Client) {
    crate::support::grpc::snapshots::remove(client, &chain(0)).unwrap();
    cleanup(client);
}
