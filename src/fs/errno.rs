//! The one table from what went wrong to what the application sees.
//!
//! Exhaustive on purpose: a new way to fail does not compile until somebody has decided here.

use super::read::ReadError;
pub use rustix::io::Errno;

/// A refusal that is no failure: the question has this answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No such name in that directory.
    NoEntry,
    /// The node's layer is gone, or never was.
    Stale,
    NotADirectory,
    /// Asked for the target of something that is no symlink, or for the content of what has none.
    NotThatKind,
    /// Nothing here ever changes.
    ReadOnly,
    NoAttribute,
    /// The caller's buffer is too small for the attribute.
    SmallBuffer,
    NoIoctl,
    /// Makes the kernel do without that operation, on the whole connection, for ever.
    DoWithout,
    /// A request the kernel should not have made.
    Malformed,
}

impl From<Refusal> for Errno {
    fn from(refusal: Refusal) -> Errno {
        match refusal {
            Refusal::NoEntry => Errno::NOENT,
            Refusal::Stale => Errno::STALE,
            Refusal::NotADirectory => Errno::NOTDIR,
            Refusal::NotThatKind | Refusal::Malformed => Errno::INVAL,
            Refusal::ReadOnly => Errno::ROFS,
            Refusal::NoAttribute => Errno::NODATA,
            Refusal::SmallBuffer => Errno::RANGE,
            Refusal::NoIoctl => Errno::NOTTY,
            Refusal::DoWithout => Errno::NOSYS,
        }
    }
}

impl From<&ReadError> for Errno {
    fn from(error: &ReadError) -> Errno {
        match error {
            // Bytes that could not be had.
            ReadError::Fetch { .. } | ReadError::Storage { .. } => Errno::IO,
            // Bytes that were had and are wrong: never hand them out.
            ReadError::Digest { .. } | ReadError::Inflate { .. } | ReadError::Header(_) => Errno::IO,
            // The index contradicts the layer.
            ReadError::OutOfRange { .. } | ReadError::Length { .. } | ReadError::Condemned { .. } => Errno::IO,
            ReadError::Panicked => Errno::IO,
            // The reader's process is dying; nobody sees this.
            ReadError::Interrupted => Errno::INTR,
            ReadError::Removed => Errno::STALE,
        }
    }
}
