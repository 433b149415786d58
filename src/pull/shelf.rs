//! Checkpoints of layers that have been pulled: where inflating can begin the next time.
//!
//! A layer is pulled again when its image was removed meanwhile, or when another image has it above other layers. The first pass goes through
//! it from the front, as nothing else is possible with most layers; it leaves a *zinfo* behind (the checkpoints of a zTOC, in the same
//! format), with which the next one inflates in parts, on all cores. Of a layer that was loaded lazily, its zTOC says the same.
//!
//! Nothing here is trusted or needed: see [`super::parts`]. So nothing is synced, what cannot be written is left, and what is damaged is as
//! good as missing. At most [`ROOM`] bytes are kept; the oldest go.

use crate::{
    inflate::{Entry, WINDOW},
    oci::Digest,
};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::PathBuf,
    time::SystemTime,
};
use tempfile::NamedTempFile;

/// Number of checkpoints (i32) and span size (i64).
const HEADER: u64 = 12;
/// Compressed offset (i64), uncompressed offset (i64), bits (u8), without the window that follows.
const NUMBERS: usize = 17;
/// Smaller layers are inflated before a helper would have begun.
const WORTH: u64 = 16 << 20;
/// Kept on disk: a window for each 4 MiB makes this some eight gigabytes of layers.
const ROOM: u64 = 64 << 20;
/// Checkpoints of one layer. More is no layer of ours.
const POINTS: u64 = 65_536;

/// Where a decoder may begin, and the file that says what it needs for that.
pub struct Known {
    file: File,
    points: Vec<Point>,
}

/// One checkpoint.
#[derive(Debug, Clone)]
pub struct Point {
    /// Compressed offset of the first whole byte after it.
    pub input: u64,
    /// Bits of the byte before that belong to what follows.
    pub bits: u8,
    /// Where in the file its window is, as far as there is data before it.
    pub window: Range<u64>,
}

impl Known {
    /// `points` in the order of the layer, with windows in `file`.
    pub fn new(file: File, points: Vec<Point>) -> Known {
        Known { file, points }
    }

    pub fn count(&self) -> usize {
        self.points.len()
    }

    /// The compressed offset of a point.
    pub fn at(&self, index: usize) -> Option<u64> {
        self.points.get(index).map(|point| point.input)
    }

    /// What to assume there, if it can be read.
    pub fn entry(&self, index: usize) -> Option<Entry> {
        let point = self.points.get(index)?;
        let length = point.window.end.checked_sub(point.window.start).filter(|length| *length <= WINDOW as u64)?;
        let mut window = vec![0; length as usize];
        self.file.read_exact_at(&mut window, point.window.start).ok()?;
        Entry::block(point.bits, window)
    }
}

/// How a layer is to be inflated.
pub enum Inflating {
    /// From its first to its last byte.
    Alone,
    /// With help where there may be some; what is passed is written to `draft`.
    Helped { known: Option<Known>, draft: Option<Draft> },
}

/// Checkpoints being written down. Gone when dropped.
#[derive(Debug)]
pub struct Draft {
    layer: Digest,
    /// None after the first failure.
    file: Option<BufWriter<NamedTempFile>>,
    count: u32,
}

impl Draft {
    /// A checkpoint: compressed and uncompressed offset, unused bits of the byte before, the output before it (at most a window).
    pub fn note(&mut self, input: u64, output: u64, bits: u8, window: [&[u8]; 2]) {
        let Some(file) = &mut self.file else { return };
        let pad = WINDOW.saturating_sub(window[0].len() + window[1].len());
        let mut record = Vec::with_capacity(NUMBERS + WINDOW);
        record.extend_from_slice(&input.to_le_bytes());
        record.extend_from_slice(&output.to_le_bytes());
        record.push(bits);
        record.resize(NUMBERS + pad, 0);
        window.into_iter().for_each(|part| record.extend_from_slice(part));
        match file.write_all(&record) {
            Ok(()) => self.count += 1,
            Err(error) => {
                tracing::debug!(layer = %self.layer, %error, "cannot write checkpoints down");
                self.file = None;
            }
        }
    }
}

/// All that are kept.
pub struct Shelf {
    directory: PathBuf,
    /// Of layers that were loaded lazily.
    indexed: Indexed,
}

/// Checkpoints of a layer from its zTOC, if it has one here.
pub type Indexed = Box<dyn Fn(&Digest) -> Option<Known> + Send + Sync>;

impl Shelf {
    /// Everything in `directory` is ours. What a crash has left there goes.
    pub fn open(directory: PathBuf, indexed: Indexed) -> Shelf {
        let shelf = Shelf { directory, indexed };
        for (path, ..) in shelf.files() {
            if path.extension().is_some() {
                let _ = fs::remove_file(path);
            }
        }
        shelf
    }

    fn path(&self, layer: &Digest) -> PathBuf {
        self.directory.join(layer.hex())
    }

    /// What is known of a layer of `size` bytes, or else where to write down what is passed.
    pub fn inflating(&self, layer: &Digest, size: u64) -> Inflating {
        if size < WORTH {
            return Inflating::Helped { known: None, draft: None };
        }
        let kept = File::open(self.path(layer)).and_then(read);
        let known = kept.ok().or_else(|| (self.indexed)(layer)).filter(|known| known.count() > 1);
        let draft = match known {
            Some(_) => None,
            None => {
                self.draft(*layer).inspect_err(|error| tracing::debug!(%error, "no checkpoints are written down")).ok()
            }
        };
        Inflating::Helped { known, draft }
    }

    fn draft(&self, layer: Digest) -> io::Result<Draft> {
        fs::create_dir_all(&self.directory)?;
        let file = tempfile::Builder::new().suffix(".new").tempfile_in(&self.directory)?;
        let mut file = BufWriter::new(file);
        // The count comes last.
        file.write_all(&[0; HEADER as usize])?;
        Ok(Draft { layer, file: Some(file), count: 0 })
    }

    /// The layer was right, so what was passed is worth keeping.
    pub fn keep(&self, mut draft: Draft) {
        let Some(mut file) = draft.file.take().filter(|_| draft.count > 1) else { return };
        let mut keep = || {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&draft.count.to_le_bytes())?;
            file.write_all(&super::front::SPACING.to_le_bytes())?;
            file.flush()
        };
        let kept = keep().and_then(|()| {
            let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.persist(self.path(&draft.layer)).map_err(|error| error.error)
        });
        match kept {
            Ok(_) => self.make_room(),
            Err(error) => tracing::debug!(layer = %draft.layer, %error, "cannot keep checkpoints"),
        }
    }

    fn files(&self) -> Vec<(PathBuf, u64, SystemTime)> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let file = |entry: fs::DirEntry| {
            let metadata = entry.metadata().ok()?;
            Some((entry.path(), metadata.len(), metadata.modified().ok()?))
        };
        entries.filter_map(file).collect()
    }

    fn make_room(&self) {
        let mut files = self.files();
        files.sort_by_key(|(_, _, modified)| std::cmp::Reverse(*modified));
        let mut kept = 0;
        for (path, size, _) in files {
            kept += size;
            if kept > ROOM {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// Reads a zinfo: numbers now, windows when they are needed.
fn read(mut file: File) -> io::Result<Known> {
    let damaged = || io::Error::from(io::ErrorKind::InvalidData);
    let length = file.metadata()?.len();
    let mut head = [0; HEADER as usize];
    file.read_exact(&mut head)?;
    let count = u64::from(u32::from_le_bytes([head[0], head[1], head[2], head[3]]));
    let record = (NUMBERS + WINDOW) as u64;
    if count > POINTS || length != HEADER + count * record {
        return Err(damaged());
    }
    let mut points: Vec<Point> = Vec::new();
    for index in 0..count {
        let at = HEADER + index * record;
        let mut numbers = [0; NUMBERS];
        file.read_exact_at(&mut numbers, at)?;
        let (input, rest) = numbers.split_first_chunk().ok_or_else(damaged)?;
        let (output, bits) = rest.split_first_chunk().ok_or_else(damaged)?;
        let (input, output) = (u64::from_le_bytes(*input), u64::from_le_bytes(*output));
        let end = at + record;
        let window = end - output.min(WINDOW as u64)..end;
        if points.last().is_some_and(|last| last.input >= input) {
            return Err(damaged());
        }
        points.push(Point { input, bits: bits[0], window });
    }
    Ok(Known { file, points })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shelf(directory: &std::path::Path) -> Shelf {
        Shelf::open(directory.join("checkpoints"), Box::new(|_| None))
    }

    fn known(inflating: Inflating) -> Option<Known> {
        match inflating {
            Inflating::Alone => None,
            Inflating::Helped { known, .. } => known,
        }
    }

    fn draft(inflating: Inflating) -> Option<Draft> {
        match inflating {
            Inflating::Alone => None,
            Inflating::Helped { draft, .. } => draft,
        }
    }

    fn fill(draft: &mut Draft) {
        draft.note(10, 0, 0, [b"", b""]);
        draft.note(2_000_000, 5_000_000, 3, [&[1; 768], &[2; 32_000]]);
        draft.note(4_000_000, 10_000_000, 0, [b"", &[3; WINDOW]]);
    }

    #[test]
    fn what_was_passed_is_there_the_next_time_and_what_is_damaged_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let (layer, size) = (Digest::of(b"layer"), WORTH);
        let first = shelf(directory.path());
        assert!(draft(first.inflating(&layer, WORTH - 1)).is_none(), "too small");
        let mut passed = draft(first.inflating(&layer, size)).unwrap();
        fill(&mut passed);
        // A draft that is not kept leaves nothing.
        drop(draft(first.inflating(&layer, size)).unwrap());
        first.keep(passed);
        assert_eq!(first.files().len(), 1);
        let second = shelf(directory.path());
        let there = known(second.inflating(&layer, size)).unwrap();
        assert_eq!((there.count(), there.at(1)), (3, Some(2_000_000)));
        let window = [&[1u8; 768][..], &[2; 32_000]].concat();
        assert_eq!(there.entry(1), Entry::block(3, window));
        assert_eq!(there.entry(0), Entry::block(0, Vec::new()));
        // It is a zinfo as in a zTOC.
        let path = second.path(&layer);
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes[4..12], (4u64 << 20).to_le_bytes());
        assert_eq!(bytes.len(), 12 + 3 * (17 + 32768));
        for damage in [&bytes[..bytes.len() - 1], &bytes[..11], b""] {
            fs::write(&path, damage).unwrap();
            assert!(known(second.inflating(&layer, size)).is_none());
        }
        let mut backwards = bytes.clone();
        backwards[12 + 17 + 32768] = 0;
        backwards[12 + 17 + 32768 + 1] = 0;
        backwards[12 + 17 + 32768 + 2] = 0;
        fs::write(&path, backwards).unwrap();
        assert!(known(second.inflating(&layer, size)).is_none());
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_and_what_a_crash_left_goes_at_start() {
        let directory = tempfile::tempdir().unwrap();
        let first = shelf(directory.path());
        let mut passed = draft(first.inflating(&Digest::of(b"new"), WORTH)).unwrap();
        fill(&mut passed);
        let old = first.path(&Digest::of(b"old"));
        let file = File::create(&old).unwrap();
        file.set_len(ROOM).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        first.keep(passed);
        assert!(!old.exists() && first.path(&Digest::of(b"new")).exists());
        fs::write(first.directory.join("x.new"), "").unwrap();
        assert_eq!(shelf(directory.path()).files().len(), 1);
    }
}
