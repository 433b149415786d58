//! Writing a layout: new blobs are staged beside the destination, and one rename makes the result visible.
//!
//! Until that rename the destination is untouched; a failure, a signal or a full disk leaves only what was there before.
//! Blobs of the source are linked where that is safe, else copied by the kernel (which shares extents where the filesystem can).
//!
//! Where we deviate: the Go CLI deletes an existing `oci-dir` destination recursively, whatever it is. Here it is replaced only
//! when it is empty or holds nothing but an OCI layout. And what the destination was is there until the new one is complete.

use super::{BLOBS, Blob, INDEX, LayoutError, MARKER, OciLayout, Trust};
use crate::{
    cli::{
        args::Format,
        interrupt::{self, Stopped},
    },
    oci::{Digest, Hasher},
};
use rustix::fs::{AtFlags, CWD, RenameFlags, copy_file_range, linkat, renameat_with};
use std::{
    collections::BTreeSet,
    fs::{File, Permissions},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};
use tempfile::{NamedTempFile, TempDir};

const MARKER_CONTENT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// What an OCI layout directory may hold and still be replaced as one. `ingest` is a leftover of the Go CLI's.
const LAYOUT_NAMES: [&str; 5] = [INDEX, MARKER, "blobs", "ingest", "manifest.json"];
/// Bytes that the kernel copies between two looks at the stop flag.
const COPY: u64 = 64 << 20;

/// Why a layout could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("the output {} {why}", path.display())]
    Refused { path: PathBuf, why: String },
    #[error("failed to write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("failed to copy blob {digest}")]
    Copy { digest: Digest, source: io::Error },
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Where a layout goes; checked before any work is done.
#[derive(Debug)]
pub enum Destination {
    /// A tar file that appears under this name when complete.
    Archive(PathBuf),
    /// A pipe or device that takes the tar file as it is written.
    Stream { path: PathBuf, file: File },
    /// A directory that does not exist, or is empty.
    NewDirectory(PathBuf),
    /// A directory that holds an OCI layout and nothing else.
    ReplacedLayout(PathBuf),
}

impl Destination {
    /// Looks at what is at `path` now.
    pub fn check(path: &Path, format: Format) -> Result<Destination, WriteError> {
        let refused = |why: &str| WriteError::Refused { path: path.to_owned(), why: why.to_owned() };
        let failed = |source| WriteError::Write { path: path.to_owned(), source };
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if path.file_name().is_none() {
                    return Err(refused("has no name"));
                }
                if !parent(path).is_dir() {
                    return Err(refused("would be in a directory that does not exist"));
                }
                return Ok(match format {
                    Format::Archive => Destination::Archive(path.to_owned()),
                    Format::Directory => Destination::NewDirectory(path.to_owned()),
                });
            }
            Err(e) => return Err(failed(e)),
        };
        // A symbolic link stays one: what it names is replaced. (The name of a pipe leads nowhere.)
        let real = match metadata.is_dir() || metadata.is_file() {
            true => path.canonicalize().map_err(failed)?,
            false => path.to_owned(),
        };
        match (format, metadata.is_dir()) {
            (Format::Archive, true) => Err(refused("is a directory; --format oci-dir writes directories")),
            (Format::Archive, false) if metadata.is_file() => Ok(Destination::Archive(real)),
            (Format::Archive, false) => {
                let file = File::options().write(true).open(path).map_err(failed)?;
                Ok(Destination::Stream { path: path.to_owned(), file })
            }
            (Format::Directory, false) => Err(refused("is a file; --format oci-archive writes files")),
            (Format::Directory, true) => {
                let names: Vec<_> = std::fs::read_dir(&real)
                    .and_then(|entries| entries.take(1000).map(|e| e.map(|e| e.file_name())).collect())
                    .map_err(failed)?;
                let foreign = names.iter().find(|name| !LAYOUT_NAMES.iter().any(|known| name == known));
                match foreign {
                    _ if names.is_empty() => Ok(Destination::NewDirectory(real)),
                    Some(name) => Err(WriteError::Refused {
                        path: path.to_owned(),
                        why: format!(
                            "is a directory that is not (only) an OCI layout, it has {name:?}; it is not replaced"
                        ),
                    }),
                    None if names.iter().any(|name| name == INDEX || name == MARKER) => {
                        Ok(Destination::ReplacedLayout(real))
                    }
                    None => Err(refused("is a directory that is not an OCI layout; it is not replaced")),
                }
            }
        }
    }

    /// Whether the bytes go where our lines would go.
    pub fn is_stdout(&self) -> bool {
        let Destination::Stream { file, .. } = self else { return false };
        let ours = file.metadata().map(|m| (m.dev(), m.ino()));
        let stdout = rustix::fs::fstat(io::stdout()).map(|s| (s.st_dev, s.st_ino));
        matches!((ours, stdout), (Ok(a), Ok(b)) if a == b)
    }

    fn path(&self) -> &Path {
        match self {
            Destination::Archive(path) | Destination::NewDirectory(path) | Destination::ReplacedLayout(path) => path,
            Destination::Stream { path, .. } => path,
        }
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A layout in the making. Dropping it removes everything that was made.
#[derive(Debug)]
pub struct Staging {
    destination: Destination,
    directory: TempDir,
}

impl Staging {
    /// An empty layout beside its destination.
    pub fn new(destination: Destination) -> Result<Staging, WriteError> {
        let (place, mode) = match &destination {
            Destination::Stream { .. } => (std::env::temp_dir(), 0o700),
            Destination::Archive(path) => (parent(path).to_owned(), 0o700),
            // This one stays, so the umask decides.
            Destination::NewDirectory(path) | Destination::ReplacedLayout(path) => (parent(path).to_owned(), 0o777),
        };
        let failed = |source| WriteError::Write { path: place.clone(), source };
        let directory = tempfile::Builder::new()
            .prefix(".soci-")
            .permissions(Permissions::from_mode(mode))
            .tempdir_in(&place)
            .map_err(failed)?;
        std::fs::create_dir_all(directory.path().join(BLOBS)).map_err(failed)?;
        Ok(Staging { destination, directory })
    }

    /// Adds a blob of our own making.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, WriteError> {
        let digest = Digest::of(bytes);
        let path = self.blob_path(digest);
        let written = match File::options().write(true).create_new(true).open(&path) {
            // The same bytes, put before.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(digest),
            Err(e) => Err(e),
            Ok(mut file) => file.write_all(bytes).and_then(|()| file.set_permissions(Permissions::from_mode(0o444))),
        };
        written.map(|()| digest).map_err(|source| WriteError::Write { path, source })
    }

    /// A blob that was [`Staging::put`].
    pub fn blob(&self, digest: Digest) -> Option<Blob> {
        Blob::open(&self.blob_path(digest)).ok().flatten()
    }

    /// Completes the layout and makes it visible. An archive has the blobs `reachable`; a directory has those and every other
    /// blob of the source, as the Go CLI's. Either way `index` is `index.json`.
    pub fn publish(self, source: &OciLayout, reachable: &BTreeSet<Digest>, index: &[u8]) -> Result<(), WriteError> {
        match &self.destination {
            Destination::Archive(path) => {
                let failed = |source| WriteError::Write { path: path.clone(), source };
                let temporary = tempfile::Builder::new()
                    .prefix(".soci-")
                    .permissions(Permissions::from_mode(0o666))
                    .tempfile_in(parent(path))
                    .map_err(failed)?;
                self.write_archive(temporary.as_file(), path, source, reachable, index)?;
                interrupt::check()?;
                temporary.persist(path).map_err(|e| failed(e.error)).map(drop)
            }
            Destination::Stream { path, file } => self.write_archive(file, path, source, reachable, index),
            Destination::NewDirectory(_) | Destination::ReplacedLayout(_) => self.publish_directory(source, index),
        }
    }

    fn write_archive(
        &self,
        mut out: &File,
        path: &Path,
        source: &OciLayout,
        reachable: &BTreeSet<Digest>,
        index: &[u8],
    ) -> Result<(), WriteError> {
        let failed = |source| WriteError::Write { path: path.to_owned(), source };
        for directory in ["blobs/", "blobs/sha256/"] {
            out.write_all(&tar::header(directory, 0o755, 0, b'5')).map_err(failed)?;
        }
        for digest in reachable {
            let blob = self.blob(*digest).map_or_else(|| source.blob(*digest), Ok)?;
            let name = format!("{BLOBS}/{}", digest.hex());
            out.write_all(&tar::headers(&name, 0o444, blob.len())).map_err(failed)?;
            copy(&blob, *digest, out)?;
            out.write_all(tar::padding(blob.len())).map_err(failed)?;
        }
        for (name, mode, bytes) in [(INDEX, 0o644, index), (MARKER, 0o444, MARKER_CONTENT)] {
            out.write_all(&tar::headers(name, mode, bytes.len() as u64)).map_err(failed)?;
            out.write_all(bytes).map_err(failed)?;
            out.write_all(tar::padding(bytes.len() as u64)).map_err(failed)?;
        }
        out.write_all(&[0; 1024]).map_err(failed)
    }

    fn publish_directory(self, source: &OciLayout, index: &[u8]) -> Result<(), WriteError> {
        for digest in source.digests()? {
            let path = self.blob_path(digest);
            if !path.exists() {
                place(&source.blob(digest)?, digest, &path)?;
            }
        }
        let final_path = self.destination.path();
        let failed = |source| WriteError::Write { path: final_path.to_owned(), source };
        for (name, bytes) in [(INDEX, index), (MARKER, MARKER_CONTENT)] {
            std::fs::write(self.directory.path().join(name), bytes).map_err(failed)?;
        }
        interrupt::check()?;
        let staged = self.directory.path();
        if let Destination::ReplacedLayout(_) = self.destination {
            match renameat_with(CWD, staged, CWD, final_path, RenameFlags::EXCHANGE) {
                // The old layout now has the temporary name, and goes away with it.
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
                Err(e) => return Err(failed(e.into())),
            }
            // This filesystem cannot exchange: there is a moment without either.
            let aside = NamedTempFile::with_prefix_in(".soci-", parent(final_path)).map_err(failed)?.into_temp_path();
            std::fs::remove_file(&aside).and_then(|()| std::fs::rename(final_path, &aside)).map_err(failed)?;
            if let Err(e) = std::fs::rename(staged, final_path) {
                let _ = std::fs::rename(&aside, final_path);
                return Err(failed(e));
            }
            let _ = std::fs::remove_dir_all(&aside);
        } else {
            std::fs::rename(staged, final_path).map_err(failed)?;
        }
        let _ = self.directory.keep();
        Ok(())
    }

    fn blob_path(&self, digest: Digest) -> PathBuf {
        self.directory.path().join(BLOBS).join(digest.hex())
    }
}

/// Gives a blob of the source a name in the new layout, or copies it there.
fn place(blob: &Blob, digest: Digest, path: &Path) -> Result<(), WriteError> {
    interrupt::check()?;
    if blob.may_be_linked() {
        // Through the descriptor: the very file that was looked at, whatever its name means by now.
        let opened = format!("/proc/self/fd/{}", blob.file.as_raw_fd());
        if linkat(CWD, &opened, CWD, path, AtFlags::SYMLINK_FOLLOW).is_ok() {
            return Ok(());
        }
    }
    let failed = |source| WriteError::Write { path: path.to_owned(), source };
    let file = File::options().write(true).create_new(true).open(path).map_err(failed)?;
    copy(blob, digest, &file)?;
    file.set_permissions(Permissions::from_mode(0o444)).map_err(failed)
}

/// Appends a blob to a file.
fn copy(blob: &Blob, digest: Digest, mut out: &File) -> Result<(), WriteError> {
    let failed = |source| match interrupt::stopped() {
        Some(stopped) => WriteError::Stopped(stopped),
        None => WriteError::Copy { digest, source },
    };
    let mut done = 0;
    if blob.trust() == Trust::Inside {
        let mut from = blob.start;
        while done < blob.len() {
            interrupt::check()?;
            let want = usize::try_from((blob.len() - done).min(COPY)).unwrap_or(usize::MAX);
            match copy_file_range(&*blob.file, Some(&mut from), out, None, want) {
                Ok(0) | Err(_) => break,
                Ok(copied) => done += copied as u64,
            }
        }
    }
    // What the kernel would not copy (other filesystem, pipe, a link that must be checked) is read and written.
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    while done < blob.len() {
        let want = buffer.len().min(usize::try_from(blob.len() - done).unwrap_or(usize::MAX));
        let chunk = &mut buffer[..want];
        interrupt::check()?;
        blob.read_at(chunk, done).and_then(|()| out.write_all(chunk)).map_err(failed)?;
        if blob.trust() == Trust::Linked {
            hasher.update(chunk);
        }
        done += want as u64;
    }
    if blob.trust() == Trust::Linked {
        let actual = hasher.finish();
        if actual != digest {
            return Err(LayoutError::Digest { expected: digest, actual }.into());
        }
    }
    // A file that grew is not copied further than its length was; one that shrank failed above.
    Ok(())
}

/// The few tar headers of an `oci-archive`: no owner, no time, so that equal content gives equal bytes.
mod tar {
    const BLOCK: u64 = 512;
    /// Largest size that eleven octal digits hold.
    const MAX_OCTAL: u64 = 0o777_7777_7777;

    /// The header, or headers, of a regular file.
    pub fn headers(name: &str, mode: u32, size: u64) -> Vec<u8> {
        if size <= MAX_OCTAL {
            return header(name, mode, size, b'0').to_vec();
        }
        // `LENGTH size=DIGITS\n`, where LENGTH counts itself: two digits, as the whole is always between 10 and 99 bytes.
        let rest = format!(" size={size}\n");
        let record = format!("{}{rest}", rest.len() + 2);
        let mut out = header("PaxHeaders.0/blob", 0, record.len() as u64, b'x').to_vec();
        out.extend_from_slice(record.as_bytes());
        out.extend_from_slice(padding(record.len() as u64));
        out.extend_from_slice(&header(name, mode, 0, b'0'));
        out
    }

    /// One ustar header. Names here are constants or the hex of a digest, and always fit.
    pub fn header(name: &str, mode: u32, size: u64, kind: u8) -> [u8; BLOCK as usize] {
        let mut block = [0; BLOCK as usize];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &name.as_bytes()[..name.len().min(100)]);
        put(100, format!("{mode:07o}\0").as_bytes());
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, b"00000000000\0");
        put(148, b"        ");
        put(156, &[kind]);
        put(257, b"ustar\x0000");
        put(329, b"0000000\0");
        put(337, b"0000000\0");
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    /// The zeros that fill the last block of `size` bytes.
    pub fn padding(size: u64) -> &'static [u8] {
        static ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        &ZEROS[..((BLOCK - size % BLOCK) % BLOCK) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_octal_cannot_hold_get_an_extended_header() {
        let small = tar::headers("blobs/sha256/x", 0o444, 0o777_7777_7777);
        assert_eq!(small.len(), 512);
        let large = tar::headers("blobs/sha256/x", 0o444, 8 << 30);
        assert_eq!(large.len(), 3 * 512);
        assert_eq!(&large[512..512 + 19], b"19 size=8589934592\n");
    }

    #[test]
    fn a_directory_that_holds_anything_else_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let check = || Destination::check(&path, Format::Directory);
        assert!(matches!(check(), Ok(Destination::NewDirectory(_))));
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(check(), Ok(Destination::NewDirectory(_))));
        std::fs::create_dir(path.join("blobs")).unwrap();
        assert!(matches!(check(), Err(WriteError::Refused { .. })));
        std::fs::write(path.join("index.json"), "{}").unwrap();
        assert!(matches!(check(), Ok(Destination::ReplacedLayout(_))));
        std::fs::write(path.join("thesis.txt"), "").unwrap();
        assert!(matches!(check(), Err(WriteError::Refused { .. })));
        assert!(matches!(Destination::check(&path, Format::Archive), Err(WriteError::Refused { .. })));
    }
}
