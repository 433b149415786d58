//! zTOCs: the Go builder's own outputs as the oracle, then layers of our own making, read back byte by byte.

#[path = "support/tar_writer.rs"]
pub mod tar_writer;

use flate2::{
    Compression as Level, GzBuilder,
    read::{GzDecoder, MultiGzDecoder},
    write::GzEncoder,
};
use proptest::prelude::*;
use soci::{
    inflate::{self, InflateError},
    oci::Digest,
    tar::{self, Kind, TarError},
    ztoc::{BuildError, BuildOptions, Built, Compression, DiffId, Limits, NotIndexable, Ztoc, ZtocError, build},
};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
    ops::Range,
};
use tar_writer::{Dialect, Member, TarWriter, pax_record};

// ---- helpers -------------------------------------------------------------------------------------------------------

fn options(span_size: u64) -> BuildOptions {
    BuildOptions { span_size, ..BuildOptions::default() }
}

fn try_build(layer: &[u8], compression: Compression, span_size: u64) -> Result<Built, BuildError> {
    build(layer, compression, &options(span_size))
}

fn gzip_built(layer: &[u8], span_size: u64) -> Built {
    try_build(layer, Compression::Gzip, span_size).unwrap()
}

fn refusal(layer: &[u8], compression: Compression) -> NotIndexable {
    match try_build(layer, compression, 4096) {
        Err(BuildError::NotIndexable(reason)) => reason,
        other => panic!("expected a refusal: {:?}", other.map(|built| built.files)),
    }
}

fn parse(bytes: &[u8]) -> Ztoc<'_> {
    Ztoc::parse(bytes, &Limits::default()).unwrap()
}

fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Level::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

pub fn gunzip(layer: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    MultiGzDecoder::new(layer).read_to_end(&mut data).unwrap();
    data
}

/// Bytes that compress a little, different for each seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|at| if at / 50 % 3 == 0 { b'a' + (at % 7) as u8 } else { next() & 0x3f }).collect()
}

/// Reads uncompressed bytes as a daemon would: only whole, verified spans, each inflated on its own.
fn extract(ztoc: &Ztoc<'_>, bytes: &[u8], layer: &[u8], range: Range<u64>) -> Vec<u8> {
    let mut out = Vec::new();
    for index in ztoc.spans().spans_of(range.clone()) {
        let span = &ztoc.spans().spans[index];
        let compressed = &layer[span.compressed.start as usize..span.compressed.end as usize];
        assert_eq!(Digest::of(compressed), span.digest, "span {index}");
        let (start, end) = (range.start.max(span.uncompressed.start), range.end.min(span.uncompressed.end));
        let skip = start - span.uncompressed.start;
        let mut piece = vec![0xaa; (end - start) as usize];
        match ztoc.spans().compression {
            Compression::Gzip => {
                inflate::inflate_span(span.bits, &bytes[span.window.clone()], compressed, skip, &mut piece).unwrap();
            }
            Compression::Uncompressed => piece = compressed[skip as usize..][..piece.len()].to_vec(),
        }
        out.extend_from_slice(&piece);
    }
    out
}

/// The members of a tar by name.
fn members(tar: &[u8]) -> Vec<(tar::Entry, Vec<u8>)> {
    let mut reader = tar::Reader::new();
    let mut rest = tar;
    let mut all = Vec::new();
    while let Some(entry) = reader.next(&mut rest).unwrap() {
        let size = if entry.kind.has_content() { entry.size as usize } else { 0 };
        let data = tar[entry.offset as usize..][..size].to_vec();
        all.push((entry, data));
    }
    reader.finish().unwrap();
    all
}

/// Everything a layer and its zTOC must agree on.
fn check_agreement(layer: &[u8], built: &Built, tar: &[u8], ranges: &[(u64, u64)]) {
    let ztoc = parse(&built.bytes);
    let spans = ztoc.spans();
    assert_eq!(built.digest, Digest::of(&built.bytes));
    assert_eq!((built.layer_digest, built.layer_size), (Digest::of(layer), layer.len() as u64));
    assert_eq!(spans.compressed_size, layer.len() as u64);
    assert_eq!(spans.spans.len(), built.spans);
    for span in &spans.spans {
        let compressed = &layer[span.compressed.start as usize..span.compressed.end as usize];
        assert_eq!(Digest::of(compressed), span.digest);
    }
    let expected = members(tar);
    assert_eq!(
        (ztoc.file_count(), ztoc.files().count(), built.files),
        (expected.len(), expected.len(), expected.len())
    );
    for (file, (entry, data)) in ztoc.files().zip(&expected) {
        assert_eq!((file.name, file.link, file.kind), (&entry.name[..], &entry.link[..], entry.kind));
        let in_calendar = (-62_167_219_200..253_402_300_800).contains(&entry.mtime.0);
        let mtime = if in_calendar { entry.mtime } else { (-62_135_596_800, 0) }; // zTOCs hold the years 0 to 9999
        assert_eq!((file.offset, file.size, file.mtime), (entry.offset, entry.size, mtime));
        assert_eq!((file.mode, file.uid, file.gid), (entry.mode as u32, entry.uid as u32, entry.gid as u32));
        assert_eq!((file.uname, file.gname), (&entry.uname[..], &entry.gname[..]));
        assert_eq!((file.devmajor, file.devminor), (entry.devmajor as u32, entry.devminor as u32));
        let records: Vec<_> = entry.records.iter().map(|(k, v)| (&k[..], &v[..])).collect();
        assert_eq!(file.pax_records().collect::<Vec<_>>(), records);
        assert_eq!(file.xattrs().collect::<Vec<_>>(), entry.xattrs().collect::<Vec<_>>());
        assert_eq!(extract(&ztoc, &built.bytes, layer, file.content()), *data);
        let headers = extract(&ztoc, &built.bytes, layer, file.header..file.offset);
        let mut again = tar::parse_entry(&headers).unwrap();
        again.offset += file.header;
        assert_eq!(again, *entry);
    }
    let size = spans.uncompressed_size;
    for &(from, len) in ranges {
        let from = if size == 0 { 0 } else { from % size };
        let to = size.min(from + len);
        assert_eq!(extract(&ztoc, &built.bytes, layer, from..to), tar[from as usize..to as usize]);
    }
}

// ---- the Go builder as the oracle ----------------------------------------------------------------------------------

/// Layers by name, and the manifest. Two of the layers are stored as differences to a third (they hold the same data).
pub fn golden() -> (BTreeMap<String, Vec<u8>>, Vec<serde_json::Value>) {
    let mut archive = Vec::new();
    GzDecoder::new(&include_bytes!("data/golden-ztoc.tar.gz")[..]).read_to_end(&mut archive).unwrap();
    let mut files: BTreeMap<String, Vec<u8>> =
        members(&archive).into_iter().map(|(entry, data)| (String::from_utf8(entry.name).unwrap(), data)).collect();
    let manifest = serde_json::from_slice(&files.remove("manifest.json").unwrap()).unwrap();
    let base = files["big.tar.gz"].clone();
    let deltas: Vec<String> = files.keys().filter(|name| name.ends_with(".delta")).cloned().collect();
    for name in deltas {
        // Records of three u32 (length of new bytes; offset and length of bytes of the base after them) and new bytes.
        let delta = files.remove(&name).unwrap();
        let (mut rest, mut full) = (&delta[..], Vec::new());
        while !rest.is_empty() {
            let [new, offset, len] =
                [0, 4, 8].map(|at| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap()) as usize);
            full.extend_from_slice(&rest[12..12 + new]);
            full.extend_from_slice(&base[offset..offset + len]);
            rest = &rest[12 + new..];
        }
        files.insert(name.strip_suffix(".delta").unwrap().to_owned(), full);
    }
    (files, manifest)
}

#[test]
fn every_ztoc_of_the_go_builder_is_reproduced_byte_for_byte() {
    let (layers, cases) = golden();
    assert!(cases.len() >= 20);
    for case in &cases {
        let text = |key: &str| case[key].as_str().unwrap_or_default();
        let (name, layer) = (text("layer"), &layers[text("layer")]);
        assert_eq!(Digest::of(layer).hex(), text("layer_sha256"), "{name}");
        let compression = match text("compression") {
            "gzip" => Compression::Gzip,
            _ => Compression::Uncompressed,
        };
        let options = BuildOptions {
            span_size: case["span_size"].as_u64().unwrap(),
            build_tool: text("build_tool").to_owned(),
            diff_id: DiffId::Compute,
        };
        let built = build(&layer[..], compression, &options);
        match (text("build_error"), &built) {
            ("", Ok(built)) => {
                assert_eq!(built.bytes.len() as u64, case["ztoc_size"].as_u64().unwrap(), "{name}");
                assert_eq!(built.digest.to_string(), text("ztoc_digest"), "{name}");
                let tar = if compression == Compression::Gzip { gunzip(layer) } else { layer.clone() };
                assert_eq!(built.diff_id, Some(Digest::of(&tar)), "{name}");
                check_agreement(layer, built, &tar, &[(0, u64::MAX >> 1), (1000, 70_000), (tar.len() as u64 / 2, 1)]);
            }
            // Deliberate: Go refuses every `git archive` tarball. We index it; the header takes no part.
            (error, Ok(built)) if error.contains("entry 'g'") => {
                assert_eq!(built.warnings.len(), 1);
                check_agreement(layer, built, layer, &[]);
            }
            (error, Err(BuildError::NotIndexable(reason))) if !error.is_empty() => match name {
                "trailgarb.tar.gz" => assert!(matches!(reason, NotIndexable::GzipHeader { .. }), "{reason}"),
                "sp_gnu.tar" => assert!(matches!(reason, NotIndexable::Tar(TarError::Sparse { .. })), "{reason}"),
                _ => panic!("unknown refusal of {name}: {reason}"),
            },
            (error, built) => panic!("{name}: Go says {error:?}, we {:?}", built.as_ref().map(|built| built.digest)),
        }
    }
}

/// `formats.md` 9.1, as far as the golden cases do not contain them: the tables that the text gives.
#[test]
fn the_published_vectors_hold() {
    let (layers, _) = golden();
    let v5 = gzip_built(&layers["vec.tar.gz"], 512);
    assert_eq!(v5.digest.to_string(), "sha256:1071e02c595f9d6c833a71adec249de4bb5d4da6fd7d7588b8c581e8dff6a93f");
    let table: Vec<_> = parse(&v5.bytes)
        .spans()
        .spans
        .iter()
        .map(|span| {
            let hex: String = span.digest.hex().chars().take(16).collect();
            (span.compressed.start, span.compressed.end, span.uncompressed.start, span.bits, hex)
        })
        .collect();
    let expected = [
        (10, 113, 0, 0, "8a76fe1a51f91247"),
        (112, 261, 600, 1, "ecbe9483297debe8"),
        (260, 385, 1200, 2, "8141395cd439e492"),
        (384, 452, 1800, 5, "b8b4e8812d930c4e"),
        (451, 546, 2400, 7, "e67acdbeb1c11a08"),
        (545, 774, 3000, 4, "bb9fa45f2c87a462"),
        (773, 893, 3800, 1, "4303400df6573ba4"),
        (892, 904, 4600, 1, "ad05a9714c17ab62"),
        (903, 916, 5400, 7, "91dc65549e027303"),
    ]
    .map(|(start, end, out, bits, hex)| (start, end, out, bits, hex.to_owned()));
    assert_eq!(table, expected);

    let v4 = gzip_built(&layers["emptyfirst.tar.gz"], 1 << 22);
    let ztoc = parse(&v4.bytes);
    assert_eq!(ztoc.spans().spans.iter().map(|span| span.compressed.start).collect::<Vec<_>>(), [10, 30]);
    assert!(!ztoc.spans().mountable_by_go());
    assert_eq!(v4.warnings.len(), 1);
    assert!(parse(&v5.bytes).spans().mountable_by_go());

    let v8 = try_build(&[], Compression::Uncompressed, 1 << 22).unwrap();
    assert_eq!(v8.bytes.len(), 164);
    assert_eq!(v8.digest.to_string(), "sha256:adea60c2769acec3e7efdf8c3a78d809921af5a25afc10e66a57bc7ca2cbac37");
    let ztoc = parse(&v8.bytes);
    assert!(ztoc.spans().spans.is_empty() && !ztoc.spans().mountable_by_go());
    assert!(ztoc.spans().spans_of(0..0).is_empty());
    assert_eq!((ztoc.version(), ztoc.build_tool()), ("0.9".into(), "AWS SOCI CLI v0.2".into()));
}

#[test]
fn a_version_1_zinfo_reads_like_its_version_2() {
    let (layers, _) = golden();
    let layer = &layers["vec.tar.gz"];
    let v2 = gzip_built(layer, 512).bytes;
    // The first checkpoint lies behind count and span size; cut it out, and make every offset in front of the cut fit again
    // by leaving the file as it is and moving the vector's length and head forward over the gap.
    let find = |needle: &[u8]| v2.windows(needle.len()).position(|window| window == needle).unwrap();
    let blob_len = 12 + 9 * 32_785u32;
    let mut vector = blob_len.to_le_bytes().to_vec();
    vector.extend_from_slice(&9u32.to_le_bytes());
    vector.extend_from_slice(&512u64.to_le_bytes());
    let at = find(&vector);
    let mut v1 = v2.clone();
    let moved = at + 32_785;
    v1[moved..moved + 16].copy_from_slice(&vector);
    v1[moved..moved + 4].copy_from_slice(&(blob_len - 32_785).to_le_bytes());
    // The one offset that pointed to the vector.
    let pointer = (0..at)
        .find(|&from| from as u64 + u64::from(u32::from_le_bytes(v1[from..from + 4].try_into().unwrap())) == at as u64)
        .unwrap();
    v1[pointer..pointer + 4].copy_from_slice(&((moved - pointer) as u32).to_le_bytes());
    let (old, new) = (parse(&v1), parse(&v2));
    for (old, new) in old.spans().spans.iter().zip(&new.spans().spans) {
        assert_eq!((&old.compressed, &old.uncompressed, old.bits), (&new.compressed, &new.uncompressed, new.bits));
    }
    let tar = gunzip(layer);
    assert_eq!(extract(&old, &v1, layer, 0..5000), tar[..5000]);
}

// ---- what is refused, what is not ----------------------------------------------------------------------------------

#[test]
fn broken_gzip_is_refused_with_its_reason() {
    let good = gzip(&TarWriter::of(Dialect::Pax, &[Member::file("a", noise(1, 3000))]), 6);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut layer = good.clone();
        change(&mut layer);
        refusal(&layer, Compression::Gzip)
    };
    let end = good.len();
    assert!(matches!(with(&|l| l.push(0)), NotIndexable::GzipHeader { .. }), "trailing zero");
    assert!(matches!(with(&|l| l.extend(b"garbage")), NotIndexable::GzipHeader { .. }));
    assert!(matches!(with(&|l| l[end - 8] ^= 1), NotIndexable::GzipChecksum(_)), "CRC");
    assert!(matches!(with(&|l| l[end - 1] ^= 1), NotIndexable::GzipChecksum(_)), "ISIZE");
    for cut in [1, 4, 8, 9, 100, end - 12, end - 5, end - 1] {
        assert_eq!(with(&|l| l.truncate(end - cut)), NotIndexable::GzipTruncated, "{cut} bytes short");
    }
    assert_eq!(refusal(b"", Compression::Gzip), NotIndexable::GzipTruncated);
    let zlib = flate2::write::ZlibEncoder::new(Vec::new(), Level::new(6)).finish().unwrap();
    assert!(matches!(refusal(&zlib, Compression::Gzip), NotIndexable::GzipHeader { offset: 0, .. }));
    let zstd = [0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert!(matches!(refusal(&zstd, Compression::Gzip), NotIndexable::GzipHeader { .. }));
    assert!(matches!(refusal(&good, Compression::Uncompressed), NotIndexable::Tar(_)), "gzip that is called tar");
    let mut flipped = good.clone();
    flipped[10] |= 0b110; // block type 3
    assert!(matches!(refusal(&flipped, Compression::Gzip), NotIndexable::Deflate(_)));
}

#[test]
fn a_read_error_is_told_apart_from_a_bad_layer() {
    struct Fails(usize);
    impl Read for Fails {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            self.0 -= 1;
            buffer[0] = 0;
            Ok(1)
        }
    }
    for compression in [Compression::Gzip, Compression::Uncompressed] {
        let result = build(Fails(0), compression, &options(4096));
        assert!(matches!(result, Err(BuildError::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionReset));
    }
    assert!(matches!(build(Fails(700), Compression::Uncompressed, &options(4096)), Err(BuildError::Io(_))));
    assert!(matches!(try_build(b"", Compression::Uncompressed, 0), Err(BuildError::SpanSize(0))));
    assert!(matches!(try_build(b"", Compression::Gzip, u64::MAX), Err(BuildError::SpanSize(u64::MAX))));
}

#[test]
fn tars_end_where_gos_reader_lets_them_end() {
    let mut tar = TarWriter::new(Dialect::Pax);
    tar.add(&Member::file("a", "abc"));
    let body = tar.bytes.clone();
    let size = |tar: &[u8]| {
        let built = try_build(tar, Compression::Uncompressed, 4096).unwrap();
        assert_eq!(built.files, 1);
        parse(&built.bytes).spans().uncompressed_size
    };
    assert_eq!(size(&body), 1024, "no end marker");
    assert_eq!(size(&body[..515]), 515, "no padding");
    assert_eq!(size(&[&body[..], &[0; 512]].concat()), 1536, "one zero block");
    assert_eq!(size(&[&body[..], &[0; 1024], &[7; 99]].concat()), 2048, "whatever follows the marker is not the tar");
    for bad in [&body[..100], &body[..514], &[&body[..], &[0; 512], &body[..]].concat(), &[&body[..], &[0; 3]].concat()]
    {
        assert!(matches!(refusal(bad, Compression::Uncompressed), NotIndexable::Tar(_)), "{}", bad.len());
    }
    // Padding beyond the marker may hold whole spans.
    let padded = wrap(&[&body[..], &vec![0; 3_000_000]].concat(), &Wrapping::Flushes(100_000));
    let built = gzip_built(&padded, 65_536);
    let ztoc = parse(&built.bytes);
    assert!(ztoc.spans().spans.last().unwrap().uncompressed.start > ztoc.spans().uncompressed_size);
    check_agreement(&padded, &built, &gunzip(&padded), &[(0, 9999)]);
}

#[test]
fn content_that_somebody_else_took_is_passed_over_by_the_reader() {
    let tar = TarWriter::of(Dialect::Pax, &[Member::file("a", vec![1; 1300]), Member::file("b", "")]);
    let expected = members(&tar);
    let mut reader = tar::Reader::new();
    let mut input = &tar[..];
    let first = reader.next(&mut input).unwrap().unwrap();
    // Part of it by the reader itself, the rest by us, which ends at the padding: there is no more to pass over than the content.
    assert_eq!(reader.next(&mut &input[..300]).unwrap(), None);
    reader.pass(5000);
    input = &input[first.size as usize..];
    assert_eq!(reader.next(&mut input).unwrap().unwrap(), expected[1].0);
    assert_eq!(reader.next(&mut input).unwrap(), None);
    reader.finish().unwrap();
}

#[test]
fn sparse_entries_are_refused_in_all_their_forms() {
    let sparse = |member: Member| {
        let reason = refusal(&TarWriter::of(Dialect::Pax, &[member]), Compression::Uncompressed);
        assert!(matches!(reason, NotIndexable::Tar(TarError::Sparse { .. })), "{reason}");
    };
    sparse(Member::new(b'S', "old"));
    let file = || Member::file("f", "data");
    sparse(file().record("GNU.sparse.offset", "0").record("GNU.sparse.numbytes", "4"));
    sparse(file().record("GNU.sparse.map", "0,4").record("GNU.sparse.size", "9"));
    sparse(file().record("GNU.sparse.major", "1").record("GNU.sparse.minor", "0").record("GNU.sparse.realsize", "9"));
    // A version that Go does not know is an ordinary file to it.
    let unknown = file().record("GNU.sparse.major", "2").record("GNU.sparse.minor", "0");
    assert!(try_build(&TarWriter::of(Dialect::Pax, &[unknown]), Compression::Uncompressed, 512).is_ok());
}

#[test]
fn a_link_that_claims_a_size_is_indexed_only_where_go_can_read_it() {
    let link = |size| Member { size: Some(size), ..Member::new(b'1', "link").linked("a") };
    let tar = |members: &[Member]| TarWriter::of(Dialect::Pax, members);
    let file = Member::file("a", "abc");
    let small = tar(&[file.clone(), link(300), file.clone()]);
    let built = try_build(&small, Compression::Uncompressed, 512).unwrap();
    check_agreement(&small, &built, &small, &[]);
    let last = tar(&[file.clone(), link(9000)]);
    let built = try_build(&last, Compression::Uncompressed, 512).unwrap();
    check_agreement(&last, &built, &last, &[]);
    let middle = tar(&[file.clone(), link(9000), file]);
    assert_eq!(refusal(&middle, Compression::Uncompressed), NotIndexable::Oversized);
}

#[test]
fn helper_members_apply_as_gos_reader_applies_them() {
    let helper = |flag, data: Vec<u8>| Member { data, ..Member::new(flag, "helper") };
    let one = |members: &[Member]| {
        let mut tar = TarWriter::new(Dialect::Gnu);
        members.iter().for_each(|member| tar.plain(member));
        let mut all = members_of(&tar.finish());
        assert_eq!(all.len(), 1);
        all.remove(0)
    };
    fn members_of(tar: &[u8]) -> Vec<tar::Entry> {
        members(tar).into_iter().map(|(entry, _)| entry).collect()
    }
    let file = Member::file("name", "");
    let x = |key: &str, value: &str| helper(b'x', pax_record(key.as_bytes(), value.as_bytes()));

    let twice = one(&[x("comment", "1"), x("path", "p"), file.clone()]);
    assert_eq!((&twice.name[..], twice.records.len()), (&b"p"[..], 1), "the second replaces the first");
    let both = one(&[helper(b'L', b"long\0junk".to_vec()), x("path", "pax"), file.clone()]);
    assert_eq!(both.name, b"long", "GNU wins");
    let empty = one(&[x("path", ""), file.clone()]);
    assert_eq!(
        (&empty.name[..], empty.records.len()),
        (&b"name"[..], 1),
        "an empty value changes nothing but is listed"
    );
    let global = one(&[helper(b'g', pax_record(b"path", b"global")), file.clone()]);
    assert_eq!((&global.name[..], global.records.len()), (&b"name"[..], 0), "global records apply to nothing");
    let v7_dir = one(&[x("path", "dir/"), Member { flag: 0, ..file.clone() }]);
    assert_eq!(v7_dir.kind, Kind::Directory, "NUL and a final slash");
    assert_eq!(one(&[Member::file("f/", "")]).kind, Kind::Regular, "but not with flag 0");
    assert_eq!(one(&[Member { flag: b'7', ..Member::file("c", "data") }]).kind, Kind::Regular, "contiguous");
    let owner = one(&[x("uid", "5000000000"), x("uid", "5000000000"), file.clone()]);
    assert_eq!((owner.uid, owner.uid as u32), (5_000_000_000, 705_032_704));

    for bad in [
        vec![helper(b'x', vec![b'0'; (1 << 20) + 1]), file.clone()],
        vec![x("size", "-1"), file.clone()],
        vec![x("mtime", "yesterday"), file.clone()],
        vec![helper(b'g', b"junk".to_vec()), file.clone()],
        vec![Member::new(b'Z', "unknown")],
    ] {
        let mut tar = TarWriter::new(Dialect::Gnu);
        bad.iter().for_each(|member| tar.plain(member));
        let reason = refusal(&tar.finish(), Compression::Uncompressed);
        assert!(matches!(reason, NotIndexable::Tar(_)), "{reason}");
    }
}

#[test]
fn asking_for_more_than_a_span_holds_is_an_error_never_zeros() {
    let tar = TarWriter::of(Dialect::Pax, &[Member::file("a", noise(7, 50_000))]);
    let layer = gzip(&tar, 6);
    let built = gzip_built(&layer, 8192);
    let ztoc = parse(&built.bytes);
    for span in &ztoc.spans().spans {
        let bytes = &layer[span.compressed.start as usize..span.compressed.end as usize];
        let window = &built.bytes[span.window.clone()];
        let len = (span.uncompressed.end - span.uncompressed.start) as usize;
        let mut out = vec![0; len];
        inflate::inflate_span(span.bits, window, bytes, 0, &mut out).unwrap();
        for cut in 0..bytes.len().min(40) {
            let result = inflate::inflate_span(span.bits, window, &bytes[..cut], 0, &mut out);
            assert!(matches!(result, Err(InflateError::Short { .. })), "{cut}: {result:?}");
        }
        let beyond = inflate::inflate_span(span.bits, window, bytes, len as u64 + 20_000, &mut [0; 9]);
        assert!(matches!(beyond, Err(InflateError::Short { .. })), "{beyond:?}");
    }
    assert_eq!(inflate::inflate_span(8, &[], &layer[10..], 0, &mut [0]), Err(InflateError::Checkpoint));
    assert_eq!(inflate::inflate_span(0, &[0; 32_769], &layer[10..], 0, &mut [0]), Err(InflateError::Checkpoint));
    assert_eq!(inflate::inflate_span(0, &[], &[], 5, &mut []), Ok(()));
}

#[test]
fn layers_are_told_apart_by_their_first_bytes() {
    use inflate::{Sniffed, sniff};
    let tar = TarWriter::of(Dialect::Gnu, &[Member::file("a", "b")]);
    assert_eq!(sniff(&tar), Sniffed::Tar);
    assert_eq!(sniff(&[0; 1024]), Sniffed::Tar);
    assert_eq!(sniff(&gzip(&tar, 1)), Sniffed::Gzip);
    assert_eq!(sniff(&[0x28, 0xb5, 0x2f, 0xfd, 4]), Sniffed::Zstd);
    assert_eq!(sniff(b"{\"json\": true}"), Sniffed::Unknown);
    assert_eq!(sniff(b""), Sniffed::Unknown);
}

// ---- hostile zTOCs -------------------------------------------------------------------------------------------------

#[test]
fn entries_that_do_not_fit_the_archive_are_refused() {
    let tar =
        TarWriter::of(Dialect::Pax, &[Member::file("first", noise(1, 700)), Member::file("second", noise(2, 237))]);
    let built = try_build(&tar, Compression::Uncompressed, 512).unwrap();
    let patched = |old: i64, new: i64| {
        let mut bytes = built.bytes.clone();
        let found: Vec<usize> = (0..bytes.len() - 8).filter(|&at| bytes[at..at + 8] == old.to_le_bytes()).collect();
        assert_eq!(found.len(), 1, "{old}");
        bytes[found[0]..found[0] + 8].copy_from_slice(&new.to_le_bytes());
        bytes
    };
    let entry = |bytes: &[u8]| {
        let result = Ztoc::parse(bytes, &Limits::default());
        assert!(matches!(result, Err(ZtocError::Entry { .. })), "{:?}", result.map(|_| ()));
    };
    // First: header 0, content 512..1212. Second: header 1536, content 2048..2285, end of the archive 3584.
    entry(&patched(700, 1025)); // reaches into the second's header
    entry(&patched(700, -1));
    entry(&patched(700, i64::MAX));
    entry(&patched(2048, 1536)); // no header
    entry(&patched(2048, 2050));
    entry(&patched(2048, 4096));
    entry(&patched(237, 1537));
    entry(&patched(3584, 2284)); // the archive
    assert!(Ztoc::parse(&patched(237, 1536), &Limits::default()).is_ok());
    let small = |limits: Limits| matches!(Ztoc::parse(&built.bytes, &limits), Err(ZtocError::Limit(_)));
    assert!(small(Limits { bytes: 100, ..Limits::default() }));
    assert!(small(Limits { files: 1, ..Limits::default() }));
    assert!(small(Limits { spans: 6, ..Limits::default() }));
    assert!(small(Limits { span: 511, ..Limits::default() }));
    assert!(small(Limits { header: 511, ..Limits::default() }));
    assert!(small(Limits { text: 3, ..Limits::default() }));
}

#[test]
fn every_truncation_of_a_ztoc_is_refused() {
    let tar = TarWriter::of(Dialect::Pax, &[Member::file("a", "b").record("SCHILY.xattr.user.k", "v")]);
    let built = try_build(&tar, Compression::Uncompressed, 512).unwrap();
    for end in 0..built.bytes.len() - 1 {
        // The last byte is the NUL and padding of a string, which nothing reads.
        if let Ok(ztoc) = Ztoc::parse(&built.bytes[..end], &Limits::default()) {
            assert!(end + 4 > built.bytes.len(), "{end} of {}", built.bytes.len());
            assert_eq!(ztoc.files().count(), 1);
        }
    }
}

// ---- layers of our own making --------------------------------------------------------------------------------------

/// How a tar becomes a layer.
#[derive(Debug, Clone)]
enum Wrapping {
    Plain,
    Gzip(u32),
    Headers,
    Members(Vec<usize>),
    Flushes(usize),
    EmptyAround,
}

fn wrap(tar: &[u8], wrapping: &Wrapping) -> Vec<u8> {
    match wrapping {
        Wrapping::Plain => tar.to_vec(),
        Wrapping::Gzip(level) => gzip(tar, *level),
        Wrapping::Headers => {
            let builder = GzBuilder::new().filename("layer.tar").comment("c").extra(noise(9, 40_000)).mtime(5);
            let mut encoder = builder.write(Vec::new(), Level::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        Wrapping::Members(cuts) => {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (tar.len() + 1)).collect();
            cuts.extend([0, tar.len()]);
            cuts.sort_unstable();
            cuts.windows(2).flat_map(|pair| gzip(&tar[pair[0]..pair[1]], 6)).collect()
        }
        Wrapping::Flushes(every) => {
            let mut encoder = GzEncoder::new(Vec::new(), Level::new(6));
            for piece in tar.chunks(*every) {
                encoder.write_all(piece).unwrap();
                encoder.flush().unwrap();
            }
            encoder.finish().unwrap()
        }
        Wrapping::EmptyAround => [gzip(b"", 6), gzip(tar, 6), gzip(b"", 0)].concat(),
    }
}

fn wrappings() -> impl Strategy<Value = Wrapping> {
    prop_oneof![
        Just(Wrapping::Plain),
        (0u32..=9).prop_map(Wrapping::Gzip),
        Just(Wrapping::Headers),
        prop::collection::vec(any::<usize>(), 1..5).prop_map(Wrapping::Members),
        (1000usize..20_000).prop_map(Wrapping::Flushes),
        Just(Wrapping::EmptyAround),
    ]
}

fn names() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[a-z]{1,12}(/[a-z.]{1,12}){0,4}".prop_map(String::into_bytes),
        1 => prop::collection::vec(1u8..=255, 0..40),
        1 => prop::collection::vec(1u8..=255, 90..300),
        1 => prop::sample::select(vec![&b"./"[..], b"/abs", b"../up", b"dir/", b"d//e", b".wh.x", b"d/.wh..wh..opq"])
            .prop_map(<[u8]>::to_vec),
    ]
}

prop_compose! {
    fn any_member()(
        flag in prop::sample::select(&b"000001234567\0"[..]),
        name in names(),
        link in names(),
        mode in prop_oneof![Just(0o644u64), 0u64..0o200_000],
        ids in prop_oneof![Just((0u64, 0u64)), (0u64..1 << 22, 0u64..1 << 33)],
        owner in ("[a-z]{0,40}", prop::collection::vec(1u8..=255, 0..30)),
        mtime in prop_oneof![0u64..1 << 33, Just(1u64 << 40)],
        dev in (0u64..300, 0u64..1 << 20),
        xattrs in prop::collection::btree_map("(SCHILY\\.xattr\\.[a-z.]{1,20}|comment|LIBARCHIVE\\.x)",
            prop::collection::vec(any::<u8>(), 0..60), 0..3),
        time in prop::option::weighted(0.3, "-?[0-9]{1,10}(\\.[0-9]{1,12})?"),
        seed in any::<u64>(),
        size in prop_oneof![Just(0usize), 1usize..600, 500usize..60_000],
    ) -> Member {
        let has_data = matches!(flag, b'0' | b'7' | 0);
        let mut records: Vec<(Vec<u8>, Vec<u8>)> = xattrs.into_iter().map(|(k, v)| (k.into_bytes(), v)).collect();
        records.extend(time.map(|time| (b"mtime".to_vec(), time.into_bytes())));
        Member {
            flag,
            // A NUL flag with a final slash is a directory, whose data would be the next header.
            data: if has_data && !(flag == 0 && name.ends_with(b"/")) { noise(seed, size) } else { Vec::new() },
            link: if matches!(flag, b'1' | b'2') { link } else { Vec::new() },
            name, mode, uid: ids.0, gid: ids.1, uname: owner.0.into_bytes(), gname: owner.1, mtime, dev, records, size: None,
        }
    }
}

/// Reads at most a few bytes at a time, like a slow pipe.
struct Dribble<'a>(&'a [u8], usize);

impl Read for Dribble<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = buffer.len().min(self.1);
        self.0.read(&mut buffer[..count])
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn proptest_every_file_and_range_of_any_layer_equals_its_source(
        all in prop::collection::vec(any_member(), 0..12),
        dialect in prop::sample::select(vec![Dialect::Pax, Dialect::Gnu, Dialect::V7]),
        wrapping in wrappings(),
        span_size in prop::sample::select(vec![1u64, 300, 512, 5000, 40_000, 1 << 22]),
        ranges in prop::collection::vec((any::<u64>(), 0u64..200_000), 8),
        dribble in 1usize..5000,
    ) {
        let tar = TarWriter::of(dialect, &all);
        // What was written is what the reader sees, where the dialect can express it.
        for ((entry, data), member) in members(&tar).iter().zip(&all) {
            prop_assert_eq!(data, &member.data);
            if dialect != Dialect::V7 {
                prop_assert_eq!(&entry.name, &member.name);
                prop_assert_eq!(&entry.link, &member.link);
                prop_assert_eq!((entry.uid, entry.gid), (member.uid as i64, member.gid as i64));
            }
        }
        let layer = wrap(&tar, &wrapping);
        let compression = if matches!(wrapping, Wrapping::Plain) { Compression::Uncompressed } else { Compression::Gzip };
        let built = try_build(&layer, compression, span_size).unwrap();
        let opaque = all.iter().any(|member| member.name.ends_with(b".wh..wh..opq"));
        prop_assert!(built.has_opaque || !opaque || dialect == Dialect::V7);
        check_agreement(&layer, &built, &tar, &ranges);

        let options = BuildOptions { span_size, diff_id: DiffId::Compute, ..BuildOptions::default() };
        let slowly = build(Dribble(&layer, dribble), compression, &options).unwrap();
        prop_assert_eq!(slowly.bytes, built.bytes);
        prop_assert_eq!(slowly.diff_id, Some(Digest::of(&tar)));
    }

    #[test]
    fn proptest_several_spans_inflate_from_one_buffer(
        seed in any::<u64>(),
        wrapping in wrappings(),
        (first, last) in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
    ) {
        prop_assume!(!matches!(wrapping, Wrapping::Plain));
        let tar = TarWriter::of(Dialect::Gnu, &[Member::file("a", noise(seed, 150_000))]);
        let layer = wrap(&tar, &wrapping);
        let built = gzip_built(&layer, 1000);
        let ztoc = parse(&built.bytes);
        let spans = &ztoc.spans().spans;
        let (first, last) = (first.index(spans.len()), last.index(spans.len()));
        let (first, last) = (first.min(last), first.max(last));
        let bytes = &layer[spans[first].compressed.start as usize..spans[last].compressed.end as usize];
        let range = spans[first].uncompressed.start as usize..spans[last].uncompressed.end as usize;
        let mut out = vec![0; range.len()];
        inflate::inflate_span(spans[first].bits, &built.bytes[spans[first].window.clone()], bytes, 0, &mut out).unwrap();
        prop_assert_eq!(&out[..], &tar[range]);
    }
}
