//! The process that forks workers and does nothing else.
//!
//! The custodian has threads and only three capabilities, so it can neither fork safely nor give a worker what it needs. This process is forked from
//! the custodian while that has one thread and all its capabilities; it keeps those that workers need, and for every order it receives over its
//! socket it forks a worker, which goes on to confine itself. It parses nothing but orders, and ends when the custodian does; its workers end with it.
//!
//! ```text
//! order    task u8 | old kernel u8 | zero [u8; 6] | bytes u64 | inodes u64       24 bytes, little endian; descriptors: source, work, report, and
//!                                                                                for a copy the id mappings
//! ```

use super::{Budget, Place, worker};
use crate::sys::{
    self,
    process::{Forked, SingleThread},
    seqpacket,
};
use caps::Capability;
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What workers need: owners, other people's directories, modes and times, set-ID bits, devices, file capabilities, `trusted.overlay.opaque`. And, only
/// until a worker has confined itself, the right to choose its root directory.
const CAPABILITIES: [Capability; 8] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_CHROOT,
];

/// What a worker makes a tree out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// A tar that comes through a pipe.
    Unpack(Place),
    /// A directory; its owners are translated by id mappings that are read from a file of at most [`Task::MAPPINGS`] bytes.
    Copy,
}

impl Task {
    /// Twice 340 ranges of three numbers.
    pub const MAPPINGS: u64 = 32 << 10;

    fn code(self) -> u8 {
        match self {
            Task::Unpack(Place::Bottom) => 0,
            Task::Unpack(Place::Above) => 1,
            Task::Copy => 2,
        }
    }

    fn from_code(code: u8) -> Option<Task> {
        [Task::Unpack(Place::Bottom), Task::Unpack(Place::Above), Task::Copy].into_iter().find(|t| t.code() == code)
    }
}

/// What one worker is to do, beside its descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    pub task: Task,
    pub budget: Budget,
    /// Behave as on a kernel without landlock.
    pub old_kernel: bool,
}

impl Order {
    const LEN: usize = 24;

    fn encode(&self) -> [u8; Order::LEN] {
        let mut out = [0; Order::LEN];
        out[0] = self.task.code();
        out[1] = u8::from(self.old_kernel);
        out[8..16].copy_from_slice(&self.budget.bytes.to_le_bytes());
        out[16..24].copy_from_slice(&self.budget.inodes.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Option<Order> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let order = Order {
            task: Task::from_code(*bytes.first()?)?,
            budget: Budget { bytes: word(8)?, inodes: word(16)? },
            old_kernel: *bytes.get(1)? != 0,
        };
        (order.encode()[..] == *bytes).then_some(order)
    }
}

/// The custodian's end.
#[derive(Debug)]
pub struct Spawner {
    socket: OwnedFd,
}

impl Spawner {
    /// Forks the spawner. `leave_behind` is what the new process must not keep of this one.
    pub fn start<T>(alone: &SingleThread, leave_behind: T) -> io::Result<(Spawner, T)> {
        let (ours, theirs) = seqpacket::pair()?;
        match sys::process::fork(alone)? {
            Forked::Parent => Ok((Spawner { socket: ours }, leave_behind)),
            Forked::Child => {
                drop((ours, leave_behind));
                let code = match std::panic::catch_unwind(|| serve(theirs, alone)) {
                    Ok(Ok(())) => 0,
                    Ok(Err(error)) => {
                        sys::process::complain("soci-spawner", error);
                        1
                    }
                    Err(_) => 1,
                };
                sys::process::exit_now(code)
            }
        }
    }

    /// Starts a worker. It says how it ended over `report`, as one [`super::report`]; if it closes without, the worker died.
    pub fn order(
        &self,
        order: &Order,
        source: BorrowedFd<'_>,
        work: BorrowedFd<'_>,
        report: BorrowedFd<'_>,
        mappings: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = [source, work, report].into_iter().chain(mappings).collect();
        seqpacket::send_with_fds(self.socket.as_fd(), &order.encode(), &fds, seqpacket::Send::Wait)
    }
}

fn serve(socket: OwnedFd, alone: &SingleThread) -> io::Result<()> {
    rustix::thread::set_name(c"soci-spawner")?;
    // In a custodian that the daemon started, standard input is the daemon's socket. Not /dev/null instead: a unit may hide /dev.
    nix::unistd::dup2_stdin(io::pipe()?.0)?;
    sys::process::close_all_but(socket.as_fd(), alone)?;
    rustix::process::umask(rustix::fs::Mode::empty());
    sys::process::forget_children()?;
    sys::capabilities::keep_only(&CAPABILITIES)?;
    sys::seccomp::confine(sys::seccomp::Role::Spawner, alone)?;
    let own = rustix::process::getpid();
    let mut buffer = [0; Order::LEN + 1];
    loop {
        let (received, fds) = seqpacket::recv_with_fds(socket.as_fd(), &mut buffer)?;
        if received == 0 {
            return Ok(());
        }
        let no_order = || io::Error::other("the custodian sent something that is no order");
        let order = Order::decode(&buffer[..received]).ok_or_else(no_order)?;
        let given = worker::Given::new(&order, fds).ok_or_else(no_order)?;
        match sys::process::fork(alone) {
            Ok(Forked::Parent) => {}
            Ok(Forked::Child) => {
                drop(socket);
                let ended = std::panic::catch_unwind(|| worker::work(&order, given, own, alone));
                sys::process::exit_now(i32::from(ended.is_err()))
            }
            // The report closes unsaid; the custodian takes the worker for dead and says so.
            Err(error) => sys::process::complain("soci-spawner", format_args!("forking a worker: {error}")),
        }
    }
}
