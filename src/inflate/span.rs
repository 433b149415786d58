//! Inflating from a checkpoint, piece by piece.

use super::{InflateError, WINDOW, gzip, raw::Corrupt, raw::Raw, raw::State, raw::Stop};

/// Inflates a span, or several consecutive ones, from compressed bytes that come in pieces of any size.
///
/// ```text
///   Shared ──first byte──▶ Inside ──end of the stream──▶ Between (trailer, next member's header) ──▶ Inside
/// ```
/// Memory: the window, and while a header is incomplete at most [`gzip::MAX_HEADER`] bytes of it.
pub struct SpanInflater {
    raw: Raw,
    at: At,
}

enum At {
    /// Before the byte that is shared with the span before; so many of its bits are ours.
    Shared(u8, Vec<u8>),
    Inside,
    /// What there is of the trailer and of the header of the next member.
    Between(Vec<u8>),
}

/// What a call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Bytes taken from the front of the input.
    pub read: usize,
    /// Bytes put at the front of the output.
    pub written: usize,
}

impl SpanInflater {
    /// At a checkpoint. `window` is what the checkpoint stores, or as much of its end as there is data before it: what refers
    /// back further is refused.
    pub fn new(bits: u8, window: &[u8]) -> Result<SpanInflater, InflateError> {
        if bits > 7 || window.len() > WINDOW {
            return Err(InflateError::Checkpoint);
        }
        let mut raw = Raw::new();
        let at = match bits {
            0 => {
                raw.set_window(window);
                At::Inside
            }
            bits => At::Shared(bits, window.to_vec()),
        };
        Ok(SpanInflater { raw, at })
    }

    /// Inflates from the front of `input` to the front of `output`. Nothing moves when the input is used up, or the output.
    pub fn inflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<Moved, InflateError> {
        let mut moved = Moved { read: 0, written: 0 };
        while moved.written < output.len() {
            let rest = &input[moved.read..];
            match &mut self.at {
                At::Shared(bits, window) => {
                    let Some(&shared) = rest.first() else { break };
                    self.raw.prime(*bits, shared >> (8 - *bits));
                    self.raw.set_window(window);
                    self.at = At::Inside;
                    moved.read += 1;
                }
                At::Inside => {
                    let step = self.raw.inflate(rest, &mut output[moved.written..], Stop::Never);
                    let step = step.map_err(|Corrupt| InflateError::Data)?;
                    moved.read += step.read;
                    moved.written += step.written;
                    match step.state {
                        State::End => self.at = At::Between(Vec::new()),
                        _ if step.read == 0 && step.written == 0 => break,
                        _ => {}
                    }
                }
                At::Between(held) => {
                    if rest.is_empty() {
                        break;
                    }
                    let before = held.len();
                    let room = (gzip::TRAILER + gzip::MAX_HEADER).saturating_sub(before);
                    held.extend_from_slice(&rest[..rest.len().min(room)]);
                    let header = held.get(gzip::TRAILER..).map_or(Ok(None), gzip::header_len);
                    match header.map_err(InflateError::Member)? {
                        // What was held before was not enough, so the end lies in what was just added.
                        Some(length) => {
                            moved.read += (gzip::TRAILER + length).saturating_sub(before);
                            self.raw.reset();
                            self.at = At::Inside;
                        }
                        // No header is longer than what is held at most.
                        None if held.len() == before => return Err(InflateError::Data),
                        None => moved.read += held.len() - before,
                    }
                }
            }
        }
        Ok(moved)
    }
}
