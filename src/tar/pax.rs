//! PAX records: `<length> <key>=<value>\n`, with the checks of Go's reader.

use std::collections::BTreeMap;

/// PAX records by key, in byte order. Values may hold NUL and anything else.
pub type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// Keys of extended attributes start with this; the rest is the attribute's name. `LIBARCHIVE.xattr.` is ignored.
pub const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

const SPARSE_OFFSET: &[u8] = b"GNU.sparse.offset";
const SPARSE_BYTES: &[u8] = b"GNU.sparse.numbytes";
const SPARSE_MAP: &[u8] = b"GNU.sparse.map";
const SPARSE_MAJOR: &[u8] = b"GNU.sparse.major";
const SPARSE_MINOR: &[u8] = b"GNU.sparse.minor";

/// The records of one `x` or `g` member. A later record replaces an earlier one of the same key.
pub fn parse(mut data: &[u8]) -> Result<Records, &'static str> {
    let mut records = Records::new();
    let mut sparse: Vec<&[u8]> = Vec::new();
    while !data.is_empty() {
        let (key, value, rest) = record(data)?;
        data = rest;
        if key == SPARSE_OFFSET || key == SPARSE_BYTES {
            // Version 0.0 repeats two keys; readers keep them as one record of version 0.1.
            let expected = if sparse.len().is_multiple_of(2) { SPARSE_OFFSET } else { SPARSE_BYTES };
            if key != expected || value.contains(&b',') {
                return Err("malformed sparse map in a PAX header");
            }
            sparse.push(value);
        } else {
            records.insert(key.to_vec(), value.to_vec());
        }
    }
    if !sparse.is_empty() {
        records.insert(SPARSE_MAP.to_vec(), sparse.join(&b','));
    }
    Ok(records)
}

/// Key, value, and the data after them.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

fn record(data: &[u8]) -> Result<Record<'_>, &'static str> {
    const BAD: &str = "malformed PAX record";
    let space = data.iter().position(|&c| c == b' ').ok_or(BAD)?;
    let (digits, rest) = (&data[..space], &data[space + 1..]);
    let length = integer(digits).filter(|&n| n >= 5).and_then(|n| usize::try_from(n).ok()).ok_or(BAD)?;
    if length > data.len() || length <= space + 1 {
        return Err(BAD);
    }
    let (line, rest) = rest.split_at(length - space - 1);
    let line = line.strip_suffix(b"\n").ok_or(BAD)?;
    let equals = line.iter().position(|&c| c == b'=').ok_or(BAD)?;
    let (key, value) = (&line[..equals], &line[equals + 1..]);
    let has_nul = match key {
        b"" => return Err(BAD),
        b"path" | b"linkpath" | b"uname" | b"gname" => value.contains(&0),
        _ => key.contains(&0),
    };
    if has_nul { Err("NUL in a PAX record") } else { Ok((key, value, rest)) }
}

/// A decimal number as Go's `ParseInt(s, 10, 64)` reads it: sign allowed, nothing else.
pub fn integer(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Decimal seconds with up to nine digits of fraction; more are cut off. The sign also holds for the fraction.
pub fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (whole, fraction) = match text.iter().position(|&c| c == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &[][..]),
    };
    let seconds = integer(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0u32, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    if whole.starts_with(b"-") && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

/// Whether records with these keys and values make a member sparse, in the eyes of Go's reader (PAX 0.0, 0.1, 1.0).
pub fn is_sparse<'a>(records: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> bool {
    let (mut major, mut minor, mut map) = (&b""[..], &b""[..], &b""[..]);
    for (key, value) in records {
        match key {
            SPARSE_MAJOR => major = value,
            SPARSE_MINOR => minor = value,
            SPARSE_MAP => map = value,
            _ => {}
        }
    }
    match (major, minor) {
        (b"0", b"0" | b"1") | (b"1", b"0") => true,
        (b"", b"") => !map.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_round_down_like_go() {
        assert_eq!(time(b"1700000000.25"), Some((1_700_000_000, 250_000_000)));
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time(b"-0.5"), Some((-1, 500_000_000)));
        assert_eq!(time(b"7.1234567899"), Some((7, 123_456_789)));
        assert_eq!(time(b"7."), Some((7, 0)));
        for bad in [&b""[..], b".5", b"1.x", b"1_0", b"0x1", b"9223372036854775808"] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        assert_eq!(parse(b"6 a=b\n").unwrap().get(&b"a"[..]), Some(&b"b".to_vec()));
        assert_eq!(parse(b"8 a=b\0c\n").unwrap().len(), 1, "NUL in an ordinary value is legal");
        for bad in [
            &b"6 a=b"[..],
            b"7 a=b\n",
            b"6 ab\n\n",
            b"5 =b\n",
            b"x a=b\n",
            b"6a=b\n",
            b"4 a\n",
            b"-6 a=b\n",
            b"2 ",
            b"11 path=a\0\n",
            b"11 a\0b=cdef\n",
            b"99999999999999999999 a=b\n",
        ] {
            assert!(parse(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn sparse_version_0_0_becomes_one_map() {
        // Lengths are part of the record, so build them rather than count them.
        let line = |body: &str| {
            let mut length = body.len() + 3;
            if length.to_string().len() + body.len() + 2 > length {
                length += 1;
            }
            format!("{length} {body}\n").into_bytes()
        };
        let good = [line("GNU.sparse.offset=1"), line("GNU.sparse.numbytes=2")].concat();
        let records = parse(&good).unwrap();
        assert_eq!(records.get(SPARSE_MAP), Some(&b"1,2".to_vec()));
        assert!(is_sparse(records.iter().map(|(k, v)| (k.as_slice(), v.as_slice()))));
        assert!(parse(&line("GNU.sparse.numbytes=2")).is_err());
        assert!(parse(&line("GNU.sparse.offset=1,2")).is_err());
    }
}
