//! A configuration file of somebody else's, read again when it has changed.

use std::{
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// Largest file read. Thousands of logins fit.
pub(super) const MAX_FILE: u64 = 1 << 20;

/// What tells one state of a file from another.
#[derive(PartialEq, Eq, Clone, Copy)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

/// Why a file cannot be used.
pub(super) enum Unreadable {
    Read {
        path: String,
        source: io::Error,
    },
    /// In words that hold nothing of the file.
    Malformed {
        path: String,
        what: String,
    },
}

/// One file, as a `T`.
pub(super) struct Reread<T> {
    path: PathBuf,
    /// What was read last, and which file that was. Held while the file is read.
    read: Mutex<Option<(Stamp, Arc<T>)>>,
}

impl<T> Reread<T> {
    pub fn new(path: PathBuf) -> Reread<T> {
        Reread { path, read: Mutex::new(None) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says; None if there is none.
    pub fn load(&self, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<Option<Arc<T>>, Unreadable> {
        let path = || self.path.display().to_string();
        let unreadable = |source| Unreadable::Read { path: path(), source };
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = match std::fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                *read = None;
                return Ok(None);
            }
            Err(error) => return Err(unreadable(error)),
        };
        let meta = file.metadata().map_err(unreadable)?;
        let stamp = Stamp { inode: meta.ino(), size: meta.size(), modified: (meta.mtime(), meta.mtime_nsec()) };
        if let Some((known, value)) = &*read
            && *known == stamp
        {
            return Ok(Some(value.clone()));
        }
        if meta.size() > MAX_FILE {
            return Err(Unreadable::Malformed { path: path(), what: "it is larger than 1 MiB".into() });
        }
        let mut text = zeroize::Zeroizing::new(Vec::new());
        file.by_ref().take(MAX_FILE).read_to_end(&mut text).map_err(unreadable)?;
        let value = Arc::new(parse(&text).map_err(|what| Unreadable::Malformed { path: path(), what })?);
        *read = Some((stamp, value.clone()));
        Ok(Some(value))
    }
}
