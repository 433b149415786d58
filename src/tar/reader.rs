//! The push reader: bytes in, entries out, one state machine.
//!
//! ```text
//!   Header ──x,g,L,K──▶ Helper ──complete──▶ Skip ──▶ Header
//!     │ └───── other ── entry ─────────────▶ Skip ──▶ Header
//!     └── zero block ─▶ LastZero ── zero block ─▶ Ended
//! ```

use super::{BLOCK, Entry, Kind, MAX_HELPER, Records, TarError, header, pax};

/// Reads a tar that arrives in pieces of any size.
#[derive(Debug)]
pub struct Reader {
    state: State,
    block: header::Block,
    filled: usize,
    position: u64,
    records: Records,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
    global_headers: u64,
}

#[derive(Debug)]
enum State {
    /// Collecting a header block.
    Header,
    /// One zero block was seen.
    LastZero,
    /// Collecting the data of a helper member.
    Helper { flag: u8, left: u64, pad: u64, data: Vec<u8> },
    /// Passing over contents, then padding.
    Skip { data: u64, pad: u64 },
    /// After the end marker: whatever follows is not ours.
    Ended,
}

impl Default for Reader {
    fn default() -> Reader {
        Reader::new()
    }
}

impl Reader {
    /// At the start of an archive.
    pub fn new() -> Reader {
        Reader {
            state: State::Header,
            block: [0; BLOCK as usize],
            filled: 0,
            position: 0,
            records: Records::new(),
            long_name: Vec::new(),
            long_link: Vec::new(),
            global_headers: 0,
        }
    }

    /// Takes bytes from the front of `input` up to the end of the next entry's headers. `None`: all were taken.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<Entry>, TarError> {
        while !input.is_empty() {
            match &mut self.state {
                State::Ended => *input = &[],
                State::Skip { data, pad } => {
                    let from_data = take(input, data);
                    let from_pad = if *data == 0 { take(input, pad) } else { 0 };
                    self.position += from_data + from_pad;
                    if *data == 0 && *pad == 0 {
                        self.state = State::Header;
                    }
                }
                State::Helper { left, data, .. } => {
                    let bytes = *input;
                    let taken = take(input, left);
                    data.extend_from_slice(&bytes[..bytes.len() - input.len()]);
                    self.position += taken;
                    if *left == 0 {
                        self.end_helper()?;
                    }
                }
                State::Header | State::LastZero => {
                    let wanted = self.block.len() - self.filled;
                    let (bytes, rest) = input.split_at(wanted.min(input.len()));
                    self.block[self.filled..self.filled + bytes.len()].copy_from_slice(bytes);
                    self.filled += bytes.len();
                    self.position += bytes.len() as u64;
                    *input = rest;
                    if self.filled == self.block.len() {
                        self.filled = 0;
                        if let Some(entry) = self.end_block()? {
                            return Ok(Some(entry));
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// The input has ended: how much of it the archive takes, its end marker included.
    pub fn finish(&self) -> Result<u64, TarError> {
        match &self.state {
            State::Header | State::LastZero if self.filled > 0 => Err(TarError::Truncated("a header")),
            State::Helper { .. } => Err(TarError::Truncated("a helper entry")),
            State::Skip { data, .. } if *data > 0 => Err(TarError::Truncated("the data of an entry")),
            // Missing padding and missing end markers are usual.
            State::Header | State::LastZero | State::Skip { .. } | State::Ended => Ok(self.position),
        }
    }

    /// Passes over `count` bytes of the current entry's content that were taken from the input by somebody else.
    pub fn pass(&mut self, count: u64) {
        if let State::Skip { data, pad } = &mut self.state {
            let count = count.min(*data);
            *data -= count;
            self.position += count;
            if *data == 0 && *pad == 0 {
                self.state = State::Header;
            }
        }
    }

    /// How many PAX global headers were passed over.
    pub fn global_headers(&self) -> u64 {
        self.global_headers
    }

    fn end_block(&mut self) -> Result<Option<Entry>, TarError> {
        let offset = self.position - BLOCK;
        let invalid = |problem| TarError::Header { offset, problem };
        let is_zero = self.block.iter().all(|&c| c == 0);
        match (&self.state, is_zero) {
            (State::LastZero, true) => self.state = State::Ended,
            (State::LastZero, false) => return Err(invalid("a zero block in the middle of the archive")),
            (_, true) => self.state = State::LastZero,
            (_, false) => {
                let header = header::parse(&self.block).map_err(invalid)?;
                return self.begin_member(header, offset);
            }
        }
        Ok(None)
    }

    fn begin_member(&mut self, header: header::Header, offset: u64) -> Result<Option<Entry>, TarError> {
        let invalid = |problem| TarError::Header { offset, problem };
        if header.size < 0 {
            return Err(invalid("negative size"));
        }
        if let flag @ (b'x' | b'g' | b'L' | b'K') = header.flag {
            let size = header.size.cast_unsigned();
            if size > MAX_HELPER {
                return Err(invalid("helper entry over 1 MiB"));
            }
            self.state = State::Helper { flag, left: size, pad: padding(size), data: Vec::new() };
            if size == 0 {
                self.end_helper()?;
            }
            return Ok(None);
        }
        let entry = self.entry(header, offset)?;
        let data = if entry.kind.has_content() { entry.size } else { 0 };
        self.skip(data, padding(data));
        Ok(Some(entry))
    }

    /// Applies the helpers collected so far, in Go's order: PAX, then GNU long names over it.
    fn entry(&mut self, header: header::Header, offset: u64) -> Result<Entry, TarError> {
        let invalid = |problem| TarError::Header { offset, problem };
        let mut entry = Entry {
            name: header.name,
            kind: Kind::Regular,
            link: header.link,
            size: 0,
            mode: header.mode,
            uid: header.uid,
            gid: header.gid,
            uname: header.uname,
            gname: header.gname,
            mtime: (header.mtime, 0),
            devmajor: header.devmajor,
            devminor: header.devminor,
            records: std::mem::take(&mut self.records),
            offset: self.position,
        };
        let mut size = header.size;
        for (key, value) in entry.records.iter().filter(|(_, value)| !value.is_empty()) {
            let number = || pax::integer(value).ok_or(invalid("a PAX number does not parse"));
            let time = || pax::time(value).ok_or(invalid("a PAX time does not parse"));
            match key.as_slice() {
                b"path" => entry.name.clone_from(value),
                b"linkpath" => entry.link.clone_from(value),
                b"uname" => entry.uname.clone_from(value),
                b"gname" => entry.gname.clone_from(value),
                b"uid" => entry.uid = number()?,
                b"gid" => entry.gid = number()?,
                b"size" => size = number()?,
                b"mtime" => entry.mtime = time()?,
                b"atime" | b"ctime" => drop(time()?),
                _ => {}
            }
        }
        for (long, field) in [(&mut self.long_name, &mut entry.name), (&mut self.long_link, &mut entry.link)] {
            if !long.is_empty() {
                *field = std::mem::take(long);
            }
        }
        entry.kind = match header.flag {
            0 if entry.name.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' => Kind::Regular,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(TarError::Sparse { offset }),
            flag => return Err(TarError::Unsupported { offset, flag }),
        };
        entry.size = u64::try_from(size).map_err(|_| invalid("negative size"))?;
        if pax::is_sparse(entry.records.iter().map(|(key, value)| (key.as_slice(), value.as_slice()))) {
            return Err(TarError::Sparse { offset });
        }
        Ok(entry)
    }

    fn end_helper(&mut self) -> Result<(), TarError> {
        let State::Helper { flag, pad, data, .. } = std::mem::replace(&mut self.state, State::Header) else {
            return Ok(());
        };
        let offset = self.position;
        let records = || pax::parse(&data).map_err(|problem| TarError::Header { offset, problem });
        match flag {
            b'x' => self.records = records()?,
            b'g' => {
                records()?; // containerd could not unpack a malformed one either
                self.global_headers += 1;
            }
            b'L' => self.long_name = header::string(&data).to_vec(),
            _ => self.long_link = header::string(&data).to_vec(),
        }
        self.skip(0, pad);
        Ok(())
    }

    fn skip(&mut self, data: u64, pad: u64) {
        self.state = if data == 0 && pad == 0 { State::Header } else { State::Skip { data, pad } };
    }
}

/// Takes up to `left` bytes from the front of `input`, and from `left`.
fn take(input: &mut &[u8], left: &mut u64) -> u64 {
    let count = usize::try_from(*left).map_or(input.len(), |left| left.min(input.len()));
    *input = &input[count..];
    *left -= count as u64;
    count as u64
}

/// Bytes from the end of `size` bytes of data to the next block.
fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK
}
