//! What is on disk: used again without the network, never trusted unchecked, and not needed to read.

use super::lab::*;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use soci::{
    fs::{LayerData, ReadError},
    layers::{Layer, Remedy},
    layout::SnapshotId,
    oci::Digest,
    ztoc::Compression,
};
use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tempfile::tempdir;

async fn reads_all(layer: &Layer, image: &Image) {
    let bytes = layer.read(0..image.size).await.unwrap();
    assert!(bytes == image.bytes(0..image.size));
}

/// A directory in which an earlier daemon has read all of `image`.
async fn read_before(image: &Image) -> (tempfile::TempDir, PathBuf) {
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let layer = lab.open(image, Script::good(image)).await;
    reads_all(&layer, image).await;
    until("it is checked", || lab.seen.complete.load(Ordering::SeqCst) == 1).await;
    let path = lab.layout.layer(&image.layer);
    (directory, path)
}

fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

/// Puts another file in its place; the one that is there may be linked elsewhere.
fn replace(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_here_is_read_without_a_source_after_a_restart() {
    for image in [Image::gzip(50, 50_000), Image::plain(50, 65_536)] {
        let (directory, _) = read_before(&image).await;
        let lab = Lab::at(directory.path(), streaming());
        let layer = lab.open(&image, Arc::new(Unneeded)).await;
        assert!(layer.is_complete());
        assert_eq!(layer.progress().0, image.blob.len() as u64);
        reads_all(&layer, &image).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn opening_needs_neither_a_source_nor_the_fetched_ztoc_after_a_restart() {
    let image = Image::gzip(51, 50_000);
    let (directory, _) = read_before(&image).await;
    fs::remove_dir_all(directory.path().join("content")).unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let wanted = lab.wanted(&image, Arc::new(Unneeded));
    fs::remove_file(&wanted.ztoc_path).unwrap();
    let layer = lab.store.open(wanted, SnapshotId(7)).await.unwrap();
    reads_all(&layer, &image).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_bytes_on_disk_are_fetched_again_and_never_served() {
    for image in [Image::gzip(52, 50_000), Image::plain(52, 65_536)] {
        let (directory, path) = read_before(&image).await;
        for span in [0, 2, image.spans.len() - 1] {
            overwrite(&path.join("blob"), image.middle(span), b"damage");
        }
        let lab = Lab::at(directory.path(), quiet());
        let source = Script::good(&image);
        let layer = lab.open(&image, source.clone()).await;
        let readers = (0..8).map(|_| reads_all(&layer, &image));
        futures::future::join_all(readers).await;
        assert!(layer.is_complete());
        for span in 0..image.spans.len() {
            let damaged = [0, 2, image.spans.len() - 1].contains(&span);
            let asked = source.asked_for(image.middle(span));
            assert!(if damaged { (1..=3).contains(&asked) } else { asked == 0 }, "span {span}: {asked}");
        }
        drop((layer, lab));
        let lab = Lab::at(directory.path(), quiet());
        reads_all(&*lab.open(&image, Arc::new(Unneeded)).await, &image).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_without_its_bytes_is_found_out() {
    let image = Image::gzip(53, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let path = lab.layout.layer(&image.layer);
    drop(lab.open(&image, Script::good(&image)).await);
    drop(lab);
    // As after a power cut: every mark was written, no byte was.
    overwrite(&path.join("spans"), 40, &vec![1; image.spans.len()]);
    let lab = Lab::at(directory.path(), quiet());
    let layer = lab.open(&image, Script::good(&image)).await;
    assert!(layer.is_complete(), "as far as it knows");
    reads_all(&layer, &image).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_crash_leaves_of_a_directory_it_is_used_or_made_again() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage); 16] = [
        ("no spans", |d| fs::remove_file(d.join("spans")).unwrap()),
        ("empty spans", |d| replace(&d.join("spans"), |b| b.clear())),
        ("spans in the header", |d| replace(&d.join("spans"), |b| b.truncate(20))),
        ("spans cut", |d| replace(&d.join("spans"), |b| b.truncate(43))),
        ("spans of zeros", |d| replace(&d.join("spans"), |b| b.fill(0))),
        ("no toc", |d| fs::remove_file(d.join("toc")).unwrap()),
        ("empty toc", |d| replace(&d.join("toc"), |b| b.clear())),
        ("toc cut", |d| replace(&d.join("toc"), |b| b.truncate(b.len() - 1))),
        ("toc of zeros", |d| replace(&d.join("toc"), |b| b.fill(0))),
        ("no ztoc", |d| fs::remove_file(d.join("ztoc")).unwrap()),
        ("empty ztoc", |d| replace(&d.join("ztoc"), |b| b.clear())),
        ("ztoc cut", |d| replace(&d.join("ztoc"), |b| b.truncate(b.len() / 2))),
        ("a wrong window in the ztoc", |d| {
            replace(&d.join("ztoc"), |b| {
                let middle = b.len() / 2;
                b[middle] ^= 1;
            })
        }),
        ("no blob", |d| fs::remove_file(d.join("blob")).unwrap()),
        ("blob cut", |d| replace(&d.join("blob"), |b| b.truncate(b.len() / 2))),
        ("nothing", |d| fs::remove_dir_all(d).unwrap()),
    ];
    let image = Image::gzip(54, 50_000);
    for (name, damage) in cases {
        let (directory, path) = read_before(&image).await;
        for leftover in ["spans.new", "toc.new", "ztoc.new", "data"] {
            fs::write(path.join(leftover), b"left over").unwrap();
        }
        damage(&path);
        let lab = Lab::at(directory.path(), quiet());
        let layer = lab.try_open(&image, Script::good(&image), 1).await;
        let layer = layer.unwrap_or_else(|error| panic!("{name}: {error}"));
        let bytes = layer.read(0..image.size).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(bytes == image.bytes(0..image.size), "{name}");
        drop((layer, lab));
        // And what is there now is whole.
        let lab = Lab::at(directory.path(), quiet());
        let layer = lab.open(&image, Arc::new(Unneeded)).await;
        reads_all(&layer, &image).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_to_the_toc_or_ztoc_costs_no_download() {
    let image = Image::gzip(55, 50_000);
    for name in ["toc", "ztoc"] {
        let (directory, path) = read_before(&image).await;
        replace(&path.join(name), |b| b.truncate(100));
        let lab = Lab::at(directory.path(), quiet());
        reads_all(&*lab.open(&image, Arc::new(Unneeded)).await, &image).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ztoc_that_is_not_the_one_is_refused_by_name() {
    let image = Image::gzip(56, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let wanted = lab.wanted(&image, Script::good(&image));
    let path = wanted.ztoc_path.clone();
    replace(&path, |bytes| bytes[1000] ^= 1);
    let error = lab.store.open(wanted.clone(), SnapshotId(1)).await.err().unwrap().to_string();
    assert!(error.contains(path.to_str().unwrap()) && error.contains("is not the zTOC"), "{error}");
    fs::remove_file(&path).unwrap();
    let error = lab.store.open(wanted, SnapshotId(1)).await.err().unwrap().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_layer_that_is_not_the_layer_is_reported_once() {
    let image = Image { layer: Digest::of(b"another layer"), ..Image::gzip(57, 50_000) };
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), streaming());
    let layer = lab.open(&image, Script::good(&image)).await;
    until("it is complete", || lab.seen.complete.load(Ordering::SeqCst) == 1).await;
    assert_eq!(lab.seen.contradictions.load(Ordering::SeqCst), 1);
    let error = layer.read(0..1000).await.unwrap_err();
    assert!(matches!(error, ReadError::Condemned { .. }), "{error}");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(lab.seen.contradictions.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_index_is_not_blamed_for_what_the_disk_has_done() {
    let image = Image::gzip(58, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let path = lab.layout.layer(&image.layer);
    let layer = lab.open(&image, Script::good(&image)).await;
    layer.read(0..image.size / 2).await.unwrap();
    drop((layer, lab));
    overwrite(&path.join("blob"), image.middle(1), b"damage");
    let lab = Lab::at(directory.path(), streaming());
    let layer = lab.open(&image, Script::good(&image)).await;
    until("it is complete and right", || lab.seen.complete.load(Ordering::SeqCst) == 1).await;
    assert_eq!(lab.seen.contradictions.load(Ordering::SeqCst), 0);
    reads_all(&layer, &image).await;
}

/// A filesystem of its own, of a given size.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(bytes: usize) -> Tmpfs {
        let directory = tempdir().unwrap();
        let options = format!("size={bytes}");
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Tmpfs(directory)
    }
    fn resize(&self, bytes: usize) {
        let options = format!("size={bytes}");
        mount(Some("tmpfs"), self.0.path(), Some("tmpfs"), MsFlags::MS_REMOUNT, Some(options.as_str())).unwrap();
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_full_disk_fails_no_read_and_is_not_filled_in_a_loop() {
    for image in [Image::gzip(59, 50_000), Image::plain(59, 65_536)] {
        let disk = Tmpfs::new(image.ztoc.len() + image.blob.len() / 2);
        let lab = Lab::at(disk.0.path(), streaming());
        let source = Script::good(&image);
        let layer = lab.open(&image, source.clone()).await;
        for _ in 0..3 {
            for span in 0..image.spans.len() {
                let range = image.of_span(span);
                assert!(layer.read(range.clone()).await.unwrap() == image.bytes(range));
            }
        }
        assert!(!layer.is_complete());
        let before = source.requests().len();
        tokio::time::sleep(Duration::from_secs(3)).await;
        let after = source.requests().len();
        assert!(after - before <= 4, "{} requests in 3 s that nobody made", after - before);
        disk.resize(16 << 20);
        until("there is room again", || layer.is_complete()).await;
        reads_all(&layer, &image).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_full_disk_fails_no_read_of_a_large_span() {
    // One span of 20 MB that has room nowhere.
    let tar = TarWriter::of(Dialect::Pax, &[Member::file("f", random_bytes(60, 20_000_000))]);
    for compression in [Compression::Gzip, Compression::Uncompressed] {
        let blob = if compression == Compression::Gzip { gzip(&tar, 1) } else { tar.clone() };
        let image = Image::of(tar.clone(), blob, compression, 1 << 30);
        assert_eq!(image.spans.len(), 1);
        let disk = Tmpfs::new(4 << 20);
        let lab = Lab::at(disk.0.path(), quiet());
        // The first answer is wrong, so it must not be what is read.
        let wrong = image.middle(0);
        let source = Script::new(&image, move |request| Act {
            corrupt: if request.number == 1 { vec![wrong] } else { Vec::new() },
            chunk: 256 << 10,
            ..Act::default()
        });
        let layer = lab.open(&image, source.clone()).await;
        let range = 9_000_000..9_100_000;
        let bytes = within(2 * SOON, layer.read(range.clone())).await.unwrap();
        assert!(bytes == image.bytes(range));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_neither_fetched_nor_inflated_bytes_take_the_last_of_the_disk() {
    let image = Image::gzip(62, 50_000);
    // The blob fits, what is inflated from it does not.
    let disk = Tmpfs::new(image.ztoc.len() + image.blob.len() * 5 / 4 + image.size as usize / 8);
    let lab = Lab::spilling(disk.0.path(), streaming(), 1 << 30);
    let layer = lab.open(&image, Script::good(&image)).await;
    for _ in 0..3 {
        for span in 0..image.spans.len() {
            let range = image.of_span(span);
            assert!(layer.read(range.clone()).await.unwrap() == image.bytes(range));
        }
    }
    let stat = nix::sys::statvfs::statvfs(disk.0.path()).unwrap();
    let (free, whole) = (stat.blocks_available(), stat.blocks());
    eprintln!("{free} of {whole} blocks are free");
    assert!(free >= whole / 64, "{free} of {whole} blocks are free");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_in_the_middle_of_a_download_goes_on_where_it_was() {
    let image = Image::gzip(61, 20_000);
    let directory = tempdir().unwrap();
    let (mut asked, mut lives) = (0, 0);
    loop {
        let lab = Lab::at(directory.path(), streaming());
        let source = Script::new(&image, |request| Act {
            refuse: (request.number > 0).then_some(Remedy::Retry(None)),
            cut: Some(300_000),
            ..Act::default()
        });
        let layer = lab.open(&image, source.clone()).await;
        lives += 1;
        if layer.is_complete() {
            break;
        }
        until("a part has come", || source.requests().len() > 1 || layer.is_complete()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        asked += source.sent();
        assert!(lives < 20);
    }
    assert!(lives > 2 && asked < image.blob.len() * 3 / 2, "{lives} lives, {asked} bytes");
}
