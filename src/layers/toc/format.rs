//! The records of the flat file. Little-endian and without alignment, so that they are read where they lie.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const MAGIC: [u8; 8] = *b"SOCItoc\n";
/// Changes whenever a file written by an older build must not be read: layout, but also what `build` makes of a zTOC.
pub(super) const VERSION: u32 = 1;

pub(super) const HAS_XATTRS: u32 = 1;
pub(super) const HAS_OPAQUE: u32 = 2;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct Header {
    pub magic: [u8; 8],
    pub version: U32,
    pub flags: U32,
    pub layer: [u8; 32],
    pub nodes: U32,
    pub dirents: U32,
    pub names_len: U32,
    pub links_len: U32,
    pub xattrs_len: U32,
    pub body_crc: U32,
    /// Of all bytes before this field.
    pub header_crc: U32,
}

pub(super) const HEADER_LEN: usize = size_of::<Header>();

/// One file. `a` and `b` by kind: directory: first dirent and count; symlink: place and length of the target; device: rdev.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RawNode {
    pub size: U64,
    pub offset: U64,
    pub mtime: I64,
    pub mtime_nanos: U32,
    pub mode: U32,
    pub uid: U32,
    pub gid: U32,
    pub nlink: U32,
    pub a: U32,
    pub b: U32,
    pub header_len: U32,
    pub parent: U32,
    pub name: U32,
    pub xattrs: U32,
    pub xattr_count: U16,
    pub flags: U16,
}

pub(super) const IMPLIED: u16 = 1;
pub(super) const OPAQUE: u16 = 2;
pub(super) const WHITEOUT: u16 = 4;
pub(super) const RENAMED: u16 = 8;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct Dirent {
    pub name: U32,
    pub node: U32,
}

const _: () = assert!(size_of::<RawNode>() == 72 && size_of::<Dirent>() == 8 && HEADER_LEN == 76);

/// Reads one xattr of a block: one byte length of the name, four bytes length of the value, name, value.
pub(super) fn split_xattr(block: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (&name_len, rest) = block.split_first()?;
    let (value_len, rest) = rest.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(name_len.into())?;
    let (value, rest) = rest.split_at_checked(u32::from_le_bytes(*value_len).try_into().ok()?)?;
    Some((name, value, rest))
}
