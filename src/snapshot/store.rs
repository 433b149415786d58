//! Snapshot records in one transactional database.
//!
//! One thread owns all writing. It takes every change that is waiting into one transaction and commits once for all of them, so
//! that fifty layers prepared at the same time cost one sync of the disk and not fifty. A change either finds its
//! preconditions true and is applied whole, or touches nothing.
//!
//! ```text
//! records   name -> record (JSON)          in byte order, which is the order of List
//! names     id -> name
//! children  (parent id, child id) -> ()
//! facts     schema, next-id, first-id, imported
//! imported  id -> ()                       what a Go snapshotter had given out
//! unwritten id -> boot                     committed in that boot, and not known to be on disk (see `written`)
//! ```
//!
//! Invariant: `names` and `children` follow from `records`; all three change in one transaction.
//! Invariant: a file that is not a database of ours is reported and left as it is.

use super::error::{SnapshotError, StoreError};
use super::mapped;
use super::model::{BootId, Info, Kind, Labels, Timestamp, Usage, label};
use super::record;
use super::takeover::Import;
use crate::layout::SnapshotId;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use std::collections::HashSet;
use std::io;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot};

const RECORDS: TableDefinition<&str, &[u8]> = TableDefinition::new("records");
const NAMES: TableDefinition<u32, &str> = TableDefinition::new("names");
const CHILDREN: TableDefinition<(u32, u32), ()> = TableDefinition::new("children");
const FACTS: TableDefinition<&str, u64> = TableDefinition::new("facts");

/// Not in databases of before there was a takeover; those of a node that was not taken over need not have it.
const IMPORTED: TableDefinition<u32, ()> = TableDefinition::new("imported");

/// Not in databases of versions that did not know it: those have no such marks.
const UNWRITTEN: TableDefinition<u32, u128> = TableDefinition::new("unwritten");

const SCHEMA: &str = "schema";
const NEXT_ID: &str = "next-id";
/// The first number this database ever gave out. Directories with smaller ones are somebody else's.
const FIRST_ID: &str = "first-id";
/// The transaction of the Go snapshotter's database that was taken over.
const IMPORTED_AT: &str = "imported";
/// Schema of this version.
const SCHEMA_VERSION: u64 = 1;

/// Memory for pages. The database of a node with 10,000 snapshots has some 20 MB, most of which nobody reads twice.
const CACHE_BYTES: usize = 4 << 20;
/// Changes waiting for the writer. More make their callers wait.
const QUEUE: usize = 256;
/// Changes in one transaction: bounds how long the first waits for the last.
const BATCH: usize = 64;
/// Longest parent chain. Overlay mounts with more than 500 lower directories cannot be made anyway.
const MAX_CHAIN: usize = 1024;

/// When a change has to be on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Before the call returns.
    Durable,
    /// With the next durable change; a crash may lose it.
    Soon,
}

/// A snapshot in a parent chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub id: SnapshotId,
    pub lazy: bool,
}

/// What Update may change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelUpdate {
    /// All labels become these.
    Replace(Labels),
    /// These labels change, the others stay.
    Set(Labels),
}

type Outcome = Box<dyn FnOnce(Result<(), StoreError>) + Send>;
type Apply = Box<dyn FnOnce(&mut Tables<'_>) -> Result<Outcome, StoreError> + Send>;

struct Job {
    change: Change,
    apply: Apply,
}

/// The records. Dropping it ends the writer and releases the file.
pub struct Store {
    db: Arc<Database>,
    /// `None` only while being dropped.
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    next_id: AtomicU32,
    ours: Ours,
    /// What is committed is marked with it; `None`: not at all.
    boot: Option<BootId>,
}

/// Which numbers are ours.
struct Ours {
    /// All from this one on.
    first: u32,
    /// And these, which came with a takeover.
    imported: HashSet<u32>,
    imported_at: Option<u64>,
}

/// What [`Store::open`] finds out before there is a writer.
struct Opened {
    db: Database,
    next: u64,
    ours: Ours,
}

impl Drop for Store {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has already failed its callers.
            let _ = writer.join();
        }
    }
}

/// The tables of one write transaction.
pub(super) struct Tables<'txn> {
    records: redb::Table<'txn, &'static str, &'static [u8]>,
    names: redb::Table<'txn, u32, &'static str>,
    children: redb::Table<'txn, (u32, u32), ()>,
    facts: redb::Table<'txn, &'static str, u64>,
    unwritten: redb::Table<'txn, u32, u128>,
}

impl<'txn> Tables<'txn> {
    fn open(txn: &'txn WriteTransaction) -> Result<Tables<'txn>, StoreError> {
        Ok(Tables {
            records: txn.open_table(RECORDS).map_err(StoreError::database)?,
            names: txn.open_table(NAMES).map_err(StoreError::database)?,
            children: txn.open_table(CHILDREN).map_err(StoreError::database)?,
            facts: txn.open_table(FACTS).map_err(StoreError::database)?,
            unwritten: txn.open_table(UNWRITTEN).map_err(StoreError::database)?,
        })
    }

    fn put(&mut self, info: &Info) -> Result<(), StoreError> {
        let bytes = record::encode(info)?;
        self.records.insert(info.name.as_str(), bytes.as_slice()).map_err(StoreError::database)?;
        self.names.insert(info.id.0, info.name.as_str()).map_err(StoreError::database)?;
        Ok(())
    }

    fn take(&mut self, name: &str) -> Result<(), StoreError> {
        self.records.remove(name).map_err(StoreError::database)?;
        Ok(())
    }

    /// The snapshot was committed just now. The files of a lazy layer are the layer store's, which looks after them itself.
    fn mark(&mut self, info: &Info, boot: Option<BootId>) -> Result<(), StoreError> {
        if let Some(boot) = boot
            && info.kind == Kind::Committed
            && !info.is_lazy()
        {
            self.unwritten.insert(info.id.0, boot.0).map_err(StoreError::database)?;
        }
        Ok(())
    }

    fn unmark(&mut self, id: SnapshotId) -> Result<(), StoreError> {
        self.unwritten.remove(id.0).map_err(StoreError::database)?;
        Ok(())
    }

    /// The numbers of the snapshots on `id`.
    fn children_of(&self, id: SnapshotId) -> Result<Vec<u32>, StoreError> {
        let range = self.children.range((id.0, 0)..=(id.0, u32::MAX)).map_err(StoreError::database)?;
        range.map(|entry| entry.map(|(pair, _)| pair.value().1).map_err(StoreError::database)).collect()
    }

    /// The record is gone: its number, its mark, and its place under its parent with it.
    fn forget(&mut self, info: &Info) -> Result<(), StoreError> {
        if let Some(parent) = &info.parent {
            let missing = || StoreError::Inconsistent(format!("parent {parent:?} of {:?} is missing", info.name));
            let parent = get(&self.records, parent)?.ok_or_else(missing)?;
            self.children.remove((parent.id.0, info.id.0)).map_err(StoreError::database)?;
        }
        self.take(&info.name)?;
        self.names.remove(info.id.0).map_err(StoreError::database)?;
        self.unmark(info.id)
    }

    /// The number `id` is taken: the next one is above it.
    fn above(&mut self, id: SnapshotId) -> Result<(), StoreError> {
        let next = self.facts.get(NEXT_ID).map_err(StoreError::database)?.map_or(0, |next| next.value());
        let next = next.max(u64::from(id.0) + 1);
        self.facts.insert(NEXT_ID, next).map_err(StoreError::database)?;
        Ok(())
    }
}

fn get(records: &impl ReadableTable<&'static str, &'static [u8]>, name: &str) -> Result<Option<Info>, StoreError> {
    let bytes = records.get(name).map_err(StoreError::database)?;
    bytes.map(|bytes| record::decode(name, bytes.value())).transpose()
}

/// `parent` and its ancestors, nearest first. `parent` must be committed.
fn chain(
    records: &impl ReadableTable<&'static str, &'static [u8]>,
    parent: Option<&str>,
) -> Result<Vec<Link>, SnapshotError> {
    let mut out = Vec::new();
    let mut next = parent.map(str::to_owned);
    while let Some(name) = next {
        let info = match get(records, &name)? {
            Some(info) => info,
            None if out.is_empty() => return Err(SnapshotError::ParentNotFound(name)),
            None => return Err(StoreError::Inconsistent(format!("parent {name:?} is missing")).into()),
        };
        if info.kind != Kind::Committed {
            return Err(SnapshotError::ParentNotCommitted(name));
        }
        if out.len() == MAX_CHAIN {
            return Err(StoreError::Inconsistent(format!("more than {MAX_CHAIN} parents")).into());
        }
        out.push(Link { id: info.id, lazy: info.labels.contains_key(label::REMOTE) });
        next = info.parent;
    }
    Ok(out)
}

impl Store {
    /// Opens the database, or makes one where there is none, of what `import` gives. `floor` is above every snapshot directory that exists.
    /// `settle` is called before anything becomes durable: what the records name is to be so first. What is committed is marked with `boot`.
    pub fn open(
        path: &Path,
        floor: u32,
        boot: Option<BootId>,
        import: impl FnOnce() -> Result<Option<Import>, StoreError>,
        settle: impl Fn() -> io::Result<()> + Send + 'static,
    ) -> Result<Store, StoreError> {
        match std::fs::symlink_metadata(path) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => create(path, floor, import()?.as_ref())?,
            Err(source) => return Err(StoreError::File { path: path.into(), source }),
        }
        // redb checks what it reads but may panic on a damaged file; the operator is owed a message.
        let opened = std::panic::catch_unwind(|| open_existing(path));
        let damaged = |what: &str| StoreError::Damaged { path: path.into(), what: what.into() };
        let Opened { db, next, ours } = opened.unwrap_or_else(|_| Err(damaged("its pages make no sense")))?;
        let next = u32::try_from(next).map_err(|_| damaged("its next snapshot number is too large"))?;
        if next < floor {
            // A crash lost a number that a directory has: without this the number would come again once that is swept.
            let txn = db.begin_write().map_err(StoreError::database)?;
            Tables::open(&txn)?.facts.insert(NEXT_ID, u64::from(floor)).map_err(StoreError::database)?;
            txn.commit().map_err(StoreError::database)?;
        }
        let db = Arc::new(db);
        let (jobs, queue) = mpsc::channel(QUEUE);
        let writer = std::thread::Builder::new().name("snapshot-store".into()).spawn({
            let db = db.clone();
            move || write_loop(&db, &settle, queue)
        });
        let writer = writer.map_err(|source| StoreError::File { path: path.into(), source })?;
        let next_id = AtomicU32::new(next.max(floor).max(1));
        Ok(Store { db, jobs: Some(jobs), writer: Some(writer), next_id, ours, boot })
    }

    /// A number that no snapshot ever had.
    pub fn allocate(&self) -> Result<SnapshotId, SnapshotError> {
        let next = self.next_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |id| id.checked_add(1));
        next.map(SnapshotId).map_err(|_| SnapshotError::IdsExhausted)
    }

    /// Whether a directory with this number is ours to remove.
    pub fn is_ours(&self, id: SnapshotId) -> bool {
        id.0 >= self.ours.first || self.ours.imported.contains(&id.0)
    }

    /// The transaction of the Go snapshotter's database that was taken over, if one was.
    pub fn imported_at(&self) -> Option<u64> {
        self.ours.imported_at
    }

    fn records(&self) -> Result<redb::ReadOnlyTable<&'static str, &'static [u8]>, StoreError> {
        let txn = self.db.begin_read().map_err(StoreError::database)?;
        txn.open_table(RECORDS).map_err(StoreError::database)
    }

    /// The snapshot `name`, if there is one.
    pub fn find(&self, name: &str) -> Result<Option<Info>, StoreError> {
        get(&self.records()?, name)
    }

    /// The snapshot `name`.
    pub fn get(&self, name: &str) -> Result<Info, SnapshotError> {
        self.find(name)?.ok_or_else(|| SnapshotError::NotFound(name.to_owned()))
    }

    /// `parent` and its ancestors, nearest first.
    pub fn chain(&self, parent: Option<&str>) -> Result<Vec<Link>, SnapshotError> {
        chain(&self.records()?, parent)
    }

    /// The snapshot `name` and its ancestors, from one moment.
    pub fn with_chain(&self, name: &str) -> Result<(Info, Vec<Link>), SnapshotError> {
        let records = self.records()?;
        let info = get(&records, name)?.ok_or_else(|| SnapshotError::NotFound(name.to_owned()))?;
        let parents = chain(&records, info.parent.as_deref())?;
        Ok((info, parents))
    }

    /// Up to `limit` snapshots that `wanted` accepts, after the name `after`, in byte order of their names.
    pub fn page(
        &self,
        after: Option<&str>,
        limit: usize,
        wanted: &dyn Fn(&Info) -> bool,
    ) -> Result<Vec<Info>, StoreError> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let records = self.records()?;
        let range = records.range::<&str>((from, Bound::Unbounded)).map_err(StoreError::database)?;
        let mut out = Vec::new();
        for entry in range {
            let (name, bytes) = entry.map_err(StoreError::database)?;
            let info = record::decode(name.value(), bytes.value())?;
            if wanted(&info) {
                out.push(info);
                if out.len() == limit {
                    break;
                }
            }
        }
        Ok(out)
    }

    /// Numbers of all snapshots.
    pub fn ids(&self) -> Result<HashSet<u32>, StoreError> {
        let txn = self.db.begin_read().map_err(StoreError::database)?;
        let names = txn.open_table(NAMES).map_err(StoreError::database)?;
        let ids = names.iter().map_err(StoreError::database)?;
        ids.map(|entry| entry.map(|(id, _)| id.value()).map_err(StoreError::database)).collect()
    }

    /// The name of a snapshot.
    pub fn name(&self, id: SnapshotId) -> Result<Option<String>, StoreError> {
        let txn = self.db.begin_read().map_err(StoreError::database)?;
        let names = txn.open_table(NAMES).map_err(StoreError::database)?;
        Ok(names.get(id.0).map_err(StoreError::database)?.map(|name| name.value().to_owned()))
    }

    /// Snapshots that were committed and are not known to be on disk, and the boots in which they were.
    pub fn unwritten(&self) -> Result<Vec<(SnapshotId, BootId)>, StoreError> {
        let txn = self.db.begin_read().map_err(StoreError::database)?;
        let marks = match txn.open_table(UNWRITTEN) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            marks => marks.map_err(StoreError::database)?,
        };
        let names = txn.open_table(NAMES).map_err(StoreError::database)?;
        let mut out = Vec::new();
        for mark in marks.iter().map_err(StoreError::database)? {
            let (id, boot) = mark.map_err(StoreError::database)?;
            // A version that knows no marks may have removed the snapshot.
            if names.get(id.value()).map_err(StoreError::database)?.is_some() {
                out.push((SnapshotId(id.value()), BootId(boot.value())));
            }
        }
        Ok(out)
    }

    /// Applies `change` in a transaction. An error that is not the store's leaves no trace and harms nobody else.
    async fn write<T: Send + 'static>(
        &self,
        change: Change,
        apply: impl FnOnce(&mut Tables<'_>) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, SnapshotError> {
        let (answer, done) = oneshot::channel();
        let apply: Apply = Box::new(move |tables| {
            let result = match apply(tables) {
                // Half of the change may be in the transaction: nobody may commit it. Every other error comes before the
                // first change, so the transaction is still good for the others.
                Err(SnapshotError::Store(StoreError::Database(error))) => {
                    let message = error.to_string();
                    let _ = answer.send(Err(StoreError::Database(error).into()));
                    return Err(StoreError::Batch(message));
                }
                other => other,
            };
            Ok(Box::new(move |committed: Result<(), StoreError>| {
                // A caller that went away does not need the answer.
                let _ = answer.send(committed.map_err(SnapshotError::from).and(result));
            }))
        });
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        jobs.send(Job { change, apply }).await.map_err(|_| StoreError::Closed)?;
        done.await.map_err(|_| StoreError::Closed)?
    }

    /// Makes everything that was answered so far durable.
    pub async fn sync(&self) -> Result<(), SnapshotError> {
        self.write(Change::Durable, |_| Ok(())).await
    }

    /// A new snapshot. Its parent must be committed, its name free.
    pub async fn insert(&self, info: Info, change: Change) -> Result<(), SnapshotError> {
        let boot = self.boot;
        let insert = move |tables: &mut Tables<'_>| {
            let parents = chain(&tables.records, info.parent.as_deref())?;
            if get(&tables.records, &info.name)?.is_some() {
                return Err(SnapshotError::AlreadyExists(info.name));
            }
            tables.put(&info)?;
            tables.mark(&info, boot)?;
            if let Some(parent) = parents.first() {
                tables.children.insert((parent.id.0, info.id.0), ()).map_err(StoreError::database)?;
            }
            Ok(tables.above(info.id)?)
        };
        self.write(change, insert).await
    }

    /// A Committed snapshot that was never active, in place of the Active snapshot `key` that was made for it.
    pub async fn replace(&self, key: &str, info: Info) -> Result<(), SnapshotError> {
        let (key, boot) = (key.to_owned(), self.boot);
        let replace = move |tables: &mut Tables<'_>| {
            let parents = chain(&tables.records, info.parent.as_deref())?;
            if get(&tables.records, &info.name)?.is_some() {
                return Err(SnapshotError::AlreadyExists(info.name));
            }
            let Some(active) = get(&tables.records, &key)? else { return Err(SnapshotError::NotFound(key)) };
            if active.kind != Kind::Active {
                return Err(SnapshotError::NotActive(key));
            }
            tables.put(&info)?;
            tables.mark(&info, boot)?;
            tables.take(&key)?;
            tables.names.remove(active.id.0).map_err(StoreError::database)?;
            if let Some(parent) = parents.first() {
                tables.children.insert((parent.id.0, info.id.0), ()).map_err(StoreError::database)?;
                tables.children.remove((parent.id.0, active.id.0)).map_err(StoreError::database)?;
            }
            Ok(tables.above(info.id)?)
        };
        self.write(Change::Durable, replace).await
    }

    /// The Committed snapshot `name` has its content in the directory `to` from now on. What was made of the content that it had is forgotten.
    pub async fn renumber(&self, name: &str, to: SnapshotId, usage: Usage) -> Result<(), SnapshotError> {
        let (name, boot) = (name.to_owned(), self.boot);
        let renumber = move |tables: &mut Tables<'_>| {
            let Some(old) = get(&tables.records, &name)? else { return Err(SnapshotError::NotFound(name)) };
            let parent = chain(&tables.records, old.parent.as_deref())?.first().map(|link| link.id);
            let of_it: Vec<Info> = mapped::of(old.id, &tables.records)?;
            let children = tables.children_of(old.id)?;
            for copy in of_it {
                tables.forget(&copy)?;
            }
            tables.names.remove(old.id.0).map_err(StoreError::database)?;
            tables.unmark(old.id)?;
            for child in children {
                tables.children.remove((old.id.0, child)).map_err(StoreError::database)?;
                tables.children.insert((to.0, child), ()).map_err(StoreError::database)?;
            }
            if let Some(parent) = parent {
                tables.children.remove((parent.0, old.id.0)).map_err(StoreError::database)?;
                tables.children.insert((parent.0, to.0), ()).map_err(StoreError::database)?;
            }
            let info = Info { id: to, usage, ..old };
            tables.put(&info)?;
            tables.mark(&info, boot)?;
            Ok(tables.above(to)?)
        };
        self.write(Change::Durable, renumber).await
    }

    /// These snapshots are on disk.
    pub async fn written(&self, ids: Vec<SnapshotId>) -> Result<(), SnapshotError> {
        let written = move |tables: &mut Tables<'_>| Ok(ids.into_iter().try_for_each(|id| tables.unmark(id))?);
        self.write(Change::Durable, written).await
    }

    /// The Active snapshot `key` becomes the Committed snapshot `name`.
    pub async fn commit(
        &self,
        key: &str,
        name: &str,
        labels: Labels,
        usage: Usage,
        now: Timestamp,
    ) -> Result<(), SnapshotError> {
        let (key, name, boot) = (key.to_owned(), name.to_owned(), self.boot);
        let commit = move |tables: &mut Tables<'_>| {
            if get(&tables.records, &name)?.is_some() {
                return Err(SnapshotError::AlreadyExists(name));
            }
            let Some(active) = get(&tables.records, &key)? else { return Err(SnapshotError::NotFound(key)) };
            if active.kind != Kind::Active {
                return Err(SnapshotError::NotActive(key));
            }
            let kind = Kind::Committed;
            let info = Info { name, kind, labels, usage, created: now, updated: now, ..active };
            tables.put(&info)?;
            tables.mark(&info, boot)?;
            tables.take(&key)?;
            Ok(())
        };
        self.write(Change::Durable, commit).await
    }

    /// Removes the record of `key`, which must have no children.
    pub async fn remove(&self, key: &str, change: Change) -> Result<Info, SnapshotError> {
        let key = key.to_owned();
        let remove = move |tables: &mut Tables<'_>| {
            let Some(info) = get(&tables.records, &key)? else { return Err(SnapshotError::NotFound(key)) };
            if !tables.children_of(info.id)?.is_empty() {
                return Err(SnapshotError::HasChildren(key));
            }
            tables.forget(&info)?;
            Ok(info)
        };
        self.write(change, remove).await
    }

    /// Changes labels of `name`.
    pub async fn update(&self, name: &str, update: LabelUpdate, now: Timestamp) -> Result<Info, SnapshotError> {
        let name = name.to_owned();
        let update = move |tables: &mut Tables<'_>| {
            let Some(mut info) = get(&tables.records, &name)? else { return Err(SnapshotError::NotFound(name)) };
            match update {
                LabelUpdate::Replace(labels) => info.labels = labels,
                LabelUpdate::Set(labels) => info.labels.extend(labels),
            }
            info.updated = now;
            tables.put(&info)?;
            Ok(info)
        };
        self.write(Change::Durable, update).await
    }
}

/// Makes an empty database beside `path` and moves it there, so that a file at `path` was whole once.
fn create(path: &Path, floor: u32, import: Option<&Import>) -> Result<(), StoreError> {
    let file = |source| StoreError::File { path: path.into(), source };
    let new = path.with_extension("redb.new");
    match std::fs::remove_file(&new) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(file(e)),
        _ => {}
    }
    let db = Database::builder().set_cache_size(CACHE_BYTES).create(&new).map_err(StoreError::database)?;
    let txn = db.begin_write().map_err(StoreError::database)?;
    {
        let mut tables = Tables::open(&txn)?;
        let first = import.map_or(floor, |import| floor.max(import.last_id.saturating_add(1)));
        for (fact, value) in [(SCHEMA, SCHEMA_VERSION), (NEXT_ID, first.into()), (FIRST_ID, first.into())] {
            tables.facts.insert(fact, value).map_err(StoreError::database)?;
        }
        if let Some(import) = import {
            tables.facts.insert(IMPORTED_AT, import.transaction).map_err(StoreError::database)?;
            let mut imported = txn.open_table(IMPORTED).map_err(StoreError::database)?;
            for info in &import.infos {
                if let Some(name) = &info.parent {
                    let missing = || StoreError::Inconsistent(format!("parent {name:?} is missing"));
                    let parent = get(&tables.records, name)?.ok_or_else(missing)?;
                    tables.children.insert((parent.id.0, info.id.0), ()).map_err(StoreError::database)?;
                }
                tables.put(info)?;
                imported.insert(info.id.0, ()).map_err(StoreError::database)?;
            }
        }
    }
    txn.commit().map_err(StoreError::database)?;
    drop(db);
    std::fs::rename(&new, path).map_err(file)?;
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(file)
}

fn open_existing(path: &Path) -> Result<Opened, StoreError> {
    use redb::{DatabaseError, StorageError, TableError};
    let damaged = |what: String| StoreError::Damaged { path: path.into(), what };
    let db = match Database::builder().set_cache_size(CACHE_BYTES).open(path) {
        Ok(db) => db,
        Err(DatabaseError::DatabaseAlreadyOpen) => return Err(StoreError::InUse { path: path.into() }),
        Err(DatabaseError::Storage(StorageError::Corrupted(what))) => return Err(damaged(what)),
        Err(DatabaseError::Storage(StorageError::Io(e)))
            if matches!(e.kind(), std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof) =>
        {
            return Err(damaged(e.to_string()));
        }
        Err(e) => return Err(StoreError::database(e)),
    };
    let txn = db.begin_read().map_err(StoreError::database)?;
    let facts = txn.open_table(FACTS).map_err(|e| damaged(e.to_string()))?;
    let optional = |name: &str| -> Result<Option<u64>, StoreError> {
        Ok(facts.get(name).map_err(StoreError::database)?.map(|value| value.value()))
    };
    let fact = |name: &str| optional(name)?.ok_or_else(|| damaged(format!("it does not say its {name}")));
    let found = fact(SCHEMA)?;
    if found > SCHEMA_VERSION {
        return Err(StoreError::Newer { path: path.into(), found, known: SCHEMA_VERSION });
    }
    let first = u32::try_from(fact(FIRST_ID)?).map_err(|_| damaged("its first number is too large".into()))?;
    let next = fact(NEXT_ID)?;
    txn.open_table(RECORDS).map_err(|e| damaged(e.to_string()))?;
    txn.open_table(NAMES).map_err(|e| damaged(e.to_string()))?;
    txn.open_table(CHILDREN).map_err(|e| damaged(e.to_string()))?;
    let imported_at = optional(IMPORTED_AT)?;
    let imported = match txn.open_table(IMPORTED) {
        Ok(table) => {
            let ids = table.iter().map_err(StoreError::database)?;
            ids.map(|entry| entry.map(|(id, _)| id.value()).map_err(StoreError::database)).collect::<Result<_, _>>()?
        }
        Err(TableError::TableDoesNotExist(_)) => HashSet::new(),
        Err(e) => return Err(damaged(e.to_string())),
    };
    drop((facts, txn));
    Ok(Opened { db, next, ours: Ours { first, imported, imported_at } })
}

/// Applies what is waiting, commits, answers; until nobody can send any more.
fn write_loop(db: &Database, settle: &dyn Fn() -> io::Result<()>, mut queue: mpsc::Receiver<Job>) {
    while let Some(first) = queue.blocking_recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH
            && let Ok(job) = queue.try_recv()
        {
            batch.push(job);
        }
        let mut outcomes = Vec::with_capacity(batch.len());
        let committed = write_batch(db, settle, batch, &mut outcomes);
        let failed = committed.err().map(|error| error.to_string());
        for outcome in outcomes {
            outcome(failed.clone().map_or(Ok(()), |error| Err(StoreError::Batch(error))));
        }
    }
}

/// One transaction. Jobs that are dropped unapplied answer "closed" by dropping their channel.
fn write_batch(
    db: &Database,
    settle: &dyn Fn() -> io::Result<()>,
    batch: Vec<Job>,
    outcomes: &mut Vec<Outcome>,
) -> Result<(), StoreError> {
    let durable = batch.iter().any(|job| job.change == Change::Durable);
    if durable {
        settle().map_err(StoreError::Unsettled)?;
    }
    let mut txn = db.begin_write().map_err(StoreError::database)?;
    let durability = if durable { Durability::Immediate } else { Durability::None };
    txn.set_durability(durability).map_err(StoreError::database)?;
    {
        let mut tables = Tables::open(&txn)?;
        for job in batch {
            outcomes.push((job.apply)(&mut tables)?);
        }
    }
    txn.commit().map_err(StoreError::database)
}
