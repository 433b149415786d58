//! The machine: kernel, FUSE, the root directory's filesystem, units.

use super::Finding;
use crate::cli::output;
use rustix::fs::{FileType, Mode, OFlags};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// Oldest kernel that runs it: Amazon Linux 2's first.
const OLDEST: (u32, u32) = (4, 14);
/// First one that replays what a dead daemon had read (`FUSE_NOTIFY_RESEND`).
const RESENDS: (u32, u32) = (6, 9);
/// Less room than this is soon none.
const LITTLE: u64 = 1 << 30;
/// Units of the package that must not be missing.
const UNITS: [&str; 4] =
    ["soci-snapshotter.socket", "soci-snapshotter.service", "soci-mount.service", "soci-custodian.socket"];

pub fn kernel() -> Vec<Finding> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |name: &str| filesystems.lines().any(|line| line.split_whitespace().last() == Some(name));
    let mut out = vec![match version(&release) {
        None => Finding::skipped("kernel", format!("{release:?} is no version that can be compared")),
        Some(version) if version < OLDEST => Finding::problem(
            "kernel",
            format!("{release} is older than {}.{}", OLDEST.0, OLDEST.1),
            "use a newer kernel",
        ),
        Some(version) if version < RESENDS => {
            Finding::ok("kernel", format!("{release} (requests of a dead daemon are answered from its own notes)"))
        }
        Some(_) => Finding::ok("kernel", release),
    }];
    for name in ["overlay", "fuse"] {
        out.push(match has(name) {
            true => Finding::ok("kernel", format!("has {name}")),
            false => Finding::problem(
                "kernel",
                format!("does not have the filesystem {name}"),
                format!("modprobe {name}; to have it after a reboot: echo {name} >/etc/modules-load.d/{name}.conf"),
            ),
        });
    }
    out.push(device());
    out
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn device() -> Finding {
    const CHECK: &str = "FUSE";
    const PATH: &str = "/dev/fuse";
    let fix = "modprobe fuse; in a container, give it the device (--device /dev/fuse)";
    let is_device =
        rustix::fs::stat(PATH).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::CharacterDevice);
    if !is_device {
        return Finding::problem(CHECK, format!("{PATH} is not there"), fix);
    }
    match rustix::fs::open(PATH, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Finding::ok(CHECK, format!("{PATH} can be opened")),
        Err(error) if !rustix::process::geteuid().is_root() => {
            Finding::skipped(CHECK, format!("{PATH}: {error}; run soci doctor as root"))
        }
        Err(error) => Finding::problem(CHECK, format!("{PATH} cannot be opened: {error}"), fix),
    }
}

pub fn root(root: &Path) -> Vec<Finding> {
    const CHECK: &str = "disk";
    let path = root.display();
    match rustix::fs::statvfs(root) {
        Err(rustix::io::Errno::NOENT) => {
            vec![Finding::skipped(CHECK, format!("{path} is not there yet; the daemon makes it"))]
        }
        Err(rustix::io::Errno::ACCESS) => vec![Finding::skipped(CHECK, format!("{path} can only be seen by root"))],
        Err(error) => {
            vec![Finding::problem(CHECK, format!("{path}: {error}"), "name the daemon's root directory with --root")]
        }
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let fix = format!("make room on the filesystem of {path}: remove images that nobody uses");
            let found = format!("{} free at {path}", output::bytes(free));
            let mut out = vec![match free {
                0 => Finding::problem(
                    CHECK,
                    format!("no room at {path}: reads are served from the network only"),
                    fix.clone(),
                ),
                few if few < LITTLE => Finding::warning(CHECK, found, fix.clone()),
                _ => Finding::ok(CHECK, found),
            }];
            if stat.f_files > 0 && stat.f_favail == 0 {
                out.push(Finding::problem(CHECK, format!("no inodes left at {path}"), fix));
            }
            out
        }
    }
}

pub fn units() -> Vec<Finding> {
    const CHECK: &str = "units";
    // What sd_booted(3) looks at.
    if !Path::new("/run/systemd/system").is_dir() {
        return vec![Finding::skipped(CHECK, "this system was not booted with systemd")];
    }
    UNITS.iter().map(|unit| judge(unit, &properties(unit))).collect()
}

/// `Name=value` lines of a unit.
fn properties(unit: &str) -> String {
    let shown = Command::new("systemctl")
        .args(["show", "--no-pager", "-p", "LoadState,ActiveState,SubState,UnitFileState,Result", unit])
        .stdin(Stdio::null())
        .output();
    shown.map(|shown| String::from_utf8_lossy(&shown.stdout).into_owned()).unwrap_or_default()
}

/// Pure.
fn judge(unit: &'static str, properties: &str) -> Finding {
    const CHECK: &str = "units";
    let of = |name: &str| properties.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or("");
    let (load, active, enabled) = (of("LoadState"), of("ActiveState"), of("UnitFileState"));
    match (load, active) {
        ("", _) => Finding::skipped(CHECK, format!("{unit}: systemctl does not answer")),
        ("not-found", _) => Finding::warning(
            CHECK,
            format!("{unit} is not installed"),
            "install the package, or start the programs yourself",
        ),
        ("masked", _) => Finding::problem(CHECK, format!("{unit} is masked"), format!("systemctl unmask {unit}")),
        (_, "failed") => Finding::problem(
            CHECK,
            format!("{unit} has failed ({})", of("Result")),
            format!("journalctl -u {unit} -x says why; then systemctl restart {unit}"),
        ),
        (_, "active" | "activating" | "reloading") if unit.ends_with(".socket") && enabled == "disabled" => {
            Finding::warning(
                CHECK,
                format!("{unit} runs, but not after the next boot"),
                format!("systemctl enable {unit}"),
            )
        }
        (_, "active" | "activating" | "reloading") => {
            Finding::ok(CHECK, format!("{unit}: {active}, {}", of("SubState")))
        }
        _ if unit.ends_with(".socket") => {
            Finding::problem(CHECK, format!("{unit} is {active}"), format!("systemctl enable --now {unit}"))
        }
        // A service that its socket starts.
        _ => Finding::ok(CHECK, format!("{unit}: {active}; started when it is needed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Verdict;

    #[test]
    fn releases_of_distributions_are_versions() {
        for (release, wanted) in
            [("6.1.112-122.189.amzn2023.x86_64", (6, 1)), ("4.14.355-276.639.amzn2", (4, 14)), ("6.18.0", (6, 18))]
        {
            assert_eq!(version(release), Some(wanted));
        }
        assert_eq!(version("linux"), None);
    }

    #[test]
    fn a_unit_is_judged_by_what_somebody_must_do_about_it() {
        let judged = |unit, text: &str| judge(unit, &text.replace(' ', "\n")).verdict;
        let socket = "soci-snapshotter.socket";
        assert_eq!(judged(socket, "LoadState=loaded ActiveState=active UnitFileState=enabled"), Verdict::Ok);
        assert_eq!(judged(socket, "LoadState=loaded ActiveState=active UnitFileState=disabled"), Verdict::Warning);
        assert_eq!(judged(socket, "LoadState=loaded ActiveState=inactive UnitFileState=disabled"), Verdict::Problem);
        assert_eq!(judged("soci-snapshotter.service", "LoadState=loaded ActiveState=inactive"), Verdict::Ok);
        assert_eq!(
            judged("soci-snapshotter.service", "LoadState=loaded ActiveState=failed Result=exit-code"),
            Verdict::Problem
        );
        assert_eq!(judged(socket, "LoadState=not-found ActiveState=inactive"), Verdict::Warning);
        assert_eq!(judged(socket, ""), Verdict::Skipped);
    }
}
