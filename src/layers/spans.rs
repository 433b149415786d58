//! Which spans of a layer are here, which are on their way, and who waits for them.
//!
//! ```text
//!            taken                    verified
//!   Absent ─────────▶ Fetching ─────────────────▶ Present
//!     ▲                  │  ▲ a reader came          │
//!     │                  │  └────────── Evicting ◀────┤
//!     │                  │                 │          │
//!     └──────────────────┴─────────────────┴──────────┘
//!       fetch or digest failed          gone, found damaged
//! ```
//!
//! Invariant: a span is `Present` only after its bytes matched the digest in the zTOC.
//! Invariant: a span is taken by at most one fetch, which its [`Ticket`] names; later readers wait for that one. Only who has taken a span
//! writes its bytes, and only who evicts it removes them.
//!
//! Absent on purpose: I/O, and the lock around it (`Layer` holds one, for moments only).

use std::{collections::HashMap, ops::Range, ops::RangeInclusive};

/// Where a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    Absent,
    Fetching(Ticket),
    Present,
    /// Its bytes are being removed.
    Evicting,
}

/// Names what was taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ticket(u32);

/// The spans of one layer. `W` is what a waiting reader leaves behind to be woken.
#[derive(Debug)]
pub struct SpanMap<W> {
    states: Vec<Span>,
    missing: usize,
    waiting: HashMap<usize, Vec<W>>,
    tickets: u32,
}

impl<W> SpanMap<W> {
    /// A map of `count` spans, of which `present` are here.
    pub fn new(count: usize, present: impl Iterator<Item = usize>) -> SpanMap<W> {
        let mut map =
            SpanMap { states: vec![Span::Absent; count], missing: count, waiting: HashMap::new(), tickets: 0 };
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

    fn ticket(&mut self) -> Ticket {
        self.tickets = self.tickets.wrapping_add(1);
        Ticket(self.tickets)
    }

    /// Takes every absent span of `wanted`, as runs of neighbours.
    pub fn take_wanted(&mut self, wanted: RangeInclusive<usize>) -> Vec<Range<usize>> {
        let ticket = self.ticket();
        let mut runs: Vec<Range<usize>> = Vec::new();
        for span in wanted {
            if self.get(span) != Span::Absent || span >= self.states.len() {
                continue;
            }
            self.states[span] = Span::Fetching(ticket);
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
        let ticket = self.ticket();
        let mut end = first;
        while end < self.states.len() && self.get(end) == Span::Absent && (end == first || fits(end)) {
            self.states[end] = Span::Fetching(ticket);
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

    /// Gives back a span that was taken with `ticket`, unless a reader has come to wait for it. Returns whether it did.
    pub fn give_back(&mut self, span: usize, ticket: Ticket) -> bool {
        let idle = self.get(span) == Span::Fetching(ticket) && !self.is_wanted(span);
        if idle {
            self.states[span] = Span::Absent;
        }
        idle
    }

    /// Begins to remove a span that is here. Whether it was.
    pub fn evict(&mut self, span: usize) -> bool {
        match self.states.get_mut(span) {
            Some(state) if *state == Span::Present => {
                *state = Span::Evicting;
                self.missing += 1;
                true
            }
            _ => false,
        }
    }

    /// The bytes of `span` are gone. If a reader has come to wait for it, it is taken and to be fetched.
    pub fn evicted(&mut self, span: usize) -> bool {
        let wanted = self.is_wanted(span);
        let ticket = self.ticket();
        if let Some(state) = self.states.get_mut(span) {
            *state = if wanted { Span::Fetching(ticket) } else { Span::Absent };
        }
        wanted
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
    fn a_span_that_is_evicted_is_taken_until_it_is_given_back() {
        let mut map: SpanMap<u8> = SpanMap::new(2, [0, 1].into_iter());
        assert!(map.evict(0) && !map.evict(0));
        assert!(map.take_wanted(0..=1).is_empty(), "nobody fetches what is about to be removed");
        map.wait(0, 7);
        assert!(map.evicted(0), "a reader has come");
        assert!(matches!(map.get(0), Span::Fetching(_)));
        assert_eq!(map.arrived(0), vec![7]);
        assert!(map.evict(1) && !map.evicted(1));
        assert_eq!((map.get(1), map.missing()), (Span::Absent, 1));
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
