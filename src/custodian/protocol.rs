//! What the daemon may ask, and what it hears back: fixed sizes, and a decoder for which every byte string is a request or an error.
//!
//! ```text
//! request  version u8 | operation u8 | place u8 | zero u8 | snapshot u32 | uid u32 | gid u32 | tag u64
//!          | bytes u64 | inodes u64 | number of parents u32 | parents [u32; 128]                        556 bytes, little endian
//! reply    version u8 | status u8    | zero u16 | errno    u32 | tag u64 | size u64 | inodes u64
//!          | a worker's report [u8; 224], see `unpack::report`                                          256 bytes, little endian
//! ```
//! `Copy` has the snapshot to be copied in the place of `uid`. Fields that an operation does not use are zero, and anything else there is refused: two encodings of one request would be one too many.
//! Descriptors: `Unpack` comes with two, the tar and the leash; `Copy` with the id mappings and the leash; `Publish` with one, the answers of [`super::implied`]; the others with none.
#![forbid(unsafe_code)]

use crate::{
    layout::SnapshotId,
    unpack::{
        Budget, Place,
        report::{self, Report},
    },
};
use std::io;

/// Both ends are installed together (and an operation that the other end does not know is refused, which is an error like others); this catches a daemon that talks to the custodian of another release.
const VERSION: u8 = 3;
/// chown(2) reads this number as "leave it", so it can be nobody's id.
const NO_ID: u32 = u32::MAX;
/// Layers below one. Images have at most 127 layers: that is what Docker and containerd can mount.
pub const MAX_PARENTS: usize = 128;

/// What a directory tree takes up: blocks, counted once per inode however many names it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes of disk.
    pub size: u64,
    pub inodes: u64,
}

/// One thing the custodian does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Are you there, and do we speak the same version?
    Hello,
    /// Remove the snapshot's directory and everything in it. A directory that does not exist is removed already.
    Remove { id: SnapshotId },
    /// Measure the snapshot's `fs`.
    Usage { id: SnapshotId },
    /// Give the snapshot's `fs` directory (only itself) to `uid`:`gid`.
    OwnUpper { id: SnapshotId, uid: u32, gid: u32 },
    /// Unpack a tar beside the snapshot's `fs`, in place of what was unpacked there before.
    Unpack { id: SnapshotId, place: Place, budget: Budget },
    /// Put what was unpacked in the place of the snapshot's empty `fs`. `parents` are the snapshots below, nearest first.
    Publish { id: SnapshotId, parents: Vec<SnapshotId> },
    /// Remove what was unpacked and not published.
    Discard { id: SnapshotId },
    /// Have everything on disk that was written before. The snapshots' whole filesystem is synced.
    Sync,
    /// Copy the `fs` of another snapshot, with other owners, to where a tar would be unpacked.
    Copy { id: SnapshotId, from: SnapshotId },
}

/// An operation, and the number its reply will carry.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    pub const LEN: usize = 44 + 4 * MAX_PARENTS;

    /// Of more than [`MAX_PARENTS`] parents only so many are sent.
    pub fn encode(&self) -> [u8; Request::LEN] {
        let (operation, id) = match &self.operation {
            Operation::Hello => (0, SnapshotId(0)),
            Operation::Remove { id } => (1, *id),
            Operation::Usage { id } => (2, *id),
            Operation::OwnUpper { id, .. } => (3, *id),
            Operation::Unpack { id, .. } => (4, *id),
            Operation::Publish { id, .. } => (5, *id),
            Operation::Discard { id } => (6, *id),
            Operation::Copy { id, .. } => (7, *id),
            Operation::Sync => (8, SnapshotId(0)),
        };
        let mut out = [0; Request::LEN];
        out[0] = VERSION;
        out[1] = operation;
        out[4..8].copy_from_slice(&id.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.tag.to_le_bytes());
        match &self.operation {
            Operation::OwnUpper { uid, gid, .. } => {
                out[8..12].copy_from_slice(&uid.to_le_bytes());
                out[12..16].copy_from_slice(&gid.to_le_bytes());
            }
            Operation::Copy { from, .. } => out[8..12].copy_from_slice(&from.0.to_le_bytes()),
            Operation::Unpack { place, budget, .. } => {
                out[2] = u8::from(*place == Place::Above);
                out[24..32].copy_from_slice(&budget.bytes.to_le_bytes());
                out[32..40].copy_from_slice(&budget.inodes.to_le_bytes());
            }
            Operation::Publish { parents, .. } => {
                let parents = &parents[..parents.len().min(MAX_PARENTS)];
                out[40..44].copy_from_slice(&(parents.len() as u32).to_le_bytes());
                for (field, parent) in out[44..].chunks_exact_mut(4).zip(parents) {
                    field.copy_from_slice(&parent.0.to_le_bytes());
                }
            }
            Operation::Hello
            | Operation::Remove { .. }
            | Operation::Usage { .. }
            | Operation::Discard { .. }
            | Operation::Sync => {}
        }
        out
    }

    /// Total: never panics, and `decode(x).encode() == x` whenever it succeeds.
    pub fn decode(bytes: &[u8]) -> Result<Request, Malformed> {
        let bytes: &[u8; Request::LEN] = bytes.try_into().map_err(|_| Malformed::Length(bytes.len()))?;
        let half = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        if bytes[0] != VERSION {
            return Err(Malformed::Version(bytes[0]));
        }
        let id = SnapshotId(half(4));
        let operation = match bytes[1] {
            0 => Operation::Hello,
            1 => Operation::Remove { id },
            2 => Operation::Usage { id },
            3 => match (half(8), half(12)) {
                (NO_ID, _) | (_, NO_ID) => return Err(Malformed::NoSuchId),
                (uid, gid) => Operation::OwnUpper { id, uid, gid },
            },
            4 => Operation::Unpack {
                id,
                place: if bytes[2] == 0 { Place::Bottom } else { Place::Above },
                budget: Budget { bytes: word(24), inodes: word(32) },
            },
            5 => {
                let count = half(40) as usize;
                let listed = bytes[44..].chunks_exact(4).take(count);
                let parents = listed.map(|p| SnapshotId(u32::from_le_bytes([p[0], p[1], p[2], p[3]]))).collect();
                Operation::Publish { id, parents }
            }
            6 => Operation::Discard { id },
            7 => Operation::Copy { id, from: SnapshotId(half(8)) },
            8 => Operation::Sync,
            unknown => return Err(Malformed::Operation(unknown)),
        };
        let request = Request { tag: word(16), operation };
        match request.encode() == *bytes {
            true => Ok(request),
            false => Err(Malformed::Surplus),
        }
    }

    /// The tag of bytes that may be no request, so that even a refusal finds its asker; 0 if there is none.
    pub fn tag_of(bytes: &[u8]) -> u64 {
        bytes.get(16..24).and_then(|tag| tag.try_into().ok()).map_or(0, u64::from_le_bytes)
    }
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done; the numbers are zero unless usage was asked for.
    Done(Usage),
    /// The system refused with this errno.
    Failed(i32),
    /// The bytes were no request, or the descriptors not those of one.
    Malformed,
    /// A worker's own words.
    Reported(Report),
    /// A worker ended without a word.
    WorkerDied,
}

/// The answer to one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub tag: u64,
    pub outcome: Outcome,
}

impl Reply {
    pub const LEN: usize = 32 + report::LEN;

    pub fn encode(&self) -> [u8; Reply::LEN] {
        let mut out = [0; Reply::LEN];
        let (status, errno, usage) = match &self.outcome {
            Outcome::Done(usage) => (0, 0, *usage),
            Outcome::Failed(errno) => (1, *errno, Usage::default()),
            Outcome::Malformed => (2, 0, Usage::default()),
            Outcome::Reported(report) => {
                out[32..].copy_from_slice(&report::encode(report));
                (3, 0, Usage::default())
            }
            Outcome::WorkerDied => (4, 0, Usage::default()),
        };
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
            (VERSION, 3) => Outcome::Reported(report::decode(&bytes[32..])?),
            (VERSION, 4) => Outcome::WorkerDied,
            _ => return None,
        };
        Some(Reply { tag: word(8)?, outcome })
    }

    /// The outcome of everything but unpacking.
    pub fn into_result(self) -> io::Result<Usage> {
        match self.outcome {
            Outcome::Done(usage) => Ok(usage),
            Outcome::Failed(errno) => Err(io::Error::from_raw_os_error(errno)),
            Outcome::Malformed => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "the custodian did not understand the request"))
            }
            Outcome::Reported(_) | Outcome::WorkerDied => {
                Err(io::Error::new(io::ErrorKind::InvalidData, "the custodian answered another question"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn operations() -> impl Strategy<Value = Operation> {
        let id = any::<u32>().prop_map(SnapshotId);
        let parents = prop::collection::vec(any::<u32>().prop_map(SnapshotId), 0..MAX_PARENTS);
        prop_oneof![
            Just(Operation::Hello),
            Just(Operation::Sync),
            id.clone().prop_map(|id| Operation::Remove { id }),
            id.clone().prop_map(|id| Operation::Usage { id }),
            (id.clone(), 0..NO_ID, 0..NO_ID).prop_map(|(id, uid, gid)| Operation::OwnUpper { id, uid, gid }),
            (id.clone(), any::<bool>(), any::<u64>(), any::<u64>()).prop_map(|(id, above, bytes, inodes)| {
                let place = if above { Place::Above } else { Place::Bottom };
                Operation::Unpack { id, place, budget: Budget { bytes, inodes } }
            }),
            (id.clone(), parents).prop_map(|(id, parents)| Operation::Publish { id, parents }),
            id.clone().prop_map(|id| Operation::Discard { id }),
            (id.clone(), id).prop_map(|(id, from)| Operation::Copy { id, from }),
        ]
    }

    proptest! {
        #[test]
        fn proptest_every_byte_string_is_a_request_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..Request::LEN + 8)) {
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(&request.encode()[..], &bytes[..]);
                prop_assert_eq!(Request::tag_of(&bytes), request.tag);
            }
            if let Some(reply) = Reply::decode(&bytes) {
                prop_assert_eq!(Reply::decode(&reply.encode()), Some(reply));
            }
        }

        #[test]
        fn proptest_requests_survive_the_journey_and_one_wrong_byte_makes_another_request_or_none(
            operation in operations(), tag: u64, at in 0..Request::LEN, byte: u8,
        ) {
            let request = Request { tag, operation };
            let mut bytes = request.encode();
            prop_assert_eq!(Request::decode(&bytes), Ok(request));
            bytes[at] = byte;
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(request.encode(), bytes);
            }
        }

        #[test]
        fn proptest_replies_survive_the_journey(tag: u64, size: u64, inodes: u64, errno: i32, which in 0..5) {
            let outcome = match which {
                0 => Outcome::Done(Usage { size, inodes }),
                1 => Outcome::Failed(errno),
                2 => Outcome::Reported(Ok(Budget { bytes: size, inodes })),
                3 => Outcome::WorkerDied,
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
