//! Parts of a layer that are inflated before their turn, by threads of their own.
//!
//! ```text
//!   held:   ▓▓▓▓▓▓▓▓▓▓▓▓│▒▒▒▒▒▒▒▒▒▒▒▒▒▒│▒▒▒▒▒▒▒▒▒▒▒▒▒▒│░░░░░░░      compressed bytes that have arrived
//!           ▲           ▲              ▲
//!           position    part (helper)  part (helper)
//! ```
//! Where parts begin comes from checkpoints that somebody has written down ([`Known`]), or is guessed from bytes that look like the start of
//! a member or frame. Neither needs to be right: the decoder before a part must end in the very state that the part began with
//! ([`Entry::is_at`]), or the part is thrown away.
//!
//! Memory: a part belongs to one of the [`Crew`]'s permits until it is used up, with its compressed bytes (at most [`UNPLANNED`]) and
//! [`PART_BUFFERS`] buffers of what it became; a helper waits for its turn when these are full.

use super::{pipeline::BUFFER, shelf::Known};
use crate::inflate::{Entry, LayerDecoder, Marker, StreamError};
use bytes::Bytes;
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Compressed bytes of a layer that are held while nothing has been planned for them. Two parts between checkpoints 4 MiB of output
/// apart fit, whatever their ratio but the worst.
const UNPLANNED: u64 = 8 << 20;
/// Least compressed bytes of a part whose start is guessed: a few milliseconds of work, against the cost of a thread.
const PART_MIN: u64 = 512 << 10;
/// A checkpoint nearer than this to the one before is passed over.
const KNOWN_MIN: u64 = 64 << 10;
/// Buffers of output that a part may be ahead of its turn: what 4 MiB between checkpoints become.
const PART_BUFFERS: usize = 17;
/// Guesses that may be wrong before guessing is given up, beyond those that were right.
const WRONG_GUESSES: u32 = 3;
/// Hashing what comes out is one core's work, and so fast that more helpers would wait for it.
const HELPERS_MAX: usize = 8;

/// The helpers of the node, all layers together. Cheap to clone.
#[derive(Clone)]
pub struct Crew(Arc<Semaphore>);

impl Crew {
    /// One core is for who is helped.
    pub fn new(cores: usize) -> Crew {
        Crew(Arc::new(Semaphore::new(cores.saturating_sub(1).clamp(1, HELPERS_MAX))))
    }

    fn helper(&self) -> Option<Arc<OwnedSemaphorePermit>> {
        self.0.clone().try_acquire_owned().ok().map(Arc::new)
    }
}

/// Compressed bytes, from one position of the layer to another.
#[derive(Default)]
pub struct Held {
    pieces: VecDeque<(u64, Bytes)>,
    end: u64,
}

impl Held {
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            let at = self.end;
            self.end += bytes.len() as u64;
            self.pieces.push_back((at, bytes));
        }
    }

    pub fn end(&self) -> u64 {
        self.end
    }

    /// What there is from `position` on and before `limit`, in one piece: more may follow. Empty at the end.
    pub fn piece(&self, position: u64, limit: u64) -> Bytes {
        self.slice(position..limit).next().unwrap_or_default()
    }

    /// What there is of `range`.
    pub fn slice(&self, range: Range<u64>) -> impl Iterator<Item = Bytes> {
        let first = self.pieces.partition_point(|(at, bytes)| at + bytes.len() as u64 <= range.start);
        self.pieces.range(first..).take_while(move |(at, _)| *at < range.end).filter_map(move |(at, bytes)| {
            let from = range.start.saturating_sub(*at) as usize;
            let to = (range.end - at).min(bytes.len() as u64) as usize;
            (from < to).then(|| bytes.slice(from..to))
        })
    }

    /// Forgets what lies before `position`.
    pub fn forget(&mut self, position: u64) {
        while self.pieces.front().is_some_and(|(at, bytes)| at + bytes.len() as u64 <= position) {
            self.pieces.pop_front();
        }
    }

    /// The first `marker` whose entry is at `from` or later, with where it is. One that lies across two pieces is not seen: there are more.
    fn find(&self, marker: Marker, from: u64) -> Option<u64> {
        let mut at = from;
        for piece in self.slice(from..self.end) {
            if let Some(found) = marker.find(&piece) {
                return Some(at + found as u64);
            }
            at += piece.len() as u64;
        }
        None
    }
}

/// What a helper says.
pub enum Made {
    /// Output: a buffer and how much of it counts.
    Bytes(Vec<u8>, usize),
    /// All of the part has been decoded; how its decoder stands.
    End(Box<LayerDecoder>),
    /// It cannot be decoded, at least not as it was begun.
    Failed(StreamError),
}

/// A part on its way.
pub struct Part {
    pub entry: Entry,
    /// Where a decoder has to be that has decoded what comes before, and where this one ends.
    pub range: Range<u64>,
    pub made: Receiver<Made>,
    /// Given back when both sides are done with the memory.
    _helper: Arc<OwnedSemaphorePermit>,
}

/// Where parts may begin.
pub enum Cuts {
    /// From somebody who has been here before.
    Known { known: Known, next: usize },
    /// Wherever it looks like it.
    Guessed(Guesses),
    /// Nowhere.
    None,
}

/// Guessing, and how it goes.
#[derive(Default)]
pub struct Guesses {
    markers: &'static [Marker],
    right: u32,
    wrong: u32,
    /// The start of the next part.
    open: Option<(u64, Marker)>,
    /// Nothing was found before this, and for so many bytes.
    searched: u64,
    fruitless: u64,
}

impl Guesses {
    pub fn of(markers: &'static [Marker]) -> Guesses {
        Guesses { markers, ..Guesses::default() }
    }

    fn find(&mut self, held: &Held, from: u64) -> Option<(u64, Marker)> {
        let from = from.max(self.searched);
        let found = self.markers.iter().find_map(|marker| held.find(*marker, from).map(|at| (at, *marker)));
        match found {
            Some(_) => self.fruitless = 0,
            None if from < held.end() => {
                self.fruitless += held.end() - from;
                self.searched = held.end();
            }
            None => {}
        }
        found
    }
}

impl Cuts {
    /// How much to hold for the next part.
    pub fn appetite(&self) -> u64 {
        match self {
            Cuts::Known { .. } => UNPLANNED,
            Cuts::Guessed(guesses) if guesses.open.is_some() => UNPLANNED,
            // Until there is a sign of one.
            Cuts::Guessed(_) => 4 * PART_MIN,
            Cuts::None => 0,
        }
    }

    /// Whether more bytes may bring another part.
    pub fn is_hopeful(&self) -> bool {
        match self {
            Cuts::Known { known, next } => *next < known.count(),
            Cuts::Guessed(guesses) => guesses.fruitless < UNPLANNED / 2,
            Cuts::None => false,
        }
    }

    /// The next part that lies wholly in `held` (of which no more will come if `ended`) behind `from`, and that a decoder now at `position` does not
    /// reach at once.
    fn next(&mut self, held: &Held, ended: bool, position: u64, from: u64) -> Option<(Entry, Range<u64>)> {
        match self {
            Cuts::None => None,
            Cuts::Known { known, next } => {
                let begins = |at: u64| at >= from && at > position;
                while known.at(*next).is_some_and(|at| !begins(at)) {
                    *next += 1;
                }
                let start = known.at(*next)?;
                let after = (*next + 1..known.count()).find(|i| known.at(*i).is_some_and(|at| at >= start + KNOWN_MIN));
                let end = match after {
                    Some(after) => known.at(after).filter(|end| *end <= held.end())?,
                    None if ended && held.end() > start => held.end(),
                    None => return None,
                };
                let index = std::mem::replace(next, after.unwrap_or(known.count()));
                Some((known.entry(index)?, start..end))
            }
            Cuts::Guessed(guesses) => {
                if guesses.open.is_some_and(|(at, _)| at < from || at <= position) {
                    guesses.open = None;
                }
                if guesses.open.is_none() {
                    guesses.open = guesses.find(held, from.max(position + PART_MIN / 2));
                }
                let (start, marker) = guesses.open?;
                let next = guesses.find(held, start + PART_MIN);
                let end = match next {
                    Some((end, _)) => end,
                    None if ended && held.end() > start => held.end(),
                    None => return None,
                };
                guesses.open = next;
                Some((marker.entry(), start..end))
            }
        }
    }

    /// A part was used.
    pub fn was_right(&mut self) {
        if let Cuts::Guessed(guesses) = self {
            guesses.right += 1;
        }
    }

    /// A part was thrown away.
    pub fn was_wrong(&mut self) {
        match self {
            Cuts::Known { .. } => *self = Cuts::None,
            Cuts::Guessed(guesses) => {
                guesses.wrong += 1;
                if guesses.wrong > guesses.right + WRONG_GUESSES {
                    *self = Cuts::None;
                }
            }
            Cuts::None => {}
        }
    }

    /// Has a helper begin the next part, if there is one, and somebody free.
    pub fn begin(&mut self, crew: &Crew, held: &Held, ended: bool, position: u64, from: u64) -> Option<Part> {
        if !self.is_hopeful() {
            *self = Cuts::None;
            return None;
        }
        let helper = crew.helper()?;
        let (entry, range) = self.next(held, ended, position, from)?;
        let bytes: Vec<Bytes> = held.slice(range.start - entry.shared()..range.end).collect();
        let (out, made) = sync_channel(PART_BUFFERS);
        let work = {
            let (entry, helper) = (entry.clone(), helper.clone());
            move || {
                let _helper = helper;
                inflate(&entry, &bytes, &out);
            }
        };
        // Without a thread the part is decoded in its turn.
        thread::Builder::new().name("layer-part".into()).spawn(work).ok()?;
        Some(Part { entry, range, made, _helper: helper })
    }
}

/// Decodes a part; ends early when nobody wants it.
fn inflate(entry: &Entry, bytes: &[Bytes], out: &SyncSender<Made>) {
    let mut decoder = Box::new(LayerDecoder::resume(entry));
    let (mut buffer, mut filled) = (vec![0; BUFFER], 0);
    for piece in bytes {
        let mut rest: &[u8] = piece;
        loop {
            let moved = match decoder.decode(rest, &mut buffer[filled..]) {
                Ok(moved) => moved,
                Err(error) => {
                    let _ = out.send(Made::Failed(error));
                    return;
                }
            };
            rest = &rest[moved.read..];
            filled += moved.written;
            if filled == buffer.len() {
                if out.send(Made::Bytes(std::mem::replace(&mut buffer, vec![0; BUFFER]), filled)).is_err() {
                    return;
                }
                filled = 0;
                // At a place nothing is left inside the decoder.
                if rest.is_empty() && decoder.place().is_some() {
                    break;
                }
            } else if rest.is_empty() {
                break;
            }
        }
    }
    if filled > 0 && out.send(Made::Bytes(buffer, filled)).is_err() {
        return;
    }
    let _ = out.send(Made::End(decoder));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(pieces: &[&[u8]]) -> Held {
        let mut held = Held::default();
        pieces.iter().for_each(|piece| held.push(Bytes::copy_from_slice(piece)));
        held
    }

    #[test]
    fn what_is_held_is_found_by_position() {
        let mut held = held(&[b"abc", b"", b"defg", b"h"]);
        assert_eq!(held.end(), 8);
        let text = |held: &Held, range: Range<u64>| held.slice(range).collect::<Vec<_>>().concat();
        for (from, to) in [(0, 8), (2, 4), (3, 7), (7, 8), (8, 8), (1, 1), (5, 100)] {
            assert_eq!(text(&held, from..to), b"abcdefgh"[from as usize..(to as usize).min(8)], "{from} {to}");
        }
        assert_eq!(held.piece(4, 6), "ef");
        assert_eq!(held.piece(8, 9), "");
        held.forget(5);
        assert_eq!(text(&held, 3..8), b"defgh", "a piece is forgotten as a whole");
        held.forget(8);
        assert_eq!(text(&held, 0..8), b"");
    }

    #[test]
    fn markers_are_found_from_a_position_on() {
        let held = held(&[b"..\x1f\x8b\x08....", b"\x1f\x8b\x08"]);
        assert_eq!(held.find(Marker::Member, 0), Some(2));
        assert_eq!(held.find(Marker::Member, 3), Some(9));
        assert_eq!(held.find(Marker::Frame, 0), None);
    }
}
