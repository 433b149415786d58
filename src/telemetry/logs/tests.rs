use super::*;
use std::sync::{Arc, Mutex};

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<String>>);

impl Sink for Kept {
    fn write(&self, line: &[u8]) {
        self.0.lock().expect("lock").push_str(&String::from_utf8_lossy(line));
    }
}

/// The lines that `speak` logs at `level`.
fn lines(level: Level, speak: impl FnOnce()) -> Vec<String> {
    let kept = Kept::default();
    let layer = Collect(JsonLines::new(kept.clone())).with_filter(filter_fn(move |metadata| passes(level, metadata)));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), speak);
    let text = kept.0.lock().expect("lock");
    text.lines().map(str::to_owned).collect()
}

/// A line without its time, which is checked by itself.
fn timeless(line: &str) -> String {
    let (before, time) = line.split_once(r#""time":""#).expect("a time");
    let (time, after) = time.split_once('"').expect("its end");
    assert!(time.len() >= 30 && time.as_bytes()[19] == b'.', "{time}");
    format!("{before}{after}")
}

#[test]
fn a_machine_read_line_has_sorted_keys_and_its_strings_stay_strings() {
    let lines = lines(Level::Info, || {
        let span = tracing::info_span!("prepare", key = "default/1/extract", parent = "");
        span.in_scope(|| {
            tracing::info!(
                target: "soci::snapshot",
                { "remote-snapshot-prepared" = "true", size = 5 },
                "remote snapshot successfully prepared."
            );
        });
    });
    assert_eq!(
        lines.iter().map(|line| timeless(line)).collect::<Vec<_>>(),
        [
            r#"{"key":"default/1/extract","level":"info","msg":"remote snapshot successfully prepared.","parent":"","remote-snapshot-prepared":"true","size":5,}"#
        ]
    );
}

#[test]
fn levels_have_logrus_names() {
    let lines = lines(Level::Trace, || {
        tracing::trace!("a");
        tracing::debug!("a");
        tracing::info!("a");
        tracing::warn!("a");
        tracing::error!("a");
    });
    let names: Vec<String> = lines
        .iter()
        .map(|line| {
            serde_json::from_str::<Map<String, Value>>(line).expect("json")["level"].as_str().expect("str").to_owned()
        })
        .collect();
    assert_eq!(names, ["trace", "debug", "info", "warning", "error"]);
}

#[test]
fn fatal_lines_pass_at_every_level_and_carry_the_chain_of_causes() {
    #[derive(Debug, thiserror::Error)]
    #[error("failed to open config file")]
    struct Outer(#[source] io::Error);
    for level in [Level::Trace, Level::Panic] {
        let lines = lines(level, || fatal("failed to open config file /x", &Outer(io::Error::other("no such file"))));
        assert_eq!(
            timeless(&lines[0]),
            r#"{"error":"failed to open config file: no such file","level":"fatal","message_id":"650073dd777e49b9ae6a80b9ffcf4cff","msg":"failed to open config file /x",}"#
        );
    }
}

#[test]
fn other_crates_never_speak_below_a_warning() {
    let lines = lines(Level::Trace, || {
        tracing::trace!(target: "hyper::proto", "Authorization: Bearer abc");
        tracing::debug!(target: "reqwest", "Authorization: Bearer abc");
        tracing::info!(target: "socialite", "Authorization: Bearer abc");
        tracing::warn!(target: "h2", "going away");
        tracing::trace!(target: "soci", "ours");
    });
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(!lines.concat().contains("Bearer"));
}

#[test]
fn times_have_nine_digits_and_the_local_offset() {
    assert_eq!(rfc3339(1_704_164_645, 0, 0), "2024-01-02T03:04:05.000000000Z");
    assert_eq!(rfc3339(1_704_164_645, 6_000_000, 19_800), "2024-01-02T08:34:05.006000000+05:30");
    assert_eq!(rfc3339(1_704_164_645, 1, -12_600), "2024-01-01T23:34:05.000000001-03:30");
}

#[test]
fn a_field_that_would_hide_a_key_of_the_format_is_moved_aside() {
    let lines = lines(Level::Info, || tracing::info!(time = "noon", level = 3, "m"));
    let line: Map<String, Value> = serde_json::from_str(&lines[0]).expect("json");
    assert_eq!(line["level"], "info");
    assert_eq!(line["fields.level"], 3);
    assert_eq!(line["fields.time"], "noon");
}

#[test]
fn spans_learn_fields_later_and_inner_fields_win() {
    let lines = lines(Level::Info, || {
        let outer = tracing::info_span!("outer", digest = "a", image = tracing::field::Empty);
        outer.record("image", "nginx");
        outer.in_scope(|| tracing::info_span!("inner", digest = "b").in_scope(|| tracing::info!("m")));
    });
    assert_eq!(timeless(&lines[0]), r#"{"digest":"b","image":"nginx","level":"info","msg":"m",}"#);
}

#[test]
fn level_names_are_those_of_the_flag() {
    assert_eq!("WARN".parse(), Ok(Level::Warning));
    assert_eq!("warning".parse(), Ok(Level::Warning));
    assert!("loud".parse::<Level>().is_err());
}
