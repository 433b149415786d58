//! What systemd is told while the daemon runs: when it is ready, that it lives, and in one line what it does.
//!
//! Without systemd (`NOTIFY_SOCKET` unset) everything here does nothing. Nothing waits for systemd: a message it does not take is lost,
//! and the next one says the same.

use crate::{layers::Background, telemetry::catalog::say};
use sd_notify::NotifyState;
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How often the status line is brought up to date. People look at it, and each change costs systemd a message.
const STATUS_PERIOD: Duration = Duration::from_secs(2);
/// How long a start that failed is left to be read before systemd tries again. Crashes of a daemon that ran are followed at once
/// (`RestartSec=` in its unit); a configuration that cannot be read does not get better ten times a second.
pub const FAILED_START_PAUSE: Duration = Duration::from_secs(2);

/// Whether systemd started us and listens.
pub fn listens() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

fn tell(states: &[NotifyState<'_>]) {
    // Whoever does not listen is not told.
    let _ = sd_notify::notify(states);
}

pub fn ready() {
    tell(&[NotifyState::Ready]);
}

pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: reads under way are being answered")]);
}

pub fn status(text: &str) {
    tell(&[NotifyState::Status(text)]);
}

/// Begins a reload. `systemctl reload` of a unit with `Type=notify-reload` waits for the [`ready`] that ends it; others show it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// Tells systemd that we live, twice as often as it asks for (`WatchdogSec=`), as long as `stuck` returns, and names nothing.
///
/// It takes the locks that everything else goes through. If one of them is never given back, or the runtime stands still, or a thread was not seen
/// for a while, systemd ends this process and the next one resumes.
pub async fn watchdog(stuck: impl Fn() -> Option<String>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut said = false;
    loop {
        match stuck() {
            None => tell(&[NotifyState::Watchdog]),
            Some(what) if !said => {
                said = true;
                say!(Stuck, error = what, "something stands still: systemd is to restart this daemon");
            }
            Some(_) => {}
        }
        tokio::time::sleep(limit / 2).await;
    }
}

/// What the node's images are doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Images of which at least one layer is loaded lazily.
    pub images: usize,
    /// Lazily loaded layers, each counted once however many snapshots use it.
    pub layers: usize,
    /// Compressed bytes of those layers that are here.
    pub fetched: u64,
    /// Compressed bytes of those layers.
    pub size: u64,
    /// Those layers of which something is missing.
    pub incomplete: usize,
    pub background: Background,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.layers == 0 {
            return f.write_str("ready; no image is loaded lazily");
        }
        write!(
            f,
            "{}, {}, {} of {} fetched; ",
            count(self.images, "image"),
            count(self.layers, "lazy layer"),
            Bytes(self.fetched),
            Bytes(self.size)
        )?;
        match (self.background, self.incomplete) {
            (Background::NoRoom, _) => f.write_str("DISK FULL: nothing is kept, reads go to the network"),
            (_, 0) => f.write_str("all complete"),
            (Background::Streaming, n) => write!(f, "background: {} to complete", count(n, "layer")),
            (Background::Off, n) => write!(f, "{} incomplete (background fetch is off)", count(n, "layer")),
        }
    }
}

fn count(n: usize, what: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {what}{plural}")
}

/// A size as people read it: three digits and a binary unit.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let (mut value, mut unit) = (self.0 as f64 / 1024.0, 0);
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let decimals = if value < 100.0 { 1 } else { 0 };
        write!(f, "{value:.decimals$} {}", UNITS[unit])
    }
}

/// Something an operator should see in `systemctl status` until it is no longer so, appended to the line.
#[derive(Debug, Clone, Default)]
pub struct Note(Arc<Mutex<Option<String>>>);

impl Note {
    pub fn set(&self, note: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = note;
    }

    fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Keeps the status line up to date.
pub async fn show_status(progress: impl Fn() -> String, note: Note) {
    if !listens() {
        return;
    }
    let mut shown = String::new();
    loop {
        let mut line = progress();
        if let Some(note) = note.get() {
            line = format!("{line}; {note}");
        }
        if line != shown {
            // One line: systemd would take what follows a newline for another assignment.
            status(&line.replace(['\n', '\r'], " "));
            shown = line;
        }
        tokio::time::sleep(STATUS_PERIOD).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_line_says_what_an_operator_asks_first() {
        let progress =
            Progress { images: 2, layers: 7, fetched: 130 << 20, size: 3 << 30, incomplete: 4, ..Progress::default() };
        assert_eq!(
            progress.to_string(),
            "2 images, 7 lazy layers, 130 MiB of 3.0 GiB fetched; background: 4 layers to complete"
        );
        let one = Progress { images: 1, layers: 1, fetched: 1000, size: 1000, ..Progress::default() };
        assert_eq!(one.to_string(), "1 image, 1 lazy layer, 1000 B of 1000 B fetched; all complete");
        let off = Progress { incomplete: 1, background: Background::Off, ..one };
        assert!(off.to_string().ends_with("1 layer incomplete (background fetch is off)"), "{off}");
        let full = Progress { background: Background::NoRoom, ..off };
        assert!(full.to_string().contains("DISK FULL"), "{full}");
        assert_eq!(Progress::default().to_string(), "ready; no image is loaded lazily");
    }

    #[test]
    fn sizes_have_at_most_four_digits() {
        let text = |bytes| Bytes(bytes).to_string();
        assert_eq!(text(0), "0 B");
        assert_eq!(text(1536), "1.5 KiB");
        assert_eq!(text(1023 << 20), "1023 MiB");
        assert_eq!(text(u64::MAX), "16384 PiB");
    }
}
