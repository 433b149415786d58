//! What is fetched that nobody has asked for, and that it is in nobody's way.

use super::lab::*;
use soci::{
    fs::LayerData,
    layers::{Pace, Remedy, Settings},
};
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};
use tempfile::tempdir;

#[tokio::test(flavor = "multi_thread")]
async fn everything_arrives_when_nobody_reads() {
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), streaming());
    let images: Vec<Image> = (0..3).map(|n| Image::gzip(30 + 100 * n, 50_000)).collect();
    let mut layers = Vec::new();
    for image in &images {
        layers.push(lab.open(image, Script::good(image)).await);
    }
    until("all are complete", || layers.iter().all(|layer| layer.is_complete())).await;
    until("all are checked", || lab.seen.complete.load(Ordering::SeqCst) == 3).await;
    assert_eq!(lab.seen.contradictions.load(Ordering::SeqCst), 0);
    assert_eq!(lab.scheduler.queue_length(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_background_only_what_is_read_is_fetched() {
    let image = Image::gzip(31, 50_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let source = Script::good(&image);
    let layer = lab.open(&image, source.clone()).await;
    layer.read(image.of_span(3)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let asked: Vec<_> = source.requests().into_iter().map(|request| request.range).collect();
    assert_eq!(asked, [image.spans[3].compressed.clone()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn at_a_pace_one_span_comes_per_period_after_the_silence() {
    let image = Image::gzip(32, 50_000);
    let directory = tempdir().unwrap();
    let (period, silence) = (Duration::from_millis(100), Duration::from_millis(400));
    let lab = Lab::at(directory.path(), Settings { pace: Pace::Every { period, silence }, ..quiet() });
    let source = Script::good(&image);
    let opened = Instant::now();
    let _layer = lab.open(&image, source.clone()).await;
    tokio::time::sleep(Duration::from_millis(1250)).await;
    let requests = source.requests();
    assert!(requests[0].at - opened >= silence);
    // 850 ms after the silence, on a machine that may be slow.
    assert!((4..=9).contains(&requests.len()), "{}", requests.len());
    for (before, after) in requests.iter().zip(&requests[1..]) {
        assert!(after.at - before.at >= period - Duration::from_millis(20));
    }
    let spans =
        |request: &Request| (0..image.spans.len()).filter(|span| request.range.contains(&image.middle(*span))).count();
    assert!(requests.iter().all(|request| spans(request) == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_in_bytes_per_second_is_kept() {
    let image = Image::gzip(33, 20_000);
    let directory = tempdir().unwrap();
    let limit = image.blob.len() as u64 / 4;
    let lab = Lab::at(directory.path(), Settings { max_bytes_per_sec: Some(limit), ..streaming() });
    let source = Script::good(&image);
    let begun = Instant::now();
    let layer = lab.open(&image, source.clone()).await;
    until("half of it is here", || source.sent() >= image.blob.len() / 2).await;
    let took = begun.elapsed().as_secs_f64();
    assert!((1.5..2.4).contains(&took), "two seconds' worth took {took} s");
    // Readers are not limited.
    let begun = Instant::now();
    layer.read(0..image.size).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_is_served_at_once_while_the_background_is_at_its_window() {
    // 12 MB of two layers that come slowly, so that more is asked for than comes.
    let big = Image::of_noise(34, 24, 500_000, 400_000);
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), streaming());
    let slow = Script::new(&big, |_| Act { delay: Duration::from_millis(400), ..Act::default() });
    let _layer = lab.open(&big, slow.clone()).await;
    let small = Image::gzip(35, 50_000);
    until("the window is full", || slow.requests().len() >= 2).await;
    let before = slow.requests().len();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(slow.requests().len(), before, "it is not full yet");
    let source = Script::good(&small);
    let layer = lab.try_open(&small, source.clone(), 2).await.unwrap();
    let begun = Instant::now();
    layer.read(small.of_span(2)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    assert!(source.requests()[0].at - begun < Duration::from_millis(100));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_stuck_does_not_stop_other_layers() {
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), streaming());
    // Much more than any window.
    let big = Image::of_noise(36, 40, 500_000, 400_000);
    let stuck = Script::new(&big, |_| Act { stall: Some(1000), ..Act::default() });
    let layer = lab.open(&big, stuck.clone()).await;
    until("the window is full of it", || stuck.requests().len() >= 2).await;
    let other = Image::gzip(37, 50_000);
    let fine = lab.try_open(&other, Script::good(&other), 2).await.unwrap();
    let begun = Instant::now();
    until("the other layer is complete", || fine.is_complete()).await;
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(stuck.requests().len() < 20, "a stuck source collects {} requests", stuck.requests().len());
    assert!(!layer.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_is_left_alone_for_a_while_and_does_not_stop_others() {
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), streaming());
    let (image, other) = (Image::gzip(38, 50_000), Image::gzip(39, 50_000));
    let failing = Script::new(&image, |request| {
        let refuse = (request.number < 2).then_some(Remedy::Retry(None));
        Act { refuse, ..Act::default() }
    });
    let layer = lab.open(&image, failing.clone()).await;
    let fine = lab.try_open(&other, Script::good(&other), 2).await.unwrap();
    until("the other layer is complete", || fine.is_complete()).await;
    until("this one too", || layer.is_complete()).await;
    assert!((1..=2).contains(&lab.seen.background_failures.load(Ordering::SeqCst)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_follows_a_read_comes_next() {
    let image = Image::gzip(40, 20_000);
    let directory = tempdir().unwrap();
    // So slow that everything but the nearest would take minutes.
    let lab = Lab::at(directory.path(), Settings { max_bytes_per_sec: Some(1 << 16), ..streaming() });
    let source = Script::good(&image);
    let layer = lab.open(&image, source.clone()).await;
    let middle = image.spans.len() / 2;
    layer.read(image.of_span(middle)).await.unwrap();
    until("the next span is asked for", || source.asked_for(image.middle(middle + 1)) == 1).await;
    assert!(!layer.is_complete());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_index_lists_is_fetched_whatever_the_pace_and_a_stuck_source_holds_nobody() {
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), quiet());
    let big = Image::of_noise(41, 40, 500_000, 400_000);
    let stuck = Script::new(&big, |_| Act { stall: Some(1000), ..Act::default() });
    let layer = lab.open(&big, stuck.clone()).await;
    for span in 0..big.spans.len() {
        lab.scheduler.prefetch(&layer, span..span + 1);
    }
    let image = Image::gzip(42, 50_000);
    let failing = Script::new(&image, |request| Act {
        refuse: (request.number == 0).then_some(Remedy::Retry(None)),
        ..Act::default()
    });
    let other = lab.try_open(&image, failing.clone(), 2).await.unwrap();
    lab.scheduler.prefetch(&other, 0..1);
    lab.scheduler.prefetch(&other, 2..5);
    lab.scheduler.prefetch(&other, image.spans.len() - 1..usize::MAX);
    let last = image.spans.len() - 1;
    until("the other layer's are here", || {
        [2, 3, 4, last].iter().all(|span| failing.asked_for(image.middle(*span)) > 0)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(failing.asked_for(image.middle(6)), 0, "what is not listed is not fetched");
    assert!(stuck.requests().len() < 30, "{}", stuck.requests().len());
}
