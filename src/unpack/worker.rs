//! One layer's process: gives up everything but what unpacking takes, unpacks, reports, ends.

use super::{Applier, Detail, Order, Stopped, apply, report};
use crate::sys::{
    self,
    landlock::{self, Rights},
    process::SingleThread,
    seccomp, seqpacket,
};
use caps::{CapSet, Capability};
use rustix::process::{Pid, Resource, Rlimit};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Descriptors: the pipe, the report, the directories that `directories` keeps open, and a few in passing.
const DESCRIPTORS: u64 = 128;
/// Address space: the program itself and what `directories` may hold, several times over.
const ADDRESS_SPACE: u64 = 1 << 30;

/// Does all of it. Returns when the report is sent, or there is nobody left to get it.
pub fn work(order: &Order, tar: OwnedFd, work: OwnedFd, report: OwnedFd, spawner: Pid, alone: &SingleThread) {
    let ended = match confine(order, work.as_fd(), report.as_fd(), spawner, alone) {
        Ok(()) => unpack(order, tar.as_fd(), work),
        Err(error) => Err(Stopped::Failed {
            errno: error.raw_os_error().unwrap_or(rustix::io::Errno::IO.raw_os_error()),
            detail: Detail::new(format!("confining the worker: {error}").as_bytes()),
        }),
    };
    // Whoever asked may be gone.
    let _ = seqpacket::send(report.as_fd(), &report::encode(&ended), seqpacket::Send::Wait);
}

fn unpack(order: &Order, tar: BorrowedFd<'_>, work: OwnedFd) -> report::Report {
    let applier = Applier::new(work, order.place, order.budget, order.old_kernel)
        .map_err(|e| Stopped::Failed { errno: e.raw_os_error(), detail: Detail::new(b"opening the directory") })?;
    apply::unpack(tar, applier)
}

/// From most to least power: each step needs what the next one takes away.
fn confine(
    order: &Order,
    work: BorrowedFd<'_>,
    report: BorrowedFd<'_>,
    spawner: Pid,
    alone: &SingleThread,
) -> io::Result<()> {
    rustix::thread::set_name(c"soci-unpack")?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    if rustix::process::getppid() != Some(spawner) {
        return Err(io::Error::other("the spawner has died"));
    }
    // Whoever holds the other end of the report can end this process by closing it, whatever this process is doing then.
    sys::process::die_with(report)?;
    rustix::process::fchdir(work)?;
    rustix::process::chroot(".")?;
    if !order.old_kernel {
        landlock::confine_to(work, Rights::Create, alone)?;
    }
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::drop(None, set, Capability::CAP_SYS_CHROOT).map_err(io::Error::other)?;
    }
    let limits = [
        (Resource::Nofile, DESCRIPTORS),
        (Resource::As, ADDRESS_SPACE),
        (Resource::Core, 0),
        // The list of implied directories is a file too.
        (Resource::Fsize, order.budget.bytes.max(64 << 20)),
    ];
    for (resource, limit) in limits {
        rustix::process::setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })?;
    }
    seccomp::confine(seccomp::Role::Worker, alone)?;
    Ok(())
}
