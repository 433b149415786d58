//! The entries of a tar, collected compactly while it goes by, because a zTOC is written from its last entry to its first.

use super::{Kind, NotIndexable, OPAQUE_MARKER};
use crate::tar::{self, BLOCK, Entry, Reader, XATTR_PREFIX};

/// The fields of an entry; its strings lie one after the other in [`Rows::text`].
pub struct Row {
    pub kind: Kind,
    pub offset: u64,
    pub size: u64,
    pub mode: i64,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub devmajor: i64,
    pub devminor: i64,
    name: u32,
    link: u32,
    uname: u32,
    gname: u32,
    records: u32,
    total: u32,
}

/// Entries that are taken from the end, freeing memory on the way.
#[derive(Default)]
pub struct Rows {
    rows: Vec<Row>,
    text: Vec<u8>,
}

/// The strings of one row.
pub struct Texts<'a> {
    pub name: &'a [u8],
    pub link: &'a [u8],
    pub uname: &'a [u8],
    pub gname: &'a [u8],
    pub records: Vec<(&'a [u8], &'a [u8])>,
}

/// Freed memory is given back after this many rows.
const SHRINK_EVERY: usize = 1 << 15;

impl Rows {
    fn push(&mut self, entry: &Entry) {
        let start = self.text.len();
        for text in [&entry.name, &entry.link, &entry.uname, &entry.gname] {
            self.text.extend_from_slice(text);
        }
        for (key, value) in &entry.records {
            for text in [key, value] {
                self.text.extend_from_slice(&(text.len() as u32).to_le_bytes());
                self.text.extend_from_slice(text);
            }
        }
        self.rows.push(Row {
            kind: entry.kind,
            offset: entry.offset,
            size: entry.size,
            mode: entry.mode,
            uid: entry.uid as u32, // Go does the same
            gid: entry.gid as u32,
            mtime: entry.mtime,
            devmajor: entry.devmajor,
            devminor: entry.devminor,
            // All of them come from helper members of at most 1 MiB.
            name: entry.name.len() as u32,
            link: entry.link.len() as u32,
            uname: entry.uname.len() as u32,
            gname: entry.gname.len() as u32,
            records: entry.records.len() as u32,
            total: (self.text.len() - start) as u32,
        });
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Takes the last row and hands it to `with`.
    pub fn pop<T>(&mut self, with: impl FnOnce(&Row, &Texts<'_>) -> T) -> Option<T> {
        let row = self.rows.pop()?;
        let start = self.text.len() - row.total as usize;
        let mut rest = &self.text[start..];
        let mut take = |len: u32| {
            let (text, after) = rest.split_at(len as usize);
            rest = after;
            text
        };
        let (name, link, uname, gname) = (take(row.name), take(row.link), take(row.uname), take(row.gname));
        let mut take_counted = || {
            let len = take(4);
            take(u32::from_le_bytes([len[0], len[1], len[2], len[3]]))
        };
        let records = (0..row.records).map(|_| (take_counted(), take_counted())).collect();
        let result = with(&row, &Texts { name, link, uname, gname, records });
        self.text.truncate(start);
        if self.rows.len().is_multiple_of(SHRINK_EVERY) {
            self.text.shrink_to_fit();
            self.rows.shrink_to_fit();
        }
        Some(result)
    }
}

/// Lists the tar that is pushed into it.
#[derive(Default)]
pub struct Listing {
    reader: Reader,
    rows: Rows,
    has_xattrs: bool,
    has_opaque: bool,
    truncated_owner: bool,
    /// The last entry has no content, but a size that makes Go's zTOC reader misplace whatever follows.
    oversized: bool,
}

/// What a listing found.
pub struct Listed {
    pub rows: Rows,
    pub archive_size: u64,
    pub has_xattrs: bool,
    pub has_opaque: bool,
    pub warnings: Vec<String>,
}

impl Listing {
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), NotIndexable> {
        while let Some(entry) = self.reader.next(&mut bytes)? {
            if self.oversized {
                return Err(NotIndexable::Oversized);
            }
            if entry.size > i64::MAX as u64 {
                return Err(NotIndexable::Oversized);
            }
            self.oversized = !entry.kind.has_content() && entry.size > BLOCK;
            self.has_xattrs |= entry.records.keys().any(|key| key.starts_with(XATTR_PREFIX));
            self.has_opaque |= entry.name.ends_with(OPAQUE_MARKER);
            self.truncated_owner |= u32::try_from(entry.uid).is_err() || u32::try_from(entry.gid).is_err();
            self.rows.push(&entry);
        }
        Ok(())
    }

    pub fn finish(self) -> Result<Listed, tar::TarError> {
        let archive_size = self.reader.finish()?;
        let mut warnings = Vec::new();
        if self.truncated_owner {
            warnings.push("an owner does not fit 32 bits: the Go snapshotter cannot read such files".to_owned());
        }
        if self.reader.global_headers() > 0 {
            warnings.push("PAX global headers have no effect".to_owned());
        }
        Ok(Listed { rows: self.rows, archive_size, has_xattrs: self.has_xattrs, has_opaque: self.has_opaque, warnings })
    }
}
