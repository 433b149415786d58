//! The Prometheus text format, version 0.0.4: `# HELP`, `# TYPE`, and samples; and histograms, which are several samples each.
#![forbid(unsafe_code)]

use super::families::Family;
use std::{
    fmt::{Display, Write as _},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Writes families one after the other; a family without samples leaves no trace.
pub(super) struct Writer {
    out: String,
    family: Option<(&'static str, String)>,
}

impl Writer {
    pub(super) fn new() -> Writer {
        Writer { out: String::new(), family: None }
    }

    /// The samples that follow belong to this family.
    pub(super) fn family(&mut self, family: &Family) {
        let Family { name, kind, help } = family;
        self.family = Some((name, format!("# HELP {name} {help}\n# TYPE {name} {kind}\n")));
    }

    /// One sample. Labels are given in alphabetical order (and a histogram's `le` last, as the Go client has it).
    pub(super) fn sample(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let Some((name, head)) = &mut self.family else { return };
        self.out.push_str(&std::mem::take(head));
        self.out.push_str(name);
        self.out.push_str(suffix);
        let mut before = '{';
        for (label, text) in labels {
            self.out.push(before);
            self.out.push_str(label);
            self.out.push_str("=\"");
            for character in text.chars() {
                match character {
                    '\\' => self.out.push_str("\\\\"),
                    '"' => self.out.push_str("\\\""),
                    '\n' => self.out.push_str("\\n"),
                    other => self.out.push(other),
                }
            }
            self.out.push('"');
            before = ',';
        }
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "}} {value}");
    }

    pub(super) fn finish(self) -> String {
        self.out
    }
}

/// Upper bounds are powers of two; milliseconds go to 2^14, microseconds to 2^10.
const MOST_BUCKETS: usize = 15;

/// Durations sorted into buckets.
pub(super) struct Histogram {
    unit: Duration,
    buckets: usize,
    /// How many fell into each bucket alone; the last one is what exceeds all bounds.
    counts: [AtomicU64; MOST_BUCKETS + 1],
    /// Sum in nanoseconds: exact, and enough for 584 years.
    nanoseconds: AtomicU64,
}

impl Histogram {
    /// Bounds of 1 to 16384 ms.
    pub(super) fn milliseconds() -> Histogram {
        Histogram::new(Duration::from_millis(1), 15)
    }

    /// Bounds of 1 to 1024 µs.
    pub(super) fn microseconds() -> Histogram {
        Histogram::new(Duration::from_micros(1), 11)
    }

    fn new(unit: Duration, buckets: usize) -> Histogram {
        Histogram { unit, buckets, counts: Default::default(), nanoseconds: AtomicU64::new(0) }
    }

    pub(super) fn observe(&self, duration: Duration) {
        let bucket = (0..self.buckets).find(|bucket| duration <= self.unit * (1 << bucket)).unwrap_or(MOST_BUCKETS);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Nothing, if nothing was observed.
    pub(super) fn write(&self, out: &mut Writer, labels: &[(&str, &str)]) {
        // Read once, so that the buckets add up to the count even while others observe.
        let counts: [u64; MOST_BUCKETS + 1] = std::array::from_fn(|i| self.counts[i].load(Ordering::Relaxed));
        let total: u64 = counts.iter().sum();
        if total == 0 {
            return;
        }
        let mut cumulative = 0;
        let mut bucket = |bound: &str, count: u64| {
            cumulative += count;
            out.sample("_bucket", &[labels, &[("le", bound)]].concat(), cumulative);
        };
        for (exponent, count) in counts.iter().take(self.buckets).enumerate() {
            bucket(&(1u64 << exponent).to_string(), *count);
        }
        bucket("+Inf", counts[MOST_BUCKETS]);
        let sum = self.nanoseconds.load(Ordering::Relaxed) as f64 / self.unit.as_nanos() as f64;
        out.sample("_sum", labels, sum);
        out.sample("_count", labels, total);
    }
}
