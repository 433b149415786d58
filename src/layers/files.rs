//! The files of one layer below `<root>/layers/sha256/<hex>/`, and what each promises.
//!
//! | file    | content | promise |
//! |---------|---------|---------|
//! | `ztoc`  | the zTOC as fetched | its digest was checked when it was fetched, and is in `spans` |
//! | `toc`   | the flat table of contents | checksummed; rebuilt from `ztoc` when damaged |
//! | `blob`  | the compressed layer at its own offsets, sparse | bytes of a present span matched the span's digest when written |
//! | `spans` | header, then one byte per span: 1 = present | written after the span's bytes; a crash of the machine may lose or keep either |
//!
//! The last promise is weak on purpose: no fsync delays a reader. Whoever reads a span that an earlier process wrote checks its
//! digest again ([`LayerFiles::read_span`]), so a torn write or a rotten block is found, and fetched again.

use crate::{inflate, oci::Digest, sys::map::Mapping, ztoc::Compression, ztoc::Span, ztoc::SpanTable};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

const MAGIC: &[u8; 8] = b"SOCISPN1";
/// Magic and the zTOC's digest.
const HEADER: u64 = 8 + 32;

/// The open files of one layer.
pub struct LayerFiles {
    blob: File,
    presence: File,
    ztoc: Mapping,
}

/// What a span on disk turned out to be.
pub enum OnDisk {
    Good(Vec<u8>),
    /// Its digest does not match: a crash or the disk damaged it.
    Damaged,
}

/// Paths of the files of the layer in `directory`.
pub fn ztoc_path(directory: &Path) -> PathBuf {
    directory.join("ztoc")
}
/// See [`ztoc_path`].
pub fn toc_path(directory: &Path) -> PathBuf {
    directory.join("toc")
}

/// The digest of the zTOC that `directory` was made for, if it is complete.
pub fn ztoc_of(directory: &Path) -> Option<Digest> {
    let mut header = [0; HEADER as usize];
    File::open(directory.join("spans")).ok()?.read_exact(&mut header).ok()?;
    let digest = header.strip_prefix(MAGIC)?.try_into().ok()?;
    Some(Digest::from_bytes(digest))
}

/// Makes `directory` for a layer of `blob_bytes` with the zTOC in `source`. What was there is replaced; `spans` comes last and says
/// that the rest is complete.
pub fn create(directory: &Path, source: &Path, ztoc: &Digest, blob_bytes: u64, spans: usize) -> io::Result<()> {
    let presence = directory.join("spans");
    let _ = fs::remove_file(&presence);
    let blob = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(directory.join("blob"))?;
    blob.set_len(blob_bytes)?;
    let target = ztoc_path(directory);
    let _ = fs::remove_file(&target);
    if fs::hard_link(source, &target).is_err() {
        fs::copy(source, &target)?;
    }
    let temporary = directory.join("spans.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(MAGIC)?;
    file.write_all(ztoc.as_bytes())?;
    file.write_all(&vec![0; spans])?;
    fs::rename(temporary, presence)
}

impl LayerFiles {
    /// Opens what [`create`] made.
    pub fn open(directory: &Path) -> io::Result<LayerFiles> {
        let options = |name: &str| OpenOptions::new().read(true).write(true).open(directory.join(name));
        let ztoc = Mapping::of(&File::open(ztoc_path(directory))?)?;
        Ok(LayerFiles { blob: options("blob")?, presence: options("spans")?, ztoc })
    }

    /// Lets the zTOC's pages go; the windows of spans that are read come back one by one.
    pub fn settle(&self) {
        let _ = self.ztoc.release_pages();
    }

    /// The zTOC's bytes.
    pub fn ztoc(&self) -> &[u8] {
        &self.ztoc
    }

    /// The spans that `spans` says are present, of `count`.
    pub fn present(&self, count: usize) -> io::Result<Vec<usize>> {
        let mut bytes = vec![0; count];
        self.presence.read_exact_at(&mut bytes, HEADER)?;
        Ok(bytes.iter().enumerate().filter(|(_, b)| **b == 1).map(|(i, _)| i).collect())
    }

    /// Writes bytes of the blob, then says that `span` is present.
    pub fn store(&self, span: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.blob.write_all_at(bytes, offset)?;
        self.presence.write_all_at(&[1], HEADER + span as u64)
    }

    /// Says that `span` is not present.
    pub fn forget(&self, span: usize) -> io::Result<()> {
        self.presence.write_all_at(&[0], HEADER + span as u64)
    }

    /// The compressed bytes of `span`; `check` compares its digest.
    pub fn read_span(&self, span: &Span, check: bool) -> io::Result<OnDisk> {
        let mut bytes = vec![0; (span.compressed.end - span.compressed.start) as usize];
        match self.blob.read_exact_at(&mut bytes, span.compressed.start) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(OnDisk::Damaged),
            Err(error) => return Err(error),
        }
        if check && Digest::of(&bytes) != span.digest {
            return Ok(OnDisk::Damaged);
        }
        Ok(OnDisk::Good(bytes))
    }

    /// The sha256 of the whole blob.
    pub fn blob_digest(&self, bytes: u64) -> io::Result<Digest> {
        let mut hasher = crate::oci::Hasher::new();
        let mut buffer = vec![0; 256 << 10];
        let mut at = 0;
        while at < bytes {
            let n = buffer.len().min((bytes - at) as usize);
            self.blob.read_exact_at(&mut buffer[..n], at)?;
            hasher.update(&buffer[..n]);
            at += n as u64;
        }
        Ok(hasher.finish())
    }

    /// Bytes held on disk: the blob is sparse, so this grows as spans arrive.
    pub fn disk_usage(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        [&self.blob, &self.presence].iter().filter_map(|f| f.metadata().ok()).map(|m| m.blocks() * 512).sum::<u64>()
            + self.ztoc.len() as u64
    }
}

/// The uncompressed bytes `[skip, skip + out.len())` of `span`, from its compressed bytes.
pub fn inflate(
    table: &SpanTable,
    span: &Span,
    ztoc: &[u8],
    compressed: &[u8],
    skip: u64,
    out: &mut [u8],
) -> Result<(), inflate::InflateError> {
    match table.compression {
        Compression::Gzip => {
            let window = ztoc.get(span.window.clone()).unwrap_or_default();
            inflate::inflate_span(span.bits, window, compressed, skip, out)
        }
        Compression::Uncompressed => {
            let end = (skip as usize).saturating_add(out.len());
            let bytes = compressed.get(skip as usize..end).ok_or(inflate::InflateError::Short { missing: out.len() as u64 })?;
            out.copy_from_slice(bytes);
            Ok(())
        }
    }
}
