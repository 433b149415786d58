//! Log lines.
//!
//! On stderr, one JSON object per line as logrus writes it: keys sorted, `level`, `msg`, `time` (RFC 3339, local offset, nine digits), and the event's
//! fields with the types they were given. Tests and operators' scripts of the Go snapshotter read these lines: a value given as the string `"true"`
//! stays a string. Fields of the spans around an event come along; the event's own win.
//!
//! Where stderr is the journal (`JOURNAL_STREAM` names it), lines go to journald itself, and fields become `SOCI_…` fields one can search by
//! ([`journal`]).
//!
//! The journal is read by people, stderr also by scripts of the Go snapshotter, which count lines: what is said for each layer or artifact of an image
//! at level info ([`ROUTINE_TARGET`], and messages of the catalog that are marked so) is debug in the journal.
//!
//! Confidentiality: only targets of this crate may speak below `warn`, whatever level was asked for. HTTP and TLS libraries print headers at `debug` and
//! `trace`; no setting can make them do it here.
//!
//! `fatal` exists in logrus but not in tracing: see [`fatal`].
#![forbid(unsafe_code)]

mod journal;
mod recent;

use super::{catalog::Message, status::Said};
use crate::sys::clock;
use serde_json::{Map, Value};
use std::{
    fmt::{self, Write as _},
    io::{self, Write},
    os::linux::fs::MetadataExt,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};
use tracing::{
    Event, Level as TracingLevel, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
};
use tracing_subscriber::{
    Layer,
    filter::filter_fn,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

/// The target of everything this crate says.
const OWN_TARGET: &str = "soci";
/// The target of what is said at level info for scripts that read stderr, and is detail in the journal.
pub const ROUTINE_TARGET: &str = "soci::routine";
/// The product's daemon, as the journal names it.
const IDENTIFIER: &str = "soci-snapshotter-grpc";
/// An event field that overrides the level's name; only `fatal` and `panic` have a use for it.
const LEVEL_FIELD: &str = "log.level";

/// What `--log-level` accepts: logrus' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Trace,
    Debug,
    Info,
    Warning,
    Error,
    Fatal,
    Panic,
}

/// A level name that logrus does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid log level: {0:?}; one of trace, debug, info, warn, error, fatal, panic")]
pub struct UnknownLevel(String);

impl FromStr for Level {
    type Err = UnknownLevel;

    fn from_str(name: &str) -> Result<Level, UnknownLevel> {
        match name.to_ascii_lowercase().as_str() {
            "trace" => Ok(Level::Trace),
            "debug" => Ok(Level::Debug),
            "info" => Ok(Level::Info),
            "warn" | "warning" => Ok(Level::Warning),
            "error" => Ok(Level::Error),
            "fatal" => Ok(Level::Fatal),
            "panic" => Ok(Level::Panic),
            _ => Err(UnknownLevel(name.to_owned())),
        }
    }
}

impl Level {
    /// Whether details were asked for.
    fn is_detailed(self) -> bool {
        matches!(self, Level::Trace | Level::Debug)
    }

    /// The most that passes. tracing has nothing above `error`, so fatal lines pass at every setting, as they should.
    fn filter(self) -> LevelFilter {
        match self {
            Level::Trace => LevelFilter::TRACE,
            Level::Debug => LevelFilter::DEBUG,
            Level::Info => LevelFilter::INFO,
            Level::Warning => LevelFilter::WARN,
            Level::Error | Level::Fatal | Level::Panic => LevelFilter::ERROR,
        }
    }
}

/// Where lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// journald if stderr is the journal, JSON on stderr otherwise.
    Automatic,
    Json,
    Journald,
}

/// Starts logging for the process. Before this, nothing is logged; a second call is an error.
pub fn init(level: Level, output: Output) -> io::Result<()> {
    // Loads the time zone now: later the file may be out of reach.
    clock::utc_offset(0);
    let journal = match output {
        Output::Json => None,
        Output::Journald => Some(journal::Journal::connect(level.is_detailed())?),
        // If journald's socket is out of reach, stderr still arrives there; only the fields are not separate.
        Output::Automatic if stderr_is_the_journal() => journal::Journal::connect(level.is_detailed()).ok(),
        Output::Automatic => None,
    };
    // What is wrong is remembered whatever is written.
    let warnings = |metadata: &Metadata<'_>| passes(Level::Warning, metadata);
    let recent = Collect(&recent::RECENT).with_filter(filter_fn(warnings));
    let registry = tracing_subscriber::registry().with(recent);
    let passes = move |metadata: &Metadata<'_>| passes(level, metadata);
    let result = match journal {
        Some(journal) => registry.with(Collect(journal).with_filter(filter_fn(passes))).try_init(),
        None => registry.with(Collect(JsonLines::new(Stderr)).with_filter(filter_fn(passes))).try_init(),
    };
    result.map_err(io::Error::other)
}

/// systemd names the device and inode of the stream it connected; a redirected stderr has another one (systemd.exec(5)).
fn stderr_is_the_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream.to_str() == Some(format!("{}:{}", stderr.st_dev(), stderr.st_ino()).as_str())
}

fn passes(level: Level, metadata: &Metadata<'_>) -> bool {
    let own = metadata.target().strip_prefix(OWN_TARGET).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
    let limit = if own { level.filter() } else { level.filter().min(LevelFilter::WARN) };
    *metadata.level() <= limit
}

/// Logs why the process is about to exit, at level `fatal`: `msg` and the chain of causes in `error`.
pub fn fatal(message: &str, error: &(dyn std::error::Error + 'static)) {
    let message_id = Message::CannotStart.id();
    tracing::error!(target: "soci", { "log.level" = "fatal", message_id, error = error }, "{message}");
}

/// The last warnings and errors of the catalog that this process said, oldest first.
pub fn recent() -> Vec<Said> {
    recent::RECENT.all()
}

/// An error and its sources, outermost first, separated by colons.
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

/// Where finished lines go.
trait Sink: Send + Sync + 'static {
    fn write(&self, line: &[u8]);
}

struct Stderr;

impl Sink for Stderr {
    fn write(&self, line: &[u8]) {
        // There is nobody left to tell that telling failed.
        let _ = io::stderr().lock().write_all(line);
    }
}

struct JsonLines<S> {
    sink: S,
}

impl<S: Sink> JsonLines<S> {
    fn new(sink: S) -> JsonLines<S> {
        JsonLines { sink }
    }
}

/// A span's fields, kept with the span.
struct SpanFields(Map<String, Value>);

/// Takes finished events.
trait Receiver: Send + Sync + 'static {
    /// `fields`: those of the spans around it and its own, `message` among them.
    fn event(&self, metadata: &Metadata<'_>, fields: Map<String, Value>);
}

impl<S: Sink> Receiver for JsonLines<S> {
    fn event(&self, metadata: &Metadata<'_>, fields: Map<String, Value>) {
        let mut line = render(fields, *metadata.level(), SystemTime::now());
        line.push('\n');
        self.sink.write(line.as_bytes());
    }
}

/// Collects the fields of events and of the spans around them.
struct Collect<R>(R);

impl<C, R: Receiver> Layer<C> for Collect<R>
where
    C: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, C>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(SpanFields(fields.0));
        }
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, context: Context<'_, C>) {
        let mut fields = Fields::default();
        values.record(&mut fields);
        if let Some(span) = context.span(id)
            && let Some(SpanFields(known)) = span.extensions_mut().get_mut()
        {
            known.append(&mut fields.0);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, C>) {
        let mut fields = Map::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(SpanFields(known)) = span.extensions().get() {
                fields.extend(known.iter().map(|(name, value)| (name.clone(), value.clone())));
            }
        }
        let mut own = Fields(fields);
        event.record(&mut own);
        self.0.event(event.metadata(), own.0);
    }
}

fn render(mut fields: Map<String, Value>, level: TracingLevel, now: SystemTime) -> String {
    let message = fields.remove("message").unwrap_or_else(|| Value::String(String::new()));
    let level = fields.remove(LEVEL_FIELD).unwrap_or_else(|| {
        Value::from(match level {
            TracingLevel::TRACE => "trace",
            TracingLevel::DEBUG => "debug",
            TracingLevel::INFO => "info",
            TracingLevel::WARN => "warning",
            TracingLevel::ERROR => "error",
        })
    });
    for (name, value) in [("level", level), ("msg", message), ("time", Value::String(timestamp(now)))] {
        // logrus' way with fields that would hide its own.
        if let Some(hidden) = fields.insert(name.to_owned(), value) {
            fields.insert(format!("fields.{name}"), hidden);
        }
    }
    // A serde_json map is sorted by key unless its `preserve_order` feature is on; sort where it is.
    let sorted: std::collections::BTreeMap<String, Value> = fields.into_iter().collect();
    // Strings, numbers and booleans always serialise.
    serde_json::to_string(&sorted).unwrap_or_default()
}

fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(0);
    rfc3339(seconds, since.subsec_nanos(), clock::utc_offset(seconds))
}

fn rfc3339(seconds: i64, nanos: u32, offset: i32) -> String {
    let local = jiff::Timestamp::from_second(seconds.saturating_add(i64::from(offset))).unwrap_or_default();
    let local = jiff::tz::Offset::UTC.to_datetime(local);
    let mut out = format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{nanos:09}",
        local.year(),
        local.month(),
        local.day(),
        local.hour(),
        local.minute(),
        local.second()
    );
    match offset {
        0 => out.push('Z'),
        _ => {
            let sign = if offset < 0 { '-' } else { '+' };
            let minutes = offset.unsigned_abs() / 60;
            // Writing to a String cannot fail.
            let _ = write!(out, "{sign}{:02}:{:02}", minutes / 60, minutes % 60);
        }
    }
    out
}

/// Collects fields with their types.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl Fields {
    fn set(&mut self, field: &Field, value: impl Into<Value>) {
        // `r#type` and friends.
        let name = field.name().strip_prefix("r#").unwrap_or(field.name());
        self.0.insert(name.to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value);
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value);
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value);
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value);
    }
    fn record_i128(&mut self, field: &Field, value: i128) {
        self.set(field, value.to_string());
    }
    fn record_u128(&mut self, field: &Field, value: u128) {
        self.set(field, value.to_string());
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.set(field, Chain(value).to_string());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests;
