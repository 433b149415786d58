//! One range as several requests at the same time.
//!
//! A blocked reader's request shares the link with whatever streams in the background, connection by connection. Asked for in pieces
//! it has more connections, so more of the link, and new ones need fewer round trips to get up to speed.

use super::{
    receive::MAX_BUFFERED,
    source::{Body, Remedy, Source, SourceError},
};
use crate::registry::HostId;
use bytes::Bytes;
use futures::future::BoxFuture;
use std::{collections::VecDeque, ops::Range, sync::Arc};
use tokio::{sync::mpsc, task::JoinSet};

/// Smaller pieces than this cost more in requests than they gain in share.
const MIN_PIECE: u64 = 384 << 10;
/// More pieces than this need connections that have not got up to speed yet.
const MAX_PIECES: u64 = 2;
/// Chunks of a piece that wait for their turn; the pieces of one span are in memory anyway when it is complete. Larger ones are not split.
const QUEUE: usize = 1024;

/// Opens `range` of `source` in pieces, or as one if it is small.
pub async fn open(source: &Arc<dyn Source>, range: Range<u64>, avoid: &[HostId]) -> Result<Box<dyn Body>, SourceError> {
    let length = range.end - range.start;
    let pieces = (length / MIN_PIECE).clamp(1, MAX_PIECES);
    // Who sent wrong bytes must be known the next time.
    if pieces == 1 || length > MAX_BUFFERED || !avoid.is_empty() || !source.is_remote() {
        return source.open(range, avoid).await;
    }
    let step = length.div_ceil(pieces);
    let mut rest = VecDeque::new();
    let mut tasks = JoinSet::new();
    for number in 1..pieces {
        let piece = range.start + number * step..(range.start + (number + 1) * step).min(range.end);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (source, avoid) = (source.clone(), avoid.to_vec());
        tasks.spawn(async move {
            if let Err(error) = pump(&source, piece, &avoid, &sender).await {
                let _ = sender.send(Err(error)).await;
            }
        });
        rest.push_back(receiver);
    }
    let first = source.open(range.start..range.start + step, avoid).await?;
    Ok(Box::new(Split { host: first.host(), first: Some(first), left: step, rest, _tasks: tasks }))
}

fn early(left: u64) -> SourceError {
    SourceError { reason: format!("the response ended {left} bytes early"), remedy: Remedy::Retry(None) }
}

async fn pump(
    source: &Arc<dyn Source>,
    piece: Range<u64>,
    avoid: &[HostId],
    sender: &mpsc::Sender<Result<Bytes, SourceError>>,
) -> Result<(), SourceError> {
    let mut left = piece.end - piece.start;
    let mut body = source.open(piece, avoid).await?;
    while left > 0 {
        let Some(chunk) = take(&mut body, &mut left).await? else { return Err(early(left)) };
        if sender.send(Ok(chunk)).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// The next bytes of a piece, and none of what does not belong to it.
async fn take(body: &mut Box<dyn Body>, left: &mut u64) -> Result<Option<Bytes>, SourceError> {
    let Some(mut chunk) = body.chunk().await? else { return Ok(None) };
    chunk.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
    *left -= chunk.len() as u64;
    Ok(Some(chunk))
}

struct Split {
    first: Option<Box<dyn Body>>,
    /// Of the first piece.
    left: u64,
    rest: VecDeque<mpsc::Receiver<Result<Bytes, SourceError>>>,
    host: Option<HostId>,
    /// Dropped with the body: pieces that nobody waits for are not fetched.
    _tasks: JoinSet<()>,
}

impl Body for Split {
    fn chunk(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        Box::pin(async move {
            if let Some(first) = &mut self.first {
                if self.left > 0 {
                    return take(first, &mut self.left).await?.ok_or_else(|| early(self.left)).map(Some);
                }
                self.first = None;
            }
            while let Some(receiver) = self.rest.front_mut() {
                match receiver.recv().await {
                    Some(chunk) => return chunk.map(Some),
                    None => self.rest.pop_front(),
                };
            }
            Ok(None)
        })
    }

    /// Who sends the first piece. The others usually come from the same host.
    fn host(&self) -> Option<HostId> {
        self.host.clone()
    }
}
