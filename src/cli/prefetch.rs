//! `soci prefetch`: lists prefetch artifacts and shows which spans they name.

use super::{
    args::{Global, PrefetchInfo, PrefetchList},
    artifacts::{ArtifactsError, Kind},
    blobs::BlobError,
    containerd::{Session, SessionError},
    output::indent,
    table::{ago, head, table},
};
use crate::oci::Digest;
use serde::{Deserialize, Serialize};
use std::{
    fmt::Write as _,
    io::{self, Write},
};

/// Why there was nothing to print.
#[derive(Debug, thiserror::Error)]
pub enum PrefetchError {
    #[error("invalid checksum digest format: {0:?} is not a digest (sha256: and 64 hexadecimal digits)")]
    InvalidDigest(String),
    #[error("couldn't retrieve artifact for {0}, not found (`soci prefetch list` shows those there are)")]
    Unknown(Digest),
    #[error("the provided digest is not a prefetch artifact (type: {0})")]
    NotPrefetch(&'static str),
    #[error(
        "prefetch artifact {0} is recorded, but its bytes are not in the content store; `soci rebuild-db` forgets it"
    )]
    Gone(Digest),
    #[error("prefetch artifact {digest} cannot be read")]
    Malformed { digest: Digest, source: serde_json::Error },
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("failed to write to stdout")]
    Output(#[source] io::Error),
}

/// An artifact as it is stored (`formats.md` 6.1).
#[derive(Debug, Deserialize)]
struct Artifact {
    #[serde(default)]
    version: String,
    #[serde(default)]
    prefetch_spans: Vec<Spans>,
}

#[derive(Debug, Deserialize)]
struct Spans {
    #[serde(default)]
    start_span: i64,
    #[serde(default)]
    end_span: i64,
    #[serde(default)]
    priority: i64,
}

impl Spans {
    fn count(&self) -> i64 {
        self.end_span.saturating_sub(self.start_span).saturating_add(1)
    }
}

fn total(artifact: &Artifact) -> i64 {
    artifact.prefetch_spans.iter().fold(0, |sum, spans| sum.saturating_add(spans.count()))
}

/// `soci prefetch list`.
pub fn list(args: &PrefetchList, global: &Global) -> Result<(), PrefetchError> {
    #[derive(Serialize)]
    #[serde(rename_all = "PascalCase")]
    struct Entry {
        digest: Digest,
        layer_digest: String,
        total_spans: i64,
        created_at: Option<String>,
    }
    let session = Session::open(global)?;
    let rows = session.artifacts.rows()?;
    let now = jiff::Timestamp::now();
    let (mut lines, mut entries) = (vec![head(["DIGEST", "LAYER DIGEST", "SPANS", "CREATED"])], Vec::new());
    for (digest, row) in rows.of_kind(Kind::Prefetch) {
        let spans = match session.artifact(digest) {
            Err(BlobError::Stopped(stopped)) => return Err(BlobError::Stopped(stopped).into()),
            Ok(Some(bytes)) => serde_json::from_slice(&bytes).ok().map(|artifact| total(&artifact)),
            Ok(None) | Err(_) => None,
        };
        let layer = row.describes.map(|d| d.to_string()).unwrap_or_default();
        let shown = spans.map_or_else(|| "N/A".to_owned(), |n| n.to_string());
        lines.push(vec![digest.to_string(), layer.clone(), shown, ago(row.created_at, now)]);
        let created_at = row.created_at.map(|at| at.to_string());
        entries.push(Entry { digest, layer_digest: layer, total_spans: spans.unwrap_or(-1), created_at });
    }
    let text = match (args.json, entries.is_empty()) {
        (true, true) => "null\n".to_owned(),
        (true, false) => serde_json::to_string_pretty(&entries).unwrap_or_default() + "\n",
        (false, _) => table(&lines),
    };
    print(&text)
}

/// `soci prefetch info`.
pub fn info(args: &PrefetchInfo, global: &Global) -> Result<(), PrefetchError> {
    let text = args.operands.first().map(String::as_str).unwrap_or_default();
    let digest: Digest = text.parse().map_err(|_| PrefetchError::InvalidDigest(text.to_owned()))?;
    let session = Session::open(global)?;
    let row = session.artifacts.rows()?.get(digest).ok_or(PrefetchError::Unknown(digest))?;
    if row.kind != Kind::Prefetch {
        return Err(PrefetchError::NotPrefetch(row.kind.name()));
    }
    let bytes = session.artifact(digest)?.ok_or(PrefetchError::Gone(digest))?;
    let artifact: Artifact =
        serde_json::from_slice(&bytes).map_err(|source| PrefetchError::Malformed { digest, source })?;
    let created = row.created_at.map(|at| at.strftime("%Y-%m-%d %H:%M:%S").to_string()).unwrap_or_default();
    let layer = row.describes.map(|d| d.to_string()).unwrap_or_default();
    let mut out = String::new();
    for (name, value) in [
        ("Digest:", digest.to_string()),
        ("Version:", artifact.version.clone()),
        ("Span Ranges:", artifact.prefetch_spans.len().to_string()),
        ("Layer Digest:", layer),
        ("Size:", format!("{} bytes", row.size)),
        ("Created:", created),
    ] {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{name:<15}{value}");
    }
    out.push_str("\nPrefetch Spans:\n");
    for (at, spans) in artifact.prefetch_spans.iter().enumerate() {
        let (start, end) = (spans.start_span, spans.end_span);
        let _ = writeln!(out, "  [{at}] StartSpan: {start}, EndSpan: {end} (covers {} spans)", spans.count());
        if spans.priority != 0 {
            let _ = writeln!(out, "      Priority: {}", spans.priority);
        }
    }
    let _ = writeln!(out, "\nTotal spans to prefetch: {}", total(&artifact));
    if args.json {
        let _ = writeln!(out, "\nRaw JSON:\n{}", String::from_utf8_lossy(&indent(&bytes)));
    }
    print(&out)
}

fn print(text: &str) -> Result<(), PrefetchError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(PrefetchError::Output)
}
