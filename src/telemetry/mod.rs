//! What the daemon says about itself: log lines and metrics, in the shape that the Go snapshotter's users and tests read.
//!
//! * [`logs`] — one JSON object per line on stderr, or journald's own protocol with structured fields where stderr is the journal.
//! * [`metrics`] — counters and histograms with the Go snapshotter's names, rendered by hand (see there why).
//! * [`http`] — the small server behind `metrics_address` and `debug_address`.
//! * [`limit`] — for what must not be said a thousand times.
#![forbid(unsafe_code)]

pub mod http;
pub mod limit;
pub mod logs;
pub mod metrics;
