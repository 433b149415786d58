//! The snapshots of a Go snapshotter that ran here before us: its `metadata.db`, read once.
//!
//! containerd's own metadata names these snapshots, so they keep their names, numbers, kinds, parents, labels, times and usage, and their
//! directories. [`read`] only reads; `Store` puts everything into a new database that appears under its name when it is whole. So a crash in the
//! middle leaves no database of ours, and the next start does it again; and `metadata.db` stays as it is, for the way back.
//!
//! The schema (`runtime.md` 3.8) is that of containerd's own overlay snapshotter:
//!
//! ```text
//! v1 / snapshots / <name> / id kind parent createdat updatedat inodes size, labels / <key>      sequence of "snapshots": the last number
//! ```
//!
//! A record that makes no sense is named in [`Import::refused`] with the reason, and so is what stands on it; its directory is left alone.

use super::error::StoreError;
use super::mapped::is_reserved;
use super::model::{Info, Kind, Labels, Timestamp, Usage};
use crate::bolt::{self, Bucket, Damaged, Value};
use crate::layout::SnapshotId;
use rustix::fs::{FlockOperation, flock};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

/// Largest database that is read: it is held in memory as a whole. A snapshot takes one to two kB of it.
const MAX_FILE: u64 = 512 << 20;
/// How long a Go snapshotter that was told to end may still have its database open.
const PREDECESSOR: Duration = Duration::from_secs(6);
/// Seconds from the first of January of the year 1, where Go counts from, to that of 1970.
const YEAR_ONE: i64 = 62_135_596_800;

/// What is taken over.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Import {
    /// Parents before their children.
    pub infos: Vec<Info>,
    pub refused: Vec<Refused>,
    /// The last number that was given out.
    pub last_id: u32,
    /// Which state of the file this is.
    pub transaction: u64,
}

/// A snapshot that cannot be taken over.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    pub name: String,
    pub why: NotImported,
}

/// Why a snapshot cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotImported {
    #[error("its record is not a bucket")]
    NotARecord,
    #[error("its name is not text, or one that is kept for layers of ours")]
    Name,
    #[error("its record has no usable {0:?}")]
    Field(&'static str),
    #[error("its number {0} is larger than ours can be")]
    TooLarge(u64),
    #[error("its number {0} belongs to another snapshot, too")]
    Twice(u32),
    #[error("its parent {0:?} is missing, not committed, or cannot be taken over")]
    Parent(String),
}

/// The snapshots that the database at `path` has; `None` where there is no such file. The file is locked while it is read.
pub fn read(path: &Path) -> Result<Option<Import>, StoreError> {
    let failed = |source| StoreError::File { path: path.into(), source };
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    lock(&file, path)?;
    let mut bytes = Vec::new();
    (&file).take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    let damaged = |what: String| StoreError::PredecessorDamaged { path: path.into(), what };
    if bytes.len() as u64 > MAX_FILE {
        return Err(damaged(format!("it has more than {MAX_FILE} bytes")));
    }
    import(&bytes).map(Some).map_err(|e| damaged(e.to_string()))
}

/// Which state the file at `path` is in, if it can be told.
pub fn transaction(path: &Path) -> Option<u64> {
    let mut head = Vec::new();
    File::open(path).ok()?.take(bolt::HEAD as u64).read_to_end(&mut head).ok()?;
    bolt::transaction(&head).ok()
}

/// A Go snapshotter keeps its database locked as long as it lives.
fn lock(file: &File, path: &Path) -> Result<(), StoreError> {
    let deadline = Instant::now() + PREDECESSOR;
    loop {
        match flock(file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StoreError::PredecessorRuns { path: path.into() }),
            Err(e) => return Err(StoreError::File { path: path.into(), source: e.into() }),
        }
    }
}

/// What the bytes of the database say. Pure.
pub fn import(file: &[u8]) -> Result<Import, Damaged> {
    let database = bolt::read(file)?;
    let snapshots = database.root.bucket(b"v1").and_then(|v1| v1.bucket(b"snapshots"));
    let transaction = database.transaction();
    // Made when the first snapshot is.
    let Some(snapshots) = snapshots else { return Ok(Import { transaction, ..Import::default() }) };
    let mut refused = Vec::new();
    let mut found: BTreeMap<String, Info> = BTreeMap::new();
    let mut numbers: BTreeMap<u32, String> = BTreeMap::new();
    for (key, value) in &snapshots.entries {
        let name = String::from_utf8_lossy(key).into_owned();
        match record(key, value) {
            Ok(info) => match numbers.insert(info.id.0, name.clone()) {
                None => drop(found.insert(name, info)),
                // Which of them has the directory cannot be told.
                Some(other) => {
                    let why = NotImported::Twice(info.id.0);
                    found.remove(&other);
                    refused.push(Refused { name: other, why: why.clone() });
                    refused.push(Refused { name, why });
                }
            },
            Err(why) => refused.push(Refused { name, why }),
        }
    }
    let mut last_id = u32::try_from(snapshots.sequence).unwrap_or(u32::MAX);
    if let Some((highest, _)) = numbers.last_key_value() {
        last_id = last_id.max(*highest);
    }
    let infos = grounded(found, &mut refused);
    refused.sort_by(|a, b| a.name.cmp(&b.name));
    refused.dedup();
    Ok(Import { infos, refused, last_id, transaction })
}

/// Those of `found` whose chains of parents are whole, parents first. The others are refused.
fn grounded(mut found: BTreeMap<String, Info>, refused: &mut Vec<Refused>) -> Vec<Info> {
    let mut infos: Vec<Info> = Vec::new();
    let mut committed: BTreeSet<String> = BTreeSet::new();
    loop {
        let stands = |info: &Info| info.parent.as_ref().is_none_or(|parent| committed.contains(parent));
        let ready: Vec<String> = found.values().filter(|info| stands(info)).map(|info| info.name.clone()).collect();
        if ready.is_empty() {
            break;
        }
        for info in ready.iter().filter_map(|name| found.remove(name)) {
            if info.kind == Kind::Committed {
                committed.insert(info.name.clone());
            }
            infos.push(info);
        }
    }
    let rest = found
        .into_values()
        .map(|info| Refused { name: info.name, why: NotImported::Parent(info.parent.unwrap_or_default()) });
    refused.extend(rest);
    infos
}

fn record(key: &[u8], value: &Value) -> Result<Info, NotImported> {
    let Value::Bucket(bucket) = value else { return Err(NotImported::NotARecord) };
    let name = std::str::from_utf8(key).ok().filter(|name| !name.is_empty() && !is_reserved(name));
    let name = name.ok_or(NotImported::Name)?;
    let id = field(bucket, "id", |bytes| uvarint(bytes).filter(|id| *id > 0))?;
    let id = u32::try_from(id).map_err(|_| NotImported::TooLarge(id))?;
    let kind = field(bucket, "kind", |bytes| match bytes {
        [1] => Some(Kind::View),
        [2] => Some(Kind::Active),
        [3] => Some(Kind::Committed),
        _ => None,
    })?;
    let parent = optional(bucket, "parent", |bytes| Some(std::str::from_utf8(bytes).ok()?.to_owned()))?;
    let labels = match bucket.entries.get(b"labels".as_slice()) {
        None => Labels::new(),
        Some(Value::Bucket(labels)) => read_labels(labels).ok_or(NotImported::Field("labels"))?,
        Some(Value::Bytes(_)) => return Err(NotImported::Field("labels")),
    };
    Ok(Info {
        id: SnapshotId(id),
        name: name.to_owned(),
        parent: parent.filter(|parent| !parent.is_empty()),
        kind,
        created: field(bucket, "createdat", time)?,
        updated: field(bucket, "updatedat", time)?,
        labels,
        usage: Usage {
            size: optional(bucket, "size", count)?.unwrap_or(0),
            inodes: optional(bucket, "inodes", count)?.unwrap_or(0),
        },
    })
}

fn field<T>(bucket: &Bucket, name: &'static str, read: impl Fn(&[u8]) -> Option<T>) -> Result<T, NotImported> {
    optional(bucket, name, read)?.ok_or(NotImported::Field(name))
}

fn optional<T>(
    bucket: &Bucket,
    name: &'static str,
    read: impl Fn(&[u8]) -> Option<T>,
) -> Result<Option<T>, NotImported> {
    match bucket.entries.get(name.as_bytes()) {
        None => Ok(None),
        Some(Value::Bytes(bytes)) => read(bytes).map(Some).ok_or(NotImported::Field(name)),
        Some(Value::Bucket(_)) => Err(NotImported::Field(name)),
    }
}

fn read_labels(labels: &Bucket) -> Option<Labels> {
    let text = |bytes: &[u8]| Some(std::str::from_utf8(bytes).ok()?.to_owned());
    let label = |(key, value): (&Vec<u8>, &Value)| match value {
        Value::Bytes(value) => Some((text(key)?, text(value)?)),
        Value::Bucket(_) => None,
    };
    labels.entries.iter().map(label).collect()
}

/// Go's unsigned varint, alone in `bytes`.
fn uvarint(bytes: &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for (n, byte) in bytes.iter().enumerate() {
        let shift = 7 * u32::try_from(n).ok()?;
        let part = u64::from(byte & 0x7f);
        if shift > 63 || (shift == 63 && part > 1) {
            return None;
        }
        value |= part << shift;
        if byte & 0x80 == 0 {
            return (n + 1 == bytes.len()).then_some(value);
        }
    }
    None
}

/// Go's signed varint, which must not be negative.
fn count(bytes: &[u8]) -> Option<u64> {
    let zigzag = uvarint(bytes)?;
    (zigzag & 1 == 0).then_some(zigzag >> 1)
}

/// Go's `time.Time` in its binary form: version, seconds since the year 1, nanoseconds, offset of the zone, which does not matter here.
fn time(bytes: &[u8]) -> Option<Timestamp> {
    let wanted = match bytes.first()? {
        1 => 15,
        2 => 16, // the offset has seconds
        _ => return None,
    };
    if bytes.len() != wanted {
        return None;
    }
    let seconds = i64::from_be_bytes(bytes[1..9].try_into().ok()?).checked_sub(YEAR_ONE)?;
    let nanos = u32::from_be_bytes(bytes[9..13].try_into().ok()?);
    (nanos < 1_000_000_000).then_some(Timestamp { seconds, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_go_writes_them() {
        assert_eq!(uvarint(&[0]), Some(0));
        assert_eq!(uvarint(&[0xac, 0x02]), Some(300));
        assert_eq!(uvarint(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]), Some(u64::MAX));
        for bad in [&[][..], &[0x80], &[0x01, 0x00], &[0xff; 10], &[0xff; 40]] {
            assert_eq!(uvarint(bad), None, "{bad:?}");
        }
        assert_eq!(count(&[0xd8, 0x04]), Some(300));
        assert_eq!(count(&[0x01]), None, "minus one");
    }

    #[test]
    fn times_are_read_as_go_writes_them() {
        let mut bytes = vec![1];
        bytes.extend_from_slice(&(YEAR_ONE + 5).to_be_bytes());
        bytes.extend_from_slice(&7u32.to_be_bytes());
        bytes.extend_from_slice(&(-1i16).to_be_bytes());
        assert_eq!(time(&bytes), Some(Timestamp { seconds: 5, nanos: 7 }));
        assert_eq!(time(&bytes[..14]), None);
        bytes[9] = 0xff;
        assert_eq!(time(&bytes), None, "more nanoseconds than a second has");
        bytes[0] = 3;
        assert_eq!(time(&bytes), None);
    }

    fn row(id: u64, kind: u8, parent: Option<&str>) -> Value {
        let mut id_bytes = Vec::new();
        let mut rest = id;
        while rest >= 0x80 {
            id_bytes.push((rest as u8) | 0x80);
            rest >>= 7;
        }
        id_bytes.push(rest as u8);
        let mut at = vec![1];
        at.extend_from_slice(&YEAR_ONE.to_be_bytes());
        at.extend_from_slice(&[0, 0, 0, 0, 0xff, 0xff]);
        let mut entries = BTreeMap::from([
            (b"id".to_vec(), Value::Bytes(id_bytes)),
            (b"kind".to_vec(), Value::Bytes(vec![kind])),
            (b"createdat".to_vec(), Value::Bytes(at.clone())),
            (b"updatedat".to_vec(), Value::Bytes(at)),
        ]);
        if let Some(parent) = parent {
            entries.insert(b"parent".to_vec(), Value::Bytes(parent.as_bytes().to_vec()));
        }
        Value::Bucket(Bucket { sequence: 0, entries })
    }

    fn file(rows: Vec<(&[u8], Value)>, sequence: u64) -> Vec<u8> {
        let entries = rows.into_iter().map(|(name, row)| (name.to_vec(), row)).collect();
        let nest = |name: &[u8], bucket| BTreeMap::from([(name.to_vec(), Value::Bucket(bucket))]);
        let v1 = Bucket { sequence: 0, entries: nest(b"snapshots", Bucket { sequence, entries }) };
        let root = Bucket { sequence: 0, entries: nest(b"v1", v1) };
        let database = bolt::empty();
        let commit = database.commit(&root);
        let mut file = Vec::new();
        for (page, bytes) in commit.pages.iter().chain([&commit.meta]) {
            let at = usize::try_from(database.offset(*page)).unwrap();
            file.resize(file.len().max(at + bytes.len()), 0);
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
        file
    }

    #[test]
    fn what_makes_no_sense_is_named_and_takes_only_what_stands_on_it_along() {
        let rows: Vec<(&[u8], Value)> = vec![
            (b"base", row(1, 3, None)),
            (b"middle", row(300, 3, Some("base"))),
            (b"top", row(3, 2, Some("middle"))),
            (b"on-active", row(4, 2, Some("top"))),
            (b"orphan", row(5, 3, Some("gone"))),
            (b"on-orphan", row(6, 2, Some("orphan"))),
            (b"loop-a", row(7, 3, Some("loop-b"))),
            (b"loop-b", row(8, 3, Some("loop-a"))),
            (b"same-1", row(9, 3, None)),
            (b"same-2", row(9, 3, None)),
            (b"same-3", row(9, 3, None)),
            (b"large", row(1 << 32, 3, None)),
            (b"odd", row(11, 4, None)),
            (b"zero", row(0, 3, None)),
            (b"\xff\xfe", row(12, 3, None)),
            (b"value", Value::Bytes(vec![1])),
        ];
        let import = import(&file(rows, 20)).unwrap();
        let names: Vec<&str> = import.infos.iter().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["base", "middle", "top"]);
        assert_eq!(import.infos[1].id, SnapshotId(300));
        assert_eq!(import.last_id, 300);
        let refused: Vec<(&str, &NotImported)> = import.refused.iter().map(|r| (r.name.as_str(), &r.why)).collect();
        let parent = |name: &str| NotImported::Parent(name.into());
        let expected = [
            ("large", &NotImported::TooLarge(1 << 32)),
            ("loop-a", &parent("loop-b")),
            ("loop-b", &parent("loop-a")),
            ("odd", &NotImported::Field("kind")),
            ("on-active", &parent("top")),
            ("on-orphan", &parent("orphan")),
            ("orphan", &parent("gone")),
            ("same-1", &NotImported::Twice(9)),
            ("same-2", &NotImported::Twice(9)),
            ("same-3", &NotImported::Twice(9)),
            ("value", &NotImported::NotARecord),
            ("zero", &NotImported::Field("id")),
            ("\u{fffd}\u{fffd}", &NotImported::Name),
        ];
        assert_eq!(refused, expected);
    }

    #[test]
    fn a_database_that_was_never_used_has_no_snapshots_and_garbage_is_an_error() {
        let none = import(&file(Vec::new(), 0)).unwrap();
        assert_eq!((none.infos.len(), none.refused.len(), none.last_id), (0, 0, 0));
        assert!(import(b"not a database").is_err());
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(&dir.path().join("metadata.db")).unwrap(), None);
    }
}
