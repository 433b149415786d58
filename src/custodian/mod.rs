//! `soci-custodian`: the only process that may touch files it does not own, and all it does with that.
//!
//! The daemon has no capabilities, so it can neither remove nor measure a container's 0700 directories, nor give a new directory to another user.
//! It asks the custodian, which has CAP_CHOWN, CAP_DAC_OVERRIDE and CAP_FOWNER and nothing else: no network, no other directory than
//! `<root>/snapshotter/snapshots` (landlock where the kernel has it, and descriptors opened beneath it everywhere), no system call it does not need.
//!
//! Invariants:
//! * A request names a snapshot by number ([`protocol::Request`]); no byte of it ever becomes a path component other than that number in decimal.
//! * No symlink is followed and no mount is entered, whatever is in the tree and however it changes meanwhile ([`tree`]).
//! * Memory does not grow with the depth or width of a tree, except by one entry per hard-linked file while measuring.
//! * Every message gets one reply; bytes that are no request get an error reply.
//!
//! ```text
//!   daemon: Client ──SEQPACKET── 4 threads per connection: recv → decode → act on a directory descriptor → reply with the request's tag
//!                                  └ a thread per layer that is unpacked ──▶ spawner ──fork──▶ worker: pipe ▶ <id>/unpack ▶ report
//! ```
//!
//! Unpacking is not done here but in a worker process per layer ([`crate::unpack`]), which has more capabilities than the custodian and can reach less:
//! a process that does nothing but fork workers is forked off before the custodian gives its capabilities up.
#![forbid(unsafe_code)]

mod client;
mod implied;
mod private;
pub mod protocol;
mod server;
mod tree;

pub use crate::unpack::{Budget, Place, Refusal};
pub use client::{Client, Connection, Lower, UnpackError, start};
pub use implied::{DirectoryAttributes, Found};
pub use protocol::Usage;

use crate::{
    layout::Layout,
    sys::{self, Confinement, landlock},
    unpack::spawner::Spawner,
};
use caps::Capability;
use clap::Parser;
use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::PathBuf,
    process::ExitCode,
};

/// Why each: giving away a new upper directory; reading and emptying foreign directories; deleting foreign files from sticky ones.
const CAPABILITIES: [Capability; 3] = [Capability::CAP_CHOWN, Capability::CAP_DAC_OVERRIDE, Capability::CAP_FOWNER];

/// Removes, measures and assigns snapshot directories for a daemon that has no capabilities.
#[derive(Debug, Parser)]
#[command(name = "soci-custodian", version)]
struct Args {
    /// The daemon's --root.
    #[arg(long, default_value = crate::layout::DEFAULT_ROOT)]
    root: PathBuf,
    /// Serve the socket on standard input until the other end closes it, instead of the listening socket that systemd passes.
    #[arg(long)]
    stdin: bool,
    /// Go without openat2 and landlock, as on kernels that have neither. For tests.
    #[arg(long, hide = true)]
    as_on_an_old_kernel: bool,
}

/// Everything `src/bin/soci-custodian.rs` does.
pub fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error);
            ExitCode::FAILURE
        }
    }
}

enum Service {
    One(OwnedFd),
    /// Whoever connects; and whom to tell that we are ready. Confined, we could not open a socket for that any more.
    Every(OwnedFd, Option<OwnedFd>),
}

fn run(args: &Args) -> io::Result<()> {
    let service = receive_socket(args)?;
    let layout = Layout::new(&args.root);
    // The daemon may not have made it yet.
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(layout.snapshots())?;
    // Needs CAP_SYS_ADMIN, which systemd's unit does not grant: there PrivateNetwork= has done it already.
    if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        tracing::debug!(%error, "keeping the network namespace we were started in");
    }
    std::env::set_current_dir("/")?;
    // Proved now, as landlock is about to hide /proc.
    let alone = sys::process::SingleThread::prove()?;
    let (spawner, service) = Spawner::start(&alone, service)?;
    let snapshots = tree::Snapshots::open(&layout.snapshots(), args.as_on_an_old_kernel)?;
    let swept = snapshots.sweep()?;
    if swept > 0 {
        complain(format_args!("removed what was left of {swept} layers whose unpacking was interrupted"));
    }
    let landlock = confine(&snapshots, args, &alone)?;
    if snapshots.opener() != tree::Opener::Kernel || landlock == Confinement::Unsupported {
        complain(
            "this kernel lacks openat2 (Linux 5.6) or landlock (5.19): names are resolved one component at a time, and what unpacks is confined by chroot and seccomp alone",
        );
    }
    let server = server::Server::new(snapshots, spawner, args.as_on_an_old_kernel);
    match service {
        Service::One(socket) => server.serve_one(socket),
        Service::Every(listener, manager) => {
            if let Some(manager) = manager
                && let Err(error) = sys::seqpacket::send(manager.as_fd(), b"READY=1", sys::seqpacket::Send::Wait)
            {
                complain(format_args!("telling systemd that we are ready: {error}"));
            }
            server.serve_every(listener.as_fd())
        }
    }
}

fn receive_socket(args: &Args) -> io::Result<Service> {
    if args.stdin {
        return Ok(Service::One(io::stdin().as_fd().try_clone_to_owned()?));
    }
    let mut sockets = sys::process::inherited_descriptors()?;
    match (sockets.pop(), sockets.len()) {
        (Some(listener), 0) => Ok(Service::Every(listener, sys::process::notify_socket()?)),
        (Some(_), more) => Err(io::Error::other(format!("systemd passed {} sockets; expected one", more + 1))),
        (None, _) => Err(io::Error::other("no socket: start with --stdin, or by its systemd socket unit")),
    }
}

fn complain(message: impl std::fmt::Display) {
    sys::process::complain("soci-custodian", message);
}

/// From most to least power: each step needs what the next one takes away. Whether landlock is in force.
fn confine(snapshots: &tree::Snapshots, args: &Args, alone: &sys::process::SingleThread) -> io::Result<Confinement> {
    sys::capabilities::keep_only(&CAPABILITIES)?;
    let landlock = match args.as_on_an_old_kernel {
        true => Confinement::Unsupported,
        false => landlock::confine_to([(snapshots.directory(), landlock::Rights::TakeAway)], alone)?,
    };
    sys::seccomp::confine(sys::seccomp::Role::Custodian, alone)?;
    Ok(landlock)
}
