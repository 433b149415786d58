//! What is written beside a lazy snapshot, so that it can be served again after a restart without asking anybody.

use crate::{
    fs::ImpliedAttrs,
    layout::{Layout, SnapshotId},
    oci::{Digest, Reference},
};
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, fs, io, io::Write, path::Path};

/// Version of both files. A newer one is refused: it was written by a newer daemon, which knows why.
const VERSION: u32 = 1;

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
    #[allow(clippy::too_many_arguments)] // one per field; the version is not the caller's to choose
    pub fn new(
        layer: Digest,
        ztoc: Digest,
        manifest: Digest,
        image: Reference,
        namespace: String,
        no_xattrs: bool,
        depth: usize,
    ) -> LazyRecord {
        LazyRecord { version: VERSION, layer, ztoc, manifest, image, namespace, no_xattrs, depth }
    }

    /// Writes the record and the attributes of implied directories, durably: the record last, so that it vouches for both.
    pub fn write(&self, layout: &Layout, id: SnapshotId, implied: &HashMap<u32, ImpliedAttrs>) -> io::Result<()> {
        let implied: Vec<(&u32, &ImpliedAttrs)> = implied.iter().collect();
        write_durably(&layout.snapshot_implied(id), &serde_json::to_vec(&implied)?)?;
        write_durably(&layout.snapshot_lazy_record(id), &serde_json::to_vec(self)?)
    }

    /// Reads both back.
    pub fn read(layout: &Layout, id: SnapshotId) -> io::Result<(LazyRecord, HashMap<u32, ImpliedAttrs>)> {
        let path = layout.snapshot_lazy_record(id);
        let invalid = |e: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display()));
        let record: LazyRecord = serde_json::from_slice(&fs::read(&path)?).map_err(|e| invalid(e.to_string()))?;
        if record.version > VERSION {
            return Err(invalid(format!("written by a newer version (format {}, this one knows {VERSION})", record.version)));
        }
        let implied: Vec<(u32, ImpliedAttrs)> =
            serde_json::from_slice(&fs::read(layout.snapshot_implied(id))?).map_err(|e| invalid(e.to_string()))?;
        Ok((record, implied.into_iter().collect()))
    }
}

fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(temporary, path)
}
