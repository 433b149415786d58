//! `/proc/self/mountinfo`: which mounts there are, without touching any of them.
//!
//! A `stat` of a mount point asks the filesystem mounted there, and one that nobody serves never answers. This table is the kernel's own.
#![forbid(unsafe_code)]

use super::context;
use std::{
    ffi::OsString,
    fs::File,
    io,
    os::unix::{ffi::OsStringExt, fs::FileExt},
    path::{Path, PathBuf},
};

/// One mount, as far as we care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor`, as in `/sys/class/bdi`.
    pub device: String,
    pub point: PathBuf,
    pub fstype: String,
}

/// The table, held open: it can be read again when `/proc` is out of reach.
#[derive(Debug)]
pub struct Mounts(File);

impl Mounts {
    pub fn open() -> io::Result<Mounts> {
        File::open("/proc/self/mountinfo").map(Mounts).map_err(|e| context("opening /proc/self/mountinfo", e))
    }

    fn read(&self) -> io::Result<Vec<Mount>> {
        let mut text = Vec::new();
        let mut chunk = [0; 16 * 1024];
        // By position, as several threads may be reading.
        loop {
            match self.0.read_at(&mut chunk, text.len() as u64)? {
                0 => return Ok(text.split(|b| *b == b'\n').filter_map(parse).collect()),
                length => text.extend_from_slice(&chunk[..length]),
            }
        }
    }

    /// The mount on `point`, the topmost if several are stacked there.
    pub fn at(&self, point: &Path) -> io::Result<Option<Mount>> {
        Ok(self.read()?.into_iter().rfind(|mount| mount.point == point))
    }

    /// Whether anything is mounted on `directory` or somewhere below it.
    pub fn any_below(&self, directory: &Path) -> io::Result<bool> {
        Ok(self.read()?.iter().any(|mount| mount.point.starts_with(directory)))
    }
}

/// All mounts two levels below `directory`: on `<directory>/<anything>/<name>`. Each as often as mounts are stacked there.
pub fn mounts_two_below(directory: &Path, name: &str) -> io::Result<Vec<Mount>> {
    let is_one = |mount: &Mount| {
        mount.point.file_name().is_some_and(|last| last == name)
            && mount.point.parent().and_then(Path::parent) == Some(directory)
    };
    Ok(Mounts::open()?.read()?.into_iter().filter(is_one).collect())
}

/// The mount on `point`, the topmost if several are stacked there.
pub fn mount_at(point: &Path) -> io::Result<Option<Mount>> {
    Mounts::open()?.at(point)
}

/// One line: `id parent major:minor root point options [optional…] - fstype source options`.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    let fstype = String::from_utf8_lossy(fields.skip_while(|field| *field != b"-").nth(1)?).into_owned();
    Some(Mount { device, point, fstype })
}

/// Undoes the kernel's octal escapes of blank, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
            }
            _ => None,
        };
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_blank_and_optional_fields_is_read() {
        let line = br"36 35 0:98 / /var/lib/a\040b rw,noatime shared:1 master:2 - fuse.rawBridge soci ro,user_id=0";
        let mount = parse(line).expect("a mount");
        assert_eq!(mount.device, "0:98");
        assert_eq!(mount.point, Path::new("/var/lib/a b"));
        assert_eq!(mount.fstype, "fuse.rawBridge");
    }

    #[test]
    fn the_root_directory_is_a_mount_and_a_fresh_directory_is_not() {
        assert!(mount_at(Path::new("/")).expect("readable").is_some());
        let dir = tempfile::tempdir().expect("temp");
        assert_eq!(mount_at(dir.path()).expect("readable"), None);
        let mounts = Mounts::open().expect("open");
        assert!(mounts.any_below(Path::new("/")).expect("readable"));
        assert!(!mounts.any_below(dir.path()).expect("and again"));
    }
}
