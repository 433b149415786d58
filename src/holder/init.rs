//! The FUSE INIT handshake, as far as the holder needs it until `fs::wire` has it.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// What was negotiated with the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitParams {
    pub minor: u32,
    pub flags: u64,
    pub max_readahead: u32,
    pub max_write: u32,
    pub max_pages: u16,
    pub max_background: u16,
}

/// A message that is not an INIT request we can answer.
#[derive(Debug, thiserror::Error)]
#[error("not a FUSE INIT request of protocol 7")]
pub struct NotInit;

/// Answers an INIT request.
pub fn answer_init(request: &[u8]) -> Result<(InitParams, Vec<u8>), NotInit> {
    let word = |at: usize| request.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    let (opcode, major, minor) = (word(4).ok_or(NotInit)?, word(40).ok_or(NotInit)?, word(44).ok_or(NotInit)?);
    let (readahead, flags) = (word(48).ok_or(NotInit)?, word(52).ok_or(NotInit)?);
    if opcode != 26 || major != 7 {
        return Err(NotInit);
    }
    // ASYNC_READ, AUTO_INVAL off, DO_READDIRPLUS, NO_OPEN_SUPPORT, PARALLEL_DIROPS, MAX_PAGES, CACHE_SYMLINKS, NO_OPENDIR_SUPPORT
    let flags = flags & (1 | 1 << 13 | 1 << 17 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 24);
    let init = InitParams {
        minor: minor.min(31),
        flags: flags.into(),
        max_readahead: readahead.min(1 << 20),
        max_write: 4096,
        max_pages: 256,
        max_background: u16::MAX,
    };
    let mut reply = Vec::with_capacity(80);
    reply.extend(80u32.to_le_bytes());
    reply.extend(0u32.to_le_bytes());
    reply.extend(request.get(8..16).ok_or(NotInit)?);
    for word in [7, init.minor, init.max_readahead, flags] {
        reply.extend(word.to_le_bytes());
    }
    reply.extend(init.max_background.to_le_bytes());
    reply.extend((init.max_background / 4 * 3).to_le_bytes());
    reply.extend(init.max_write.to_le_bytes());
    reply.extend(1u32.to_le_bytes());
    reply.extend(init.max_pages.to_le_bytes());
    reply.resize(80, 0);
    Ok((init, reply))
}
