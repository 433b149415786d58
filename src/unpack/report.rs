//! How a worker ended, as a fixed-size message.
//!
//! ```text
//! status u8 | refusal u8 | length of detail u8 | zero u8 | errno u32 | bytes u64 | inodes u64 | detail [u8; 200]      224 bytes, little endian
//! ```

use super::{Budget, Detail, Refusal, Stopped};

/// What was unpacked, or why it ended early.
pub type Report = Result<Budget, Stopped>;

/// Length of a report on the wire.
pub const LEN: usize = 24 + Detail::MAX;

/// As bytes.
pub fn encode(report: &Report) -> [u8; LEN] {
    let mut out = [0; LEN];
    let detail = match report {
        Ok(used) => {
            out[8..16].copy_from_slice(&used.bytes.to_le_bytes());
            out[16..24].copy_from_slice(&used.inodes.to_le_bytes());
            return out;
        }
        Err(Stopped::Refused { why, detail }) => {
            out[..2].copy_from_slice(&[1, why.code()]);
            detail
        }
        Err(Stopped::Failed { errno, detail }) => {
            out[0] = 2;
            out[4..8].copy_from_slice(&errno.to_le_bytes());
            detail
        }
    };
    let text = detail.as_bytes();
    out[2] = u8::try_from(text.len()).unwrap_or(0);
    out[24..24 + text.len()].copy_from_slice(text);
    out
}

/// Total: `None` for bytes that `encode` would not have written.
pub fn decode(bytes: &[u8]) -> Option<Report> {
    let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let detail = Detail::new(bytes.get(24..24 + usize::from(*bytes.get(2)?))?);
    let report = match bytes.first()? {
        0 => Ok(Budget { bytes: word(8)?, inodes: word(16)? }),
        1 => Err(Stopped::Refused { why: Refusal::from_code(*bytes.get(1)?)?, detail }),
        2 => Err(Stopped::Failed { errno: i32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?), detail }),
        _ => return None,
    };
    (encode(&report)[..] == *bytes).then_some(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn proptest_every_byte_string_is_a_report_or_none(bytes in prop::collection::vec(any::<u8>(), 0..LEN + 8)) {
            if let Some(report) = decode(&bytes) {
                prop_assert_eq!(&encode(&report)[..], &bytes[..]);
            }
        }

        #[test]
        fn proptest_reports_survive_the_journey(
            bytes: u64, inodes: u64, errno: i32, code in 0..Refusal::ALL.len(), text in prop::collection::vec(any::<u8>(), 0..300), which in 0..3,
        ) {
            let detail = Detail::new(&text);
            let report = match which {
                0 => Ok(Budget { bytes, inodes }),
                1 => Err(Stopped::Refused { why: Refusal::ALL[code], detail }),
                _ => Err(Stopped::Failed { errno, detail }),
            };
            prop_assert_eq!(decode(&encode(&report)), Some(report));
        }
    }
}
