//! The configuration file: defaults, zero rules, messages, and the packaged file that documents them.

use soci::config::{self, *};
use std::path::Path;
use std::time::Duration;

const PACKAGED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/etc/soci-snapshotter-grpc/config.toml");

fn loaded(text: &str) -> Loaded {
    config::parse(text, Path::new("t.toml")).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn config(text: &str) -> Config {
    loaded(text).config
}

fn error(text: &str) -> String {
    config::parse(text, Path::new("t.toml")).map(|l| panic!("{text}: {:?}", l.config)).unwrap_err().to_string()
}

fn warnings(text: &str) -> Vec<String> {
    loaded(text).warning_lines()
}

#[test]
fn the_packaged_file_is_the_documented_default() {
    let text = config::documented(&Config::default());
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(Path::new(PACKAGED).parent().unwrap()).unwrap();
        std::fs::write(PACKAGED, &text).unwrap();
    }
    let packaged = std::fs::read_to_string(PACKAGED).unwrap();
    assert_eq!(packaged, text, "run this test with UPDATE_GOLDEN=1");
    let loaded = config::load(Path::new(PACKAGED)).unwrap();
    assert_eq!(loaded.config, Config::default());
    assert_eq!(loaded.warnings, []);
}

#[test]
fn every_key_is_documented_and_shown_in_the_packaged_file() {
    let packaged = std::fs::read_to_string(PACKAGED).unwrap();
    for (path, doc) in config::keys() {
        assert!(doc.len() > 10, "{path}: {doc:?}");
        let key = path.rsplit('.').next().unwrap();
        let shown = [format!("\n{key} = "), format!("[{path}]\n"), format!("[{path}."), format!("{path}.\"")];
        assert!(shown.iter().any(|line| packaged.contains(line.as_str())), "{path}");
    }
}

#[test]
fn an_empty_file_and_explicit_zeros_are_the_defaults() {
    assert_eq!(config(""), Config::default());
    let zeros = "
        filesystem_cache_type = ''
        max_concurrency = 0
        mount_timeout_sec = 0
        fuse_metrics_emit_wait_duration_sec = 0
        metrics_network = ''
        metadata_store = ''
        [http]
        DialTimeoutMsec = 0
        ResponseHeaderTimeoutMsec = 0
        RequestTimeoutMsec = 0
        MaxRetries = 0
        MinWaitMsec = 0
        MaxWaitMsec = 0
        [blob]
        valid_interval = 0
        fetching_timeout_sec = 0
        max_retries = 0
        min_wait_msec = 0
        max_wait_msec = 0
        max_span_verification_retries = 0
        [background_fetch]
        silence_period_msec = 0
        fetch_period_msec = 0
        max_queue_size = 0
        drop_policy = ''
        emit_metric_period_sec = 0
        [content_store]
        type = ''
        containerd_address = ''
        [cri_keychain]
        image_service_path = ''
        [resolver]
        auth_client_ttl_sec = 0
        [snapshotter]
        min_layer_size = 0
        [layer_store]
        cache_memory_mb = 0
    ";
    assert_eq!(config(zeros), Config::default());
    assert_eq!(warnings(zeros), Vec::<String>::new());
}

#[test]
fn the_defaults_are_those_of_the_go_daemon() {
    let c = Config::default();
    assert_eq!((c.max_concurrency, c.mount_timeout), (Limit::At(100), Timeout::After(Duration::from_secs(30))));
    assert_eq!((c.metrics_network, c.metrics_address.as_str()), (Network::Tcp, ""));
    assert_eq!(c.fuse_metrics_emit_wait, Duration::from_secs(60));
    assert!(!c.debug && !c.disable_verification && !c.no_prometheus && !c.skip_check_snapshotter_supported);
    assert_eq!(c.http.request_timeout, Timeout::After(Duration::from_secs(300)));
    assert_eq!(c.http.dial_timeout, Timeout::After(Duration::from_secs(3)));
    assert_eq!((c.http.max_retries, c.blob.max_retries, c.blob.max_span_verification_retries), (8, 8, 0));
    assert_eq!((c.blob.min_wait, c.blob.max_wait), (Duration::from_millis(30), Duration::from_secs(300)));
    assert_eq!(c.blob.valid_interval, Duration::from_secs(60));
    assert!(c.directory_cache.direct && !c.blob.check_always && !c.background_fetch.disable);
    assert_eq!((c.background_fetch.pace, c.background_fetch.silence), (Pace::LineRate, Silence::None));
    assert_eq!(
        (c.background_fetch.max_queue_size, c.background_fetch.drop_policy),
        (Limit::At(300), DropPolicy::Newest)
    );
    assert_eq!(c.background_fetch.max_bytes_per_sec, Limit::Unlimited);
    assert_eq!(c.content_store.kind, ContentStoreType::Soci);
    assert_eq!(c.content_store.containerd_address, "/run/containerd/containerd.sock");
    assert!(!c.pull_modes.soci_v1.enable && c.pull_modes.soci_v2.enable && !c.prefetch.enable);
    let p = &c.pull_modes.parallel_pull_unpack;
    assert!(!p.enable && !p.parallel_pull_as_fallback && !p.discard_unpacked_layers);
    assert_eq!((p.max_concurrent_downloads, p.max_concurrent_downloads_per_image), (Limit::Unlimited, Limit::At(3)));
    assert_eq!((p.max_concurrent_unpacks, p.max_concurrent_unpacks_per_image), (Limit::Unlimited, Limit::At(1)));
    assert_eq!((p.concurrent_download_chunk_size, p.decompress_streams.len()), (ChunkSize::WholeLayer, 0));
    assert_eq!(c.resolver.auth_client_ttl, Timeout::After(Duration::from_secs(3600)));
    assert_eq!((c.snapshotter.min_layer_size, c.layer_store.cache_memory_bytes), (MinLayerSize::Off, 16 << 20));
}

#[test]
fn negative_numbers_have_names() {
    let c = config(
        "max_concurrency = -1\nmount_timeout_sec = -5\n[http]\nMaxRetries = -1\nResponseHeaderTimeoutMsec = -1\n\
         [blob]\nmax_retries = -1\nmax_span_verification_retries = -1\nvalid_interval = -1\n\
         [background_fetch]\nmax_queue_size = -1\nfetch_period_msec = -1\nemit_metric_period_sec = -1\n\
         [resolver]\nauth_client_ttl_sec = -1\n[prefetch]\nmax_concurrency = -3\n[snapshotter]\nmin_layer_size = -9\n",
    );
    assert_eq!((c.max_concurrency, c.mount_timeout), (Limit::Unlimited, Timeout::Never));
    assert_eq!((c.http.max_retries, c.blob.max_retries, c.blob.max_span_verification_retries), (0, 0, 3));
    assert_eq!((c.http.response_header_timeout, c.resolver.auth_client_ttl), (Timeout::Never, Timeout::Never));
    assert_eq!((c.blob.valid_interval, c.background_fetch.emit_metric_period), (Duration::ZERO, Duration::ZERO));
    assert_eq!((c.background_fetch.max_queue_size, c.background_fetch.pace), (Limit::Unlimited, Pace::LineRate));
    assert_eq!((c.prefetch.max_concurrency, c.snapshotter.min_layer_size), (Limit::Unlimited, MinLayerSize::Off));
    assert_eq!(config(&render(&c)), c);
}

#[test]
fn background_periods_count_only_where_somebody_chose_them() {
    let c = config("[background_fetch]\nfetch_period_msec = 500\nsilence_period_msec = 30000");
    assert_eq!((c.background_fetch.pace, c.background_fetch.silence), (Pace::LineRate, Silence::None));
    let c = config("[background_fetch]\nfetch_period_msec = 100\nsilence_period_msec = 200\nmax_queue_size = 50");
    assert_eq!(c.background_fetch.pace, Pace::Every(Duration::from_millis(100)));
    assert_eq!(c.background_fetch.silence, Silence::For(Duration::from_millis(200)));
    assert_eq!(c.background_fetch.max_queue_size, Limit::At(50));
}

#[test]
fn blob_retries_follow_http_only_where_they_are_zero() {
    let c = config("[http]\nMaxRetries = 2\nMinWaitMsec = 7\n[blob]\nmin_wait_msec = 0");
    assert_eq!((c.blob.max_retries, c.blob.min_wait), (8, Duration::from_millis(7)));
}

#[test]
fn keys_match_in_any_case_but_the_exact_name_wins() {
    assert_eq!(config("METRICS_ADDRESS = 'a'").metrics_address, "a");
    assert_eq!(config("[HTTP]\nmaxretries = 3").http.max_retries, 3);
    let both = loaded("DEBUG = true\ndebug = false");
    assert!(!both.config.debug);
    assert_eq!(both.warnings.len(), 1);
}

#[test]
fn unknown_keys_are_named_with_their_place_and_the_nearest_known_key() {
    let expect = [
        ("metrics_adress = 'x'", "t.toml:1:1: metrics_adress: unknown key, ignored; did you mean metrics_address?"),
        (
            "\n[http]\n  max_retries = 1",
            "t.toml:3:3: http.max_retries: unknown key, ignored; did you mean http.MaxRetries?",
        ),
        (
            "[pull_modes.soci_v2]\nenabled = false",
            "t.toml:2:1: pull_modes.soci_v2.enabled: unknown key, ignored; did you mean pull_modes.soci_v2.enable?",
        ),
        (
            "fetch_period_msec = 1",
            "t.toml:1:1: fetch_period_msec: unknown key, ignored; did you mean background_fetch.fetch_period_msec?",
        ),
        ("[snapshoter]\nx = 1", "t.toml:1:2: snapshoter: unknown key, ignored; did you mean snapshotter?"),
        ("qqq = 1", "t.toml:1:1: qqq: unknown key, ignored"),
        (
            "[[resolver.host.'docker.io'.mirrors]]\nhost = 'https://m'\ninsecur = true",
            "t.toml:3:1: resolver.host.docker.io.mirrors.insecur: unknown key, ignored; did you mean resolver.host.docker.io.mirrors.insecure?",
        ),
    ];
    for (text, warning) in expect {
        assert_eq!(warnings(text), [warning]);
        let strict = loaded(text).strict().unwrap_err().to_string();
        assert!(strict.contains(warning), "{strict}");
    }
    assert!(loaded("debug = true").strict().is_ok());
}

#[test]
fn values_of_the_wrong_type_are_decode_errors_with_their_place() {
    for (text, expected) in [
        ("max_concurrency = 'x'", "t.toml:1:19: max_concurrency: expected an integer, found string"),
        ("max_concurrency = 1.0", "t.toml:1:19: max_concurrency: expected an integer, found float"),
        ("debug = 1", "t.toml:1:9: debug: expected a boolean, found integer"),
        ("http = 3", "http: expected a table, found integer"),
        ("[debug]", "debug: expected a boolean, found table"),
        (
            "[pull_modes.parallel_pull_unpack]\nconcurrent_download_chunk_size = 5",
            "t.toml:2:34: pull_modes.parallel_pull_unpack.concurrent_download_chunk_size: expected a string, found integer",
        ),
        ("x = 99999999999999999999", "t.toml:1:"),
        ("a = 1\nb = ", "t.toml:2:"),
        ("[http]\n[http]", "t.toml:2:"),
    ] {
        let error = error(text);
        assert!(error.starts_with("failed to load config file \"t.toml\": t.toml:"), "{error}");
        assert!(error.contains(expected), "{error} / {expected}");
    }
}

#[test]
fn values_a_setting_cannot_have_are_parse_errors() {
    for (text, expected) in [
        (
            "[pull_modes.parallel_pull_unpack]\nenable = true\nconcurrent_download_chunk_size = 'badstring'",
            "t.toml:3:34: pull_modes.parallel_pull_unpack.concurrent_download_chunk_size: invalid size format: badstring",
        ),
        (
            "[background_fetch]\ndrop_policy = 'random'",
            r#"background_fetch.drop_policy must be "oldest" or "newest", got "random""#,
        ),
        ("metadata_store = 'x'", "unknown metadata store type: x; must be db or db-multi"),
        ("[content_store]\ntype = 'x'", "unknown content store type: x; must be one of [soci containerd]"),
        ("[[resolver.host.h.mirrors]]\nhost = 'mirror.example'", "mirror host must be a URL with its scheme"),
    ] {
        let error = error(text);
        assert!(error.starts_with("config file at \"t.toml\": failed to parse config: t.toml:"), "{error}");
        assert!(error.contains(expected), "{error} / {expected}");
    }
}

#[test]
fn the_former_name_of_the_fallback_works_with_a_warning_and_must_not_contradict_the_new_one() {
    let table = "[content_store]\ntype = 'containerd'\n[pull_modes.parallel_pull_unpack]\n";
    let former = loaded(&format!("{table}experimental_parallel_pull_as_fallback = true"));
    assert!(former.config.pull_modes.parallel_pull_unpack.parallel_pull_as_fallback);
    let line = former.warning_lines().join("\n");
    assert!(line.contains("t.toml:4:1: ") && line.contains("deprecated; the key is now"), "{line}");
    let both = format!("{table}parallel_pull_as_fallback = false\nexperimental_parallel_pull_as_fallback = true");
    let error = error(&both);
    assert!(error.contains("t.toml:5:1") && error.contains("(line 4)"), "{error}");
    let same = format!("{table}parallel_pull_as_fallback = true\nexperimental_parallel_pull_as_fallback = true");
    let deprecated = |warning: &&Warning| matches!(warning.kind, WarningKind::Deprecated { .. });
    assert_eq!(loaded(&same).warnings.iter().filter(deprecated).count(), 1);
}

#[test]
fn parallel_limits_are_checked_where_they_are_used() {
    let with = |rest: &str| format!("[content_store]\ntype = 'containerd'\n[pull_modes.parallel_pull_unpack]\n{rest}");
    let limits = "max_concurrent_downloads = 2\nmax_concurrent_downloads_per_image = 3\n\
                  max_concurrent_unpacks = 1\nmax_concurrent_unpacks_per_image = 2\n";
    let both = error(&with(&format!("enable = true\n{limits}")));
    assert!(both.contains("global download limit less than per-image download limit"), "{both}");
    assert!(both.contains("global unpack limit less than per-image unpack limit"), "{both}");
    config(&with(limits));
    for fine in ["9\nmax_concurrent_downloads_per_image = 3", "0\nmax_concurrent_downloads_per_image = 0"] {
        config(&with(&format!("enable = true\nmax_concurrent_downloads = {fine}")));
    }
    let fitted = config(&with("enable = true\nmax_concurrent_downloads = 2"));
    let fitted = fitted.pull_modes.parallel_pull_unpack.max_concurrent_downloads_per_image;
    assert_eq!(fitted, Limit::At(2), "a default does not contradict what was written");
    // Each limit names the line of the other.
    assert!(both.contains("t.toml:5:1: ") && both.contains("max_concurrent_downloads_per_image, line 6"), "{both}");
    assert!(both.contains("t.toml:7:1: ") && both.contains("max_concurrent_unpacks_per_image, line 8"), "{both}");
}

#[test]
fn one_key_is_enough_for_eager_pulls_whatever_the_content_store() {
    for store in ["", "type = 'soci'", "type = 'containerd'"] {
        for key in ["enable = true", "parallel_pull_as_fallback = true"] {
            for discard in ["", "discard_unpacked_layers = true", "discard_unpacked_layers = false"] {
                let text = format!("[content_store]\n{store}\n[pull_modes.parallel_pull_unpack]\n{key}\n{discard}\n");
                assert_eq!(loaded(&text).warning_lines(), Vec::<String>::new(), "{text}");
            }
        }
    }
    // The documented default with one word changed, as an operator would.
    let documented = soci::config::documented(&Config::default());
    let changed = documented.replace("parallel_pull_as_fallback = false", "parallel_pull_as_fallback = true");
    assert!(changed != documented && config(&changed).pull_modes.parallel_pull_unpack.parallel_pull_as_fallback);
}

#[test]
fn decompressors_and_mirrors_are_kept_as_written_and_survive_a_dump() {
    let text = r#"
        [content_store]
        type = "containerd"
        containerd_address = "unix:///run/c.sock"
        [pull_modes.parallel_pull_unpack]
        parallel_pull_as_fallback = true
        max_concurrent_downloads_per_image = 10
        concurrent_download_chunk_size = "16mb"
        [pull_modes.parallel_pull_unpack.decompress_streams."gzip"]
        path = "/usr/bin/rapid gzip"
        args = ["-d", "-c", "it's 'quoted' \"text\""]
        [pull_modes.parallel_pull_unpack.decompress_streams.zstd]
        path = "/usr/bin/zstd"
        args = []
        [[resolver.host."docker.io".mirrors]]
        host = "https://one.example:5000"
        [[resolver.host."docker.io".mirrors]]
        host = "http://two.example"
        insecure = true
        request_timeout_sec = -1
        [[resolver.host."localhost:5000".mirrors]]
        host = "http://three"
        request_timeout_sec = 4
    "#;
    let c = config(text);
    let gzip = &c.pull_modes.parallel_pull_unpack.decompress_streams["gzip"];
    assert_eq!((gzip.path.as_str(), gzip.args[2].as_str()), ("/usr/bin/rapid gzip", "it's 'quoted' \"text\""));
    assert_eq!(c.pull_modes.parallel_pull_unpack.decompress_streams.len(), 2);
    assert_eq!(c.pull_modes.parallel_pull_unpack.concurrent_download_chunk_size, ChunkSize::Bytes(16 << 20));
    assert_eq!(c.content_store.containerd_address, "/run/c.sock");
    let mirrors = &c.resolver.host["docker.io"];
    assert_eq!(mirrors.len(), 2);
    assert!(!mirrors[0].insecure && mirrors[0].request_timeout == RequestTimeout::Inherit);
    assert!(mirrors[1].insecure && mirrors[1].request_timeout == RequestTimeout::Never);
    assert_eq!(loaded(&render(&c)).warnings, []);
    assert_eq!(config(&render(&c)), c);
    assert_eq!(config(&documented(&c)), c);
}

#[test]
fn registries_and_logins_are_configured_in_tables_of_their_own() {
    let c = config(
        "[registry]\nconfig_path = '/etc/containerd/certs.d::/etc/docker/certs.d'\n[kubelet_keychain]\nenable_keychain = true\n\
         image_credential_provider_config = '/c.json'\nimage_credential_provider_bin_dir = '/bin'",
    );
    let directories = c.registry.directories();
    assert_eq!(directories, [Path::new("/etc/containerd/certs.d"), Path::new("/etc/docker/certs.d")]);
    assert!(c.kubelet_keychain.enable_keychain && c.kubelet_keychain.bin_dir == "/bin");
    let usual = soci::registry::DEFAULT_DIRECTORIES.map(std::path::PathBuf::from);
    assert_eq!(Config::default().registry.directories(), usual, "as the tool's --hosts-dir");
    assert_eq!(config("[registry]\nconfig_path = ''").registry.directories(), Vec::<std::path::PathBuf>::new());
    let incomplete = error("[kubelet_keychain]\nenable_keychain = true\nimage_credential_provider_config = '/c.json'");
    assert!(incomplete.contains("kubelet_keychain.image_credential_provider_bin_dir: must be set"), "{incomplete}");
}

#[test]
fn files_are_found_or_missed_as_the_go_daemon_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    let chain = |e: ConfigError| {
        let source = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        format!("{e}{source}")
    };
    let missing = chain(config::load(&path).unwrap_err());
    let name = path.display();
    assert_eq!(missing, format!("failed to open config file \"{name}\": open {name}: no such file or directory"));
    std::fs::write(&path, "").unwrap();
    assert_eq!(config::load(&path).unwrap().config, Config::default());
    std::fs::write(&path, b"debug = true\n# \xff\n").unwrap();
    let error = config::load(&path).unwrap_err().to_string();
    assert!(error.contains("config.toml:2:3: the file is not UTF-8"), "{error}");
    std::fs::write(&path, vec![b'\n'; (MAX_FILE_SIZE + 1) as usize]).unwrap();
    assert!(matches!(config::load(&path), Err(ConfigError::TooLarge { .. })));
}

proptest::proptest! {
    #[test]
    fn proptest_no_text_makes_the_parser_panic(text in "[a-z_=\\[\\]\"'{}., 0-9\n-]{0,200}") {
        let _ = config::parse(&text, Path::new("t.toml"));
    }
}
