//! Every setting, once: name, type, zero rule, default and documentation together.
//!
//! The documentation here is the documentation: `config default` prints it, and the packaged `config.toml` is that output.
//! Order is the order of the file.

use super::codec::*;
use super::reader::{Entry, Section, TableReader};
use super::values::*;
use super::writer::Writer;
use std::collections::BTreeMap;
use std::time::Duration;

/// `field: Type = codec => "key" | "former key";`, then `tables { field: Table => "key"; }`.
macro_rules! settings {
    (
        $(#[doc = $table_doc:expr])+
        struct $Table:ident {
            $( $(#[doc = $doc:expr])+ $field:ident : $ty:ty = $codec:expr => $key:literal $(| $alias:literal)* ; )*
            $(tables { $( $section:ident : $Section:ty => $section_key:literal ; )* })?
        }
    ) => {
        $(#[doc = $table_doc])+
        #[derive(Debug, Clone, PartialEq)]
        pub struct $Table {
            $( $(#[doc = $doc])+ pub $field: $ty, )*
            $($( pub $section: $Section, )*)?
        }

        impl Default for $Table {
            fn default() -> $Table {
                $Table { $( $field: $codec.default(), )* $($( $section: Default::default(), )*)? }
            }
        }

        impl Section for $Table {
            const DOC: &'static [&'static str] = &[$($table_doc),+];

            fn read(&mut self, table: &mut TableReader<'_, '_>) {
                $( table.setting($key, &[$($alias),*], &$codec, &mut self.$field); )*
                $($( table.section($section_key, &mut self.$section); )*)?
            }

            fn write(&self, writer: &mut Writer) {
                $( writer.setting($key, &[$($doc),+], &$codec, &self.$field); )*
                $($( writer.section($section_key, &self.$section); )*)?
            }

            fn catalogue(path: &str, out: &mut Vec<Entry>) {
                let join = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
                $( out.push(Entry { path: join($key), doc: &[$($doc),+] }); )*
                $($(
                    out.push(Entry { path: join($section_key), doc: <$Section>::DOC });
                    <$Section>::catalogue(&join($section_key), out);
                )*)?
                let _ = join;
            }
        }
    };
}

settings! {
    /// Configuration of soci-snapshotter-grpc. Every setting is listed with its default.
    ///
    /// Unless a setting says otherwise, 0 and "" mean the default. Unknown keys are reported and ignored;
    /// `soci-snapshotter-grpc config check --strict` refuses them.
    struct Config {
        /// Accepted for compatibility; no effect here because blobs are kept by the layer store.
        http_cache_type: String = Words("") => "http_cache_type";
        /// Accepted for compatibility; no effect here because fetched spans are always kept on disk, in the layer store.
        filesystem_cache_type: String = Words("") => "filesystem_cache_type";
        /// Accepted for compatibility; no effect here because a mounted layer costs next to nothing and is never evicted.
        resolve_result_entry: i64 = Unused(0) => "resolve_result_entry";
        /// Trace FUSE requests at log level debug.
        debug: bool = Flag(false) => "debug";
        /// Do not compare a file's tar header with the index when it is first read. Span digests are always checked.
        disable_verification: bool = Flag(false) => "disable_verification";
        /// Layers prepared at the same time. Negative: unlimited.
        max_concurrency: Limit = limit(100) => "max_concurrency";
        /// Seconds that preparing a layer may take before it is left to containerd. Negative: no limit.
        mount_timeout: Timeout = timeout_s(30) => "mount_timeout_sec";
        /// Seconds between an image's first mount and the report of its FUSE operations. Negative: at once.
        fuse_metrics_emit_wait: Duration = delay_s(60) => "fuse_metrics_emit_wait_duration_sec";
        /// Where Prometheus metrics are served: host:port, or the path of a socket. Empty: nowhere.
        metrics_address: String = Words("") => "metrics_address";
        /// What metrics_address is: tcp, tcp4, tcp6 or unix.
        metrics_network: Network = OneOf(Network::Tcp) => "metrics_network";
        /// Do not serve metrics, whatever metrics_address says.
        no_prometheus: bool = Flag(false) => "no_prometheus";
        /// host:port of the debug listener. Empty: none. It says which Go profiles do not exist here.
        debug_address: String = Words("") => "debug_address";
        /// Accepted for compatibility (db or db-multi); no effect here because file metadata is not kept in a database.
        metadata_store: MetadataStore = OneOf(MetadataStore::Db) => "metadata_store";
        /// Accepted for compatibility; no effect here because file metadata is not kept in a database.
        metadata_db_no_sync: bool = Flag(false) => "metadata_db_no_sync";
        /// Accepted for compatibility; no effect here because file metadata is not kept in a database.
        metadata_insertion_chunk_size: i64 = Unused(0) => "metadata_insertion_chunk_size";
        /// Do not try at start whether overlay filesystems can live below the root directory.
        skip_check_snapshotter_supported: bool = Flag(false) => "skip_check_snapshotter_supported";

        tables {
            http: Http => "http";
            blob: Blob => "blob";
            directory_cache: DirectoryCache => "directory_cache";
            fuse: Fuse => "fuse";
            background_fetch: BackgroundFetch => "background_fetch";
            content_store: ContentStore => "content_store";
            prefetch: Prefetch => "prefetch";
            pull_modes: PullModes => "pull_modes";
            kubeconfig_keychain: KubeconfigKeychain => "kubeconfig_keychain";
            cri_keychain: CriKeychain => "cri_keychain";
            kubelet_keychain: KubeletKeychain => "kubelet_keychain";
            resolver: Resolver => "resolver";
            registry: Registry => "registry";
            snapshotter: SnapshotterTable => "snapshotter";
            layer_store: LayerStore => "layer_store";
        }
    }
}

settings! {
    /// Requests to registries.
    struct Http {
        /// Milliseconds to connect, TLS included. Negative: no limit.
        dial_timeout: Timeout = timeout_ms(3000) => "DialTimeoutMsec";
        /// Milliseconds until the response's headers. Negative: no limit.
        response_header_timeout: Timeout = timeout_ms(3000) => "ResponseHeaderTimeoutMsec";
        /// Milliseconds for one attempt, body included. Negative: no limit.
        request_timeout: Timeout = timeout_ms(300_000) => "RequestTimeoutMsec";
        /// Retries after the first attempt. Negative: none.
        max_retries: u32 = retries(8) => "MaxRetries";
        /// Milliseconds before the first retry.
        min_wait: Duration = delay_ms(30) => "MinWaitMsec";
        /// Milliseconds before any later retry, at most.
        max_wait: Duration = delay_ms(300_000) => "MaxWaitMsec";
    }
}

settings! {
    /// Reading layers from registries.
    struct Blob {
        /// Accepted for compatibility; no effect here because nobody has to be asked whether a layer is available: what
        /// serving it takes is on local disk.
        valid_interval: Duration = delay_s(60) => "valid_interval";
        /// Seconds for one request, and for everything that is tried for one read: when they are over, the program that
        /// reads gets an I/O error, and its next read tries again. Negative: no limit.
        fetching_timeout: Timeout = timeout_s(300) => "fetching_timeout_sec";
        /// Retries after the first attempt. The number below, which the Go snapshotter's sample file lists too, means as
        /// often as fetching_timeout_sec allows; any other is obeyed. Negative: none. 0: as http.MaxRetries.
        max_retries: u32 = retries(8) => "max_retries";
        /// Milliseconds before the first retry. 0: as http.MinWaitMsec.
        min_wait: Duration = delay_ms(30) => "min_wait_msec";
        /// Milliseconds before any later retry, at most. 0: as http.MaxWaitMsec.
        max_wait: Duration = delay_ms(300_000) => "max_wait_msec";
        /// Accepted for compatibility; no effect here, as valid_interval.
        check_always: bool = Flag(false) => "check_always";
        /// Accepted for compatibility; no effect here because one request always asks for one range.
        force_single_range_mode: bool = Flag(false) => "force_single_range_mode";
        /// Further fetches of a span whose digest was wrong. Negative: 3. 0: as max_retries.
        max_span_verification_retries: u32 = span_retries() => "max_span_verification_retries";
    }
}

settings! {
    /// Accepted for compatibility; no effect here because the layer store replaces the directory cache.
    struct DirectoryCache {
        /// Accepted for compatibility; no effect here because the layer store replaces the directory cache.
        max_lru_cache_entry: i64 = Unused(0) => "max_lru_cache_entry";
        /// Accepted for compatibility; no effect here because the layer store replaces the directory cache.
        max_cache_fds: i64 = Unused(0) => "max_cache_fds";
        /// Accepted for compatibility; no effect here because the layer store replaces the directory cache.
        sync_add: bool = Flag(false) => "sync_add";
        /// Accepted for compatibility; no effect here because the layer store replaces the directory cache.
        direct: bool = Flag(true) => "direct";
    }
}

settings! {
    /// The filesystem that lazy layers are read through.
    struct Fuse {
        /// Accepted for compatibility; no effect here because layers never change: attributes are cached for ever.
        attr_timeout: i64 = Unused(1) => "attr_timeout";
        /// Accepted for compatibility; no effect here because layers never change: names are cached for ever.
        entry_timeout: i64 = Unused(1) => "entry_timeout";
        /// Accepted for compatibility; no effect here because layers never change: missing names are cached for ever.
        negative_timeout: i64 = Unused(1) => "negative_timeout";
        /// Log each FUSE operation at log level debug. File names then appear in the log.
        log_fuse_operations: bool = Flag(false) => "log_fuse_operations";
    }
}

settings! {
    /// Fetching the rest of an image while its containers run.
    struct BackgroundFetch {
        /// Fetch only what is read.
        disable: bool = Flag(false) => "disable";
        /// Milliseconds to wait after an image's first mount. The number below, which the Go snapshotter's sample file
        /// lists too, means no wait at all; any other is obeyed. Negative: no wait.
        silence: Silence = silence() => "silence_period_msec";
        /// Milliseconds between two spans. The number below, which the Go snapshotter's sample file lists too, means as
        /// fast as the link allows while no container waits for something else; any other is obeyed. Negative: as fast
        /// as the link allows.
        pace: Pace = pace() => "fetch_period_msec";
        /// Accepted for compatibility; no effect here because layers do not queue: whatever is missing of any image is
        /// fetched, the likeliest spans first.
        max_queue_size: Limit = limit(300) => "max_queue_size";
        /// Accepted for compatibility (newest or oldest); no effect here because layers do not queue.
        drop_policy: DropPolicy = OneOf(DropPolicy::Newest) => "drop_policy";
        /// Seconds between two reports of how many layers are incomplete.
        emit_metric_period: Duration = delay_s(10) => "emit_metric_period_sec";
        /// Bytes per second that the background may fetch on this machine. 0 or negative: unlimited.
        /// This setting does not exist in the Go snapshotter.
        max_bytes_per_sec: Limit = no_limit() => "max_bytes_per_sec";
    }
}

settings! {
    /// SOCI indexes and zTOCs.
    struct ContentStore {
        /// soci: an OCI layout below the root directory. containerd: what containerd's content store has of an image's index
        /// and zTOCs is copied from there into that layout and need not be in a registry.
        kind: ContentStoreType = OneOf(ContentStoreType::Soci) => "type";
        /// containerd's socket. Layers that containerd has already are read from there, whatever the type is.
        containerd_address: String = SocketPath("/run/containerd/containerd.sock") => "containerd_address";
    }
}

settings! {
    /// Prefetch artifacts: lists of spans that the author of an index wants fetched first.
    struct Prefetch {
        /// Fetch what the prefetch artifacts of an index name before anything else.
        enable: bool = Flag(false) => "enable";
        /// Accepted for compatibility; no effect here because one scheduler fills the link, however many layers there are.
        max_concurrency: Limit = no_limit() => "max_concurrency";
    }
}

settings! {
    /// How images are pulled.
    struct PullModes {
        tables {
            soci_v1: SociV1 => "soci_v1";
            soci_v2: SociV2 => "soci_v2";
            parallel_pull_unpack: ParallelPullUnpack => "parallel_pull_unpack";
        }
    }
}

settings! {
    /// Lazy loading with an index found through the registry's referrers API.
    struct SociV1 {
        /// Whether to look for such an index.
        enable: bool = Flag(false) => "enable";
    }
}

settings! {
    /// Lazy loading with an index named by an annotation of the image's manifest.
    struct SociV2 {
        /// Whether to look for such an index.
        enable: bool = Flag(true) => "enable";
    }
}

settings! {
    /// Eager pulls: layers downloaded and unpacked by this daemon, all layers of an image at once. Which mode when:
    ///   nothing set                  images with a SOCI index are loaded lazily, all others are pulled by containerd
    ///   parallel_pull_as_fallback    for most nodes: indexed images start at once, all others are pulled here, in half the time
    ///   enable                       every image is pulled here before it starts: for programs that read most of their image
    ///                                at once, or where the registry may be gone while containers run
    /// Nothing has to be tuned: requests in flight and their size follow the link, the registry and the processors. What is
    /// set below is a limit. Whatever the mode, a layer of an indexed image that has no zTOC is pulled here, not the whole image.
    struct ParallelPullUnpack {
        /// Pull every image eagerly; lazy loading is not tried.
        enable: bool = Flag(false) => "enable";
        /// Pull an image eagerly when it has no SOCI index, instead of leaving it to containerd. No effect with enable.
        /// Formerly experimental_parallel_pull_as_fallback.
        parallel_pull_as_fallback: bool = Flag(false)
            => "parallel_pull_as_fallback" | "experimental_parallel_pull_as_fallback";
        /// Range requests in flight, all images together, streaming of lazy layers included; a read that a container waits for
        /// is never held back, but counts. 0 or negative: as many as help.
        max_concurrent_downloads: Limit = open_limit(-1) => "max_concurrent_downloads";
        /// Range requests in flight for one image. The number below, which the Go snapshotter's sample file lists too, means
        /// as many as help, and so do 0 and negative numbers.
        max_concurrent_downloads_per_image: Limit = open_limit(3) => "max_concurrent_downloads_per_image";
        /// Bytes of one range request, such as '4mb' (b, kb, mb, gb; base 1024), at most 16mb. Empty or 0: chosen by the size of
        /// the layer.
        concurrent_download_chunk_size: ChunkSize = Size => "concurrent_download_chunk_size";
        /// Layers unpacked at the same time, all images together. 0 or negative: two for each processor.
        max_concurrent_unpacks: Limit = open_limit(-1) => "max_concurrent_unpacks";
        /// Layers of one image unpacked at the same time. The number below, which the Go snapshotter's sample file lists too,
        /// means no limit for one image, and so do 0 and negative numbers.
        max_concurrent_unpacks_per_image: Limit = open_limit(1) => "max_concurrent_unpacks_per_image";
        /// Do not keep compressed layers in containerd's content store. They are kept only with content_store.type =
        /// "containerd"; otherwise there is nothing to discard.
        discard_unpacked_layers: bool = Flag(false) => "discard_unpacked_layers";
        /// Programs that decompress gzip or zstd layers from standard input to standard output. None by default. Example:
        ///   [pull_modes.parallel_pull_unpack.decompress_streams.gzip]
        ///   path = '/usr/bin/unpigz'
        ///   args = ['-d', '-c']
        decompress_streams: BTreeMap<String, DecompressStream> = Streams => "decompress_streams";
    }
}

settings! {
    /// Registry logins from Kubernetes secrets.
    struct KubeconfigKeychain {
        /// Use the secrets of type kubernetes.io/dockerconfigjson of all namespaces, as far as this kubeconfig may list and watch them.
        enable_keychain: bool = Flag(false) => "enable_keychain";
        /// Path of the kubeconfig. Empty: $KUBECONFIG, else ~/.kube/config.
        kubeconfig_path: String = Words("") => "kubeconfig_path";
    }
}

settings! {
    /// Registry logins from the CRI image service, which is then also served on the daemon's own socket.
    struct CriKeychain {
        /// Proxy the CRI image service and use the logins that pass through it. kubelet has to be told to ask there:
        /// --image-service-endpoint=unix:///run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock
        enable_keychain: bool = Flag(false) => "enable_keychain";
        /// Socket of the CRI image service that everything is passed on to.
        image_service_path: String = SocketPath("/run/containerd/containerd.sock") => "image_service_path";
    }
}

settings! {
    /// Registry logins from kubelet's credential providers, run by this daemon. This table does not exist in the Go daemon.
    struct KubeletKeychain {
        /// Use the credential providers of the next two settings.
        enable_keychain: bool = Flag(false) => "enable_keychain";
        /// The file that kubelet is given as --image-credential-provider-config.
        config_path: String = Words("") => "image_credential_provider_config";
        /// The directory that kubelet is given as --image-credential-provider-bin-dir.
        bin_dir: String = Words("") => "image_credential_provider_bin_dir";
    }
}

settings! {
    /// Which registries are asked.
    struct Resolver {
        /// Accepted for compatibility; no effect here because a session lasts as long as the registry lets it, and a login
        /// that is refused is looked up again.
        auth_client_ttl: Timeout = timeout_s(3600) => "auth_client_ttl_sec";
        /// Accepted for compatibility; no effect here because images of one registry share its connections anyway.
        enable_auth_client_sharing: bool = Flag(false) => "enable_auth_client_sharing";
        /// Mirrors, asked in this order before the registry that the image names. None by default. Example:
        ///   [[resolver.host."docker.io".mirrors]]
        ///   host = 'https://mirror.example:5000'   # with its scheme
        ///   insecure = false                       # true: plain HTTP
        ///   request_timeout_sec = 0                # 0: as http.RequestTimeoutMsec; negative: no limit
        host: BTreeMap<String, Vec<Mirror>> = Mirrors => "host";
    }
}

settings! {
    /// Registries as containerd and Docker have them configured. This table does not exist in the Go daemon.
    struct Registry {
        /// Directories with one directory per registry, in it hosts.toml or certificates, separated by colons: those of containerd
        /// (its own default since 2.2) and Docker, so that what they need to reach a registry is not to be written down again.
        /// Set to '' for none, as in the Go daemon. A registry's own hosts.toml there wins over [resolver.host], and that over
        /// _default; `config check` says who decides. Changes below it are in force for the next request.
        config_path: String = Verbatim("/etc/containerd/certs.d:/etc/docker/certs.d") => "config_path";
    }
}

settings! {
    /// Which layers are loaded lazily.
    struct SnapshotterTable {
        /// Compressed bytes below which a layer is not loaded lazily. Needs the label soci.size, which only nerdctl sends.
        /// 0 or negative: off.
        min_layer_size: MinLayerSize = min_layer_size() => "min_layer_size";
        /// Accepted for compatibility; no effect here because a start needs no network and never fails for one layer.
        allow_invalid_mounts_on_restart: bool = Flag(false) => "allow_invalid_mounts_on_restart";
    }
}

settings! {
    /// Layers on disk. These settings do not exist in the Go snapshotter.
    struct LayerStore {
        /// Mebibytes of memory for inflated spans.
        cache_memory_bytes: u64 = mebibytes(16) => "cache_memory_mb";
    }
}
