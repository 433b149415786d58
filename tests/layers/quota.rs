//! The quota of the layer store: what is evicted, what is not, and that no reader ever notices.

use super::lab::*;
use soci::{
    fs::LayerData,
    layers::{Background, Layer, QuotaSettings, Remedy, Settings},
    layout::SnapshotId,
};
use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tempfile::tempdir;

/// A quota of that share of the layer, with the usual marks.
fn share_of(image: &Image, percent: u64) -> QuotaSettings {
    QuotaSettings::of(image.blob.len() as u64 * percent / 100, 90, 80)
}

fn blocks(lab: &Lab, image: &Image) -> u64 {
    std::fs::metadata(lab.layout.layer(&image.layer).join("blob")).unwrap().blocks() * 512
}

async fn reads_each_span(layer: &Layer, image: &Image) {
    for span in 0..image.spans.len() {
        let range = image.of_span(span);
        assert!(layer.read(range.clone()).await.unwrap() == image.bytes(range), "span {span}");
    }
}

/// What the layer store has on disk is within its marks again.
async fn settled(lab: &Lab, quota: QuotaSettings) {
    until("what is too much is evicted", || lab.scheduler.usage().0 <= quota.high).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_larger_than_the_quota_is_read_whole_and_takes_no_more_than_it_may() {
    for image in [Image::gzip(80, 30_000), Image::plain(80, 32_768)] {
        let directory = tempdir().unwrap();
        let quota = share_of(&image, 50);
        let lab = Lab::at(directory.path(), Settings { quota, ..quiet() });
        let layer = lab.open(&image, Script::good(&image)).await;
        for _ in 0..3 {
            reads_each_span(&layer, &image).await;
            settled(&lab, quota).await;
            // The blocks at the ends of a span may stay.
            let edges = 2 * 4096 * image.spans.len() as u64;
            assert!(blocks(&lab, &image) <= quota.max + edges, "{} of {}", blocks(&lab, &image), quota.max);
        }
        assert!(lab.seen.evicted.load(Ordering::SeqCst) > image.spans.len() / 2);
        assert!(!layer.is_complete());
        let bytes = layer.read(0..image.size).await.unwrap();
        assert!(bytes == image.bytes(0..image.size));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_background_stops_below_the_low_mark_and_never_brings_back_what_was_evicted() {
    let image = Image::gzip(81, 30_000);
    let directory = tempdir().unwrap();
    let quota = share_of(&image, 50);
    let lab = Lab::at(directory.path(), Settings { quota, ..streaming() });
    let source = Script::good(&image);
    let layer = lab.open(&image, source.clone()).await;
    until("the background has stopped", || lab.scheduler.background() == Background::AtQuota).await;
    assert!(lab.scheduler.usage().0 <= quota.low + quota.max / 5);
    reads_each_span(&layer, &image).await;
    settled(&lab, quota).await;
    let before = source.requests().len();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(source.requests().len(), before, "nobody reads, nothing is fetched");
    // More room, at once.
    lab.scheduler.reconfigure(streaming());
    until("all of it is here", || layer.is_complete()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_longest_ago_goes_first() {
    let image = Image::gzip(82, 30_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let source = Script::good(&image);
    let layer = lab.open(&image, source.clone()).await;
    reads_each_span(&layer, &image).await;
    // Not from memory, and in another second than the others.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let recent = [1, 4];
    for span in recent {
        layer.read(image.of_span(span)).await.unwrap();
    }
    let quota = share_of(&image, 50);
    lab.scheduler.reconfigure(Settings { quota, ..quiet() });
    // The next one that arrives finds it too full. Another layer, so that everything of this one may go.
    let other = Image::gzip(83, 30_000);
    let more = lab.try_open(&other, Script::good(&other), 2).await.unwrap();
    more.read(other.of_span(0)).await.unwrap();
    settled(&lab, quota).await;
    for span in recent {
        layer.read(image.of_span(span)).await.unwrap();
        assert_eq!(source.asked_for(image.middle(span)), 1, "span {span} was read a moment ago");
    }
    assert!(!layer.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_prefetch_artifact_names_is_never_evicted_also_after_a_restart() {
    let image = Image::gzip(84, 30_000);
    let directory = tempdir().unwrap();
    let quota = share_of(&image, 40);
    let settings = || Settings { quota, ..quiet() };
    {
        let lab = Lab::at(directory.path(), settings());
        let layer = lab.open(&image, Script::good(&image)).await;
        lab.scheduler.prefetch(&layer, 0..2);
        reads_each_span(&layer, &image).await;
        settled(&lab, quota).await;
    }
    let lab = Lab::at(directory.path(), settings());
    let source = Script::good(&image);
    let layer = lab.open(&image, source.clone()).await;
    for _ in 0..2 {
        reads_each_span(&layer, &image).await;
        settled(&lab, quota).await;
    }
    assert!(lab.seen.evicted.load(Ordering::SeqCst) > 0);
    for span in 0..2 {
        assert_eq!(source.asked_for(image.middle(span)), 0, "span {span} is pinned");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_everything_is_pinned_what_is_read_beyond_the_quota_is_served_and_not_kept() {
    let image = Image::gzip(85, 30_000);
    let directory = tempdir().unwrap();
    let quota = share_of(&image, 30);
    let lab = Lab::at(directory.path(), Settings { quota, ..quiet() });
    let layer = lab.open(&image, Script::good(&image)).await;
    lab.scheduler.prefetch(&layer, 0..image.spans.len());
    for _ in 0..2 {
        reads_each_span(&layer, &image).await;
    }
    assert_eq!(lab.seen.evicted.load(Ordering::SeqCst), 0);
    assert!(lab.scheduler.usage().0 <= quota.max);
    assert_eq!(lab.scheduler.background(), Background::NoRoom);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_smaller_quota_takes_effect_at_the_next_start_without_a_read() {
    let image = Image::gzip(86, 30_000);
    let directory = tempdir().unwrap();
    {
        let lab = Lab::at(directory.path(), quiet());
        reads_each_span(&*lab.open(&image, Script::good(&image)).await, &image).await;
    }
    let quota = share_of(&image, 30);
    let lab = Lab::at(directory.path(), Settings { quota, ..quiet() });
    let source = Script::good(&image);
    let layer = lab.open(&image, source.clone()).await;
    settled(&lab, quota).await;
    assert_eq!(source.requests().len(), 0);
    assert!(blocks(&lab, &image) < image.blob.len() as u64 / 2);
    reads_each_span(&layer, &image).await;
    // Removing it gives back what was counted.
    drop(layer);
    lab.store.release(image.layer, SnapshotId(1)).await.unwrap();
    until("nothing is counted", || lab.scheduler.usage().0 == 0).await;
}

/// The same bytes as the tar, whatever is evicted, fails, or is restarted in between.
#[tokio::test(flavor = "multi_thread")]
async fn reads_equal_the_tar_while_spans_are_evicted_sources_fail_and_daemons_come_and_go() {
    for seed in 0..4 {
        let image = Arc::new(if seed % 2 == 0 { Image::gzip(87 + seed, 20_000) } else { Image::plain(87, 16_384) });
        let directory = tempdir().unwrap();
        let mut evicted = 0;
        for life in 0..4 {
            let pace = if life % 2 == 0 { quiet() } else { streaming() };
            let quota = share_of(&image, 15 + 10 * life);
            let settings = Settings { quota, retries: 1000, verification_retries: 1000, budget: 4 * SOON, ..pace };
            evicted += one_life(directory.path(), settings, &image, seed * 10 + life).await;
        }
        assert!(evicted > image.spans.len(), "{evicted}");
    }
}

async fn one_life(root: &Path, settings: Settings, image: &Arc<Image>, seed: u64) -> usize {
    let lab = Lab::at(root, settings);
    let size = image.blob.len() as u64;
    let source = Script::new(image, move |request| {
        let mut random = Random::new(seed * 1000 + request.number as u64);
        let mut act = Act { chunk: 2000 + random.below(40_000) as usize, ..Act::default() };
        match random.below(8) {
            0 => act.refuse = Some(Remedy::Retry(Some(Duration::from_millis(random.below(5))))),
            1 => act.cut = Some(random.below(30_000)),
            2 => act.corrupt = vec![random.below(size)],
            _ => {}
        }
        act
    });
    let layer = lab.open(image, source).await;
    let readers = (0..8).map(|reader| {
        let (layer, image) = (layer.clone(), image.clone());
        tokio::spawn(async move {
            let mut random = Random::new(seed * 100 + reader);
            for _ in 0..60 {
                let range = random.range(image.size, 100_000);
                let bytes = layer.read(range.clone()).await.unwrap();
                assert!(bytes == image.bytes(range));
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        within(6 * SOON, reader).await.unwrap();
    }
    lab.seen.evicted.load(Ordering::SeqCst)
}
