//! Spans that memory must not hold.

use super::lab::*;
use soci::{fs::LayerData, ztoc::Compression};
use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::tempdir;

/// One span of `size` bytes that compress well.
fn compressible(size: usize) -> Image {
    let block = noise(80, 100_000);
    let mut data = Vec::with_capacity(size);
    while data.len() < size {
        // Every second piece repeats; some are zeros.
        data.extend_from_slice(&block);
        data.extend_from_slice(&block[..50_000]);
        data.extend_from_slice(&vec![0; 300_000]);
    }
    data.truncate(size);
    let tar = TarWriter::of(Dialect::Pax, &[Member::file("large", data)]);
    let blob = gzip(&tar, 1);
    let image = Image::of(tar, blob, Compression::Gzip, 1 << 40);
    assert_eq!(image.spans.len(), 1);
    image
}

/// The most memory this process has had since the last reset.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn reset_peak() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// In a process of its own, because memory is counted by process.
#[test]
fn a_span_of_200_mb_is_inflated_once_and_not_in_memory() {
    let module = module_path!().split_once("::").unwrap().1;
    let test = format!("{module}::ignored_in_a_process_of_its_own");
    let output =
        Command::new(std::env::current_exe().unwrap()).args(["--exact", &test, "--ignored", "--nocapture"]).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by the test above"]
async fn ignored_in_a_process_of_its_own() {
    let image = Arc::new(compressible(200_000_000));
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let source = Script::new(&image, |_| Act { chunk: 1 << 20, ..Act::default() });
    let layer = lab.open(&image, source.clone()).await;
    reset_peak();
    let before = peak_kib();
    let readers = (0..8).map(|seed| {
        let (layer, image) = (layer.clone(), image.clone());
        tokio::spawn(async move {
            let mut random = Random::new(seed);
            for _ in 0..50 {
                let range = random.range(image.size, 1 << 20);
                let bytes = layer.read(range.clone()).await.unwrap();
                assert!(bytes == image.bytes(range));
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        within(4 * SOON, reader).await.unwrap();
    }
    let grown = peak_kib().saturating_sub(before) >> 10;
    assert!(image.blob.len() > 40 << 20, "large on the wire, too");
    // What eight reads hold, and a few pieces.
    assert!(grown < 32, "memory grew by {grown} MiB");
    assert_eq!(source.requests().len(), 1);
    let data = fs::metadata(lab.layout.layer(&image.layer).join("data")).unwrap();
    assert!(
        data.len() >= image.size && data.blocks() * 512 < 150_000_000,
        "zeros take no room: {}",
        data.blocks() * 512
    );
    // Every read after that is one from a file.
    let begun = Instant::now();
    for _ in 0..20 {
        layer.read(image.size - 100_000..image.size).await.unwrap();
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_span_that_breaks_off_goes_on_where_it_was() {
    // Does not compress: the span is large on the wire as well.
    let tar = TarWriter::of(
        Dialect::Pax,
        &[Member::file("large", random_bytes(81, 40_000_000)), Member::file("small", noise(1, 50_000))],
    );
    for (compression, blob) in [(Compression::Gzip, gzip(&tar, 1)), (Compression::Uncompressed, tar.clone())] {
        let image = Image::of(tar.clone(), blob, compression, 1 << 40);
        for settings in [quiet(), streaming()] {
            let directory = tempdir().unwrap();
            let lab = Lab::at(directory.path(), settings);
            let source = Script::new(&image, |_| Act { cut: Some(15_000_000), chunk: 256 << 10, ..Act::default() });
            let layer = lab.open(&image, source.clone()).await;
            let range = 39_000_000..39_500_000;
            let bytes = within(2 * SOON, layer.read(range.clone())).await.unwrap();
            assert!(bytes == image.bytes(range));
            let starts: Vec<u64> = source.requests().iter().map(|request| request.range.start).collect();
            assert_eq!(starts, [0, 15_000_000, 30_000_000]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_span_with_a_wrong_digest_is_never_served() {
    let tar = TarWriter::of(Dialect::Pax, &[Member::file("large", random_bytes(82, 40_000_000))]);
    for (compression, blob) in [(Compression::Gzip, gzip(&tar, 1)), (Compression::Uncompressed, tar.clone())] {
        let image = Image::of(tar.clone(), blob, compression, 1 << 40);
        let directory = tempdir().unwrap();
        let lab = Lab::at(directory.path(), quiet());
        let wrong = image.blob.len() as u64 - 100;
        let source = Script::new(&image, move |request| Act {
            corrupt: if request.number == 0 { vec![wrong] } else { Vec::new() },
            chunk: 256 << 10,
            ..Act::default()
        });
        let layer = lab.open(&image, source.clone()).await;
        let bytes = within(2 * SOON, layer.read(0..1_000_000)).await.unwrap();
        assert!(bytes == image.bytes(0..1_000_000));
        assert_eq!(source.requests().len(), 2);
        // Damaged behind our back, found by the next daemon.
        let path = lab.layout.layer(&image.layer);
        drop((layer, lab));
        OpenOptions::new().write(true).open(path.join("blob")).unwrap().write_all_at(b"damage", 20_000_000).unwrap();
        let lab = Lab::at(directory.path(), quiet());
        let source = Script::new(&image, |_| Act { chunk: 256 << 10, ..Act::default() });
        let layer = lab.open(&image, source.clone()).await;
        let range = 19_900_000..20_100_000;
        let readers = (0..4).map(|_| layer.read(range.clone()));
        for bytes in within(2 * SOON, futures::future::join_all(readers)).await {
            assert!(bytes.unwrap() == image.bytes(range.clone()));
        }
        assert_eq!(source.requests().len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_reader_of_a_large_span_leaves_its_work_to_the_others() {
    let image = Arc::new(compressible(60_000_000));
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let source = Script::new(&image, |_| Act { chunk: 1 << 20, ..Act::default() });
    let layer = lab.open(&image, source.clone()).await;
    for wait in [0, 1, 5, 20, 50] {
        let (reading, end) = (layer.clone(), image.size);
        let reader = tokio::spawn(async move { reading.read(end - 1000..end).await });
        tokio::time::sleep(Duration::from_millis(wait)).await;
        reader.abort();
    }
    let range = image.size - 1000..image.size;
    let bytes = within(SOON, layer.read(range.clone())).await.unwrap();
    assert!(bytes == image.bytes(range));
    assert_eq!(source.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_removed_while_a_large_span_is_inflated_ends_it() {
    let image = Arc::new(compressible(60_000_000));
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let layer = lab.open(&image, Script::good(&image)).await;
    let (reading, end) = (layer.clone(), image.size);
    let reader = tokio::spawn(async move { reading.read(end - 1000..end).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    lab.store.release(image.layer, soci::layout::SnapshotId(1)).await.unwrap();
    let _ = within(SOON, reader).await.unwrap();
    assert!(!lab.layout.layer(&image.layer).exists());
}
