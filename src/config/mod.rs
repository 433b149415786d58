//! The daemon's settings and command line: text in, typed values out.
//!
//! * [`load`] reads one file and nothing else. A missing file is fine only at the default path.
//! * Numbers that stand for something else (`-1`, `0`, `""`) become enums while parsing, never later.
//! * Every problem names file, line and column and the key; an unknown key is a [`Warning`] with the nearest known key.
//! * [`render`] is the inverse of [`load`]: what it prints loads as the same [`Config`]. [`documented`] prints the same with
//!   the documentation of every key; the packaged `etc/soci-snapshotter-grpc/config.toml` is its output for the defaults.
//! * [`args`] is the command line, also pure.
//!
//! Absent on purpose: checks that need to look at the machine (does a decompressor exist, can an address be bound).
#![forbid(unsafe_code)]

pub mod args;
mod codec;
mod reader;
mod settings;
mod values;
mod writer;

pub use settings::*;
pub use values::*;

use crate::layout;
use reader::{Entry, Reader, Section, Written};
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use writer::{Style, Writer};

/// Bound of the file. The documented default has 9 KB; 1 MiB has room for ten thousand mirrors.
pub const MAX_FILE_SIZE: u64 = 1 << 20;

/// A place in the file, both from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl Position {
    fn of(text: &str, offset: usize) -> Position {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |end| end + 1);
        Position { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1 }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub at: Position,
    /// Dotted path, or empty where the text is not TOML.
    pub key: String,
    pub message: String,
}

/// Something in the file that deserves a look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    pub at: Position,
    pub kind: WarningKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WarningKind {
    UnknownKey { key: String, nearest: Option<String> },
    Deprecated { key: String, now: String },
    UnknownDecompressor { name: String },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.at)?;
        match &self.kind {
            WarningKind::UnknownKey { key, nearest: Some(nearest) } => {
                write!(f, "{key}: unknown key, ignored; did you mean {nearest}?")
            }
            WarningKind::UnknownKey { key, nearest: None } => write!(f, "{key}: unknown key, ignored"),
            WarningKind::Deprecated { key, now } => write!(f, "{key}: deprecated; the key is now {now}"),
            WarningKind::UnknownDecompressor { name } => {
                write!(
                    f,
                    "pull_modes.parallel_pull_unpack.decompress_streams.{name}: Unsupported compression algorithm; \
                    known are gzip and zstd"
                )
            }
        }
    }
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("failed to open config file {:?}", path.display())]
    Open { path: PathBuf, source: OpenError },
    #[error("failed to load config file {:?}: {}", path.display(), Problems(path, problems))]
    Decode { path: PathBuf, problems: Vec<Problem> },
    #[error("config file at {:?}: failed to parse config: {}", path.display(), Problems(path, problems))]
    Value { path: PathBuf, problems: Vec<Problem> },
    #[error("failed to load config file {:?}: it is larger than {MAX_FILE_SIZE} bytes", path.display())]
    TooLarge { path: PathBuf },
    /// Only from [`Loaded::strict`].
    #[error("config file at {:?} has warnings: {}", path.display(), Warnings(path, warnings))]
    Strict { path: PathBuf, warnings: Vec<Warning> },
}

/// Why a file cannot be opened or read, in the words that the Go daemon uses.
#[derive(Debug, thiserror::Error)]
#[error("open {}: {}", path.display(), plain(cause))]
pub struct OpenError {
    path: PathBuf,
    cause: std::io::Error,
}

/// The system's words for an error, lower case and without its number.
fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

struct Problems<'a>(&'a Path, &'a [Problem]);

impl fmt::Display for Problems<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.1.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{}:{}: ", self.0.display(), problem.at)?;
            if !problem.key.is_empty() {
                write!(f, "{}: ", problem.key)?;
            }
            f.write_str(&problem.message)?;
        }
        Ok(())
    }
}

struct Warnings<'a>(&'a Path, &'a [Warning]);

impl fmt::Display for Warnings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, warning) in self.1.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{}:{warning}", self.0.display())?;
        }
        Ok(())
    }
}

/// Settings, and what was odd about the file they came from.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    pub warnings: Vec<Warning>,
    path: PathBuf,
}

impl Loaded {
    /// The warnings as lines with the file's name, for the log.
    pub fn warning_lines(&self) -> Vec<String> {
        self.warnings.iter().map(|warning| format!("{}:{warning}", self.path.display())).collect()
    }

    /// The settings, if there is nothing odd about the file.
    pub fn strict(self) -> Result<Config, ConfigError> {
        match self.warnings.is_empty() {
            true => Ok(self.config),
            false => Err(ConfigError::Strict { path: self.path, warnings: self.warnings }),
        }
    }
}

/// Reads the settings in `path`.
pub fn load(path: &Path) -> Result<Loaded, ConfigError> {
    let failed = |cause| ConfigError::Open { path: path.into(), source: OpenError { path: path.into(), cause } };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && path == Path::new(layout::DEFAULT_CONFIG) => {
            return Ok(Loaded { config: Config::default(), warnings: Vec::new(), path: path.into() });
        }
        Err(e) => return Err(failed(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_SIZE {
        return Err(ConfigError::TooLarge { path: path.into() });
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => parse(text, path),
        Err(e) => {
            let valid = String::from_utf8_lossy(&bytes[..e.valid_up_to()]);
            let at = Position::of(&valid, valid.len());
            let problem = Problem { at, key: String::new(), message: "the file is not UTF-8".into() };
            Err(ConfigError::Decode { path: path.into(), problems: vec![problem] })
        }
    }
}

/// Reads settings from `text`; `path` is only named in messages.
pub fn parse(text: &str, path: &Path) -> Result<Loaded, ConfigError> {
    let document = toml_edit::Document::parse(text).map_err(|e| {
        let at = e.span().map_or(Position { line: 1, column: 1 }, |span| Position::of(text, span.start));
        let problem = Problem { at, key: String::new(), message: e.message().trim().replace('\n', ", ") };
        ConfigError::Decode { path: path.into(), problems: vec![problem] }
    })?;
    let mut config = Config::default();
    let mut reader = Reader::new(text, catalogue());
    reader.read("", document.as_table(), &mut config);
    settle(&mut config, &mut reader);
    let Reader { undecodable, unusable, mut warnings, .. } = reader;
    if !undecodable.is_empty() {
        return Err(ConfigError::Decode { path: path.into(), problems: undecodable });
    }
    if !unusable.is_empty() {
        return Err(ConfigError::Value { path: path.into(), problems: unusable });
    }
    warnings.sort_by_key(|warning| warning.at);
    Ok(Loaded { config, warnings, path: path.into() })
}

/// What depends on more than one key.
fn settle(config: &mut Config, reader: &mut Reader<'_>) {
    let zero = |key: &str| reader.written.get(key).is_some_and(|written| written.zero);
    if zero("blob.max_retries") {
        config.blob.max_retries = config.http.max_retries;
    }
    if zero("blob.min_wait_msec") {
        config.blob.min_wait = config.http.min_wait;
    }
    if zero("blob.max_wait_msec") {
        config.blob.max_wait = config.http.max_wait;
    }
    let table = "pull_modes.parallel_pull_unpack";
    let written = |key: &str| reader.written.get(&format!("{table}.{key}")).copied();
    let pull = &mut config.pull_modes.parallel_pull_unpack;
    // A default never contradicts what was written.
    let fit = |per_image: &mut Limit, global: Limit, written: Option<Written>| {
        if written.is_none() && per_image.max() > global.max() {
            *per_image = global;
        }
    };
    let per_image = written("max_concurrent_downloads_per_image");
    fit(&mut pull.max_concurrent_downloads_per_image, pull.max_concurrent_downloads, per_image);
    let per_image = written("max_concurrent_unpacks_per_image");
    fit(&mut pull.max_concurrent_unpacks_per_image, pull.max_concurrent_unpacks, per_image);

    let kubelet = &config.kubelet_keychain;
    for (value, key) in [
        (&kubelet.config_path, "kubelet_keychain.image_credential_provider_config"),
        (&kubelet.bin_dir, "kubelet_keychain.image_credential_provider_bin_dir"),
    ] {
        if kubelet.enable_keychain && value.is_empty() {
            let on = reader.written.get("kubelet_keychain.enable_keychain");
            let at = on.map_or(Position { line: 1, column: 1 }, |written| written.at);
            let message =
                "must be set, to what kubelet is given, where kubelet_keychain.enable_keychain is true".into();
            reader.unusable.push(Problem { at, key: key.into(), message });
        }
    }
    let store = &config.layer_store;
    if store.low_water > store.high_water {
        let key = "layer_store.low_water";
        let at = reader.written.get(key).or_else(|| reader.written.get("layer_store.high_water"));
        let at = at.map_or(Position { line: 1, column: 1 }, |written| written.at);
        let message = format!(
            "{} is above layer_store.high_water, {}: removing would never end",
            store.low_water, store.high_water
        );
        reader.unusable.push(Problem { at, key: key.into(), message });
    }
    let at = |key: &str| written(key).map_or(Position { line: 1, column: 1 }, |written| written.at);
    let (mut problems, mut warnings) = (Vec::new(), Vec::new());
    for fault in pull.faults() {
        let other = fault.other().and_then(|key| Some((key, written(key)?.at.line)));
        let message = match other {
            Some((key, line)) => format!("{fault}; the other one is {key}, line {line}"),
            None => fault.to_string(),
        };
        problems.push(Problem { at: at(fault.key()), key: format!("{table}.{}", fault.key()), message });
    }
    for name in pull.decompress_streams.keys().filter(|name| !matches!(name.as_str(), "gzip" | "zstd")) {
        let kind = WarningKind::UnknownDecompressor { name: name.clone() };
        warnings.push(Warning { at: at("decompress_streams"), kind });
    }
    reader.unusable.extend(problems);
    reader.warnings.extend(warnings);
}

/// Why eager pulls cannot work as configured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParallelFault {
    #[error("global download limit less than per-image download limit")]
    Downloads,
    #[error("global unpack limit less than per-image unpack limit")]
    Unpacks,
    #[error("the path {path:?} of decompressor {name:?} is empty or has one of the characters {UNSAFE_IN_PATHS}")]
    Decompressor { name: String, path: String },
}

/// What the Go daemon does not accept in the path of a decompressor.
const UNSAFE_IN_PATHS: &str = r"# % { } \ | ; & $ < >";

impl ParallelFault {
    fn key(&self) -> &'static str {
        match self {
            ParallelFault::Downloads => "max_concurrent_downloads",
            ParallelFault::Unpacks => "max_concurrent_unpacks",
            ParallelFault::Decompressor { .. } => "decompress_streams",
        }
    }

    /// The other key of a contradiction.
    fn other(&self) -> Option<&'static str> {
        match self {
            ParallelFault::Downloads => Some("max_concurrent_downloads_per_image"),
            ParallelFault::Unpacks => Some("max_concurrent_unpacks_per_image"),
            ParallelFault::Decompressor { .. } => None,
        }
    }
}

impl ParallelPullUnpack {
    /// Why eager pulls cannot work as configured; empty where they are switched off.
    pub fn faults(&self) -> Vec<ParallelFault> {
        if !self.enable && !self.parallel_pull_as_fallback {
            return Vec::new();
        }
        let exceeds = |per_image: Limit, global: Limit| match (per_image, global) {
            (Limit::At(per_image), Limit::At(global)) => per_image > global,
            (Limit::Unlimited, _) | (_, Limit::Unlimited) => false,
        };
        let mut faults = Vec::new();
        if exceeds(self.max_concurrent_downloads_per_image, self.max_concurrent_downloads) {
            faults.push(ParallelFault::Downloads);
        }
        if exceeds(self.max_concurrent_unpacks_per_image, self.max_concurrent_unpacks) {
            faults.push(ParallelFault::Unpacks);
        }
        for (name, stream) in &self.decompress_streams {
            if stream.path.is_empty() || stream.path.contains(|c: char| c != ' ' && UNSAFE_IN_PATHS.contains(c)) {
                faults.push(ParallelFault::Decompressor { name: name.clone(), path: stream.path.clone() });
            }
        }
        faults
    }
}

impl Registry {
    /// The directories of `config_path`, in order.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.config_path.split(':').filter(|path| !path.is_empty()).map(PathBuf::from).collect()
    }
}

/// Keys whose settings differ, in the order of their names. Keys that have no effect are left out.
pub fn changes(old: &Config, new: &Config) -> Vec<String> {
    let (old, new) = (flat(old), flat(new));
    let idle = |key: &str| {
        let doc = catalogue().into_iter().find(|entry| entry.path == key).map(|entry| entry.doc.concat());
        doc.is_some_and(|doc| doc.trim_start().starts_with("Accepted for compatibility"))
    };
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    keys.into_iter().filter(|key| old.get(*key) != new.get(*key) && !idle(key)).cloned().collect()
}

/// Every setting as text, by its dotted path.
fn flat(config: &Config) -> std::collections::BTreeMap<String, String> {
    fn walk(path: &str, table: &toml_edit::Table, out: &mut std::collections::BTreeMap<String, String>) {
        for (key, item) in table {
            let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
            match item.as_table() {
                Some(table) => walk(&path, table, out),
                None => {
                    out.insert(path, item.to_string().trim().to_owned());
                }
            }
        }
    }
    let mut out = std::collections::BTreeMap::new();
    // What we print ourselves is TOML; a test holds it to that.
    if let Ok(document) = render(config).parse::<toml_edit::DocumentMut>() {
        walk("", document.as_table(), &mut out);
    }
    out
}

fn catalogue() -> Vec<Entry> {
    let mut entries = Vec::new();
    Config::catalogue("", &mut entries);
    entries
}

/// Every key with its documentation, in the order of the file.
pub fn keys() -> Vec<(String, String)> {
    catalogue().into_iter().map(|entry| (entry.path, entry.doc.concat().trim().to_owned())).collect()
}

/// `config dump`: the settings as a file that loads as the same settings.
pub fn render(config: &Config) -> String {
    let mut writer = Writer::new(Style::Plain);
    config.write(&mut writer);
    writer.finish()
}

/// `config default`: the same with the documentation of every key.
pub fn documented(config: &Config) -> String {
    let mut writer = Writer::new(Style::Documented);
    writer.comment(Config::DOC);
    config.write(&mut writer);
    writer.finish()
}
