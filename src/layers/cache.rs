//! Inflated spans in memory: bounded in bytes, least recently read out first, each inflated once however many readers ask.
//!
//! It exists because the kernel asks for a span in pieces of at most a megabyte, and inflating starts at a span's beginning every
//! time. What a container has read stays in the kernel's page cache; this one only has to span the moments between those pieces.

use bytes::Bytes;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::OnceCell;

/// A span of a layer: the layer's number in this process, and the span's.
pub type Key = (u64, usize);

#[derive(Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    /// The filled ones by when they were read last, oldest first.
    by_use: BTreeMap<u64, Key>,
    bytes: u64,
    clock: u64,
}

struct Entry {
    cell: Arc<OnceCell<Bytes>>,
    /// Place in `by_use`; none until it is filled.
    used: Option<u64>,
}

impl Inner {
    /// `key` was read now.
    fn touch(&mut self, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let Some(bytes) = entry.cell.get() else { return };
        self.clock += 1;
        match entry.used.replace(self.clock) {
            Some(before) => {
                self.by_use.remove(&before);
            }
            None => self.bytes += bytes.len() as u64,
        }
        self.by_use.insert(self.clock, key);
    }

    fn remove(&mut self, key: Key) {
        let Some(entry) = self.entries.remove(&key) else { return };
        if let Some(used) = entry.used {
            self.by_use.remove(&used);
            self.bytes -= entry.cell.get().map_or(0, |bytes| bytes.len() as u64);
        }
    }
}

/// The cache. One per node.
pub struct InflatedCache {
    inner: Mutex<Inner>,
    max_bytes: u64,
}

/// Somebody who fills an entry or waits for it. The last one to leave takes an empty entry along: a failed one, or one whose readers
/// were all interrupted.
struct Visit<'a> {
    cache: &'a InflatedCache,
    key: Key,
    cell: Arc<OnceCell<Bytes>>,
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let mut inner = self.cache.lock();
        // The table's and ours.
        let is_last = Arc::strong_count(&self.cell) <= 2;
        let is_mine = inner.entries.get(&self.key).is_some_and(|entry| Arc::ptr_eq(&entry.cell, &self.cell));
        if is_last && is_mine && self.cell.get().is_none() {
            inner.remove(self.key);
        }
    }
}

impl InflatedCache {
    /// A cache of at most `max_bytes`, or of one span if that is larger, not counting what readers hold at the moment.
    pub fn new(max_bytes: u64) -> InflatedCache {
        InflatedCache { inner: Mutex::default(), max_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The span, if it is here now.
    pub fn get(&self, key: Key) -> Option<Bytes> {
        let mut inner = self.lock();
        let bytes = inner.entries.get(&key)?.cell.get().cloned()?;
        inner.touch(key);
        Some(bytes)
    }

    /// The span, inflated by `inflate` unless it is here or somebody else is at it. If that one gives up, this one takes over.
    pub async fn get_or_inflate<E, F: Future<Output = Result<Bytes, E>>>(
        &self,
        key: Key,
        inflate: impl FnOnce() -> F,
    ) -> Result<Bytes, E> {
        let visit = {
            let mut inner = self.lock();
            let entry = inner.entries.entry(key).or_insert_with(|| Entry { cell: Arc::default(), used: None });
            Visit { cache: self, key, cell: entry.cell.clone() }
        };
        let bytes = visit.cell.get_or_try_init(inflate).await?.clone();
        let mut inner = self.lock();
        if inner.entries.get(&key).is_some_and(|entry| Arc::ptr_eq(&entry.cell, &visit.cell)) {
            inner.touch(key);
        }
        // The newest stays whatever its size: the next piece of it is about to be asked for.
        while inner.bytes > self.max_bytes && inner.by_use.len() > 1 {
            let Some((_, &oldest)) = inner.by_use.first_key_value() else { break };
            inner.remove(oldest);
        }
        drop(inner);
        Ok(bytes)
    }

    /// Forgets every span of `layer`.
    pub fn forget(&self, layer: u64) {
        let mut inner = self.lock();
        let keys: Vec<Key> = inner.entries.keys().filter(|key| key.0 == layer).copied().collect();
        keys.into_iter().for_each(|key| inner.remove(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_least_recently_read_span_goes_first_and_failures_do_not_stay() {
        let cache = InflatedCache::new(10);
        for span in 0..2 {
            cache.get_or_inflate((1, span), || async { Ok::<_, ()>(Bytes::from_static(b"12345")) }).await.unwrap();
        }
        assert!(cache.get((1, 0)).is_some());
        cache.get_or_inflate((1, 2), || async { Ok::<_, ()>(Bytes::from_static(b"12345")) }).await.unwrap();
        assert!(cache.get((1, 1)).is_none() && cache.get((1, 0)).is_some());
        assert!(cache.get_or_inflate((2, 0), || async { Err(()) }).await.is_err());
        assert!(cache.get_or_inflate((2, 0), || async { Ok::<_, ()>(Bytes::from_static(b"1")) }).await.is_ok());
        cache.forget(1);
        assert_eq!(cache.lock().bytes, 1);
    }

    #[tokio::test]
    async fn an_interrupted_reader_leaves_nothing_and_the_next_one_takes_over() {
        let cache = Arc::new(InflatedCache::new(10));
        let stuck = cache.get_or_inflate((1, 0), || async { std::future::pending::<Result<Bytes, ()>>().await });
        let waiting = cache.get_or_inflate((1, 0), || async { Ok::<_, ()>(Bytes::from_static(b"1")) });
        tokio::select! {
            biased;
            _ = stuck => unreachable!("it never ends"),
            _ = tokio::task::yield_now() => {}
        }
        assert!(waiting.await.is_ok());
        let stuck = cache.get_or_inflate((1, 1), || async { std::future::pending::<Result<Bytes, ()>>().await });
        assert!(futures::FutureExt::now_or_never(stuck).is_none());
        assert_eq!(cache.lock().entries.len(), 1);
    }

    #[tokio::test]
    async fn a_span_larger_than_the_cache_stays_until_the_next_one() {
        let cache = InflatedCache::new(3);
        for span in 0..2 {
            assert!(
                cache.get_or_inflate((1, span), || async { Ok::<_, ()>(Bytes::from_static(b"1234")) }).await.is_ok()
            );
        }
        assert!(cache.get((1, 0)).is_none());
        assert_eq!(cache.lock().bytes, 4);
    }
}
