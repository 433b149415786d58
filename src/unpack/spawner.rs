//! The process that forks workers and does nothing else.
//!
//! The custodian has threads and only three capabilities, so it can neither fork safely nor give a worker what it needs. This process is forked from
//! the custodian while that has one thread and all its capabilities; it keeps those that workers need, and for every order it receives over its
//! socket it forks a worker, which goes on to confine itself. It parses nothing but orders, and ends when the custodian does; its workers end with it.
//!
//! ```text
//! order    place u8 | old kernel u8 | zero [u8; 6] | bytes u64 | inodes u64      24 bytes, little endian; descriptors: tar, work, report
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

/// What one worker is to do, beside its descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    pub place: Place,
    pub budget: Budget,
    /// Behave as on a kernel without openat2 and landlock.
    pub old_kernel: bool,
}

impl Order {
    const LEN: usize = 24;

    fn encode(&self) -> [u8; Order::LEN] {
        let mut out = [0; Order::LEN];
        out[0] = u8::from(self.place == Place::Above);
        out[1] = u8::from(self.old_kernel);
        out[8..16].copy_from_slice(&self.budget.bytes.to_le_bytes());
        out[16..24].copy_from_slice(&self.budget.inodes.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Option<Order> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let order = Order {
            place: if *bytes.first()? == 0 { Place::Bottom } else { Place::Above },
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
        tar: BorrowedFd<'_>,
        work: BorrowedFd<'_>,
        report: BorrowedFd<'_>,
    ) -> io::Result<()> {
        seqpacket::send_with_fds(self.socket.as_fd(), &order.encode(), &[tar, work, report], seqpacket::Send::Wait)
    }
}

fn serve(socket: OwnedFd, alone: &SingleThread) -> io::Result<()> {
    rustix::thread::set_name(c"soci-spawner")?;
    // In a custodian that the daemon started, standard input is the daemon's socket.
    nix::unistd::dup2_stdin(std::fs::File::open("/dev/null")?)?;
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
        let (Some(order), Ok([tar, work, report])) =
            (Order::decode(&buffer[..received]), <[OwnedFd; 3]>::try_from(fds))
        else {
            return Err(io::Error::other("the custodian sent something that is no order"));
        };
        match sys::process::fork(alone) {
            Ok(Forked::Parent) => {}
            Ok(Forked::Child) => {
                drop(socket);
                let ended = std::panic::catch_unwind(|| worker::work(&order, tar, work, report, own, alone));
                sys::process::exit_now(i32::from(ended.is_err()))
            }
            // The report closes unsaid; the custodian takes the worker for dead and says so.
            Err(error) => sys::process::complain("soci-spawner", format_args!("forking a worker: {error}")),
        }
    }
}
