//! A layer in memory, for unit tests.

use super::read::{LayerData, ReadError};
use super::tree::{HeaderCheck, Layer, LazyLayer, Xattrs};
use crate::layers::toc::{self, Entry, EntryKind, Toc};
use crate::layout::SnapshotId;
use crate::oci::Digest;
use bytes::Bytes;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{future::Future, pin::Pin};

pub struct Memory {
    pub bytes: Bytes,
    pub fetched: AtomicU64,
}

impl Memory {
    pub fn new(bytes: Vec<u8>) -> Memory {
        Memory { bytes: bytes.into(), fetched: AtomicU64::new(0) }
    }

    fn slice(&self, range: Range<u64>) -> Option<Bytes> {
        let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
        (start <= end && end <= self.bytes.len()).then(|| self.bytes.slice(start..end))
    }
}

impl LayerData for Memory {
    fn try_read(&self, range: Range<u64>) -> Option<Bytes> {
        self.slice(range)
    }
    fn read(&self, range: Range<u64>) -> Pin<Box<dyn Future<Output = Result<Bytes, ReadError>> + Send + '_>> {
        Box::pin(async move { self.slice(range.clone()).ok_or(ReadError::OutOfRange { range }) })
    }
    fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }
    fn compressed_size(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn digest(&self) -> Digest {
        Digest::of(b"layer")
    }
}

pub fn entry(name: &str, kind: EntryKind) -> Entry<'_> {
    Entry {
        name: name.as_bytes(),
        kind,
        offset: 512,
        header: 0,
        size: 0,
        link: b"",
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: (1_700_000_000, 0),
        devmajor: 0,
        devminor: 0,
        xattrs: Vec::new(),
    }
}

pub fn file(name: &str, offset: u64, size: u64) -> Entry<'_> {
    Entry { offset, header: offset - 512, size, ..entry(name, EntryKind::Regular) }
}

pub fn lazy<'a>(id: u32, data: Arc<dyn LayerData>, entries: impl IntoIterator<Item = Entry<'a>>) -> LazyLayer {
    let layer = data.digest();
    let toc = Toc::from_bytes(toc::build_entries(&layer, 0, entries).unwrap(), &layer).unwrap();
    LazyLayer {
        id: SnapshotId(id),
        toc: Arc::new(toc),
        implied: HashMap::new(),
        data,
        headers: HeaderCheck::Skipped,
        xattrs: Xattrs::Shown,
        maps: None,
    }
}

pub fn layer_of<'a>(data: Arc<Memory>, entries: impl IntoIterator<Item = Entry<'a>>) -> Arc<Layer> {
    Arc::new(Layer::new(lazy(7, data, entries)))
}
