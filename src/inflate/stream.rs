//! A whole layer from its first byte: gzip with any number of members, zstd with any number of frames, or as it is.
//!
//! ```text
//!   Sniffing ──▶ Gzip: Header ──▶ Body ──▶ Trailer ──▶ Header … ──▶ Over      (what follows the last member is no gzip: padding)
//!           ├──▶ Zstd
//!           └──▶ Plain
//! ```
//! A decoder may also begin in the middle, at an [`Entry`]; and it says when it stands where another one could have begun
//! ([`LayerDecoder::place`]). So a layer can be decompressed in parts at the same time, and the parts be checked against each other.
//!
//! Checksums inside the formats are not compared: who unpacks a layer compares the sha256 of all that comes out.
#![forbid(unsafe_code)]

use super::{
    Moved, Sniffed,
    entry::{Entry, Place},
    gzip,
    raw::{Corrupt, Raw, State, Stop},
    sniff,
};

/// Enough to tell gzip and zstd from everything else.
const MAGIC: usize = 4;

/// Why a layer cannot be decompressed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    #[error("invalid DEFLATE data")]
    Deflate,
    #[error("the layer begins like gzip, but not with a valid header")]
    Header(#[source] gzip::HeaderError),
    #[error("invalid zstd data: {0}")]
    Zstd(String),
}

/// Decompresses a layer that comes in pieces of any size. What it is, its first bytes say.
pub struct LayerDecoder {
    at: At,
}

enum At {
    /// What there is of the first [`MAGIC`] bytes.
    Sniffing(Vec<u8>),
    /// Before a byte that is shared with what comes before the entry; so many of its bits are ours.
    Shared(u8, Vec<u8>),
    /// Bytes that were looked at and are still to be decoded, in front of all others.
    Header(Box<Raw>, Vec<u8>, Member),
    /// Between two blocks: how many bits of the last byte have not been used.
    Body(Box<Raw>, Option<u8>),
    /// So many bytes of the trailer are still to come.
    Trailer(Box<Raw>, usize),
    Zstd(Box<zstd::stream::raw::Decoder<'static>>, Held, Frame),
    Plain(Held),
    Over,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Member {
    First,
    Later,
}

/// Whether the last frame has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frame {
    Inside,
    Ended,
}

/// The first bytes, and how many of them are used up.
struct Held(Vec<u8>, usize);

impl Default for LayerDecoder {
    fn default() -> LayerDecoder {
        LayerDecoder { at: At::Sniffing(Vec::new()) }
    }
}

impl LayerDecoder {
    pub fn new() -> LayerDecoder {
        LayerDecoder::default()
    }

    /// Begins in the middle of a layer, with the first byte that `entry` needs.
    pub fn resume(entry: &Entry) -> LayerDecoder {
        let at = match entry {
            Entry::Start => return LayerDecoder::default(),
            Entry::Block { bits: 0, window } => {
                let mut raw = Box::<Raw>::default();
                raw.set_window(window);
                At::Body(raw, None)
            }
            Entry::Block { bits, window } => At::Shared(*bits, window.clone()),
        };
        LayerDecoder { at }
    }

    /// Decodes from the front of `input` to the front of `output`, until one of them is used up, or until it stands at a [`Place`].
    pub fn decode(&mut self, input: &[u8], output: &mut [u8]) -> Result<Moved, StreamError> {
        let mut moved = Moved { read: 0, written: 0 };
        while moved.written < output.len() {
            let step = self.step(&input[moved.read..], &mut output[moved.written..])?;
            moved.read += step.0.read;
            moved.written += step.0.written;
            if step.1 == Step::Starved || self.place().is_some() {
                break;
            }
        }
        Ok(moved)
    }

    /// Where it stands, if another decoder could begin there. Only what was decoded last counts: ask before going on.
    pub fn place(&self) -> Option<Place> {
        match &self.at {
            At::Body(_, Some(bits)) => Some(Place::Block { bits: *bits }),
            At::Header(_, held, Member::Later) if held.is_empty() => Some(Place::Start),
            At::Zstd(_, held, Frame::Ended) if held.1 == held.0.len() => Some(Place::Start),
            _ => None,
        }
    }

    /// What the layer is, once that is known.
    pub fn format(&self) -> Option<Sniffed> {
        match &self.at {
            At::Sniffing(_) => None,
            At::Shared(..) | At::Header(..) | At::Body(..) | At::Trailer(..) => Some(Sniffed::Gzip),
            At::Zstd(..) => Some(Sniffed::Zstd),
            At::Plain(_) => Some(Sniffed::Tar),
            At::Over => Some(Sniffed::Unknown),
        }
    }

    /// No more bytes will come: whether the last thing that began also ended, and what was held back of a layer shorter than its magic.
    pub fn is_whole(&self) -> bool {
        match &self.at {
            At::Sniffing(held) => held.is_empty(),
            At::Header(_, held, member) => *member == Member::Later && held.is_empty(),
            At::Shared(..) | At::Body(..) | At::Trailer(..) => false,
            At::Zstd(..) | At::Plain(_) | At::Over => true,
        }
    }

    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<(Moved, Step), StreamError> {
        let read = |read| (Moved { read, written: 0 }, Step::On);
        let starved =
            |moved: Moved| (moved, if moved.read == 0 && moved.written == 0 { Step::Starved } else { Step::On });
        match &mut self.at {
            At::Sniffing(held) => {
                let wanted = (MAGIC - held.len()).min(input.len());
                held.extend_from_slice(&input[..wanted]);
                if held.len() < MAGIC {
                    return Ok((Moved { read: wanted, written: 0 }, Step::Starved));
                }
                let held = std::mem::take(held);
                self.at = match sniff(&held) {
                    Sniffed::Gzip => At::Header(Box::default(), held, Member::First),
                    Sniffed::Zstd => At::Zstd(Box::new(zstd_decoder()?), Held(held, 0), Frame::Inside),
                    // The unpacker says what is wrong with what is no tar.
                    Sniffed::Tar | Sniffed::Unknown => At::Plain(Held(held, 0)),
                };
                Ok(read(wanted))
            }
            At::Shared(bits, window) => {
                let Some(shared) = input.first() else {
                    return Ok((Moved { read: 0, written: 0 }, Step::Starved));
                };
                let mut raw = Box::<Raw>::default();
                raw.prime(*bits, shared >> (8 - *bits));
                raw.set_window(window);
                self.at = At::Body(raw, None);
                Ok(read(1))
            }
            At::Header(raw, held, member) => {
                let before = held.len();
                match gzip::header_len(held) {
                    Err(_) if *member == Member::Later => {
                        self.at = At::Over;
                        return Ok(read(0));
                    }
                    Err(error) => return Err(StreamError::Header(error)),
                    Ok(_) => {}
                }
                if input.is_empty() {
                    return Ok((Moved { read: 0, written: 0 }, Step::Starved));
                }
                let room = gzip::MAX_HEADER.saturating_sub(before).min(input.len());
                held.extend_from_slice(&input[..room]);
                match gzip::header_len(held) {
                    // What was held before was not enough, so the end lies in what was just added.
                    Ok(Some(length)) => {
                        raw.reset();
                        self.at = At::Body(std::mem::take(raw), Some(0));
                        Ok(read(length.saturating_sub(before)))
                    }
                    Ok(None) if held.len() == before => Err(StreamError::Header(gzip::HeaderError::Unknown)),
                    Ok(None) => Ok(read(room)),
                    Err(_) if *member == Member::Later => {
                        self.at = At::Over;
                        Ok(read(room))
                    }
                    Err(error) => Err(StreamError::Header(error)),
                }
            }
            At::Body(raw, between) => {
                let step = raw.inflate(input, output, Stop::Block).map_err(|Corrupt| StreamError::Deflate)?;
                let moved = Moved { read: step.read, written: step.written };
                *between = None;
                match step.state {
                    State::End => self.at = At::Trailer(std::mem::take(raw), gzip::TRAILER),
                    State::BlockEnd { last: true, .. } => {}
                    State::BlockEnd { last: false, bits } => *between = Some(bits),
                    State::Inside => return Ok(starved(moved)),
                }
                Ok((moved, Step::On))
            }
            At::Trailer(raw, left) => {
                let skipped = (*left).min(input.len());
                *left -= skipped;
                if *left == 0 {
                    self.at = At::Header(std::mem::take(raw), Vec::new(), Member::Later);
                    return Ok(read(skipped));
                }
                Ok((Moved { read: skipped, written: 0 }, Step::Starved))
            }
            At::Zstd(decoder, held, frame) => {
                let from_held = held.1 < held.0.len();
                let source = if from_held { &held.0[held.1..] } else { input };
                let moved;
                (moved, *frame) = zstd_step(decoder, source, output)?;
                if from_held {
                    held.1 += moved.read;
                    return Ok((Moved { read: 0, written: moved.written }, Step::On));
                }
                Ok(starved(moved))
            }
            At::Plain(held) => {
                let from_held = held.1 < held.0.len();
                let source = if from_held { &held.0[held.1..] } else { input };
                let n = source.len().min(output.len());
                output[..n].copy_from_slice(&source[..n]);
                if from_held {
                    held.1 += n;
                    return Ok((Moved { read: 0, written: n }, Step::On));
                }
                Ok(starved(Moved { read: n, written: n }))
            }
            At::Over => Ok((Moved { read: input.len(), written: 0 }, Step::Starved)),
        }
    }
}

/// Whether another step may move something.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    On,
    Starved,
}

fn zstd_decoder() -> Result<zstd::stream::raw::Decoder<'static>, StreamError> {
    zstd::stream::raw::Decoder::new().map_err(|e| StreamError::Zstd(e.to_string()))
}

fn zstd_step(
    decoder: &mut zstd::stream::raw::Decoder<'static>,
    input: &[u8],
    output: &mut [u8],
) -> Result<(Moved, Frame), StreamError> {
    use zstd::stream::raw::{InBuffer, Operation, OutBuffer};
    let mut input = InBuffer::around(input);
    let mut output = OutBuffer::around(output);
    // What it would like to have next; nothing once a frame has come out as a whole.
    let wanted = decoder.run(&mut input, &mut output).map_err(|e| StreamError::Zstd(e.to_string()))?;
    let frame = if wanted == 0 { Frame::Ended } else { Frame::Inside };
    Ok((Moved { read: input.pos(), written: output.pos() }, frame))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn decode(bytes: &[u8], piece: usize, room: usize) -> Result<Vec<u8>, StreamError> {
        let (mut decoder, mut out) = (LayerDecoder::new(), Vec::new());
        let mut buffer = vec![0; room];
        for chunk in bytes.chunks(piece) {
            let mut rest = chunk;
            loop {
                let moved = decoder.decode(rest, &mut buffer)?;
                rest = &rest[moved.read..];
                out.extend_from_slice(&buffer[..moved.written]);
                if rest.is_empty() && moved.written < buffer.len() {
                    break;
                }
            }
            assert!(rest.is_empty());
        }
        assert!(decoder.is_whole() || bytes.len() < MAGIC);
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn proptest_every_format_comes_out_the_same_in_pieces_of_any_size(
            seed in prop::collection::vec(any::<u8>(), 4..5000), repeat in 1usize..20, piece in 1usize..3000, room in 1usize..3000,
        ) {
            let tar = seed.repeat(repeat);
            let plain: Vec<u8> = [b"tar!", &tar[..]].concat();
            let (left, right) = plain.split_at(plain.len() / 3);
            let members = [gzip(left), gzip(right), vec![0; 7]].concat();
            let frames = [zstd::encode_all(left, 3).unwrap(), zstd::encode_all(right, 1).unwrap()].concat();
            for form in [plain.clone(), gzip(&plain), members, frames] {
                prop_assert!(decode(&form, piece, room).unwrap() == plain);
            }
        }

        #[test]
        fn proptest_garbage_never_panics(kind in 0usize..3, garbage in prop::collection::vec(any::<u8>(), 0..600), piece in 1usize..300) {
            let magic: [&[u8]; 3] = [&[0x1f, 0x8b, 8, 0], &[0x28, 0xb5, 0x2f, 0xfd], &[]];
            let bytes = [magic[kind], &garbage].concat();
            let mut decoder = LayerDecoder::new();
            let mut buffer = [0; 512];
            'all: for chunk in bytes.chunks(piece) {
                let mut rest = chunk;
                for _ in 0..10_000 {
                    let Ok(moved) = decoder.decode(rest, &mut buffer) else { break 'all };
                    rest = &rest[moved.read..];
                    if moved.read == 0 && moved.written == 0 {
                        break;
                    }
                }
            }
        }
    }

    #[test]
    fn a_stream_that_ends_early_is_not_whole() {
        let whole = gzip(&[7; 100_000]);
        let mut decoder = LayerDecoder::new();
        let mut buffer = vec![0; 200_000];
        let mut rest = &whole[..whole.len() - 9];
        while !rest.is_empty() {
            rest = &rest[decoder.decode(rest, &mut buffer).unwrap().read..];
        }
        assert!(!decoder.is_whole());
    }
}
