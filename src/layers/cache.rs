//! Inflated spans in memory: bounded in bytes, least recently read out first, each inflated once however many readers ask.
//!
//! It exists because the kernel asks for a span in pieces of at most a megabyte, and inflating starts at a span's beginning every
//! time. What a container has read stays in the kernel's page cache; this one only has to span the moments between those pieces.

use bytes::Bytes;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::OnceCell;

/// A span of a layer: the layer's number in this process, and the span's.
pub type Key = (u64, usize);

#[derive(Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    bytes: u64,
    clock: u64,
}

struct Entry {
    cell: Arc<OnceCell<Bytes>>,
    /// Bytes counted for this entry; 0 until it is filled.
    counted: u64,
    used: u64,
}

/// The cache. One per node.
pub struct InflatedCache {
    inner: Mutex<Inner>,
    max_bytes: u64,
}

impl InflatedCache {
    /// A cache of at most `max_bytes`, not counting what readers hold at the moment.
    pub fn new(max_bytes: u64) -> InflatedCache {
        InflatedCache { inner: Mutex::default(), max_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The span, if it is here now.
    pub fn get(&self, key: Key) -> Option<Bytes> {
        let mut inner = self.lock();
        inner.clock += 1;
        let clock = inner.clock;
        let entry = inner.entries.get_mut(&key)?;
        entry.used = clock;
        entry.cell.get().cloned()
    }

    /// The span, inflated by `inflate` unless it is here or somebody else is at it. If that one gives up, this one takes over.
    pub async fn get_or_inflate<E, F: Future<Output = Result<Bytes, E>>>(
        &self,
        key: Key,
        inflate: impl FnOnce() -> F,
    ) -> Result<Bytes, E> {
        let cell = {
            let mut inner = self.lock();
            inner.clock += 1;
            let clock = inner.clock;
            let entry = inner.entries.entry(key).or_insert_with(|| Entry { cell: Arc::default(), counted: 0, used: 0 });
            entry.used = clock;
            entry.cell.clone()
        };
        let result = cell.get_or_try_init(inflate).await.cloned();
        let mut inner = self.lock();
        match &result {
            Ok(bytes) => {
                if let Some(entry) = inner.entries.get_mut(&key)
                    && entry.counted == 0
                    && Arc::ptr_eq(&entry.cell, &cell)
                {
                    entry.counted = bytes.len() as u64;
                    inner.bytes += bytes.len() as u64;
                }
                self.evict(&mut inner, key);
            }
            Err(_) => {
                // Nobody filled it and nobody else is at it: a failed entry must not stay for ever.
                if inner.entries.get(&key).is_some_and(|e| e.counted == 0 && Arc::strong_count(&e.cell) <= 2) {
                    inner.entries.remove(&key);
                }
            }
        }
        result
    }

    fn evict(&self, inner: &mut Inner, keep: Key) {
        while inner.bytes > self.max_bytes {
            let oldest = inner.entries.iter().filter(|(k, e)| e.counted > 0 && **k != keep).min_by_key(|(_, e)| e.used);
            let Some((&key, _)) = oldest else { break };
            if let Some(entry) = inner.entries.remove(&key) {
                inner.bytes -= entry.counted;
            }
        }
    }

    /// Forgets every span of `layer`.
    pub fn forget(&self, layer: u64) {
        let mut inner = self.lock();
        let mut freed = 0;
        inner.entries.retain(|key, entry| {
            let keep = key.0 != layer;
            if !keep {
                freed += entry.counted;
            }
            keep
        });
        inner.bytes -= freed;
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
}
