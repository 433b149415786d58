//! Opening a child directory without being led elsewhere.
#![forbid(unsafe_code)]

use rustix::{
    fd::{BorrowedFd, OwnedFd},
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::ffi::CStr;

/// Open to be listed and to be the base of `*at` calls.
pub fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

/// The directory `name` in `directory`, as openat2 (Linux 5.6) opens it: ELOOP or ENOTDIR if it is something else, EXDEV if something is mounted on
/// it, ENOSYS (or EPERM, from a container's seccomp profile that is older than the call) if this kernel cannot.
pub fn open(directory: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let beneath =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    loop {
        // EAGAIN: something was renamed meanwhile and the kernel could not be sure.
        match rustix::fs::openat2(directory, name, directory_flags(), Mode::empty(), beneath) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// The same by openat, for kernels without openat2. `name` must be one component that is not `..`; mounts are the caller's business.
pub fn open_nofollow(directory: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(directory, name, directory_flags(), Mode::empty())
}
