//! How many bytes to keep on their way: enough that the link is never idle, not so many that a blocked read waits behind them.
//!
//! The product of the best recent rate and the shortest recent time to a first byte is what the link holds when it is full
//! (the bandwidth-delay product). Asking for more only builds a queue in front of whoever asks next. The gain above one lets
//! the estimate grow while the link has room: each round may be a tenth faster than the last, until it is not.
//!
//! Absent on purpose: a clock. Callers pass the time.

use std::{collections::VecDeque, time::Duration, time::Instant};

/// Below this much asked for, another request is sent, whatever was measured: half a span of an ordinary layer.
pub const MIN_BYTES: u64 = 768 << 10;
/// Above this a slow reader's memory would be at stake, and no link is known to need it (10 Gbit/s, 50 ms).
pub const MAX_BYTES: u64 = 64 << 20;
/// Before anything is known: fills 500 Mbit/s at 40 ms, costs a blocked read 5 ms at 4 Gbit/s.
const START_BYTES: u64 = 5 << 19;
/// Headroom by which the estimate may grow from one measurement to the next. What is on its way exceeds the window by up to a request,
/// so the link is full at less than one as well; growth needs more than one where requests are small.
const GAIN: f64 = 1.1;
/// Rates are counted in slices this long.
const SLICE: Duration = Duration::from_millis(100);
/// Measurements older than this many slices are forgotten: links change.
const SLICES: usize = 50;

/// The estimate. One per node: the first hop is what all requests share.
#[derive(Debug, Default)]
pub struct Window {
    slices: VecDeque<u64>,
    current: (Option<Instant>, u64),
    first_bytes: VecDeque<(Instant, Duration)>,
}

impl Window {
    /// `bytes` of a response body arrived.
    pub fn arrived(&mut self, bytes: u64, now: Instant) {
        match self.current.0 {
            None => self.current = (Some(now), bytes),
            Some(start) => {
                let passed = now.saturating_duration_since(start);
                if passed >= SLICE {
                    // A slice that was cut short by silence says nothing about the link; its rate is a lower bound all the same.
                    let rate = (self.current.1 as f64 / passed.as_secs_f64()) as u64;
                    self.slices.push_back(rate);
                    if self.slices.len() > SLICES {
                        self.slices.pop_front();
                    }
                    self.current = (Some(now), 0);
                }
                self.current.1 += bytes;
            }
        }
    }

    /// The first byte of a response came `after` its request was sent.
    pub fn first_byte(&mut self, after: Duration, now: Instant) {
        self.first_bytes.push_back((now, after));
        while self.first_bytes.len() > 64
            || self
                .first_bytes
                .front()
                .is_some_and(|(at, _)| now.saturating_duration_since(*at) > Duration::from_secs(10))
        {
            if self.first_bytes.len() == 1 {
                break;
            }
            self.first_bytes.pop_front();
        }
    }

    /// Bytes per second, the best of the recent past; 0 when nothing is known.
    pub fn rate(&self) -> u64 {
        self.slices.iter().copied().max().unwrap_or(0)
    }

    /// While fewer bytes than this are on their way, another request may be sent.
    pub fn bytes(&self) -> u64 {
        let delay = self.first_bytes.iter().map(|(_, after)| *after).min();
        match (delay, self.rate()) {
            (Some(delay), rate) if rate > 0 && self.slices.len() >= 3 => {
                ((rate as f64 * delay.as_secs_f64() * GAIN) as u64).clamp(MIN_BYTES, MAX_BYTES)
            }
            _ => START_BYTES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_settles_at_what_the_link_holds() {
        let mut window = Window::default();
        assert_eq!(window.bytes(), START_BYTES);
        let mut now = Instant::now();
        for _ in 0..100 {
            window.first_byte(Duration::from_millis(30), now);
            now += Duration::from_millis(10);
            window.arrived(625_000, now);
        }
        // 62.5 MB/s for 30 ms is 1.9 MB.
        let bytes = window.bytes();
        assert!((1_700_000..2_900_000).contains(&bytes), "{bytes}");
    }

    #[test]
    fn it_forgets_a_faster_past_and_never_leaves_its_bounds() {
        let mut window = Window::default();
        let mut now = Instant::now();
        for rate in [u32::MAX as u64, 1] {
            for _ in 0..2000 {
                window.first_byte(Duration::from_secs(1), now);
                now += Duration::from_millis(10);
                window.arrived(rate, now);
            }
        }
        assert_eq!(window.bytes(), MIN_BYTES);
    }
}
