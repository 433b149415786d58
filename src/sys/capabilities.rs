//! Giving capabilities up, for good, and proving it.
//!
//! Capabilities belong to threads. A thread that is started later inherits from the one that starts it, so both functions here insist on being
//! called while the process has exactly one thread: whatever runs afterwards, runs without.
//!
//! Invariant: `Ok` means that the five rows of `/proc/thread-self/status` were read back and say what was asked for. `no_new_privs` and the locked
//! securebits make it final: neither an executable's file capabilities nor being uid 0 brings anything back.

use super::context;
use caps::{CapSet, Capability, CapsHashSet};
use nix::libc;
use std::io;

/// Drops every capability of the process: effective, permitted, inheritable, ambient and bounding are 0 afterwards, and `no_new_privs` is set.
pub fn drop_all() -> io::Result<()> {
    keep_only(&[])
}

/// Drops every capability but `kept`, which the process must have.
pub fn keep_only(kept: &[Capability]) -> io::Result<()> {
    super::process::SingleThread::prove()?;
    let mask = kept.iter().fold(0u64, |mask, capability| mask | capability.bitmask());
    let before = Rows::read()?;
    if before.permitted & mask != mask {
        let missing: Vec<String> =
            kept.iter().filter(|c| before.permitted & c.bitmask() == 0).map(|c| c.to_string()).collect();
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the process was started without {}", missing.join(", ")),
        ));
    }
    // The bounding set and the securebits need CAP_SETPCAP, so they come first. A process that has nothing to lose may lack it.
    if before.bounding & !mask != 0 {
        drop_bounding(mask)?;
    }
    if before.effective & Capability::CAP_SETPCAP.bitmask() != 0 {
        lock_securebits()?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|e| context("setting no_new_privs", e))?;
    let set: CapsHashSet = kept.iter().copied().collect();
    let change = |which: CapSet, set: &CapsHashSet| {
        caps::set(None, which, set).map_err(|e| io::Error::other(format!("changing the {which:?} set: {e}")))
    };
    if before.ambient != 0 {
        caps::clear(None, CapSet::Ambient).map_err(|e| io::Error::other(format!("clearing the ambient set: {e}")))?;
    }
    // Only what is not so already: a process that has nothing may also be forbidden to call capset.
    if before.inheritable != 0 {
        change(CapSet::Inheritable, &CapsHashSet::new())?;
    }
    if before.effective != mask {
        change(CapSet::Effective, &set)?;
    }
    if before.permitted != mask {
        change(CapSet::Permitted, &set)?;
    }

    let after = Rows::read()?;
    let wanted =
        Rows { inheritable: 0, permitted: mask, effective: mask, bounding: mask, ambient: 0, no_new_privs: true };
    if after != wanted {
        return Err(io::Error::other(format!("capabilities are {after:x?} after dropping, instead of {wanted:x?}")));
    }
    Ok(())
}

/// Whether this thread may mount.
pub fn may_mount() -> io::Result<bool> {
    Ok(Rows::read()?.effective & Capability::CAP_SYS_ADMIN.bitmask() != 0)
}

/// Empties the bounding set but for `kept`, by number: a kernel may know capabilities that no crate has heard of yet.
fn drop_bounding(kept: u64) -> io::Result<()> {
    for number in 0..64u32 {
        // SAFETY: PR_CAPBSET_READ and PR_CAPBSET_DROP take a number by value and touch no memory of ours.
        let present = unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(number), 0, 0, 0) };
        if present < 0 {
            return Ok(()); // EINVAL: one past the last capability this kernel has
        }
        if present == 0 || kept & (1 << number) != 0 {
            continue;
        }
        // SAFETY: as above.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        if dropped != 0 {
            return Err(context(
                format_args!("dropping capability {number} from the bounding set"),
                io::Error::last_os_error(),
            ));
        }
    }
    Ok(())
}

/// From here on uid 0 is a number like any other: exec by root grants nothing, setuid changes nothing, and neither can be undone.
fn lock_securebits() -> io::Result<()> {
    use rustix::thread::CapabilitiesSecureBits as Bits;
    let bits = Bits::NO_ROOT
        | Bits::NO_ROOT_LOCKED
        | Bits::NO_SETUID_FIXUP
        | Bits::NO_SETUID_FIXUP_LOCKED
        | Bits::KEEP_CAPS_LOCKED
        | Bits::NO_CAP_AMBIENT_RAISE
        | Bits::NO_CAP_AMBIENT_RAISE_LOCKED;
    rustix::thread::set_capabilities_secure_bits(bits).map_err(|e| context("locking the securebits", e))
}

/// The capability rows of a thread, as the kernel reports them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    pub no_new_privs: bool,
}

impl Rows {
    /// Of the calling thread.
    pub fn read() -> io::Result<Rows> {
        let status = std::fs::read_to_string("/proc/thread-self/status")
            .map_err(|e| context("reading /proc/thread-self/status", e))?;
        Rows::parse(&status).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "/proc/thread-self/status has no capability rows")
        })
    }

    /// From the text of a `status` file; `None` if a row is missing or is not a number.
    pub fn parse(status: &str) -> Option<Rows> {
        let row = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim).map(str::to_owned)
        };
        let mask = |name: &str| u64::from_str_radix(&row(name)?, 16).ok();
        Some(Rows {
            inheritable: mask("CapInh")?,
            permitted: mask("CapPrm")?,
            effective: mask("CapEff")?,
            bounding: mask("CapBnd")?,
            ambient: mask("CapAmb")?,
            // The row exists since Linux 4.10.
            no_new_privs: row("NoNewPrivs")? == "1",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_is_refused_while_another_thread_runs() {
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        let refused = drop_all().expect_err("a second thread would keep its capabilities");
        assert!(refused.to_string().contains("threads"), "{refused}");
        drop(stop);
        assert!(other.join().is_ok());
    }

    #[test]
    fn rows_are_read_from_a_status_file() {
        let text = "Name:\tx\nCapInh:\t0\nCapPrm:\tf\nCapEff:\t3\nCapBnd:\t000001ff\nCapAmb:\t0\nNoNewPrivs:\t1\n";
        let rows = Rows::parse(text).expect("complete");
        assert_eq!((rows.permitted, rows.effective, rows.bounding, rows.no_new_privs), (0xf, 3, 0x1ff, true));
        assert_eq!(Rows::parse("CapInh:\t0\n"), None);
    }
}
