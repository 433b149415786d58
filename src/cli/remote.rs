//! From the threads of this tool to services that answer in their own time, and back.
//!
//! Commands are plain threads; [`Remote`] is the one runtime that talks to containerd and registries for them. Whatever they wait for
//! ends when the process should stop, so Ctrl-C is never further away than [`LOOK`].

use super::interrupt::{self, Stopped};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use std::{
    io::{self, Read},
    time::Duration,
};
use tokio::sync::mpsc;

/// How often somebody who waits looks whether he should stop.
const LOOK: Duration = Duration::from_millis(50);
/// Pieces of a blob that wait to be read: about as much as is on its way.
const AHEAD: usize = 8;

/// The runtime. Dropping it ends what is under way.
pub struct Remote {
    runtime: tokio::runtime::Runtime,
}

impl Remote {
    /// Starts it.
    pub fn new() -> io::Result<Remote> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        Ok(Remote { runtime })
    }

    /// Waits for `future`, or until the process should stop.
    pub fn wait<T>(&self, future: impl Future<Output = T>) -> Result<T, Stopped> {
        self.runtime.block_on(async {
            tokio::select! {
                done = future => Ok(done),
                stopped = stop() => Err(stopped),
            }
        })
    }

    /// Waits for `future` even if the process should stop: for cleaning up, which must not take long.
    pub fn wait_briefly<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(5), future).await.ok() })
    }

    /// Begins something that goes on by itself.
    pub fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.runtime.spawn(future)
    }

    /// The pieces of `stream` as something that a thread can read.
    pub fn reader<E: std::error::Error + Send + Sync + 'static>(
        &self,
        stream: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Pipe {
        let (send, receive) = mpsc::channel(AHEAD);
        let pump = async move {
            let mut stream = std::pin::pin!(stream);
            loop {
                let piece = tokio::select! {
                    piece = stream.next() => piece.map(|piece| piece.map_err(io::Error::other)),
                    stopped = stop() => Some(Err(stopped.into())),
                };
                let Some(piece) = piece else { break };
                let last = piece.is_err();
                if send.send(Some(piece)).await.is_err() || last {
                    return;
                }
            }
            // Says that this is the end, and not a task that was given up.
            let _ = send.send(None).await;
        };
        let pump = self.runtime.spawn(pump);
        Pipe { receive, pump, piece: Bytes::new(), ended: false }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let Ok(empty) = tokio::runtime::Builder::new_current_thread().build() else { return };
        std::mem::replace(&mut self.runtime, empty).shutdown_background();
    }
}

async fn stop() -> Stopped {
    loop {
        if let Some(stopped) = interrupt::stopped() {
            return stopped;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// See [`Remote::reader`].
pub struct Pipe {
    receive: mpsc::Receiver<Option<io::Result<Bytes>>>,
    pump: tokio::task::JoinHandle<()>,
    piece: Bytes,
    ended: bool,
}

impl Read for Pipe {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.receive.blocking_recv() {
                Some(Some(piece)) => self.piece = piece?,
                Some(None) => self.ended = true,
                None => return Err(io::Error::other("the transfer was given up")),
            }
        }
        let read = out.len().min(self.piece.len());
        out[..read].copy_from_slice(&self.piece.split_to(read));
        Ok(read)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.pump.abort();
    }
}
