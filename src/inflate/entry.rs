//! Where in a layer a second decoder can begin, and how to know that it was right to.
//!
//! ```text
//!   decoder of the part before:  ……………………▶ Place ──┐ the same state?  yes: what the second one made is what this one would have made
//!   decoder of this part:               Entry ……────┘                 no: it is thrown away, and this one goes on
//! ```
//! So an entry may be a guess, or the word of a stranger: nothing but time is lost if it is wrong.
#![forbid(unsafe_code)]

use super::{Sniffed, WINDOW};

/// What a decoder assumes that begins in the middle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A gzip member or a zstd frame begins here.
    Start,
    /// A DEFLATE block begins here.
    Block {
        /// How many high bits of the first byte belong to it, when not all.
        bits: u8,
        /// The end of what comes out before it. What refers back further is refused.
        window: Vec<u8>,
    },
}

/// Where a decoder stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// After a gzip member or a zstd frame.
    Start,
    /// In front of a DEFLATE block; so many bits of the last byte belong to it.
    Block { bits: u8 },
}

impl Entry {
    /// A checkpoint, if its numbers are possible.
    pub fn block(bits: u8, window: Vec<u8>) -> Option<Entry> {
        (bits <= 7 && window.len() <= WINDOW).then_some(Entry::Block { bits, window })
    }

    /// How many bytes before the place it needs as well.
    pub fn shared(&self) -> u64 {
        match self {
            Entry::Start | Entry::Block { bits: 0, .. } => 0,
            Entry::Block { .. } => 1,
        }
    }

    /// Whether a decoder at `place`, `before` being the end of what has come out of it, goes on as one that begins here: whatever the
    /// latter makes without an error, the former would make too.
    pub fn is_at(&self, place: Option<Place>, before: &[u8]) -> bool {
        match (self, place) {
            (Entry::Start, Some(Place::Start)) => true,
            (Entry::Block { bits, window }, Some(Place::Block { bits: there })) => {
                *bits == there && before.ends_with(window)
            }
            _ => false,
        }
    }
}

/// Bytes that may mean an entry that needs nothing of what comes before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// A gzip member begins: bgzip, stargz, files put together.
    Member,
    /// DEFLATE data was flushed, and may begin anew: `pigz -i`.
    Flush,
    /// A zstd frame begins: zstd:chunked, pzstd.
    Frame,
}

impl Marker {
    /// Those of a format, the likelier first.
    pub fn of(format: Sniffed) -> &'static [Marker] {
        match format {
            Sniffed::Gzip => &[Marker::Member, Marker::Flush],
            Sniffed::Zstd => &[Marker::Frame],
            Sniffed::Tar | Sniffed::Unknown => &[],
        }
    }

    /// The first one in `bytes` that lies wholly in them: where its entry is.
    pub fn find(self, bytes: &[u8]) -> Option<usize> {
        let (mark, behind): (&[u8], usize) = match self {
            // Without flags but those of a name or an extra field, which bgzip and stargz use.
            Marker::Member => (&[0x1f, 0x8b, 8], 0),
            Marker::Flush => (&[0, 0, 0xff, 0xff], 4),
            Marker::Frame => (&[0x28, 0xb5, 0x2f, 0xfd], 0),
        };
        memchr::memmem::find(bytes, mark).map(|at| at + behind)
    }

    /// What to assume there.
    pub fn entry(self) -> Entry {
        match self {
            Marker::Member | Marker::Frame => Entry::Start,
            Marker::Flush => Entry::Block { bits: 0, window: Vec::new() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_right_only_in_the_state_that_it_assumes() {
        let block = |bits, window: &[u8]| Entry::block(bits, window.to_vec()).unwrap();
        let at = |bits| Some(Place::Block { bits });
        assert!(block(3, b"end").is_at(at(3), b"the end"));
        assert!(block(0, b"").is_at(at(0), b"anything"));
        assert!(!block(3, b"end").is_at(at(4), b"the end"));
        assert!(!block(3, b"END").is_at(at(3), b"the end"));
        assert!(!block(3, b"before the end").is_at(at(3), b"the end"));
        assert!(!block(0, b"").is_at(Some(Place::Start), b"") && !block(0, b"").is_at(None, b""));
        assert!(Entry::Start.is_at(Some(Place::Start), b"") && !Entry::Start.is_at(at(0), b""));
        assert_eq!(Entry::block(8, Vec::new()), None);
        assert_eq!(Entry::block(0, vec![0; WINDOW + 1]), None);
    }

    #[test]
    fn markers_are_found_where_they_are_whole() {
        assert_eq!(Marker::Member.find(b"..\x1f\x8b\x08.."), Some(2));
        assert_eq!(Marker::Flush.find(b"..\0\0\xff\xff"), Some(6));
        assert_eq!(Marker::Frame.find(b"\x28\xb5\x2f\xfd"), Some(0));
        assert_eq!(Marker::Frame.find(b"\x28\xb5\x2f"), None);
    }
}
