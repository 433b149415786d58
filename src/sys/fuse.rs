//! The FUSE device and the one mount that is made with it.
#![forbid(unsafe_code)]

use super::{context, mountinfo};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{CWD, Mode, OFlags, openat},
    mount::{MountFlags, UnmountFlags},
};
use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

const DEVICE: &str = "/dev/fuse";
/// Device number of `/dev/fuse`: misc major, FUSE minor (Documentation/admin-guide/devices.txt).
const DEVICE_NUMBER: (u32, u32) = (10, 229);
/// What `/proc/mounts` calls the mount. The Go snapshotter's name; tests and operators count this string.
pub const FSTYPE: &str = "fuse.rawBridge";
/// The source column of `/proc/mounts`, and the file system's name in `df`.
pub const SOURCE: &str = "soci";
/// Largest READ request. With 256 pages in INIT it is the largest that one request can carry.
pub const MAX_READ: u32 = 1 << 20;

/// Opens a new, not yet mounted connection. Needs access to the device, which a unit with `PrivateDevices=` does not have.
pub fn open_device() -> io::Result<OwnedFd> {
    openat(CWD, DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| context(format_args!("opening {DEVICE}"), e))
}

/// Whether a descriptor somebody sent is one of the FUSE device.
pub fn is_device(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice
            && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == DEVICE_NUMBER
    })
}

/// Whether the connection behind a device is mounted somewhere: neither aborted nor unmounted by its last user.
pub fn is_connected(device: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(device, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    // POLLERR is what the kernel says of a connection that is over (fs/fuse/dev.c, fuse_dev_poll).
    rustix::io::retry_on_intr(|| poll(&mut fds, Some(&now))).is_ok() && !fds[0].revents().contains(PollFlags::ERR)
}

/// Mounts the connection: read-only; set-user-id programs and device nodes of images keep their meaning, so neither `nosuid` nor `nodev`.
///
/// The kernel checks permissions by the attributes it has cached (`default_permissions`), for every user (`allow_other`).
pub fn mount(device: BorrowedFd<'_>, point: &Path) -> io::Result<()> {
    let options = format!(
        "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions,max_read={MAX_READ}",
        device.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let options = CString::new(options).map_err(io::Error::other)?;
    rustix::mount::mount(SOURCE, point, FSTYPE, MountFlags::RDONLY, Some(options.as_c_str()))
        .map_err(|e| context(format_args!("mounting {FSTYPE} on {}", point.display()), e))
}

/// Takes the mount out of the tree at once; it ends when its last user does. Never waits for whoever serves it.
pub fn detach(point: &Path) -> io::Result<()> {
    rustix::mount::unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .map_err(|e| context(format_args!("detaching the mount on {}", point.display()), e))
}

/// Sets how far the kernel reads ahead on the mount. INIT alone cannot raise it above 128 KiB.
pub fn set_read_ahead(point: &Path, kb: u32) -> io::Result<()> {
    let mount = mountinfo::mount_at(point)?
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("nothing is mounted on {}", point.display())))?;
    let knob = format!("/sys/class/bdi/{}/read_ahead_kb", mount.device);
    std::fs::write(&knob, kb.to_string()).map_err(|e| context(format_args!("writing {knob}"), e))
}

/// Reads one request within `patience`.
pub fn read_request(device: BorrowedFd<'_>, buffer: &mut [u8], patience: Duration) -> io::Result<usize> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = [PollFd::from_borrowed_fd(device, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel sent no FUSE request")),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        match rustix::io::read(device, &mut *buffer) {
            // ENOENT: the request was interrupted before we read it; the next one is as good.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT | rustix::io::Errno::AGAIN) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn only_the_fuse_device_passes_for_it() {
        let null = std::fs::File::open("/dev/null").expect("null");
        assert!(!is_device(null.as_fd()));
        if let Ok(device) = open_device() {
            assert!(is_device(device.as_fd()));
        }
    }
}
