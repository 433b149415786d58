//! Writing zTOCs: the order of everything is that of the Go builder, so that equal layers give equal digests.

use super::{
    Compression, VERSION,
    flatbuf::{Builder, Offset, TooLarge},
    listing::{Row, Rows, Texts},
    time,
};
use crate::oci::Digest;

/// What a zTOC consists of.
pub struct Parts {
    pub compression: Compression,
    pub build_tool: String,
    pub compressed_size: u64,
    pub uncompressed_size: u64,
    pub rows: Rows,
    pub zinfo: Vec<u8>,
    pub digests: Vec<Digest>,
}

/// Uses up the parts as it goes, so that memory holds little more than the result.
pub fn serialise(mut parts: Parts) -> Result<Vec<u8>, TooLarge> {
    let mut out = Builder::new();
    let version = out.string(VERSION.as_bytes());
    let build_tool = out.string(parts.build_tool.as_bytes());

    let mut files = Vec::with_capacity(parts.rows.len());
    while let Some(file) = parts.rows.pop(|row, texts| file(&mut out, row, texts)) {
        files.push(file);
        out.check()?;
    }
    drop(parts.rows);
    let metadata = out.offsets(&files);
    drop(files);
    out.start_table();
    out.offset(0, metadata);
    let toc = out.end_table();

    let checkpoints = out.byte_vector(parts.zinfo);
    let mut digests: Vec<Offset> = Vec::with_capacity(parts.digests.len());
    for digest in &parts.digests {
        digests.push(out.string(digest.to_string().as_bytes()));
    }
    digests.reverse();
    let span_digests = out.offsets(&digests);
    out.check()?;
    out.start_table();
    // There are none in an empty uncompressed layer, whose largest span id is -1.
    out.u32(1, (digests.len() as u32).wrapping_sub(1));
    out.offset(2, span_digests);
    out.offset(3, checkpoints);
    let algorithm: i8 = match parts.compression {
        Compression::Gzip => 1,
        Compression::Uncompressed => 2,
    };
    out.scalar(0, algorithm.to_le_bytes(), 1i8.to_le_bytes());
    let compression_info = out.end_table();

    out.start_table();
    out.offset(0, version);
    out.offset(1, build_tool);
    out.offset(4, toc);
    out.i64(2, parts.compressed_size.cast_signed());
    out.i64(3, parts.uncompressed_size.cast_signed());
    out.offset(5, compression_info);
    let root = out.end_table();
    out.finish(root)
}

fn file(out: &mut Builder, row: &Row, texts: &Texts<'_>) -> Offset {
    let name = out.string(texts.name);
    let kind = out.string(row.kind.as_str().as_bytes());
    let link = out.string(texts.link);
    let uname = out.string(texts.uname);
    let gname = out.string(texts.gname);
    let mtime = out.string(time::format(row.mtime).as_bytes());
    let mut records = Vec::with_capacity(texts.records.len());
    for (key, value) in &texts.records {
        let key = out.string(key);
        let value = out.string(value);
        out.start_table();
        out.offset(0, key);
        out.offset(1, value);
        records.push(out.end_table());
    }
    records.reverse();
    let records = out.offsets(&records);
    out.start_table();
    out.offset(0, name);
    out.offset(1, kind);
    out.i64(2, row.offset.cast_signed());
    out.i64(3, row.size.cast_signed());
    out.offset(4, link);
    out.i64(5, row.mode);
    out.u32(6, row.uid);
    out.u32(7, row.gid);
    out.offset(8, uname);
    out.offset(9, gname);
    out.offset(10, mtime);
    out.i64(11, row.devmajor);
    out.i64(12, row.devminor);
    out.offset(13, records);
    out.end_table()
}
