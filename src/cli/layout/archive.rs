//! Finding the blobs of a layout inside a tar file, without unpacking it.
//!
//! Headers are read one after another and data is skipped. Only names that matter are kept: documents, and blobs whose name is
//! the hex of a digest. Links, devices and everything else an archive can hold have no effect. A name that occurs twice counts
//! the last time, as when unpacking.
//!
//! Not [`crate::tar`]'s reader: that one is pushed a stream and lists what Go lists; here gigabytes of data are skipped by
//! seeking, and only what names a blob matters.

use super::{Blob, INDEX, LayoutError, MARKER};
use crate::{cli::interrupt, oci::Digest};
use std::{collections::HashMap, fs::File, os::unix::fs::FileExt, path::Path, sync::Arc};

const BLOCK: u64 = 512;
/// Entries of one archive. A layout has one for each blob; the largest images have some thousand.
const MAX_ENTRIES: u32 = 1 << 20;
/// A PAX header or long name; Go's tar reader has the same limit.
const MAX_EXTENSION: u64 = 1 << 20;

/// What was found in a tar file.
#[derive(Debug)]
pub struct Archive {
    file: Arc<File>,
    pub(super) blobs: HashMap<Digest, (u64, u64)>,
    pub(super) index: Option<(u64, u64)>,
    marker: Option<(u64, u64)>,
    /// `manifest.json` or `repositories`: `docker save` wrote this.
    pub(super) docker: bool,
    /// A directory that contains an `index.json`.
    pub(super) nested: Option<String>,
    /// A name that a root filesystem has.
    pub(super) rootfs: bool,
}

struct Header {
    name: Vec<u8>,
    size: u64,
    kind: u8,
    sparse: bool,
}

impl Archive {
    /// Lists an archive.
    pub(super) fn scan(path: &Path, file: File) -> Result<Archive, LayoutError> {
        let damaged = |at, why| LayoutError::Tar { path: path.to_owned(), at, why };
        let failed = |e| LayoutError::read(path.display(), e);
        let length = file.metadata().map_err(failed)?.len();
        let mut archive = Archive {
            file: Arc::new(file),
            blobs: HashMap::new(),
            index: None,
            marker: None,
            docker: false,
            nested: None,
            rootfs: false,
        };
        let (mut at, mut name, mut size): (u64, Option<Vec<u8>>, Option<u64>) = (0, None, None);
        for entry in 0.. {
            if entry == MAX_ENTRIES {
                return Err(damaged(at, "it has too many entries"));
            }
            interrupt::check()?;
            if at + BLOCK > length {
                break;
            }
            let mut block = [0; BLOCK as usize];
            archive.file.read_exact_at(&mut block, at).map_err(failed)?;
            if block.iter().all(|b| *b == 0) {
                break;
            }
            let header = header(&block).map_err(|why| damaged(at, why))?;
            if header.sparse {
                return Err(damaged(at, "it has a sparse file"));
            }
            let data = at + BLOCK;
            let extension = matches!(header.kind, b'x' | b'g' | b'L' | b'K');
            let length_of_data = match size.take_if(|_| !extension) {
                Some(size) => size,
                None => header.size,
            };
            let end = data.checked_add(length_of_data).filter(|end| *end <= length);
            let end = end.ok_or_else(|| damaged(at, "it ends in the middle of a file"))?;
            if extension {
                if length_of_data > MAX_EXTENSION {
                    return Err(damaged(at, "it has an oversized extended header"));
                }
                let mut bytes = vec![0; length_of_data as usize];
                archive.file.read_exact_at(&mut bytes, data).map_err(failed)?;
                match header.kind {
                    b'L' => name = Some(bytes.split(|b| *b == 0).next().unwrap_or_default().to_vec()),
                    b'x' => {
                        for (key, value) in pax(&bytes).ok_or_else(|| damaged(at, "an extended header is malformed"))? {
                            match key {
                                b"path" => name = Some(value.to_vec()),
                                b"size" => {
                                    let number = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                                    size = Some(number.ok_or_else(|| damaged(at, "an extended header is malformed"))?);
                                }
                                _ => {}
                            }
                        }
                    }
                    _ => {}
                }
            } else {
                let name = name.take().unwrap_or(header.name);
                if matches!(header.kind, b'0' | 0 | b'7') {
                    archive.note(&name, (data, length_of_data));
                } else {
                    archive.rootfs |= matches!(clean(&name), b"bin" | b"etc" | b"usr" | b"bin/" | b"etc/" | b"usr/");
                }
            }
            at = end.checked_next_multiple_of(BLOCK).unwrap_or(length);
        }
        Ok(archive)
    }

    fn note(&mut self, name: &[u8], place: (u64, u64)) {
        let name = clean(name);
        if name == INDEX.as_bytes() {
            self.index = Some(place);
        } else if name == MARKER.as_bytes() {
            self.marker = Some(place);
        } else if name == b"manifest.json" || name == b"repositories" {
            self.docker = true;
        } else if let Some(directory) = name.strip_suffix(b"/index.json") {
            self.nested = Some(String::from_utf8_lossy(&directory[..directory.len().min(200)]).into_owned());
        } else if let Some(hex) = name.strip_prefix(b"blobs/sha256/").and_then(|hex| std::str::from_utf8(hex).ok())
            && let Ok(digest) = Digest::from_hex(hex)
        {
            self.blobs.insert(digest, place);
        }
    }

    pub(super) fn blob(&self, digest: Digest) -> Option<Blob> {
        self.blobs.get(&digest).map(|(start, len)| Blob::section(self.file.clone(), *start, *len))
    }

    pub(super) fn member(&self, name: &str) -> Option<Blob> {
        let place = if name == INDEX { self.index } else { self.marker };
        place.map(|(start, len)| Blob::section(self.file.clone(), start, len))
    }
}

/// Whether a block begins a tar archive.
pub(super) fn is_header(block: &[u8; BLOCK as usize]) -> bool {
    header(block).is_ok()
}

fn clean(mut name: &[u8]) -> &[u8] {
    while let Some(rest) = name.strip_prefix(b"./").or_else(|| name.strip_prefix(b"/")) {
        name = rest;
    }
    name
}

fn header(block: &[u8; BLOCK as usize]) -> Result<Header, &'static str> {
    let stored = number(&block[148..156]).ok_or("a header has no checksum")?;
    let sum: u64 =
        block.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u64::from(*b) }).sum();
    if stored != sum {
        return Err("a header has a wrong checksum");
    }
    let text = |field: &[u8]| field.split(|b| *b == 0).next().unwrap_or_default().to_vec();
    let mut name = text(&block[..100]);
    if &block[257..263] == b"ustar\0" && block[345] != 0 {
        let mut long = text(&block[345..500]);
        long.push(b'/');
        long.extend_from_slice(&name);
        name = long;
    }
    let kind = block[156];
    // Links, devices and directories have no data, whatever their size field says.
    let size = match kind {
        b'1'..=b'6' => 0,
        _ => number(&block[124..136]).ok_or("a header has a malformed size")?,
    };
    Ok(Header { name, size, kind, sparse: kind == b'S' })
}

/// A numeric field: octal digits between blanks and NULs, or big-endian binary when the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if let [first @ 0x80..=0xff, rest @ ..] = field {
        // 0xff begins a negative number.
        if *first != 0x80 || rest.len() < 8 || rest[..rest.len() - 8].iter().any(|b| *b != 0) {
            return None;
        }
        return rest[rest.len() - 8..].try_into().ok().map(u64::from_be_bytes).filter(|n| i64::try_from(*n).is_ok());
    }
    let digits = field.iter().copied().skip_while(|b| *b == b' ').take_while(|b| !matches!(b, b' ' | 0));
    digits.into_iter().try_fold(0u64, |n, digit| match digit {
        b'0'..=b'7' => n.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// The records `LENGTH KEY=VALUE\n` of a PAX header.
fn pax(mut bytes: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let blank = bytes.iter().position(|b| *b == b' ')?;
        let length: usize = std::str::from_utf8(&bytes[..blank]).ok()?.parse().ok()?;
        let record = bytes.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|b| *b == b'=')?;
        records.push((&record[..equals], &record[equals + 1..]));
        bytes = &bytes[length..];
    }
    Some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   17 \0"), Some(15));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Some(1 << 33));
        for bad in [&b"9"[..], b"-1", &[0xff; 12], &[0x80, 1, 2, 3, 0xff, 0, 0, 0, 0, 0, 0, 0], &[0x80, 1]] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn pax_records_are_read_and_malformed_ones_refused() {
        assert_eq!(pax(b"9 path=a\n11 size=12\n"), Some(vec![(&b"path"[..], &b"a"[..]), (b"size", b"12")]));
        for bad in [&b"9 path=a"[..], b"x", b"3 a\n", b"99 path=a\n", b"0 \n", b"2 \n"] {
            assert_eq!(pax(bad), None, "{bad:?}");
        }
    }
}
