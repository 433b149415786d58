//! One row of `artifacts.db`: what the Go CLI keeps about an artifact, in its encoding (`formats.md` 7.2). Pure.

use crate::bolt::{Bucket, Value};
use crate::oci::Digest;
use jiff::Timestamp;
use std::collections::BTreeMap;

/// Seconds from the first of January of the year 1, where Go counts from, to that of 1970.
const YEAR_ONE: i64 = 62_135_596_800;

/// What an artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Index,
    Ztoc,
    Prefetch,
}

impl Kind {
    /// As it is stored and as messages show it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Index => "soci_index",
            Kind::Ztoc => "soci_layer",
            Kind::Prefetch => "soci_prefetch",
        }
    }

    fn of(name: &str) -> Option<Kind> {
        [Kind::Index, Kind::Ztoc, Kind::Prefetch].into_iter().find(|kind| kind.name() == name)
    }
}

/// What is known about an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub kind: Kind,
    pub size: u64,
    /// What the artifact describes: the image manifest of an index, the layer of the others.
    pub describes: Option<Digest>,
    /// Indexes: the image's target, an index or manifest.
    pub image: Option<Digest>,
    /// Indexes: `os/architecture[/variant]`.
    pub platform: String,
    /// Indexes: the original image manifest. zTOCs: the layer.
    pub location: String,
    pub media_type: String,
    pub artifact_type: String,
    /// Rows of old versions have none.
    pub created_at: Option<Timestamp>,
    pub span_size: u64,
}

impl Row {
    /// Reads a row; `None` if it is none that we understand.
    pub fn decode(bucket: &Bucket) -> Option<Row> {
        let bytes = |key: &str| match bucket.entries.get(key.as_bytes()) {
            Some(Value::Bytes(bytes)) => Some(bytes.as_slice()),
            _ => None,
        };
        let text = |key: &str| bytes(key).map(|b| String::from_utf8_lossy(b).into_owned()).unwrap_or_default();
        let number = |key: &str| u64::try_from(varint(bytes(key)?)?).ok();
        Some(Row {
            kind: Kind::of(&text("type"))?,
            size: number("size")?,
            describes: text("oci_digest").parse().ok(),
            image: text("image_digest").parse().ok(),
            platform: text("platform"),
            location: text("location"),
            media_type: text("media_type"),
            artifact_type: text("artifact_type"),
            created_at: bytes("created_at").and_then(time),
            span_size: number("span_size").unwrap_or(0),
        })
    }

    /// The row as it is stored.
    pub fn encode(&self) -> Bucket {
        let digest = |digest: &Option<Digest>| digest.map(|d| d.to_string().into_bytes()).unwrap_or_default();
        let mut entries = BTreeMap::new();
        let mut put = |key: &str, value: Vec<u8>| drop(entries.insert(key.as_bytes().to_vec(), Value::Bytes(value)));
        put("size", to_varint(self.size));
        put("oci_digest", digest(&self.describes));
        put("image_digest", digest(&self.image));
        put("platform", self.platform.clone().into_bytes());
        put("location", self.location.clone().into_bytes());
        put("type", self.kind.name().as_bytes().to_vec());
        put("media_type", self.media_type.clone().into_bytes());
        put("artifact_type", self.artifact_type.clone().into_bytes());
        if let Some(at) = self.created_at {
            put("created_at", to_time(at));
        }
        put("span_size", to_varint(self.span_size));
        Bucket { sequence: 0, entries }
    }
}

/// Go's signed varint: seven bits a byte, low first, zigzag.
fn varint(bytes: &[u8]) -> Option<i64> {
    let mut value = 0u64;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f).checked_shl(at as u32 * 7)?;
        if byte & 0x80 == 0 {
            return Some((value >> 1) as i64 ^ -((value & 1) as i64));
        }
    }
    None
}

fn to_varint(value: u64) -> Vec<u8> {
    // Sizes of files: never near the sign.
    let mut left = value << 1;
    let mut out = Vec::new();
    while left >= 0x80 {
        out.push(left as u8 | 0x80);
        left >>= 7;
    }
    out.push(left as u8);
    out
}

/// Go's binary form of a time. The zone it was shown in is of no interest.
fn time(bytes: &[u8]) -> Option<Timestamp> {
    if !matches!((bytes.first()?, bytes.len()), (1, 15) | (2, 16)) {
        return None;
    }
    let seconds = i64::from_be_bytes(bytes[1..9].try_into().ok()?).checked_sub(YEAR_ONE)?;
    let nanos = i32::from_be_bytes(bytes[9..13].try_into().ok()?);
    Timestamp::new(seconds, nanos).ok()
}

fn to_time(at: Timestamp) -> Vec<u8> {
    let (mut seconds, mut nanos) = (at.as_second(), at.subsec_nanosecond());
    if nanos < 0 {
        (seconds, nanos) = (seconds - 1, nanos + 1_000_000_000);
    }
    let mut out = vec![1];
    out.extend_from_slice(&(seconds + YEAR_ONE).to_be_bytes());
    out.extend_from_slice(&nanos.to_be_bytes());
    out.extend_from_slice(&(-1i16).to_be_bytes()); // UTC
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_specification() {
        let at: Timestamp = "2024-01-02T03:04:05.678Z".parse().unwrap();
        let bytes = to_time(at);
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "010000000edd25742528697580ffff");
        assert_eq!(time(&bytes), Some(at));
        assert_eq!(time(&bytes[..14]), None);
    }

    #[test]
    fn numbers_are_zigzag_varints() {
        for value in [0, 1, 63, 64, 4 << 20, i64::MAX as u64] {
            assert_eq!(varint(&to_varint(value)), Some(value as i64));
        }
        assert_eq!(varint(&[1]), Some(-1));
        assert_eq!(varint(&[0x80; 11]), None);
        assert_eq!(varint(&[]), None);
    }

    #[test]
    fn rows_survive_and_old_ones_lack_fields() {
        let row = Row {
            kind: Kind::Index,
            size: 1633,
            describes: Some(Digest::of(b"manifest")),
            image: Some(Digest::of(b"index")),
            platform: "linux/arm64/v8".into(),
            location: "x".into(),
            media_type: "m".into(),
            artifact_type: "a".into(),
            created_at: Some("2024-01-02T03:04:05.678Z".parse().unwrap()),
            span_size: 0,
        };
        let mut bucket = row.encode();
        assert_eq!(Row::decode(&bucket).as_ref(), Some(&row));
        bucket.entries.remove(&b"created_at"[..]);
        bucket.entries.remove(&b"span_size"[..]);
        assert_eq!(Row::decode(&bucket), Some(Row { created_at: None, ..row }));
        bucket.entries.remove(&b"size"[..]);
        assert_eq!(Row::decode(&bucket), None);
    }
}
