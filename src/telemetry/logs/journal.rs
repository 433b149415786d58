//! Lines for journald, in its own protocol: one datagram each, fields one can search by.
//!
//! `MESSAGE_ID` is that of the catalog; an event's fields become `SOCI_<NAME>`, so `image`, `layer` and `reason` are `SOCI_IMAGE=`, `SOCI_LAYER=`
//! and `SOCI_REASON=`. `MESSAGE` is the event's words and, where it has one, its error: who reads `journalctl -u` sees no other field.
//!
//! The crate tracing-journald puts one prefix on every field or none, so that it can write `MESSAGE_ID` or `SOCI_LAYER`, not both.
//!
//! A journald that does not take lines costs a moment each ([`PATIENCE`]) and the lines; how many were lost is said when it does again.

use super::{ROUTINE_TARGET, Receiver};
use crate::telemetry::{
    catalog::{self, Journal as Repetition, Message},
    limit::Once,
};
use serde_json::{Map, Value};
use std::{
    io,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tracing::{Level, Metadata};

/// Where journald listens (systemd-journald.service(8)).
const SOCKET: &str = "/run/systemd/journal/socket";
/// Readers wait for whoever writes a line: no longer than they would wait for a disk.
const PATIENCE: Duration = Duration::from_millis(100);
/// Longest value. With [`MAX_FIELDS`] of them a line fits a datagram (212,992 bytes where nobody changed `wmem_default`).
const MAX_VALUE: usize = 8 << 10;
/// Fields of one event that are sent. No event of ours has ten.
const MAX_FIELDS: usize = 20;

/// What a repeated line is about: message, image, reason.
type Fact = (Message, String, String);

/// A connection to journald.
pub(super) struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    /// Whether lines of [`ROUTINE_TARGET`] and repetitions are wanted.
    detailed: bool,
    said: Once<Fact>,
    lost: AtomicU64,
}

impl Journal {
    /// `detailed`: whether debug lines were asked for, too.
    pub(super) fn connect(detailed: bool) -> io::Result<Journal> {
        Journal::to(Path::new(SOCKET), detailed)
    }

    fn to(path: &Path, detailed: bool) -> io::Result<Journal> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let journal = Journal { socket, path: path.to_owned(), detailed, said: Once::new(), lost: AtomicU64::new(0) };
        // journald ignores an empty datagram; whether somebody listens shows.
        journal.socket.send_to(&[], path)?;
        Ok(journal)
    }

    fn send(&self, datagram: &[u8]) {
        if self.socket.send_to(datagram, &self.path).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let mut note = Vec::new();
            field(&mut note, "MESSAGE", &format!("{lost} log lines were lost: journald did not take them"));
            field(&mut note, "PRIORITY", "4");
            let _ = self.socket.send_to(&note, &self.path);
        }
    }

    /// Whether the journal has this line already, in what it says of an image.
    fn is_repetition(&self, message: Option<Message>, fields: &Map<String, Value>) -> bool {
        let Some(message) = message else { return false };
        if message.entry().journal != Repetition::OncePerImage {
            return false;
        }
        let text = |name: &str| fields.get(name).map(plain).unwrap_or_default();
        // A layer without an image (labels were missing) is a fact of its own.
        let image = if fields.contains_key("image") { text("image") } else { text("target") };
        !self.said.is_first((message, image, text("reason")))
    }
}

impl Receiver for Journal {
    fn event(&self, metadata: &Metadata<'_>, fields: Map<String, Value>) {
        let message = fields.get(catalog::ID_FIELD).and_then(Value::as_str).and_then(Message::with_id);
        let is_detail = metadata.target() == ROUTINE_TARGET || self.is_repetition(message, &fields);
        if is_detail && !self.detailed {
            return;
        }
        self.send(&encode(metadata, fields, is_detail));
    }
}

fn encode(metadata: &Metadata<'_>, mut fields: Map<String, Value>, is_detail: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    let fatal = fields.remove(super::LEVEL_FIELD).is_some();
    let priority = match *metadata.level() {
        _ if fatal => "2",
        _ if is_detail => "7",
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    };
    let mut message = fields.remove("message").as_ref().map(plain).unwrap_or_default();
    if let Some(error) = fields.get("error").map(plain)
        && !message.contains(&error)
    {
        message = format!("{message}: {error}");
    }
    field(&mut out, "MESSAGE", &message);
    field(&mut out, "PRIORITY", priority);
    field(&mut out, "SYSLOG_IDENTIFIER", crate::telemetry::logs::IDENTIFIER);
    if let Some(id) = fields.remove(catalog::ID_FIELD).as_ref().map(plain) {
        field(&mut out, "MESSAGE_ID", &id);
    }
    if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
        field(&mut out, "CODE_FILE", file);
        field(&mut out, "CODE_LINE", &line.to_string());
    }
    for (name, value) in fields.iter().take(MAX_FIELDS) {
        field(&mut out, &searchable(name), &plain(value));
    }
    out
}

/// A value as text, without JSON's quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// journald's names have upper-case letters, digits and underscores, 64 at most.
fn searchable(name: &str) -> String {
    let letters = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    "SOCI_".chars().chain(letters).take(64).collect()
}

/// One field (systemd's "Native Journal Protocol"): a line, or a length and bytes where the value has lines of its own.
fn field(out: &mut Vec<u8>, name: &str, value: &str) {
    let end = (0..=MAX_VALUE.min(value.len())).rev().find(|end| value.is_char_boundary(*end)).unwrap_or(0);
    let value = &value[..end];
    out.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        out.push(b'\n');
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value.as_bytes());
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{catalog::say, logs::Collect};
    use tracing_subscriber::layer::SubscriberExt;

    /// The datagrams that `speak` sends.
    fn datagrams(detailed: bool, speak: impl FnOnce()) -> Vec<String> {
        let dir = tempfile::tempdir().expect("temp");
        let path = dir.path().join("socket");
        let listener = UnixDatagram::bind(&path).expect("bind");
        listener.set_nonblocking(true).expect("non-blocking");
        let journal = Journal::to(&path, detailed).expect("connected");
        tracing::subscriber::with_default(tracing_subscriber::registry().with(Collect(journal)), speak);
        let mut buffer = vec![0; 1 << 18];
        let mut out = Vec::new();
        while let Ok(length) = listener.recv(&mut buffer) {
            out.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        out.remove(0); // the one that only asks
        out
    }

    #[test]
    fn fields_can_be_searched_by_and_the_error_is_in_the_message() {
        let sent = datagrams(false, || {
            say!(
                LayerNotLazy,
                image = "r/i:1",
                layer = "sha256:a",
                reason = "timeout",
                error = "too\nslow",
                "not lazy"
            );
        });
        let id = Message::LayerNotLazy.id();
        assert!(sent[0].starts_with("MESSAGE\n\u{12}\0\0\0\0\0\0\0not lazy: too\nslow\nPRIORITY=4\n"), "{:?}", sent[0]);
        for line in [&format!("MESSAGE_ID={id}"), "SOCI_IMAGE=r/i:1", "SOCI_LAYER=sha256:a", "SOCI_REASON=timeout"] {
            assert!(sent[0].lines().any(|l| l == line), "{line} in {:?}", sent[0]);
        }
    }

    #[test]
    fn what_is_said_for_each_layer_is_in_the_journal_once_for_each_image_and_reason() {
        let speak = || {
            for (image, reason) in [("a", "x"), ("a", "x"), ("a", "y"), ("b", "x")] {
                say!(LayerNotLazy, image, layer = "l", reason, error = "e", "m");
            }
            tracing::info!(target: ROUTINE_TARGET, "detail");
        };
        assert_eq!(datagrams(false, speak).len(), 3);
        let all = datagrams(true, speak);
        assert_eq!(all.len(), 5);
        assert_eq!(all.iter().filter(|d| d.contains("PRIORITY=7")).count(), 2);
    }

    #[test]
    fn a_value_without_end_is_cut_between_characters() {
        let sent = datagrams(false, || tracing::info!(path = "é".repeat(MAX_VALUE), "m"));
        assert!(sent[0].len() < MAX_VALUE + 500 && sent[0].contains('é') && !sent[0].contains('\u{fffd}'));
    }

    #[test]
    fn a_fatal_line_is_critical_and_numbers_are_plain() {
        let sent = datagrams(false, || {
            tracing::error!(target: "soci", { "log.level" = "fatal", size = 5u64 }, "the end");
        });
        assert!(sent[0].contains("PRIORITY=2\n") && sent[0].contains("SOCI_SIZE=5\n"), "{}", sent[0]);
    }
}
