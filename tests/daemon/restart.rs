//! How long containers wait for the next daemon: reads are answered first, everything else comes after.

use super::lazy::*;
use super::*;
use crate::support::grpc::{Client, snapshots};
use crate::support::image::{Form, Image, Layer, noise};
use crate::support::registry::image_manifest;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;

const LAYERS: usize = 30;
/// Of each layer, beside the file that is read.
const SMALL_FILES: usize = 400;
const RESTARTS: usize = 12;
/// From the start of the program to the first answer. It takes a few hundredths of a second; a build without optimisation on a machine that is
/// busy with other tests gets this long.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
pub(super) const BLOCK: usize = 4096;

/// An image of many layers with many files each, as large images are.
fn publish(site: &Site, reference: &str) -> Published {
    let layer = |n: usize| {
        let mut layer = Layer::new();
        layer.dir("data");
        layer.file(format!("data/{n}"), content(n));
        layer.dir(format!("lib-{n}"));
        for file in 0..SMALL_FILES {
            layer.file(format!("lib-{n}/module_{file}.py"), noise(file as u64, 64));
        }
        layer.form(Form::GzipMembers(128 << 10))
    };
    let (plain, layout) = (site.root.join("plain"), site.root.join("indexed"));
    Image::new((0..LAYERS).map(layer).collect()).write(&plain);
    crate::support::daemon::convert(&plain, &layout, &SPANS);
    let (manifest, read) = image_manifest(&layout);
    let layers = read.layers.iter().map(|l| l.digest).collect();
    Published { reference: reference.into(), manifest, layers, layout }
}

/// A block of the file, from the daemon whatever the kernel has kept; in aligned memory, as O_DIRECT wants.
pub(super) fn block(file: &File, at: usize) -> Vec<u8> {
    try_block(file, at).unwrap()
}

pub(super) fn try_block(file: &File, at: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 2 * BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    file.read_exact_at(&mut buffer[start..start + BLOCK], at as u64)?;
    Ok(buffer[start..start + BLOCK].to_vec())
}

#[test]
fn privileged_after_a_crash_reads_are_answered_before_anything_else_is_done() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let (registry, proxy, config) = registry_and_proxy(&site);
    let image = publish(&site, &proxy.reference("app", "v1"));
    registry.push(&image.layout, "app", "v1");
    let mut running = site.start(&config);
    image.prepare_all(&Client::connect(&site.socket()));
    let top = LAYERS - 1;
    let lazy = site.layout().lazy();
    let place =
        names(&lazy).into_iter().map(|id| lazy.join(id).join(format!("data/{top}"))).find(|p| p.exists()).unwrap();
    assert!(std::fs::read(&place).unwrap() == content(top));
    let direct = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&place).unwrap();
    let mut took: Vec<Duration> = Vec::new();
    for n in 0..RESTARTS {
        running.process.kill_9();
        // Nobody is asked: everything is here.
        proxy.down();
        let begun = Instant::now();
        running = site.run(&mut site.command(&config));
        let at = n * BLOCK;
        assert!(block(&direct, at) == content(top)[at..at + BLOCK]);
        took.push(begun.elapsed());
        running.wait_for(STARTED);
        let log = running.log();
        let (answers, ready) = (log.find("reads are answered"), log.find(STARTED));
        assert!(answers.is_some() && answers < ready, "{log}");
        for later in ["snapshot records are open", "lazy layers restored"] {
            assert!(log.find(later).is_some_and(|at| Some(at) > answers), "{later}: {log}");
        }
        proxy.up();
    }
    took.sort();
    println!(
        "restart: {LAYERS} lazy layers, from the program's start to the first answered read: median {:.3} s, worst {:.3} s of {RESTARTS} restarts",
        took[RESTARTS / 2].as_secs_f64(),
        took[RESTARTS - 1].as_secs_f64()
    );
    assert!(took[RESTARTS - 1] < ANSWERED_WITHIN, "{took:?}");
    remove_everything(&site, &Client::connect(&site.socket()), LAYERS);
}

#[test]
fn privileged_a_service_manager_that_reads_nothing_delays_nothing_and_hears_of_it_later() {
    let slot = Slot::take();
    let site = Site::new(&slot);
    let notify = site.root.join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"X_FILLER=1", &notify).is_ok() {}
    let mut command = site.command("");
    command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", "1000000");
    let running = site.run(&mut command);
    running.wait_for(STARTED);
    snapshots::prepare(&Client::connect(&site.socket()), "key", "", HashMap::new()).unwrap();
    snapshots::remove(&Client::connect(&site.socket()), "key").unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    for wanted in ["READY=1", "WATCHDOG=1"] {
        let mut buffer = [0; 8192];
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < Duration::from_secs(30), "it does not say {wanted}");
            let length = manager.recv(&mut buffer).unwrap_or_else(|error| panic!("no {wanted}: {error}"));
            if String::from_utf8_lossy(&buffer[..length]).lines().any(|line| line == wanted) {
                break;
            }
        }
    }
    let (status, took) = running.stop(Signal::SIGTERM);
    assert!(status.success() && took < Duration::from_secs(10), "{status}, {took:?}");
}
