//! One 512-byte header block: checksum, dialect, fields.

use super::BLOCK;

/// The fields of a header block, before any helper member is applied.
#[derive(Debug)]
pub struct Header {
    pub flag: u8,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub size: i64,
    pub mode: i64,
    pub uid: i64,
    pub gid: i64,
    pub mtime: i64,
    pub uname: Vec<u8>,
    pub gname: Vec<u8>,
    pub devmajor: i64,
    pub devminor: i64,
}

pub type Block = [u8; BLOCK as usize];

const NUMBER: &str = "not a number";

/// Decodes a block that is not all zeros.
pub fn parse(block: &Block) -> Result<Header, &'static str> {
    check_sum(block)?;
    let mut header = Header {
        flag: block[156],
        name: string(&block[..100]).to_vec(),
        link: string(&block[157..257]).to_vec(),
        size: number(&block[124..136])?,
        mode: number(&block[100..108])?,
        uid: number(&block[108..116])?,
        gid: number(&block[116..124])?,
        mtime: number(&block[136..148])?,
        uname: Vec::new(),
        gname: Vec::new(),
        devmajor: 0,
        devminor: 0,
    };
    let (magic, version, trailer) = (&block[257..263], &block[263..265], &block[508..512]);
    let ustar = magic == b"ustar\0";
    let gnu = magic == b"ustar " && version == b" \0";
    if !ustar && !gnu {
        return Ok(header); // V7
    }
    header.uname = string(&block[265..297]).to_vec();
    header.gname = string(&block[297..329]).to_vec();
    header.devmajor = number(&block[329..337])?;
    header.devminor = number(&block[337..345])?;
    let prefix = if ustar && trailer == b"tar\0" {
        number(&block[476..488])?; // STAR has access and change times here; they must be numbers
        number(&block[488..500])?;
        string(&block[345..476])
    } else if ustar {
        string(&block[345..500])
    } else {
        gnu_prefix(block)
    };
    if !prefix.is_empty() {
        header.name = [prefix, b"/", &header.name].concat();
    }
    Ok(header)
}

/// GNU headers have times where USTAR has the prefix; but Go before 1.8 wrote a prefix there, and Go's reader still
/// understands that.
fn gnu_prefix(block: &Block) -> &[u8] {
    let is_time = |field: &[u8]| field[0] == 0 || number(field).is_ok();
    if is_time(&block[345..357]) && is_time(&block[357..369]) {
        return b"";
    }
    let prefix = string(&block[345..500]);
    if prefix.is_ascii() { prefix } else { b"" }
}

fn check_sum(block: &Block) -> Result<(), &'static str> {
    let stored = octal(&block[148..156]).map_err(|_| "checksum is not a number")?;
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (at, &byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    if stored == unsigned || stored == signed { Ok(()) } else { Err("checksum mismatch") }
}

/// Up to the first NUL.
pub fn string(field: &[u8]) -> &[u8] {
    field.split(|&c| c == 0).next().unwrap_or_default()
}

/// Base-256 when the top bit is set (two's complement, big-endian), else octal.
fn number(field: &[u8]) -> Result<i64, &'static str> {
    let Some(&first) = field.first().filter(|&&c| c & 0x80 != 0) else {
        return octal(field);
    };
    let invert = if first & 0x40 != 0 { 0xff } else { 0 };
    let mut value = 0u64;
    for (at, &byte) in field.iter().enumerate() {
        let byte = if at == 0 { (byte ^ invert) & 0x7f } else { byte ^ invert };
        if value >> 56 > 0 {
            return Err(NUMBER);
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).map_err(|_| NUMBER)?;
    Ok(if invert == 0 { value } else { !value })
}

/// Octal digits between spaces and NULs; nothing at all is 0.
fn octal(field: &[u8]) -> Result<i64, &'static str> {
    let is_fill = |c: &u8| *c == b' ' || *c == 0;
    let Some(start) = field.iter().position(|c| !is_fill(c)) else {
        return Ok(0);
    };
    let end = field.iter().rposition(|c| !is_fill(c)).map_or(start, |last| last + 1);
    string(&field[start..end]).iter().try_fold(0i64, |value, &digit| match digit {
        b'0'..=b'7' => value.checked_mul(8).map(|v| v + i64::from(digit - b'0')).ok_or(NUMBER),
        _ => Err(NUMBER),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b" 644 \0\0"), Ok(0o644));
        assert_eq!(number(b"12\x0034"), Ok(0o12));
        assert_eq!(number(b"\0 \0"), Ok(0));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x2a"), Ok(42));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff"), Ok(-1));
        assert_eq!(number(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"), Ok(i64::MAX));
        for bad in [&b"8"[..], b"6 4", b"-1", b"\x80\0\0\0\x80\0\0\0\0\0\0\0", b"\x80\x01\0\0\0\0\0\0\0\0\0\0"] {
            assert!(number(bad).is_err(), "{bad:?}");
        }
    }
}
