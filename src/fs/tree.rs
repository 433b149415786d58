//! All layers of the one mount: a directory per snapshot below the root.
//!
//! ```text
//! node id     1                     the mount's root
//!             id << 32 | n + 1      node n of the flat TOC of snapshot id
//!             id << 32 | 0xfffffffe the hidden state directory of that layer, …ff its file
//! ```
//!
//! Invariant: a node id is a pure function of snapshot and TOC, so that the kernel's references to nodes stay right when
//! another process continues to serve the mount, and forgetting needs no count. [`NODE_SCHEME`] is stored with whatever
//! remembers node ids (today: the running kernel) and changes with the picture above.
//!
//! Invariant: snapshot ids are never reused, so a node id never comes to mean another file.

use super::observer::Observer;
use super::read::LayerData;
use super::state_file::StateFile;
use super::wire::{Attr, StatfsOut};
use crate::layers::toc::{Kind, Node, ROOT, Toc};
use crate::layout::SnapshotId;
use crate::oci::IdMaps;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{Semaphore, watch};

/// Version of the node id scheme.
pub const NODE_SCHEME: u32 = 1;
/// The root of the mount: `FUSE_ROOT_ID`.
pub const ROOT_NODE: u64 = 1;

const STATE_DIR: u32 = u32::MAX - 1;
const STATE_FILE: u32 = u32::MAX;

/// What reads of one layer may hold in memory while they wait, in pages: 256 MiB. Room for 256 blocked readers of the
/// largest request each; the reads beyond wait in line, on their own layer only.
const READ_BUDGET_PAGES: usize = 65_536;

/// Attributes of a directory that a layer implies, as the layers below have them.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ImpliedAttrs {
    /// Permission bits; the type is always directory.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Whether the tar header of a file is compared with the index before its first byte is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderCheck {
    Required,
    Skipped,
}

/// Whether a layer's xattrs are shown. Opaque directories are marked in any case: overlayfs needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Xattrs {
    Shown,
    Hidden,
}

/// A layer as it is put into the tree.
pub struct LazyLayer {
    pub id: SnapshotId,
    pub toc: Arc<Toc>,
    /// By node number; directories that are not here keep what the TOC says (0755, root).
    pub implied: HashMap<u32, ImpliedAttrs>,
    pub data: Arc<dyn LayerData>,
    pub headers: HeaderCheck,
    pub xattrs: Xattrs,
    /// Translates owners, for containers in a user namespace.
    pub maps: Option<IdMaps>,
}

/// A layer in the tree, with what serving it accumulates.
pub struct Layer {
    pub id: SnapshotId,
    pub toc: Arc<Toc>,
    pub data: Arc<dyn LayerData>,
    pub(super) implied: HashMap<u32, ImpliedAttrs>,
    pub(super) xattrs: Xattrs,
    pub(super) maps: Option<IdMaps>,
    pub(super) state_file: StateFile,
    pub(super) budget: Arc<Semaphore>,
    /// One bit per node: its header was compared. Empty where headers are not checked.
    checked: Box<[AtomicU64]>,
    last_error: Mutex<Option<String>>,
}

impl Layer {
    pub(super) fn new(layer: LazyLayer) -> Layer {
        let words = match layer.headers {
            HeaderCheck::Required => layer.toc.len().div_ceil(64),
            HeaderCheck::Skipped => 0,
        };
        Layer {
            id: layer.id,
            toc: layer.toc,
            data: layer.data,
            implied: layer.implied,
            xattrs: layer.xattrs,
            maps: layer.maps,
            state_file: StateFile::default(),
            budget: Arc::new(Semaphore::new(READ_BUDGET_PAGES)),
            checked: (0..words).map(|_| AtomicU64::new(0)).collect(),
            last_error: Mutex::new(None),
        }
    }

    fn bit(&self, node: u32) -> Option<(&AtomicU64, u64)> {
        self.checked.get(node as usize / 64).map(|word| (word, 1 << (node % 64)))
    }

    pub(super) fn must_check_header(&self, node: u32) -> bool {
        self.bit(node).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit == 0)
    }

    pub(super) fn header_is_right(&self, node: u32) {
        if let Some((word, bit)) = self.bit(node) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    pub(super) fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the state file reports from now on.
    pub(super) fn set_last_error(&self, error: String) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    pub(super) fn node_id(&self, node: u32) -> u64 {
        u64::from(self.id.0) << 32 | u64::from(node).saturating_add(1)
    }

    pub(super) fn state_dir_id(&self) -> u64 {
        u64::from(self.id.0) << 32 | u64::from(STATE_DIR)
    }

    pub(super) fn state_file_id(&self) -> u64 {
        u64::from(self.id.0) << 32 | u64::from(STATE_FILE)
    }

    pub(super) fn attr(&self, node: &Node) -> Attr {
        let mut attr = attr(self.node_id(node.index), node.mode, node.size, node.mtime);
        (attr.uid, attr.gid, attr.nlink, attr.rdev) = (node.uid, node.gid, node.nlink, node.rdev);
        if node.kind == Kind::Directory {
            // As a small ext4 directory has it; some programs take 0 for "no directory here".
            attr.size = u64::from(BLOCK_SIZE);
            attr.blocks = u64::from(BLOCK_SIZE / 512);
        }
        if node.implied
            && let Some(implied) = self.implied.get(&node.index)
        {
            attr.mode = Kind::Directory.mode_bits() | implied.mode & 0o7777;
            (attr.uid, attr.gid) = (implied.uid, implied.gid);
            set_times(&mut attr, implied.mtime);
        }
        if let Some(maps) = &self.maps {
            (attr.uid, attr.gid) = maps.host_or_nobody(attr.uid, attr.gid);
        }
        attr
    }

    pub(super) fn state_dir_attr(&self) -> Attr {
        Attr { nlink: 2, ..attr(self.state_dir_id(), 0o040500, 0, (0, 0)) }
    }

    /// Freezes the state file's content, and describes it.
    pub(super) fn state_file_attr(&self) -> Attr {
        let size = self.state_file.refresh(self);
        attr(self.state_file_id(), 0o100400, size, now())
    }
}

const BLOCK_SIZE: u32 = 4096;

fn attr(ino: u64, mode: u32, size: u64, mtime: (i64, u32)) -> Attr {
    let blocks = size.div_ceil(BLOCK_SIZE.into()).saturating_mul(u64::from(BLOCK_SIZE / 512));
    let mut attr = Attr { ino, size, blocks, mode, nlink: 1, blksize: BLOCK_SIZE, ..Attr::default() };
    set_times(&mut attr, mtime);
    attr
}

/// Nobody ever changed or read these files, so all times are the one the tar has.
fn set_times(attr: &mut Attr, (seconds, nanos): (i64, u32)) {
    (attr.mtime, attr.ctime, attr.atime) = (seconds, seconds, seconds);
    (attr.mtimensec, attr.ctimensec, attr.atimensec) = (nanos, nanos, nanos);
}

fn now() -> (i64, u32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(since.as_secs()).unwrap_or(0), since.subsec_nanos())
}

/// What a node id stands for.
pub(super) enum Target {
    Root,
    Node(Arc<Layer>, Node),
    StateDir(Arc<Layer>),
    StateFile(Arc<Layer>),
}

/// Why a layer is not taken into the tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    #[error("snapshot 0 is the mount's own root")]
    Reserved,
    #[error("snapshot {0} is already in the tree")]
    Exists(SnapshotId),
}

/// Names overlayfs looks at to learn that a directory is opaque.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OpaqueMark {
    #[default]
    Trusted,
    /// For mounts with `userxattr`.
    User,
}

impl OpaqueMark {
    pub(super) fn name(self) -> &'static [u8] {
        match self {
            OpaqueMark::Trusted => b"trusted.overlay.opaque",
            OpaqueMark::User => b"user.overlay.opaque",
        }
    }
}

/// Why there is nothing at a node id or name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// Its layer is on its way.
    Expected(SnapshotId),
    Gone,
}

struct Layers {
    by_id: BTreeMap<u32, Arc<Layer>>,
    /// Snapshots whose layers cannot be shown yet. None of them is in `by_id`.
    expected: HashSet<SnapshotId>,
    changed: (i64, u32),
}

/// Everything the mount shows.
pub struct Tree {
    /// Written when snapshots come and go, read by every request; nothing else is locked while it is held.
    layers: RwLock<Layers>,
    /// Counts how often a layer ceased to be expected.
    arrivals: watch::Sender<u64>,
    /// Set by whoever watches the disk; the kernel asks rarely.
    statfs: Mutex<StatfsOut>,
    pub(super) opaque: OpaqueMark,
    pub(super) observer: Arc<dyn Observer>,
}

impl Tree {
    pub fn new(opaque: OpaqueMark, observer: Arc<dyn Observer>) -> Tree {
        let statfs = StatfsOut { bsize: BLOCK_SIZE, frsize: BLOCK_SIZE, namelen: 255, ..StatfsOut::default() };
        Tree {
            layers: RwLock::new(Layers { by_id: BTreeMap::new(), expected: HashSet::new(), changed: now() }),
            arrivals: watch::Sender::new(0),
            statfs: Mutex::new(statfs),
            opaque,
            observer,
        }
    }

    /// Shows a layer at `/<id>`.
    pub fn add(&self, layer: LazyLayer) -> Result<(), AddError> {
        let id = layer.id;
        if id.0 == 0 {
            return Err(AddError::Reserved);
        }
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        if layers.by_id.contains_key(&id.0) {
            return Err(AddError::Exists(id));
        }
        layers.by_id.insert(id.0, Arc::new(Layer::new(layer)));
        layers.changed = now();
        let arrived = layers.expected.remove(&id);
        drop(layers);
        if arrived {
            self.arrivals.send_modify(|count| *count += 1);
        }
        Ok(())
    }

    /// Has requests about a snapshot wait: its layer will be shown. Nothing changes if it is.
    pub fn expect(&self, id: SnapshotId) {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        if !layers.by_id.contains_key(&id.0) {
            layers.expected.insert(id);
        }
    }

    /// It will not; what waited for it finds nothing.
    pub fn give_up(&self, id: SnapshotId) {
        if self.layers.write().unwrap_or_else(PoisonError::into_inner).expected.remove(&id) {
            self.arrivals.send_modify(|count| *count += 1);
        }
    }

    /// Waits until a layer is not expected any more: it is here, or was given up.
    pub(super) async fn arrival(&self, id: SnapshotId) {
        let is_over = |_: &u64| !self.layers.read().unwrap_or_else(PoisonError::into_inner).expected.contains(&id);
        // Looked at after subscribing, and counted after it was changed, so no arrival is lost. The sender is `self`'s.
        let _ = self.arrivals.subscribe().wait_for(is_over).await;
    }

    /// Takes a layer away; reads that are under way end on their own.
    pub fn remove(&self, id: SnapshotId) -> Option<Arc<Layer>> {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        layers.changed = now();
        layers.by_id.remove(&id.0)
    }

    pub fn get(&self, id: SnapshotId) -> Option<Arc<Layer>> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner).by_id.get(&id.0).cloned()
    }

    /// All layers, by id.
    pub fn layers(&self) -> Vec<Arc<Layer>> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner).by_id.values().cloned().collect()
    }

    /// What `statfs(2)` answers from now on: of the filesystem that holds the layers.
    pub fn set_statfs(&self, statfs: StatfsOut) {
        *self.statfs.lock().unwrap_or_else(PoisonError::into_inner) = statfs;
    }

    pub(super) fn statfs(&self) -> StatfsOut {
        *self.statfs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: SnapshotId) -> Result<Arc<Layer>, Missing> {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        match layers.by_id.get(&id.0) {
            Some(layer) => Ok(layer.clone()),
            None if layers.expected.contains(&id) => Err(Missing::Expected(id)),
            None => Err(Missing::Gone),
        }
    }

    pub(super) fn target(&self, node_id: u64) -> Result<Target, Missing> {
        if node_id == ROOT_NODE {
            return Ok(Target::Root);
        }
        let halves = (u32::try_from(node_id >> 32), u32::try_from(node_id & u64::from(u32::MAX)));
        let (Ok(id), Ok(low)) = halves else { return Err(Missing::Gone) };
        let layer = self.find(SnapshotId(id))?;
        match low {
            STATE_DIR => Ok(Target::StateDir(layer)),
            STATE_FILE => Ok(Target::StateFile(layer)),
            _ => {
                let node = low.checked_sub(1).and_then(|node| layer.toc.node(node)).ok_or(Missing::Gone)?;
                Ok(Target::Node(layer, node))
            }
        }
    }

    pub(super) fn root_attr(&self) -> Attr {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        let mut attr = attr(ROOT_NODE, 0o040755, BLOCK_SIZE.into(), layers.changed);
        attr.nlink = u32::try_from(layers.by_id.len()).unwrap_or(u32::MAX).saturating_add(2);
        attr
    }

    /// A layer by the name of its directory: a decimal number, written the one way.
    pub(super) fn by_name(&self, name: &[u8]) -> Result<Arc<Layer>, Missing> {
        let text = std::str::from_utf8(name).map_err(|_| Missing::Gone)?;
        let id = text.parse::<u32>().ok().filter(|id| id.to_string() == text).ok_or(Missing::Gone)?;
        self.find(SnapshotId(id))
    }

    /// The layer with the least id above `after`.
    pub(super) fn next_after(&self, after: u32) -> Option<Arc<Layer>> {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        layers.by_id.range((Bound::Excluded(after), Bound::Unbounded)).next().map(|(_, layer)| layer.clone())
    }
}

/// Whether `node` is the root of its layer.
pub(super) fn is_layer_root(node: &Node) -> bool {
    node.index == ROOT
}
