//! Keeps what layers take on disk below the quota: the spans that were read longest ago are evicted.
//!
//! ```text
//!   0 ───────── low ─────────────────── high ──────── max
//!     background │ what readers want     │ evict down  │ given to who waits,
//!     fetches    │ is kept; nothing is   │ to low      │ kept no longer
//!                │ fetched ahead         │             │
//! ```
//! The background stops at the low mark, or it would bring back what was evicted for ever.
//!
//! What may be evicted is *clean*: a verified span that a registry has, too. Pinned, so never evicted, are the spans that a prefetch
//! artifact names (they are what its containers begin with), and everything that serving a layer without the network takes: its zTOC and
//! table of contents, which are no spans and not counted. A span that is being read or fetched at the moment is passed over. Every lazy
//! layer has a registry, so there is no other content here that could not come back.
//!
//! Invariant: a span's presence mark is gone before its bytes are, so a crash at any point leaves a span that is here, or one that is not.
//! Invariant: bytes are read from the blob only under a [`Hold`], which eviction passes over; while a span is being evicted nobody fetches
//! it, so nobody writes what is about to be punched out.

use super::{
    fetch::Taken,
    layer::{Arrival, Layer},
    scheduler::MAX_REQUEST,
    spans,
};
use crate::telemetry::catalog::say;
use std::{
    ops::Range,
    sync::{
        Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// After a pass that could not evict enough, how long the next one waits: what was in use has to be let go first.
const PAUSE: Duration = Duration::from_secs(5);

/// The quota, in bytes of compressed spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaSettings {
    pub max: u64,
    pub high: u64,
    pub low: u64,
}

impl QuotaSettings {
    pub const UNLIMITED: QuotaSettings = QuotaSettings { max: u64::MAX, high: u64::MAX, low: u64::MAX };

    /// `max` bytes, with marks in percent of it.
    pub fn of(max: u64, high: u32, low: u32) -> QuotaSettings {
        let mark = |percent: u32| (u128::from(max) * u128::from(percent.min(100)) / 100) as u64;
        QuotaSettings { max, high: mark(high), low: mark(low.min(high)) }
    }
}

/// How much of the quota is used, and by whom.
pub(super) struct Quota {
    used: AtomicU64,
    /// Leaf lock.
    layers: Mutex<Vec<Weak<Layer>>>,
    evicting: AtomicBool,
    /// Leaf lock.
    resume: Mutex<Option<Instant>>,
    epoch: Instant,
}

impl Quota {
    pub fn new() -> Quota {
        Quota {
            used: AtomicU64::new(0),
            layers: Mutex::default(),
            evicting: AtomicBool::new(false),
            resume: Mutex::default(),
            epoch: Instant::now(),
        }
    }

    /// Seconds of this process, from 1. 0 is "before it".
    pub fn now(&self) -> u32 {
        u32::try_from(self.epoch.elapsed().as_secs()).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// Bytes of spans that are on disk.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A layer with `bytes` on disk was opened.
    pub fn add(&self, layer: Weak<Layer>, bytes: u64) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.retain(|layer| layer.strong_count() > 0);
        layers.push(layer);
        drop(layers);
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn grew(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn shrank(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether so many bytes more may be kept.
    pub fn admits(&self, bytes: u64, settings: &QuotaSettings) -> bool {
        self.used().saturating_add(bytes) <= settings.max
    }

    /// Whether what nobody waits for may be fetched.
    pub fn has_room_ahead(&self, settings: &QuotaSettings) -> bool {
        settings.low == u64::MAX || self.used().saturating_add(MAX_REQUEST.min(settings.low / 8)) <= settings.low
    }

    /// Whether the caller is to evict now.
    pub fn begin(&self, settings: &QuotaSettings) -> bool {
        if self.used() <= settings.high {
            return false;
        }
        let resume = *self.resume.lock().unwrap_or_else(PoisonError::into_inner);
        resume.is_none_or(|at| at <= Instant::now()) && !self.evicting.swap(true, Ordering::AcqRel)
    }

    /// Evicts until the low mark is reached, or nothing is left to evict. Blocks on the disk.
    pub fn evict(&self, settings: &QuotaSettings) {
        let layers: Vec<_> = {
            let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
            layers.iter().filter_map(Weak::upgrade).collect()
        };
        // What was read longest ago goes first; of what nobody has read, what is least likely to be.
        let mut candidates: Vec<(u32, f32, usize, usize)> = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            candidates.extend(layer.evictable().into_iter().map(|(read, value, span)| (read, value, number, span)));
        }
        candidates.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let (before, mut evicted) = (self.used(), 0u64);
        let mut trouble = None;
        for (_, _, number, span) in candidates {
            if self.used() <= settings.low {
                break;
            }
            match layers[number].evict(span) {
                Ok(gone) => evicted += u64::from(gone),
                Err(error) => {
                    trouble = Some(error);
                    break;
                }
            }
        }
        let (used, max) = (self.used(), settings.max);
        tracing::info!(
            evicted,
            freed = before.saturating_sub(used),
            used,
            max,
            "layer store above its high mark, spans evicted"
        );
        if let Some(error) = &trouble {
            say!(NotEvicted, %error, "cannot evict from the layer store");
        }
        let is_stuck = trouble.is_some() || used > settings.high;
        let resume = is_stuck.then(|| Instant::now() + PAUSE);
        *self.resume.lock().unwrap_or_else(PoisonError::into_inner) = resume;
        self.evicting.store(false, Ordering::Release);
    }
}

/// A span that stays in the blob while this lives.
pub(super) struct Hold<'a> {
    layer: &'a Layer,
    span: usize,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut held = self.layer.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.span) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.span);
            }
        }
    }
}

impl Layer {
    /// Keeps `span` where it is, to be read. None if it is not here.
    pub(super) fn hold(&self, span: usize) -> Option<Hold<'_>> {
        let map = self.map();
        if map.get(span) != spans::Span::Present {
            return None;
        }
        // Under the map's lock, as `evict` looks.
        *self.held.lock().unwrap_or_else(PoisonError::into_inner).entry(span).or_default() += 1;
        drop(map);
        self.touch(span);
        Some(Hold { layer: self, span })
    }

    /// `span` was read.
    pub(super) fn touch(&self, span: usize) {
        if let Some(read) = self.read_at.get(span) {
            read.store(self.shared().scheduler.quota().now(), Ordering::Relaxed);
        }
    }

    /// `spans` are never evicted.
    pub(super) fn pin(&self, spans: Range<usize>) {
        for span in spans.start..spans.end.min(self.table.spans.len()) {
            // What is not written down is pinned as long as this process lives.
            let _ = self.files.pin(span);
        }
    }

    /// When each span that may go was read, its value, and which it is.
    fn evictable(&self) -> Vec<(u32, f32, usize)> {
        let values = self.values();
        let map = self.map();
        let present = (0..self.table.spans.len()).filter(|span| map.get(*span) == spans::Span::Present);
        let clean = present.filter(|span| !self.files.is_pinned(*span));
        let read = |span: usize| self.read_at.get(span).map_or(0, |read| read.load(Ordering::Relaxed));
        clean.map(|span| (read(span), values.get(span).copied().unwrap_or(0.0), span)).collect()
    }

    /// Takes `span` off the disk, unless it is in use. Whether it did.
    fn evict(&self, span: usize) -> std::io::Result<bool> {
        if self.entry(span).is_err() {
            return Ok(false);
        }
        {
            let mut map = self.map();
            let is_held = self.held.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&span);
            if is_held || self.is_being_judged() || !map.evict(span) {
                return Ok(false);
            }
        }
        self.set_checked(span, false);
        let punched = self.files.forget(span).and_then(|()| self.files.punch(self.own_bytes(span)));
        if let Err(error) = punched {
            // It is still whole, or its digest will tell.
            let _ = self.files.keep(span);
            for waiter in self.map().arrived(span) {
                let _ = waiter.send(Ok(Arrival::OnDisk));
            }
            return Err(error);
        }
        self.left(span);
        self.shared().observer.evicted(&self.digest(), self.span_bytes(span));
        // Readers may have come meanwhile.
        let is_wanted = self.map().evicted(span);
        self.rewind();
        if let (true, Some(layer)) = (is_wanted, self.arc()) {
            self.shared().scheduler.demand(Taken::new(layer, span..span + 1));
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_percentages_and_the_low_one_is_not_above_the_high_one() {
        assert_eq!(QuotaSettings::of(1000, 90, 80), QuotaSettings { max: 1000, high: 900, low: 800 });
        assert_eq!(QuotaSettings::of(1000, 70, 80), QuotaSettings { max: 1000, high: 700, low: 700 });
        assert_eq!(QuotaSettings::of(u64::MAX, 100, 100), QuotaSettings::UNLIMITED);
    }
}
