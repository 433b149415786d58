//! The layer store: zTOC, table of contents, spans and their marks.

use super::{Job, Random, at_every_change, runtime, say, seeds};
use crate::layers::lab::{Image, Lab, Script, quiet};
use soci::fs::LayerData;
use soci::layout::SnapshotId;
use soci::oci::Digest;
use std::path::Path;
use std::sync::Arc;

/// Small enough that two of them are a few dozen writes each.
fn images() -> Vec<Image> {
    [300, 301].map(|seed| Image::of_noise(seed, 12, 40_000, 60_000)).to_vec()
}

#[test]
#[ignore = "run by the tests below, which kill it"]
fn child() {
    let Some(job) = Job::mine() else { return };
    let images = images();
    runtime().block_on(async {
        let lab = Lab::at(&job.place, quiet());
        let mut random = Random::new(job.seed);
        for _ in 0..job.steps {
            let image = &images[random.below(images.len())];
            let user = 1 + random.below(2) as u32;
            match random.below(10) {
                0..6 => {
                    let layer = lab.try_open(image, Script::good(image), user).await.unwrap();
                    for _ in 0..1 + random.below(4) {
                        let span = random.below(image.spans.len());
                        let bytes = layer.read(image.of_span(span)).await.unwrap();
                        assert!(bytes == image.bytes(image.of_span(span)));
                    }
                    say(&format!("read {user}"));
                }
                6 => {
                    let layer = lab.try_open(image, Script::good(image), user).await.unwrap();
                    layer.read(0..image.size).await.unwrap();
                    say(&format!("all {user}"));
                }
                7 | 8 => lab.store.release(image.layer, SnapshotId(user)).await.unwrap(),
                _ => {
                    let store = lab.store.clone();
                    tokio::task::spawn_blocking(move || store.sweep()).await.unwrap().unwrap();
                }
            }
        }
    });
}

/// Spans that are marked as present, and how many of them have other bytes than their digest covers.
pub fn marks(root: &Path, image: &Image) -> (usize, usize) {
    let directory = soci::layout::Layout::new(root).layer(&image.layer);
    let (Ok(marks), Ok(blob)) = (std::fs::read(directory.join("spans")), std::fs::read(directory.join("blob"))) else {
        return (0, 0);
    };
    let (mut marked, mut wrong) = (0, 0);
    for (n, span) in image.spans.iter().enumerate() {
        // After the magic and the zTOC's digest.
        if marks.get(40 + n) == Some(&1) {
            let range = span.compressed.start as usize..span.compressed.end as usize;
            marked += 1;
            wrong += usize::from(blob.get(range).is_none_or(|bytes| Digest::of(bytes) != span.digest));
        }
    }
    (marked, wrong)
}

/// Opens what is left: every byte is right, nothing that nobody uses stays.
pub fn check(root: &Path) {
    let images = images();
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(async {
        let lab = Lab::at(root, quiet());
        for image in &images {
            let layer = lab.try_open(image, Script::good(image), 1).await.unwrap();
            let bytes = layer.read(0..image.size).await.unwrap();
            assert!(bytes == image.bytes(0..image.size), "other bytes than the layer has");
        }
        let store = lab.store.clone();
        tokio::task::spawn_blocking(move || store.sweep()).await.unwrap().unwrap();
        let mut left: Vec<String> = std::fs::read_dir(lab.layout.layers())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let mut used: Vec<String> = images.iter().map(|image| image.layer.hex().to_string()).collect();
        left.sort();
        used.sort();
        assert_eq!(left, used);
        for image in &images {
            let mut files: Vec<String> = std::fs::read_dir(lab.layout.layer(&image.layer))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            // A layer that was complete for long enough has been examined.
            files.retain(|name| name != "verdict");
            files.sort();
            assert_eq!(files, ["blob", "spans", "toc", "ztoc"], "no temporary files");
            lab.store.release(image.layer, SnapshotId(1)).await.unwrap();
        }
        assert_eq!(std::fs::read_dir(lab.layout.layers()).unwrap().count(), 0);
    });
}

pub const CHILD: &str = "crash::layers::child";

#[test]
fn the_layer_store_is_killed_at_every_write_and_never_serves_another_byte() {
    let images = Arc::new(images());
    let mut places = 0;
    for seed in seeds(&[1]) {
        places += at_every_change(CHILD, seed, 10, |root, _| {
            for image in images.iter() {
                let (_, wrong) = marks(root, image);
                assert_eq!(wrong, 0, "a mark is made after its bytes");
            }
            check(root);
        });
    }
    assert!(places > 50, "{places}");
    eprintln!("killed at {places} places");
}

pub fn all() -> Vec<Image> {
    images()
}
