//! One blob: a range of an open file. Opened once, so that what was checked is what is read.

use crate::cli::interrupt;
use rustix::fs::OFlags;
use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

/// Whether bytes may be passed on without looking at them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// A file of the layout itself.
    Inside,
    /// A symbolic link led here (Bazel builds such layouts). Only bytes that have the digest of their name are the layout's to
    /// show: the link may point at anything that we can read and its author cannot.
    Linked,
}

/// A blob that can be read, several times and by several threads.
#[derive(Debug, Clone)]
pub struct Blob {
    pub(super) file: Arc<File>,
    pub(super) start: u64,
    len: u64,
    trust: Trust,
}

impl Blob {
    /// Opens a file as a blob; `None` if there is none. What is not a file (a FIFO, a device) is an error, and is not waited for.
    pub(super) fn open(path: &Path) -> io::Result<Option<Blob>> {
        let open = |flags: OFlags| {
            let flags = (flags | OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
            File::options().read(true).custom_flags(flags).open(path)
        };
        let (file, trust) = match open(OFlags::NOFOLLOW) {
            Ok(file) => (file, Trust::Inside),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => match open(OFlags::empty()) {
                Ok(file) => (file, Trust::Linked),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(e),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        Ok(Some(Blob { file: Arc::new(file), start: 0, len: metadata.len(), trust }))
    }

    /// A range of an archive.
    pub(super) fn section(file: Arc<File>, start: u64, len: u64) -> Blob {
        Blob { file, start, len, trust: Trust::Inside }
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it may be copied unread.
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// Whether the file is a whole blob that only we or root can change: then another name for it is as good as a copy.
    pub(super) fn may_be_linked(&self) -> bool {
        let Ok(metadata) = self.file.metadata() else { return false };
        let ours = metadata.uid() == 0 || metadata.uid() == rustix::process::geteuid().as_raw();
        self.start == 0
            && metadata.len() == self.len
            && self.trust == Trust::Inside
            && ours
            && metadata.mode() & 0o022 == 0
    }

    /// Its bytes, from the first one.
    pub fn reader(&self) -> BlobReader {
        BlobReader { file: self.file.clone(), at: self.start, end: self.start + self.len }
    }

    /// Fills `out` from `offset` on.
    pub fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(out.len() as u64).filter(|end| *end <= self.len);
        match end {
            Some(_) => self.file.read_exact_at(out, self.start + offset),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Reads a blob; fails when the process should stop, and when the file became shorter.
pub struct BlobReader {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for BlobReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        interrupt::check()?;
        let want = out.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        match self.file.read_at(&mut out[..want], self.at)? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was read")),
            read => {
                self.at += read as u64;
                Ok(read)
            }
        }
    }
}
