//! Compares a file's tar header, as the layer has it, with what the index says about the file.
//!
//! The digests of spans come from the index too, so an index could describe one file with the place of another one's bytes;
//! this finds it at the first read of the file.

use crate::layers::toc::{self, Node, Toc};
use crate::tar::{self, Kind, TarError};

/// The first thing in which header and index differ.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderMismatch {
    #[error("the tar header cannot be read")]
    Unreadable(#[source] TarError),
    #[error("the tar header differs from the index in: {0}")]
    Field(&'static str),
}

/// How a zTOC without a time for a file reads: 0001-01-01. Its builder met a year that the format has no text for.
const NO_TIME: i64 = -62_135_596_800;

/// Compares `region`, the bytes before the content of `node`, with the TOC.
pub(super) fn compare(toc: &Toc, node: &Node, region: &[u8]) -> Result<(), HeaderMismatch> {
    let entry = tar::parse_entry(region).map_err(HeaderMismatch::Unreadable)?;
    let mut components = Vec::new();
    toc::clean(&entry.name, &mut components);
    // zTOCs keep the low 32 bits of these.
    let low = |value: i64| value as u32;
    let checks = [
        ("type", entry.kind == Kind::Regular),
        ("name", node.renamed || components.join(&b'/') == toc.path(node.index)),
        ("size", entry.size == node.size),
        ("mode", low(entry.mode) & 0o7777 == node.mode & 0o7777),
        ("uid", low(entry.uid) == node.uid),
        ("gid", low(entry.gid) == node.gid),
        ("mtime", entry.mtime == node.mtime || node.mtime.0 == NO_TIME),
        ("xattrs", entry.xattrs().filter(|(name, _)| toc::is_served(name)).eq(toc.xattrs(node.index))),
    ];
    match checks.iter().find(|(_, equal)| !equal) {
        Some((field, _)) => Err(HeaderMismatch::Field(field)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::toc::{Entry, EntryKind, build_entries};
    use crate::oci::Digest;

    fn region(name: &str, change: impl FnOnce(&mut [u8; 512])) -> [u8; 512] {
        let mut block = [0; 512];
        let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, "0000755");
        put(108, "0000001");
        put(116, "0000002");
        put(124, "00000000012");
        put(136, "00000000100");
        put(156, "0");
        put(257, "ustar\x0000");
        change(&mut block);
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn outcome(name: &str, change: impl FnOnce(&mut [u8; 512])) -> Result<(), HeaderMismatch> {
        let entry = Entry {
            name: b"usr/bin/tool",
            kind: EntryKind::Regular,
            offset: 512,
            header: 0,
            size: 10,
            link: b"",
            mode: 0o100755,
            uid: 1,
            gid: 2,
            mtime: (64, 0),
            devmajor: 0,
            devminor: 0,
            xattrs: Vec::new(),
        };
        let layer = Digest::of(b"layer");
        let toc = Toc::from_bytes(build_entries(&layer, 1, [entry]).unwrap(), &layer).unwrap();
        let node = toc.node(toc.resolve(b"usr/bin/tool").unwrap()).unwrap();
        compare(&toc, &node, &region(name, change))
    }

    #[test]
    fn a_header_that_says_the_same_passes_however_its_name_is_written() {
        for name in ["usr/bin/tool", "./usr/bin/tool", "/usr//bin/../bin/tool"] {
            assert_eq!(outcome(name, |_| {}), Ok(()));
        }
    }

    #[test]
    fn any_difference_is_named() {
        let field = |outcome: Result<(), HeaderMismatch>| match outcome {
            Err(HeaderMismatch::Field(field)) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(outcome("usr/bin/other", |_| {})), "name");
        assert_eq!(field(outcome("usr/bin/tool", |block| block[134] = b'3')), "size");
        assert_eq!(field(outcome("usr/bin/tool", |block| block[106] = b'4')), "mode");
        assert_eq!(field(outcome("usr/bin/tool", |block| block[114] = b'7')), "uid");
        assert_eq!(field(outcome("usr/bin/tool", |block| block[122] = b'7')), "gid");
        assert_eq!(field(outcome("usr/bin/tool", |block| block[146] = b'1')), "mtime");
        assert_eq!(field(outcome("usr/bin/tool", |block| block[156] = b'5')), "type");
        let garbage = outcome("usr/bin/tool", |block| block[100..108].fill(0xfe));
        assert!(garbage.is_err());
    }
}
