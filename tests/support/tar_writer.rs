//! Writes tars with anything in them, legal or not: for tests that read them.

/// How long names and the like are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// POSIX: a PAX header where the fields are too small.
    Pax,
    /// GNU: `L` and `K` members and base-256 numbers.
    Gnu,
    /// Before all of that; everything is cut to its field.
    V7,
}

/// One member. Fields that the dialect cannot hold become helper members.
#[derive(Debug, Clone)]
pub struct Member {
    pub flag: u8,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u64,
    pub uid: u64,
    pub gid: u64,
    pub uname: Vec<u8>,
    pub gname: Vec<u8>,
    pub mtime: u64,
    pub dev: (u64, u64),
    /// PAX records; with the other dialects they still are written as a PAX header.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
    pub data: Vec<u8>,
    /// Says another size than that of the data.
    pub size: Option<u64>,
}

impl Member {
    pub fn new(flag: u8, name: impl Into<Vec<u8>>) -> Member {
        Member {
            flag,
            name: name.into(),
            link: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            uname: Vec::new(),
            gname: Vec::new(),
            mtime: 1_700_000_000,
            dev: (0, 0),
            records: Vec::new(),
            data: Vec::new(),
            size: None,
        }
    }

    pub fn file(name: impl Into<Vec<u8>>, data: impl Into<Vec<u8>>) -> Member {
        Member { data: data.into(), ..Member::new(b'0', name) }
    }

    pub fn linked(mut self, target: impl Into<Vec<u8>>) -> Member {
        self.link = target.into();
        self
    }

    pub fn record(mut self, key: &str, value: impl Into<Vec<u8>>) -> Member {
        self.records.push((key.into(), value.into()));
        self
    }
}

/// One PAX record, which starts with its own length.
pub fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length.to_string().len() + rest != length {
        length = length.to_string().len() + rest;
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// A tar as it grows.
#[derive(Debug, Clone)]
pub struct TarWriter {
    pub bytes: Vec<u8>,
    dialect: Dialect,
}

impl TarWriter {
    pub fn new(dialect: Dialect) -> TarWriter {
        TarWriter { bytes: Vec::new(), dialect }
    }

    /// A whole tar with its end marker.
    pub fn of(dialect: Dialect, members: &[Member]) -> Vec<u8> {
        let mut tar = TarWriter::new(dialect);
        members.iter().for_each(|member| tar.add(member));
        tar.finish()
    }

    pub fn add(&mut self, member: &Member) {
        let mut records = member.records.clone();
        let mut written = member.clone();
        match self.dialect {
            Dialect::V7 => {}
            Dialect::Gnu => {
                for (flag, text) in [(b'L', &member.name), (b'K', &member.link)] {
                    if text.len() > 100 {
                        let data = [text, &b"\0"[..]].concat();
                        self.plain(&Member { data, ..Member::new(flag, "././@LongLink") });
                    }
                }
            }
            Dialect::Pax => {
                for (key, text, field) in [
                    ("path", &member.name, 100),
                    ("linkpath", &member.link, 100),
                    ("uname", &member.uname, 32),
                    ("gname", &member.gname, 32),
                ] {
                    if text.len() > field {
                        records.push((key.into(), text.clone()));
                    }
                }
                for (key, number, field) in
                    [("uid", &mut written.uid, 0o777_7777), ("gid", &mut written.gid, 0o777_7777)]
                {
                    if *number > field {
                        records.push((key.into(), number.to_string().into()));
                        *number = 0;
                    }
                }
            }
        }
        if !records.is_empty() {
            let data = records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
            self.plain(&Member { data, ..Member::new(b'x', "PaxHeaders/x") });
        }
        self.plain(&written);
    }

    /// One header block and data, as they are.
    pub fn plain(&mut self, member: &Member) {
        let mut block = [0u8; 512];
        let mut text = |at: usize, len: usize, text: &[u8]| {
            let len = len.min(text.len());
            block[at..at + len].copy_from_slice(&text[..len]);
        };
        text(0, 100, &member.name);
        text(157, 100, &member.link);
        if self.dialect != Dialect::V7 {
            text(257, 8, if self.dialect == Dialect::Gnu { b"ustar  \0" } else { b"ustar\x0000" });
            text(265, 32, &member.uname);
            text(297, 32, &member.gname);
            number(&mut block[329..337], member.dev.0);
            number(&mut block[337..345], member.dev.1);
        }
        block[156] = member.flag;
        number(&mut block[100..108], member.mode);
        number(&mut block[108..116], member.uid);
        number(&mut block[116..124], member.gid);
        number(&mut block[124..136], member.size.unwrap_or(member.data.len() as u64));
        number(&mut block[136..148], member.mtime);
        self.block(block);
        self.bytes.extend_from_slice(&member.data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    /// A header block, its checksum filled in.
    pub fn block(&mut self, mut block: [u8; 512]) {
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|&byte| u64::from(byte)).sum();
        number(&mut block[148..156], sum);
        self.bytes.extend_from_slice(&block);
    }

    /// Two zero blocks, padded to GNU's record size.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 1024]);
        self.bytes.resize(self.bytes.len().next_multiple_of(10_240), 0);
        self.bytes
    }
}

/// Octal with a NUL, or base-256 when it does not fit.
fn number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    if value < 1 << (3 * digits) {
        field[..digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
    } else {
        let start = field.len() - 8;
        field[start..].copy_from_slice(&value.to_be_bytes());
        field[0] |= 0x80;
    }
}
