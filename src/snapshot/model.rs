//! The nouns of containerd's snapshots API.

use crate::layout::SnapshotId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// Label keys that mean something to us (`runtime.md` 2).
pub mod label {
    /// On Prepare: the chain id under which the layer is to be committed. Makes it a layer extraction.
    pub const TARGET: &str = "containerd.io/snapshot.ref";
    /// The image, as the user named it.
    pub const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
    /// The image's manifest for this platform.
    pub const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
    /// The compressed layer.
    pub const LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
    /// This layer and later ones.
    pub const IMAGE_LAYERS: &str = "containerd.io/snapshot/cri.image-layers";
    /// Compressed size of the layer; only nerdctl sends it.
    pub const SIZE: &str = "containerd.io/snapshot/remote/soci.size";
    /// Sizes of the layers in [`IMAGE_LAYERS`]; only nerdctl sends it.
    pub const IMAGE_LAYERS_SIZE: &str = "containerd.io/snapshot/remote/image.layers.size";
    /// The SOCI index that the user wants; only nerdctl sends it. May be empty.
    pub const INDEX_DIGEST: &str = "containerd.io/snapshot/remote/soci.index.digest";
    pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
    pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

    /// Written by us: the namespace of the Prepare.
    pub const NAMESPACE: &str = "containerd.io/snapshot/remote/namespace";
    /// Written by us, on lazy layers, with [`REMOTE_VALUE`].
    pub const REMOTE: &str = "containerd.io/snapshot/remote";
    pub const REMOTE_VALUE: &str = "remote snapshot";
    /// Written by us, on lazy layers, as `true`.
    pub const HAS_INDEX: &str = "containerd.io/snapshot/remote/has.soci.index.digest";
}

/// Labels in byte order of their keys.
pub type Labels = BTreeMap<String, String>;

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    View,
    Active,
    Committed,
}

impl Kind {
    /// As filters name it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

/// Space on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes, hard links counted once.
    pub size: u64,
    pub inodes: u64,
}

/// One run of the kernel, as it names itself (`/proc/sys/kernel/random/boot_id`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootId(pub u128);

impl BootId {
    /// Of 32 hexadecimal digits, with or without dashes; `None` for anything else.
    pub fn parse(text: &str) -> Option<BootId> {
        let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
        let is_one = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        is_one.then(|| u128::from_str_radix(&digits, 16).ok()).flatten().map(BootId)
    }
}

/// A moment, in the parts that protobuf wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp {
    pub seconds: i64,
    pub nanos: u32,
}

impl Timestamp {
    /// The system clock's now.
    pub fn now() -> Timestamp {
        // A clock before 1970 is a clock that is not set: its time is worth nothing anyway.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp { seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX), nanos: since.subsec_nanos() }
    }
}

/// A snapshot as containerd sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    pub id: SnapshotId,
    pub name: String,
    /// Name of the parent; `None` at the bottom of a chain.
    pub parent: Option<String>,
    pub kind: Kind,
    pub created: Timestamp,
    pub updated: Timestamp,
    pub labels: Labels,
    /// As stored at commit; nothing before.
    pub usage: Usage,
}

impl Info {
    /// Whether its content comes through the lazy filesystem.
    pub fn is_lazy(&self) -> bool {
        self.kind == Kind::Committed && self.labels.contains_key(label::REMOTE)
    }
}
