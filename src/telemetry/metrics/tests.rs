use super::*;

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

#[test]
fn nothing_is_shown_before_something_happened() {
    assert_eq!(Metrics::new().render(), "");
}

#[test]
fn a_series_has_the_text_that_tests_of_the_go_snapshotter_look_for() {
    let metrics = Metrics::new();
    metrics.general().count(Count::FuseMountFailure);
    let text = metrics.render();
    assert_eq!(
        text,
        "# HELP soci_fs_operation_count The count of soci snapshotter operations. Broken down by operation type and layer sha.\n\
         # TYPE soci_fs_operation_count counter\n\
         soci_fs_operation_count{layer=\"\",operation_type=\"fuse_mount_failure_count\"} 1\n"
    );
}

#[test]
fn a_histogram_is_cumulative_and_its_sum_may_have_a_fraction() {
    let metrics = Metrics::new();
    let layer = metrics.layer(digest("l"));
    for micros in [500, 1_000, 1_500, 20_000_000] {
        layer.took(MillisecondOperation::Mount, Duration::from_micros(micros));
    }
    let text = metrics.render();
    let labels = format!("layer=\"{}\",operation_type=\"mount\"", digest("l"));
    let series = |line: &str| text.contains(&format!("soci_fs_operation_duration_milliseconds_{line}\n"));
    assert!(series(&format!("bucket{{{labels},le=\"1\"}} 2")), "{text}");
    assert!(series(&format!("bucket{{{labels},le=\"2\"}} 3")));
    assert!(series(&format!("bucket{{{labels},le=\"16384\"}} 3")));
    assert!(series(&format!("bucket{{{labels},le=\"+Inf\"}} 4")));
    assert!(series(&format!("sum{{{labels}}} 20003")));
    assert!(series(&format!("count{{{labels}}} 4")));
    assert_eq!(text.matches("_bucket{").count(), 16);

    layer.read(4096, Duration::from_nanos(2500));
    let text = metrics.render();
    assert_eq!(text.matches("microseconds_bucket{").count(), 12);
    assert!(text.contains("operation_type=\"synchronous_read\"} 2.5\n"), "{text}");
    assert!(text.contains("operation_type=\"synchronous_read_count\"} 1\n"));
    assert!(text.contains("# TYPE soci_fs_bytes_served gauge\n"));
    assert!(text.contains("operation_type=\"synchronous_bytes_served\"} 4096\n"));
}

#[test]
fn a_burst_of_failures_raises_the_failure_state_once() {
    let metrics = Metrics::new();
    for n in 0..100 {
        metrics.layer(digest(&format!("{}", n % 3))).failed(FuseFailure::FileRead);
    }
    metrics.general().failed(FuseFailure::Unknown);
    let text = metrics.render();
    assert!(text.contains("{layer=\"\",operation_type=\"fuse_failure_state\"} 1\n"), "{text}");
    assert_eq!(text.matches("fuse_failure_state").count(), 1);
    assert!(text.contains("operation_type=\"fuse_file_read_failure_count\"} 34\n"));
    assert!(text.contains("operation_type=\"fuse_unknown_operation_failure_count\"} 1\n"));
}

#[test]
fn the_eviction_counter_exists_from_the_start_and_the_queue_is_set_not_added() {
    let metrics = Metrics::new();
    metrics.background_fetch_enabled();
    metrics.set_background_queue(7);
    metrics.set_background_queue(3);
    let text = metrics.render();
    assert!(text.contains("{layer=\"\",operation_type=\"background_fetch_work_queue_evicted\"} 0\n"), "{text}");
    assert!(text.contains(
        "soci_fs_image_operation_count_key{image=\"\",operation_type=\"background_fetch_work_queue_size\"} 3\n"
    ));
}

#[test]
fn an_images_operations_appear_all_at_once_and_never_change_again() {
    let metrics = Metrics::new();
    let image = digest("manifest");
    let (operations, first) = metrics.image(image);
    assert_eq!(first, FirstUse::Yes);
    assert_eq!(metrics.image(image).1, FirstUse::No);
    operations.count(ImageOperation::NodeLookup);
    assert_eq!(metrics.render(), "");
    metrics.show_image_operations(&image);
    operations.count(ImageOperation::NodeLookup);
    metrics.show_image_operations(&image);
    let text = metrics.render();
    assert_eq!(text.matches("soci_fs_image_operation_count_key{").count(), 10);
    assert!(text.contains(&format!("{{image=\"{image}\",operation_type=\"node.Lookup\"}} 1\n")), "{text}");
    assert!(text.contains("operation_type=\"whiteout.Getattr\"} 0\n"));
}

#[test]
fn mounted_layers_are_asked_for_at_scrape_time() {
    let metrics = Metrics::new();
    let layers = Arc::new(Mutex::new(Vec::new()));
    let asked = layers.clone();
    metrics.set_mounted_layers(move || asked.lock().expect("lock").clone());
    assert_eq!(metrics.render(), "");
    for id in [2, 1] {
        layers.lock().expect("lock").push(MountedLayer {
            digest: digest("l"),
            mountpoint: format!("/r/snapshots/{id}/fs"),
            fetched: 5,
            size: 10,
        });
    }
    let text = metrics.render();
    let labels = format!("digest=\"{}\",mountpoint=\"/r/snapshots/1/fs\"", digest("l"));
    assert!(
        text.contains(&format!(
            "# TYPE soci_fs_layer_fetched_size_bytes counter\nsoci_fs_layer_fetched_size_bytes{{{labels}}} 5\n"
        )),
        "{text}"
    );
    assert!(text.contains(&format!("soci_fs_layer_size_bytes{{{labels}}} 10\n")));
    layers.lock().expect("lock").clear();
    assert_eq!(metrics.render(), "");
}

#[test]
fn operation_types_do_not_occur_in_other_names_or_help() {
    let mut all: Vec<&str> = families::counts().collect();
    all.extend(MicrosecondOperation::ALL.map(MicrosecondOperation::label));
    for family in [
        &families::OPERATION_COUNT,
        &families::BYTES_SERVED,
        &families::IMAGE_OPERATIONS,
        &families::LAYER_FETCHED,
        &families::LAYER_SIZE,
    ] {
        for operation in &all {
            assert!(!family.name.contains(operation) && !family.help.contains(operation), "{operation}");
        }
    }
    let labels = [Count::PreresolveQueueDrop, Count::Fuse(FuseFailure::Unknown), Count::FuseFailureState];
    let named: Vec<&str> = labels.iter().filter_map(|count| families::counts().nth(count.index())).collect();
    assert_eq!(named, ["preresolve_queue_drop", "fuse_unknown_operation_failure_count", "fuse_failure_state"]);
}

#[test]
fn a_forgotten_layer_is_gone_and_may_come_back() {
    let metrics = Metrics::new();
    metrics.layer(digest("l")).count(Count::ResolveCacheMiss);
    metrics.forget_layer(&digest("l"));
    assert_eq!(metrics.render(), "");
    metrics.layer(digest("l")).count(Count::ResolveCacheMiss);
    assert!(metrics.render().contains("resolve_cache_miss\"} 1\n"));
}

#[test]
fn labels_are_escaped() {
    let metrics = Metrics::new();
    metrics.set_mounted_layers(|| {
        vec![MountedLayer { digest: digest("l"), mountpoint: "a\"b\\c\nd".into(), fetched: 0, size: 0 }]
    });
    assert!(metrics.render().contains(r#"mountpoint="a\"b\\c\nd"} 0"#));
}
