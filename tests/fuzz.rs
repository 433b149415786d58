//! Fuzz targets on stable Rust: bolero's own engine runs each for a moment in `cargo test`, and `cargo bolero` for as long
//! as one likes. They state what must hold for any bytes, beyond not panicking.

use bolero::check;
use soci::{
    inflate, tar,
    ztoc::{BuildOptions, Compression, Limits, Ztoc, build},
};
use std::time::Duration;

/// Of each target in an ordinary test run.
const MOMENT: Duration = Duration::from_secs(2);

fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    field[..digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
}

fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum = block.iter().map(|&byte| u64::from(byte)).sum();
    octal(&mut block[148..156], sum);
}

/// A small tar with a PAX header, a file and a link.
fn small_tar() -> Vec<u8> {
    let mut tar = Vec::new();
    let records = b"30 mtime=1350244992.023960108\n27 SCHILY.xattr.user.k=val\n";
    for (flag, name, data) in [(b'x', "x", &records[..]), (b'0', "file", &[b'd'; 700][..]), (b'2', "link", b"")] {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[156] = flag;
        block[257..265].copy_from_slice(b"ustar\x0000");
        octal(&mut block[124..136], data.len() as u64);
        seal(&mut block);
        tar.extend_from_slice(&block);
        tar.extend_from_slice(data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.extend_from_slice(&[0; 1024]);
    tar
}

fn small_gzip() -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    for piece in small_tar().chunks(300) {
        encoder.write_all(piece).unwrap();
        encoder.flush().unwrap();
    }
    encoder.finish().unwrap()
}

/// What [`Ztoc::parse`] promises, checked on whatever it accepts.
fn check_ztoc(bytes: &[u8], layer: &[u8]) {
    let Ok(ztoc) = Ztoc::parse(bytes, &Limits::default()) else {
        return;
    };
    let table = ztoc.spans();
    let mut previous: Option<&soci::ztoc::Span> = None;
    for span in &table.spans {
        assert!(span.compressed.start < span.compressed.end && span.compressed.end <= table.compressed_size);
        assert!(span.uncompressed.start <= span.uncompressed.end && span.bits <= 7);
        assert!(bytes.get(span.window.clone()).is_some_and(|window| window.len() <= inflate::WINDOW));
        if let Some(previous) = previous {
            assert_eq!(previous.uncompressed.end, span.uncompressed.start);
            assert!(span.compressed.start <= previous.compressed.end && span.compressed.end > previous.compressed.end);
        }
        previous = Some(span);
        let range = span.compressed.start as usize..span.compressed.end as usize;
        if let (Compression::Gzip, Some(compressed)) = (table.compression, layer.get(range)) {
            let len = (span.uncompressed.end - span.uncompressed.start) as usize; // bounded by what DEFLATE can do
            let mut out = vec![0; len];
            drop(inflate::inflate_span(span.bits, &bytes[span.window.clone()], compressed, 0, &mut out));
        }
    }
    let (mut count, mut end) = (0, 0);
    for file in ztoc.files() {
        assert!(file.header >= end && file.offset >= file.header + 512);
        end = file.content().end;
        assert!(end <= table.uncompressed_size);
        for index in table.spans_of(file.content()) {
            assert!(index < table.spans.len());
        }
        assert!(file.xattrs().count() <= file.pax_records().count());
        count += 1;
    }
    assert_eq!(count, ztoc.file_count());
}

#[test]
fn fuzz_a_ztoc_of_any_bytes() {
    check!().with_test_time(MOMENT).for_each(|bytes| check_ztoc(bytes, &[]));
}

#[test]
fn fuzz_a_ztoc_with_some_bytes_changed() {
    let options = BuildOptions { span_size: 500, ..BuildOptions::default() };
    let tar = small_tar();
    let gzip = small_gzip();
    let of_tar = build(&tar[..], Compression::Uncompressed, &options).unwrap().bytes;
    let of_gzip = build(&gzip[..], Compression::Gzip, &options).unwrap().bytes;
    check_ztoc(&of_tar, &tar);
    check_ztoc(&of_gzip, &gzip);
    check!().with_test_time(MOMENT).with_type::<Vec<(u32, u8)>>().for_each(|changes| {
        for (ztoc, layer) in [(&of_tar, &tar), (&of_gzip, &gzip)] {
            let mut ztoc = ztoc.clone();
            // Windows are most of the bytes and mean nothing to the parser: aim at both ends.
            for &(at, value) in changes.iter().take(8) {
                let (at, len) = (at as usize, ztoc.len());
                let at = if at.is_multiple_of(2) { at % len.min(1200) } else { len - 1 - at % len.min(1200) };
                ztoc[at] = value;
            }
            check_ztoc(&ztoc, layer);
        }
    });
}

#[test]
fn fuzz_a_zinfo_inside_a_good_ztoc() {
    let options = BuildOptions { span_size: 500, ..BuildOptions::default() };
    let layer = small_gzip();
    let good = build(&layer[..], Compression::Gzip, &options).unwrap().bytes;
    // The zinfo starts with the number of checkpoints and the span size.
    let spans = Ztoc::parse(&good, &Limits::default()).unwrap().into_spans();
    let mut start = (spans.spans.len() as u32).to_le_bytes().to_vec();
    start.extend_from_slice(&500u64.to_le_bytes());
    let blob = good.windows(start.len()).position(|window| window == start).unwrap();
    check!().with_test_time(MOMENT).with_type::<(u8, u8, i64, bool)>().for_each(|&(point, field, value, relative)| {
        let mut ztoc = good.clone();
        let at = blob + 12 + (usize::from(point) % spans.spans.len()) * 32_785;
        let at = at + [0, 8, 16][usize::from(field) % 3];
        let old = i64::from_le_bytes(ztoc[at..at + 8].try_into().unwrap());
        let value = if relative { old.wrapping_add(value % 9) } else { value };
        ztoc[at..at + 8].copy_from_slice(&value.to_le_bytes());
        check_ztoc(&ztoc, &layer);
    });
}

#[test]
fn fuzz_a_tar_of_any_blocks() {
    let good = small_tar();
    check!().with_test_time(MOMENT).with_type::<(Vec<(u16, u8)>, bool, u16)>().for_each(|(changes, sealed, cut)| {
        let mut bytes = good.clone();
        for &(at, value) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        if *sealed {
            for header in [0, 1024, 3072 - 512] {
                seal(&mut bytes[header..header + 512]);
            }
        }
        drop(tar::parse_entry(&bytes[..1536]));
        // However the bytes arrive, the same comes out.
        let cut = usize::from(*cut) % bytes.len();
        let list = |pieces: &[&[u8]]| {
            let mut reader = tar::Reader::new();
            let mut all = Vec::new();
            for piece in pieces {
                let mut rest = *piece;
                loop {
                    match reader.next(&mut rest) {
                        Ok(Some(entry)) => all.push(entry),
                        Ok(None) => break,
                        Err(error) => return (all, Err(error)),
                    }
                }
            }
            (all, reader.finish())
        };
        assert_eq!(list(&[&bytes]), list(&[&bytes[..cut], &bytes[cut..]]));
    });
}

#[test]
fn fuzz_a_gzip_of_any_bytes() {
    let good = small_gzip();
    check!().with_test_time(MOMENT).with_type::<(Vec<(u16, u8)>, Vec<u8>)>().for_each(|(changes, tail)| {
        let mut bytes = good.clone();
        for &(at, value) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        bytes.extend_from_slice(tail);
        let mut out = [0; 4096];
        drop(inflate::inflate_span(3, &good, &bytes, 7, &mut out));
        let options = BuildOptions { span_size: 100, ..BuildOptions::default() };
        if let Ok(built) = build(&bytes[..], Compression::Gzip, &options) {
            assert!(Ztoc::parse(&built.bytes, &Limits::default()).is_ok());
        }
    });
}
