//! The decoder whose word counts: it decodes a layer in order, or takes over what a helper has made of the next part.
//!
//! While the link is slower than one core nothing is ever held, and this is a plain loop. When compressed bytes pile up, and there are places where
//! decoding can begin, helpers begin there ([`super::parts`]). Where there are none, it writes down those that it passes, for the next pull.

use super::{
    parts::{Crew, Cuts, Guesses, Held, Made, Part},
    pipeline::{Out, PipelineError},
    shelf::{Draft, Inflating},
};
use crate::{
    inflate::{LayerDecoder, Marker, Place, Sniffed, WINDOW},
    oci::{Digest, Hasher},
};
use bytes::Bytes;
use std::{collections::VecDeque, mem};
use tokio::sync::mpsc;

/// Output between two checkpoints that are written down: what zTOCs have by default.
pub const SPACING: u64 = 4 << 20;

/// What has gone in, and how.
pub struct Inflated {
    /// sha256 of the compressed bytes.
    pub compressed: Digest,
    /// Parts that helpers have made.
    pub parts: u32,
    /// Checkpoints that were passed.
    pub draft: Option<Draft>,
}

/// See the module.
pub struct Front {
    input: mpsc::Receiver<Bytes>,
    ended: bool,
    hasher: Hasher,
    held: Held,
    /// Compressed bytes that the decoder has taken.
    position: u64,
    decoder: LayerDecoder,
    crew: Crew,
    cuts: Cuts,
    ahead: VecDeque<Part>,
    /// Where the last part ends that a helper has begun.
    planned: u64,
    parts: u32,
    out: Out,
    buffer: Vec<u8>,
    filled: usize,
    /// Up to a window of what was sent to `out`.
    sent: Vec<u8>,
    /// What the decoder puts out next was sent already.
    skip: u64,
    draft: Option<Draft>,
    /// Output offset of the last checkpoint that was written down.
    noted: Option<u64>,
    /// It is not yet known what the layer is.
    is_unknown: bool,
    manner: Manner,
}

/// Whether helpers may be asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Alone,
    Helped,
}

impl Front {
    pub fn new(
        input: mpsc::Receiver<Bytes>,
        out: Out,
        crew: Crew,
        inflating: Inflating,
    ) -> Result<Front, PipelineError> {
        let (manner, cuts, draft) = match inflating {
            Inflating::Alone => (Manner::Alone, Cuts::None, None),
            Inflating::Helped { known: Some(known), .. } => (Manner::Helped, Cuts::Known { known, next: 0 }, None),
            Inflating::Helped { known: None, draft } => (Manner::Helped, Cuts::None, draft),
        };
        Ok(Front {
            input,
            ended: false,
            hasher: Hasher::new(),
            held: Held::default(),
            position: 0,
            decoder: LayerDecoder::new(),
            crew,
            cuts,
            ahead: VecDeque::new(),
            planned: 0,
            parts: 0,
            skip: 0,
            buffer: out.buffer()?,
            out,
            filled: 0,
            sent: Vec::new(),
            draft,
            noted: None,
            is_unknown: true,
            manner,
        })
    }

    /// Decodes all of the layer.
    pub fn run(mut self) -> Result<Inflated, PipelineError> {
        loop {
            self.fill();
            self.plan();
            self.held.forget(self.position.saturating_sub(1));
            match self.ahead.front().map(|part| part.range.start) {
                Some(start) if start == self.position => self.take_over()?,
                // Only if it was never where a decoder could stop.
                Some(start) if start < self.position => self.throw_away(),
                next => {
                    let piece = self.held.piece(self.position, next.unwrap_or(u64::MAX));
                    match piece.is_empty() {
                        false => self.decode(&piece)?,
                        true if self.ended => break,
                        true => self.wait(),
                    }
                }
            }
        }
        self.flush()?;
        let Front { hasher, parts, draft, .. } = self;
        Ok(Inflated { compressed: hasher.finish(), parts, draft })
    }

    fn take(&mut self, bytes: Bytes) {
        self.hasher.update(&bytes);
        self.held.push(bytes);
    }

    fn wait(&mut self) {
        match self.input.blocking_recv() {
            Some(bytes) => self.take(bytes),
            None => self.ended = true,
        }
    }

    /// Takes what has arrived, while it may be of use to helpers.
    fn fill(&mut self) {
        let appetite = if self.cuts.is_hopeful() { self.cuts.appetite() } else { 0 };
        while !self.ended && self.held.end() - self.planned.max(self.position) < appetite {
            match self.input.try_recv() {
                Ok(bytes) => self.take(bytes),
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => self.ended = true,
            }
        }
    }

    fn plan(&mut self) {
        if self.is_unknown
            && let Some(format) = self.decoder.format()
        {
            self.is_unknown = false;
            match (&self.cuts, self.manner) {
                (Cuts::Known { .. }, _) if format != Sniffed::Gzip => self.cuts = Cuts::None,
                (Cuts::None, Manner::Helped) => self.cuts = Cuts::Guessed(Guesses::of(Marker::of(format))),
                _ => {}
            }
        }
        loop {
            let from = self.planned.max(self.position);
            match self.cuts.begin(&self.crew, &self.held, self.ended, self.position, from) {
                Some(part) => {
                    self.planned = part.range.end;
                    self.ahead.push_back(part);
                }
                None => return,
            }
        }
    }

    /// The next part is not one.
    fn throw_away(&mut self) {
        self.ahead.pop_front();
        self.cuts.was_wrong();
        if let Cuts::None = self.cuts {
            // The others are of the same origin.
            self.ahead.clear();
        }
    }

    fn send(&mut self, buffer: Vec<u8>, filled: usize) -> Result<(), PipelineError> {
        remember(&mut self.sent, &buffer[..filled]);
        self.out.send(buffer, filled)
    }

    /// Sends what has been decoded here.
    fn flush(&mut self) -> Result<(), PipelineError> {
        if self.filled > 0 {
            let next = self.out.buffer()?;
            let (buffer, filled) = (mem::replace(&mut self.buffer, next), mem::take(&mut self.filled));
            self.send(buffer, filled)?;
        }
        Ok(())
    }

    /// Decodes a piece, all of it.
    fn decode(&mut self, piece: &[u8]) -> Result<(), PipelineError> {
        let mut rest = piece;
        loop {
            let at = self.filled;
            let moved = self.decoder.decode(rest, &mut self.buffer[at..]).map_err(PipelineError::Stream)?;
            rest = &rest[moved.read..];
            self.position += moved.read as u64;
            let known = moved.written.min(usize::try_from(self.skip).unwrap_or(usize::MAX));
            self.buffer.copy_within(at + known..at + moved.written, at);
            self.filled += moved.written - known;
            self.skip -= known as u64;
            let place = self.decoder.place();
            if let Some(Place::Block { bits }) = place {
                self.note(bits);
            }
            let is_full = at + moved.written == self.buffer.len();
            if self.filled == self.buffer.len() {
                self.flush()?;
            }
            // At a place nothing is left inside the decoder.
            if rest.is_empty() && (!is_full || place.is_some()) {
                return Ok(());
            }
        }
    }

    /// Writes a checkpoint down, if the last one is far enough.
    fn note(&mut self, bits: u8) {
        let output = self.out.bytes + self.filled as u64;
        if self.draft.is_none() || self.skip > 0 || self.noted.is_some_and(|last| output - last <= SPACING) {
            return;
        }
        let here = &self.buffer[self.filled.saturating_sub(WINDOW)..self.filled];
        let before = &self.sent[self.sent.len().saturating_sub(WINDOW - here.len())..];
        if let Some(draft) = &mut self.draft {
            draft.note(self.position, output, bits, [before, here]);
            self.noted = Some(output);
        }
    }

    /// The decoder has come to where a part begins: takes what its helper makes, if the helper began in the state that the decoder is in.
    fn take_over(&mut self) -> Result<(), PipelineError> {
        self.flush()?;
        let right = |part: &Part| part.entry.is_at(self.decoder.place(), &self.sent);
        if !self.ahead.front().is_some_and(right) {
            self.throw_away();
            return Ok(());
        }
        let Some(part) = self.ahead.pop_front() else { return Ok(()) };
        let mut taken = 0;
        let ended = loop {
            // Others are begun meanwhile.
            self.fill();
            self.plan();
            match part.made.recv() {
                Ok(Made::Bytes(buffer, filled)) => {
                    taken += filled as u64;
                    self.send(buffer, filled)?;
                }
                Ok(Made::End(decoder)) => break Some(decoder),
                // Beyond what it assumed, or really broken: that is seen when it is decoded again.
                Ok(Made::Failed(error)) => {
                    tracing::debug!(%error, "a part of the layer cannot be inflated by itself");
                    break None;
                }
                Err(_) => break None,
            }
        };
        match ended {
            // Enough for whatever refers back from behind it.
            Some(decoder) if taken >= WINDOW as u64 => {
                self.decoder = *decoder;
                self.position = part.range.end;
                self.parts += 1;
                self.cuts.was_right();
            }
            Some(_) => self.skip = taken,
            None => {
                self.cuts.was_wrong();
                self.skip = taken;
            }
        }
        Ok(())
    }
}

/// Keeps up to a window of the end of what was sent.
fn remember(sent: &mut Vec<u8>, bytes: &[u8]) {
    let new = &bytes[bytes.len().saturating_sub(WINDOW)..];
    let kept = WINDOW - new.len();
    sent.drain(..sent.len().saturating_sub(kept));
    sent.extend_from_slice(new);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_of_what_was_sent_is_remembered() {
        let mut sent = Vec::new();
        let mut all = Vec::new();
        for (number, length) in [10, 0, 20_000, 20_000, 40_000, 5].into_iter().enumerate() {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 7 + number) as u8).collect();
            all.extend_from_slice(&bytes);
            remember(&mut sent, &bytes);
            assert!(sent == all[all.len().saturating_sub(WINDOW)..], "{number}");
        }
    }
}
