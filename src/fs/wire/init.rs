//! The INIT handshake: what we ask of the kernel, once per mount.
//!
//! Answered by `soci-mount`, which still has the privilege that lifts the kernel's caps; every daemon that serves the
//! connection afterwards gets the outcome as [`InitParams`] and never sees the request.

use super::abi::{FUSE_MAJOR, FUSE_MINOR, FUSE_MINOR_OLDEST, InHeader, InitIn, InitOut, OutHeader, opcode};
use super::{WireError, split};
use fuser::InitFlags;
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

/// Largest number of pages of one request that kernels allow without a sysctl: 1 MiB reads.
const MAX_PAGES: u16 = 256;
/// Nothing is ever written; the kernel insists on room for one such request in every read buffer.
const MAX_WRITE: u32 = 4096;
/// The kernel's own limit is what a 16-bit field can say. With the default of 12, a dozen readers blocked on one layer's
/// registry would stall every other layer.
const MAX_BACKGROUND: u16 = u16::MAX;
/// Where the kernel starts to call the connection congested, and stops reading ahead. Never, for us.
const CONGESTION_THRESHOLD: u16 = u16::MAX;
/// `fuse_init_in` of kernels that know `FUSE_INIT_EXT` continues with the upper half of the flags.
const FLAGS2_LEN: usize = size_of::<u32>();

/// What is asked for where the kernel offers it. Measured in `field/fuse.md`; absent on purpose:
/// READDIRPLUS_AUTO (loses a third when cold), AUTO_INVAL_DATA (layers never change), EXPLICIT_INVAL_DATA (the state file
/// relies on a changed size dropping its pages), WRITEBACK_CACHE, POSIX_ACL, PASSTHROUGH (excludes no-open).
const WANTED: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_BIG_WRITES)
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_CACHE_SYMLINKS)
    .union(InitFlags::FUSE_NO_OPEN_SUPPORT)
    .union(InitFlags::FUSE_NO_OPENDIR_SUPPORT)
    .union(InitFlags::FUSE_MAX_PAGES)
    .union(InitFlags::FUSE_INIT_EXT)
    .union(InitFlags::FUSE_HAS_RESEND);

/// What was negotiated. Valid as long as the mount; stored beside the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitParams {
    pub minor: u32,
    /// Bits of `fuser::InitFlags` that both sides have.
    pub flags: u64,
    pub max_readahead: u32,
    pub max_write: u32,
    pub max_pages: u16,
    pub max_background: u16,
}

impl InitParams {
    fn has(&self, flag: InitFlags) -> bool {
        InitFlags::from_bits_truncate(self.flags).contains(flag)
    }

    /// Whether the kernel repeats unanswered requests when asked to (Linux 6.9).
    pub fn can_resend(&self) -> bool {
        self.has(InitFlags::FUSE_HAS_RESEND)
    }

    /// Least length of a read buffer the kernel accepts, and room for many forgets in one read.
    pub fn read_buffer_len(&self) -> usize {
        // Kernel: max(FUSE_MIN_READ_BUFFER, fuse_in_header + fuse_write_in + max_write).
        (self.max_write as usize).saturating_add(4096).max(32 * 1024)
    }
}

/// Whether the kernel is to repeat unanswered requests, if it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resend {
    Wanted,
    /// As if this were a kernel before 6.9: for tests of what we do there.
    Unwanted,
}

/// Answers the INIT request in `request`: what was agreed on, and the bytes to write to the device.
pub fn answer_init(request: &[u8], resend: Resend) -> Result<(InitParams, Vec<u8>), WireError> {
    let short = || WireError::Short(request.len());
    let (header, body) = split::<InHeader>(request).ok_or_else(short)?;
    if header.opcode != opcode::INIT {
        return Err(WireError::NotInit(header.opcode));
    }
    let (init, rest) = split::<InitIn>(body).ok_or_else(short)?;
    if init.major != FUSE_MAJOR || init.minor < FUSE_MINOR_OLDEST {
        return Err(WireError::Version { major: init.major, minor: init.minor });
    }
    let mut offered = u64::from(init.flags);
    if offered & InitFlags::FUSE_INIT_EXT.bits() != 0
        && let Some(flags2) = rest.first_chunk::<FLAGS2_LEN>()
    {
        offered |= u64::from(u32::from_ne_bytes(*flags2)) << 32;
    }
    let wanted = match resend {
        Resend::Wanted => WANTED,
        Resend::Unwanted => WANTED.difference(InitFlags::FUSE_HAS_RESEND),
    };
    let flags = offered & wanted.bits();
    let max_pages = if flags & InitFlags::FUSE_MAX_PAGES.bits() != 0 { MAX_PAGES } else { 32 };
    let params = InitParams {
        minor: init.minor.min(FUSE_MINOR),
        flags,
        max_readahead: init.max_readahead,
        max_write: MAX_WRITE,
        max_pages,
        max_background: MAX_BACKGROUND,
    };
    let [low, high] = [flags & u64::from(u32::MAX), flags >> 32].map(|half| u32::try_from(half).unwrap_or(0));
    let out = InitOut {
        major: FUSE_MAJOR,
        minor: params.minor,
        max_readahead: params.max_readahead,
        flags: low,
        max_background: params.max_background,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: params.max_write,
        time_gran: 1,
        max_pages,
        map_alignment: 0,
        flags2: high,
        unused: [0; 7],
    };
    const LEN: usize = size_of::<OutHeader>() + size_of::<InitOut>();
    let mut reply = Vec::with_capacity(LEN);
    reply.extend_from_slice(OutHeader { len: LEN as u32, error: 0, unique: header.unique }.as_bytes());
    reply.extend_from_slice(out.as_bytes());
    Ok((params, reply))
}
