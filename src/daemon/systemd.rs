//! What systemd is told while the daemon runs: when it is ready, that it lives, and in one line what it does.
//!
//! Without systemd (`NOTIFY_SOCKET` unset) everything here does nothing. Nothing waits for systemd: its socket holds a few messages, and when it is
//! full, because the manager is busy or stands still, a message is lost. What may not be lost is said again: [`ready`] until it is taken, the
//! others with the next period.

use crate::{
    layers::Background,
    snapshot::BootId,
    sys::{process, seqpacket},
};
use sd_notify::NotifyState;
use std::{
    fmt::{self, Write},
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How often the status line is brought up to date. People look at it, and each change costs systemd a message.
const STATUS_PERIOD: Duration = Duration::from_secs(2);
/// Between two attempts to tell what has to be told.
const AGAIN: Duration = Duration::from_millis(100);
/// How long a start that failed is left to be read before systemd tries again. Crashes of a daemon that ran are followed at once
/// (`RestartSec=` in its unit); a configuration that cannot be read does not get better ten times a second.
pub const FAILED_START_PAUSE: Duration = Duration::from_secs(2);

/// Set by our unit, see [`boot`].
const BOOT: &str = "SOCI_BOOT_ID";

/// Whether systemd started us and listens.
pub fn listens() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Which boot this is. From our unit (`%b`), as /proc/sys may be hidden from it; else from the kernel itself.
pub fn boot() -> Option<BootId> {
    let told = std::env::var(BOOT).ok().and_then(|text| BootId::parse(&text));
    told.or_else(|| BootId::parse(&std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?))
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Taken; or there is nobody to take it.
    Taken,
    /// There was no room for it.
    Lost,
}

fn tell(states: &[NotifyState<'_>]) -> Told {
    match process::notify_socket() {
        Ok(Some(socket)) => tell_on(socket.as_fd(), states),
        // Whoever does not listen is not told.
        Ok(None) | Err(_) => Told::Taken,
    }
}

fn tell_on(socket: BorrowedFd<'_>, states: &[NotifyState<'_>]) -> Told {
    let text = states.iter().fold(String::new(), |mut text, state| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{state}");
        text
    });
    match seqpacket::send(socket, text.as_bytes(), seqpacket::Send::OrFail) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Told::Lost,
        Ok(()) | Err(_) => Told::Taken,
    }
}

/// Says it until it is taken: a start that systemd does not hear of is a failed one.
pub fn ready() {
    if tell(&[NotifyState::Ready]) == Told::Taken {
        return;
    }
    let again = || {
        while tell(&[NotifyState::Ready]) == Told::Lost {
            std::thread::sleep(AGAIN);
        }
    };
    // Without a thread, what systemd does about it ends well, too: the next daemon resumes.
    let _ = std::thread::Builder::new().name("ready".into()).spawn(again);
}

pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: reads under way are being answered")]);
}

pub fn status(text: &str) -> Told {
    tell(&[NotifyState::Status(text)])
}

/// We live.
pub fn alive() -> Told {
    tell(&[NotifyState::Watchdog])
}

/// Begins a reload. `systemctl reload` of a unit with `Type=notify-reload` waits for the [`ready`] that ends it; others show it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    };
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
            (Background::AtQuota, n) => write!(f, "{} incomplete (quota reached)", count(n, "layer")),
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
            if status(&line.replace(['\n', '\r'], " ")) == Told::Taken {
                shown = line;
            }
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
    fn a_manager_that_reads_nothing_is_not_waited_for_and_is_told_when_it_reads_again() {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let filled =
                (0..100_000).take_while(|_| tell_on(ours.as_fd(), &[NotifyState::Watchdog]) == Told::Taken).count();
            done.send((filled, ours)).unwrap();
        });
        let (filled, ours) = ended.recv_timeout(Duration::from_secs(60)).expect("it never waits");
        assert!((1..100_000).contains(&filled), "{filled} messages fit");
        let mut buffer = [0; 64];
        while let Ok(length) = theirs.recv(&mut buffer) {
            assert_eq!(&buffer[..length], b"WATCHDOG=1\n");
        }
        assert_eq!(tell_on(ours.as_fd(), &[NotifyState::Ready]), Told::Taken);
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
