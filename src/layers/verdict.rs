//! What was found out about a layer and its index, and how that outlives the process.
//!
//! That an index is right is written beside the layer and goes with it; losing it costs another look. That one is wrong is kept apart
//! ([`Condemned`]), so that it is still known when the layer was removed and its image is pulled again.

use crate::oci::Digest;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Version of both files. What a newer daemon wrote is not understood, so not used: the layer is looked at again.
const VERSION: u32 = 1;
/// Indexes that are remembered as wrong; beyond, the oldest are forgotten. Each is an incident: nobody has a thousand.
const MOST: usize = 1024;
/// Longest reason that is kept: names in it are cut at 200 bytes.
const MAX_REASON: usize = 2048;

/// What a complete layer turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// What is shown of it is what its index promised, and what is in it.
    Genuine { diff_id: Digest },
    /// What is shown is not what the layer has.
    Contradicts { reason: String },
}

#[derive(Serialize, Deserialize)]
struct Proof {
    version: u32,
    ztoc: Digest,
    diff_id: Digest,
}

fn path(directory: &Path) -> PathBuf {
    directory.join("verdict")
}

fn temporary(target: &Path) -> PathBuf {
    target.with_extension("new")
}

/// The diff ID of the layer in `directory`, if it was found to be what the zTOC `ztoc` says.
pub fn proven(directory: &Path, ztoc: &Digest) -> Option<Digest> {
    // Left by a crash in the middle.
    let _ = fs::remove_file(temporary(&path(directory)));
    let proof: Proof = serde_json::from_slice(&fs::read(path(directory)).ok()?).ok()?;
    (proof.version == VERSION && proof.ztoc == *ztoc).then_some(proof.diff_id)
}

/// Remembers that. A power cut may lose it.
pub fn prove(directory: &Path, ztoc: Digest, diff_id: Digest) -> io::Result<()> {
    let target = path(directory);
    let temporary = temporary(&target);
    fs::write(&temporary, serde_json::to_vec(&Proof { version: VERSION, ztoc, diff_id })?)?;
    fs::rename(temporary, target)
}

#[derive(Serialize, Deserialize)]
struct Sentence {
    version: u32,
    layer: Digest,
    ztoc: Digest,
    reason: String,
}

/// Pairs of layer and zTOC of which the one is not what the other says. A file each, named by both; an operator may remove one.
pub struct Condemned {
    directory: PathBuf,
    /// Leaf lock.
    known: Mutex<HashMap<(Digest, Digest), String>>,
}

impl Condemned {
    /// Those that are remembered in `directory`. Blocks on the disk. What cannot be read is not known.
    pub fn open(directory: PathBuf) -> Condemned {
        let mut known = HashMap::new();
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten().take(2 * MOST) {
            if entry.path().extension().is_some() {
                // Left by a crash in the middle.
                let _ = fs::remove_file(entry.path());
                continue;
            }
            let read = fs::read(entry.path()).ok().and_then(|bytes| serde_json::from_slice::<Sentence>(&bytes).ok());
            if let Some(sentence) = read.filter(|sentence| sentence.version == VERSION) {
                known.insert((sentence.layer, sentence.ztoc), sentence.reason);
            }
        }
        Condemned { directory, known: Mutex::new(known) }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<(Digest, Digest), String>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why `layer` must not be read by way of `ztoc`, if that is known.
    pub fn why(&self, layer: &Digest, ztoc: &Digest) -> Option<String> {
        self.known().get(&(*layer, *ztoc)).cloned()
    }

    /// Remembers that, by this process in any case, and on disk before this returns without an error.
    pub fn add(&self, layer: Digest, ztoc: Digest, reason: &str) -> io::Result<()> {
        let reason: String = reason.chars().take(MAX_REASON).collect();
        let many = {
            let mut known = self.known();
            known.insert((layer, ztoc), reason.clone());
            known.len() > MOST
        };
        fs::create_dir_all(&self.directory)?;
        if many {
            self.forget_oldest()?;
        }
        let target = self.directory.join(format!("{}-{}", layer.hex(), ztoc.hex()));
        let temporary = temporary(&target);
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(&Sentence { version: VERSION, layer, ztoc, reason })?)?;
        file.sync_data()?;
        fs::rename(temporary, target)?;
        fs::File::open(&self.directory)?.sync_all()
    }

    fn forget_oldest(&self) -> io::Result<()> {
        let entries = fs::read_dir(&self.directory)?.filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        });
        match entries.min() {
            Some((_, oldest)) => fs::remove_file(oldest),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_known_to_the_next_process_for_that_pair_alone() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("condemned");
        let (layer, ztoc) = (Digest::of(b"layer"), Digest::of(b"ztoc"));
        let condemned = Condemned::open(directory.clone());
        assert_eq!(condemned.why(&layer, &ztoc), None);
        condemned.add(layer, ztoc, "it lies").unwrap();
        fs::write(directory.join("torn.new"), b"{").unwrap();
        let again = Condemned::open(directory.clone());
        assert!(!directory.join("torn.new").exists());
        assert_eq!(again.why(&layer, &ztoc).as_deref(), Some("it lies"));
        assert_eq!(again.why(&ztoc, &ztoc), None);
    }

    #[test]
    fn a_proof_counts_for_its_ztoc_and_not_if_it_is_torn_or_newer() {
        let root = tempfile::tempdir().unwrap();
        let (ztoc, diff_id) = (Digest::of(b"ztoc"), Digest::of(b"diff"));
        assert_eq!(proven(root.path(), &ztoc), None);
        prove(root.path(), ztoc, diff_id).unwrap();
        assert_eq!(proven(root.path(), &ztoc), Some(diff_id));
        assert_eq!(proven(root.path(), &diff_id), None);
        let whole = fs::read_to_string(path(root.path())).unwrap();
        for bad in [&whole[..whole.len() / 2], "", &whole.replace("\"version\":1", "\"version\":2")] {
            fs::write(path(root.path()), bad).unwrap();
            assert_eq!(proven(root.path(), &ztoc), None, "{bad}");
        }
    }
}
