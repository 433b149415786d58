//! Content of regular files: which bytes of the layer answer a read, and that they are the file's.
//!
//! ```text
//! READ ─▶ plan ─▶ header compared? ──no──▶ header region ─▶ compare ─┐
//!          │            │ yes                                        ▼
//!          │            └────────────────────────────────────────▶ content
//!          └─ at or beyond the end: no bytes
//! ```
//!
//! Two ways through that picture: [`try_read`] on the FUSE thread, as far as memory goes; [`read`] in a task.
//!
//! Memory: a task that waits holds a permit of its layer's budget and whatever [`LayerData::read`] holds; when the bytes are
//! there they are written to the kernel in the same poll, so finished reads don't pile up. Nothing here blocks a FUSE thread.

use super::header::{self, HeaderMismatch};
use super::tree::Layer;
use crate::layers::{
    prior,
    toc::{Kind, Node},
};
use crate::oci::Digest;
use bytes::Bytes;
use std::ops::Range;
use std::{future::Future, pin::Pin};

/// The uncompressed bytes of one layer. Implemented by the layer store.
pub trait LayerData: Send + Sync {
    /// Bytes that are in memory already. Called on a FUSE thread: must not wait for disk, network or a busy lock.
    fn try_read(&self, range: Range<u64>) -> Option<Bytes>;
    /// Verified bytes of `range`, all of them. May be dropped at any await when the reader's process dies. While it waits it
    /// should hold no memory in proportion to `range`.
    fn read(&self, range: Range<u64>) -> Pin<Box<dyn Future<Output = Result<Bytes, ReadError>> + Send + '_>>;
    /// A program or library that lies at `_file` is in use: the byte at `_touched` is wanted, the rest is likely to be.
    fn in_use(&self, _file: Range<u64>, _touched: u64) {}
    /// Compressed bytes that are here.
    fn fetched(&self) -> u64;
    fn compressed_size(&self) -> u64;
    fn digest(&self) -> Digest;
}

/// Why a read fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("failed to read the file: {reason}")]
    Fetch { reason: String },
    #[error("failed to read the file: span {span}: span digests do not match")]
    Digest { span: usize },
    #[error("failed to read the file: span {span} cannot be inflated: {reason}")]
    Inflate { span: usize, reason: String },
    #[error("failed to read the file: bytes {}..{} are outside of the layer", range.start, range.end)]
    OutOfRange { range: Range<u64> },
    #[error(
        "failed to read the file: unexpected copied data size for on-demand fetch. read = {got}, expected = {expected}"
    )]
    Length { got: usize, expected: u64 },
    #[error("failed to read the file: local storage: {reason}")]
    Storage { reason: String },
    #[error("failed to read the file")]
    Header(#[source] HeaderMismatch),
    #[error("failed to read the file: the SOCI index of its layer is wrong: {reason}")]
    Condemned { reason: String },
    #[error("failed to read the file: the read ended unexpectedly")]
    Panicked,
    #[error("the read was interrupted")]
    Interrupted,
    #[error("the layer was removed")]
    Removed,
}

impl ReadError {
    /// In one word, for searches: `SOCI_REASON=` in the journal.
    pub fn code(&self) -> &'static str {
        match self {
            ReadError::Fetch { .. } => "fetch",
            ReadError::Digest { .. } => "digest",
            ReadError::Inflate { .. } => "inflate",
            ReadError::OutOfRange { .. } | ReadError::Length { .. } => "range",
            ReadError::Storage { .. } => "storage",
            ReadError::Header(_) => "header",
            ReadError::Condemned { .. } => "index-wrong",
            ReadError::Panicked | ReadError::Interrupted | ReadError::Removed => "ended",
        }
    }

    /// With its causes, as logs and the state file show it.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

/// The bytes of the layer that answer a read of `size` bytes at `offset` of `node`; empty at or beyond its end. `None` if the
/// node has no content.
pub(super) fn plan(node: &Node, offset: u64, size: u32) -> Option<Range<u64>> {
    if node.kind != Kind::Regular {
        return None;
    }
    let start = offset.min(node.size);
    let end = start.saturating_add(size.into()).min(node.size);
    // No overflow: the TOC refuses files that end beyond i64::MAX.
    Some(node.offset.saturating_add(start)..node.offset.saturating_add(end))
}

fn exactly(bytes: Bytes, range: &Range<u64>) -> Result<Bytes, ReadError> {
    let expected = range.end.saturating_sub(range.start);
    match bytes.len() as u64 == expected {
        true => Ok(bytes),
        false => Err(ReadError::Length { got: bytes.len(), expected }),
    }
}

fn check_header(layer: &Layer, node: &Node, region: &[u8]) -> Result<(), ReadError> {
    header::compare(&layer.toc, node, region).map_err(ReadError::Header)?;
    layer.header_is_right(node.index);
    Ok(())
}

/// Answers a read from memory, if everything it needs is there.
pub(super) fn try_read(layer: &Layer, node: &Node, range: Range<u64>) -> Option<Result<Bytes, ReadError>> {
    if range.is_empty() {
        return Some(Ok(Bytes::new()));
    }
    if layer.must_check_header(node.index) {
        let region = layer.data.try_read(node.header())?;
        if let Err(error) = exactly(region, &node.header()).and_then(|region| check_header(layer, node, &region)) {
            return Some(Err(error));
        }
    }
    layer.data.try_read(range.clone()).map(|bytes| exactly(bytes, &range))
}

/// Answers a read, waiting for what is not there yet.
pub(super) async fn read(layer: &Layer, node: &Node, range: Range<u64>) -> Result<Bytes, ReadError> {
    let pages = u32::try_from(range.end.saturating_sub(range.start).div_ceil(4096)).unwrap_or(u32::MAX);
    // The budget is never closed.
    let _permit = layer.budget.acquire_many(pages).await.map_err(|_| ReadError::Removed)?;
    if layer.must_check_header(node.index) {
        let region = layer.data.read(node.header()).await?;
        check_header(layer, node, &exactly(region, &node.header())?)?;
    }
    if prior::is_code(layer.toc.name(node.index), node.mode & 0o7777) {
        layer.data.in_use(node.offset..node.offset.saturating_add(node.size), range.start);
    }
    exactly(layer.data.read(range.clone()).await?, &range)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::testing::{Memory, file, layer_of};
    use std::sync::Arc;

    #[test]
    fn reads_are_cut_at_the_end_of_the_file() {
        let layer = layer_of(Arc::new(Memory::new(vec![7; 4096])), [file("f", 1000, 100)]);
        let node = layer.toc.node(1).unwrap();
        assert_eq!(plan(&node, 0, 4096), Some(1000..1100));
        assert_eq!(plan(&node, 40, 10), Some(1040..1050));
        assert_eq!(plan(&node, 99, 4096), Some(1099..1100));
        for beyond in [100, 101, u64::MAX] {
            assert!(plan(&node, beyond, 4096).unwrap().is_empty());
            assert_eq!(try_read(&layer, &node, plan(&node, beyond, 1).unwrap()), Some(Ok(Bytes::new())));
        }
        assert_eq!(plan(&layer.toc.node(0).unwrap(), 0, 1), None);
    }

    #[tokio::test]
    async fn a_source_that_returns_too_little_is_an_error_not_a_short_file() {
        let memory = Arc::new(Memory::new(vec![7; 1050]));
        let layer = layer_of(memory, [file("f", 1000, 100)]);
        let node = layer.toc.node(1).unwrap();
        let outcome = read(&layer, &node, plan(&node, 0, 4096).unwrap()).await;
        assert!(matches!(outcome, Err(ReadError::OutOfRange { .. } | ReadError::Length { .. })), "{outcome:?}");
    }
}
