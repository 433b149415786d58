//! What readers get, and what it costs the source.

use super::lab::*;
use bytes::Bytes;
use soci::{fs::LayerData, ztoc::Compression};
use std::{path::Path, sync::Arc, time::Duration};
use tempfile::tempdir;

/// The same tar, compressed in ways that make spans differ.
fn images() -> Vec<(&'static str, Image)> {
    let tar = tar(3, 20, 60_000);
    let members: Vec<u8> = tar.chunks(97_001).flat_map(|piece| gzip(piece, 6)).collect();
    let around = [gzip(b"", 6), gzip(&tar, 6), gzip(b"", 0)].concat();
    let of = |blob: Vec<u8>, compression, span_size| Image::of(tar.clone(), blob, compression, span_size);
    vec![
        ("gzip", of(gzip(&tar, 6), Compression::Gzip, 50_000)),
        ("gzip, one span", of(gzip(&tar, 6), Compression::Gzip, 1 << 30)),
        ("gzip, tiny spans", of(gzip(&tar, 9), Compression::Gzip, 1)),
        ("gzip, stored", of(gzip(&tar, 0), Compression::Gzip, 100_000)),
        ("gzip members", of(members, Compression::Gzip, 50_000)),
        ("gzip, empty members around", of(around, Compression::Gzip, 50_000)),
        ("plain", of(tar.clone(), Compression::Uncompressed, 65_536)),
        ("plain, one span", of(tar.clone(), Compression::Uncompressed, 1 << 30)),
        ("plain, tiny spans", of(tar.clone(), Compression::Uncompressed, 1000)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn any_range_of_any_layer_reads_as_the_tar_it_was_made_of() {
    for (name, image) in images() {
        assert!(name != "gzip" || image.spans.iter().any(|span| span.bits != 0), "spans that share bytes");
        let labs: [fn(&Path) -> Lab; 4] = [
            |root| Lab::at(root, quiet()),
            |root| Lab::at(root, streaming()),
            |root| Lab::spilling(root, streaming(), 1 << 30),
            |root| Lab::spilling(root, quiet(), 400_000),
        ];
        for lab in labs {
            let directory = tempdir().unwrap();
            let lab = lab(directory.path());
            let layer = lab.open(&image, Script::good(&image)).await;
            let mut random = Random::new(7);
            for turn in 0..60 {
                let range = random.range(image.size, if turn % 4 == 0 { 300_000 } else { 5000 });
                let bytes = layer.read(range.clone()).await.unwrap();
                assert!(bytes == image.bytes(range.clone()), "{name}: {range:?}");
                if let Some(bytes) = layer.try_read(range.clone()) {
                    assert!(bytes == image.bytes(range.clone()), "{name}, from memory: {range:?}");
                }
            }
            let all = layer.read(0..image.size).await.unwrap();
            assert!(all == image.bytes(0..image.size), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_span_is_fetched_once_however_many_readers_want_it() {
    for settings in [quiet(), streaming()] {
        let image = Arc::new(Image::gzip(5, 50_000));
        let directory = tempdir().unwrap();
        let lab = Lab::at(directory.path(), settings);
        let source = Script::new(&image, |_| Act { delay: Duration::from_millis(1), ..Act::default() });
        let layer = lab.open(&image, source.clone()).await;
        let readers = (0..32).map(|seed| {
            let (layer, image) = (layer.clone(), image.clone());
            tokio::spawn(async move {
                let mut random = Random::new(seed);
                for _ in 0..40 {
                    let range = random.range(image.size, 100_000);
                    let bytes = layer.read(range.clone()).await.unwrap();
                    assert!(bytes == image.bytes(range));
                }
            })
        });
        for reader in readers.collect::<Vec<_>>() {
            reader.await.unwrap();
        }
        layer.read(0..image.size).await.unwrap();
        for span in 0..image.spans.len() {
            assert_eq!(source.asked_for(image.middle(span)), 1, "span {span}");
        }
        assert!(layer.is_complete());
        assert_eq!(layer.progress(), (image.blob.len() as u64, image.blob.len() as u64));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_outside_of_the_layer_is_refused_and_nothing_is_nothing() {
    let image = Image::gzip(6, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let layer = lab.open(&image, Script::good(&image)).await;
    assert!(layer.read(image.size - 1..image.size + 1).await.is_err());
    assert!(layer.read(u64::MAX - 1..u64::MAX).await.is_err());
    assert_eq!(layer.read(5..5).await.unwrap(), Bytes::new());
    #[allow(clippy::reversed_empty_ranges)] // the point
    let backwards = 9..3;
    assert_eq!(layer.read(backwards).await.unwrap(), Bytes::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_reader_does_not_hurt_the_others() {
    let image = Arc::new(Image::gzip(8, 50_000));
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let source = Script::new(&image, |_| Act { delay: Duration::from_millis(3), ..Act::default() });
    let layer = lab.open(&image, source.clone()).await;
    let mut random = Random::new(1);
    let mut patient = Vec::new();
    for seed in 0..40 {
        let span = random.below(image.spans.len() as u64) as usize;
        let range = image.of_span(span);
        let (reading, copy) = (layer.clone(), range.clone());
        let interrupted = tokio::spawn(async move { reading.read(copy).await });
        let (reading, image) = (layer.clone(), image.clone());
        patient.push(tokio::spawn(async move {
            let bytes = reading.read(range.clone()).await.unwrap();
            assert!(bytes == image.bytes(range));
        }));
        tokio::time::sleep(Duration::from_micros(300 * seed)).await;
        interrupted.abort();
    }
    for reader in patient {
        within(SOON, reader).await.unwrap();
    }
    for span in 0..image.spans.len() {
        assert!(source.asked_for(image.middle(span)) <= 1, "span {span}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_snapshot_of_a_layer_shares_it() {
    let image = Image::gzip(9, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let first = lab.try_open(&image, Script::good(&image), 1).await.unwrap();
    let second = lab.try_open(&image, Script::good(&image), 2).await.unwrap();
    assert!(Arc::ptr_eq(&first, &second));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_is_inflated_before_it_is_read() {
    let image = Image::gzip(9, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::spilling(directory.path(), streaming(), 1 << 30);
    let layer = lab.open(&image, Script::good(&image)).await;
    let middles = (0..image.spans.len()).map(|span| image.of_span(span)).filter(|range| !range.is_empty());
    let middles: Vec<_> = middles.map(|range| range.start..range.start + 1).collect();
    until("all of it is there at once", || middles.iter().all(|range| layer.try_read(range.clone()).is_some())).await;
    for range in middles {
        assert!(layer.try_read(range.clone()).unwrap() == image.bytes(range));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_asks_a_registry_in_several_pieces_and_gets_one_span() {
    let image = Image::of_noise(10, 10, 1_500_000, 3_000_000);
    let longest = (0..image.spans.len())
        .max_by_key(|span| image.spans[*span].compressed.end - image.spans[*span].compressed.start);
    let (longest, size) = (longest.unwrap(), image.blob.len() as u64);
    let faults: [fn(&Request, u64) -> Act; 4] = [
        |_, _| Act::default(),
        |request, _| Act { extra: 100, cut: (request.number == 0).then_some(10_000), ..Act::default() },
        |request, _| Act { cut: (request.number == 2).then_some(10_000), ..Act::default() },
        |request, size| Act {
            corrupt: if request.avoid.is_empty() { (0..size).step_by(100_000).collect() } else { Vec::new() },
            host: Some(soci::registry::HostId::new("http://bad")),
            ..Act::default()
        },
    ];
    for fault in faults {
        let directory = tempdir().unwrap();
        let lab = Lab::at(directory.path(), quiet());
        let source = Script::at(Place::Remote, &image, move |request| fault(request, size));
        let layer = lab.open(&image, source.clone()).await;
        let range = image.of_span(longest);
        let bytes = within(SOON, layer.read(range.clone())).await.unwrap();
        assert!(bytes == image.bytes(range));
        assert!(source.requests().len() >= 2, "{}", source.requests().len());
    }
}
