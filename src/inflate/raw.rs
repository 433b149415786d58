//! The seam to zlib-rs: raw inflate through zlib's C interface, the only one with block stops, primed bits and windows.
//!
//! This file holds all the `unsafe` of the module. Invariant of [`Raw`]: `stream` was set up by `inflateInit2_` and not
//! yet torn down, and holds no pointer to a caller's buffer between calls that anything reads.
#![allow(unsafe_code)] // see above

use super::WINDOW;
use libz_rs_sys as z;
use std::ffi::c_int;

/// Raw DEFLATE: no header, no trailer, window of 32 KiB.
const RAW: c_int = -15;

/// zlib counts buffers in 32 bits; larger slices are handed over in part.
const MAX_SLICE: usize = 1 << 30;

/// When to return before input or output are used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Only at the end of the stream.
    Never,
    /// After each block.
    Block,
}

/// Where a call stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Input or output is used up, in the middle of something.
    Inside,
    /// A block has just ended; `bits` (0 to 7) of the last byte read are not part of it. Only with [`Stop::Block`].
    BlockEnd {
        /// Unused bits of the last byte.
        bits: u8,
        /// It was the final block of the stream.
        last: bool,
    },
    /// The stream has ended; what follows it is unread.
    End,
}

/// What a call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes taken from the front of the input.
    pub read: usize,
    /// Bytes put at the front of the output.
    pub written: usize,
    /// Where it stopped. `Inside` without a byte read or written means that it needs more input or output.
    pub state: State,
}

/// The data is not DEFLATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Corrupt;

/// A raw inflate stream.
pub struct Raw {
    stream: Box<z::z_stream>,
}

// SAFETY: the library ties a stream to no thread: its state is memory that only this stream points to, from Rust's allocator; the pointers to
// callers' buffers are stale between calls, and nothing reads them (invariant). All methods that touch it take `&mut self`.
unsafe impl Send for Raw {}

impl Default for Raw {
    fn default() -> Raw {
        Raw::new()
    }
}

impl Raw {
    /// At the start of a stream, with an empty window.
    pub fn new() -> Raw {
        let mut stream = Box::new(z::z_stream::default());
        let size = size_of::<z::z_stream>() as c_int;
        // SAFETY: `stream` is a valid z_stream with default (null) allocators, which selects Rust's allocator; version
        // and size are those of the library this file is compiled with. It is boxed, so its address never changes.
        let code = unsafe { z::inflateInit2_(&raw mut *stream, RAW, z::zlibVersion(), size) };
        assert_eq!(code, z::Z_OK, "inflateInit2 fails only without memory");
        Raw { stream }
    }

    /// Back to the state of [`Raw::new`], keeping the memory.
    pub fn reset(&mut self) {
        // SAFETY: the stream is initialised (invariant).
        let code = unsafe { z::inflateReset(&raw mut *self.stream) };
        debug_assert_eq!(code, z::Z_OK);
    }

    /// Puts the low `bits` (at most 7) of `value` in front of the input. Only right after `new` or `reset`.
    pub fn prime(&mut self, bits: u8, value: u8) {
        debug_assert!(bits <= 7);
        // SAFETY: the stream is initialised (invariant).
        let code = unsafe { z::inflatePrime(&raw mut *self.stream, bits.into(), value.into()) };
        debug_assert_eq!(code, z::Z_OK);
    }

    /// Sets what came before; of more than 32 KiB the end counts. Only right after `new`, `reset` or `prime`.
    pub fn set_window(&mut self, window: &[u8]) {
        let window = &window[window.len().saturating_sub(WINDOW)..];
        if window.is_empty() {
            return;
        }
        // SAFETY: the stream is initialised (invariant); pointer and length are those of a live slice, which is copied.
        let code = unsafe { z::inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), window.len() as u32) };
        debug_assert_eq!(code, z::Z_OK);
    }

    /// Inflates from the front of `input` to the front of `output`.
    pub fn inflate(&mut self, input: &[u8], output: &mut [u8], stop: Stop) -> Result<Progress, Corrupt> {
        let input = &input[..input.len().min(MAX_SLICE)];
        let room = output.len().min(MAX_SLICE);
        let output = &mut output[..room];
        let stream = &mut *self.stream;
        stream.next_in = input.as_ptr();
        stream.avail_in = input.len() as u32;
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = output.len() as u32;
        let flush = match stop {
            Stop::Never => z::Z_NO_FLUSH,
            Stop::Block => z::Z_BLOCK,
        };
        // SAFETY: the stream is initialised (invariant); the pointers and lengths just set are those of live slices that
        // do not overlap (one is borrowed mutably), and both lengths fit 32 bits. Whatever bytes `input` holds, the
        // library's contract is to stay within them.
        let code = unsafe { z::inflate(&raw mut *stream, flush) };
        let read = input.len() - stream.avail_in as usize;
        let written = output.len() - stream.avail_out as usize;
        let data_type = stream.data_type;
        let state = match code {
            z::Z_STREAM_END => State::End,
            // BUF_ERROR says that no byte moved; a block may have ended nevertheless, in bits that were read before.
            z::Z_OK | z::Z_BUF_ERROR if stop == Stop::Block && data_type & 128 != 0 => {
                State::BlockEnd { bits: (data_type & 7) as u8, last: data_type & 64 != 0 }
            }
            z::Z_OK | z::Z_BUF_ERROR => State::Inside,
            _ => return Err(Corrupt),
        };
        Ok(Progress { read, written, state })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: the stream is initialised (invariant) and never used again.
        unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}
