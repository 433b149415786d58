//! A complete layer is compared with what its index says, to the last byte and the last attribute, and what comes of it is kept.

use super::lab::*;
use soci::{
    fs::{LayerData, ReadError},
    layers::{Layer, Verdict},
    oci::{Chain, Digest},
    ztoc::Compression,
};
use std::{fs::OpenOptions, os::unix::fs::FileExt, path::Path, sync::atomic::Ordering};
use tempfile::tempdir;

/// Replaces the first `from` in the zTOC, which must be there.
fn forged(image: &Image, from: &[u8], to: &[u8]) -> Image {
    let mut ztoc = image.ztoc.to_vec();
    let at = ztoc.windows(from.len()).position(|window| window == from).expect("what is to be forged");
    ztoc[at..at + to.len()].copy_from_slice(to);
    Image { ztoc: ztoc.into(), ..image.clone() }
}

fn swapped(image: &Image, one: &[u8], other: &[u8]) -> Image {
    let temporary: Vec<u8> = one.iter().map(|byte| byte ^ 0x80).collect();
    forged(&forged(&forged(image, one, &temporary), other, one), &temporary, other)
}

async fn judged(lab: &Lab) {
    until("it is judged", || lab.seen.complete.load(Ordering::SeqCst) == 1).await;
}

/// The diff ID that a layer was found to have.
fn diff_id(layer: &Layer) -> Digest {
    match layer.verdict() {
        Some(Verdict::Genuine { diff_id }) => *diff_id,
        other => panic!("{other:?}"),
    }
}

fn reason(layer: &Layer) -> String {
    match layer.verdict() {
        Some(Verdict::Contradicts { reason }) => reason.clone(),
        other => panic!("{other:?}"),
    }
}

fn damage(path: &Path, offset: u64) {
    let blob = OpenOptions::new().read(true).write(true).open(path.join("blob")).unwrap();
    let mut byte = [0];
    blob.read_exact_at(&mut byte, offset).unwrap();
    blob.write_all_at(&[byte[0] ^ 0x55], offset).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_what_its_index_says_is_examined_once() {
    let tar = tar(80, 5, 60_000);
    // As tools write them: padded to a record, in members, and with zeros behind the last one.
    let padded = [&tar[..], &[0; 10_240]].concat();
    let members = [gzip(&padded[..100_000], 6), gzip(&padded[100_000..], 6)].concat();
    let cases = [
        ("plain", padded.clone(), Compression::Uncompressed),
        ("one member", gzip(&padded, 6), Compression::Gzip),
        ("members", members, Compression::Gzip),
    ];
    for (name, blob, compression) in cases {
        let image = Image::of(padded.clone(), blob, compression, 50_000);
        let directory = tempdir().unwrap();
        let lab = Lab::at(directory.path(), streaming());
        let layer = lab.open(&image, Script::good(&image)).await;
        judged(&lab).await;
        assert_eq!(diff_id(&layer), Digest::of(&padded), "{name}");
        drop((layer, lab));
        let lab = Lab::at(directory.path(), streaming());
        let layer = lab.open(&image, std::sync::Arc::new(Unneeded)).await;
        assert_eq!(diff_id(&layer), Digest::of(&padded), "{name}");
    }
}

/// What Go has indexed is in use on nodes: a wrong accusation would end containers.
#[tokio::test(flavor = "multi_thread")]
async fn no_layer_that_go_has_indexed_is_accused() {
    let (layers, cases) = crate::formats::golden();
    let mut judged_ones = 0;
    for case in cases.iter().filter(|case| case["build_error"].as_str().unwrap_or_default().is_empty()) {
        let (name, span_size) = (case["layer"].as_str().unwrap(), case["span_size"].as_u64().unwrap());
        let blob = layers[name].clone();
        let (tar, compression) = match case["compression"].as_str().unwrap() {
            "gzip" => (crate::formats::gunzip(&blob), Compression::Gzip),
            _ => (blob.clone(), Compression::Uncompressed),
        };
        let image = Image::of(tar, blob, compression, span_size);
        if image.spans.is_empty() {
            continue;
        }
        let directory = tempdir().unwrap();
        let lab = Lab::at(directory.path(), streaming());
        let layer = lab.open(&image, Script::good(&image)).await;
        judged(&lab).await;
        assert_eq!(diff_id(&layer), Digest::of(&image.tar), "{name} {span_size}");
        judged_ones += 1;
    }
    assert!(judged_ones >= 15, "{judged_ones}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_image_says_of_the_diff_id_does_not_change_what_is_found() {
    let image = Image::gzip(81, 50_000);
    let real = Digest::of(&image.tar);
    for claimed in [real, Digest::of(b"something else")] {
        let directory = tempdir().unwrap();
        let lab = Lab::at(directory.path(), streaming());
        let mut wanted = lab.wanted(&image, Script::good(&image));
        wanted.chain = Chain::of_names(None, &claimed.to_string());
        let layer = lab.store.open(wanted, soci::layout::SnapshotId(1)).await.unwrap();
        lab.scheduler.add(&layer);
        judged(&lab).await;
        assert_eq!(diff_id(&layer), real);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_lie_in_an_index_is_found_and_ends_the_reads() {
    let honest = Image::gzip(82, 50_000);
    let mode = |mode: u64| mode.to_le_bytes();
    let window = honest.spans[3].window.clone();
    let mut wrong_window = honest.ztoc.to_vec();
    wrong_window[window].iter_mut().for_each(|byte| *byte ^= 1);
    let cases = [
        ("a mode", forged(&honest, &mode(0o644), &mode(0o4755)), "the mode 4755, the layer 0644"),
        (
            "two files exchanged",
            swapped(&honest, b"dir/file3", b"dir/file7"),
            "has \"dir/file7\" where the layer has \"dir/file3\"",
        ),
        ("a window", Image { ztoc: wrong_window.into(), ..honest.clone() }, ""),
    ];
    for (name, image, expected) in cases {
        for claims in [false, true] {
            let directory = tempdir().unwrap();
            let lab = Lab::at(directory.path(), streaming());
            let source = Script::good(&image);
            let mut wanted = lab.wanted(&image, source.clone());
            wanted.chain = Chain::of_names(None, &Digest::of(&image.tar).to_string()).filter(|_| claims);
            let layer = lab.store.open(wanted.clone(), soci::layout::SnapshotId(1)).await.unwrap();
            lab.scheduler.add(&layer);
            judged(&lab).await;
            assert_eq!(lab.seen.contradictions.load(Ordering::SeqCst), 1, "{name}");
            assert!(reason(&layer).contains(expected), "{name}: {}", reason(&layer));
            let refused = |result| matches!(result, Err(ReadError::Condemned { .. }));
            assert!(refused(layer.read(0..1000).await) && layer.try_read(0..1000).is_none(), "{name}");
            // Another daemon knows it, and when the layer has gone and comes again, too.
            drop((layer, lab));
            let lab = Lab::at(directory.path(), streaming());
            let layer = lab.store.open(wanted.clone(), soci::layout::SnapshotId(1)).await.unwrap();
            assert!(refused(layer.read(0..1000).await), "{name}");
            drop(layer);
            lab.store.release(image.layer, soci::layout::SnapshotId(1)).await.unwrap();
            assert!(
                lab.store.condemned(&image.layer, &wanted.ztoc).is_some_and(|why| why.contains(expected)),
                "{name}"
            );
            assert_eq!(lab.store.condemned(&image.layer, &Digest::of(&honest.ztoc)), None, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_index_is_not_blamed_for_bytes_that_no_digest_covers_nor_for_rot_after_a_check() {
    // The gzip header's time, and a span that this very process has checked.
    for place in [5, 0] {
        let image = Image::gzip(83, 50_000);
        let directory = tempdir().unwrap();
        let lab = Lab::at(directory.path(), quiet());
        let layer = lab.open(&image, Script::good(&image)).await;
        layer.read(0..image.size / 2).await.unwrap();
        damage(&lab.layout.layer(&image.layer), if place > 0 { place } else { image.middle(1) });
        layer.read(image.size / 2..image.size).await.unwrap();
        until("what was damaged is asked for again", || !layer.is_complete() || layer.verdict().is_some()).await;
        layer.read(0..image.size).await.unwrap();
        judged(&lab).await;
        assert_eq!(diff_id(&layer), Digest::of(&image.tar));
        assert_eq!(lab.seen.contradictions.load(Ordering::SeqCst), 0);
    }
}
