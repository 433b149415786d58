//! The two ends of FlatBuffers that zTOCs need: a builder that repeats the Go builder byte for byte, and bounds-checked
//! views of hostile bytes.
//!
//! A FlatBuffer is built from its end to its front. [`Builder`] therefore appends everything *reversed* and turns the
//! whole around once at the end: that never copies a growing buffer, and parts already built are never touched again.
//! An offset below is a distance from the end of the finished buffer.
//!
//! The views ask only that what is read lies within the bytes. Strings are byte strings (the format says UTF-8, Go does
//! not care, and tar names are what they are), alignment is not needed, and no view follows anything recursively.

use super::MAX_BYTES;
use std::ops::Range;

/// The buffer would exceed what FlatBuffers can address.
#[derive(Debug)]
pub struct TooLarge;

/// Distance of an object from the end of the buffer.
pub type Offset = u32;

/// zTOC tables have at most 14 slots.
const MAX_SLOTS: usize = 14;

#[derive(Clone, Copy, PartialEq, Eq)]
struct VTable {
    slots: usize,
    /// Table size, then the position of each slot in the table (0: absent).
    entries: [u16; MAX_SLOTS + 1],
}

/// Builds a FlatBuffer with the Go builder's layout.
pub struct Builder {
    reversed: Vec<u8>,
    alignment: usize,
    vtables: Vec<(VTable, usize)>,
    start: usize,
    slots: [usize; MAX_SLOTS],
}

impl Builder {
    pub fn new() -> Builder {
        Builder { reversed: Vec::new(), alignment: 1, vtables: Vec::new(), start: 0, slots: [0; MAX_SLOTS] }
    }

    /// Fails as soon as the buffer has outgrown its format; everything built later is meaningless.
    pub fn check(&self) -> Result<(), TooLarge> {
        if self.reversed.len() > MAX_BYTES { Err(TooLarge) } else { Ok(()) }
    }

    /// Zeros until `extra` more bytes would end at a multiple of `size`.
    fn align(&mut self, size: usize, extra: usize) {
        self.alignment = self.alignment.max(size);
        let pad = (self.reversed.len() + extra).wrapping_neg() % size;
        self.reversed.resize(self.reversed.len() + pad, 0);
    }

    fn put(&mut self, bytes: &[u8]) {
        let from = self.reversed.len();
        self.reversed.extend_from_slice(bytes);
        self.reversed[from..].reverse();
    }

    fn here(&self) -> Offset {
        self.reversed.len() as Offset // `check` tells when this has wrapped
    }

    pub fn string(&mut self, bytes: &[u8]) -> Offset {
        self.align(4, bytes.len() + 1);
        self.put(&[0]);
        self.put(bytes);
        self.put(&(bytes.len() as u32).to_le_bytes());
        self.here()
    }

    /// Frees `bytes` while it copies them, so that both are never there in full.
    pub fn byte_vector(&mut self, mut bytes: Vec<u8>) -> Offset {
        const PIECE: usize = 1 << 20;
        let len = bytes.len();
        self.align(4, len);
        while !bytes.is_empty() {
            let rest = bytes.len().saturating_sub(PIECE);
            self.put(&bytes[rest..]);
            bytes.truncate(rest);
            bytes.shrink_to_fit();
        }
        self.put(&(len as u32).to_le_bytes());
        self.here()
    }

    /// `reversed_offsets`: those of the last element first.
    pub fn offsets(&mut self, reversed_offsets: &[Offset]) -> Offset {
        self.align(4, 4 * reversed_offsets.len());
        for &target in reversed_offsets {
            self.put_offset(target);
        }
        self.put(&(reversed_offsets.len() as u32).to_le_bytes());
        self.here()
    }

    fn put_offset(&mut self, target: Offset) {
        self.align(4, 0);
        let distance = self.here().wrapping_sub(target).wrapping_add(4);
        self.put(&distance.to_le_bytes());
    }

    pub fn start_table(&mut self) {
        self.start = self.reversed.len();
        self.slots = [0; MAX_SLOTS];
    }

    /// A scalar of any width, left out when it is the default.
    pub fn scalar<const N: usize>(&mut self, slot: usize, value: [u8; N], default: [u8; N]) {
        if value != default {
            self.align(N, 0);
            self.put(&value);
            self.slots[slot] = self.reversed.len();
        }
    }

    pub fn i64(&mut self, slot: usize, value: i64) {
        self.scalar(slot, value.to_le_bytes(), [0; 8]);
    }

    pub fn u32(&mut self, slot: usize, value: u32) {
        self.scalar(slot, value.to_le_bytes(), [0; 4]);
    }

    pub fn offset(&mut self, slot: usize, target: Offset) {
        self.put_offset(target);
        self.slots[slot] = self.reversed.len();
    }

    pub fn end_table(&mut self) -> Offset {
        self.align(4, 0);
        let table = self.reversed.len() + 4;
        let slots = self.slots.iter().rposition(|&at| at != 0).map_or(0, |last| last + 1);
        let mut vtable = VTable { slots, entries: [0; MAX_SLOTS + 1] };
        vtable.entries[0] = (table - self.start) as u16; // at most 14 slots of 8 bytes
        for (entry, &at) in vtable.entries[1..].iter_mut().zip(&self.slots[..slots]) {
            *entry = if at == 0 { 0 } else { (table - at) as u16 };
        }
        match self.vtables.iter().rposition(|(known, _)| *known == vtable) {
            Some(index) => {
                let to_vtable = self.vtables[index].1 as i64 - table as i64;
                self.put(&(to_vtable as i32).to_le_bytes());
                let last = self.vtables.len() - 1;
                self.vtables.swap(index, last); // neighbours tend to look alike
            }
            None => {
                let size = 4 + 2 * slots;
                self.put(&(size as i32).to_le_bytes());
                for entry in vtable.entries[..=slots].iter().rev() {
                    self.put(&entry.to_le_bytes());
                }
                self.put(&(size as u16).to_le_bytes());
                self.vtables.push((vtable, self.reversed.len()));
            }
        }
        table as Offset
    }

    pub fn finish(mut self, root: Offset) -> Result<Vec<u8>, TooLarge> {
        self.align(self.alignment, 4);
        self.put_offset(root);
        self.check()?;
        let mut bytes = self.reversed;
        bytes.reverse();
        Ok(bytes)
    }
}

/// Something points outside of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBounds;

type Checked<T> = Result<T, OutOfBounds>;

fn array<const N: usize>(bytes: &[u8], at: usize) -> Checked<[u8; N]> {
    let end = at.checked_add(N).ok_or(OutOfBounds)?;
    bytes.get(at..end).and_then(|slice| slice.try_into().ok()).ok_or(OutOfBounds)
}

fn u32_at(bytes: &[u8], at: usize) -> Checked<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

/// Follows the offset stored at `at`.
fn follow(bytes: &[u8], at: usize) -> Checked<usize> {
    let target = at.checked_add(u32_at(bytes, at)? as usize).ok_or(OutOfBounds)?;
    if target < bytes.len() { Ok(target) } else { Err(OutOfBounds) }
}

/// Where the bytes of the string or byte vector at `at` are.
fn place(bytes: &[u8], at: usize) -> Checked<Range<usize>> {
    let len = u32_at(bytes, at)? as usize;
    let start = at + 4; // in bounds, or the length could not have been read
    let end = start.checked_add(len).filter(|&end| end <= bytes.len()).ok_or(OutOfBounds)?;
    Ok(start..end)
}

/// A table within hostile bytes.
#[derive(Debug, Clone, Copy)]
pub struct Table<'a> {
    bytes: &'a [u8],
    at: usize,
    vtable: &'a [u8],
}

impl<'a> Table<'a> {
    pub fn root(bytes: &'a [u8]) -> Checked<Table<'a>> {
        Table::at(bytes, follow(bytes, 0)?)
    }

    fn at(bytes: &'a [u8], at: usize) -> Checked<Table<'a>> {
        let distance = i64::from(i32::from_le_bytes(array(bytes, at)?));
        let vtable = i64::try_from(at).ok().and_then(|at| usize::try_from(at - distance).ok()).ok_or(OutOfBounds)?;
        let size = usize::from(u16::from_le_bytes(array(bytes, vtable)?));
        let vtable = vtable.checked_add(size).and_then(|end| bytes.get(vtable..end)).ok_or(OutOfBounds)?;
        Ok(Table { bytes, at, vtable })
    }

    /// Where the field of a slot is, unless absent.
    fn field(&self, slot: usize) -> Option<usize> {
        match array(self.vtable, 4 + 2 * slot).map(u16::from_le_bytes) {
            Ok(0) | Err(OutOfBounds) => None,
            Ok(relative) => Some(self.at + usize::from(relative)),
        }
    }

    pub fn scalar<const N: usize>(&self, slot: usize) -> Checked<Option<[u8; N]>> {
        self.field(slot).map(|at| array(self.bytes, at)).transpose()
    }

    pub fn i64(&self, slot: usize) -> Checked<i64> {
        Ok(self.scalar(slot)?.map_or(0, i64::from_le_bytes))
    }

    pub fn i32(&self, slot: usize) -> Checked<i32> {
        Ok(self.scalar(slot)?.map_or(0, i32::from_le_bytes))
    }

    pub fn u32(&self, slot: usize) -> Checked<u32> {
        Ok(self.scalar(slot)?.map_or(0, u32::from_le_bytes))
    }

    /// A string or byte vector; empty when absent.
    pub fn bytes(&self, slot: usize) -> Checked<&'a [u8]> {
        match self.field(slot) {
            Some(at) => Ok(&self.bytes[place(self.bytes, follow(self.bytes, at)?)?]),
            None => Ok(&[]),
        }
    }

    /// Where the bytes of a slot are.
    pub fn place(&self, slot: usize) -> Checked<Option<Range<usize>>> {
        self.field(slot).map(|at| place(self.bytes, follow(self.bytes, at)?)).transpose()
    }

    pub fn table(&self, slot: usize) -> Checked<Option<Table<'a>>> {
        self.field(slot).map(|at| Table::at(self.bytes, follow(self.bytes, at)?)).transpose()
    }

    /// A vector of offsets; empty when absent.
    pub fn vector(&self, slot: usize) -> Checked<Vector<'a>> {
        let Some(at) = self.field(slot) else {
            return Ok(Vector { bytes: self.bytes, start: 0, len: 0 });
        };
        let at = follow(self.bytes, at)?;
        let len = u32_at(self.bytes, at)? as usize;
        let end = len.checked_mul(4).and_then(|size| size.checked_add(at + 4)).ok_or(OutOfBounds)?;
        if end > self.bytes.len() {
            return Err(OutOfBounds);
        }
        Ok(Vector { bytes: self.bytes, start: at + 4, len })
    }
}

/// A vector of offsets to tables or strings; the offsets are within the bytes, what they point to is not checked yet.
#[derive(Debug, Clone, Copy)]
pub struct Vector<'a> {
    bytes: &'a [u8],
    start: usize,
    len: usize,
}

impl<'a> Vector<'a> {
    pub fn len(&self) -> usize {
        self.len
    }

    fn element(&self, index: usize) -> Checked<usize> {
        if index < self.len { follow(self.bytes, self.start + 4 * index) } else { Err(OutOfBounds) }
    }

    pub fn table(&self, index: usize) -> Checked<Table<'a>> {
        Table::at(self.bytes, self.element(index)?)
    }

    pub fn string(&self, index: usize) -> Checked<&'a [u8]> {
        Ok(&self.bytes[place(self.bytes, self.element(index)?)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The `flatbuffers` crate as the oracle: tables of every shape, shared and unshared vtables, all alignments.
    #[test]
    fn the_layout_is_that_of_the_flatbuffers_crate() {
        for seed in 0..200u32 {
            let mut ours = Builder::new();
            let mut theirs = flatbuffers::FlatBufferBuilder::new();
            let (mut our_tables, mut their_tables) = (Vec::new(), Vec::new());
            for table in 0..5u32 {
                let mix = seed.wrapping_mul(2_654_435_761).wrapping_add(table * 40_503) >> 7;
                let text = vec![b'x'; (mix % 11) as usize];
                let our_text = ours.string(&text);
                let their_text = theirs.create_byte_string(&text);
                ours.start_table();
                let start = theirs.start_table();
                ours.offset(0, our_text);
                theirs.push_slot_always(4, their_text);
                for slot in 1..6usize {
                    let value = if mix >> slot & 1 == 0 { 0 } else { mix };
                    if slot.is_multiple_of(2) {
                        ours.i64(slot, value.into());
                        theirs.push_slot(4 + 2 * slot as u16, i64::from(value), 0);
                    } else {
                        ours.u32(slot, value);
                        theirs.push_slot(4 + 2 * slot as u16, value, 0);
                    }
                }
                our_tables.push(ours.end_table());
                their_tables.push(theirs.end_table(start));
            }
            our_tables.reverse();
            let our_vector = ours.offsets(&our_tables);
            let their_vector = theirs.create_vector(&their_tables);
            let our_blob = ours.byte_vector(vec![7; seed as usize]);
            let their_blob = theirs.create_vector(&vec![7u8; seed as usize]);
            ours.start_table();
            ours.offset(1, our_vector);
            ours.offset(0, our_blob);
            let our_root = ours.end_table();
            let start = theirs.start_table();
            theirs.push_slot_always(6, their_vector);
            theirs.push_slot_always(4, their_blob);
            let their_root = theirs.end_table(start);
            theirs.finish_minimal(their_root);
            let bytes = ours.finish(our_root).unwrap();
            assert_eq!(bytes, theirs.finished_data(), "seed {seed}");
            let root = Table::root(&bytes).unwrap();
            assert_eq!(root.bytes(0).unwrap().len(), seed as usize);
            assert_eq!(root.vector(1).unwrap().len(), 5);
        }
    }
}
