//! Every name, once: families with their help, and the values of `operation_type`.
#![forbid(unsafe_code)]

/// A metric family.
pub(super) struct Family {
    pub name: &'static str,
    pub kind: &'static str,
    pub help: &'static str,
}

/// A family of histograms and its `operation_type`s.
pub(super) struct HistogramFamily<const N: usize> {
    pub family: Family,
    pub operations: [&'static str; N],
}

macro_rules! labelled {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// All of them, in the order of their declaration.
            pub const ALL: [$name; $name::NUMBER] = [$($name::$variant),+];
            pub(super) const NUMBER: usize = [$($label),+].len();
            const LABELS: [&'static str; $name::NUMBER] = [$($label),+];

            pub(super) const fn index(self) -> usize {
                self as usize
            }

            /// The value of the `operation_type` label.
            pub const fn label(self) -> &'static str {
                Self::LABELS[self.index()]
            }
        }
    };
}

labelled! {
    /// What is measured in milliseconds.
    MillisecondOperation {
        /// A lazy layer's way from the Prepare call to readable, discovery included.
        Mount = "mount",
        /// Making a resolved layer readable.
        FuseMount = "fuse_mount",
        /// One range request on blob data, until its headers, retries included.
        RemoteRegistryGet = "remote_registry_get",
        /// Building the layer's table of contents.
        InitMetadataStore = "init_metadata_store",
        /// Reading and checking a zTOC from disk.
        ZtocUnmarshal = "ztoc_unmarshal",
        /// Each host tried for a blob's location.
        BlobRedirect = "blob_redirect",
        /// Asking the registry for a layer's size.
        GetLayerSize = "get_layer_size",
        /// From the first background span of a layer to its last.
        BackgroundFetch = "background_fetch",
        /// Fetching an index and everything it lists; the `layer` label is the index digest.
        SociIndexFetch = "soci_index_fetch",
        /// Fetching one blob of an index.
        ZtocFetch = "ztoc_fetch",
    }
}

labelled! {
    /// What is measured in microseconds.
    MicrosecondOperation {
        /// One directory listing.
        NodeReaddir = "node_readdir",
        /// One READ.
        SynchronousRead = "synchronous_read",
    }
}

labelled! {
    /// FUSE operations that can fail for reasons of ours (EIO, not ENOENT).
    FuseFailure {
        NodeGetattr = "fuse_node_getattr_failure_count",
        NodeListxattr = "fuse_node_listxattr_failure_count",
        NodeLookup = "fuse_node_lookup_failure_count",
        NodeOpen = "fuse_node_open_failure_count",
        NodeReaddir = "fuse_node_readdir_failure_count",
        FileRead = "fuse_file_read_failure_count",
        FileGetattr = "fuse_file_getattr_failure_count",
        WhiteoutGetattr = "fuse_whiteout_getattr_failure_count",
        /// Any other.
        Unknown = "fuse_unknown_operation_failure_count",
    }
}

labelled! {
    /// FUSE operations counted per image.
    ImageOperation {
        NodeGetattr = "node.Getattr",
        NodeGetxattr = "node.Getxattr",
        NodeListxattr = "node.Listxattr",
        NodeLookup = "node.Lookup",
        NodeOpen = "node.Open",
        NodeReaddir = "node.Readdir",
        NodeReadlink = "node.Readlink",
        FileRead = "file.Read",
        FileGetattr = "file.Getattr",
        WhiteoutGetattr = "whiteout.Getattr",
    }
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// A READ.
    SynchronousRead,
    /// A span that a READ had to download.
    SynchronousReadRemoteFetch,
    /// A lazy Prepare that failed although the layer is indexed (general).
    FuseMountFailure,
    /// A local preparation that failed (general).
    LocalMountFailure,
    BackgroundSpanFetch,
    BackgroundSpanFetchFailure,
    /// A layer that fell out of the full queue (general).
    BackgroundFetchWorkQueueEvicted,
    ResolveCacheHit,
    ResolveCacheMiss,
    /// A layer that did not fit the pre-resolution queue (general).
    PreresolveQueueDrop,
    /// A span that was taken off the disk because the layer store's quota was reached.
    SpanEvicted,
    /// A snapshot whose layer turned out not to be what its index or image says.
    IndexContradiction,
    /// Any internal failure lately (general). Counted by [`super::LayerMetrics::failed`].
    FuseFailureState,
    Fuse(FuseFailure),
}

const PLAIN_COUNTS: [&str; 13] = [
    "synchronous_read_count",
    "synchronous_read_remote_registry_fetch_count",
    "fuse_mount_failure_count",
    "local_mount_failure_count",
    "background_span_fetch_count",
    "background_span_fetch_failure_count",
    "background_fetch_work_queue_evicted",
    "resolve_cache_hit",
    "resolve_cache_miss",
    "preresolve_queue_drop",
    "fuse_failure_state",
    "layer_store_evicted_spans",
    "index_contradiction_count",
];
pub(super) const COUNTS: usize = PLAIN_COUNTS.len() + FuseFailure::NUMBER;

/// The labels of all counts, by [`Count::index`].
pub(super) fn counts() -> impl Iterator<Item = &'static str> {
    PLAIN_COUNTS.into_iter().chain(FuseFailure::LABELS)
}

impl Count {
    pub(super) const fn index(self) -> usize {
        match self {
            Count::SynchronousRead => 0,
            Count::SynchronousReadRemoteFetch => 1,
            Count::FuseMountFailure => 2,
            Count::LocalMountFailure => 3,
            Count::BackgroundSpanFetch => 4,
            Count::BackgroundSpanFetchFailure => 5,
            Count::BackgroundFetchWorkQueueEvicted => 6,
            Count::ResolveCacheHit => 7,
            Count::ResolveCacheMiss => 8,
            Count::PreresolveQueueDrop => 9,
            Count::FuseFailureState => 10,
            Count::SpanEvicted => 11,
            Count::IndexContradiction => 12,
            Count::Fuse(failure) => PLAIN_COUNTS.len() + failure.index(),
        }
    }
}

pub(super) const HISTOGRAM_MILLISECONDS: HistogramFamily<{ MillisecondOperation::NUMBER }> = HistogramFamily {
    family: Family {
        name: "soci_fs_operation_duration_milliseconds",
        kind: "histogram",
        help: "Latency in milliseconds of soci snapshotter operations. Broken down by operation type and layer sha.",
    },
    operations: MillisecondOperation::LABELS,
};
pub(super) const HISTOGRAM_MICROSECONDS: HistogramFamily<{ MicrosecondOperation::NUMBER }> = HistogramFamily {
    family: Family {
        name: "soci_fs_operation_duration_microseconds",
        kind: "histogram",
        help: "Latency in microseconds of soci snapshotter operations. Broken down by operation type and layer sha.",
    },
    operations: MicrosecondOperation::LABELS,
};
pub(super) const OPERATION_COUNT: Family = Family {
    name: "soci_fs_operation_count",
    kind: "counter",
    help: "The count of soci snapshotter operations. Broken down by operation type and layer sha.",
};
pub(super) const BYTES_SERVED: Family = Family {
    name: "soci_fs_bytes_served",
    kind: "gauge",
    help: "The number of bytes served per soci snapshotter operations. Broken down by operation type and layer sha.",
};
pub(super) const BYTES_SERVED_OPERATION: &str = "synchronous_bytes_served";
pub(super) const IMAGE_OPERATIONS: Family = Family {
    name: "soci_fs_image_operation_count_key",
    kind: "gauge",
    help: "The count of soci snapshotter operations. Broken down by operation type and image digest.",
};
pub(super) const BACKGROUND_QUEUE_OPERATION: &str = "background_fetch_work_queue_size";
pub(super) const LAYER_FETCHED: Family =
    Family { name: "soci_fs_layer_fetched_size_bytes", kind: "counter", help: "Total fetched size of the layer" };
pub(super) const LAYER_SIZE: Family =
    Family { name: "soci_fs_layer_size_bytes", kind: "counter", help: "Total size of the layer" };
