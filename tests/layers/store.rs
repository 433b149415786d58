//! When a layer is opened, by whom it is held, and when it goes.

use super::lab::*;
use soci::{fs::LayerData, layout::SnapshotId, oci::Digest};
use std::{fs, sync::Arc, time::Duration};
use tempfile::tempdir;

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_goes_with_its_last_user() {
    let image = Image::gzip(70, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let path = lab.layout.layer(&image.layer);
    let claim = lab.store.claim();
    lab.try_open(&image, Script::good(&image), 1).await.unwrap();
    lab.try_open(&image, Script::good(&image), 2).await.unwrap();
    lab.store.open(lab.wanted(&image, Script::good(&image)), claim).await.unwrap();
    lab.store.release(image.layer, SnapshotId(1)).await.unwrap();
    lab.store.release(image.layer, SnapshotId(1)).await.unwrap();
    lab.store.release(image.layer, SnapshotId(3)).await.unwrap();
    lab.store.release(image.layer, claim).await.unwrap();
    assert!(path.join("spans").exists());
    lab.store.release(image.layer, SnapshotId(2)).await.unwrap();
    assert!(!path.exists());
    assert_eq!(fs::read_dir(lab.layout.layers()).unwrap().count(), 0, "nothing is left beside it");
    // It can come again.
    let layer = lab.try_open(&image, Script::good(&image), 4).await.unwrap();
    assert!(path.join("spans").exists());
    layer.read(0..image.size).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_removed_while_somebody_still_has_it_is_opened_anew() {
    let image = Image::gzip(71, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let old = lab.try_open(&image, Script::good(&image), 1).await.unwrap();
    old.read(image.of_span(0)).await.unwrap();
    lab.store.release(image.layer, SnapshotId(1)).await.unwrap();
    let new = lab.try_open(&image, Script::good(&image), 2).await.unwrap();
    assert!(!Arc::ptr_eq(&old, &new));
    let bytes = new.read(0..image.size).await.unwrap();
    assert!(bytes == image.bytes(0..image.size));
    // What it has fetched is really there.
    drop((old, new, lab));
    let lab = Lab::at(directory.path(), quiet());
    let layer = lab.try_open(&image, Arc::new(Unneeded), 2).await.unwrap();
    layer.read(0..image.size).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn opening_and_releasing_at_the_same_time_is_safe() {
    let image = Arc::new(Image::gzip(72, 200_000));
    let directory = tempdir().unwrap();
    let lab = Arc::new(Lab::at(directory.path(), streaming()));
    let users = (0..12).map(|user| {
        let (lab, image) = (lab.clone(), image.clone());
        tokio::spawn(async move {
            let mut random = Random::new(user.into());
            for _ in 0..15 {
                let layer = lab.try_open(&image, Script::good(&image), user).await.unwrap();
                let range = random.range(image.size, 10_000);
                let bytes = layer.read(range.clone()).await.unwrap();
                assert!(bytes == image.bytes(range));
                drop(layer);
                lab.store.release(image.layer, SnapshotId(user)).await.unwrap();
            }
        })
    });
    for user in users.collect::<Vec<_>>() {
        within(2 * SOON, user).await.unwrap();
    }
    assert_eq!(fs::read_dir(lab.layout.layers()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gives_up_opening_holds_nothing() {
    let image = Image::gzip(73, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    for wait in 0..20 {
        let opening = lab.try_open(&image, Script::good(&image), 1);
        let _ =
            tokio::time::timeout(Duration::from_micros(wait * 500), opening).await.map(|result| drop(result.unwrap()));
        // The one that came in time is a user.
        lab.store.release(image.layer, SnapshotId(1)).await.unwrap();
        let path = lab.layout.layer(&image.layer);
        within(SOON, async {
            while path.exists() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_cannot_be_opened_has_no_user() {
    let image = Image { ztoc: bytes::Bytes::from_static(b"no zTOC at all"), ..Image::gzip(74, 50_000) };
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    assert!(lab.try_open(&image, Script::good(&image), 1).await.is_err());
    let store = lab.store.clone();
    tokio::task::spawn_blocking(move || store.sweep()).await.unwrap().unwrap();
    assert_eq!(fs::read_dir(lab.layout.layers()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_removes_what_nobody_uses_and_nothing_else() {
    let images: Vec<Image> = (0..3).map(|n| Image::gzip(75 + 100 * n, 200_000)).collect();
    let directory = tempdir().unwrap();
    {
        let lab = Lab::at(directory.path(), quiet());
        for image in &images {
            lab.open(image, Script::good(image)).await;
        }
    }
    let lab = Lab::at(directory.path(), quiet());
    let sweep = || {
        let store = lab.store.clone();
        tokio::task::spawn_blocking(move || store.sweep())
    };
    let layers = lab.layout.layers();
    fs::create_dir_all(layers.join("nonsense/below")).unwrap();
    fs::create_dir_all(layers.join(format!("{}.gone", Digest::of(b"x").hex()))).unwrap();
    fs::write(layers.join("file"), b"").unwrap();
    let kept = lab.open(&images[1], Arc::new(Unneeded)).await;
    assert_eq!(sweep().await.unwrap().unwrap(), 5);
    let left: Vec<_> = fs::read_dir(&layers).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [lab.layout.layer(&images[1].layer)]);
    assert_eq!(sweep().await.unwrap().unwrap(), 0);
    drop(kept);
    // Not even while it is being opened.
    for turn in 0..10 {
        let opening = lab.try_open(&images[0], Script::good(&images[0]), 5);
        let (layer, swept) = tokio::join!(opening, async {
            tokio::time::sleep(Duration::from_micros(turn * 400)).await;
            sweep().await.unwrap()
        });
        swept.unwrap();
        layer.unwrap().read(0..images[0].size).await.unwrap();
        assert!(lab.layout.layer(&images[0].layer).join("spans").exists());
        lab.store.release(images[0].layer, SnapshotId(5)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_of_nothing_is_no_error() {
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    assert_eq!(lab.store.sweep().unwrap(), 0);
}
