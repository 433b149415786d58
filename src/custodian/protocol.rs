//! What the daemon may ask, and what it hears back: fixed sizes, and a decoder for which every byte string is a request or an error.
//!
//! ```text
//! request  version u8 | operation u8 | zero u16 | snapshot u32 | uid u32 | gid u32 | tag u64        24 bytes, little endian
//! reply    version u8 | status u8    | zero u16 | errno    u32 | tag u64 | size u64 | inodes u64    32 bytes, little endian
//! ```
//! Fields that an operation does not use are zero, and anything else there is refused: two encodings of one request would be one too many.
#![forbid(unsafe_code)]

use crate::layout::SnapshotId;
use std::io;

/// Both ends are installed together; this catches a daemon that talks to the custodian of another release.
const VERSION: u8 = 1;
/// chown(2) reads this number as "leave it", so it can be nobody's id.
const NO_ID: u32 = u32::MAX;

/// What a directory tree takes up: blocks, counted once per inode however many names it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes of disk.
    pub size: u64,
    pub inodes: u64,
}

/// One thing the custodian does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Are you there, and do we speak the same version?
    Hello,
    /// Remove the snapshot's directory and everything in it. A directory that does not exist is removed already.
    Remove { id: SnapshotId },
    /// Measure the snapshot's `fs`.
    Usage { id: SnapshotId },
    /// Give the snapshot's `fs` directory (only itself) to `uid`:`gid`.
    OwnUpper { id: SnapshotId, uid: u32, gid: u32 },
}

/// An operation, and the number its reply will carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub tag: u64,
    pub operation: Operation,
}

/// Bytes that are no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a message of {0} bytes instead of {len}", len = Request::LEN)]
    Length(usize),
    #[error("protocol version {0} instead of {VERSION}")]
    Version(u8),
    #[error("unknown operation {0}")]
    Operation(u8),
    #[error("a field that the operation does not use is not zero")]
    Surplus,
    #[error("4294967295 is not a user or group")]
    NoSuchId,
}

impl Request {
    pub const LEN: usize = 24;

    pub fn encode(&self) -> [u8; Request::LEN] {
        let (operation, id, uid, gid) = match self.operation {
            Operation::Hello => (0, 0, 0, 0),
            Operation::Remove { id } => (1, id.0, 0, 0),
            Operation::Usage { id } => (2, id.0, 0, 0),
            Operation::OwnUpper { id, uid, gid } => (3, id.0, uid, gid),
        };
        let mut out = [0; Request::LEN];
        out[0] = VERSION;
        out[1] = operation;
        out[4..8].copy_from_slice(&u32::to_le_bytes(id));
        out[8..12].copy_from_slice(&u32::to_le_bytes(uid));
        out[12..16].copy_from_slice(&u32::to_le_bytes(gid));
        out[16..24].copy_from_slice(&self.tag.to_le_bytes());
        out
    }

    /// Total: never panics, and `decode(x).encode() == x` whenever it succeeds.
    pub fn decode(bytes: &[u8]) -> Result<Request, Malformed> {
        let bytes: &[u8; Request::LEN] = bytes.try_into().map_err(|_| Malformed::Length(bytes.len()))?;
        let [version, operation, zero @ .., t0, t1, t2, t3, t4, t5, t6, t7] = *bytes;
        let [z0, z1, i0, i1, i2, i3, u0, u1, u2, u3, g0, g1, g2, g3] = zero;
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        let id = SnapshotId(u32::from_le_bytes([i0, i1, i2, i3]));
        let (uid, gid) = (u32::from_le_bytes([u0, u1, u2, u3]), u32::from_le_bytes([g0, g1, g2, g3]));
        let tag = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
        let owner_unused = uid == 0 && gid == 0;
        let (operation, surplus) = match operation {
            0 => (Operation::Hello, !(owner_unused && id.0 == 0)),
            1 => (Operation::Remove { id }, !owner_unused),
            2 => (Operation::Usage { id }, !owner_unused),
            3 if uid == NO_ID || gid == NO_ID => return Err(Malformed::NoSuchId),
            3 => (Operation::OwnUpper { id, uid, gid }, false),
            unknown => return Err(Malformed::Operation(unknown)),
        };
        match surplus || (z0, z1) != (0, 0) {
            true => Err(Malformed::Surplus),
            false => Ok(Request { tag, operation }),
        }
    }

    /// The tag of bytes that may be no request, so that even a refusal finds its asker; 0 if there is none.
    pub fn tag_of(bytes: &[u8]) -> u64 {
        bytes.get(16..24).and_then(|tag| tag.try_into().ok()).map_or(0, u64::from_le_bytes)
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done; the numbers are zero unless usage was asked for.
    Done(Usage),
    /// The system refused with this errno.
    Failed(i32),
    /// The bytes were no request.
    Malformed,
}

/// The answer to one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    pub tag: u64,
    pub outcome: Outcome,
}

impl Reply {
    pub const LEN: usize = 32;

    pub fn encode(&self) -> [u8; Reply::LEN] {
        let (status, errno, usage) = match self.outcome {
            Outcome::Done(usage) => (0, 0, usage),
            Outcome::Failed(errno) => (1, errno, Usage::default()),
            Outcome::Malformed => (2, 0, Usage::default()),
        };
        let mut out = [0; Reply::LEN];
        out[0] = VERSION;
        out[1] = status;
        out[4..8].copy_from_slice(&errno.to_le_bytes());
        out[8..16].copy_from_slice(&self.tag.to_le_bytes());
        out[16..24].copy_from_slice(&usage.size.to_le_bytes());
        out[24..32].copy_from_slice(&usage.inodes.to_le_bytes());
        out
    }

    /// `None` for bytes that are no reply of this version.
    pub fn decode(bytes: &[u8]) -> Option<Reply> {
        let bytes: &[u8; Reply::LEN] = bytes.try_into().ok()?;
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let errno = i32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?);
        let outcome = match (bytes[0], bytes[1]) {
            (VERSION, 0) => Outcome::Done(Usage { size: word(16)?, inodes: word(24)? }),
            (VERSION, 1) => Outcome::Failed(errno),
            (VERSION, 2) => Outcome::Malformed,
            _ => return None,
        };
        Some(Reply { tag: word(8)?, outcome })
    }

    /// The outcome as the asker wants it.
    pub fn into_result(self) -> io::Result<Usage> {
        match self.outcome {
            Outcome::Done(usage) => Ok(usage),
            Outcome::Failed(errno) => Err(io::Error::from_raw_os_error(errno)),
            Outcome::Malformed => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "the custodian did not understand the request"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn proptest_every_byte_string_is_a_request_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(&request.encode()[..], &bytes[..]);
                prop_assert_eq!(Request::tag_of(&bytes), request.tag);
            }
            if let Some(reply) = Reply::decode(&bytes) {
                prop_assert_eq!(Reply::decode(&reply.encode()), Some(reply));
            }
        }

        #[test]
        fn proptest_almost_valid_requests_decode_to_what_they_encode(
            version in 0u8..3, operation in 0u8..6, zero in 0u8..2, id: u32, owner in prop::option::of(any::<(u32, u32)>()), tag: u64,
        ) {
            let mut bytes = [0; Request::LEN];
            bytes[..3].copy_from_slice(&[version, operation, zero]);
            bytes[4..8].copy_from_slice(&id.to_le_bytes());
            let (uid, gid) = owner.unwrap_or_default();
            bytes[8..12].copy_from_slice(&uid.to_le_bytes());
            bytes[12..16].copy_from_slice(&gid.to_le_bytes());
            bytes[16..].copy_from_slice(&tag.to_le_bytes());
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
        }

        #[test]
        fn proptest_replies_survive_the_journey(tag: u64, size: u64, inodes: u64, errno: i32, which in 0..3) {
            let outcome = match which {
                0 => Outcome::Done(Usage { size, inodes }),
                1 => Outcome::Failed(errno),
                _ => Outcome::Malformed,
            };
            let reply = Reply { tag, outcome };
            prop_assert_eq!(Reply::decode(&reply.encode()), Some(reply));
        }
    }

    #[test]
    fn an_owner_that_chown_would_ignore_is_refused() {
        let request = Request { tag: 1, operation: Operation::OwnUpper { id: SnapshotId(1), uid: u32::MAX, gid: 0 } };
        assert_eq!(Request::decode(&request.encode()), Err(Malformed::NoSuchId));
    }
}
