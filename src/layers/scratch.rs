//! Inflated spans on disk, for as long as they may be wanted again: the second level behind the memory cache.
//!
//! Programs map their libraries and touch pages of many spans in turn, more than fit in memory, and inflating a span again for every
//! page costs what the whole start should. So inflated spans go into one unlinked file. In practice it lives in the page cache: it is
//! bounded, and what is evicted is punched out, usually before the kernel has written any of it. Of a disk that fills up it takes nothing that
//! fetched data could have.
//!
//! Invariant: what is read is what was put. A slot is punched out when its last reader is done with it, never before.
//!
//! Absent on purpose: durability. The file has no name, and is gone with the process.

use super::{cache::Key, room::Claim};
use bytes::Bytes;
use rustix::{
    fs::{FallocateFlags, Mode, OFlags},
    io::{Errno, ReadWriteFlags},
};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, IoSliceMut},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Slots begin at multiples of this: holes are punched in whole blocks.
const BLOCK: u64 = 4096;
/// ext4 files end at 16 TiB; long before that a new one takes over. (At the front of the old one somebody may still read.)
const MAX_FILE: u64 = 4 << 40;

/// Who puts a span, and so what it may push out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// A reader wanted it: the least recently read goes.
    Wanted,
    /// Nobody has asked for it yet: it takes only room that is free.
    Ahead,
}

struct Slot {
    file: Arc<File>,
    offset: u64,
    length: u64,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // If the hole cannot be punched, the bytes stay until the process ends.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(&*self.file, flags, self.offset, self.length.next_multiple_of(BLOCK));
    }
}

struct Inner {
    /// Where the next slot goes; slots keep the file they are in.
    file: Arc<File>,
    slots: HashMap<Key, (Arc<Slot>, u64)>,
    /// Keys by when they were read last, oldest first.
    by_use: BTreeMap<u64, Key>,
    clock: u64,
    used: u64,
    next: u64,
}

impl Inner {
    fn remove(&mut self, key: Key) -> Option<Arc<Slot>> {
        let (slot, used) = self.slots.remove(&key)?;
        self.by_use.remove(&used);
        self.used -= slot.length;
        Some(slot)
    }

    fn touch(&mut self, key: Key) -> Option<Arc<Slot>> {
        self.clock += 1;
        let clock = self.clock;
        let (slot, used) = self.slots.get_mut(&key)?;
        self.by_use.remove(used);
        *used = clock;
        self.by_use.insert(clock, key);
        Some(slot.clone())
    }
}

/// The file. One per node.
pub struct Scratch {
    directory: PathBuf,
    /// For moments only: FUSE threads take it.
    inner: Mutex<Inner>,
    max_bytes: u64,
}

fn unlinked(directory: &Path) -> io::Result<Arc<File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(Arc::new(File::from(rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?)))
}

impl Scratch {
    /// An unlinked file in `directory`, of at most `max_bytes`.
    pub fn create(directory: &Path, max_bytes: u64) -> io::Result<Scratch> {
        let file = unlinked(directory)?;
        let inner = Inner { file, slots: HashMap::new(), by_use: BTreeMap::new(), clock: 0, used: 0, next: 0 };
        Ok(Scratch { directory: directory.to_owned(), inner: Mutex::new(inner), max_bytes })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is room for `bytes` more without pushing anything out.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.lock().used.saturating_add(bytes) <= self.max_bytes
    }

    /// Whether `key` is here.
    pub fn holds(&self, key: Key) -> bool {
        self.lock().slots.contains_key(&key)
    }

    /// Keeps `bytes` as `key`. Blocks on the disk; a disk of which others need the rest keeps nothing, and that is no error.
    pub fn put(&self, key: Key, bytes: &[u8], put: Put) {
        let length = bytes.len() as u64;
        // Punched out when this returns, not under the lock.
        let mut gone = Vec::new();
        let slot = {
            let mut inner = self.lock();
            let fits = |inner: &Inner| inner.used + length <= self.max_bytes;
            if length > self.max_bytes || inner.slots.contains_key(&key) || (put == Put::Ahead && !fits(&inner)) {
                return;
            }
            if inner.next > MAX_FILE {
                let Ok(file) = unlinked(&self.directory) else { return };
                (inner.file, inner.next) = (file, 0);
            }
            while !fits(&inner) {
                let Some((_, &oldest)) = inner.by_use.first_key_value() else { break };
                gone.extend(inner.remove(oldest));
            }
            inner.used += length;
            let offset = inner.next;
            inner.next = offset + length.next_multiple_of(BLOCK);
            Slot { file: inner.file.clone(), offset, length }
        };
        let claim = Claim::for_inflated(&slot.file, length);
        let written = claim.and_then(|_claim| slot.file.write_all_at(bytes, slot.offset));
        let mut inner = self.lock();
        if written.is_err() || inner.slots.contains_key(&key) {
            inner.used -= length;
            drop(inner);
            return;
        }
        inner.clock += 1;
        let clock = inner.clock;
        inner.by_use.insert(clock, key);
        inner.slots.insert(key, (Arc::new(slot), clock));
    }

    /// The bytes `part` of `key`, if it is here. Blocks on the disk when the kernel has written it out.
    pub fn read(&self, key: Key, part: Range<u64>) -> Option<Bytes> {
        let slot = self.slot(key, &part)?;
        let mut out = vec![0; (part.end - part.start) as usize];
        slot.file.read_exact_at(&mut out, slot.offset + part.start).ok()?;
        Some(out.into())
    }

    /// The same without waiting for the disk.
    pub fn try_read(&self, key: Key, part: Range<u64>) -> Option<Bytes> {
        let slot = self.slot(key, &part)?;
        let mut out = vec![0; (part.end - part.start) as usize];
        let at = slot.offset + part.start;
        match rustix::io::preadv2(&*slot.file, &mut [IoSliceMut::new(&mut out)], at, ReadWriteFlags::NOWAIT) {
            Ok(read) if read == out.len() => Some(out.into()),
            // Part of it is on disk only, or this kernel or filesystem cannot tell.
            Ok(_) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS) | Err(_) => None,
        }
    }

    fn slot(&self, key: Key, part: &Range<u64>) -> Option<Arc<Slot>> {
        let slot = self.lock().touch(key)?;
        (part.start <= part.end && part.end <= slot.length).then_some(slot)
    }

    /// Forgets every span of `layer`.
    pub fn forget(&self, layer: u64) {
        let mut inner = self.lock();
        let keys: Vec<Key> = inner.slots.keys().filter(|key| key.0 == layer).copied().collect();
        let gone: Vec<_> = keys.into_iter().filter_map(|key| inner.remove(key)).collect();
        drop(inner);
        // Punching takes a moment.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(max_bytes: u64) -> Scratch {
        Scratch::create(&std::env::temp_dir(), max_bytes).unwrap()
    }

    #[test]
    fn what_is_read_is_what_was_put_and_the_least_recently_read_goes() {
        let scratch = scratch(10_000);
        scratch.put((1, 0), &[1; 4000], Put::Wanted);
        scratch.put((1, 1), &[2; 4000], Put::Wanted);
        assert_eq!(scratch.read((1, 0), 10..20).unwrap(), vec![1; 10]);
        scratch.put((1, 2), &[3; 4000], Put::Ahead);
        assert!(!scratch.holds((1, 2)), "what nobody asked for pushes nothing out");
        scratch.put((1, 2), &[3; 4000], Put::Wanted);
        assert!(scratch.read((1, 1), 0..1).is_none() && scratch.read((1, 0), 0..4000).is_some());
        assert_eq!(scratch.try_read((1, 2), 3999..4000).unwrap(), vec![3; 1]);
        assert!(scratch.read((1, 2), 3999..4001).is_none());
        scratch.forget(1);
        assert!(scratch.has_room(10_000) && !scratch.holds((1, 2)));
    }

    #[test]
    fn a_file_that_is_used_up_is_followed_by_another() {
        let scratch = scratch(1 << 20);
        scratch.put((1, 0), &[1; 5000], Put::Wanted);
        scratch.lock().next = MAX_FILE + 1;
        scratch.put((1, 1), &[2; 5000], Put::Wanted);
        assert_eq!(scratch.lock().next, 8192);
        assert_eq!(scratch.read((1, 0), 0..5000).unwrap(), vec![1; 5000]);
        assert_eq!(scratch.read((1, 1), 0..5000).unwrap(), vec![2; 5000]);
    }

    #[test]
    fn a_slot_that_is_being_read_is_not_punched_out() {
        let scratch = scratch(4096);
        scratch.put((1, 0), &[7; 4096], Put::Wanted);
        let slot = scratch.slot((1, 0), &(0..4096)).unwrap();
        scratch.put((1, 1), &[8; 4096], Put::Wanted);
        let mut out = [0; 4096];
        slot.file.read_exact_at(&mut out, slot.offset).unwrap();
        assert_eq!(out, [7; 4096]);
        let (file, offset) = (slot.file.clone(), slot.offset);
        drop(slot);
        file.read_exact_at(&mut out, offset).unwrap();
        assert_eq!(out, [0; 4096], "nobody needs it any more");
    }
}
