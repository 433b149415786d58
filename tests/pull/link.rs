//! The link and the registry, shared by pulls and by containers that read.

use super::*;
use crate::support::daemon::Settings;

#[test]
fn privileged_a_registry_that_allows_few_requests_at_a_time_is_asked_less_and_nothing_fails() {
    let slot = Slot::take();
    let node = Node::new(&slot, Version::V22, FALLBACK);
    let layers = (0..4).map(|n| bulk(&format!("bulk{n}"), 60 + n, 12));
    let image = Image::new([busybox()].into_iter().chain(layers).collect());
    let (_, reference) = node.publish_plain("limited", &image);
    node.proxy.allow_at_once(3);
    node.proxy.shape(3_000_000, Duration::from_millis(5));
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.daemon.layers(), fallen_back(5));
    let seen = node.proxy.take_seen();
    let refused = seen.iter().filter(|s| s.status == 429).count();
    let served = seen.iter().filter(|s| s.status == 206).count();
    eprintln!("{refused} of {} refused", refused + served);
    assert!(refused > 0, "it has tried");
    assert!(refused <= served, "{refused} refused, {served} served: it has learnt");
    // The same of a registry that says 503, and is slow.
    let layers = (0..4).map(|n| bulk(&format!("bulk{n}"), 70 + n, 4));
    let image = Image::new([busybox()].into_iter().chain(layers).collect());
    let (_, reference) = node.publish_plain("busy", &image);
    node.proxy.allow_at_once(u64::MAX);
    node.proxy.shape(3_000_000, Duration::from_millis(150));
    node.proxy.rule(Rule::blobs(Fault::Status(503)).times(6).after(3));
    node.containerd.pull("soci", &reference).unwrap();
    assert_eq!(node.daemon.layers().deferred, 0);
}

#[test]
fn privileged_the_limit_of_requests_holds_for_pulls_and_streaming_together() {
    let slot = Slot::take();
    let more = "[pull_modes.parallel_pull_unpack]\nparallel_pull_as_fallback = true\nmax_concurrent_downloads = 2\n";
    let node = Node::new(&slot, Version::V22, more);
    let (_, layers, lazy) = node.publish("lazy", &app(80, 16));
    let (_, plain) = node.publish_plain("plain", &Image::new(vec![bulk("one", 81, 8), bulk("two", 82, 8)]));
    node.proxy.share_line(4_000_000);
    node.containerd.pull("soci", &lazy).unwrap();
    assert_eq!(node.daemon.layers().lazy, layers);
    node.proxy.take_most_at_once();
    node.containerd.pull("soci", &plain).unwrap();
    assert_eq!(node.daemon.layers().local, 2);
    let most = node.proxy.take_most_at_once();
    // The image's configuration is a blob as well: one may be on its way to us, one to containerd.
    assert!((2..=4).contains(&most), "{most} at once");
}

#[test]
fn privileged_a_container_that_reads_is_not_starved_by_a_pull_and_the_pull_goes_on() {
    let slot = Slot::take();
    // Nothing streams by itself, so each read is a demand.
    let more = format!("{FALLBACK}[background_fetch]\ndisable = true\n");
    let node =
        Node::with_settings(&slot, Version::V22, Settings { more, log_level: "debug".into(), ..Settings::default() });
    let (_, _, lazy) = node.publish("lazy", &app(83, 12));
    let layers = (0..6).map(|n| bulk(&format!("bulk{n}"), 84 + n, 20));
    let (_, plain) = node.publish_plain("plain", &Image::new(layers.collect()));
    node.containerd.pull("soci", &lazy).unwrap();
    let rate = 6_000_000;
    node.proxy.share_line(rate);
    std::thread::scope(|scope| {
        let containerd = &node.containerd;
        let pull = scope.spawn(move || containerd.pull("soci", &plain));
        eventually("the pull is at work", || node.proxy.at_once() >= 3);
        node.proxy.take_seen();
        let mount = node.containerd.mount("soci", "default", &lazy, &node.root.join("lazy"));
        let start = Instant::now();
        let read: usize = (0..12).map(|n| std::fs::read(mount.path.join(format!("bulk/{n:04}"))).unwrap().len()).sum();
        let took = start.elapsed();
        assert_eq!(read, 12 << 20);
        assert!(!pull.is_finished(), "the pull must still be at work for this to mean something");
        // Twelve megabytes of tar are some eight compressed ones: half of the line, at least.
        eprintln!("read within {took:?}");
        assert!(took < Duration::from_secs_f64(8.0 * 1e6 / rate as f64 * 3.0 + 3.0), "{took:?}");
        // It has not stood still either.
        std::thread::sleep(Duration::from_secs(1));
        let pulled: u64 = node.proxy.take_seen().iter().filter(|s| s.path.contains("/plain/")).map(|s| s.bytes).sum();
        assert!(pulled > 0 || node.proxy.at_once() > 0);
        node.proxy.share_line(0);
        pull.join().unwrap().unwrap();
    });
    assert_eq!(node.daemon.layers().deferred, 0);
}
