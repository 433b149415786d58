//! One layer's process: gives up everything but what its task takes, makes the tree, reports, ends.

use super::{Applier, Detail, Order, Place, Stopped, Task, apply, copy, report};
use crate::oci::IdMaps;
use crate::sys::{
    self,
    landlock::{self, Rights},
    process::SingleThread,
    seccomp, seqpacket,
};
use caps::{CapSet, Capability};
use rustix::process::{Pid, Resource, Rlimit};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
};

/// Descriptors: the pipe, the report, the directories that `directories` keeps open, and a few in passing.
const DESCRIPTORS: u64 = 128;
/// Address space: the program itself and what `directories` may hold, several times over.
const ADDRESS_SPACE: u64 = 1 << 30;

/// The descriptors that come with an order.
pub struct Given {
    /// The tar, or the directory to be copied.
    source: OwnedFd,
    work: OwnedFd,
    report: OwnedFd,
    mappings: Option<OwnedFd>,
}

impl Given {
    /// `None` if they are not those of the order.
    pub fn new(order: &Order, fds: Vec<OwnedFd>) -> Option<Given> {
        match order.task {
            Task::Unpack(_) => {
                let [source, work, report] = fds.try_into().ok()?;
                Some(Given { source, work, report, mappings: None })
            }
            Task::Copy => {
                let [source, work, report, mappings] = fds.try_into().ok()?;
                Some(Given { source, work, report, mappings: Some(mappings) })
            }
        }
    }
}

/// Does all of it. Returns when the report is sent, or there is nobody left to get it.
pub fn work(order: &Order, given: Given, spawner: Pid, alone: &SingleThread) {
    let ended = match confine(order, &given, spawner, alone) {
        Ok(()) => make(order, given.source, given.work, given.mappings),
        Err(error) => Err(failed(
            error.raw_os_error().unwrap_or(rustix::io::Errno::IO.raw_os_error()),
            &format!("confining the worker: {error}"),
        )),
    };
    // Whoever asked may be gone.
    let _ = seqpacket::send(given.report.as_fd(), &report::encode(&ended), seqpacket::Send::Wait);
}

fn failed(errno: i32, detail: &str) -> Stopped {
    Stopped::Failed { errno, detail: Detail::new(detail.as_bytes()) }
}

fn make(order: &Order, source: OwnedFd, work: OwnedFd, mappings: Option<OwnedFd>) -> report::Report {
    let (place, maps) = match (order.task, mappings) {
        (Task::Unpack(place), _) => (place, None),
        (Task::Copy, mappings) => {
            let mut text = String::new();
            let read = mappings.map(|file| File::from(file).take(Task::MAPPINGS).read_to_string(&mut text));
            let invalid = |error: String| failed(rustix::io::Errno::INVAL.raw_os_error(), &error);
            match read {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(invalid(format!("reading the id mappings: {error}"))),
                None => return Err(invalid("no id mappings".to_owned())),
            }
            // Whiteouts mean what they mean where the original is.
            (Place::Above, Some(text.parse::<IdMaps>().map_err(|e| invalid(e.to_string()))?))
        }
    };
    let applier =
        Applier::new(work, place, order.budget).map_err(|e| failed(e.raw_os_error(), "opening the directory"))?;
    match maps {
        None => apply::unpack(source.as_fd(), applier),
        Some(maps) => copy::copy(source, &maps, applier),
    }
}

/// From most to least power: each step needs what the next one takes away.
fn confine(order: &Order, given: &Given, spawner: Pid, alone: &SingleThread) -> io::Result<()> {
    rustix::thread::set_name(c"soci-unpack")?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    if rustix::process::getppid() != Some(spawner) {
        return Err(io::Error::other("the spawner has died"));
    }
    // Whoever holds the other end of the report can end this process by closing it, whatever this process is doing then.
    sys::process::die_with(given.report.as_fd())?;
    rustix::process::fchdir(&given.work)?;
    rustix::process::chroot(".")?;
    if !order.old_kernel {
        let readable = match order.task {
            Task::Unpack(_) => None,
            Task::Copy => Some((given.source.as_fd(), Rights::Read)),
        };
        landlock::confine_to([(given.work.as_fd(), Rights::Create)].into_iter().chain(readable), alone)?;
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
    let role = match order.task {
        Task::Unpack(_) => seccomp::Role::Worker,
        Task::Copy => seccomp::Role::Copier,
    };
    seccomp::confine(role, alone)?;
    Ok(())
}
