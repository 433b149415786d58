//! Which spans of a layer are here, which are on their way, and who waits for them.
//!
//! ```text
//!            taken                    verified
//!   Absent ─────────▶ Fetching ─────────────────▶ Present
//!     ▲                  │                           │
//!     └──────────────────┴───────────────────────────┘
//!       fetch or digest failed          found damaged
//! ```
//!
//! Invariant: a span is `Present` only after its bytes matched the digest in the zTOC.
//! Invariant: a span is taken by at most one fetch; later readers wait for that one.
//!
//! Absent on purpose: I/O, and the lock around it (`Layer` holds one, for moments only).

use std::{collections::HashMap, ops::Range, ops::RangeInclusive};

/// Where a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    Absent,
    Fetching,
    Present,
}

/// The spans of one layer. `W` is what a waiting reader leaves behind to be woken.
#[derive(Debug)]
pub struct SpanMap<W> {
    states: Vec<Span>,
    missing: usize,
    waiting: HashMap<usize, Vec<W>>,
}

impl<W> SpanMap<W> {
    /// A map of `count` spans, of which `present` are here.
    pub fn new(count: usize, present: impl Iterator<Item = usize>) -> SpanMap<W> {
        let mut map = SpanMap { states: vec![Span::Absent; count], missing: count, waiting: HashMap::new() };
        for span in present {
            map.arrived(span);
        }
        map
    }

    /// Spans that are not here yet, on their way or not.
    pub fn missing(&self) -> usize {
        self.missing
    }

    pub fn get(&self, span: usize) -> Span {
        self.states.get(span).copied().unwrap_or(Span::Absent)
    }

    /// Takes every absent span of `wanted`, as runs of neighbours.
    pub fn take_wanted(&mut self, wanted: RangeInclusive<usize>) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for span in wanted {
            if self.get(span) != Span::Absent || span >= self.states.len() {
                continue;
            }
            self.states[span] = Span::Fetching;
            match runs.last_mut() {
                Some(run) if run.end == span => run.end += 1,
                _ => runs.push(span..span + 1),
            }
        }
        runs
    }

    /// Takes `first`, if it is absent, and the absent neighbours after it while `fits` says so.
    pub fn take_run(&mut self, first: usize, mut fits: impl FnMut(usize) -> bool) -> Option<Range<usize>> {
        if first >= self.states.len() || self.get(first) != Span::Absent {
            return None;
        }
        let mut end = first;
        while end < self.states.len() && self.get(end) == Span::Absent && (end == first || fits(end)) {
            self.states[end] = Span::Fetching;
            end += 1;
        }
        Some(first..end)
    }

    /// Leaves `waiter` to be returned when `span` arrives or fails.
    pub fn wait(&mut self, span: usize, waiter: W) {
        self.waiting.entry(span).or_default().push(waiter);
    }

    /// Whether a reader waits for `span`.
    pub fn is_wanted(&self, span: usize) -> bool {
        self.waiting.get(&span).is_some_and(|w| !w.is_empty())
    }

    /// `span` is here. Returns who waited.
    pub fn arrived(&mut self, span: usize) -> Vec<W> {
        if let Some(state) = self.states.get_mut(span)
            && *state != Span::Present
        {
            *state = Span::Present;
            self.missing -= 1;
        }
        self.waiting.remove(&span).unwrap_or_default()
    }

    /// Gives back a span that was taken, unless a reader has come to wait for it. Returns whether it did.
    pub fn give_back(&mut self, span: usize) -> bool {
        let idle = self.get(span) == Span::Fetching && !self.is_wanted(span);
        if idle {
            self.states[span] = Span::Absent;
        }
        idle
    }

    /// The fetch of `span` came to nothing, or what was here is damaged. Returns who waited.
    pub fn lost(&mut self, span: usize) -> Vec<W> {
        if let Some(state) = self.states.get_mut(span) {
            if *state == Span::Present {
                self.missing += 1;
            }
            *state = Span::Absent;
        }
        self.waiting.remove(&span).unwrap_or_default()
    }

    /// Everybody who waits for any span.
    pub fn abandon(&mut self) -> Vec<W> {
        self.waiting.drain().flat_map(|(_, waiting)| waiting).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_taken_once_and_its_waiters_are_returned_once() {
        let mut map: SpanMap<u8> = SpanMap::new(5, [2].into_iter());
        assert_eq!(map.take_wanted(0..=4), vec![0..2, 3..5]);
        assert!(map.take_wanted(0..=4).is_empty());
        map.wait(1, 7);
        assert!(map.is_wanted(1));
        assert_eq!(map.arrived(1), vec![7]);
        assert_eq!(map.arrived(1), Vec::<u8>::new());
        assert_eq!(map.missing(), 3);
        map.wait(0, 8);
        assert_eq!(map.lost(0), vec![8]);
        assert_eq!(map.take_run(0, |_| true), Some(0..1));
        map.lost(1);
        assert_eq!(map.missing(), 4);
    }

    #[test]
    fn a_run_stops_at_what_is_here_and_at_what_does_not_fit() {
        let mut map: SpanMap<()> = SpanMap::new(6, [4].into_iter());
        assert_eq!(map.take_run(0, |s| s < 2), Some(0..2));
        assert_eq!(map.take_run(2, |_| true), Some(2..4));
        assert_eq!(map.take_run(4, |_| true), None);
        assert_eq!(map.take_run(9, |_| true), None);
    }
}
