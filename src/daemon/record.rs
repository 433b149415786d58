//! What is written beside a lazy snapshot, so that it can be served again after a restart without asking anybody.

use crate::{
    fs::ImpliedAttrs,
    index::ZtocDescriptor,
    layout::{Layout, SnapshotId},
    oci::{Chain, Digest, IdMaps, Reference},
    snapshot::Target,
};
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, fs, io, io::Write, path::Path};

/// Version of the file. A newer one is refused: it was written by a newer daemon, which knows why.
const VERSION: u32 = 2;
/// What is written where there are no id mappings: daemons that know no others can read it.
const UNMAPPED_VERSION: u32 = 1;

/// The image and layer behind a lazy snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LazyRecord {
    version: u32,
    pub layer: Digest,
    pub ztoc: Digest,
    /// Platform manifest of the image.
    pub manifest: Digest,
    #[serde(with = "reference_text")]
    pub image: Reference,
    pub namespace: String,
    /// No entry of the layer has an xattr.
    pub no_xattrs: bool,
    /// Number of layers below.
    pub depth: usize,
    /// The SOCI index that named the zTOC. Unknown of layers that an earlier version mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Digest>,
    /// What the image says of the layer's diff ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<Chain>,
    /// Shown with the owners of a user namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maps: Option<IdMaps>,
}

mod reference_text {
    use super::Reference;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(reference: &Reference, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(reference)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Reference, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

impl LazyRecord {
    /// The record of the layer that `target` names, with that zTOC and `depth` layers below it.
    pub fn new(target: &Target, ztoc: &ZtocDescriptor, depth: usize) -> LazyRecord {
        LazyRecord {
            version: UNMAPPED_VERSION,
            layer: target.layer,
            ztoc: ztoc.digest,
            manifest: target.manifest,
            image: target.reference.clone(),
            namespace: target.namespace.clone(),
            no_xattrs: ztoc.disable_xattrs,
            depth,
            index: None,
            chain: target.chain,
            maps: None,
        }
    }

    /// The same, known to come from that index.
    pub fn found_in(self, index: Digest) -> LazyRecord {
        LazyRecord { index: Some(index), ..self }
    }

    /// The record of the same layer, shown with the owners of a user namespace.
    pub fn mapped(self, maps: IdMaps) -> LazyRecord {
        LazyRecord { version: VERSION, maps: Some(maps), ..self }
    }

    /// Writes the record with the attributes of implied directories, durably: containerd is told only afterwards.
    pub fn write(&self, layout: &Layout, id: SnapshotId, implied: &HashMap<u32, ImpliedAttrs>) -> io::Result<()> {
        let file = File { record: self.clone(), implied: implied.iter().map(|(n, a)| (*n, a.clone())).collect() };
        write_durably(&layout.snapshot_lazy_record(id), &serde_json::to_vec(&file)?)
    }

    /// Reads both back.
    pub fn read(layout: &Layout, id: SnapshotId) -> io::Result<(LazyRecord, HashMap<u32, ImpliedAttrs>)> {
        let path = layout.snapshot_lazy_record(id);
        let invalid = |e: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display()));
        let bytes = fs::read(&path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        let version: Version = serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
        if version.version > VERSION {
            let found = version.version;
            return Err(invalid(format!("written by a newer version (format {found}, this one knows {VERSION})")));
        }
        let file: File = serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
        Ok((file.record, file.implied.into_iter().collect()))
    }
}

/// The file: pairs instead of a map, because JSON has no numbers as keys.
#[derive(Serialize, Deserialize)]
struct File {
    #[serde(flatten)]
    record: LazyRecord,
    implied: Vec<(u32, ImpliedAttrs)>,
}

/// Read first: what else is in the file depends on it.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// The snapshots that have a record, whatever the snapshot database says: what must be readable when that cannot be read.
pub fn all(layout: &Layout) -> Vec<SnapshotId> {
    let names = fs::read_dir(layout.snapshots())
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let ids = names.filter_map(|name| name.parse().ok()).map(SnapshotId);
    let mut ids: Vec<SnapshotId> = ids.filter(|id| layout.snapshot_lazy_record(*id).exists()).collect();
    ids.sort_unstable();
    ids
}

/// Content and name are on disk when this returns: the snapshot that is committed next counts on them after a power cut.
fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(temporary, path)?;
    match path.parent() {
        Some(directory) => fs::File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}
