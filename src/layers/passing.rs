//! Reading from a large span that has room nowhere: it is fetched, hashed and inflated in passing.
//!
//! The read gets its part once the last byte has confirmed the digest. A whole span comes over the network for each such read, so this
//! is for nodes whose disk is full, where the alternative is an error.

use super::{
    large::Excerpt,
    layer::Layer,
    read::stopping,
    source::{Body, SourceError},
};
use crate::{
    fs::ReadError,
    inflate::{InflateError, SpanInflater},
    oci::{Digest, Hasher},
    ztoc::{Compression, Span},
};
use bytes::Bytes;
use std::ops::Range;
use tokio::sync::mpsc;

/// Chunks between who receives and who inflates.
const QUEUE: usize = 16;
/// Inflated bytes at a time.
const PIECE: usize = 64 << 10;

/// What passed by.
struct Passed {
    digest: Digest,
    result: Result<Bytes, InflateError>,
}

impl Layer {
    /// The bytes `part` of a span, which are kept nowhere.
    pub(super) async fn in_passing(&self, span: usize, part: Range<u64>) -> Result<Bytes, ReadError> {
        let entry = self.entry(span)?;
        // One at a time: each of them could fill the link.
        let _turn = self.checking.lock().await;
        let mut avoid = Vec::new();
        let mut last = ReadError::Fetch { reason: "no source for the layer".into() };
        for source in self.sources() {
            if self.is_removed() {
                return Err(ReadError::Removed);
            }
            // Once more where the first answer was wrong, which may come from another host.
            for _ in 0..2 {
                let body = match source.open(entry.compressed.clone(), &avoid).await {
                    Ok(body) => body,
                    Err(error) => {
                        last = ReadError::Fetch { reason: error.reason };
                        break;
                    }
                };
                let host = body.host();
                match self.pass(span, entry, part.clone(), body).await {
                    Ok(Ok(Passed { digest, result })) if digest == entry.digest => {
                        return result.map_err(|error| ReadError::Inflate { span, reason: error.to_string() });
                    }
                    Ok(Ok(_)) => last = ReadError::Digest { span },
                    Ok(Err(error)) => last = ReadError::Fetch { reason: error.reason },
                    Err(error) => return Err(error),
                }
                avoid.extend(host);
            }
        }
        Err(last)
    }

    async fn pass(
        &self,
        span: usize,
        entry: &Span,
        part: Range<u64>,
        mut body: Box<dyn Body>,
    ) -> Result<Result<Passed, SourceError>, ReadError> {
        let (chunks, received) = mpsc::channel(QUEUE);
        let inflating = self.blocking(move |layer| layer.digest_and_inflate(span, part, received));
        let receiving = async move {
            let mut left = entry.compressed.end - entry.compressed.start;
            while left > 0 {
                let Some(mut chunk) = body.chunk().await? else { break };
                chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                left -= chunk.len() as u64;
                if chunks.send(chunk).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        let (received, passed) = tokio::join!(receiving, inflating);
        Ok(received.and(Ok(passed?)))
    }

    fn digest_and_inflate(
        &self,
        span: usize,
        part: Range<u64>,
        mut chunks: mpsc::Receiver<Bytes>,
    ) -> Result<Passed, ReadError> {
        let entry = self.entry(span)?;
        let window = self.files.ztoc().get(entry.window.clone()).unwrap_or_default();
        let mut inflater = match self.table.compression {
            Compression::Gzip => Some(SpanInflater::new(entry.bits, window).map_err(|_| stopping())?),
            Compression::Uncompressed => None,
        };
        let mut hasher = Hasher::new();
        let mut excerpt = Excerpt::new(part);
        let mut failure = None;
        let mut out = vec![0; PIECE];
        while let Some(chunk) = chunks.blocking_recv() {
            hasher.update(&chunk);
            let Some(inflater) = &mut inflater else {
                excerpt.pass(&chunk);
                continue;
            };
            let mut input: &[u8] = &chunk;
            while failure.is_none() && !excerpt.is_whole() {
                match inflater.inflate(input, &mut out) {
                    Ok(moved) if moved.written == 0 => break,
                    Ok(moved) => {
                        input = &input[moved.read..];
                        excerpt.pass(&out[..moved.written]);
                    }
                    Err(error) => failure = Some(error),
                }
            }
        }
        let missing = excerpt.part.end - excerpt.part.start - excerpt.taken.len() as u64;
        let result = match failure {
            Some(error) => Err(error),
            None if missing > 0 => Err(InflateError::Short { missing }),
            None => Ok(excerpt.taken.into()),
        };
        Ok(Passed { digest: hasher.finish(), result })
    }
}
