//! Memory that outlives the process: an anonymous file (memfd) that other processes keep open, mapped by the one that uses it.
//!
//! It is read and written as 64-bit words, each at once, because a process of the past or future may have left or may find any of them. What the
//! kernel is asked to put there (`read(2)`) it puts there directly: there is no moment in which it exists only in this process.

use nix::libc;
use rustix::fs::{MemfdFlags, SealFlags};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

/// Neither grows nor shrinks, for ever: so that a mapping of it cannot lose its ground (SIGBUS).
const SEALS: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK).union(SealFlags::SEAL);
const WORD: usize = size_of::<AtomicU64>();

/// A new anonymous file of `size` bytes, all of them zero.
pub fn create(name: &str, size: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, size as u64)?;
    rustix::fs::fcntl_add_seals(&fd, SEALS)?;
    Ok(fd)
}

/// Whether a descriptor that came from elsewhere is a file that [`create`] could have made. Other files cannot be sealed at all.
pub fn is_shared(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SEALS))
}

/// An anonymous file with `bytes`, which nobody can change any more.
pub fn sealed(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut at = 0;
    while at < bytes.len() {
        at += rustix::io::pwrite(&fd, &bytes[at..], at as u64)?;
    }
    rustix::fs::fcntl_add_seals(&fd, SEALS | SealFlags::WRITE)?;
    Ok(fd)
}

/// The content of a file that [`sealed`] could have made, if it has `max` bytes at most.
pub fn unseal(fd: BorrowedFd<'_>, max: usize) -> io::Result<Vec<u8>> {
    let is_sealed = rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SEALS | SealFlags::WRITE));
    let size = rustix::fs::fstat(fd)?.st_size;
    let size = usize::try_from(size).ok().filter(|size| is_sealed && *size <= max);
    let size =
        size.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a sealed anonymous file of sensible size"))?;
    let (mut bytes, mut at) = (vec![0; size], 0);
    while at < size {
        match rustix::io::pread(fd, &mut bytes[at..], at as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => at += read,
        }
    }
    Ok(bytes)
}

/// What tells one such file from another as long as the machine runs.
pub fn identity(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(rustix::fs::fstat(fd)?.st_ino)
}

/// The whole file, mapped.
#[derive(Debug)]
pub struct SharedMemory(memmap2::MmapRaw);

impl SharedMemory {
    /// Maps a file that [`create`] made, here or in another process.
    pub fn map(fd: BorrowedFd<'_>) -> io::Result<SharedMemory> {
        if !is_shared(fd) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a sealed anonymous file"));
        }
        memmap2::MmapRaw::map_raw(fd.as_raw_fd()).map(SharedMemory)
    }

    /// How many words it has.
    pub fn words(&self) -> usize {
        self.0.len() / WORD
    }

    /// # Panics
    /// If there are not so many words.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words(), "word {index} of {}", self.words());
        // SAFETY: in bounds by the assertion; a mapping starts at a page, so words are aligned; the seals keep the file as long as it was when it
        // was mapped; everybody who touches these bytes does so through atomics of this size, or lets the kernel write them (`fill`), which for
        // this purpose is another process.
        unsafe { AtomicU64::from_ptr(self.0.as_mut_ptr().cast::<u64>().add(index)) }
    }

    /// `read(2)` of `device` straight into the `words` words from `first` on: the number of bytes it put there.
    ///
    /// # Panics
    /// If there are not so many words.
    pub fn fill(&self, device: impl AsFd, first: usize, words: usize) -> io::Result<usize> {
        assert!(first.checked_add(words).is_some_and(|end| end <= self.words()), "{words} words from {first}");
        // SAFETY: the range is inside the mapping by the assertion, and the mapping is as long as `self`, which is borrowed. No reference to
        // these bytes exists but to atomics.
        let read = unsafe {
            libc::read(
                device.as_fd().as_raw_fd(),
                self.0.as_mut_ptr().add(first * WORD).cast::<libc::c_void>(),
                words * WORD,
            )
        };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// The first `bytes` bytes from word `first` on, appended to `into`.
    pub fn copy(&self, first: usize, bytes: usize, into: &mut Vec<u8>) {
        let end = into.len() + bytes;
        for index in first..first + bytes.div_ceil(WORD) {
            into.extend_from_slice(&self.word(index).load(Ordering::Relaxed).to_ne_bytes());
        }
        into.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_shared_file_keeps_its_size() {
        let fd = create("test", 4096).expect("memfd");
        assert!(rustix::fs::ftruncate(&fd, 8192).is_err());
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
    }

    #[test]
    fn what_one_mapping_is_told_the_next_one_knows() {
        let fd = create("test", 4096).expect("memfd");
        let first = SharedMemory::map(fd.as_fd()).expect("map");
        first.word(3).store(7, Ordering::Release);
        let (read, mut write) = std::io::pipe().expect("pipe");
        write.write_all(b"hello, world").expect("write");
        assert_eq!(first.fill(&read, 8, 4).expect("read"), 12);
        drop(first);
        let second = SharedMemory::map(fd.as_fd()).expect("map");
        assert_eq!(second.word(3).load(Ordering::Acquire), 7);
        let mut text = b">".to_vec();
        second.copy(8, 12, &mut text);
        assert_eq!(text, b">hello, world");
    }

    #[test]
    fn only_sealed_anonymous_files_are_mapped() {
        let file = tempfile::tempfile().expect("file");
        file.set_len(4096).expect("size");
        assert!(!is_shared(file.as_fd()) && SharedMemory::map(file.as_fd()).is_err());
        let null = std::fs::File::open("/dev/null").expect("null");
        assert!(SharedMemory::map(null.as_fd()).is_err());
    }

    #[test]
    fn what_is_sealed_is_read_back_and_cannot_be_changed() {
        let fd = sealed("test", b"secret").expect("memfd");
        assert_eq!(unseal(fd.as_fd(), 6).expect("read"), b"secret");
        assert!(unseal(fd.as_fd(), 5).is_err(), "too large");
        assert!(rustix::io::pwrite(&fd, b"x", 0).is_err());
        assert!(unseal(create("test", 4096).expect("memfd").as_fd(), 4096).is_err(), "that one can be written");
    }

    #[test]
    #[should_panic(expected = "word 512 of 512")]
    fn there_is_nothing_beyond_the_end() {
        let memory = SharedMemory::map(create("test", 4096).expect("memfd").as_fd()).expect("map");
        memory.word(512);
    }
}
