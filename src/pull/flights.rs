//! One download of a layer for all places that it is unpacked to.
//!
//! The same bytes above different layers are different jobs: each unpacks for itself. Only the first of them asks the registry; while others
//! follow it, what it brings is written to a file without name, at their own pace to be read. What had gone by when one came is fetched for
//! that one alone.
//!
//! ```text
//!   leader:    0 ════════════════▶ position ─ ─ ─ ─ ─ ▶ size
//!   follower:  0 ──its own──▶ from ═══from the file═══▶ written … and alone again from there, if the leader gives up
//! ```
//! The leader never waits for anybody, so nobody's trouble is another's. Without followers nothing touches the disk.

use super::download::Sink;
use crate::oci::Digest;
use bytes::Bytes;
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};
use tokio::sync::watch;

/// What a follower reads at a time.
const PIECE: u64 = 256 << 10;

/// All downloads that may be followed.
pub struct Flights {
    /// Where files without names may live.
    directory: PathBuf,
    flights: Arc<Mutex<HashMap<Digest, Weak<Flight>>>>,
}

struct Flight {
    state: Mutex<State>,
    /// Bytes before this offset are in the file, or went by before there was one; whether more will come.
    written: watch::Sender<Written>,
}

#[derive(Clone, Copy)]
struct Written {
    end: u64,
    is_over: bool,
}

#[derive(Default)]
struct State {
    /// What the leader has brought, or is about to write.
    position: u64,
    /// What it brings from `from` on, from the moment that somebody follows.
    file: Option<(Arc<File>, u64)>,
}

/// Whose download it is.
pub enum Role<S> {
    Leader(Lead<S>),
    Follower(Follow, S),
}

/// A sink that others follow. Dropped before the end, they go on alone.
pub struct Lead<S> {
    sink: S,
    flight: Arc<Flight>,
    layer: Digest,
    flights: Arc<Mutex<HashMap<Digest, Weak<Flight>>>>,
}

/// A place behind a leader.
pub struct Follow {
    file: Arc<File>,
    /// What comes before must be had from elsewhere.
    pub from: u64,
    start: u64,
    written: watch::Receiver<Written>,
    _flight: Arc<Flight>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flights {
    pub fn new(directory: PathBuf) -> Flights {
        Flights { directory, flights: Arc::default() }
    }

    /// Leads the download of `layer`, or follows who does.
    pub fn join<S: Sink>(&self, layer: Digest, sink: S) -> Role<S> {
        let mut flights = lock(&self.flights);
        if let Some(flight) = flights.get(&layer).and_then(Weak::upgrade)
            && !flight.written.borrow().is_over
            && let Ok(follow) = flight.follow(&self.directory)
        {
            return Role::Follower(follow, sink);
        }
        let written = watch::Sender::new(Written { end: 0, is_over: false });
        let flight = Arc::new(Flight { state: Mutex::default(), written });
        flights.insert(layer, Arc::downgrade(&flight));
        Role::Leader(Lead { sink, flight, layer, flights: self.flights.clone() })
    }
}

impl Flight {
    fn follow(self: &Arc<Self>, directory: &PathBuf) -> io::Result<Follow> {
        let mut state = lock(&self.state);
        let (file, start) = match &state.file {
            Some((file, from)) => (file.clone(), *from),
            None => {
                let file = Arc::new(tempfile::tempfile_in(directory)?);
                let from = state.position;
                state.file = Some((file.clone(), from));
                self.written.send_modify(|written| written.end = written.end.max(from));
                (file, from)
            }
        };
        Ok(Follow { file, from: start, start, written: self.written.subscribe(), _flight: self.clone() })
    }
}

impl<S: Sink> Sink for Lead<S> {
    async fn put(&mut self, bytes: Bytes) -> bool {
        let (at, file) = {
            let mut state = lock(&self.flight.state);
            let at = state.position;
            state.position += bytes.len() as u64;
            (at, state.file.clone())
        };
        if let Some((file, from)) = file
            && !self.flight.written.borrow().is_over
        {
            let piece = bytes.clone();
            let written = tokio::task::spawn_blocking(move || file.write_all_at(&piece, at - from)).await;
            let end = at + bytes.len() as u64;
            self.flight.written.send_modify(|state| match written {
                Ok(Ok(())) => state.end = end,
                // A full disk: whoever follows goes on alone.
                Ok(Err(_)) | Err(_) => state.is_over = true,
            });
        }
        self.sink.put(bytes).await
    }
}

impl<S> Drop for Lead<S> {
    fn drop(&mut self) {
        let mut flights = lock(&self.flights);
        if flights.get(&self.layer).is_some_and(|flight| flight.as_ptr() == Arc::as_ptr(&self.flight)) {
            flights.remove(&self.layer);
        }
        self.flight.written.send_modify(|written| written.is_over = true);
    }
}

impl Follow {
    /// Passes on what the leader brings, from [`Follow::from`] on; how far that went, or `None` when no more is wanted.
    pub async fn pass(mut self, sink: &mut impl Sink) -> Option<u64> {
        let mut at = self.from;
        loop {
            let written = *self.written.borrow_and_update();
            while at < written.end {
                let (file, length) = (self.file.clone(), (written.end - at).min(PIECE) as usize);
                let offset = at - self.start;
                let read = tokio::task::spawn_blocking(move || {
                    let mut piece = vec![0; length];
                    file.read_exact_at(&mut piece, offset).map(|()| piece)
                });
                let Ok(Ok(piece)) = read.await else { return Some(at) };
                if !sink.put(piece.into()).await {
                    return None;
                }
                at += length as u64;
            }
            if written.is_over {
                return Some(at);
            }
            if self.written.changed().await.is_err() {
                return Some(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Collected(Vec<u8>);

    impl Sink for Collected {
        async fn put(&mut self, bytes: Bytes) -> bool {
            self.0.extend_from_slice(&bytes);
            true
        }
    }

    fn lead(flights: &Flights, layer: Digest) -> Lead<Collected> {
        match flights.join(layer, Collected::default()) {
            Role::Leader(lead) => lead,
            Role::Follower(..) => panic!("somebody leads"),
        }
    }

    fn follow(flights: &Flights, layer: Digest) -> Follow {
        match flights.join(layer, Collected::default()) {
            Role::Leader(_) => panic!("nobody leads"),
            Role::Follower(follow, _) => follow,
        }
    }

    #[tokio::test]
    async fn followers_get_what_comes_after_them_and_learn_where_it_ended() {
        let directory = tempfile::tempdir().unwrap();
        let flights = Flights::new(directory.path().to_owned());
        let layer = Digest::of(b"layer");
        let mut leader = lead(&flights, layer);
        let early = follow(&flights, layer);
        assert_eq!(early.from, 0);
        leader.put(Bytes::from_static(b"abc")).await;
        let late = follow(&flights, layer);
        assert_eq!(late.from, 0, "the file is there already");
        let early = tokio::spawn(async move {
            let mut sink = Collected::default();
            (early.pass(&mut sink).await, sink.0)
        });
        leader.put(Bytes::from_static(b"defg")).await;
        drop(leader);
        assert_eq!(early.await.unwrap(), (Some(7), b"abcdefg".to_vec()));
        let mut sink = Collected::default();
        assert_eq!(late.pass(&mut sink).await, Some(7));
        assert_eq!(sink.0, b"abcdefg");
        assert!(lock(&flights.flights).is_empty());
    }

    #[tokio::test]
    async fn what_went_by_before_anybody_followed_is_not_in_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let flights = Flights::new(directory.path().to_owned());
        let layer = Digest::of(b"layer");
        let mut leader = lead(&flights, layer);
        leader.put(Bytes::from_static(b"abc")).await;
        let follower = follow(&flights, layer);
        assert_eq!(follower.from, 3);
        leader.put(Bytes::from_static(b"def")).await;
        assert_eq!(leader.sink.0, b"abcdef");
        // Another layer is another flight.
        drop(lead(&flights, Digest::of(b"another")));
        drop(leader);
        let mut sink = Collected::default();
        assert_eq!(follower.pass(&mut sink).await, Some(6));
        assert_eq!(sink.0, b"def");
        drop(lead(&flights, layer));
    }
}
