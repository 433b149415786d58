//! The gzip wrapper: member headers and trailers (RFC 1952), as strict as the stricter of zlib and Go's reader.
#![forbid(unsafe_code)]

/// CRC32 and length after the DEFLATE data of a member.
pub const TRAILER: usize = 8;

/// The largest header that Go's reader accepts: fixed part, extra field, name, comment, checksum.
pub const MAX_HEADER: usize = 10 + (2 + 65535) + 2 * MAX_TEXT + 2;

/// Go's limit for file name and comment, their NUL included.
const MAX_TEXT: usize = 512;

const HAS_CRC: u8 = 2;
const HAS_EXTRA: u8 = 4;
const HAS_NAME: u8 = 8;
const HAS_COMMENT: u8 = 16;
const RESERVED: u8 = 0xe0;

/// Why bytes are not a gzip header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// No gzip magic: another format, or garbage after the last member.
    #[error("no gzip header")]
    Magic,
    /// Compression method or flags from the future.
    #[error("unknown gzip method or flags")]
    Unknown,
    /// A name or comment that Go's reader refuses.
    #[error("a text of the gzip header is over 511 bytes")]
    TextTooLong,
    /// The checksum of the header itself.
    #[error("gzip header checksum mismatch")]
    Checksum,
}

/// The length of the member header that `bytes` start with; `None` when more bytes are needed to tell.
pub fn header_len(bytes: &[u8]) -> Result<Option<usize>, HeaderError> {
    if !bytes.iter().zip([0x1f, 0x8b]).all(|(a, b)| *a == b) {
        return Err(HeaderError::Magic);
    }
    let Some(&[_, _, method, flags, ..]) = bytes.get(..10) else {
        return Ok(None);
    };
    if method != 8 || flags & RESERVED != 0 {
        return Err(HeaderError::Unknown);
    }
    let mut at = 10;
    if flags & HAS_EXTRA != 0 {
        let Some(&[low, high]) = bytes.get(at..at + 2) else {
            return Ok(None);
        };
        at += 2 + usize::from(u16::from_le_bytes([low, high]));
    }
    for text in [HAS_NAME, HAS_COMMENT] {
        if flags & text != 0 {
            let rest = bytes.get(at..).unwrap_or_default();
            match rest.iter().take(MAX_TEXT).position(|&c| c == 0) {
                Some(end) => at += end + 1,
                None if rest.len() >= MAX_TEXT => return Err(HeaderError::TextTooLong),
                None => return Ok(None),
            }
        }
    }
    if flags & HAS_CRC != 0 {
        let Some(&[low, high]) = bytes.get(at..at + 2) else {
            return Ok(None);
        };
        if crc32fast::hash(&bytes[..at]) & 0xffff != u32::from(u16::from_le_bytes([low, high])) {
            return Err(HeaderError::Checksum);
        }
        at += 2;
    }
    Ok((at <= bytes.len()).then_some(at))
}

/// CRC32 of a member's uncompressed bytes, and their number modulo 2^32.
pub fn trailer(bytes: [u8; TRAILER]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = bytes;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, rest: &[u8]) -> Vec<u8> {
        [&[0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 3], rest].concat()
    }

    #[test]
    fn every_prefix_of_a_header_asks_for_more_bytes() {
        let mut full = header(HAS_CRC | HAS_EXTRA | HAS_NAME | HAS_COMMENT, b"\x03\0abcname\0comment\0");
        let crc = crc32fast::hash(&full).to_le_bytes();
        full.extend_from_slice(&crc[..2]);
        for end in 0..full.len() {
            assert_eq!(header_len(&full[..end]), Ok(None), "{end}");
        }
        assert_eq!(header_len(&full), Ok(Some(full.len())));
        assert_eq!(header_len(&[&full[..], b"data"].concat()), Ok(Some(full.len())));
        *full.last_mut().unwrap() ^= 1;
        assert_eq!(header_len(&full), Err(HeaderError::Checksum));
    }

    #[test]
    fn what_zlib_or_go_refuse_is_refused() {
        assert_eq!(header_len(b"\x78\x9c"), Err(HeaderError::Magic));
        assert_eq!(header_len(b"\0"), Err(HeaderError::Magic));
        assert_eq!(header_len(&header(0x20, b"")), Err(HeaderError::Unknown));
        assert_eq!(header_len(&header(HAS_NAME, &[b'a'; 512])), Err(HeaderError::TextTooLong));
        let longest = [&[b'a'; 511][..], &[0]].concat();
        assert_eq!(header_len(&header(HAS_NAME, &longest)), Ok(Some(522)));
    }
}
