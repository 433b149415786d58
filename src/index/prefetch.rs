//! Prefetch artifacts: which spans of a layer to load first (`formats.md` 6.2). Hostile input; pure.

use std::ops::RangeInclusive;

/// Largest artifact read. A range takes 32 bytes and a layer has some thousands of spans.
pub const MAX_SIZE: u64 = 4 << 20;

/// The ranges of an artifact as written, not yet held against a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefetch {
    ranges: Vec<(i64, i64)>,
}

/// Why an artifact says nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefetchError {
    #[error("the prefetch artifact cannot be read")]
    Malformed,
    #[error("unsupported prefetch artifact version {0:?}")]
    Version(String),
    #[error("prefetch artifact is empty")]
    Empty,
}

#[derive(serde::Deserialize)]
struct Artifact {
    #[serde(default)]
    version: String,
    #[serde(default)]
    prefetch_spans: Option<Vec<Spans>>,
}

#[derive(serde::Deserialize)]
struct Spans {
    #[serde(default)]
    start_span: i64,
    #[serde(default)]
    end_span: i64,
}

/// Reads an artifact.
pub fn parse(bytes: &[u8]) -> Result<Prefetch, PrefetchError> {
    let artifact: Artifact = serde_json::from_slice(bytes).map_err(|_| PrefetchError::Malformed)?;
    if artifact.version != "1.0" {
        return Err(PrefetchError::Version(artifact.version.chars().take(50).collect()));
    }
    let ranges: Vec<_> =
        artifact.prefetch_spans.unwrap_or_default().iter().map(|s| (s.start_span, s.end_span)).collect();
    if ranges.is_empty() {
        return Err(PrefetchError::Empty);
    }
    Ok(Prefetch { ranges })
}

impl Prefetch {
    /// Ranges in the artifact.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Never, once parsed.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges that a layer whose last span is `last` has, in the order of the artifact, cut to its spans.
    pub fn ranges(&self, last: u32) -> impl Iterator<Item = RangeInclusive<u32>> + '_ {
        let last = i64::from(last);
        self.ranges.iter().filter_map(move |&(start, end)| {
            let (start, end) = (start.max(0), end.min(last));
            // Both lie within 0..=u32::MAX when the range is not empty.
            (start <= end).then_some(start as u32..=end as u32)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_to_the_layer_however_mad() {
        let text = br#"{"version":"1.0","prefetch_spans":[{"start_span":10,"end_span":12},{"start_span":-5,"end_span":2147483647},
            {"start_span":3,"end_span":2},{"start_span":11,"end_span":99,"priority":3},{"start_span":-9223372036854775808,"end_span":-1}]}"#;
        let ranges: Vec<_> = parse(text).unwrap().ranges(11).collect();
        assert_eq!(ranges, [10..=11, 0..=11, 11..=11]);
    }

    #[test]
    fn other_versions_and_empty_artifacts_are_told_apart() {
        assert_eq!(parse(br#"{"version":"1.0","prefetch_spans":[]}"#), Err(PrefetchError::Empty));
        assert_eq!(parse(br#"{"version":"2.0"}"#), Err(PrefetchError::Version("2.0".into())));
        assert_eq!(parse(b"nonsense"), Err(PrefetchError::Malformed));
        assert_eq!(
            parse(br#"{"version":"1.0","prefetch_spans":[{"start_span":1e99}]}"#),
            Err(PrefetchError::Malformed)
        );
    }
}
