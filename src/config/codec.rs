//! How a value is written in the file: its type there, its default, and what zero and negative numbers mean.

use super::values::{
    Choice, ChunkSize, DecompressStream, Limit, MinLayerSize, Mirror, Pace, RequestTimeout, Silence, Timeout,
};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::time::Duration;
use toml_edit::{Item, TableLike};

/// Why a value in the file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Not of the setting's type: the file cannot be decoded.
    Type(String),
    /// Of the right type, but not a value the setting can have.
    Value(String),
}

/// A remark about something inside a table that does not make it unusable.
pub struct Remark {
    pub span: Option<Range<usize>>,
    pub key: String,
    pub known: &'static [&'static str],
}

/// Text of a value.
pub enum Text {
    /// Goes behind `key = `.
    Inline(String),
    /// Whole tables, each with its header below the given path.
    Tables(Vec<(String, Vec<(String, String)>)>),
}

/// One way to write a value.
pub trait Codec {
    type Value: Clone + PartialEq;
    fn default(&self) -> Self::Value;
    fn decode(&self, item: &Item, remarks: &mut Vec<Remark>) -> Result<Self::Value, Fault>;
    fn encode(&self, value: &Self::Value) -> Text;
}

pub fn mismatch(expected: &str, item: &Item) -> Fault {
    let found = match item.type_name() {
        "none" => "nothing",
        other => other,
    };
    Fault::Type(format!("expected {expected}, found {found}"))
}

fn integer(item: &Item) -> Result<i64, Fault> {
    item.as_integer().ok_or_else(|| mismatch("an integer", item))
}

fn string(item: &Item) -> Result<&str, Fault> {
    item.as_str().ok_or_else(|| mismatch("a string", item))
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A literal string where TOML allows one, as the Go daemon prints them.
pub fn quote(text: &str) -> String {
    if text.chars().all(|c| c != '\'' && (c == '\t' || !c.is_control())) {
        format!("'{text}'")
    } else {
        toml_edit::Value::from(text).to_string()
    }
}

/// A bare key where TOML allows one.
pub fn quote_key(key: &str) -> String {
    if !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
        key.to_owned()
    } else {
        toml_edit::Value::from(key).to_string()
    }
}

/// A boolean; what is written is what counts.
pub struct Flag(pub bool);

impl Codec for Flag {
    type Value = bool;
    fn default(&self) -> bool {
        self.0
    }
    fn decode(&self, item: &Item, _: &mut Vec<Remark>) -> Result<bool, Fault> {
        item.as_bool().ok_or_else(|| mismatch("a boolean", item))
    }
    fn encode(&self, value: &bool) -> Text {
        Text::Inline(value.to_string())
    }
}

/// A string; an empty one is the default.
pub struct Words(pub &'static str);

impl Codec for Words {
    type Value = String;
    fn default(&self) -> String {
        self.0.to_owned()
    }
    fn decode(&self, item: &Item, _: &mut Vec<Remark>) -> Result<String, Fault> {
        let text = string(item)?;
        Ok(if text.is_empty() { self.default() } else { text.to_owned() })
    }
    fn encode(&self, value: &String) -> Text {
        Text::Inline(quote(value))
    }
}

/// A string; an empty one is what it is.
pub struct Verbatim(pub &'static str);

impl Codec for Verbatim {
    type Value = String;
    fn default(&self) -> String {
        self.0.to_owned()
    }
    fn decode(&self, item: &Item, _: &mut Vec<Remark>) -> Result<String, Fault> {
        string(item).map(str::to_owned)
    }
    fn encode(&self, value: &String) -> Text {
        Text::Inline(quote(value))
    }
}

/// A path of a socket; a leading `unix://` is dropped.
pub struct SocketPath(pub &'static str);

impl Codec for SocketPath {
    type Value = String;
    fn default(&self) -> String {
        self.0.to_owned()
    }
    fn decode(&self, item: &Item, remarks: &mut Vec<Remark>) -> Result<String, Fault> {
        let text = Words(self.0).decode(item, remarks)?;
        Ok(text.strip_prefix("unix://").map(str::to_owned).unwrap_or(text))
    }
    fn encode(&self, value: &String) -> Text {
        Text::Inline(quote(value))
    }
}

/// One word of a few; an empty one is the default.
pub struct OneOf<T>(pub T);

impl<T: Choice> Codec for OneOf<T> {
    type Value = T;
    fn default(&self) -> T {
        self.0
    }
    fn decode(&self, item: &Item, _: &mut Vec<Remark>) -> Result<T, Fault> {
        let text = string(item)?;
        if text.is_empty() {
            return Ok(self.0);
        }
        T::WORDS
            .iter()
            .find(|(word, _)| *word == text)
            .map(|(_, value)| *value)
            .ok_or_else(|| Fault::Value(T::refuse(text)))
    }
    fn encode(&self, value: &T) -> Text {
        let word = T::WORDS.iter().find(|(_, known)| known == value).map_or("", |(word, _)| word);
        Text::Inline(quote(word))
    }
}

/// An integer that is kept as written because nothing here acts on it.
pub struct Unused(pub i64);

impl Codec for Unused {
    type Value = i64;
    fn default(&self) -> i64 {
        self.0
    }
    fn decode(&self, item: &Item, _: &mut Vec<Remark>) -> Result<i64, Fault> {
        integer(item)
    }
    fn encode(&self, value: &i64) -> Text {
        Text::Inline(value.to_string())
    }
}

/// A value that is an integer in the file. `read` gets numbers other than zero where `zero_is_default`.
pub struct Number<T> {
    default: i64,
    zero_is_default: bool,
    read: fn(i64) -> T,
    write: fn(&T) -> i64,
    _value: PhantomData<T>,
}

impl<T: Clone + PartialEq> Codec for Number<T> {
    type Value = T;
    fn default(&self) -> T {
        (self.read)(self.default)
    }
    fn decode(&self, item: &Item, _: &mut Vec<Remark>) -> Result<T, Fault> {
        Ok(match integer(item)? {
            0 if self.zero_is_default => self.default(),
            number => (self.read)(number),
        })
    }
    fn encode(&self, value: &T) -> Text {
        Text::Inline((self.write)(value).to_string())
    }
}

fn number<T>(default: i64, zero_is_default: bool, read: fn(i64) -> T, write: fn(&T) -> i64) -> Number<T> {
    Number { default, zero_is_default, read, write, _value: PhantomData }
}

fn limit_from(number: i64) -> Limit {
    match u64::try_from(number) {
        Ok(0) | Err(_) => Limit::Unlimited,
        Ok(count) => Limit::At(count),
    }
}

fn negative_when_unlimited(limit: &Limit) -> i64 {
    match limit {
        Limit::Unlimited => -1,
        Limit::At(count) => clamp(*count),
    }
}

/// A limit: zero is the default, negative is unlimited.
pub fn limit(default: i64) -> Number<Limit> {
    number(default, true, limit_from, negative_when_unlimited)
}

/// A limit: zero and negative are unlimited.
pub fn open_limit(default: i64) -> Number<Limit> {
    number(default, false, limit_from, negative_when_unlimited)
}

/// A limit that is unlimited by default and is then written as zero.
pub fn no_limit() -> Number<Limit> {
    number(0, false, limit_from, |limit| match limit {
        Limit::Unlimited => 0,
        Limit::At(count) => clamp(*count),
    })
}

fn timeout_from(number: i64, unit: fn(u64) -> Duration) -> Timeout {
    u64::try_from(number).map_or(Timeout::Never, |n| Timeout::After(unit(n)))
}

fn in_seconds(duration: Duration) -> i64 {
    clamp(duration.as_secs())
}

fn in_millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A timeout in milliseconds: zero is the default, negative is never.
pub fn timeout_ms(default: i64) -> Number<Timeout> {
    number(default, true, |n| timeout_from(n, Duration::from_millis), |t| t.duration().map_or(-1, in_millis))
}

/// A timeout in seconds: zero is the default, negative is never.
pub fn timeout_s(default: i64) -> Number<Timeout> {
    number(default, true, |n| timeout_from(n, Duration::from_secs), |t| t.duration().map_or(-1, in_seconds))
}

/// A delay in milliseconds: zero is the default, negative is none at all.
pub fn delay_ms(default: i64) -> Number<Duration> {
    fn read(n: i64) -> Duration {
        Duration::from_millis(u64::try_from(n).unwrap_or(0))
    }
    number(default, true, read, |d| if d.is_zero() { -1 } else { in_millis(*d) })
}

/// A delay in seconds: zero is the default, negative is none at all.
pub fn delay_s(default: i64) -> Number<Duration> {
    fn read(n: i64) -> Duration {
        Duration::from_secs(u64::try_from(n).unwrap_or(0))
    }
    number(default, true, read, |d| if d.is_zero() { -1 } else { in_seconds(*d) })
}

/// Retries after the first attempt: zero is the default, negative is none.
pub fn retries(default: i64) -> Number<u32> {
    fn read(n: i64) -> u32 {
        u32::try_from(n.max(0)).unwrap_or(u32::MAX)
    }
    number(default, true, read, |n| if *n == 0 { -1 } else { i64::from(*n) })
}

/// Fetches after a span whose digest was wrong: zero is none, negative is three.
pub fn span_retries() -> Number<u32> {
    fn read(n: i64) -> u32 {
        u32::try_from(n).unwrap_or(if n < 0 { 3 } else { u32::MAX })
    }
    number(0, false, read, |n| i64::from(*n))
}

/// The size below which a layer is not loaded lazily: zero and negative switch it off.
pub fn min_layer_size() -> Number<MinLayerSize> {
    fn read(n: i64) -> MinLayerSize {
        match u64::try_from(n) {
            Ok(0) | Err(_) => MinLayerSize::Off,
            Ok(bytes) => MinLayerSize::Bytes(bytes),
        }
    }
    number(0, false, read, |size| match size {
        MinLayerSize::Off => 0,
        MinLayerSize::Bytes(bytes) => clamp(*bytes),
    })
}

/// Mebibytes in the file, bytes in the program: zero and negative are the default.
pub fn mebibytes(default: u32) -> Number<u64> {
    fn read(n: i64) -> u64 {
        u64::try_from(n).unwrap_or(0).saturating_mul(1 << 20)
    }
    number(i64::from(default), true, read, |bytes| clamp(bytes >> 20))
}

/// The Go daemon's default period. Its sample file lists every default, so this number is nobody's choice.
const GO_FETCH_PERIOD_MS: i64 = 500;
/// The Go daemon's default silence period; see [`GO_FETCH_PERIOD_MS`].
const GO_SILENCE_PERIOD_MS: i64 = 30_000;

/// Milliseconds between spans: the Go default, zero and negative are line rate.
pub fn pace() -> Number<Pace> {
    fn read(n: i64) -> Pace {
        match u64::try_from(n) {
            Ok(0) | Err(_) => Pace::LineRate,
            Ok(_) if n == GO_FETCH_PERIOD_MS => Pace::LineRate,
            Ok(ms) => Pace::Every(Duration::from_millis(ms)),
        }
    }
    number(GO_FETCH_PERIOD_MS, true, read, |pace| match pace {
        Pace::LineRate => GO_FETCH_PERIOD_MS,
        Pace::Every(period) => in_millis(*period),
    })
}

/// Milliseconds of silence: the Go default, zero and negative are none.
pub fn silence() -> Number<Silence> {
    fn read(n: i64) -> Silence {
        match u64::try_from(n) {
            Ok(0) | Err(_) => Silence::None,
            Ok(_) if n == GO_SILENCE_PERIOD_MS => Silence::None,
            Ok(ms) => Silence::For(Duration::from_millis(ms)),
        }
    }
    number(GO_SILENCE_PERIOD_MS, true, read, |silence| match silence {
        Silence::None => GO_SILENCE_PERIOD_MS,
        Silence::For(period) => in_millis(*period),
    })
}

/// Bytes with an optional unit: `[blanks] digits[.digits] [blanks] [b|kb|mb|gb] [blanks]`, base 1024, any case.
pub struct Size;

impl Codec for Size {
    type Value = ChunkSize;
    fn default(&self) -> ChunkSize {
        ChunkSize::WholeLayer
    }
    fn decode(&self, item: &Item, _: &mut Vec<Remark>) -> Result<ChunkSize, Fault> {
        let text = string(item)?;
        if text.is_empty() {
            return Ok(ChunkSize::WholeLayer);
        }
        match parse_size(text) {
            Some(0) => Ok(ChunkSize::WholeLayer),
            Some(bytes) => Ok(ChunkSize::Bytes(bytes)),
            None => Err(Fault::Value(format!("invalid size format: {text}"))),
        }
    }
    fn encode(&self, value: &ChunkSize) -> Text {
        Text::Inline(match value {
            ChunkSize::WholeLayer => quote(""),
            ChunkSize::Bytes(bytes) => quote(&bytes.to_string()),
        })
    }
}

/// The bytes that `text` stands for, truncated to an integer.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number_end);
    let shift = match unit.trim_start() {
        "" | "b" => 0,
        "kb" => 10,
        "mb" => 20,
        "gb" => 30,
        _ => return None,
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return None,
        Some((whole, fraction)) => (whole, fraction),
        None => (number, ""),
    };
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    // 18 digits are more than 2^30 units can tell apart, and still fit the arithmetic.
    let digits = &fraction[..fraction.len().min(18)];
    let scale = 10u128.pow(u32::try_from(digits.len()).ok()?);
    let part = (digits.parse::<u128>().unwrap_or(0) << shift) / scale;
    whole.checked_add(u64::try_from(part).ok()?)
}

/// `[[resolver.host."<image host>".mirrors]]`.
pub struct Mirrors;

const MIRROR_KEYS: &[&str] = &["host", "insecure", "request_timeout_sec"];

impl Codec for Mirrors {
    type Value = BTreeMap<String, Vec<Mirror>>;
    fn default(&self) -> Self::Value {
        BTreeMap::new()
    }
    fn decode(&self, item: &Item, remarks: &mut Vec<Remark>) -> Result<Self::Value, Fault> {
        let hosts = item.as_table_like().ok_or_else(|| mismatch("a table of image hosts", item))?;
        let mut out = BTreeMap::new();
        for (host, settings) in hosts.iter() {
            let settings =
                settings.as_table_like().ok_or_else(|| mismatch("a table with a list of mirrors", settings))?;
            note_unknown(settings, host, &["mirrors"], remarks);
            let Some(list) = lookup(settings, "mirrors") else { continue };
            let mut mirrors = Vec::new();
            for entry in tables(list)? {
                note_unknown(entry, &format!("{host}.mirrors"), MIRROR_KEYS, remarks);
                mirrors.push(mirror(entry)?);
            }
            out.insert(host.to_owned(), mirrors);
        }
        Ok(out)
    }
    fn encode(&self, value: &Self::Value) -> Text {
        let mut out = Vec::new();
        for (host, mirrors) in value {
            for mirror in mirrors {
                let timeout = match mirror.request_timeout {
                    RequestTimeout::Inherit => 0,
                    RequestTimeout::Never => -1,
                    RequestTimeout::After(duration) => in_seconds(duration),
                };
                let keys = vec![
                    ("host".to_owned(), quote(&mirror.host)),
                    ("insecure".to_owned(), mirror.insecure.to_string()),
                    ("request_timeout_sec".to_owned(), timeout.to_string()),
                ];
                out.push((format!("[[{{path}}.{}.mirrors]]", quote_key(host)), keys));
            }
        }
        Text::Tables(out)
    }
}

fn mirror(entry: &dyn TableLike) -> Result<Mirror, Fault> {
    let host = lookup(entry, "host").map(string).transpose()?.unwrap_or("");
    let url = url::Url::parse(host).ok().filter(|url| url.has_host() && matches!(url.scheme(), "http" | "https"));
    if url.is_none() {
        return Err(Fault::Value(format!(
            "mirror host must be a URL with its scheme, such as https://mirror.example:5000, got {:?}",
            redacted(host)
        )));
    }
    let insecure = match lookup(entry, "insecure") {
        Some(item) => item.as_bool().ok_or_else(|| mismatch("a boolean", item))?,
        None => false,
    };
    let request_timeout = match lookup(entry, "request_timeout_sec").map(integer).transpose()?.unwrap_or(0) {
        0 => RequestTimeout::Inherit,
        n => u64::try_from(n).map_or(RequestTimeout::Never, |n| RequestTimeout::After(Duration::from_secs(n))),
    };
    Ok(Mirror { host: host.to_owned(), insecure, request_timeout })
}

/// What may be shown of a host that somebody wrote: not what could be a user name and its secret.
fn redacted(host: &str) -> &str {
    host.rsplit('@').next().unwrap_or(host)
}

/// `decompress_streams."<gzip or zstd>"`.
pub struct Streams;

const STREAM_KEYS: &[&str] = &["path", "args"];

impl Codec for Streams {
    type Value = BTreeMap<String, DecompressStream>;
    fn default(&self) -> Self::Value {
        BTreeMap::new()
    }
    fn decode(&self, item: &Item, remarks: &mut Vec<Remark>) -> Result<Self::Value, Fault> {
        let streams = item.as_table_like().ok_or_else(|| mismatch("a table of decompressors", item))?;
        let mut out = BTreeMap::new();
        for (name, stream) in streams.iter() {
            let table = stream.as_table_like().ok_or_else(|| mismatch("a table with path and args", stream))?;
            note_unknown(table, name, STREAM_KEYS, remarks);
            let path = lookup(table, "path").map(string).transpose()?.unwrap_or("").to_owned();
            let args = match lookup(table, "args") {
                None => Vec::new(),
                Some(list) => {
                    let list = list.as_array().ok_or_else(|| mismatch("an array of strings", list))?;
                    let words = list.iter().map(|arg| arg.as_str().map(str::to_owned));
                    words
                        .collect::<Option<Vec<_>>>()
                        .ok_or_else(|| Fault::Type("expected an array of strings".into()))?
                }
            };
            out.insert(name.to_owned(), DecompressStream { path, args });
        }
        Ok(out)
    }
    fn encode(&self, value: &Self::Value) -> Text {
        let table = |(name, stream): (&String, &DecompressStream)| {
            let args = stream.args.iter().map(|arg| quote(arg)).collect::<Vec<_>>().join(", ");
            let keys = vec![("path".to_owned(), quote(&stream.path)), ("args".to_owned(), format!("[{args}]"))];
            (format!("[{{path}}.{}]", quote_key(name)), keys)
        };
        Text::Tables(value.iter().map(table).collect())
    }
}

/// The item under `key`: the exact name first, any case second.
pub fn lookup<'t>(table: &'t dyn TableLike, key: &str) -> Option<&'t Item> {
    table.get(key).or_else(|| table.iter().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, item)| item))
}

fn tables(item: &Item) -> Result<Vec<&dyn TableLike>, Fault> {
    if let Some(list) = item.as_array_of_tables() {
        return Ok(list.iter().map(|table| table as &dyn TableLike).collect());
    }
    let list = item.as_array().ok_or_else(|| mismatch("a list of tables", item))?;
    let tables = list.iter().map(|value| value.as_inline_table().map(|table| table as &dyn TableLike));
    tables.collect::<Option<Vec<_>>>().ok_or_else(|| Fault::Type("expected a list of tables".into()))
}

fn note_unknown(table: &dyn TableLike, at: &str, known: &'static [&'static str], remarks: &mut Vec<Remark>) {
    for (name, item) in table.iter() {
        if !known.iter().any(|key| key.eq_ignore_ascii_case(name)) {
            let span = table.key(name).and_then(|key| key.span()).or_else(|| item.span());
            remarks.push(Remark { span, key: format!("{at}.{name}"), known });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_grammar_of_the_go_daemon() {
        let table: &[(&str, Option<u64>)] = &[
            ("100B", Some(100)),
            ("1KB", Some(1024)),
            ("1.5MB", Some(1_572_864)),
            ("1Kb", Some(1024)),
            ("  1 MB  ", Some(1_048_576)),
            ("16mb", Some(16 << 20)),
            ("0", Some(0)),
            ("0.0000001b", Some(0)),
            ("-100B", None),
            ("invalid", None),
            ("1000m", None),
            ("1MiB", None),
            ("1e3", None),
            ("1.", None),
            (".5mb", None),
            ("1.2.3", None),
            ("", None),
            ("99999999999gb", None),
        ];
        for (text, bytes) in table {
            assert_eq!(parse_size(text), *bytes, "{text:?}");
        }
    }

    #[test]
    fn strings_are_literal_where_toml_allows_it() {
        assert_eq!(quote("a b\\c"), r"'a b\c'");
        assert_eq!(quote("it's"), "\"it's\"");
        assert_eq!(quote_key("gzip"), "gzip");
        assert_eq!(quote_key("docker.io"), "\"docker.io\"");
    }
}
