//! The systemd units: valid, as closed as promised, and for Amazon Linux 2 free of what its systemd 219 does not know.

use soci::layout::{DEFAULT_ADDRESS, DEFAULT_ROOT, Layout};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const SETS: [&str; 2] = ["al2023", "al2"];
const UNITS: [&str; 5] = [
    "soci-snapshotter.socket",
    "soci-snapshotter.service",
    "soci-mount.service",
    "soci-custodian.socket",
    "soci-custodian.service",
];

/// What the units for Amazon Linux 2 may say, by section; all of it is in systemd 219 (released 2015-02-16), whose NEWS and manual pages
/// were the source. A directive of later versions would be ignored there, with a line in the journal that nobody reads.
const KNOWN_TO_219: [(&str, &[&str]); 4] = [
    ("Unit", &["Description", "Documentation", "After", "Before", "Wants", "Requires", "RequiresMountsFor"]),
    ("Install", &["WantedBy", "Also"]),
    ("Socket", &["ListenStream", "ListenSequentialPacket", "SocketMode", "DirectoryMode", "RemoveOnStop"]),
    (
        "Service",
        &[
            "Type",
            "ExecStart",
            "ExecReload",
            "Restart",
            "RestartSec",
            "StartLimitInterval", // since 230 in [Unit], as StartLimitIntervalSec=
            "TimeoutStartSec",
            "TimeoutStopSec",
            "WatchdogSec",
            "FileDescriptorStoreMax",
            "LimitNOFILE",
            "OOMScoreAdjust",
            "Environment",
            "UMask",
            "CapabilityBoundingSet",
            "NoNewPrivileges",
            "ProtectSystem", // yes and full; strict is of 232
            "ProtectHome",   // yes and read-only; tmpfs is of 239
            "PrivateTmp",
            "PrivateDevices",
            "PrivateNetwork",
            "DevicePolicy",
            "DeviceAllow",
            "InaccessibleDirectories", // since 231 InaccessiblePaths=
            "RestrictAddressFamilies",
            "SystemCallArchitectures",
            "SystemCallFilter", // names of calls; groups of them are of 231
            "SystemCallErrorNumber",
        ],
    ),
];

/// A mount made under any of these is seen by nobody else (each was tried alone).
const HIDE_MOUNTS: [&str; 14] = [
    "ProtectSystem",
    "ProtectHome",
    "PrivateTmp",
    "PrivateMounts",
    "PrivateDevices",
    "ProtectKernelTunables",
    "ProtectKernelModules",
    "ProtectKernelLogs",
    "ProtectControlGroups",
    "ProtectProc",
    "ProcSubset",
    "ReadWritePaths",
    "MountFlags",
    "RuntimeDirectory",
];

fn directory(set: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(set)
}

/// Section, directive and value of each line that is no comment.
fn lines(set: &str, unit: &str) -> Vec<(String, String, String)> {
    let text = fs::read_to_string(directory(set).join(unit)).unwrap();
    let mut section = String::new();
    let mut out = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            Some(name) => section = name.to_owned(),
            None => {
                let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("{set}/{unit}: {line}"));
                out.push((section.clone(), key.to_owned(), value.to_owned()));
            }
        }
    }
    out
}

fn value(set: &str, unit: &str, directive: &str) -> String {
    lines(set, unit).into_iter().find(|(_, key, _)| key == directive).map(|(.., value)| value).unwrap_or_default()
}

/// A root with the distribution's units, ours, and something to execute wherever ours point.
fn root_with(set: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| root.path().join(path.trim_start_matches('/'));
    let copied = at("/usr/lib/systemd");
    fs::create_dir_all(&copied).unwrap();
    let done = Command::new("cp").arg("-a").arg("/usr/lib/systemd/system").arg(&copied).status().unwrap();
    assert!(done.success());
    fs::create_dir_all(at("/etc/systemd/system")).unwrap();
    for unit in UNITS {
        fs::copy(directory(set).join(unit), at("/etc/systemd/system").join(unit)).unwrap();
        for (_, key, value) in lines(set, unit) {
            if key.starts_with("Exec") {
                let program = at(value.split_whitespace().next().unwrap());
                fs::create_dir_all(program.parent().unwrap()).unwrap();
                fs::write(&program, "#!/bin/sh\n").unwrap();
                fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
    }
    root
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    for set in SETS {
        let root = root_with(set);
        let verify = || {
            let mut command = Command::new("systemd-analyze");
            // Without --recursive-errors=no a typo is a warning and the exit status is 0.
            command
                .args(["verify", "--man=no", "--recursive-errors=no"])
                .arg(format!("--root={}", root.path().display()));
            command.args(UNITS).output().expect("systemd-analyze; `make setup` installs it")
        };
        let found = verify();
        let said = String::from_utf8_lossy(&found.stderr).into_owned();
        assert!(found.status.success() && said.is_empty(), "{set}: {said}");
        // It would say so.
        let unit = root.path().join("etc/systemd/system/soci-mount.service");
        let broken = fs::read_to_string(&unit).unwrap().replace("[Service]\n", "[Service]\nResart=always\n");
        fs::write(&unit, broken).unwrap();
        assert!(!verify().status.success(), "{set}");
    }
}

#[test]
fn the_units_for_amazon_linux_2023_are_as_closed_as_promised() {
    // Tenths of systemd's exposure level. The daemon's rest: root, Internet sockets, homes that can be read.
    for (unit, at_most) in
        [("soci-snapshotter.service", 18), ("soci-custodian.service", 25), ("soci-mount.service", 40)]
    {
        let found = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager", &format!("--threshold={at_most}")])
            .arg(directory("al2023").join(unit))
            .output()
            .expect("systemd-analyze; `make setup` installs it");
        let said = String::from_utf8_lossy(&found.stdout).into_owned();
        assert!(found.status.success(), "{unit}: {said}{}", String::from_utf8_lossy(&found.stderr));
        assert!(said.contains("Overall exposure level"), "{unit}: {said}");
    }
}

#[test]
fn the_units_for_amazon_linux_2_say_nothing_that_systemd_219_does_not_know() {
    let known: BTreeMap<&str, &[&str]> = KNOWN_TO_219.into_iter().collect();
    let mut unknown = Vec::new();
    for unit in UNITS {
        for (section, key, value) in lines("al2", unit) {
            let newer = matches!((key.as_str(), value.as_str()), ("ProtectSystem", "strict") | ("ProtectHome", "tmpfs"))
                // Of 231, 235 and later; '@' before the path of a program is old, '+' and '!' are not.
                || (key.starts_with("Exec") && value.starts_with(['+', '!', ':']))
                || (key == "SystemCallFilter" && value.contains('@'))
                || value.contains("%E") || value.contains("%S") || value.contains("%t");
            if newer || !known.get(section.as_str()).is_some_and(|keys| keys.contains(&key.as_str())) {
                unknown.push(format!("{unit}: [{section}] {key}={value}"));
            }
        }
    }
    assert!(unknown.is_empty(), "{}", unknown.join("\n"));
}

#[test]
fn nothing_hides_the_holders_mount_and_nobody_waits_in_a_unit_for_what_the_other_keeps() {
    for set in SETS {
        for (_, key, _) in lines(set, "soci-mount.service") {
            assert!(!HIDE_MOUNTS.contains(&key.as_str()), "{set}: {key}= would hide the mount from containers");
        }
        // Requires= would restart the daemon together with a crashed holder.
        for (_, key, value) in lines(set, "soci-snapshotter.service") {
            let strong = ["Requires", "Requisite", "BindsTo", "PartOf", "Upholds"].contains(&key.as_str());
            assert!(!strong, "{set}: {key}={value}");
        }
        assert_eq!(value(set, "soci-snapshotter.service", "Before"), "containerd.service", "{set}");
        assert!(["", "read-only"].contains(&value(set, "soci-snapshotter.service", "ProtectHome").as_str()), "{set}");
    }
}

#[test]
fn sockets_and_programs_are_where_the_programs_look_for_them() {
    let custodian = Layout::new(DEFAULT_ROOT).custodian_socket().display().to_string();
    for set in SETS {
        assert_eq!(value(set, "soci-snapshotter.socket", "ListenStream"), DEFAULT_ADDRESS);
        assert_eq!(value(set, "soci-custodian.socket", "ListenSequentialPacket"), custodian);
        for unit in ["soci-snapshotter.socket", "soci-custodian.socket"] {
            assert_eq!(value(set, unit, "RemoveOnStop"), "yes");
        }
        for helper in ["soci-mount", "soci-custodian"] {
            let program = format!("{}/{helper}", soci::sys::process::LIBEXEC);
            assert_eq!(value(set, &format!("{helper}.service"), "ExecStart"), program);
        }
    }
}
