//! Layers for containers in a user namespace: the same content, owned by whom the namespace's ids stand for outside.
//!
//! The Prepare of such a container carries two id mappings. Each layer below it is shown once more: a lazy one through the lazy filesystem, which
//! translates owners as it answers; an unpacked one as a copy that the custodian makes. These *mapped layers* have snapshot numbers and records of
//! their own, so that they are served again after a restart and swept when nobody uses them. They are shared by all containers with the same mappings,
//! are found by a name that no client can use, and are in no listing: containerd would remove what it has not made.
//!
//! Invariant: a mapped layer is removed only when no snapshot with its mappings stands on its original ([`Inner::forget_unused`]).

use super::directories::{self, Access};
use super::disk::blocking;
use super::error::{SnapshotError, StoreError};
use super::model::{Info, Kind, Labels, Usage, label};
use super::record;
use super::snapshotter::Inner;
use super::state::Mount;
use super::store::{Change, LabelUpdate, Link};
use crate::layout::SnapshotId;
use crate::oci::IdMaps;
use redb::ReadableTable;
use std::collections::HashSet;
use std::ops::Bound;

/// Names of mapped layers start with it. containerd's names start with its namespaces', which never start with a dot.
const PREFIX: &str = ".mapped/";

/// Whether a name is not for clients.
pub(super) fn is_reserved(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Whether a record is not for clients.
pub(super) fn is_mapped(info: &Info) -> bool {
    is_reserved(&info.name)
}

fn name(original: SnapshotId, maps: &IdMaps) -> String {
    format!("{PREFIX}{original}/{maps}")
}

/// The mapped layers that were made of `original`.
pub(super) fn of(
    original: SnapshotId,
    records: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<Vec<Info>, StoreError> {
    let prefix = format!("{PREFIX}{original}/");
    let mut out = Vec::new();
    for entry in
        records.range::<&str>((Bound::Included(prefix.as_str()), Bound::Unbounded)).map_err(StoreError::database)?
    {
        let (name, bytes) = entry.map_err(StoreError::database)?;
        if !name.value().starts_with(&prefix) {
            break;
        }
        out.push(record::decode(name.value(), bytes.value())?);
    }
    Ok(out)
}

/// The mappings that labels ask for: both, or none.
pub(super) fn wanted(labels: &Labels) -> Result<Option<IdMaps>, SnapshotError> {
    let (Some(uids), Some(gids)) = (labels.get(label::UID_MAPPING), labels.get(label::GID_MAPPING)) else {
        return Ok(None);
    };
    let invalid = |label| move |source| SnapshotError::IdMapping { label, source };
    // Each for itself first, for an error that names the right label.
    IdMaps::new(uids, uids).map_err(invalid(label::UID_MAPPING))?;
    IdMaps::new(uids, gids).map(Some).map_err(invalid(label::GID_MAPPING))
}

/// An update of labels that leaves a snapshot its mappings: they are what its mounts, and those they keep from being swept, are known by.
pub(super) fn kept(info: &Info, mut update: LabelUpdate) -> LabelUpdate {
    let (LabelUpdate::Replace(labels) | LabelUpdate::Set(labels)) = &mut update;
    for key in [label::UID_MAPPING, label::GID_MAPPING] {
        if let Some(value) = info.labels.get(key) {
            labels.insert(key.to_owned(), value.clone());
        }
    }
    update
}

impl Inner {
    /// Prepare of a container's snapshot in a user namespace.
    pub(super) async fn create_mapped(
        &self,
        key: String,
        parent: Option<String>,
        labels: Labels,
        maps: &IdMaps,
    ) -> Result<Mount, SnapshotError> {
        let parents = self.whole(self.precheck(&key, parent.as_deref())?).await?;
        self.check_available(&parents).await?;
        // Nothing is found unused between here and the new record.
        let _kept = self.mapping.lock().await;
        let made = async {
            let mut lower = Vec::with_capacity(parents.len());
            for link in &parents {
                lower.push(self.mapped_layer(link, maps).await?);
            }
            let making = self.make(Access::Writable).await?;
            let id = making.id;
            match parents.first() {
                Some(_) => self.inherit_owner(id, &lower).await?,
                None => self.own_mapped(id, (0, 0), maps).await?,
            }
            self.store.insert(Self::new_info(id, key, parent, Kind::Active, labels), Change::Durable).await?;
            Ok(self.mount(id, Kind::Active, &lower))
        };
        // Directories without a record, and mapped layers that nobody came to use.
        made.await.inspect_err(|_| self.removed.notify_one())
    }

    /// What is to be mounted in the place of `parents`, for a snapshot with these labels. Mapped layers that a power cut took are made again.
    pub(super) async fn as_mounted(&self, labels: &Labels, parents: Vec<Link>) -> Result<Vec<Link>, SnapshotError> {
        let Some(maps) = wanted(labels)? else { return Ok(parents) };
        let _kept = self.mapping.lock().await;
        let mut mapped = Vec::with_capacity(parents.len());
        for link in &parents {
            mapped.push(self.mapped_layer(link, &maps).await?);
        }
        Ok(mapped)
    }

    async fn mapped_layer(&self, of: &Link, maps: &IdMaps) -> Result<Link, SnapshotError> {
        let name = name(of.id, maps);
        if let Some(info) = self.store.find(&name)? {
            let link = Link { id: info.id, lazy: of.lazy };
            self.check_available(std::slice::from_ref(&link)).await?;
            return Ok(link);
        }
        let making = self.make(Access::ReadOnly).await?;
        let id = making.id;
        let mut labels = Labels::new();
        let mut usage = Usage::default();
        if of.lazy {
            labels.insert(label::REMOTE.into(), label::REMOTE_VALUE.into());
            let shown = self.lazy.map(of.id, id, maps).await;
            shown.map_err(|why| SnapshotError::NotMapped { id: of.id, why })?;
            let layout = self.layout.clone();
            let linked = blocking(move || directories::link_to_lazy(&layout, id)).await;
            if let Err(source) = linked {
                self.lazy.remove(id);
                return Err(SnapshotError::Directory { id, source });
            }
        } else {
            let copied = self.disk.copy(of.id, id, maps).await;
            copied.map_err(|error| SnapshotError::NotMapped { id: of.id, why: super::chain(&error) })?;
            let layout = self.layout.clone();
            let original = of.id;
            let owner = blocking(move || directories::owner(&layout, original)).await;
            let owner = owner.map_err(|source| SnapshotError::Directory { id: original, source })?;
            self.own_mapped(id, owner, maps).await?;
            usage = self.disk_usage(id).await?;
        }
        let info = Info { usage, ..Self::new_info(id, name, None, Kind::Committed, labels) };
        if let Err(error) = self.store.insert(info, Change::Durable).await {
            self.lazy.remove(id);
            return Err(error);
        }
        if !of.lazy {
            self.writing.committed(id);
        }
        Ok(Link { id, lazy: of.lazy })
    }

    /// Gives the snapshot's `fs` to whom `owner` is outside.
    async fn own_mapped(&self, id: SnapshotId, owner: (u32, u32), maps: &IdMaps) -> Result<(), SnapshotError> {
        let none = || SnapshotError::NotMapped { id, why: format!("it has no id for {}:{}", owner.0, owner.1) };
        let (uid, gid) = maps.host(owner.0, owner.1).ok_or_else(none)?;
        self.disk.own_upper(id, uid, gid).await.map_err(|source| SnapshotError::Directory { id, source })
    }

    /// Forgets mapped layers on which no snapshot stands any more. Their directories are orphans from then on.
    pub(super) async fn forget_unused(&self) -> Result<(), SnapshotError> {
        let mapped = self.store.page(None, usize::MAX, &is_mapped)?;
        if mapped.is_empty() {
            return Ok(());
        }
        let _settled = self.mapping.lock().await;
        let mut used = HashSet::new();
        let users = |info: &Info| info.labels.contains_key(label::UID_MAPPING) && info.kind == Kind::Active;
        for info in self.store.page(None, usize::MAX, &users)? {
            // What cannot be read any more was accepted once: better too much kept than too little.
            let Ok(Some(maps)) = wanted(&info.labels) else { continue };
            used.extend(self.store.chain(info.parent.as_deref())?.iter().map(|link| name(link.id, &maps)));
        }
        for info in self.store.page(None, usize::MAX, &is_mapped)?.iter().filter(|info| !used.contains(&info.name)) {
            self.store.remove(&info.name, Change::Soon).await?;
        }
        Ok(())
    }
}
