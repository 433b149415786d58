//! What systemd is told, and SIGHUP: with a socket in the place of systemd's, which is all of systemd that a daemon sees.

use super::*;
use std::os::unix::net::UnixDatagram;

/// The receiving end of `NOTIFY_SOCKET`.
struct Manager {
    socket: UnixDatagram,
    heard: std::cell::RefCell<Vec<String>>,
}

impl Manager {
    fn listen(site: &Site) -> Manager {
        let socket = UnixDatagram::bind(site.root.join("notify")).unwrap();
        socket.set_nonblocking(true).unwrap();
        Manager { socket, heard: Default::default() }
    }

    /// Lines so far.
    fn lines(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
            self.heard.borrow_mut().extend(message.lines().map(str::to_owned));
        }
        self.heard.borrow().clone()
    }

    /// Waits for a line; forgets everything up to it.
    fn hears(&self, what: &str, matches: impl Fn(&str) -> bool) -> String {
        let mut found = None;
        eventually(what, || {
            found = self.lines().iter().position(|line| matches(line));
            found.is_some()
        });
        let mut heard = self.heard.borrow_mut();
        heard.drain(..=found.unwrap()).next_back().unwrap()
    }
}

fn start(site: &Site, config: &str) -> (Manager, Running) {
    let manager = Manager::listen(site);
    let mut command = site.command(config);
    // Half a second: pings every quarter.
    command.env("NOTIFY_SOCKET", site.root.join("notify")).env("WATCHDOG_USEC", "500000");
    let running = site.run(&mut command);
    running.wait_for(STARTED);
    (manager, running)
}

#[test]
fn privileged_systemd_hears_when_the_daemon_is_ready_lives_and_stops() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (manager, running) = start(&site, "");
    // In either order.
    eventually("a status", || manager.lines().iter().any(|line| line == "STATUS=ready; no image is loaded lazily"));
    manager.hears("READY", |line| line == "READY=1");
    manager.hears("a ping", |line| line == "WATCHDOG=1");
    manager.hears("another ping", |line| line == "WATCHDOG=1");
    assert_eq!(running.stop(Signal::SIGTERM).0.code(), Some(0));
    manager.hears("STOPPING", |line| line == "STOPPING=1");
}

#[test]
fn privileged_a_start_that_fails_says_why_and_is_not_repeated_ten_times_a_second() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let manager = Manager::listen(&site);
    let mut command = site.command("\n[http]\nMaxRetries = 'many'\n");
    command.env("NOTIFY_SOCKET", site.root.join("notify"));
    let begun = Instant::now();
    let running = site.run(&mut command);
    let line = manager.hears("why", |line| line.starts_with("STATUS=NOT RUNNING"));
    assert!(line.contains("config.toml:3:14: http.MaxRetries: "), "{line}");
    running.wait_for_end(Duration::from_secs(20));
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(running.process.stop().code(), Some(1));
}

#[test]
fn privileged_a_reload_applies_what_can_change_names_what_cannot_and_refuses_a_bad_file() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (manager, running) = start(&site, "");
    manager.hears("READY", |line| line == "READY=1");
    let pid = running.process.pid();
    let reload = |config: &str| {
        std::fs::write(site.root.join("config.toml"), config).unwrap();
        running.process.signal(Signal::SIGHUP);
        manager.hears("RELOADING", |line| line == "RELOADING=1");
        manager.hears("READY again", |line| line == "READY=1");
    };

    reload("[background_fetch]\nmax_bytes_per_sec = 1000000\n[layer_store]\ncache_memory_mb = 20\n");
    let log = running.log();
    assert!(log.contains("\"applied\":\"background_fetch.max_bytes_per_sec\""), "{log}");
    assert!(log.contains("\"keys\":\"layer_store.cache_memory_mb\""), "{log}");
    manager.hears("the note", |line| line.ends_with("restart needed for layer_store.cache_memory_mb"));

    reload("[background_fetch]\nmax_bytes_per_sec = 1\n[http]\nMaxRetries = 'many'\n");
    let log = running.log();
    assert!(log.contains("config.toml:4:14: http.MaxRetries: "), "{log}");
    assert!(log.contains("nothing has changed"), "{log}");
    manager.hears("the note", |line| line.contains("CONFIGURATION NOT RELOADED: "));

    // Only what differs from what runs is applied: the bad file left the limit alone.
    reload("[background_fetch]\nmax_bytes_per_sec = 1000000\n");
    running.wait_for("nothing that can change without a restart has changed");
    manager.hears("a plain status", |line| line == "STATUS=ready; no image is loaded lazily");
    assert_eq!(running.process.pid(), pid);
    assert!(running.process.is_running());
    assert_eq!(running.stop(Signal::SIGTERM).0.code(), Some(0));
}
