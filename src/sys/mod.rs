//! The seam to the kernel: capabilities, seccomp, landlock, sockets that carry descriptors, the FUSE mount.
//!
//! Contract: this is the only module of the package that may say `unsafe` (besides the FFI seam of `inflate`), so everything that must be believed
//! about a raw descriptor or a raw system call is believed here. What it offers is small, typed and safe to call.
//!
//! Nothing is decided by build features: a kernel as old as Amazon Linux 2's lacks some of these calls, so each is tried and its absence is an
//! answer ([`Confinement::Unsupported`]), never a crash.

pub mod beneath;
pub mod capabilities;
pub mod clock;
pub mod fuse;
pub mod landlock;
pub mod map;
pub mod mountinfo;
pub mod process;
pub mod seccomp;
pub mod seqpacket;
pub mod shared;

pub use capabilities::drop_all as drop_all_capabilities;

/// What became of an optional layer of confinement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confinement {
    /// It is in force for this thread and every thread it will start.
    Applied,
    /// This kernel does not have it; nothing changed.
    Unsupported,
}

/// An [`std::io::Error`] that names what was being done, for calls whose errno alone would not tell an operator anything.
pub(crate) fn context(what: impl std::fmt::Display, error: impl Into<std::io::Error>) -> std::io::Error {
    let error = error.into();
    std::io::Error::new(error.kind(), format!("{what}: {error}"))
}
