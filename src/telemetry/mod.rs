//! What the daemon says about itself: log lines and metrics, in the shape that the Go snapshotter's users and tests read.
//!
//! * [`logs`] — one JSON object per line on stderr, or journald's own protocol with structured fields where stderr is the journal.
//! * [`catalog`] — the messages an operator may have to act on, and what `journalctl -x` says about each.
//! * [`metrics`] — counters and histograms with the Go snapshotter's names, rendered by hand (see there why).
//! * [`http`] — the small server behind `metrics_address` and `debug_address`.
//! * [`status`] — what `soci status` reads from the daemon.
//! * [`limit`] — for what must not be said a thousand times.
#![forbid(unsafe_code)]

pub mod catalog;
pub mod http;
pub mod limit;
pub mod logs;
pub mod metrics;
pub mod status;
