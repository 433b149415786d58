//! Power cuts: an emulated machine is killed in the middle of its work, again and again, together with what its disks had not flushed yet
//! ([`super::disk`]); what each boot finds is judged in the guest (`guest::cuts`).

use super::{
    backend::{Machine, Place, verdict},
    disk::{Disk, Lost, Random},
    prepare::{self, Payload, cache, target},
    storm,
};
use crate::{
    Outcome, ensure,
    guest::tools::{run, shell, text},
    guest::{LAST, WORKING},
};
use std::{
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

/// An emulated machine needs half a minute for a boot and a minute to read everything; a busy host some times that.
const LIMIT: Duration = Duration::from_secs(15 * 60);
/// A cut at which everything is flushed loses nothing; it waits so long for one that does.
const MOMENT: Duration = Duration::from_secs(10);
/// One cut in so many is not waited for: it comes while the machine starts or looks around.
const EARLY: u64 = 5;

/// `power-cuts [n=COUNT] [seed=NUMBER]`
pub fn main(words: &[&str]) -> ExitCode {
    let (mut count, mut seed) = (20, std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs()));
    for word in words {
        match word.split_once('=').map(|(name, value)| (name, value.parse::<u64>())) {
            Some(("n", Ok(n))) if n > 0 => count = n,
            Some(("seed", Ok(n))) => seed = n,
            _ => {
                eprintln!("usage: vm-tests power-cuts [n=COUNT] [seed=NUMBER]");
                return ExitCode::from(2);
            }
        }
    }
    match series(count, seed) {
        Ok((summary, results)) => {
            let passed = results.lines().any(|line| line == "end passed");
            let outcome = if passed { "0 errors" } else { "FAILED" };
            println!("power cuts: {summary}, {outcome}");
            results.lines().for_each(|line| println!("power cuts: {line}"));
            if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("power cuts (seed {seed}): {error}");
            ExitCode::FAILURE
        }
    }
}

fn series(count: u64, seed: u64) -> Outcome<(String, String)> {
    let payload = Payload { work: target().join("vm"), guests: cache().join("guests") };
    fs::create_dir_all(&payload.work).map_err(|error| error.to_string())?;
    prepare::tools()?;
    prepare::root_filesystems(&payload, &["bookworm"])?;
    let built = storm::built()?;
    prepare::images(&payload, &built.join("soci"))?;
    let place = Place::new()?;
    storm::put(&payload.work.join("images/registry"), &built, &place.path.join("vm"), "power-cuts")?;
    shell(&format!("strip --strip-debug -o {0}/vm/v1/soci {1}/soci", place.path.display(), built.display()))?;

    let machine = Machine::debian(&payload, &place)?;
    let mut random = Random::new(seed);
    let root = Disk::new(&machine.root, random.below(1 << 31))?;
    let data = Disk::new(&machine.data, random.below(1 << 31))?;
    let disks = [root.drive(), "file=vm.img,if=virtio,format=raw,cache=writeback".to_owned(), data.drive()];
    let (mut cuts, mut early) = (0, 0);
    let mut lost = Lost::default();
    let begun = Instant::now();
    let ended = loop {
        let last = cuts == count;
        let mut child = machine.start(&disks, if last { LAST } else { "" })?;
        let impatient = cuts > 0 && !last && random.below(EARLY) == 0;
        let until = Duration::from_millis(random.below(if impatient { 40_000 } else { 15_000 }));
        let boot = Instant::now();
        let mut from = impatient.then_some(boot);
        // Why it is not to be cut any more.
        let over = loop {
            if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
                ensure!(status.success(), "the emulator: {status}: {}", read(&place, "qemu.log"));
                break Some(Ok(()));
            }
            let said = read(&place, "console");
            if said.contains("end Kernel panic") || boot.elapsed() > LIMIT {
                break Some(Err(format!("the guest hangs: {}", said.lines().last().unwrap_or_default())));
            }
            if !last && from.is_none() && said.contains(WORKING) {
                from = Some(Instant::now());
            }
            if from.is_some_and(|from| from.elapsed() >= until + MOMENT)
                || (from.is_some_and(|from| from.elapsed() >= until) && root.unflushed() + data.unflushed() > 0)
            {
                break None;
            }
            std::thread::sleep(Duration::from_millis(if from.is_some() { 2 } else { 100 }));
        };
        if let Some(ended) = over {
            let _ = child.kill();
            let _ = child.wait();
            break ended;
        }
        child.kill().and_then(|()| child.wait()).map_err(|error| error.to_string())?;
        for disk in [&root, &data] {
            let of_disk = disk.cut()?;
            lost.unflushed += of_disk.unflushed;
            lost.gone += of_disk.gone;
        }
        cuts += 1;
        early += u64::from(impatient);
        let (when, flushed) = (boot.elapsed().as_secs(), lost.unflushed / 2);
        eprintln!(
            "cut {cuts} of {count}, {when} s after the machine was switched on; not flushed so far: {flushed} KiB"
        );
    };
    root.settle()?;
    data.settle()?;
    drop((root, data));
    machine.collect(&place);
    // The file systems themselves must be whole, or what was found says nothing about us.
    let ended = ended.and_then(|()| {
        [&machine.root, &machine.data].into_iter().try_for_each(|disk| {
            // It was left mounted by a guest that switched itself off at once: its journal first.
            let _ = run("e2fsck", &["-p", &disk.display().to_string()]);
            run("e2fsck", &["-fn", &disk.display().to_string()]).map(drop)
        })
    });
    let summary = format!(
        "seed {seed}, {cuts} cuts in {:.0} s, {early} of them while it started or looked around, {} KiB not flushed, of which {} KiB were lost",
        begun.elapsed().as_secs_f64(),
        lost.unflushed / 2,
        lost.gone / 2
    );
    let results = verdict("power-cuts", &place, ended)?;
    Ok((summary, results))
}

fn read(place: &Place, name: &str) -> String {
    fs::read(place.path.join(name)).map(|bytes| text(&bytes)).unwrap_or_default()
}
