//! A snapshot's record as bytes. JSON: small, readable with any tool when something is wrong, and open for new fields.

use super::error::StoreError;
use super::model::{Info, Kind, Labels, Timestamp, Usage};
use crate::layout::SnapshotId;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Record<'a> {
    id: u32,
    kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    parent: Option<std::borrow::Cow<'a, str>>,
    created: Timestamp,
    updated: Timestamp,
    #[serde(skip_serializing_if = "Labels::is_empty", default)]
    labels: std::borrow::Cow<'a, Labels>,
    #[serde(default)]
    usage: Usage,
}

/// The record of `info`, without its name.
pub fn encode(info: &Info) -> Result<Vec<u8>, StoreError> {
    let record = Record {
        id: info.id.0,
        kind: info.kind,
        parent: info.parent.as_deref().map(Into::into),
        created: info.created,
        updated: info.updated,
        labels: std::borrow::Cow::Borrowed(&info.labels),
        usage: info.usage,
    };
    serde_json::to_vec(&record).map_err(|source| StoreError::DamagedRecord { name: info.name.clone(), source })
}

/// The snapshot `name` whose record is `bytes`.
pub fn decode(name: &str, bytes: &[u8]) -> Result<Info, StoreError> {
    let record: Record<'_> =
        serde_json::from_slice(bytes).map_err(|source| StoreError::DamagedRecord { name: name.to_owned(), source })?;
    Ok(Info {
        id: SnapshotId(record.id),
        name: name.to_owned(),
        parent: record.parent.map(Into::into),
        kind: record.kind,
        created: record.created,
        updated: record.updated,
        labels: record.labels.into_owned(),
        usage: record.usage,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_garbage_is_named() {
        let at = Timestamp { seconds: 5, nanos: 7 };
        let labels = Labels::from([("a".into(), "1".into()), ("b".into(), "\u{0}\"é".into())]);
        let usage = Usage { size: 3, inodes: 4 };
        let (id, kind, parent) = (SnapshotId(9), Kind::Committed, Some("p".into()));
        let info = Info { id, name: "n".into(), parent, kind, created: at, updated: at, labels, usage };
        assert_eq!(decode("n", &encode(&info).unwrap()).unwrap(), info);
        assert!(decode("n", b"{").unwrap_err().to_string().contains("\"n\""));
    }
}
