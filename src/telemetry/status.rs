//! What the daemon says of itself to `soci status`, `soci explain` and `soci doctor`: one JSON document, `GET /status` on the status socket.
//!
//! Shapes only; `daemon` fills them in, `cli` prints them. Numbers are bytes unless named otherwise, times are RFC 3339 in UTC. Readers ignore
//! fields they do not know, and writers only ever add some: then a `soci` of one version understands a daemon of another.

use serde::{Deserialize, Serialize};

/// Path of the document.
pub const PATH: &str = "/status";
/// Largest document that a reader takes: 4096 layers with everything that can be said of them have a tenth of it.
pub const MAX_SIZE: u64 = 32 << 20;

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub revision: String,
    pub pid: u32,
    pub started: String,
    pub state: State,
    /// Why it is [`State::Degraded`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub trouble: Option<Trouble>,
    /// Where containerd finds it.
    pub address: String,
    pub root: String,
    pub config: String,
    /// Whether soci-mount keeps the FUSE connection for the next daemon.
    pub connection_kept: bool,
    /// Spans that the background has still to fetch.
    pub background_queue: u64,
    pub images: Vec<Image>,
    /// The last warnings and errors of the message catalog, newest last.
    pub messages: Vec<Said>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Layers are being shown again; containerd is not answered yet.
    Starting,
    Serving,
    /// What is mounted is served; nothing new is taken.
    Degraded,
    /// Of a newer daemon.
    #[serde(other)]
    Unknown,
}

/// Why nothing new is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// In one word: `config`, `disk`, `records`.
    pub reason: String,
    pub error: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// As the client named it.
    pub image: String,
    pub manifest: String,
    pub namespace: String,
    /// Bottom first, as they were prepared.
    pub layers: Vec<Layer>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub layer: String,
    /// Number of its snapshot.
    pub snapshot: u32,
    pub mode: Mode,
    /// Why it is so, in one word and in words.
    pub reason: String,
    pub why: String,
    /// When that was decided; empty for a layer that an earlier daemon mounted.
    pub decided: String,
    /// Of lazy layers.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub lazy: Option<Lazy>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Fetched while containers read it.
    Lazy,
    /// Pulled and unpacked by the snapshotter.
    Pulled,
    /// Pulled and unpacked by containerd.
    Containerd,
    #[serde(other)]
    Unknown,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Lazy => "lazy",
            Mode::Pulled => "pulled",
            Mode::Containerd => "containerd",
            Mode::Unknown => "unknown",
        }
    }
}

/// How far a lazy layer is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lazy {
    /// Compressed.
    pub size: u64,
    /// Of those, how many are here.
    pub fetched: u64,
    pub fetched_percent: u8,
    pub mountpoint: String,
    /// Reads that ended with an I/O error in a container.
    pub read_errors: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_error: Option<String>,
    /// All of it is here and was compared with digest, diff ID and table of contents.
    #[serde(default)]
    pub verified: bool,
    /// Its index was found to be wrong, in this way: reads of it end with an I/O error.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub condemned: Option<String>,
}

impl Lazy {
    /// Rounded down, so that 100 means all of it.
    pub fn percent(fetched: u64, size: u64) -> u8 {
        match size {
            0 => 100,
            _ => u8::try_from(u128::from(fetched.min(size)) * 100 / u128::from(size)).unwrap_or(100),
        }
    }
}

/// A message of the catalog that was said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    pub at: String,
    /// `warning` or `error`.
    pub level: String,
    pub message_id: String,
    pub subject: String,
    /// The line, with its error.
    pub text: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub layer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// How often in a row, about the same image, layer and reason.
    pub times: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_layer_is_a_hundred_percent_and_nothing_less_is() {
        assert_eq!((Lazy::percent(0, 0), Lazy::percent(7, 7), Lazy::percent(9, 7)), (100, 100, 100));
        assert_eq!((Lazy::percent(999_999, 1_000_000), Lazy::percent(u64::MAX - 1, u64::MAX)), (99, 99));
    }

    #[test]
    fn words_of_a_newer_daemon_are_read_as_unknown() {
        assert_eq!(serde_json::from_str::<State>("\"dreaming\"").expect("read"), State::Unknown);
        assert_eq!(serde_json::from_str::<Mode>("\"erofs\"").expect("read"), Mode::Unknown);
    }
}
