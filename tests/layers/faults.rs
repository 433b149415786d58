//! Sources that fail in every way they can.

use super::lab::*;
use soci::{
    fs::{LayerData, ReadError},
    layers::{Layer, Persistence, Remedy, Settings, Source},
    registry::HostId,
};
use std::{
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::{Duration, Instant},
};
use tempfile::tempdir;

/// Opens the layer with `source`, and runs `test`.
async fn with(settings: Settings, image: &Image, source: Arc<dyn Source>, test: impl AsyncFnOnce(Lab, Arc<Layer>)) {
    let directory = tempdir().unwrap();
    let lab = Lab::at(directory.path(), settings);
    let layer = lab.open(image, source).await;
    within(2 * SOON, test(lab, layer)).await;
}

async fn reads_all(layer: &Layer, image: &Image) {
    let bytes = layer.read(0..image.size).await.unwrap();
    assert!(bytes == image.bytes(0..image.size));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_fails_is_made_again_as_often_as_the_settings_say() {
    let image = Image::gzip(10, 50_000);
    let refuse = |times: usize| {
        move |request: &Request| {
            let refuse = (request.number < times).then_some(Remedy::Retry(None));
            Act { refuse, ..Act::default() }
        }
    };
    with(quiet(), &image, Script::new(&image, refuse(3)), async |_, layer| reads_all(&layer, &image).await).await;
    let hopeless = Script::new(&image, refuse(usize::MAX));
    with(quiet(), &image, hopeless.clone(), async |_, layer| {
        let error = layer.read(image.of_span(1)).await.unwrap_err();
        assert_eq!(error, ReadError::Fetch { reason: "refused, as told".into() });
    })
    .await;
    assert_eq!(hopeless.requests().len(), 4, "one attempt and three retries");
    assert!(hopeless.requests()[3].at - hopeless.requests()[0].at >= Duration::from_millis(2 + 4 + 8));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_wait_no_longer_than_their_budget() {
    let image = Image::gzip(11, 50_000);
    let source = Script::new(&image, |_| Act { refuse: Some(Remedy::Retry(None)), ..Act::default() });
    let budget = Duration::from_millis(300);
    let settings = Settings { retries: u32::MAX, budget, ..quiet() };
    with(settings, &image, source, async |_, layer| {
        let begun = Instant::now();
        assert!(layer.read(image.of_span(0)).await.is_err());
        assert!(begun.elapsed() < budget + Duration::from_secs(2));
    })
    .await;
    // Also behind so many stuck requests that theirs is not even made.
    let image = Image::gzip(11, 20_000);
    let stuck = Script::new(&image, |_| Act { stall: Some(0), ..Act::default() });
    let settings = Settings { budget, ..quiet() };
    with(settings, &image, stuck.clone(), async |_, layer| {
        let readers = (0..image.spans.len()).map(|span| layer.read(image.of_span(span)));
        let begun = Instant::now();
        assert!(futures::future::join_all(readers).await.iter().all(|result| result.is_err()));
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        assert!(image.spans.len() > 16 && stuck.requests().len() <= image.spans.len());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_time_may_heal_is_tried_until_the_budget_ends_and_what_it_may_not_is_not() {
    let image = Image::gzip(11, 50_000);
    let settings = Settings { retries: 0, persistence: Persistence::WholeBudget, ..quiet() };
    for trouble in [Remedy::Later, Remedy::Retry(None)] {
        let source = Script::new(&image, move |request| Act {
            refuse: (request.number < 6).then_some(trouble),
            ..Act::default()
        });
        // One more that says no for ever does not end it.
        let absent = Script::new(&image, |_| Act { refuse: Some(Remedy::OtherSource), ..Act::default() });
        with(settings.clone(), &image, source.clone(), async |_, layer| {
            layer.add_source(absent);
            let bytes = layer.read(image.of_span(1)).await.unwrap();
            assert!(bytes == image.bytes(image.of_span(1)));
        })
        .await;
        assert_eq!(source.requests().len(), 7);
    }
    let absent = Script::new(&image, |_| Act { refuse: Some(Remedy::OtherSource), ..Act::default() });
    with(settings.clone(), &image, absent.clone(), async |_, layer| {
        assert!(layer.read(image.of_span(1)).await.is_err());
    })
    .await;
    assert_eq!(absent.requests().len(), 1, "time does not bring back what is gone");
    let dead = Script::new(&image, |_| Act { refuse: Some(Remedy::Later), ..Act::default() });
    let budget = Duration::from_millis(1500);
    with(Settings { budget, ..settings }, &image, dead.clone(), async |_, layer| {
        let begun = Instant::now();
        assert!(layer.read(image.of_span(1)).await.is_err());
        assert!(begun.elapsed() >= budget, "{:?}", begun.elapsed());
    })
    .await;
    assert!((4..8).contains(&dead.requests().len()), "{}", dead.requests().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_ends_early_is_continued_behind_the_last_whole_span() {
    let image = Image::gzip(12, 30_000);
    let source = Script::new(&image, |_| Act { cut: Some(100_000), ..Act::default() });
    with(Settings { retries: 1, ..quiet() }, &image, source.clone(), async |_, layer| reads_all(&layer, &image).await)
        .await;
    let requests = source.requests();
    assert!(requests.len() > 3, "{}", requests.len());
    for (before, after) in requests.iter().zip(&requests[1..]) {
        let arrived = before.range.start + 100_000;
        let next = image.spans.iter().find(|span| span.compressed.end > arrived).unwrap();
        assert_eq!(after.range.start, next.compressed.start);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_beyond_what_was_asked_for_are_ignored() {
    let image = Image::gzip(13, 50_000);
    let source = Script::new(&image, |_| Act { extra: 5000, ..Act::default() });
    with(quiet(), &image, source, async |_, layer| {
        for span in (0..image.spans.len()).rev() {
            let bytes = layer.read(image.of_span(span)).await.unwrap();
            assert!(bytes == image.bytes(image.of_span(span)));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_with_a_wrong_digest_is_refetched_from_another_host_and_never_served() {
    let image = Image::gzip(14, 50_000);
    let (bad, good) = (HostId::new("http://bad"), HostId::new("http://good"));
    let (wrong, avoided) = (vec![image.middle(1), image.middle(3)], bad.clone());
    // What the registry client does: the first host that is not to be avoided.
    let source = Script::new(&image, move |request| match request.avoid.contains(&avoided) {
        false => Act { corrupt: wrong.clone(), host: Some(avoided.clone()), ..Act::default() },
        true => Act { host: Some(good.clone()), ..Act::default() },
    });
    for settings in [quiet(), streaming()] {
        with(settings, &image, source.clone(), async |_, layer| reads_all(&layer, &image).await).await;
    }
    let requests = source.requests();
    assert!(requests.iter().any(|request| request.avoid == [bad.clone()]));
    assert_eq!(source.asked_for(image.middle(0)), 2, "what was right is not fetched again: once per layer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_whose_digest_stays_wrong_is_an_error_and_its_neighbours_are_served() {
    let image = Image::gzip(15, 50_000);
    let wrong = image.middle(2);
    let source = Script::new(&image, move |_| Act { corrupt: vec![wrong], ..Act::default() });
    with(quiet(), &image, source.clone(), async |_, layer| {
        let error = layer.read(image.of_span(2)).await.unwrap_err();
        assert_eq!(error, ReadError::Digest { span: 2 });
        assert_eq!(source.requests().len(), 3, "one attempt and as many as there are verification retries");
        for span in [1, 3] {
            let bytes = layer.read(image.of_span(span)).await.unwrap();
            assert!(bytes == image.bytes(image.of_span(span)));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_one_source_are_fetched_from_another() {
    let image = Image::gzip(16, 50_000);
    let everywhere: Vec<u64> = (0..image.spans.len()).map(|span| image.middle(span)).collect();
    for settings in [quiet(), streaming()] {
        let corrupt = everywhere.clone();
        let bad = Script::new(&image, move |_| Act { corrupt: corrupt.clone(), ..Act::default() });
        let good = Script::new(&image, |_| Act { open_delay: Duration::from_millis(100), ..Act::default() });
        with(settings, &image, good, async |_, layer| {
            layer.add_source(bad.clone());
            reads_all(&layer, &image).await;
        })
        .await;
        assert!(bad.requests().len() <= image.spans.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_has_lost_the_blob_is_asked_once_and_another_takes_over() {
    let image = Image::gzip(17, 50_000);
    for settings in [quiet(), streaming()] {
        let lost = Script::new(&image, |_| Act { refuse: Some(Remedy::OtherSource), ..Act::default() });
        with(settings, &image, Script::good(&image), async |_, layer| {
            layer.add_source(lost.clone());
            for span in 0..image.spans.len() {
                layer.read(image.of_span(span)).await.unwrap();
            }
        })
        .await;
        // More than one may have been on its way to it, or all of them to the other before this one was known.
        assert!(lost.requests().len() <= 4, "{}", lost.requests().len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_only_fails_is_given_up_for_another() {
    let image = Image::gzip(17, 50_000);
    let failing = Script::new(&image, |_| Act { refuse: Some(Remedy::Retry(None)), ..Act::default() });
    with(quiet(), &image, Script::good(&image), async |_, layer| {
        layer.add_source(failing.clone());
        reads_all(&layer, &image).await;
    })
    .await;
    assert_eq!(failing.requests().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_is_not_held_by_a_background_request_that_fails_or_stalls() {
    let image = Image::gzip(18, 50_000);
    for first in [
        Act { stall: Some(30_000), ..Act::default() },
        Act { cut: Some(30_000), delay: Duration::from_millis(100), ..Act::default() },
    ] {
        let host = HostId::new("http://stuck");
        let first = Act { host: Some(host.clone()), ..first };
        let source =
            Script::new(&image, move |request| if request.number == 0 { first.clone() } else { Act::default() });
        with(streaming(), &image, source.clone(), async |_, layer| {
            until("the background has begun", || !source.requests().is_empty()).await;
            let held = source.requests()[0].range.clone();
            let last = image.spans.iter().rposition(|span| held.contains(&span.compressed.start)).unwrap();
            let begun = Instant::now();
            let bytes = layer.read(image.of_span(last)).await.unwrap();
            assert!(bytes == image.bytes(image.of_span(last)));
            assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        })
        .await;
        assert!(source.requests()[1].avoid.is_empty() || source.requests()[1].avoid == [host]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_panics_fails_the_read_and_nothing_waits_for_ever() {
    let image = Image::gzip(19, 50_000);
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = broken.clone();
    let source = Script::new(&image, move |_| Act { panic: is_broken.load(Ordering::SeqCst), ..Act::default() });
    with(quiet(), &image, source, async |_, layer| {
        let readers = (0..4).map(|_| layer.read(image.of_span(1)));
        assert!(futures::future::join_all(readers).await.iter().all(|result| result.is_err()));
        broken.store(false, Ordering::SeqCst);
        reads_all(&layer, &image).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_falls_silent_is_given_up_soon_and_who_sent_it_is_passed_over_once() {
    let image = Image::gzip(22, 50_000);
    let host = |name: &str| -> Option<HostId> { Some(HostId::new(name)) };
    let (silent, other) = (host("http://silent"), host("http://other"));
    let (one, two) = (silent.clone(), other.clone());
    let source = Script::new(&image, move |request| match request.number {
        0 => Act { host: one.clone(), stall: Some(10_000), ..Act::default() },
        _ => Act { host: two.clone(), ..Act::default() },
    });
    with(quiet(), &image, source.clone(), async |_, layer| {
        let begun = Instant::now();
        let range = image.of_span(2);
        assert!(layer.read(range.clone()).await.unwrap() == image.bytes(range));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        // What it did once is no reason to leave it alone for good.
        let range = image.of_span(3);
        assert!(layer.read(range.clone()).await.unwrap() == image.bytes(range));
    })
    .await;
    let avoided: Vec<_> = source.requests().into_iter().map(|request| request.avoid).collect();
    assert_eq!(avoided, [vec![], silent.into_iter().collect(), vec![]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_always_slow_is_not_asked_over_and_over() {
    let image = Image::gzip(23, 50_000);
    let slow = Act { chunk: 10_000, delay: Duration::from_millis(1500), ..Act::default() };
    let source = Script::new(&image, move |_| slow.clone());
    with(quiet(), &image, source.clone(), async |_, layer| {
        let range = image.of_span(2);
        assert!(layer.read(range.clone()).await.unwrap() == image.bytes(range));
    })
    .await;
    assert!(source.requests().len() <= 3, "{} requests", source.requests().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_removed_layer_end_with_an_error() {
    let image = Image::gzip(20, 50_000);
    for settings in [quiet(), streaming()] {
        let stuck = Script::new(&image, |_| Act { stall: Some(100), ..Act::default() });
        with(settings, &image, stuck.clone(), async |lab, layer| {
            let readers: Vec<_> = (0..image.spans.len())
                .map(|span| {
                    let (layer, range) = (layer.clone(), image.of_span(span));
                    tokio::spawn(async move { layer.read(range).await })
                })
                .collect();
            until("they wait", || !stuck.requests().is_empty()).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            lab.store.release(image.layer, soci::layout::SnapshotId(1)).await.unwrap();
            for reader in readers {
                let result = within(Duration::from_secs(5), reader).await.unwrap();
                assert_eq!(result.err(), Some(ReadError::Removed));
            }
            let late = within(Duration::from_secs(1), layer.read(image.of_span(2))).await;
            assert_eq!(late.err(), Some(ReadError::Removed));
        })
        .await;
    }
}

/// Everything that can go wrong and heal, at random, under many readers: only right bytes, and all of them in the end.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_source_does_only_right_bytes_are_read() {
    for seed in 0..6 {
        let image = Arc::new(Image::gzip(21 + seed, 40_000));
        let settings = if seed % 2 == 0 { streaming() } else { quiet() };
        let settings = Settings { retries: 1000, verification_retries: 1000, ..settings };
        let size = image.blob.len() as u64;
        let source = Script::new(&image, move |request| {
            let mut random = Random::new(seed * 1000 + request.number as u64);
            let mut act = Act { chunk: 1 + random.below(40_000) as usize, ..Act::default() };
            match random.below(6) {
                0 => act.refuse = Some(Remedy::Retry(Some(Duration::from_millis(random.below(5))))),
                1 => act.cut = Some(random.below(60_000)),
                2 => act.corrupt = (0..5).map(|_| random.below(size)).collect(),
                3 => act.extra = random.below(100) as usize,
                4 => act.open_delay = Duration::from_millis(random.below(10)),
                _ => {}
            }
            act
        });
        let copy = image.clone();
        with(settings, &image, source, async |_, layer| {
            let readers = (0..8).map(|reader| {
                let (layer, image) = (layer.clone(), copy.clone());
                tokio::spawn(async move {
                    let mut random = Random::new(seed * 100 + reader);
                    for _ in 0..20 {
                        let range = random.range(image.size, 150_000);
                        let bytes = layer.read(range.clone()).await.unwrap();
                        assert!(bytes == image.bytes(range));
                    }
                })
            });
            for reader in readers.collect::<Vec<_>>() {
                reader.await.unwrap();
            }
            reads_all(&layer, &copy).await;
        })
        .await;
    }
}
