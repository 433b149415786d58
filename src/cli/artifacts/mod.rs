//! `artifacts.db`: which SOCI artifacts were made here, and of what (`formats.md` 7.2). Only this tool knows the file.
//!
//! It is the file of the Go CLI, and stays so: either can go on where the other stopped. The file is locked while it is read or
//! changed and at no other time, so that a command that builds for minutes does not keep others waiting; the Go CLI holds the lock
//! all the while, so we wait, say so, and can be interrupted.

mod row;

pub use row::{Kind, Row};

use super::interrupt::{self, Stopped};
use crate::bolt::{self, Bucket, Database, Value};
use crate::oci::Digest;
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{DirBuilder, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::PathBuf,
    time::{Duration, Instant},
};

/// The bucket all rows are in.
const BUCKET: &[u8] = b"soci_artifacts";
/// Largest file that is read: a million rows.
const MAX_FILE: u64 = 1 << 30;
/// How long we wait for another process before we say so.
const SILENT: Duration = Duration::from_secs(1);

/// Why the database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactsError {
    #[error("artifacts.db is not available: cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("artifacts.db is not available: cannot create {} (its parent must exist; --root names another place)", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "artifacts.db is not available: {} is not usable: {why}; move it away and run `soci rebuild-db`", path.display()
    )]
    Damaged { path: PathBuf, why: bolt::Damaged },
    #[error("artifacts.db is not available: {} has more than {MAX_FILE} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// The database below one root. Opens nothing by itself.
#[derive(Debug, Clone)]
pub struct Artifacts {
    root: PathBuf,
    path: PathBuf,
}

/// All rows, by digest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows(Bucket);

impl Artifacts {
    /// The database of the tool whose root this is.
    pub fn new(layout: &crate::layout::Layout) -> Artifacts {
        Artifacts { root: layout.root().to_owned(), path: layout.artifacts_db() }
    }

    /// Makes the root directory, as every command does first. Its parent must exist.
    pub fn prepare(&self) -> Result<(), ArtifactsError> {
        match DirBuilder::new().mode(0o700).create(&self.root) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(ArtifactsError::Root { path: self.root.clone(), source })
            }
            _ => Ok(()),
        }
    }

    /// The rows as they are now. No file is no rows.
    pub fn rows(&self) -> Result<Rows, ArtifactsError> {
        match File::open(&self.path) {
            Ok(file) => {
                self.lock(&file, FlockOperation::NonBlockingLockShared)?;
                let mut root = self.read(&file)?.root;
                Ok(rows(&mut root))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Rows::default()),
            Err(source) => Err(ArtifactsError::Open { path: self.path.clone(), source }),
        }
    }

    /// Changes the rows: all of what `change` does, or, after a crash, nothing.
    pub fn change<T>(&self, change: impl FnOnce(&mut Rows) -> T) -> Result<T, ArtifactsError> {
        let opened = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&self.path);
        let file = opened.map_err(|source| ArtifactsError::Open { path: self.path.clone(), source })?;
        self.lock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let mut database = self.read(&file)?;
        let mut root = std::mem::take(&mut database.root);
        let mut rows = rows(&mut root);
        let before = rows.clone();
        let result = change(&mut rows);
        if rows != before {
            root.entries.insert(BUCKET.to_vec(), Value::Bucket(rows.0));
            self.write(&file, &database, &root)?;
        }
        Ok(result)
    }

    fn read(&self, file: &File) -> Result<Database, ArtifactsError> {
        let failed = |source| ArtifactsError::Read { path: self.path.clone(), source };
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(ArtifactsError::TooLarge { path: self.path.clone() });
        }
        // Also where the first write of all broke off before its meta page.
        if bytes.iter().take(bolt::METAS).all(|b| *b == 0) {
            return Ok(bolt::empty());
        }
        bolt::read(&bytes).map_err(|why| ArtifactsError::Damaged { path: self.path.clone(), why })
    }

    fn write(&self, file: &File, database: &Database, root: &Bucket) -> Result<(), ArtifactsError> {
        let commit = database.commit(root);
        let put = |(page, bytes): &(u64, Vec<u8>)| file.write_all_at(bytes, database.offset(*page));
        let written = commit
            .pages
            .iter()
            .try_for_each(put)
            .and_then(|()| file.sync_data())
            .and_then(|()| put(&commit.meta))
            .and_then(|()| file.sync_data());
        written.map_err(|source| ArtifactsError::Write { path: self.path.clone(), source })
    }

    fn lock(&self, file: &File, how: FlockOperation) -> Result<(), ArtifactsError> {
        let began = Instant::now();
        let mut said = false;
        loop {
            match flock(file, how) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(e) => return Err(ArtifactsError::Open { path: self.path.clone(), source: e.into() }),
            }
            if !said && began.elapsed() > SILENT {
                said = true;
                super::say(&format!("waiting for another soci process that uses {}", self.path.display()));
            }
            interrupt::check()?;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn rows(root: &mut Bucket) -> Rows {
    match root.entries.remove(BUCKET) {
        Some(Value::Bucket(bucket)) => Rows(bucket),
        _ => Rows::default(),
    }
}

impl Rows {
    /// The row of an artifact.
    pub fn get(&self, digest: Digest) -> Option<Row> {
        match self.0.entries.get(digest.to_string().as_bytes())? {
            Value::Bucket(bucket) => Row::decode(bucket),
            Value::Bytes(_) => None,
        }
    }

    /// Adds or replaces a row.
    pub fn put(&mut self, digest: Digest, row: &Row) {
        self.0.entries.insert(digest.to_string().into_bytes(), Value::Bucket(row.encode()));
    }

    /// Removes a row.
    pub fn remove(&mut self, digest: Digest) {
        self.0.entries.remove(digest.to_string().as_bytes());
    }

    /// All rows that we understand, in the order of their digests. Others (another digest algorithm) stay in the file.
    pub fn iter(&self) -> impl Iterator<Item = (Digest, Row)> + '_ {
        self.0.entries.iter().filter_map(|(key, value)| {
            let digest = std::str::from_utf8(key).ok()?.parse().ok()?;
            match value {
                Value::Bucket(bucket) => Some((digest, Row::decode(bucket)?)),
                Value::Bytes(_) => None,
            }
        })
    }

    /// Those of one kind.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (Digest, Row)> + '_ {
        self.iter().filter(move |(_, row)| row.kind == kind)
    }
}
