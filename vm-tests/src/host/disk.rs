//! A disk that loses what it was not told to keep: the other end of an emulated machine's disk, over NBD.
//!
//! ```text
//!   guest ── write ──▶ cache, in our memory ── flush, or no room ──▶ a file
//!                             │ the power is cut
//!                             └──▶ some of it to the file, in no order, some of it torn; the rest is gone
//! ```
//! Killing an emulator whose disk is a file loses nothing that the guest's kernel has written: this machine's page cache survives. A real disk has a cache
//! of its own, writes it back as it likes, and promises only what was flushed. So does this one. A sector is written whole or not at all.

use crate::Outcome;
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    os::unix::{
        fs::FileExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

const SECTOR: u64 = 512;
/// Of what is in the cache, before the disk writes back by itself: 32 MiB.
const CACHE: usize = 65_536;
/// No guest asks for more at once (QEMU's own limit).
const LARGEST: u32 = 32 << 20;

/// Small, fast, and the same again from the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    /// Below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What became of writes that were not flushed when the power was cut.
#[derive(Debug, Default, Clone, Copy)]
pub struct Lost {
    /// Sectors in the cache at the moment.
    pub unflushed: usize,
    /// Of these, gone.
    pub gone: usize,
}

struct State {
    file: File,
    size: u64,
    /// By number of the sector; what the file has of these is older.
    cache: BTreeMap<u64, [u8; SECTOR as usize]>,
    random: Random,
}

impl State {
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)?;
        let first = offset / SECTOR;
        let last = first + out.len() as u64 / SECTOR;
        for (sector, bytes) in self.cache.range(first..last) {
            let at = ((sector - first) * SECTOR) as usize;
            out[at..at + SECTOR as usize].copy_from_slice(bytes);
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for (n, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
            let mut copy = [0; SECTOR as usize];
            copy.copy_from_slice(sector);
            self.cache.insert(offset / SECTOR + n as u64, copy);
        }
        // In no order that the guest could rely on.
        while self.cache.len() > CACHE {
            let some = self.random.below(4) == 0;
            self.settle(|random| some || random.below(2) == 0)?;
        }
        Ok(())
    }

    /// Writes the sectors that are chosen to the file; neighbours in one go.
    fn settle(&mut self, mut chosen: impl FnMut(&mut Random) -> bool) -> io::Result<()> {
        let mut run: (u64, Vec<u8>) = (0, Vec::new());
        let mut kept = BTreeMap::new();
        for (sector, bytes) in std::mem::take(&mut self.cache) {
            if !chosen(&mut self.random) {
                kept.insert(sector, bytes);
                continue;
            }
            if run.0 + run.1.len() as u64 / SECTOR != sector {
                self.file.write_all_at(&run.1, run.0 * SECTOR)?;
                run = (sector, Vec::new());
            }
            run.1.extend_from_slice(&bytes);
        }
        self.cache = kept;
        self.file.write_all_at(&run.1, run.0 * SECTOR)
    }

    /// The power is gone. Guests write blocks of eight sectors: most are kept or lost whole, some are torn.
    fn cut(&mut self) -> io::Result<Lost> {
        let unflushed = self.cache.len();
        let share = [0, 25, 50, 75, 100][self.random.below(5) as usize];
        let (mut block, mut fate, mut torn) = (u64::MAX, false, false);
        let mut kept = BTreeMap::new();
        for (sector, bytes) in std::mem::take(&mut self.cache) {
            if sector / 8 != block {
                block = sector / 8;
                fate = self.random.below(100) < share;
                torn = share > 0 && self.random.below(16) == 0;
            }
            if if torn { self.random.below(2) == 0 } else { fate } {
                kept.insert(sector, bytes);
            }
        }
        self.cache = kept;
        let gone = unflushed - self.cache.len();
        self.settle(|_| true)?;
        Ok(Lost { unflushed, gone })
    }
}

/// The disk; it is there until it is dropped, whoever connects.
pub struct Disk {
    state: Arc<Mutex<State>>,
    socket: PathBuf,
    listener: Option<JoinHandle<()>>,
}

impl Disk {
    /// Offers the file as a disk on a socket beside it.
    pub fn new(file: &Path, seed: u64) -> Outcome<Disk> {
        let socket = file.with_extension("nbd");
        let why = |error: io::Error| format!("{}: {error}", socket.display());
        let _ = std::fs::remove_file(&socket);
        let open = File::options().read(true).write(true).open(file).map_err(why)?;
        let size = open.metadata().map_err(why)?.len() / SECTOR * SECTOR;
        let state = Arc::new(Mutex::new(State { file: open, size, cache: BTreeMap::new(), random: Random::new(seed) }));
        let listener = UnixListener::bind(&socket).map_err(why)?;
        let served = state.clone();
        let thread = std::thread::spawn(move || {
            for connection in listener.incoming() {
                let Ok(connection) = connection else { return };
                // Ends when the machine does, in whatever way.
                match serve(&connection, &served) {
                    Ok(Ended::Closed) => {}
                    Ok(Ended::Told) => return,
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                        ) => {}
                    Err(error) => eprintln!("the disk's connection: {error}"),
                }
            }
        });
        Ok(Disk { state, socket, listener: Some(thread) })
    }

    /// What QEMU calls it.
    pub fn drive(&self) -> String {
        format!("file=nbd+unix:///?socket={},if=virtio,format=raw,cache=writeback", self.socket.display())
    }

    /// Sectors that a cut at this moment could lose.
    pub fn unflushed(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).cache.len()
    }

    /// After the machine was killed.
    pub fn cut(&self) -> Outcome<Lost> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).cut().map_err(|error| error.to_string())
    }

    /// After the machine has switched itself off: a disk writes back before it stops.
    pub fn settle(&self) -> Outcome {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.settle(|_| true).map_err(|error| error.to_string())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Open until it was read: a greeting that nobody takes would be an error like any other.
        if let (Ok(mut last), Some(listener)) = (UnixStream::connect(&self.socket), self.listener.take())
            && last.write_all(&GOODBYE).is_ok()
        {
            let _ = listener.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Instead of a client's flags: from ourselves.
const GOODBYE: [u8; 4] = *b"END!";
const OPTION: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
/// Of the disk: flags are valid, and flushes understood.
const FLAGS: u16 = 1 | 1 << 2;

enum Ended {
    Closed,
    Told,
}

fn number<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The protocol of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>: fixed newstyle, simple replies.
fn serve(connection: &UnixStream, state: &Mutex<State>) -> io::Result<Ended> {
    let size = state.lock().unwrap_or_else(PoisonError::into_inner).size;
    let (mut from, mut to) =
        (BufReader::with_capacity(1 << 20, connection), BufWriter::with_capacity(1 << 20, connection));
    to.write_all(b"NBDMAGIC")?;
    to.write_all(OPTION)?;
    to.write_all(&3u16.to_be_bytes())?;
    to.flush()?;
    let flags: [u8; 4] = number(&mut from)?;
    if flags == GOODBYE {
        return Ok(Ended::Told);
    }
    loop {
        if number::<8>(&mut from)? != *OPTION {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let option = u32::from_be_bytes(number(&mut from)?);
        let length = u32::from_be_bytes(number(&mut from)?);
        let mut data = vec![0; length.min(LARGEST) as usize];
        from.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| -> io::Result<()> {
            to.write_all(&OPTION_REPLY.to_be_bytes())?;
            to.write_all(&option.to_be_bytes())?;
            to.write_all(&kind.to_be_bytes())?;
            to.write_all(&(data.len() as u32).to_be_bytes())?;
            to.write_all(data)
        };
        match option {
            // EXPORT_NAME
            1 => {
                to.write_all(&size.to_be_bytes())?;
                to.write_all(&FLAGS.to_be_bytes())?;
                if flags[3] & 2 == 0 {
                    to.write_all(&[0; 124])?;
                }
                to.flush()?;
                break;
            }
            // ABORT
            2 => return Ok(Ended::Closed),
            // INFO and GO: the export, its block sizes, and that this is all.
            6 | 7 => {
                let export = [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &FLAGS.to_be_bytes()].concat();
                let blocks =
                    [&3u16.to_be_bytes()[..], &512u32.to_be_bytes(), &4096u32.to_be_bytes(), &LARGEST.to_be_bytes()];
                reply(3, &export)?;
                reply(3, &blocks.concat())?;
                reply(1, &[])?;
                to.flush()?;
                if option == 7 {
                    break;
                }
            }
            // Structured replies and the like: not supported.
            _ => {
                reply(1 << 31 | 1, &[])?;
                to.flush()?;
            }
        }
    }
    loop {
        if u32::from_be_bytes(number(&mut from)?) != REQUEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let _flags: [u8; 2] = number(&mut from)?;
        let kind = u16::from_be_bytes(number(&mut from)?);
        let cookie: [u8; 8] = number(&mut from)?;
        let offset = u64::from_be_bytes(number(&mut from)?);
        let length = u32::from_be_bytes(number(&mut from)?);
        let fits = length <= LARGEST && offset.checked_add(length.into()).is_some_and(|end| end <= size);
        let whole = offset % SECTOR == 0 && u64::from(length) % SECTOR == 0;
        let mut data = Vec::new();
        if kind <= 1 {
            if !fits || !whole {
                return Err(io::ErrorKind::InvalidData.into());
            }
            data.resize(length as usize, 0);
        }
        let done = match kind {
            0 => state.lock().unwrap_or_else(PoisonError::into_inner).read(offset, &mut data),
            1 => {
                from.read_exact(&mut data)?;
                let done = state.lock().unwrap_or_else(PoisonError::into_inner).write(offset, &data);
                data.clear();
                done
            }
            2 => return Ok(Ended::Closed),
            3 => state.lock().unwrap_or_else(PoisonError::into_inner).settle(|_| true),
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        let errno: u32 = match &done {
            Ok(()) => 0,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => 22,
            Err(_) => 5,
        };
        to.write_all(&REPLY.to_be_bytes())?;
        to.write_all(&errno.to_be_bytes())?;
        to.write_all(&cookie)?;
        if done.is_ok() {
            to.write_all(&data)?;
        }
        // Nothing more has come: the machine waits.
        if from.buffer().is_empty() {
            to.flush()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Disk, Random, SECTOR};
    use std::{fs, os::unix::fs::FileExt};

    /// Neither more nor less than what a disk promises.
    #[test]
    fn what_was_flushed_is_kept_and_of_the_rest_some_is_lost() {
        let directory = std::env::temp_dir().join(format!("vm-tests-disk-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("disk.img");
        let (mut gone, mut kept) = (0, 0);
        for seed in 0..20 {
            fs::write(&file, vec![0; 1 << 20]).unwrap();
            let disk = Disk::new(&file, Random::new(seed).below(1 << 30)).unwrap();
            let write = |sector: u64, byte: u8| {
                disk.state.lock().unwrap().write(sector * SECTOR, &[byte; SECTOR as usize]).unwrap();
            };
            (0..64).for_each(|sector| write(sector, 1));
            disk.settle().unwrap();
            (32..96).for_each(|sector| write(sector, 2));
            let mut seen = [0; SECTOR as usize];
            disk.state.lock().unwrap().read(95 * SECTOR, &mut seen).unwrap();
            assert_eq!(seen, [2; SECTOR as usize], "the machine reads what it wrote");
            let lost = disk.cut().unwrap();
            assert_eq!(lost.unflushed, 64);
            let open = fs::File::open(&file).unwrap();
            for sector in 0..96u64 {
                open.read_exact_at(&mut seen, sector * SECTOR).unwrap();
                let before = u8::from(sector < 64);
                assert!(seen.iter().all(|byte| *byte == seen[0]), "sector {sector} is torn");
                assert!(seen[0] == before || (sector >= 32 && seen[0] == 2), "sector {sector} is {}", seen[0]);
            }
            gone += lost.gone;
            kept += lost.unflushed - lost.gone;
        }
        assert!(gone > 200 && kept > 200, "{gone} lost, {kept} kept");
        fs::remove_dir_all(&directory).unwrap();
    }
}
