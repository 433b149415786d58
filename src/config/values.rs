//! The values a setting can have, without the numbers that stand for something else in the file.

use std::time::Duration;

/// An upper limit on a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Unlimited,
    At(u64),
}

impl Limit {
    /// The largest count allowed.
    pub fn max(self) -> u64 {
        match self {
            Limit::Unlimited => u64::MAX,
            Limit::At(count) => count,
        }
    }
}

/// How long to wait before giving up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    Never,
    After(Duration),
}

impl Timeout {
    /// For interfaces that take an optional duration.
    pub fn duration(self) -> Option<Duration> {
        match self {
            Timeout::Never => None,
            Timeout::After(duration) => Some(duration),
        }
    }
}

/// How often the background may fetch a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// As fast as the link allows while nobody waits for something more urgent.
    LineRate,
    Every(Duration),
}

/// How long the background stays quiet after an image was first mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    None,
    For(Duration),
}

/// How much of a layer one range request of an eager pull asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkSize {
    WholeLayer,
    Bytes(u64),
}

/// Below which compressed size a layer is not worth loading lazily.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MinLayerSize {
    Off,
    Bytes(u64),
}

/// A setting whose values are words.
pub trait Choice: Copy + PartialEq + Sized + 'static {
    const WORDS: &'static [(&'static str, Self)];
    /// What to say about a word that is none of them.
    fn refuse(word: &str) -> String;
}

macro_rules! choice {
    ($(#[doc = $doc:expr])+ $name:ident { $($variant:ident = $word:literal),+ } refuse $refuse:expr) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($variant),+ }
        impl Choice for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, $name::$variant)),+];
            fn refuse(word: &str) -> String {
                let refuse: fn(&str) -> String = $refuse;
                refuse(word)
            }
        }
    };
}

choice! {
    /// Which layer leaves a full background queue.
    DropPolicy { Newest = "newest", Oldest = "oldest" }
    refuse |word| format!(r#"background_fetch.drop_policy must be "oldest" or "newest", got "{word}""#)
}
choice! {
    /// Where the Go snapshotter keeps file metadata.
    MetadataStore { Db = "db", DbMulti = "db-multi" }
    refuse |word| format!("unknown metadata store type: {word}; must be db or db-multi")
}
choice! {
    /// Where SOCI indexes and zTOCs are kept.
    ContentStoreType { Soci = "soci", Containerd = "containerd" }
    refuse |word| format!("unknown content store type: {word}; must be one of [soci containerd]")
}
choice! {
    /// What kind of address `metrics_address` is.
    Network { Tcp = "tcp", Tcp4 = "tcp4", Tcp6 = "tcp6", Unix = "unix" }
    refuse |word| format!("unknown network {word:?}; must be one of tcp, tcp4, tcp6, unix")
}

/// A registry that is asked before the one an image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// URL with its scheme: `https://mirror.example:5000`.
    pub host: String,
    /// Plain HTTP instead of HTTPS.
    pub insecure: bool,
    pub request_timeout: RequestTimeout,
}

/// `request_timeout_sec` of a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestTimeout {
    /// As `[http] RequestTimeoutMsec`.
    Inherit,
    Never,
    After(Duration),
}

/// A program that decompresses layers from its standard input to its standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecompressStream {
    pub path: String,
    pub args: Vec<String>,
}
