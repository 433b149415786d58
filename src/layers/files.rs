//! The files of one layer below `<root>/layers/sha256/<hex>/`, and what each promises.
//!
//! | file    | content | promise |
//! |---------|---------|---------|
//! | `ztoc`  | the zTOC as fetched | its digest is in `spans`, and compared whenever the layer is opened |
//! | `toc`   | the flat table of contents | checksummed; rebuilt from `ztoc` when damaged |
//! | `blob`  | the compressed layer at its own offsets, sparse | bytes of a present span matched the span's digest when written |
//! | `spans` | header, then one byte per span: 1 = present, 2 = pinned, 3 = both | written after the span's bytes; a crash of the machine may lose or keep either |
//! | `verdict` | that the layer is what its zTOC says (`verdict`) | a hint; without it the layer is examined again |
//! | `data`  | large spans inflated, at their uncompressed offsets, sparse | none: it belongs to one process, the next one removes it |
//!
//! The promise of `spans` is weak on purpose: no fsync delays a reader. Whoever reads a span that an earlier process wrote checks its
//! digest again, so a torn write or a rotten block is found, and fetched again.

use super::room::Claim;
use crate::{
    oci::{Digest, Hasher},
    sys::map::Mapping,
    ztoc::Span,
};
use rustix::fs::FallocateFlags;
use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

const MAGIC: &[u8; 7] = b"SOCISPN";
/// The digit after the magic. A newer one is refused, and its layer left as it is: it may number spans or inodes in another way.
const VERSION: u8 = b'1';
/// Magic, version and the zTOC's digest.
const HEADER: u64 = 8 + 32;
/// Bits of a span's mark.
const PRESENT: u8 = 1;
/// See [`PRESENT`]. A daemon that does not know this bit takes the span for absent.
const PINNED: u8 = 2;
/// Holes are punched in whole blocks of this, the largest that filesystems of nodes use.
const BLOCK: u64 = 4096;
/// What is read at a time to be hashed or inflated: large enough that system calls don't show, small beside everything else.
pub const PIECE: usize = 256 << 10;

/// The open files of one layer.
pub struct LayerFiles {
    directory: PathBuf,
    blob: File,
    presence: File,
    ztoc: Mapping,
    ztoc_digest: Digest,
    /// Spans that are never evicted. Held while a mark is written, so that it has both bits right.
    pins: Mutex<HashSet<usize>>,
    /// Made when the first large span is inflated. Locked for moments only.
    data: Mutex<Option<Arc<File>>>,
}

/// Path of the zTOC of the layer in `directory`.
pub fn ztoc_path(directory: &Path) -> PathBuf {
    directory.join("ztoc")
}
/// See [`ztoc_path`].
pub fn toc_path(directory: &Path) -> PathBuf {
    directory.join("toc")
}

/// The digest of the zTOC that `directory` was made for, if it was finished.
pub fn ztoc_of(directory: &Path) -> io::Result<Option<Digest>> {
    let mut header = [0; HEADER as usize];
    match File::open(directory.join("spans")).and_then(|mut file| file.read_exact(&mut header)) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    match header.strip_prefix(MAGIC) {
        Some([VERSION, digest @ ..]) => Ok(digest.try_into().ok().map(Digest::from_bytes)),
        Some([newer @ b'2'..=b'9', ..]) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!(
                "its file \"spans\" was written by a newer version (format {}, this one knows {})",
                char::from(*newer),
                char::from(VERSION)
            ),
        )),
        _ => Ok(None),
    }
}

/// Puts the zTOC at `source` into `directory`, by name or else by content.
pub fn place_ztoc(directory: &Path, source: &Path) -> io::Result<()> {
    let target = ztoc_path(directory);
    let _ = fs::remove_file(&target);
    if fs::hard_link(source, &target).is_ok() {
        return Ok(());
    }
    let temporary = target.with_extension("new");
    fs::copy(source, &temporary)?;
    fs::rename(temporary, target)
}

/// Makes `directory` for a layer of `blob_bytes` with the zTOC in `source`. What was there is replaced; `spans` comes last and says
/// that the rest is complete.
pub fn create(directory: &Path, source: &Path, ztoc: &Digest, blob_bytes: u64, spans: usize) -> io::Result<()> {
    let presence = directory.join("spans");
    let _ = fs::remove_file(&presence);
    // A new file: somebody may still read the one that was here.
    let _ = fs::remove_file(directory.join("blob"));
    let blob = OpenOptions::new().write(true).create_new(true).mode(0o600).open(directory.join("blob"))?;
    blob.set_len(blob_bytes)?;
    place_ztoc(directory, source)?;
    let temporary = directory.join("spans.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(MAGIC)?;
    file.write_all(&[VERSION])?;
    file.write_all(ztoc.as_bytes())?;
    file.write_all(&vec![0; spans])?;
    fs::rename(temporary, presence)
}

/// A whole file, mapped. An empty one is damaged: none of ours ever is.
pub fn map(path: &Path) -> io::Result<Mapping> {
    let file = File::open(path)?;
    match file.metadata()?.len() {
        0 => Err(io::Error::new(io::ErrorKind::InvalidData, "the file is empty")),
        _ => Mapping::of(&file),
    }
}

impl LayerFiles {
    /// Opens what [`create`] made.
    pub fn open(directory: &Path) -> io::Result<LayerFiles> {
        let options = |name: &str| OpenOptions::new().read(true).write(true).open(directory.join(name));
        match fs::remove_file(directory.join("data")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(LayerFiles {
            directory: directory.to_owned(),
            blob: options("blob")?,
            presence: options("spans")?,
            ztoc: map(&ztoc_path(directory))?,
            ztoc_digest: ztoc_of(directory)?.ok_or(io::ErrorKind::InvalidData)?,
            pins: Mutex::default(),
            data: Mutex::default(),
        })
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The digest of the zTOC that the directory was made for; whoever opens a layer compares it.
    pub fn ztoc_digest(&self) -> Digest {
        self.ztoc_digest
    }

    /// Lets the zTOC's pages go; the windows of spans that are read come back one by one.
    pub fn settle(&self) {
        let _ = self.ztoc.release_pages();
    }

    /// The zTOC's bytes.
    pub fn ztoc(&self) -> &[u8] {
        &self.ztoc
    }

    /// The spans that `spans` says are present, of `count`. What a torn file does not say is absent.
    pub fn present(&self, count: usize) -> io::Result<Vec<usize>> {
        let whole = HEADER + count as u64;
        if self.presence.metadata()?.len() < whole {
            self.presence.set_len(whole)?;
        }
        let mut bytes = vec![0; count];
        self.presence.read_exact_at(&mut bytes, HEADER)?;
        let with = |bit: u8| bytes.iter().enumerate().filter(move |(_, b)| **b < 4 && **b & bit != 0).map(|(i, _)| i);
        self.pins().extend(with(PINNED));
        Ok(with(PRESENT).collect())
    }

    fn pins(&self) -> MutexGuard<'_, HashSet<usize>> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_pinned(&self, span: usize) -> bool {
        self.pins().contains(&span)
    }

    /// Says that `span` is never to be evicted.
    pub fn pin(&self, span: usize) -> io::Result<()> {
        let mut pins = self.pins();
        if !pins.insert(span) {
            return Ok(());
        }
        let mut mark = [0];
        self.presence.read_exact_at(&mut mark, HEADER + span as u64)?;
        self.presence.write_all_at(&[(mark[0] & PRESENT) | PINNED], HEADER + span as u64)
    }

    fn mark(&self, span: usize, present: u8) -> io::Result<()> {
        let pins = self.pins();
        let pinned = if pins.contains(&span) { PINNED } else { 0 };
        self.presence.write_all_at(&[present | pinned], HEADER + span as u64)
    }

    /// Gives the disk back what `range` of the blob takes, but for the blocks at its ends, which it may share with others.
    pub fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let (start, end) = (range.start.next_multiple_of(BLOCK), range.end / BLOCK * BLOCK);
        if start < end {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.blob, flags, start, end - start)?;
        }
        Ok(())
    }

    /// Writes bytes of the blob, unless that would take the last of the room.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let _claim = Claim::for_fetched(&self.blob, bytes.len() as u64)?;
        self.blob.write_all_at(bytes, offset)
    }

    /// Room for so many inflated bytes.
    pub fn claim(&self, bytes: u64) -> io::Result<Claim> {
        Claim::for_inflated(&self.blob, bytes)
    }

    /// Says that `span` is present. Its bytes were written before.
    pub fn keep(&self, span: usize) -> io::Result<()> {
        self.mark(span, PRESENT)
    }

    /// Says that `span` is not present.
    pub fn forget(&self, span: usize) -> io::Result<()> {
        self.mark(span, 0)
    }

    /// Bytes of the blob.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.blob.read_exact_at(out, offset)
    }

    /// Whether the bytes of `span` in the blob are those that its digest covers.
    pub fn is_intact(&self, span: &Span) -> io::Result<bool> {
        Ok(self.hash(span.compressed.start, span.compressed.end)? == Some(span.digest))
    }

    fn hash(&self, start: u64, end: u64) -> io::Result<Option<Digest>> {
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; PIECE.min((end - start) as usize)];
        let mut at = start;
        while at < end {
            let n = buffer.len().min((end - at) as usize);
            match self.blob.read_exact_at(&mut buffer[..n], at) {
                Ok(()) => hasher.update(&buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            }
            at += n as u64;
        }
        Ok(Some(hasher.finish()))
    }

    /// Where large spans of a layer of so many uncompressed bytes are inflated to.
    pub fn data(&self, uncompressed: u64) -> io::Result<Arc<File>> {
        let mut data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*data {
            return Ok(file.clone());
        }
        let path = self.directory.join("data");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.set_len(uncompressed)?;
        Ok(data.insert(Arc::new(file)).clone())
    }

    /// Bytes held on disk: blob and data are sparse, so this grows as spans arrive.
    pub fn disk_usage(&self) -> u64 {
        let data = self.data.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let files = [Some(&self.blob), Some(&self.presence), data.as_deref()];
        let held = |file: &File| file.metadata().map_or(0, |m| m.blocks() * 512);
        files.into_iter().flatten().map(held).sum::<u64>() + self.ztoc.len() as u64
    }
}
