//! Inflates what has arrived before anybody asks for it, on a core that has nothing else to do.
//!
//! One thread of the lowest priority. It takes spans in the order they arrive, which is the order of likelihood, and keeps them in
//! the scratch file while that has room. A blocked read never waits for it: readers inflate for themselves.

use super::layer::Layer;
use std::sync::{
    Weak,
    mpsc::{Receiver, SyncSender, sync_channel},
};

/// Spans that wait to be inflated; what does not fit is inflated when it is read. 16 GiB of default spans.
const QUEUE: usize = 4096;

/// The way to the thread. It ends when the last of these is dropped.
pub struct Ahead {
    sender: SyncSender<(Weak<Layer>, usize)>,
}

impl Ahead {
    /// Starts the thread.
    pub fn start() -> std::io::Result<Ahead> {
        let (sender, receiver) = sync_channel(QUEUE);
        std::thread::Builder::new().name("inflate-ahead".into()).spawn(move || run(&receiver))?;
        Ok(Ahead { sender })
    }

    /// `span` of `layer` has arrived.
    pub(super) fn arrived(&self, layer: Weak<Layer>, span: usize) {
        let _ = self.sender.try_send((layer, span));
    }
}

fn run(receiver: &Receiver<(Weak<Layer>, usize)>) {
    // Of this thread only: what setpriority(2) calls a process is a thread on Linux.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 19);
    while let Ok((layer, span)) = receiver.recv() {
        if let Some(layer) = layer.upgrade() {
            layer.inflate_ahead(span);
        }
    }
}
