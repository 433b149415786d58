//! What runs in the place of one of the product's programs, under its unit: tries what the unit must refuse, and what it must allow.
//!
//! The programs confine themselves further; that their processes are confined is looked up in `/proc` (story, `confinement`).

use super::tools::{ROOT, attempt, text};
use std::{
    fs,
    path::Path,
    process::{Command, ExitCode, Stdio},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Daemon,
    Holder,
    Custodian,
}

pub const ROLES: [Role; 3] = [Role::Daemon, Role::Holder, Role::Custodian];

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Daemon => "daemon",
            Role::Holder => "holder",
            Role::Custodian => "custodian",
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Role::Daemon => "soci-snapshotter.service",
            Role::Holder => "soci-mount.service",
            Role::Custodian => "soci-custodian.service",
        }
    }
}

/// Which units are installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Units {
    /// All that systemd 252 can do.
    Strict,
    /// What systemd 219 can do; the rest is the programs' own work.
    Old,
}

/// An act, and whether it may work for a role under a set of units.
struct Act {
    what: &'static str,
    command: &'static [&'static str],
    may: fn(Role, Units) -> bool,
}

const ACTS: &[Act] = &[
    Act { what: "mount", command: &["mount", "-t", "tmpfs", "none", "/mnt"], may: |role, _| role == Role::Holder },
    Act { what: "write to /usr", command: &["touch", "/usr/written"], may: |role, _| role == Role::Holder },
    Act { what: "write to /etc", command: &["touch", "/etc/written"], may: |role, _| role == Role::Holder },
    Act {
        what: "write to /var",
        command: &["touch", "/var/written"],
        may: |role, units| role == Role::Holder || units == Units::Old,
    },
    Act { what: "write to root's home", command: &["touch", "/root/written"], may: |role, _| role == Role::Holder },
    Act {
        what: "read root's home",
        command: &["cat", "/root/.docker/config.json"],
        may: |role, _| role != Role::Custodian,
    },
    Act { what: "write to its state", command: &["touch", "/var/lib/soci-snapshotter-grpc/written"], may: |_, _| true },
    Act {
        what: "give a file away",
        command: &["chown", "nobody", "/var/lib/soci-snapshotter-grpc/written"],
        may: |role, _| role == Role::Custodian,
    },
    Act {
        what: "make a device node",
        command: &["mknod", "/var/lib/soci-snapshotter-grpc/node", "c", "1", "3"],
        may: |role, _| role == Role::Custodian,
    },
    Act {
        what: "make and open a disk",
        command: &["sh", "-c", "cd /var/lib/soci-snapshotter-grpc && mknod disk b 254 0 && head -c 1 disk"],
        may: |_, _| false,
    },
    Act {
        what: "make a program set-user-id",
        command: &["sh", "-c", "cd /var/lib/soci-snapshotter-grpc && touch program && chmod 4755 program"],
        may: |role, units| role == Role::Custodian || units == Units::Old,
    },
    Act {
        what: "write to the kernel's log",
        command: &["sh", "-c", "echo probe >/dev/kmsg"],
        // soci-mount sees /dev; what it may open there is up to a cgroup that a container does not have to itself.
        may: |role, _| role == Role::Holder && Path::new("/run/systemd/container").exists(),
    },
    Act { what: "set the clock", command: &["date", "-s", "2001-01-01"], may: |_, _| false },
    Act { what: "look into process 1", command: &["readlink", "/proc/1/exe"], may: |_, _| false },
    Act { what: "use a network interface", command: &["ip", "link", "set", "lo", "mtu", "9000"], may: |_, _| false },
    Act {
        what: "connect to the registry",
        command: &["busybox", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:5000/v2/"],
        may: |role, _| role == Role::Daemon,
    },
];

pub fn main(role: &str) -> ExitCode {
    let Some(role) = ROLES.into_iter().find(|known| known.name() == role) else { return ExitCode::FAILURE };
    let unit = fs::read_to_string("/usr/lib/systemd/system/soci-snapshotter.service").unwrap_or_default();
    let units = if unit.contains("ProtectSystem=strict") { Units::Strict } else { Units::Old };
    let mut wrong = 0;
    for act in ACTS {
        let expected = (act.may)(role, units);
        // Its own standard input: a unit may hide /dev, and with it what would be given instead.
        let done = Command::new(act.command[0]).args(&act.command[1..]).stdin(Stdio::inherit()).output();
        let (works, said) = match done {
            Ok(done) => (done.status.success(), text(&done.stderr)),
            Err(error) => (false, error.to_string()),
        };
        let verdict = if works == expected { "as promised" } else { "WRONG" };
        wrong += u32::from(works != expected);
        eprintln!(
            "{}: {}: {}: {verdict} {}",
            role.name(),
            act.what,
            if works { "works" } else { "refused" },
            said.trim()
        );
    }
    // What an act left behind is not for the next role to trip over.
    for left in ["written", "disk", "node", "program"] {
        let _ = fs::remove_file(Path::new(ROOT).join(left));
    }
    for left in ["/usr/written", "/etc/written", "/var/written", "/root/written"] {
        let _ = fs::remove_file(left);
    }
    let _ = attempt("umount", &["/mnt"]);
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
