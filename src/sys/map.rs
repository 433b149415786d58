//! Read-only mappings of files that only this product writes, and never changes in place.

use std::{fs::File, io, ops::Deref};

/// A whole file, mapped read-only.
pub struct Mapping(memmap2::Mmap);

impl Mapping {
    /// Maps all of `file` and brings its pages in at once: whoever opens such a file reads all of it first, for its checksum.
    pub fn of(file: &File) -> io::Result<Mapping> {
        let mut options = memmap2::MmapOptions::new();
        options.populate();
        // SAFETY: the bytes of a mapping must not change while they are borrowed, and the file must not shrink (SIGBUS).
        // The files mapped here live in a directory that only this product's user can enter; they are written under a
        // temporary name, renamed when they are complete, and later only unlinked, which leaves a mapping intact.
        unsafe { options.map(file) }.map(Mapping)
    }

    /// Gives the pages back to the page cache, so that they don't count as ours until they are touched again.
    pub fn release_pages(&self) -> io::Result<()> {
        // SAFETY: `MADV_DONTNEED` on a shared or private read-only file mapping drops page table entries; the next access
        // reads the same bytes of the same file again, so nothing that is borrowed changes.
        unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) }
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
