//! The FUSE ABI: bytes of `/dev/fuse` to [`Request`]s, and answers to bytes.
//!
//! Pure. Parsing is total: whatever the bytes are, the outcome is a request (maybe [`Operation::Malformed`], which still can
//! be answered) or, where not even the header is there, an error. Only what a read-only filesystem meets is spelled out;
//! everything that would change something is one variant.
//!
//! Absent on purpose: file handles. Nothing is opened here (`OPEN` is answered with `ENOSYS`), so they are always 0.

mod abi;
mod init;
mod reply;
#[cfg(test)]
mod tests;

pub use abi::{Attr, EntryOut, InHeader, OutHeader, StatfsOut};
pub use init::{InitParams, Resend, answer_init};
pub use reply::{
    DirBuffer, Notification, Reply, Ttl, error_reply, node_changed_notification, ok_reply, resend_notification,
    root_changed_notification,
};

use abi::{InterruptIn, ReadIn, XattrSize, opcode};
use zerocopy::FromBytes;

/// Bytes that are no FUSE request, or one that this product cannot serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("a FUSE request of {0} bytes is shorter than its header says")]
    Short(usize),
    #[error("the first FUSE request is opcode {0}, not INIT")]
    NotInit(u32),
    #[error(
        "the kernel speaks FUSE {major}.{minor}; at least {}.{} is needed",
        abi::FUSE_MAJOR,
        abi::FUSE_MINOR_OLDEST
    )]
    Version { major: u32, minor: u32 },
}

/// One request of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// Names the request; to be repeated as it is. See [`Request::was_taken_before`].
    pub unique: u64,
    pub node: u64,
    /// The thread that asks, as `soci-mount`'s PID namespace sees it; 0 if it cannot.
    pub pid: u32,
    pub operation: Operation<'a>,
}

/// Whether a listing carries attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    Names,
    Plus,
}

/// What the kernel asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    Lookup {
        name: &'a [u8],
    },
    Getattr,
    Readlink,
    Read {
        offset: u64,
        size: u32,
    },
    Readdir {
        offset: u64,
        size: u32,
        listing: Listing,
    },
    Getxattr {
        name: &'a [u8],
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Statfs,
    Interrupt {
        unique: u64,
    },
    /// OPEN: answered with ENOSYS once, and never asked again.
    Open,
    /// Others that the kernel does without when told so: OPENDIR, FLUSH, FSYNC, ACCESS, LSEEK, STATX, and unknown ones.
    Optional,
    /// RELEASE, RELEASEDIR, DESTROY: nothing to do, but an answer is due.
    Acknowledge,
    /// FORGET, BATCH_FORGET, NOTIFY_REPLY: an answer would be a mistake.
    Silent,
    Ioctl,
    /// Anything that would change the filesystem.
    Mutation,
    /// A second INIT, or a body that is too short for its opcode.
    Malformed,
}

impl<'a> Request<'a> {
    /// Reads the request in `bytes`, which is what one `read(2)` of the device returned.
    pub fn parse(bytes: &'a [u8]) -> Result<Request<'a>, WireError> {
        let (header, body) = split::<InHeader>(bytes).ok_or(WireError::Short(bytes.len()))?;
        if header.len as usize != bytes.len() {
            return Err(WireError::Short(bytes.len()));
        }
        // Extensions (security contexts, groups) follow the arguments, at the end.
        let extensions = usize::from(header.total_extlen) * 8;
        let operation = body
            .len()
            .checked_sub(extensions)
            .and_then(|len| Operation::parse(header.opcode, &body[..len]))
            .unwrap_or(Operation::Malformed);
        Ok(Request { unique: header.unique, node: header.nodeid, pid: header.pid, operation })
    }

    /// Whether the kernel says that an earlier reader of the device did not answer it (`FUSE_UNIQUE_RESEND`).
    pub fn was_taken_before(&self) -> bool {
        self.unique >> 63 == 1
    }
}

impl<'a> Operation<'a> {
    fn parse(code: u32, body: &'a [u8]) -> Option<Operation<'a>> {
        Some(match code {
            opcode::LOOKUP => Operation::Lookup { name: name(body)? },
            opcode::GETATTR => Operation::Getattr,
            opcode::READLINK => Operation::Readlink,
            opcode::READ => {
                let (ReadIn { offset, size, .. }, _) = split(body)?;
                Operation::Read { offset, size }
            }
            opcode::READDIR | opcode::READDIRPLUS => {
                let (ReadIn { offset, size, .. }, _) = split(body)?;
                let listing = if code == opcode::READDIR { Listing::Names } else { Listing::Plus };
                Operation::Readdir { offset, size, listing }
            }
            opcode::GETXATTR => {
                let (XattrSize { size, .. }, rest) = split(body)?;
                Operation::Getxattr { name: name(rest)?, size }
            }
            opcode::LISTXATTR => {
                let (XattrSize { size, .. }, _) = split(body)?;
                Operation::Listxattr { size }
            }
            opcode::STATFS => Operation::Statfs,
            opcode::INTERRUPT => {
                let (InterruptIn { unique }, _) = split(body)?;
                Operation::Interrupt { unique }
            }
            opcode::OPEN => Operation::Open,
            opcode::OPENDIR | opcode::FLUSH | opcode::ACCESS | opcode::LSEEK | opcode::STATX => Operation::Optional,
            // fsync(2) of a file that cannot have changed succeeds, as it does on a lower file of an overlay.
            opcode::FSYNC | opcode::FSYNCDIR => Operation::Optional,
            opcode::RELEASE | opcode::RELEASEDIR | opcode::DESTROY => Operation::Acknowledge,
            opcode::FORGET | opcode::BATCH_FORGET | opcode::NOTIFY_REPLY => Operation::Silent,
            opcode::IOCTL => Operation::Ioctl,
            opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::TMPFILE
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE => Operation::Mutation,
            opcode::INIT => return None,
            _ => Operation::Optional,
        })
    }
}

/// A struct at the start of `bytes`, copied out (the buffer need not be aligned), and what follows.
fn split<T: FromBytes>(bytes: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(bytes).ok()
}

/// A NUL-terminated name.
fn name(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    (end > 0).then(|| &bytes[..end])
}
